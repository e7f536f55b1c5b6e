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

import train_gpt
import train_vq

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "long: takes a minute; runs if ALL_TESTS is set, as in .ci/run")


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "long" in item.keywords and not os.environ.get("ALL_TESTS"):
            item.add_marker(pytest.mark.skip(reason="takes a minute or more: set ALL_TESTS=1"))


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


# The training scripts in two small steps

QUICK = ["--limit", "64", "--device", "cpu", "--batch-size", "8", "--log-every", "1", "--eval-every", "2"]


def run_vq(tmp_path, *flags):
    train_vq.main(train_vq.get_args([*QUICK, "--out", str(tmp_path / "vq.pt"), *flags]))
    return torch.load(tmp_path / "vq.pt", weights_only=True)


def run_gpt(tmp_path, *flags):
    train_gpt.main(train_gpt.get_args([*QUICK, "--out", str(tmp_path / "gpt.pt"), "--vq",
                                       str(tmp_path / "vq.pt"), *flags]))
    return torch.load(tmp_path / "gpt.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_vq(folder, "--steps", "2")
    run_gpt(folder, "--steps", "2")
    return folder
