"""Run a model with strong marks in the results of attention, and follow them to the tokens that they reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.layout import STATIC, Places, TokenLayout, is_whole
from attn_monitor.capture.token_places.site_places import Mosaic, PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import noise_images
from attn_monitor.capture.token_places.tokens import Call, Tokens, concatenate


@dataclass(frozen=True)
class Marks:
    """Hold the cells of a grid, and their queries, that are marked at one site in the image of its slot."""

    slot: int
    grid: tuple[int, ...]
    places: frozenset[int]
    queries: tuple[int, ...]


class MarkedResults:
    """Run the model with marks, and check at which tokens they come out.

    Attributes:
        tokens: Sketches in the base image without marks, in the base image with the marks of each slot, with marks at
            the CLS queries of the sites without other marks (``lone``), if any, with marks at all queries but one
            (``spared``; one image for all sites or more, as ``images_of_spared`` numbers them), and in another image.
        order: The sites in the order in which they run.
    """

    def __init__(
        self,
        search: PlaceSearch,
        marks: dict[SiteKey, Marks],
        lone: Mapping[SiteKey, int] | None = None,
        spared: Mapping[SiteKey, int] | None = None,
        images_of_spared: Mapping[SiteKey, int] | None = None,
    ) -> None:
        slots = 1 + max((m.slot for m in marks.values()), default=-1)
        base, other = noise_images(search.images, 2, seed=8)
        self._slot_of_lone, first = slots, 1 + slots + bool(lone)
        self._spared = spared or {}
        self._image_of_spared = {key: first + n for key, n in (images_of_spared or {}).items()}
        shown = torch.stack([base] * (1 + max([first - 1, *self._image_of_spared.values()])) + [other])
        marked_queries = {}
        for key, tokens in search.reference.sites.items():
            marked_queries[key] = torch.zeros(len(shown), tokens.queries, dtype=torch.bool, device=shown.device)
            if key in marks:
                marked_queries[key][1 + marks[key].slot, list(marks[key].queries)] = True
            elif lone and key in lone:
                marked_queries[key][1 + slots, lone[key]] = True
            if key in self._image_of_spared:
                others = torch.arange(tokens.queries, device="cpu") != self._spared[key]
                marked_queries[key][self._image_of_spared[key]] = others
        self.search, self.marks = search, marks
        # The other image runs alone: what depends on the images beside it would seem to change with marks.
        parts = [slice(0, -1), slice(-1, None)]
        looks = [search.ablated_model(shown[p], 1, marks={k: m[p] for k, m in marked_queries.items()}) for p in parts]
        self.tokens = concatenate(looks)
        self.order = [key for key in search.sites if key in self.tokens.sites]

    def two_hops(self) -> set[SiteKey]:
        """Return the sites where V consists of attention results from the same call of a module, and their sources.

        A V that does not depend on the image may also be learned prompts or coordinates. So the results of the earlier
        sites are marked in one more forward, in which only a V that contains these results changes.
        """
        suspects: list[tuple[Tensor, SiteKey, list[SiteKey]]] = []  # V, its site, possible sources
        for key in self.order:
            seen = self.tokens.sites[key]
            beside = [k for k in self.order if k == key or (seen.within and self.tokens.sites[k].within == seen.within)]
            # Weights may meet other results in a further product, as those of the queries do in agent attention.
            again = self.tokens.again.get(key)
            for of_site, sources in ((seen.v, beside[: beside.index(key)]), (again, beside)):
                if sources and of_site is not None and not _depends_on_image(of_site, seen.threshold):
                    suspects.append((of_site, key, sources))
        if not suspects:
            return set()
        marked = self._with_all_marked({k for *_, sources in suspects for k in sources})
        chained: set[SiteKey] = set()
        for of_site, key, sources in suspects:
            after = marked.again.get(key) if key in sources else marked.sites[key].v
            limit, alone = self.tokens.sites[key].threshold, of_site[0]
            if after is None or not bool((relative_change(after[0], alone) > limit).any()):
                continue
            # Prompts plus results differ between tokens without marks too; they count where the results are of patches.
            bare = not bool((relative_change(alone, alone[:1]) > limit).any())
            if bare or not self.marks.keys().isdisjoint(sources):
                chained.update([*sources, key])
        return chained

    def _with_all_marked(self, keys: set[SiteKey]) -> Tokens:
        """Return the tokens of the base image with marks in all results of these sites."""
        base = noise_images(self.search.images, 2, seed=8)[:1]  # the same base image as in __init__
        marks = {
            key: torch.full((1, seen.queries), key in keys, device=base.device)
            for key, seen in self.search.reference.sites.items()
        }
        return self.search.ablated_model(base, 1, marks=marks)

    def goes_to_patches(self, key: SiteKey, mosaic: Mosaic | None, layout: TokenLayout) -> bool:
        """Check whether a lone query's result changes patches, where the innermost module that it changes ends."""
        seen, image = self.tokens.sites[key], 1 + self._slot_of_lone
        for call in reversed(seen.within):
            leaving = self.tokens.exits.get(call, ())
            exits = () if mosaic is None else mosaic.exits.get(call, ())
            for number, tensor in enumerate(leaving):
                moved = (relative_change(tensor[image], tensor[0]) > seen.threshold).tolist()
                if not any(moved):
                    continue
                places = _if_whole(mosaic, exits[number]) if mosaic is not None and len(exits) == len(leaving) else None
                if places is not None and len(places) != len(moved):
                    places = None
                if places is None and len(moved) == len(layout.order):
                    places = layout.places
                return places is not None and any(m and p >= 0 for m, p in zip(moved, places, strict=True))
        return False

    def spared_gets_others(self, key: SiteKey) -> bool | None:
        """Check whether the spared token changes with the marks of other queries, where the innermost module ends.

        Returns:
            None where the token had already changed when it entered that module, by an earlier layer's marks.
        """
        if key not in self._image_of_spared or key not in self.tokens.sites:
            return False
        site, seen = self.search.sites[key], self.tokens.sites[key]
        for call in reversed(seen.within):
            if any(call in o.within and o.within != seen.within for o in self.tokens.sites.values()):
                break
            for leaving in self.tokens.exits.get(call, ()):
                entering = self.tokens.entries.get(call, leaving[..., :0, :])
                as_entered = entering.shape[1] == leaving.shape[1]
                token = self._spared[key] if leaving.shape[1] == seen.queries else None
                token = site.cls_at.get(call[0], token) if as_entered else token
                moved = self._moved_with_others(key, leaving)
                if token is not None and any(moved):
                    return None if as_entered and self._moved_with_others(key, entering)[token] else moved[token]
        return False

    def _moved_with_others(self, key: SiteKey, sketches: Tensor) -> list[bool]:
        moved = relative_change(sketches[self._image_of_spared[key]], sketches[0]) > self.tokens.sites[key].threshold
        return [bool(m) for m in moved]

    def is_right(self, key: SiteKey, mosaic: Mosaic | None) -> bool:
        """Check the marks of a site in the tokens that leave the modules around, and in the V that they reach next."""
        results = self._verdicts(key, mosaic)
        if "wrong" in results:
            return False
        return "right" in results or "in another order" not in results

    def reaches_tokens(self, key: SiteKey, mosaic: Mosaic | None) -> bool:
        """Check whether the marks of a site reach any tokens; they do not where the model drops the result."""
        return key in self.marks and any(self._verdicts(key, mosaic))

    def _verdicts(self, key: SiteKey, mosaic: Mosaic | None) -> list[str]:
        results = [self._at_exit(key, call, mosaic) for call in reversed(self.tokens.sites[key].within)]
        return [*results, self._at_next_site(key, mosaic)]

    def _moved(self, key: SiteKey, sketches: Tensor) -> list[bool]:
        """Return for each token whether it changes with the marks of a site."""
        image, limit = 1 + self.marks[key].slot, self.tokens.sites[key].threshold
        change = relative_change(sketches[image], sketches[0])
        if bool((change > limit).any()):  # once some show, weaker ones are no rounding: LayerScale shrinks most
            limit /= 16
        moved: list[bool] = (change > limit).tolist()
        return moved

    def _marked_places(self, key: SiteKey, others: Sequence[SiteKey]) -> set[int]:
        """Return the cells marked at a site, or in the same image and grid at one of the other sites with a layout."""
        own = self.marks[key]
        marks = (self.marks[k] for k in others if k in self.marks and self.search.sites[k].layout is not None)
        return set(own.places).union(*(m.places for m in marks if (m.slot, m.grid) == (own.slot, own.grid)))

    def _at_exit(self, key: SiteKey, call: Call, mosaic: Mosaic | None) -> str:
        """Return the verdict on the first tensor with marks that leaves a module.

        Some modules return the tokens of several layers, and marks show in those of their own and of later layers only.

        Returns:
            "right", "in another order", "wrong", or "" where no tensor shows marks.
        """
        leaving = self.tokens.exits.get(call, ())
        exits = () if mosaic is None else mosaic.exits.get(call, ())
        places: Sequence[Places | None] = exits if len(exits) == len(leaving) else [None] * len(leaving)
        verdicts = (self._at_tensor(key, call, mosaic, *one) for one in zip(leaving, places, strict=True))
        return next((verdict for verdict in verdicts if verdict), "")

    def _at_tensor(
        self, key: SiteKey, call: Call, mosaic: Mosaic | None, leaving: Tensor, leaving_places: Places | None
    ) -> str:
        """Return the verdict, as `_at_exit` does, on one tensor that a module returns."""
        entering = self.tokens.entries.get(call)
        out = self._moved(key, leaving)
        if entering is not None and entering.shape[1] != len(out):
            entering = None
        before = [False] * len(out) if entering is None else self._moved(key, entering)
        entry = None if mosaic is None or entering is None else _if_whole(mosaic, mosaic.entries.get(call))
        exit_ = None if mosaic is None else _if_whole(mosaic, leaving_places)
        places = exit_ if exit_ is not None and entry is not None else entry
        if places is None and len(out) == self.tokens.sites[key].queries:
            at_queries = {q: p for p, q in self.search.sites[key].patch_queries.items()}
            places = tuple(at_queries.get(t, STATIC) for t in range(len(out)))
        newly = [t for t in range(len(out)) if out[t] and not before[t]]
        if places is None or not newly:
            return ""
        inside = [k for k in self.order if call in self.tokens.sites[k].within]
        wanted, both_known = self._marked_places(key, inside), exit_ is not None and entry is not None
        missing = any(places[t] in wanted and not out[t] for t in range(len(out)))
        extra = both_known and any(places[t] not in wanted for t in newly)
        if missing or extra:
            return "wrong"
        return "in another order" if both_known and exit_ != entry else "right"

    def _at_next_site(self, key: SiteKey, mosaic: Mosaic | None) -> str:
        """Return the verdict on V of the next attention that the marks reach: "right", "wrong", or "" for none."""
        if mosaic is None or not is_whole(mosaic.v.get(key), mosaic.cells):
            return ""
        own = self._moved_places(key, key, mosaic)
        number = self.order.index(key)
        for i, later in enumerate(self.order[number + 1 :], number + 1):
            if not is_whole(mosaic.v.get(later), mosaic.cells):
                continue
            if self.tokens.sites[later].v.shape[1] != len(mosaic.v[later]):
                continue
            newly = self._moved_places(key, later, mosaic) - own
            if newly:
                expected = self._marked_places(key, self.order[:i])  # parallel branches come out together
                return "right" if self.marks[key].places <= newly | own and newly <= expected else "wrong"
        return ""

    def _moved_places(self, key: SiteKey, site: SiteKey, mosaic: Mosaic) -> set[int]:
        """Return the cells of the tokens with a V at ``site`` that changes with the marks of ``key``."""
        moved = self._moved(key, self.tokens.sites[site].v)
        return {p for p, m in zip(mosaic.v[site], moved, strict=True) if m and p >= 0}


def _if_whole(mosaic: Mosaic, places: Places | None) -> Places | None:
    return places if is_whole(places, mosaic.cells) else None


def _depends_on_image(sketches: Tensor, limit: float) -> bool:
    return bool((relative_change(sketches[-1], sketches[0]) > limit).any())
