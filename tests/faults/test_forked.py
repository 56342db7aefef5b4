"""Children of `tests.support.forked` end as fresh interpreters do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked

ENDINGS = {
    "the last line": "print(__name__, sys.argv[1:], os.getcwd(), os.environ.get('SET'), sys.stdin.read())",
    "exit code": "print('one'); sys.exit(3)",
    "message": "sys.exit('what is wrong')",
    "exception": "print('one'); raise ValueError('two')",
    "interrupt": "raise KeyboardInterrupt",
    "signal": "print('lost in the buffer'); os.kill(os.getpid(), signal.SIGTERM)",
    "handler": "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); os.kill(os.getpid(), signal.SIGTERM)",
    "at once": "print('lost in the buffer'); os._exit(4)",
    "threads": """
def late():
    time.sleep(0.2)
    print("a thread is waited for", flush=True)
threading.Thread(target=late).start()
threading.Thread(target=time.sleep, args=[60], daemon=True).start()
atexit.register(print, "atexit")
""",
    "an exception at exit": "atexit.register(lambda: 1 / 0)",
    "in a thread": "threading.Thread(target=lambda: 1 / 0).start()",
}


def ended(run: Any, code: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, output, and the last line of what went wrong."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"import atexit, os, signal, sys, threading, time\n{code}",
        "a",
        "b",
    ]
    environment = {**os.environ, "SET": "here"}
    ran = run(command, input="words", capture_output=True, text=True, cwd=folder, env=environment, timeout=100)
    return ran.returncode, ran.stdout, ran.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize("code", ENDINGS.values(), ids=ENDINGS)
def test_a_fork_ends_as_a_fresh_interpreter(code: str, tmp_path: Path) -> None:
    assert ended(forked.run, code, tmp_path) == ended(subprocess.run, code, tmp_path)


def test_modules_and_files_run_as_main(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys, beside\nprint(__name__, sys.argv, beside.__file__, __file__)")
    (tmp_path / "beside.py").touch()
    for words in (["script.py", "x"], ["-m", "script", "x"]):
        command = [sys.executable, *words]
        fork, fresh = (run(command, cwd=tmp_path, capture_output=True) for run in (forked.run, subprocess.run))
        assert fork.stdout == fresh.stdout != b"", fork.stderr


def test_signals_and_time_limits_reach_it() -> None:
    wait = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        with forked.Popen(wait, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            assert process.poll() is None
            process.send_signal(number)
        assert process.returncode == -number
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(wait, timeout=0.5, stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.CalledProcessError):
        forked.run([sys.executable, "-c", "1 / 0"], check=True, capture_output=True)
