"""Read a JSON object field by field, with a check of each field's type and range."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from attn_monitor.errors import ArchiveError

MAX_INTEGER = 2**63 - 1


class Fields:
    """The fields of a JSON object; every method raises `ArchiveError` for a missing field or a wrong value.

    Args:
        values: The parsed object.
        where: Name of the object in errors.

    Example:
        >>> Fields({"step": 3, "grid": [14, 14]}, "header").integers("grid")
        (14, 14)
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ArchiveError(f"{where} is {reprlib.repr(values)}, expected an object with fields")
        self._values, self.where = values, where

    def integer(self, name: str, *, least: int = 0) -> int:
        """Return an integer of at least ``least``."""
        value = self._get(name)
        if not _is_integer(value) or not least <= value <= MAX_INTEGER:
            raise self._wrong(name, f"an integer of at least {least}")
        return int(value)

    def integers(self, name: str, *, least: int = 0) -> tuple[int, ...]:
        """Return a list of integers of at least ``least``."""
        values = self.items(name)
        if not all(_is_integer(value) and least <= value <= MAX_INTEGER for value in values):
            raise self._wrong(name, f"integers of at least {least}")
        return tuple(values)

    def number(self, name: str) -> float:
        """Return a number; NaN for null, as JSON has no NaN."""
        value = self._get(name)
        if value is None:
            return math.nan
        if not _is_number(value):
            raise self._wrong(name, "a number or null")
        return float(value)

    def numbers(self, name: str, *, missing: bool = False) -> tuple[float, ...]:
        """Return a list of finite numbers; with ``missing``, NaN for null."""
        values = [math.nan if value is None and missing else value for value in self.items(name)]
        if not all(_is_number(value) or (missing and value is math.nan) for value in values):
            raise self._wrong(name, "finite numbers")
        return tuple(map(float, values))

    def is_none(self, name: str) -> bool:
        """Return True if the field is null."""
        return self._get(name) is None

    def boolean(self, name: str) -> bool:
        """Return a boolean."""
        value = self._get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str) -> str:
        """Return a string."""
        value = self._get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """Return a list of at least one string, all different."""
        values = self.items(name)
        if not values or not all(isinstance(v, str) for v in values) or len(set(values)) < len(values):
            raise self._wrong(name, "at least one string, all different")
        return tuple(values)

    def items(self, name: str) -> list[Any]:
        """Return a list of any items."""
        value = self._get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return a nested object unchecked."""
        return self.child(name)._values

    def child(self, name: str) -> Fields:
        """Return the fields of a nested object."""
        return Fields(self._get(name), f"{name} of the {self.where}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def _get(self, name: str) -> Any:
        if name not in self._values:
            raise ArchiveError(f"the {self.where} has no {name!r}")
        return self._values[name]

    def _wrong(self, name: str, expected: str) -> ArchiveError:
        return ArchiveError(f"{name}={reprlib.repr(self._values[name])} in the {self.where}, expected {expected}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_integer(value) and abs(value) <= MAX_INTEGER
