"""The list of metrics: what each is computed from, which are on by default, and their values for a snapshot.

Values are computed once, on the device where the rows are. Everything that reports them (loggers, callbacks, archive,
health flags) uses these.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention

Captured = Mapping[tuple[str, int], LayerAttention]
Measured = dict[tuple[str, int], dict[str, Tensor]]
"""Values by (role, layer) and name, on the host: (n, H) for each head, (n,) or () where heads make no sense."""


def metric_tag(role: str, layer: int, metric: str, head: int | None = None) -> str:
    """Name of a metric wherever it is logged: the mean, or one head's own value."""
    if head is None:
        return f"attn/{role}/layer{layer}/{metric}"
    return f"attn_heads/{role}/layer{layer}/{metric}/head{head}"


@dataclass(frozen=True)
class Scene:
    """What a metric may look at: one layer of one role, and what it is compared with (None: nothing of its shape)."""

    attention: LayerAttention
    threshold: float
    before: LayerAttention | None = None
    teacher: Scene | None = None  # of a student
    truth: Tensor | None = None  # objects, bool (B, objects, h, w)

    @cached_property
    def p(self) -> Tensor:
        """Attention over patches, (B, H, N)."""
        return self.attention.maps.flatten(-2)

    @cached_property
    def mask(self) -> Tensor:
        """DINO's mass mask, bool (B, H, N)."""
        return F.mass_mask(self.p, self.threshold)


@dataclass(frozen=True)
class Metric:
    """How a metric is computed; one that has nothing to look at in a scene gives no values there."""

    compute: Callable[[Scene], Mapping[str, Tensor]]
    default: bool = True


def _prefix_mass(scene: Scene) -> dict[str, Tensor]:
    """Attention on all prefix tokens together and, where there are several, on each."""
    prefix = scene.attention.rows[..., : scene.attention.num_prefix]
    if scene.attention.num_prefix == 0:
        return {}
    masses = {"prefix_mass": prefix.sum(-1)}
    if scene.attention.num_prefix > 1:
        masses["prefix_mass_cls"] = prefix[..., 0]
        masses.update({f"prefix_mass_register{i}": prefix[..., i] for i in range(1, scene.attention.num_prefix)})
    return masses


def _outlier_fraction(scene: Scene) -> dict[str, Tensor]:
    norms = scene.attention.norms
    return {} if norms is None else {"outlier_fraction": F.outlier_fraction(norms[:, scene.attention.num_prefix :])}


def _drift(scene: Scene) -> dict[str, Tensor]:
    if scene.before is None:
        return {}
    return {"drift": F.js_divergence(scene.p, scene.before.maps.flatten(-2).to(scene.p.device))}


def _student_teacher_divergence(scene: Scene) -> dict[str, Tensor]:
    if scene.teacher is None:
        return {}
    return {"student_teacher_divergence": F.js_divergence(scene.p, scene.teacher.p)}


def _mask_agreement(scene: Scene) -> dict[str, Tensor]:
    return {} if scene.teacher is None else {"mask_agreement": F.jaccard(scene.mask, scene.teacher.mask)}


def _cls_patch_cosine(scene: Scene) -> dict[str, Tensor]:
    return {} if scene.attention.cosine is None else {"cls_patch_cosine": scene.attention.cosine}


def _distance(scene: Scene) -> dict[str, Tensor]:
    return {} if scene.attention.distance is None else {"distance": scene.attention.distance}


def _jaccard(scene: Scene) -> dict[str, Tensor]:
    """Overlap with each object: of each head, of the best head for each object (DINO), of the one best head."""
    if scene.truth is None or not scene.truth.any():
        return {}
    truth = scene.truth.to(scene.p.device)
    maps = scene.mask.unflatten(-1, scene.attention.grid).float()
    shown = torch.nn.functional.interpolate(maps, truth.shape[-2:], mode="nearest").bool().flatten(-2)
    overlap = F.jaccard(shown[:, :, None], truth.flatten(-2)[:, None])  # (B, H, objects)
    per_object = overlap.transpose(1, 2)[truth.flatten(-2).any(-1)]  # (objects there, H)
    # A head without a mask (NaN in its row) overlaps with nothing.
    best, fixed = per_object.amax(1), per_object.mean(0).amax()
    return {"jaccard": per_object, "jaccard_best_head": best, "jaccard_fixed_head": fixed}


