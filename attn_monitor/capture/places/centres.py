"""Places told by small changes: checked on the user's images, and ranked where fields overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_monitor.capture.observer import SiteKey
from attn_monitor.capture.places import layout as lay
from attn_monitor.capture.places.layout import PatchConv, Places, TokenLayout
from attn_monitor.capture.places.silent_forward import SiteTokens, Tokens
from attn_monitor.capture.places.silent_runs import Asker
from attn_monitor.capture.places.site_places import Mosaic, SitePlaces, limit_of, mosaic_of

_ROUNDS = 5  # of two base images each: the user's and noise


def check_on_user_images(
    ask: Asker,
    images: Sequence[Tensor],
    strength: float,
    found: Mapping[SiteKey, SitePlaces],
    mosaics: Sequence[Mosaic],
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


def _tells_otherwise(seen: SiteTokens, key: SiteKey, mosaic: Mosaic) -> bool:
    told = [(seen.v, mosaic.v[key])]
    if seen.q is not None and lay.is_whole(mosaic.q.get(key), mosaic.cells):
        told.append((seen.q, mosaic.q[key]))
    slack = 0.25 if seen.dtype in (torch.float16, torch.bfloat16) else 0.1  # of weights from 0 to 1
    return any(
        lay.other_weights(lay.shares(sketches, limit_of(seen) / 4)[0], places, mosaic.cells, slack) > 0.02
        for sketches, places in told
    )


def refuse_partial_views(
    ask: Asker, images: Tensor, found: Mapping[SiteKey, SitePlaces], mosaics: Sequence[Mosaic]
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
            moved = lay.changes(seen[key].v[1:], seen[key].v[:1])[:, list(layout.patches)] > limit_of(seen[key]) / 4
            border = torch.ones(grid, dtype=torch.bool, device=moved.device)
            border[1:-1, 1:-1] = False
            if not bool(moved[0][border.flatten()].all()):
                found[key].why = "the outermost pixels of the image are not seen: the model looks at a crop"
            elif not bool(moved[1:].all()):
                found[key].why = "its keys hold a part of their patches only (tokens left out, or pooled irregularly)"
            found[key].layout = None if found[key].why else layout


def refuse_overlaps(ask: Asker, images: Tensor, found: Mapping[SiteKey, SitePlaces], mosaics: Sequence[Mosaic]) -> None:
    """A key that is no patch and yet depends on the image holds all of it: else it is a patch of a finer grid."""
    doubtful: dict[SiteKey, list[int]] = {}
    for key, site in found.items():
        mosaic = None if site.layout is None else mosaic_of(mosaics, site.layout)
        if mosaic is not None and key in mosaic.v and lay.SEVERAL in mosaic.v[key] and lay.has_own(mosaic.v[key]):
            doubtful[key] = [t for t, p in enumerate(mosaic.v[key]) if p == lay.SEVERAL]
    if not doubtful:
        return
    base = lay.noise_images(images, 1, seed=4)[0]
    seen = ask(torch.cat([base[None], lay.corners_changed(base)]), 3).sites
    for key, tokens in doubtful.items():
        moved = lay.changes(seen[key].v[1:], seen[key].v[:1])[:, tokens] > limit_of(seen[key]) / 4
        if not bool(moved.all()):
            found[key].layout = None
            found[key].why = "some of its keys hold parts of several patches of the grid that the others form"


def rank_centres(
    ask: Asker,
    images: Tensor,
    user: Tensor,
    strength: float,
    found: Mapping[SiteKey, SitePlaces],
    unplaced: Sequence[SiteKey],
    mosaics: Sequence[Mosaic],
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
    mosaics: Sequence[Mosaic],
) -> bool:
    """Place a site's keys and queries; whether that could be settled."""
    site = found[key]
    seen = [[t.sites[key] for t in bases if key in t.sites] for bases in told]
    if any(len(some) < len(bases) for some, bases in zip(seen, told, strict=True)):
        site.why = "it runs in another way on other images"
        return True
    limit = limit_of(seen[0][0]) / 4
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


def _changes_order(mosaic: Mosaic, key: SiteKey, places: Places, limit: float) -> bool:
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
