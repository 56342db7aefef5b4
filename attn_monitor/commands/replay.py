"""Redraw a run from its archive: for each probe image a film strip, an animation and the last panel.

Snapshots that cannot be read are left out, and named at the end.

Example: attn-monitor replay runs/version_0 --out pictures --format mp4
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from attn_monitor.commands.support.results import notify, print_metrics, results_in
from attn_monitor.commands.support.runs import StoredRun
from attn_monitor.draw.animation_files import Animation, animation_file, check_ending
from attn_monitor.draw.animations import with_durations
from attn_monitor.draw.canvas import Pixels, blank_picture, paste
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.panels import PANEL_PIXELS, panel
from attn_monitor.draw.slices import slice_photo
from attn_monitor.draw.strips import STRIP_COLUMNS, filmstrip
from attn_monitor.errors import ArchiveError
from attn_monitor.measurements import HealthFlag
from attn_monitor.record.archive import step_of
from attn_monitor.record.thinning import thin
from attn_monitor.snapshot import Snapshot

ANIMATED_PIXELS = PANEL_PIXELS // 2  # of a panel's cells together: half of those that stand still
HELD = 100  # pictures of a WebP or GIF, which are in memory until all are drawn


def replay(
    run: str,
    *,
    out: str | None = None,
    format: Literal["webp", "mp4", "gif"] = "webp",
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Run `attn-monitor replay`, which this module describes.

    Args:
        run: the archive of a run, or the log directory that holds it.
        out: folder for the pictures; by default `pictures` inside the archive.
        format: of the animations; mp4 needs PyAV (extra "video") and shows every snapshot, webp and
            gif up to 100, evenly spaced.
        drawing: how to draw; its values are options of their own.
    """
    found = StoredRun(run)
    panels = _Panels(found, drawing)
    with results_in(found.folder / "pictures" if out is None else Path(out)) as results:
        folder = results.folder
        animated = [check_ending(folder / f"{name}.{format}") for name in panels.probe.names]
        history, flags = _animate(panels, animated, len(found.paths) if format == "mp4" else HELD)
        for index, (animation, name) in enumerate(zip(animated, panels.probe.names, strict=True)):
            still = panels.draw(history[-1], index)
            attention = history[-1].layer(history[-1].roles[-1])
            below = slice_photo(panels.probe.frames_of(index), panels.photos[index], attention, panels.options)
            strip = filmstrip(history, index, below, options=panels.options)
            for path, picture in ((f"{name}-panel.png", still), (f"{name}-filmstrip.png", strip)):
                results.save(folder / path, picture)
            results.add(animation)
    print_metrics(history[-1])
    print(f"health flags raised in this run: {len(flags) or 'none'}")
    for flag in flags:
        print(f"  {flag}")
    if found.broken:
        raise ArchiveError(f"pictures are without {'; '.join(found.broken)}")


class _Panels:
    """Draws the panels of a run's probe images."""

    def __init__(self, run: StoredRun, options: DrawingOptions) -> None:
        self.run, self.probe, self.options = run, run.probe, options
        self.photos = self.probe.pixels

    def draw(self, snapshot: Snapshot, index: int, pixels: int = PANEL_PIXELS) -> Pixels:
        """Draw the panel of one image; ``pixels`` are those of all cells together."""
        self.run.check_belongs(snapshot)
        truth = None if self.probe.masks is None else self.probe.plane_masks[index].numpy()
        shown: dict[str, Any] = {"caption": self.probe.shown_caption, "frames": self.probe.frames_of(index)}
        return panel(snapshot, index, self.photos[index], truth=truth, options=self.options, pixels=pixels, **shown)


def _animate(panels: _Panels, paths: Sequence[Path], most: int) -> tuple[list[Snapshot], list[HealthFlag]]:
    """Write an animation of each image, of at most so many steps.

    Returns the snapshots that a film strip shows, the last one included, and the flags of all snapshots.
    """
    of_run = panels.run.paths
    steps = [step_of(path) for path in of_run] if len(of_run) > 1 else []  # one alone may have another name
    in_strips = {steps[i] for i in thin(steps, STRIP_COLUMNS)}
    drawn = in_strips.union(steps[i] for i in thin(steps, most))
    if len(drawn) < len(steps):
        notify(f"animations show {len(drawn)} of {len(steps):,} snapshots, evenly spaced; --format mp4 shows all")
    kept: list[Snapshot] = []
    flags: list[HealthFlag] = []
    with ExitStack() as stack:
        animations = [_SameSize(stack.enter_context(animation_file(path))) for path in paths]
        threads = stack.enter_context(ThreadPoolExecutor())  # encoders run beside the drawing of the next step
        encoding: list[Future[None]] = []
        for snapshot, seconds in with_durations(_chosen(panels.run, drawn, flags)):
            pictures = [panels.draw(snapshot, index, ANIMATED_PIXELS) for index in range(len(paths))]
            for future in encoding:
                future.result()
            encoding = [
                threads.submit(a.add, picture, seconds) for a, picture in zip(animations, pictures, strict=True)
            ]
            kept = [*(s for s in kept if s.step in in_strips), snapshot]
        for future in encoding:
            future.result()
    return kept, flags


def _chosen(run: StoredRun, steps: Collection[int], flags: list[HealthFlag]) -> Iterator[Snapshot]:
    """Yield the snapshots of these steps (of all, where there are none) and the last one; collect the flags of all."""
    last: Snapshot | None = None
    for snapshot in run:
        flags += snapshot.flags
        last = snapshot if steps and snapshot.step not in steps else None
        if last is None:
            yield snapshot
    if last is not None:  # as the one after it cannot be read
        yield last


class _SameSize:
    """Makes all pictures of an animation as large as the first one: layers and grids may change in a run."""

    def __init__(self, animation: Animation) -> None:
        self._animation = animation
        self._size: tuple[int, int] | None = None

    def add(self, picture: Pixels, seconds: float) -> None:
        """Append a picture; a larger one is shrunk to fit, a smaller one stands in the corner."""
        height, width = self._size = self._size or (picture.shape[0], picture.shape[1])
        if picture.shape[:2] != self._size:
            smaller = Image.fromarray(picture)
            smaller.thumbnail((width, height))
            picture = blank_picture(width, height)
            paste(picture, 0, 0, np.asarray(smaller))
        self._animation.add(picture, seconds)
