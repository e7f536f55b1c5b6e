"""pytest -q tests/test_serve.py      vLLM draws the tokens that generate draws.

In the environment of tests/requirements-vllm.txt; skipped elsewhere, but for the first tests.
"""
import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch

import runs
import sample
import serve_vllm
from conftest import ROOT
from model import GPT, GPT_SIZES, GPTConfig, load_gpt
from sample import generate
from serve_vllm import Engine

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
needs_vllm = pytest.mark.skipif(serve_vllm.MISSING is not None,
                                reason="needs vLLM, tests/requirements-vllm.txt")
TINY = dict(dim=192, n_layer=2, n_head=4, vocab_size=96, block_size=64, num_classes=10)


def a_gpt(**changes):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**TINY, **changes})).eval()
    for weight in gpt.parameters():
        torch.nn.init.normal_(weight, std=0.15 if weight.dim() > 1 else 1)
    return gpt


@contextmanager
def engine(gpt, tmp_path, guided=True, path=None, **settings):
    if path is None:
        path = tmp_path / "gpt.pt"
        torch.save({"model": gpt.state_dict(), "config": asdict(gpt.config)}, path)
    serving = Engine(gpt, path, guided=guided, **{"enforce_eager": True, **settings})
    try:
        yield serving
    finally:
        serving.close()


def equal(serving, gpt, cond, mask=None, **how):
    """How many tokens are those of generate, and of how many."""
    ours = generate(gpt, cond, mask, top_k=1, **how)
    theirs = serve_vllm.generate(serving, cond, mask, top_k=1, **how)
    assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
    assert len(ours.unique()) > 10                   # one that always draws the same would prove nothing
    return (ours == theirs).sum().item(), ours.numel()


def test_without_vllm_it_is_one_line_and_help_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_vllm, "MISSING", ImportError("No module named 'vllm'"))
    with pytest.raises(runs.InputError, match="No module named 'vllm'.*requirements-vllm.txt"):
        Engine(a_gpt(), tmp_path / "gpt.pt")
    command = [sys.executable, "serve_vllm.py", "--help"]
    help = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert help.returncode == 0 and "--tensor-parallel-size" in help.stdout


def test_wrong_flags_are_one_line():
    with pytest.raises(runs.InputError, match="--dtype bfloat16"):
        serve_vllm.get_args(["--int8"])
    for flags in (["--jacobi", "4"], ["--cfg-schedule", "linear"]):
        with pytest.raises(runs.InputError, match="vLLM has neither"):
            serve_vllm.get_args(flags)
    with pytest.raises(runs.InputError, match="by neighbours"):
        serve_vllm.start(a_gpt(order="neighbours"), serve_vllm.get_args(["--gpt", "near.pt"]))
    with pytest.raises(runs.InputError, match="--cache-gb 1000000 is more memory than is free"):
        serve_vllm.start(a_gpt(), serve_vllm.get_args(["--cache-gb", "1000000"]))
    with pytest.raises(SystemExit):
        serve_vllm.get_args(["--no-such-flag", "2"])


@needs_vllm
@pytest.mark.parametrize("changes, settings", [
    ({}, {}), (dict(n_kv_head=2), {}), (dict(cond_rope="identity"), {}),
    ({}, dict(max_num_seqs=5)),                                  # an odd number of requests at a time
    ({}, dict(block_size=32, num_gpu_blocks_override=8)),        # 224 places for 10 times 65: preemption
    ({}, dict(enable_chunked_prefill=True, max_num_batched_tokens=8, max_num_seqs=8)),    # prompts in parts
    ({}, dict(enable_prefix_caching=True, block_size=32))])
def test_tokens_of_a_class_model_are_those_of_generate(tmp_path, changes, settings):
    gpt, cond = a_gpt(**changes), torch.arange(10)
    with engine(gpt, tmp_path, **settings) as serving:
        for how in (dict(cfg_scale=2.0), dict(cfg_scale=3.0, cfg_interval=9), dict(cfg_scale=1.0),
                    dict(cfg_scale=2.0, prefix=torch.arange(170).view(10, 17) % 96)):    # on the live engine
            same, of = equal(serving, gpt, cond, **how)
            assert same == of, how


@needs_vllm
def test_without_guidance_a_sequence_has_one_row_and_cannot_be_guided(tmp_path):
    gpt = a_gpt()
    with engine(gpt, tmp_path, guided=False) as serving:
        assert serving.rows == 1
        assert equal(serving, gpt, torch.arange(10)) == (640, 640)
        with pytest.raises(runs.InputError, match="cfg_scale 2.0: this engine was started without guidance"):
            serve_vllm.generate(serving, torch.arange(2), cfg_scale=2.0)


