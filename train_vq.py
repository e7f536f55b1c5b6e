"""Train the image tokenizer: L2 + LPIPS + PatchGAN on the picture, codebook and commitment loss on the codes.

Shapes: B images, H x W pixels, h x w a smaller grid (of latents, VGG's features or patches), N tokens of an
        image, D feature channels, C code channels, V codebook entries.
Paper:  LlamaGen (arXiv 2406.06525) section 2.1; LPIPS (Zhang 2018); PatchGAN (Isola 2017);
        VQGAN (Esser 2021).
Run:    python train_vq.py                                         # shapes, 5 minutes on a laptop
        python train_vq.py --data fashion_mnist --minutes 10
"""
import copy
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import find_file, image_grid, load_data, save_picture, spread
from runs import (InputError, check_compile, counting, fast_dtype, fill_weights, finite, flag_parser, joined,
                  learning_rate, mixed_precision, natural, not_negative, of_first, pick_device, positive,
                  rank_and_world, read_checkpoint, run, summed, update_ema)
from tokenizer import (VQ_SIZES, AttnBlock, ResBlock, VQConfig, VQModel, evaluate, load_tokenizer,
                       to_pictures, tokenize_in_passes)
from training import (Progress, add_training_flags, aside, batch_of, check_same_data, clip_gradients, prepare,
                      put, put_weights, restore, resume_state, training_state, whole, whole_weights)


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
                # Where all channels are 0, a root of the sum of squares would have the gradient 0 / 0.
                first, second = F.normalize(x.float(), eps=1e-10).chunk(2)       # (B, D, h, w)
                distance = F.conv2d((first - second).square(), getattr(self, f"lin{self.TAPS.index(i)}"))
                total = total + distance.mean(dim=(2, 3), keepdim=True)
        return total                                             # (B, 1, 1, 1)


def load_lpips(args, device):
    """LPIPS from --vgg and --lpips, the cache or the network; None if its weight is 0. InputError if it is
    asked for and its files cannot be had: days of training without it would be wasted."""
    if args.lpips_weight == 0:
        return None
    vgg = args.vgg or find_file("lpips", "vgg16-397923af.pth", args.data_dir)
    return LPIPS(vgg, args.lpips or find_file("lpips", "vgg.pth", args.data_dir)).to(device)


# ------------------------------------------------------------------------------------------------------------
# The adversary

class PatchDiscriminator(nn.Module):
    """Judges overlapping patches, not the whole picture: (B, 3, H, W) -> one logit per patch (B, 1, h, w).

    What L2 blurs is texture, which shows in a patch; whether the whole is right, L2 sees itself.
    """

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
        # As in DCGAN (Radford 2016): small weights, gains near 1.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, images):
        return self.main(images)


def discriminator_loss(real, fake, kind="hinge"):
    """What the discriminator minimises, from its logits on real and on reconstructed patches."""
    # 1/2 (max(0, 1 - D(x)) + max(0, 1 + D(y))): indifferent once the margin is kept
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    # 1/2 (-log sigmoid(D(x)) - log(1 - sigmoid(D(y)))), with softplus(t) = log(1 + e^t) for numerical safety.
    # The vanilla and the non-saturating game share this half and differ in what the generator minimises.
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake, kind="hinge"):
    """What the decoder minimises, from the discriminator's logits on its pictures."""
    # -log sigmoid(D(y)): strong gradients exactly where the decoder is losing
    if kind == "non-saturating":
        return F.softplus(-fake).mean()
    # -D(y), as in VQGAN, for hinge and vanilla
    return -fake.mean()


def adaptive_weight(reconstruction_loss, adversarial_loss, last_layer):
    """Scale the adversary so that its gradient at the last layer is as long as the reconstruction's (VQGAN
    eq. 7):  lambda = |d L_rec| / (|d L_gan| + 1e-4), both with respect to last_layer, at most 1e4."""
    # summed: under torchrun each process has the gradient of its own pictures.
    length = lambda loss: (summed(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]) /
                           rank_and_world()[1]).norm()
    return (length(reconstruction_loss) / (length(adversarial_loss) + 1e-4)).clamp(0, 1e4).detach()


