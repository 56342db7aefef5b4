"""Fixtures that every test gets."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from attn_monitor import messages
from attn_monitor.background import job_queue
from attn_monitor.train import cost
from tests.support import processes

# A slow example is no fault of the code; and what passed does not fail by another draw.
settings.register_profile("shared machine", deadline=None, derandomize=True)
settings.load_profile("shared machine")

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seeded_without_known_warnings() -> Iterator[None]:
    """Lightning's advice on workers and the like is no finding; every other warning fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
        warnings.filterwarnings("ignore", message=".*You defined a `validation_step` but have no `val_dataloader`.*")
        # PyTorch 2.4 and 2.5 ask Lightning before 2.6 for an argument; ours would fail the test.
        warnings.filterwarnings(
            "ignore", message=".*`torch.load` with `weights_only=False`", module="lightning|pytorch_l"
        )
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the state that libraries draw from
        yield


@pytest.fixture(autouse=True)
def _our_warnings_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end no run, not even where warnings are exceptions; here they do."""

    def fail(warning: UserWarning) -> None:
        raise warning

    monkeypatch.setattr(messages, "print_in_place_of", fail)


@pytest.fixture(autouse=True)
def _slow_drawing_is_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine draws late, which is a warning only where a test is about slowness."""
    if request.module.__name__ not in (
        "tests.faults.test_job_queue",
        "tests.faults.test_faults",
        "tests.faults.test_outages",
    ):
        monkeypatch.setattr(job_queue, "WAITING", 10_000)


@pytest.fixture(autouse=True)
def _no_snapshot_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine on which they cost nothing; `test_schedule.py` is about those that do."""
    monkeypatch.setattr(cost, "SHARE", math.inf)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four of the photographs that the scikit-image wheel carries."""
    import shutil

    import skimage.data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        shutil.copy(Path(skimage.data.__file__).parent / name, folder)
    return folder


@pytest.fixture
def free_port() -> int:
    """A loopback port that nothing listens on."""
    return processes.free_port()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for W&B runs that never touch the network."""
    import wandb

    for name, value in {
        "MODE": "offline",
        "SILENT": "true",
        "DIR": str(tmp_path),
        "CACHE_DIR": str(tmp_path / "c"),
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield tmp_path
    if wandb.run is not None:
        wandb.finish()  # of a test that failed
    wandb.teardown()


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """What an earlier test has compiled is forgotten: in a process that compiles, training gets no hooks."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None and any(map(callable, frames.cached_backends.values())):
        torch._dynamo.reset()
