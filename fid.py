"""The numbers of the paper: FID, sFID, Inception Score, precision, recall; rFID, PSNR, SSIM of a tokenizer.

    python fid.py REF SAMPLES              each a folder, an .npz with arr_0, or an .npz with mu and sigma
    python fid.py shapes out/samples.npz   without Inception weights: a small CNN trained on real pictures,
                                           and the rules by which shapes are drawn
    python fid.py --recon out/vq.pt --data shapes
    python fid.py --sweep 1 1.5 2 3 5      draw and measure at several guidance scales
    python fid.py --alignment 500          draw captions of shapes and read the pictures back

Shapes: B images, H x W pixels, M samples of a set, L real pictures, D features, K classes.
Paper:  FID (Heusel 2017); sFID (Nash 2021); Inception Score (Salimans 2016); precision and recall
        (Kynkaanniemi 2019); SSIM (Wang 2004). All with the definitions of ADM's evaluator (Dhariwal 2021),
        which the LlamaGen paper used.
"""
import hashlib
import json
import math
import os
import sys
import zipfile
from functools import partial
from itertools import chain, filterfalse, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import data as data_module
import sample
from data import (ARRAY_NAMES, ArrayData, batch_indices, check_tokenizer, find_file, in_order, load_data,
                  save_picture)
from files import Listing, read_image, told, warning
from runs import (DEVICE_HELP, InputError, check_output, counting, explained, fill_weights, finite,
                  flag_parser, learning_rate, not_negative, pick_device, rank_and_world, read_checkpoint, run,
                  short_hash, wait_for_all, weights_hash, whole_file)
from shapes import captioned_items, drawn_kinds, in_reading_order, parse_caption, read_pictures
from tokenizer import evaluate, load_tokenizer, pass_size, to_float, to_pictures, tokenize_in_passes


# ------------------------------------------------------------------------------------------------------------
# The Inception network of FID: that of TensorFlow's 2015 graph, with the parameter names of
# pt_inception-2015-12-05-6726825d.pth. It differs from the later, published Inception v3 in its pooling:
# average pools do not count the padding, and the last block has a max pool.

class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


# At the border the mean is that of the pixels that exist: the zeros of the padding do not count.
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)


# A block is a list of branches. A branch is a list of steps: a pool, a row (name, c_out, kernel, stride,
# padding) for a ConvBN, or a list of rows that all read the same input. The ends of all branches are stacked.

def block_a(c_pool):
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            [average, ("branch_pool", c_pool, 1)]]


def block_c(c):
    """7 x 7 kernels as a row and a column each: 14 weights instead of 49."""
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
             ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
            [average, ("branch_pool", 192, 1)]]


def block_e(pool):
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
            [pool, ("branch_pool", 192, 1)]]


STEM = [("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3), halve,
        ("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1, 0), halve]
BLOCKS = {                                                       # name: channels that come in, branches
    "Mixed_5b": (192, block_a(32)),                              # 35 x 35
    "Mixed_5c": (256, block_a(64)),
    "Mixed_5d": (288, block_a(64)),
    "Mixed_6a": (288, [[("branch3x3", 384, 3, 2, 0)],            # from 35 x 35 to 17 x 17
                       [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3),
                        ("branch3x3dbl_3", 96, 3, 2, 0)],
                       [halve]]),
    "Mixed_6b": (768, block_c(128)),
    "Mixed_6c": (768, block_c(160)),
    "Mixed_6d": (768, block_c(160)),
    "Mixed_6e": (768, block_c(192)),
    "Mixed_7a": (768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2, 0)],         # to 8 x 8
                       [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                        ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2, 0)],
                       [halve]]),
    "Mixed_7b": (1280, block_e(average)),
    "Mixed_7c": (2048, block_e(maximum)),                        # only here 2015 took the maximum
}


class InceptionBlock(nn.Module):
    """Branches side by side, their results stacked along the channels."""

    def __init__(self, c_in, branches):
        super().__init__()
        # Each step becomes a pool or a list of rows.
        self.branches = [[[s] if isinstance(s, tuple) else s for s in steps] for steps in branches]
        for steps in self.branches:
            width = c_in
            for rows in filterfalse(callable, steps):
                for name, c_out, *how in rows:
                    self.add_module(name, ConvBN(width, c_out, *how))
                width = c_out

    def forward(self, x):
        results = []
        for steps in self.branches:
            ends = [x]
            for step in steps:
                ends = ([step(ends[0])] if callable(step) else
                        [self.get_submodule(name)(ends[0]) for name, *_ in step])
            results += ends
        return torch.cat(results, dim=1)


