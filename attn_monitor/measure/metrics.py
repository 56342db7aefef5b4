"""The list of metrics: what each is computed from, which are on by default, and their values for a snapshot.

Values are computed once, on the device where the rows are. Everything that reports them (loggers, callbacks, archive,
health flags) uses these.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention
from attn_monitor.measure.sinks import names_of_prefix, received, sink_share
from attn_monitor.measurements import MetricKey, Metrics

Captured = Mapping[tuple[str, int], LayerAttention]
Measured = dict[tuple[str, int], dict[str, Tensor]]
"""Values by (role, layer) and name, on the host: (n, H) for each head, (n,) or () where heads make no sense."""


@dataclass(frozen=True)
class MetricInputs:
    """One layer of one role, and what it is compared with: each None where there is none of its shape."""

    attention: LayerAttention
    threshold: float
    before: LayerAttention | None = None
    teacher: MetricInputs | None = None  # of a student
    truth: Tensor | None = None  # objects, bool (B, objects, h, w)
    reference: LayerAttention | None = None  # at the step that Gram drift is measured against

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
    """How a metric is computed; where its inputs are missing it gives no values."""

    compute: Callable[[MetricInputs], Mapping[str, Tensor]]
    default: bool = True


def _prefix_mass(inputs: MetricInputs) -> dict[str, Tensor]:
    """Attention on all prefix tokens together and, where there are several, on CLS and each register."""
    prefix = inputs.attention.rows[..., : inputs.attention.num_prefix]
    if inputs.attention.num_prefix == 0:
        return {}
    masses = {"prefix_mass": prefix.sum(-1)}
    if inputs.attention.num_prefix > 1:
        for index, name in enumerate(names_of_prefix(inputs.attention)):
            if "token" not in name:  # found to be CLS or a register
                masses[f"prefix_mass_{name.lower().replace(' ', '')}"] = prefix[..., index]
    return masses


def _outlier_fraction(inputs: MetricInputs) -> dict[str, Tensor]:
    norms = inputs.attention.norms
    return {} if norms is None else {"outlier_fraction": F.outlier_fraction(norms[:, inputs.attention.num_prefix :])}


def _drift(inputs: MetricInputs) -> dict[str, Tensor]:
    if inputs.before is None:
        return {}
    return {"drift": F.js_divergence(inputs.p, inputs.before.maps.flatten(-2).to(inputs.p.device))}


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
    return {} if inputs.attention.distance is None else {"distance": inputs.attention.distance}


def _max_logit(inputs: MetricInputs) -> dict[str, Tensor]:
    """Of all queries where every query was read, and of the CLS query."""
    known = {name: getattr(inputs.attention, name) for name in LARGEST}
    return {name: value for name, value in known.items() if value is not None}


def _sinks(inputs: MetricInputs) -> dict[str, Tensor]:
    """Of every query where every query was read, else of the CLS query."""
    for name, cls in (("sink_share", False), ("sink_share_cls", True)):
        shares = received(inputs.attention, cls=cls)
        if shares is not None:
            return {name: sink_share(shares, inputs.attention.num_prefix)}
    return {}


def _jaccard(inputs: MetricInputs) -> dict[str, Tensor]:
    """Overlap with each object: of each head, of the best head for each object (DINO), of the one best head."""
    if inputs.truth is None or not inputs.truth.any():
        return {}
    truth = inputs.truth.to(inputs.p.device)
    maps = inputs.mask.unflatten(-1, inputs.attention.grid).float()
    shown = inputs.attention.grid.over_pixels(maps, (truth.shape[-2], truth.shape[-1])).bool().flatten(-2)
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
    "gram_drift": Metric(_gram_drift),  # where features are stored
    "jaccard": Metric(_jaccard),
    "max_logit": Metric(_max_logit),
    "sinks": Metric(_sinks),
}
LARGEST = ("max_logit", "max_logit_cls")
"""Values of which the largest counts over heads and images, and not the mean."""
SINK_SHARES = ("sink_share", "sink_share_cls")
"""What "sinks" gives, by which queries were read."""
TOKEN_METRICS = {"outlier_fraction", "cls_patch_cosine"}
METRICS_OF_ANY_WEIGHTS = {
    "prefix_mass",
    "gram_drift",
    *TOKEN_METRICS,
    "max_logit",
}  # the others are of distributions, which signed weights are not


def check_threshold(threshold: float) -> float:
    """The mask's threshold, if it is one."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected a share of attention mass above 0 and up to 1, such as 0.6")
    return threshold


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
    reference: Captured | None = None,
) -> Measured:
    """Every selected metric of what was captured; ``before`` is the snapshot before, ``truth`` (B, objects, h, w).

    ``reference`` is the snapshot that Gram drift is measured against.
    """
    inputs: dict[tuple[str, int], MetricInputs] = {}
    for role, layer in sorted(layers, key=lambda key: key[0] == "student"):  # teachers first: students refer to them
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
        told = [m for m in metrics if layers[key].kind != "signed" or m in METRICS_OF_ANY_WEIGHTS]
        measured[key] = {k: v.detach() for m in told for k, v in METRICS[m].compute(inputs[key]).items()}
    return _to_host(measured)


def _alike(other: LayerAttention | None, attention: LayerAttention) -> LayerAttention | None:
    return other if other is not None and other.rows.shape == attention.rows.shape else None


def _to_host(measured: Measured) -> Measured:
    """All values in one transfer."""
    flat = [v.float().flatten() for values in measured.values() for v in values.values()]
    numbers = iter(torch.cat(flat).cpu().split([len(v) for v in flat]) if flat else ())
    return {key: {k: next(numbers).view(v.shape) for k, v in values.items()} for key, values in measured.items()}


def summarise(measured: Measured) -> Metrics:
    """What loggers get: means over heads and images, and each head's own mean over images; the largest of `LARGEST`."""
    metrics = Metrics()
    for (role, layer), values in measured.items():
        for name, value in values.items():
            largest = name in LARGEST
            metrics[MetricKey(role, layer, name)] = float(value.amax() if largest else value.mean())
            if value.ndim == 2:
                for head, summary in enumerate(value.amax(0) if largest else value.mean(0)):
                    metrics[MetricKey(role, layer, name, head)] = float(summary)
    return metrics
