"""Which channels of an image are shown."""

from __future__ import annotations

from collections.abc import Sequence

from attn_monitor.errors import ProbeError


def shown_bands(bands: Sequence[int] | None, channels: int) -> tuple[int, ...]:
    """Return the channels to show, by default the first three or the first."""
    if bands is None:
        return (0, 1, 2) if channels >= 3 else (0,)
    if not are_bands(bands, channels):
        raise ProbeError(f"bands={bands!r}: expected one channel, or three, of 0 to {channels - 1}")
    return tuple(bands)


def are_bands(bands: Sequence[int], channels: int) -> bool:
    """Return whether these are one or three channels of as many."""
    return len(bands) in (1, 3) and all(isinstance(band, int) and 0 <= band < channels for band in bands)
