"""Models by name, from timm, transformers, torchvision, torch.hub or a factory, with weights or a checkpoint."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from attn_monitor.errors import AttnMonitorError, ModelNameError, first_line
from attn_monitor.weights.downloads import hub_or_cache, socket_timeout
from attn_monitor.weights.loading import load_checkpoint, refuse_random

EXPECTED = (
    "timm:NAME, hf:NAME_OR_DIR, torchvision:NAME, hub:REPO_OR_DIR:NAME, package.module:factory or "
    "package.module:factory(arguments)"
)


def load_model(
    name: str,
    *,
    checkpoint: str | None = None,
    key: str | None = None,
    weights: bool = False,
    allow_missing: bool = False,
    trust: bool = False,
) -> nn.Module:
    """Load a model by name, on the CPU and in eval mode; a report of a checkpoint's loading goes to stderr.

    Args:
        name: ``timm:NAME``, ``hf:NAME_OR_DIR``, ``torchvision:NAME``, ``hub:REPO:NAME`` of torch.hub or of a directory
            with a hubconf.py, ``package.module:factory``. The last two take arguments: ``pkg.vit:build(depth=12)``.
        checkpoint: file or folder of weights, see `load_checkpoint`.
        key: what to take from the checkpoint: "student", "teacher", or a prefix of names in it.
        weights: load the library's own pretrained weights. A directory of Hugging Face always brings its own.
        allow_missing: accept a checkpoint that leaves a part of the backbone at random.
        trust: unpickle what the checkpoint holds beside tensors, which may run any code.

    Raises:
        ModelNameError: there is no such model, or it cannot be made.
        CheckpointError: weights cannot be read, or do not fit.

    Example:
        >>> load_model("torch.nn:Linear(3, 4)")
        Linear(in_features=3, out_features=4, bias=True)
    """
    prefix, _, rest = name.partition(":")
    if not rest or not prefix:
        raise ModelNameError(f"model {name!r}: expected {EXPECTED}{_with_library(name)}")
    load, remedy = _LIBRARIES.get(prefix, (None, ""))
    try:
        with redirect_stdout(sys.stderr):  # models and downloads print, and stdout is for results
            model = _from_module(prefix, rest) if load is None else load(rest, weights)
    except AttnMonitorError as error:
        raise type(error)(f"model {name!r}: {error}") from error
    except ModuleNotFoundError as error:
        package = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision"}.get(prefix)
        advice = "Install that package, or check the name" if package is None else f"Run: pip install {package}"
        raise ModelNameError(f"model {name!r}: {error}. {advice}") from error
    except Exception as error:  # libraries raise what they like for downloads, damaged files and unknown names
        if load is None:
            raise
        if not remedy:
            remedy = "Pass --checkpoint FILE for weights that you have, or --weights false to go without"
            remedy = remedy if weights else "Check the name"
        raise ModelNameError(f"model {name!r}: {first_line(error)}. {remedy}") from error
    if not isinstance(model, nn.Module):
        raise ModelNameError(f"model {name!r} gave a {type(model).__name__}, expected a torch.nn.Module")
    if checkpoint is not None:
        print(load_checkpoint(model, checkpoint, key=key, allow_missing=allow_missing, trust=trust), file=sys.stderr)
    elif key is not None:
        raise ModelNameError(f"key={key!r}: no checkpoint was given that it could choose from")
    return model.eval()


def _with_library(name: str) -> str:
    """Suggest the library that knows a name without one; empty where timm does not."""
    try:
        import timm
    except ImportError:
        return ""
    return f"; did you mean timm:{name}?" if timm.is_model(name) else ""


def _timm(name: str, weights: bool) -> Any:
    import timm

    if ":" not in name:  # such as hf-hub:ORGANISATION/NAME
        if not timm.is_model(name):
            raise ModelNameError(f"timm knows no {name!r}{did_you_mean(name, timm.list_models())}")
        if weights and not timm.get_pretrained_cfg(name).has_weights:
            raise RuntimeError("timm has no weights for it")
    with hub_or_cache(weights or ":" in name):
        try:  # vision transformers then take images of any size
            return timm.create_model(name, pretrained=weights, dynamic_img_size=True)
        except TypeError:
            return timm.create_model(name, pretrained=weights)


def _hugging_face(name: str, weights: bool) -> Any:
    if (name.count("/") > 1 or name.startswith((".", "/", "~"))) and not Path(name).is_dir():  # no ORGANISATION/NAME
        raise ModelNameError(f"{name} is no folder")
    with hub_or_cache(not Path(name).is_dir()):
        from transformers import AutoConfig, AutoModel

        if not weights and not Path(name).is_dir():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            return AutoModel.from_config(config, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
        refuse_random("its weights", sorted(info["missing_keys"]))
        return model


def _torchvision(name: str, weights: bool) -> Any:
    from torchvision.models import get_model, list_models

    known = list_models()
    if name.lower() not in known:
        raise ModelNameError(f"torchvision knows no {name!r}{did_you_mean(name, known)}")
    with socket_timeout():
        return get_model(name, weights="DEFAULT" if weights else None)


def _torch_hub(name: str, weights: bool) -> Any:
    """Run a repository's code: naming it is the consent that torch.hub would ask for, and there may be no terminal."""
    found = re.fullmatch(r"(.+):(\w+(?:\(.*\))?)", name, re.DOTALL)
    if found is None:
        raise ModelNameError("expected hub:REPO:NAME, such as hub:facebookresearch/dino:main:dino_vits16")
    repository, call = found[1], _parse_call(found[2])
    source = "local" if Path(repository).is_dir() else "github"
    load = partial(
        torch.hub.load, repository, call.name, *call.arguments, source=source, trust_repo=True, skip_validation=True,
        verbose=False, **call.keywords,
    )  # fmt: skip
    with socket_timeout(), _errors_say_where(RuntimeError):  # which torch.hub raises for names and dependencies
        if "pretrained" in call.keywords:
            return load()
        try:
            return load(pretrained=weights)
        except TypeError as error:
            if "pretrained" not in str(error):
                raise
            return load()