METRICS = {
    "entropy": Metric(lambda s: {"entropy": F.entropy(s.p)}),
    "mask_area": Metric(lambda s: {"mask_area": F.area_of(s.mask, s.p)}),
    "prefix_mass": Metric(_prefix_mass),
    "peak": Metric(lambda s: {"peak": F.peak(s.p)}),
    "outlier_fraction": Metric(_outlier_fraction),
    "head_divergence": Metric(lambda s: {"head_divergence": F.head_divergence(s.p)}),
    "student_teacher_divergence": Metric(_student_teacher_divergence),
    "mask_agreement": Metric(_mask_agreement),
    "drift": Metric(_drift),
    "distance": Metric(_distance, default=False),  # needs every query's row
    "cls_patch_cosine": Metric(_cls_patch_cosine),
    "jaccard": Metric(_jaccard),
}
OF_TOKENS = {"outlier_fraction", "cls_patch_cosine"}
OF_ANY_WEIGHTS = {"prefix_mass", *OF_TOKENS}  # the others are of distributions, which signed weights are not


def select_metrics(metrics: Sequence[str] | str | None) -> tuple[str, ...]:
    """Names of metrics: None for those on by default, "all", or the names given; an unknown one is an error."""
    if metrics is None:
        return tuple(name for name, metric in METRICS.items() if metric.default)
    if metrics == "all":
        return tuple(METRICS)
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(str(name), METRICS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            expected = f'expected None, "all" or names among {", ".join(METRICS)}'
            raise ValueError(f"metrics: received {name!r}, {expected}{hint}")
    return tuple(name for name in METRICS if name in names)


@F.full_precision()
def measure(
    layers: Captured,
    before: Captured,
    *,
    metrics: Sequence[str],
    threshold: float,
    truth: Tensor | None = None,
) -> Measured:
    """Every selected metric of what was captured; ``before`` is the snapshot before, ``truth`` (B, objects, h, w)."""
    scenes: dict[tuple[str, int], Scene] = {}
    for role, layer in sorted(layers, key=lambda key: key[0] == "student"):  # teachers first: students refer to them
        attention = layers[role, layer]
        teacher = scenes.get(("teacher", layer)) if role == "student" else None
        scenes[role, layer] = Scene(
            attention,
            threshold,
            before=_alike(before.get((role, layer)), attention),
            teacher=None if teacher is None or _alike(teacher.attention, attention) is None else teacher,
            truth=truth,
        )
    measured: Measured = {}
    for key in layers:
        told = [m for m in metrics if layers[key].kind != "signed" or m in OF_ANY_WEIGHTS]
        measured[key] = {k: v.detach() for m in told for k, v in METRICS[m].compute(scenes[key]).items()}
    return _to_host(measured)


def _alike(other: LayerAttention | None, attention: LayerAttention) -> LayerAttention | None:
    return other if other is not None and other.rows.shape == attention.rows.shape else None


def _to_host(measured: Measured) -> Measured:
    """All values in one transfer."""
    flat = [v.float().flatten() for values in measured.values() for v in values.values()]
    numbers = iter(torch.cat(flat).cpu().split([len(v) for v in flat]) if flat else ())
    return {key: {k: next(numbers).view(v.shape) for k, v in values.items()} for key, values in measured.items()}


def summarise(measured: Measured) -> dict[str, float]:
    """What loggers get, by tag: means over heads and images, and each head's own mean over images."""
    metrics: dict[str, float] = {}
    for (role, layer), values in measured.items():
        for name, value in values.items():
            metrics[metric_tag(role, layer, name)] = float(value.mean())
            if value.ndim == 2:
                heads: Any = value.mean(0).tolist()
                metrics.update({metric_tag(role, layer, name, head): v for head, v in enumerate(heads)})
    return metrics
