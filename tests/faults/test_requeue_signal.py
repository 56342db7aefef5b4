"""Slurm's signal before the end of a job: its handler flushes the run's writer, whatever of ours is being written."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from attn_monitor.trackers.events import Picture
from attn_monitor.trackers.tensorboard import TensorBoard
from tests.support import forked
from tests.support.events import Events
from tests.support.processes import ROOT

COUNT, SECONDS = 8, 30.0  # processes, and how long one may take


def pictures(size: int = 400) -> list[Picture]:
    """Noise, which makes large files."""
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return [Picture(f"attn_maps/image{n}", lambda: noise) for n in range(4)]


def log_pictures(tracker: TensorBoard, events: list[Picture], step: int) -> None:
    with tracker.batch(step) as log:
        for event in events:
            log(event)


def log_rows_until_a_signal(folder: Path, seconds: float) -> None:
    """What a training thread does that logs many scalars, beside pictures; ends in a handler like Lightning's.

    The signal comes ``seconds`` after the first pictures, however long those take on a busy machine.
    """
    writer = SummaryWriter(folder)
    tracker = TensorBoard(writer)

    def handle(*_: object) -> None:
        writer.flush()
        writer.close()
        os._exit(7)

    kill = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    kill.daemon = True

    def draw() -> None:
        for step in range(10_000):
            log_pictures(tracker, pictures(), step)
            if step == 0:
                kill.start()

    signal.signal(signal.SIGUSR1, handle)
    threading.Thread(target=draw, daemon=True).start()
    for step in range(10**9):
        for number in range(15):
            writer.add_scalar(f"metric{number}", 0.0, step)
        time.sleep(0.15)


def code_of(process: int) -> int:
    """Its exit code; it is killed if it hangs."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    """Fork processes that get the signal at different moments, and print how they ended."""
    for number in range(COUNT):
        if (process := os.fork()) == 0:
            log_rows_until_a_signal(Path(sys.argv[1]) / str(number), 0.5 + 0.037 * number)
        print("code", code_of(process), flush=True)


@pytest.mark.slow
def test_a_handler_that_flushes_the_writer_never_waits_for_ever(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.test_requeue_signal", str(tmp_path)]
    ran = forked.run(command, capture_output=True, text=True, env=environment, timeout=400)
    codes = ran.stdout.split()[1::2]
    # The signal may also come while a scalar is put into the queue, which takes microseconds and hangs without us too.
    assert codes.count("7") >= COUNT - 1, (codes, ran.stderr[-2000:])
    for number in (n for n, code in enumerate(codes) if code == "7"):
        events = Events(tmp_path / str(number))
        assert events.scalars("metric14")
        assert events.images("attn_maps/image0")


def test_rows_of_the_run_do_not_wait_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred are taken while one picture is being written; then the writer's queue is as bounded as before."""
    writer = SummaryWriter(tmp_path)
    records = writer._get_file_writer().event_writer._async_writer
    written, begun, release = records._writer.write, threading.Event(), threading.Event()

    def slow(record: bytes) -> None:
        if len(record) > 10_000:
            begun.set()
            release.wait(20)
        written(record)

    monkeypatch.setattr(records._writer, "write", slow)
    drawing = threading.Thread(target=log_pictures, args=(TensorBoard(writer), pictures()[:1], 0))
    drawing.start()
    assert begun.wait(20)
    started = time.monotonic()
    for step in range(100):
        writer.add_scalar("loss", 0.5, step)
    assert time.monotonic() - started < 10
    assert records._byte_queue.qsize() == 100
    release.set()
    drawing.join(20)
    assert not drawing.is_alive()
    assert records._byte_queue.maxsize == 10
    assert isinstance(records._byte_queue, queue.Queue)
    writer.close()
    assert len(Events(tmp_path).scalars("loss")) == 100


if __name__ == "__main__":
    main()