# ------------------------------------------------------------------------------------------------------------
# Looking at the tokenizer, and after its codebook

@torch.inference_mode()
def save_preview(vq, data, device, path, count=16):
    """A PNG with `count` originals, evenly spread over the data set, above their reconstructions."""
    images, _ = next(iter(data.take([spread(range(len(data)), count)])))
    images = images[:, 0]                                        # (B, 3, H, W) uint8; crop 0 is the centre
    back = to_pictures(vq, tokenize_in_passes(vq, images, device)).cpu()
    both = torch.cat([images.permute(0, 2, 3, 1), back]).numpy()
    save_picture(image_grid(both, columns=len(images), row_names=("original", "reconstructed")), path)


@torch.no_grad()
def restart_dead_codes(vq, counts, images):
    """Move codebook entries that no picture used (counts == 0) onto badly served latents of this batch.

    Without it a short run keeps only the few entries that happened to lie near the first latents (Jukebox
    restarts them at random latents; Dhariwal 2020). The chance of a latent grows with its squared distance to
    the nearest entry, as in k-means++, or most restarts would land on plain background and split it into
    codes that mean the same.
    """
    with aside(vq, images.device):
        z = F.normalize(vq.encode(images).float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)  # (B N, C)
    z, weight = joined(z), vq.quantize.embedding.weight
    codes = whole(vq.quantize.codes())                                                       # (V, C)
    distance = 2 - 2 * (z @ codes.T).amax(dim=1)                                     # |z - e|^2 on the sphere
    # Of NaN nothing can be drawn. A run with NaN latents is past saving, which its next loss will show.
    chance = distance.nan_to_num(0).clamp(min=1e-6)                                          # (B N,)
    chosen = of_first(torch.multinomial(chance, len(counts), replacement=True))              # (V,)
    put(torch.where((counts == 0)[:, None], z[chosen].to(weight.dtype), whole(weight)), weight)


# ------------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    parser = flag_parser(__file__, __doc__)
    add_training_flags(parser, out="out/vq.pt", minutes=4.2)
    add = parser.add_argument_group("model").add_argument
    add("--size", default="VQ-tiny", choices=VQ_SIZES, help="a row of VQ_SIZES in tokenizer.py")
    add("--image-size", type=counting, default=32, help="side of the pictures in pixels")
    add("--codebook-size", type=counting, help="V, instead of the size's own")
    add("--init", help="start from the weights of this tokenizer: fine-tune a released one")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=counting, default=32, help="pictures per step; 128 in the paper")
    add("--lr", type=positive, default=2e-3, help="peak learning rate; 1e-4 in the paper")
    add("--warmup", type=natural, default=50, help="steps of linear warm-up; 0 in the paper")
    add("--restart-every", type=natural, default=50,
        help="steps between restarts of unused codes, to 80%%; 0: never")
    add = parser.add_argument_group("losses").add_argument
    add("--commitment-weight", type=not_negative, default=0.25, help="beta of the commitment loss")
    add("--entropy-weight", type=finite, default=0.0, help="of the entropy loss on the codes")
    add("--lpips-weight", type=not_negative, default=0.0,
        help="perceptual; 1 in the paper; 528 MB and much time")
    add("--vgg", help="vgg16-397923af.pth, if it is not in the cache")
    add("--lpips", help="LPIPS v0.1's vgg.pth, if it is not in the cache")
    add("--disc-weight", type=not_negative, default=0.5, help="of the adversarial loss")
    add("--disc-start", type=natural, default=20000, help="step at which the discriminator joins")
    add("--disc-loss", default="hinge", choices=("hinge", "vanilla", "non-saturating"), help="its game")
    add("--disc-adaptive", action="store_true", help="scale --disc-weight by the ratio of gradients")
    args = parser.parse_args(argv)
    if args.compile and args.disc_adaptive:
        parser.error("--disc-adaptive takes a second gradient, which --compile does not allow: drop one")
    if args.shard and args.disc_adaptive:
        parser.error("--disc-adaptive looks at a whole weight, of which --shard leaves a part: drop one")
    return args


