"""An archive folder is one run's: whoever comes at the same time takes another, and a resumed run finds its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attn_monitor import ProbeBatch, load_snapshots
from attn_monitor.record import folder_claim as claim
from attn_monitor.record.folder_claim import CLAIM, claim_again, claim_free
from tests.support import forked
from tests.support.processes import ROOT
from tests.support.together import STEPS

processes = multiprocessing.get_context("fork")


def folder_in_another_process(root: Path, name: str, run: str | None) -> str:
    """The name of the folder that another process would get."""
    mine, theirs = processes.Pipe()

    def ask() -> None:
        got = claim_again(root / name, run) or claim_free(root, "x")
        theirs.send(got.folder.name)
        os._exit(0)

    process = processes.Process(target=ask)
    process.start()
    process.join()
    return str(mine.recv())


def test_the_first_name_that_is_empty_and_nobodys(tmp_path: Path) -> None:
    first, second = claim_free(tmp_path, "x"), claim_free(tmp_path, "x")
    assert (first.folder.name, first.note) == ("x", "")
    assert second.folder.name == "x-2"
    assert second.note == f"{tmp_path / 'x'} is taken by this process, so this one writes to x-2"
    (tmp_path / "x-3").mkdir()
    (tmp_path / "x-3" / "step-000000000.npz").touch()  # without a claim
    (tmp_path / "x-4").write_text("a file")
    third = claim_free(tmp_path, "x", 3)
    assert third.note == f"{tmp_path / 'x-3'} is not empty, so this one writes to x-5"
    signed = [json.loads(line) for line in (tmp_path / "x" / CLAIM).read_text().splitlines()]
    assert [(s["run"], s["pid"]) for s in signed] == [(first.run, os.getpid())]


def test_a_folder_that_nothing_was_written_to_is_removed(tmp_path: Path) -> None:
    unused = claim_free(tmp_path, "x")
    unused.release()
    unused.release()
    assert list(tmp_path.iterdir()) == []
    used = claim_free(tmp_path, "x")
    (used.folder / "step-000000000.npz").touch()
    used.release()
    assert claim_free(tmp_path, "x").folder.name == "x-2"


def test_a_run_finds_its_own_again_when_nobody_else_writes_there(tmp_path: Path) -> None:
    mine = claim_free(tmp_path, "x")
    (mine.folder / "probe.npz").touch()
    assert claim_again(mine.folder, "another") is None
    assert claim_again(mine.folder, mine.run) is None, "this process has it already"
    assert claim_again(tmp_path / "elsewhere", mine.run) is None
    assert folder_in_another_process(tmp_path, "x", mine.run) == "x-2", "this process still writes there"
    mine.release()
    assert folder_in_another_process(tmp_path, "x", mine.run) == "x", "and that process has ended"
    again = claim_again(mine.folder, mine.run)
    assert again is not None
    assert (again.folder, again.run) == (mine.folder, mine.run)
    assert len((mine.folder / CLAIM).read_text().splitlines()) == 3


def test_the_owner_is_named(tmp_path: Path) -> None:
    """The process that writes now, or the last one that did."""
    mine = claim_free(tmp_path, "x")
    (mine.folder / "probe.npz").touch()
    theirs, done = processes.Pipe()

    def ask() -> None:
        done.send((claim.owner(mine.folder), claim_free(tmp_path, "x").note, claim.claim_to_fill(mine.folder) is None))
        os._exit(0)

    process = processes.Process(target=ask)
    process.start()
    who, note, refused = theirs.recv()
    process.join()
    assert re.fullmatch(rf"process {os.getpid()} on \S+ \(since 20\S+\)", who)
    assert note == f"{mine.folder} is taken by {who}, so this one writes to x-2"
    assert refused
    assert folder_in_another_process(tmp_path, "x", mine.run) == "x-3", "asking for the owner unlocked nothing"
    mine.release()
    assert claim.owner(mine.folder) == who
    assert claim.owner(tmp_path / "elsewhere") == ""


def test_asking_for_the_owner_does_not_unlock_what_this_process_holds(tmp_path: Path) -> None:
    """As closing any handle of a file drops a process's locks on it."""
    mine = claim_free(tmp_path, "x")
    assert claim.owner(mine.folder) == "this process"
    assert claim_free(tmp_path, "x").folder.name == "x-2"
    assert claim.claim_to_fill(mine.folder) is None
    assert folder_in_another_process(tmp_path, "x", mine.run) == "x-3"


