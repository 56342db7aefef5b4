"""Find the images in a batch, whatever containers it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from itertools import groupby
from operator import itemgetter
from types import ModuleType
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from attn_monitor.image_axes import likely_axes

IMAGE_WORDS = ("global", "image", "pixel", "img", "view", "x")
"""Words in the keys and attributes that hold images, the most reliable first."""

MAX_CHANNELS = 32  # most images have fewer; feature maps and weights have more
SMALLEST = 8  # pixels on a side of images with more channels; weights of convolutions are smaller
MAX_CONTAINERS = 10_000  # to search in a batch, as an object may lead to a whole program


def find_images(batch: Any) -> Tensor | None:
    """Find the floating-point images of a batch; None if it holds none.

    They are (B, C, H, W), clips or volumes of five dimensions with at most `MAX_CHANNELS` channels; else such tensors
    with more channels, else spectrograms (B, frequency, time). If a container holds several, the name that comes first
    in `IMAGE_WORDS` wins, then the larger images, then the first. At most `MAX_CONTAINERS` are searched.
    """
    return next((found for kind in _KINDS if (found := _find(batch, kind)) is not None), None)


def _has_few_channels(x: Tensor) -> bool:
    return x.ndim in (4, 5) and min(x.shape[1 : x.ndim - 2]) <= MAX_CHANNELS


_KINDS: tuple[Callable[[Tensor], bool], ...] = (
    _has_few_channels,
    lambda x: x.ndim in (4, 5) and min(x.shape[-2:]) >= SMALLEST,
    lambda x: x.ndim == 3 and min(x.shape[1:]) > 1 and len(x) not in (1, 3),  # else it may be one image
)


def _find(batch: Any, kind: Callable[[Tensor], bool]) -> Tensor | None:
    seen: dict[int, Any] = {}
    searches, found = [_search(batch, kind, seen)], None  # a list, as chains of objects are longer than Python's stack
    while searches:
        try:
            part = searches[-1].send(found)
        except StopIteration as end:
            searches.pop()
            found = end.value
        else:
            searches.append(_search(part, kind, seen))
            found = None
    return found


def _search(
    batch: Any, kind: Callable[[Tensor], bool], seen: dict[int, Any]
) -> Generator[Any, Tensor | None, Tensor | None]:
    """Yield the parts to search, receive what each holds, and return the images of them all."""
    if isinstance(batch, Tensor):
        return batch if batch.is_floating_point() and kind(batch) else None
    known = id(batch) in seen or len(seen) >= MAX_CONTAINERS  # objects may refer to each other
    if known or isinstance(batch, (str, bytes, int, float, type(None))):
        return None
    seen[id(batch)] = batch  # keeps it alive, so that its id is not reused
    parts = sorted(((_rank(name), part) for name, part in _parts(batch)), key=itemgetter(0))
    for _, alike in groupby(parts, key=itemgetter(0)):
        found = []
        for _, part in alike:
            images = yield part
            found += [] if images is None else [images]
        if found:
            return max(found, key=lambda images: math.prod(likely_axes(images.shape).size_of(images)))
    return None


def describe_batch(batch: Any) -> str:
    """Describe a batch in error messages, by the shapes and types of its first parts."""
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)} {batch.dtype}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {describe_batch(part)}" for name, part in _parts(batch)[:6]) + "}"
    if isinstance(batch, (list, tuple)):
        return "[" + ", ".join(describe_batch(part) for _, part in _parts(batch)[:6]) + "]"
    return type(batch).__name__


def _rank(name: str) -> int:
    """Return the index of the first of `IMAGE_WORDS` in a name, their number if there is none."""
    return next((rank for rank, word in enumerate(IMAGE_WORDS) if word in name.lower()), len(IMAGE_WORDS))


def _parts(container: Any) -> list[tuple[str, Any]]:
    """Return a container's own items with their key or attribute; none if it is no container."""
    node = _as_pytree(container) if _is_leaf(container) else container
    registered = pytree.SUPPORTED_NODES.get(type(node))
    if registered is not None and registered.flatten_with_keys_fn is None:
        return [("", part) for part in pytree.tree_leaves(node, is_leaf=lambda part: part is not node)]
    found = pytree.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)[0]
    return [(_name(path[0]), part) for path, part in found if path]


def _is_leaf(value: Any) -> bool:
    """Return whether pytree knows no parts of a value; its own function is there from PyTorch 2.5 on."""
    parts = pytree.tree_leaves(value, is_leaf=lambda part: part is not value)
    return len(parts) == 1 and parts[0] is value


def _name(key: Any) -> str:
    """Return the name of an attribute or a mapping's key, empty for an index in a sequence."""
    return str(getattr(key, "name", getattr(key, "key", "")))


def _as_pytree(value: Any) -> Any:
    """Convert containers that pytree does not know to a dict or list, and objects to their attributes."""
    if isinstance(value, Mapping):  # UserDict, and so Hugging Face's BatchEncoding and BatchFeature
        return dict(value)
    if isinstance(value, (list, tuple)):  # a subclass, which pytree takes for a leaf
        return list(value)
    if isinstance(value, (Tensor, nn.Module, type, ModuleType)):
        return value
    return _declared_fields(value) or getattr(value, "__dict__", value)


def _declared_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or an attrs class, which may have slots and so no ``__dict__``."""
    names = [
        *getattr(type(value), "__dataclass_fields__", ()),
        *(field.name for field in getattr(type(value), "__attrs_attrs__", ())),
    ]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}
