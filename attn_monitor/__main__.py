"""`attn-monitor`, and `python -m attn_monitor`: the commands, which take seconds to import."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `attn-monitor`: Ctrl-C is one line, also while PyTorch is imported."""
    try:
        from attn_monitor.commands.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("attn-monitor: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":  # importing the module, as one does who imports every module, runs nothing
    main()
