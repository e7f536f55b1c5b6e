"""Sampling: tokens one after another with a key-value cache and classifier-free guidance, then pixels.

Shapes: B images, R sequences (B, or 2 B with guidance), N tokens of an image, V vocabulary,
        P given tokens, Q tokens of a pass, L condition tokens, M images of a whole job.
Paper:  LlamaGen (arXiv 2406.06525) section 2.2; guidance: Ho & Salimans 2022;
        guidance interval: Kynkaanniemi 2024; top-p: Holtzman 2020; several tokens a pass: see draw_ahead.
Run:    python sample.py             # a labelled grid of the model that train_gpt.py left in out/
"""
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import PICTURE_NAMES, image_grid, imagenet_names, save_picture
from files import text_lines, warning
from model import load_gpt, packed
from runs import (DEVICE_HELP, InputError, SharedArray, alone, check_compile, check_output, check_tensor,
                  counting, explained, fast_dtype, finite, flag_parser, free_memory, largest,
                  natural, not_negative, number,
                  pick_device, rank_and_world, read_checkpoint, run, short_hash, wait_for_all, weights_hash,
                  whole_file)
from text import Captions, Classes, pretrained_text_encoder, tiny_text_encoder_from
from tokenizer import load_tokenizer, to_pictures

EXAMPLES = ["a large red star on a navy background", "a small yellow heart on a white background",
            "a cyan ring left of an orange cross on a black background"]    # drawn if no prompt is given

# Guidance and temperature where no flag gives them. Small models err less often when they dare less; a text
# model that knows its few captions by heart is thrown off by strong guidance.
SETTINGS = {("class", "own"): (2.25, 0.5), ("class", "released"): (4.0, 1.0),
            ("text", "own"): (1.5, 0.6), ("text", "released"): (7.5, 1.0)}


def filter_logits(logits, top_k=0, top_p=1.0):
    """Keep the top_k largest logits (..., V), and of those the most probable ones that reach top_p together;
    the rest is -inf. Ties with the k-th largest stay, so does the token that crosses top_p.
    """
    V = logits.shape[-1]
    if 0 < top_k < V:
        kth = logits.topk(top_k).values[..., -1:]                # (..., 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        values, order = logits.sort(dim=-1, descending=True)
        p = values.softmax(dim=-1)
        outside = p.cumsum(dim=-1) - p >= top_p              # the sum before this token already reaches top_p
        outside[..., 0] = False                                  # never remove the best token
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None, noise=None):
    """One token per row of logits (..., V), a sample of p = softmax(logits / temperature): (...) int64.

    Below temperature 1 likely tokens become likelier; at 0 only the likeliest is left. The filters come after
    the temperature, as in the released code. noise: e below, if it was drawn before.
    """
    if top_k == 1 or temperature < 1e-20:                        # by less than that, float32 cannot divide
        return logits.argmax(dim=-1)
    logits = filter_logits(logits / temperature, top_k, top_p)
    # The Gumbel-max trick, in its exponential form: argmax of p / e with e ~ Exp(1) is a sample of p. Unlike
    # torch.multinomial it never makes the CPU wait for the GPU.
    if noise is None:
        noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def guide(logits, cfg_scale):
    """Classifier-free guidance: from logits (2 B, ...), first the conditional and then the unconditional
    rows, to  uncond + s (cond - uncond),  (B, ...): away from what would be drawn whatever was asked for.
    """
    conditional, unconditional = logits.chunk(2)
    return unconditional + cfg_scale * (conditional - unconditional)


