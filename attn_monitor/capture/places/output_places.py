"""Whether the results of attention go to the tokens that its queries are: marks put into them are looked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.capture.observer import SiteKey
from attn_monitor.capture.places import layout as lay
from attn_monitor.capture.places.silent_forward import Call, Tokens
from attn_monitor.capture.places.silent_runs import Asker
from attn_monitor.capture.places.site_places import Mosaic, SitePlaces, grid_of, limit_of, mosaic_of


def refuse_mixtures(found: Mapping[SiteKey, SitePlaces], reference: Tokens) -> None:
    """Two products of one V in one call of a module: for the same queries a mixture, for others a part each."""
    for key in reference.mixed & set(found):
        found[key].layout, found[key].why = None, "what it reads is also combined with other weights (a mixture)"
    sites = [(key, reference.sites[key]) for key in found if key in reference.sites]
    for i, (key, a) in enumerate(sites):
        for other, b in sites[i + 1 :]:
            if not a.within or a.within != b.within or a.v.shape != b.v.shape or not torch.equal(a.v, b.v):
                continue
            shared = set(found[key].patch_queries) & set(found[other].patch_queries)
            shared |= {-1} if found[key].cls is not None and found[other].cls is not None else set()
            if shared or (
                a.queries == b.queries == 1 and a.q is not None and b.q is not None and torch.equal(a.q, b.q)
            ):
                for one in (found[key], found[other]):
                    one.layout, one.why = None, "two attentions over the same values are combined for the same queries"
            else:
                found[key].part = found[other].part = True


def check_landing(
    ask: Asker,
    images: Tensor,
    found: Mapping[SiteKey, SitePlaces],
    mosaics: Sequence[Mosaic],
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
        elif key in marks and not landing.is_right(key, mosaic_of(mosaics, place.layout)):
            place.layout, place.why = None, "the results of its queries do not go to the tokens that its queries are"


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
            grid = grid_of(found[key])
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
            if before and not _depends_on_image(seen.v, limit_of(seen)):
                chained.update([*before, key])
            again = self.tokens.again.get(key)
            if again is not None and not _depends_on_image(again, limit_of(seen)):
                chained.add(key)
        return chained

    def is_right(self, key: SiteKey, mosaic: Mosaic | None) -> bool:
        """Looked at where the modules around end, and where the next attention reads."""
        seen = self.tokens.sites[key]
        told = [self._at_exit(key, call, mosaic) for call in reversed(seen.within)]
        told.append(self._at_next_site(key, mosaic))
        if "wrong" in told:
            return False
        return "right" in told or "in another order" not in told

    def _moved(self, key: SiteKey, sketches: Tensor) -> list[bool]:
        image = 1 + self.marks[key].slot
        moved: list[bool] = (lay.changes(sketches[image], sketches[0]) > limit_of(self.tokens.sites[key])).tolist()
        return moved

    def _marked_places(self, key: SiteKey, others: Sequence[SiteKey]) -> set[int]:
        grid, mine = grid_of(self.found[key]), self.marks[key]
        alike = [
            self.marks[k].places
            for k in others
            if k in self.marks and self.marks[k].slot == mine.slot and grid_of(self.found[k]) == grid
        ]
        return set(mine.places).union(*alike)

    def _at_exit(self, key: SiteKey, call: Call, mosaic: Mosaic | None) -> str:
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

    def _at_next_site(self, key: SiteKey, mosaic: Mosaic | None) -> str:
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
                expected = self._marked_places(key, self.order[:i])  # branches that run side by side land together
                return "right" if self.marks[key].places <= newly | own and newly <= expected else "wrong"
        return ""

    def _at_places(self, key: SiteKey, site: SiteKey, mosaic: Mosaic) -> set[int]:
        """Places of the tokens whose V moved at a site."""
        moved = self._moved(key, self.tokens.sites[site].v)
        return {p for p, m in zip(mosaic.v[site], moved, strict=True) if m and p >= 0}
