"""Train the GPT on the tokens of a data set: next-token prediction with a class or a caption in front.

    loss = - 1/N sum over t of log p(token t | condition, tokens 0 .. t-1)

Shapes: B images, M images of a data set, N tokens of an image, K crops per image, V vocabulary, H x W pixels,
        L condition tokens, E width of their features.
Paper:  LlamaGen (arXiv 2406.06525) section 2.2 and 3.2.
Run:    python train_gpt.py                                        # after train_vq.py; 5 minutes on a laptop
        python train_gpt.py --data fashion_mnist --minutes 10
        python train_vq.py --cond text --minutes 4 --out out/text/vq.pt
        python train_gpt.py --cond text --vq out/text/vq.pt --minutes 15 --out out/text/gpt.pt
"""
import copy
import math
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (batch_indices, check_tokenizer, code_key, extract_codes, image_grid, load_data, read_about,
                  read_captions, read_codes, save_picture, spread, to_device)
from files import warning
from model import GPT, GPT_SIZES, GPTConfig, load_gpt
from runs import (InputError, check_compile, counting, fast_dtype, fill_weights, finite, flag_parser,
                  learning_rate, mixed_precision, my_part, natural, not_negative, pick_device, positive,
                  read_checkpoint, read_config, run, share, update_ema, weights_hash)
from sample import SETTINGS, generate
from text import (Captions, Classes, pretrained_text_encoder, saved_text_encoder, tiny_text_encoder,
                  tiny_text_encoder_from)
from tokenizer import load_tokenizer, to_pictures
from training import (Progress, add_training_flags, batch_of, check_same_data, clip_gradients, exchange,
                      prepare, put_weights, restore, resume_state, training_state, whole_weights)


# ------------------------------------------------------------------------------------------------------------
# The data: codes, and what the GPT is told about each picture

def prepare_codes(args, vq, vq_hash, device):
    """The folders with the tokens of the training and of the held-out pictures, for read_codes: those in
    --codes, or made now from --data and kept beside --out for the next run.

    The tokenizer is finished, so every picture is tokenized once and never again: the GPT's loop reads
    integers, and no encoder runs in it.
    """
    splits = ("train", "test")
    if args.codes:
        folders = [Path(args.codes) / split for split in splits]
        if any(read_about(folder)["vq_hash"] != vq_hash for folder in folders):
            raise InputError(f"{args.codes} and {args.vq} do not belong together: the codes are those of "
                             f"another tokenizer")
        return folders
    size = args.image_size or read_checkpoint(args.vq, mmap=True).get("image_size", 256)    # 256: released
    check_tokenizer(vq, size, args.vq)
    folders = []
    for split in splits:
        data = load_data(args.data, split, size, args.limit, args.data_dir, args.flip,
                         ranges=args.ten_crop, captioned=args.cond == "text")
        folders.append(Path(args.out).parent / "codes" / code_key(vq_hash, data))
        extract_codes(vq, vq_hash, data, folders[-1], device)
    return folders


def usable(labels, K, cond):
    """Which pictures to ask for: not those with the label -1, which could not be read, nor, of classes, any
    beyond the K of the training pictures, where the null class has its row."""
    strange = (labels >= K) & (cond == "class")
    if strange.any():
        warning(f"left out {strange.sum()} pictures of classes that are not trained")
    return np.flatnonzero((labels >= 0) & ~strange)


def prepare_captions(args, folders, base, saved, device):
    """The Captions of the training and of the held-out pictures, and the text encoder that is still to run in
    every step: None if its features are cached. base: the checkpoint --init; saved: the text encoder of a
    checkpoint to go on from, or None."""
    null = base.get("model", {}).get("cls_embedding.uncond_embedding")          # (L, E) of --init, or None
    length = args.text_length or (len(null) if null is not None else None)
    train, test = (read_captions(folder) for folder in folders)
    if args.text_encoder != "tiny":
        text = pretrained_text_encoder(args.text_encoder, length or 120, device)
    elif saved:
        text = tiny_text_encoder_from(saved, args.init or args.out, device).train()
    else:
        text = tiny_text_encoder([c for several in train for c in several], length or 32).to(device)
    train, test = Captions(train, text), Captions(test, text)
    if null is not None and (text.length, train.width) != tuple(null.shape):
        L, E = null.shape
        raise InputError(f"{args.init} does not fit this text encoder: it reads {L} tokens of width "
                         f"{E:,}, the encoder gives {text.length} of width {train.width:,}. Pass the "
                         f"--text-encoder and --text-length that it was trained with")
    if text.cut:
        warning(f"{text.cut} captions are longer than {text.length} tokens and lose their ends")
    if args.text_encoder == "tiny" or args.live_features:
        return train, test, text
    for captions, folder in zip((train, test), folders):
        captions.cache_features(text, folder, device)
    return train, test, None


