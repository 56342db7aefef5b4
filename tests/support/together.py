"""Several processes that start at the same moment: what is heavy is imported once, then they are forked."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from attn_monitor import AttentionMapCallback, ProbeBatch
from tests.support.helpers import Distillation, loader, trainer

STEPS = 3

LOGGERS: dict[str, Callable[[Path], Any]] = {
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="run"),
    "csv": lambda folder: CSVLogger(folder, name="run"),
    "none": lambda folder: False,
}


class Together(pl.Callback):
    """Waits until all processes are about to begin, and until all have begun."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def setup(self, *_: Any, **__: Any) -> None:
        self._wait("here")

    def on_train_start(self, *_: Any) -> None:
        self._wait("begun")

    def _wait(self, what: str) -> None:
        (self.folder / f"{what}-{os.getpid()}").touch()
        while len(list(self.folder.glob(f"{what}-*"))) < self.count:
            time.sleep(0.005)


def run(folder: Path, logger: str, number: int, count: int, checkpoint: str = "") -> dict[str, Any]:
    """One run among many; its probe tells it from the others. Returns where its archive is said to be."""
    torch.manual_seed(number)
    callback = AttentionMapCallback(
        ProbeBatch(torch.full((1, 3, 32, 32), 0.1 * number), names=[f"of run {number}"]), every_n_train_steps=1
    )
    together, steps = folder / f"together-{bool(checkpoint)}", STEPS + 2 * bool(checkpoint)
    together.mkdir(exist_ok=True)
    callbacks = (callback, Together(together, count))  # in this order: archives are chosen when all have begun
    running = trainer(folder, *callbacks, max_steps=steps, logger=LOGGERS[logger](folder))
    running.fit(Distillation(), loader(), ckpt_path=checkpoint or None)
    if not checkpoint:
        running.save_checkpoint(folder / f"{number}.ckpt")
    assert callback.kept.archive.name is not None
    return {
        "archive": str(Path(running.log_dir or folder) / callback.kept.archive.name),
        "name": f"of run {number}",
    }


def main() -> None:
    """Fork the processes, and write what each returned."""
    folder, logger, count, checkpoint = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    warnings.simplefilter("ignore")
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            try:
                result = run(folder, logger, number, count, checkpoint)
                (folder / f"result-{number}.json").write_text(json.dumps(result))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main()
