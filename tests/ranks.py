"""Run commands of the project in float32, one after another in one process, or in several at once:

    python tests/ranks.py train_vq.py --steps 20                            # a CPU without bf16, as it were
    torchrun --nproc-per-node=4 tests/ranks.py train_vq.py --steps 20 + train_gpt.py --steps 20 --shard
    torchrun --nproc-per-node=2 tests/ranks.py pictures FOLDER 8 OUT        # the colours that an epoch shows

Beside each checkpoint NAME.pt, process r writes NAME.r.bytes: how much it holds of the weights, as much again
for their gradients, and the optimizer's state.
"""
import contextlib
import io
import json
import os
import sys
from itertools import groupby, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

import runs

runs.fast_dtype = lambda device: torch.float32       # before the others import it

import train_gpt
import train_vq
import training
from data import load_data

SCRIPTS = {"train_vq.py": train_vq, "train_gpt.py": train_gpt}


def local_bytes(tree):
    """Of all tensors in dicts and lists, what this process holds."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if torch.is_tensor(leaf)]
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def counted(nets, optimizers):
    state = training.training_state(nets, optimizers)
    sizes = dict(weights=local_bytes(state["raw"]), gradients=local_bytes(state["raw"]),
                 optimizer=local_bytes(state["optimizer"]))
    Path(out).with_suffix(f".{runs.rank_and_world()[0]}.bytes").write_text(json.dumps(sizes))
    return state


def pictures(folder, batch_size, out):
    """Write OUT.r: red + 256 green of each picture of this process's part of an epoch, and what was told."""
    os.cpu_count = lambda: 4                                     # two workers for each of two processes
    with contextlib.redirect_stderr(io.StringIO()) as told:
        train, batch_size = load_data(folder, "train", 16, captioned=True), int(batch_size)
        batches = islice(train.batches(batch_size, seed=0), len(train) // batch_size)
        colours = torch.cat([batch[:, :2, 8, 8] for batch in batches])                   # (M / W, 2)
    red, green = (colours * 127.5 + 127.5).round().long().T
    Path(f"{out}.{runs.rank_and_world()[0]}").write_text(json.dumps(
        dict(seen=(red + 256 * green).tolist(), told=told.getvalue())))


if __name__ == "__main__":
    train_vq.training_state = train_gpt.training_state = counted
    for command, words in groupby(sys.argv[1:], lambda word: word == "+"):
        script, *flags = words
        if script == "pictures":
            pictures(*flags)
        elif not command:
            args = SCRIPTS[script].get_args(flags)
            out = args.out
            SCRIPTS[script].main(args)
    if dist.is_initialized():
        dist.destroy_process_group()
