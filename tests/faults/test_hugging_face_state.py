"""What a Hugging Face checkpoint holds of attention is written whole or not at all, and ends no training."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_monitor.hugging_face import STATE, AttentionMapTrainerCallback
from tests.support.helpers import tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
PROBE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def begin(folder: Path, step: int = 0, resume: Any = None) -> tuple[AttentionMapTrainerCallback, Any, Any]:
    """A callback whose training begins at this step, with what its Trainer would hand to it."""
    callback = AttentionMapTrainerCallback(PROBE, loggers=[])
    args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=resume, report_to=[])
    state = SimpleNamespace(global_step=step, max_steps=4, epoch=0.0, is_world_process_zero=True)
    callback.on_train_begin(args, state, None, model=tiny_vit())
    return callback, args, state


def save(callback: AttentionMapTrainerCallback, args: Any, state: Any, step: int) -> Path:
    state.global_step = step
    folder = Path(args.output_dir, f"checkpoint-{step}")
    folder.mkdir()
    callback.on_save(args, state, None)
    return folder


def test_the_state_of_a_checkpoint_is_taken_up(tmp_path: Path) -> None:
    callback, args, state = begin(tmp_path)
    assert [path.name for path in save(callback, args, state, 2).iterdir()] == [STATE]
    callback.on_train_end(args, state, None)
    again, *_ = begin(tmp_path, step=2)
    assert again.watch is not None
    assert again.watch.monitor is not None
    assert [s.step for s in again.watch.monitor.history] == [0, 2]
    again.watch.close()


@pytest.mark.parametrize("content", ["truncated", "empty", "text", "another object"])
def test_a_damaged_state_is_a_warning(tmp_path: Path, content: str) -> None:
    callback, args, state = begin(tmp_path)
    path = save(callback, args, state, 2) / STATE
    callback.on_train_end(args, state, None)
    whole = path.read_bytes()
    if content == "another object":
        torch.save(torch.ones(3), path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no checkpoint"}[content])
    with pytest.warns(UserWarning, match=f"{STATE} cannot be read, so film strips start"):
        again, *_ = begin(tmp_path, step=2)
    assert again.watch is not None
    assert again.watch.active
    assert again.watch.step(3) is not None
    again.watch.close()


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("PytorchStreamWriter failed writing file")])
@pytest.mark.parametrize("where", ["save", "replace"])
def test_a_state_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    callback, args, state = begin(tmp_path)

    replace = os.replace

    def fail(source: Any, path: Any) -> None:
        if where == "replace" and Path(path).name != STATE:
            return replace(source, path)  # of the archive, which a thread writes at the same time
        if where == "save":
            path.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((torch, "save") if where == "save" else (os, "replace")), fail)
        with pytest.warns(UserWarning, match="cannot be written"):
            folder = save(callback, args, state, 2)
    assert list(folder.iterdir()) == []
    callback.on_train_end(args, state, None)
