"""A timeline made from checkpoints is the one that the callback recorded."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from attn_monitor import (
    ArchiveError,
    AttentionMapCallback,
    AttentionMonitor,
    AttentionSnapshot,
    DrawingOptions,
    HealthLimits,
    MetricOptions,
    ProbeBatch,
    load_snapshots,
)
from attn_monitor.commands import cli
from attn_monitor.commands.backfill import Backfilled, backfill, backfill_run
from attn_monitor.commands.pick import rank
from attn_monitor.errors import CheckpointError, LayerError, MissingPackageError, ProbeError
from attn_monitor.record.folder_claim import claim_free
from attn_monitor.weights.run_checkpoints import step_in_name
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, tiny_vit, trainer
from tests.support.processes import launch
from tests.support.releases import TORCH

EASILY_RAISED = HealthLimits(peak=0.25, divergence_growth=1.001, divergence_floor=1e-12)
STEPS = [0, 2, 4, 6, 8]


class AveragedInTheStep(Distillation):
    """The teacher follows before each step, so that a checkpoint holds the models that stand between two steps."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        super().on_train_batch_end()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None: ...


class SavedAtTheStart(pl.Callback):
    """A checkpoint of step 0, which ModelCheckpoint does not write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "start.ckpt")


def training(folder: Path) -> None:
    """Train, watched, with a checkpoint every other step, and with attention so sharp that flags are raised."""
    module = AveragedInTheStep()
    with torch.no_grad():
        for backbone in (module.student_backbone, module.teacher_backbone):
            backbone.blocks[-1].attn.qkv.weight.mul_(20)
    checkpoints = folder / "checkpoints"
    callbacks = [
        AttentionMapCallback(
            ProbeBatch(torch.randn(2, 3, 32, 32)),
            every_n_train_steps=2,
            health=EASILY_RAISED,
            features=True,
            metrics=MetricOptions(training=False),  # of training's own forwards there is nothing in checkpoints
        ),
        SavedAtTheStart(checkpoints),
        ModelCheckpoint(checkpoints, every_n_train_steps=2, save_top_k=-1),
    ]
    # One step more, as Lightning counts an epoch more once training has ended.
    trainer(folder, *callbacks, enable_checkpointing=True, max_steps=9).fit(module, loader(count=40))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice, and the health flags that are wanted here
        training(folder)
    return folder


def live(run: Path) -> Path:
    return run / "run" / "version_0"


def recorded(run: Path) -> list[AttentionSnapshot]:
    """What the callback recorded at the steps of checkpoints."""
    return [s for s in load_snapshots(live(run) / "attn_monitor") if s.step in STEPS]


def backfilled(run: Path, out: Path, checkpoints: Path | None = None, **arguments: Any) -> Backfilled:
    probe = ProbeBatch.load(live(run) / "attn_monitor" / "probe.npz")
    monitor = AttentionMonitor(probe, health=EASILY_RAISED, features=True)
    return backfill_run(checkpoints or run / "checkpoints", tiny_vit(), monitor, out, **arguments)


@pytest.mark.slow
def test_it_is_what_the_callback_recorded(run: Path, tmp_path: Path) -> None:
    result = backfilled(run, tmp_path / "out")
    assert result.added == tuple(STEPS)
    assert (result.there, result.left_out) == ((), {})
    again, first = load_snapshots(result.archive), recorded(run)
    assert [s.step for s in again] == [s.step for s in first] == STEPS
    assert sum(len(s.flags) for s in first) >= 2
    for a, b in zip(again, first, strict=True):
        assert (a.names, a.roles, a.epoch, a.flags, a.flags_raised) == (
            b.names, b.roles, b.epoch, b.flags, b.flags_raised
        )  # fmt: skip
        assert a.roles == ("student", "teacher")
        assert a.metrics == b.metrics
        for key, attention in a.layers.items():
            for name in ("rows", "colors", "features"):
                assert torch.equal(getattr(attention, name), getattr(b.layers[key], name)), name
    assert again[-1].metrics["student", 1, "student_teacher_divergence", None] > 0
    assert again[-1].metrics["teacher", 1, "drift", None] > 0
    assert again[-1].metrics["teacher", 1, "dense_separability", None] > 0


def test_checkpoints_are_ranked_as_what_the_callback_recorded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pick", str(run / "checkpoints"), "--model", "tests.support.helpers:tiny_vit", "--json", "--start", "0"]
    cli.main([*words, "--probe", str(live(run) / "attn_monitor" / "probe.npz"), "--out", str(tmp_path / "out")])
    told = json.loads(capsys.readouterr().out)
    expected = rank({s.step: s.metrics for s in recorded(run)})
    assert told["rankings"] == [ranking.as_dict() for ranking in expected if ranking.use == "dense"]
    assert [s["step"] for s in told["rankings"][0]["scores"]] == STEPS


def test_loggers_get_what_they_got_live(run: Path, tmp_path: Path) -> None:
    backfilled(run, tmp_path / "out")
    again, first = Events(tmp_path / "out"), Events(live(run))
    for kind in ("scalars", "images", "histograms"):
        tags = {tag for tag in first.tags[kind] if tag.startswith("attn")}
        assert tags == set(again.tags[kind])
    for tag in again.tags["scalars"]:
        assert again.scalars(tag) == [(step, value) for step, value in first.scalars(tag) if step in STEPS]
    for tag in set(again.tags["images"]) - {"attn_timelapse"}:  # of all steps together
        expected = dict(first.encoded(tag))
        got = {step: picture for step, picture in again.encoded(tag) if step in expected}
        assert got == {step: picture for step, picture in expected.items() if step in STEPS}
        alone = {step for step, _ in again.encoded(tag)} - expected.keys()
        assert alone <= {STEPS[-1]}, "strips of the whole run are logged once more at its end"
    assert set(again.tags["tensors"]) <= set(first.tags["tensors"])


def test_it_is_resumed_and_gaps_are_filled(run: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for name in ("start.ckpt", "epoch=0-step=4.ckpt"):
        shutil.copy(run / "checkpoints" / name, some)
    assert backfilled(run, tmp_path / "out", some).added == (0, 4)
    result = backfilled(run, tmp_path / "out")
    assert (result.added, result.there) == ((2, 6, 8), (0, 4))
    assert backfilled(run, tmp_path / "out").added == ()
    assert len(list((tmp_path / "out").glob("events*"))) == 2, "nothing to do opens no logger"
    for a, b in zip(load_snapshots(result.archive), recorded(run), strict=True):
        for key, value in a.metrics.items():
            if key.metric == "gram_drift":  # of features in float16, which were turned onto others
                assert value == pytest.approx(b.metrics[key], abs=1e-4)
            elif key.metric != "drift":  # the snapshot before was another one
                assert value == b.metrics[key]


def test_flags_are_those_of_a_run_without_a_break(run: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for name in ("start.ckpt", "epoch=0-step=2.ckpt"):
        shutil.copy(run / "checkpoints" / name, some)
    backfilled(run, tmp_path / "out", some)
    result = backfilled(run, tmp_path / "out")
    again, first = load_snapshots(result.archive), recorded(run)
    assert [s.flags for s in again] == [s.flags for s in first]
    before = again[2].metrics["teacher", 1, "drift", None]
    assert before == pytest.approx(first[2].metrics["teacher", 1, "drift", None], abs=1e-4)


def test_a_broken_checkpoint_is_named_and_skipped(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    whole = (folder / "epoch=0-step=6.ckpt").read_bytes()
    (folder / "epoch=0-step=6.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, folder / "another-9.pt")
    shutil.copy(folder / "epoch=0-step=8.ckpt", folder / "last.ckpt")
    probe = str(live(run) / "attn_monitor" / "probe.npz")
    with pytest.raises(ArchiveError, match=r"2 checkpoints are left out: epoch=0-step=6.ckpt, another-9.pt"):
        backfill(
            str(folder),
            model="tests.support.helpers:tiny_vit",
            probe=probe,
            out=str(tmp_path / "out"),
            logger="none",
            features=True,
            gram_step=4,
            drawing=DrawingOptions(scale="minmax"),
        )
    said = capsys.readouterr()
    filled = load_snapshots(tmp_path / "out" / "attn_monitor")
    assert [s.step for s in filled] == [0, 2, 4, 8]
    assert [("student", 1, "gram_drift", None) in s.metrics for s in filled] == [False, False, False, True]
    assert "step-000000008.npz" in said.out
    assert "4 snapshots added" in said.out
    assert "epoch=0-step=6.ckpt: no readable file of weights" in said.err
    assert "another-9.pt: a VisionTransformer was looked for below every name" in said.err
    assert "last.ckpt is of step 8, as is epoch=0-step=8.ckpt, which is taken" in said.err
    assert (tmp_path / "out" / "attn_monitor" / "pictures" / "attn_maps-image0.jpg").exists()


def test_one_role_by_its_key(run: Path, tmp_path: Path) -> None:
    result = backfilled(run, tmp_path / "out", key="state_dict.teacher_backbone", loggers=())
    (first, *_) = load_snapshots(result.archive)
    assert first.roles == ("teacher",)


def test_checkpoints_of_other_roles_are_left_out(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    torch.save({"teacher_backbone": tiny_vit().state_dict(), "global_step": 9}, folder / "late.ckpt")
    result = backfilled(run, tmp_path / "out", folder, loggers=())
    assert result.added == tuple(STEPS)
    (reason,) = result.left_out.values()
    assert reason.endswith("holds weights of teacher, and the checkpoints before it of student, teacher")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"threshold": 0.7}, r"threshold 0\.6 \(now 0\.7\)"),
        ({"layers": "all"}, r"layers -1 \(now 'all'\)"),
        ({"query": (1, 2)}, r"query 'cls' \(now \[1, 2\]\)"),
        ({"metrics": ["entropy"]}, r"metrics \['entropy', .*\] \(now \['entropy'\]\)"),
        ({"key": "teacher"}, r"key None \(now 'teacher'\)"),
        ({"model": tiny_vit(depth=3)}, r"model 'VisionTransformer of 32,224 parameters' \(now 'VisionTransformer of 4"),
        ({"masks": torch.ones(2, 1, 32, 32)}, "is of other images or masks; pass --probe"),
    ],
)
def test_a_repetition_with_other_settings_is_refused(run: Path, tmp_path: Path, change: Any, told: str) -> None:
    """Also where there is no step to add."""
    one, archive = tmp_path / "one", live(run) / "attn_monitor"
    one.mkdir()
    shutil.copy(run / "checkpoints" / "epoch=0-step=4.ckpt", one)
    probe = ProbeBatch.load(archive / "probe.npz")
    backfill_run(one, tiny_vit(), AttentionMonitor(probe), tmp_path / "out", loggers=())
    choice = {name: change.pop(name) for name in ("key", "model", "masks") & change.keys()}
    if "masks" in choice:
        probe = ProbeBatch(probe.images, mean=probe.mean, std=probe.std, masks=choice["masks"])
    monitor, model = AttentionMonitor(probe, **change), choice.get("model", tiny_vit())
    with pytest.raises(ArchiveError, match=told):
        backfill_run(one, model, monitor, tmp_path / "out", key=choice.get("key"), loggers=())


def test_what_is_added_to_a_live_archive_is_like_it(run: Path, tmp_path: Path) -> None:
    """Which settings it had is told by its snapshots, as far as they do."""
    shutil.copytree(live(run) / "attn_monitor", tmp_path / "attn_monitor")
    (tmp_path / "attn_monitor" / "step-000000000.npz").unlink()
    told: list[str] = []
    probe = ProbeBatch.load(tmp_path / "attn_monitor" / "probe.npz")
    with pytest.raises(ArchiveError, match=r"holds student, layer 1: .* would add student, layer 0: 4 heads, grid"):
        backfill_run(run / "checkpoints", tiny_vit(), AttentionMonitor(probe, layers=0), tmp_path, notify=told.append)
    assert "neither threshold nor metrics" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["attn_monitor"], "no logger was opened"
    assert backfilled(run, tmp_path, loggers=()).added == (0,)


def test_a_failure_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    probe = ProbeBatch.load(live(run) / "attn_monitor" / "probe.npz")
    monitor = AttentionMonitor(probe, layers=7)
    with pytest.raises(LayerError):
        backfill_run(run / "checkpoints", tiny_vit(), monitor, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_size_than_the_probe(run: Path, tmp_path: Path, photographs: Path) -> None:
    """It is refused, and what the error advises works."""
    torch.save({"model": fixed_vit().state_dict()}, tmp_path / "1.pt")
    model = "tests.integration.test_backfill:fixed_vit"
    probe = str(live(run) / "attn_monitor" / "probe.npz")
    told = r"probe\.npz: its images have 32 × 32 pixels, and the model refuses these and takes 64 × 64\. Pass a folder"
    with pytest.raises(ProbeError, match=told):
        backfill(str(tmp_path / "1.pt"), model=model, probe=probe, out=str(tmp_path / "out"), logger="none")
    backfill(str(tmp_path / "1.pt"), model=model, probe=str(photographs), out=str(tmp_path / "out"), logger="none")
    assert ProbeBatch.load(tmp_path / "out" / "attn_monitor" / "probe.npz").images.shape[-2:] == (64, 64)
    smaller = f"{model}(img_size=32)"
    torch.save({"model": fixed_vit(img_size=32).state_dict()}, tmp_path / "1.pt")
    backfill(str(tmp_path / "1.pt"), model=smaller, probe=probe, out=str(tmp_path / "smaller"), logger="none")


def fixed_vit(**changes: Any) -> nn.Module:
    """A model that takes images of 64 × 64 pixels alone, or of another size."""
    return tiny_vit(**{"dynamic_img_size": False, "img_size": 64, **changes})


def test_options_of_checkpoints_are_passed_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"model": tiny_vit().state_dict()}, folder / "1.pt")
    torch.save({"model": tiny_vit(depth=1).state_dict()}, folder / "2.pt")
    torch.save({"model": tiny_vit().state_dict(), "code": Path("/").exists}, folder / "3.pt")
    images, out = str(live(run) / "attn_monitor" / "probe.npz"), str(tmp_path / "out")
    words = [
        "backfill",
        str(folder),
        "--model",
        "tests.support.helpers:tiny_vit",
        "--probe",
        images,
        "--logger",
        "none",
    ]
    with pytest.raises(SystemExit, match=r"2 checkpoints are left out: 3\.pt, 2\.pt"):
        cli.main([*words, "--out", out])
    reason = "unpickling it would call builtins.getattr" if TORCH >= (2, 6) else "it holds objects beside tensors"
    assert reason in capsys.readouterr().err
    cli.main([*words, "--out", out, "--trust", "--allow-missing"])
    assert len(load_snapshots(tmp_path / "out" / "attn_monitor")) == 3


def test_an_unreadable_image_among_others_is_left_out_and_named(run: Path, photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path / "images")
    (tmp_path / "images" / "aaa.png").write_text("no image")
    words = ["backfill", str(run / "checkpoints"), "--model", "tests.support.helpers:tiny_vit", "--logger", "none"]
    with pytest.raises(SystemExit, match=r"1 image is left out that cannot be read: aaa\.png \("):
        cli.main([*words, "--probe", str(tmp_path / "images"), "--size", "32", "--out", str(tmp_path / "out")])
    snapshots = load_snapshots(tmp_path / "out" / "attn_monitor")
    assert [len(snapshot.names) for snapshot in snapshots] == [4] * len(STEPS)


@pytest.mark.slow
def test_sharded_checkpoints_of_lightning(tmp_path: Path) -> None:
    launch("tests.support.sharded_work:saved_in_shards", tmp_path, processes=1)
    assert (tmp_path / "checkpoints" / "epoch=0-step=2.ckpt" / ".metadata").exists()
    result = backfilled(tmp_path, tmp_path / "out", loggers=())
    assert result.added == (2, 4)
    rows = {s.step: s.rows("student") for s in load_snapshots(live(tmp_path) / "attn_monitor")}
    for snapshot in load_snapshots(result.archive):
        assert snapshot.roles == ("student", "teacher")
        np.testing.assert_allclose(snapshot.rows("student"), rows[snapshot.step], atol=1e-3)


def test_a_snapshot_that_is_damaged_is_made_again(run: Path, tmp_path: Path) -> None:
    whole = backfilled(run, tmp_path / "out", loggers=())
    path = whole.archive / "step-000000008.npz"
    before = load_snapshots(whole.archive)[-1]
    path.write_bytes(path.read_bytes()[:700])
    again = backfilled(run, tmp_path / "out", loggers=())
    assert again.added == (8,)
    # Drift is from the snapshot before, which is read again as it is stored, in float16.
    assert load_snapshots(whole.archive)[-1].metrics == pytest.approx(before.metrics, rel=1e-2, abs=1e-5)


def test_plain_weights_with_a_number(run: Path, tmp_path: Path) -> None:
    for number in (5, 30):
        torch.save(tiny_vit().state_dict(), tmp_path / f"checkpoint{number:04d}.pth")
    (tmp_path / "checkpoint-500").mkdir()
    save_file(tiny_vit().state_dict(), tmp_path / "checkpoint-500" / "model.safetensors")
    result = backfilled(run, tmp_path / "out", tmp_path, loggers=())
    assert result.added == (5, 30, 500)
    assert load_snapshots(result.archive)[0].roles == ("backbone",)


def test_the_archive_of_others_is_left_alone(run: Path, tmp_path: Path) -> None:
    claim = claim_free(tmp_path, "attn_monitor")
    with pytest.raises(ArchiveError, match=r"attn_monitor: this process writes here\. Wait for its end"):
        backfilled(run, tmp_path)
    claim.release()
    ProbeBatch(torch.randn(2, 3, 32, 32)).save(tmp_path / "attn_monitor" / "probe.npz")
    with pytest.raises(ArchiveError, match="is of other images or masks; pass --probe"):
        backfilled(run, tmp_path)


@pytest.mark.parametrize(
    ("name", "step"),
    [("epoch=3-step=1200.ckpt", 1200), ("checkpoint0040.pth", 40), ("model_0012500.rank_0.pth", 12500)],
)
def test_steps_in_names(name: str, step: int) -> None:
    assert step_in_name(Path(name)) == step
    assert step_in_name(Path("checkpoint-500") / "pytorch_model.bin") == 500
    with pytest.raises(CheckpointError, match=r"best\.ckpt: the step at which it was saved is not known"):
        step_in_name(Path("best.ckpt"))


class SavedAfter(pl.Callback):
    """Checkpoints after some batches, where ModelCheckpoint warns of manual optimization."""

    def __init__(self, folder: Path, batches: tuple[int, ...]) -> None:
        self.folder, self.batches = folder, batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx in self.batches:
            trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


class BothOptimize(AveragedInTheStep):
    """Two optimizers by hand: Lightning's global_step counts both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.student_backbone, self.head)]


def test_steps_are_those_of_loggers_with_two_optimizers(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    callbacks = [
        AttentionMapCallback(ProbeBatch(torch.randn(2, 3, 32, 32)), every_n_train_steps=2),
        SavedAfter(checkpoints, batches=(1, 3)),
    ]
    trainer(tmp_path, *callbacks).fit(BothOptimize(), loader(count=40))
    result = backfilled(tmp_path, tmp_path / "out", loggers=())
    assert result.added == (2, 4)
    rows = {s.step: s.rows("teacher") for s in load_snapshots(live(tmp_path) / "attn_monitor")}
    for snapshot in load_snapshots(result.archive):
        assert np.array_equal(snapshot.rows("teacher"), rows[snapshot.step])


@pytest.mark.slow
def test_weights_and_biases(run: Path, tmp_path: Path, offline: Path) -> None:
    result = backfilled(run, tmp_path / "out", loggers="wandb")
    assert len(result.added) == 5
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert list(folder.glob("files/media/images/attn_maps/*.jpg"))


def test_without_weights_and_biases_the_extra_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"logger='wandb' needs wandb, .*attn_monitor\[wandb\]"):
        backfilled(run, tmp_path / "out", loggers="wandb")
    assert not (tmp_path / "out").exists()
