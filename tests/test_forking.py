"""pytest -q tests/test_forking.py      The diffs in FORKING.md fit today's code, and what they make runs."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import QUICK, ROOT

TEXT = (ROOT / "FORKING.md").read_text(encoding="utf-8")
DIFFS = {re.search(r"^\+\+\+ b/(\S+)", diff, re.M)[1]: diff
         for diff in re.findall(r"```diff\n(.*?)```", TEXT, re.S)}
BRIEF = [*QUICK, "--steps", "2", "--eval-every", "9"]            # one preview, at the end
SHIPPED = (ROOT / "notebooks/weights/vq.pt").as_posix()

# What to run with each changed file: small, and where there is one, a property that the change has to have.
SMALL = """
import torch
from model import GPT, GPTConfig
from sample import generate
gpt = GPT(GPTConfig(dim=48, n_layer=2, n_head=4, vocab_size=96, block_size=16, num_classes=10)).eval()
for weight in gpt.parameters():
    torch.nn.init.normal_(weight, std=0.3)
cond = torch.tensor([1, 2, 3])
"""
TRY = {
    "tokenizer.py": f"""
import train_vq
from tokenizer import load_tokenizer
train_vq.main(train_vq.get_args({BRIEF} + ["--restart-every", "0", "--out", "vq.pt"]))
trained = load_tokenizer("vq.pt").quantize
untrained = type(trained)(trained.config)
learns = [name for name, weight in untrained.named_parameters() if weight.requires_grad]
assert learns == ["project.weight", "project.bias"]              # the table stays as it was drawn
assert (trained.codes().norm(dim=1) - 1).abs().max() < 1e-5
""",
    "sample.py": SMALL + """
from sample import guide
logits = torch.randn(2, 1, 96)
guided, p = guide(logits, 9.0), logits[0].softmax(dim=-1)
assert ((guided > -torch.inf) == (p >= p.max() / 10)).all()      # what is left is likely with the class
assert (generate(gpt, cond, cfg_scale=9.0) >= 0).all()
""",
    "model.py": SMALL + f"""
with torch.no_grad():                                            # cached decoding = the full forward
    for interval in (-1, 3):
        tokens = generate(gpt, cond, cfg_scale=2.0, cfg_interval=interval, temperature=0)
        logits, null = (gpt(tokens[:, :-1], who)[0] for who in (cond, torch.full_like(cond, 10)))
        guided = null + 2 * (logits - null)
        if interval > -1:
            guided[:, interval + 2:] = logits[:, interval + 2:]
        assert (tokens == guided.argmax(dim=-1)).all()
    assert not torch.allclose(logits[0, 0], gpt(tokens[:1, :-1], cond[1:2])[0][0, 0])    # the class arrives
import train_gpt
train_gpt.main(train_gpt.get_args({BRIEF} + ["--vq", "{SHIPPED}", "--out", "gpt.pt"]))
"""}


def test_there_are_three_experiments_and_a_try_for_each():
    assert DIFFS.keys() == TRY.keys()


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_is_short_fits_the_code_and_what_it_makes_runs(name, tmp_path):
    changed = re.findall(r"^[+-](?!\+\+ |-- ).*", DIFFS[name], re.M)
    assert 0 < len(changed) < 30
    assert all(len(line) <= 111 for line in changed)             # 110 and the sign in front
    if not shutil.which("git"):
        pytest.skip("git is missing, which applies the diff")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    # Inside another repository git would look for the files at that one's top, and silently find none.
    quiet = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    subprocess.run(["git", "apply", "-"], input=DIFFS[name], text=True, cwd=tmp_path, check=True,
                   env=quiet | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
    assert (tmp_path / name).read_text() != (ROOT / name).read_text()
    done = subprocess.run([sys.executable, "-c", TRY[name]], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 160
