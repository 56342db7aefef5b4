"""Refuse attention where values or tokens are also mixed in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.layout import SEVERAL, TokenLayout
from attn_monitor.capture.token_places.site_places import PlaceSearch, SitePlaces
from attn_monitor.capture.token_places.synthetic_images import noise_images
from attn_monitor.capture.token_places.tokens import Call, SiteTokens, Tokens
from attn_monitor.grid import Grid

_MOST = 0.9  # share of the tokens; a convolution, such as a position encoding, reaches fewer from one corner


def refuse_mixtures(search: PlaceSearch) -> PlaceSearch:
    """Refuse sites with weights or values that occur in further products.

    Two products of one V in one call of a module are a mixture where they have the same queries, and parts of one
    layer where they have different ones.
    """
    found, reference = search.sites, search.reference
    again = reference.again.keys() & reference.sites.keys()
    twice = {key for key in again if torch.equal(reference.again[key], reference.sites[key].v)}
    reasons: dict[SiteKey, str] = {}
    for keys, reason in (
        (
            reference.mixed,
            "what it reads (V) is an operand of another product too, so its weights may not be all that is applied",
        ),
        (reference.parts, "its softmax meets V in several products, with a part of its keys or heads in each"),
        (
            reference.sums,
            "its weights are summed up in a further product, so the rows that are applied in the end may be others",
        ),
        (
            twice,
            "its weights, or what could be, meet the same values in two products, so its rows may not be all that "
            "is applied to these values",
        ),
    ):
        reasons |= dict.fromkeys(keys & found.keys(), reason)
    partial: dict[SiteKey, SitePlaces] = {}
    sites = [(key, reference.sites[key]) for key in found if key in reference.sites]
    for (key, a), (other_key, b) in combinations(sites, 2):
        site, other = found[key], found[other_key]
        if not a.within or a.within != b.within or a.v.shape != b.v.shape or not torch.equal(a.v, b.v):
            continue
        alike = site.query_grid == other.query_grid
        shared = alike and not set(site.patch_queries).isdisjoint(other.patch_queries)
        shared = shared or (site.cls is not None and other.cls is not None)
        if shared or _same_single_query(a, b):
            reason = (
                "two attentions in one call of a module have the same values and some of the same queries, so the "
                "rows of one may not be all that is applied, or may not be applied"
            )
            reasons |= {key: reason, other_key: reason}
        else:
            partial |= {k: replace(found[k], partial_queries=True) for k in (key, other_key)}
    return search.with_sites(partial).refusing(reasons)


def _same_single_query(a: SiteTokens, b: SiteTokens) -> bool:
    return a.queries == b.queries == 1 and a.q is not None and b.q is not None and torch.equal(a.q, b.q)


def refuse_other_mixing(search: PlaceSearch) -> PlaceSearch:
    """Refuse sites where tokens mix outside the attention result too, or where other tokens scale this result.

    The tokens that enter the enclosing module are replaced by noise, which differs in the patches of one corner, and
    the results of attention are fixed: at 0, and at strong marks. Then all other tokens must leave the module
    unchanged. A change that reaches neither CLS nor most tokens is taken for a convolution and accepted.

    The test runs only where tokens did not leave the module as they had entered in the mosaics, where the patches did
    not when CLS alone was changed, where rows do not sum to 1, or where the queries are not known.
    """
    calls = {key: call for key in search.sites if (call := _doubtful_call(search, key)) is not None}
    if not calls:
        return search
    reasons: dict[SiteKey, str] = {}
    nothing, exchanged = dict[Call, Tensor](), dict[Call, Tensor]()
    for key, call in calls.items():
        entry = search.sites[key].entries[call[0]]
        nothing[call] = torch.zeros(2, len(entry.order), dtype=torch.bool, device="cpu")
        exchanged[call] = nothing[call].clone()
        exchanged[call][:, _corner(entry, search.sites[key].cls)] = True
    marked = torch.tensor([False, True], device=search.images.device)  # at 0, what scales the results is not seen
    marks = {key: marked[:, None].expand(-1, seen.queries) for key, seen in search.reference.sites.items()}
    images = torch.cat([noise_images(search.images, 1, seed=8)] * 2)
    # Not in one batch: a term that is the same for all its images would not differ between them.
    looks = [search.ablated_model(images, 1, marks=marks, exchanged=e) for e in (nothing, exchanged)]
    for key, call in calls.items():
        site, left = search.sites[key], [look.exits.get(call, ()) for look in looks]
        if not all(key in look.sites and out and len(out[0]) for look, out in zip(looks, left, strict=True)):
            continue
        if left[0][0].shape != left[1][0].shape:
            continue
        limit, kept = looks[0].sites[key].threshold, ~exchanged[call][0]
        moved = [change.cpu() > limit for change in relative_change(left[1][0], left[0][0])]
        if _reach_most(moved[0], kept, site.cls):
            reasons[key] = (
                f"in {call[0]}, tokens change with others also where the result of attention is held fixed, so its "
                "weights are not all that mixes them there"
            )
        elif _reach_most(moved[1], kept, site.cls):
            reasons[key] = (
                "what its product with V gives is scaled by something of other tokens, such as the sums of weights "
                "that are normalised after V, so the weights are not those that the model applies in the end"
            )
    return search.refusing(reasons)


def refuse_changed_with_others(search: PlaceSearch) -> PlaceSearch:
    """Refuse sites where patches leave the module otherwise when CLS changes, though results go to their queries alone.

    A number of all tokens, such as the largest, may not change with the patches of one corner.
    """
    calls = {key: _doubtful_call(search, key) for key, *_ in search.placed()}
    return search.refusing(
        {
            key: f"in {call[0]}, tokens change with others beside what its attention gives, so its weights are not all "
            "that mixes them there"
            for key, call in calls.items()
            if call is not None and _change_together(search, call)
        }
    )


def refuse_side_by_side(search: PlaceSearch) -> PlaceSearch:
    """Refuse attention operations in one call of a module where any is independent of the first one's result.

    Heads, or chunks of queries, in a loop are parts of one layer and are counted as one. Blocks in one function read
    the results of earlier blocks and are layers. Chunks of queries are not refused: the first one is read.
    """
    groups: dict[object, list[SiteKey]] = {}
    for key, site, _ in search.placed():
        if site.patch_queries and (seen := search.reference.sites.get(key)):
            groups.setdefault(seen.within, []).append(key)
    images = torch.cat([noise_images(search.images, 1, seed=8)] * 2)
    reasons: dict[SiteKey, str] = {}
    for first, *others in groups.values():
        if not others:
            continue
        second = torch.tensor([False, True], device=search.images.device)
        sites = search.reference.sites.items()
        marks = {key: (second & (key == first))[:, None].expand(-1, seen.queries) for key, seen in sites}
        after = search.ablated_model(images, 1, marks=marks).sites
        beside = [key for key in others if key in after and not _differs(after[key])]
        if not beside:
            continue
        applied = _reaching_tokens(search, [first, *beside])
        dropped = [key for key in (first, *beside) if key not in applied]
        search = search.with_sites({applied[0]: replace(search.sites[applied[0]], together=(*applied[1:], *dropped))})
        queries = [query for key in applied for query in search.sites[key].patch_queries]
        if len(queries) == len(set(queries)):  # one, or chunks of queries, each with complete rows
            continue
        for key in applied:
            reasons[key] = (
                f"{len(applied)} attentions run side by side in one call of {key[0] or 'the model'}, such as heads "
                "in a loop: a map of one is no map of the layer. Compute them in one product"
            )
    return search.refusing(reasons)


def _reaching_tokens(search: PlaceSearch, keys: Sequence[SiteKey]) -> Sequence[SiteKey]:
    """Leave out the sites with results that reach no tokens, such as statistics; return all where none would stay."""
    images = torch.cat([noise_images(search.images, 1, seed=8)] * (1 + len(keys)))
    slots = torch.arange(len(images), device=search.images.device)
    of_sites = {key: slots == 1 + keys.index(key) if key in keys else slots < 0 for key in search.reference.sites}
    marks = {key: of_sites[key][:, None].expand(-1, seen.queries) for key, seen in search.reference.sites.items()}
    after = search.ablated_model(images, 1, marks=marks)
    tokens = [*(seen.v for seen in after.sites.values()), *(t for leaving in after.exits.values() for t in leaving)]
    reaching = [
        key
        for slot, key in enumerate(keys, 1)
        if any(
            bool((relative_change(t[slot], t[0]) > search.reference.sites[key].threshold / 16).any()) for t in tokens
        )
    ]
    return reaching or keys


def name_chunks_of_keys(search: PlaceSearch) -> PlaceSearch:
    """Give products of one set of queries with several sets of keys, in one call of a module, this as their reason."""
    groups: dict[object, list[SiteKey]] = {}
    for key, seen in search.reference.sites.items():
        if key in search.sites and search.sites[key].layout is None and seen.q is not None:
            groups.setdefault((seen.within, seen.q.numpy().tobytes()), []).append(key)
    reasons: dict[SiteKey, str] = {}
    for keys in groups.values():
        values = {search.reference.sites[key].v.numpy().tobytes() for key in keys}
        if len(values) == len(keys) > 1:
            reason = (
                f"its queries meet {len(keys)} sets of keys in one call of {keys[0][0] or 'the model'}, such as chunks "
                "of keys in a loop: a map of one is no map of the layer. Compute them in one product"
            )
            reasons |= dict.fromkeys(keys, reason)
    return search.refusing(reasons)


def _differs(seen: SiteTokens) -> bool:
    """Check whether V of the second image differs from that of the first."""
    return bool((relative_change(seen.v[1], seen.v[0]) > seen.threshold).any())


def _doubtful_call(search: PlaceSearch, key: SiteKey) -> Call | None:
    """Return the innermost call around a site that takes and returns tokens; None where nothing mixed them."""
    site, seen = search.sites[key], search.reference.sites.get(key)
    mosaic = search.mosaic_of(site.layout)
    if site.layout is None or seen is None or mosaic is None:
        return None
    for call in reversed(seen.within):
        entry, exits = site.entries.get(call[0]), mosaic.exits.get(call, ())
        if entry is None or not exits or len(exits[0]) not in (len(entry.order), seen.queries):
            continue
        as_entered = exits[0] == mosaic.entries.get(call) and SEVERAL not in exits[0]
        known = seen.q is not None and search.ablated_model.formats[key].sums_to_1
        return None if as_entered and known and not _change_together(search, call) else call
    return None


def _change_together(search: PlaceSearch, call: Call) -> bool:
    """Check whether most tokens leave a module otherwise when a parameter changes others that enter it, such as CLS."""
    return any(_changes_others(search.reference, tokens, call) for tokens in search.nudged)


def _changes_others(before: Tokens, after: Tokens, call: Call) -> bool:
    """Check whether most of the tokens that enter a call as before, in the first image, leave it otherwise."""
    ends = [t.entries.get(call) for t in (before, after)] + [
        next(iter(t.exits.get(call, ())), None) for t in (before, after)
    ]
    known = [t[0] for t in ends if t is not None]
    if len(known) < len(ends) or len({t.shape for t in known}) > 1:
        return False
    limit = max((seen.threshold for seen in before.sites.values()), default=1e-3)
    still = relative_change(known[1], known[0]) <= limit / 16
    moved = relative_change(known[3], known[2])[still] > limit
    return 0 < len(moved) < len(still) and float(moved.double().mean()) >= _MOST


def _corner(entry: TokenLayout, cls: int | None) -> list[int]:
    """Return the patches in the last corner of the grid, or in the first where CLS is late in the sequence."""
    lines = Grid(entry.grid).lines
    near = (lines < torch.tensor([[max(1, count // 4)] for count in entry.grid], device="cpu")).all(0)
    late = cls is not None and cls > len(entry.order) // 2
    return [entry.patches[cell if late else -1 - cell] for cell in near.nonzero().flatten().tolist()]


def _reach_most(moved: Tensor, kept: Tensor, cls: int | None) -> bool:
    """Check whether CLS, or most of the tokens that were not exchanged, have changed."""
    if len(moved) != len(kept):  # the module returns its queries only
        return cls is not None and cls < len(moved) and bool(moved[cls])
    return bool(cls is not None and moved[cls]) or float(moved[kept].double().mean()) >= _MOST
