"""Run a model on images and observe its attention: `record_attention`, and `AttentionRecorder` to do so repeatedly.

A first forward on noise images finds every attention site, its token layout and what stands in the way of reading
it. From then on only the wanted modules are watched, and the forward is left after the last of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor import layout as lay
from attn_monitor.errors import (
    AttentionError,
    ForwardError,
    LayerError,
    NoAttentionError,
    NonFiniteAttentionError,
    QueryError,
    UnsupportedAttentionError,
    VerificationError,
)
from attn_monitor.isolation import isolated_forward, model_device_dtype
from attn_monitor.layout import TokenLayout
from attn_monitor.observer import AttentionObserver, Done, SiteKey
from attn_monitor.operations import Observation, Query

Layers = int | str | Sequence[int | str]
QuerySpec = str | int | tuple[int, int]
Forward = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's query token attends to, for every image and head.

    ``rows`` is (B, H, T) float32 on the model's device: the prefix tokens first (CLS, registers), then the patches
    row by row; softmax rows sum to 1 over T. ``mixed`` marks layers that do not apply the softmax as it is (talking
    heads, gated mixes). ``verified_error`` is the relative difference between row·V and the model's own output,
    NaN when it was not checked.
    """

    layer: int
    name: str
    rows: Tensor
    num_prefix: int
    grid: tuple[int, int]
    mixed: bool
    verified_error: float

    @property
    def maps(self) -> Tensor:
        """The patch part as images, (B, H, gh, gw), not renormalised: DINO's numbers."""
        maps: Tensor = self.rows[..., self.num_prefix :].unflatten(-1, self.grid)
        return maps


@dataclass(frozen=True)
class Site:
    """One place in the model where attention runs, as found on noise images."""

    index: int
    key: SiteKey
    op: str
    heads: int
    queries: int
    keys: int
    layout: TokenLayout | None
    mixed: bool
    error: float | None
    refusal: AttentionError | None

    @property
    def name(self) -> str:
        """Module path, with `#n` when the module runs attention more than once in a forward."""
        path, count = self.key
        return f"{path or '(root)'}#{count}" if count else path or "(root)"


def record_attention(
    model: nn.Module,
    images: Tensor,
    *,
    layers: Layers = -1,
    query: QuerySpec = "cls",
    forward: Forward | None = None,
    verify: bool = True,
) -> list[LayerAttention]:
    """Attention of the model on images (B, C, H, W), one entry per layer asked for.

    ``layers``: an index in order of execution (negative from the end), a module path, a list of these, or "all".
    ``query``: "cls", "mean" (average over all queries), ``(row, col)`` of a patch, or a token index.
    ``forward``: how to call the model when ``model(images)`` is not right. ``verify=False`` skips the comparison of
    row·V with the model's own output. The model is left as it was found.

    Raises a subclass of `AttentionError` with the reason when a map would not be what the model computed.
    """
    recorder = AttentionRecorder(model, layers=layers, query=query, forward=forward, verify=verify)
    return recorder(images)


