"""How fast is it here, and how far from what this machine can do?

    python tests/bench.py                    # GPT-B and VQ-16: some eight minutes on 2 cores
    python tests/bench.py --size tiny --only decode --json bench.json
    python tests/bench.py --only serving --images 1 8 32             # where vLLM is, beside it

Every limit is measured in the same run: the speed of reading memory, of multiplying matrices, of convolving.
    decoding   one step reads every weight of a matrix once, and what the caches hold
    training   6 FLOP for each weight and token (2 forward, 4 backward); attention 12 S D a layer and token
    tokenizer  2 FLOP for each weight and place that its convolutions go over, counted by hooks
Turns: each round times every line of a table once; what is printed is the best of the rounds.
"""
import argparse
import copy
import json
import platform
import re
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from model import GPT, GPT_SIZES, GPTConfig, quantize
from sample import cache_bytes
from runs import InputError, counting, fast_dtype, mixed_precision, pick_device, run
from tokenizer import VQ_SIZES, VQConfig, VQModel


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device):
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def best_of_turns(works, device, rounds):
    """Seconds of each of the works {name: function}: all in turn, round after round, the best of each."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds + 1):                                  # the first one warms up
        for name, work in works.items():
            best[name] = min(best[name], seconds(work, device))
    return best


def peak_bytes(device, start=False):
    """Most memory in use since the last call with start: of a GPU, or of this process (Linux), else None."""
    if device.type == "cuda":
        ask = torch.cuda.reset_peak_memory_stats if start else torch.cuda.max_memory_allocated
        return ask(device)
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None
    if start:
        return peak.write_text("5")                              # the high-water mark, back to what is in use
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def limits(device):
    """What the machine gives: bytes/s read, FLOP/s of products in float32 and bf16 and of convolutions."""
    block, n = torch.ones(2 ** 27, device=device), 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    half = a.to(fast_dtype(device)), b.to(fast_dtype(device))
    picture = torch.randn(4, 128, 128, 128, device=device).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(128, 128, 3, padding=1).to(device, memory_format=torch.channels_last)
    best = best_of_turns({"read": block.sum, "float32": lambda: a @ b.T, "fast": lambda: half[0] @ half[1].T,
                          "conv": lambda: conv(picture)}, device, 8)
    return {"read_bytes": 4 * len(block) / best["read"], "float32_flop": 2 * n ** 3 / best["float32"],
            "fast_flop": 2 * n ** 3 / best["fast"],
            "conv_flop": 2 * conv.weight.numel() * picture[:, 0].numel() / best["conv"]}


def linear_weights(net):
    return sum(part.weight.numel() for part in net.modules() if isinstance(part, nn.Linear))


def decode(args, device, limit):
    """Whole pictures with guidance: seconds, beside the time of reading weights and caches."""
    gpt = random_gpt(args.size, 256, device)
    if device.type == "cpu":                                     # "nn.Linear": PyTorch's own product
        kinds = {"nn.Linear": (gpt, 4), "packed": (gpt, 4), "bf16": (quantize(gpt, 16), 2),
                 "int8": (quantize(gpt), 1)}
    else:
        half = random_gpt(args.size, 256, device).to(fast_dtype(device))
        kinds = {"float32": (gpt, 4), "bf16": (half, 2), "int8": (quantize(half), 1)}
    first, packed = next(iter(kinds)), sample.packed

    def draw(kind, images):
        sample.packed = (lambda gpt: gpt) if kind == "nn.Linear" else packed
        cond = torch.arange(images, device=device) % 1000
        sample.generate(kinds[kind][0], cond, cfg_scale=2.0)
        sample.packed = packed

    rows = []
    for images in args.images:
        best = best_of_turns({kind: lambda kind=kind: draw(kind, images) for kind in kinds}, device,
                             args.rounds)
        for kind, (_, size) in kinds.items():
            caches = cache_bytes(gpt.config, 2 * images, 128, 2 if device.type == "cuda" and size < 4 else 4)
            floor = 256 * (linear_weights(gpt) * size + caches) / limit["read_bytes"]
            rows.append({"images": images, "weights": kind, "seconds": best[kind],
                         "ms per token": best[kind] / 256 * 1e3, "images/s": images / best[kind],
                         "speed-up": best[first] / best[kind], "times floor": best[kind] / floor})
    return rows


def growth(args, device, limit):
    """Milliseconds a token in the middle of the picture, peak memory and caches, against batch and grid."""
    return [middle_step(args.size, device, side, images)
            for side, batches in ((16, (1, 4, 16, 64)), (24, (1, 8)), (32, (1, 8))) for images in batches]


def middle_step(size, device, side, images):
    """A row of `growth`. Its GPT and caches are gone before those of the next are made."""
    gpt = sample.packed(random_gpt(size, side ** 2, device))
    peak_bytes(device, start=True)
    caches = gpt.new_caches(2 * images)
    for cache in caches:
        cache.k.fill_(0), cache.v.fill_(0)                       # else their pages are not there yet
    place = slice(side ** 2 // 2, side ** 2 // 2 + 1)
    token = torch.zeros(2 * images, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        s = best_of_turns({"step": lambda: gpt.step(token, place, None, caches)}, device, 4)["step"]
    return {"grid": side, "images": images, "ms per token": s * 1e3, "ms per image": s * 1e3 / images,
            "peak MB": (peak_bytes(device) or 0) / 1e6,
            "caches MB": sum(c.k.nbytes + c.v.nbytes for c in caches) / 1e6,
            "by formula": cache_bytes(gpt.config, 2 * images, side ** 2 + 1) / 1e6}


def training(args, device, limit):
    """Steps of 4 pictures of 256 tokens: forward, backward, clipping, fused AdamW."""
    gpt = random_gpt(args.size, 256, device).train()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4, fused=True)
    tokens, c = torch.randint(16384, (4, 256), device=device), gpt.config
    flop = 4 * 256 * (6 * linear_weights(gpt) + 12 * c.n_layer * 256 * c.dim / 2)        # half: it is causal

    def step(precision):
        with precision():
            loss = gpt(tokens[:, :-1], tokens[:, 0] % 1000, tokens, want_logits=False)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    works = {"float32": lambda: step(nullcontext), "fast": lambda: step(lambda: mixed_precision(device))}
    names = {"float32": "float32", "fast": str(fast_dtype(device)).removeprefix("torch.")}
    return [{"products in": names[kind], "s per step": s, "tokens/s": 1024 / s,
             "share of peak": flop / s / limit[f"{kind}_flop"]}
            for kind, s in best_of_turns(works, device, args.rounds).items()]


def tokenizer(args, device, limit):
    """Pictures of 256 x 256 pixels to tokens and back, beside their convolutions at the measured peak."""
    vq = VQModel(VQConfig(**VQ_SIZES["VQ-tiny" if args.size == "tiny" else "VQ-16"])).eval().to(
        device, memory_format=torch.channels_last)
    flop = {}
    for part in vq.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda part, given, out: flop.update(
                now=flop.get("now", 0) + 2 * part.weight.numel() * out[:, 0].numel()))
    rows = []
    with torch.inference_mode():
        for count in (1, 8):
            images = torch.rand(count, 3, 256, 256, device=device) * 2 - 1
            tokens = vq.tokenize(images)
            works = {"tokenize": lambda: vq.tokenize(images), "detokenize": lambda: vq.detokenize(tokens)}
            needed = {}
            for name, work in works.items():
                flop["now"] = 0
                work()
                needed[name] = flop["now"]
            for name, s in best_of_turns(works, device, args.rounds).items():
                rows.append({"images": count, "work": name, "seconds": s, "s per image": s / count,
                             "times floor": s / (needed[name] / limit["conv_flop"])})
    return rows


def random_gpt(size, block_size, device):
    """Speed does not depend on what the weights know; but no logits are all alike in a trained model."""
    gpt = GPT(GPTConfig(**GPT_SIZES[size], block_size=block_size)).eval().to(device)
    nn.init.normal_(gpt.output.weight, std=0.02)
    return gpt


def serving(args, device, limit):
    """generate beside vLLM (serve_vllm.py, in its environment): seconds of whole pictures with guidance."""
    import serve_vllm
    gpt = random_gpt(args.size, 64 if args.size == "tiny" else 256, device)
    half = gpt if device.type == "cpu" else copy.deepcopy(gpt).to(fast_dtype(device))
    ours = {"float32": lambda: sample.packed(gpt), "bf16": lambda: quantize(gpt, 16) if half is gpt else half,
            "int8": lambda: quantize(half)}
    theirs = {"vLLM float32": {}, "vLLM compiled": {"enforce_eager": False},
              "vLLM bf16": {"enforce_eager": False, "dtype": "bfloat16"}}
    best = {}

    def time_it(kind, draw):
        draw(torch.arange(2, device=device), cfg_scale=2.0)      # warms up
        for images in args.images:
            s = seconds(lambda: draw(torch.arange(images, device=device), cfg_scale=2.0), device)
            best[kind, images] = min(best.get((kind, images), float("inf")), s)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpt.pt"
        torch.save({"model": gpt.state_dict(), "config": asdict(gpt.config)}, path)
        for _ in range(args.rounds):
            for (kind, make), (other, settings) in zip(ours.items(), theirs.items()):
                time_it(kind, partial(sample.generate, make()))
                engine = serve_vllm.Engine(gpt, path, max_num_seqs=64, **{"enforce_eager": True, **settings})
                time_it(other, partial(serve_vllm.generate, engine))
                engine.close()
    return [{"weights": kind} | {f"{images} images, s": best[kind, images] for images in args.images}
            for kind in (*ours, *theirs)]


TABLES = {"decode": decode, "growth": growth, "training": training, "tokenizer": tokenizer,
          "serving": serving}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="GPT-B", choices=GPT_SIZES, help="with tiny, VQ-tiny as well")
    parser.add_argument("--images", type=counting, nargs="+", default=[1, 8], help="pictures drawn at a time")
    parser.add_argument("--only", nargs="+", choices=TABLES, help="these tables alone",
                        default=[name for name in TABLES if name != "serving"])
    parser.add_argument("--rounds", type=counting, default=2, help="turns after the one that warms up")
    parser.add_argument("--device", help="cpu, cuda or mps; the best there is if left out")
    parser.add_argument("--json", help="write all numbers to this file as well")
    return parser.parse_args(argv)


def main(args):
    device = pick_device(args.device)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise InputError(f"--json {args.json}: there is no such folder")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        torch.cpu.get_capabilities().get("cpu_name") or platform.processor())
    limit = limits(device)
    result = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "limits": limit}
    read, single, fast, conv = (value / 1e9 for value in limit.values())
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}: reads {read:.0f} GB/s, "
          f"multiplies {single:.0f} GFLOP/s in float32, {fast:.0f} in {fast_dtype(device)}, convolves "
          f"{conv:.0f}")
    for table in args.only:
        result[table] = rows = TABLES[table](args, device, limit)
        print(f"\n{table}: {TABLES[table].__doc__.splitlines()[0]}")
        print("  ".join(f"{key:>12}" for key in rows[0]))
        for row in rows:
            print("  ".join(f"{value:>{max(12, len(key))}.3g}" if isinstance(value, float) else
                            f"{value:>{max(12, len(key))}}" for key, value in row.items()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main, get_args)
