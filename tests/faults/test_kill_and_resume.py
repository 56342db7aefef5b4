"""A run that is killed and resumed: its archive holds each step once, and nothing of the killed process is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from attn_monitor import AttentionMapCallback, AttentionSnapshot, load_snapshots
from attn_monitor.record.archive import snapshot_path
from tests.integration.test_resume import RUN, first_part, steps
from tests.support import forked
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer
from tests.support.processes import ROOT
from tests.support.tiers import sweep

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

SCRIPT = """
    import sys, time
    from pathlib import Path
    from lightning.pytorch.callbacks import ModelCheckpoint
    from attn_monitor import AttentionMapCallback
    from tests.support.helpers import Distillation, loader, trainer

    class Slow(Distillation):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            print("step", self.global_step, flush=True)
            time.sleep(0.2)

    folder = Path(sys.argv[1])
    watch = AttentionMapCallback(every_n_train_steps=1)
    saved = ModelCheckpoint(folder / "ckpt", save_top_k=-1, every_n_train_steps=4, filename="{step}")
    running = trainer(folder, watch, saved, max_steps=500, enable_checkpointing=True)
    running.fit(Slow(), loader())
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    """Killed at step 7, after a checkpoint at step 4, and resumed with another schedule."""
    archive = tmp_path / RUN / "attn_monitor"
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as killed:
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.startswith("step 7"):
                killed.send_signal(signal.SIGKILL)
    before = [s.step for s in load_snapshots(archive)]
    assert before == list(range(len(before)))
    assert before[-1] >= 5, "otherwise there is nothing to set aside"
    (archive / ".writing-here-1-00.npz").write_bytes(b"half a file")
    again = AttentionMapCallback(every_n_train_steps=2)
    running = trainer(tmp_path, again, max_steps=8)
    with pytest.warns(UserWarning, match=r"resumed from step 4, and had reached step \d.*superseded-1.*twice"):
        running.fit(Distillation(), loader(), ckpt_path=tmp_path / "ckpt" / "step=4.ckpt")
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 6, 8]
    assert [s.step for s in load_snapshots(archive / "superseded-1")] == [n for n in before if n > 4]
    assert not list(archive.glob(".writing*"))
    assert again.monitor is not None
    assert [s.step for s in again.monitor.history] == [0, 1, 2, 3, 4, 6, 8]
    assert not list((tmp_path / RUN).glob("attn_monitor-*"))
    signed = [json.loads(line) for line in (archive / "run.jsonl").read_text().splitlines()]
    assert [s["pid"] for s in signed] == [killed.pid, os.getpid()]
    logged = [step for step, _ in Events(tmp_path / RUN).scalars("attn/teacher/layer1/entropy")]
    assert {6, 8} <= set(logged)  # of those before, TensorBoard's writer may have held some back


@pytest.mark.filterwarnings("ignore:.*`torch.load` with `weights_only=False`:FutureWarning")  # Lightning's, 2.4
@pytest.mark.parametrize(
    "damage", sweep([None, b"", b"broken"], quick=1), ids=["contradicting itself", "empty", "broken"]
)
def test_a_damaged_snapshot_does_not_end_a_resumed_run(tmp_path: Path, damage: bytes | None) -> None:
    checkpoint = first_part(tmp_path, 4, AttentionMapCallback(every_n_train_steps=1))
    state = torch.load(checkpoint, weights_only=True)
    (key,) = (k for k in state["callbacks"] if k.startswith("AttentionMapCallback"))
    assert state["callbacks"][key]["last_step"] == 3, "so that step 4 is read from the archive"
    path = snapshot_path(tmp_path / RUN / "attn_monitor", 4)
    if damage is None:
        good = AttentionSnapshot.load(path)
        AttentionSnapshot(good.step + 10**6, 0, good.names, good.layers).save(path)
    else:
        path.write_bytes(damage)
    again = AttentionMapCallback(every_n_train_steps=1)
    with pytest.warns(UserWarning, match=r"film strips leave out.*step-000000004\.npz"):
        trainer(tmp_path, again, max_steps=6).fit(Distillation(), loader(), ckpt_path=checkpoint)
    assert again.monitor is not None
    assert [s.step for s in again.monitor.history] == [0, 1, 2, 3, 4, 5, 6]
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_resumed_in_a_place_where_another_run_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = first_part(tmp_path / "a", 4, AttentionMapCallback(every_n_train_steps=2))
    first_part(tmp_path / "b", 4, AttentionMapCallback(every_n_train_steps=2))
    before = {path: path.read_bytes() for path in (tmp_path / "b" / RUN / "attn_monitor").glob("*.*")}
    again = AttentionMapCallback(every_n_train_steps=2)
    trainer(tmp_path / "b", again, max_steps=8).fit(Distillation(), loader(), ckpt_path=checkpoint)
    assert [s.step for s in load_snapshots(tmp_path / "b" / RUN / "attn_monitor-2")] == [4, 6, 8]
    assert {path: path.read_bytes() for path in before} == before
    assert re.search(
        r"attn_monitor is taken by process \d+ on \S+ \(since \S+\), so this one writes to attn_monitor-2", caplog.text
    )


def test_a_run_that_fails_before_its_first_snapshot_leaves_no_folder(tmp_path: Path) -> None:
    class Failing(Distillation):
        def on_train_start(self) -> None:
            raise RuntimeError("the user's own mistake")

    with pytest.raises(RuntimeError, match="own mistake"):
        trainer(tmp_path, AttentionMapCallback(), max_steps=2).fit(Failing(), loader())
    assert not (tmp_path / RUN / "attn_monitor").exists()
