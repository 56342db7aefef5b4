"""Find every attention site of a model on noise images: its token layout, or what stands in the way of reading it."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture.forward import Forward, run_forward
from attn_monitor.capture.observer import AttentionObserver, SiteKey
from attn_monitor.capture.operations import Observation, Verdict, settle
from attn_monitor.capture.places import layout as lay
from attn_monitor.capture.places.find_places import find_places
from attn_monitor.capture.places.layout import TokenLayout
from attn_monitor.capture.places.silent_forward import HowToRead
from attn_monitor.capture.places.site_places import SitePlaces
from attn_monitor.capture.rows import Folding, Reading, widen
from attn_monitor.capture.sharding import refuse_split_parameters
from attn_monitor.errors import (
    AttentionError,
    ForwardError,
    NoAttentionError,
    NonFiniteAttentionError,
    UnsupportedAttentionError,
    VerificationError,
)

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
    scope: str = ""  # path of the module in which all of it ran
    reading: Reading | None = None  # of an operation that nobody listed
    places: SitePlaces = field(default_factory=SitePlaces)

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
    folding: Folding | None = None
    moving: int = 0  # keys that depend on the image, where no attention has mixed them yet
    repeatable: bool = True


@dataclass(frozen=True)
class _Look:
    """What a model was found to have, for as long as it lives."""

    known: tuple[Any, ...]
    forward: Callable[[], object]
    sites: tuple[Site, ...]


_LOOKS: weakref.WeakKeyDictionary[nn.Module, list[_Look]] = weakref.WeakKeyDictionary()


def sites_of(model: nn.Module, images: Tensor, forward: Forward, known: tuple[Any, ...]) -> tuple[Site, ...]:
    """Every attention site of the model, asked once for what is ``known``: its structure, image size and precision."""
    looks, identity = _LOOKS.setdefault(model, []), _identity(forward)
    for look in looks:
        if look.known == known and look.forward() is identity():
            return look.sites
    sites = discover(model, images, forward)
    looks.append(_Look(known, identity, sites))
    del looks[:-8]  # sizes come and go
    return sites


def forget(model: nn.Module) -> None:
    """Ask anew the next time."""
    _LOOKS.pop(model, None)


def _identity(forward: Forward) -> Callable[[], object]:
    """What tells a forward from others without keeping it alive: the code, where nothing else is part of it."""
    if isinstance(forward, types.FunctionType) and not (forward.__closure__ or forward.__defaults__):
        code = forward.__code__
        return lambda: code
    try:
        return weakref.WeakMethod(forward) if isinstance(forward, types.MethodType) else weakref.ref(forward)
    except TypeError:  # an object without weak references is told by its own identity alone
        return object


def discover(model: nn.Module, images: Tensor, forward: Forward) -> tuple[Site, ...]:
    """Run the model on noise of the images' size and list every attention site in order of execution.

    Then it is asked where the keys and queries of each stand in the image; see `places`.
    """
    found: list[_Found] = []
    modules = dict(model.named_modules())
    one, other = lay.noise_images(images, 2)
    noise = torch.stack([one, one, other])
    observer = AttentionObserver(lambda key, seen: found.append(_examine(key, seen)), lambda key: 0, images=noise)
    with refuse_split_parameters(model):
        run_forward(model, noise, forward, observer, modules.items())
    if not found:
        hint = "batched products but no softmax over tokens that meets V" if observer.products else "no batched product"
        raise NoAttentionError(
            f"no attention was observed in {type(model).__name__}: its forward ran {hint}. "
            "Models without softmax attention (convolutional networks, linear attention) have no map to show"
        )
    how = {
        e.key: HowToRead(e.folding, e.seen.reading)
        for e in found
        if e.repeatable and not _shape_problem(e.seen) and e.seen.rows is not None
    }
    places: dict[SiteKey, SitePlaces] = {}
    if how:
        first = next(e for e in found if e.key in how)
        places = find_places(
            model, images, forward, how, first.moving, first.seen.keys, observer.convs, piece=min(len(images), 8)
        )
    read = [entry.seen for entry in found if entry.seen.rows is not None]
    verdicts = iter(settle(read))
    return tuple(
        _site(
            index, entry, places.get(entry.key, SitePlaces()), next(verdicts) if entry.seen.rows is not None else None
        )
        for index, entry in enumerate(found)
    )


def _examine(key: SiteKey, seen: Observation) -> _Found:
    """In which order batch and heads are, and whether equal images give equal tokens."""
    entry = _Found(key, seen)
    foldings: list[Folding | None] = [None] if seen.values is not None else []
    if seen.values is not None and seen.batch * seen.heads % _IMAGES == 0:
        foldings += ["batch first", "heads first"] if seen.batch == 1 else ["heads first"]
    for folding in foldings:
        reading = seen.regrouped(_IMAGES, folding)
        if reading.values is None or reading.rows is None or reading.batch != _IMAGES:
            continue
        limit = lay.threshold(reading.values.dtype, reading.values.device)
        values, rows = widen(reading.values).transpose(1, 2).flatten(2), reading.rows.flatten(1)[:, None]  # (B, …, C)
        # Equal images must be equal in what is read and in how much of it: V alone may be the same for all heads.
        repeatable = all(bool((lay.changes(t[1], t[0]) <= limit).all()) for t in (values, rows))
        if repeatable or folding is None:  # a reading other than the plain one must explain what is seen
            entry.seen, entry.folding, entry.repeatable = reading, folding, repeatable
            entry.moving = int((lay.changes(values[2], values[0]) > limit).sum())
        if repeatable:
            break
    entry.seen = replace(entry.seen, values=None, source=None)
    return entry


def _shape_problem(seen: Observation) -> str | None:
    """Why the shape of an attention operation alone rules out a global row over patches."""
    if seen.problem:
        return seen.problem
    if seen.batch % _IMAGES:
        return f"it runs on {seen.batch} sequences for {_IMAGES} images (several images packed into one, or a part)"
    if seen.batch != _IMAGES:
        return f"it is windowed attention ({seen.batch // _IMAGES} windows of {seen.keys} tokens for each image)"
    return None


def _site(index: int, entry: _Found, places: SitePlaces, verdict: Verdict | None) -> Site:
    seen = entry.seen
    site = Site(
        index,
        entry.key,
        seen.op,
        seen.heads,
        seen.queries,
        seen.keys,
        places.layout,
        verdict is not None and verdict.mixed,
        None if verdict is None or seen.error is None else verdict.error,
        None,
        entry.folding,
        seen.scope,
        seen.reading,
        places,
    )
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
        return UnsupportedAttentionError(
            f"{where} has {site.queries} queries and {site.keys} keys of which no map can be drawn: "
            f"{site.places.why}. Choose another layer"
        )
    return None


def mismatch(index: int, name: str, op: str, error: float, tolerance: float) -> VerificationError:
    """The refusal of a row that does not reproduce the model's output."""
    return VerificationError(
        f"layer {index} ({name}, {op}): the attention row times V differs from the model's own output by {error:.2g} "
        f"(allowed: {tolerance:.2g}), so the row is not what the model computed and no map is shown. Please report the "
        "model; forward= or another layer may help meanwhile"
    )
