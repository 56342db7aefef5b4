"""Captures and their peers, each in turns on the same images: how many plain forwards they take."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.measure import Rounds, Spread, available_bytes, take_turns
from benchmarks.peers import Peer, Run, Size, ours, peers

SMALL = Size("ViT-S/16", width=384, depth=12, heads=6, pixels=224, batch=1)
BASE = Size("ViT-B/16", width=768, depth=12, heads=12, pixels=224, batch=1)


@dataclass(frozen=True)
class Setting:
    """A size and how much time its rounds may take."""

    size: Size
    budget: float
    all_layers: bool = True


SETTINGS = [
    Setting(SMALL, 14),
    Setting(replace(SMALL, batch=8), 40),
    Setting(replace(SMALL, pixels=480), 30),
    Setting(replace(SMALL, pixels=960), 75),
    Setting(BASE, 20),
    Setting(replace(BASE, batch=8), 45),
]
LEFT_OUT = {
    "ViT-S/16 at 480 px, batch 8": "time: with all peers, three rounds of it take minutes on two cores, and batch 1 "
    "says the same",
    "ViT-S/16 at 960 px, batch 8": "time and memory: one plain forward takes many seconds on two cores, and the full "
    "matrices of all layers would take 30 GB",
}
TINY = [Setting(Size("tiny", width=48, depth=2, heads=6, pixels=64, batch=1), 0.2)]


@dataclass(frozen=True)
class Row:
    """One way of getting attention, at one size. ``speedup`` is its ratio over ours for as many layers."""

    way: str
    layers: str
    ratio: Spread  # to its own floor
    speedup: dict[str, Spread] = field(default_factory=dict)  # ours of these layers, on timm's model
    speedup_same_model: dict[str, Spread] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """All ways at one size."""

    size: Size
    rounds: int
    plain_ms: float
    rows: list[Row]
    skipped: dict[str, str]

    @property
    def title(self) -> str:
        """Model, image size and batch."""
        return f"{self.size.name} at {self.size.pixels} px, batch {self.size.batch}"

    def row(self, way: str) -> Row | None:
        """A row by its way."""
        return next((row for row in self.rows if row.way == way), None)

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        return {"title": self.title, **asdict(self)}


def measure_speed(settings: list[Setting]) -> Iterator[Table]:
    """A table for each setting, as soon as it is measured."""
    for setting in settings:
        yield _table(setting)
        gc.collect()


def _table(setting: Setting) -> Table:
    size, skipped = setting.size, {}
    runs: dict[str, Run] = ours(size)
    taken: list[Peer] = []
    for peer in peers():
        need = int(size.matrix_bytes * (size.depth * peer.matrices or 1))
        if peer.missing:
            skipped[peer.title] = f"{peer.package} is not installed"
        elif need > available_bytes() // 2:
            skipped[peer.title] = f"memory: the matrices alone would take {need / 2**30:.0f} GB"
        else:
            runs.update(peer.build(size))
            taken.append(peer)
    rounds = take_turns(runs, budget=setting.budget)
    return Table(
        size, rounds.count, rounds.milliseconds("plain"), [*_ours(rounds), *(_row(p, rounds) for p in taken)], skipped
    )


def _ours(rounds: Rounds) -> Iterator[Row]:
    for name in rounds.seconds:
        if name.startswith("ours, "):
            _, layers, *verified = name.split(", ")
            yield Row("ours" + ", verified" * bool(verified), layers, rounds.ratio(name, "plain"))
    yield Row("an empty dispatch mode", "all", rounds.ratio("empty mode", "plain"))


def _row(peer: Peer, rounds: Rounds) -> Row:
    own = (peer.run, peer.floor)
    # Whatever gives all layers or nothing is also what one has to run for the last one.
    layers = ["last"] if peer.layers == "last" else ["last", "all"]
    # Who leaves the model after a layer does not look for later ones either.
    against = {"last": "ours, last by index" if peer.layers == "last" else "ours, last", "all": "ours, all"}
    speedup = {which: rounds.quotient(own, (against[which], "plain")) for which in layers}
    same = {which: f"ours on {peer.run}, {which}" for which in layers}
    on_same = {which: rounds.ratio(peer.run, name) for which, name in same.items() if name in rounds.seconds}
    return Row(peer.title, peer.layers, rounds.ratio(*own), speedup, on_same)
