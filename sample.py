"""Sampling: tokens one after another with a key-value cache and classifier-free guidance, then pixels.

Shapes: B images, R rows of the batch (B, or 2 B with guidance), N tokens of an image, V vocabulary,
        P given tokens, L condition tokens.
Paper:  LlamaGen (arXiv 2406.06525) section 2.2; guidance: Ho & Salimans 2022;
        guidance interval: Kynkaanniemi 2024; top-p: Holtzman 2020.
Run:    python sample.py             # a labelled grid of the model that train_gpt.py left in out/
"""
import csv
import hashlib
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fid
from data import (SharedArray, captioned_items, flag_parser, image_grid, imagenet_names, natural,
                  pick_device, positive, rank_and_world, run, to_uint8, wait_for_all)
from model import gpt_from_checkpoint
from text import pretrained_text_encoder, tiny_text_encoder_from
from tokenizer import InputError, load_tokenizer, read_checkpoint, weights_hash

EXAMPLES = ["a large red star on a navy background", "a small yellow heart on a white background",
            "a cyan ring left of an orange cross on a black background"]    # drawn if no prompt is given

# Guidance and temperature where no flag gives them. Small models err less often when they dare less; a text
# model that knows its few captions by heart is thrown off by strong guidance.
SETTINGS = {("class", "own"): (2.5, 0.5), ("class", "released"): (4.0, 1.0),
            ("text", "own"): (1.5, 0.6), ("text", "released"): (7.5, 1.0)}


def filter_logits(logits, top_k=0, top_p=1.0):
    """Keep the top_k largest logits, and of those the most probable ones that reach top_p together; the rest
    is -inf.

    logits (B, V). Ties with the k-th largest stay; the token that crosses top_p stays. 0 and 1.0 switch them
    off.
    """
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


@torch.no_grad()
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
    P = 0 if prefix is None else prefix.shape[1]
    guided = cfg_scale != 1 and (cfg_interval < 0 or P <= cfg_interval + 1)
    tokens = torch.zeros(B, N, dtype=torch.long, device=cond.device)
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
    classes, lowered = [], [name.lower() for name in class_names]
    for word in (word.strip() for word in text.split(",")):
        if word.lower() in lowered:
            classes.append(lowered.index(word.lower()))
        elif word.isdecimal() and int(word) < len(class_names):
            classes.append(int(word))
        else:
            some = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
            raise InputError(f"--classes {word!r}: use numbers from 0 to {len(class_names) - 1}, or names: "
                             f"{some}")
    return classes


