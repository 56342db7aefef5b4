"""Find every attention site of a model on noise images: its token layout, or what stands in the way of reading it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor import layout as lay
from attn_monitor.errors import (
    AttentionError,
    ForwardError,
    NoAttentionError,
    NonFiniteAttentionError,
    UnsupportedAttentionError,
    VerificationError,
)
from attn_monitor.layout import TokenLayout
from attn_monitor.observer import AttentionObserver, SiteKey
from attn_monitor.operations import Observation, Verdict, settle
from attn_monitor.questions import keys_that_are_tokens, patch_codes
from attn_monitor.running import Forward, run_forward
from attn_monitor.sharding import refuse_split_parameters
from attn_monitor.sources import Folding

_IMAGES = 3  # noise, of which the first two are the same


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
    folding: Folding | None = None

    @property
    def name(self) -> str:
        """Module path, with `#n` when the module runs attention more than once in a forward."""
        path, count = self.key
        return f"{path or '(root)'}#{count}" if count else path or "(root)"


@dataclass
class _Found:
    """What was seen at a site, before it is known what its tokens are."""

    key: SiteKey
    seen: Observation
    kind: tuple[Any, ...] = ()
    folding: Folding | None = None
    static: Tensor | None = None  # keys that do not depend on the image, bool (K,)
    repeatable: bool = True
    layout: TokenLayout | None = field(default=None, init=False)
    are_tokens: bool = field(default=True, init=False)  # told only where there is no layout


def discover(model: nn.Module, images: Tensor, forward: Forward) -> tuple[Site, ...]:
    """Run the model on noise of the images' size and list every attention site in order of execution."""
    found: list[_Found] = []
    modules = dict(model.named_modules())
    one, other = lay.noise_images(images, 2)
    noise = torch.stack([one, one, other])
    observer = AttentionObserver(
        lambda key, seen: found.append(_examine(key, seen, modules[key[0]])), lambda key: 0, images=noise
    )
    with refuse_split_parameters(model):
        run_forward(model, noise, forward, observer, modules.items())
    if not found:
        hint = "batched products but no softmax over tokens that meets V" if observer.products else "no batched product"
        raise NoAttentionError(
            f"no attention was observed in {type(model).__name__}: its forward ran {hint}. "
            "Models without softmax attention (convolutional networks, linear attention) have no map to show"
        )
    _find_layouts(model, images, forward, found, observer.convs)
    read = [entry.seen for entry in found if entry.seen.rows is not None]
    verdicts = iter(settle(read))
    return tuple(
        _site(index, entry, next(verdicts) if entry.seen.rows is not None else None)
        for index, entry in enumerate(found)
    )


def _examine(key: SiteKey, seen: Observation, module: nn.Module) -> _Found:
    """Which keys depend on the image, and in which order batch and heads are."""
    entry = _Found(key, seen)
    foldings: list[Folding | None] = [None] if seen.values is not None else []
    if seen.values is not None and seen.batch * seen.heads % _IMAGES == 0:
        foldings += ["batch first", "heads first"] if seen.batch == 1 else ["heads first"]
    for folding in foldings:
        reading = seen.regrouped(_IMAGES, folding)
        if reading.values is None or reading.batch != _IMAGES:
            continue
        first, same, other = reading.values.split(1)
        repeatable = not bool(lay.changed_tokens(same, first).any())
        if repeatable or folding is None:  # a reading other than the plain one must explain what is seen
            entry.seen, entry.folding, entry.repeatable = reading, folding, repeatable
            entry.static = ~lay.changed_tokens(other, first)[0]
        if repeatable:
            break
    width = 0 if seen.values is None else seen.values.shape[-1]
    entry.kind = (type(module), seen.op, entry.seen.heads, seen.queries, seen.keys, width)
    entry.seen = replace(entry.seen, values=None, source=None)
    return entry


def _find_layouts(
    model: nn.Module, images: Tensor, forward: Forward, found: list[_Found], convs: list[lay.PatchConv]
) -> None:
    """Give each entry whose keys are the image's patches its token layout.

    A layout is proven where patches can still be told apart: before attention has mixed them. Sites of the same kind
    have the same layout. Any other site inherits one, or the order of the patch embedding, if its keys are tokens.
    """
    readable = [e for e in found if e.static is not None and e.repeatable and not _shape_problem(e.seen)]
    # Queries and keys of different number: tokens are pooled on the way, and a grid can only be proven, not assumed.
    pooled = any(e.seen.queries not in (1, e.seen.keys) for e in found if e.seen.batch == _IMAGES)
    known: dict[tuple[Any, ...], TokenLayout | None] = {}

    @functools.cache
    def tokens() -> dict[SiteKey, int]:
        return keys_that_are_tokens(model, images, forward, {e.key: e.folding for e in readable})

    for entry in readable:
        if entry.kind in known:
            entry.layout = known[entry.kind]
            continue
        inherited = [la for la in known.values() if la is not None and len(la.order) == entry.seen.keys]
        layout = inherited[0] if inherited else _own_layout(model, images, forward, entry, convs)
        if layout is None:
            layout = _assumed_layout(entry, known, convs)
        if layout is not None and (inherited or not layout.proven):
            assumable = layout.proven or not pooled
            if not assumable or tokens().get(entry.key, 0) < len(layout.patches):
                layout = None
        entry.layout = known[entry.kind] = layout
    for entry in readable:
        entry.are_tokens = entry.layout is not None or entry.key in tokens()


