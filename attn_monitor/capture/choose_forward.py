"""Choose how to call a model: by the first forward under which what is asked for can be read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from attn_monitor.capture.forward import Forward, default_forward, is_sharded
from attn_monitor.capture.layer_selection import Layers, QuerySpec, select_sites
from attn_monitor.capture.masked_models import (
    empty_flat_mask_forward,
    empty_mask_forward,
    features_forward,
    unmasked_forward,
)
from attn_monitor.capture.site_cache import Conditions, Known, sites_of
from attn_monitor.capture.sites import Site
from attn_monitor.errors import ArgumentError, AttentionError, LayerError, QueryError


@dataclass(frozen=True)
class ForwardOption:
    """A way to call a model, and what has to be said about maps that were made so."""

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
"""Tried in this order where the user has not said how to call a model."""


def forward_options(forward: Forward | Sequence[ForwardOption] | None) -> tuple[ForwardOption, ...]:
    """The ways to call a model that are tried: the user's one, several, or all that there are."""
    if forward is None:
        return FORWARD_OPTIONS
    options = [ForwardOption(forward)] if callable(forward) else forward
    if not isinstance(options, (list, tuple)) or not options or not all(isinstance(o, ForwardOption) for o in options):
        raise ArgumentError(f"forward={forward!r}: expected a function of (model, images), or None for model(images)")
    return tuple(options)


@dataclass(frozen=True)
class Discovery:
    """Every attention site of a model, under one way to call it and as long as the conditions stay the same."""

    option: ForwardOption
    known: Known

    @property
    def sites(self) -> tuple[Site, ...]:
        """In order of execution."""
        return self.known.sites


def choose_forward(
    model: nn.Module,
    images: Tensor,
    options: Sequence[ForwardOption],
    conditions: Conditions,
    layers: Layers,
    query: QuerySpec,
) -> Discovery:
    """The discovery by the first option that gives what is asked for, else by the first option."""
    # Sharded models run together in all processes, and a failure may be one process's alone.
    options = options[:1] if is_sharded(model) else options
    trials = (_try(model, images, option, conditions, layers, query) for option in options)
    first = next(trials)
    others = trials if first.problem is not None else ()  # it cannot be read, or failed: it may want other arguments
    chosen = next((trial for trial in itertools.chain([first], others) if trial.problem is None), first)
    if isinstance(chosen, _Failure):
        raise chosen.problem
    return chosen.discovery


@dataclass(frozen=True)
class _Failure:
    """A forward under which no site could be discovered."""

    problem: AttentionError


@dataclass(frozen=True)
class _Trial:
    """What a forward gave, and what is wrong with that."""

    discovery: Discovery
    problem: AttentionError | None = None


def _try(
    model: nn.Module,
    images: Tensor,
    option: ForwardOption,
    conditions: Conditions,
    layers: Layers,
    query: QuerySpec,
) -> _Trial | _Failure:
    try:
        discovery = Discovery(option, sites_of(model, images, option.forward, conditions))
    except AttentionError as error:
        return _Failure(error)
    try:
        select_sites(discovery.sites, layers, query)
    except (LayerError, QueryError):  # another forward would not change that
        return _Trial(discovery)
    except AttentionError as error:
        return _Trial(discovery, error)
    return _Trial(discovery)
