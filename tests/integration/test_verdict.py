"""The verdict on real trainings: live, in loggers, in the archive, and from files by `attn-monitor summary`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from attn_monitor import AttentionMapCallback, HealthLimits, load_snapshots
from attn_monitor.commands import cli
from attn_monitor.commands.support.run_summary import summarise_run
from attn_monitor.player.contents import step_facts
from tests.integration.test_training_features import Crops, Dino, K
from tests.support.events import Events
from tests.support.helpers import trainer


class Soft(Dino):
    """The teacher's answers are too soft to teach anything: all answers become uniform."""

    def targets(self, answers: torch.Tensor) -> torch.Tensor:
        return torch.full_like(answers, 1 / K)


def fit(folder: Path, module: Dino, **options: Any) -> AttentionMapCallback:
    pl.seed_everything(1)
    watch = AttentionMapCallback(every_n_train_steps=4, **options)
    trainer(folder, watch, max_steps=40).fit(module, DataLoader(Crops(), batch_size=8, shuffle=True))
    return watch


def test_uniform_answers_are_diagnosed_by_ln_k(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A DINO run whose loss stands at ln 96 = 4.5643, and everything that says so."""
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="all images get a uniform answer") as warned:
        fit(tmp_path, Soft())
    assert len([w for w in warned if "uniform answer" in str(w.message)]) == 1  # once
    folder = tmp_path / "run" / "version_0"
    snapshots = load_snapshots(folder / "attn_monitor")
    last = snapshots[-1]
    assert last.verdict is not None
    assert last.verdict.state == "complete collapse"
    assert f"= ln {K}, that of a uniform answer" in str(last.verdict)
    assert last.metrics["attn/training/loss"] == pytest.approx(math.log(K), rel=2e-3)
    assert snapshots[1].verdict is not None
    assert snapshots[1].verdict.state == "no verdict yet"
    flags = [flag for snapshot in snapshots for flag in snapshot.flags if flag.kind == "complete_collapse"]
    assert len(flags) == 1
    assert f"verdict: {last.verdict}" in caplog.text
    assert Events(folder).text("attn/health/verdict") == str(last.verdict)
    assert step_facts(last)["verdict"] == last.verdict.as_dict()
    found = summarise_run(folder)
    assert found.health == last.verdict  # from the metrics in the files
    with pytest.raises(SystemExit) as ended:
        cli.main(["summary", str(folder), "--json"])
    assert ended.value.code == 3
    assert json.loads(capsys.readouterr().out)["health"]["state"] == "complete collapse"
    cli.main(["summary", str(folder)])
    assert "Complete collapse since step" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_not_judged_where_that_is_switched_off(tmp_path: Path) -> None:
    fit(tmp_path, Soft(), health=HealthLimits(verdict=False), dirpath=tmp_path / "archive")
    snapshots = load_snapshots(tmp_path / "archive")
    assert all(snapshot.verdict is None for snapshot in snapshots)
    assert not any(flag.role == "training" for snapshot in snapshots for flag in snapshot.flags)