def code_batches(codes, kept, conditions, batch_size, seed, start=0, device="cpu"):
    """Endless batches: tokens (B, N) int64, one random crop of each picture, and for each picture the row of
    conditions.names that it is drawn for, (B,). No Python per picture. B: this process's part of batch_size.

    codes  (M, K, N) uint16, memory-mapped: only what a batch asks for is read
    kept   the pictures to use, a part of 0 .. M-1
    start  the number of the first batch: random numbers follow from (seed, number), also in a resumed run
    """
    for number, index in enumerate(batch_indices(len(kept), batch_size, seed, start), start):
        rng, pictures = np.random.default_rng((seed, number)), kept[index.numpy()]
        crop = rng.integers(codes.shape[1], size=len(pictures))
        rows = conditions.draw(pictures, rng)
        pictures, crop, rows = my_part(pictures), my_part(crop), my_part(rows)   # of all that was drawn
        tokens = torch.from_numpy(codes[pictures, crop].astype(np.int64))
        yield to_device(tokens, device), rows


# ------------------------------------------------------------------------------------------------------------
# Looking at the GPT

@torch.inference_mode()
def validation_loss(gpt, text, codes, kept, conditions, device, count, batch_size=100):
    """Mean nats per token over the first crop of `count` held-out pictures, evenly spread. A model that knew
    nothing would have ln V; e^loss is among how many equally likely tokens it hesitates."""
    total, pictures = torch.zeros((), device=device), np.array(spread(kept, count))
    for i in range(0, len(pictures), batch_size):
        index = pictures[i:i + batch_size]
        tokens = torch.from_numpy(codes[index, 0].astype(np.int64)).to(device)   # (B, N)
        rows = conditions.draw(index, np.random.default_rng(i))
        with mixed_precision(device):
            cond, cond_mask = conditions(rows, text, device)
            total += gpt(tokens[:, :-1], cond, tokens, cond_mask, want_logits=False)[1] * len(tokens)
    return (total / len(pictures)).item()


@torch.no_grad()
def save_samples(gpt, text, vq, conditions, device, path, args, columns=8):
    """A labelled PNG: one row for each of ten classes or captions, the same random numbers every time, so
    that two previews differ by what was learnt in between."""
    rows = np.array(spread(range(len(conditions.names)), 10)).repeat(columns)
    cond, cond_mask = conditions(rows, text, device)
    cfg_scale, temperature = SETTINGS[args.cond, "own"]
    tokens = generate(gpt, cond, cond_mask, cfg_scale=cfg_scale if args.cfg_scale is None else args.cfg_scale,
                      temperature=temperature if args.temperature is None else args.temperature,
                      generator=torch.Generator(device).manual_seed(args.seed))
    save_picture(image_grid(to_pictures(vq, tokens).cpu().numpy(), columns,
                            row_names=[conditions.names[i] for i in rows[::columns]]), path)


# ------------------------------------------------------------------------------------------------------------
# Guidance folded into the weights

def log_likelihood(gpt, tokens, cond):
    """log p(picture | class) of tokens (B, N) and classes (B,), in nats, (B,)."""
    logits, _ = gpt(tokens[:, :-1], cond)                        # (B, N, V)
    nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return -nats.view_as(tokens).sum(dim=1)


