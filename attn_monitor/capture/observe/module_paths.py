"""Compare dotted paths of modules; the path "" is that of the model itself."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence


def is_inside(path: str, other: str) -> bool:
    """Return whether one module is below another; every module is inside the model."""
    return other == "" or path.startswith(f"{other}.")


def children_with(paths: Iterable[str], parent: str) -> set[str]:
    """Return the names of a module's children in which some of these modules are, or which are one of them."""
    return {path[len(parent) :].strip(".").partition(".")[0] for path in paths if is_inside(path, parent)}


def common_path(paths: Sequence[str]) -> str:
    """Return the path of the innermost module that contains all of these."""
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(p.split(".") for p in paths), strict=False))
    return ".".join(parts[0] for parts in shared)


def words_of(name: str) -> list[str]:
    """Return the words of a name in snake case or camel case, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
