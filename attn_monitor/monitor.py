"""`AttentionMonitor`: probe, capture and metrics in one, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attn_monitor import distributed
from attn_monitor.attention import LayerAttention
from attn_monitor.attention_snapshot import AttentionSnapshot
from attn_monitor.capture.choose_forward import ForwardOption
from attn_monitor.capture.every_query import EveryQueryOf
from attn_monitor.capture.forward import Forward
from attn_monitor.capture.layer_selection import Layers, QuerySpec, check_layers, check_query
from attn_monitor.capture.recorder import AttentionRecorder, Verify, check_verify
from attn_monitor.capture.recording_plan import ModelSummary
from attn_monitor.capture.site_cache import Doubt
from attn_monitor.errors import AttnMonitorError, HeadError
from attn_monitor.measure.health import Health, HealthLimits
from attn_monitor.measure.metrics import TOKEN_METRICS, Captured, check_threshold, measure, select_metrics, summarise
from attn_monitor.measure.patch_features import check_features, with_colors, with_features
from attn_monitor.measurements import HealthFlag
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.curves import Curves
from attn_monitor.record.history import History
from attn_monitor.record.snapshot_file import snapshot_from_state, snapshot_state
from attn_monitor.snapshot import Snapshot

Result = TypeVar("Result")


class AttentionMonitor:
    """Takes snapshots of one or more models on a fixed probe.

    ``previous`` is the latest snapshot, ``history`` the past of the drawn layers, thinned evenly to at most 24,
    ``curves`` a few metrics of every layer over the run;
    ``health.flags`` are the health flags so far. ``layers`` and ``query`` are those of `record_attention`;
    ``threshold`` is the mass that DINO's mask keeps (0…1); ``metrics`` are names (None: all but "distance",
    with every query of the last layer alone; "all"); ``health`` says when a flag is raised; ``verify`` is True (every
    snapshot), "first" (and after changes) or False; ``forward`` calls a model when ``model(images)`` is not right;
    ``or_mean`` reads query="mean" where a model has no CLS token.
    ``features`` keeps the patch features of the layers that are drawn, in at most 32 dimensions, and measures Gram
    drift against the first snapshot from step ``gram_step`` on (None: the first of all).
    What is known of a model is asked again when it may have changed, as in `AttentionRecorder`, and a flag "order" is
    raised where maps may have been drawn in an old order of tokens.
    ``distributed=True``: every process of the group calls `snapshot` at the same steps, runs its share of the probe
    and gets the whole; otherwise a process that calls it looks by itself.
    ``alone=True``: a role that fails is left out of a look, and ``failed`` holds its error, unless all fail; otherwise
    the first error is raised.
    """

    def __init__(
        self,
        probe: ProbeBatch,
        *,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        threshold: float = 0.6,
        metrics: Sequence[str] | str | None = None,
        health: HealthLimits = HealthLimits(),
        verify: Verify = True,
        forward: Forward | Sequence[ForwardOption] | None = None,
        or_mean: bool = False,
        features: bool = False,
        gram_step: int | None = None,
        distributed: bool = False,
        alone: bool = False,
    ) -> None:
        self.probe, self.alone = probe, alone
        self.metrics, self.health = select_metrics(metrics), Health(health)
        self.layers, self.query, self.threshold = check_layers(layers), check_query(query), check_threshold(threshold)
        self.every_query: EveryQueryOf = "last" if metrics is None else "all"  # by name, of every layer
        self.verify, self.forward, self.or_mean, self.distributed = check_verify(verify), forward, or_mean, distributed
        self.features, self.gram_step = check_features(features, gram_step)
        self.reference: Snapshot | None = None  # that Gram drift is measured against
        self.previous: Snapshot | None = None
        self.history, self.curves = History(), Curves()
        self._chunk = len(probe)
        self.failed: dict[str, Exception] = {}  # by role, at the latest look
        self._recorders: dict[str, AttentionRecorder] = {}
        self._confirmed: dict[str, int] = {}  # step at which a role's tokens were last found in their places
        self._reordered: list[HealthFlag] = []  # for the next snapshot

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Find the wanted layers in each model on images of the probe's size, or raise why one cannot be read."""

        def look(role: str, model: nn.Module) -> None:
            self._in_chunks(role, lambda: self._recorder(role, model).check(self.probe.images[: self._chunk]))

        self._of_each(models, look)

    def confirm(self, models: Mapping[str, nn.Module], *, step: int) -> tuple[HealthFlag, ...]:
        """Check at the end of a run that the tokens are where they were found; flags where maps may be in an old order.

        A `snapshot` that is the last one does so by itself.
        """
        self._of_each(models, lambda role, model: self._follow(role, model, step, last=True))
        found, self._reordered = self.health.add(self._reordered), []
        return found

    def found(self) -> dict[str, ModelSummary]:
        """What the latest look has found, by role."""
        return {role: recorder.summary() for role, recorder in self._recorders.items()}

    def snapshot(
        self,
        models: Mapping[str, nn.Module],
        *,
        step: int,
        epoch: int = 0,
        flags: Sequence[HealthFlag] = (),
        last: bool = False,
    ) -> AttentionSnapshot:
        """Capture every role's attention on the probe and compute its metrics, compared with the snapshot before.

        ``flags`` are health flags that were found elsewhere and go with it, known or not. ``last``: the run ends with
        it, and the places of tokens are checked in any case.
        """
        layers = self._capture(models, step, last)
        before = self.previous.layers if self.previous is not None and self.previous.step < step else {}
        reference = self.reference.layers if self.reference is not None and self.reference.step < step else None
        if self.features:
            layers = with_features(layers, {} if self.previous is None else self.previous.layers)
        measured = measure(
            layers,
            before,
            metrics=self.metrics,
            threshold=self.threshold,
            truth=self.probe.masks,
            reference=reference,
        )
        if self._is_shared() and not distributed.is_rank_zero():  # which alone draws and writes
            layers = {key: replace(attention, patches=None) for key, attention in layers.items()}
        layers = {key: attention.to("cpu") for key, attention in layers.items()}
        layers = with_colors(layers, self._settled())
        self.health.add(flags)
        found = (*flags, *self.health.add(self._reordered), *self.health.examine(step, layers, measured))
        self._reordered = []
        metrics, raised = summarise(measured), len(self.health.flags)
        snapshot = AttentionSnapshot(step, epoch, self.probe.names, layers, metrics, found, raised)
        self.remember(snapshot)
        return snapshot

    def check_heads(self, heads: Sequence[int] | None) -> None:
        """Raise `HeadError` if one of these is no head of a watched layer; known after the first look."""
        for role, recorder in self._recorders.items():
            for layer, count in recorder.heads.items():
                missing = [str(head) for head in heads or () if head >= count]
                if missing:
                    raise HeadError(
                        f"heads={list(heads or ())}: layer {layer} of {role} has heads 0 to {count - 1}, so no "
                        f"{', '.join(missing)}. Choose among these"
                    )

    def left_out(self) -> list[str]:
        """What layers="all" leaves out of each role, and numbers that layers lack, with the reasons."""
        texts = []
        for role, recorder in self._recorders.items():
            texts += [f"{role}, {reason}" for reason in recorder.without_statistics.values()]
            if reasons := recorder.left_out.values():
                lines = "".join(f"\n  {reason}" for reason in reasons)
                texts.append(f'layers="all" leaves out {len(reasons)} of the layers of {role}:{lines}')
        return texts

    def let_go(self) -> None:
        """Hold no model: the next look finds everything anew."""
        self._recorders.clear()
        self._confirmed.clear()

    def forget(self) -> None:
        """Drop the past: the next snapshot is the first one of a run."""
        self.previous, self.reference = None, None
        self.history, self.curves = History(), Curves()
        self.health = Health(self.health.limits)

    @property
    def images_at_a_time(self) -> int:
        """How many images run together: the whole probe, fewer after memory ran out."""
        return self._chunk

    @property
    def draws_every_layer(self) -> bool:
        """Whether each captured layer is worth drawing, as in a list of layers; else the last one is."""
        return isinstance(self.layers, (list, tuple))

    def drawn_layers(self, snapshot: Snapshot) -> tuple[int, ...]:
        """Layers that are drawn of a snapshot."""
        return snapshot.drawn_layers(self.draws_every_layer)

    def state_dict(self) -> dict[str, Any]:
        """Probe, latest snapshot and film-strip history: tensors and text only, for ``weights_only`` loading.

        At most 24 snapshots of the layers that are drawn, in float16, so its size does not grow with the run.
        """
        return {
            "probe": self.probe.state_dict(),
            "previous": _state(self.previous),
            "reference": _state(self.reference),
            "history": [snapshot_state(s) for s in self.history],
            "health": self.health.state_dict(),
            "curves": self.curves.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`: the same images, and the same past."""
        self.probe = ProbeBatch.from_state_dict(state["probe"])
        self._chunk = len(self.probe)
        self.previous, self.reference = _snapshot(state["previous"]), _snapshot(state["reference"])
        self.history = History([snapshot_from_state(s) for s in state["history"]])
        self.health.load_state_dict(state["health"])
        self.curves = Curves.from_state_dict(state["curves"])

    def _capture(self, models: Mapping[str, nn.Module], step: int, last: bool) -> dict[tuple[str, int], LayerAttention]:
        """The whole probe, on the models' device."""
        part = distributed.share(len(self.probe)) if self._is_shared() else None
        images = self.probe.images if part is None else self.probe.images[list(part.indices)]

        def look(role: str, model: nn.Module) -> list[LayerAttention]:
            self._follow(role, model, step, last)
            return self._record(role, model, images)

        recorded = self._of_each(models, look)
        captured = {(role, attention.layer): attention for role, layers in recorded.items() for attention in layers}
        return captured if part is None else distributed.merge(captured, part)

    def _of_each(self, models: Mapping[str, nn.Module], look: Callable[[str, nn.Module], Result]) -> dict[str, Result]:
        """What each role gives; one that fails is looked for anew the next time, in all processes."""
        found: dict[str, Result] = {}
        self.failed = {}
        for role, model in models.items():
            try:
                found[role] = look(role, model)
            except Exception as error:
                self._recorders.pop(role, None)
                self.failed[role] = error
                if not self.alone:
                    break
        if self.failed and not (found and self.alone):
            role, first = next(iter(self.failed.items()))
            raise named(role, first) if len(models) > 1 else first
        return found

    def _record(self, role: str, model: nn.Module, images: Tensor) -> list[LayerAttention]:
        """One model on its images."""

        def record() -> list[LayerAttention]:
            recorder = self._recorder(role, model)
            if self._is_shared():
                recorder.check(self.probe.images[: self._chunk])  # all processes ask the same questions, and as many
            parts = zip(*(recorder(chunk) for chunk in images.split(self._chunk)), strict=True)
            return [LayerAttention.cat(layer) for layer in parts]

        return self._in_chunks(role, record, len(images))

    def _follow(self, role: str, model: nn.Module, step: int, last: bool) -> None:
        """Ask again what may have changed since the latest snapshot; all processes ask the same, and as much."""
        recorder = self._recorder(role, model)

        def images() -> Tensor:
            return self.probe.images[: self._chunk]

        def worst(ask: Callable[[], int]) -> Doubt:
            answer = self._in_chunks(role, ask)
            return Doubt(distributed.max_over_processes(answer) if self._is_shared() else answer)

        first = doubt = worst(lambda: recorder.doubt(images(), last=last))
        if doubt == Doubt.DUE:
            doubt = worst(lambda: recorder.check_places(images()))
        if doubt >= Doubt.CHANGED and worst(lambda: recorder.ask_again(images(), doubt)):
            self._reordered.append(_reordered(role, self._confirmed.get(role, step), step))
        if first or role not in self._confirmed:
            self._confirmed[role] = step

    def _settled(self) -> Captured:
        """Layers of the latest snapshot, whose colours are computed now if nobody has asked for them yet.

        Where all of them are black, as every token held NaN, the layer of an earlier snapshot.
        """
        layers = {} if self.previous is None else dict(self.previous.layers)
        for key, attention in layers.items():  # else what colours are computed from would pile up
            try:
                colors = attention.colors
            except Exception:  # told with this snapshot, which is lost; the next ones go on
                if attention.patch_colors is not None:
                    attention.patch_colors.give_up(torch.zeros(*attention.maps[:, 0].flatten(1).shape, 3))
                raise
            if colors is not None and not colors.any():
                past = (s.layers[key] for s in reversed(self.history) if key in s.layers)
                layers[key] = next((a for a in past if a.colors is not None and a.colors.any()), attention)
        return layers

    def _is_shared(self) -> bool:
        return self.distributed and distributed.is_distributed()

    def _in_chunks(self, role: str, action: Callable[[], Result], images: int | None = None) -> Result:
        """Look at a role, again with half the images at a time whenever memory runs out."""
        while True:
            try:
                return self._with_one_outcome(role, action)
            except Exception as error:
                chunk = min(self._chunk, images or self._chunk)
                if not distributed.is_out_of_memory(error) or chunk == 1:
                    raise
                self._chunk = (chunk + 1) // 2

    def _with_one_outcome(self, role: str, action: Callable[[], Result]) -> Result:
        """Look at a role; where that fails in one of several processes, it fails in all."""
        if not self._is_shared():
            return action()
        try:
            return distributed.run_in_all(action)
        except Exception:
            self._recorders.pop(role, None)  # so that all look for the layers anew: sharded models do so together
            raise

    def remember(self, snapshot: Snapshot) -> None:
        """Make it the latest snapshot, which the next one is compared with."""
        self.previous = snapshot
        if self.reference is not None and snapshot.step <= self.reference.step:
            self.reference = None  # from before a run was resumed
        stored = [a.features for a in snapshot.layers.values() if a.features is not None]
        whole = bool(stored) and all(bool(features.isfinite().all()) for features in stored)
        if self.features and self.reference is None and whole and snapshot.step >= self.gram_step:
            self.reference = snapshot
        self.health.add(snapshot.flags)
        self.history.add(snapshot, self.drawn_layers(snapshot))
        self.curves.add(snapshot.step, snapshot.metrics)

    def _recorder(self, role: str, model: nn.Module) -> AttentionRecorder:
        known = self._recorders.get(role)
        if known is None or known.model is not getattr(model, "_orig_mod", model):
            known = self._recorders[role] = AttentionRecorder(
                model,
                layers=self.layers,
                query=self.query,
                forward=self.forward,
                or_mean=self.or_mean,
                verify=self.verify,
                nonfinite="keep",
                distance="distance" in self.metrics,
                logits="max_logit" in self.metrics,
                sinks="sinks" in self.metrics,
                every_query=self.every_query,
                tokens=not TOKEN_METRICS.isdisjoint(self.metrics),
                patches=True,
                follow=False,
            )
        return known


def named(role: str, error: Exception) -> Exception:
    """The error of a role beside others, in a sentence that says which."""
    if not isinstance(error, AttnMonitorError):
        return error
    same = type(error)(f"{role}: {error}")
    same.__cause__ = error.__cause__
    return same


def _reordered(role: str, since: int, step: int) -> HealthFlag:
    text = (
        f"its tokens hold other parts of the image than at step {since:,}, and its attention is read in the new order "
        f"from here on. Maps of steps after {since:,} may be drawn in the old order: draw them again from checkpoints "
        "(attn-monitor backfill)"
    )
    return HealthFlag("order", role, None, (), step, None, text)


def _state(snapshot: Snapshot | None) -> dict[str, Any] | None:
    return None if snapshot is None else snapshot_state(snapshot)


def _snapshot(state: dict[str, Any] | None) -> Snapshot | None:
    return None if state is None else snapshot_from_state(state)
