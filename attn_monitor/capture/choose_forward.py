"""Choose how to call a model: take the first forward under which the requested rows can be read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from attn_monitor.capture.find_axes import axes_of, taking_channels_first
from attn_monitor.capture.image_channels import channels_that_run
from attn_monitor.capture.layer_selection import Layers, QuerySpec, select_sites
from attn_monitor.capture.masked_models import (
    empty_flat_mask_forward,
    empty_mask_forward,
    features_forward,
    unmasked_forward,
)
from attn_monitor.capture.observe.forward import Forward, default_forward, is_sharded
from attn_monitor.capture.other_shapes import shape_that_runs
from attn_monitor.capture.site_cache import Conditions, Known, sites_of
from attn_monitor.capture.sites import Site
from attn_monitor.errors import ArgumentError, AttentionError, ForwardError, InputTypeError, LayerError, QueryError
from attn_monitor.image_axes import ImageAxes, parse_axes


@dataclass(frozen=True)
class ForwardOption:
    """Pair a way to call a model with the note that its maps carry."""

    forward: Forward
    note: str = ""


_EMPTY = "it asks for a mask of patches, and is looked at with an empty one"

FORWARD_OPTIONS = (
    ForwardOption(default_forward),
    ForwardOption(
        unmasked_forward,
        "it masks patches at random, and is looked at with all of them (mask_ratio=0, no shuffling)",
    ),
    ForwardOption(empty_mask_forward, _EMPTY),
    ForwardOption(empty_flat_mask_forward, _EMPTY),
    ForwardOption(features_forward, "its own forward gives no map, so it is looked at by forward_features"),
)
"""The forwards to try, in this order, if the user gives none."""


def forward_options(forward: Forward | Sequence[ForwardOption] | None) -> tuple[ForwardOption, ...]:
    """Return the forwards to try: those given, else `FORWARD_OPTIONS`; raise `ArgumentError` for anything else."""
    if forward is None:
        return FORWARD_OPTIONS
    options = [ForwardOption(forward)] if callable(forward) else forward
    if not isinstance(options, (list, tuple)) or not options or not all(isinstance(o, ForwardOption) for o in options):
        raise ArgumentError(f"forward={forward!r}: expected a function of (model, images), or None for model(images)")
    return tuple(options)


@dataclass(frozen=True)
class Discovery:
    """Hold every attention site of a model under one forward, valid while the conditions stay the same."""

    option: ForwardOption
    known: Known

    @property
    def axes(self) -> ImageAxes:
        """Return the names of the images' dimensions, in the order in which the model takes them."""
        return self.known.conditions.axes

    def covers(self, images: Tensor, structure: int) -> bool:
        """Return whether it holds for images in the order that the model takes."""
        same = images.ndim == 1 + len(self.axes.names)
        return same and self.known.cover(Conditions.of(images, self.axes, structure))

    @property
    def forward(self) -> Forward:
        """Return the forward, for images (B, C, *size)."""
        return taking_channels_first(self.option.forward, self.axes)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Return all sites in order of execution."""
        return self.known.sites


def find_discovery(
    model: nn.Module,
    images: Tensor,
    axes: str | None,
    options: Sequence[ForwardOption],
    structure: int,
    *,
    layers: Layers,
    query: QuerySpec,
) -> Discovery:
    """Discover the sites on images in the order that the model takes, see `choose_forward`.

    Where no layer can be read, and several keys hold each patch, groups of channels are one more axis of the image.

    Args:
        model: The model to run.
        images: (B, …) on the model's device, in its dtype.
        axes: Names of their dimensions, None to ask the model.
        options: The forwards to try.
        structure: The model's `structure_of`.
        layers: The requested layers.
        query: The requested query.
    """

    def under(axes: ImageAxes) -> Discovery:
        conditions = Conditions.of(images, axes, structure)
        return choose_forward(model, axes.channels_first(images), options, conditions, layers, query)

    try:
        first = parse_axes(axes, images) or axes_of(model, images, [option.forward for option in options])
        found = under(first)
    except (ForwardError, InputTypeError) as error:
        by_itself = options[0].forward is default_forward and not is_sharded(model)
        if not by_itself:
            raise
        way = shape_that_runs(model, images) or (channels_that_run(model, images) if images.ndim == 4 else "")
        if not way:
            raise
        if isinstance(error, InputTypeError):
            raise InputTypeError(f"{error}. {way}") from error.__cause__
        failure = ForwardError(f"{error.failed or error}. {way}")  # without the usual remedy, which is another
        failure.batch = error.batch
        raise failure from error.__cause__
    groups = next((site.places.channel_groups for site in found.sites if site.places.channel_groups), ())
    readable = any(site.layout is not None for site in found.sites)
    if axes is not None or first.channel is None or readable or not groups:
        return found
    apart = under(first.with_groups(groups))
    return apart if any(site.layout is not None for site in apart.sites) else found


def choose_forward(
    model: nn.Module,
    images: Tensor,
    options: Sequence[ForwardOption],
    conditions: Conditions,
    layers: Layers,
    query: QuerySpec,
) -> Discovery:
    """Discover the sites by the first option under which the requested rows can be read, else by the first option.

    Args:
        model: The model to run.
        images: (B, C, *size) on the model's device, in its dtype.
        options: The forwards to try, in order; only the first one for a sharded model.
        conditions: Those under which the result stays valid.
        layers: The requested layers.
        query: The requested query.

    Raises:
        AttentionError: The first option found no site and no other option can read the requested rows.
    """
    # All processes must run a sharded model the same number of times, and a failure may be local to one of them.
    options = options[:1] if is_sharded(model) else options
    trials = (_try(model, images, option, conditions, layers, query) for option in options)
    first = next(trials)
    others = trials if first.problem is not None else ()  # it may need other arguments
    chosen = next((trial for trial in itertools.chain([first], others) if trial.problem is None), first)
    if isinstance(chosen.found, AttentionError):
        raise chosen.found
    return chosen.found


class _Trial(NamedTuple):
    """Hold the sites that a forward gave, else its error, and the problem with the requested rows."""

    found: Discovery | AttentionError
    problem: AttentionError | None = None


def _try(
    model: nn.Module,
    images: Tensor,
    option: ForwardOption,
    conditions: Conditions,
    layers: Layers,
    query: QuerySpec,
) -> _Trial:
    try:
        found = Discovery(option, sites_of(model, images, option.forward, conditions))
    except AttentionError as error:
        return _Trial(error, error)
    try:
        select_sites(found.sites, layers, query)
    except (LayerError, QueryError):  # independent of the forward
        pass
    except AttentionError as error:
        return _Trial(found, error)
    return _Trial(found)
