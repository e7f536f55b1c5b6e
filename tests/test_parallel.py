"""pytest -q tests/test_parallel.py      Many processes learn what one learns; what sizes need, on paper.

The tests marked long run where the variable ALL_TESTS is set, as in .ci/run.
"""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import kill
import model
import runs
import training
from conftest import ROOT, run_gpt, run_vq
from model import GPT, GPTConfig

long = pytest.mark.long
SAME = ["--limit", "64", "--device", "cpu", "--batch-size", "16", "--log-every", "1", "--lr", "1e-3"]
VQ = ["train_vq.py", *SAME, "--disc-start", "1000", "--restart-every", "2"]
GPT_FLAGS = ["train_gpt.py", *SAME, "--class-dropout", "0"]


def start(world, *commands):
    """tests/ranks.py with these commands, in `world` processes."""
    words = [word for command in commands for word in (*map(str, command), "+")][:-1]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return subprocess.Popen([sys.executable, *torchrun[:4 * (world > 1)], ROOT / "tests/ranks.py", *words],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert code is None or process.returncode == code, (process.returncode, err[-3000:])
    return out, err


def log(path, *names):
    """The values of each step in a log, (steps, names)."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return torch.tensor([[line[name] for name in names] for line in lines if set(names) <= line.keys()])


def held(path, rank):
    return json.loads(path.with_suffix(f".{rank}.bytes").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A tokenizer and two GPTs, for classes and for captions, trained for a few steps by one process."""
    folder = tmp_path_factory.mktemp("one")
    finish(start(1, *commands(folder, folder / "vq.pt")))
    return folder


STEPS = 20 if os.environ.get("ALL_TESTS") else 4


def commands(folder, vq, *flags, steps=STEPS):
    steps = ["--steps", steps, *flags]
    return ([*VQ, "--out", folder / "vq.pt", *steps],
            [*GPT_FLAGS, "--vq", vq, "--out", folder / "gpt.pt", *steps, "--grad-accum", 2],
            # AdamW: Muon's iterations are in bf16, whose roundings differ with the sharding.
            [*GPT_FLAGS, "--vq", vq, "--out", folder / "text.pt", *steps, "--cond", "text", "--optimizer",
             "adamw"])


@pytest.mark.parametrize("world, flags", [
    (2, ["--shard", "--checkpoint-activations"]), pytest.param(2, [], marks=long),
    pytest.param(4, [], marks=long), pytest.param(4, ["--shard"], marks=long)])
def test_the_number_of_processes_does_not_change_what_is_learnt(one, tmp_path, world, flags):
    finish(start(world, *commands(tmp_path, one / "vq.pt", *flags)))
    for name, loss in (("vq", "l2"), ("gpt", "loss"), ("text", "loss")):
        ours, theirs = (log(folder / f"{name}.jsonl", loss, "grad_norm") for folder in (tmp_path, one))
        assert len(ours) == STEPS
        torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=1e-4, atol=1e-4)
        weights, same = (torch.load(folder / f"{name}.pt", weights_only=True)["model"]
                         for folder in (tmp_path, one))
        assert weights.keys() == same.keys()
        for key in weights:
            far = (weights[key] - same[key]).abs() > 3e-4
            # Of 20,480 vectors one lies as near to a second code as to its first (their products are 1e-7
            # apart): rounding decides which, and that moves one row of the codebook.
            if key == "quantize.embedding.weight":
                assert far.any(dim=1).sum() <= 1
            else:
                assert not far.any(), (name, key)
        if flags and world == 4:
            share = [sum(held(tmp_path / f"{name}.pt", rank).values()) for rank in range(world)]
            assert max(share) <= 0.4 * sum(held(one / f"{name}.pt", 0).values()), name