class AttentionRecorder:
    """Records the same layers again and again, remembering what it found out about the model.

    ``verify``: True checks the first recording and each one after the model or the image size changed; "always"
    checks every one; False none. ``nonfinite`` "raise" refuses rows with NaN or infinity, "keep" returns them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        forward: Forward | None = None,
        verify: bool | str = True,
        nonfinite: str = "raise",
    ) -> None:
        if verify not in (True, False, "always"):
            raise ValueError(f'verify={verify!r}: expected True (first time), False (never) or "always"')
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.layers, self.query, self.verify, self.nonfinite = layers, check_query(query), verify, nonfinite
        self._forward = forward or default_forward
        self._sites: tuple[Site, ...] = ()
        self._known: tuple[Any, ...] | None = None
        self._verified = False

    def sites(self, images: Tensor) -> tuple[Site, ...]:
        """Every attention site in order of execution, usable or not; found anew when model or image size changed."""
        images = self._prepare(images)
        known = (tuple(images.shape[1:]), images.dtype, images.device, _structure(self.model))
        if known != self._known:
            self._sites, self._known, self._verified = (
                discover(self.model, images, self._forward),
                known,
                False,
            )
        return self._sites

    def check(self, images: Tensor) -> None:
        """Raise the reason if a wanted layer cannot be read on images of this size."""
        select_sites(self.sites(images), self.layers, self.query, self.model)

    def __call__(self, images: Tensor) -> list[LayerAttention]:
        """Attention on (B, C, H, W) images, one entry per wanted layer, on the model's device."""
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"images: received {got}, expected a floating-point tensor (batch, channels, height, width)"
            )
        images = self._prepare(images)
        wanted = select_sites(self.sites(images), self.layers, self.query, self.model)
        verify = self.verify == "always" or (bool(self.verify) and not self._verified)
        recorded = self._record(images, wanted, verify)
        self._verified = self._verified or verify
        return recorded

    def _prepare(self, images: Tensor) -> Tensor:
        device, dtype = model_device_dtype(self.model)
        return images.to(device=device, dtype=dtype)

    def _record(self, images: Tensor, wanted: dict[SiteKey, tuple[Site, Query]], verify: bool) -> list[LayerAttention]:
        found: dict[SiteKey, Observation] = {}
        observer = AttentionObserver(
            lambda key, seen: found.update({key: replace(seen, values=None)}),
            lambda key: wanted[key][1] if key in wanted else None,
            images=images,
            verify=verify,
            last=None if _is_sharded(self.model) else next(reversed(wanted)),
        )
        run_forward(self.model, images, self._forward, observer, _subtrees(self.model, {path for path, _ in wanted}))
        return [self._layer(site, found.get(key)) for key, (site, _) in wanted.items()]

    def _layer(self, site: Site, seen: Observation | None) -> LayerAttention:
        if seen is None or seen.rows is None or seen.keys != site.keys or site.layout is None:
            self._known = None  # look again next time
            raise UnsupportedAttentionError(
                f"layer {site.index} ({site.name}): attention was not where it had been found on the first look; "
                "the model takes another path for these images"
            )
        rows = seen.rows.float()
        if self.nonfinite == "raise" and not bool(rows.isfinite().all()):
            raise NonFiniteAttentionError(f"layer {site.index} ({site.name}): its attention row holds NaN or infinity")
        if seen.error is not None and not seen.error <= seen.tolerance and bool(rows.isfinite().all()):
            raise _mismatch(site.index, site.name, seen)
        order = site.layout.order
        if order != tuple(range(len(order))):
            rows = rows[..., torch.tensor(order, device=rows.device)]
        error = float("nan") if seen.error is None else seen.error
        return LayerAttention(site.index, site.name, rows, len(site.layout.prefix), site.layout.grid, seen.mixed, error)


def default_forward(model: nn.Module, images: Tensor) -> Any:
    """``model(images)``; Hugging Face models are told to accept sizes other than their own."""
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        return model(images, interpolate_pos_encoding=True)
    return model(images)


