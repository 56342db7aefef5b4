"""Names that can stand in tags, folders and titles: of callbacks, and of images."""

from __future__ import annotations

import re

LONGEST = 80  # bytes of a name, so that what loggers put around it fits in the 255 of a file's


def cut(text: str, limit: int) -> str:
    """As much of a text as fits in a number of bytes of UTF-8, in whole characters."""
    return text.encode()[:limit].decode(errors="ignore")


def file_name(stem: str, ending: str) -> str:
    """A name that file systems take: 255 bytes at most, the ending such as ".jpg" included."""
    return cut(stem, 255 - len(ending.encode())) + ending


def check_name(name: str | None) -> str | None:
    """A callback's own name, if it can stand in a tag and in a folder's name."""
    if name is not None and (name.isdigit() or not re.fullmatch(r"[\w.+-]+", name)):
        allowed = "letters, digits, '_', '.', '+' or '-', and not digits alone (those number callbacks without a name)"
        raise ValueError(f'name={name!r}: expected {allowed}, such as "early"')
    if name is not None and len(name.encode()) > LONGEST:
        raise ValueError(f"name={name!r}: expected at most {LONGEST} bytes, received {len(name.encode())}")
    return name


def renamed(tag: str, name: str) -> str:
    """A tag under a name, which follows its first part: ``attn/x`` becomes ``attn-early/x``. No name, no change."""
    if not name:
        return tag
    first, slash, rest = tag.partition("/")
    return f"{first}-{name}{slash}{rest}"


def titled(title: str, name: str) -> str:
    """A title for people, with the name."""
    return f"{title} ({name})" if name else title
