"""`AttentionSnapshot`: what was captured at one step, and its file format.

A file is a plain `.npz`: `header` holds JSON, and each `rows/{role}/{layer}` a (B, H, T) float16 array; `colors` are
uint8, `features` float16 and all other optional tensors float32, so that `numpy.load(path, allow_pickle=False)` reads
it anywhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attn_monitor.attention import KINDS, OPTIONAL_TENSORS, LayerAttention
from attn_monitor.errors import ArchiveError
from attn_monitor.measure.health import HEALTH_TAG, HealthFlag
from attn_monitor.measure.metrics import MetricKey, Metrics
from attn_monitor.patch_colors import PatchColors
from attn_monitor.record import format_1 as first_format
from attn_monitor.record.geometry import geometry_facts, read_geometry
from attn_monitor.record.header_fields import Fields
from attn_monitor.record.npz import FORMAT, Shape, Take, check_format, open_npz, parse_json, tensors_in, write_npz

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRECISION = 1e-2  # of sums over a row, which is stored in float16 and may come from a softmax in bfloat16


@dataclass(frozen=True)
class AttentionSnapshot:
    """Attention of every role and layer on the probe at one step, on the host, with the metrics made from it.

    ``layers`` maps (role, layer) to a `LayerAttention`; ``names`` are the probe images'; ``metrics`` are values by
    `MetricKey` (role, layer, metric, head); ``flags`` are the health flags raised at this step, ``flags_raised`` how
    many the run has raised so far, these included.
    """

    step: int
    epoch: int
    names: tuple[str, ...]
    layers: Mapping[tuple[str, int], LayerAttention]
    metrics: Metrics = field(default_factory=Metrics)
    flags: tuple[HealthFlag, ...] = ()
    flags_raised: int = 0

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles in the order of capture, such as ("student", "teacher")."""
        return tuple(dict.fromkeys(role for role, _ in self.layers))

    def layers_of(self, role: str) -> tuple[int, ...]:
        """Layer indices captured for a role, in order."""
        return tuple(layer for r, layer in self.layers if r == role)

    def drawn_layers(self, every: bool = False) -> tuple[int, ...]:
        """Layers that pictures show: the last one captured, or every one."""
        captured = self.layers_of(self.roles[-1])
        return captured if every else captured[-1:]

    def layer(self, role: str, layer: int = -1) -> LayerAttention:
        """One layer's attention; a negative layer counts from the last one captured."""
        captured = self.layers_of(role)
        if not captured:
            raise KeyError(f"role {role!r} is not in this snapshot; it holds {', '.join(self.roles)}")
        if layer < 0 and -layer <= len(captured):
            layer = captured[layer]
        if layer not in captured:
            raise KeyError(f"layer {layer} of {role!r} is not in this snapshot; it holds {list(captured)}")
        return self.layers[role, layer]

    def rows(self, role: str, layer: int = -1) -> Tensor:
        """(B, H, T) float32: prefix tokens first, then patches row by row; sums to 1 unless the layer is mixed."""
        return self.layer(role, layer).rows

    def maps(self, role: str, layer: int = -1) -> Tensor:
        """(B, H, gh, gw) float32: the patch part of `rows`."""
        return self.layer(role, layer).maps

    def scalars(self, *, heads: bool | Collection[int] = True) -> dict[str, float]:
        """What loggers get, by tag: ``attn/…`` means, ``attn/health_flags``, and ``attn_heads/…`` of each head.

        ``heads``: whether heads are wanted, or the layers of which they are.
        """
        layers = heads if isinstance(heads, Collection) else {key.layer for key in self.metrics} if heads else ()
        values = {key.tag: value for key, value in self.metrics.items() if key.head is None or key.layer in layers}
        return {**values, HEALTH_TAG: float(self.flags_raised)}

    def plot(self, image: int = 0, *, role: str | None = None, layer: int = -1) -> Figure:
        """A matplotlib figure of an image's maps, of the last role where none is named; matplotlib must be there."""
        from attn_monitor.draw.notebook import snapshot_figure

        return snapshot_figure(self, image, role, layer)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        from attn_monitor.draw.notebook import snapshot_png

        return snapshot_png(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a temporary name and rename, so that a reader never meets half a file."""
        header, arrays = self._stored()
        write_npz(Path(path), header, {k: v.numpy() for k, v in arrays.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionSnapshot:
        """Read a snapshot; `ArchiveError` when the file is not one, or its parts contradict each other."""
        with open_npz(Path(path)) as file:
            return cls._from_stored(file.header, file.tensor)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: float16 tensors and a JSON text, loadable with ``weights_only=True``."""
        header, arrays = self._stored()
        return {"header": json.dumps({"format": FORMAT, **header}), "arrays": arrays}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> AttentionSnapshot:
        """The snapshot that `state_dict` came from, in float16 precision; `ArchiveError` when it is not one."""
        stored = Fields(state, "state of a snapshot")
        header = Fields(parse_json(stored.text("header")), "header")
        check_format(header)
        return cls._from_stored(header, tensors_in(stored.mapping("arrays")))

    def only(self, layers: Sequence[int]) -> AttentionSnapshot:
        """The same without metrics and other layers: what a film strip needs."""
        kept = {key: value.rows_alone() for key, value in self.layers.items() if key[1] in layers}
        return AttentionSnapshot(self.step, self.epoch, self.names, kept)

    def _stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        arrays = {f"rows/{role}/{layer}": a.rows.half() for (role, layer), a in self.layers.items()}
        header = {
            "step": self.step,
            "epoch": self.epoch,
            "names": list(self.names),
            # Apart, as versions that do not know flags of whole models read the others.
            "flags": [flag.state_dict() for flag in self.flags if flag.layer is not None],
            "model_flags": [flag.state_dict() for flag in self.flags if flag.layer is None],
            "flags_raised": self.flags_raised,
            "layers": [
                {
                    "role": role,
                    "layer": layer,
                    "name": a.name,
                    "num_prefix": a.num_prefix,
                    "grid": list(a.grid),
                    "mixed": a.mixed,
                    "kind": a.kind,
                    "places": a.places,
                    "model": a.model,
                    "query": a.query,
                    "prefix_names": list(a.prefix_names),
                    "verified_error": _finite(a.verified_error),
                    "heads": a.rows.shape[1],
                    "metrics": _stored_metrics(self.metrics, role, layer),
                    **_facts(arrays[f"rows/{role}/{layer}"].float(), a.kind),
                    **_patch_facts(a),
                    **geometry_facts(a.geometry),
                }
                for (role, layer), a in self.layers.items()
            ],
        }
        for name in OPTIONAL_TENSORS:
            optional = {f"{name}/{role}/{layer}": getattr(a, name) for (role, layer), a in self.layers.items()}
            arrays.update({key: value.float() for key, value in optional.items() if value is not None})
        for (role, layer), a in self.layers.items():
            if a.colors is not None:
                arrays[f"colors/{role}/{layer}"] = (a.colors * 255).round().byte()
            if a.features is not None:
                arrays[f"features/{role}/{layer}"] = a.features.half()
        return header, arrays

    @classmethod
    def _from_stored(cls, header: Fields, take: Take) -> AttentionSnapshot:
        names, metrics = header.names("names"), Metrics()
        by_tag = first_format.Tags(header.mapping("metrics")) if "metrics" in header else None
        layers: dict[tuple[str, int], LayerAttention] = {}
        for number, item in enumerate(header.items("layers")):
            entry = Fields(item, f"header's entry {number} of layers")
            key = entry.text("role"), entry.whole("layer")
            if key in layers:
                raise ArchiveError(f"layer {key[1]} of {key[0]!r} is there twice")
            of_layer = _metrics(entry, *key) if by_tag is None else by_tag.of_layer(*key)
            layers[key] = _layer(entry, len(names), of_layer, take)
            metrics.update(of_layer)
        if not layers:
            raise ArchiveError("the header has no layers: expected at least one")
        flags = tuple(
            _flag(Fields(item, f"header's {what} {number}"), about)
            for kind, what, about in (("model_flags", "model flag", None), ("flags", "flag", layers))
            for number, item in enumerate(header.items(kind, default=[]))
        )
        raised = header.whole("flags_raised") if by_tag is None else by_tag.flags_raised
        return cls(header.whole("step"), header.whole("epoch"), names, layers, metrics, flags, raised)


def _layer(entry: Fields, images: int, metrics: Metrics, take: Take) -> LayerAttention:
    """One layer, checked against itself and against its metrics."""
    role, index, prefix = entry.text("role"), entry.whole("layer"), entry.whole("num_prefix")
    gh, gw = entry.wholes("grid", count=2, least=1)
    heads = entry.whole("heads", least=1) if "heads" in entry else None
    shapes: dict[str, Shape] = {
        "rows": (images, heads, prefix + gh * gw),
        "distance": (images, heads),
        "norms": (images, prefix + gh * gw),
        "cosine": (images,),
        "max_logit": (images, heads),
        "max_logit_cls": (images, heads),
        "received": (images, prefix + gh * gw),
        "value_norms": (images, prefix + gh * gw),
    }
    rows = take(f"rows/{role}/{index}", ("float16",), shapes["rows"])
    if rows is None:
        raise ArchiveError(f"rows of layer {index} of {role!r} are missing")
    shapes.update(dict.fromkeys(("distance", "max_logit", "max_logit_cls"), rows.shape[:2]))
    rows = rows.float()
    optional: dict[str, Any] = {n: take(f"{n}/{role}/{index}", ("float32",), shapes[n]) for n in OPTIONAL_TENSORS}
    name, mixed, error = entry.text("name"), entry.truth("mixed"), entry.number("verified_error")
    told = entry.text("kind", default="weights" if mixed else "distribution")
    kind = next((k for k in KINDS if k == told), None)
    if kind is None:
        raise ArchiveError(f"kind of layer {index} of {role!r} is {told!r}, expected one of {', '.join(KINDS)}")
    optional.update({key: entry.text(key, default="") for key in ("places", "model", "query")})  # not in older files
    optional["prefix_names"] = entry.names("prefix_names") if entry.items("prefix_names", default=[]) else ()
    optional.update(_patches(entry, (images, gh * gw), take), geometry=read_geometry(entry))
    attention = LayerAttention(index, name, rows, prefix, (gh, gw), mixed, error, kind, **optional)
    _check_rows(entry, attention, metrics)
    if len(attention.prefix_names) not in (0, prefix):
        raise ArchiveError(f"prefix_names of layer {index} of {role!r} are not {prefix}")
    return attention


def _patches(entry: Fields, shape: tuple[int, int], take: Take) -> dict[str, Any]:
    """What is stored of the patch tokens of one layer, (images, patches) each."""
    role, index, found = entry.text("role"), entry.whole("layer"), dict[str, Any]()
    colors = take(f"colors/{role}/{index}", ("uint8",), (*shape, 3)) if "color_scale" in entry else None
    if colors is not None:
        scale = entry.number("color_scale")
        if not scale > 0:
            raise ArchiveError(f"color_scale of layer {index} of {role!r} is {scale}, expected a number above 0")
        found["patch_colors"] = PatchColors.of(colors.float() / 255, scale)
    features = take(f"features/{role}/{index}", ("float16",), (*shape, None)) if "features_error" in entry else None
    if features is not None:
        error = entry.numbers("features_error", missing=True)
        if len(error) != 2:
            raise ArchiveError(f"features_error of layer {index} of {role!r} is {error}, expected two numbers")
        found.update(features=features.float(), features_error=error)
    return found


def _patch_facts(attention: LayerAttention) -> dict[str, Any]:
    """What a file says of the patch tokens' colours and features."""
    facts: dict[str, Any] = {}
    if attention.patch_colors is not None:
        facts["color_scale"] = attention.patch_colors.scale
    if attention.features is not None and attention.features_error is not None:
        facts["features_error"] = list(map(_finite, attention.features_error))
    return facts


def _check_rows(entry: Fields, attention: LayerAttention, metrics: Metrics) -> None:
    """Refuse rows that are not what the header and the metrics made from them say."""
    where = f"rows of layer {attention.layer} of {entry.text('role')!r}"
    facts = _facts(attention.rows, attention.kind)
    of_layer = metrics.of_layer(entry.text("role"), attention.layer)
    # Files of the first stage do not say whether rows hold NaN. Then the entropy is NaN too.
    told = entry.truth("finite", default=math.isfinite(of_layer.get("entropy", math.nan)))
    if told and not facts["finite"]:
        raise ArchiveError(f"{where} hold NaN or infinity, and the header does not say so")
    if entry.truth("distribution", default=attention.kind == "distribution") and not facts["distribution"]:
        raise ArchiveError(f"{where} are not distributions: expected shares of at least 0 that sum to 1")
    found, measured = attention.rows[..., : attention.num_prefix].sum(-1).mean(), of_layer.get("prefix_mass", math.nan)
    if attention.kind == "distribution" and abs(measured - found) > PRECISION:
        raise ArchiveError(f"{where}: num_prefix={attention.num_prefix} does not fit prefix_mass={measured:.3g}")


def _facts(rows: Tensor, kind: str) -> dict[str, bool]:
    """What a file says of its rows in the header, so that nothing else is taken for it."""
    finite = rows.isfinite().all(-1)
    shares = (rows.amin(-1) >= 0) & ((rows.sum(-1) - 1).abs() <= PRECISION)
    return {"finite": bool(finite.all()), "distribution": kind == "distribution" and bool((shares | ~finite).all())}


def _stored_metrics(metrics: Metrics, role: str, layer: int) -> dict[str, dict[str, Any]]:
    """Of one layer by name: the mean, and where there are some the heads' own values from head 0 on."""
    stored: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        if key[:2] == (role, layer) and key.head is None:
            stored.setdefault(key.metric, {})["mean"] = _finite(value)
        elif key[:2] == (role, layer):
            stored.setdefault(key.metric, {}).setdefault("heads", []).append(_finite(value))
    return stored


def _metrics(entry: Fields, role: str, layer: int) -> Metrics:
    """What `_stored_metrics` stored."""
    metrics, stored = Metrics(), entry.within("metrics")
    for name in stored:
        values = stored.within(name)
        metrics[MetricKey(role, layer, name)] = values.number("mean")
        if "heads" in values:
            heads = values.numbers("heads", missing=True)
            if len(heads) != entry.whole("heads"):
                raise ArchiveError(
                    f"{name} in the {stored.where} has {len(heads)} values for {entry.whole('heads')} heads"
                )
            metrics.update({MetricKey(role, layer, name, head): value for head, value in enumerate(heads)})
    return metrics


def _flag(stored: Fields, layers: Mapping[tuple[str, int], LayerAttention] | None) -> HealthFlag:
    """A flag about one of these layers, or about a whole model where there are none."""
    role, layer, heads = stored.text("role"), None, stored.wholes("heads")
    if layers is not None:
        layer = stored.whole("layer")
        if (role, layer) not in layers or any(head >= layers[role, layer].rows.shape[1] for head in heads):
            raise ArchiveError(
                f"the {stored.where} is about layer {layer} of {role!r}, heads {heads}, which are not here"
            )
    value = stored.number("value")
    known = None if math.isnan(value) else value
    return HealthFlag(stored.text("kind"), role, layer, heads, stored.whole("step"), known, stored.text("text"))


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