def run_forward(
    model: nn.Module,
    images: Tensor,
    forward: Forward,
    observer: AttentionObserver,
    watched: Iterable[tuple[str, nn.Module]],
) -> None:
    """One isolated forward under the observer; a failure of the model becomes a `ForwardError` that names the size."""
    try:
        with isolated_forward(model), observer.watch(watched):
            forward(model, images)
    except Done:
        pass
    except (AttentionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ForwardError(
            f"{type(model).__name__} failed on images {tuple(images.shape)} {images.dtype}: "
            f"{type(error).__name__}: {error}. If it is the size, choose one that the model takes (a multiple of its "
            "patch size); if it wants other arguments, pass forward=lambda model, images: ..."
        ) from error


# -- finding the sites ------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """An observation on three noise images, of which the first two are the same."""

    key: SiteKey
    seen: Observation
    static: Tensor | None = None  # tokens that do not depend on the image, bool (K,)
    repeatable: bool = True


def discover(model: nn.Module, images: Tensor, forward: Forward) -> tuple[Site, ...]:
    """Run the model on noise of the images' size and list every attention site in order of execution."""
    found: list[_Found] = []

    def report(key: SiteKey, seen: Observation) -> None:
        entry = _Found(key, seen)
        if seen.values is not None and seen.batch == 3:
            entry.static = ~lay.changed_tokens(seen.values[2:], seen.values[:1])[0]
            entry.repeatable = not bool(lay.changed_tokens(seen.values[1:2], seen.values[:1]).any())
        seen.values = None
        found.append(entry)

    one, other = lay.noise_images(images, 2)
    noise = torch.stack([one, one, other])
    observer = AttentionObserver(report, lambda key: 0, images=noise)
    run_forward(model, noise, forward, observer, model.named_modules())
    if not found:
        hint = "batched products but no softmax over tokens that meets V" if observer.products else "no batched product"
        raise NoAttentionError(
            f"no attention was observed in {type(model).__name__}: its forward ran {hint}. "
            "Models without softmax attention (convolutional networks, linear attention) have no map to show"
        )
    layouts = _find_layouts(model, images, forward, found, observer.convs)
    return tuple(_site(index, entry, layouts) for index, entry in enumerate(found))


def _find_layouts(
    model: nn.Module, images: Tensor, forward: Forward, found: list[_Found], convs: list[lay.PatchConv]
) -> dict[int, TokenLayout]:
    """The token layout for every key length whose tokens are the image's patches."""
    layouts: dict[int, TokenLayout] = {}
    # Queries and keys of different number: tokens are pooled on the way, and a grid can only be proven, not assumed.
    seen_grids = [c.grid for c in convs]
    pooled = any(e.seen.queries not in (1, e.seen.keys) for e in found if e.seen.batch == 3)
    for entry in found:
        keys = entry.seen.keys
        if keys in layouts or _shape_problem(entry.seen) or entry.static is None or not entry.repeatable:
            continue
        static = entry.static if not bool(entry.static.all()) else torch.zeros_like(entry.static)
        patches = keys - int(static.sum())
        candidates = lay.candidate_grids((images.shape[-2], images.shape[-1]), patches, convs)
        for conv in candidates:
            codes = _patch_codes(model, images, forward, entry.key, conv)
            layout = lay.layout_from_codes(codes, conv, static)
            if layout is not None and (layout.proven or (conv.grid in seen_grids and not pooled)):
                layouts[keys] = layout
                break
        else:
            # Attention has mixed the patches already (class attention): their order is that of the patch embedding.
            same = [la.grid for la in layouts.values() if len(la.patches) == patches]
            same += [g for g in seen_grids if g[0] * g[1] == patches]
            if same and not pooled:
                prefix = tuple(int(i) for i in static.nonzero().flatten())
                rest = tuple(i for i in range(keys) if i not in set(prefix))
                layouts[keys] = TokenLayout(same[0], prefix, rest, proven=False)
    return layouts


def _patch_codes(model: nn.Module, images: Tensor, forward: Forward, key: SiteKey, conv: lay.PatchConv) -> Tensor:
    values: list[Tensor] = []

    def report(_: SiteKey, seen: Observation) -> None:
        if seen.values is not None:
            values.append(seen.values)

    coded = lay.code_images(images, conv)
    observer = AttentionObserver(
        report, lambda k: 0 if k == key else None, images=coded, last=None if _is_sharded(model) else key
    )
    run_forward(model, coded, forward, observer, _subtrees(model, {key[0]}))
    return lay.read_codes(values[0])


def _shape_problem(seen: Observation, images: int = 3) -> str | None:
    """Why the shape of an attention operation alone rules out a global row over patches."""
    if seen.problem:
        return seen.problem
    if seen.batch != images:
        return f"it is windowed attention ({seen.batch // images} windows of {seen.keys} tokens for each image)"
    if seen.queries not in (1, seen.keys):
        return f"its {seen.queries} queries and {seen.keys} keys are different tokens (pooled keys or cross-attention)"
    return None


def _site(index: int, entry: _Found, layouts: dict[int, TokenLayout]) -> Site:
    key, seen = entry.key, entry.seen
    site = Site(
        index,
        key,
        seen.op,
        seen.heads,
        seen.queries,
        seen.keys,
        layouts.get(seen.keys),
        seen.mixed,
        seen.error,
        None,
    )
    return replace(site, refusal=_refusal(site, entry))


def _refusal(site: Site, entry: _Found) -> AttentionError | None:
    where, seen = f"layer {site.index} ({site.name}, {site.op})", entry.seen
    problem = _shape_problem(seen)
    if problem:
        return UnsupportedAttentionError(f"{where} has no global attention row: {problem}. Choose another layer")
    if seen.rows is not None and not bool(seen.rows.isfinite().all()):
        return NonFiniteAttentionError(f"{where}: its attention row holds NaN or infinity")
    if seen.error is not None and not seen.error <= seen.tolerance:
        return _mismatch(site.index, site.name, seen)
    if not entry.repeatable:
        return ForwardError(
            f"{where}: two identical images gave different tokens, so the forward is random even in eval mode "
            "(random token masking, as in MAE?). Pass a deterministic forward=lambda model, images: ..."
        )
    if site.layout is None:
        return UnsupportedAttentionError(
            f"{where} attends over {site.keys} tokens, which are not the image's grid of patches plus a prefix "
            "(channel attention, or a pooled hierarchy). Choose another layer"
        )
    return None


def _mismatch(index: int, name: str, seen: Observation) -> VerificationError:
    return VerificationError(
        f"layer {index} ({name}, {seen.op}): the attention row times V differs from the model's own output by "
        f"{seen.error:.2g} (allowed: {seen.tolerance:.2g}), so the row is not what the model computed and no map is "
        "shown. Please report the model; forward= or another layer may help meanwhile"
    )


# -- choosing layers and queries -------------------------------------------------------------------------------


def check_query(query: QuerySpec) -> QuerySpec:
    """The query, if it is of a kind that exists; lists from YAML become tuples."""
    if isinstance(query, (list, tuple)) and len(query) == 2 and all(isinstance(i, int) for i in query):
        return (query[0], query[1])
    if query in ("cls", "mean") or (isinstance(query, int) and not isinstance(query, bool) and query >= 0):
        return query
    raise ValueError(f'query={query!r}: expected "cls", "mean", a token index, or (row, col) of a patch')


def select_sites(
    sites: Sequence[Site], layers: Layers, query: QuerySpec, model: nn.Module
) -> dict[SiteKey, tuple[Site, Query]]:
    """The sites asked for, in order of execution, each with the row to read there; raises the reason if one can't."""
    if layers == "all":
        chosen = [s for s in sites if s.refusal is None]
        if not chosen and sites[-1].refusal is not None:
            raise sites[-1].refusal
    else:
        wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
        chosen = [sites[i] for i in sorted({i for want in wanted for i in _find_layer(sites, want)})]
    selected = {}
    for site in chosen:
        if site.refusal is not None:
            raise _with_alternatives(site.refusal, sites)
        selected[site.key] = (site, resolve_query(site, query, model))
    return selected


def _with_alternatives(refusal: AttentionError, sites: Sequence[Site]) -> AttentionError:
    usable = [s.index for s in sites if s.refusal is None]
    return type(refusal)(f"{refusal}. Layers that can be read: {usable or 'none'}")


def _find_layer(sites: Sequence[Site], want: int | str) -> list[int]:
    if isinstance(want, int) and not isinstance(want, bool):
        if -len(sites) <= want < len(sites):
            return [want % len(sites)]
        raise LayerError(
            f"layers={want}: expected {-len(sites)} to {len(sites) - 1}; this model has {len(sites)} layers"
        )
    named = [s.index for s in sites if s.name == want or s.key[0] == want or s.key[0].startswith(f"{want}.")]
    if not named:
        raise LayerError(
            f"layers={want!r}: no attention ran there. Attention ran in: {', '.join(s.name for s in sites)}"
        )
    return named


def resolve_query(site: Site, query: QuerySpec, model: nn.Module) -> Query:
    """Token index of the query at this site, or "mean"."""
    assert site.layout is not None
    where = f"layer {site.index} ({site.name})"
    if query == "mean":
        return "mean"
    if site.queries == 1:
        if query in ("cls", 0):
            return 0
        raise QueryError(f'{where} has a single query token, so query={query!r} does not exist there; use query="cls"')
    if isinstance(query, int):
        if query < site.queries:
            return query
        raise QueryError(f"query={query}: {where} has tokens 0 to {site.queries - 1}")
    if isinstance(query, tuple):
        (row, col), (gh, gw) = query, site.layout.grid
        if 0 <= row < gh and 0 <= col < gw:
            return site.layout.patches[row * gw + col]
        raise QueryError(f"query=({row}, {col}): {where} has a grid of {gh} rows and {gw} columns of patches")
    return _cls_index(site, site.layout.prefix, where, model)


def _cls_index(site: Site, prefix: tuple[int, ...], where: str, model: nn.Module) -> int:
    if not prefix:
        raise QueryError(
            f'{where} has {site.keys} tokens, all of them patches, so there is no CLS token. Use query="mean": the '
            "attention each patch receives, averaged over all queries"
        )
    names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
    has_cls = any(re.search(r"cls|class", n) for n in names)
    has_registers = any(re.search(r"reg_|register|storage", n) for n in names)
    if (has_cls or (len(prefix) == 1 and not has_registers)) and (prefix[0] == 0 or len(prefix) == 1):
        return prefix[0]
    raise QueryError(
        f"{where} has {len(prefix)} tokens that are not patches, at {list(prefix)}, and nothing tells which is the CLS "
        'token (registers are not). Choose one by its index, query=<index>, or use query="mean"'
    )


# -- small facts about models -----------------------------------------------------------------------------------


def _structure(model: nn.Module) -> int:
    """Changes when a submodule is replaced, added or removed."""
    return hash(tuple((name, id(module)) for name, module in model.named_modules()))


def _subtrees(model: nn.Module, roots: set[str]) -> list[tuple[str, nn.Module]]:
    """The modules at these paths with all that is below them, so that each operation is credited as on first look."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(path == root or root == "" or path.startswith(root + ".") for root in roots)
    ]


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP manages parameters here: then every forward must run to its end, to shard them again."""
    return any(
        "FSDP" in base.__name__ or "FullySharded" in base.__name__ for m in model.modules() for base in type(m).__mro__
    )