def load_models(args, device):
    """The GPT, its tokenizer, its text encoder (None if it draws classes), the names of its classes, and
    whether it is our own or a released one. One line if they do not belong together."""
    if args.image_size and args.image_size % 16:
        raise InputError(f"--image-size {args.image_size}: released GPTs draw one token per 16 pixels, so it "
                         f"has to be a multiple of 16")
    checkpoint = read_checkpoint(args.gpt, mmap=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gpt = gpt_from_checkpoint(checkpoint, args.gpt, args.image_size, device, dtype)
    vq = load_tokenizer(args.vq, device)
    if vq.config.codebook_size != gpt.config.vocab_size:
        raise InputError(f"{args.gpt} and {args.vq} do not belong together: the GPT predicts "
                         f"{gpt.config.vocab_size:,} tokens, the codebook has "
                         f"{vq.config.codebook_size:,} entries")
    if "vq_hash" in checkpoint and checkpoint["vq_hash"] != weights_hash(vq):
        raise InputError(f"{args.gpt} and {args.vq} do not belong together: the GPT was trained on the "
                         "tokens of another tokenizer. Pass that one as --vq, or run train_gpt.py again")
    text = load_text_encoder(args, checkpoint, gpt, device) if gpt.config.model_type == "t2i" else None
    names, own = checkpoint.get("class_names"), "class_names" in checkpoint
    if not own:                                                  # a released file
        K = gpt.config.num_classes
        names = imagenet_names() if K == 1000 else [str(i) for i in range(K)]
    return gpt, vq, text, names, own


def load_text_encoder(args, checkpoint, gpt, device):
    """The one saved in the GPT's checkpoint, or FLAN-T5 from --text-encoder or where it was in training."""
    if "text_encoder" in checkpoint:
        return tiny_text_encoder_from(checkpoint["text_encoder"], args.gpt, device)
    trained_with = checkpoint["args"].get("text_encoder") if "config" in checkpoint else None
    folder = args.text_encoder or trained_with
    if folder is None:
        raise InputError(f"{args.gpt} draws from features of a T5 encoder: pass its folder as --text-encoder "
                         "(for the released models google/flan-t5-xl, from huggingface.co)")
    text = pretrained_text_encoder(folder, gpt.config.cls_token_num, device)
    if text.t5.config.d_model != gpt.config.caption_dim:
        raise InputError(f"{args.gpt} and {folder} do not belong together: the GPT reads features of width "
                         f"{gpt.config.caption_dim:,}, the encoder gives {text.t5.config.d_model:,}")
    return text


def read_prompts(args):
    """--prompts, or the lines of --prompts-file that are not blank."""
    prompts = args.prompts
    if args.prompts_file:
        try:
            prompts = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts-file {args.prompts_file} cannot be read ({error})") from None
        prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts or not all(map(str.strip, prompts)):
        raise InputError("a prompt is empty: give each some words")
    return [prompt.strip() for prompt in prompts]


class Conditions:
    """What can be drawn, by number: the classes of a model, or prompts."""

    def __init__(self, names, text, device):
        self.names, self.text, self.device = names, text, device

    def __call__(self, numbers):
        """The GPT's cond and cond_mask for these numbers, (B,)."""
        if self.text is None:
            return torch.from_numpy(numbers).to(self.device), None
        ids = self.text.tokenize([self.names[i] for i in numbers])
        with torch.no_grad():
            return self.text(ids.to(self.device))


def sample_batch(gpt, vq, conditions, labels, number, args, device):
    """Pictures of these classes or prompts, uint8 (B, H, W, 3). The random numbers come from --seed and the
    batch's number alone, so it does not matter which process draws it, or when."""
    seed = np.random.SeedSequence((args.seed, number)).generate_state(1, np.uint64).item()
    generator = torch.Generator(device).manual_seed(seed)
    tokens = generate(gpt, *conditions(labels), args.cfg_scale, args.cfg_interval,
                      args.temperature, args.top_k, args.top_p, generator=generator)
    with torch.inference_mode():
        images = vq.detokenize(tokens).float()                   # (B, 3, H, W), about -1 .. 1
        if args.image_size_eval:
            images = F.interpolate(images, size=(args.image_size_eval,) * 2, mode="bicubic")
        return to_uint8(images).cpu().numpy()


def sample_all(gpt, vq, conditions, labels, images, args, device, numbers=None, filled=None):
    """Fill `images` (M, H, W, 3) batch by batch, all or those with these numbers; prints the speed."""
    started, count = time.perf_counter(), 0
    numbers = range(-(-len(labels) // args.batch_size)) if numbers is None else numbers
    for number in tqdm(numbers, desc="sampling", unit=" batches"):
        rows = slice(number * args.batch_size, (number + 1) * args.batch_size)
        images[rows] = sample_batch(gpt, vq, conditions, labels[rows], number, args, device)
        if filled is not None:
            filled[number] = SharedArray.DONE
        count += len(labels[rows])
    seconds = time.perf_counter() - started
    if count:
        print(f"{count} images in {seconds:.1f} s on {device}: "
              f"{count * gpt.config.block_size / seconds:,.0f} tokens/s, {count / seconds:.2f} images/s")


def sample_grid(gpt, vq, conditions, classes, per_class, side, args, device):
    """Write --out: a row of pictures per class or prompt, or, with one picture each, rows of four with
    titles."""
    labels = np.repeat(classes, per_class)
    images = np.empty((len(labels), side, side, 3), np.uint8)
    sample_all(gpt, vq, conditions, labels, images, args, device)
    words = [conditions.names[c] for c in classes]
    sheet = (image_grid(images, 4, titles=words) if per_class == 1 else
             image_grid(images, per_class, row_names=words))
    sheet.save(args.out)
    print(f"wrote {args.out}")


def sample_npz(gpt, vq, conditions, labels, side, args, device):
    """Write --npz, the evaluators' format: arr_0 uint8 (M, H, W, 3), and label int64 (M,) or, for text, the
    strings prompt (M,). Under torchrun each process draws its share of the batches; interrupted, the same
    command goes on where it was."""
    path = Path(args.npz)
    # The key of unfinished work: the models' files and every flag that changes a picture.
    files = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in (args.gpt, args.vq)]
    flags = [args.seed, args.batch_size, args.cfg_scale, args.cfg_interval, args.temperature, args.top_k,
             args.top_p, args.image_size, args.text_encoder]
    words = [conditions.names[i] for i in labels]
    key = hashlib.sha256(repr((files, flags, side, labels.tolist(), words)).encode()).hexdigest()[:16]
    whole = path.with_name(f"{path.name}.{key}.arr_0")
    drawn = whole.exists()                                       # interrupted while packing
    wait_for_all()
    if not drawn:
        array = SharedArray(whole, (len(labels), side, side, 3), np.uint8, key,
                            units=-(-len(labels) // args.batch_size))
        sample_all(gpt, vq, conditions, labels, array.rows, args, device, array.mine, array.done)
        array.finish()
    if rank_and_world()[0] == 0:
        packed = path.with_name(f"{path.name}.packed")
        with open(packed, "wb") as file:               # a file object, or NumPy would append .npz to the name
            what = {"prompt": np.array(words)} if conditions.text else {"label": labels}
            np.savez(file, arr_0=np.load(whole, mmap_mode="r"), **what)
        packed.replace(path)
        whole.unlink()
        print(f"wrote {path}")


def sweep(gpt, vq, conditions, labels, side, args, device):
    """Sample and evaluate at every guidance scale of --sweep: the trade-off between fidelity and variety as a
    table, sweep.csv, and as curves, sweep.png. The samples stay in the folder sweep/."""
    folder, table = Path(args.out).parent / "sweep", []
    for args.cfg_scale in args.sweep:
        args.npz = str(folder / f"cfg_{args.cfg_scale:g}.npz")
        sample_npz(gpt, vq, conditions, labels, side, args, device)
        flags = ["--inception", args.inception] if args.inception else []
        metrics = fid.evaluate_samples(fid.get_args([args.ref, args.npz, *flags]), device)
        table.append({"cfg_scale": args.cfg_scale,
                      **{name: value for name, value in metrics.items() if not name.startswith(" ")}})
        print(", ".join(f"{name} {value:.4g}" for name, value in table[-1].items()))
    with open(folder.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    columns = [name for name in table[0] if name not in ("cfg_scale", "Real test accuracy")]
    fid.plot_lines(table, "cfg_scale", columns, folder.with_suffix(".png"))
    print(f"wrote {folder.with_suffix('.csv')} and {folder.with_suffix('.png')}")


def alignment(gpt, vq, text, side, args, device):
    """How well pictures of `shapes` agree with captions from the test split, --alignment of each: one shape
    or two, of combinations that were trained on or held out."""
    for seen in (True, False):
        items = captioned_items("test", seen=seen)
        for two in (False, True):
            found = [item["caption"] for item in items if ("shapes" in item) == two]
            captions = [found[i * len(found) // args.alignment] for i in range(args.alignment)]
            images = np.empty((len(captions), side, side, 3), np.uint8)
            conditions = Conditions(captions, text, device)
            sample_all(gpt, vq, conditions, np.arange(len(captions)), images, args, device)
            shares = fid.agreement(torch.from_numpy(images).permute(0, 3, 1, 2), captions, device)
            print(f"{len(captions)} pictures of {'two shapes' if two else 'one shape'}, "
                  f"{'seen' if seen else 'held-out'} combinations: " +
                  ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))


def numbers(text):
    """An argparse type: "1,1.5,2" -> [1.0, 1.5, 2.0]."""
    return [float(word) for word in text.split(",")]


def get_args(argv=None):
    parser = flag_parser(__doc__)
    group = parser.add_argument_group("models")
    group.add_argument("--gpt", default="out/gpt.pt", help="train_gpt.py's checkpoint or a released one")
    group.add_argument("--vq", default="out/vq.pt", help="the tokenizer that the GPT was trained with")
    group.add_argument("--text-encoder", metavar="FOLDER",
                       help="FLAN-T5's config.json, weights and spiece.model, for GPTs that read its "
                            "features")
    group.add_argument("--image-size", type=positive(int),
                       help="released GPTs only: pixels of its grid, 256 if left out")
    group = parser.add_argument_group("what to draw")
    group.add_argument("--classes",
                       help="ids or names, separated by commas: one row each; all (at most ten) if left out")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="captions, one row each")
    prompts.add_argument("--prompts-file", help="captions, one a line")
    prompts.add_argument("--alignment", type=positive(int), metavar="M",
                         help="for models of shapes: draw M pictures each of one and two shapes, of seen and "
                              "of held-out combinations, and print how often kind, colour, ... are right")
    group.add_argument("--per-class", type=positive(int),
                       help="pictures of each class or prompt; 8 if left out, 1 for a released GPT")
    group.add_argument("--out", default="out/samples.png", help="the labelled grid")
    group.add_argument("--npz", help="instead of a grid, write --num-samples pictures for fid.py")
    group.add_argument("--num-samples", type=positive(int), default=1000, help="pictures in the --npz")
    group.add_argument("--random-classes", action="store_true",
                       help="draw the classes of the --npz at random, as the paper did, instead of balanced")
    group.add_argument("--image-size-eval", type=positive(int),
                       help="resize the pictures to this side (bicubic); 256 in the paper")
    group.add_argument("--sweep", type=numbers, metavar="S,S,...",
                       help="draw --num-samples pictures at each of these guidance scales and evaluate them: "
                            "sweep.csv and sweep.png beside --out")
    group.add_argument("--ref", default="shapes", help="what --sweep compares with, as fid.py's REF")
    group.add_argument("--inception", help="Inception's weights for --sweep, if they are not in the cache")
    group = parser.add_argument_group("how to sample")
    group.add_argument("--cfg-scale", type=float,
                       help="guidance; 1: none, 0: unconditional; if left out 2.5 (with text 1.5), for a "
                            "released GPT 4 (with text 7.5)")
    group.add_argument("--cfg-interval", type=int, default=-1, help="i: guide tokens 0 to i+1 only; -1: all")
    group.add_argument("--temperature", type=float,
                       help="below 1: less varied; 0: the likeliest token; if left out 0.5 (with text 0.6), "
                            "for a released GPT 1")
    group.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    group.add_argument("--top-p", type=float, default=1.0,
                       help="draw from the likeliest tokens that make up this share")
    group.add_argument("--batch-size", type=positive(int), default=100,
                       help="pictures drawn at the same time")
    group.add_argument("--seed", type=natural, default=0,
                       help="same seed, same pictures (on the same kind of device)")
    group.add_argument("--device", help="cuda, mps or cpu; the best one present if left out")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile one decoding step: slow start, faster steps")
    args = parser.parse_args(argv)
    if (args.temperature or 0) < 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature and --top-k have to be 0 or more, --top-p above 0 and at most 1")
    return args


def main(args):
    device = pick_device(args.device)
    target = Path(args.npz or args.out)
    if target.is_dir():
        raise InputError(f"{target} is a folder: give the name of a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    gpt, vq, text, names, own = load_models(args, device)
    cfg_scale, temperature = SETTINGS["text" if text else "class", "own" if own else "released"]
    args.cfg_scale = cfg_scale if args.cfg_scale is None else args.cfg_scale
    args.temperature = temperature if args.temperature is None else args.temperature
    side = args.image_size_eval or math.isqrt(gpt.config.block_size) * vq.config.downsample
    if args.compile:
        gpt.step = torch.compile(gpt.step, fullgraph=True, dynamic=False)
    if text is None and (args.prompts or args.prompts_file or args.alignment):
        raise InputError(f"{args.gpt} draws classes, not prompts: use --classes, or train with --cond text")
    if text and args.classes:
        raise InputError(f"{args.gpt} draws from text: use --prompts instead of --classes")
    if args.alignment:
        return alignment(gpt, vq, text, side, args, device)
    if text:
        names = read_prompts(args) if args.prompts or args.prompts_file else EXAMPLES
        text.tokenize(names)
        if text.cut:
            print(f"warning: {text.cut} prompts are longer than {text.length} tokens and lose their ends",
                  file=sys.stderr)
    conditions = Conditions(names, text, device)
    classes = parse_classes(args.classes, names) if args.classes else list(range(len(names)))
    if not (args.npz or args.sweep):
        classes = classes if args.classes or text else classes[:10]
        per_class = args.per_class or (8 if own else 1)
        return sample_grid(gpt, vq, conditions, classes, per_class, side, args, device)
    labels = np.array(classes)[np.arange(args.num_samples) % len(classes)]
    if args.random_classes:
        labels = np.random.default_rng(args.seed).choice(classes, args.num_samples)
    if args.sweep:
        sweep(gpt, vq, conditions, labels, side, args, device)
    else:
        sample_npz(gpt, vq, conditions, labels, side, args, device)


if __name__ == "__main__":
    run(main, get_args)
