"""Assign tokens with overlapping receptive fields to patches, by the centre of what each token depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv, candidate_grids
from attn_monitor.capture.observe.random_projections import FINE, relative_change
from attn_monitor.capture.token_places.decoding import (
    are_clear,
    cells_by_rank,
    centres,
    is_warped,
    places_by_centre,
    share_far_from,
)
from attn_monitor.capture.token_places.finer_queries import by_centre
from attn_monitor.capture.token_places.known_order import is_order, may_be_order, row_by_row
from attn_monitor.capture.token_places.layout import STATIC, Places, TokenLayout, layout_of
from attn_monitor.capture.token_places.shifted_images import ShiftedOrder, orders_that_shift
from attn_monitor.capture.token_places.site_places import Mosaic, PlaceSearch, SitePlaces
from attn_monitor.capture.token_places.synthetic_images import noise_images, ramps
from attn_monitor.capture.token_places.tokens import SiteTokens, Tokens

SMALL = 12  # cells of a grid in which each can be changed alone
_ROUNDS = 5  # each has two base images: the user's and noise

Cells = tuple[int, ...]


@dataclass(frozen=True)
class Ranked:
    """Hold the sites that were ranked without doubts, with their tokens on one noise image.

    Attributes:
        keys: The sites; of small grids, all sites that were ranked.
        base: (C, *size) noise image.
        seen: Tokens of the `ramps` of ``base``.
    """

    keys: Sequence[SiteKey]
    base: Tensor
    seen: Tokens


def rank_centres(
    search: PlaceSearch, image: Tensor, strength: float, unplaced: Sequence[SiteKey]
) -> tuple[PlaceSearch, Ranked]:
    """Assign the tokens of sites by their centres, where the user's image and noise give the same assignment.

    Args:
        search: The search.
        image: (C, *size), one of the user's images.
        strength: Standard deviation of the noise in `ramps`, relative to that of the image.
        unplaced: Sites that have no layout yet.

    Returns:
        The search, in which sites have their layout or the reason for having none, and the sites that were ranked
        before the last round, with their tokens on noise.
    """
    # Dark noise beside a bright image, and the reverse: a token order that depends on brightness then differs.
    contrast = -0.5 if float(image.float().mean()) > float(search.images.float().mean()) else 0.5
    noise = noise_images(search.images, _ROUNDS, seed=4, brightness=torch.full((_ROUNDS,), contrast, device="cpu"))
    coarsest = 1 + max(m.cells for m in search.mosaics)
    on_user_image: list[Tokens] = []
    on_noise: list[Tokens] = []
    waiting = [key for key in unplaced if not _hold_single_cells(search, key)]
    clear: list[SiteKey] = []
    for number in range(_ROUNDS):
        for tokens, base in ((on_user_image, image), (on_noise, noise[number])):
            changed = ramps(base, strength, seed=10 + number)
            seen = search.ablated_model(changed, 4 + number, by_head=coarsest, sketch_size=FINE)
            tokens.append(Tokens(seen.sites))  # of all rounds, and nothing else is read
        still = []
        for key in waiting:
            site, done = _ranked(search, key, (on_user_image, on_noise), None)
            search = search.with_sites({key: site})
            still += [] if done else [key]
        clear += [key for key in waiting if key not in still and (number + 1 < _ROUNDS or _is_small(search, key))]
        waiting = still
        if not waiting:
            break
        if number == 0:  # more images would tell centres apart; these tell orders that need no centres
            bases = [(image, on_user_image[0]), (noise[0], on_noise[0])]
            for key, order in orders_that_shift(search, bases, strength, 4, waiting).items():
                site, done = _ranked(search, key, (on_user_image, on_noise), order)
                search = search.with_sites({key: site})
                if done:
                    waiting.remove(key)
                    clear.append(key)
            if not waiting:
                break
    return search, Ranked(clear, noise[0], on_noise[0])


def _is_small(search: PlaceSearch, key: SiteKey) -> bool:
    layout = search.sites[key].layout
    return layout is not None and math.prod(layout.grid) <= SMALL


def _hold_single_cells(search: PlaceSearch, key: SiteKey) -> bool:
    """Check whether exact tokens form no complete grid: some share a cell, or all are exact and leave cells out.

    Only grids with at least as many cells as there are tokens that change can show this.
    """
    for mosaic in search.mosaics:
        places = mosaic.v.get(key, ())
        held, moving = [p for p in places if p >= 0], sum(p != STATIC for p in places)
        if held and mosaic.cells >= moving and (len(set(held)) < len(held) or len(held) == moving):
            return True
    return False


def _ranked(
    search: PlaceSearch,
    key: SiteKey,
    halves: tuple[Sequence[Tokens], Sequence[Tokens]],
    known: ShiftedOrder | None,
) -> tuple[SitePlaces, bool]:
    """Assign a site's keys and queries; return the site, and False where more base images may help."""
    site = search.sites[key]
    seen = [[t.sites[key] for t in half if key in t.sites] for half in halves]
    if any(len(some) < len(half) for some, half in zip(seen, halves, strict=True)):
        reason = "it does not run on every one of the synthetic images that find its patches"
        return replace(site, reason=reason), True
    first, rounds = seen[0][0], len(seen[0])
    limit = first.threshold / 4
    # A token may hardly change with one noise, as where a large position embedding is added.
    moving, hopeful = (
        torch.stack([relative_change(s.v[1], s.v[0]) > limit for some in seen for s in some]).any(0),
        False,
    )
    for conv in candidate_grids(search.size, len(moving), int(moving.sum()), search.convs):
        centres_of_keys = [_centre([s.v for s in some], conv, search.size, limit) for some in seen]
        geometry = conv.geometry.unless_whole(conv.grid, search.size)
        others = [o for _, _, o in search.placed() if o.grid == conv.grid and len(o.order) == len(moving)]
        hopeful = hopeful or rounds < 2 or _are_promising(centres_of_keys, conv.grid, rounds)
        if known is not None:
            places = known.places if known.grid == conv.grid else None
        else:
            places = _agreed_places(centres_of_keys, conv.grid, rounds, others)
        if places is None:
            continue
        if _distance_of_heads([s.heads for some in seen for s in some], conv, search.size, places, limit) > 0.35:
            reason = "its heads read different parts of each patch, so a key holds no one part for all of them"
        elif any(m.conv == conv and _in_several_orders(m, key, places, 4 * limit) for m in search.mosaics):
            reason = (
                "between some of the synthetic images, most of its tokens do not change where their patches do "
                "not, and between others they do, so its tokens may not be in one order"
            )
        elif known is None and is_warped(torch.stack(centres_of_keys).nanmean(0), places, conv.grid):
            reason = (
                "the centres of what its keys hold lie closer together in the middle of the image, more than half a "
                "cell beside the equal cells of a grid"
            )
        else:
            layout = layout_of(places, conv.grid, "centres", geometry)
            queries = {} if layout is None else _queries_by_centre(seen, layout, conv, search.size, limit)
            if layout is not None and known is not None and known.of_queries:
                queries = dict(enumerate(layout.patches))
            finer = None
            if not queries:
                queries, finer = by_centre(seen, math.prod(conv.grid), search.convs, search.size, limit)
            return replace(site, layout=layout, patch_queries=queries, query_grid=finer), True
        return replace(site, reason=reason), True
    return site, not hopeful


