"""Each fault injected for real: training ends normally with one clear warning, and the rest is still monitored."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from attn_monitor import AttentionMapCallback, AttentionSnapshot, load_snapshots
from attn_monitor.background import job_queue
from attn_monitor.draw import canvas as drawing
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

RUN = Path("run") / "version_0"
STEPS = 8


class At(pl.Callback):
    """Does something to the run after a step."""

    def __init__(self, step: int, what: Callable[[pl.Trainer, Any], None]) -> None:
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.what(trainer, pl_module)


def fit(
    folder: Path, *callbacks: pl.Callback, on_error: str = "warn", **changes: Any
) -> tuple[pl.Trainer, AttentionMapCallback, list[str]]:
    """A run with a snapshot at every step; returns what the monitor warned of."""
    torch.manual_seed(0)
    watch = AttentionMapCallback(every_n_train_steps=1, on_error=on_error)
    running = trainer(folder, watch, *callbacks, max_steps=STEPS, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running.fit(Distillation(), loader())
    told = [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]
    assert running.global_step == STEPS
    return running, watch, told


def written(running: pl.Trainer) -> None:
    """Wait until nothing is being written, so that what follows happens between two snapshots."""
    (watch,) = (c for c in running.callbacks if isinstance(c, AttentionMapCallback))
    publisher = watch.run.output.publisher
    assert publisher is not None
    publisher.drain()


def steps(folder: Path) -> list[int]:
    return [s.step for s in load_snapshots(folder / RUN / "attn_monitor")]


def out_of_memory_above(images: int) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        if not module.training and len(args[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    return hook


@pytest.mark.slow
def test_out_of_memory_halves_the_chunk(tmp_path: Path) -> None:
    """The probe of 4 images is recorded one by one, and the maps are the same."""

    def squeeze(running: pl.Trainer, module: Any) -> None:
        module.student_backbone.blocks[0].register_forward_pre_hook(out_of_memory_above(1))

    _, watch, told = fit(tmp_path, At(4, squeeze))
    assert told == []
    assert steps(tmp_path) == list(range(STEPS + 1))
    assert watch.monitor is not None
    assert watch.monitor.images_at_a_time == 1
    plain = tmp_path / "plain"
    fit(plain)
    one, other = (load_snapshots(f / RUN / "attn_monitor")[-1].rows("student") for f in (tmp_path, plain))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_out_of_memory_even_for_one_image(tmp_path: Path) -> None:
    def squeeze(running: pl.Trainer, module: Any) -> None:
        module.student_backbone.blocks[0].register_forward_pre_hook(out_of_memory_above(0))

    _, _, told = fit(tmp_path, At(4, squeeze))
    assert "taking a snapshot of student failed, training goes on. OutOfMemoryError" in told[0]
    assert told[1].endswith("this was not done:\n  taking a snapshot of student: steps 4, 5, 6, 7, 8")
    assert len(told) == 2
    roles = {s.step: s.roles for s in load_snapshots(tmp_path / RUN / "attn_monitor")}
    assert roles == {step: ("student", "teacher") if step < 4 else ("teacher",) for step in range(STEPS + 1)}


@pytest.mark.slow
def test_a_swapped_backbone_is_the_one_that_is_shown(tmp_path: Path) -> None:
    def swap(running: pl.Trainer, module: Any) -> None:
        torch.manual_seed(5)
        module.student_backbone = tiny_vit()
        with torch.no_grad():
            module.student_backbone.blocks[1].attn.qkv.weight.mul_(30)

    _, _, told = fit(tmp_path, At(4, swap))
    assert all("attention health" in text for text in told)  # the new model is a sharp one
    entropy = dict(Events(tmp_path / RUN).scalars("attn/student/layer1/entropy"))
    assert entropy[3] > 0.9
    assert entropy[4] < 0.8


@pytest.mark.slow
def test_a_swapped_layer_freezing_and_compiling(tmp_path: Path) -> None:
    def change(running: pl.Trainer, module: Any) -> None:
        module.student_backbone.blocks[1] = tiny_vit().blocks[1]
        module.student_backbone.blocks[1].attn.fused_attn = False
        module.student_backbone.blocks[0].requires_grad_(False)
        module.teacher_backbone.compile(backend="eager")

    _, _, told = fit(tmp_path, At(4, change))
    assert told == []
    assert steps(tmp_path) == list(range(STEPS + 1))


@pytest.mark.slow
def test_a_removed_layer(tmp_path: Path) -> None:
    """One block less in both: what is the last layer now is recorded as such, from then on."""

    def remove(running: pl.Trainer, module: Any) -> None:
        del module.student_backbone.blocks[1], module.teacher_backbone.blocks[1]

    _, _, told = fit(tmp_path, At(4, remove))
    assert told == []
    layers = {s.step: s.layers_of("teacher") for s in load_snapshots(tmp_path / RUN / "attn_monitor")}
    assert layers[3] == (1,)
    assert layers[4] == (0,)


def test_nan_weights_are_shown_as_missing(tmp_path: Path) -> None:
    def spoil(running: pl.Trainer, module: Any) -> None:
        with torch.no_grad():
            module.teacher_backbone.blocks[1].attn.qkv.weight[0, 0] = float("nan")

    _, _, told = fit(tmp_path, At(4, spoil))
    assert "teacher, layer 1, head 0: attention holds NaN or infinity" in told[0]
    assert all("attention health" in text for text in told)
    last = load_snapshots(tmp_path / RUN / "attn_monitor")[-1]
    assert last.rows("teacher").isnan().any()
    _, picture = Events(tmp_path / RUN).images("attn_maps/image0")[-1]
    assert (abs(picture.astype(int) - drawing.MISSING).max(-1) < 12).sum() > 2000


def test_archive_becomes_unwritable(tmp_path: Path) -> None:
    """A file where the archive's folder was: writing fails, for root too."""

    def block(running: pl.Trainer, module: Any) -> None:
        written(running)
        shutil.rmtree(tmp_path / RUN / "attn_monitor")
        (tmp_path / RUN / "attn_monitor").write_text("in the way")

    _, _, told = fit(tmp_path, At(2, block))
    assert len(told) == 2
    assert re.search(r"writing the archive failed, training goes on\. (FileExists|NotADirectory)Error", told[0])
    assert told[1].endswith("this was not done:\n  writing the archive: steps 2, 3, 4, 5, 6, 7, 8")
    assert len(Events(tmp_path / RUN).images("attn_maps/image0")) == STEPS + 1


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left while a snapshot is being written: no half file stays, and what was written is whole."""
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    _, _, told = fit(tmp_path)
    assert "writing the archive failed, training goes on. OSError: [Errno 28] No space left" in told[0]
    assert steps(tmp_path) == [0, 1, 2]  # the first write was the probe
    assert "writing the archive: steps 3, 4, 5, 6, 7, 8" in told[1]
    assert not list((tmp_path / RUN / "attn_monitor").glob(".writing*"))


@pytest.mark.slow
def test_archive_deleted_in_mid_run(tmp_path: Path) -> None:
    def delete(running: pl.Trainer, module: Any) -> None:
        written(running)
        shutil.rmtree(tmp_path / RUN / "attn_monitor")

    _, _, told = fit(tmp_path, At(4, delete))
    assert len(told) == 2
    assert "was deleted in mid-run" in told[0]
    assert told[1].endswith("writing the archive works again; missing: steps 0, 1, 2, 3")
    assert steps(tmp_path)[-1] == STEPS
    assert (tmp_path / RUN / "attn_monitor" / "probe.npz").exists()


@pytest.mark.slow
def test_closed_event_file(tmp_path: Path) -> None:
    """TensorBoard's writer is closed by somebody else: it may reopen, but nothing ends and the archive is whole."""

    def close(running: pl.Trainer, module: Any) -> None:
        running.logger.experiment.close()

    fit(tmp_path, At(4, close))
    assert steps(tmp_path) == list(range(STEPS + 1))


