"""Train the image tokenizer: L2 + LPIPS + PatchGAN on the picture, codebook and commitment loss on the codes.

Shapes: B images, H x W pixels, D feature channels, V codebook entries.
Paper:  LlamaGen (arXiv 2406.06525) section 2.1; LPIPS (Zhang 2018); PatchGAN (Isola 2017);
        VQGAN (Esser 2021).
Run:    python train_vq.py                                         # shapes, 2 minutes on a laptop
        python train_vq.py --data fashion_mnist --minutes 8
"""
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from data import (find_file, flag_parser, image_grid, load_data, natural, pick_device, positive, run, share,
                  spread, to_float, to_uint8)
from tokenizer import (VQ_SIZES, InputError, VQConfig, VQModel, codebook_statistics, fill_weights,
                       load_tokenizer, read_checkpoint)


# ------------------------------------------------------------------------------------------------------------
# The perceptual loss

class LPIPS(nn.Module):
    """Distance of two pictures as VGG16 sees them: squared differences of normalised, weighted features.

    Zhang 2018 eq. 1:  d(a, b) = sum over taps l of the mean over h, w of  w_l . (a_l - b_l)^2
    Frozen and in eval mode; gradients reach the pictures.
    """
    TAPS = (3, 8, 15, 22, 29)                                    # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, vgg_path, lin_path):
        super().__init__()
        layers, c_in = [], 3
        for width in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool",
                      512, 512, 512, "pool", 512, 512, 512):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()]
                c_in = width
        self.features = nn.Sequential(*layers)
        weights = read_checkpoint(vgg_path)["model"]
        fill_weights(self, {k: w for k, w in weights.items() if k.startswith("features.")}, vgg_path)
        heads = read_checkpoint(lin_path)["model"]
        for i, tap in enumerate(self.TAPS):
            head = heads.get(f"lin{i}.model.1.weight")
            if head is None or head.shape != (1, self.features[tap - 1].out_channels, 1, 1):
                raise InputError(f"{lin_path} is not LPIPS v0.1's vgg.pth: lin{i}.model.1.weight is missing "
                                 f"or misshapen")
            self.register_buffer(f"lin{i}", head.float())
        # LPIPS wants ImageNet's mean and deviation, expressed for pictures in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, a, b):                                     # a, b (B, 3, H, W) in [-1, 1]
        x = (torch.cat([a, b]) - self.shift) / self.scale
        total = 0
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                unit = x.float() / (x.float().square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
                first, second = unit.chunk(2)                    # (B, D, h, w)
                distance = F.conv2d((first - second).square(), getattr(self, f"lin{self.TAPS.index(i)}"))
                total = total + distance.mean(dim=(2, 3), keepdim=True)
        return total                                             # (B, 1, 1, 1)


def load_lpips(args):
    """LPIPS from --vgg and --lpips, the cache or the network; None, with one line why, if its weights cannot
    be had."""
    if args.lpips_weight == 0:
        return None
    try:
        vgg = args.vgg or find_file("lpips", "vgg16-397923af.pth", args.data_dir)
        return LPIPS(vgg, args.lpips or find_file("lpips", "vgg.pth", args.data_dir))
    except InputError as error:
        if args.vgg or args.lpips:                    # asked for by name: a typo must not change the training
            raise
        print(f"LPIPS is off: {error}")


# ------------------------------------------------------------------------------------------------------------
# The adversary

class PatchDiscriminator(nn.Module):
    """Judges overlapping patches, not the whole picture: (B, 3, H, W) -> one logit per patch (B, 1, h, w)."""

    def __init__(self, size=256, width=64):
        super().__init__()
        n_layers = max(0, min(3, int(math.log2(size)) - 2))      # 3, or fewer for pictures below 32 pixels
        layers, c_in = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for i in range(1, n_layers + 1):
            c_out, stride = width * min(2 ** i, 8), 2 if i < n_layers else 1
            layers += [nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(c_out),
                       nn.LeakyReLU(0.2)]
            c_in = c_out
        self.main = nn.Sequential(*layers, nn.Conv2d(c_in, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, images):
        return self.main(images)


def discriminator_loss(real, fake, kind="hinge"):
    """What the discriminator minimises, from its logits on real and on reconstructed patches."""
    if kind == "hinge":             # max(0, 1 - D(x)) + max(0, 1 + D(y)): indifferent once the margin is kept
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    # -log sigmoid(D(x)) - log(1 - sigmoid(D(y))), with softplus(t) = log(1 + e^t) for numerical safety. The
    # vanilla and the non-saturating game share this half and differ in what the generator minimises.
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake, kind="hinge"):
    """What the decoder minimises, from the discriminator's logits on its pictures."""
    if kind == "non-saturating":    # -log sigmoid(D(y)): strong gradients exactly where the decoder is losing
        return F.softplus(-fake).mean()
    return -fake.mean()                  # hinge and vanilla, as in VQGAN


def adaptive_weight(reconstruction_loss, adversarial_loss, last_layer):
    """VQGAN eq. 7: scale the adversary so that its gradient at the last layer is as long as the
    reconstruction's."""
    length = lambda loss: torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
    return (length(reconstruction_loss) / (length(adversarial_loss) + 1e-4)).clamp(0, 1e4).detach()


# ------------------------------------------------------------------------------------------------------------
# What both training scripts need; train_gpt.py imports these

def add_training_flags(parser, out, minutes):
    """The flags that train_vq.py and train_gpt.py share."""
    group = parser.add_argument_group("data and files")
    group.add_argument("--data", default="shapes",
                       help="shapes, fashion_mnist, mnist, cifar10, or a folder of pictures")
    group.add_argument("--data-dir", help="where to look for the data set's files first")
    group.add_argument("--limit", type=positive(int),
                       help="use only so many pictures of each split")
    group.add_argument("--out", default=out, help="the checkpoint; its log and preview are written beside it")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    group = parser.add_argument_group("how long and where")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive(float), default=minutes,
                        help="train this long, the learning rate fitted to it")
    length.add_argument("--steps", type=positive(int), help="train for this many steps instead")
    group.add_argument("--device", help="cuda, mps or cpu; the best one present if left out")
    group.add_argument("--seed", type=natural, default=0,
                       help="of the weights, the order of the data and the dropout")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile the training step: slow start, faster steps")
    group.add_argument("--eval-every", type=positive(int), default=500,
                       help="steps between preview and checkpoint")
    group.add_argument("--log-every", type=positive(int), default=20, help="steps between lines of the log")


