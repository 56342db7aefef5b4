"""Hostile models that no threshold was ever tuned on: other compositions of the same and of further parts."""

from __future__ import annotations

from tests.hostile import Hostile

HELD_OUT: list[Hostile] = []
