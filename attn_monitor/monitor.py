"""`AttentionMonitor`: probe, capture and metrics in one, for any training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture import AttentionRecorder, Forward, LayerAttention, Layers, QuerySpec
from attn_monitor.drawing import thin
from attn_monitor.health import Health, HealthLimits
from attn_monitor.metrics import OF_TOKENS, measure, select_metrics, summarise
from attn_monitor.probe import ProbeBatch
from attn_monitor.snapshot import OPTIONAL, AttentionSnapshot

HISTORY = 24  # snapshots kept for film strips
HEALTH_TAG = "attn/health_flags"  # how many have been raised so far


class AttentionMonitor:
    """Takes snapshots of one or more models on a fixed probe.

    ``previous`` is the latest snapshot, ``history`` the past of the drawn layers, thinned evenly to at most 24;
    ``health.flags`` are the health flags so far. ``layers`` and ``query`` are those of `record_attention`;
    ``threshold`` is the mass that DINO's mask keeps (0…1); ``metrics`` are names (None: all but "distance", which
    needs every query's row; "all"); ``health`` says when a flag is raised; ``verify`` is True (first snapshot and
    after changes), "always" or False; ``forward`` calls a model when ``model(images)`` is not right.
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
        verify: bool | str = True,
        forward: Forward | None = None,
    ) -> None:
        self.probe = probe
        self.metrics, self.health = select_metrics(metrics), Health(health)
        self.layers, self.query, self.threshold = layers, query, check_threshold(threshold)
        self.verify, self.forward = verify, forward
        self.previous: AttentionSnapshot | None = None
        self.history: list[AttentionSnapshot] = []
        self._chunk = len(probe)
        self._recorders: dict[str, AttentionRecorder] = {}

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Find the wanted layers in each model on images of the probe's size, or raise why one cannot be read."""
        for role, model in models.items():
            self._recorder(role, model).check(self.probe.images[:1])

    def snapshot(self, models: Mapping[str, nn.Module], *, step: int, epoch: int = 0) -> AttentionSnapshot:
        """Capture every role's attention on the probe and compute its metrics, compared with the snapshot before."""
        layers: dict[tuple[str, int], LayerAttention] = {}
        for role, model in models.items():
            for attention in self._record(self._recorder(role, model)):
                layers[role, attention.layer] = attention
        before = self.previous.layers if self.previous is not None and self.previous.step < step else {}
        measured = measure(layers, before, metrics=self.metrics, threshold=self.threshold, truth=self.probe.masks)
        layers = {key: _to_host(attention) for key, attention in layers.items()}
        flags = self.health.examine(step, layers, measured)
        metrics = {**summarise(measured), HEALTH_TAG: float(len(self.health.flags))}
        snapshot = AttentionSnapshot(step, epoch, self.probe.names, layers, metrics, flags)
        self.remember(snapshot)
        return snapshot

    def forget(self) -> None:
        """Drop the past: the next snapshot is the first one of a run."""
        self.previous, self.history, self.health = None, [], Health(self.health.limits)

    def shown_layers(self, snapshot: AttentionSnapshot) -> tuple[int, ...]:
        """Layers worth drawing: each one of a list, else the last."""
        captured = snapshot.layers_of(snapshot.roles[-1])
        return captured if isinstance(self.layers, (list, tuple)) else captured[-1:]

    def state_dict(self) -> dict[str, Any]:
        """Probe, latest snapshot and film-strip history: tensors and text only, for ``weights_only`` loading.

        At most `HISTORY` snapshots of the layers that are drawn, in float16, so its size does not grow with the run.
        """
        return {
            "probe": self.probe.state_dict(),
            "previous": None if self.previous is None else self.previous.state_dict(),
            "history": [s.state_dict() for s in self.history],
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`: the same images, and the same past."""
        self.probe = ProbeBatch.from_state_dict(state["probe"])
        self._chunk = len(self.probe)
        self.previous = None if state["previous"] is None else AttentionSnapshot.from_state_dict(state["previous"])
        self.history = [AttentionSnapshot.from_state_dict(s) for s in state["history"]]
        self.health.load_state_dict(state["health"])

    def _record(self, recorder: AttentionRecorder) -> list[LayerAttention]:
        """The whole probe, on the model's device; in smaller and smaller chunks when memory runs out."""
        while True:
            try:
                chunks = [recorder(images) for images in self.probe.images.split(self._chunk)]
            except Exception as error:
                if not _is_out_of_memory(error) or self._chunk == 1:
                    raise
                self._chunk = (self._chunk + 1) // 2
            else:
                return [_joined(parts) for parts in zip(*chunks, strict=True)]

    def remember(self, snapshot: AttentionSnapshot) -> None:
        """Make it the latest snapshot, which the next one is compared with."""
        self.previous = snapshot
        self.health.add(snapshot.flags)
        kept = [s for s in self.history if s.step < snapshot.step]
        self.history = [*kept, snapshot.only(self.shown_layers(snapshot))]
        if len(self.history) > HISTORY:
            self.history = [self.history[i] for i in thin([s.step for s in self.history], HISTORY * 3 // 4)]

    def _recorder(self, role: str, model: nn.Module) -> AttentionRecorder:
        known = self._recorders.get(role)
        if known is None or known.model is not getattr(model, "_orig_mod", model):
            known = self._recorders[role] = AttentionRecorder(
                model,
                layers=self.layers,
                query=self.query,
                forward=self.forward,
                verify=self.verify,
                nonfinite="keep",
                distance="distance" in self.metrics,
                tokens=not OF_TOKENS.isdisjoint(self.metrics),
            )
        return known


def _tensors(attention: LayerAttention) -> dict[str, Tensor]:
    """Everything that has one entry for each image."""
    optional = {name: getattr(attention, name) for name in OPTIONAL}
    return {"rows": attention.rows, **{name: value for name, value in optional.items() if value is not None}}


def _joined(parts: Sequence[LayerAttention]) -> LayerAttention:
    """One layer's attention on all images, from its attention on some each."""
    if len(parts) == 1:
        return parts[0]
    values: list[dict[str, Tensor]] = [_tensors(part) for part in parts]
    together: dict[str, Any] = {name: torch.cat([v[name] for v in values]) for name in values[0]}
    return replace(parts[0], **together)


def _to_host(attention: LayerAttention) -> LayerAttention:
    moved: dict[str, Any] = {name: value.cpu() for name, value in _tensors(attention).items()}
    return replace(attention, **moved)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """CUDA's own error, the CPU allocator's, or one that was caused by them."""
    if error is None:
        return False
    cpu = isinstance(error, (RuntimeError, MemoryError)) and "DefaultCPUAllocator" in str(error)
    return cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _is_out_of_memory(error.__cause__)


def check_threshold(threshold: float) -> float:
    """The mask's threshold, if it is one."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected a share of attention mass above 0 and up to 1, such as 0.6")
    return threshold
