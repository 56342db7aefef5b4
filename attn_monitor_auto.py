"""Entry point for Lightning's Trainer: gives it an `AttentionMapCallback` where the environment asks for one.

Every Trainer in an environment with this package asks, so until ``ATTN_MONITOR`` is set nothing is imported here.
"""

from __future__ import annotations

import os
from typing import Any

OFF = ("", "0", "false", "no", "off")


def callbacks() -> list[Any]:
    """What `attn_monitor.environment` makes of ``ATTN_MONITOR=1``; whatever goes wrong there ends nobody's run."""
    if os.environ.get("ATTN_MONITOR", "").strip().lower() in OFF:
        return []
    try:
        from attn_monitor.environment import callback_from

        return [callback_from(os.environ)]
    except Exception as error:
        from attn_monitor.messages import warn

        warn(f"attn_monitor: ATTN_MONITOR is set, and attention is not watched in this run. {error}")
        return []