@pytest.mark.slow
def test_encoding_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bytes:
        raise OSError("encoder error -2")

    monkeypatch.setattr(drawing, "encoded", broken)
    _, _, told = fit(tmp_path)
    assert [t.split(". ")[0].split(": ")[1] for t in told] == [
        "logging some pictures to TensorBoardLogger failed, training goes on",
        "the run has ended, and this was not done:\n  logging some pictures to TensorBoardLogger",
    ]
    assert steps(tmp_path) == list(range(STEPS + 1))
    assert len(Events(tmp_path / RUN).scalars("attn/student/layer1/entropy")) == STEPS + 1


class SlowLogger(TensorBoardLogger):
    """Takes a tenth of a second for each call."""

    @property
    def experiment(self) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)
        return super().experiment


@pytest.mark.slow
def test_slow_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are skipped instead of piling up; the scalars are all there."""
    monkeypatch.setattr(job_queue, "WAITING", 2)
    _, _, told = fit(tmp_path, logger=SlowLogger(tmp_path, name="run", version=0))
    assert "logging pictures to SlowLogger failed, training goes on. TimeoutError: SlowLogger is too slow" in told[0]
    assert len(told) <= 3
    events = Events(tmp_path / RUN)
    assert len(events.scalars("attn/student/layer1/entropy")) == STEPS + 1
    assert events.images("attn_maps/image0")[-1][0] == STEPS  # the oldest are skipped
    assert len(events.images("attn_maps/image0")) < STEPS + 1


def test_raise_ends_training_at_the_next_safe_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "encoded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, on_error="raise")


@pytest.mark.slow
def test_error_in_user_code_keeps_what_was_captured(tmp_path: Path) -> None:
    def fail(running: pl.Trainer, module: Any) -> None:
        raise RuntimeError("the user's own mistake")

    with pytest.raises(RuntimeError, match="own mistake"):
        fit(tmp_path, At(4, fail))
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert len(Events(tmp_path / RUN).images("attn_filmstrip/image0")) == 4


SCRIPT = """
    import signal, sys, time
    from pathlib import Path
    from attn_monitor import AttentionMapCallback
    from tests.support.helpers import Distillation, loader, trainer

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run started in the background ignores it

    class Slow(Distillation):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            print("step", self.global_step, flush=True)
            time.sleep(0.05)

    running = trainer(Path(sys.argv[1]), AttentionMapCallback(every_n_train_steps=1), max_steps=5000)
    running.fit(Slow(), loader())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_signals(tmp_path: Path, name: str) -> None:
    """Whatever ends the process, every archived file is whole; Ctrl-C and SIGTERM also flush the latest."""
    script = textwrap.dedent(SCRIPT)
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    last = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:  # to the end: steps may still be finished after the signal
            last = int(line.split()[1]) if line.startswith("step") else last
            if last == 12:
                process.send_signal(getattr(signal, name))
    archive = tmp_path / RUN / "attn_monitor"
    written = [AttentionSnapshot.load(path).step for path in sorted(archive.glob("step-*.npz"))]
    assert written == list(range(len(written)))
    if name != "SIGKILL":
        assert written[-1] >= last - 1
        assert not list(archive.glob(".writing*"))
    else:
        assert len(written) >= 5
    assert Events(tmp_path / RUN).images("attn_maps/image0")  # the event file is readable too
