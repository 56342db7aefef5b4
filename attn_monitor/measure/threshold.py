"""The check of a mask's share of attention, which options of commands need before PyTorch is imported."""

from __future__ import annotations

from numbers import Real

from attn_monitor.errors import ArgumentError


def check_threshold(threshold: float) -> float:
    """Return ``threshold``; `ArgumentError` if it is not a share above 0 and up to 1."""
    if not isinstance(threshold, Real) or isinstance(threshold, bool) or not 0 < threshold <= 1:
        raise ArgumentError(
            f"threshold={threshold!r}: expected a share of attention mass above 0 and up to 1, such as 0.6"
        )
    return threshold
