"""Lock the archive folder of a run, find it again when the run is resumed, and never wait for it without a limit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from attn_monitor.background import wait_budget
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.record.archive import set_aside
from attn_monitor.record.atomic_file import remove_unfinished
from attn_monitor.record.folder_claim import Claim, claim_again, claim_free, claim_later


@dataclass(frozen=True)
class ArchiveId:
    """Identify an archive in a checkpoint by its folder's name and the run's id in its lock; None before it is open."""

    name: str | None = None
    run: str | None = None


def claim_archive(known: ArchiveId, wanted: Path, number: int, budget: WaitBudget) -> tuple[Claim, bool]:
    """Lock the folder that this run has written to before, else the first free one.

    Args:
        known: the archive in the run's checkpoint, which is preferred.
        wanted: the folder to take otherwise; if another run has it, ``wanted-2``, ``wanted-3``, … are tried.
        number: the first of these numbers to try; 1 is ``wanted`` itself.
        budget: how long the run may still wait.

    Returns:
        The lock, and whether the run continues in its own folder. If the disk does not answer in time, the folder is
        made and locked as soon as it does.
    """

    def claim() -> tuple[Claim, bool]:
        again = None
        if known.name is not None and known.run is not None:
            again = claim_again(wanted.parent / known.name, known.run)
        return again or claim_free(wanted.parent, wanted.name, number), again is not None

    try:
        return budget.call(claim, lambda late: late[0].release())
    except TimeoutError as error:
        return claim_later(wanted.parent, wanted.name, error), False


def release(claim: Claim) -> None:
    """Unlock the folder within seconds; a disk that does not answer is left to a background thread."""
    with suppress(TimeoutError):
        WaitBudget(2 * wait_budget.EXCEPTION_SECONDS).call(claim.release)


def tidy(folder: Path, step: int) -> str:
    """Remove the unfinished files of a killed process, and move snapshots after ``step`` aside.

    Returns:
        A sentence on what was moved, empty if nothing was.
    """
    remove_unfinished(folder)
    return set_aside(folder, step)
