"""A value of a wrong type is an `ArgumentError` of the constructor, for each argument of the callback and options."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from torch import nn

from attn_monitor import (
    AttentionMapCallback,
    DrawingOptions,
    HealthLimits,
    MetricOptions,
    ProbeOptions,
    Watch,
)
from attn_monitor.errors import ArgumentError

WRONG = (object(), b"bytes", 1.5j, nn.Linear(1, 1), int)  # of no argument's type
ALSO_WRONG: dict[str, tuple[Any, ...]] = {
    "targets": ("backbone", ["student"], {"student": 3}, {3: "x"}, {"student": None}, {}, {"a/b": "x"}),
    "metrics": (3, True, {}),
    "name": (3, True, [], ""),
    "threshold": (True, "x", float("nan")),
    "masks": (3, [], {}),
    "scale": ([], {}),
    "colormap": ([], {}),
    "check_ema": (1, "yes"),
    "snapshots": (True, float("nan")),
}
CLASSES = (AttentionMapCallback, DrawingOptions, HealthLimits, MetricOptions, ProbeOptions)
NAMES = [(cls, name) for cls in CLASSES for name in inspect.signature(cls).parameters]


@pytest.mark.parametrize(("cls", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_type_is_an_argument_error(cls: type, name: str) -> None:
    wrong = [v for v in WRONG if not (name == "forward" and callable(v))]
    for value in (*wrong, *ALSO_WRONG.get(name, ())):
        others = {"probe": "photos"} if name in ("num_images", "image_size") and cls is AttentionMapCallback else {}
        with pytest.raises(ArgumentError, match=f"{name}|probe|mean|metrics"):
            cls(**{name: value}, **others)


@pytest.mark.parametrize("models", [3, {}, [nn.Linear(1, 1)], {"a": 3}, {"a/b": nn.Linear(1, 1)}, {3: nn.Linear(1, 1)}])
def test_models_of_watch_are_checked(models: Any, tmp_path: Any) -> None:
    with pytest.raises(ArgumentError, match="models"):
        Watch(models, folder=tmp_path)


def test_options_have_no_unchecked_field() -> None:
    """The lists above are of all option classes that the callback takes."""
    taken = {type(p.default) for p in inspect.signature(AttentionMapCallback).parameters.values()}
    assert {cls for cls in taken if dataclasses.is_dataclass(cls)} <= set(CLASSES)
