"""Skip what a release that runs the tests does not have; each reason names the release that brought it."""

from __future__ import annotations

import lightning
import pytest
import torch


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


TORCH, LIGHTNING = _numbers(torch.__version__), _numbers(lightning.__version__)
"""Major and minor number, such as (2, 14)."""


def since_torch(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test on older releases of PyTorch."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"{what}, from PyTorch {major}.{minor} on")


def since_lightning(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test on older releases of Lightning."""
    return pytest.mark.skipif((major, minor) > LIGHTNING, reason=f"{what}, from Lightning {major}.{minor} on")
