"""The images are found in batches of every container, and of several the right ones."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from attn_monitor import ProbeError
from attn_monitor.train.batch_images import describe_batch, find_images
from attn_monitor.train.probe_search import probe_from_batch

IMAGES, LARGER = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
LABELS = torch.zeros(2, dtype=torch.long)


@dataclass
class Sample:
    mask: Tensor
    image: Any


@dataclass(frozen=True, slots=True)
class Slotted:
    mask: Tensor
    image: Any


class Named(NamedTuple):
    mask: Tensor
    image: Any


Old = namedtuple("Old", ["mask", "image"])


class Plain:
    """As in PyTorch's own documentation of `pin_memory`."""

    def __init__(self, mask: Tensor, image: Any) -> None:
        self.mask, self.image, self.owner = mask, image, self


class Tuple(tuple[Any, ...]):
    """A class of its own that pytree does not know."""


class Nameless:
    """Registered with pytree without names."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


pytree.register_pytree_node(Nameless, lambda n: (list(n.parts), None), lambda parts, _: Nameless(*parts))


def by_name(container: Any) -> Any:
    """Makes one that holds larger images, which no name says to be images, before the others."""
    return lambda images: container(mask=LARGER, image=images)


NAMED = {
    "dict": by_name(dict),
    "OrderedDict": by_name(OrderedDict),
    "defaultdict": lambda images: defaultdict(list, mask=LARGER, image=images),
    "UserDict": by_name(UserDict),
    "dataclass": by_name(Sample),
    "dataclass with slots": by_name(Slotted),
    "NamedTuple": by_name(Named),
    "namedtuple": by_name(Old),
    "plain object": by_name(Plain),
}
UNNAMED = {
    "list": lambda images: [LABELS, images],
    "tuple": lambda images: (LABELS, images),
    "deque": lambda images: deque([LABELS, images]),
    "tuple of its own class": lambda images: Tuple([LABELS, images]),
    "registered without names": lambda images: Nameless(LABELS, images),
}


@pytest.mark.parametrize("outer", [*NAMED, *UNNAMED])
@pytest.mark.parametrize("inner", ["", *NAMED, *UNNAMED])
def test_every_container_in_every_other(outer: str, inner: str) -> None:
    makers = {**NAMED, **UNNAMED}
    images = makers[inner](IMAGES) if inner else IMAGES
    assert find_images(makers[outer](images)) is IMAGES


def test_hugging_face_containers() -> None:
    transformers = pytest.importorskip("transformers")
    for container in (transformers.BatchEncoding, transformers.BatchFeature):
        assert find_images(container({"mask": LARGER, "pixel_values": IMAGES})) is IMAGES
        assert find_images([LABELS, {"inputs": container({"pixel_values": IMAGES})}]) is IMAGES


@pytest.mark.parametrize("slots", [False, True])
def test_attrs_classes(slots: bool) -> None:
    attrs = pytest.importorskip("attrs")
    sample = attrs.make_class("Sample", ["mask", "image"], slots=slots)
    assert find_images([LABELS, sample(LARGER, IMAGES)]) is IMAGES


def test_of_several_crops_the_largest() -> None:
    assert find_images([IMAGES, IMAGES.clone(), LARGER, LARGER.clone()]) is LARGER
    assert find_images({"views": [IMAGES, LARGER]}) is LARGER
    assert find_images({"local_crops": [IMAGES], "global_crops": [LARGER]}) is LARGER
    assert find_images({"local_crops": [LARGER], "global_crops": [IMAGES]}) is IMAGES


def test_names_are_compared_within_one_container() -> None:
    """A target's name, in which there is an "x", does not come before the images beside it."""
    assert find_images((IMAGES, {"box_masks": IMAGES.clone()})) is IMAGES
    assert find_images({"a": {"image": IMAGES}, "b": LARGER}) is LARGER


def test_objects_that_refer_to_each_other_are_searched_once() -> None:
    """Thirty levels, each with two references to the one below: a billion ways down."""
    below: Any = Plain(LABELS, LABELS)
    for _ in range(30):
        below = Plain(below, below)
    assert find_images(below) is None
    assert find_images([below, IMAGES]) is IMAGES
    assert find_images({"mask": [LARGER], "more": (views := [IMAGES]), "views": views}) is IMAGES


def test_what_is_no_image() -> None:
    parts = [LABELS, "text", None, 3, IMAGES.byte(), IMAGES[0], torch.rand(2, 64, 3, 3), torch.nn.Conv2d(3, 3, 3)]
    assert find_images(parts) is None
    assert find_images({"image": Tensor, "view": torch, "x": find_images}) is None
    assert find_images([]) is None


def test_a_batch_without_images_is_described() -> None:
    assert describe_batch(LABELS) == "a tensor (2,) torch.int64"
    assert describe_batch({"label": LABELS, "more": [LABELS, "text"]}) == (
        "{label: a tensor (2,) torch.int64, more: [a tensor (2,) torch.int64, str]}"
    )
    assert describe_batch(UserDict(label=3)) == "{label: int}"
    assert describe_batch(Sample(LABELS, None)) == "Sample"
    with pytest.raises(ProbeError, match=r"received \[a tensor \(2,\) torch.int64, str\]. Pass probe="):
        probe_from_batch([LABELS, "text"], 4)
