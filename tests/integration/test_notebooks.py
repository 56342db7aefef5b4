"""The notebooks of `examples/notebooks` run from first to last cell, and have no outputs in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import ROOT

nbformat: Any = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient: Any = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SHOWN = {  # what each shows: players as frames, sheets as pictures
    "attention_in_five_lines": {"text/html": 1, "image/png": 1},
    "a_finished_run": {"text/html": 1, "image/png": 2},
    "backfill_checkpoints": {"text/html": 1},
}


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS} == SHOWN.keys()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are not committed"
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    outputs = [output for cell in code for output in cell.outputs]
    errors = [output.text for output in outputs if output.output_type == "stream" and "Traceback" in output.text]
    assert not errors
    data = [output.data for output in outputs if "data" in output]
    for kind, least in SHOWN[path.stem].items():
        assert sum(kind in found for found in data) >= least, kind
    assert any(found.get("text/html", "").startswith("<iframe sandbox=") for found in data), "a player"