def _are_promising(halves: Sequence[Tensor], grid: Cells, rounds: int) -> bool:
    """Check whether all rounds may tell an order: both halves mostly rank alike, or lines may come clear."""
    one, other = (cells_by_rank(half[:, ~half.isnan().any(0)], grid) for half in halves)
    if len(one) == len(other) and float((one == other).double().mean()) >= 0.5:
        return True
    return may_be_order(halves, grid, _ROUNDS / rounds)


def _in_several_orders(mosaic: Mosaic, key: SiteKey, places: Places, limit: float) -> bool:
    """Check whether tokens change between images as if the model permuted them, not as if their fields overlapped.

    Between two images in the same order, the tokens whose own cells agree do not change; between other images, most of
    them change as much as any token. A field of several cells changes between almost any two images.
    """
    tokens = [t for t, p in enumerate(places) if p >= 0]
    changes = mosaic.changes[key].permute(2, 0, 1)[tokens]  # (N, M, M)
    codes = torch.tensor(mosaic.codes, device=changes.device)[[places[t] for t in tokens]]
    same, still = codes[:, :, None] == codes[:, None], changes <= limit
    share = ((same & still).sum(0) / same.sum(0)).fill_diagonal_(torch.nan)  # (M, M): of the tokens whose cells agree
    if not float(share.nan_to_num(0).max()) > 0.5 > float(share.nan_to_num(1).min()):
        return False
    return float(changes[same & ~still].median()) > 0.8 * float(changes[~same].median())


