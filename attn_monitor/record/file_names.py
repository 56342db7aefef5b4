"""Names that file systems take."""

from __future__ import annotations

LONGEST = 80  # bytes of a name, so that what loggers put around it fits in the 255 of a file's


def cut(text: str, limit: int) -> str:
    """As much of a text as fits in a number of bytes of UTF-8, in whole characters."""
    return text.encode()[:limit].decode(errors="ignore")


def file_name(stem: str, ending: str) -> str:
    """A name that file systems take: 255 bytes at most, the ending such as ".jpg" included."""
    return cut(stem, 255 - len(ending.encode())) + ending
