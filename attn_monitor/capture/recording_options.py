"""`RecordingOptions`: what a recording measures beside the requested rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from attn_monitor.errors import ArgumentError

EveryQueryOf = Literal["none", "last", "all"]
"""The requested layers in which every query is read: one layer costs about one percent of a forward."""

Verify = bool | Literal["first"]


def check_verify(verify: Verify | str) -> Verify:
    """Return a valid ``verify``; raise `ArgumentError` otherwise."""
    if isinstance(verify, bool) or (isinstance(verify, str) and verify == "first"):
        return verify  # type: ignore[return-value]
    raise ArgumentError(f'verify={verify!r}: expected True (every recording), "first" (and after changes) or False')


@dataclass(frozen=True)
class RecordingOptions:
    """Hold the arguments of these names of `AttentionRecorder`, which describes them.

    Raises:
        ArgumentError: An argument is invalid.
    """

    nonfinite: str
    distance: bool
    tokens: bool
    patches: bool
    logits: bool
    sinks: bool
    every_query: EveryQueryOf

    def __post_init__(self) -> None:
        if self.nonfinite not in ("raise", "keep"):
            raise ArgumentError(f'nonfinite={self.nonfinite!r}: expected "raise" or "keep"')
        if self.every_query not in get_args(EveryQueryOf):
            raise ArgumentError(f'every_query={self.every_query!r}: expected "none", "last" (wanted layer) or "all"')