def _agreed_places(halves: Sequence[Tensor], grid: Cells, rounds: int, others: Sequence[TokenLayout]) -> Places | None:
    """Return the assignment on which both halves of the base images agree, None where there is none.

    An order row by row, or of another layer, needs no more than that nothing contradicts it (`known_order`). From the
    third round on it is enough that both halves together, or another layer, give one and that each half comes close.

    Args:
        halves: (axes, T) centres in cells, one tensor for each half of the base images.
        grid: Number of cells on each axis.
        rounds: How many base images each half has.
        others: Layouts of other sites with the same grid and number of keys.
    """
    one, other = (places_by_centre(half, grid) for half in halves)
    if one is not None and one == other and (rounds > 2 or are_clear(halves, one, grid)):
        return one
    together = torch.stack(list(halves)).mean(0)
    known = [places for places in (row_by_row(together, grid), *(layout.places for layout in others)) if places]
    found = next((places for places in dict.fromkeys(known) if is_order(halves, places, grid)), None)
    if found is not None or rounds < 3:
        return found
    both = places_by_centre(together, grid)
    guesses = [places for places in (both, *(layout.places for layout in others)) if places is not None]
    return next((g for g in guesses if all(share_far_from(half, g, grid, 0.9) <= 0.02 for half in halves)), None)


def _queries_by_centre(
    halves: Sequence[Sequence[SiteTokens]], keys: TokenLayout, conv: PatchConv, size: Cells, limit: float
) -> dict[int, int]:
    """Return the query of each cell: in the order of the keys where each half of the base images mostly agrees with it.

    Otherwise return the order in which both halves rank the queries. An order that is nearly that of the keys is not
    used as it is: a few queries may be exchanged by chance.
    """
    if any(tokens.q is None for half in halves for tokens in half):
        return {}
    queries = [_centre([tokens.q for tokens in half], conv, size, limit) for half in halves]
    one, other = (places_by_centre(half, keys.grid) for half in queries)
    places = one if one == other else None
    order = keys.places
    if queries[0].shape[-1] == len(order):
        alike = min(_share_ranked_as(half, order, keys.grid) for half in queries)
        places = order if alike > 0.5 else places if alike < 0.5 else None
    return {p: t for t, p in enumerate(places or ()) if p >= 0}


def _share_ranked_as(centre: Tensor, places: Places, grid: Cells) -> float:
    """Return the share of assigned tokens that (axes, T) centres rank into their cell; 0 where a centre is missing."""
    tokens = [t for t, p in enumerate(places) if p >= 0]
    if bool(centre[:, tokens].isnan().any()):
        return 0.0
    ranked = cells_by_rank(centre[:, tokens], grid)
    return float((ranked == torch.tensor([places[t] for t in tokens], device=ranked.device)).double().mean())


def _centre(sketches: Sequence[Tensor | None], conv: PatchConv, size: Cells, limit: float) -> Tensor:
    """Average the (axes, …, T) centres of tokens over several base images."""
    return torch.stack([centres(s, conv, size, limit) for s in sketches if s is not None]).nanmean(0)


def _distance_of_heads(
    heads: Sequence[Tensor | None], conv: PatchConv, size: Cells, places: Places, limit: float
) -> float:
    """Return by how many cells the centres of the heads differ, on average over the tokens."""
    if any(h is None for h in heads):
        return 0.0
    tokens = [t for t, p in enumerate(places) if p != STATIC]
    own = _centre(heads, conv, size, limit)[..., tokens].nanmean(-1)  # (axes, H)
    return float((own.amax(1) - own.amin(1)).nan_to_num(0).max())
