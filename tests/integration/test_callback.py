"""The callback on real Trainers: what is logged, when, and that training does not notice."""

from __future__ import annotations

import io
import json
import random
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from PIL import Image
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, AttentionSnapshot, ProbeBatch, ProbeOptions, load_snapshots
from attn_monitor.errors import ForwardError, NoAttentionError, ProbeError, QueryError
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

RUN = Path("run") / "version_0"


def archive(folder: Path) -> list[AttentionSnapshot]:
    return load_snapshots(folder / RUN / "attn_monitor")


def test_no_arguments_watch_student_and_teacher(tmp_path: Path) -> None:
    trainer(tmp_path, AttentionMapCallback(), max_steps=6).fit(Distillation(), loader(), loader(8))
    events = Events(tmp_path / RUN)
    steps = [0, 1, 2, 3, 4, 5, 6]
    for role in ("student", "teacher"):
        for metric in ("entropy", "mask_area", "prefix_mass", "peak", "head_divergence"):
            assert [s for s, _ in events.scalars(f"attn/{role}/layer1/{metric}")] == steps
        assert [s for s, _ in events.scalars(f"attn/{role}/layer1/drift")] == steps[1:]
    assert len(events.scalars("attn/student/layer1/student_teacher_divergence")) == len(steps)
    for image in range(4):
        assert [s for s, _ in events.images(f"attn_maps/image{image}")] == steps
        assert [s for s, _ in events.images(f"attn_filmstrip/image{image}")] == [0, 1, 2, 3, 5, 6]
    assert not [tag for tag in events.tags["scalars"] if tag.startswith("attn_heads")]
    for tag in ("attn_maps/image0", "attn_filmstrip/image0"):
        encoded = events.encoded(tag)[0][1]
        assert encoded[:4] + encoded[8:12] == b"RIFFWEBP"
    assert "uniform" in events.text("attn_monitor/how_to_read")
    assert "- threshold: `0.6`" in events.text("attn_monitor/how_to_read")
    assert "custom_scalars__config__" in events.tags["tensors"]


@pytest.mark.slow
def test_the_end_of_a_run_is_a_time_lapse(tmp_path: Path) -> None:
    trainer(tmp_path, AttentionMapCallback(), max_steps=3).fit(Distillation(), loader(), loader(8))
    events = Events(tmp_path / RUN)
    ((step, gif),) = events.encoded("attn_timelapse")
    with Image.open(io.BytesIO(gif)) as animation:
        assert (step, animation.format, animation.n_frames) == (3, "GIF", 4)
    assert "attn_histogram/teacher/layer1/entropy" in events.tags["histograms"]


def test_adopts_the_largest_views_of_multi_crops(tmp_path: Path) -> None:
    class MultiCrop(Distillation):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["crops"][1], batch_idx)

    def collate(images: list[Tensor]) -> dict[str, Any]:
        views = torch.stack(images)
        return {"index": torch.arange(len(images)), "crops": [views[..., :16, :16], views, views.flip(-1)]}

    data = torch.utils.data.DataLoader(loader().dataset, batch_size=4, collate_fn=collate)
    callback = AttentionMapCallback()
    trainer(tmp_path, callback, max_steps=2, limit_val_batches=0).fit(MultiCrop(), data)
    assert callback.monitor is not None
    assert callback.monitor.probe.images.shape == (8, 3, 32, 32)


def reference_rows(model: nn.Module, images: Tensor) -> Tensor:
    """Every head's CLS row of the last block, by timm's own eager attention in float64."""
    import copy

    model = copy.deepcopy(model).double().eval()
    seen: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        model(images.double())
    return seen[0][:, :, 0]