SCHEDULES = {"constant": lambda t: 1, "linear": lambda t: t,
             "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2}


def guidance_scales(cfg_scale, schedule, interval, count):
    """The scale of each of `count` passes: 1 + (s - 1) f(t), t from 0 in the first to 1 in the last one, cut
    off by an interval. One that grows (Muse, arXiv 2301.00704) leaves the first tokens, which decide what the
    picture becomes, their variety."""
    # The released code asks whether step i, which reads token i and makes token i + 1, is past the interval;
    # token 0 comes from the prefill, before any step. So the last guided one is token i + 1.
    last = count if interval < 0 else interval + 2
    return [1 + (cfg_scale - 1) * SCHEDULES[schedule](i / max(count - 1, 1)) if i < last else 1.0
            for i in range(count)]


def guided_steps(gpt, cond, cond_mask, scales, given, single):
    """Run the condition and the given tokens (B, P); returns the logits (B, 1, V) of the first token to draw;
    a function for the passes after it; and the caches, to be given back. All logits are guided.

    scales  of all passes, a list; single: one token a pass, none is run ahead
    """
    (B, P), L, device = given.shape, gpt.config.cls_token_num, cond.device
    # Guidance needs each sequence twice. Both go through the network as one batch, [conditional;
    # unconditional]: reading the weights is what takes the time, and they are read once for both.
    # With s = 1 the equation gives the conditional logits alone: then there is nothing to compute twice.
    guided = max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)     # passes
    scales = torch.tensor(scales, device=device)[:, None]
    twice = lambda x: torch.cat([x, x])
    if P < guided:
        cond, given = torch.cat([cond, gpt.cls_embedding.null(cond)]), twice(given)          # (R, ...)
        # The null caption is seen through the same mask, as in the training of the released models.
        cond_mask = cond_mask if cond_mask is None else twice(cond_mask)
    # A CPU reads what is filled of the caches and no more. On a GPU, and in a step that was compiled (which
    # hides the class's own), no shape changes and a mask hides what is empty: one graph serves all places.
    # Nothing is copied to the CPU before the last token is drawn.
    static = single and ("step" in vars(gpt) or device.type == "cuda")
    gpt = gpt if static else packed(gpt)
    mask = None if single and not static and cond_mask is None else gpt.attention_mask(cond_mask)
    kept = gpt.take_caches(len(cond))
    caches, few = ([cache.first(R) for cache in kept] for R in (len(cond), B))
    places = torch.arange(len(gpt.rope), device=device).split(1)

    def step(newest, now, start, stop):
        """Run tokens (B, S), which are a slice `now` of the picture; logits (B, Q, V) for passes from `start`
        to before `stop`."""
        place = places[L + now.start] if static else slice(L + now.start, L + now.stop)
        if start < guided:
            return guide(gpt.step(twice(newest), place, mask, caches), scales[start:stop])
        # Past the interval the unconditional half is dropped, not computed and thrown away.
        return gpt.step(newest, place, mask if cond_mask is None else mask[:B], few)

    logits = gpt.prefill(given, cond, mask, caches)              # (R, 1, V)
    return guide(logits, scales[P]) if P < guided else logits, step, kept


def draw_ahead(step, pick, tokens, done, width, noise_of_one):
    """Fill tokens (B, N) from number `done` on with what one by one would give, in fewer passes.

    Jacobi iteration (Song 2021, arXiv 2002.03629): run the newest token and `width` - 1 guesses behind it at
    once, and draw each again from what is before it. A draw is a function of the logits and its noise, and
    the noise of a token stays the same in all passes: what follows right guesses is what would have been
    drawn one by one. So that is final, one token a pass at least, and the rest are better guesses.
    (Speculative Jacobi decoding, arXiv 2410.01699, draws with new noise and accepts with probability
    min(1, p / q): the same distribution, more passes here.) A batch goes on when all of its pictures can.
    """
    (B, N), guessed, noise = tokens.shape, done, []
    while done < N:
        stop = min(done + width, N)
        tokens[:, guessed:stop] = tokens[:, done - 1:done]       # not drawn yet: like the newest
        noise += [noise_of_one() for _ in range(guessed, stop)]
        now = slice(done - 1, stop - 1)
        drawn = pick(step(tokens[:, now], now, done, stop), noise=torch.stack(noise, dim=1))     # (B, Q)
        right = (drawn[:, :-1] == tokens[:, done:stop - 1]).all(dim=0)                           # (Q - 1,)
        tokens[:, done:stop] = drawn
        settled = 1 + int(right.long().cumprod(dim=0).sum())     # how many: the CPU has to know
        done, guessed, noise = done + settled, stop, noise[settled:]