def _static(entry: _Found) -> Tensor:
    assert entry.static is not None
    return entry.static if not bool(entry.static.all()) else torch.zeros_like(entry.static)


def _own_layout(
    model: nn.Module, images: Tensor, forward: Forward, entry: _Found, convs: list[lay.PatchConv]
) -> TokenLayout | None:
    """What the patches spell out at this site."""
    static = _static(entry)
    size = (images.shape[-2], images.shape[-1])
    for conv in lay.candidate_grids(size, len(static), int(static.sum()), convs):
        codes = patch_codes(model, images, forward, entry.key, entry.folding, conv)
        layout = lay.layout_from_codes(codes, conv, static)
        if layout is not None and (layout.proven or conv.grid in [c.grid for c in convs]):
            return layout
    return None


def _assumed_layout(
    entry: _Found, known: dict[tuple[Any, ...], TokenLayout | None], convs: list[lay.PatchConv]
) -> TokenLayout | None:
    """The order of the patch embedding, where attention has mixed the patches already (class attention)."""
    static = _static(entry)
    patches = len(static) - int(static.sum())
    grids = [la.grid for la in known.values() if la is not None] + [c.grid for c in convs]
    grid = next((g for g in grids if g[0] * g[1] == patches), None)
    if grid is None:
        return None
    prefix = tuple(int(i) for i in static.nonzero().flatten())
    return TokenLayout(grid, prefix, tuple(i for i in range(len(static)) if i not in set(prefix)), proven=False)


def _shape_problem(seen: Observation) -> str | None:
    """Why the shape of an attention operation alone rules out a global row over patches."""
    if seen.problem:
        return seen.problem
    if seen.batch % _IMAGES:
        return f"it runs on {seen.batch} sequences for {_IMAGES} images (several images packed into one, or a part)"
    if seen.batch != _IMAGES:
        return f"it is windowed attention ({seen.batch // _IMAGES} windows of {seen.keys} tokens for each image)"
    if seen.queries not in (1, seen.keys):
        return f"its {seen.queries} queries and {seen.keys} keys are different tokens (pooled keys or cross-attention)"
    return None


def _site(index: int, entry: _Found, verdict: Verdict | None) -> Site:
    seen = entry.seen
    error = None if verdict is None or seen.error is None else verdict.error
    mixed = verdict is not None and verdict.mixed
    site = Site(
        index, entry.key, seen.op, seen.heads, seen.queries, seen.keys, entry.layout, mixed, error, None,
        entry.folding,
    )  # fmt: skip
    return replace(site, refusal=_refusal(site, entry, verdict))


def _refusal(site: Site, entry: _Found, verdict: Verdict | None) -> AttentionError | None:
    where, seen = f"layer {site.index} ({site.name}, {site.op})", entry.seen
    problem = _shape_problem(seen)
    if problem:
        return UnsupportedAttentionError(f"{where} has no global attention row: {problem}. Choose another layer")
    if verdict is not None and not verdict.finite:
        return NonFiniteAttentionError(f"{where}: its attention row holds NaN or infinity")
    if verdict is not None and verdict.error > seen.tolerance:
        return mismatch(site.index, site.name, seen.op, verdict.error, seen.tolerance)
    if not entry.repeatable:
        return ForwardError(
            f"{where}: two identical images gave different tokens, so the forward is random even in eval mode "
            "(random token masking, as in MAE?). Pass a deterministic forward=lambda model, images: ..."
        )
    if site.layout is None:
        what = (
            "tokens, which are not the image's grid of patches plus a prefix (a pooled hierarchy, patches left out, or "
            "a part of the image)"
            if entry.are_tokens
            else "keys that are not the tokens entering the module (channel attention, or linear attention)"
        )
        return UnsupportedAttentionError(f"{where} attends over {site.keys} {what}. Choose another layer")
    return None


def mismatch(index: int, name: str, op: str, error: float, tolerance: float) -> VerificationError:
    """The refusal of a row that does not reproduce the model's output."""
    return VerificationError(
        f"layer {index} ({name}, {op}): the attention row times V differs from the model's own output by {error:.2g} "
        f"(allowed: {tolerance:.2g}), so the row is not what the model computed and no map is shown. Please report the "
        "model; forward= or another layer may help meanwhile"
    )
