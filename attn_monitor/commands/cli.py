"""The `attn-monitor` command: each of its commands is a function in a module of that name."""

from __future__ import annotations

import inspect
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from attn_monitor.commands.backfill import backfill
from attn_monitor.commands.check import check
from attn_monitor.commands.compare import compare
from attn_monitor.commands.replay import replay
from attn_monitor.commands.report import report
from attn_monitor.commands.show import show
from attn_monitor.commands.summary import summary
from attn_monitor.commands.video import video
from attn_monitor.errors import AttentionError
from attn_monitor.weights.models import did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS: list[Callable[..., None]] = [check, show, video, replay, report, backfill, compare, summary]
MAY_BE_EMPTY = {"key"}  # of names in a checkpoint that have no prefix
TYPES = {
    **{"int": "a whole number", "float": "a number", "list": "a list", "NoneType": "null"},
    **dict.fromkeys(["tuple", "tuple with 2 elements"], "a list of two, such as [224, 336]"),
}
"""What jsonargparse calls a type, for people."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of these words, by default the program's: mistakes are told in one line, without a traceback."""
    run, values = _parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        run(**values)
        sys.stdout.flush()  # a full disk is met here, and not while Python ends
    except BrokenPipeError:  # whoever reads the output, such as `head`, has had enough
        _forget_output()
        sys.exit(1)
    except OSError as error:
        sys.exit(f"attn-monitor: {_in_words(error)}")
    except (AttentionError, ValueError) as error:  # what models, contents of files and arguments can be wrong with
        sys.exit(f"attn-monitor: {' '.join(str(error).split())}")


def _parse(words: list[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """The command and its arguments; mistakes end the program with status 2."""
    command = _command(words)
    try:
        parsed = _parser().parse_args(spelled_out(words))
        values = parsed[parsed.subcommand].as_dict()
        if empty := [name for name, value in values.items() if value == "" and name not in MAY_BE_EMPTY]:
            raise ArgumentError(None, f"{empty[0]} is empty")
    except (ArgumentError, OSError, ValueError) as error:  # the latter two of configuration files
        name = "attn-monitor" if command is None else f"attn-monitor {command.__name__}"
        print(f"{name}: {_reworded(str(error), words, command)} (see {name} --help)", file=sys.stderr)
        sys.exit(2)
    del values["config"]
    return next(c for c in COMMANDS if c.__name__ == parsed.subcommand), values


def _in_words(error: OSError) -> str:
    """Our own text, or what the system says of which file."""
    if error.errno is None:
        return " ".join(str(error).split())
    if error.filename is None:
        _forget_output()
        return f"standard output cannot be written to ({error.strerror}); make room, or send it elsewhere"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename}: does not exist; check the path"
    return f"{error.filename}: {error.strerror}; check the path and who may read and write there"


def _forget_output() -> None:
    """What is still to be printed would fail again while Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def spelled_out(words: Sequence[str]) -> list[str]:
    """Options as jsonargparse takes them: underscores, the full name where one begins so, true for a switch alone."""
    switches = {f"--{p.name}": isinstance(p.default, bool) for p in _parameters(_command(words))}
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


def _reworded(mistake: str, words: Sequence[str], command: Callable[..., None] | None) -> str:
    """What jsonargparse says in several lines and by its names of types, in one line."""
    names = [c.__name__ for c in COMMANDS]
    if command is None and not (words and words[0].startswith("-")):
        received = f"no command {words[0]!r}{did_you_mean(words[0], names)}" if words else "no command"
        return f"{received}; expected one of {', '.join(names)}"
    of_type = re.match(r'(?s)Parser key "([^"]+)":.*Expected.*value: (.*)', mistake)
    if of_type is not None:
        found = re.findall(r"Expected (?:an? )?(.+?)(?:\. Got.*)?$", mistake, re.MULTILINE)
        plain = [re.sub(r"^<class '(\w+)'>$|^typing\.Literal\[(.*)\]$", r"\1\2", text) for text in found]
        expected = dict.fromkeys(TYPES.get(text, text) for text in plain)
        return f"{of_type[1]}={of_type[2]}: expected {' or '.join(expected)}"
    options = {p.name: f"--{p.name}" for p in _parameters(command) if p.kind is p.KEYWORD_ONLY}
    said = re.sub(r'^Parser key "(\w+)":', r"--\1:", " ".join(mistake.split()))
    said = re.sub(r'^Validation failed: Key "(\S+)" is required.*', r"the following arguments are required: \1", said)
    spelled = re.sub(rf"\b(?:{'|'.join(names)})\.(\w+)", lambda at: options.get(at[1], at[1]), said)
    spelled = spelled[:1].lower() + spelled[1:]
    unknown = re.match(r"unrecognized arguments: (--\w+)", spelled)
    return spelled if unknown is None else f"{spelled}{did_you_mean(unknown[1], list(options.values()))}"


def _command(words: Sequence[str]) -> Callable[..., None] | None:
    return next((c for c in COMMANDS if c.__name__ == next(iter(words), "")), None)


def _parameters(command: Callable[..., None] | None) -> list[inspect.Parameter]:
    return [] if command is None else list(inspect.signature(command).parameters.values())


def _parser() -> ArgumentParser:
    about = "Attention of checkpoints and of runs that have ended."
    parser = _plain_parser(prog="attn-monitor", description=about)
    commands = parser.add_subcommands(required=True)
    for command in COMMANDS:
        commands.add_subcommand(command.__name__, _parser_of(command), help=_description(command).partition("\n\n")[0])
    return parser


def _parser_of(command: Callable[..., None]) -> ArgumentParser:
    """A function's keyword-only parameters are options on the command line too."""
    parameters = _parameters(command)
    needed = [p for p in parameters if p.default is p.empty]
    words = [f"--{p.name} {p.name.upper()}" if p.kind is p.KEYWORD_ONLY else p.name for p in needed]
    words += [f"[{p.name}]" for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is None]
    usage = f"attn-monitor {command.__name__} {' '.join(words)} [options]"
    parser = _plain_parser(description=_description(command), usage=usage)
    parser.add_argument("--config", action="config", help="a YAML file with arguments")
    options: set[str | int] = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    positional: set[str | int] = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY}
    optional: set[str | int] = {p.name for p in parameters if p.name in positional and p.default is None}
    parser.add_function_arguments(command, skip=options | optional, as_positional=True, as_group=False)
    for name in sorted(map(str, optional)):  # jsonargparse would make an option of it
        told = re.search(rf"^ *{name}: (.+)$", inspect.getdoc(command) or "", re.MULTILINE)
        parser.add_argument(name, nargs="?", help="" if told is None else told[1])
    parser.add_function_arguments(command, skip=positional, as_group=False)
    return parser


def _plain_parser(**settings: Any) -> ArgumentParser:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Leaves examples in one line, to be copied."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            fill = super()._fill_text
            paragraphs = text.split("\n\n")
            return "\n\n".join(p if p.startswith("Example: ") else fill(p, width, indent) for p in paragraphs)

    return ArgumentParser(formatter_class=Formatter, exit_on_error=False, **settings)


def _description(command: Callable[..., None]) -> str:
    return (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]
