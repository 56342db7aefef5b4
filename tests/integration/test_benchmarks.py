"""The benchmark program runs to its end, on tiny models, and writes what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support import forked

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_quick_run_writes_the_document(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    done = forked.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "benchmarks.json").read_text())
    (table,) = stored["speed"]
    ways = {(row["way"], row["layers"]) for row in table["rows"]}
    assert {("ours", "last"), ("ours", "all"), ("DINO-style `get_last_selfattention`", "last")} <= ways
    assert len(ways) + len(table["skipped"]) == 11, "each peer has a row, or a reason"
    assert stored["training"]["snapshots"] == 4  # before steps 0, 2 and 4, and after the last
    assert 0 < stored["training"]["told"] < 1
    assert {target["what"] for target in stored["targets"] if target["at_most"] and target["bound"] == 0} == {
        "unwanted packages imported"
    }
    document = (tmp_path / "benchmarks.md").read_text()
    assert "figures say nothing" in document
    assert str(Path.home()) not in document + json.dumps(stored), "nothing of this machine's folders"
