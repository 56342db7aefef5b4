"""The `attn-monitor` command: each of its commands is a function in a module of that name."""

from __future__ import annotations

import sys
from collections.abc import Callable

from attn_monitor.errors import AttentionError
from attn_monitor.offline.check import check
from attn_monitor.offline.replay import replay
from attn_monitor.offline.show import show

COMMANDS: list[Callable[..., None]] = [check, show, replay]


def main() -> None:
    """Entry point of `attn-monitor`: mistakes are told in one line, without a traceback."""
    from jsonargparse import auto_cli

    try:
        auto_cli([*COMMANDS], as_positional=True)
        sys.stdout.flush()  # a full disk is met here, and not while Python ends
    except (AttentionError, OSError, ValueError) as error:  # what files, models and arguments can be wrong with
        sys.exit(f"attn-monitor: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