def contrast(gpt, reference, tokens, cond, args):
    """Condition contrastive alignment (CCA, arXiv 2410.09347): guidance learnt once, instead of computed for
    every picture with a second row. Each picture is compared with the reference, which does not change, in
    r = log p(picture | class) - log p_reference(picture | class), and again with another's class, r':

        loss = - 1/lambda log sigmoid(beta r) - log sigmoid(-beta r')

    Likelier with its class, unlikelier with others: in the end the classes stand further apart than the data
    have them, as guidance puts them. A picture whose class is dropped, so that guidance is still possible, or
    equal to the other has no wrong class: there r' counts as a second r.

    tokens (B, N), cond (B,): a batch; the other class is that of the picture before. Returns the mean loss.
    """
    if len(cond) < 2:
        raise InputError("--cca compares pictures: --batch-size has to be at least 2 for each process")
    dropped = torch.rand(len(cond), device=cond.device) < args.class_dropout
    right, other = (torch.where(dropped, reference.config.num_classes, c) for c in (cond, cond.roll(1)))
    tokens, cond, sign = tokens.repeat(2, 1), torch.cat([right, other]), torch.where(right == other, 1, -1)
    with torch.no_grad():
        before = log_likelihood(reference, tokens, cond)
    r, other_r = (args.cca_beta * (log_likelihood(gpt, tokens, cond) - before)).chunk(2)         # (B,) each
    weight = torch.where(right == other, 1 / args.cca_lambda, 1.0)
    return -(F.logsigmoid(r) / args.cca_lambda + weight * F.logsigmoid(sign * other_r)).mean()


# ------------------------------------------------------------------------------------------------------------
# The model and its optimizer

@torch.no_grad()
def quick_start(gpt, codebook):
    """First weights from which a small GPT learns in half the steps. codebook (V, C): unit vectors.

    Adam moves each weight by about the learning rate. At the paper's 1e-4, weights that start with a std of
    0.02 remain what they are for hundreds of steps; at rates for runs of minutes they are washed away in a
    dozen, and what tells the tokens apart with them. So here all start larger: embeddings as a random
    projection of the codebook, so that codes that look alike are alike to the GPT, plus noise of their own;
    matrices that keep the length of a normalised input: a sum over D channels with weights of variance 1 / D.
    Those that end a branch start at 0, every block as the identity.
    """
    V, C = codebook.shape
    D = gpt.config.dim
    # Longer than a step of Adam by far, shorter than 1, so that 1,000 steps can still turn them; the part of
    # their own is half of the shared part: look-alikes start alike, yet no two are the same.
    gpt.tok_embeddings.weight.copy_(0.5 * codebook @ torch.randn(C, D) + 0.25 * torch.randn(V, D))
    for layer in gpt.layers:
        for linear in (layer.attention.wqkv, layer.feed_forward.w1, layer.feed_forward.w3):
            nn.init.normal_(linear.weight, std=D ** -0.5)
        for linear in (layer.attention.wo, layer.feed_forward.w2):
            nn.init.zeros_(linear.weight)


def read_base(args, state, vq, vq_hash):
    """The checkpoint --init, or {}. InputError, before pictures are tokenized, if it cannot be the start, or
    `state` (None: a fresh run) had another tokenizer."""
    if args.cca and args.cond == "text":
        raise InputError("--cca is for classes: captions of two pictures may both be true of one")
    base, V = read_checkpoint(args.init, mmap=True) if args.init else {}, vq.config.codebook_size
    for path, checkpoint in ((args.init, base), (args.out, state or {})):
        if checkpoint.get("vq_hash", vq_hash) != vq_hash:
            raise InputError(f"{path} and {args.vq} do not belong together: that GPT had another tokenizer")
    if not args.init:
        return base
    kind = "text" if "cls_embedding.uncond_embedding" in base["model"] else "class"
    if len(base["model"].get("tok_embeddings.weight", ())) != V:
        raise InputError(f"{args.init} does not fit {args.vq}: it is no GPT for a codebook of {V:,} entries")
    if kind != args.cond:
        raise InputError(f"{args.init} does not fit --cond {args.cond}: it was trained with --cond {kind}")
    return base


def prepare_model(args, own, names, vq, base, device):
    """A new GPT of --size, or one with the weights of --init (`base`, its checkpoint) on a grid of its own.
    own: what the data decide of its configuration; names: of their classes."""
    first = load_gpt(args.init, checkpoint=base) if args.init else None
    config = first.config if first else GPTConfig(**GPT_SIZES[args.size])
    own = own | ({"cond_rope": config.cond_rope} if first else {"order": args.order})
    config = replace(config, **own, token_dropout=args.dropout, resid_dropout=args.dropout,
                     ffn_dropout=args.dropout, class_dropout=0.0 if args.cca else args.class_dropout,
                     drop_path=args.drop_path)                   # --cca drops classes itself
    gpt = GPT(config)
    if first:
        weights, table = first.state_dict(), "cls_embedding.embedding_table.weight"
        before = first.config.num_classes
        if table in weights and (before != len(names) or base.get("class_names", names) != names):
            if args.cca:
                raise InputError(f"{args.cca} was trained on other classes: --cca needs one of the same data")
            # With other classes only the last row, the null class, means what it meant.
            print(f"{args.init} has {before:,} classes, the data {len(names):,} others: the table of classes "
                  f"starts anew, all other weights are kept")
            weights[table] = torch.cat([gpt.state_dict()[table][:-1], weights[table][-1:]])
        fill_weights(gpt, weights, args.init)
    elif not args.paper_init:
        quick_start(gpt, vq.quantize.codes().cpu())
    return gpt.to(device)


