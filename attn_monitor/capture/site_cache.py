"""What each model was found to have, kept for as long as the model lives and nothing speaks against it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attn_monitor.capture.fingerprint import Key, State, state_of
from attn_monitor.capture.forward import Forward
from attn_monitor.capture.isolation import all_modules
from attn_monitor.capture.site_discovery import discover
from attn_monitor.capture.sites import Site


class Conditions(NamedTuple):
    """Under which a model's sites stay the same."""

    together: bool  # several images run at once, of which is known how they are told apart
    image_shape: tuple[int, ...]  # (C, H, W)
    dtype: torch.dtype
    device: torch.device
    structure: int

    @classmethod
    def of(cls, images: Tensor, structure: int) -> Conditions:
        """Of images as the model takes them, and the model's `structure_of`."""
        return cls(len(images) > 1, tuple(images.shape[1:]), images.dtype, images.device, structure)

    def cover(self, other: Conditions) -> bool:
        """Whether sites found under these are those under the others too."""
        return other in (self, self._replace(together=False))


def structure_of(model: nn.Module) -> int:
    """Changes when a submodule is replaced, added, removed, renamed, or given another class (as FSDP does)."""
    return hash(tuple((id(module), type(module), *module._modules.keys()) for module in all_modules(model)))


class Doubt(IntEnum):
    """Whether what is known of a model still holds; of several processes, the largest counts."""

    NONE = 0
    DUE = 1  # it is time to check the places
    CHANGED = 2  # something that they may depend on is not as it was
    MOVED = 3  # the check has shown other places


@dataclass(eq=False)
class Known:
    """Every attention site of a model under one forward, and what it may depend on as it was then.

    What changes in ordinary training and moves no token (BatchNorm's statistics, centres of a loss, counters) must not
    be a reason to ask again for ever. So an item that has changed is ``ignored`` from then on if the sites were found
    where they had been: a number at once, and anything else if it changes from look to look, since a switch that was
    turned once is likely to be turned again. Functions are never ignored. For what is ignored and for trained weights
    there is the check of the places, at growing distances.
    """

    conditions: Conditions
    sites: tuple[Site, ...]
    state: State
    ignored: frozenset[Key] = frozenset()
    changed: frozenset[Key] = frozenset()  # when the sites were found again where they had been
    looks: int = 0  # recordings that were made of them
    recorded: bool = field(default=False, repr=False)  # since the latest doubt

    def doubt(self, model: nn.Module, forward: Forward, *, last: bool = False) -> Doubt:
        """To be called before each recording. A check is due after 1, 2, 4, 8, … of them, and before the ``last``."""
        self.looks, self.recorded = self.looks + self.recorded, False
        if self.changes(state_of(model, forward)):
            return Doubt.CHANGED
        return Doubt.DUE if last or (self.looks and self.looks & (self.looks - 1) == 0) else Doubt.NONE

    def changes(self, now: State) -> set[Key]:
        """What is not as it was."""
        if now == self.state:
            return set()
        keys = (self.state.keys() | now.keys()) - self.ignored
        return {key for key in keys if now.get(key) != self.state.get(key)}

    def follow(self, before: Known) -> None:
        """Learn from what was known before, under other circumstances, what to ignore."""
        if not same_places(before.sites, self.sites):
            return
        self.changed = frozenset(before.changes(self.state))
        kinds = {key: (self.state.get(key) or before.state[key]).kind for key in self.changed}
        again = {key for key, kind in kinds.items() if kind == "number" or (kind == "other" and key in before.changed)}
        self.ignored = before.ignored | again


def same_places(before: Sequence[Site], now: Sequence[Site]) -> bool:
    """Whether the same sites were found, with tokens in the same places where both times these could be told."""
    if [(site.key, site.queries, site.keys) for site in before] != [
        (site.key, site.queries, site.keys) for site in now
    ]:
        return False
    both = ((a, b) for a, b in zip(before, now, strict=True) if a.layout is not None and b.layout is not None)
    return all(
        a.layout == b.layout and (a.places.cls, a.places.patch_queries) == (b.places.cls, b.places.patch_queries)
        for a, b in both
    )


_CACHE: weakref.WeakKeyDictionary[nn.Module, list[Known]] = weakref.WeakKeyDictionary()
_SIZE = 8  # entries a model: image sizes come and go


def sites_of(model: nn.Module, images: Tensor, forward: Forward, conditions: Conditions) -> Known:
    """Every attention site of the model, discovered once for the same conditions, state of the model and forward."""
    entries, state = _CACHE.setdefault(model, []), state_of(model, forward)
    alike = [known for known in reversed(entries) if known.conditions.cover(conditions)]
    for known in alike:
        if not known.changes(state):
            return known
    sites = discover(model, images, forward)
    found = Known(conditions, sites, state_of(model, forward))  # as it is now: some models change as they run
    before = next((known for known in alike if not _is_of_another_forward(known, state)), None)
    if before is not None:
        found.follow(before)
    entries.append(found)
    del entries[:-_SIZE]
    return found


def forget(model: nn.Module) -> None:
    """Discover the model's sites again the next time."""
    _CACHE.pop(model, None)


def _is_of_another_forward(known: Known, now: State) -> bool:
    """Whether the function itself is another one: then nothing is to be learned from what differs."""
    changed = [key for key in known.changes(now) if key[0] == "forward"]
    return any((now.get(key) or known.state[key]).kind == "code" for key in changed)
