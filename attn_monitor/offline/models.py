"""Load a model by name for the offline commands: `timm:…`, `hf:…`, `torchvision:…` or `package.module:callable`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attn_monitor.capture.backbones import role_of
from attn_monitor.offline.downloads import hub_or_cache, socket_timeout


class ModelNameError(ValueError):
    """The name does not lead to a model, or the checkpoint does not fit it."""


def load_model(name: str, *, checkpoint: str | None = None, key: str | None = None, weights: bool = False) -> nn.Module:
    """The named model on the CPU in eval mode.

    ``weights`` loads the library's own pretrained weights; ``checkpoint`` a file of weights, from which the entries
    below ``key`` are taken; without it, see `load_checkpoint`. What was loaded is said on stderr.
    """
    prefix, _, rest = name.partition(":")
    library = _LIBRARIES.get(prefix)
    if not rest:
        raise ModelNameError(
            f"model {name!r}: expected timm:NAME, hf:NAME, torchvision:NAME or package.module:callable"
        )
    try:
        model = _from_module(prefix, rest) if library is None else library.load(rest, weights)
    except ModuleNotFoundError as error:
        remedy = "Install that package, or check the name" if library is None else f"Run: pip install {library.package}"
        raise ModelNameError(f"model {name!r}: {error}. {remedy}") from error
    except (OSError, RuntimeError) as error:  # what the libraries raise for downloads, and for names they do not know
        if library is None:
            raise
        raise ModelNameError(f"model {name!r}: {_first_line(error)}. {_remedy(prefix, weights)}") from error
    if checkpoint is not None:
        print(load_checkpoint(model, checkpoint, key=key), file=sys.stderr)
    elif key is not None:
        raise ModelNameError(f"key={key!r}: no checkpoint was given that it could choose from")
    return model.eval()


def _timm(name: str, weights: bool) -> nn.Module:
    import timm

    if ":" not in name:  # those are repositories on a hub
        if not timm.is_model(name):
            raise ModelNameError(f"model 'timm:{name}': timm knows no {name!r}{_suggestion(name, timm.list_models())}")
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
    with hub_or_cache(not Path(name).is_dir()):
        from transformers import AutoConfig, AutoModel

        if weights or Path(name).is_dir():
            model = AutoModel.from_pretrained(name)
        else:
            model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    return model


def _torchvision(name: str, weights: bool) -> nn.Module:
    from torchvision.models import get_model, list_models

    known = list_models()
    if name.lower() not in known:
        raise ModelNameError(f"model 'torchvision:{name}': torchvision knows no {name!r}{_suggestion(name, known)}")
    with socket_timeout():
        model: nn.Module = get_model(name, weights="DEFAULT" if weights else None)
    return model


@dataclass(frozen=True)
class _Library:
    """One that makes models by name, given whether with its pretrained weights; ``package`` is what pip installs."""

    load: Callable[[str, bool], nn.Module]
    package: str


_LIBRARIES = {
    "timm": _Library(_timm, "timm"),
    "hf": _Library(_hugging_face, "transformers"),
    "torchvision": _Library(_torchvision, "torchvision"),
}


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _remedy(library: str, weights: bool) -> str:
    if library == "hf":
        return "Check the name and the connection, or give a folder that holds the model: hf:FOLDER"
    if weights:
        return "Pass --checkpoint FILE for weights that you have, or --weights false to go without"
    return "Check the name"


def _from_module(module: str, attribute: str) -> nn.Module:
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None:
        raise ModelNameError(f"module {module!r} has no {attribute!r}")
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise ModelNameError(f"{module}:{attribute} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def load_checkpoint(model: nn.Module, path: str, *, key: str | None = None) -> str:
    """Fill the model from the entries below ``key`` in a file of weights; pickled code is never run.

    Without a key, those of the prefixes (``teacher.backbone.``, …) below which most entries fit; of equals a teacher,
    as DINO evaluates, before a student, then the first in alphabetical order. Returns what was loaded and left over.
    """
    try:
        tensors = _flatten(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and torch each have their own errors for other files
        raise ModelNameError(f"checkpoint {path}: no readable file of weights ({_first_line(error)})") from error
    wanted = model.state_dict()

    def missing(prefix: str) -> list[str]:
        return [n for n, w in wanted.items() if (t := tensors.get(prefix + n)) is None or t.shape != w.shape]

    first = next(iter(wanted))
    prefixes = sorted({name.removesuffix(first) for name in tensors if f".{name}".endswith(f".{first}")})
    among = [p for p in prefixes if key is None or p == key or p.startswith(f"{key.rstrip('.')}.")]
    if not among:
        of = "" if key is None else f"nothing of it lies below key={key!r}; "
        raise ModelNameError(
            f"checkpoint {path}: {of}a {type(model).__name__} was looked for below "
            f"{', '.join(map(repr, prefixes)) or 'every name'} (it has {len(tensors)} entries, and needs {first!r})"
        )
    best = min(among, key=lambda prefix: (len(missing(prefix)), _PREFERENCE.get(role_of(prefix) or "", 1), prefix))
    if lacking := missing(best):
        raise ModelNameError(
            f"checkpoint {path}: {len(lacking)} of {len(wanted)} entries are missing or of another shape, such as "
            f"{lacking[0]!r} (looked below {best!r})"
        )
    model.load_state_dict({n: tensors[best + n] for n in wanted})
    left = [name for name in tensors if not (name.startswith(best) and name.removeprefix(best) in wanted)]
    others = [repr(prefix) for prefix in prefixes if prefix != best and not missing(prefix)]
    return (
        f"{path}: loaded all {len(wanted)} entries of the model from below {best!r}; {len(left)} entries are left over"
        + (f" ({', '.join(_parents(left))})" if left else "")
        + (f"; {', '.join(others)} would fit too: choose by --key" if others else "")
    )


_PREFERENCE = {"teacher": 0, "student": 2}


def _parents(names: list[str], most: int = 6) -> list[str]:
    """The first two parts of names, each once."""
    parents = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
    return parents[:most] + ["…"] * (len(parents) > most)


def _flatten(stored: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if not isinstance(stored, dict):
        return {}
    flat: dict[str, torch.Tensor] = {}
    for key, value in stored.items():
        if isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = value
        else:
            flat.update(_flatten(value, f"{prefix}{key}."))
    return flat
