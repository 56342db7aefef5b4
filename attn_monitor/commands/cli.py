"""The `attn-monitor` program: a command is the function of a module of its name; the module's docstring is its help."""

from __future__ import annotations

import inspect
import os
import re
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from attn_monitor.commands.backfill import backfill
from attn_monitor.commands.check import check
from attn_monitor.commands.compare import compare
from attn_monitor.commands.pick import pick
from attn_monitor.commands.replay import replay
from attn_monitor.commands.report import report
from attn_monitor.commands.show import show
from attn_monitor.commands.summary import summary
from attn_monitor.commands.video import video
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import AttentionError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS: list[Callable[..., None]] = [check, show, video, replay, report, backfill, compare, summary, pick]
DRAWING = "drawing"  # the parameter of a command whose values are options of their own
MAY_BE_EMPTY = {"key"}  # the prefix of names in a checkpoint that have none


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: the words of the command line; by default those of the program.

    Raises:
        SystemExit: with status 2 and one line on stderr where the words are wrong, with status 1 and one line where
            the command fails. Errors in this program have a traceback.
    """
    run, values = _parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        run(**values)
        sys.stdout.flush()  # a full disk is met here, and not while Python ends
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        _forget_output()
        sys.exit(1)
    except OSError as error:
        sys.exit(f"attn-monitor: {_in_words(error)}")
    except (AttentionError, ValueError) as error:  # wrong arguments, contents of files and models
        sys.exit(f"attn-monitor: {' '.join(str(error).split())}")


def _parse(words: list[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """Return the command and its arguments; mistakes end the program with status 2 and jsonargparse's own words."""
    command = _command(words)
    try:
        parsed = _parser().parse_args(spelled_out(words))
        values = parsed[parsed.subcommand].as_dict()
        if empty := [name for name, value in values.items() if value == "" and name not in MAY_BE_EMPTY]:
            raise ArgumentError(None, f"{empty[0]} is empty")
        if DRAWING in inspect.signature(run := _named(parsed.subcommand)).parameters:
            values[DRAWING] = DrawingOptions(**{f.name: values.pop(f.name) for f in fields(DrawingOptions)})
    except (ArgumentError, OSError, ValueError) as error:  # the latter two of configuration files
        name = "attn-monitor" if command is None else f"attn-monitor {command.__name__}"
        print(f"{name}: {' '.join(str(error).split())} (see {name} --help)", file=sys.stderr)
        sys.exit(2)
    del values["config"]
    return run, values


def _in_words(error: OSError) -> str:
    """Return a text of our own as it is; of the system's errors the file, the reason and what to do."""
    if error.errno is None:
        return " ".join(str(error).split())
    if error.filename is None:
        _forget_output()
        return f"standard output cannot be written to ({error.strerror}); make room, or send it elsewhere"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename}: does not exist; check the path"
    return f"{error.filename}: {error.strerror}; check the path and who may read and write there"


def _forget_output() -> None:
    """Send the rest of stdout nowhere: it would fail again while Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def spelled_out(words: Sequence[str]) -> list[str]:
    """Write options as jsonargparse takes them: with underscores, and switches without a value with ``=true``."""
    switches = {f"--{p.name}" for p in _parameters(_command(words)) if isinstance(p.default, bool)}
    spelled = []
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            if option in switches and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
        spelled.append(option + equals + value)
    return spelled


def _named(name: str) -> Callable[..., None]:
    return next(c for c in COMMANDS if c.__name__ == name)


def _command(words: Sequence[str]) -> Callable[..., None] | None:
    return next((c for c in COMMANDS if c.__name__ == next(iter(words), "")), None)


def _parameters(command: Callable[..., None] | None) -> list[inspect.Parameter]:
    return [] if command is None else list(inspect.signature(command).parameters.values())


def _parser() -> ArgumentParser:
    about = "Attention of checkpoints and of runs that have ended."
    parser = _plain_parser(prog="attn-monitor", description=about)
    commands = parser.add_subcommands(required=True)
    for command in COMMANDS:
        commands.add_subcommand(command.__name__, _parser_of(command), help=_help(command).partition("\n\n")[0])
    return parser


def _parser_of(command: Callable[..., None]) -> ArgumentParser:
    """Return the parser of a command; keyword-only parameters of its function are options, others are positional."""
    parameters = _parameters(command)
    needed = [p for p in parameters if p.default is p.empty]
    words = [f"--{p.name} {p.name.upper()}" if p.kind is p.KEYWORD_ONLY else p.name for p in needed]
    words += [f"[{p.name}]" for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is None]
    usage = f"attn-monitor {command.__name__} {' '.join(words)} [options]"
    parser = _plain_parser(description=_help(command), usage=usage)
    parser.add_argument("--config", action="config", help="a YAML file with arguments")
    options: set[str | int] = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    positional: set[str | int] = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY}
    optional: set[str | int] = {p.name for p in parameters if p.name in positional and p.default is None}
    parser.add_function_arguments(command, skip=options | optional, as_positional=True, as_group=False)
    for name in sorted(map(str, optional)):  # jsonargparse would make an option of it
        about = re.search(rf"^ *{name}: (.+)$", inspect.getdoc(command) or "", re.MULTILINE)
        parser.add_argument(name, nargs="?", help="" if about is None else about[1])
    parser.add_function_arguments(command, skip={*positional, DRAWING}, as_group=False)
    if DRAWING in options:
        parser.add_class_arguments(DrawingOptions, None, as_group=False)
    return parser


def _plain_parser(**settings: Any) -> ArgumentParser:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Leaves docstrings as they are, with examples to be copied."""

    return ArgumentParser(formatter_class=Formatter, exit_on_error=False, allow_abbrev=True, **settings)


def _help(command: Callable[..., None]) -> str:
    return (sys.modules[command.__module__].__doc__ or "").strip()