def resize_as_tf1(images, size=299):
    """TensorFlow 1's bilinear resize: float (B, 3, H, W) -> (B, 3, size, size).

    Pixel i of the result lies at i * H / size of the source (no half-pixel centres), and nothing is averaged
    when shrinking. F.interpolate cannot do this; with its convention FID changes visibly.
    """
    for _ in ("along x", "along y"):
        length = images.shape[3]
        source = torch.arange(size, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        low = source.floor().long()
        a, b = images.index_select(3, low), images.index_select(3, (low + 1).clamp(max=length - 1))
        images = (a + (b - a) * (source - low)).transpose(2, 3)
    return images


class InceptionV3(InceptionBlock):
    """The stem is a block of one branch; the others follow one after another."""

    def __init__(self):
        super().__init__(3, [STEM])
        for name, (c_in, branches) in BLOCKS.items():
            self.add_module(name, InceptionBlock(c_in, branches))
        self.fc = nn.Linear(2048, 1008)

    @torch.no_grad()
    def features(self, images):
        """What the metrics read, float32, from images uint8 (B, 3, H, W) of any size.

        pool     (B, 2048)  mean over the last grid: FID, precision, recall
        spatial  (B, 2023)  7 channels of a 17 x 17 grid, row by row, channel fastest: sFID
        logits   (B, 1008)  without the bias, as ADM's evaluator has it: Inception Score
        """
        x = (resize_as_tf1(images.float()) - 128) / 128          # (B, 3, 299, 299)
        x = x.to(self.fc.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self(x)                                              # (B, 192, 35, 35)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))        # (B, 768, 17, 17)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1).float()                # (B, 17 * 17 * 7)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))        # (B, 2048, 8, 8)
        pool = x.float().mean(dim=(2, 3))
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.float().T}


def fold_batch_norm(net):
    """Merge each batch norm into the convolution before it: gamma (w x - mean) / sqrt(var + eps) + beta is
    again a convolution with a bias. Returns the same net in eval mode, laid out for fast convolutions."""
    for module in net.eval().modules():
        if isinstance(module, ConvBN):
            module.conv = fuse_conv_bn_eval(module.conv.double(), module.bn.double()).float()
            module.bn = nn.Identity()
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


def load_inception(path, device):
    """The folded network with the weights of `path`, or of the cache, or downloaded."""
    path, net = path or find_file("inception", "pt_inception-2015-12-05-6726825d.pth"), InceptionV3()
    # Some copies of the file lack the norms' counters.
    counters = {name: x for name, x in net.state_dict().items() if name.endswith("num_batches_tracked")}
    return fold_batch_norm(fill_weights(net, counters | read_checkpoint(path)["model"], path)).to(device)


# ------------------------------------------------------------------------------------------------------------
# Metrics. They take NumPy arrays or tensors of any width and compute in float64, but for the distances.

def feature_statistics(features):
    """Mean (D,) and covariance (D, D), divided by M - 1, of features (M, D): float64, block by block."""
    features = torch.as_tensor(features)
    if len(features) < 2:
        raise InputError(f"{len(features)} image: a covariance needs at least two")
    blocks = features.split(4096)
    mean = sum(block.double().sum(dim=0) for block in blocks) / len(features)
    centred = (block.double() - mean for block in blocks)
    covariance = sum(block.T @ block for block in centred) / (len(features) - 1)
    return mean.cpu().numpy(), covariance.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Distance of two Gaussians, Heusel 2017 eq. 6:  |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2).

    With any root R of S1 (R R^T = S1), S1 S2 has the same eigenvalues as R^T S2 R. That matrix is symmetric,
    so they are real and not negative, and the trace is the sum of their roots. The root of a matrix that is
    not symmetric, which is slow and fails where a covariance has not full rank, is never taken.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).cpu().double() for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1),) * 2:
        raise InputError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise InputError("the statistics hold NaN or infinite numbers")
    root, failed = torch.linalg.cholesky_ex(sigma1)              # the fastest root, if S1 has full rank
    if failed:                                                   # else r of D columns are enough
        values, vectors = torch.linalg.eigh(sigma1)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        root = vectors[:, kept] * values[kept].sqrt()
    with explained("the statistics have no distance that fits into a number", kinds=RuntimeError):
        trace = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def inception_score(logits, split_size=5000):
    """exp of the mean of KL(p(y|x) || p(y)) over runs of `split_size` images in their order, and the mean of
    those. A short last run counts like the others, as in ADM's evaluator."""
    scores = []
    for block in torch.as_tensor(logits).split(split_size):
        log_p = block.double().log_softmax(dim=1)                # (m, K)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(block))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(real, fake, k=3, block=1000):
    """Share of `fake` (M, D) near `real` (L, D), and of `real` near `fake`: fidelity and variety.

    Near a set: inside the ball around one of its points that reaches to that point's k-th neighbour in it.
    Distances are made `block` rows at a time, never all at once.
    """
    real, fake = torch.as_tensor(real).float(), torch.as_tensor(fake).float()
    if min(len(real), len(fake)) <= k:
        raise InputError(f"precision and recall need more than {k} images on each side")
    # Distances do not change, but lose fewer digits, when both sets are moved to the origin.
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre

    def radii(points):                                           # the nearest of all is the point itself
        return torch.cat([torch.cdist(rows, points).topk(k + 1, largest=False).values[:, -1]
                          for rows in points.split(block)])

    def share_inside(points, centres, radius):
        inside = [(torch.cdist(rows, centres) <= radius).any(dim=1) for rows in points.split(block)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real, radii(real)), share_inside(real, fake, radii(fake))


