"""The image tokenizer (VQ-VAE / VQGAN): a picture becomes a grid of integers and comes back as a picture.

    image --encoder--> z --nearest codebook entry--> tokens --look-up--> zq --decoder--> image

Shapes: B images, H x W pixels, h x w latent grid, N = h * w tokens, V codebook entries, C code channels,
        Z latent channels, D feature channels.
Paper:  LlamaGen (arXiv 2406.06525) section 2.1; VQ-VAE eq. 3 (van den Oord 2017); VQGAN (Esser 2021);
        l2-normalised, low-dimensional codes: ViT-VQGAN (Yu 2022).
Run:    python tokenizer.py          # the shapes of one pass through VQ-tiny
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from runs import InputError, build, check_tensor, explained, read_checkpoint, read_config


@dataclass
class VQConfig:
    """The defaults are VQ-16, the paper's tokenizer: 16 x 16 pixels become one token."""
    codebook_size: int = 16384
    codebook_embed_dim: int = 8          # low on purpose: fewer dimensions, more of the codebook in use
    ch: int = 128                        # channels at full resolution; a multiple of norm_groups
    ch_mult: tuple = (1, 1, 2, 2, 4)     # channels of each level in units of ch; H and W halve in between
    z_channels: int = 256
    num_res_blocks: int = 2              # per level in the encoder; the decoder has one more
    norm_groups: int = 32                # of GroupNorm; see `group_norm`
    commitment_weight: float = 0.25      # beta in VQ-VAE eq. 3
    entropy_weight: float = 0.0

    @property
    def downsample(self):
        """Pixels per token along one side: 16 for VQ-16."""
        return 2 ** (len(self.ch_mult) - 1)


VQ_SIZES = {                                                     # VQModel(VQConfig(**VQ_SIZES["VQ-16"]))
    "VQ-tiny": dict(codebook_size=512, ch=32, ch_mult=(1, 1, 2), z_channels=64, num_res_blocks=1,
                    norm_groups=8),
    "VQ-8":  dict(ch_mult=(1, 2, 2, 4)),                         # 70M
    "VQ-16": dict(ch_mult=(1, 1, 2, 2, 4)),                      # 72M
}


# ------------------------------------------------------------------------------------------------------------
# Building blocks of the encoder and the decoder. Attribute names are those of the released weights.

def group_norm(config, channels):
    """The released tokenizers have 32 groups of at least 4 channels. VQ-tiny keeps the 4 and has fewer
    groups: with one channel per group a norm would erase the mean colour of a picture."""
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + f(x), f = (norm, swish, 3x3 conv) twice; a 1x1 conv on the skip path where the channels change."""

    def __init__(self, config, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(config, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)        # f starts as a constant: x, with its colours, gets through

    def forward(self, x):                                        # x    (B, D, h, w)
        y = self.conv1(F.silu(self.norm1(x)))                    # swish(x) = x sigmoid(x) = silu(x)
        y = self.conv2(F.silu(self.norm2(y)))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + y


class AttnBlock(nn.Module):
    """x + single-head attention in which every position of the grid sees every other one."""

    def __init__(self, config, channels):
        super().__init__()
        self.norm = group_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x):                                        # x    (B, D, h, w)
        y = self.norm(x)
        # (B, D, h, w) -> (B, 1, N, D): without an axis of heads PyTorch's fused attention is not used.
        flat = lambda t: t.flatten(2).transpose(1, 2)[:, None]
        y = F.scaled_dot_product_attention(flat(self.q(y)), flat(self.k(y)), flat(self.v(y)))
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the grid. Zeros are added to the right and the bottom only, as in the released weights."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid: repeat each pixel, then smooth with a learned 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """All blocks at one resolution: residual ones, each followed by attention if asked for, then a resize."""

    def __init__(self, config, c_in, c_out, attention, resize, n_blocks):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(config, c_in if i == 0 else c_out, c_out) for i in range(n_blocks))
        self.attn = nn.ModuleList(AttnBlock(config, c_out) for _ in range(n_blocks if attention else 0))
        if resize is Downsample:
            self.downsample = Downsample(c_out)
        elif resize is Upsample:
            self.upsample = Upsample(c_out)

    def forward(self, x):
        for i, res in enumerate(self.res):
            x = res(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        for resize in ("downsample", "upsample"):                # a level has one of them or none
            x = getattr(self, resize)(x) if hasattr(self, resize) else x
        return x


def middle(config, channels):
    """The bottleneck, the same in the encoder and the decoder."""
    return nn.ModuleList([ResBlock(config, channels, channels), AttnBlock(config, channels),
                          ResBlock(config, channels, channels)])


class Encoder(nn.Module):
    """Pixels to latents, from the highest resolution to the lowest."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(config, widths[i - 1] if i else config.ch, width, attention=(i == last),
                  resize=None if i == last else Downsample, n_blocks=config.num_res_blocks)
            for i, width in enumerate(widths))
        self.mid = middle(config, widths[-1])
        self.norm_out = group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x):                                        # x    (B, 3, H, W)
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)                                         # half of h and w each time, but for the last
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))           #      (B, Z, h, w)