_LIBRARIES: dict[str, tuple[Callable[[str, bool], Any], str]] = {
    "timm": (_timm, ""),
    "hf": (_hugging_face, "Check the name and the connection, or give a folder that holds the model: hf:FOLDER"),
    "torchvision": (_torchvision, ""),
    "hub": (_torch_hub, "Check the name and the connection, or give a folder that holds hubconf.py: hub:FOLDER:NAME"),
}
"""By prefix: what makes a model by name, with pretrained weights or not, and what to do where it fails."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the end of a message that lists the known names near to one; empty where there are none."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _from_module(module: str, call: str) -> Any:
    """Call a factory, or take a module that exists; the working directory is searched, as by `python -m`."""
    parsed = _parse_call(call)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    with _errors_say_where():
        imported = importlib.import_module(module)
    try:
        found: Any = reduce(getattr, parsed.name.split("."), imported)
    except AttributeError:
        raise ModelNameError(
            f"module {module!r} has no {parsed.name!r}{did_you_mean(parsed.name, dir(imported))}"
        ) from None
    with _errors_say_where():
        return found if isinstance(found, nn.Module) else found(*parsed.arguments, **parsed.keywords)


class _Call(NamedTuple):
    name: str
    arguments: list[Any]
    keywords: dict[str, Any]


def _parse_call(text: str) -> _Call:
    """Parse ``factory`` or ``factory(12, name="value")``; arguments are Python's literals, nothing is evaluated."""
    expected = f"{text!r}: expected NAME or NAME(arguments) with numbers, strings, lists and the like as arguments"
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = ast.unparse(call.func)
        arguments = [ast.literal_eval(argument) for argument in call.args]
        keywords = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ModelNameError(expected) from error
    if not all(part.isidentifier() for part in [*name.split("."), *keywords]):
        raise ModelNameError(expected)
    return _Call(name, arguments, keywords)


@contextmanager
def _errors_say_where(*known: type[Exception]) -> Iterator[None]:
    """Turn what a model's own code raises into one line with its place; errors that `load_model` words itself pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (AttnMonitorError, ModuleNotFoundError, OSError, *known)):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise ModelNameError(f"{type(error).__name__}: {first_line(error)} ({where})") from error
