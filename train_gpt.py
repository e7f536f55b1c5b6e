"""Train the GPT on the tokens of a data set: next-token prediction with a class in front.

Shapes: B images, N tokens of an image, K crops per image, V vocabulary, H x W pixels.
Paper:  LlamaGen (arXiv 2406.06525) section 2.2 and 3.2.
Run:    python train_gpt.py                                        # after train_vq.py; 6 minutes on a laptop
        python train_gpt.py --data fashion_mnist --minutes 12
"""
import argparse
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from data import (batch_indices, code_key, extract_codes, image_grid, load_data, pick_device, positive,
                  read_about, read_codes, run, to_uint8)
from model import GPT, GPT_SIZES, GPTConfig
from sample import generate
from tokenizer import InputError, load_tokenizer, read_checkpoint, weights_hash
from train_vq import (Clock, Log, add_training_flags, learning_rate, mixed_precision, random_state,
                      restore_random_state, resume_state, save_checkpoint, update_ema)


def parameter_groups(gpt, weight_decay):
    """Decay matrices and embeddings (2 and more dimensions); leave the gains of the norms alone."""
    parameters = list(gpt.parameters())
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def prepare_codes(args, vq, vq_hash, device):
    """The tokens of the training and of the held-out pictures, each as read_codes gives it: those in --codes,
    or made now from --data and kept beside --out for the next run."""
    splits = ("train", "test")
    if args.codes:
        folders = [Path(args.codes) / split for split in splits]
        if any(read_about(folder)["vq_hash"] != vq_hash for folder in folders):
            raise InputError(f"{args.codes} and {args.vq} do not belong together: the codes are those of "
                             f"another tokenizer")
        return [read_codes(folder) for folder in folders]
    size = args.image_size or read_checkpoint(args.vq).get("image_size", 256)    # 256: a released tokenizer
    if size % vq.config.downsample:
        raise InputError(f"--image-size {size}: {args.vq} makes one token of {vq.config.downsample} x "
                         f"{vq.config.downsample} pixels, so the size has to be a multiple of "
                         f"{vq.config.downsample}")
    all_codes = []
    for split in splits:
        data = load_data(args.data, split, size, args.limit, args.data_dir, ranges=args.ten_crop)
        folder = Path(args.out).parent / "codes" / code_key(vq_hash, data)
        extract_codes(vq, vq_hash, data, folder, device)
        all_codes.append(read_codes(folder))
    return all_codes


def code_batches(codes, labels, batch_size, seed, start=0, device="cpu"):
    """Endless batches of tokens (B, N) int64 and labels (B,), one random crop of
    each picture. No Python per picture."""
    labels = torch.from_numpy(labels)
    for step, index in enumerate(batch_indices(len(labels), batch_size, seed, start), start):
        crop = np.random.default_rng((seed, step)).integers(codes.shape[1], size=len(index))
        tokens = torch.from_numpy(codes[index.numpy(), crop].astype(np.int64))
        batch = tokens, labels[index]
        if device.type == "cuda":                         # pinned memory lets the copy overlap with computing
            batch = tuple(t.pin_memory() for t in batch)
        yield tuple(t.to(device, non_blocking=True) for t in batch)


@torch.inference_mode()
def validation_loss(gpt, codes, labels, device, count=1000, batch_size=100):
    """Mean nats per token over the first crop of the first `count` held-out pictures, without dropout."""
    gpt.eval()
    total, count = torch.zeros((), device=device), min(count, len(labels))
    for i in range(0, count, batch_size):
        rows = slice(i, min(i + batch_size, count))
        tokens = torch.from_numpy(codes[rows, 0].astype(np.int64)).to(device)    # (B, N)
        classes = torch.from_numpy(labels[rows]).to(device)                      # (B,)
        with mixed_precision(device):
            total += gpt(tokens[:, :-1], classes, targets=tokens)[1] * len(tokens)
    gpt.train()
    return (total / count).item()