def parameter_groups(named, weight_decay, text_lr=1.0):
    """Groups for AdamW, of (name, weight) pairs. Weight decay pulls on matrices and embeddings (2 and more
    dimensions), whose length may grow without need, not on the gains of norms, which belong near 1. "rate" is
    the group's learning rate as a share of the run's: text_lr for what a caption passes through before the
    transformer. At rates for minutes, what all captions have in common would outgrow there what tells them
    apart."""
    groups = []
    for of_text, rate in ((False, 1.0), (True, text_lr)):
        chosen = [weight for name, weight in named
                  if (name.startswith("text.") or ".cap_proj." in name) == of_text]
        matrices, gains = ([w for w in chosen if (w.dim() >= 2) == matrix] for matrix in (True, False))
        groups.append({"params": matrices, "weight_decay": weight_decay, "rate": rate})
        groups.append({"params": gains, "weight_decay": 0.0, "rate": rate})
    return [group for group in groups if group["params"]]


def prepare_optimizers(nets, args):
    """Muon for the matrices of the GPT's layers and AdamW for the rest, or AdamW for all, as in the paper.

    Muon (Jordan 2024): Adam scales every weight by itself, and then the step of a whole matrix lies in the
    few directions that its gradients share. Muon makes all directions equally long: of the momentum
    M = U S V^T it steps along U V^T, to which a few Newton-Schulz iterations, matrix products only, come near
    enough. match_rms_adamw scales that to the length of AdamW's step; three times as much was best here.
    """
    of_layer = lambda name, weight: args.optimizer == "muon" and ".layers." in name and weight.dim() == 2
    layers = [weight for name, weight in nets.named_parameters() if of_layer(name, weight)]
    rest = [(name, weight) for name, weight in nets.named_parameters() if not of_layer(name, weight)]
    muon = [torch.optim.Muon([{"params": layers, "rate": 3.0}], lr=args.lr, weight_decay=args.weight_decay,
                             ns_steps=3, adjust_lr_fn="match_rms_adamw")] if layers else []
    # beta2 is 0.95 for the reason that train_vq.adam gives; decay and rates differ by group
    return muon + [torch.optim.AdamW(parameter_groups(rest, args.weight_decay, args.text_lr), lr=args.lr,
                                     betas=(0.9, 0.95), fused=True)]


