"""Several callbacks on one trainer: each with tags, charts, archive and checkpoint state of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from attn_monitor import AttentionMapCallback, load_snapshots
from attn_monitor.trackers.naming import prefixed
from tests.support import wandb_runs
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer

RUN = Path("run") / "version_0"


def watch(**arguments: Any) -> AttentionMapCallback:
    return AttentionMapCallback(**{"num_images": 2, "every_n_train_steps": 1, "on_error": "raise", **arguments})


def test_a_name_follows_the_first_part_of_a_tag() -> None:
    assert prefixed("attn/teacher/layer3/entropy", "2") == "attn-2/teacher/layer3/entropy"
    assert prefixed("attn_table", "early") == "attn_table-early"
    assert prefixed("attn_maps/cat", "") == "attn_maps/cat"


@given(st.text("ab/", min_size=1), st.text("ab", min_size=1), st.text("ab", min_size=1))
def test_renaming_keeps_tags_apart(tag: str, one: str, other: str) -> None:
    assert (prefixed(tag, one) == prefixed(tag, other)) == (one == other)
    assert prefixed(tag, one) != tag


def test_tensorboard(tmp_path: Path) -> None:
    curves = {"heads": "curves"}
    callbacks = [
        watch(**curves),
        watch(layers=0, **curves),
        watch(threshold=0.9, name="wide", **curves),
        watch(layers=[0, 1], **curves),
    ]
    running = trainer(tmp_path, *callbacks, max_steps=3)
    running.fit(Distillation(), loader())
    events = Events(tmp_path / RUN)
    archives = {}
    for suffix, layer in (("", 1), ("-2", 0), ("-wide", 1), ("-3", 1)):
        folder = tmp_path / RUN / f"attn_monitor{suffix}"
        archives[suffix] = load_snapshots(folder)
        tag = f"teacher/layer{layer}/entropy"
        logged = events.scalars(f"attn{suffix}/{tag}")
        # The archive has plain tags.
        assert logged == [(s.step, pytest.approx(s.metrics[f"attn/{tag}"])) for s in archives[suffix]]
        assert [step for step, _ in logged] == [0, 1, 2, 3]
        assert float(running.callback_metrics[f"attn{suffix}/{tag}"]) == pytest.approx(logged[-1][1])
        assert len(events.scalars(f"attn_heads{suffix}/{tag}/head3")) == 4
        panel = f"attn_maps{suffix}/image1" + ("/layer0" if suffix == "-3" else "")
        for picture in (panel, panel.replace("attn_maps", "attn_filmstrip")):
            assert [step for step, _ in events.images(picture)] == [0, 1, 2, 3], picture
        assert len(events.encoded(f"attn_timelapse{suffix}")) == 1
        assert f"attn_histogram{suffix}/{tag}" in events.tags["histograms"]
        assert f"attn_maps{suffix}`" in events.text(f"attn_monitor{suffix}/how_to_read")
    areas = [archives[suffix][-1].metrics["attn/teacher/layer1/mask_area"] for suffix in ("", "-wide")]
    assert areas[0] < areas[1]


HEAD_METRICS = (
    "entropy",
    "mask_area",
    "prefix_mass",
    "peak",
    "student_teacher_divergence",
    "mask_agreement",
    "drift",
    "max_logit",
)


def test_charts_of_all_callbacks_are_in_the_one_layout(tmp_path: Path) -> None:
    both = watch(heads="curves"), watch(layers=0, name="early", heads="curves")
    trainer(tmp_path, *both, max_steps=1).fit(Distillation(), loader())
    charts = Events(tmp_path / RUN).charts()
    assert "attn_heads/teacher/layer1/entropy/head.*" in charts["entropy per head"]
    assert "attn_heads-early/teacher/layer0/entropy/head.*" in charts["entropy per head (early)"]
    assert len(charts) == 2 * len(HEAD_METRICS) + 2
    assert "attn-early/(student|teacher)/layer[0-9]+/entropy$" in charts["means (early)"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_wandb(offline: Path) -> None:
    logger = WandbLogger(project="test", save_dir=offline, offline=True)
    trainer(offline, watch(), watch(layers=0), logger=logger, max_steps=2).fit(Distillation(), loader())
    logger.experiment.finish()
    rows = wandb_runs.history(offline)
    for tag in ("attn-2/teacher/layer0/entropy", "attn_maps-2/image0", "attn_overlay-2/image1", "attn_maps/image0"):
        assert [row["trainer/global_step"] for row in rows if tag in row] == [0, 1, 2], tag
    for tag in ("attn_table-2", "attn_timelapse-2", "attn_table", "attn_timelapse"):
        assert sum(tag in row for row in rows) == 1
    assert any("attn_heads_chart-2/teacher/layer0" in key for row in rows for key in row)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming")
def test_each_goes_on_by_itself_after_resuming(tmp_path: Path) -> None:
    def callbacks() -> list[AttentionMapCallback]:
        return [watch(), watch(layers=0), watch(name="wide", threshold=0.9)]

    saved = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=2)
    trainer(tmp_path, *callbacks(), saved, max_steps=2, enable_checkpointing=True).fit(Distillation(), loader())
    again = callbacks()
    trainer(tmp_path, *again, max_steps=4).fit(Distillation(), loader(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    events = Events(tmp_path / RUN)
    for callback, suffix, layer in zip(again, ("", "-2", "-wide"), (1, 0, 1), strict=True):
        steps = [0, 1, 2, 3, 4]
        assert [s.step for s in load_snapshots(tmp_path / RUN / f"attn_monitor{suffix}")] == steps
        assert [step for step, _ in events.scalars(f"attn{suffix}/student/layer{layer}/entropy")] == steps
        assert callback.monitor is not None
        assert [s.step for s in callback.monitor.history] == steps
    assert sorted(p.name for p in (tmp_path / RUN).glob("attn_monitor*")) == [
        "attn_monitor", "attn_monitor-2", "attn_monitor-wide",
    ]  # fmt: skip


def test_a_checkpoint_can_monitor_the_second(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="attn-2/teacher/layer0/entropy", every_n_train_steps=1)
    trainer(tmp_path, watch(), watch(layers=0), best, max_steps=2, enable_checkpointing=True).fit(
        Distillation(), loader()
    )
    entropies = [s.metrics["attn/teacher/layer0/entropy"] for s in load_snapshots(tmp_path / RUN / "attn_monitor-2")]
    assert best.best_model_score is not None
    assert any(torch.isclose(best.best_model_score, torch.tensor(e)) for e in entropies)


@pytest.mark.parametrize("second", [{}, {"threshold": 0.9}, {"probe": torch.randn(2, 3, 32, 32), "num_images": None}])
def test_without_a_difference_that_checkpoints_can_tell_lightning_asks_for_one(
    tmp_path: Path, second: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match="state_key` must be unique"):
        trainer(tmp_path, watch(), watch(**second))
    trainer(tmp_path, watch(), watch(**second, name="other"), max_steps=1).fit(Distillation(), loader())
    assert {"attn", "attn-other"} <= {tag.partition("/")[0] for tag in Events(tmp_path / RUN).tags["scalars"]}


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    running = trainer(tmp_path, watch(name="a"), watch(name="a", layers=0))
    with pytest.raises(ValueError, match="name='a': 2 AttentionMapCallbacks have it"):
        running.fit(Distillation(), loader())


@pytest.mark.parametrize("name", ["", "a/b", "2", "a b"])
def test_names_that_cannot_stand_in_a_tag(name: str) -> None:
    with pytest.raises(ValueError, match=f"name='{name}': expected letters"):
        AttentionMapCallback(name=name)
