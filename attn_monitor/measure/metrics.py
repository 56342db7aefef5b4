"""`METRICS`, the metrics by name, and their computation for a snapshot.

Values of attention are computed once, on the device of the rows; loggers, callbacks, the archive and health flags use
the same ones. Dense metrics are computed where pictures are drawn, see `attn_monitor.draw.history`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention
from attn_monitor.errors import ArgumentError
from attn_monitor.measure.sinks import received_shares, sink_share
from attn_monitor.measurements import MetricKey, Metrics

Captured = Mapping[tuple[str, int], LayerAttention]
Measured = dict[tuple[str, int], dict[str, Tensor]]
"""Values by (role, layer) and name, on the host: (n, H) with a value per head, otherwise (n,) or ()."""


@dataclass(frozen=True)
class MetricInputs:
    """One layer of one role and what it is compared with, None where nothing of its shape exists.

    Args:
        attention: Attention of the layer.
        threshold: Share of attention in the mass mask, 0 to 1.
        before: The same layer in the previous snapshot.
        teacher: The teacher's inputs, for a student.
        truth: Ground-truth objects, bool (B, objects, h, w).
        reference: The same layer at the step that Gram drift is measured against.
    """

    attention: LayerAttention
    threshold: float
    before: LayerAttention | None = None
    teacher: MetricInputs | None = None
    truth: Tensor | None = None
    reference: LayerAttention | None = None

    @cached_property
    def p(self) -> Tensor:
        """Attention on patches, (B, H, N)."""
        return self.attention.on_patches

    @cached_property
    def mask(self) -> Tensor:
        """DINO's mass mask, bool (B, H, N)."""
        return F.mass_mask(self.p, self.threshold)


@dataclass(frozen=True)
class Metric:
    """A metric: ``compute`` returns its values by name, none if inputs are missing; ``default`` selects it."""

    compute: Callable[[MetricInputs], Mapping[str, Tensor]] = lambda inputs: {}
    default: bool = True


def _prefix_mass(inputs: MetricInputs) -> dict[str, Tensor]:
    """Sum the attention on all prefix tokens and, if there are several, on the CLS token and each register.

    Of the CLS tokens of frames, "CLS 0", "CLS 1" and so on, only the sum is a metric.
    """
    prefix = inputs.attention.rows[..., : inputs.attention.num_prefix]
    if inputs.attention.num_prefix == 0:
        return {}
    masses = {"prefix_mass": prefix.sum(-1)}
    if inputs.attention.num_prefix > 1:
        for index, name in enumerate(inputs.attention.prefix_names):
            if "token" not in name and not name.startswith("CLS "):  # known to be the CLS token or a register
                masses[f"prefix_mass_{name.lower().replace(' ', '')}"] = prefix[..., index]
    return masses


def _outlier_fraction(inputs: MetricInputs) -> dict[str, Tensor]:
    norms = inputs.attention.norms
    return {} if norms is None else {"outlier_fraction": F.outlier_fraction(norms[:, inputs.attention.num_prefix :])}


def _drift(inputs: MetricInputs) -> dict[str, Tensor]:
    if inputs.before is None:
        return {}
    return {"drift": F.js_divergence(inputs.p, inputs.before.on_patches.to(inputs.p.device))}


def _student_teacher_divergence(inputs: MetricInputs) -> dict[str, Tensor]:
    if inputs.teacher is None:
        return {}
    return {"student_teacher_divergence": F.js_divergence(inputs.p, inputs.teacher.p)}


def _mask_agreement(inputs: MetricInputs) -> dict[str, Tensor]:
    return {} if inputs.teacher is None else {"mask_agreement": F.jaccard(inputs.mask, inputs.teacher.mask)}


def _cls_patch_cosine(inputs: MetricInputs) -> dict[str, Tensor]:
    return {} if inputs.attention.cosine is None else {"cls_patch_cosine": inputs.attention.cosine}


def _gram_drift(inputs: MetricInputs) -> dict[str, Tensor]:
    now, then = inputs.attention.features, None if inputs.reference is None else inputs.reference.features
    if now is None or then is None or now.shape != then.shape:
        return {}
    return {"gram_drift": F.gram_drift(now, then).to(inputs.p.device)}


def _distance(inputs: MetricInputs) -> dict[str, Tensor]:
    distance, axes = inputs.attention.distance, inputs.attention.grid.axes
    if distance is None:
        return {}
    if distance.ndim == 2:
        return {"distance": distance}
    return {f"distance_{axis}": along for axis, along in zip(axes, distance.unbind(-1), strict=True)}


def _max_logit(inputs: MetricInputs) -> dict[str, Tensor]:
    """Return the largest logit over every query if every query was read, and of the CLS query."""
    known = {name: getattr(inputs.attention, name) for name in LARGEST}
    return {name: value for name, value in known.items() if value is not None}


def _sinks(inputs: MetricInputs) -> dict[str, Tensor]:
    """Return the share on sinks for every query if every query was read, otherwise for the CLS query."""
    for name, cls in (("sink_share", False), ("sink_share_cls", True)):
        shares = received_shares(inputs.attention, cls=cls)
        if shares is not None:
            return {name: sink_share(shares, inputs.attention.num_prefix)}
    return {}