def prepare_model(args, state, device):
    """A new VQModel of --size, or one with the weights of --init; the name of what it is."""
    base = load_tokenizer(args.init) if args.init else None
    config, name = base.config if base else VQConfig(**VQ_SIZES[args.size]), args.init or args.size
    config = replace(config, codebook_size=args.codebook_size or config.codebook_size,
                     commitment_weight=args.commitment_weight, entropy_weight=args.entropy_weight)
    if config.codebook_size > 65536:
        raise InputError(f"--codebook-size {config.codebook_size}: tokens are stored in 16 bits, so 65,536 "
                         f"is the most")
    if args.image_size % config.downsample:
        f = config.downsample
        raise InputError(f"--image-size {args.image_size}: {name} makes one token of {f} x {f} pixels, so "
                         f"the size has to be a multiple of {f}")
    if state and state["config"] != asdict(config):
        raise InputError(f"{args.out} was trained with other settings: resume with that run's flags")
    vq = VQModel(config)
    if base:
        fill_weights(vq, base.state_dict(), args.init)
    return vq.to(device), name


def report(progress, usage, batch_size, lr):
    """Write the log line of the last steps, and the same in short beside the bar."""
    means = progress.means()
    speed = batch_size * means.pop("steps_per_second")
    psnr = 10 * math.log10(4 / max(means["l2"], 1e-12))          # the range [-1, 1] is 2 wide: peak^2 = 4
    progress.log(psnr=psnr, usage=usage, **means, lr=lr, images_per_second=speed)
    losses = ", ".join(f"{key} {value:.3f}" for key, value in means.items() if value)
    progress.bar.set_postfix_str(f"PSNR {psnr:.1f} dB, codes {usage:.0%}, {speed:.0f} images/s, {losses}",
                                 refresh=False)


def adam(net, lr):
    """The paper's optimizer. beta2 is 0.95 instead of Adam's 0.999, as for language models: the scale of the
    gradient is then a mean over some 20 steps, which follows a loss that changes quickly."""
    return torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)


