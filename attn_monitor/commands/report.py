"""Write a run as one interactive HTML page: every step, image, layer and head.

With two runs of the same images, their maps are swiped between and subtracted. The file opens by double click, needs no
network and makes no request. Steps are thinned evenly, with a note, where it would be larger than 8 MB. Snapshots that
cannot be read are left out, and named in the page and at the end.

Example: attn-monitor report runs/version_0 --out report.html
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

from attn_monitor.commands.compare import compare_runs
from attn_monitor.commands.support.results import doing, print_path, writing_to
from attn_monitor.commands.support.runs import find_archive
from attn_monitor.errors import ArchiveError
from attn_monitor.player.contents import Contents
from attn_monitor.player.page import page_of_runs
from attn_monitor.player.report import EMBED_BYTES, FILE_BYTES, contents_within, names_of, write_whole


def report(run: str, other: str | None = None, *, out: str = "report.html", embed: bool = False) -> None:
    """Run `attn-monitor report`, which this module describes.

    Args:
        run: the archive of a run, or the log directory that holds it.
        other: another run that watched the same images.
        out: the file to write.
        embed: at most 4 MB, for pages that show it inside of theirs.
    """
    path = Path(out)
    if path.is_dir():
        raise IsADirectoryError(f"out={path}: is a folder, expected the file to write, such as {path / 'report.html'}")
    with doing(f"writing {path}"):
        contents = _contents(run, other, EMBED_BYTES if embed else FILE_BYTES)
        with writing_to(path.parent):
            write_whole(path, page_of_runs(contents))
    print_path(path)
    if broken := [f"{of_run.name}: {reason}" for of_run in contents for reason in of_run.broken]:
        raise ArchiveError(f"{path} is without {'; '.join(broken)}")


@dataclass(frozen=True)
class Player:
    """The page in a frame of a notebook, ``height`` pixels high, apart from the notebook and without requests."""

    page: str = field(repr=False)
    height: int = 900

    def _repr_html_(self) -> str:
        frame = f'style="width: 100%; height: {self.height}px; border: 0; border-radius: 8px"'
        return f'<iframe sandbox="allow-scripts allow-downloads" {frame} srcdoc="{html.escape(self.page)}"></iframe>'


def snapshot_player(run: str | Path, other: str | Path | None = None, *, height: int = 900) -> Player:
    """Show a run in a notebook, interactively, as `attn-monitor report` writes it.

    Args:
        run: an archive, or the log directory that holds it.
        other: a run of the same images; their maps are swiped between and subtracted.
        height: of the frame, in pixels.

    Returns:
        An object for the end of a notebook's cell. At most 4 MB stay in the notebook; steps are thinned evenly for it.

    Raises:
        FileNotFoundError: there are no snapshots.
        ArchiveError: they cannot be read, or the two runs cannot be compared.
    """
    return Player(page_of_runs(_contents(run, other, EMBED_BYTES)), height)


def _contents(run: str | Path, other: str | Path | None, limit: int) -> list[Contents]:
    folders = [find_archive(path) for path in (run, other) if path is not None]
    if other is not None:
        compare_runs(*folders)  # raises where they cannot be compared
    return contents_within(list(zip(names_of(folders), folders, strict=True)), limit)
