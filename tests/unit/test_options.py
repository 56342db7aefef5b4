"""`ProbeOptions` and `MetricOptions` refuse what is wrong as soon as they are made, and are never changed."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from attn_monitor import DrawingOptions, HealthLimits, MetricOptions, ProbeBatch, ProbeOptions
from attn_monitor.train.probe_search import probe_from_images

TENSOR = torch.zeros(4, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "argument", "remedy"),
    [
        ({"masks": "m"}, "masks='m': probe is None", "expected the folder"),
        ({"masks": "m", "images": TENSOR}, "masks='m': probe is a Tensor", "expected the folder"),
        ({"num_images": 4, "images": TENSOR}, "num_images=4: probe is a Tensor", "probe[:4]"),
        ({"num_images": 0}, "num_images=0", "at least 1"),
        ({"num_images": True}, "num_images=True", "at least 1"),
        ({"image_size": 64, "images": ProbeBatch(TENSOR)}, "image_size=64: probe is a ProbeBatch", "Leave image_size"),
        ({"image_size": 64}, "image_size=64: probe is None", "Leave image_size"),
        ({"image_size": [1, 2, 3, 4], "images": "x"}, "image_size=[1, 2, 3, 4]", "(height, width)"),
        ({"mean": [0.5]}, "mean=[0.5], std=None", "expected both"),
        ({"mean": [0.5], "std": [0]}, "std=[0]", "no std of 0"),
        ({"mean": [0, 0, 0], "std": [1, 1, 1], "images": ProbeBatch(TENSOR)}, "mean=", "of its own"),
        ({"images": 7}, "probe: received a int", "expected a folder"),
        ({"images": {"a": 1}}, "probe: received a dict", "expected a folder"),
    ],
)
def test_images_that_cannot_be_watched(options: dict[str, Any], argument: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(argument)}.*{re.escape(remedy)}"):
        ProbeOptions(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"names": "entropie"}, "metrics: received 'entropie'.*did you mean 'entropy'"),
        ({"names": ["entropy", "x"]}, "metrics: received 'x'"),
        ({"gram_step": -1}, "gram_step=-1: expected a step of at least 0"),
        ({"gram_step": 1.0}, r"gram_step=1\.0"),
        ({"verify": "alway"}, "verify='alway': expected True"),
        ({"verify": None}, "verify=None"),
    ],
)
def test_metrics_that_cannot_be_measured(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MetricOptions(**options)


def test_limits_are_numbers() -> None:
    wrong: Any = "high"
    with pytest.raises(ValueError, match="health: peak='high'; expected a number"):
        HealthLimits(peak=wrong)


@pytest.mark.parametrize("value", [ProbeOptions("x"), MetricOptions(["entropy"]), DrawingOptions(), HealthLimits()])
def test_options_cannot_be_changed(value: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)
    for other in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert vars(other) == vars(value)


def test_shortcuts_replace_values_of_a_group() -> None:
    given = ProbeOptions("folder", num_images=3, image_size=96)
    assert vars(ProbeOptions.of(given, num_images=5, image_size=None)) == vars(ProbeOptions("folder", 5, 96))
    assert vars(ProbeOptions.of("folder", num_images=3, image_size=96)) == vars(given)


def test_data_are_read_later() -> None:
    loader = DataLoader(TENSOR)  # type: ignore[arg-type]
    assert ProbeOptions(loader).data is loader
    assert ProbeOptions(loader).load() is None
    assert ProbeOptions("folder").data is None
    loaded = ProbeOptions(TENSOR, mean=(0, 0, 0), std=(1, 1, 1)).load()
    assert loaded is not None
    assert loaded.mean == (0, 0, 0)


@pytest.mark.parametrize(("axes", "shape"), [("dchw", (4, 3, 8, 8)), ("cthw", (3, 5, 8, 8)), ("hwct", (8, 8, 3, 5))])
def test_named_axes_of_images_that_were_found_in_data(axes: str, shape: tuple[int, ...]) -> None:
    """The axes are read alike by the recorder (`axes`) and by pictures and captions (`image_axes`)."""
    found = probe_from_images(torch.rand(2, *shape))
    probe = ProbeOptions(axes=axes).with_statistics(found)
    assert "".join(probe.image_axes.names) == probe.axes == axes
    channels, spatial = axes.index("c"), [size for size, name in zip(shape, axes, strict=True) if name != "c"]
    assert probe.channels_first.shape == (2, shape[channels], *spatial)
    assert len(probe.mean) == len(probe.std) == shape[channels]
    assert found.axes is None