@contextmanager
def mixed_precision(device):
    """Matrix products in bf16, weights in float32, where the hardware is made for it: CUDA, and CPUs with
    bf16 instructions (there a step of the tiny GPT takes 0.7 of its time in float32)."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    cpu = able.get("amx_bf16", False) or able.get("avx512_bf16", False)
    # On the CPU, PyTorch's fused attention goes backward 4 times slower in bf16 than in float32, and 2 times
    # slower than the plain formula, which SDPBackend.MATH selects.
    attention = sdpa_kernel(SDPBackend.MATH) if cpu else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=cpu or device.type == "cuda"), attention:
        yield


def learning_rate(peak, step, progress, warmup, final=0.02):
    """Warm-up by steps, then a cosine over `progress` (0 at the start, 1 at the end) down to final * peak."""
    if step < warmup:                                            # 1. linear warm-up
        return peak * (step + 1) / warmup
    # 2. cosine decay; final = 1 keeps it constant
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (final + (1 - final) * cosine)


@torch.no_grad()
def update_ema(average, model, decay, step):
    """average <- d average + (1 - d) model, with a smaller d in the first steps, when the average is still
    young."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - d)


class Clock:
    """Progress of a run from 0 to 1, by steps or by minutes, carried over a resume; ends early on Ctrl-C."""

    def __init__(self, args, seconds=0.0):
        self.args, self.interrupted, self.started = args, False, time.perf_counter() - seconds
        # Ctrl-C only raises a flag: the step in progress is finished, so what is saved is a whole state. The
        # handler removes itself, so that a second Ctrl-C stops at once.
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def seconds(self):
        return time.perf_counter() - self.started

    def progress(self, step):
        return step / self.args.steps if self.args.steps else self.seconds() / (60 * self.args.minutes)

    def running(self, step):
        return not self.interrupted and self.progress(step) < 1

    def stop(self, script):
        """To be called after the loop and the last save; tells how to resume if the run was interrupted."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.interrupted:
            flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
            sys.exit(f"interrupted; all is saved. Go on with: "
                     f"{shlex.join(['python', script, *flags, '--resume'])}")


def save_checkpoint(path, fresh=False, **contents):
    """Write under a temporary name, then rename: an interruption never leaves half a checkpoint behind.

    fresh: the first save of a new run; an older checkpoint of that name is kept as NAME.previous.pt.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        if fresh and path.exists():                     # a copy: at no moment is there none of that name
            shutil.copyfile(path, partial)
            partial.replace(path.with_suffix(".previous.pt"))
        torch.save(contents, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def random_state(device):
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def resume_state(args, *needed):
    """The checkpoint in --out with everything needed to go on, or None for a fresh run. `needed`: entries
    that only this script's checkpoints have."""
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        return None
    state = read_checkpoint(args.out)
    if not {"config", "optimizer", "raw", "random", *needed} <= state.keys():
        raise InputError(f"{args.out} has no complete state to go on from: it was not written by this script")
    for name in ("data", "image_size", "limit", "seed", "init", "codes", "ten_crop", "captioned", "cond",
                 "text_encoder"):
        flag, now, before = f"--{name.replace('_', '-')}", getattr(args, name, None), state["args"].get(name)
        if now != before:
            raise InputError(f"{args.out} was trained with other settings, {flag} {before} instead of {now}: "
                             f"resume with that run's flags")
    return state


class Log:
    """One JSON object per line in NAME.jsonl beside the checkpoint. A fresh run starts a new file and keeps
    the old one as NAME.previous.jsonl."""

    def __init__(self, args):
        path = Path(args.out).with_suffix(".jsonl")
        if path.exists() and not args.resume:
            path.replace(path.with_suffix(".previous.jsonl"))
        self.file = open(path, "a", buffering=1)

    def write(self, **values):
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps(rounded), file=self.file)


