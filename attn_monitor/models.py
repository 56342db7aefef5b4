"""Load a model by name for the offline commands: `timm:…`, `hf:…`, `torchvision:…` or `package.module:callable`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class ModelNameError(ValueError):
    """The name does not lead to a model, or the checkpoint does not fit it."""


def load_model(name: str, *, checkpoint: str | None = None, weights: bool = False) -> nn.Module:
    """The named model on the CPU in eval mode.

    ``weights`` loads the library's own pretrained weights; ``checkpoint`` a file of weights, from which the entries
    that fit are taken (a Lightning or DINO checkpoint's prefix, such as ``teacher.backbone.``, is found by itself).
    """
    library, _, rest = name.partition(":")
    loaders: dict[str, Callable[[str, bool], nn.Module]] = {
        "timm": _timm,
        "hf": _hugging_face,
        "torchvision": _torchvision,
    }
    if not rest:
        raise ModelNameError(
            f"model {name!r}: expected timm:NAME, hf:NAME, torchvision:NAME or package.module:callable"
        )
    try:
        model = loaders[library](rest, weights) if library in loaders else _importable(library, rest)
    except ModuleNotFoundError as error:
        raise ModelNameError(f"model {name!r}: {error}. Install that package, or check the name") from error
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def _timm(name: str, weights: bool) -> nn.Module:
    import timm

    model: nn.Module
    try:  # vision transformers then take images of any size
        model = timm.create_model(name, pretrained=weights, dynamic_img_size=True)
    except TypeError:
        model = timm.create_model(name, pretrained=weights)
    return model


def _hugging_face(name: str, weights: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    model: nn.Module
    if weights or Path(name).is_dir():
        model = AutoModel.from_pretrained(name)
    else:
        model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    return model


def _torchvision(name: str, weights: bool) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights="DEFAULT" if weights else None)
    return model


def _importable(module: str, attribute: str) -> nn.Module:
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None:
        raise ModelNameError(f"module {module!r} has no {attribute!r}")
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise ModelNameError(f"{module}:{attribute} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Fill the model from a file of weights, whatever prefix its entries have there; pickled code is never run."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    tensors = _flatten(stored)
    wanted = model.state_dict()
    prefixes = {key[: -len(name)] for key in tensors for name in list(wanted)[:1] if key.endswith(name)}

    def rank(prefix: str) -> tuple[int, bool]:
        fits = sum(prefix + n in tensors and tensors[prefix + n].shape == w.shape for n, w in wanted.items())
        return fits, "teacher" in prefix

    best = max(prefixes, key=rank, default="")
    missing = [n for n, w in wanted.items() if (t := tensors.get(best + n)) is None or t.shape != w.shape]
    if missing:
        raise ModelNameError(
            f"checkpoint {path}: {len(missing)} of {len(wanted)} entries are missing or of another shape, such as "
            f"{missing[0]!r} (looked below {best!r})"
        )
    model.load_state_dict({n: tensors[best + n] for n in wanted})


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