def save_samples(gpt, vq, class_names, device, path, args, columns=8):
    """A labelled PNG: one row per class (the first ten), the same random numbers every time."""
    names = class_names[:10]
    classes = torch.arange(len(names), device=device).repeat_interleave(columns)
    gpt.eval()
    tokens = generate(gpt, classes, cfg_scale=args.cfg_scale, temperature=args.temperature,
                      generator=torch.Generator(device).manual_seed(args.seed))
    gpt.train()
    with torch.inference_mode():
        pixels = to_uint8(vq.detokenize(tokens)).cpu().numpy()
    image_grid(pixels, columns, row_names=names).save(path)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser, out="out/gpt.pt", minutes=6.25)
    parser.add_argument("--vq", default="out/vq.pt", help="the tokenizer: train_vq.py's or a released one")
    parser.add_argument("--codes", help="a folder that data.py extract filled, instead of --data")
    parser.add_argument("--ten-crop", type=float, nargs="+", default=[], metavar="RANGE",
                        help="tokenize ten crops of the picture at RANGE times the size: 1.1 1.05 in the "
                             "paper; if left out, the centre crop and its mirror image")
    group = parser.add_argument_group("model")
    group.add_argument("--size", default="tiny", choices=GPT_SIZES, help="a row of GPT_SIZES in model.py")
    group.add_argument("--image-size", type=positive(int),
                       help="side of the pictures; the tokenizer's own if left out")
    group.add_argument("--dropout", type=float, default=0.0,
                       help="on embeddings, attention output and feed-forward; 0.1 in the paper")
    group.add_argument("--class-dropout", type=float, default=0.1,
                       help="share of classes replaced by the null class")
    group.add_argument("--drop-path", type=float, default=0.0,
                       help="stochastic depth; with it --dropout 0 is usual")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch-size", type=positive(int), default=16,
                       help="pictures per step; 256 in the paper")
    group.add_argument("--grad-accum", type=positive(int), default=1,
                       help="batches whose gradients make one step")
    group.add_argument("--lr", type=positive(float), default=3e-3,
                       help="peak learning rate; 1e-4 in the paper")
    group.add_argument("--lr-final", type=float, default=0.02,
                       help="end of the cosine as a share of --lr; 1: constant")
    group.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up; 0 in the paper")
    group.add_argument("--weight-decay", type=float, default=0.05, help="on tensors of 2 and more dimensions")
    group.add_argument("--clip", type=positive(float), default=1.0, help="largest norm of the gradient")
    group.add_argument("--ema", type=float, default=0.995,
                       help="decay of the averaged weights that are saved; 0: off")
    group.add_argument("--cfg-scale", type=float, default=2.5, help="guidance of the sample grids")
    group.add_argument("--temperature", type=float, default=0.4, help="of the sample grids; 1: as trained")
    return parser.parse_args(argv)


