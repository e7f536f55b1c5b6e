"""pytest -q tests/test_bench.py"""
import json
from pathlib import Path

import pytest
import torch

import beyond
import bench
import fid
import runs
from model import GPT, GPT_SIZES, GPTConfig


def test_it_prints_tables_beside_the_limits_of_the_same_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "limits", lambda device: dict(read_bytes=1e9, float32_flop=1e9, fast_flop=1e9,
                                                             conv_flop=1e9))
    bench.main(bench.get_args(["--size", "tiny", "--rounds", "1", "--only", "training", "--device", "cpu",
                               "--json", str(tmp_path / "b.json")]))
    told, found = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "training: Steps of 4 pictures" in told and "share of peak" in told
    for row in found["training"]:
        assert row["tokens/s"] == pytest.approx(1024 / row["s per step"]) and row["share of peak"] > 0
    with pytest.raises(runs.InputError, match="no such folder"):
        bench.main(bench.get_args(["--json", str(tmp_path / "none" / "b.json")]))


def test_bytes_and_weights_by_formula_are_those_of_the_tensors():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**GPT_SIZES["GPT-B"]))
    assert bench.linear_weights(gpt) == 12 * (4 * 768 ** 2 + 3 * 768 * 2048) + 768 * 16384
    small = GPT(GPTConfig(dim=64, n_layer=2, n_head=4, n_kv_head=2, vocab_size=8, block_size=16))
    assert bench.cache_bytes(small.config, 6, 17) == sum(c.k.nbytes + c.v.nbytes for c in small.new_caches(6))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_the_peak_is_that_since_its_start():
    cpu = torch.device("cpu")
    torch.ones(2 ** 28)                                          # 1 GiB, gone again
    bench.peak_bytes(cpu, start=True)
    before = bench.peak_bytes(cpu)
    torch.ones(2 ** 26)
    assert 2 ** 28 * 0.9 < bench.peak_bytes(cpu) - before < 2 ** 28 * 1.5


@pytest.mark.long
def test_beyond_trains_what_is_missing_and_fills_every_row_of_its_table(tmp_path, capsys, monkeypatch):
    class Judge:
        def __init__(self, args, device):
            pass

        def measure(self, path):
            return dict.fromkeys(beyond.FIGURES.values(), 0.5)

    monkeypatch.setattr(fid, "Judged", Judge)
    flags = ["--out", str(tmp_path), "--seeds", "1", "--scale", "0.001", "--limit", "64", "--images", "10",
             "--rounds", "1"]
    beyond.main(beyond.get_args([*flags, "--device", "cpu"]))
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert table.keys() == beyond.ROWS.keys()
    assert table["plain, no guidance"]["passes, 1"] == 64
    assert table["neighbours, guidance 2"]["passes, 1"] == 15
    assert 1 < table["plain, guidance 1.5, 12 tokens ahead"]["passes, 1"] <= 64
    told = capsys.readouterr().out
    assert "| CCA, no guidance | 64 | 64 |" in told and "| as guidance 1.5 |" in told
    before = (tmp_path / "plain_0.pt").stat().st_mtime_ns
    beyond.train(beyond.get_args(flags), 0)
    assert (tmp_path / "plain_0.pt").stat().st_mtime_ns == before
