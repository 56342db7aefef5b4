"""Which key and which query of each attention operation is which patch, asked of the model at every depth.

A few forwards with silenced attention (`silence`) on made-up images (`layout`), each asked once for a model, an image
size and a precision. A place is what a token holds of the image, whatever it is called and wherever it comes from.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_monitor import layout as lay
from attn_monitor.layout import PatchConv, Places, TokenLayout
from attn_monitor.observer import SiteKey
from attn_monitor.running import Forward, run_forward
from attn_monitor.silence import Call, HowToRead, SilentObserver, SiteTokens, Tokens

_CLASS_NAME, _REGISTER_NAME = re.compile(r"cls|class"), re.compile(r"reg_|register|storage")
_MOST_GRIDS = 6  # a pyramid has four, and one more when a guess is wrong


@dataclass
class SitePlaces:
    """What is known of one attention operation's keys and queries.

    ``layout`` is that of the keys, None with the reason in ``why``. ``cls`` is the query index of the CLS token, None
    with the reason in ``no_cls``; ``patch_queries`` maps a cell to the query that holds it. ``part`` says that other
    operations have the rest of the queries. ``entries`` are the layouts of the tokens that enter the modules around.
    """

    layout: TokenLayout | None = None
    why: str = ""
    cls: int | None = None
    no_cls: str = ""
    patch_queries: Mapping[int, int] = field(default_factory=dict)
    part: bool = False
    entries: Mapping[str, TokenLayout] = field(default_factory=dict)


@dataclass
class _Mosaic:
    """What one grid's mosaics told: places of V, q and k at each site, and of tokens at modules' ends."""

    conv: PatchConv
    v: dict[SiteKey, Places] = field(default_factory=dict)
    q: dict[SiteKey, Places] = field(default_factory=dict)
    k: dict[SiteKey, Places] = field(default_factory=dict)
    entries: dict[Call, Places] = field(default_factory=dict)
    exits: dict[Call, Places] = field(default_factory=dict)
    apart: dict[SiteKey, Tensor] = field(default_factory=dict)  # (M, M, T): changes between images, where not exact
    dilated: set[SiteKey] = field(default_factory=set)  # sites whose heads hold different cells of this grid

    @property
    def cells(self) -> int:
        return math.prod(self.conv.grid)


class _Asker:
    """Runs silent forwards on images, a piece at a time, each question in a random state of its own."""

    def __init__(
        self, model: nn.Module, forward: Forward, how: Mapping[SiteKey, HowToRead], calls: set[str], piece: int
    ) -> None:
        self.model, self.forward, self.how, self.calls, self.piece = model, forward, how, calls, max(piece, 3)
        self.modules = dict(model.named_modules())
        self.images_asked = 0

    def __call__(
        self,
        images: Tensor,
        seed: int,
        *,
        marks: Mapping[SiteKey, Tensor] | None = None,
        nudged: Sequence[tuple[nn.Module, str]] = (),
        by_head: int = 0,
    ) -> Tokens:
        parts = []
        for start in range(0, len(images), self.piece):
            piece = slice(start, start + self.piece)
            some = None if marks is None else {key: m[piece] for key, m in marks.items()}
            observer = SilentObserver(images[piece], self.how, marks=some, nudged=nudged, by_head=by_head)

            def seeded(model: nn.Module, x: Tensor) -> Any:
                _seed_everything(seed, x.device)
                return self.forward(model, x)

            with ExitStack() as stack:
                observer.watch_calls(stack, self.modules, self.calls)
                run_forward(self.model, images[piece], seeded, observer, self.modules.items())
            parts.append(observer.tokens)
        self.images_asked += len(images)
        return _joined(parts)


def _seed_everything(seed: int, device: torch.device) -> None:
    """Another random state, which the isolation around every forward undoes."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the state that models use


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """What was read piece by piece, of what was there in every piece and of the same length."""
    if len(parts) == 1:
        return parts[0]

    def together(kept: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
        alike = [k for k in kept[0] if all(k in other and other[k].shape[1:] == kept[0][k].shape[1:] for other in kept)]
        return {k: torch.cat([other[k] for other in kept]) for k in alike}

    sites: dict[SiteKey, SiteTokens] = {}
    for key, first in parts[0].sites.items():
        others = [p.sites[key] for p in parts if key in p.sites]
        if len(others) < len(parts) or any(o.v.shape[1:] != first.v.shape[1:] for o in others):
            continue
        tensors: dict[str, Any] = {}
        for name in ("v", "q", "k", "heads"):
            known = [t for t in (getattr(o, name) for o in others) if t is not None]
            tensors[name] = torch.cat(known) if len(known) == len(parts) else None
        sites[key] = SiteTokens(**tensors, queries=first.queries, dtype=first.dtype, within=first.within)
    entries, exits, again = (together([getattr(p, name) for p in parts]) for name in ("entries", "exits", "again"))
    return Tokens(sites, entries, exits, again)


def find_places(
    model: nn.Module,
    images: Tensor,
    forward: Forward,
    how: Mapping[SiteKey, HowToRead],
    moving: int,
    keys: int,
    convs: Sequence[PatchConv],
    piece: int,
) -> dict[SiteKey, SitePlaces]:
    """Places of keys and queries at the sites that ``how`` says how to read.

    Of the first of them, ``moving`` of its ``keys`` depend on the image. One of the user's images is asked about too.
    """
    around = {path for key in how for path in _ancestors(key[0])}
    ask = _Asker(model, forward, how, around & dict(model.named_modules()).keys(), piece)
    found = {key: SitePlaces() for key in how}
    size = (images.shape[-2], images.shape[-1])
    grids = [*lay.candidate_grids(size, keys, moving, convs)]
    # Where the first attention is coarser than the patches, these tell whether its heads see the same of them.
    grids = [*(c for c in convs if c.disjoint and lay.is_covering(c, size) and math.prod(c.grid) > keys), *grids]
    mosaics, reference = _ask_mosaics(ask, images, found, grids, convs)
    if not mosaics:
        return found
    strength = max(lay.little(site.dtype) for site in reference.sites.values())
    chosen = _least_alike(images)
    _check_on_user_images(ask, chosen, strength, found, mosaics)
    unplaced = [k for k, f in found.items() if f.layout is None and not f.why and k in reference.sites]
    if unplaced:
        _rank_centres(ask, images, chosen[0], strength, found, unplaced, mosaics, convs)
    _refuse_partial_views(ask, images, found, mosaics)
    _refuse_overlaps(ask, images, found, mosaics)
    _find_queries(found, mosaics, reference)
    _find_cls(ask, images, found, mosaics, reference)
    _refuse_mixtures(found, reference)
    _check_landing(ask, images, found, mosaics, reference)
    for key, places in found.items():
        if places.layout is None and not places.why:
            places.why = _what_keys_are(key, mosaics)
    return found


def _ancestors(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _least_alike(images: Tensor) -> list[Tensor]:
    """The brightest and the darkest of the user's images; noise where all show one colour only."""
    lively = images[images.flatten(1).float().std(1, correction=0) > 1e-3]
    if not len(lively):
        return [lay.noise_images(images, 1, seed=3)[0]]
    brightness = lively.flatten(1).float().mean(1)
    return [lively[i] for i in dict.fromkeys([int(brightness.argmax()), int(brightness.argmin())])]


def _limit(site: SiteTokens) -> float:
    return lay.threshold(site.dtype, site.v.device)


# Mosaics: exact places


def _ask_mosaics(
    ask: _Asker,
    images: Tensor,
    found: dict[SiteKey, SitePlaces],
    waiting: list[PatchConv],
    convs: Sequence[PatchConv],
) -> tuple[list[_Mosaic], Tokens]:
    """Exact places on every grid that tokens could be; and the tokens of the first mosaics' first image."""
    mosaics: list[_Mosaic] = []
    reference = Tokens()
    size = (images.shape[-2], images.shape[-1])
    while waiting and len(mosaics) < _MOST_GRIDS:
        conv = waiting.pop(0)
        if any(m.conv.grid == conv.grid for m in mosaics):
            continue
        tokens = ask(lay.mosaics(images, conv), 1, by_head=math.prod(conv.grid))
        mosaic = _read_mosaics(tokens, conv)
        mosaics.append(mosaic)
        reference = reference if reference.sites else tokens
        for key, places in mosaic.v.items():
            site = found[key]
            if site.layout is not None:
                continue
            site.layout = lay.layout_of(places, conv.grid, "exact")
            k = mosaic.k.get(key)
            if site.layout is None:
                continue
            if k is not None and lay.is_whole(k, mosaic.cells) and k != places:
                site.layout, site.why = None, "its keys and its values hold different patches"
            elif any(key in m.dilated for m in mosaics):
                site.layout, site.why = None, "its heads see different parts of each patch (dilated attention)"
        moving = {
            (len(places), sum(p != lay.STATIC for p in places))
            for key, places in mosaic.v.items()
            if found[key].layout is None and not found[key].why
        }
        waiting += [
            c for keys, live in sorted(moving, reverse=True) for c in lay.candidate_grids(size, keys, live, convs)
        ]
    return mosaics, reference


def _read_mosaics(tokens: Tokens, conv: PatchConv) -> _Mosaic:
    mosaic, cells = _Mosaic(conv), math.prod(conv.grid)
    limits = []
    for key, site in tokens.sites.items():
        limits.append(_limit(site))
        for name in ("v", "q", "k"):
            sketches = getattr(site, name)
            if sketches is not None:
                getattr(mosaic, name)[key] = lay.read_places(sketches, cells, limits[-1])
        if not lay.is_whole(mosaic.v[key], cells):
            mosaic.apart[key] = lay.changes(site.v[:, None], site.v[None])
        if site.heads is not None:
            heads = {lay.read_places(site.heads[:, h], cells, limits[-1]) for h in range(site.heads.shape[1])}
            if len(heads) > 1 and any(p >= 0 for places in heads for p in places):
                mosaic.dilated.add(key)
    limit = max(limits, default=1e-3)
    mosaic.entries = {call: lay.read_places(t, cells, limit) for call, t in tokens.entries.items()}
    mosaic.exits = {call: lay.read_places(t, cells, limit) for call, t in tokens.exits.items()}
    return mosaic


def _of_grid(mosaics: Sequence[_Mosaic], layout: TokenLayout) -> _Mosaic | None:
    return next((m for m in mosaics if m.conv.grid == layout.grid), None)


def _what_keys_are(key: SiteKey, mosaics: Sequence[_Mosaic]) -> str:
    """Why a site's keys have no places, in words."""
    seen = [m for m in mosaics if key in m.v]
    if not seen:
        return "its operation did not run in the same way on other images"
    places = seen[0].v[key]
    moving = [p for p in places if p != lay.STATIC]
    if not moving:
        return "what it reads (V) does not depend on the image, so no key holds a part of it"
    if len(moving) == len(places) and all(p == lay.SEVERAL for p in places):
        several = (
            "each of its keys holds many parts of the image (channel or linear attention, or tokens mixed elsewhere)"
        )
        return several
    distinct = len({p for p in moving if p >= 0})
    return (
        f"{len(moving)} of its {len(places)} keys hold parts of the image, and they are not the grid of its patches "
        f"(of {seen[0].cells} patches {distinct} stand alone in a key): a part of the image, patches left out, pooled "
        "tokens in no regular grid, or an order that changes from image to image"
    )


# Small changes: the user's own images, and fields that overlap


def _check_on_user_images(
    ask: _Asker,
    images: Sequence[Tensor],
    strength: float,
    found: Mapping[SiteKey, SitePlaces],
    mosaics: Sequence[_Mosaic],
) -> None:
    """The same places must hold on images of the user's, each in another call and another random state."""
    for mosaic in mosaics:
        placed = [k for k, f in found.items() if f.layout is not None and f.layout.grid == mosaic.conv.grid]
        for number, image in enumerate(images if placed else ()):
            seen = ask(lay.weighted(image, mosaic.conv, strength), 2 + number).sites
            for key in placed:
                if key not in seen or seen[key].v.shape[1] != len(mosaic.v[key]):
                    found[key].layout, found[key].why = (
                        None,
                        "it runs in another way on the user's images than on noise",
                    )
                elif found[key].layout is not None and _tells_otherwise(seen[key], key, mosaic):
                    found[key].layout = None
                    found[key].why = "its tokens hold other patches on another image, or in another call"


def _tells_otherwise(seen: SiteTokens, key: SiteKey, mosaic: _Mosaic) -> bool:
    told = [(seen.v, mosaic.v[key])]
    if seen.q is not None and lay.is_whole(mosaic.q.get(key), mosaic.cells):
        told.append((seen.q, mosaic.q[key]))
    slack = 0.25 if seen.dtype in (torch.float16, torch.bfloat16) else 0.1  # of weights from 0 to 1
    return any(
        lay.other_weights(lay.shares(sketches, _limit(seen) / 4)[0], places, mosaic.cells, slack) > 0.02
        for sketches, places in told
    )


def _refuse_partial_views(
    ask: _Asker, images: Tensor, found: Mapping[SiteKey, SitePlaces], mosaics: Sequence[_Mosaic]
) -> None:
    """Coarse tokens, and tokens whose fields overlap, must see all of their cell and all of the image's border."""
    finest, base = max(m.cells for m in mosaics), lay.noise_images(images, 1, seed=4)[0]
    doubtful: dict[tuple[int, int], list[SiteKey]] = {}
    for key, site in found.items():
        if site.layout is not None and (site.layout.evidence == "centres" or math.prod(site.layout.grid) < finest):
            doubtful.setdefault(site.layout.grid, []).append(key)
    for grid, keys in doubtful.items():
        conv = PatchConv(grid, (0, 0), disjoint=False)
        changed = [lay.outermost_changed(base, conv)[None], lay.quadrants_changed(base, conv)]
        seen = ask(torch.cat([base[None], *changed]), 3).sites
        for key in keys:
            layout = found[key].layout
            assert layout is not None
            moved = lay.changes(seen[key].v[1:], seen[key].v[:1])[:, list(layout.patches)] > _limit(seen[key]) / 4
            border = torch.ones(grid, dtype=torch.bool, device=moved.device)
            border[1:-1, 1:-1] = False
            if not bool(moved[0][border.flatten()].all()):
                found[key].why = "the outermost pixels of the image are not seen: the model looks at a crop"
            elif not bool(moved[1:].all()):
                found[key].why = "its keys hold a part of their patches only (tokens left out, or pooled irregularly)"
            found[key].layout = None if found[key].why else layout


def _refuse_overlaps(
    ask: _Asker, images: Tensor, found: Mapping[SiteKey, SitePlaces], mosaics: Sequence[_Mosaic]
) -> None:
    """A key that is no patch and yet depends on the image holds all of it: else it is a patch of a finer grid."""
    doubtful: dict[SiteKey, list[int]] = {}
    for key, site in found.items():
        mosaic = None if site.layout is None else _of_grid(mosaics, site.layout)
        if mosaic is not None and key in mosaic.v and lay.SEVERAL in mosaic.v[key] and lay.has_own(mosaic.v[key]):
            doubtful[key] = [t for t, p in enumerate(mosaic.v[key]) if p == lay.SEVERAL]
    if not doubtful:
        return
    base = lay.noise_images(images, 1, seed=4)[0]
    seen = ask(torch.cat([base[None], lay.corners_changed(base)]), 3).sites
    for key, tokens in doubtful.items():
        moved = lay.changes(seen[key].v[1:], seen[key].v[:1])[:, tokens] > _limit(seen[key]) / 4
        if not bool(moved.all()):
            found[key].layout = None
            found[key].why = "some of its keys hold parts of several patches of the grid that the others form"


_ROUNDS = 5  # of two base images each: the user's and noise


def _rank_centres(
    ask: _Asker,
    images: Tensor,
    user: Tensor,
    strength: float,
    found: Mapping[SiteKey, SitePlaces],
    unplaced: Sequence[SiteKey],
    mosaics: Sequence[_Mosaic],
    convs: Sequence[PatchConv],
) -> None:
    """Places of tokens whose fields overlap, by their centres: the user's image and noise must tell the same."""
    size = (images.shape[-2], images.shape[-1])
    # Dark noise beside a bright image, and the reverse: an order that hangs on brightness is not the same in both.
    contrast = -0.5 if float(user.float().mean()) > 0 else 0.5
    noise = lay.noise_images(images, _ROUNDS, seed=4) + contrast
    told: tuple[list[Tokens], list[Tokens]] = ([], [])
    waiting = list(unplaced)
    for number in range(_ROUNDS):
        for bases, image in zip(told, (user, noise[number]), strict=True):
            coarsest = 1 + max(m.cells for m in mosaics)
            bases.append(ask(lay.ramps(image, strength, seed=10 + number), 4 + number, by_head=coarsest))
        waiting = [key for key in waiting if not _rank_site(key, found, told, size, convs, mosaics)]
        if not waiting:
            break


def _rank_site(
    key: SiteKey,
    found: Mapping[SiteKey, SitePlaces],
    told: tuple[list[Tokens], list[Tokens]],
    size: tuple[int, int],
    convs: Sequence[PatchConv],
    mosaics: Sequence[_Mosaic],
) -> bool:
    """Place a site's keys and queries; whether that could be settled."""
    site = found[key]
    seen = [[t.sites[key] for t in bases if key in t.sites] for bases in told]
    if any(len(some) < len(bases) for some, bases in zip(seen, told, strict=True)):
        site.why = "it runs in another way on other images"
        return True
    limit = _limit(seen[0][0]) / 4
    live, hopeful = lay.changes(seen[0][0].v[1], seen[0][0].v[0]) > limit, False
    for conv in lay.candidate_grids(size, len(live), int(live.sum()), convs):
        halves = [_centre([s.v for s in some], conv.grid, limit) for some in seen]
        others = [f.layout for f in found.values() if f.layout is not None and f.layout.grid == conv.grid]
        hopeful = hopeful or len(seen[0]) < 2 or _agreement(halves, conv.grid) >= 0.5
        places = _agreed_places(halves, conv.grid, len(seen[0]), [o for o in others if len(o.order) == len(live)])
        if places is None:
            continue
        if _heads_apart([s.heads for some in seen for s in some], conv.grid, places, limit) > 0.35:
            site.why = "its heads see different parts of each patch (dilated attention)"
        elif any(m.conv.grid == conv.grid and _changes_order(m, key, places, 4 * limit) for m in mosaics):
            site.why = "its tokens hold other patches on another image, or in another call"
        else:
            site.layout = lay.layout_of(places, conv.grid, "centres")
            if site.layout is not None:
                queries = [[s.q for s in some] for some in seen]
                site.patch_queries = _queries_by_centre(queries, site.layout, conv.grid, limit)
        return True
    return not hopeful


def _agreement(halves: Sequence[Tensor], grid: tuple[int, int]) -> float:
    """Share of tokens that two halves of the base images rank alike: with more of them, a few others may follow."""
    one, other = (lay.cells_by_rank(half[:, ~half.isnan().any(0)], grid) for half in halves)
    return float((one == other).double().mean()) if len(one) == len(other) else 0.0


def _changes_order(mosaic: _Mosaic, key: SiteKey, places: Places, limit: float) -> bool:
    """Whether tokens change between images as if they were exchanged, and not as if their neighbours did.

    In two images that agree in a token's own cell, a token whose field overlaps others changes a little, or always. One
    that was exchanged in some of the images changes not at all in some pairs, and as much as any token in others.
    """
    tokens = [t for t, p in enumerate(places) if p >= 0]
    apart = mosaic.apart[key].permute(2, 0, 1)[tokens]  # (N, M, M)
    codes = torch.tensor(lay.partition_codes(mosaic.cells), device=apart.device)[[places[t] for t in tokens]]
    same = (codes[:, :, None] == codes[:, None]) & ~torch.eye(codes.shape[1], dtype=torch.bool, device=apart.device)
    own, other = apart[same], apart[codes[:, :, None] != codes[:, None]]
    still = own <= limit
    if not 0.05 < float(still.double().mean()) < 0.95:
        return False
    return float(own[~still].median()) > 0.8 * float(other.median())


def _agreed_places(
    halves: Sequence[Tensor], grid: tuple[int, int], rounds: int, others: Sequence[TokenLayout]
) -> Places | None:
    """Places that two halves of the base images tell alike.

    After a few rounds it is enough that both together tell them, or another layer does, and each half nearly so.
    """
    one, other = (lay.places_by_centre(half, grid) for half in halves)
    if one is not None and one == other:
        return one
    if rounds < 3:
        return None
    both = lay.places_by_centre(torch.stack(list(halves)).nanmean(0), grid)
    guesses = [places for places in (both, *map(_places_of, others)) if places is not None]
    return next((g for g in guesses if all(lay.far_from(half, g, grid, 0.9) <= 0.02 for half in halves)), None)


def _places_of(layout: TokenLayout) -> Places:
    where = {token: cell for cell, token in enumerate(layout.patches)}
    return tuple(where.get(token, lay.STATIC) for token in range(len(layout.order)))


def _queries_by_centre(
    queries: Sequence[Sequence[Tensor | None]], keys: TokenLayout, grid: tuple[int, int], limit: float
) -> dict[int, int]:
    """Where two halves of the base images tell the queries alike; as the keys where each half tells most of them so.

    An order that is nearly that of the keys is none to trust: a few queries may be exchanged by chance.
    """
    if any(q is None for some in queries for q in some):
        return {}
    halves = [_centre(some, grid, limit) for some in queries]
    one, other = (lay.places_by_centre(half, grid) for half in halves)
    places = one if one == other else None
    order = _places_of(keys)
    if halves[0].shape[-1] == len(order):
        alike = min(_told_as(half, order, grid) for half in halves)
        places = order if alike > 0.5 else places if alike < 0.5 else None
    return {p: t for t, p in enumerate(places or ()) if p >= 0}


def _told_as(centre: Tensor, places: Places, grid: tuple[int, int]) -> float:
    """Share of the tokens with a place that (2, T) centres rank into it; 0 where they leave some of them out."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    if bool(centre[:, tokens].isnan().any()):
        return 0.0
    ranked = lay.cells_by_rank(centre[:, tokens], grid)
    return float((ranked == torch.tensor([places[t] for t in tokens], device=ranked.device)).double().mean())


def _centre(sketches: Sequence[Tensor | None], grid: tuple[int, int], limit: float) -> Tensor:
    """(2, …, T) centres on average over several base images."""
    return torch.stack([lay.centres(s, grid, limit) for s in sketches if s is not None]).nanmean(0)


def _heads_apart(heads: Sequence[Tensor | None], grid: tuple[int, int], places: Places, limit: float) -> float:
    """By how many cells the heads' own centres differ, on average over the tokens."""
    if any(h is None for h in heads):
        return 0.0
    tokens = [t for t, p in enumerate(places) if p != lay.STATIC]
    own = _centre(heads, grid, limit)[..., tokens].nanmean(-1)  # (2, H)
    return float((own.amax(1) - own.amin(1)).nan_to_num(0).max())


# Queries, and which of them is CLS


def _find_queries(found: Mapping[SiteKey, SitePlaces], mosaics: Sequence[_Mosaic], reference: Tokens) -> None:
    """Which query holds which patch of the keys' grid, and the layouts of what enters the modules around."""
    for key, site in found.items():
        mosaic = None if site.layout is None else _of_grid(mosaics, site.layout)
        if site.layout is None or mosaic is None or key not in reference.sites:
            continue
        if not site.patch_queries and key in mosaic.q:
            held = [p for p in mosaic.q[key] if p >= 0]
            if len(held) == len(set(held)) and lay.has_own(mosaic.q[key]):
                site.patch_queries = {p: t for t, p in enumerate(mosaic.q[key]) if p >= 0}
                masked = lay.layout_of(mosaic.q[key], site.layout.grid, "exact")
                if masked is not None:  # also the queries of patches that a mask token replaced
                    site.patch_queries = dict(enumerate(masked.patches))
        within = {call[0]: mosaic.entries.get(call) for call in reference.sites[key].within}
        layouts = {path: lay.layout_of(p, site.layout.grid, "exact") for path, p in within.items() if p is not None}
        if site.layout.evidence == "centres" and not any(layouts.values()):
            # Where no token can be told exactly, those that enter are taken to be in the order of the keys.
            layouts = {
                path: site.layout for path, p in within.items() if p is not None and len(p) == len(site.layout.order)
            }
        site.entries = {path: layout for path, layout in layouts.items() if layout is not None}


def _class_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parameters that are a class token by their name, as (module, name)."""
    found = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            small = parameter is not None and parameter.is_floating_point() and parameter.numel() <= 65536
            if small and _CLASS_NAME.search(name) and not hasattr(parameter, "ds_id"):
                found.append((module, name))
    return found[:4]


def _find_cls(
    ask: _Asker,
    images: Tensor,
    found: Mapping[SiteKey, SitePlaces],
    mosaics: Sequence[_Mosaic],
    reference: Tokens,
) -> None:
    """Which query is CLS: the one that moves when the class token's parameter is changed."""
    first = lay.mosaics(images, mosaics[0].conv)[:1]
    nudges = [ask(first, 1, nudged=[owner]) for owner in _class_parameters(ask.model)]
    registers = any(_REGISTER_NAME.search(name) for m in ask.model.modules() for name in m._parameters)
    for key, site in found.items():
        if site.layout is None or key not in reference.sites:
            continue
        before, held = reference.sites[key], set(site.patch_queries.values())
        others = [t for t in range(before.queries) if t not in held]
        moved_keys: list[int] = []
        moved: list[list[int]] = []
        for nudge in nudges:
            after = nudge.sites.get(key)
            if after is None or after.v.shape[1:] != before.v.shape[1:]:
                continue
            limit = _limit(before)
            if after.q is not None and before.q is not None and after.q.shape[1:] == before.q.shape[1:]:
                moved.append(_changed(after.q, before.q[:1], limit))
            moved_keys += [t for t in _changed(after.v, before.v[:1], limit) if t in site.layout.prefix]
        site.cls, site.no_cls = _choose_cls(site, before, [m for m in moved if m], others, registers)
        _put_cls_first(site, moved_keys, nudges, reference, key)


def _changed(after: Tensor, before: Tensor, limit: float) -> list[int]:
    return [int(t) for t in (lay.changes(after[0], before[0]) > limit).nonzero().flatten()]


def _choose_cls(
    site: SitePlaces, before: SiteTokens, moved: Sequence[list[int]], others: Sequence[int], registers: bool
) -> tuple[int | None, str]:
    """The query index of CLS, or why there is none."""
    assert site.layout is not None
    alone = sorted({m[0] for m in moved if len(m) == 1})
    if moved and len(alone) == 1 and alone[0] in others:
        return alone[0], ""
    if moved and any(len(m) > 1 for m in moved) and not alone:
        several = max(moved, key=len)
        if len(several) > len(others):
            return None, "its class parameter takes part in every token, so no single token is CLS"
        return None, f"it has {len(several)} class tokens, at {several}, and nothing tells which one is meant"
    if len(alone) > 1:
        return None, f"it has {len(alone)} class tokens, at {alone}, and nothing tells which one is meant"
    if before.q is None and before.queries > 1:
        return None, "what its queries are made of could not be seen"
    if not others:
        return None, ""
    if len(others) == 1 and not (registers and before.queries > 1):
        return others[0], ""
    return None, (
        f"it has {len(others)} queries that are not patches, at {list(others)[:20]}, and nothing tells which is the "
        "CLS token (registers are not)"
    )


def _put_cls_first(
    site: SitePlaces, moved_keys: Sequence[int], nudges: Sequence[Tokens], reference: Tokens, key: SiteKey
) -> None:
    """The prefix starts with the CLS key, in the operation and in what enters the modules around it."""
    assert site.layout is not None
    keys = sorted(set(moved_keys))
    site.layout = _with_first(site.layout, keys)
    entries = {}
    for call in reference.sites[key].within:
        layout, before = site.entries.get(call[0]), reference.entries.get(call)
        if layout is None or before is None:
            continue
        limit, changed = _limit(reference.sites[key]), set()
        for nudge in nudges:
            after = nudge.entries.get(call)
            if after is not None and after.shape[1:] == before.shape[1:]:
                changed.update(_changed(after, before[:1], limit))
        entries[call[0]] = _with_first(layout, sorted(changed & set(layout.prefix)))
    site.entries = entries


def _with_first(layout: TokenLayout, cls: Sequence[int]) -> TokenLayout:
    if len(cls) != 1:
        return layout
    prefix = (cls[0], *(t for t in layout.prefix if t != cls[0]))
    return TokenLayout(layout.grid, prefix, layout.patches, layout.evidence)


# Where results go


def _refuse_mixtures(found: Mapping[SiteKey, SitePlaces], reference: Tokens) -> None:
    """Two products of one V in one call of a module: for the same queries a mixture, for others a part each."""
    sites = [(key, reference.sites[key]) for key in found if key in reference.sites]
    for i, (key, a) in enumerate(sites):
        for other, b in sites[i + 1 :]:
            if not a.within or a.within != b.within or a.v.shape != b.v.shape or not torch.equal(a.v, b.v):
                continue
            shared = set(found[key].patch_queries) & set(found[other].patch_queries)
            if shared or (
                a.queries == b.queries == 1 and a.q is not None and b.q is not None and torch.equal(a.q, b.q)
            ):
                for one in (found[key], found[other]):
                    one.layout, one.why = None, "two attentions over the same values are combined for the same queries"
            else:
                found[key].part = found[other].part = True


def _check_landing(
    ask: _Asker,
    images: Tensor,
    found: Mapping[SiteKey, SitePlaces],
    mosaics: Sequence[_Mosaic],
    reference: Tokens,
) -> None:
    """Marks in a product's results must come out at the tokens that its queries are."""
    marks = _choose_marks(found, reference)
    if not marks:
        return
    slots = 1 + max(m.slot for m in marks.values())
    base, other = lay.noise_images(images, 2, seed=8)
    shown = torch.stack([base, *(base for _ in range(slots)), other])
    by_site = {}
    for key, site in reference.sites.items():
        by_site[key] = torch.zeros(len(shown), site.queries, dtype=torch.bool, device=images.device)
        if key in marks:
            by_site[key][1 + marks[key].slot, list(marks[key].queries)] = True
    tokens = ask(shown, 1, marks=by_site)
    landing = _Landing(tokens, marks, found)
    hops = landing.hops()
    for key, place in found.items():
        if place.layout is None or key not in tokens.sites:
            continue
        if key in hops:
            place.layout, place.why = None, "it is one of two hops: what an attention gave is read by attention again"
        elif key in marks and not landing.is_right(key, _of_grid(mosaics, place.layout)):
            place.layout, place.why = None, "the results of its queries do not go to the tokens that its queries are"


def _grid_of(site: SitePlaces) -> tuple[int, int]:
    return (0, 0) if site.layout is None else site.layout.grid


def _depends_on_image(sketches: Tensor, limit: float) -> bool:
    return bool((lay.changes(sketches[-1], sketches[0]) > limit).any())


@dataclass(frozen=True)
class _Marked:
    """What is marked at one site, in the image of its slot: the cells, and the queries that hold them."""

    slot: int
    places: frozenset[int]
    queries: tuple[int, ...]


def _choose_marks(found: Mapping[SiteKey, SitePlaces], reference: Tokens) -> dict[SiteKey, _Marked]:
    """Sites that share an image have places of their own, at least three each."""
    sites = [k for k, f in found.items() if f.layout is not None and len(f.patch_queries) > 1 and k in reference.sites]
    fewest = min((len(found[key].patch_queries) for key in sites), default=1)
    slots = math.ceil(3 * len(sites) / fewest)
    generator = torch.Generator().manual_seed(9)
    marks: dict[SiteKey, _Marked] = {}
    for slot in range(slots):
        orders: dict[tuple[int, int], list[int]] = {}
        share = sites[slot::slots]
        for number, key in enumerate(share):
            grid = _grid_of(found[key])
            if grid not in orders:
                orders[grid] = torch.randperm(math.prod(grid), generator=generator).tolist()
            held = found[key].patch_queries
            mine = [p for p in orders[grid][number :: max(len(share), 2)] if p in held]  # at most half of them
            if mine:
                marks[key] = _Marked(slot, frozenset(mine), tuple(held[p] for p in mine))
    return marks


class _Landing:
    """Whether results of a site's queries land in the tokens that the queries are."""

    def __init__(self, tokens: Tokens, marks: Mapping[SiteKey, _Marked], found: Mapping[SiteKey, SitePlaces]) -> None:
        self.tokens, self.marks, self.found = tokens, marks, found
        self.order = [key for key in found if key in tokens.sites]

    def hops(self) -> set[SiteKey]:
        """Operations whose V is nothing but what others gave in the same call of a module; and those others."""
        chained: set[SiteKey] = set()
        for number, key in enumerate(self.order):
            seen = self.tokens.sites[key]
            before = [k for k in self.order[:number] if seen.within and self.tokens.sites[k].within == seen.within]
            if before and not _depends_on_image(seen.v, _limit(seen)):
                chained.update([*before, key])
            again = self.tokens.again.get(key)
            if again is not None and not _depends_on_image(again, _limit(seen)):
                chained.add(key)
        return chained

    def is_right(self, key: SiteKey, mosaic: _Mosaic | None) -> bool:
        """Looked at where the modules around end, and where the next attention reads."""
        seen = self.tokens.sites[key]
        told = [self._at_exit(key, call, mosaic) for call in reversed(seen.within)]
        told.append(self._at_next_site(key, mosaic))
        if "wrong" in told:
            return False
        return "right" in told or "in another order" not in told

    def _moved(self, key: SiteKey, sketches: Tensor) -> list[bool]:
        image = 1 + self.marks[key].slot
        moved: list[bool] = (lay.changes(sketches[image], sketches[0]) > _limit(self.tokens.sites[key])).tolist()
        return moved

    def _marked_places(self, key: SiteKey, others: Sequence[SiteKey]) -> set[int]:
        grid, mine = _grid_of(self.found[key]), self.marks[key]
        alike = [
            self.marks[k].places
            for k in others
            if k in self.marks and self.marks[k].slot == mine.slot and _grid_of(self.found[k]) == grid
        ]
        return set(mine.places).union(*alike)

    def _at_exit(self, key: SiteKey, call: Call, mosaic: _Mosaic | None) -> str:
        leaving, entering = self.tokens.exits.get(call), self.tokens.entries.get(call)
        if leaving is None:
            return ""
        out = self._moved(key, leaving)
        same_length = entering is not None and entering.shape[1] == len(out)
        before = self._moved(key, entering) if entering is not None and same_length else [False] * len(out)
        entry = exit_ = None
        if mosaic is not None:
            exit_ = mosaic.exits.get(call)
            entry = mosaic.entries.get(call) if same_length else None
            exit_ = exit_ if lay.is_whole(exit_, mosaic.cells) else None
            entry = entry if lay.is_whole(entry, mosaic.cells) else None
        at_queries = {q: p for p, q in self.found[key].patch_queries.items()}
        if exit_ is not None and entry is not None:
            places, verdict = list(exit_), "right" if exit_ == entry else "in another order"
        elif entry is not None:
            places, verdict = list(entry), "right"
        elif len(out) == self.tokens.sites[key].queries:
            places, verdict = [at_queries.get(t, lay.STATIC) for t in range(len(out))], "right"
        else:
            return ""
        inside = [k for k in self.order if call in self.tokens.sites[k].within]
        wanted = self._marked_places(key, inside)
        newly = {t for t in range(len(out)) if out[t] and not before[t]}
        if not newly:
            return ""
        missing = any(places[t] in wanted and not out[t] for t in range(len(out)))
        strict = exit_ is not None and entry is not None
        extra = strict and any(places[t] not in wanted for t in newly)
        return "wrong" if missing or extra else verdict

    def _at_next_site(self, key: SiteKey, mosaic: _Mosaic | None) -> str:
        if mosaic is None or not lay.is_whole(mosaic.v.get(key), mosaic.cells):
            return ""
        own = self._at_places(key, key, mosaic)
        number = self.order.index(key)
        for i, later in enumerate(self.order[number + 1 :], number + 1):
            if not lay.is_whole(mosaic.v.get(later), mosaic.cells) or mosaic.v[later] is None:
                continue
            if self.tokens.sites[later].v.shape[1] != len(mosaic.v[later]):
                continue
            newly = self._at_places(key, later, mosaic) - own
            if newly:
                expected = self._marked_places(key, self.order[number:i])
                return "right" if self.marks[key].places <= newly | own and newly <= expected else "wrong"
        return ""

    def _at_places(self, key: SiteKey, site: SiteKey, mosaic: _Mosaic) -> set[int]:
        """Places of the tokens whose V moved at a site."""
        moved = self._moved(key, self.tokens.sites[site].v)
        return {p for p, m in zip(mosaic.v[site], moved, strict=True) if m and p >= 0}