class Decoder(nn.Module):
    """Latents to pixels: the encoder's mirror image, stored from the lowest resolution to the highest."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(config, widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(config, widths[i - 1] if i else width, width, attention=(i == 0),
                  resize=None if i == last else Upsample, n_blocks=config.num_res_blocks + 1)
            for i, width in enumerate(widths))
        self.norm_out = group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):                                        # z    (B, Z, h, w)
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)                                         # twice h and w each time, but for the last
        return self.conv_out(F.silu(self.norm_out(x)))           #      (B, 3, H, W)


# ------------------------------------------------------------------------------------------------------------
# The quantizer

class VectorQuantizer(nn.Module):
    """Nearest-neighbour lookup in a table of V unit vectors."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        # Rows are stored as they come and normalised on use. All directions are equally likely at the start,
        # so that no entry begins closer to the data than the others.
        nn.init.normal_(self.embedding.weight)

    def codes(self):
        """The codebook as it is used: V unit vectors, (V, C)."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, z, codes):                                 # z    (B, N, C) unit vectors
        # On the unit sphere |z - e|^2 = 2 - 2 z.e, so argmin of the distance = argmax of a matmul; in blocks,
        # or the products of all B N vectors with all V codes would be the largest tensor of all.
        blocks = z.flatten(0, 1).split(max(1, 2 ** 24 // len(codes)))
        return torch.cat([(block @ codes.T).argmax(dim=-1) for block in blocks]).view(z.shape[:2])   # (B, N)

    def forward(self, z):                                        # z    (B, C, h, w)
        # Unit vectors of neighbouring entries differ by less than bf16 resolves: no autocast in here.
        with torch.autocast(z.device.type, enabled=False):
            codes = self.codes()                                 #      (V, C)
            flat = F.normalize(z.float().flatten(2).transpose(1, 2), dim=-1)     # (B, N, C)
            tokens = self.nearest(flat.detach(), codes.detach())     #  (B, N)
            zq = codes[tokens]                                   #      (B, N, C)

            # VQ-VAE eq. 3: the codebook moves to the encoder's output, the encoder commits to the codebook.
            losses = {
                "codebook": (zq - flat.detach()).square().mean(),
                "commitment": self.config.commitment_weight * (zq.detach() - flat).square().mean(),
                "entropy": self.entropy_loss(flat, codes),
            }
        # Straight-through: forward gives zq, backward treats the lookup as the identity, d zq / d flat = 1.
        zq = flat + (zq - flat).detach()
        return zq.transpose(1, 2).reshape(z.shape), tokens, losses

    def entropy_loss(self, z, codes, temperature=0.01):
        """E[H(p(code | z))] - H(E[p(code | z)]): each vector sure of its code, all codes equally popular.

        p = softmax of the negative squared distances over the temperature (MaskGIT's tokenizer loss; Chang
        2022).
        """
        if self.config.entropy_weight == 0:
            return z.new_zeros(())
        log_p = F.log_softmax(2 * (z @ codes.T).flatten(0, 1) / temperature, dim=-1)         # (B N, V)
        p = log_p.exp()
        sample_entropy = -(p * log_p).sum(dim=-1).mean()
        mean_p = p.mean(dim=0)                                                               # (V,)
        codebook_entropy = -(mean_p * (mean_p + 1e-8).log()).sum()
        return self.config.entropy_weight * (sample_entropy - codebook_entropy)


# ------------------------------------------------------------------------------------------------------------

class VQModel(nn.Module):
    """The whole tokenizer. Images are float in [-1, 1]; what the decoder returns is not clamped."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def encode(self, images):
        """images (B, 3, H, W), in any precision -> latents before quantization (B, C, h, w)."""
        check_tensor("images", images, ("B", 3, "H", "W"))
        f, (H, W) = self.config.downsample, images.shape[2:]
        if not images.is_floating_point() or H % f or W % f or not H * W:
            raise InputError(f"images are {images.dtype}, {W}x{H} pixels: they have to be float in [-1, 1] "
                             f"(see to_float), of a width and a height divisible by {f}, a token's side")
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight)))

    def decode(self, zq):                                        # zq   (B, C, h, w)
        return self.decoder(self.post_quant_conv(zq.to(self.post_quant_conv.weight)))

    def tokenize(self, images):
        """images (B, 3, H, W) float in [-1, 1] -> tokens (B, N) int64, row by row from the top left."""
        z = self.encode(images).float().flatten(2).transpose(1, 2)
        return self.quantize.nearest(F.normalize(z, dim=-1), self.quantize.codes())

    def detokenize(self, tokens, grid=None, wait=True):
        """tokens (B, N) -> images (B, 3, H, W); grid = (h, w), a square when left out; wait: see
        check_tensor."""
        check_tensor("tokens", tokens, ("B", "N"), ids=self.config.codebook_size, wait=wait)
        h, w = grid or (math.isqrt(tokens.shape[1]),) * 2
        if h * w != tokens.shape[1] or not h * w:
            raise InputError(f"{tokens.shape[1]} tokens do not fill a {h}x{w} grid: pass grid=(h, w)")
        zq = self.quantize.codes()[tokens]                       # zq   (B, N, C)
        return self.decode(zq.transpose(1, 2).unflatten(2, (h, w)))

    def forward(self, images):
        """images (B, 3, H, W) -> reconstructions (B, 3, H, W), tokens (B, N), losses (a dict of scalars)."""
        zq, tokens, losses = self.quantize(self.encode(images))
        return self.decode(zq), tokens, losses


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

