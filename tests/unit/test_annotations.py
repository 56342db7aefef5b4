"""Annotations from which command lines and YAML files make options, whatever the release of jsonargparse."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import Dataset

from attn_monitor import AttentionMapCallback, DrawingOptions, EvaluationOptions, HealthLimits, MetricOptions
from attn_monitor.probe.options import ProbeOptions


def parts(annotation: Any) -> Iterator[Any]:
    """The annotation, and those that it is made of."""
    yield annotation
    for inner in typing.get_args(annotation):
        yield from parts(inner)


OPTIONS = [AttentionMapCallback, ProbeOptions, EvaluationOptions, MetricOptions, DrawingOptions, HealthLimits]


@pytest.mark.parametrize("options", OPTIONS)
def test_no_class_has_parameters(options: type) -> None:
    """jsonargparse 4.42 to 4.50 fails at ``Dataset[Any]`` in a union, as at any class that is no collection."""
    hints = typing.get_type_hints(options.__init__)
    assert hints.keys() >= set(inspect.signature(options).parameters) - {"kwargs"}
    for hint in hints.values():
        for part in parts(hint):
            origin = typing.get_origin(part)
            assert not (isinstance(origin, type) and issubclass(origin, Dataset)), part
