"""List the kinds of attention that are recognised; `kind.py` says what a kind does."""

from __future__ import annotations

import functools
from typing import Any

from attn_monitor.capture.observe.kinds.explicit import SOFTMAX, ExplicitAttention
from attn_monitor.capture.observe.kinds.fused import FusedAttention
from attn_monitor.capture.observe.kinds.kernels import KernelAttention
from attn_monitor.capture.observe.kinds.kind import AttentionKind

KINDS: tuple[type[AttentionKind], ...] = (FusedAttention, ExplicitAttention, KernelAttention)


@functools.lru_cache(maxsize=1024)
def kind_of(func: Any) -> type[AttentionKind] | None:
    """Return the kind of attention that calls of an operation concern; None if none."""
    return next((kind for kind in KINDS if kind.concerns(func)), None)


def is_attention_alone(func: Any) -> bool:
    """Return whether an operation is attention, or its softmax, whatever its arguments are."""
    return kind_of(func) is FusedAttention or func in SOFTMAX
