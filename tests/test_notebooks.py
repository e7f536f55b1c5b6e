"""pytest -q tests/test_notebooks.py      Each notebook runs from its first cell to its last, and is stored
with outputs in the form that notebooks/run.py gives it."""
import json
import sys

import nbformat
import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import course
import make_weights
import run
from runs import read_checkpoint, weights_hash
from sample import generate
from tokenizer import to_pictures

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_offline_without_errors(path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")       # whoever asks the network gets no answer
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    notebook = nbformat.read(path, as_version=4)
    run.execute(notebook, fast=True, solve=True)     # few steps, and solutions in the places of exercises
    assert not list(run.faults(notebook))
    asked = [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]
    assert asked and all("yes: " in str(cell.outputs) for cell in asked)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    notebook = nbformat.read(path, as_version=4)
    assert run.sources_hash(notebook) == notebook.metadata["course"]["sources"], "edited and not run again"
    assert not list(run.faults(notebook)) and "MINUTES" not in path.read_text()
    outputs = [output for cell in cells for output in cell["outputs"]]
    pictures = [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]
    assert len(pictures) >= 5
    assert not any(output["output_type"] == "error" for output in outputs)


def test_all_notebooks_together_are_a_small_download():
    assert NOTEBOOKS and sum(path.stat().st_size for path in NOTEBOOKS) <= run.ALL


@pytest.mark.parametrize("numbers, message", [(["12"], "no notebook 12: there are 1, "),
                                              (["1", "x"], "no notebook x")])
def test_a_notebook_that_there_is_not_is_one_line(numbers, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", *numbers])
    with pytest.raises(SystemExit, match=message):
        run.main()


def test_the_weights_that_come_along_are_small_and_belong_together():
    assert {path.stem for path in course.WEIGHTS.iterdir()} == make_weights.RUNS.keys()
    assert sum(path.stat().st_size for path in course.WEIGHTS.iterdir()) < 15e6
    for vq, gpt in (("vq", "gpt"), ("text_vq", "text_gpt")):
        saved = read_checkpoint(course.WEIGHTS / f"{gpt}.pt")
        assert saved["vq_hash"] == weights_hash(course.load(vq)), f"{gpt} was trained on other tokens"
        assert {weight.dtype for weight in saved["model"].values()} == {torch.float16}
    classes = torch.arange(10).repeat(10)
    with torch.no_grad():
        pictures = to_pictures(course.load("vq"), generate(course.load("gpt"), classes, temperature=0.5))
        seen = course.load("judge").features(pictures.permute(0, 3, 1, 2))["logits"].argmax(-1)
    assert (seen == classes).float().mean() > 0.8
    assert course.load("text").eval() and course.load("text_gpt").config.model_type == "t2i"


@pytest.mark.parametrize("folder", ["README.md", "notebooks", "notebooks/../notebooks"])
def test_copies_for_a_class_overwrite_nothing(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="would be overwritten"):
        course.without_solutions(folder)


def test_rounding_touches_float32_alone():
    given = {"a": torch.tensor([1 / 3]), "b": {"c": torch.tensor([7]), "d": "words"}}
    assert make_weights.half(given)["a"].dtype == torch.float16
    assert make_weights.half(given)["b"] == {"c": torch.tensor([7]), "d": "words"}
