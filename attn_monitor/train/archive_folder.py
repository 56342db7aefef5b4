"""Which folder a run's archive is: one that nobody else writes to, and the same one when the run is resumed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from attn_monitor.publish.background import DISK_PATIENCE, LAST_WORDS, Patience, within
from attn_monitor.record.archive import set_aside
from attn_monitor.record.folder_claim import Claim, claim_again, claim_free, claim_later
from attn_monitor.record.npz import remove_unfinished


@dataclass(frozen=True)
class ArchiveId:
    """What a checkpoint keeps: the folder's name and the id in the run's claim of it; None before there is one."""

    name: str | None = None
    run: str | None = None


def claim_archive(known: ArchiveId, wanted: Path, number: int, patience: Patience) -> tuple[Claim, bool]:
    """Claim the folder that this run has written to before, else one that is nobody's; and which of both it is.

    One that is nobody's is ``wanted``, or ``wanted-2``, ``wanted-3``, …, counted from ``number`` on. Where the disk
    does not answer in time, it is one that is made when it does.
    """

    def claim() -> tuple[Claim, bool]:
        again = None if known.name is None else claim_again(wanted.parent / known.name, known.run)
        return again or claim_free(wanted.parent, wanted.name, number), again is not None

    try:
        return within(patience, min(DISK_PATIENCE, patience.for_now), claim, lambda late: late[0].release())
    except TimeoutError as error:
        return claim_later(wanted.parent, wanted.name, error), False


def release(claim: Claim) -> None:
    """Let others have the folder; by itself later where the disk does not answer at once."""
    with suppress(TimeoutError):
        within(Patience(LAST_WORDS), LAST_WORDS, claim.release)


def tidy(folder: Path, step: int) -> str:
    """Clear up what a process of this run left when it was killed, for the run to go on from a step.

    Unfinished files are removed, and later snapshots set aside. Returns what is to be said of it, or nothing.
    """
    remove_unfinished(folder)
    return set_aside(folder, step)
