"""What a Lightning run is to the callback: where it writes, how long it is, what its archive holds already."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from attn_monitor.snapshot import ArchiveError, AttentionSnapshot, load_step, snapshot_paths, step_of


def run_folder(trainer: pl.Trainer) -> Path:
    """Where this run keeps its files: the logger's own folder, else save_dir/name/version as ModelCheckpoint has it."""
    log_dir = trainer.log_dir  # agreed on by all ranks
    logger = trainer.logger
    if logger is None or hasattr(logger, "log_dir"):
        return Path(log_dir or trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(log_dir or trainer.default_root_dir, str(logger.name), version)


def total_steps(trainer: pl.Trainer) -> float:
    """Length of the run in optimizer steps, infinite where Lightning cannot tell."""
    try:
        return trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes from epoch to epoch
        return math.inf


def free_archive(folder: Path, base: str, first: int, taken: Collection[str | None]) -> str:
    """The first of ``base``, ``base-2``, ``base-3``, … from number ``first`` on that is empty, and nobody else's."""
    names = (base if n == 1 else f"{base}-{n}" for n in itertools.count(first))
    return next(n for n in names if n not in taken and not any((folder / n).glob("*")))


def written_between(archive: Path, after: int, until: int, names: Sequence[str]) -> list[AttentionSnapshot]:
    """Snapshots of these images at steps above ``after`` and up to ``until``; none where they cannot be read."""
    try:
        read = [load_step(p) for p in snapshot_paths(archive) if after < step_of(p) <= until]
    except ArchiveError:
        return []
    return [s for s in read if s.names == tuple(names)]
