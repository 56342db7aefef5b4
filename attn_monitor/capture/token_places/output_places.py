"""Check by marks in the results of attention that these go to the same tokens as its queries."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.token_places.marked_results import MarkedResults, Marks
from attn_monitor.capture.token_places.site_places import PlaceSearch, SitePlaces

_OTHER_RESULTS = (
    "the token of query {} also gets results of other queries, which are mixed after the product with V, so that the "
    "row of one query is not all that its token gets"
)


def check_outputs(search: PlaceSearch) -> PlaceSearch:
    """Refuse sites where marks in the results do not come out at the tokens of their queries."""
    marks = _choose_marks(search)
    lone = {
        key: site.cls
        for key, site, _ in search.placed()
        if site.cls is not None and key not in marks and key in search.reference.sites
    }
    if not any(search.placed()):
        return search
    spared = _choose_spared(search)
    check = MarkedResults(search, marks, lone, spared, dict.fromkeys(spared, 0))
    two_hops = check.two_hops()
    doubtful, reasons = [], dict[SiteKey, str]()
    for key, _, layout in search.placed():
        if key not in check.tokens.sites:
            continue
        reason = ""
        if key in two_hops:
            reason = "it is one of two hops: what an attention gave is read by attention again"
        elif key in marks and not check.is_right(key, search.mosaic_of(layout)):
            doubtful.append(key)
        elif key in search.reference.rivals and not check.reaches_tokens(key, search.mosaic_of(layout)):
            reason = "its weights are applied to more than one set of values"
        elif key in lone and check.goes_to_patches(key, search.mosaic_of(layout), layout):
            reason = "the result of its query goes to the patches, so that it is not the CLS token"
        elif check.spared_gets_others(key):
            reason = _OTHER_RESULTS.format(spared[key])
        if reason:
            reasons[key] = reason
    search = search.refusing(reasons)
    unknown = [key for key, *_ in search.placed() if check.spared_gets_others(key) is None]
    if not doubtful and not unknown:
        return search
    # A module may return tokens of earlier layers too; with one site per image, these show no marks.
    alone = MarkedResults(
        search,
        {key: replace(marks[key], slot=n) for n, key in enumerate(doubtful)},
        spared=spared,
        images_of_spared={key: n for n, key in enumerate(key for key in spared if key in (*doubtful, *unknown))},
    )
    unplaced: dict[SiteKey, SitePlaces] = {}
    for key, site, layout in search.placed():
        wrong = key in doubtful and (key not in alone.tokens.sites or not alone.is_right(key, search.mosaic_of(layout)))
        if wrong and site.query_grid is not None:  # a convolution on that grid may spread them; "mean" has no order
            unplaced[key] = replace(site, patch_queries={}, query_grid=None)
        elif wrong:
            reasons[key] = "not all results of its queries go to the tokens that its queries are"
        elif alone.spared_gets_others(key):
            reasons[key] = _OTHER_RESULTS.format(spared[key])
    return search.with_sites(unplaced).refusing(reasons)


def _choose_spared(search: PlaceSearch) -> dict[SiteKey, int]:
    """Choose a query of every site that gets no result of another: CLS, or the only one that is no patch."""
    spared: dict[SiteKey, int] = {}
    for key, site, _ in search.placed():
        queries = search.reference.sites[key].queries if key in search.reference.sites else 1
        others = [site.cls] if site.cls is not None else [*{*range(queries)} - {*site.patch_queries.values()}]
        if len(others) == 1 < queries:
            spared[key] = others[0]
    return spared


def _choose_marks(search: PlaceSearch) -> dict[SiteKey, Marks]:
    """Choose the marks of every site: sites that share an image get disjoint sets of about three cells or more."""
    sites = [
        (key, site.query_grid or layout.grid, site.patch_queries)
        for key, site, layout in search.placed()
        if len(site.patch_queries) > 1 and key in search.reference.sites
    ]
    fewest = min((len(held) for _, _, held in sites), default=1)
    slots = math.ceil(3 * len(sites) / fewest)
    generator = torch.Generator().manual_seed(9)
    marks: dict[SiteKey, Marks] = {}
    for slot in range(slots):
        orders: dict[tuple[int, ...], list[int]] = {}
        sharing = sites[slot::slots]
        for number, (key, grid, held) in enumerate(sharing):
            if grid not in orders:
                orders[grid] = torch.randperm(math.prod(grid), generator=generator, device="cpu").tolist()
            own = [p for p in orders[grid][number :: max(len(sharing), 2)] if p in held]  # at most half of them
            if own:
                marks[key] = Marks(slot, grid, frozenset(own), tuple(held[p] for p in own))
    return marks
