"""Compare and refill the containers, generators and objects that a model holds."""

from __future__ import annotations

import operator
import pickle
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONTAINERS = (OrderedDict, dict, list, set, deque)


def slots_of(cls: type) -> Iterator[str]:
    """Yield the names of a class's own slots."""
    slots = vars(cls).get("__slots__", ())
    for slot in (slots,) if isinstance(slots, str) else slots:
        if slot not in ("__dict__", "__weakref__"):
            yield slot


def same_items(now: Any, before: Any) -> bool:
    """Return whether two containers hold the same objects in the same order, under the same keys."""
    if len(now) != len(before) or not all(map(operator.is_, now, before)):
        return False
    return not isinstance(now, dict) or all(map(operator.is_, now.values(), before.values()))


def refill(container: Any, items: Any) -> None:
    """Clear and refill a container, which restores the order too.

    It calls the built-in type's methods because a subclass may forbid its own, as Transformers' ModelOutput does.
    """
    builtin: Any = next(base for base in CONTAINERS if isinstance(container, base))
    builtin.clear(container)
    if issubclass(builtin, dict):
        for key, item in items.items():
            builtin.__setitem__(container, key, item)
    else:
        (builtin.update if builtin is set else builtin.extend)(container, items)


def generator_state(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return the functions that get and set the state of a random generator."""
    if isinstance(generator, np.random.Generator):
        bits: Any = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    return generator.get_state, generator.set_state


def equal(a: Any, b: Any) -> bool:
    """Return whether two states of a random generator are equal."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple):
        return all(map(equal, a, b))
    return bool(a == b)


def at_a_glance(attributes: dict[str, Any]) -> list[Any]:
    """Return which objects are under which names, and the lengths of containers."""
    return [(name, id(v), len(v) if isinstance(v, CONTAINERS) else 0) for name, v in attributes.items()]


def outward_state(value: Any) -> Any:
    """Return the visible state of a cache, queue or file, else the object's pickled bytes; None if there is neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pickling an iterator is deprecated from Python 3.12 on
        for look in ("cache_info", "qsize", "tell"):
            with suppress(Exception):
                return getattr(value, look)()
        with suppress(Exception):
            return pickle.dumps(value)
    return None
