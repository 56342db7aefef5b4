"""An archive folder is one run's: whoever comes at the same time takes another, and a resumed run finds its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attn_monitor import ProbeBatch, load_snapshots
from attn_monitor.record import folder_claim as claim
from attn_monitor.record.folder_claim import CLAIM, claim_again, claim_free
from tests.processes import ROOT
from tests.together import STEPS

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
    assert "x is another run's, so this one writes to x-2" in second.note
    (tmp_path / "x-3").mkdir()
    (tmp_path / "x-3" / "step-000000000.npz").touch()  # of the first stage, without a claim
    (tmp_path / "x-4").write_text("a file")
    assert claim_free(tmp_path, "x", 3).folder.name == "x-5"
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
    assert claim_again(mine.folder, None) is None, "a run of the first stage left no claim"
    assert claim_again(tmp_path / "elsewhere", mine.run) is None
    assert folder_in_another_process(tmp_path, "x", mine.run) == "x-2", "this process still writes there"
    mine.release()
    assert folder_in_another_process(tmp_path, "x", mine.run) == "x", "and that process has ended"
    again = claim_again(mine.folder, mine.run)
    assert again is not None
    assert (again.folder, again.run) == (mine.folder, mine.run)
    assert len((mine.folder / CLAIM).read_text().splitlines()) == 3


def test_a_run_of_the_first_stage_goes_on_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "step-000000000.npz").touch()
    mine = claim_again(tmp_path / "x", None)
    assert mine is not None
    mine.release()
    assert claim_again(tmp_path / "x", mine.run) is not None


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
    """What each of the runs says of itself, see `tests.together`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.together", str(folder), logger, str(count), str(checkpoint)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-5000:]
    for number in range(count):
        yield json.loads((folder / f"result-{number}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "csv", "none"])
def test_ten_runs_at_once(tmp_path: Path, logger: str) -> None:
    """Nothing is lost, and no folder holds two runs."""
    archives = set()
    for result in start_together(tmp_path, logger, 10):
        archive = Path(result["archive"])
        archives.add(archive)
        expected = [(step, (result["name"],)) for step in range(STEPS + 1)]
        assert [(s.step, s.names) for s in load_snapshots(archive)] == expected
        assert ProbeBatch.load(archive / "probe.npz").names == (result["name"],)
    assert len(archives) == 10
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
