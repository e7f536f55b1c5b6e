"""pytest -q tests/test_notebooks.py      Each notebook runs from its first cell
to its last and is stored with outputs."""
import json
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_offline_without_errors(path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")       # whoever asks the network gets no answer
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    notebook = nbformat.read(path, as_version=4)
    if "course" in notebook.metadata:            # few steps, and the solutions in the exercises' places
        run.execute(notebook, fast=True, solve=True)
        assert not list(run.faults(notebook))
        asked = [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]
        assert asked and all("yes: " in str(cell.outputs) for cell in asked)
        return
    NotebookClient(notebook, timeout=280, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    course = nbformat.read(path, as_version=4)
    if "course" in course.metadata:              # else it is not one of the course's
        assert run.sources_hash(course) == course.metadata["course"]["sources"], "edited and not run again"
        assert not list(run.faults(course))
    outputs = [output for cell in cells for output in cell["outputs"]]
    pictures = [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]
    assert len(pictures) >= 5
    assert not any(output["output_type"] == "error" for output in outputs)