def get_args(argv=None):
    parser = flag_parser(__file__, __doc__)
    add_training_flags(parser, out="out/gpt.pt", minutes=4.3)
    parser.add_argument("--vq", default="out/vq.pt", help="the tokenizer: train_vq.py's or a released one")
    parser.add_argument("--codes", help="a folder that data.py extract filled, instead of --data")
    parser.add_argument("--ten-crop", type=positive, nargs="+", default=[], metavar="RANGE",
                        help="tokenize ten crops at RANGE times the size, 1.1 1.05 in the paper, instead of "
                             "the centre and its mirror image")
    add = parser.add_argument_group("text").add_argument
    add("--text-encoder", default="tiny", metavar="tiny|FOLDER", help="tiny: a small one, trained along; or "
        "a folder with FLAN-T5's config.json, weights and spiece.model")
    add("--text-length", type=counting, help="L; if left out the longest caption's (to 32); for FLAN-T5 120")
    add("--live-features", action="store_true", help="run FLAN-T5 in every step, not once into a file")
    add("--text-lr", type=share, default=0.1,
        help="rate for what reads captions, a share of --lr; 1 in the paper")
    add("--cond-rope", default="identity", choices=("zero", "identity"),
        help="the captions' rows of the RoPE table; zero in the paper; with --init as they were there")
    add = parser.add_argument_group("model").add_argument
    starts = parser.add_mutually_exclusive_group()
    starts.add_argument("--init", help="start from the weights of this GPT, of any image size: the paper's "
                        "second stage")
    starts.add_argument("--cca", metavar="REF.pt", help="start there and fold guidance into the weights: "
                        "then sample with --cfg-scale 1. Take --optimizer adamw --lr 6e-4, large GPTs 1e-5")
    add("--cca-beta", type=positive, default=0.02, help="small: far from the reference; of 64 tokens 0.1")
    add("--cca-lambda", type=positive, default=300,
        help="what a wrong class weighs against a right one; for runs of minutes 30")
    add("--order", default="raster", choices=("raster", "neighbours"), help="row by row, or all tokens of a "
        "distance from the corner at once; with --init or --cca as it was there")
    add("--paper-init", action="store_true", help="start with a std of 0.02, without quick_start")
    add("--size", default="tiny", choices=GPT_SIZES, help="a row of GPT_SIZES in model.py")
    add("--image-size", type=counting, help="side of the pictures; the tokenizer's own if left out")
    add("--dropout", type=share, default=0.0, help="of embeddings, attention, feed-forward; 0.1 in the paper")
    add("--class-dropout", type=share, default=0.1, help="share of conditions replaced by the null one")
    add("--drop-path", type=share, default=0.0, help="stochastic depth; with it --dropout 0 is usual")
    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", default="muon", choices=("muon", "adamw"), help="for the layers; adamw: paper")
    add("--batch-size", type=counting, default=64, help="pictures per step; 256 in the paper")
    add("--grad-accum", type=counting, default=1, help="batches whose gradients make one step")
    add("--lr", type=positive, default=3e-3, help="peak learning rate; 1e-4 in the paper")
    add("--warmup", type=natural, default=100, help="steps of linear warm-up; 0 in the paper")
    add("--weight-decay", type=not_negative, default=0.05, help="of tensors with 2 dimensions and more")
    add("--cfg-scale", type=finite, help="guidance of the previews; sample.py's if left out")
    add("--temperature", type=not_negative, help="of the previews; sample.py's if left out")
    args = parser.parse_args(argv)
    if args.cca:
        args.init, args.cfg_scale = args.cca, 1.0 if args.cfg_scale is None else args.cfg_scale
    return args