def main(args):
    # 1. What to learn from, and the networks: the tokenizer and its judges
    state = resume_state(args, "since_restart")
    device = pick_device(args.device)
    check_compile(args, device)
    torch.manual_seed(args.seed)
    vq, name = prepare_model(args, state, device)
    config = vq.config
    lpips = load_lpips(args, device)
    train, test = (load_data(args.data, split, args.image_size, args.limit, args.data_dir, args.flip,
                             captioned=args.cond == "text") for split in ("train", "test"))
    identity, batch_size = check_same_data(args, state, train.identity()), batch_of(args, len(train))
    disc = PatchDiscriminator(args.image_size).to(device)
    best = copy.deepcopy(vq).requires_grad_(False) if args.ema else vq           # what is saved and looked at
    nets = nn.ModuleDict({"vq": vq, "disc": disc})
    blocks = lambda net: [part for part in net.modules() if isinstance(part, (ResBlock, AttnBlock))]
    forward, judge = prepare(nets, {"vq": best}, blocks, args, device).values()
    optimizers = optimizer, disc_optimizer = adam(vq, args.lr), adam(disc, args.lr)
    # How often each entry was used, since the last line of the log and since the last restart
    used, since_restart = torch.zeros(2, config.codebook_size, device=device)
    preview, first = Path(args.out).with_suffix(".png"), rank_and_world()[0] == 0
    # 2. Go on where the checkpoint was. It is several times as large as the model: restore leaves nothing
    if state:
        put_weights(state.pop("model"), best, args)
        restore(nets, optimizers, state, args)
        if first:
            since_restart += state.pop("since_restart").to(device)
    print(f"{name}: {sum(p.numel() for p in vq.parameters()):,} parameters on {device}, products in "
          f"{fast_dtype(device)}; {len(train):,} pictures of {args.image_size}x{args.image_size} pixels -> "
          f"{(args.image_size // config.downsample) ** 2} tokens out of {config.codebook_size:,}")

    def save():
        progress.save(**training_state(nets, optimizers), model=whole_weights(best, args),
                      config=asdict(config), since_restart=summed(since_restart), image_size=args.image_size,
                      data=identity)
        if first:
            save_preview(load_tokenizer(args.out, device), test, device, preview)

    # 3. The loop
    with Progress(args, device, state) as progress:
        del state
        batches = train.batches(batch_size, args.seed, start=progress.step, device=device)
        while progress.running():
            done = progress.fraction()
            images = progress.next_of(batches)                   # (B, 3, H, W) in [-1, 1]
            adversarial = progress.step >= args.disc_start and args.disc_weight > 0
            lr = learning_rate(args.lr, progress.step, done, args.warmup, args.lr_final)
            for group in optimizer.param_groups + disc_optimizer.param_groups:
                group["lr"] = lr

            # The tokenizer: L2 and LPIPS of the picture, VQ-VAE's two losses of the codes, the adversary
            with mixed_precision(device):
                recon, tokens, losses = forward(images)          # (B, 3, H, W), (B, N), a dict
                losses["l2"] = F.mse_loss(recon.float(), images)
                if lpips:
                    losses["lpips"] = args.lpips_weight * lpips(recon, images).mean()
                if adversarial:                          # disc, not judge: it learns nothing from this
                    losses["gan"] = generator_loss(disc(recon).float(), args.disc_loss)
            if adversarial:
                weight = args.disc_weight
                if args.disc_adaptive:
                    weight = weight * adaptive_weight(losses["l2"] + losses.get("lpips", 0), losses["gan"],
                                                      vq.decoder.conv_out.weight)
                losses["gan"] = weight * losses["gan"]
            # One backward pass through the decoder serves all losses. Clipping keeps one odd batch from
            # throwing away what thousands have taught.
            optimizer.zero_grad()
            sum(losses.values()).backward()
            losses["grad_norm"] = clip_gradients(vq, args.clip)
            optimizer.step()
            if args.ema:
                update_ema(best, vq, args.ema, progress.step)

            # The discriminator, on the same pictures; detach: its loss must not reach the tokenizer
            if adversarial:
                with mixed_precision(device):
                    real, fake = judge(images), judge(recon.detach())            # (B, 1, h, w) each
                losses["disc"] = discriminator_loss(real.float(), fake.float(), args.disc_loss)
                disc_optimizer.zero_grad()
                losses["disc"].backward()
                clip_gradients(disc, args.clip)
                disc_optimizer.step()

            # Codebook upkeep and statistics, which stay on the device until they are logged.
            # (torch.bincount would make the CPU wait, to learn how long its answer has to be.)
            flat = tokens.flatten()                              # (B N,)
            for counts in (used, since_restart):                 # (V,)
                counts.index_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))
            progress.count(losses)
            # No restarts near the end: the decoder needs time to learn what a moved entry means.
            if args.restart_every and progress.step % args.restart_every == 0 and done < 0.8:
                restart_dead_codes(vq, summed(since_restart), images)
                since_restart.zero_()
            if progress.step % args.log_every == 0:
                report(progress, (summed(used) > 0).float().mean().item(), batch_size, lr)
                used.zero_()
            if progress.save_is_due():
                save()
        minutes = progress.seconds() / 60
        save()

    # 4. How good it is, over all test pictures
    if not first:
        return
    psnr, usage, perplexity = evaluate(load_tokenizer(args.out, device), test, device, batch_size)
    progress.log(test_psnr=psnr, test_usage=usage, test_perplexity=perplexity)
    print(f"{progress.step} steps in {minutes:.1f} minutes; over {len(test):,} test pictures: PSNR "
          f"{psnr:.2f} dB, {usage:.1%} of {config.codebook_size:,} codebook entries used, perplexity "
          f"{perplexity:.0f}")
    print(f"wrote {args.out} and {preview}")


if __name__ == "__main__":
    run(main, get_args)
