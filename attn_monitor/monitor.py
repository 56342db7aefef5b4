"""`AttentionMonitor`: capture attention on a probe and compute its metrics, in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn

from attn_monitor import distributed
from attn_monitor.attention import LayerAttention, on_host
from attn_monitor.attention_snapshot import AttentionSnapshot
from attn_monitor.capture.choose_forward import ForwardOption
from attn_monitor.capture.every_query import EveryQueryOf
from attn_monitor.capture.layer_selection import Layers, QuerySpec, check_layers, check_query
from attn_monitor.capture.observe.forward import Forward
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.recording_plan import ModelSummary
from attn_monitor.capture.site_cache import Doubt
from attn_monitor.draw.history import History
from attn_monitor.errors import AttnMonitorError, HeadError
from attn_monitor.measure.health import Health, HealthLimits
from attn_monitor.measure.metrics import TOKEN_METRICS, check_threshold, measure, summarise
from attn_monitor.measure.patch_features import with_features
from attn_monitor.measure.run_history import RunHistory
from attn_monitor.measure.verdict import judge
from attn_monitor.measurements import HealthFlag, MetricKey, Metrics, Verdict
from attn_monitor.metric_options import MetricOptions
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.curves import Curves
from attn_monitor.record.snapshot_file import snapshot_from_state, snapshot_state
from attn_monitor.snapshot import Same, Snapshot

Result = TypeVar("Result")


class AttentionMonitor:
    """Take snapshots of one or more models on a fixed probe.

    ``previous`` is the latest snapshot, ``history`` the past of the drawn layers, thinned evenly to at most 24,
    ``curves`` a few metrics of every layer over the run, and ``health.flags`` the health flags so far. A model that may
    have changed is examined again, as in `AttentionRecorder`; a flag "order" is raised if maps may have been drawn in
    an old order of tokens.

    Args:
        probe: the images.
        layers: which layers to record, see `record_attention`.
        query: which query to record, see `record_attention`.
        threshold: share of attention mass that DINO's mask keeps, from 0 to 1.
        metrics: names of metrics, "all", or `MetricOptions`; None is all but "distance", with every query of the last
            layer only.
        health: when a health flag is raised.
        forward: calls a model if ``model(images)`` is not right.
        or_mean: whether to read query="mean" of a model without a CLS token.
        features: whether to keep the patch features of the drawn layers, in at most 32 dimensions, and to measure Gram
            drift.
        distributed: whether the processes of the group share the probe. All must call `snapshot` at the same steps, and
            each gets the whole result. Otherwise a process works alone.
        alone: whether a role that fails is left out while others work; ``failed`` holds its error. Otherwise the first
            error is raised.

    Raises:
        ArgumentError: An argument is invalid.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> probe = ProbeBatch(torch.randn(3, 3, 32, 32), mean=(0, 0, 0), std=(1, 1, 1))
        >>> snapshot = AttentionMonitor(probe).snapshot({"backbone": model}, step=0)
        >>> snapshot.maps("backbone").shape
        torch.Size([3, 2, 4, 4])
    """

    def __init__(
        self,
        probe: ProbeBatch,
        *,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        threshold: float = 0.6,
        metrics: MetricOptions | Sequence[str] | str | None = None,
        health: HealthLimits = HealthLimits(),
        forward: Forward | Sequence[ForwardOption] | None = None,
        or_mean: bool = False,
        features: bool = False,
        distributed: bool = False,
        alone: bool = False,
    ) -> None:
        self.probe, self.alone = probe, alone
        options = MetricOptions.of(metrics, features=features)
        self.metrics, self.verify, self.health = options.selected, options.verify, Health(health)
        self.layers, self.query, self.threshold = check_layers(layers), check_query(query), check_threshold(threshold)
        self.every_query: EveryQueryOf = "last" if options.names is None else "all"  # by name: every layer
        self.forward, self.or_mean, self.distributed = forward, or_mean, distributed
        self.features, self.gram_step = features, options.gram_step or 0
        self.reference: Snapshot | None = None  # of Gram drift
        self.previous: Snapshot | None = None
        self.history, self.curves = History(dense="dense" in self.metrics), Curves()
        self.progress = RunHistory()  # what the verdict is made of
        self._chunk = len(probe)
        self.failed: dict[str, Exception] = {}  # by role, of the latest call
        self._recorders: dict[str, AttentionRecorder] = {}
        self._confirmed: dict[str, int] = {}  # role to the last step at which its order of tokens was checked
        self._reordered: list[HealthFlag] = []  # flags for the next snapshot

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Find the wanted layers in each model on images of the probe's size; `AttentionError` if one is unreadable."""

        def look(role: str, model: nn.Module) -> None:
            self._in_chunks(role, lambda: self._recorder(role, model).check(self.probe.images[: self._chunk]))

        self._of_each(models, look)

    def confirm(self, models: Mapping[str, nn.Module], *, step: int) -> tuple[HealthFlag, ...]:
        """Check at the end of a run which patch each token is.

        A `snapshot` with ``last=True`` includes this check.

        Returns:
            Flags for roles with maps that may have been drawn in an old order of tokens.
        """
        self._of_each(models, lambda role, model: self._follow(role, model, step, last=True))
        found, self._reordered = self.health.add(self._reordered), []
        return found

    def found(self) -> dict[str, ModelSummary]:
        """Return what was found of each role's model."""
        return {role: recorder.summary() for role, recorder in self._recorders.items()}

    def snapshot(
        self,
        models: Mapping[str, nn.Module],
        *,
        step: int,
        epoch: int = 0,
        flags: Sequence[HealthFlag] = (),
        last: bool = False,
        others: Mapping[MetricKey, float] = MappingProxyType({}),
    ) -> AttentionSnapshot:
        """Capture every role's attention on the probe and compute its metrics, compared with the snapshot before.

        Args:
            models: the models by role.
            step: optimizer steps done.
            epoch: from 0 on.
            flags: health flags from elsewhere to store with the snapshot.
            last: whether the run ends with it, so that the order of tokens is checked in any case.
            others: metrics from elsewhere to store with the snapshot.

        Returns:
            The snapshot, on the CPU.

        Raises:
            AttentionError: A model's attention cannot be read, or is not what the model computed.
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
        if self._is_shared() and not distributed.is_rank_zero():  # only rank zero draws and writes
            layers = {key: replace(attention, patches=None) for key, attention in layers.items()}
        layers = on_host(layers)
        self.health.add(flags)
        found = (*flags, *self.health.add(self._reordered), *self.health.examine(step, layers, measured))
        self._reordered = []
        metrics = Metrics({**summarise(measured), **others})
        verdict = self._judge(step, metrics)
        if verdict is not None and verdict.is_bad:
            found += self.health.add([verdict.flag(step)])
        raised = len(self.health.flags)
        snapshot = AttentionSnapshot(step, epoch, self.probe.names, layers, metrics, found, raised, verdict)
        self.remember(snapshot)
        return snapshot

    def colored(self, snapshot: Same) -> Same:
        """Return a snapshot of this run with colours of its patches, which continue those before, and "dense" metrics.

        This takes a decomposition and clusters of the patch tokens, which the callback leaves to the threads that draw
        and write. A snapshot that is saved without it has neither.
        """
        return self.history.colored(snapshot)

    @contextmanager
    def forwards(self, role: str, model: nn.Module) -> Iterator[tuple[Callable[[Tensor], Any], bool]]:
        """Yield a function that runs a checked model in isolation, and whether its first token is CLS."""
        with self._recorder(role, model).forwards() as found:
            yield found

    def check_heads(self, heads: Sequence[int] | None) -> None:
        """Raise `HeadError` if a watched layer lacks one of these heads; call it after `check` or `snapshot`."""
        for role, recorder in self._recorders.items():
            for layer, count in recorder.heads.items():
                missing = [str(head) for head in heads or () if head >= count]
                if missing:
                    raise HeadError(
                        f"heads={list(heads or ())}: layer {layer} of {role} has heads 0 to {count - 1}, so no "
                        f"{', '.join(missing)}. Choose among these"
                    )

    def left_out(self) -> list[str]:
        """Describe which layers layers="all" leaves out of each role, which lack statistics, and why."""
        texts = []
        for role, recorder in self._recorders.items():
            texts += [f"{role}, {reason}" for reason in recorder.without_statistics.values()]
            if reasons := recorder.left_out.values():
                lines = "".join(f"\n  {reason}" for reason in reasons)
                texts.append(f'layers="all" leaves out {len(reasons)} of the layers of {role}:{lines}')
        return texts

    def let_go(self) -> None:
        """Release the models; the next snapshot finds their layers again."""
        self._recorders.clear()
        self._confirmed.clear()

    def forget(self) -> None:
        """Drop the past, so that the next snapshot is the first of a run."""
        self.previous, self.reference = None, None
        self.history, self.curves = History(dense=self.history.dense), Curves()
        self.progress = RunHistory()
        self.health = Health(self.health.limits)

    @property
    def images_at_a_time(self) -> int:
        """Return how many images run together: the whole probe, or fewer after memory ran out."""
        return self._chunk

    @property
    def draws_every_layer(self) -> bool:
        """Whether each captured layer is drawn, as for a list of layers; otherwise the last one is."""
        return isinstance(self.layers, (list, tuple))

    def drawn_layers(self, snapshot: Snapshot) -> tuple[int, ...]:
        """Return the layers of a snapshot that are drawn."""
        return snapshot.drawn_layers(self.draws_every_layer)

    def state_dict(self) -> dict[str, Any]:
        """Return probe, latest snapshot and history as tensors and plain values, for ``weights_only`` loading.

        The history has at most 24 snapshots of the drawn layers in float16, so the size does not grow with the run.
        """
        return {
            "probe": self.probe.state_dict(),
            "previous": _state(self.previous),
            "reference": _state(self.reference),
            "history": [snapshot_state(s, patches=True) for s in self.history],
            "health": self.health.state_dict(),
            "curves": self.curves.state_dict(),
            "progress": self.progress.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the images and the past from `state_dict`."""
        self.probe = ProbeBatch.from_state_dict(state["probe"])
        self._chunk = len(self.probe)
        self.previous, self.reference = _snapshot(state["previous"]), _snapshot(state["reference"])
        self.history = History([snapshot_from_state(s) for s in state["history"]], dense=self.history.dense)
        self.health.load_state_dict(state["health"])
        self.curves = Curves.from_state_dict(state["curves"])
        self.progress = RunHistory.from_state_dict(state.get("progress", []))

    def _capture(self, models: Mapping[str, nn.Module], step: int, last: bool) -> dict[tuple[str, int], LayerAttention]:
        """Record the whole probe by (role, layer), on the models' device."""
        part = distributed.share(len(self.probe)) if self._is_shared() else None
        images = self.probe.images if part is None else self.probe.images[list(part.indices)]

        def look(role: str, model: nn.Module) -> list[LayerAttention]:
            self._follow(role, model, step, last)
            return self._record(role, model, images)

        recorded = self._of_each(models, look)
        captured = {(role, attention.layer): attention for role, layers in recorded.items() for attention in layers}
        return captured if part is None else distributed.merge(captured, part)

    def _of_each(self, models: Mapping[str, nn.Module], look: Callable[[str, nn.Module], Result]) -> dict[str, Result]:
        """Call ``look`` for each role; for one that fails, the next call finds the layers again, in all processes."""
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
        """Record one model on its images."""

        def record() -> list[LayerAttention]:
            recorder = self._recorder(role, model)
            if self._is_shared():
                recorder.check(self.probe.images[: self._chunk])  # all processes must run as many forwards
            parts = zip(*(recorder(chunk) for chunk in images.split(self._chunk)), strict=True)
            return [LayerAttention.cat(layer) for layer in parts]

        return self._in_chunks(role, record, len(images))

    def _follow(self, role: str, model: nn.Module, step: int, last: bool) -> None:
        """Check what may have changed since the latest snapshot; all processes run the same checks."""
        recorder = self._recorder(role, model)

        def images() -> Tensor:
            return self.probe.images[: self._chunk]

        def worst(ask: Callable[[], int]) -> Doubt:
            answer = self._in_chunks(role, ask)
            return Doubt(distributed.max_over_processes(answer) if self._is_shared() else answer)

        first = doubt = worst(lambda: recorder.doubt(images(), last=last))
        if doubt == Doubt.DUE:
            doubt = worst(lambda: recorder.check_places(images()))
        moved = doubt >= Doubt.CHANGED and bool(worst(lambda: recorder.ask_again(images(), doubt)))
        if last and doubt == Doubt.CHANGED and not moved:  # sites may be those of an earlier time in the same state
            doubt = worst(lambda: recorder.check_places(images()))
            moved = doubt == Doubt.MOVED and bool(worst(lambda: recorder.ask_again(images(), doubt)))
        if moved:
            self._reordered.append(_reordered(role, self._confirmed.get(role, step), step))
        if first or role not in self._confirmed:
            self._confirmed[role] = step

    def _is_shared(self) -> bool:
        return self.distributed and distributed.is_distributed()

    def _in_chunks(self, role: str, action: Callable[[], Result], images: int | None = None) -> Result:
        """Call ``action``, again with half the images at a time whenever memory runs out."""
        while True:
            try:
                return self._with_one_outcome(role, action)
            except Exception as error:
                chunk = min(self._chunk, images or self._chunk)
                if not distributed.is_out_of_memory(error) or chunk == 1:
                    raise
                self._chunk = (chunk + 1) // 2

    def _with_one_outcome(self, role: str, action: Callable[[], Result]) -> Result:
        """Call ``action`` so that a failure in one process is one in all."""
        if not self._is_shared():
            return action()
        try:
            return distributed.run_in_all(action)
        except Exception:
            self._recorders.pop(role, None)  # so that all processes find the layers again, as sharded models need
            raise

    def remember(self, snapshot: Snapshot) -> None:
        """Make a snapshot the latest one, which the next is compared with."""
        self.previous = snapshot
        if self.reference is not None and snapshot.step <= self.reference.step:
            self.reference = None  # it is from before the run was resumed
        stored = [a.features for a in snapshot.layers.values() if a.features is not None]
        whole = bool(stored) and all(bool(features.isfinite().all()) for features in stored)
        if self.features and self.reference is None and whole and snapshot.step >= self.gram_step:
            self.reference = snapshot
        self.health.add(snapshot.flags)
        self.history.add(snapshot, self.drawn_layers(snapshot))
        self.curves.add(snapshot.step, snapshot.metrics)
        self.progress.add(snapshot.step, snapshot.metrics)

    def _judge(self, step: int, metrics: Metrics) -> Verdict | None:
        """Judge the run so far, with what other threads have computed of earlier snapshots."""
        self.progress.add(step, metrics)
        for entry in self.history.entries:
            if entry.is_settled and entry.snapshot.step < step:
                self.progress.complete(entry.snapshot.step, entry.snapshot.metrics)
        return judge(self.progress) if self.health.limits.verdict else None

    def _recorder(self, role: str, model: nn.Module) -> AttentionRecorder:
        known = self._recorders.get(role)
        if known is None or known.model is not getattr(model, "_orig_mod", model):
            known = self._recorders[role] = AttentionRecorder(
                model,
                layers=self.layers,
                query=self.query,
                forward=self.forward,
                or_mean=self.or_mean,
                axes=self.probe.axes,
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
    """Return a role's error with the role in its text."""
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
