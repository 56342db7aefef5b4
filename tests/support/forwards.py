"""Ways to call a model, named by import paths in tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CALLS: list[tuple[int, ...]] = []


def with_flag(model: nn.Module, images: Tensor) -> Any:
    """For a model that wants to be told."""
    CALLS.append(tuple(images.shape))
    return model(images, told=True)
