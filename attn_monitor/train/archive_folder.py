"""Which folder a run's archive is: one that nobody else writes to, and the same one when the run is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attn_monitor.record.archive import set_aside
from attn_monitor.record.folder_claim import Claim, claim_again, claim_free
from attn_monitor.record.npz import remove_unfinished


@dataclass(frozen=True)
class ArchiveId:
    """What a checkpoint keeps: the folder's name and the id in the run's claim of it; None before there is one."""

    name: str | None = None
    run: str | None = None


def claim_archive(known: ArchiveId, wanted: Path, number: int = 1) -> tuple[Claim, bool]:
    """Claim the folder that this run has written to before, else one that is nobody's; and which of both it is.

    One that is nobody's is ``wanted``, or ``wanted-2``, ``wanted-3``, …, counted from ``number`` on.
    """
    again = None if known.name is None else claim_again(wanted.parent / known.name, known.run)
    return again or claim_free(wanted.parent, wanted.name, number), again is not None


def tidy(folder: Path, step: int) -> str:
    """Clear up what a process of this run left when it was killed, for the run to go on from a step.

    Unfinished files are removed, and later snapshots set aside. Returns what is to be said of it, or nothing.
    """
    remove_unfinished(folder)
    return set_aside(folder, step)