def main(args):
    state = resume_state(args)
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    vq = load_tokenizer(args.vq, device)
    vq_hash = weights_hash(vq)
    (codes, labels, about), (test_codes, test_labels, _) = prepare_codes(args, vq, vq_hash, device)
    class_names, size = about["class_names"], about["data"]["size"]
    args.batch_size = min(args.batch_size, len(labels))
    N = codes.shape[2]
    config = GPTConfig(**GPT_SIZES[args.size], vocab_size=vq.config.codebook_size, block_size=N,
                       num_classes=len(class_names), token_dropout=args.dropout, resid_dropout=args.dropout,
                       ffn_dropout=args.dropout, class_dropout=args.class_dropout, drop_path=args.drop_path)
    if state and (state["config"], state["vq_hash"]) != (asdict(config), vq_hash):
        raise InputError(f"{args.out} was trained with other settings or another tokenizer: resume with "
                         f"that run's flags")

    gpt, average = GPT(config).to(device), GPT(config).to(device)
    average.load_state_dict(gpt.state_dict())
    average.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(gpt, args.weight_decay), lr=args.lr, betas=(0.9, 0.95),
                                  fused=True)
    step, seconds = 0, 0.0
    if state:
        step, seconds = state["step"], state["seconds"]
        average.load_state_dict(state["model"])
        gpt.load_state_dict(state["raw"])
        optimizer.load_state_dict(state["optimizer"])
    tokens_per_step = args.batch_size * args.grad_accum * N
    print(f"GPT {args.size}: {sum(p.numel() for p in gpt.parameters()):,} parameters on {device}; "
          f"{len(labels):,} pictures of {N} tokens in {len(class_names)} classes; "
          f"{tokens_per_step:,} tokens per step")

    def save(fresh=False):
        best = average if args.ema else gpt
        save_checkpoint(args.out, fresh, model=best.state_dict(), raw=gpt.state_dict(), config=asdict(config),
                        optimizer=optimizer.state_dict(), step=step, seconds=clock.seconds(),
                        random=random_state(device), class_names=class_names, vq_hash=vq_hash,
                        args=vars(args))

    forward = torch.compile(gpt) if args.compile else gpt
    preview, log = Path(args.out).with_suffix(".png"), Log(args)
    recent, logged_at, fresh = torch.zeros((), device=device), step, state is None
    clock = Clock(args, seconds)
    if state:
        restore_random_state(state["random"], device)
    bar = tqdm(total=args.steps, initial=step, unit=" steps")
    batches = code_batches(codes, labels, args.batch_size, args.seed, step * args.grad_accum, device)
    while clock.running(step):
        lr = learning_rate(args.lr, step, clock.progress(step), args.warmup, args.lr_final)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(args.grad_accum):
            tokens, classes = next(batches)                      # (B, N), (B,)
            with mixed_precision(device):
                _, loss = forward(tokens[:, :-1], classes, targets=tokens)
            (loss / args.grad_accum).backward()
            recent += loss.detach() / args.grad_accum
        nn.utils.clip_grad_norm_(gpt.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        if args.ema:
            update_ema(average, gpt, args.ema, step)
        step += 1
        if step % args.log_every == 0:                        # the only place where the CPU waits for the GPU
            loss = recent.item() / (step - logged_at)
            rate = tokens_per_step * (step - logged_at) / (clock.seconds() - seconds)
            log.write(step=step, seconds=clock.seconds(), loss=loss, lr=lr, tokens_per_second=rate)
            bar.set_postfix_str(f"loss {loss:.3f} nats/token, {rate:,.0f} tokens/s", refresh=False)
            recent.zero_()
            logged_at, seconds = step, clock.seconds()
        bar.update()
        if step % args.eval_every == 0:
            best = average if args.ema else gpt
            nats = validation_loss(best, test_codes, test_labels, device)
            log.write(step=step, validation_loss=nats)
            bar.write(f"step {step}: validation loss {nats:.4f} nats per token")
            save_samples(best, vq, class_names, device, preview, args)
            save(fresh)
            fresh = False
    bar.close()
    minutes = clock.seconds() / 60
    save(fresh)
    clock.stop("train_gpt.py")

    best = average if args.ema else gpt
    nats = validation_loss(best, test_codes, test_labels, device, count=len(test_labels))
    bits = nats / math.log(2) * N / size ** 2            # of the tokens: what the tokenizer lost is not in it
    log.write(step=step, validation_loss=nats, bits_per_pixel=bits)
    save_samples(best, vq, class_names, device, preview, args)
    print(f"{step} steps in {minutes:.1f} minutes; over {len(test_labels):,} held-out pictures: "
          f"{nats:.4f} nats per token, {bits:.4f} bits per pixel (ln {config.vocab_size} = "
          f"{math.log(config.vocab_size):.2f})")
    print(f"wrote {args.out} and {preview}")


if __name__ == "__main__":
    run(main, get_args)
