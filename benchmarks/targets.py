"""What is aimed at, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.measure import Spread
from benchmarks.results import Results
from benchmarks.speed import Table


@dataclass(frozen=True)
class Target:
    """A bound on a measured figure."""

    what: str
    bound: float
    measured: Spread
    at_most: bool = True

    @property
    def reached(self) -> bool:
        """Whether the median keeps the bound."""
        return self.measured.median <= self.bound if self.at_most else self.measured.median >= self.bound

    @property
    def text(self) -> str:
        """The bound in words."""
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


def targets(results: Results) -> Iterator[Target]:
    """Every target that this run has measured something for."""
    for table in results.speed:
        yield from _captures(table)
        yield from _peers(table)
    if (memory := results.memory) is not None:
        extra, saving = Spread.of([memory.extra]), Spread.of([memory.saving])
        yield Target(f"extra peak memory of all layers, {memory.tokens:,} tokens, share of a forward's", 0.02, extra)
        yield Target("full matrices over what the capture adds", 100, saving, at_most=False)
    if (pictures := results.pictures) is not None:
        what = f"panels of {pictures.images} images: matplotlib's time over ours"
        yield Target(what, 20, pictures.speedup, at_most=False)
    if (player := results.player) is not None:
        run = f"player, {player.steps} snapshots of {player.images} images"
        yield Target(f"{run}: first picture, ms", 1000, player.first_picture_ms)
        yield Target(f"{run}: steps drawn a second", 30, player.steps_per_second, at_most=False)
        yield Target(f"{run}: file, MB", 8, Spread.of([player.file_bytes / 1e6]))
        yield Target(f"{run}: embed edition, MB", 4, Spread.of([player.embed_bytes / 1e6]))
    if (long := results.long_run) is not None:
        run = f"report of {long.steps:,} snapshots of {long.layers} layers"
        yield Target(f"{run}, seconds", 60, Spread.of([long.seconds]))
        yield Target(f"{run}, peak memory in GB", 1, Spread.of([long.peak_bytes / 1e9]))
    if (training := results.training) is not None:
        yield Target("training held up for a snapshot, over the probe's plain forward", 1.15, training.blocked)
        gap = Spread.of([abs(training.told - training.measured)])
        yield Target("the callback's own share of wall time, apart from the profiler's", 0.01, gap)
    for growth in results.growth:
        fit = Spread.of([growth.r_squared])
        yield Target(f"own cost on a straight line over {growth.of}: R²", 0.95, fit, at_most=False)
    if results.asking is not None:
        yield Target("images that a plain ViT is asked once, 224 px", 20, Spread.of([float(results.asking.images)]))
        yield Target("first look at a model, in plain forwards of one image", 20, results.asking.first)
    if results.startup is not None:
        yield Target("milliseconds that the import adds", 50, results.startup.milliseconds)
        yield Target("unwanted packages imported", 0, Spread.of([float(len(results.startup.unwanted))]))


def _captures(table: Table) -> Iterator[Target]:
    """Counted from the end, a forward runs to its end, so that it cannot take less than one; verified likewise."""
    if not _is_long(table):
        return
    bounds = {
        ("ours", "last"): 1.05,
        ("ours", "last by index"): 1.0,
        ("ours", "all"): 1.05,
        ("ours, verified", "last"): 1.05,
    }
    for row in table.rows:
        if (bound := bounds.get((row.way, row.layers))) is not None:
            yield Target(f"{row.way}, {row.layers}: {table.title}, in plain forwards", bound, row.ratio)


def _peers(table: Table) -> Iterator[Target]:
    """Where attention is a large part of a forward, peers are to be slower; nowhere is one to be faster by much."""
    peers = {row.way: row.speedup["last"] for row in table.rows if "last" in row.speedup}
    if not peers or not _is_long(table):
        return
    fastest = min(peers, key=lambda way: peers[way].median)
    what = f"last layer, the fastest peer ({fastest}) over ours: {table.title}"
    yield Target(what, 0.95, peers.pop(fastest), at_most=False)
    if table.size.pixels >= 960:
        for way, speedup in peers.items():
            bound = 1.0 if "vit-pytorch" in way else 2.0  # its model computes the matrices anyway
            yield Target(f"last layer, {way} over ours: {table.title}", bound, speedup, at_most=False)


def _is_long(table: Table) -> bool:
    """Whether a forward is long beside the milliseconds of Python that a snapshot takes whatever the images."""
    return table.size.pixels > 224 or (table.size.pixels == 224 and table.size.batch > 1)
