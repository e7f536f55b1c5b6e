"""pytest -q tests/test_checks.py      What the exercises' checks say to stubs, solutions and mistakes."""
import math
import re
import runpy
import sys

import nbformat
import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import run
from checks import FILES, check

PRELUDE = {"math": math, "np": np, "torch": torch, "nn": torch.nn, "F": torch.nn.functional}
EXERCISES = []                           # (exercise, code of the stub, of the solution)
for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    for cell, code in run.solutions(nbformat.read(path, as_version=4)):
        name = re.search(r'^check\("([\w.]+)"', cell.source, re.M)[1]
        EXERCISES.append(pytest.param(name, cell.source, code, id=name))


def told(code, capsys):
    """What the last check of this code prints."""
    exec(code, {"check": check, **PRELUDE})
    return capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.parametrize("name, stub, solution", EXERCISES)
def test_stubs_fail_solutions_pass_and_wrong_answers_get_sentences_of_their_own(name, stub, solution, capsys):
    assert told(stub, capsys).startswith("not yet")
    assert told(solution, capsys).startswith("yes")
    number, exercise = name.split(".")
    wrong = runpy.run_path(ROOT / "tests/answers" / f"{FILES[number]}.py")["WRONG"][exercise]
    checks = "\n".join(line for line in stub.splitlines() if line.startswith("check("))
    sentences = [told(f"{code}\n{checks}", capsys) for code, _ in wrong]
    for sentence, (_, words) in zip(sentences, wrong):
        assert sentence.startswith("not yet") and words in sentence
    assert len(set(sentences)) == len(wrong) >= 2