def ssim(a, b):
    """Structural similarity, Wang 2004: (B,) for images (B, 3, H, W) in 0 .. 255, from 11 pixels on a side.

    Gaussian window of 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, each colour by itself, only where
    the window fits. (The released evaluation script passes data_range=2, so its values are others.)
    """
    if min(a.shape[-2:]) < 11:
        raise InputError("SSIM needs pictures of at least 11 x 11 pixels")
    line = torch.exp(-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / (2 * 1.5 ** 2))
    line = line / line.sum()
    # The window is the product of a row and a column.
    maps = torch.stack([a, b, a * a, b * b, a * b]).flatten(0, 2)[:, None]                 # (5 B 3, 1, H, W)
    maps = F.conv2d(F.conv2d(maps, line.view(1, 1, 1, 11)), line.view(1, 1, 11, 1))
    mean_a, mean_b, aa, bb, ab = maps.view(5, *a.shape[:2], -1)                            # (B, 3, pixels)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    contrast_and_structure = 2 * (ab - mean_a * mean_b) + c2
    contrast_and_structure /= aa - mean_a ** 2 + bb - mean_b ** 2 + c2
    return (luminance * contrast_and_structure).mean(dim=(1, 2))


# ------------------------------------------------------------------------------------------------------------
# Judges without weights from outside: a small network, trained on the real pictures when first asked for, and
# for shapes the rules by which they are drawn

class Classifier(nn.Module):
    """Four levels of 3x3 convolutions, each halving the picture; the mean over what is left decides.

    Trained on the real training pictures in about a minute. Its last layer but one replaces Inception.
    """

    def __init__(self, num_classes):
        super().__init__()
        levels = [(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
                   nn.MaxPool2d(2)) for c_in, c_out in pairwise((3, 32, 64, 128, 128))]
        self.body = nn.Sequential(*chain(*levels), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, num_classes)

    def forward(self, images):                                   # images (B, 3, H, W) in [-1, 1]
        pool = self.body(images)                                 #        (B, D)
        return pool, self.head(pool)                             # logits (B, K)

    @torch.no_grad()
    def features(self, images):
        """pool (B, D) and logits (B, K), float32, from images uint8 (B, 3, H, W)."""
        pool, logits = self(to_float(images))
        return {"pool": pool, "logits": logits}


def outline(images, labels):
    """Whether each picture uint8 (M, 3, H, W) has the outline of its kind (M,): soft IoU >= 0.8 with the
    ideal one at its best place and size, and with no other kind a higher one. Bool (M,)."""
    return drawn_kinds(images.permute(0, 2, 3, 1).cpu()) == labels


def agreement(images, captions):
    """Shares of pictures uint8 (M, 3, H, W) that agree with their captions, read by the drawing rules.

    Kind, Colour   of all shapes, each counted by itself
    Background     of all pictures
    Size           of pictures of one shape: large or small
    Order          of pictures of two: the first-named is where it should be
    Everything     of all pictures: no word of the caption is wrong
    """
    items = [parse_caption(caption) for caption in captions]
    hits = {name: [] for name in ("Kind", "Colour", "Background", "Size", "Order", "Everything")}
    for two in (False, True):
        chosen = [i for i, item in enumerate(items) if ("shapes" in item) == two]
        read = read_pictures(images[chosen].permute(0, 2, 3, 1), two) if chosen else []
        for i, found in zip(chosen, read):
            asked, there = in_reading_order(items[i]), in_reading_order(found)
            # Of two shapes each counts as itself wherever it stands: take the order that fits better.
            same, swapped = ([a[word] == b[word] for a, b in zip(order, there) for word in ("kind", "colour")]
                             for order in (asked, asked[::-1]))
            best, beside = max(same, swapped, key=sum), ("left of", "right of")
            right = {"Background": items[i]["background"] == found["background"]}
            if two:
                # Beside or above, as asked for, and not swapped; where both orders fit alike, neither is.
                right["Order"] = (sum(same) > sum(swapped) and found["relation"] is not None
                                  and (items[i]["relation"] in beside) == (found["relation"] in beside))
            elif items[i]["size"]:                       # what a caption does not name cannot be wrong
                right["Size"] = items[i]["size"] == found["size"]
            hits["Kind"] += best[::2]
            hits["Colour"] += best[1::2]
            for name, hit in right.items():
                hits[name].append(hit)
            hits["Everything"].append(all(best) and all(right.values()))
    return {name: sum(found) / len(found) for name, found in hits.items() if found}


