"""Cache each model's attention sites until the model, its state or the forward changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attn_monitor.capture.find_axes import taking_channels_first
from attn_monitor.capture.fingerprint import Key, State, state_of
from attn_monitor.capture.observe.forward import Forward
from attn_monitor.capture.observe.isolation import all_modules
from attn_monitor.capture.site_discovery import discover
from attn_monitor.capture.sites import Site
from attn_monitor.capture.token_places.site_places import ONE_IMAGE
from attn_monitor.image_axes import ImageAxes


class Conditions(NamedTuple):
    """Hold the conditions under which a model's sites stay the same."""

    together: bool  # several images ran as one batch, which shows how it is ordered
    axes: ImageAxes  # of the images as the model takes them
    image_shape: tuple[int, ...]  # without the batch
    dtype: torch.dtype
    device: torch.device
    structure: int

    @classmethod
    def of(cls, images: Tensor, axes: ImageAxes, structure: int) -> Conditions:
        """Build the conditions from images in the model's dtype and order, and the model's `structure_of`."""
        return cls(len(images) > 1, axes, tuple(images.shape[1:]), images.dtype, images.device, structure)


def structure_of(model: nn.Module) -> int:
    """Return a hash that changes when a submodule is replaced, added, removed, renamed or given another class."""
    return hash(tuple((id(module), type(module), *module._modules.keys()) for module in all_modules(model)))


class Doubt(IntEnum):
    """Grade the doubt about a model's known sites; the largest value of all processes counts."""

    NONE = 0
    DUE = 1  # a check of the token-to-patch assignment is due
    CHANGED = 2  # something that the assignment may depend on has changed
    MOVED = 3  # the check has found another assignment


@dataclass(eq=False)
class Known:
    """Hold every attention site of a model under one forward, with a fingerprint of the state that it may depend on.

    State that changes in ordinary training and moves no token (BatchNorm statistics, centres of a loss, counters) must
    not cause a discovery each time. An item that changed while the sites stayed the same is therefore ``ignored`` from
    then on: a number at once, anything else (such as a switch, which may be turned again) if it changes twice in a row.
    Functions are never ignored. Ignored items and trained weights are covered by the check of the tokens, at growing
    intervals.
    """

    conditions: Conditions
    sites: tuple[Site, ...]
    state: State
    ignored: frozenset[Key] = frozenset()
    changed: frozenset[Key] = frozenset()  # since the previous discovery, with the same result
    recordings: int = 0
    recorded: bool = field(default=False, repr=False)  # since the latest call of `doubt`

    def cover(self, conditions: Conditions) -> bool:
        """Return whether the sites hold under conditions: those of several images do for one, unless refused there."""
        if conditions == self.conditions:
            return True
        of_batch = any(site.refusal is not None and ONE_IMAGE in str(site.refusal) for site in self.sites)
        return not of_batch and conditions == self.conditions._replace(together=False)

    def doubt(self, model: nn.Module, forward: Forward, *, last: bool = False) -> Doubt:
        """Return the doubt before a recording: a check is due after 1, 2, 4, 8, … of them, and before the ``last``."""
        self.recordings, self.recorded = self.recordings + self.recorded, False
        if self.changes(state_of(model, forward)):
            return Doubt.CHANGED
        return Doubt.DUE if last or (self.recordings and self.recordings & (self.recordings - 1) == 0) else Doubt.NONE

    def changes(self, now: State) -> set[Key]:
        """Return the keys of items that differ from the fingerprint, without the ignored ones."""
        if now == self.state:
            return set()
        keys = (self.state.keys() | now.keys()) - self.ignored
        return {key for key in keys if now.get(key) != self.state.get(key)}

    def inherit_ignored(self, before: Known) -> None:
        """Ignore items that differ from an earlier discovery with the same result."""
        if not same_places(before.sites, self.sites):
            return
        self.changed = frozenset(before.changes(self.state))
        kinds = {key: (self.state.get(key) or before.state[key]).kind for key in self.changed}
        again = {key for key, kind in kinds.items() if kind == "number" or (kind == "other" and key in before.changed)}
        self.ignored = before.ignored | again


def same_places(before: Sequence[Site], now: Sequence[Site]) -> bool:
    """Return whether both are the same sites, with the same token-to-patch assignment where both have one."""
    if [(site.key, site.queries, site.keys) for site in before] != [
        (site.key, site.queries, site.keys) for site in now
    ]:
        return False
    both = ((a, b) for a, b in zip(before, now, strict=True) if a.layout is not None and b.layout is not None)
    return all(
        a.layout == b.layout
        and (a.places.cls, a.places.patch_queries, a.places.query_grid)
        == (b.places.cls, b.places.patch_queries, b.places.query_grid)
        for a, b in both
    )


_CACHE: weakref.WeakKeyDictionary[nn.Module, list[Known]] = weakref.WeakKeyDictionary()
_SIZE = 8  # entries per model, such as several image sizes


def sites_of(model: nn.Module, images: Tensor, forward: Forward, conditions: Conditions) -> Known:
    """Return the model's sites, discovered once per conditions, state of the model and forward."""
    entries, state = _CACHE.setdefault(model, []), state_of(model, forward)
    alike = [known for known in reversed(entries) if known.cover(conditions)]
    for known in alike:
        if not known.changes(state):
            return known
    sites = discover(model, images, taking_channels_first(forward, conditions.axes))
    found = Known(conditions, sites, state_of(model, forward))  # read again: some models change as they run
    before = next((known for known in alike if not _is_of_another_forward(known, state)), None)
    if before is not None:
        found.inherit_ignored(before)
    entries.append(found)
    del entries[:-_SIZE]
    return found


def forget(model: nn.Module) -> None:
    """Drop the model's sites, so that they are discovered again the next time."""
    _CACHE.pop(model, None)


def _is_of_another_forward(known: Known, now: State) -> bool:
    """Return whether the forward's code differs, so that other differences show nothing about the model."""
    changed = [key for key in known.changes(now) if key[0] == "forward"]
    return any((now.get(key) or known.state[key]).kind == "code" for key in changed)
