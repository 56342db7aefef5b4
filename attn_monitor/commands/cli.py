"""The `attn-monitor` program: a command is the function of a module of its name; the module's docstring is its help."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
import sys
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from attn_monitor import __version__
from attn_monitor.errors import AttnMonitorError, MissingPackageError
from attn_monitor.extras import needs

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from attn_monitor.draw.options import DrawingOptions

COMMANDS = ("check", "show", "video", "replay", "report", "backfill", "compare", "summary", "pick", "leaderboard")
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
    try:
        try:
            name, values = _parse(list(sys.argv[1:] if arguments is None else arguments))
            run = getattr(importlib.import_module(f"attn_monitor.commands.{name}"), name)  # and PyTorch: seconds
            run(**values)
        finally:
            sys.stdout.flush()  # a full disk is met here, and not while Python ends; so are readers who left help
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        _forget_output()
        sys.exit(1)
    except OSError as error:
        sys.exit(f"attn-monitor: {_in_words(error)}")
    except (AttnMonitorError, ValueError) as error:  # wrong arguments, contents of files and models
        sys.exit(f"attn-monitor: {' '.join(str(error).split())}")


def _parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the command's name and its arguments; mistakes end the program with status 2 and one line."""
    run = command_of(words)
    try:
        values = parser_of(run).parse_args(spelled_out(words[1:], run)).as_dict()
        if empty := [name for name, value in values.items() if value == "" and name not in MAY_BE_EMPTY]:
            raise ArgumentError(None, f"{empty[0]} is empty")
        if DRAWING in inspect.signature(run).parameters:
            options = _drawing_options()
            values[DRAWING] = options(**{f.name: values.pop(f.name) for f in fields(options)})
    except BrokenPipeError:  # of help, on Python 3.10
        raise
    except MissingPackageError as error:
        sys.exit(f"attn-monitor: {error}")
    except (ArgumentError, OSError, ValueError) as error:  # the latter two of configuration files
        _end(f"attn-monitor {run.__name__}", str(error))
    del values["config"]
    return run.__name__, values


def command_of(words: Sequence[str]) -> Callable[..., None]:
    """Return the function of the command in the first word, without its body.

    Without one, the program ends: with the list of commands, its version, or one line.
    """
    name = words[0] if words else ""
    if name in COMMANDS:
        return _declared(name)
    if name in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if name == "--version":
        print(f"attn-monitor {__version__}")
        sys.exit(0)
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    _end(
        "attn-monitor", f"{name!r} is no command, expected {', '.join(COMMANDS)}{hint}" if name else "no command given"
    )


def _declared(name: str) -> Callable[..., None]:
    """Return a command's function as its source declares it: signature and docstring, of which a parser is made.

    The module is not imported, as PyTorch takes seconds: only what stands in the signature is.
    """
    module = _source(name)
    (found,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name)
    found.body = found.body[:1]
    named = {node.id for node in ast.walk(found.args) if isinstance(node, ast.Name)}
    imports = [node for node in module.body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        node.names = [alias for alias in node.names if alias.name in named | {"annotations"}]
    declared = ast.Module([*(node for node in imports if node.names), found], type_ignores=[])
    values: dict[str, Any] = {"__name__": __name__, "__doc__": ast.get_docstring(module)}  # its module is looked up
    exec(compile(declared, name, "exec"), values)
    made: Callable[..., None] = values[name]
    made.__annotations__ = inspect.get_annotations(made, eval_str=True)  # older jsonargparse would look in this module
    return made


def _source(name: str) -> ast.Module:
    return ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))


def _end(name: str, text: str) -> NoReturn:
    print(f"{name}: {' '.join(text.split())} (see {name} --help)", file=sys.stderr)
    sys.exit(2)


def _overview() -> str:
    """Return the help of the program: what each command does, from its module's docstring, without importing it."""
    lines = ["usage: attn-monitor COMMAND ...", "", "Attention of checkpoints and of runs that have ended.", ""]
    texts = {name: ast.get_docstring(_source(name)) or "" for name in COMMANDS}
    lines += [f"  {name:12s} {text.partition(chr(10) * 2)[0]}" for name, text in texts.items()]
    return "\n".join([*lines, "", "attn-monitor COMMAND --help describes a command, --version prints the version."])


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