def main(args):
    # 1. The tokenizer, and the pictures as it sees them
    state = resume_state(args, "vq_hash")
    device = pick_device(args.device)
    check_compile(args, device)
    torch.manual_seed(args.seed)
    vq = load_tokenizer(args.vq, device)
    vq_hash = weights_hash(vq)
    base = read_base(args, state, vq, vq_hash)
    folders = prepare_codes(args, vq, vq_hash, device)
    (codes, labels, about), (test_codes, test_labels, _) = (read_codes(folder) for folder in folders)
    names, N, V = about["class_names"], codes.shape[2], vq.config.codebook_size
    kept, test_kept = (usable(part, len(names), args.cond) for part in (labels, test_labels))
    identity = check_same_data(args, state, {"class_names": names, "pictures": len(codes),
                                             "readable": len(kept), **about.get("identity", {})})
    # 2. What stands in front of the tokens, and the GPT that reads it
    own = dict(vocab_size=V, block_size=N, model_type="c2i", num_classes=len(names))
    if args.cond == "class":
        train, test, text = Classes(names, labels), Classes(names, test_labels), None
    else:
        train, test, text = prepare_captions(args, folders, base, (state or base).get("text_encoder"), device)
        own |= dict(model_type="t2i", cls_token_num=train.ids.shape[1], caption_dim=train.width,
                    cond_rope=args.cond_rope)
    batch_size = batch_of(args, len(kept))
    gpt = prepare_model(args, own, names, vq, base, device)
    learns = text is not None and args.text_encoder == "tiny"    # the text encoder, together with the GPT
    nets = nn.ModuleDict({"gpt": gpt, "text": text} if learns else {"gpt": gpt})
    best = copy.deepcopy(nets).requires_grad_(False) if args.ema else nets       # what is saved, and draws
    reference = copy.deepcopy(gpt).eval().requires_grad_(False) if args.cca else None
    forwards = prepare(nets, best, lambda net: getattr(net, "layers", []), args, device)
    optimizers, preview = prepare_optimizers(nets, args), Path(args.out).with_suffix(".png")
    if state and read_config(GPTConfig, state["config"], args.out) != gpt.config:
        raise InputError(f"{args.out} was trained with other settings: resume with that run's flags")
    # 3. Go on where the checkpoint was. It is several times as large as the model: restore leaves nothing
    if state:
        put_weights(state.pop("model"), best["gpt"], args)
        restore(nets, optimizers, state, args)
    tokens_per_step = batch_size * args.grad_accum * N
    print(f"GPT {args.init or args.size}: {sum(p.numel() for p in nets.parameters()):,} parameters on "
          f"{device} in {fast_dtype(device)}; {len(kept):,} pictures, {tokens_per_step:,} tokens per step")

    def save():
        more = {"text_encoder": saved_text_encoder(best["text"]) |
                {"model": whole_weights(best["text"].t5, args)}} if learns else {}
        progress.save(**training_state(nets, optimizers), model=whole_weights(best["gpt"], args),
                      config=asdict(gpt.config), class_names=names, vq_hash=vq_hash, data=identity, **more)

    def look(count):
        """Draw the sample grid with what was just saved; returns the loss over `count` held-out pictures."""
        saved = read_checkpoint(args.out, mmap=True)
        models = (load_gpt(args.out, device=device, checkpoint=saved),
                  tiny_text_encoder_from(saved["text_encoder"], args.out, device) if learns else text)
        save_samples(*models, vq, test, device, preview, args)
        return validation_loss(*models, test_codes, test_kept, test, device, count)

    # 4. The loop
    with Progress(args, device, state) as progress:
        del state, base
        seen = progress.step * args.grad_accum                   # batches
        batches = code_batches(codes, kept, train, batch_size, args.seed, seen, device)
        while progress.running():
            lr = learning_rate(args.lr, progress.step, progress.fraction(), args.warmup, args.lr_final)
            for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
                group["lr"] = lr * group["rate"]
            mean_loss = torch.zeros((), device=device)
            for part in range(args.grad_accum):
                tokens, rows = progress.next_of(batches)         # (B, N), (B,)
                with exchange(forwards.values(), now=part == args.grad_accum - 1):
                    with mixed_precision(device):
                        # (B,) and None, or (B, L, E) and (B, L)
                        cond, cond_mask = train(rows, forwards.get("text", text), device)
                        # Position t sees the condition and tokens 0 .. t-1 and predicts token t: the last
                        # token is only ever a target.
                        loss = (contrast(forwards["gpt"], reference, tokens, cond, args) if reference else
                                forwards["gpt"](tokens[:, :-1], cond, tokens, cond_mask, False)[1])
                    # Gradients of the parts add up; each divided by their number, they give the mean.
                    (loss / args.grad_accum).backward()
                mean_loss += loss.detach() / args.grad_accum
            norm = clip_gradients(nets, args.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if args.ema:
                update_ema(best, nets, args.ema, progress.step)
            progress.count({"loss": mean_loss, "grad_norm": norm})
            if progress.step % args.log_every == 0:
                means = progress.means()
                speed = tokens_per_step * means.pop("steps_per_second")
                progress.log(**means, lr=lr, tokens_per_second=speed)
                unit = "" if args.cca else " nats/token"
                progress.bar.set_postfix_str(f"loss {means['loss']:.3f}{unit}, {speed:,.0f} tokens/s", False)
            if progress.save_is_due():
                save()
            if progress.step % args.eval_every == 0 and progress.rank == 0:
                nats = look(count=1000)
                progress.log(validation_loss=nats)
                progress.bar.write(f"step {progress.step}: validation loss {nats:.4f} nats per token")
        minutes = progress.seconds() / 60
        save()

    # 5. How good it is, over all held-out pictures. Bits per pixel do not count what the tokenizer lost.
    if progress.rank > 0:
        return
    nats = look(count=len(test_kept))
    bits = nats / math.log(2) * N / about["data"]["size"] ** 2
    progress.log(validation_loss=nats, bits_per_pixel=bits)
    print(f"{progress.step} steps in {minutes:.1f} minutes; over {len(test_kept):,} held-out pictures: "
          f"{nats:.4f} nats per token, {bits:.4f} bits per pixel (ln {V} = {math.log(V):.2f})")
    print(f"wrote {args.out} and {preview}")


if __name__ == "__main__":
    run(main, get_args)