# ------------------------------------------------------------------------------------------------------------
# Measuring a tokenizer

@torch.inference_mode()
def reconstructions(vq, data, device, batch_size):
    """One pass over a data set: pictures and reconstructions, both uint8 (B, 3, H, W), and tokens (B, N)."""
    for images, _ in data.passes(batch_size):
        images = images[:, 0].to(device)                         # the first crop is the centre
        tokens = vq.tokenize(to_float(images))
        yield images, to_uint8(vq.detokenize(tokens)).permute(0, 3, 1, 2), tokens


def peak_signal_to_noise(a, b):
    """PSNR = 10 log10(255^2 / mean (a - b)^2) in dB, (B,), of images uint8 (B, 3, H, W)."""
    mse = (a.float() - b.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-4)
    return 10 * (255 ** 2 / mse).log10()


def evaluate(vq, data, device, batch_size):
    """PSNR (dB, mean over pictures), share of the codebook in use and its perplexity."""
    counts = torch.zeros(vq.config.codebook_size, device=device)
    psnr = []
    for images, recon, tokens in reconstructions(vq, data, device, batch_size):
        psnr.append(peak_signal_to_noise(images, recon))
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
    return torch.cat(psnr).mean().item(), *codebook_statistics(counts)


@torch.inference_mode()
def save_preview(vq, data, device, path, count=16):
    """A PNG with `count` originals, evenly spread over the data set, above their reconstructions."""
    images, _ = next(iter(data.take([spread(range(len(data)), count)])))
    images = to_float(images[:, 0].to(device))
    both = torch.cat([images, vq.detokenize(vq.tokenize(images))])
    image_grid(to_uint8(both).cpu().numpy(), columns=len(images),
               row_names=("original", "reconstructed")).save(path)


# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def restart_dead_codes(vq, counts, images):
    """Move codebook entries that no picture used (counts == 0) onto badly served latents of the current
    batch.

    Without it a short run keeps only the few entries that happened to lie near the first latents (Jukebox
    restarts them at random latents; Dhariwal 2020). The chance of a latent grows with its squared distance to
    the nearest entry, as in k-means++, or most restarts would land on plain background and split it into
    codes that mean the same.
    """
    z = F.normalize(vq.encode(images).float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)      # (B N, C)
    distance = 2 - 2 * (z @ vq.quantize.codes().T).amax(dim=1)                       # |z - e|^2 on the sphere
    chosen = torch.multinomial(distance.clamp(min=1e-6), len(counts), replacement=True)
    weight = vq.quantize.embedding.weight
    weight.copy_(torch.where((counts == 0)[:, None], z[chosen].to(weight.dtype), weight))


