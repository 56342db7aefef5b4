"""`Watch` in loops of one's own, and the callback for Hugging Face's `Trainer`: as safe as in Lightning, resumable."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionSnapshot, ProbeBatch, Watch, load_snapshots
from attn_monitor.errors import NoAttentionError
from tests.integration.test_loggers import ForeignWithImages
from tests.support.events import Events
from tests.support.helpers import NoiseImages, loader, tiny_vit


class Wrapper(nn.Module):
    """DINO's MultiCropWrapper: a backbone with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = tiny_vit(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def train(watch: Watch | None, student: Wrapper, teacher: Wrapper, steps: range) -> None:
    """DINO's loop, in small."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in steps:
        if watch is not None:
            watch.step(step)
        images = torch.randn(4, 3, 32, 32)
        loss = (student(images) - teacher(images).detach()).square().mean() + student(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if watch is not None:
        watch.close(steps.stop)


def archive(folder: Path) -> list[AttentionSnapshot]:
    return load_snapshots(folder / "attn_monitor")


def networks() -> dict[str, Wrapper]:
    torch.manual_seed(3)
    return {"student": Wrapper(), "teacher": Wrapper()}


@pytest.mark.slow
def test_three_lines_in_a_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, writer = networks(), SummaryWriter(tmp_path)
    watch = Watch(models, loader(), loggers=[writer], folder=tmp_path, every_n_train_steps=2)
    train(watch, *models.values(), range(5))
    writer.close()
    assert [s.step for s in archive(tmp_path)] == [0, 2, 4, 5]
    assert archive(tmp_path)[0].roles == ("student", "teacher")
    events = Events(tmp_path)
    assert [step for step, _ in events.scalars("attn/teacher/layer1/entropy")] == [0, 2, 4, 5]
    assert len(events.images("attn_maps/image7")) == 4
    assert len(events.encoded("attn_timelapse")) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "student (backbone) and teacher (backbone): VisionTransformer, layer 1 (of layers 0 to 1)" in said.err
    assert "4 snapshots, " in said.err
    assert "health flag" in said.err


def test_training_is_bit_identical(tmp_path: Path) -> None:
    results = []
    for watched in (False, True):
        models = networks()
        torch.manual_seed(1)
        train(Watch(models, loader(), folder=tmp_path) if watched else None, *models.values(), range(3))
        results.append(models["student"].state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_roles_are_found_in_one_module_and_images_in_a_batch(tmp_path: Path) -> None:
    watch = Watch(nn.ModuleDict(networks()), folder=tmp_path)
    snapshot = watch.step(0, batch=[torch.rand(3, 3, 32, 32), torch.zeros(3)])
    assert snapshot is not None
    assert snapshot.roles == ("student", "teacher")
    assert snapshot.maps("student").shape == (3, 4, 4, 4)
    assert [watch.step(step) is not None for step in (1, 2, 3, 4)] == [True, True, False, True]
    watch.close()


class Broken(ForeignWithImages):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("no route to host")


def test_nothing_is_raised_into_the_loop(tmp_path: Path) -> None:
    """A forward that fails once, which costs its role one snapshot, and a logger that always does."""
    models = networks()
    watch = Watch(models, loader(), loggers=[Broken()], folder=tmp_path, every_n_train_steps=1)
    with warnings.catch_warnings(record=True) as caught:  # the logger's failure is told at whichever step it is known
        warnings.simplefilter("always")
        watch.step(0)
        block = models["student"].backbone.blocks[0]
        good = block.forward
        block.forward = lambda x: 1 / 0
        assert watch.step(1).roles == ("teacher",)
        block.forward = good
        assert watch.step(2) is not None
        watch.close()
    told = " ".join(str(w.message) for w in caught)
    assert "taking a snapshot of student failed, training goes on" in told
    assert "division by zero" in told
    assert "no route to host" in told
    assert [s.step for s in archive(tmp_path)] == [0, 1, 2]


def test_a_model_without_attention_is_left_alone(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=2)
    watch = Watch(model, loader(), folder=tmp_path)
    assert watch.step(0) is None  # the first step may build a model
    with pytest.warns(UserWarning, match=r"attention is not watched in this run. ResNet holds no attention"):
        assert watch.step(1) is None
    watch.close(2)
    with pytest.raises(NoAttentionError):
        Watch(model, loader(), folder=tmp_path, on_error="raise").step(0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "expected a place to write to"),
        ({"folder": "x", "on_error": "no"}, "on_error='no'"),
        ({"folder": "s3://bucket/x"}, "folder='s3://bucket/x': expected a local folder"),
        ({"folder": "x", "loggers": "tensorboard"}, "loggers='tensorboard': expected a list"),
        ({"folder": "x", "loggers": NoiseImages}, r"loggers=type\(…\): expected a list"),
        ({"folder": "x", "loggers": [math]}, r"loggers\[0\]=<module 'math'.*: it has no method that takes"),
        ({"folder": "x", "loggers": [None]}, r"loggers\[0\]=None: it has no method that takes"),
        ({"folder": "x", "every_n_train_steps": 0}, "every_n_train_steps=0"),
        ({"folder": "x", "probe": torch.zeros(4, 3, 32, 32), "num_images": 2}, r"num_images=2: probe is a Tensor"),
        ({"folder": "x", "probe": ProbeBatch(torch.zeros(4, 3, 32, 32)), "num_images": 8}, "num_images=8: probe is a"),
        ({"folder": "x", "probe": torch.zeros(4, 3, 32, 32), "image_size": 16}, "image_size=16: probe is a Tensor"),
        ({"folder": "x", "probe": NoiseImages(), "image_size": 16}, "image_size=16: probe is a NoiseImages"),
        ({"folder": "x", "num_images": 0}, "num_images=0: expected a whole number"),
        ({"folder": "x", "probe": {"train": NoiseImages()}}, "probe: received a dict.*a data set or its loader"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Watch(tiny_vit(), **arguments)


def test_processes_other_than_the_first_need_no_logger_and_no_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_monitor.distributed.is_rank_zero", lambda: False)
    for loggers in ([], [None]):
        with Watch(tiny_vit(), "on another machine", loggers=loggers) as watch:
            assert watch.step(0) is None


def test_no_size_is_the_remedy_of_what_is_refused_before_a_forward(tmp_path: Path) -> None:
    model = tiny_vit()
    model.cls_token = nn.Parameter(torch.empty(0))
    model.cls_token.ds_id = 1  # as ZeRO stage 3 leaves it
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    with pytest.warns(UserWarning, match="ZeRO stage 3") as caught, Watch(model, tmp_path, folder=tmp_path) as watch:
        watch.step(0)
    assert not [str(one.message) for one in caught if "image_size" in str(one.message)]


@pytest.mark.slow
def test_a_resumed_loop_goes_on_in_its_archive(tmp_path: Path) -> None:
    """Killed at step 5, resumed from a checkpoint of step 3."""
    models = networks()
    watch = Watch(models, loader(), folder=tmp_path, every_n_train_steps=1)
    for step in range(4):
        watch.step(step)
    torch.save(watch.state_dict(), tmp_path / "watch.pt")
    watch.step(4), watch.step(5)
    watch.close()
    again = Watch(models, folder=tmp_path, every_n_train_steps=1)
    again.load_state_dict(torch.load(tmp_path / "watch.pt", weights_only=True))
    with pytest.warns(UserWarning, match=r"resumed from step 4.*The snapshot of step 5 was moved"):
        again.step(4)
    again.step(5)
    again.close(6)
    assert [s.step for s in archive(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
    assert again.monitor is not None
    assert [s.step for s in again.monitor.history] == [0, 1, 2, 3, 4, 5, 6]
    other = Watch(models, loader(), folder=tmp_path)  # another run in this folder
    other.step(0)
    other.close()
    assert [s.step for s in load_snapshots(tmp_path / "attn_monitor-2")] == [0]


def test_after_the_first_step_a_failure_is_retried_even_without_a_snapshot_so_far(tmp_path: Path) -> None:
    """In a resumed loop the first snapshot comes steps after its start, and then no failure ends the watching."""
    model = tiny_vit()
    watch = Watch(model, torch.randn(2, 3, 32, 32), folder=tmp_path, every_n_train_steps=2)
    watch.step(0)
    state = watch.state_dict()
    watch.close()
    again = Watch(model, folder=tmp_path, every_n_train_steps=2)
    again.load_state_dict(state)
    assert again.step(1) is None
    model.blocks[0].forward = lambda x: 1 / 0
    with pytest.warns(UserWarning, match="taking a snapshot failed, training goes on.*division by zero"):
        assert again.step(2) is None
    del model.blocks[0].forward
    with pytest.warns(UserWarning, match="taking a snapshot works again; missing: step 2"):
        assert again.step(4) is not None
    again.close()
    assert [s.step for s in archive(tmp_path)] == [0, 4]


def test_a_state_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    watch = Watch(tiny_vit(), loader(), folder=tmp_path)
    with pytest.warns(UserWarning, match="reading the state of a checkpoint failed"):
        watch.load_state_dict({"monitor": {"probe": 3}})
    assert watch.step(0) is not None
    watch.close()


class HuggingFaceImages(NoiseImages):
    def __getitem__(self, index: int) -> Any:
        return {"pixel_values": super().__getitem__(index), "labels": index % 2}


def hugging_face(folder: Path, steps: int, *, resume: bool = False, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    from attn_monitor.hugging_face import AttentionMapTrainerCallback

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=ViTForImageClassification(config),
        args=arguments,
        train_dataset=HuggingFaceImages(),
        callbacks=[AttentionMapTrainerCallback(**settings)] if settings.pop("watched", True) else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_hugging_face_trainer_without_an_argument_and_resumed(tmp_path: Path) -> None:
    hugging_face(tmp_path, 3)
    assert [s.step for s in archive(tmp_path)] == [0, 1, 2, 3]
    probe = ProbeBatch.load(tmp_path / "attn_monitor" / "probe.npz")
    assert torch.equal(probe.images, NoiseImages().images[[0, 2, 4, 6, 9, 11, 13, 15]])
    assert probe.caption == "training crop"
    assert (tmp_path / "attn_monitor" / "pictures").is_dir()
    hugging_face(tmp_path, 5, resume=True)
    assert [s.step for s in archive(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert [s.step for s in load_snapshots(tmp_path / "attn_monitor")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_hugging_face_training_is_bit_identical(tmp_path: Path) -> None:
    plain = hugging_face(tmp_path / "a", 3, watched=False).model.state_dict()
    watched = hugging_face(tmp_path / "b", 3).model.state_dict()
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def test_a_data_set_of_ones_own_choice(tmp_path: Path) -> None:
    watch = Watch(tiny_vit(), NoiseImages(100), folder=tmp_path)
    watch.step(0)
    assert watch.monitor is not None
    assert torch.equal(watch.monitor.probe.images, NoiseImages(100).images[[0, 14, 28, 42, 57, 71, 85, 99]])
    assert watch.monitor.probe.caption == "original"
    watch.close()


def test_a_loader_of_a_stream_gives_its_first_batch(tmp_path: Path) -> None:
    from tests.integration.test_adoption import Stream

    watch = Watch(tiny_vit(), DataLoader(Stream(), batch_size=3), folder=tmp_path)
    snapshot = watch.step(0)
    assert snapshot is not None
    assert len(snapshot.names) == 3
    watch.close()


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run-\xff")
    writer = SummaryWriter(str(tmp_path / "events"))
    watch = Watch(tiny_vit(), torch.randn(2, 3, 32, 32), loggers=[writer], folder=folder, every_n_train_steps=1)
    watch.step(0)
    watch.close(1)
    writer.close()
    assert [s.step for s in load_snapshots(folder / "attn_monitor")] == [0, 1]
    assert (folder / "attn_monitor" / "report.html").exists()
