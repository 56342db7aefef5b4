"""Entry point for Lightning's Trainer: add an `AttentionMapCallback` if ``ATTN_MONITOR`` is set.

Every Trainer in an environment with this package calls it, so nothing is imported unless the variable is set.
"""

from __future__ import annotations

import os
from typing import Any

OFF = ("", "0", "false", "no", "off")


def callbacks() -> list[Any]:
    """Return the callback of `attn_monitor.environment` if ``ATTN_MONITOR`` is on; an error there is a warning."""
    if os.environ.get("ATTN_MONITOR", "").strip().lower() in OFF:
        return []
    try:
        from attn_monitor.environment import callback_from

        return [callback_from(os.environ)]
    except Exception as error:
        from attn_monitor.messages import warn

        warn(f"attn_monitor: ATTN_MONITOR is set, and attention is not watched in this run. {error}")
        return []