def infer_vq_config(weights, path):
    """The configuration of a released tokenizer, read off the shapes of its tensors."""
    with explained(f"{path} is not a tokenizer checkpoint: a tensor is missing or misshapen"):
        ch = weights["encoder.conv_in.weight"].shape[0]
        count = lambda name: sum(f"{name % i}" in weights for i in range(100))
        n_levels = count("encoder.conv_blocks.%d.res.0.conv1.weight")
        width = lambda i: weights[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0]
        V, C = weights["quantize.embedding.weight"].shape
        shape = dict(ch=ch, ch_mult=tuple(width(i) // ch for i in range(n_levels)),
                     z_channels=weights["quant_conv.weight"].shape[1],
                     num_res_blocks=count("encoder.conv_blocks.0.res.%d.conv1.weight"))
    # The number of groups leaves no trace in the shapes: it is that of the fitting row of VQ_SIZES, else 32.
    rows = (VQConfig(**size) for size in VQ_SIZES.values())
    groups = [row.norm_groups for row in rows if all(getattr(row, k) == v for k, v in shape.items())]
    return VQConfig(codebook_size=V, codebook_embed_dim=C, norm_groups=(groups or [32])[0], **shape)


def load_tokenizer(path, device="cpu"):
    """A VQModel in eval mode from this project's checkpoint or from a released file (vq_ds16_c2i.pt, ...)."""
    checkpoint = read_checkpoint(path, mmap=True)
    weights = checkpoint["model"]
    if "quantize.embedding.weight" not in weights:
        raise InputError(f"{path} is not a tokenizer checkpoint: it has no quantize.embedding.weight")
    config = (read_config(VQConfig, checkpoint["config"], path) if "config" in checkpoint else
              infer_vq_config(weights, path))
    vq = build(VQModel, config, weights, path, device, torch.float32)
    return vq.to(memory_format=torch.channels_last)              # faster convolutions, on CPUs too


# ------------------------------------------------------------------------------------------------------------
# From pixels to pixels: many pictures at a time, and how well they come back

def to_float(images):
    """uint8 0 .. 255 -> float32 -1 .. 1."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 .. 1 (B, 3, H, W) -> uint8 (B, H, W, 3): 127.5 x + 128, clamped and truncated, as the released
    samplers do."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def pass_size(H, W):
    """How many pictures go through a network at once: about a million pixels. In VQ-16, 128 channels wide at
    full resolution, an activation then takes half a GB, whatever the pictures' size. (More than 32 at once
    are no faster, not even small ones on a CPU.)"""
    return max(1, min(32, 2 ** 20 // (H * W)))


def tokenize_in_passes(vq, images, device):
    """Tokens (M, N) of images uint8 (M, 3, H, W), pass by pass, the last one filled up with black.

    Sums round differently in batches of another size, and one time in a million that tips a token over to its
    neighbour. Passes of one size make the tokens independent of how the pictures were grouped.
    """
    tokens, size = [], pass_size(*images.shape[-2:])
    for block in images.split(size):
        filled = F.pad(block, (0, 0, 0, 0, 0, 0, 0, size - len(block)))
        tokens.append(vq.tokenize(to_float(filled.to(device)))[:len(block)])
    return torch.cat(tokens)


@torch.inference_mode()
def to_pictures(vq, tokens, side=None):
    """Tokens (M, N) -> uint8 (M, H, W, 3), pass by pass. side: resized to it before they are rounded to whole
    numbers, bicubic without antialiasing, as the paper's samples at 384 pixels were brought to 256."""
    pictures, H = [], math.isqrt(tokens.shape[1]) * vq.config.downsample
    for block in tokens.split(pass_size(H, H)):
        images = vq.detokenize(block, wait=False).float()        # (B, 3, H, W), about -1 .. 1
        if side:
            images = F.interpolate(images, size=(side, side), mode="bicubic")
        pictures.append(to_uint8(images))
    return torch.cat(pictures)


