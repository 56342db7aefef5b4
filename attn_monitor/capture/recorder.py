"""Run a model on images and record its attention, once (`record_attention`) or repeatedly (`AttentionRecorder`).

A first forward on noise images discovers every attention site, its token layout, or the reason why it cannot be read.
Later forwards watch the requested modules only, and are left after the last of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.choose_forward import Discovery, ForwardOption, forward_options
from attn_monitor.capture.inputs import check_model
from attn_monitor.capture.layer_selection import (
    Layers,
    QuerySpec,
    check_layers,
    check_query,
    encoder_of,
    left_out,
    stack_notes,
)
from attn_monitor.capture.observe.forward import Forward
from attn_monitor.capture.observe.isolation import isolated_forward, model_device_dtype
from attn_monitor.capture.recording import OnLayer, OtherLayersError, Recording
from attn_monitor.capture.recording_options import EveryQueryOf, RecordingOptions, Verify, check_verify
from attn_monitor.capture.recording_plan import ModelSummary, RecordingPlan, plan_recording
from attn_monitor.capture.site_cache import Doubt
from attn_monitor.capture.sites import Site, prefix_names
from attn_monitor.capture.watched_model import WatchedModel
from attn_monitor.grid import Grid


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
        self.verify = check_verify(verify)
        self._measured = RecordingOptions(nonfinite, distance, tokens, patches, logits, sinks, every_query)
        self._watched = WatchedModel(self.model, forward_options(forward), axes, self.layers, self.query)
        self._follows = follow
        self._latest: Recording | None = None

    @property
    def _discovery(self) -> Discovery | None:
        return self._watched.discovery

    @property
    def _recording(self) -> Recording | None:
        """Return the recording that was planned for what is discovered now; None before."""
        latest = self._latest
        return None if latest is None or latest.discovery is not self._discovery else latest

    @property
    def _plan(self) -> RecordingPlan | None:
        return None if self._recording is None else self._recording.plan

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
        return {} if self._recording is None else dict(self._recording.without_statistics)

    @property
    def heads(self) -> dict[int, int]:
        """Return the number of heads of each requested layer, by index; empty before the discovery."""
        planned = () if self._plan is None else self._plan.sites.values()
        return {one.site.index: one.site.heads for one in planned}

    def summary(self) -> ModelSummary:
        """Summarise what was discovered; raise RuntimeError before the first `check` or recording."""
        if self._discovery is None:
            raise RuntimeError("the model has not been run yet, expected a call of check(images) before summary()")
        sites = [planned.site for planned in self._planned(self._discovery).plan.sites.values()]
        last, layers = sites[-1], tuple(site.index for site in sites)
        every = self._discovery.sites if self._in_second_stacks() else encoder_of(self._discovery.sites)
        model, count = type(self.model).__name__, 1 + max(site.index for site in every)
        return ModelSummary(
            model, layers, count, last.heads, Grid(last.layout.grid, axes=self._discovery.axes.spatial), self.notes
        )

    def sites(self, images: Tensor) -> tuple[Site, ...]:
        """Return every attention site in order of execution, readable or not, for this image size."""
        return self._look(images)[1].sites

    def check(self, images: Tensor) -> None:
        """Raise an `AttentionError` with the reason if a requested layer cannot be read on images of this size."""
        self._planned(self._look(images)[1])

    def doubt(self, images: Tensor, *, last: bool = False) -> Doubt:
        """Return whether the discovery still holds, after making it if necessary; call this before each recording.

        ``last`` announces the final recording, before which a check of the tokens is always due.
        """
        return self._watched.doubt(images, last=last)

    def check_places(self, images: Tensor) -> Doubt:
        """Run the model on a few coded images to check the token-to-patch assignment."""
        return self._watched.check_places(images)

    def ask_again(self, images: Tensor, doubt: Doubt) -> bool:
        """Discover the sites again; return whether tokens had moved, so that recordings may be in the old order."""
        return self._watched.discover_again(images, doubt)

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
        images, discovery = self._look(images, recording=True)
        recording = self._planned(discovery)
        verify = self.verify is True or (self.verify == "first" and not recording.verified)
        try:
            recorded = recording(self.model, images, verify, on_layer)
        except OtherLayersError:
            self._watched.drop(with_cache=True)
            raise
        recording.verified, discovery.known.recorded = recording.verified or verify, True
        return recorded

    @contextmanager
    def forwards(self) -> Iterator[tuple[Callable[[Tensor], Any], bool]]:
        """Yield a function that runs the model as recordings do and returns its result, and if its first token is CLS.

        The model is isolated meanwhile. Raises RuntimeError before the first `check` or recording.
        """
        if self._discovery is None:
            raise RuntimeError("the model has not been run yet, expected a call of check(images) before forwards()")
        call, sites = self._discovery.option.forward, self._planned(self._discovery).plan.sites.values()
        device, dtype = model_device_dtype(self.model)
        with isolated_forward(self.model):
            yield (
                lambda images: call(self.model, images.to(device=device, dtype=dtype)),
                all(prefix_names(planned.site)[:1] == ("CLS",) for planned in sites),
            )

    def _look(self, images: Tensor, *, recording: bool = False) -> tuple[Tensor, Discovery]:
        return self._watched.follow(images, recording=recording) if self._follows else self._watched.look(images)

    def _planned(self, discovery: Discovery) -> Recording:
        if (planned := self._recording) is not None:
            return planned
        device, tokens = discovery.known.conditions.device, self._measured.tokens or self._measured.patches
        plan = plan_recording(
            self.model, discovery.sites, self.layers, self.query, device, or_mean=self.or_mean, tokens=tokens
        )
        self._latest = Recording(discovery, plan, self.layers, self._measured)
        return self._latest