def get_args(argv=None):
    parser = flag_parser(__doc__)
    add_training_flags(parser, out="out/vq.pt", minutes=1.75)
    parser.add_argument("--captioned", action="store_true",
                        help="train on the pictures with captions, as train_gpt.py --cond text will: of "
                             "shapes, also those with two in a picture")
    group = parser.add_argument_group("model")
    group.add_argument("--size", default="VQ-tiny", choices=VQ_SIZES,
                       help="a row of VQ_SIZES in tokenizer.py")
    group.add_argument("--image-size", type=positive(int), default=32, help="side of the pictures in pixels")
    group.add_argument("--codebook-size", type=positive(int), help="V, instead of the size's own")
    group.add_argument("--init", help="start from the weights of this tokenizer: fine-tune a released one")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch-size", type=positive(int), default=32,
                       help="pictures per step; 128 in the paper")
    group.add_argument("--lr", type=positive(float), default=2e-3,
                       help="peak learning rate; 1e-4 in the paper")
    group.add_argument("--lr-final", type=share, default=0.02,
                       help="end of the cosine as a share of --lr; 1: constant")
    group.add_argument("--warmup", type=natural, default=50, help="steps of linear warm-up; 0 in the paper")
    group.add_argument("--clip", type=positive(float), default=1.0, help="largest norm of the gradient")
    group.add_argument("--ema", type=share, default=0.995,
                       help="decay of the averaged weights that are saved; 0: off")
    group.add_argument("--restart-every", type=natural, default=50,
                       help="steps between restarts of unused codebook entries, in the first 80%% of the "
                            "run; 0: never")
    group = parser.add_argument_group("losses")
    group.add_argument("--commitment-weight", type=float, default=0.25, help="beta of the commitment loss")
    group.add_argument("--entropy-weight", type=float, default=0.0, help="of the entropy loss on the codes")
    group.add_argument("--lpips-weight", type=float, default=0.0,
                       help="of the perceptual loss; 1 in the paper; needs VGG16, 528 MB, and takes most of "
                            "the time")
    group.add_argument("--vgg", help="vgg16-397923af.pth, if it is not in the cache")
    group.add_argument("--lpips", help="LPIPS v0.1's vgg.pth, if it is not in the cache")
    group.add_argument("--disc-weight", type=float, default=0.5, help="of the adversarial loss")
    group.add_argument("--disc-start", type=natural, default=20000,
                       help="step at which the discriminator joins")
    group.add_argument("--disc-loss", default="hinge", choices=("hinge", "vanilla", "non-saturating"),
                       help="its game")
    group.add_argument("--disc-adaptive", action="store_true",
                       help="scale --disc-weight by the ratio of gradients")
    args = parser.parse_args(argv)
    if args.compile and args.disc_adaptive:
        parser.error("--disc-adaptive takes a second gradient, which --compile does not allow: drop one")
    return args


