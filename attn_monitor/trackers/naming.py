"""Validate a callback's name, and put it into tags and titles."""

from __future__ import annotations

import re

from attn_monitor.errors import ArgumentError
from attn_monitor.record.file_names import MAX_NAME_BYTES


def check_name(name: str | None) -> str | None:
    """Return a callback's name if it can be part of a tag and of a folder's name.

    Raises:
        ArgumentError: It cannot; this is a `ValueError`.
    """
    if name is not None and (not isinstance(name, str) or name.isdigit() or not re.fullmatch(r"[\w.+-]+", name)):
        allowed = "letters, digits, '_', '.', '+' or '-', and not digits alone (those number callbacks without a name)"
        raise ArgumentError(f'name={name!r}: expected {allowed}, such as "early"')
    if name is not None and len(name.encode()) > MAX_NAME_BYTES:
        raise ArgumentError(f"name={name!r}: expected at most {MAX_NAME_BYTES} bytes, received {len(name.encode())}")
    return name


def prefixed(tag: str, name: str) -> str:
    """Put a name after a tag's first part: ``attn/x`` becomes ``attn-early/x``; an empty name changes nothing."""
    if not name:
        return tag
    first, slash, rest = tag.partition("/")
    return f"{first}-{name}{slash}{rest}"


def titled(title: str, name: str) -> str:
    """Put a name after a title, in brackets; an empty name changes nothing."""
    return f"{title} ({name})" if name else title
