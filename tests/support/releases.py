"""Skip what a release that runs the tests does not have; each reason names the release that brought it."""

from __future__ import annotations

from importlib.metadata import version

import lightning
import pytest
import torch


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


TORCH, LIGHTNING = _numbers(torch.__version__), _numbers(lightning.__version__)
TRANSFORMERS, JSONARGPARSE = _numbers(version("transformers")), _numbers(version("jsonargparse"))
"""Major and minor number, such as (2, 14)."""


def since_torch(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test on older releases of PyTorch."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"{what}, from PyTorch {major}.{minor} on")


def since_lightning(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test on older releases of Lightning."""
    return pytest.mark.skipif((major, minor) > LIGHTNING, reason=f"{what}, from Lightning {major}.{minor} on")