def test_a_killed_owner_is_succeeded_while_its_workers_live(tmp_path: Path) -> None:
    """A forked worker, such as a data loader's, does not inherit the lock."""
    theirs, mine = processes.Pipe()

    def run() -> None:
        held = claim_free(tmp_path, "x")
        (held.folder / "probe.npz").touch()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        mine.send((held.run, worker))
        time.sleep(60)

    process = processes.Process(target=run)
    process.start()
    run_id, worker = theirs.recv()
    assert claim_again(tmp_path / "x", run_id) is None
    process.kill()
    process.join()
    try:
        os.kill(worker, 0)
        again = claim_again(tmp_path / "x", run_id)
        assert again is not None
        assert again.run == run_id
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_to_is_not_said_to_be_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"):
        claim.claim_to_fill(tmp_path / "file" / "x")


@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b'{"run": 3}\n', b"\xff\n", b"[" * 60_000])
def test_a_claim_that_cannot_be_read_is_another_runs(tmp_path: Path, content: bytes) -> None:
    mine = claim_free(tmp_path, "x")
    mine.release()
    mine.folder.mkdir()
    (mine.folder / CLAIM).write_bytes(content)
    assert claim_again(mine.folder, mine.run) is None


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    """Then the name is one that nobody else can have, and a resumed run knows it by its id."""
    (tmp_path / "root").write_text("in the way")
    mine = claim_free(tmp_path / "root", "x")
    assert mine.folder.name == f"x-{mine.run}"
    assert "no archive folder could be made" in mine.note
    mine.release()
    (tmp_path / "root").unlink()
    mine.folder.mkdir(parents=True)
    (mine.folder / "probe.npz").touch()
    again = claim_again(mine.folder, mine.run)
    assert again is not None
    assert again.run == mine.run


def test_where_files_cannot_be_locked_the_claim_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert [claim_free(tmp_path, "x").folder.name for _ in range(3)] == ["x", "x-2", "x-3"]


def test_fifty_processes_at_once(tmp_path: Path) -> None:
    barrier, results = processes.Barrier(50), processes.SimpleQueue()

    def take() -> None:
        barrier.wait()
        results.put(claim_free(tmp_path, "x").folder.name)
        os._exit(0)

    running = [processes.Process(target=take) for _ in range(50)]
    for process in running:
        process.start()
    names = [results.get() for _ in running]
    for process in running:
        process.join()
    assert len(set(names)) == 50


def start_together(folder: Path, logger: str, count: int, checkpoint: Path | str = "") -> Iterator[dict[str, Any]]:
    """What each of the runs says of itself, see `tests.support.together`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.together", str(folder), logger, str(count), str(checkpoint)]
    ran = forked.run(command, env=environment, capture_output=True, text=True, timeout=250, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-5000:]
    for number in range(count):
        yield json.loads((folder / f"result-{number}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "csv", "none"])
def test_five_runs_at_once(tmp_path: Path, logger: str) -> None:
    """Nothing is lost, and no folder holds two runs."""
    archives = set()
    for result in start_together(tmp_path, logger, 5):
        archive = Path(result["archive"])
        archives.add(archive)
        expected = [(step, (result["name"],)) for step in range(STEPS + 1)]
        assert [(s.step, s.names) for s in load_snapshots(archive)] == expected
        assert ProbeBatch.load(archive / "probe.npz").names == (result["name"],)
    assert len(archives) == 5
    assert sorted(path.parent for path in tmp_path.rglob(claim.CLAIM)) == sorted(archives)


@pytest.mark.slow
def test_resumed_three_times_at_once(tmp_path: Path) -> None:
    """One goes on where the run was, the others elsewhere: no archive holds two of them."""
    (first,) = start_together(tmp_path, "none", 1)
    archives = sorted(result["archive"] for result in start_together(tmp_path, "none", 3, tmp_path / "0.ckpt"))
    assert [Path(archive).name for archive in archives] == ["attn_monitor", "attn_monitor-2", "attn_monitor-3"]
    assert archives[0] == first["archive"]
    steps = [[s.step for s in load_snapshots(archive)] for archive in archives]
    assert steps == [list(range(STEPS + 3)), *[list(range(STEPS + 1, STEPS + 3))] * 2]