@long
def test_the_adversary_plays_alike_sharded_or_not(tmp_path):
    # Its batch statistics are those of each process's part, so one process would differ from two.
    for name, flags in (("whole", []), ("sharded", ["--shard"])):
        finish(start(2, [*VQ, "--disc-start", 1, "--steps", 4, *flags, "--out", tmp_path / f"{name}.pt"]))
    whole, sharded = (log(tmp_path / f"{name}.jsonl", "l2", "gan", "disc") for name in ("whole", "sharded"))
    assert len(whole) == 3 and (whole[1:] > 0).any() and whole.isfinite().all()
    torch.testing.assert_close(whole, sharded, rtol=1e-3, atol=1e-5)


@long
def test_activations_are_computed_again_in_the_precision_of_the_first_time(one, tmp_path):
    # Without ranks.py, so in bf16 where the CPU multiplies it.
    losses = []
    for flags in ([], ["--checkpoint-activations"]):
        run_gpt(tmp_path, "--vq", str(one / "vq.pt"), "--steps", "3", *flags)
        losses.append(log(tmp_path / "gpt.jsonl", "loss", "grad_norm"))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_a_batch_that_cannot_be_shared_out_and_shards_of_one_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(runs.InputError, match="--shard.*torchrun"):
        run_vq(tmp_path, "--steps", "1", "--shard")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(runs.InputError, match="--batch-size 8 .*multiple of 3"):
        run_vq(tmp_path, "--steps", "1")