def train_classifier(data, device, epochs=3, batch_size=64, lr=3e-3, seed=0):
    """A Classifier in eval mode, trained on all pictures of `data`. It is kept in the cache, under a name
    made of all it depends on, for the next time. Three epochs are about a minute; it then knows nearly all
    real pictures of `shapes`."""
    if data.images.shape[-1] < 16:                               # each of its four levels halves a picture
        raise InputError("the classifiers need pictures of at least 16 x 16 pixels")
    torch.manual_seed(seed)
    net, images, targets = Classifier(len(data.class_names)).to(device), data.images, data.labels
    batch_size = min(batch_size, len(images))            # so few pictures still make one whole step an epoch
    key = short_hash([type(net).__name__, tuple(targets.shape), images.shape[-1], images.numpy().tobytes(),
                      targets.numpy().tobytes(), epochs, batch_size, lr, seed])

    def train():
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
        steps = epochs * len(images) // batch_size
        order = batch_indices(len(images), batch_size, seed)
        for step in tqdm(range(steps), desc="training the classifier", unit=" steps"):
            optimizer.param_groups[0]["lr"] = learning_rate(lr, step, step / steps, warmup=50)
            index = next(order)
            batch = to_float(images[index].to(device))           # (B, 3, H, W)
            # A decoder blurs edges and leaves a pattern of its own, and real pictures have neither. With half
            # of each batch blurred and half noisy the network judges what is drawn, not how sharply.
            batch[::2] = F.avg_pool2d(batch[::2], 3, 1, 1, count_include_pad=False)
            batch[1::2] += 0.05 * torch.randn_like(batch[1::2])
            loss = F.cross_entropy(net(batch)[1], targets[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return net.state_dict()

    path = data_module.CACHE / "classifier" / f"{key}.npz"
    return fill_weights(net, remembered(path, train), path).eval()


def remembered(path, make):
    """The dict of tensors that is kept at `path`, or, where it is missing or damaged, what make() gives."""
    if path.exists():
        try:
            with explained(f"{path} cannot be read"), np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        except InputError as error:
            print(f"{error}: it is made again", file=sys.stderr)
    result = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(result, path)
    except (InputError, OSError) as error:                       # no room or permission: then without a copy
        warning(f"{path} is not kept: {error}")
    return result


def write_arrays(arrays, path):
    """A dict of arrays as an .npz of exactly this name (np.savez appends .npz to a name, not to a file)."""
    with whole_file(path) as name, open(name, "wb") as file:
        np.savez(file, **{name: torch.as_tensor(array).cpu().numpy() for name, array in arrays.items()})


# ------------------------------------------------------------------------------------------------------------
# What REF and SAMPLES can be

class ImageSet:
    """REF or SAMPLES: pictures, ready-made statistics, or both.

    stored   arrays beside the pictures: any of mu, sigma, mu_s, sigma_s; label, prompt
    count    the number of pictures; 0 if the file holds statistics only
    shape    (3, H, W)
    """
    # What is read of them: the type, and the axes, M pictures, D features or S spatial ones.
    STORED = {"mu": (float, "D"), "sigma": (float, "DD"), "mu_s": (float, "S"), "sigma_s": (float, "SS"),
              "label": (int, "M"), "prompt": (str, "M")}

    def __init__(self, path):
        self.path, self.stored, self.count, self.files, self.shape = Path(path), {}, 0, None, None
        if self.path.is_dir():
            # FID of a part of the pictures looks like FID: tell what is read and what is not.
            found = Listing(self.path)
            self.files, unused = found.pictures, told("; not used: ", found.unused)
            print(f"{path} holds {len(self.files):,} pictures{unused}", file=sys.stderr)
            if not self.files:
                raise InputError(f"{path} holds no pictures")
            self.count, self.shape = len(self.files), self.read(0).shape
            return
        if not self.path.is_file():
            raise InputError(f"{path} does not exist, or is no file")
        with explained(f"{path} is damaged, or neither a folder of pictures nor an .npz of plain arrays"), \
                np.load(self.path, allow_pickle=False) as file:
            if "arr_0" in file:
                self.open_images().close()
            sizes = {"M": self.count}                            # D and S are those of the first array
            for name, (dtype, axes) in self.STORED.items():
                if name in file:
                    with explained(f"{path}: {name} is damaged, or not of type {dtype.__name__}"):
                        array = self.stored[name] = file[name].astype(dtype, casting="same_kind")
                    shape = tuple(sizes.setdefault(axis, len(array)) for axis in axes)
                    if array.shape != shape or 0 in shape or dtype is float and not np.isfinite(array).all():
                        raise InputError(f"{path}: {name} is {array.shape} instead of {shape}, or has NaN")
        if not self.count and not {"mu", "sigma"} <= self.stored.keys():
            raise InputError(f"{path} holds neither arr_0 nor mu and sigma")

    def open_images(self):
        """The open member arr_0 of an .npz, just behind its header."""
        archive = zipfile.ZipFile(self.path)
        file, length = archive.open("arr_0.npy"), archive.getinfo("arr_0.npy").file_size
        version = min(np.lib.format.read_magic(file)[0], 2)      # 3 differs in names outside ASCII only
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
        whole = length == file.tell() + math.prod(shape) and 0 not in shape
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not whole:
            raise InputError(f"{self.path}: arr_0 is no whole uint8 (M, H, W, 3) in C order: {dtype} {shape}")
        self.count, self.shape = shape[0], (3, *shape[1:3])
        return file

    def read(self, i):
        """Picture i of a folder, uint8 (3, H, W), of the size of the first one."""
        with explained(f"{self.files[i]} cannot be read", "mend or remove it"):
            picture = torch.from_numpy(np.array(read_image(self.files[i]))).permute(2, 0, 1)
        if picture.shape != (self.shape or picture.shape):
            found, others = (f"{W}x{H}" for _, H, W in (picture.shape, self.shape))
            raise InputError(f"{self.files[i]} is {found} pixels, others are {others}: bring all to one size")
        return picture

    def __getitem__(self, indices):
        """For the DataLoader: uint8 (B, 3, H, W), or a line that says what is wrong: an exception would leave
        a worker as a traceback. (Stacked here, a batch is one tensor to send, not B.)"""
        try:
            return torch.stack([self.read(i) for i in indices])
        except InputError as error:
            return str(error)

    def batches(self, batch_size):
        """The pictures uint8 (B, 3, H, W), read as they are needed (50,000 of 256 x 256 are 9.8 GB), and no
        more at once than `pass_size` allows for pictures of this size."""
        _, H, W = self.shape
        parts = in_order(self.count, min(batch_size, pass_size(H, W)))
        if self.files:
            how = dict(sampler=parts, batch_size=None, num_workers=min(8, os.cpu_count() or 1))
            for batch in torch.utils.data.DataLoader(self, **how):
                if isinstance(batch, str):
                    raise InputError(batch)
                yield batch
            return
        with self.open_images() as file:
            for part in parts:
                with explained(f"{self.path} cannot be read to its end", "write it again"):
                    pixels = bytearray(file.read(len(part) * H * W * 3))
                    batch = torch.frombuffer(pixels, dtype=torch.uint8).view(len(part), H, W, 3)
                yield batch.permute(0, 3, 1, 2)

    def features(self, net, device, args):
        """All pictures through `net`: what net.features gives, stacked, on the CPU. With --cache also kept in
        a file beside the pictures, named by every byte of them, their names, and the network."""
        make = lambda: stack_features(net, self.batches(args.batch_size), self.count, device, self.path.name)
        if not args.cache:
            return make()
        key = short_hash([weights_hash(net), *((path.name, hashlib.sha256(file_bytes(path)).digest())
                                               for path in self.files or [self.path])])
        folder, name = os.path.split(os.path.abspath(self.path))         # "." and ".." have no name
        return remembered(Path(folder, f"{name}.{key}.features.npz"), make)


def file_bytes(path):
    """What is in a file, mapped, not read: an .npz may have gigabytes. Empty files cannot be mapped."""
    return np.memmap(path, mode="r") if path.stat().st_size else b""


def stack_features(net, batches, count, device, name):
    """net.features of all batches: a dict of tensors on the CPU with `count` rows each. Pictures go through
    the network in passes, so memory is bounded whatever their size and however long a batch."""
    found, done = {}, 0
    with tqdm(total=count, desc=f"features of {name}", unit=" images") as bar:
        for batch in batches:
            for images in batch.split(pass_size(*batch.shape[-2:])):
                for key, rows in net.features(images.to(device, non_blocking=True)).items():
                    if key not in found:
                        found[key] = torch.empty(count, rows.shape[1])
                    found[key][done:done + len(rows)] = rows
                done += len(images)
                bar.update(len(images))
    return found


# ------------------------------------------------------------------------------------------------------------
# Measuring samples

class Inception:
    """Samples against REF by Inception's features. REF is read once, however many samples follow."""
    # figure: (features, their mean and covariance in a file of statistics)
    DISTANCES = {"FID": ("pool", "mu", "sigma"), "sFID": ("spatial", "mu_s", "sigma_s")}

    def __init__(self, args, device):
        self.args, self.device, self.net = args, device, None
        self.real, self.statistics = self.read(args.ref)

    def read(self, path):
        """The features of all pictures, None if there are none; mu, sigma, mu_s, sigma_s: the file's own, and
        else those of the features."""
        found, features = ImageSet(path), None
        if found.count == 1:
            raise InputError(f"{path} holds one picture: a covariance needs at least two")
        if found.count:
            # Loaded only now: two files of statistics are compared without it.
            self.net = self.net or load_inception(self.args.inception, self.device)
            features = found.features(self.net, self.device, self.args)
        statistics = {}
        for part, *names in self.DISTANCES.values():
            if found.stored.keys() >= set(names):
                statistics |= {name: found.stored[name] for name in names}
            elif features:
                statistics |= zip(names, feature_statistics(features[part]))
        return features, statistics

    def measure(self, path):
        fake, statistics = self.read(path)
        if fake and len(fake["pool"]) < 10_000:
            warning(f"{len(fake['pool']):,} samples make FID too high; it is usually told for 50,000")
        metrics = {figure: frechet_distance(self.statistics[mu], self.statistics[sigma],
                                            statistics[mu], statistics[sigma])
                   for figure, (_, mu, sigma) in self.DISTANCES.items()
                   if mu in self.statistics and mu in statistics}
        if fake:
            metrics["IS"] = inception_score(fake["logits"])
        if self.real and fake:
            metrics["Precision"], metrics["Recall"] = precision_recall(self.real["pool"], fake["pool"])
        return metrics


RECON = " (reconstructions)"                                     # ends the names of figures against these
# Fitting all outlines at all places and sizes takes some 2 s for 1,000 pictures.
OUTLINES = 1000          # real pictures and reconstructions whose outlines are judged: enough for +- 1 %
VQ = "out/vq.pt"         # the tokenizer of the default run


class Judged:
    """Samples of a data set known by name against its real test pictures, by a classifier trained on its
    training pictures; of shapes also by the drawing rules, which is all that samples with captions need.

    A sweep compares with as many real pictures as samples: the more there are, the smaller the balls around
    them, and the lower the precision. It compares with the tokenizer's reconstructions of them, too: a GPT
    cannot draw better than its decoder does, and the decoder's artefacts alone move every picture away from
    the real ones; beside reconstructions what is left is the GPT's own part.
    """

    def __init__(self, args, device):
        self.args, self.device, self.net = args, device, None

    def measure(self, path):
        samples = ImageSet(path)
        square = samples.count and samples.shape[1] == samples.shape[2]
        if not square or not {"label", "prompt"} & samples.stored.keys():
            raise InputError(f"{path} needs square pictures in arr_0 and label, as sample.py --npz writes")
        images = torch.cat(list(samples.batches(1000)))          # (M, 3, H, W)
        if "prompt" in samples.stored:
            return agreement(images, samples.stored["prompt"].tolist())
        if self.net is None:
            self.learn(images.shape[-1])
        return self.compare(images, torch.from_numpy(samples.stored["label"]))

    def learn(self, side):
        """Train the classifier; pass the real test pictures, and their reconstructions, through it. Of the
        shapes also their outlines are judged: those of real pictures say what the judge asks for, those of
        reconstructions what the tokenizer leaves of it. Samples can be no better than these."""
        args, count = self.args, self.args.num_samples if self.args.sweep else self.args.limit
        train = ArrayData(args.ref, "train", side, args.limit, args.data_dir)
        test = ArrayData(args.ref, "test", side, count, args.data_dir)
        self.net, self.class_names = train_classifier(train, self.device), train.class_names
        real = stack_features(self.net, [test.images], len(test), self.device, args.ref)
        self.accuracy = (real["logits"].argmax(dim=1) == test.labels).double().mean().item()
        self.features, shown = {"": real["pool"]}, {" (real)": test.images[:OUTLINES]}         # (L, D)
        if args.sweep or args.ref == "shapes" and (args.vq or Path(VQ).exists()):
            vq = load_tokenizer(args.vq or VQ, self.device)
            with torch.inference_mode():
                tokens = tokenize_in_passes(vq, test.images if args.sweep else shown[" (real)"], self.device)
                recon = to_pictures(vq, tokens).permute(0, 3, 1, 2).cpu()
            shown[RECON] = recon[:OUTLINES]
            if args.sweep:
                found = stack_features(self.net, [recon], len(recon), self.device, "reconstructions")
                self.features[RECON] = found["pool"]
        self.outlines = {f"Outline{name}": outline(pictures, test.labels[:OUTLINES]).double().mean().item()
                         for name, pictures in shown.items() if args.ref == "shapes"}

    def compare(self, images, labels):
        """Metrics of images uint8 (M, 3, H, W) with labels (M,)."""
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            raise InputError(f"the samples have labels from {labels.min()} to {labels.max()}, but there are "
                             f"{len(self.class_names)} classes: give the data set that they were drawn for")
        fake = stack_features(self.net, [images], len(images), self.device, "the samples")
        judged = {"Class accuracy": fake["logits"].argmax(dim=1) == labels}
        if self.args.ref == "shapes":
            judged["Outline"] = outline(images, labels)
        metrics = {"Real test accuracy": self.accuracy} | self.outlines
        for figure, right in judged.items():
            metrics[figure] = right.double().mean().item()
            metrics |= {f"{figure} of {name}": right[labels == i].double().mean().item()
                        for i, name in enumerate(self.class_names) if (labels == i).any()}
        statistics = feature_statistics(fake["pool"])
        for against, real in self.features.items():
            distance = frechet_distance(*feature_statistics(real), *statistics)
            figures = zip(("FID", "Precision", "Recall"), (distance, *precision_recall(real, fake["pool"])))
            metrics |= {f"{name}-classifier{against}": value for name, value in figures}
        return metrics


def reconstruct(vq, data, device, args, net=None):
    """How well a tokenizer keeps pictures: metrics over a data set, rFID too where `net` gives features."""
    similarity, pools, drawn = [], [], []

    def also(images, recon):                                     # uint8 (B, 3, H, W) each
        similarity.append(ssim(images.float(), recon.float()))
        done = sum(len(right) for right, _ in drawn)
        if args.data == "shapes" and done < OUTLINES:
            labels = data.labels[done:done + len(images)]
            drawn.append([outline(pictures, labels) for pictures in (recon, images)])
        if net:
            pools.append([net.features(pictures)["pool"].cpu() for pictures in (images, recon)])

    size, metrics = min(args.batch_size, pass_size(data.size, data.size)), {}
    psnr, usage, perplexity = evaluate(vq, data, device, size, also)
    if net:
        real, fake = (feature_statistics(torch.cat(pool)) for pool in zip(*pools))
        metrics["rFID-classifier" if isinstance(net, Classifier) else "rFID"] = frechet_distance(*real, *fake)
    for name, right in zip(("Outline", "Outline (real)"), map(torch.cat, zip(*drawn))):
        metrics[name] = right.double().mean().item()
    return metrics | {"PSNR": psnr, "SSIM": torch.cat(similarity).mean().item(), "Codebook usage": usage,
                      "Codebook perplexity": perplexity, "Codebook entropy": math.log2(perplexity)}


def recon_network(args, size, device):
    """What rFID compares: the classifier, Inception, or None, saying why, if its weights are missing."""
    if args.features == "classifier":
        if args.data not in ARRAY_NAMES:
            raise InputError(f"--features classifier learns one of {', '.join(ARRAY_NAMES)}, not {args.data}")
        return train_classifier(ArrayData(args.data, "train", size, args.limit, args.data_dir), device)
    try:
        return load_inception(args.inception, device)
    except InputError as error:
        if args.inception:
            raise
        print(f"rFID is left out: {error}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# Drawing and measuring in one command. Under torchrun all processes draw, the first one measures.

def trained_on(args):
    """The data set that the GPT's checkpoint names, if it is one known by name, else None; whether it draws
    from captions."""
    checkpoint = read_checkpoint(args.gpt, mmap=True)
    if "config" not in checkpoint:                               # a released file does not tell
        return None, False
    flags, text = checkpoint.get("args", {}), checkpoint["config"].get("model_type") == "t2i"
    # A run on a folder of codes has a --data too, which it did not read.
    return flags["data"] if flags.get("data") in ARRAY_NAMES and not flags.get("codes") else None, text


def draw(args, path, *flags):
    """Write samples to the .npz `path` with sample.py and these flags."""
    flags = ["--gpt", args.gpt, "--vq", args.vq or VQ, "--npz", str(path), *flags]
    flags += ["--device", args.device] if args.device else []
    flags += ["--temperature", str(args.temperature)] if args.temperature is not None else []
    sample.main(sample.get_args(flags))


def sweep(args, device):
    """Draw and measure at every guidance scale of --sweep: the trade-off between fidelity and variety as a
    table, --out, and as curves in a .png beside it. The samples stay in a folder beside it.

    The temperature is 1 unless told otherwise: a lower one gives up variety for fidelity as well, and the
    curves could not tell which of the two did it."""
    args.ref = args.ref or trained_on(args)[0]
    if args.ref is None:
        raise InputError(f"{args.gpt} names no data set: give REF, as in python fid.py REF --sweep ...")
    args.temperature = 1.0 if args.temperature is None else args.temperature
    target, table = check_output(args.out, (".csv",)), []
    judge = None if rank_and_world()[0] else (Judged if args.ref in ARRAY_NAMES else Inception)(args, device)
    for scale in args.sweep:
        path = target.with_suffix("") / f"cfg_{scale:g}.npz"
        draw(args, path, "--cfg-scale", str(scale), "--num-samples", str(args.num_samples), "--cfg-schedule",
             args.cfg_schedule)
        if not judge:
            continue
        table.append({"cfg_scale": scale} | {name: value for name, value in judge.measure(path).items()
                                             if not name.startswith(("Class accuracy of", "Outline "))})
        print(", ".join(f"{name} {value:.4g}" for name, value in table[-1].items()))
    if table:
        with whole_file(target) as name:
            rows = [list(row.values()) for row in table]
            np.savetxt(name, rows, "%s", ",", header=",".join(table[0]), comments="")
        plot_lines(table, "cfg_scale", target.with_suffix(".png"))
        print(f"wrote {target} and {target.with_suffix('.png')}")


def alignment(args, device):
    """How well pictures of `shapes` agree with captions from the test split, --alignment of each: one shape
    or two, of combinations that were trained on or held out."""
    if trained_on(args) != ("shapes", True):
        raise InputError(f"{args.gpt} was not trained on captions of shapes: do train_gpt.py --cond text")
    groups = {}
    for seen in (True, False):
        items = captioned_items("test", seen=seen)
        for two in (False, True):
            found = [item["caption"] for item in items if ("shapes" in item) == two]
            name = f"{'two shapes' if two else 'one shape'}, {'seen' if seen else 'held-out'} combinations"
            groups[name] = [found[i * len(found) // args.alignment] for i in range(args.alignment)]
    path = check_output(Path(args.out).with_name("alignment.npz"))
    prompts = path.with_suffix(".txt")
    if rank_and_world()[0] == 0:
        prompts.write_text("\n".join(sum(groups.values(), [])) + "\n", encoding="utf-8")
    wait_for_all()
    draw(args, path, "--prompts-file", str(prompts), "--num-samples", str(len(groups) * args.alignment))
    if rank_and_world()[0] > 0:
        return
    images = torch.cat(list(ImageSet(path).batches(1000))).split(args.alignment)
    for (name, captions), pictures in zip(groups.items(), images):
        shares = agreement(pictures, captions)
        print(f"{len(captions)} pictures of {name}: " +
              ", ".join(f"{word} {value:.1%}" for word, value in shares.items()))


def plot_lines(table, x, path, size=(300, 240)):
    """A PNG with one small diagram for each figure of the table (a list of dicts) against column x. Figures
    against reconstructions are a second line in the diagram of the same name. All axes begin at 0, those of
    shares end at 1, and x is the same everywhere."""
    names = [name for name in table[0] if name not in (x, "Real test accuracy") and not name.endswith(RECON)]
    sheet = Image.new("RGB", (size[0] * len(names), size[1]), "white")
    pen, xs = ImageDraw.Draw(sheet), [row[x] for row in table]
    write = partial(pen.text, fill="black", font=ImageFont.load_default(size=12))
    for i, name in enumerate(names):
        lines = [[row[column] for row in table] for column in (name, name + RECON) if column in table[0]]
        highest = max(map(max, lines))
        digit = 10 ** math.floor(math.log10(highest)) if highest > 0 else 1
        top = math.ceil(highest / digit) * digit if name.startswith(("FID", "sFID", "IS")) else 1
        left, right, upper, lower = size[0] * i + 50, size[0] * (i + 1) - 16, 34, size[1] - 40
        across = np.interp(xs, (min(xs), max(xs)), (left, right)).tolist()
        write(((left + right) / 2, 12), name, anchor="mm")
        write(((left + right) / 2, size[1] - 10), x, anchor="mm")
        for value, y in zip(np.linspace(0, top, 5), np.linspace(lower, upper, 5)):
            pen.line((left, y, right, y), fill="lightgray")
            write((left - 8, y), f"{value:.3g}", anchor="rm")
        for value, place in zip(xs, across):
            write((place, lower + 8), f"{value:g}", anchor="mt")
        styles = ("navy", "against real"), ("darkorange", "against reconstructions")
        for k, (values, (colour, words)) in enumerate(zip(lines, styles)):
            points = list(zip(across, np.interp(values, (0, top), (lower, upper)).tolist()))
            pen.line(points, fill=colour, width=2)
            for point in points:
                pen.circle(point, 3, fill=colour)
            if len(lines) == 2:
                write((left + 75 * k, 25), words, fill=colour, anchor="lm")
    save_picture(sheet, path)


# ------------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    parser = flag_parser(__file__, __doc__)
    add = parser.add_argument
    add("ref", nargs="?", metavar="REF", help=f"real pictures: a folder, .npz, {', '.join(ARRAY_NAMES)}")
    add("samples", nargs="?", metavar="SAMPLES", help="the generated ones: a folder or .npz")
    add("--inception", help="pt_inception-2015-12-05-6726825d.pth, if it is not in the cache")
    add("--save-stats", help="write the statistics of REF to this .npz")
    add("--cache", action="store_true", help="keep the features in a file beside the pictures")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--batch-size", type=counting, default=64, help="pictures per pass, at most; fewer if they are large")
    add("--device", help=DEVICE_HELP)
    add = parser.add_argument_group("a tokenizer's reconstructions").add_argument
    add("--recon", metavar="VQ", help="rFID, PSNR, SSIM and codebook use of this tokenizer")
    add("--data", default="shapes", help="the pictures to reconstruct")
    add("--split", default="test", choices=("train", "test"), help="which of them")
    add("--image-size", type=counting, help="their side; the tokenizer's own if left out")
    add("--features", default="inception", choices=("inception", "classifier"), help="what rFID compares")
    add = parser.add_argument_group("drawing and measuring").add_argument
    add("--sweep", type=finite, nargs="+", metavar="S", help="draw at these guidance scales in turn")
    add("--cfg-schedule", default="constant", choices=sample.SCHEDULES, help="of a --sweep: see sample.py")
    add("--alignment", type=counting, metavar="M", help="draw M pictures of each kind of caption of shapes")
    add("--gpt", default="out/gpt.pt", help="the GPT that draws; its data set is REF if that is left out")
    add("--vq", help=f"the tokenizer that it was trained with; {VQ} if left out")
    add("--num-samples", type=counting, default=1000, help="pictures for each scale")
    add("--temperature", type=not_negative, help="by default 1 for --sweep, sample.py's for --alignment")
    add("--out", default="out/sweep.csv", help="the table; curves and samples go beside it")
    add = parser.add_argument_group("data sets by name").add_argument
    add("--data-dir", help="where to look for the data set's files first")
    add("--limit", type=counting, help="use only so many real pictures of each split")
    args = parser.parse_args(argv)
    if not (args.recon or args.sweep or args.alignment or args.ref and (args.save_stats or args.samples)):
        parser.error("give REF and SAMPLES, or REF and --save-stats, or one of --recon, --sweep, --alignment")
    return args


def main(args):
    device = pick_device(args.device)
    if args.sweep:
        return sweep(args, device)
    if args.alignment:
        return alignment(args, device)
    if args.recon:
        vq = load_tokenizer(args.recon, device)
        size = args.image_size or read_checkpoint(args.recon, mmap=True).get("image_size", 256)
        check_tokenizer(vq, size, args.recon)
        data = load_data(args.data, args.split, size, args.limit, args.data_dir)
        metrics = reconstruct(vq, data, device, args, recon_network(args, size, device))
    else:
        if args.save_stats:
            check_output(args.save_stats, flag="--save-stats", reads=(args.ref, args.samples))
        judge = (Judged if args.ref in ARRAY_NAMES and not args.save_stats else Inception)(args, device)
        if args.save_stats:
            write_arrays(judge.statistics, args.save_stats)
            print(f"wrote {args.save_stats}", file=sys.stderr)
            if not args.samples:
                return
        metrics = judge.measure(args.samples)
    if any("classifier" in name for name in metrics):
        print("Figures of the small classifier cannot be compared with published FIDs.", file=sys.stderr)
    lines = (f"{name}: {value:.4f}" for name, value in metrics.items())
    print(json.dumps(metrics) if args.json else "\n".join(lines))


if __name__ == "__main__":
    run(main, get_args)
