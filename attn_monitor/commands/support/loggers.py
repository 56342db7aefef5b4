"""Loggers that a command opens, and the publishing of snapshots to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from attn_monitor.background.failures import Failures
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.commands.support.archive_to_fill import Notify
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.extras import needs
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.player.report import write_report
from attn_monitor.snapshot import Snapshot
from attn_monitor.trackers.publisher import Publisher

LoggerName = Literal["tensorboard", "wandb", "none"]

SECONDS = 600.0  # seconds that a logger may take for one step's pictures: no training waits for it


@contextmanager
def opened(loggers: LoggerName | Sequence[Any], out: Path, run: str) -> Iterator[Sequence[Any]]:
    """Open loggers that write to a folder and close them at the end; the caller's own stay as they are."""
    if loggers == "tensorboard":
        with needs("tensorboard", "logger='tensorboard'"):
            from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(out)) as writer:
            yield [writer]
    elif loggers == "wandb":
        with _wandb_run(out, run) as started:
            yield [started]
    else:
        yield () if isinstance(loggers, str) else loggers


def _wandb_run(folder: Path, run: str) -> Any:
    with needs("wandb", "logger='wandb'"):
        import wandb
    try:
        return wandb.init(dir=folder, id=run, name=folder.resolve().name, resume="allow")
    except wandb.errors.Error as error:
        raise ValueError(f"logger='wandb': {error} Or set WANDB_MODE=offline") from error


@contextmanager
def publishing(
    loggers: Sequence[Any], monitor: AttentionMonitor, archive: Path, drawing: DrawingOptions, notify: Notify
) -> Iterator[Callable[[Snapshot], None]]:
    """Yield a function that publishes a snapshot while the next one is taken, and leaves no maps out."""
    failures = Failures()
    publisher = Publisher(
        loggers,
        monitor.probe,
        folder=archive,
        style=replace(drawing, threshold=monitor.threshold),
        every_layer=monitor.draws_every_layer,
        history=monitor.history,
        curves=monitor.curves,
        failures=failures,
        budget=WaitBudget(SECONDS),
        write_report=write_report,
        keep_pictures=None,
    )

    def publish(snapshot: Snapshot) -> None:
        publisher.drain(SECONDS)
        publisher.publish(snapshot)
        failures.report(notify)

    finished = False
    try:
        yield publish
        publisher.drain(SECONDS)
        finished = True
    finally:
        publisher.close(finish=finished)
        failures.report(notify)