def _jaccard(inputs: MetricInputs) -> dict[str, Tensor]:
    """Compute the overlap with objects: of each head, of each object's best head (DINO) and of the best fixed head."""
    if inputs.truth is None or not inputs.truth.any():
        return {}
    truth = inputs.truth.to(inputs.p.device)
    if len(inputs.attention.grid) > truth.ndim - 2:  # groups of channels are no axis of the image
        inputs = MetricInputs(inputs.attention.in_plane(), inputs.threshold)
    maps = inputs.mask.unflatten(-1, inputs.attention.grid).float()
    shown = inputs.attention.grid.over_pixels(maps, truth.shape[2:]).bool().flatten(2)
    truth = truth.flatten(2)
    overlap = F.jaccard(shown[:, :, None], truth[:, None])  # (B, H, objects)
    per_object = overlap.transpose(1, 2)[truth.any(-1)]  # (objects there, H)
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
    "gram_drift": Metric(_gram_drift),  # where features are stored
    "dense": Metric(),  # computed behind training: see `draw.history`
    "jaccard": Metric(_jaccard),
    "max_logit": Metric(_max_logit),
    "sinks": Metric(_sinks),
}
LARGEST = ("max_logit", "max_logit_cls")
"""Values that are summarised by their maximum over heads and images instead of the mean."""
SINK_SHARES = ("sink_share", "sink_share_cls")
"""Values of "sinks": over every query, or of the CLS query alone."""
TOKEN_METRICS = {"outlier_fraction", "cls_patch_cosine"}
METRICS_OF_ANY_WEIGHTS = {"prefix_mass", "gram_drift", *TOKEN_METRICS, "max_logit"}
"""Metrics that are defined for signed weights too; all others need a distribution."""


def select_metrics(metrics: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the names of the selected metrics in the order of `METRICS`.

    Args:
        metrics: None for the default metrics, "all", a name, or a sequence of names.

    Raises:
        ArgumentError: A name is unknown, or ``metrics`` is of another type.
    """
    if metrics is None:
        return tuple(name for name, metric in METRICS.items() if metric.default)
    if metrics == "all":
        return tuple(METRICS)
    expected = f'expected None, "all" or names among {", ".join(METRICS)}'
    if not isinstance(metrics, Iterable) or isinstance(metrics, (bytes, Mapping)):
        raise ArgumentError(f"metrics: received a {type(metrics).__name__}, {expected}")
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in [*METRICS]:
            near = difflib.get_close_matches(str(name), METRICS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"metrics: received {name!r}, {expected}{hint}")
    return tuple(name for name in METRICS if name in names)


@F.full_precision()
def measure(
    layers: Captured,
    before: Captured,
    *,
    metrics: Sequence[str],
    threshold: float,
    truth: Tensor | None = None,
    reference: Captured | None = None,
) -> Measured:
    """Compute the selected metrics.

    Args:
        layers: Attention by (role, layer).
        before: Attention of the previous snapshot.
        metrics: Names of metrics, see `select_metrics`.
        threshold: Share of attention in the mass mask, above 0 and up to 1.
        truth: Ground-truth objects, bool (B, objects, h, w).
        reference: Attention of the snapshot that Gram drift is measured against.
    """
    inputs: dict[tuple[str, int], MetricInputs] = {}
    for role, layer in sorted(layers, key=lambda key: key[0] == "student"):  # teachers first, as students refer to them
        attention = layers[role, layer]
        teacher = inputs.get(("teacher", layer)) if role == "student" else None
        inputs[role, layer] = MetricInputs(
            attention,
            threshold,
            before=_alike(before.get((role, layer)), attention),
            teacher=None if teacher is None or _alike(teacher.attention, attention) is None else teacher,
            truth=truth,
            reference=_alike((reference or {}).get((role, layer)), attention),
        )
    measured: Measured = {}
    for key in layers:
        defined = [m for m in metrics if layers[key].kind != "signed" or m in METRICS_OF_ANY_WEIGHTS]
        measured[key] = {k: v.detach() for m in defined for k, v in METRICS[m].compute(inputs[key]).items()}
    return _to_host(measured)


def _alike(other: LayerAttention | None, attention: LayerAttention) -> LayerAttention | None:
    return other if other is not None and other.rows.shape == attention.rows.shape else None


def _to_host(measured: Measured) -> Measured:
    """Copy all values to the host in one transfer."""
    flat = [v.float().flatten() for values in measured.values() for v in values.values()]
    numbers = iter(torch.cat(flat).cpu().split([len(v) for v in flat]) if flat else ())
    return {key: {k: next(numbers).view(v.shape) for k, v in values.items()} for key, values in measured.items()}


def summarise(measured: Measured) -> Metrics:
    """Average the values over heads and images, and those of each head over images; take the maximum of `LARGEST`."""
    metrics = Metrics()
    for (role, layer), values in measured.items():
        for name, value in values.items():
            largest = name in LARGEST
            metrics[MetricKey(role, layer, name)] = float(value.amax() if largest else value.mean())
            if value.ndim == 2:
                for head, summary in enumerate((value.amax(0) if largest else value.mean(0)).tolist()):
                    metrics[MetricKey(role, layer, name, head)] = summary
    return metrics