@long
def test_what_ends_torchrun_saves_and_another_number_of_processes_goes_on(one, tmp_path):
    quiet = ["train_gpt.py", *SAME, "--vq", one / "vq.pt", "--class-dropout", "0", "--steps", 40]
    often = [*quiet, "--save-minutes", 1e-9, "--out", tmp_path / "gpt.pt"]      # after each step
    saved = 0
    for world, flags in ((2, ["--shard"]), (1, ["--resume"]), (2, ["--resume"])):
        process, before = start(world, [*often, *flags]), saved
        while process.poll() is None and saved == before:
            with contextlib.suppress(FileNotFoundError):
                saved = torch.load(tmp_path / "gpt.pt", weights_only=True)["step"]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)                      # what a cluster sends at the end of the time
        finish(process, None)
        saved = torch.load(tmp_path / "gpt.pt", weights_only=True)["step"]
        assert before < saved < 40
    finish(start(4, [*often, "--resume", "--shard"]))
    finish(start(1, [*quiet, "--out", tmp_path / "whole.pt"]))
    ours, theirs = (log(tmp_path / f"{name}.jsonl", "step", "loss") for name in ("gpt", "whole"))
    assert ours[:, 0].tolist() == list(range(1, 41))             # each step once, in the log too
    torch.testing.assert_close(ours[:20], theirs[:20], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # differences in rounding grow with the steps
    assert len(list((tmp_path / "gpt.shards").iterdir())) == 2   # the newest and the one before it


def test_killed_at_any_moment_a_run_leaves_a_whole_checkpoint_and_goes_on(capsys):
    kill.main(6 if os.environ.get("ALL_TESTS") else 2, seed=1)
    assert "every time a whole checkpoint was there" in capsys.readouterr().out


def test_every_picture_of_many_archives_is_seen_once_an_epoch_and_the_broken_ones_are_counted(tmp_path):
    archives(tmp_path / "shards", shards=100, each=8)
    finish(start(2, ["pictures", tmp_path / "shards", 8, tmp_path / "seen"]))
    first, second = (json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in range(2))
    assert not set(first["seen"]) & set(second["seen"])
    held_out, broken, seen = set(range(0, 800, 20)), set(range(7, 800, 20)), first["seen"] + second["seen"]
    assert set(seen) == set(range(800)) - held_out - broken
    assert len(seen) == len(set(seen)) + len(broken)             # each once, and one in a broken one's place
    assert "skipped 40 of 760 pictures" in first["told"] and second["told"] == ""


def archives(folder, shards, each):
    """Tar archives of pictures of one colour each, of which every 20th is broken."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for i in range(shard * each, (shard + 1) * each):
                file = io.BytesIO()
                Image.new("RGB", (16, 16), (i % 256, i // 256, 99)).save(file, "PNG")
                content = file.getvalue()[:60 if i % 20 == 7 else None]
                for name, data in ((f"{i:04}.png", content), (f"{i:04}.txt", f"number {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def test_shuffling_by_arithmetic_is_a_permutation_and_another_one_for_each_seed():
    from data import batch_indices, shuffled
    for count in (1, 2, 3, 5, 64, 100, 1000, 4097):
        order = shuffled(np.arange(count), count, (0, 0))
        assert sorted(order) == list(range(count))
        if count > 50:
            assert not np.array_equal(order, shuffled(np.arange(count), count, (0, 1)))
            assert not np.array_equal(order, shuffled(np.arange(count), count, (1, 0)))
    few = shuffled(np.array([5, 10 ** 9]), 4 * 10 ** 9, 0)        # as many pictures as nobody could list
    assert (few < 4 * 10 ** 9).all() and few[0] != few[1]
    # Where a picture lands is uniform, and does not tell where its neighbour does: chi-square at 99 %.
    orders = np.array([shuffled(np.arange(16), 16, (seed, 3)) for seed in range(4000)])
    for counts, expected, limit in (
            (np.array([np.bincount(place, minlength=16) for place in orders.T]), 4000 / 16, 293),
            (np.bincount(16 * orders[:, 3] + orders[:, 4], minlength=256).reshape(16, 16), 4000 / 240, 290)):
        off = ~np.eye(16, dtype=bool) if expected < 20 else np.ones((16, 16), bool)
        assert ((counts[off] - expected) ** 2 / expected).sum() < limit
    batches = batch_indices(100, 7, seed=0)
    epoch = torch.cat([next(batches) for _ in range(14)])
    assert len(set(epoch.tolist())) == 98
    again = batch_indices(100, 7, seed=0, start=13)
    assert torch.equal(next(again), epoch[-7:]) and torch.equal(next(again), next(batches))


# on paper

def small():
    config = GPTConfig(dim=64, n_layer=3, n_head=4, vocab_size=96, block_size=64, num_classes=10)
    return GPT(config).eval()                                    # without dropout


def kept(gpt, pictures):
    """Bytes that a forward pass keeps for the backward pass beside weights, and their copies in bf16."""
    seen, weights = {}, {w.untyped_storage().data_ptr() for w in gpt.parameters()}
    shapes = {w.shape for w in gpt.parameters()} | {w.T.shape for w in gpt.parameters() if w.dim() == 2}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes:
            seen[storage.data_ptr()] = storage
        return tensor
    tokens = torch.randint(96, (pictures, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16):
        _, loss = gpt(tokens[:, :-1], torch.zeros(pictures, dtype=torch.int64), tokens)
    return sum(storage.nbytes() for storage in seen.values())


def test_the_bytes_of_activations_are_those_that_autograd_keeps(monkeypatch):
    monkeypatch.setattr(model, "LOSS_BLOCK", 96 * 64)            # six blocks, as of a large vocabulary
    # Attention on the CPU gives its result in another order, of which w_o's input is a copy: 2 D of a token.
    copies = 6 * 64 * 3 * 2 * 64
    assert kept(small(), 6) == pytest.approx(training.activation_bytes(small(), 6) + copies, rel=0.02)


def test_the_operations_are_those_that_pytorch_counts():
    gpt, tokens = small(), torch.randint(96, (2, 64))
    with FlopCounterMode(display=False) as counter:
        gpt(tokens[:, :-1], torch.tensor([1, 2]), tokens)[1].backward()
    # Its attention is not causal, so it counts both halves of S x S; of 64 tokens that is little.
    assert training.training_flops(gpt, 2) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_table_of_the_readme_is_what_the_arithmetic_gives():
    readme = (ROOT / "README.md").read_text()
    out = subprocess.run([sys.executable, "training.py"], cwd=ROOT, text=True, capture_output=True).stdout
    assert len(out.splitlines()) >= 8
    for line in out.splitlines():
        assert line.rstrip() in readme, line