def check_passes(gpt, P, jacobi):
    """InputError for a GPT that cannot draw `jacobi` tokens a pass behind P given ones."""
    compiled = "step" in vars(gpt)
    if gpt.neighbours and (P or jacobi > 1 or compiled):
        raise InputError("this GPT draws by neighbours: without prefix, jacobi and compiled step")
    if compiled and jacobi > 1:
        raise InputError("a compiled step runs one token at a time: leave jacobi out, or compile")


@torch.no_grad()
def generate(gpt, cond, cond_mask=None, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
             prefix=None, generator=None, cfg_schedule="constant", jacobi=1):
    """Sample whole images as tokens, (B, N) int64.

    cond           (B,) class ids, or (B, L, E) text features with cond_mask (B, L), padding on the left
    cfg_scale      s in  logits = uncond + s (cond - uncond); 1: no guidance, no second row; 0: unconditional
    cfg_interval   i > -1: only tokens 0 .. i+1 are guided (by neighbours: passes); -1: all are
    temperature    divides the logits; 0, like top_k = 1, takes the most likely token
    top_k, top_p   see filter_logits
    prefix         (B, P) tokens to keep in front, P <= N: the rest of the picture is completed
    generator      torch.Generator on the model's device, for reproducible samples
    cfg_schedule   constant, or from 1 to s: linear or cosine, see guidance_scales
    jacobi         tokens that are run in a pass, see draw_ahead: the same picture, but for rounding
    """
    if not (math.isfinite(cfg_scale) and cfg_interval >= -1 and 0 <= temperature < math.inf and top_k >= 0 and
            0 < top_p <= 1 and cfg_schedule in SCHEDULES and jacobi >= 1):
        raise InputError("cfg_scale has to be finite, cfg_interval >= -1, temperature and top_k >= 0, top_p "
                         f"in (0, 1], jacobi >= 1, cfg_schedule of {', '.join(SCHEDULES)}; they are "
                         f"{cfg_scale}, {cfg_interval}, {temperature}, {top_k}, {top_p}, {jacobi}, "
                         f"{cfg_schedule}")
    gpt.check_cond(cond, cond_mask, wait=True)
    B, N = cond.shape[0], gpt.config.block_size
    P = 0 if prefix is None else check_tensor("prefix", prefix, (B, "P"), cond.device, gpt.config.vocab_size,
                                              wait=True, most=N)
    check_passes(gpt, P, jacobi)
    tokens = torch.zeros(B, N, dtype=torch.long, device=cond.device)         # in the order of drawing
    tokens[:, :P] = prefix if P else 0
    if P == N:
        return tokens

    passes = gpt.neighbours.passes if gpt.neighbours else [slice(i, i + 1) for i in range(N)]
    scales = guidance_scales(cfg_scale, cfg_schedule, cfg_interval, len(passes))
    logits, step, kept = guided_steps(gpt, cond, cond_mask, scales, tokens[:, :P],
                                      single=not gpt.neighbours and jacobi == 1)
    pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    for i, now in enumerate(passes[P:], P):                      # logits (B, Q, V) of the tokens of this pass
        newest = tokens[:, now] = pick(logits, generator=generator)
        if now.stop == N or jacobi > 1:
            break
        logits = step(newest, now, i + 1, i + 2)
    if jacobi > 1:
        draw_ahead(step, pick, tokens, P + 1, jacobi,
                   lambda: torch.empty_like(logits[:, 0]).exponential_(generator=generator))
    gpt.idle_caches[:] = [kept]                                  # for the next pictures
    return tokens[:, gpt.neighbours.order.argsort()] if gpt.neighbours else tokens


# ------------------------------------------------------------------------------------------------------------
# Models from files

def find_models(args):
    """Fill in --gpt and --vq where they were left out: what the training scripts left in out/ or, before
    anyone has trained, what comes with the project."""
    folder, kind = Path(__file__).with_name("notebooks"), "text_" * bool(args.prompts or args.prompts_file)
    if not (args.gpt or args.vq or Path("out/gpt.pt").exists()):
        args.gpt, args.vq = (str(folder / f"weights/{kind}{name}.pt") for name in ("gpt", "vq"))
        print(f"no out/gpt.pt yet: these are the weights that come with the project, {args.gpt}")
    args.gpt, args.vq = args.gpt or "out/gpt.pt", args.vq or "out/vq.pt"


