"""Make names valid for file systems and for loggers' tags."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_NAME_BYTES = 80  # leaves room for what loggers add within the 255 bytes of a file name
MAX_FILE_NAME_BYTES = 255


def truncate_utf8(text: str, limit: int) -> str:
    """Truncate a text to at most ``limit`` bytes of UTF-8, at a character."""
    return text.encode()[:limit].decode(errors="ignore")


def file_name(stem: str, ending: str) -> str:
    """Truncate ``stem`` so that the name with its ``ending``, such as ".jpg", has at most 255 bytes."""
    return truncate_utf8(stem, MAX_FILE_NAME_BYTES - len(ending.encode())) + ending


def tag_safe_names(names: Sequence[str]) -> tuple[str, ...]:
    """Make names valid in tags and file names: unique, without slash and leading dot, at most 80 bytes each.

    The function is idempotent, so that a stored probe keeps the names of its snapshots.

    Example:
        >>> tag_safe_names(["cats/1", "cats/1", ".hidden"])
        ('cats_1', 'cats_1~2', '_.hidden')
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
