"""The archive folder of a run: locked, the same one when the run is resumed, and never waited for without a limit."""

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
    """What a checkpoint keeps: the folder's name and the run's id in its claim; None before there is one."""

    name: str | None = None
    run: str | None = None


def claim_archive(known: ArchiveId, wanted: Path, number: int, budget: WaitBudget) -> tuple[Claim, bool]:
    """Claim the folder that this run has written to before, else the first free one.

    Args:
        known: the folder that the run's checkpoint names.
        wanted: the folder to take where that is not free; ``wanted-2``, ``wanted-3``, … where this is not either.
        number: from which of these on folders are tried.
        budget: what the run may still wait.

    Returns:
        The claim, and whether it is that of the run's own folder. Where the disk does not answer in time, the claim
        is of a folder that is made when it does.
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
    """Unlock the folder, within seconds; it goes on in the background where the disk does not answer."""
    with suppress(TimeoutError):
        WaitBudget(2 * wait_budget.EXCEPTION_SECONDS).call(claim.release)


def tidy(folder: Path, step: int) -> str:
    """Remove the unfinished files of a killed process, and set snapshots after ``step`` aside.

    Returns:
        A sentence on what was set aside; empty where nothing was.
    """
    remove_unfinished(folder)
    return set_aside(folder, step)