def main(args):
    state = resume_state(args, "disc")
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    start = load_tokenizer(args.init) if args.init else None
    config, name = start.config if start else VQConfig(**VQ_SIZES[args.size]), args.init or args.size
    config = replace(config, codebook_size=args.codebook_size or config.codebook_size,
                     commitment_weight=args.commitment_weight, entropy_weight=args.entropy_weight)
    if config.codebook_size > 65536:
        raise InputError(f"--codebook-size {config.codebook_size}: tokens are stored in 16 bits, so 65,536 "
                         f"is the most")
    if args.image_size % config.downsample:
        raise InputError(f"--image-size {args.image_size}: {name} makes one token of "
                         f"{config.downsample} x {config.downsample} pixels, so the size has to be a "
                         f"multiple of {config.downsample}")
    if state and state["config"] != asdict(config):
        raise InputError(f"{args.out} was trained with other settings: resume with that run's flags")

    train, test = (load_data(args.data, split, args.image_size, args.limit, args.data_dir,
                             captioned=args.captioned) for split in ("train", "test"))
    args.batch_size = min(args.batch_size, len(train))
    vq, average = VQModel(config).to(device), VQModel(config).to(device)
    if start:
        fill_weights(vq, start.state_dict(), args.init)
    average.load_state_dict(vq.state_dict())
    average.eval().requires_grad_(False)
    optimizer = torch.optim.Adam(vq.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True)
    lpips = load_lpips(args)
    lpips = lpips.to(device) if lpips else None
    disc = PatchDiscriminator(args.image_size).to(device)
    disc_optimizer = torch.optim.Adam(disc.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True)
    step, seconds = 0, 0.0
    if state:
        step, seconds = state["step"], state["seconds"]
        average.load_state_dict(state["model"])
        vq.load_state_dict(state["raw"])
        optimizer.load_state_dict(state["optimizer"])
        disc.load_state_dict(state["disc"])
        disc_optimizer.load_state_dict(state["disc_optimizer"])
    N = (args.image_size // config.downsample) ** 2
    print(f"{name}: {sum(p.numel() for p in vq.parameters()):,} parameters on {device}; "
          f"{len(train):,} pictures of {args.image_size}x{args.image_size} pixels -> {N} tokens out of "
          f"{config.codebook_size:,}")

    def save(fresh=False):
        best = average if args.ema else vq
        save_checkpoint(args.out, fresh, model=best.state_dict(), raw=vq.state_dict(), config=asdict(config),
                        optimizer=optimizer.state_dict(), disc=disc.state_dict(),
                        disc_optimizer=disc_optimizer.state_dict(), step=step, seconds=clock.seconds(),
                        since_restart=since_restart, random=random_state(device),
                        image_size=args.image_size, args=vars(args))

    forward = torch.compile(vq) if args.compile else vq
    preview, log = Path(args.out).with_suffix(".png"), Log(args)
    used, since_restart = torch.zeros(2, config.codebook_size, device=device)  # how often each entry was used
    recent, logged_at, fresh = {}, step, state is None
    clock = Clock(args, seconds)
    if state:
        since_restart += state["since_restart"].to(device)
        restore_random_state(state["random"], device)
    bar = tqdm(total=args.steps, initial=step, unit=" steps")
    batches = train.batches(args.batch_size, args.seed, start=step, device=device)
    while clock.running(step):
        progress = clock.progress(step)
        images = next(batches)                                   # (B, 3, H, W)
        adversarial = step >= args.disc_start and args.disc_weight > 0
        for group in optimizer.param_groups + disc_optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step, progress, args.warmup, args.lr_final)

        # 1. The tokenizer
        with mixed_precision(device):
            recon, tokens, losses = forward(images)
            losses["l2"] = F.mse_loss(recon.float(), images)
            if lpips:
                losses["lpips"] = args.lpips_weight * lpips(recon, images).mean()
            if adversarial:
                losses["gan"] = generator_loss(disc(recon).float(), args.disc_loss)
        if adversarial:
            weight = args.disc_weight
            if args.disc_adaptive:
                weight = weight * adaptive_weight(losses["l2"] + losses.get("lpips", 0), losses["gan"],
                                                  vq.decoder.conv_out.weight)
            losses["gan"] = weight * losses["gan"]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(vq.parameters(), args.clip)
        optimizer.step()
        if args.ema:
            update_ema(average, vq, args.ema, step)

        # 2. The discriminator, on the same pictures
        if adversarial:
            with mixed_precision(device):
                real, fake = disc(images), disc(recon.detach())
            losses["disc"] = discriminator_loss(real.float(), fake.float(), args.disc_loss)
            disc_optimizer.zero_grad()
            losses["disc"].backward()
            nn.utils.clip_grad_norm_(disc.parameters(), args.clip)
            disc_optimizer.step()

        # 3. Codebook upkeep and statistics. Sums stay on the device until they are logged, so nothing waits
        # for the GPU. (torch.bincount would, to learn how long its answer has to be.)
        flat = tokens.flatten()
        for counts in (used, since_restart):
            counts.index_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))
        step += 1
        for key, value in losses.items():
            recent[key] = recent.get(key, 0) + value.detach()
        if args.restart_every and step % args.restart_every == 0 and progress < 0.8:
            restart_dead_codes(vq, since_restart, images)
            since_restart.zero_()
        if step % args.log_every == 0:
            means = {key: (value / (step - logged_at)).item() for key, value in recent.items()}
            psnr = 10 * math.log10(4 / means["l2"])              # the range [-1, 1] is 2 wide: peak^2 = 4
            usage = (used > 0).float().mean().item()
            rate = args.batch_size * (step - logged_at) / (clock.seconds() - seconds)
            log.write(step=step, seconds=clock.seconds(), psnr=psnr, usage=usage, **means,
                      lr=optimizer.param_groups[0]["lr"], images_per_second=rate)
            bar.set_postfix_str(f"PSNR {psnr:.1f} dB, codes {usage:.0%}, {rate:.0f} images/s, " + ", ".join(
                f"{key} {value:.3f}" for key, value in means.items() if value), refresh=False)
            used.zero_()
            recent, logged_at, seconds = {}, step, clock.seconds()
        bar.update()
        if step % args.eval_every == 0:
            save_preview(average if args.ema else vq, test, device, preview)
            save(fresh)
            fresh = False
    bar.close()
    minutes = clock.seconds() / 60
    save(fresh)
    clock.stop("train_vq.py")

    best = (average if args.ema else vq).eval()
    save_preview(best, test, device, preview)
    psnr, usage, perplexity = evaluate(best, test, device, args.batch_size)
    log.write(step=step, test_psnr=psnr, test_usage=usage, test_perplexity=perplexity)
    print(f"{step} steps in {minutes:.1f} minutes; over {len(test):,} test pictures: PSNR {psnr:.2f} dB, "
          f"{usage:.1%} of {config.codebook_size:,} codebook entries used, perplexity {perplexity:.0f}")
    print(f"wrote {args.out} and {preview}")


if __name__ == "__main__":
    run(main, get_args)
