"""Run from the root:  pytest -q      No network, no GPU needed; tests marked
`cuda` skip where there is none."""
import os
import sys
from pathlib import Path

# before torch is imported; more threads than cores starve one another
os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """golden("vq") -> inputs and outputs of the official code, and the weights as a state dict."""
    def load(name):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
            arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
        weights = {key[2:]: value.float() for key, value in arrays.items() if key.startswith("w.")}
        return arrays, weights
    return load
