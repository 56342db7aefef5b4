"""Inputs that are larger, or named in another way, than any of a usual run: their cost stays small."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from attn_monitor.errors import CheckpointError
from attn_monitor.player import contents
from attn_monitor.player.contents import gather
from attn_monitor.record.archive import snapshot_path
from attn_monitor.weights.loading import load_checkpoint
from attn_monitor.weights.run_checkpoints import Checkpoint, roles_in
from tests.support.helpers import tiny_vit
from tests.support.runs import write_run


def test_names_of_three_thousand_dots(tmp_path: Path) -> None:
    names = ["." * 3000 + f"{number}.weight" for number in range(200)]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "strange.pt")
    started = time.monotonic()
    with pytest.raises(CheckpointError):
        load_checkpoint(tiny_vit(), str(tmp_path / "strange.pt"))
    assert roles_in(Checkpoint(tmp_path, 0, 0, tuple(names)), tiny_vit().state_dict()) == {}
    assert time.monotonic() - started < 20


def test_a_report_reads_no_more_snapshots_than_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snapshot,) = write_run(tmp_path, [0], sharpness=[0])
    for step in range(1, 40):
        type(snapshot)(step, 0, snapshot.names, snapshot.layers, snapshot.metrics).save(snapshot_path(tmp_path, step))
    monkeypatch.setattr(contents, "MAX_STEPS", 10)
    read: list[Path] = []
    real = contents.load_step
    monkeypatch.setattr(contents, "load_step", lambda path: read.append(path) or real(path))  # type: ignore[func-returns-value]
    found = gather(tmp_path, "run", 4_000_000)
    assert [step.facts["step"] for step in found.steps] == [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]
    assert "10 of 40 snapshots, evenly spaced" in found.note
    assert len(read) <= 14  # one tells the slices, three the size of a step