def load_models(args, device):
    """The GPT, its tokenizer, its text encoder (None if it draws classes), the names of its classes, and
    whether it is our own or a released one. One line if they do not belong together."""
    # A GPU reads bf16 weights in half the time; on the CPU float32 gives nearly the same on every machine.
    dtype = fast_dtype(device) if device.type == "cuda" else torch.float32
    on_cpu = device.type == "cpu"
    if args.bf16 and fast_dtype(device) != torch.bfloat16:
        raise InputError(f"--bf16: {device} has no instructions that multiply bf16: leave it out, or --int8")
    if on_cpu and args.compile and (args.int8 or args.bf16):
        raise InputError("--compile is for GPUs: on a CPU, --int8 and --bf16 are faster without it")
    bits = 8 if args.int8 else 16 if args.bf16 and on_cpu else None
    checkpoint = read_checkpoint(args.gpt, mmap=True)
    gpt = load_gpt(args.gpt, args.image_size, device, dtype, checkpoint, bits)
    vq = load_tokenizer(args.vq, device)
    apart = f"{args.gpt} and {args.vq} do not belong together: the GPT "
    if vq.config.codebook_size != gpt.config.vocab_size:
        raise InputError(f"{apart}predicts {gpt.config.vocab_size:,} tokens, the codebook has "
                         f"{vq.config.codebook_size:,} entries")
    if "vq_hash" in checkpoint and checkpoint["vq_hash"] != weights_hash(vq):
        raise InputError(f"{apart}was trained on the tokens of another tokenizer. Pass that one as --vq, or "
                         f"run train_gpt.py again")
    own = "class_names" in checkpoint
    f = vq.config.downsample
    if not own and f != 16:   # vq_ds8.pt has the same V, but no released GPT was trained on its tokens
        raise InputError(f"{apart}is a released one, for tokens of 16 x 16 pixels, this tokenizer's are of "
                         f"{f} x {f}: pass vq_ds16_c2i.pt or vq_ds16_t2i.pt")
    text = load_text_encoder(args, checkpoint, gpt, device) if gpt.config.model_type == "t2i" else None
    K = gpt.config.num_classes
    names = checkpoint.get("class_names", imagenet_names() if K == 1000 else [str(i) for i in range(K)])
    return gpt, vq, text, names, own


def load_text_encoder(args, checkpoint, gpt, device):
    """The one saved in the GPT's checkpoint, or FLAN-T5 from --text-encoder or where it was in training."""
    if "text_encoder" in checkpoint:
        return tiny_text_encoder_from(checkpoint["text_encoder"], args.gpt, device)
    trained_with = checkpoint.get("args", {}).get("text_encoder") if "config" in checkpoint else None
    folder = args.text_encoder or trained_with
    if folder is None:
        raise InputError(f"{args.gpt} draws from features of a T5 encoder: pass its folder as --text-encoder "
                         "(for the released models google/flan-t5-xl, from huggingface.co)")
    text = pretrained_text_encoder(folder, gpt.config.cls_token_num, device)
    if text.t5.config.d_model != gpt.config.caption_dim:
        raise InputError(f"{args.gpt} and {folder} do not belong together: the GPT reads features of width "
                         f"{gpt.config.caption_dim:,}, the encoder gives {text.t5.config.d_model:,}")
    return text


# ------------------------------------------------------------------------------------------------------------
# What to draw

def parse_classes(words, class_names):
    """["0", "heart"] or ["0,heart"] -> [0, 6]: ids or names of the model's classes."""
    classes, lowered = [], [name.lower() for name in class_names]
    for word in (word.strip() for text in words for word in text.split(",")):
        if word.lower() in lowered:
            classes.append(lowered.index(word.lower()))
        elif word.isdecimal() and int(word) < len(class_names):
            classes.append(int(word))
        else:
            some = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
            raise InputError(f"--classes {word!r}: use numbers from 0 to {len(class_names) - 1}, or names: "
                             f"{some}")
    return classes


