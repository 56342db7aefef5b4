"""The `attn-monitor` command: each of its commands is a function in a module of that name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

from attn_monitor.errors import AttentionError
from attn_monitor.offline.check import check
from attn_monitor.offline.replay import replay
from attn_monitor.offline.show import show
from attn_monitor.offline.video import video

COMMANDS: list[Callable[..., None]] = [check, show, replay, video]


def main() -> None:
    """Entry point of `attn-monitor`: mistakes are told in one line, without a traceback."""
    from jsonargparse import auto_cli

    try:
        auto_cli([*COMMANDS], as_positional=True, args=spelled_out(sys.argv[1:]), allow_abbrev=True)
        sys.stdout.flush()  # a full disk is met here, and not while Python ends
    except (AttentionError, OSError, ValueError) as error:  # what files, models and arguments can be wrong with
        sys.exit(f"attn-monitor: {' '.join(str(error).split())}")


def spelled_out(words: Sequence[str]) -> list[str]:
    """Options as jsonargparse takes them: dashes become underscores, and a switch alone means true."""
    parameters = [p for command in COMMANDS for p in inspect.signature(command).parameters.values()]
    switches = {f"--{p.name}" for p in parameters if isinstance(p.default, bool)}
    spelled = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            if option in switches and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
        spelled.append(option + equals + value)
    return spelled


if __name__ == "__main__":
    main()