@needs_vllm
@pytest.mark.parametrize("cond_rope", ["zero", "identity"])
def test_tokens_of_a_text_model_are_those_of_generate_whatever_is_padded(tmp_path, cond_rope):
    gpt = a_gpt(model_type="t2i", cls_token_num=6, caption_dim=32, cond_rope=cond_rope)
    cond = torch.randn(6, 6, 32)
    mask = (torch.arange(6) >= torch.arange(6)[:, None]).long()          # none, 1, ..., 5 of 6 are padding
    with engine(gpt, tmp_path) as serving:
        for how in (dict(cfg_scale=2.0), dict(cfg_scale=3.0, cfg_interval=9)):
            assert equal(serving, gpt, cond, mask, **how) == (384, 384)
        # That this can fail: without the mask; with the other rows of the table.
        ours = generate(gpt, cond, mask, cfg_scale=2.0, top_k=1)
        assert not torch.equal(serve_vllm.generate(serving, cond, None, cfg_scale=2.0, top_k=1)[1:], ours[1:])
        other = a_gpt(model_type="t2i", cls_token_num=6, caption_dim=32,
                      cond_rope="zero" if cond_rope == "identity" else "identity")
        same, of = equal(serving, other, cond, mask, cfg_scale=2.0)
        assert same < of


@needs_vllm
def test_a_released_file_is_served(tmp_path, monkeypatch):
    monkeypatch.setitem(GPT_SIZES, "small", dict(n_layer=2, n_head=4, dim=64))
    gpt = a_gpt(num_classes=1000, vocab_size=16384, block_size=256, dim=64, n_head=4)
    path = tmp_path / "c2i.pt"
    torch.save({"model": gpt.state_dict()}, path)
    gpt = load_gpt(path, 256)
    with engine(gpt, tmp_path, path=path, image_size=256) as serving:
        assert equal(serving, gpt, torch.tensor([3, 999]), cfg_scale=4.0) == (512, 512)


@needs_vllm
@pytest.mark.parametrize("how", [dict(), dict(temperature=0.5), dict(top_k=7), dict(top_p=0.6),
                                 dict(temperature=1.3, top_k=20, top_p=0.8)])
def test_first_tokens_are_drawn_with_their_probabilities(tmp_path, how):
    gpt = a_gpt(block_size=1, vocab_size=32)
    logits = gpt(torch.zeros(2, 0, dtype=torch.long), torch.tensor([3, 10]))[0][:, 0]            # class, null
    logits = sample.guide(logits, 1.5) / how.get("temperature", 1)
    p = sample.filter_logits(logits, how.get("top_k", 0), how.get("top_p", 1.0)).softmax(-1)[0]
    with engine(gpt, tmp_path) as serving:
        drawn = serve_vllm.generate(serving, torch.full((3000,), 3), cfg_scale=1.5,
                                    generator=torch.Generator().manual_seed(0), **how)
    counts = torch.bincount(drawn.flatten(), minlength=32)
    assert (counts[p == 0] == 0).all()
    # Pearson's statistic over the tokens that are expected at least 5 times: mean k - 1, variance 2 (k - 1).
    often = 3000 * p >= 5
    k, expected = often.sum() - 1, 3000 * p[often]
    assert ((counts[often] - expected) ** 2 / expected).sum() < k + 4 * (2 * k) ** 0.5


@needs_vllm
def test_many_captions_are_drawn_by_seed_and_no_two_alike(tmp_path):
    gpt = a_gpt(model_type="t2i", cls_token_num=40, caption_dim=32, block_size=4)
    with engine(gpt, tmp_path, max_num_batched_tokens=64, max_num_seqs=20) as serving:   # below two prompts
        draw = lambda: serve_vllm.generate(serving, torch.ones(20, 40, 32), cfg_scale=2.0,
                                           generator=torch.Generator().manual_seed(3))
        drawn = draw()
        assert torch.equal(draw(), drawn) and len(drawn.unique(dim=0)) > 10


@needs_vllm
def test_two_processes_share_the_matrices(tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
from pathlib import Path
import torch, test_serve
if __name__ == "__main__":
    gpt = test_serve.a_gpt()
    with test_serve.engine(gpt, Path({str(tmp_path)!r}), tensor_parallel_size=2) as serving:
        print("equal:", test_serve.equal(serving, gpt, torch.arange(10), cfg_scale=2.0))
"""
    (tmp_path / "two.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "two.py"], text=True, capture_output=True, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "equal: (640, 640)" in done.stdout, done.stderr[-2000:]


@needs_vllm
def test_the_command_draws_a_sheet_and_an_npz(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "ready", sample.ready)           # and back again
    monkeypatch.setattr(sample, "generate", sample.generate)
    out = str(tmp_path / "s.png")
    models = ["--vq", str(trained / "vq.pt"), "--gpt", str(trained / "gpt.pt"), "--device", "cpu",
              "--cache-gb", "1", "--out", out]
    with pytest.raises(runs.InputError, match="draws classes, not prompts"):
        serve_vllm.main(serve_vllm.get_args([*models, "--prompts", "a cat"]))
    serve_vllm.main(serve_vllm.get_args([*models, "--per-class", "2"]))
    assert (tmp_path / "s.png").stat().st_size > 1000
    gc.collect()                                                 # one engine at a time
    serve_vllm.main(serve_vllm.get_args([*models, "--npz", str(tmp_path / "s.npz"), "--num-samples", "12"]))
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (12, 32, 32, 3) and len(np.unique(file["arr_0"], axis=0)) > 6
