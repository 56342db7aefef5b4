"""Two processes ask a model again together, also where only one of them sees a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import launch
from tests.support.releases import since_torch

pytestmark = [pytest.mark.slow, since_torch(2, 6, "torch.distributed.fsdp holds FSDP2")]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("places")
    return launch("tests.support.places_work:differing", folder, processes=2)


@pytest.mark.parametrize(
    ("way", "found", "flags"),
    [
        ("one process", [0, 3], []),
        ("both", [0, 3], []),
        ("learned", [0, 4], ["order"]),  # a check is due before the fifth snapshot
        ("sharded", [0, 3], []),
    ],
)
def test_processes_ask_again_together(seen: list[dict[str, Any]], way: str, found: list[int], flags: list[str]) -> None:
    for process in seen:
        assert process[way]["found"] == found
        assert process[way]["flags"] == flags
        maps = process[way]["maps"]
        late = [step for step in range(6) if not torch.allclose(maps[step], maps[0], atol=1e-4)]
        assert late == ([3] if way == "learned" else [])  # the truth is one picture: only the order changes
        assert all(torch.equal(a, b) for a, b in zip(maps, seen[0][way]["maps"], strict=True))
