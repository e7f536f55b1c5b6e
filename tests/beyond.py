"""Beyond the paper, measured: plain LlamaGen beside guidance schedules, CCA and the order of neighbours.

    python tests/beyond.py                           # three seeds of each; trains what out/beyond lacks
    python tests/beyond.py --seeds 1 --scale 0.1     # a tenth of the steps, one seed: to see that it works

All runs of a seed take the same time: a step by neighbours takes 1.026 times as long as a plain one, one of
CCA 2.93 times (CPU time, in turns, one thread of an Intel Xeon with AMX), and CCA's share is a fifth, after a
shorter plain run. Writes --out/table.json, of which notebooks/beyond.json is a copy, and prints it.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fid
import train_gpt
from model import GPT, load_gpt, packed
from runs import counting, pick_device, positive, run
from sample import generate
from tokenizer import load_tokenizer, to_pictures

VQ, PLAIN = str(ROOT / "notebooks/weights/vq.pt"), 1500          # steps: 10 minutes of one thread
RUNS = {                                                         # flags of train_gpt.py
    "plain": ["--steps", PLAIN],
    "base": ["--steps", PLAIN * 4 // 5],
    "cca": ["--cca", "BASE", "--optimizer", "adamw", "--lr", "6e-4", "--warmup", "0", "--cca-beta", "0.1",
            "--cca-lambda", "30", "--steps", round(PLAIN / 5 / 2.93)],
    "neighbours": ["--order", "neighbours", "--steps", round(PLAIN / 1.026)],
}
ROWS = {                                                         # which run draws, and how
    "plain, no guidance": ("plain", {}),
    "plain, guidance 1.5": ("plain", dict(cfg_scale=1.5)),
    "plain, guidance 2": ("plain", dict(cfg_scale=2.0)),
    "plain, linear to 2": ("plain", dict(cfg_scale=2.0, cfg_schedule="linear")),
    "plain, linear to 3": ("plain", dict(cfg_scale=3.0, cfg_schedule="linear")),
    "plain, cosine to 2": ("plain", dict(cfg_scale=2.0, cfg_schedule="cosine")),
    "plain, guidance 1.5, 12 tokens ahead": ("plain", dict(cfg_scale=1.5, jacobi=12)),
    "CCA, no guidance": ("cca", {}),
    "neighbours, no guidance": ("neighbours", {}),
    "neighbours, guidance 1.5": ("neighbours", dict(cfg_scale=1.5)),
    "neighbours, guidance 2": ("neighbours", dict(cfg_scale=2.0)),
}
FIGURES = {"class": "Class accuracy", "outline": "Outline", "FID": "FID-classifier",
           "recall": "Recall-classifier"}


def checkpoint(args, name, seed):
    return Path(args.out) / f"{name}_{seed}.pt"


def train(args, seed):
    """All RUNS of a seed that are not there yet."""
    for name, flags in RUNS.items():
        out = checkpoint(args, name, seed)
        if not out.exists():
            base = str(checkpoint(args, "base", seed))
            flags = [max(2, round(flag * args.scale)) if isinstance(flag, int) else flag.replace("BASE", base)
                     for flag in flags]
            flags += ["--limit", args.limit] if args.limit else []
            flags += ["--device", args.device] if args.device else []
            train_gpt.main(train_gpt.get_args(["--vq", args.vq, "--seed", str(seed), "--out", str(out),
                                               "--eval-every", "100000", *map(str, flags)]))


def draw(gpt, vq, settings, images, device):
    """uint8 (images, H, W, 3) of classes in turn, and their tokens (images, N)."""
    classes, tokens = torch.arange(images, device=device) % gpt.config.num_classes, []
    for i, part in enumerate(classes.split(100)):
        tokens.append(generate(gpt, part, generator=torch.Generator(device).manual_seed(i), **settings))
    tokens = torch.cat(tokens)
    return to_pictures(vq, tokens).cpu().numpy(), tokens


def quality(args, device, table):
    """Fill each row's figures, a list over the seeds, and the tokens of ten pictures of the first one."""
    judge = fid.Judged(fid.get_args(["shapes", "--sweep", "1", "--vq", args.vq, "--num-samples",
                                     str(args.images)]), device)
    vq, path = load_tokenizer(args.vq, device), Path(args.out) / "samples.npz"
    for seed in range(args.seeds):
        for name, (made_by, settings) in ROWS.items():
            if "jacobi" in settings:                             # the pictures of another row
                continue
            gpt = load_gpt(checkpoint(args, made_by, seed), device=device)
            images, tokens = draw(gpt, vq, settings, args.images, device)
            np.savez(path, arr_0=images, label=np.arange(args.images) % gpt.config.num_classes)
            measured, row = judge.measure(path), table.setdefault(name, {})
            for short, long in FIGURES.items():
                row.setdefault(short, []).append(measured[long])
            if seed == 0:
                row["tokens"] = tokens[:10].tolist()
            print(seed, name, {short: round(row[short][-1], 3) for short in FIGURES}, flush=True)