def read_prompts(args):
    """--prompts, the lines of --prompts-file that are not blank, or a few examples."""
    prompts = args.prompts or EXAMPLES
    if args.prompts_file:
        with explained(f"--prompts-file {args.prompts_file} cannot be read", "it has to be text in UTF-8"):
            lines = text_lines(Path(args.prompts_file).read_bytes())
        prompts = [line for line in lines if line.strip()]
    if not prompts or not all(map(str.strip, prompts)):
        raise InputError("a prompt is empty: give each some words")
    return [prompt.strip() for prompt in prompts]


def balanced(chosen, args):
    """Which class or prompt each of the --num-samples pictures shows, (M,): each in turn, or at random."""
    M = args.num_samples or max(1000, len(chosen))
    if args.random_classes:
        return np.random.default_rng(args.seed).choice(chosen, M)
    if M < len(chosen):
        warning(f"--num-samples {M} leaves room for the first {M} of {len(chosen)} classes or prompts only")
    return np.array(chosen)[np.arange(M) % len(chosen)]


# ------------------------------------------------------------------------------------------------------------
# Drawing

def cache_bytes(config, rows, places, size=4):
    """Keys and values: 2 for each layer, row, place and channel of the key-value heads, of `size` bytes."""
    heads = config.n_kv_head or config.n_head
    return 2 * config.n_layer * rows * places * heads * config.dim // config.n_head * size


