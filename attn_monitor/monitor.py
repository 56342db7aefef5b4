"""`AttentionMonitor`: probe, capture and metrics in one, for any training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor import functional as F
from attn_monitor.capture import AttentionRecorder, Forward, LayerAttention, Layers, QuerySpec
from attn_monitor.drawing import thin
from attn_monitor.probe import ProbeBatch
from attn_monitor.snapshot import AttentionSnapshot, metric_tag

HISTORY = 24  # snapshots kept for film strips

Captured = Mapping[tuple[str, int], LayerAttention]


class AttentionMonitor:
    """Takes snapshots of one or more models on a fixed probe.

    ``previous`` is the latest snapshot, ``history`` the past of the drawn layers, thinned evenly to at most 24.
    ``layers`` and ``query`` are those of `record_attention`; ``threshold`` is the mass that DINO's mask keeps
    (0…1); ``verify`` is True (first snapshot and after changes), "always" or False; ``forward`` calls a model when
    ``model(images)`` is not right.
    """

    def __init__(
        self,
        probe: ProbeBatch,
        *,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        threshold: float = 0.6,
        verify: bool | str = True,
        forward: Forward | None = None,
    ) -> None:
        self.probe = probe
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
        metrics = compute_metrics(layers, before, threshold=self.threshold, masks=self.probe.masks)
        snapshot = AttentionSnapshot(step, epoch, self.probe.names, layers, metrics)
        self.remember(snapshot)
        return snapshot

    def forget(self) -> None:
        """Drop the past: the next snapshot is the first one of a run."""
        self.previous, self.history = None, []

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`: the same images, and the same past."""
        self.probe = ProbeBatch.from_state_dict(state["probe"])
        self._chunk = len(self.probe)
        self.previous = None if state["previous"] is None else AttentionSnapshot.from_state_dict(state["previous"])
        self.history = [AttentionSnapshot.from_state_dict(s) for s in state["history"]]

    def _record(self, recorder: AttentionRecorder) -> list[LayerAttention]:
        """Rows of the whole probe, on the host; in smaller and smaller chunks when memory runs out."""
        while True:
            try:
                chunks = [_to_host(recorder(images)) for images in self.probe.images.split(self._chunk)]
            except Exception as error:
                if not _is_out_of_memory(error) or self._chunk == 1:
                    raise
                self._chunk = (self._chunk + 1) // 2
            else:
                return [replace(same[0], rows=torch.cat([a.rows for a in same])) for same in zip(*chunks, strict=True)]

    def remember(self, snapshot: AttentionSnapshot) -> None:
        """Make it the latest snapshot, which the next one is compared with."""
        self.previous = snapshot
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
            )
        return known


def _to_host(recorded: list[LayerAttention]) -> list[LayerAttention]:
    return [replace(attention, rows=attention.rows.cpu()) for attention in recorded]


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


def compute_metrics(
    layers: Captured, before: Captured, *, threshold: float, masks: Tensor | None = None
) -> dict[str, float]:
    """Every metric of a snapshot by tag: means over heads and images, and each head's own mean over images."""
    metrics: dict[str, float] = {}
    for (role, layer), attention in layers.items():
        p = attention.maps.flatten(-2)  # (B, H, N)
        per_head = {
            "entropy": F.entropy(p),
            "mask_area": F.mask_area(p, threshold),
            "peak": F.peak(p),
            **_prefix_mass(attention),
        }
        earlier = before.get((role, layer))
        if earlier is not None and earlier.rows.shape == attention.rows.shape:
            per_head["drift"] = F.js_divergence(p, earlier.maps.flatten(-2))
        if role == "student" and ("teacher", layer) in layers:
            teacher = layers["teacher", layer]
            if teacher.rows.shape == attention.rows.shape:
                per_head["student_teacher_divergence"] = F.js_divergence(p, teacher.maps.flatten(-2))
        for name, values in per_head.items():
            metrics[metric_tag(role, layer, name)] = float(values.mean())
            for head, value in enumerate(values.mean(0).tolist()):
                metrics[metric_tag(role, layer, name, head)] = value
        metrics[metric_tag(role, layer, "head_divergence")] = float(F.head_divergence(p).mean())
        if masks is not None:
            metrics.update(_jaccard(role, attention, masks, threshold))
    return metrics


def _prefix_mass(attention: LayerAttention) -> dict[str, Tensor]:
    """Attention on all prefix tokens together and, where there are several, on each: (B, H) each."""
    prefix = attention.rows[..., : attention.num_prefix]
    if attention.num_prefix == 0:
        return {}
    masses = {"prefix_mass": prefix.sum(-1)}
    if attention.num_prefix > 1:
        masses["prefix_mass_cls"] = prefix[..., 0]
        masses.update({f"prefix_mass_register{i}": prefix[..., i] for i in range(1, attention.num_prefix)})
    return masses


def _jaccard(role: str, attention: LayerAttention, masks: Tensor, threshold: float) -> dict[str, float]:
    """Overlap of mass masks with ground truth: best head per object (DINO's protocol), and the best single head."""
    shape = masks.shape[-2:]
    maps = F.mass_mask(attention.maps.flatten(-2), threshold).unflatten(-1, attention.grid)
    shown = torch.nn.functional.interpolate(maps.float(), shape, mode="nearest").bool().flatten(-2)  # (B, H, pixels)
    overlap = F.jaccard(shown[:, :, None], masks.flatten(-2)[:, None])  # (B, H, objects)
    present = masks.flatten(-2).any(-1)  # (B, objects)
    if not present.any():
        return {}
    per_object = overlap.transpose(1, 2)[present]  # (objects, H)
    tag = metric_tag(role, attention.layer, "jaccard")
    heads = {metric_tag(role, attention.layer, "jaccard", h): v for h, v in enumerate(per_object.mean(0).tolist())}
    best, fixed = float(per_object.amax(1).mean()), float(per_object.mean(0).amax())
    return {f"{tag}_best_head": best, f"{tag}_fixed_head": fixed, **heads}
