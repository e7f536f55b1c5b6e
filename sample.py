"""Sampling: tokens one after another with a key-value cache and classifier-free guidance, then pixels.

Shapes: B images, R rows of the batch (B, or 2 B with guidance), N tokens of an image, V vocabulary,
        P given tokens, L condition tokens.
Paper:  LlamaGen (arXiv 2406.06525) section 2.2; guidance: Ho & Salimans 2022;
        guidance interval: Kynkaanniemi 2024; top-p: Holtzman 2020.
Run:    python sample.py             # a labelled grid of the model that train_gpt.py left in out/
"""
import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import image_grid, to_uint8
from model import gpt_from_checkpoint
from tokenizer import InputError, load_tokenizer, read_checkpoint, weights_hash
from train_vq import pick_device, positive, run


def filter_logits(logits, top_k=0, top_p=1.0):
    """Keep the top_k largest logits, and of those the most probable ones that reach top_p together; the rest
    is -inf.

    logits (B, V). Ties with the k-th largest stay; the token that crosses top_p stays. 0 and 1.0 switch them
    off. """
    V = logits.shape[-1]
    if 0 < top_k < V:
        values, order = logits.topk(top_k)
        logits = logits.masked_fill(logits < values[:, -1:], -torch.inf)
    if top_p < 1.0:
        values, order = logits.sort(dim=-1, descending=True)
        p = values.softmax(dim=-1)
        outside = p.cumsum(dim=-1) - p >= top_p              # the sum before this token already reaches top_p
        outside[:, 0] = False                                    # never remove the best token
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token per row from logits (B, V): (B,) int64."""
    if top_k == 1 or temperature == 0:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits / temperature, top_k, top_p)
    # The Gumbel-max trick, in its exponential form: argmax of p / e with e ~ Exp(1) is a sample of p. Unlike
    # torch.multinomial it never makes the CPU wait for the GPU.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


@torch.inference_mode()
def generate(gpt, cond, cond_mask=None, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
             prefix=None, generator=None):
    """Sample whole images as tokens, (B, N) int64.

    cond           (B,) class ids, or (B, L, E) text features with cond_mask (B, L), padding on the left
    cfg_scale      s in  logits = uncond + s (cond - uncond); 1: no guidance, no second row; 0: unconditional
    cfg_interval   i > -1: only tokens 0 .. i+1 are guided; -1: all are
    temperature    divides the logits; 0, like top_k = 1, takes the most likely token
    top_k, top_p   see filter_logits
    prefix         (B, P) tokens to keep in front, P <= N: the rest of the picture is completed
    generator      torch.Generator on the model's device, for reproducible samples
    """
    B, N, L = cond.shape[0], gpt.config.block_size, gpt.config.cls_token_num
    guided = cfg_scale != 1
    tokens = torch.zeros(B, N, dtype=torch.long, device=cond.device)
    P = 0 if prefix is None else prefix.shape[1]
    if P:
        tokens[:, :P] = prefix
    if P == N:
        return tokens

    # Both rows of guidance go through the network as one batch, twice the size: [conditional; unconditional].
    rows = lambda x: torch.cat([x, x]) if guided and x is not None else x
    both = torch.cat([cond, gpt.cls_embedding.null(cond)]) if guided else cond
    mask = gpt.attention_mask(rows(cond_mask))
    cache = gpt.new_cache(len(both))
    positions = torch.arange(L + N, device=cond.device)

    logits = gpt.start(rows(tokens[:, :P]), both, mask, cache)                   # (R, V)
    for i in range(P, N):                                        # logits are those of token i
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + cfg_scale * (conditional - unconditional)   # (B, V)
        tokens[:, i] = draw(logits, temperature, top_k, top_p, generator)
        if i == N - 1:
            break
        if guided and cfg_interval > -1 and i > cfg_interval:
            # The next token is past the interval: drop the unconditional rows, do not compute them in vain.
            guided = False
            cache = [(k[:B], v[:B]) for k, v in cache]
            mask = mask[:B] if mask.ndim == 4 else mask
        logits = gpt.step(rows(tokens[:, i]), positions[L + i:L + i + 1], mask, cache)
    return tokens


# ------------------------------------------------------------------------------------------------------------

def parse_classes(text, class_names):
    """"0,3,heart" -> [0, 3, 6]: ids or names of the model's classes."""
    classes = []
    for word in (word.strip() for word in text.split(",")):
        if word in class_names:
            classes.append(class_names.index(word))
        elif word.isdecimal() and int(word) < len(class_names):
            classes.append(int(word))
        else:
            some = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
            raise InputError(f"--classes {word!r}: use numbers from 0 to {len(class_names) - 1}, or names: "
                             f"{some}")
    return classes


