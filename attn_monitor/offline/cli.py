"""The `attn-monitor` command: each of its commands is a function in a module of that name."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from attn_monitor.errors import AttentionError
from attn_monitor.offline.backfill import backfill
from attn_monitor.offline.check import check
from attn_monitor.offline.compare import compare
from attn_monitor.offline.replay import replay
from attn_monitor.offline.report import report
from attn_monitor.offline.show import show
from attn_monitor.offline.summary import summary
from attn_monitor.offline.video import video

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS: list[Callable[..., None]] = [check, show, video, replay, report, backfill, compare, summary]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `attn-monitor`: mistakes are told in one line, without a traceback."""
    parsed = _parser().parse_args(spelled_out(sys.argv[1:] if arguments is None else arguments))
    command = next(c for c in COMMANDS if c.__name__ == parsed.subcommand)
    try:
        command(**{k: v for k, v in parsed[parsed.subcommand].as_dict().items() if k != "config"})
        sys.stdout.flush()  # a full disk is met here, and not while Python ends
    except KeyboardInterrupt:
        print("attn-monitor: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (AttentionError, OSError, ValueError) as error:  # what files, models and arguments can be wrong with
        sys.exit(f"attn-monitor: {' '.join(str(error).split())}")


def spelled_out(words: Sequence[str]) -> list[str]:
    """Options as jsonargparse takes them: underscores, the full name where one begins so, true for a switch alone."""
    command = next((c for c in COMMANDS if c.__name__ == next(iter(words), "")), None)
    parameters = [] if command is None else inspect.signature(command).parameters.values()
    switches = {f"--{p.name}": isinstance(p.default, bool) for p in parameters}
    spelled = []
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            begin_so = [known for known in switches if known.startswith(option)]
            option = begin_so[0] if len(begin_so) == 1 else option
            if switches.get(option) and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
        spelled.append(option + equals + value)
    return spelled


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="attn-monitor", description="Attention of checkpoints and of runs that have ended.")
    commands = parser.add_subcommands(required=True)
    for command in COMMANDS:
        commands.add_subcommand(command.__name__, _parser_of(command), help=_description(command).partition("\n\n")[0])
    return parser


def _parser_of(command: Callable[..., None]) -> ArgumentParser:
    """A function's keyword-only parameters are options on the command line too."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=_description(command))
    parser.add_argument("--config", action="config", help="a YAML file with arguments")
    parameters = inspect.signature(command).parameters.values()
    options: set[str | int] = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    positional: set[str | int] = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY}
    parser.add_function_arguments(command, skip=options, as_positional=True, as_group=False)
    parser.add_function_arguments(command, skip=positional, as_group=False)
    return parser


def _description(command: Callable[..., None]) -> str:
    return (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]


if __name__ == "__main__":
    main()
