"""MONAI's vision transformer in three dimensions, and one of its shape that needs no MONAI: by value and place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import record_attention
from attn_monitor.errors import QueryError
from tests.hostile.test_more_axes import LIMIT, images_of, off_by, sharp
from tests.support.more_axes import AnyViT, by_einsum
from tests.support.oracle import attention_matrices

SIZE, PATCH, GRID = (16, 16, 24), (8, 4, 8), (2, 4, 3)  # another number of pixels and of patches on each axis


def own(kind: str, positions: str, cls: bool, channels: int) -> nn.Module:
    """Of the same shape: patches by a convolution or cut out, attention by einsums."""
    return AnyViT(SIZE, PATCH, channels=channels, cls=cls, linear=kind == "perceptron", attend=by_einsum)


def monai(kind: str, positions: str, cls: bool, channels: int) -> nn.Module:
    """MONAI's own class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets, width = pytest.importorskip("monai.networks.nets"), 36 if positions == "sincos" else 32
        model: nn.Module = nets.ViT(
            channels, SIZE, PATCH, width, 64, 2, 4, kind, positions, classification=cls, save_attn=width == 36
        )
    return model


@pytest.mark.parametrize(("build", "positions"), [(own, ""), (monai, "learnable"), (monai, "sincos")])
@pytest.mark.parametrize("kind", ["conv", "perceptron"])
@pytest.mark.parametrize(("cls", "channels"), [(True, 1), (False, 4)])
def test_a_volume_by_value_and_place(
    build: Callable[..., nn.Module], kind: str, positions: str, cls: bool, channels: int
) -> None:
    """Patches lie row by row behind the CLS token: the last axis of the volume runs fastest in both ways to cut it."""
    model, images = sharp(build(kind, positions, cls, channels)), images_of((2, channels, *SIZE))
    matrices = attention_matrices(model, images, default_forward)
    assert len(matrices) == 2
    queries: tuple[Any, ...] = ("mean", (1, 2, 1), *(("cls",) if cls else ()))
    for query in queries:
        seen = record_attention(model, images, layers="all", query=query)
        assert [attention.layer for attention in seen] == [0, 1]
        for attention, matrix in zip(seen, matrices, strict=True):
            row: Tensor = matrix.mean(2) if query == "mean" else matrix[:, :, 0 if query == "cls" else cls + 19]
            assert off_by(attention.rows, row) <= LIMIT
            assert (attention.grid, attention.grid.axes) == (GRID, ("d", "h", "w"))
            assert attention.places == "exact"
    if not cls:
        with pytest.raises(QueryError, match='Use query="mean"'):
            record_attention(model, images)