def test_maps_are_what_the_model_computes(tmp_path: Path) -> None:
    """The archived rows of the last step equal eager float64 attention of the finished model."""
    module, callback = Distillation(), AttentionMapCallback()
    trainer(tmp_path, callback).fit(module, loader(), loader(8))
    last = archive(tmp_path)[-1]
    assert last.step == 8
    assert callback.monitor is not None
    assert callback.monitor.previous is not None
    for role, model in (("student", module.student_backbone), ("teacher", module.teacher_backbone)):
        expected = reference_rows(model, callback.monitor.probe.images).float()
        torch.testing.assert_close(callback.monitor.previous.rows(role), expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(last.rows(role), expected, atol=1e-3, rtol=1e-3)  # float16 on disk
        assert last.maps(role).shape == (8, 4, 4, 4)


@pytest.mark.slow
def test_snapshots_see_finished_steps_under_accumulation(tmp_path: Path) -> None:
    """With accumulation, each optimizer step is seen once, with the teacher already updated."""
    seen: dict[int, Tensor] = {}

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.setdefault(trainer.global_step, reference_rows(pl_module.teacher_backbone, loader(8).dataset.images))

    callback = AttentionMapCallback(every_n_train_steps=1)
    trainer(tmp_path, callback, Spy(), max_steps=4, accumulate_grad_batches=2).fit(Distillation(), loader(), loader(8))
    snapshots = {s.step: s for s in archive(tmp_path)}
    assert sorted(snapshots) == [0, 1, 2, 3, 4]
    for step, expected in seen.items():
        torch.testing.assert_close(snapshots[step].rows("teacher"), expected.float(), atol=1e-3, rtol=1e-3)


class Restless(Distillation):
    """Dropout, drop-path, and a random draw of its own in every step: any lost or extra draw shows in the weights."""

    def __init__(self) -> None:
        super().__init__(proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2)
        self.norm = nn.BatchNorm1d(8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        noise = torch.randn_like(batch) * random.random() * np.random.random()  # noqa: NPY002
        self.norm(self.head(self.student_backbone(batch)))
        return super().training_step(batch + 0.1 * noise, batch_idx)


def run_restless(folder: Path, *callbacks: pl.Callback) -> tuple[dict[str, Tensor], Any, Any, Any]:
    pl.seed_everything(7)
    module = Restless()
    module.student_backbone.blocks[0].eval()  # mixed modes must survive
    data = loader(shuffle=True)
    running = trainer(folder, *callbacks, accumulate_grad_batches=2, val_check_interval=2, max_steps=6)
    running.fit(module, data, loader(8))
    optimizer = running.optimizers[0].state_dict()["state"]
    draws = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    return module.state_dict(), optimizer, torch.get_rng_state(), draws


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
def test_training_is_bit_identical(tmp_path: Path) -> None:
    """Weights, buffers, optimizer state and all random states are the same with a snapshot at every step."""
    plain = run_restless(tmp_path / "plain")
    watched = run_restless(tmp_path / "watched", AttentionMapCallback(every_n_train_steps=1, layers="all"))
    assert len(archive(tmp_path / "watched")) == 7
    for name, value in plain[0].items():
        assert torch.equal(value, watched[0][name]), name
    for index, state in plain[1].items():
        for name, value in state.items():
            assert torch.equal(value, watched[1][index][name]), name
    assert torch.equal(plain[2], watched[2])
    assert plain[3] == watched[3]


@pytest.mark.slow
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    module = Distillation()
    trainer(tmp_path, AttentionMapCallback(), max_steps=3).fit(module, loader(), loader(8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not [t for t in threading.enumerate() if "attn_monitor" in t.name]
    assert not list((tmp_path / RUN / "attn_monitor").glob(".writing-*"))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_autocast_cache_enabled()


def test_checkpoints_load_with_weights_only(tmp_path: Path) -> None:
    running = trainer(tmp_path, AttentionMapCallback(), max_steps=2, enable_checkpointing=True)
    running.fit(Distillation(), loader(), loader(8))
    running.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    (ours,) = [v for k, v in state.items() if "AttentionMapCallback" in k]
    torch.testing.assert_close(ProbeBatch.from_state_dict(ours["monitor"]["probe"]).images, loader(8).dataset.images)


@pytest.mark.slow
def test_checkpoint_and_early_stopping_can_monitor_attention(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="attn/teacher/layer1/entropy", every_n_train_steps=1)
    stop = EarlyStopping("attn/student/layer1/entropy", patience=100)
    callback = AttentionMapCallback(every_n_train_steps=1)
    trainer(tmp_path, callback, best, stop, max_steps=4, enable_checkpointing=True).fit(
        Distillation(), loader(), loader(8)
    )
    assert best.best_model_score is not None
    values = {s.metrics["attn/teacher/layer1/entropy"] for s in archive(tmp_path)}
    assert float(best.best_model_score) in [pytest.approx(v) for v in values]


@pytest.mark.parametrize(("epochs", "expected"), [(1, [0, 4, 8, 12]), (2, [0, 8, 12])])
def test_every_n_epochs(tmp_path: Path, epochs: int, expected: list[int]) -> None:
    trainer(tmp_path, AttentionMapCallback(every_n_epochs=epochs), max_steps=-1, max_epochs=3).fit(
        Distillation(), loader(), loader(8)
    )
    assert [s.step for s in archive(tmp_path)] == expected


def test_plain_supervised_module_is_one_backbone(tmp_path: Path) -> None:
    class Supervised(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit(num_classes=4)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.vit(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer(tmp_path, AttentionMapCallback(), max_steps=2).fit(Supervised(), loader())
    assert archive(tmp_path)[-1].roles == ("backbone",)


def test_ground_truth_gives_a_jaccard_curve(tmp_path: Path) -> None:
    masks = torch.zeros(4, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, :16] = True
    masks[:2, 1, 16:, 16:] = True
    probe = ProbeBatch(loader().dataset.images[:4], masks=masks)
    trainer(tmp_path, AttentionMapCallback(probe), max_steps=2).fit(Distillation(), loader())
    curve = Events(tmp_path / RUN).scalars("attn/teacher/layer1/jaccard_best_head")
    assert len(curve) == 3
    assert all(0 < value < 1 for _, value in curve)


def test_a_probe_folder_may_have_a_folder_of_masks(tmp_path: Path, photographs: Path) -> None:
    (tmp_path / "masks").mkdir()
    for file in photographs.iterdir():
        with Image.open(file) as image:
            half = np.zeros((image.height, image.width), np.uint8)
        half[half.shape[0] // 2 :] = 1
        Image.fromarray(half).save(tmp_path / "masks" / f"{file.stem}.png")
    watch = AttentionMapCallback(ProbeOptions(photographs, masks=tmp_path / "masks"), image_size=32)
    trainer(tmp_path, watch, max_steps=1).fit(Distillation(), loader())
    assert watch.monitor is not None
    assert watch.monitor.probe.masks is not None
    assert watch.monitor.probe.masks[:, 0, 16:].all()
    assert not watch.monitor.probe.masks[:, 0, :16].any()
    assert len(Events(tmp_path / RUN).scalars("attn/teacher/layer1/jaccard_best_head")) == 2


def test_validation_batches_without_images_are_passed_over(tmp_path: Path) -> None:
    class Labels(Distillation):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    labels = torch.utils.data.DataLoader(torch.arange(8), batch_size=4)
    trainer(tmp_path, AttentionMapCallback(), max_steps=2).fit(Labels(), loader(), labels)
    assert [s.step for s in archive(tmp_path)] == [0, 1, 2]


@pytest.mark.slow
def test_two_fits_with_one_callback(tmp_path: Path) -> None:
    callback = AttentionMapCallback()
    for name in ("a", "b"):
        trainer(tmp_path / name, callback, max_steps=3).fit(Distillation(), loader())
        assert [s.step for s in archive(tmp_path / name)] == [0, 1, 2, 3]
        assert callback.monitor is not None
        assert [s.step for s in callback.monitor.history] == [0, 1, 2, 3]


@pytest.mark.slow
def test_archives_of_two_runs_are_never_mixed(tmp_path: Path) -> None:
    """Without versions (no logger), a second run gets a folder of its own; so does a second callback."""
    for _ in range(2):
        with pytest.warns(UserWarning, match="no logger"):
            trainer(tmp_path, AttentionMapCallback(), max_steps=2, logger=False).fit(Distillation(), loader())
    assert [len(load_snapshots(tmp_path / f)) for f in ("attn_monitor", "attn_monitor-2")] == [3, 3]
    both = [AttentionMapCallback(layers=0), AttentionMapCallback(layers=1)]
    trainer(tmp_path / "b", *both, max_steps=2).fit(Distillation(), loader())
    layers = [
        load_snapshots(tmp_path / "b" / RUN / f)[0].layers_of("student") for f in ("attn_monitor", "attn_monitor-2")
    ]
    assert layers == [(0,), (1,)]


@pytest.mark.slow
def test_runs_of_unknown_length(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 120

    running = trainer(tmp_path, AttentionMapCallback(), Stop(), max_steps=-1, max_epochs=-1)
    running.fit(Distillation(), loader(4))
    assert [s.step for s in archive(tmp_path)] == [0, 1, 2, 4, 8, 16, 32, 64, 114, 120]


def test_works_without_a_logger(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no logger.*archive"):
        trainer(tmp_path, AttentionMapCallback(), max_steps=2, logger=False).fit(Distillation(), loader())
    assert [s.step for s in load_snapshots(tmp_path / "attn_monitor")] == [0, 1, 2]
    pictures = {p.name for p in (tmp_path / "attn_monitor" / "pictures").iterdir()}
    assert {"attn_maps-image0.jpg", "attn_filmstrip-image3.jpg"} <= pictures


def test_a_run_ends_with_a_report_beside_its_archive(tmp_path: Path) -> None:
    trainer(tmp_path, AttentionMapCallback(num_images=2), max_steps=3).fit(Distillation(), loader(), loader(8))
    page = (tmp_path / RUN / "attn_monitor" / "report.html").read_text()
    manifest = json.loads(page.partition('id="manifest">')[2].partition("</script>")[0])
    (run,) = manifest["runs"]
    assert [step["step"] for step in run["steps"]] == [0, 1, 2, 3]
    assert run["name"] == "run/version_0"


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    class InTheWay(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            (tmp_path / RUN / "attn_monitor" / "report.html").mkdir(exist_ok=True)

    running = trainer(tmp_path, AttentionMapCallback(num_images=2), InTheWay(), max_steps=2)
    with pytest.warns(UserWarning, match="writing the report failed, training goes on") as told:
        running.fit(Distillation(), loader(), loader(8))
    assert sum("report" in str(warning.message) for warning in told) == 1
    assert [s.step for s in archive(tmp_path)] == [0, 1, 2]


class NoTransformer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 8, 8)
        self.trained = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.trained = True
        return self.encoder(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_no_transformer_is_told_before_training(tmp_path: Path) -> None:
    module = NoTransformer()
    with pytest.raises(NoAttentionError, match=r"NoTransformer.*encoder \(Conv2d\).*targets="):
        trainer(tmp_path, AttentionMapCallback(on_error="raise")).fit(module, loader())
    assert not module.trained


def test_wrong_target_names_the_nearest(tmp_path: Path) -> None:
    callback = AttentionMapCallback(targets={"teacher": "ema_backbone"})
    with pytest.raises(ValueError, match=r"targets\['teacher'\]='ema_backbone'.*did you mean '.*_backbone'"):
        trainer(tmp_path, callback).fit(Distillation(), loader())


def test_probe_folder_missing_empty_or_broken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cut.png").write_bytes(b"\x89PNG\r\n")
    for folder, text in (
        ("nowhere", "does not exist"),
        ("empty", "holds no images"),
        ("broken", r"cannot read cut\.png"),
    ):
        with pytest.raises(ProbeError, match=text):
            trainer(tmp_path, AttentionMapCallback(tmp_path / folder)).fit(Distillation(), loader())


def test_size_that_the_model_refuses(tmp_path: Path) -> None:
    module = Distillation(dynamic_img_size=False)
    callback = AttentionMapCallback(torch.randn(2, 3, 40, 40))
    with pytest.raises(ForwardError, match=r"failed on images \(3, 3, 40, 40\).*of a size that the model takes"):
        trainer(tmp_path, callback).fit(module, loader())


def test_a_query_that_the_model_lacks_is_told_and_cls_becomes_the_mean(tmp_path: Path) -> None:
    module = Distillation(class_token=False, global_pool="avg")
    with pytest.raises(QueryError, match="query=77"):
        trainer(tmp_path, AttentionMapCallback(query=77)).fit(module, loader(), loader(8))
    trainer(tmp_path, AttentionMapCallback(), max_steps=1).fit(module, loader(), loader(8))
    assert archive(tmp_path)[-1].maps("student").sum().item() == pytest.approx(32, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"threshold": 0}, "threshold=0"),
        ({"query": "CLS"}, "query='CLS'"),
        ({"every_n_train_steps": 0}, "every_n_train_steps=0"),
        ({"every_n_train_steps": 1, "every_n_epochs": 1}, "only one of them"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"num_images": 0}, "num_images=0"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AttentionMapCallback(**arguments)


def test_failure_in_mid_training_is_one_warning(tmp_path: Path) -> None:
    """A probe forward that starts to fail does not end training, nor the watching of the other role."""

    class Fragile(Distillation):
        def on_train_batch_end(self, *_: Any) -> None:
            super().on_train_batch_end()
            if self.global_step == 3:
                self.student_backbone.blocks[1].attn.register_forward_pre_hook(self.fail)

        def fail(self, module: nn.Module, args: Any) -> None:
            if not module.training:
                raise RuntimeError("deliberate")

    running = trainer(tmp_path, AttentionMapCallback(every_n_train_steps=1), max_steps=8)
    with pytest.warns(UserWarning, match="AttentionMapCallback") as caught:
        running.fit(Fragile(), loader())
    texts = [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]
    assert len(texts) == 2
    assert "taking a snapshot of student failed, training goes on. ForwardError" in texts[0]
    assert texts[1].endswith("this was not done:\n  taking a snapshot of student: steps 3, 4, 5, 6, 7, 8")
    assert running.global_step == 8
    roles = {s.step: s.roles for s in archive(tmp_path)}
    assert roles == {step: ("student", "teacher") if step < 3 else ("teacher",) for step in range(9)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*attention health")  # scattered on purpose
def test_event_file_size(tmp_path: Path, photographs: Path) -> None:
    """8 images, two roles, 12 heads: at most 1 MB for all pictures of a snapshot, strips and charts included."""
    module = Distillation(embed_dim=96, num_heads=12, img_size=224, patch_size=16)
    module.head = nn.Linear(96, 8)
    with torch.no_grad():  # sharp, scattered attention is the largest case for JPEG
        module.student_backbone.blocks[1].attn.qkv.weight.mul_(12)
    probe = ProbeBatch.from_folder(photographs)
    probe = ProbeBatch(torch.cat([probe.images, probe.images.flip(-1)]))
    callback = AttentionMapCallback(probe, every_n_train_steps=1)
    trainer(tmp_path, callback, max_steps=10).fit(module, loader(size=224, batch_size=2))
    events = Events(tmp_path / RUN)
    last = [events.encoded(tag)[-1] for tag in events.tags["images"] if tag != "attn_timelapse"]
    assert len(last) == 17
    assert {step for step, _ in last} == {10}
    assert sum(len(data) for _, data in last) <= 1e6
