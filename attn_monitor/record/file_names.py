"""Names that file systems and loggers' tags take."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_NAME_BYTES = 80  # of a name, so that what loggers put around it fits in the 255 of a file's
MAX_FILE_NAME_BYTES = 255


def truncate_utf8(text: str, limit: int) -> str:
    """As much of a text as fits in a number of bytes of UTF-8, in whole characters."""
    return text.encode()[:limit].decode(errors="ignore")


def file_name(stem: str, ending: str) -> str:
    """A name that file systems take: 255 bytes at most, the ending such as ".jpg" included."""
    return truncate_utf8(stem, MAX_FILE_NAME_BYTES - len(ending.encode())) + ending


def tag_safe_names(names: Sequence[str]) -> tuple[str, ...]:
    """Make names fit for a logger's tag and for a file name.

    Without slashes or a dot at the start, of at most 80 bytes, each one different.

    Names that this gave stay as they are, so that a stored probe has those of its snapshots.
    """
    safe: list[str] = []
    for name in names:
        plain = re.sub(r"^\.", "_.", re.sub(r"[^\w .+~-]", "_", name).strip())
        short = truncate_utf8(plain, MAX_NAME_BYTES).strip() or "image"
        unique, number = short, 1
        while unique in safe:
            number += 1
            unique = truncate_utf8(short, MAX_NAME_BYTES - len(f"~{number}")) + f"~{number}"
        safe.append(unique)
    return tuple(safe)
