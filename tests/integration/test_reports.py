"""What a run says of itself: what it found, at the start and in the dashboard; what it cost; warnings without code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from attn_monitor import AttentionMapCallback, AttentionSnapshot
from attn_monitor.train import cost
from attn_monitor.train.schedule import Schedule
from tests.hostile.test_masking import Pretraining, hugging_face_mae
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer

ARCHIVE = Path("run", "version_0", "attn_monitor")


def said(caplog: pytest.LogCaptureFixture, start: str = "") -> list[str]:
    lines = [r.message.removeprefix("AttentionMapCallback: ") for r in caplog.records if "AttentionMap" in r.message]
    return [line for line in lines if line.startswith(start)]


def test_what_was_found_is_three_lines_and_in_the_dashboard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "FREE", float("inf"))  # on a busy machine too, no snapshot is put off
    with caplog.at_level("INFO"):
        trainer(tmp_path, AttentionMapCallback()).fit(Distillation(), loader(), loader(8))
    (found,) = said(caplog, "watching")
    models, images, when = found.split("\n  ")
    assert models == (
        "watching student (student_backbone) and teacher (teacher_backbone): VisionTransformer, layer 1 "
        "(of layers 0 to 1), 4 heads, grid 4 × 4"
    )
    assert images == "on 8 validation images of 32 × 32"
    assert re.match(
        r"a snapshot every step, about [0-9.]+ m?s each, and fewer where they would take more than 1 s and 5% of", when
    )
    where, _, size = when.rpartition(", about ")
    assert where.endswith(f"; archive in {tmp_path / ARCHIVE}")
    number, unit, *more = size.split()
    written = sum(file.stat().st_size for file in (tmp_path / ARCHIVE).glob("*.npz"))
    assert float(number) * {"KB": 1e3, "MB": 1e6}[unit] == pytest.approx(written, rel=0.25)
    assert more == ["in", "all,", "without", "the", "report"]
    text = Events(tmp_path / "run" / "version_0").text("attn_monitor/how_to_read")
    assert found in text
    assert "images are normalised by: `an unknown normalisation" in text


def test_the_last_line_names_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, AttentionMapCallback(), max_steps=2).fit(Distillation(), loader(), loader(8))
    report = tmp_path / ARCHIVE / "report.html"
    assert said(caplog)[-1] == f"open {report} to see this run"
    assert report.exists()


@pytest.mark.slow
def test_without_a_report_the_last_line_names_the_archive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Blocked(AttentionMapCallback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            (tmp_path / ARCHIVE / "report.html").mkdir()

    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="writing the report"):
        trainer(tmp_path, Blocked(), max_steps=2).fit(Distillation(), loader(), loader(8))
    assert said(caplog)[-1] == f"archive in {tmp_path / ARCHIVE}"


def test_the_first_look_is_kept_apart_from_the_snapshots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe = torch.randn(2, 3, 32, 32)
    with caplog.at_level("INFO"):
        trainer(tmp_path, AttentionMapCallback(probe), max_steps=2).fit(Distillation(), loader(), loader(8))
    (line,) = said(caplog, "3 snapshots, ")
    assert " s for the first look, " in line
    assert "on 2 given images of 32 × 32" in said(caplog, "watching")[0]


@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_epochs": 90, "max_steps": 7}])
def test_a_run_by_epochs_announces_its_snapshots_and_spreads_their_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: dict[str, int]
) -> None:
    callback = AttentionMapCallback(torch.randn(2, 3, 32, 32), every_n_epochs=1, keep_pictures=2)
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback, limit_train_batches=2, **limit).fit(Distillation(), loader(8))
    (found,) = said(caplog, "watching")
    steps = [step for step, _ in Events(tmp_path / "run" / "version_0").images("attn_maps/image0")]
    last = min(limit.get("max_steps", 8), 8)
    assert steps == [0, 6, last]  # of five snapshots every third, and the last
    assert re.search(r"every epoch, about \S+ m?s each, \S+ m?s in all; .* in all, without the report$", found)


def test_an_archive_that_could_not_be_made_is_not_named_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    callback = AttentionMapCallback(dirpath=tmp_path / "file" / "archive")
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="writing the archive") as warned:
        trainer(tmp_path, callback, max_steps=1).fit(Distillation(), loader(), loader(8))
    assert "this was not done:\n  writing the archive: steps 0, 1" in str(warned[-1].message)
    assert said(caplog)[-1].startswith("verdict: ")


@pytest.mark.slow
def test_what_had_to_be_done_differently_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, AttentionMapCallback(), max_steps=2).fit(Pretraining(hugging_face_mae()), loader())
        both = Distillation(class_token=False, global_pool="avg")
        trainer(tmp_path / "b", AttentionMapCallback(), max_steps=2).fit(both, loader())
    (line,) = said(caplog, "watching backbone (backbone.vit): ViTMAEModel")
    assert line.count("it masks patches at random, and is looked at with all of them") == 1
    (line,) = said(caplog, "watching student")
    assert line.count("it has no CLS token, so maps show the attention that patches receive") == 1
    stored = AttentionSnapshot.load(next((tmp_path / "b").rglob("step-*.npz"))).layer("student")
    assert (stored.model, stored.query) == ("VisionTransformer", "mean")


def test_how_often_is_told_in_words() -> None:
    schedule = Schedule()
    schedule.start(1000)
    assert (str(schedule), schedule.count()) == ("every 20 steps", 51)
    assert str(Schedule(every_n_epochs=1)) == "every epoch"
    schedule.start(float("inf"))
    assert str(schedule) == "at ever wider distances, as the length of the run is not known"
    assert schedule.count() is None


def test_the_share_of_time_is_that_of_the_run_before_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost.time, "perf_counter", lambda: 110.0)
    monkeypatch.setattr(cost, "SHARE", 0.05)
    spent = cost.Cost(snapshots=2, blocked=2.0, started=100.0)
    assert "2 snapshots, 2.0 s on the training thread (40.0% of 5.0 s)" in spent.text(waited=5.0, behind=0.0)
    spent.postponed = 1
    assert ", spread to take 1 s and 5% of the loop beside the first and the last" in spent.text(waited=0.0, behind=0.0)


def test_warnings_show_no_source_line(tmp_path: Path) -> None:
    code = "from attn_monitor.messages import warn; warn('AttentionMapCallback: something')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "attn_monitor:0: UserWarning: AttentionMapCallback: something\n"