def fitting_batch(gpt, cfg_scale, device, jacobi=1):
    """How many pictures are drawn at the same time if nobody says so: 100, or of 64, 32, ..., 1 as many as
    have their keys, values and logits in half of the free memory. Processes agree on the least.

    Few sizes to choose from: the size decides which random numbers a picture gets, so that the same command
    should choose the same on another day.
    """
    rows, size = 1 + (cfg_scale != 1), gpt.tok_embeddings.weight.element_size()
    most = max(jacobi, math.isqrt(gpt.config.block_size) if gpt.neighbours else 1)       # tokens of a pass
    each = cache_bytes(gpt.config, rows, len(gpt.rope), size) + rows * most * 4 * 4 * gpt.config.vocab_size
    fits = -largest(-(free_memory(device) // 2 // each))[0]
    return next(size for size in (100, 64, 32, 16, 8, 4, 2, 1) if size <= max(fits, 1))


def sample_batch(models, conditions, rows, batch, args, device):
    """Pictures of these classes or prompts (B,), uint8 (B, H, W, 3) on the device. The random numbers come
    from --seed and the batch's number alone: it does not matter which process draws it, or when."""
    gpt, vq, text = models
    # Neighbouring seeds and batches must not give similar streams: SeedSequence mixes the two numbers well.
    seed = np.random.SeedSequence((args.seed, batch)).generate_state(1, np.uint64).item()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        cond, cond_mask = conditions(rows, text, device)
    tokens = generate(gpt, cond, cond_mask, args.cfg_scale, args.cfg_interval, args.temperature, args.top_k,
                      args.top_p, None, generator, args.cfg_schedule, args.jacobi)       # (B, N)
    return to_pictures(vq, tokens, args.image_size_eval)


def start_copy(pictures):
    """Let a GPU copy pictures (B, H, W, 3) to the CPU as soon as they are drawn, while Python goes on to
    the next batch. Returns the copy and the event to wait for, None if it is there."""
    if pictures.device.type != "cuda":
        return pictures, None
    host = torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True)
    host.copy_(pictures, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    return host, there


def sample_all(models, conditions, rows, images, args, device, array=None):
    """Fill `images` (M, H, W, 3) batch by batch and print the speed. array: the SharedArray that they are in,
    if this process is to draw only its part of the batches."""
    size, started, count, waiting = args.batch_size, time.perf_counter(), 0, []
    part = lambda batch: slice(batch * size, (batch + 1) * size)

    def keep(batch, host, there):
        if there is not None:
            there.synchronize()
        images[part(batch)] = host.numpy()[:len(rows[part(batch)])]
        if array is not None:
            array.done[batch] = SharedArray.DONE

    batches = range(-(-len(rows) // size)) if array is None else array.mine
    for batch in tqdm(batches, desc="sampling", unit=" batches"):
        # A smaller last batch would be compiled anew and draw other numbers: it is filled up, then cut.
        full = np.resize(rows[part(batch)], min(size, len(rows)))
        waiting.append((batch, *start_copy(sample_batch(models, conditions, full, batch, args, device))))
        count += len(rows[part(batch)])
        if device.type != "cuda" or len(waiting) > 1:        # a GPU draws while the batch before is written
            keep(*waiting.pop(0))
    for batch in waiting:
        keep(*batch)
    seconds = time.perf_counter() - started
    if count:
        speed, N = count / seconds, models[0].config.block_size
        print(f"{count} images in {seconds:.1f} s on {device}, {min(size, len(rows))} at a time: "
              f"{speed * N:,.0f} tokens/s, {speed:.2f} images/s")


def sample_grid(models, conditions, chosen, per_class, side, args, device):
    """Write --out: a row of pictures per class or prompt, or with one each, rows of four with titles."""
    rows = np.repeat(chosen, per_class)
    images = np.empty((len(rows), side, side, 3), np.uint8)
    sample_all(models, conditions, rows, images, args, device)
    words = [conditions.names[i] for i in chosen]
    sheet = (image_grid(images, 4, titles=words) if per_class == 1 else
             image_grid(images, per_class, row_names=words))
    save_picture(sheet, args.out)
    print(f"wrote {args.out}")


def sample_npz(models, conditions, rows, side, args, device):
    """Write --npz, the evaluators' format: arr_0 uint8 (M, H, W, 3), and label int64 (M,) or, for text, the
    strings prompt (M,). Under torchrun each process draws its share of the batches; interrupted, the same
    command goes on where it was.

    The pictures grow in a file of their own, so that 50,000 need no memory; the last step packs them.
    """
    path, words = Path(args.npz), [conditions.names[i] for i in rows]
    # The key of unfinished work: the models' files and every flag that changes a picture.
    files = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in (args.gpt, args.vq)]
    key = short_hash([files, args.seed, args.batch_size, args.cfg_scale, args.cfg_interval,
                      args.cfg_schedule, args.jacobi, args.temperature, args.top_k, args.top_p,
                      args.image_size, args.text_encoder, args.int8, args.bf16, side,
                      rows.tolist(), words])
    whole = path.with_name(f"{path.name}.{key}.arr_0")
    drawn = whole.exists()                                       # interrupted while packing
    wait_for_all()
    if not drawn:
        array = SharedArray(whole, (len(rows), side, side, 3), np.uint8, key,
                            units=-(-len(rows) // args.batch_size))
        sample_all(models, conditions, rows, array.rows, args, device, array)
        array.finish()
    if rank_and_world()[0] == 0:
        what = {"prompt": np.array(words)} if models[2] else {"label": rows}
        with whole_file(path) as name, open(name, "wb") as file:     # NumPy would append .npz to a name
            np.savez(file, arr_0=np.load(whole, mmap_mode="r"), **what)
        whole.unlink()
        print(f"wrote {path}")
    wait_for_all()                                               # whoever goes on finds the file


def get_args(argv=None):
    parser = flag_parser(__file__, __doc__)
    add = parser.add_argument_group("models").add_argument
    add("--gpt", help="train_gpt.py's checkpoint or a released one; if left out out/gpt.pt or, before there "
        "is one, the weights in notebooks/weights")
    add("--vq", help="the tokenizer that the GPT was trained with; if left out out/vq.pt or as --gpt")
    add("--text-encoder", metavar="FOLDER", help="folder of FLAN-T5, for GPTs that read its features")
    add("--image-size", type=number(int, "a multiple of 16, a token's side", lambda n: n > 0 and n % 16 == 0),
        help="released GPTs only: pixels of its grid, 256 if left out")
    group = parser.add_argument_group("what to draw")
    add, prompts = group.add_argument, group.add_mutually_exclusive_group()
    add("--classes", nargs="+", metavar="CLASS",
        help="ids or names (blanks or commas between them), one row each; at most ten if left out")
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="captions, one row each")
    prompts.add_argument("--prompts-file", help="captions, one a line")
    add("--per-class", type=counting, help="pictures of each class or prompt; 8, or 1 of a released GPT")
    add("--out", default="out/samples.png", help="the labelled grid")
    add("--npz", help="instead of a grid, write --num-samples pictures for fid.py")
    add("--num-samples", type=counting, help="pictures in the --npz; 1000 or all prompts if left out")
    add("--random-classes", action="store_true",
        help="classes of the --npz at random, as in the paper, not in turn")
    add("--image-size-eval", type=counting, help="resize the pictures to this side; 256 in the paper")
    add = parser.add_argument_group("how to sample").add_argument
    add("--cfg-scale", type=finite, help="guidance; 1: none, 0: unconditional; if left out 2.25 (with text "
        "1.5), for a released GPT 4 (with text 7.5)")
    add("--cfg-interval", type=number(int, "-1 or more", lambda n: n >= -1), default=-1,
        help="i: guide tokens 0 to i+1 only; -1: all")
    add("--cfg-schedule", default="constant", choices=SCHEDULES,
        help="guidance of all tokens alike, or growing from 1 to --cfg-scale")
    add("--temperature", type=not_negative, help="below 1: less varied; 0: the likeliest token; if left out "
        "0.5 (with text 0.6), for a released GPT 1")
    add("--top-k", type=natural, default=0, help="draw from the k likeliest tokens; 0: from all")
    add("--top-p", type=number(float, "above 0 and at most 1", lambda x: 0 < x <= 1), default=1.0,
        help="draw from the likeliest tokens of this share")
    add("--jacobi", type=counting, default=1, metavar="TOKENS",
        help="run so many a pass, the newest and guesses behind it: fewer passes, the same pictures (with "
        "--int8 similar ones)")
    add("--batch-size", type=counting,
        help="pictures drawn at the same time; if left out 100, or what fits into half of the free memory")
    add("--seed", type=natural, default=0, help="same seed and batch size, same pictures on this device")
    add("--device", help=DEVICE_HELP)
    add("--compile", action="store_true", help="torch.compile one decoding step: slow start, for GPUs")
    low = parser.add_mutually_exclusive_group()
    low.add_argument("--int8", action="store_true", help="the GPT's matrices in 8 bits, a quarter")
    low.add_argument("--bf16", action="store_true", help="in bf16, if this CPU multiplies it; GPUs always do")
    return parser.parse_args(argv)


def ready(gpt, args):
    """The GPT, prepared once for all batches; serve_vllm.py puts an engine in its place."""
    if args.compile:
        gpt.compile_step()
    check_passes(gpt, 0, args.jacobi)
    return gpt if args.compile else packed(gpt)


def main(args):
    check_output(args.npz or args.out, () if args.npz else PICTURE_NAMES, "--npz" if args.npz else "--out")
    device = pick_device(args.device)
    check_compile(args, device)
    find_models(args)
    gpt, vq, text, names, own = load_models(args, device)
    cfg_scale, temperature = SETTINGS["text" if text else "class", "own" if own else "released"]
    args.cfg_scale = cfg_scale if args.cfg_scale is None else args.cfg_scale
    args.temperature = temperature if args.temperature is None else args.temperature
    side = args.image_size_eval or math.isqrt(gpt.config.block_size) * vq.config.downsample
    args.batch_size = args.batch_size or fitting_batch(gpt, args.cfg_scale, device, args.jacobi)
    if text is None and (args.prompts or args.prompts_file):
        raise InputError(f"{args.gpt} draws classes, not prompts: use --classes, or train with --cond text")
    if text and args.classes:
        raise InputError(f"{args.gpt} draws from text: use --prompts instead of --classes")

    if text:
        prompts = read_prompts(args)
        conditions = Captions([[prompt] for prompt in prompts], text)
        chosen = conditions.rows.tolist()                        # equal prompts share a row of names
        if text.cut:
            warning(f"{text.cut} prompts are longer than {text.length} tokens and lose their ends")
    else:
        conditions = Classes(names)
        chosen = parse_classes(args.classes, names) if args.classes else list(range(len(names)))
    models = ready(gpt, args), vq, text                          # the three travel together from here on
    if args.npz:
        with alone(args.npz):
            return sample_npz(models, conditions, balanced(chosen, args), side, args, device)
    chosen = chosen if args.classes or text else chosen[:10]
    sample_grid(models, conditions, chosen, args.per_class or (8 if own else 1), side, args, device)


if __name__ == "__main__":
    run(main, get_args)