def load_models(args, device):
    """The GPT, its tokenizer and the names of its classes; one line if the two do not belong together."""
    checkpoint = read_checkpoint(args.gpt, mmap=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gpt = gpt_from_checkpoint(checkpoint, args.gpt, args.image_size, device, dtype)
    if gpt.config.model_type != "c2i":
        raise InputError(f"{args.gpt} is conditioned on text: this command samples class-conditional models")
    vq = load_tokenizer(args.vq, device)
    if vq.config.codebook_size != gpt.config.vocab_size:
        raise InputError(f"{args.gpt} and {args.vq} do not belong together: the GPT predicts "
                         f"{gpt.config.vocab_size:,} tokens, the codebook has "
                         f"{vq.config.codebook_size:,} entries")
    if "vq_hash" in checkpoint and checkpoint["vq_hash"] != weights_hash(vq):
        raise InputError(f"{args.gpt} and {args.vq} do not belong together: the GPT was trained on the "
                         "tokens of another tokenizer. Pass that one as --vq, or run train_gpt.py again")
    names = checkpoint.get("class_names") or [str(i) for i in range(gpt.config.num_classes)]
    return gpt, vq, names


def sample_images(gpt, vq, classes, args, device):
    """Pictures of the given classes, uint8 (M, H, W, 3), in batches; prints how fast that was."""
    generator = torch.Generator(device).manual_seed(args.seed)
    classes = torch.tensor(classes, device=device)
    side = math.isqrt(gpt.config.block_size) * vq.config.downsample
    images = np.empty((len(classes), side, side, 3), np.uint8)
    started = time.perf_counter()
    for i in tqdm(range(0, len(classes), args.batch_size), desc="sampling", unit=" batches"):
        tokens = generate(gpt, classes[i:i + args.batch_size], None, args.cfg_scale, args.cfg_interval,
                          args.temperature, args.top_k, args.top_p, generator=generator)
        with torch.inference_mode():
            images[i:i + args.batch_size] = to_uint8(vq.detokenize(tokens)).cpu().numpy()
    seconds = time.perf_counter() - started
    print(f"{len(images)} images in {seconds:.1f} s on {device}: "
          f"{len(images) * gpt.config.block_size / seconds:,.0f} tokens/s, "
          f"{len(images) / seconds:.2f} images/s")
    return images


def save_npz(path, images, labels):
    """The evaluators' format: arr_0 uint8 (M, H, W, 3), label int64 (M,)."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:                  # a file object, or NumPy would append .npz to the name
        np.savez(file, arr_0=images, label=labels)
    partial.replace(path)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("models")
    group.add_argument("--gpt", default="out/gpt.pt", help="train_gpt.py's checkpoint or a released one")
    group.add_argument("--vq", default="out/vq.pt", help="the tokenizer that the GPT was trained with")
    group.add_argument("--image-size", type=positive(int),
                       help="released GPTs only: pixels of its grid, 256 if left out")
    group = parser.add_argument_group("what to draw")
    group.add_argument("--classes",
                       help="ids or names, separated by commas: one row each; all (at most ten) if left out")
    group.add_argument("--per-class", type=positive(int), default=8, help="pictures per row")
    group.add_argument("--out", default="out/samples.png", help="the labelled grid")
    group.add_argument("--npz", help="instead of a grid, write --num-samples pictures for fid.py, balanced "
                                     "over classes")
    group.add_argument("--num-samples", type=positive(int), default=1000, help="pictures in the --npz")
    group = parser.add_argument_group("how to sample")
    group.add_argument("--cfg-scale", type=float, default=2.5, help="guidance; 1: none, 0: unconditional")
    group.add_argument("--cfg-interval", type=int, default=-1, help="i: guide tokens 0 to i+1 only; -1: all")
    group.add_argument("--temperature", type=float, default=0.4,
                       help="below 1: less varied; 0: the likeliest token")
    group.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    group.add_argument("--top-p", type=float, default=1.0,
                       help="draw from the likeliest tokens that make up this share")
    group.add_argument("--batch-size", type=positive(int), default=100,
                       help="pictures drawn at the same time")
    group.add_argument("--seed", type=int, default=0,
                       help="same seed, same pictures (on the same kind of device)")
    group.add_argument("--device", help="cuda, mps or cpu; the best one present if left out")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile one decoding step: slow start, faster steps")
    args = parser.parse_args(argv)
    if args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature and --top-k have to be 0 or more, --top-p above 0 and at most 1")
    return args


def main(args):
    device = pick_device(args.device)
    gpt, vq, names = load_models(args, device)
    classes = parse_classes(args.classes, names) if args.classes else list(range(len(names)))
    target = Path(args.npz or args.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    if args.compile:
        gpt.step = torch.compile(gpt.step, fullgraph=True, dynamic=False)
    if args.npz:
        labels = np.arange(args.num_samples) % len(classes)
        labels = np.array(classes)[labels]
        save_npz(target, sample_images(gpt, vq, labels.tolist(), args, device), labels)
    else:
        classes = classes[:10] if args.classes is None else classes
        labels = [c for c in classes for _ in range(args.per_class)]
        images = sample_images(gpt, vq, labels, args, device)
        image_grid(images, args.per_class, row_names=[names[c] for c in classes]).save(target)
    print(f"wrote {target}")


if __name__ == "__main__":
    run(main, get_args)
