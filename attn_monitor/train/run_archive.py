"""Which folder a run's archive is: one that nobody else writes to, and the same one when the run is resumed."""

from __future__ import annotations

from pathlib import Path

from attn_monitor.record.archive import set_aside
from attn_monitor.record.claim import Claim, claim_again, claim_free
from attn_monitor.record.npz import remove_unfinished


class RunArchive:
    """A checkpoint keeps the folder's ``name`` and ``run``, the id in its claim; None until a folder is claimed."""

    def __init__(self, name: str | None = None, run: str | None = None) -> None:
        self.name, self.run = name, run
        self.continued = False  # whether this run has written to the folder before
        self._claim: Claim | None = None

    def claim(self, wanted: Path, number: int = 1) -> Claim:
        """The folder that this run has written to before, else one that is nobody's.

        That is ``wanted``, or ``wanted-2``, ``wanted-3``, …, counted from ``number`` on.
        """
        self.release()
        again = None if self.name is None else claim_again(wanted.parent / self.name, self.run)
        self._claim = claim = again or claim_free(wanted.parent, wanted.name, number)
        self.name, self.run, self.continued = claim.folder.name, claim.run, again is not None
        return claim

    def release(self) -> None:
        """Let others have the folder; the name and the id stay known."""
        if self._claim is not None:
            self._claim.release()
        self._claim = None


def tidy(folder: Path, step: int) -> str:
    """Clear up what a process of this run left when it was killed, for the run to go on from a step.

    Unfinished files are removed, and later snapshots set aside. Returns what is to be said of it, or nothing.
    """
    remove_unfinished(folder)
    return set_aside(folder, step)