def peak_signal_to_noise(a, b):
    """PSNR = 10 log10(255^2 / mean (a - b)^2) in dB, (B,), of images uint8 (B, 3, H, W)."""
    mse = (a.float() - b.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-4)
    return 10 * (255 ** 2 / mse).log10()


def codebook_statistics(counts):
    """From how often each entry was used, (V,): the share of entries used at all, and the perplexity exp(H),
    H = -sum p ln p: so many equally popular entries would be as varied."""
    counts = counts.cpu()                                        # not every device has float64
    p = counts[counts > 0].double() / counts.sum()
    return (counts > 0).double().mean().item(), (-(p * p.log()).sum()).exp().item()


@torch.inference_mode()
def evaluate(vq, data, device, batch_size, also=None):
    """PSNR (dB, mean over the pictures of a data set), share of the codebook in use and its perplexity.

    also: a function that is called with each batch of pictures and their reconstructions, uint8 (B, 3, H, W),
    to measure more on the way.
    """
    counts = torch.zeros(vq.config.codebook_size, device=device)
    psnr = []
    with tqdm(total=len(data), desc="reconstructing", unit=" images") as bar:
        for images, _ in data.passes(batch_size):
            images = images[:, 0].to(device)                     # the first crop is the centre
            tokens = tokenize_in_passes(vq, images, device)      # (B, N)
            recon = to_pictures(vq, tokens).permute(0, 3, 1, 2)
            psnr.append(peak_signal_to_noise(images, recon))
            counts += torch.bincount(tokens.flatten(), minlength=len(counts))
            if also:
                also(images, recon)
            bar.update(len(images))
    return torch.cat(psnr).mean().item(), *codebook_statistics(counts)


if __name__ == "__main__":
    vq = VQModel(VQConfig(**VQ_SIZES["VQ-tiny"]))
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    reconstructions, tokens, losses = vq(images)
    print(f"VQ-tiny           {sum(p.numel() for p in vq.parameters()):,} parameters")
    print(f"images            {tuple(images.shape)}, latents {tuple(vq.encode(images).shape)}")
    print(f"tokens            {tuple(tokens.shape)}, the first eight: {tokens[0, :8].tolist()}")
    print(f"reconstructions   {tuple(reconstructions.shape)}")
    print("losses            " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
