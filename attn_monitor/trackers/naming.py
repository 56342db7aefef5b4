"""The name of a callback, in tags and titles."""

from __future__ import annotations

import re

from attn_monitor.errors import ArgumentError
from attn_monitor.record.file_names import MAX_NAME_BYTES


def check_name(name: str | None) -> str | None:
    """Check that a callback's name can stand in a tag and in a folder's name.

    Returns:
        The same.

    Raises:
        ValueError: it cannot.
    """
    if name is not None and (name.isdigit() or not re.fullmatch(r"[\w.+-]+", name)):
        allowed = "letters, digits, '_', '.', '+' or '-', and not digits alone (those number callbacks without a name)"
        raise ArgumentError(f'name={name!r}: expected {allowed}, such as "early"')
    if name is not None and len(name.encode()) > MAX_NAME_BYTES:
        raise ArgumentError(f"name={name!r}: expected at most {MAX_NAME_BYTES} bytes, received {len(name.encode())}")
    return name


def prefixed(tag: str, name: str) -> str:
    """A tag under a name, which follows its first part: ``attn/x`` becomes ``attn-early/x``. No name, no change."""
    if not name:
        return tag
    first, slash, rest = tag.partition("/")
    return f"{first}-{name}{slash}{rest}"


def titled(title: str, name: str) -> str:
    """A title for people, with the name."""
    return f"{title} ({name})" if name else title
