"""`attn-monitor report`: a run, or two of one probe, as a page that one can ask."""

from __future__ import annotations

from pathlib import Path

from attn_monitor.offline.compare import compare_runs
from attn_monitor.offline.results import doing, print_path
from attn_monitor.offline.runs import find_archive
from attn_monitor.player.report import EMBED_BYTES, FILE_BYTES, names_of, report_page, write_whole


def report(run: str, other: str | None = None, *, out: str = "report.html", embed: bool = False) -> None:
    """Write a run as one HTML file that opens by double click: every step, image, layer and head, to play and to ask.

    With two runs of the same images, they are swiped between and subtracted. The file needs no network and makes no
    request. Steps are thinned evenly, with a note, where it would be larger than 8 MB.
    For example: attn-monitor report runs/version_0 --out report.html

    Args:
        run: the archive of a run, or the log directory that holds it.
        other: another run that watched the same images.
        out: the file to write.
        embed: at most 4 MB, for pages that show it inside of theirs.
    """
    folders = [find_archive(path) for path in (run, other) if path is not None]
    if other is not None:
        compare_runs(*folders)  # tells why two cannot be compared
    path = Path(out)
    with doing(f"writing {path}"):
        page = report_page(
            list(zip(names_of(folders), folders, strict=True)), limit=EMBED_BYTES if embed else FILE_BYTES
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    print_path(path)
