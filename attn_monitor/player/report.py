"""Archives as an HTML file that opens by double click."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from attn_monitor.player.contents import Contents, gather, open_archive
from attn_monitor.player.page import code_size, page_of_runs
from attn_monitor.record.atomic_file import atomic_file

FILE_BYTES, EMBED_BYTES = 8_000_000, 4_000_000  # of a file, and of a page within another page
RESERVED_BYTES = 50_000  # for layouts and other parts that are not counted


def report_page(archives: Sequence[tuple[str, Path]], *, limit: int = FILE_BYTES) -> str:
    """The page of one or two archives, given by name and folder, in about ``limit`` bytes: as many steps as fit."""
    return page_of_runs(contents_within(archives, limit))


def write_report(folder: Path, before: Callable[[int], object] = lambda size: None) -> tuple[Path, str]:
    """Write ``report.html`` into an archive's folder.

    Args:
        folder: of the archive.
        before: called with the page's size in bytes before it is written; may prevent it by raising.

    Returns:
        Its path, and the page, small enough to be shown inside another.
    """
    path = folder / "report.html"
    page = report_page(list(zip(names_of([folder]), [folder], strict=True)), limit=EMBED_BYTES)
    write_whole(path, page, before)
    return path, page


def contents_within(
    archives: Sequence[tuple[str, Path]], limit: int, keep: Sequence[Collection[int]] | None = None
) -> list[Contents]:
    """What a page of about ``limit`` bytes shows of each archive; ``keep`` are steps of each that are never thinned."""
    opened = [open_archive(folder) for _, folder in archives]
    different = [one for i, one in enumerate(opened) if all(one.images != other.images for other in opened[:i])]
    room = (limit - code_size() - RESERVED_BYTES - sum(one.size for one in different)) / len(archives)
    kept = keep or [()] * len(archives)
    return [
        gather(folder, name, room, opened=one, keep=steps)
        for (name, folder), one, steps in zip(archives, opened, kept, strict=True)
    ]


def write_whole(path: Path, page: str, before: Callable[[int], object] = lambda size: None) -> None:
    """Write a page atomically; call ``before`` with its size in bytes first."""
    content = page.encode()
    before(len(content))
    with atomic_file(path) as file:
        file.write(content)


def names_of(archives: Sequence[Path]) -> list[str]:
    """Names of archives: the last folders of their paths, as many as make them differ, without "attn_monitor"."""
    paths = [[part for part in folder.resolve().parts[1:] if part != "attn_monitor"] for folder in archives]
    parts = [names or [str(folder)] for names, folder in zip(paths, archives, strict=True)]
    length = 2
    while len({tuple(p[-length:]) for p in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    return ["/".join(p[-length:]) for p in parts]