def spelled_out(words: Sequence[str], command: Callable[..., None]) -> list[str]:
    """Write options as jsonargparse takes them: underscores, switches with ``=true``, numbers 3,2,1 as a list."""
    switches = {f"--{p.name}" for p in _parameters(command) if isinstance(p.default, bool)}
    numbers = {f"--{p.name}": str(p.annotation) for p in _parameters(command) if "tuple[int" in str(p.annotation)}
    spelled, before = list[str](), ""
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            if option in switches and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
            if option in numbers:
                value = _as_list(value, numbers[option])
        elif before in numbers:
            option, equals, value = _as_list(word, numbers[before]), "", ""
        spelled.append(option + equals + value)
        before = spelled[-1]
    return spelled


def _as_list(numbers: str, annotation: str) -> str:
    """Return 3,2,1 or (3, 2, 1) as [3,2,1], and as is a single number that need be no list, and anything else."""
    found = re.fullmatch(r"\(?\s*(\d+(?:\s*,\s*\d+)*)\s*\)?", numbers.strip())
    return f"[{found[1]}]" if found and ("," in numbers or annotation.startswith("tuple")) else numbers


def _parameters(command: Callable[..., None]) -> list[inspect.Parameter]:
    return list(inspect.signature(command).parameters.values())


def _drawing_options() -> type[DrawingOptions]:
    from attn_monitor.draw.options import DrawingOptions

    return DrawingOptions


def parser_of(command: Callable[..., None]) -> ArgumentParser:
    """Return the parser of a command; keyword-only parameters of its function are options, others are positional."""
    parameters = _parameters(command)
    needed = [p for p in parameters if p.default is p.empty]
    words = [f"--{p.name} {p.name.upper()}" if p.kind is p.KEYWORD_ONLY else p.name for p in needed]
    several = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and str(p.annotation) == "list[str]"}
    words = [f"{word} [{word} ...]" if word in several else word for word in words]
    words += [f"[{p.name}]" for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is None]
    usage = f"attn-monitor {command.__name__} {' '.join(words)} [options]"
    parser = _plain_parser(description=command.__globals__["__doc__"], usage=usage)
    parser.add_argument("--config", action="config", help="a YAML file with arguments")
    options: set[str | int] = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    positional: set[str | int] = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY}
    optional: set[str | int] = {p.name for p in parameters if p.name in positional and p.default is None}
    parser.add_function_arguments(command, skip=options | optional | several, as_positional=True, as_group=False)
    for name in sorted(map(str, optional | several)):  # jsonargparse would make an option of it, or want YAML
        about = re.search(rf"^ *{name}: (.+)$", inspect.getdoc(command) or "", re.MULTILINE)
        parser.add_argument(name, nargs="+" if name in several else "?", help="" if about is None else about[1])
    parser.add_function_arguments(command, skip={*positional, DRAWING}, as_group=False)
    if DRAWING in options:
        parser.add_class_arguments(_drawing_options(), None, as_group=False)
    return parser


def _plain_parser(**settings: Any) -> ArgumentParser:
    with needs("jsonargparse", "the command attn-monitor"):
        from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Leaves docstrings as they are, with examples to be copied; options have dashes, and types are not listed."""

        def _get_help_string(self, action: Action) -> str:
            text, default = (action.help or "").strip(), action.default
            shown = not (default is None or default is False or "%" in text or not action.option_strings)
            return f"{text} (default: %(default)s)" if shown and action.dest not in ("help", "config") else text

        def _format_action_invocation(self, action: Action) -> str:
            flag = ", ".join(option.replace("_", "-") for option in action.option_strings)
            if action.default is False or action.dest == "help" or not flag:  # a switch, or positional
                return flag or action.dest
            return f"{flag} {'true|false' if action.default is True else action.dest.upper()}"

    return ArgumentParser(
        formatter_class=Formatter, exit_on_error=False, allow_abbrev=True, print_config=None, **settings
    )
