"""Load a model by name for the offline commands, with weights of its library or from a checkpoint."""

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
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attn_monitor.errors import AttnMonitorError, ModelNameError
from attn_monitor.weights.checkpoints import load_checkpoint, refuse_random
from attn_monitor.weights.downloads import hub_or_cache, socket_timeout
from attn_monitor.weights.weight_files import first_line

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
    """The named model on the CPU in eval mode; what was loaded is said on stderr.

    Args:
        name: ``timm:NAME``, ``hf:NAME_OR_DIR``, ``torchvision:NAME``, ``hub:REPO:NAME`` of torch.hub or of a directory
            with a hubconf.py, ``package.module:factory``. The last two take arguments: ``pkg.vit:build(depth=12)``.
        checkpoint: file or folder of weights, see `load_checkpoint`.
        key: what to take from the checkpoint: "student", "teacher", or a prefix of names in it.
        weights: load the library's own pretrained weights. A directory of Hugging Face always brings its own.
        allow_missing: accept a checkpoint that leaves a part of the backbone at random.
        trust: unpickle what the checkpoint holds beside tensors, which may run any code.

    Raises `ModelNameError` and `CheckpointError`.
    """
    prefix, _, rest = name.partition(":")
    library = _LIBRARIES.get(prefix)
    if not rest or not prefix:
        raise ModelNameError(f"model {name!r}: expected {EXPECTED}")
    try:
        with redirect_stdout(sys.stderr):  # of what models and downloads print; results are the command's
            model = _from_module(prefix, rest) if library is None else library.load(rest, weights)
    except AttnMonitorError as error:
        raise type(error)(f"model {name!r}: {error}") from error
    except ModuleNotFoundError as error:
        package = None if library is None else library.package
        remedy = "Install that package, or check the name" if package is None else f"Run: pip install {package}"
        raise ModelNameError(f"model {name!r}: {error}. {remedy}") from error
    except Exception as error:  # libraries raise what they like for downloads, damaged files and unknown names
        if library is None:
            raise
        raise ModelNameError(f"model {name!r}: {first_line(error)}. {_remedy(prefix, weights)}") from error
    if not isinstance(model, nn.Module):
        raise ModelNameError(f"model {name!r} gave a {type(model).__name__}, expected a torch.nn.Module")
    if checkpoint is not None:
        print(load_checkpoint(model, checkpoint, key=key, allow_missing=allow_missing, trust=trust), file=sys.stderr)
    elif key is not None:
        raise ModelNameError(f"key={key!r}: no checkpoint was given that it could choose from")
    return model.eval()


def _timm(name: str, weights: bool) -> nn.Module:
    import timm

    if ":" not in name:  # those are repositories on a hub
        if not timm.is_model(name):
            raise ModelNameError(f"timm knows no {name!r}{did_you_mean(name, timm.list_models())}")
        if weights and not timm.get_pretrained_cfg(name).has_weights:
            raise RuntimeError("timm has no weights for it")
    model: nn.Module
    with hub_or_cache(weights or ":" in name):
        try:  # vision transformers then take images of any size
            model = timm.create_model(name, pretrained=weights, dynamic_img_size=True)
        except TypeError:
            model = timm.create_model(name, pretrained=weights)
    return model


def _hugging_face(name: str, weights: bool) -> nn.Module:
    model: nn.Module
    if (name.count("/") > 1 or name.startswith((".", "/", "~"))) and not Path(name).is_dir():  # no ORGANISATION/NAME
        raise ModelNameError(f"{name} is no folder")
    with hub_or_cache(not Path(name).is_dir()):
        from transformers import AutoConfig, AutoModel

        if weights or Path(name).is_dir():
            model, told = AutoModel.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
            refuse_random("its weights", sorted(told["missing_keys"]))
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            model = AutoModel.from_config(config, trust_remote_code=False)
    return model


def _torchvision(name: str, weights: bool) -> nn.Module:
    from torchvision.models import get_model, list_models

    known = list_models()
    if name.lower() not in known:
        raise ModelNameError(f"torchvision knows no {name!r}{did_you_mean(name, known)}")
    with socket_timeout():
        model: nn.Module = get_model(name, weights="DEFAULT" if weights else None)
    return model


def _torch_hub(name: str, weights: bool) -> Any:
    """Naming a repository is the word to run its code, as torch.hub asks for: there may be nobody to answer."""
    found = re.fullmatch(r"(.+):(\w+(?:\(.*\))?)", name, re.DOTALL)
    if found is None:
        raise ModelNameError("expected hub:REPO:NAME, such as hub:facebookresearch/dino:main:dino_vits16")
    repository, call = found[1], _parse_call(found[2])
    source = "local" if Path(repository).is_dir() else "github"
    load = partial(
        torch.hub.load, repository, call.name, *call.arguments, source=source, trust_repo=True, skip_validation=True,
        verbose=False, **call.keywords,
    )  # fmt: skip
    with socket_timeout(), _told_as_name_error(RuntimeError):  # which torch.hub raises of names and dependencies
        if "pretrained" in call.keywords:
            return load()
        try:
            return load(pretrained=weights)
        except TypeError as error:
            if "pretrained" not in str(error):
                raise
            return load()


@dataclass(frozen=True)
class _Library:
    """One that makes models by name, given whether with pretrained weights; ``package`` is what pip installs for it."""

    load: Callable[[str, bool], Any]
    package: str | None = None


_LIBRARIES = {
    "timm": _Library(_timm, "timm"),
    "hf": _Library(_hugging_face, "transformers"),
    "torchvision": _Library(_torchvision, "torchvision"),
    "hub": _Library(_torch_hub),
}


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The known names that are near to one, as the end of a message; empty where none is."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _remedy(library: str, weights: bool) -> str:
    if library == "hf":
        return "Check the name and the connection, or give a folder that holds the model: hf:FOLDER"
    if library == "hub":
        return "Check the name and the connection, or give a folder that holds hubconf.py: hub:FOLDER:NAME"
    if weights:
        return "Pass --checkpoint FILE for weights that you have, or --weights false to go without"
    return "Check the name"


def _from_module(module: str, call: str) -> Any:
    """A factory's model, or a module that is there; the working directory is looked in as `python -m` does."""
    parsed = _parse_call(call)
    if os.getcwd() not in sys.path and "" not in sys.path:  # as for a command in a folder of scripts
        sys.path.append(os.getcwd())
    with _told_as_name_error():
        imported = importlib.import_module(module)
    try:
        found: Any = reduce(getattr, parsed.name.split("."), imported)
    except AttributeError:
        raise ModelNameError(
            f"module {module!r} has no {parsed.name!r}{did_you_mean(parsed.name, dir(imported))}"
        ) from None
    with _told_as_name_error():
        return found if isinstance(found, nn.Module) else found(*parsed.arguments, **parsed.keywords)


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: list[Any]
    keywords: dict[str, Any]


def _parse_call(text: str) -> _Call:
    """``factory`` or ``factory(12, name="value")``: Python's literals only, nothing is evaluated."""
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
def _told_as_name_error(*known: type[Exception]) -> Iterator[None]:
    """Whatever a model's own code raises is a line that says where; what `load_model` tells itself passes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (AttnMonitorError, ModuleNotFoundError, OSError, *known)):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise ModelNameError(f"{type(error).__name__}: {first_line(error)} ({where})") from error
