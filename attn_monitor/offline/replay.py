"""`attn-monitor replay`: the pictures of a run, drawn from its archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attn_monitor.draw.animations import gif
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.panels import panel
from attn_monitor.draw.strips import filmstrip
from attn_monitor.errors import ArchiveError
from attn_monitor.offline.results import print_metrics, writing_to
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import load_snapshots
from attn_monitor.record.file_names import tag_safe_names


def replay(archive: str, *, out: str | None = None, scale: str = "uniform", threshold: float = 0.6) -> None:
    """Redraw a run from its archive: for each probe image a film strip, an animation and the last panel.

    Args:
        archive: the attn_monitor folder in the log directory of a run.
        out: folder for the pictures; by default `pictures` inside the archive.
        scale: "uniform" (comparable) or "minmax" (each map for itself).
        threshold: share of attention mass inside the outline.
    """
    history = load_snapshots(archive)
    probe = ProbeBatch.load(Path(archive) / "probe.npz")
    for snapshot in history:
        if tag_safe_names(snapshot.names) != probe.names:
            raise ArchiveError(
                f"{archive}: step {snapshot.step} shows {', '.join(snapshot.names)}, and probe.npz holds "
                f"{', '.join(probe.names)}: these are files of two runs"
            )
    options = DrawingOptions(threshold, scale)
    with writing_to(Path(out) if out is not None else Path(archive) / "pictures") as folder:
        for index, (name, pixels) in enumerate(zip(probe.names, probe.pixels, strict=True)):
            truth: np.ndarray[Any, Any] | None = None if probe.masks is None else probe.masks[index].numpy()
            caption = probe.caption
            frames = [panel(s, index, pixels, truth=truth, caption=caption, options=options) for s in history]
            strip = filmstrip(history, index, pixels, options=options)
            Image.fromarray(frames[-1]).save(folder / f"{name}-panel.png")
            Image.fromarray(strip).save(folder / f"{name}-filmstrip.png")
            (folder / f"{name}.gif").write_bytes(gif(frames))
            print(f"{folder / name}-panel.png, -filmstrip.png, .gif")
    print_metrics(history[-1])
    flags = [flag for snapshot in history for flag in snapshot.flags]
    print(f"health flags raised in this run: {len(flags) or 'none'}")
    for flag in flags:
        print(f"  {flag}")
