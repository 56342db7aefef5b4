"""Run a model on images and record its attention, once (`record_attention`) or repeatedly (`AttentionRecorder`).

A first forward on noise images discovers every attention site, its token layout, or the reason why it cannot be read.
Later forwards watch the requested modules only, and are left after the last of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.choose_forward import Discovery, ForwardOption, find_discovery, forward_options
from attn_monitor.capture.every_query import EveryQueryOf, check_every_query
from attn_monitor.capture.inputs import check_finite, check_images, check_model
from attn_monitor.capture.layer_selection import (
    Layers,
    QuerySpec,
    check_layers,
    check_query,
    counts_from_end,
    encoder_of,
    left_out,
    select_sites,
    stack_notes,
)
from attn_monitor.capture.observe.forward import Forward, check_materialised
from attn_monitor.capture.observe.isolation import isolated_forward, model_device_dtype
from attn_monitor.capture.recheck_places import places_hold
from attn_monitor.capture.recording import OnLayer, OtherLayersError, Recording
from attn_monitor.capture.recording_plan import ModelSummary, RecordingPlan, plan_recording
from attn_monitor.capture.site_cache import Doubt, forget, same_places, structure_of
from attn_monitor.capture.sites import Site, prefix_names
from attn_monitor.errors import ArgumentError, QueryError
from attn_monitor.grid import Grid

Verify = bool | Literal["first"]


def check_verify(verify: Verify | str) -> Verify:
    """Return a valid ``verify``; raise `ArgumentError` otherwise."""
    if isinstance(verify, bool) or (isinstance(verify, str) and verify == "first"):
        return verify  # type: ignore[return-value]
    raise ArgumentError(f'verify={verify!r}: expected True (every recording), "first" (and after changes) or False')


def record_attention(
    model: nn.Module,
    images: Tensor,
    *,
    layers: Layers = -1,
    query: QuerySpec = "cls",
    forward: Forward | None = None,
    verify: bool = True,
    axes: str | None = None,
) -> list[LayerAttention]:
    """Record a model's attention on images and leave the model as it was.

    With layers="all", layers that cannot be read are left out, and a warning lists them with the reasons. Another
    warning is given if a model that masks patches was run without masks.

    Args:
        model: The model, on any device.
        images: (B, C, H, W), normalised as for the model; or clips (B, C, T, H, W) or (B, T, C, H, W), volumes
            (B, C, D, H, W), spectrograms (B, F, T) or (B, T, F), in the order that the model takes.
        layers: An index in order of execution (negative from the encoder's end), a module path, a list of these, or
            "all" layers of the encoder. Select a second stack, such as an MAE's decoder, by its path or by indices.
        query: "cls", "mean" (average over all queries), ``(row, col)`` of a patch, or a token index.
        forward: How to call the model if not as ``model(images)``.
        verify: Compare row·V with the model's own output.
        axes: A letter for each dimension of an image, "c" for channels, such as "tchw" or "cdhw". None asks the model
            which dimension holds the channels.

    Returns:
        One entry per requested layer.

    Raises:
        AttentionError: A map would not show what the model computed; a subclass gives the kind of reason.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> (last,) = record_attention(model, torch.randn(1, 3, 32, 32))
        >>> last.layer, tuple(last.maps.shape)  # (images, heads, rows, columns)
        (1, (1, 2, 4, 4))
    """
    recorder = AttentionRecorder(model, layers=layers, query=query, forward=forward, verify=verify, axes=axes)
    recorded = recorder(images)
    if note := recorder.forward_note:
        warnings.warn(f"{type(recorder.model).__name__}: {note}", stacklevel=2)
    if reasons := recorder.left_out.values():
        lines = "".join(f"\n  {reason}" for reason in reasons)
        model_name = type(recorder.model).__name__
        warnings.warn(f'layers="all" leaves out {len(reasons)} of the layers of {model_name}:{lines}', stacklevel=2)
    return recorded


class AttentionRecorder:
    """Record the same layers repeatedly, and reuse what was discovered in the model.

    The discovery is repeated when the model's buffers, attributes, hooks, methods or forward change, or when the
    token-to-patch assignment, which is checked after 1, 2, 4, 8, … recordings, has changed. The latter gives a warning,
    since recordings after the previous check may be in the old order.

    Args:
        model: The model to record.
        layers: See `record_attention`.
        query: See `record_attention`.
        forward: How to call the model, or several options: the first that can read the requested rows is used.
        or_mean: Read query="mean" if the model has no CLS token; see `notes`.
        axes: See `record_attention`.
        verify: True checks every recording, "first" the first one and each after the model or image size changed, False
            none.
        nonfinite: "raise" refuses rows with NaN or infinity, "keep" returns them.
        distance: Measure the mean attention distance over all queries.
        tokens: Measure the norms and cosine similarities of the tokens that enter each block.
        patches: Keep the patch tokens of each requested layer, or of the last one for "all".
        logits: Measure the largest logit of the CLS query, and of every query in the layers of ``every_query``.
        sinks: Measure the norms of V, and the attention that keys receive in the layers of ``every_query``.
        every_query: The layers in which every query is read: "none", "last" or "all".
        follow: Check for changes before each recording. False leaves `doubt`, `check_places` and `ask_again` to the
            caller, for processes that must agree on them.

    Raises:
        ArgumentError: An argument is invalid.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> recorder = AttentionRecorder(model, layers="all")
        >>> [tuple(layer.rows.shape) for layer in recorder(torch.randn(1, 3, 32, 32))]
        [(1, 2, 17), (1, 2, 17)]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        forward: Forward | Sequence[ForwardOption] | None = None,
        or_mean: bool = False,
        axes: str | None = None,
        verify: Verify = True,
        nonfinite: str = "raise",
        distance: bool = False,
        tokens: bool = False,
        patches: bool = False,
        logits: bool = False,
        sinks: bool = False,
        every_query: EveryQueryOf = "none",
        follow: bool = True,
    ) -> None:
        self.model = check_model(model)
        self.layers, self.query, self.or_mean = check_layers(layers), check_query(query), or_mean
        if nonfinite not in ("raise", "keep"):
            raise ArgumentError(f'nonfinite={nonfinite!r}: expected "raise" or "keep"')
        self.verify = check_verify(verify)
        self._recording = Recording(
            self.layers, nonfinite, distance, tokens, patches, logits, sinks, check_every_query(every_query)
        )
        self._follow, self._axes = follow, axes
        self._options = forward_options(forward)
        self._discovery: Discovery | None = None
        self._plan: RecordingPlan | None = None
        self._verified = False

    @property
    def forward_note(self) -> str:
        """Return a note on how the model was called; "" for ``model(images)``."""
        return "" if self._discovery is None else self._discovery.option.note

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes for readers of the maps: another forward, second stacks, "mean" for lack of a CLS token."""
        notes = [self.forward_note]
        if self._plan is not None and self._discovery is not None and not self._in_second_stacks():
            notes += stack_notes(self._discovery.sites)
            if groups := self._discovery.axes.groups:
                held = "; ".join(", ".join(map(str, group)) for group in groups)
                notes.append(f"each patch has {len(groups)} tokens, for channels {held}: the first axis of its grid")
        if self._plan is not None and self._plan.query != self.query:
            notes.append("it has no CLS token, so maps show the attention that patches receive (query='mean')")
        return tuple(note for note in notes if note)

    def _in_second_stacks(self) -> bool:
        return self._plan is not None and any(planned.site.stack for planned in self._plan.sites.values())

    @property
    def left_out(self) -> dict[int, str]:
        """Return the layers that layers="all" leaves out, each with the reason; empty before the discovery."""
        if self._discovery is None or self._plan is None or self.layers != "all":
            return {}
        return left_out(self._discovery.sites, self._plan.query)

    @property
    def without_statistics(self) -> dict[int, str]:
        """Return the layers without statistics over many queries, because rows failed the check, with the reasons."""
        return dict(self._recording.without_statistics)

    @property
    def heads(self) -> dict[int, int]:
        """Return the number of heads of each requested layer, by index; empty before the discovery."""
        planned = () if self._plan is None else self._plan.sites.values()
        return {one.site.index: one.site.heads for one in planned}

    def summary(self) -> ModelSummary:
        """Summarise what was discovered; raise RuntimeError before the first `check` or recording."""
        if self._discovery is None:
            raise RuntimeError("the model has not been run yet, expected a call of check(images) before summary()")
        sites = [planned.site for planned in self._planned(self._discovery).sites.values()]
        last, layers = sites[-1], tuple(site.index for site in sites)
        every = self._discovery.sites if self._in_second_stacks() else encoder_of(self._discovery.sites)
        model, count = type(self.model).__name__, 1 + max(site.index for site in every)
        return ModelSummary(
            model, layers, count, last.heads, Grid(last.layout.grid, axes=self._discovery.axes.spatial), self.notes
        )

    def sites(self, images: Tensor) -> tuple[Site, ...]:
        """Return every attention site in order of execution, readable or not, for this image size."""
        return self._follow_model(images)[1].sites

    def check(self, images: Tensor) -> None:
        """Raise an `AttentionError` with the reason if a requested layer cannot be read on images of this size."""
        self._planned(self._follow_model(images)[1])

    def doubt(self, images: Tensor, *, last: bool = False) -> Doubt:
        """Return whether the discovery still holds, after making it if necessary; call this before each recording.

        ``last`` announces the final recording, before which a check of the tokens is always due.
        """
        discovery = self._look(images)[1]
        return discovery.known.doubt(self.model, discovery.option.forward, last=last)

    def check_places(self, images: Tensor) -> Doubt:
        """Run the model on a few coded images to check the token-to-patch assignment."""
        images, discovery = self._look(images)
        known = discovery.known
        hold = places_hold(self.model, images, discovery.forward, known.sites, known.recordings)
        return Doubt.NONE if hold else Doubt.MOVED

    def ask_again(self, images: Tensor, doubt: Doubt) -> bool:
        """Discover the sites again; return whether tokens had moved, so that recordings may be in the old order."""
        before = self._look(images)[1].sites
        if doubt == Doubt.MOVED:
            forget(self.model)
        self._discovery = None
        now = self._look(images)[1].sites
        lost = {site.key for site in before if site.layout is not None} - {s.key for s in now if s.layout is not None}
        return doubt == Doubt.MOVED and (bool(lost) or not same_places(before, now))

    def __call__(self, images: Tensor, *, on_layer: OnLayer | None = None) -> list[LayerAttention]:
        """Record the requested layers.

        Args:
            images: As in `record_attention`.
            on_layer: Called with each requested layer while its whole matrix can still be read; returns the error of
                the rows that it has read (see `CheckedRows`), which must pass the same check as the recorded row.

        Returns:
            One entry per requested layer, on the model's device.

        Raises:
            AttentionError: A requested layer cannot be read, or its row is not what the model computed.
        """
        images, discovery = self._follow_model(images, recording=True)
        verify = self.verify is True or (self.verify == "first" and not self._verified)
        plan = self._planned(discovery)
        try:
            recorded = self._recording(
                self.model, images, discovery.axes.spatial, discovery.forward, plan, verify, on_layer
            )
        except OtherLayersError:
            self._discovery = None  # discover again next time
            forget(self.model)
            raise
        self._verified, discovery.known.recorded = self._verified or verify, True
        return recorded

    @contextmanager
    def forwards(self) -> Iterator[tuple[Callable[[Tensor], Any], bool]]:
        """Yield a function that runs the model as recordings do and returns its result, and if its first token is CLS.

        The model is isolated meanwhile. Raises RuntimeError before the first `check` or recording.
        """
        if self._discovery is None:
            raise RuntimeError("the model has not been run yet, expected a call of check(images) before forwards()")
        call, sites = self._discovery.option.forward, self._planned(self._discovery).sites.values()
        device, dtype = model_device_dtype(self.model)
        with isolated_forward(self.model):
            yield (
                lambda images: call(self.model, images.to(device=device, dtype=dtype)),
                all(prefix_names(planned.site)[:1] == ("CLS",) for planned in sites),
            )

    def _follow_model(self, images: Tensor, *, recording: bool = False) -> tuple[Tensor, Discovery]:
        """Repeat the discovery if it is in doubt, then return as `_look`; check the tokens only before a recording."""
        if self._follow:
            doubt = self.doubt(images)
            if doubt == Doubt.DUE and recording:
                doubt = self.check_places(images)
            if doubt >= Doubt.CHANGED and self.ask_again(images, doubt):
                warnings.warn(
                    f"the tokens of {type(self.model).__name__} hold other parts of the image than before, and its "
                    "attention is read in the new order from now on. Recordings since the latest check of the places "
                    "(they come after 1, 2, 4, 8, … recordings) may be in the old order: record those again",
                    stacklevel=3,
                )
        return self._look(images)

    def _look(self, images: Tensor) -> tuple[Tensor, Discovery]:
        """Return images (B, C, *size) for the model, and its sites for the current modules and image size."""
        images = check_images(images)
        known, structure = self._discovery, structure_of(self.model)
        if known is None or structure != known.known.conditions.structure:
            check_materialised(self.model)
        device, dtype = model_device_dtype(self.model)
        images = images.to(device=device, dtype=dtype)
        if known is None or not known.covers(images, structure):
            check_finite(images)
            known = find_discovery(
                self.model, images, self._axes, self._options, structure, layers=self.layers, query=self.query
            )
            self._discovery, self._plan, self._verified = known, None, False
            self._recording.without_statistics.clear()
        return known.axes.channels_first(images), known

    def _planned(self, discovery: Discovery) -> RecordingPlan:
        if self._plan is None:
            query = self.query
            try:
                wanted = select_sites(discovery.sites, self.layers, query)
            except QueryError:
                if not self.or_mean or query != "cls":
                    raise
                query = "mean"
                wanted = select_sites(discovery.sites, self.layers, query)
            device, tokens = discovery.known.conditions.device, self._recording.tokens or self._recording.patches
            self._plan = plan_recording(
                self.model, discovery.sites, query, wanted, device, tokens=tokens, from_end=counts_from_end(self.layers)
            )
        return self._plan
