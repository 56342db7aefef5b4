"""What killed processes were writing goes when anybody opens the folder, but nothing that may still be written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attn_monitor.commands.support.runs import StoredRun
from attn_monitor.record.folder_claim import CLAIM, claim_free
from tests.support import forked
from tests.support.processes import ROOT
from tests.support.runs import write_run

HOLDS = """
import sys, time
from pathlib import Path
from attn_monitor.record.folder_claim import claim_to_fill
claim = claim_to_fill(Path(sys.argv[1]))
print(claim is not None, flush=True)
time.sleep(60)
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Of a run that has ended, with an old and a new file that were not finished, and a file of the user's."""
    claim = claim_free(tmp_path, "archive")
    write_run(claim.folder, (0,), sharpness=(0,))
    claim.release()
    for name in (".writing-host-1-aaaa.npz", ".writing-host-2-bbbb.npz", ".mine"):
        (claim.folder / name).write_text("half")
    for name in (".writing-host-1-aaaa.npz", ".mine"):
        os.utime(claim.folder / name, (time.time() - 7200,) * 2)
    return claim.folder


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


KEPT = [".mine", ".writing-host-2-bbbb.npz"]
ALL = [".mine", ".writing-host-1-aaaa.npz", ".writing-host-2-bbbb.npz"]


def test_a_command_that_opens_an_archive(archive: Path) -> None:
    signed = (archive / CLAIM).read_text()
    StoredRun(archive)
    assert hidden(archive) == KEPT
    assert (archive / CLAIM).read_text() == signed


def test_a_run_that_begins_beside_it(archive: Path) -> None:
    claim_free(archive.parent, "archive").release()
    assert hidden(archive) == KEPT


def test_nothing_goes_while_a_process_writes_there(archive: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDS, str(archive)]
    with forked.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        StoredRun(archive)
        assert hidden(archive) == ALL
        other.kill()
    StoredRun(archive)
    assert hidden(archive) == KEPT


def test_nothing_goes_while_this_process_writes_there(tmp_path: Path) -> None:
    claim = claim_free(tmp_path, "archive")
    write_run(claim.folder, (0,), sharpness=(0,))
    unfinished = claim.folder / ".writing-host-1-aaaa.npz"
    unfinished.touch()
    os.utime(unfinished, (0, 0))
    StoredRun(claim.folder)
    assert unfinished.exists()
    claim.release()


def test_nothing_goes_where_nobody_has_signed(archive: Path) -> None:
    (archive / CLAIM).unlink()
    StoredRun(archive)
    assert hidden(archive) == ALL