def speed(args, device, table):
    """Passes, counted, and ms per picture at batch 1 and 64: all rows in turn, the best of the rounds."""
    gpts, passes, step = {}, [0], GPT.step
    for name, (made_by, _) in ROWS.items():
        if made_by not in gpts:                                  # packed once, as sample.py does
            gpts[made_by] = packed(load_gpt(checkpoint(args, made_by, 0), device=device))

    def counted(self, *given):
        passes[0] += 1
        return step(self, *given)

    vq, GPT.step = load_tokenizer(args.vq, device), counted
    for B in (1, 64):
        for turn in range(args.rounds):
            for name, (made_by, settings) in ROWS.items():
                row, passes[0] = table.setdefault(name, {}), 0
                began = time.perf_counter()
                shapes = (torch.arange(B, device=device) + turn) % 10
                tokens = generate(gpts[made_by], shapes,
                                  generator=torch.Generator(device).manual_seed(turn), **settings)
                to_pictures(vq, tokens).cpu()
                row.setdefault(f"all ms, {B}", []).append(1000 * (time.perf_counter() - began) / B)
                row.setdefault(f"all passes, {B}", []).append(1 + passes[0])
        for row in table.values():
            row[f"ms, {B}"] = min(row.pop(f"all ms, {B}"))
            row[f"passes, {B}"] = float(np.mean(row.pop(f"all passes, {B}")))
    GPT.step = step


def main(args):
    device, table = pick_device(args.device), {}
    for seed in range(args.seeds):
        train(args, seed)
    quality(args, device, table)
    speed(args, device, table)
    with open(Path(args.out) / "table.json", "w", encoding="utf-8") as file:
        json.dump(table, file)
    print("| | passes, 1 picture | 64 | ms, 1 picture | each of 64 | right class % | right outline % | "
          "FID-classifier | recall |")
    print("|---" * 9 + "|")
    for name, row in table.items():
        shown = [f"{k * np.mean(row[key]):.{d}f} ({k * min(row[key]):.{d}f} - {k * max(row[key]):.{d}f})"
                 for key, k, d in (("class", 100, 1), ("outline", 100, 1), ("FID", 1, 2), ("recall", 1, 2))
                 ] if "class" in row else ["as guidance 1.5", "", "", ""]
        print(f"| {name} | {row['passes, 1']:.0f} | {row['passes, 64']:.0f} | {row['ms, 1']:.0f} | "
              f"{row['ms, 64']:.1f} | " + " | ".join(shown) + " |")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vq", default=VQ, help="the tokenizer of all runs")
    parser.add_argument("--out", default="out/beyond", help="folder of the runs and of table.json")
    parser.add_argument("--seeds", type=counting, default=3, help="0, 1, ... so many")
    parser.add_argument("--scale", type=positive, default=1.0, help="a share of the steps")
    parser.add_argument("--limit", type=counting, help="pictures to train on; all if left out")
    parser.add_argument("--images", type=counting, default=1000, help="drawn for each row and seed")
    parser.add_argument("--rounds", type=counting, default=5, help="turns of the timing")
    parser.add_argument("--device", help="cpu, cuda, ...; the best there is if left out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, get_args)
