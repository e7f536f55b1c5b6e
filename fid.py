"""The numbers of the paper: FID, sFID, Inception Score, precision, recall; rFID, PSNR, SSIM of a tokenizer.

    python fid.py REF SAMPLES              each a folder, an .npz with arr_0, or an .npz with mu and sigma
    python fid.py shapes out/samples.npz   without Inception weights: a small CNN trained on the real pictures
    python fid.py --recon out/vq.pt --data shapes

Shapes: B images, H x W pixels, M samples of a set, D features, K classes.
Paper:  FID (Heusel 2017); sFID (Nash 2021); Inception Score (Salimans 2016); precision and recall
        (Kynkaanniemi 2019); SSIM (Wang 2004). All with the definitions of ADM's evaluator (Dhariwal 2021),
        which the LlamaGen paper used.
"""
import functools
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data as data_module
from data import (ARRAY_NAMES, BACKGROUNDS, COLOURS, KINDS, RELATIONS, SIZES, ArrayData, batch_indices,
                  captioned_shapes, find_file, flag_parser, image_files, in_order, load_data, pick_device,
                  positive, read_image, run, to_float)
from tokenizer import (InputError, codebook_statistics, fill_weights, load_tokenizer, read_checkpoint,
                       weights_hash)
from train_vq import learning_rate, peak_signal_to_noise, reconstructions, save_checkpoint


# ------------------------------------------------------------------------------------------------------------
# The Inception network of FID: that of TensorFlow's 2015 graph, with the parameter names of
# pt_inception-2015-12-05-6726825d.pth. It differs from the later, published Inception v3 in its pooling:
# average pools do not count the padding, and the last block has a max pool.

class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU. Stride 1 keeps the size unless told otherwise."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if padding is None and stride == 1 else padding or 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):

    def __init__(self, c_in, c_pool):
        super().__init__()
        self.branch1x1 = ConvBN(c_in, 64, 1)
        self.branch5x5_1 = ConvBN(c_in, 48, 1)
        self.branch5x5_2 = ConvBN(48, 64, 5)
        self.branch3x3dbl_1 = ConvBN(c_in, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3)
        self.branch_pool = ConvBN(c_in, c_pool, 1)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double,
                          self.branch_pool(average_pool(x))], dim=1)


class InceptionB(nn.Module):

    def __init__(self, c_in):
        super().__init__()
        self.branch3x3 = ConvBN(c_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBN(c_in, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.branch1x1 = ConvBN(768, 192, 1)
        self.branch7x7_1 = ConvBN(768, c, 1)
        self.branch7x7_2 = ConvBN(c, c, (1, 7))
        self.branch7x7_3 = ConvBN(c, 192, (7, 1))
        self.branch7x7dbl_1 = ConvBN(768, c, 1)
        self.branch7x7dbl_2 = ConvBN(c, c, (7, 1))
        self.branch7x7dbl_3 = ConvBN(c, c, (1, 7))
        self.branch7x7dbl_4 = ConvBN(c, c, (7, 1))
        self.branch7x7dbl_5 = ConvBN(c, 192, (1, 7))
        self.branch_pool = ConvBN(768, 192, 1)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average_pool(x))], dim=1)


class InceptionD(nn.Module):

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvBN(768, 192, 1)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBN(768, 192, 1)
        self.branch7x7x3_2 = ConvBN(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBN(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2)

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):

    def __init__(self, c_in, max_pool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvBN(c_in, 320, 1)
        self.branch3x3_1 = ConvBN(c_in, 384, 1)
        self.branch3x3_2a = ConvBN(384, 384, (1, 3))
        self.branch3x3_2b = ConvBN(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvBN(c_in, 448, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3)
        self.branch3x3dbl_3a = ConvBN(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvBN(384, 384, (3, 1))
        self.branch_pool = ConvBN(c_in, 192, 1)

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(pooled)], dim=1)


def resize_as_tf1(images, size=299):
    """TensorFlow 1's bilinear resize: float (B, 3, H, W) -> (B, 3, size, size).

    Pixel i of the result lies at i * H / size of the source (no half-pixel centres), and nothing is averaged
    when shrinking. F.interpolate cannot do this; with its convention FID changes visibly.
    """
    for axis in (3, 2):                                          # along x, then along y
        length = images.shape[axis]
        source = torch.arange(size, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        low = source.floor().long()
        high = (low + 1).clamp(max=length - 1)
        shape = (-1, 1) if axis == 2 else (-1,)
        a, b = images.index_select(axis, low), images.index_select(axis, high)
        images = a + (b - a) * (source - low).view(shape)
    return images


class InceptionV3(nn.Module):

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        self.Mixed_5b = InceptionA(192, c_pool=32)
        self.Mixed_5c = InceptionA(256, c_pool=64)
        self.Mixed_5d = InceptionA(288, c_pool=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
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
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)                         # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)                         # (B, 192, 35, 35)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))        # (B, 768, 17, 17)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1).float()                # (B, 17 * 17 * 7)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))        # (B, 2048, 8, 8)
        pool = x.float().mean(dim=(2, 3))
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.float().T}


def fold_batch_norm(net):
    """Merge each batch norm into the convolution before it: gamma (w x - mean) / sqrt(var + eps) + beta is
    again a convolution with a bias. Returns the same net in eval mode, laid out for fast convolutions."""
    for module in net.modules():
        if isinstance(module, ConvBN) and isinstance(module.bn, nn.BatchNorm2d):
            conv, bn = module.conv, module.bn
            scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
            conv.weight.data = (conv.weight.double() * scale[:, None, None, None]).float()
            conv.bias = nn.Parameter((bn.bias.double() - bn.running_mean.double() * scale).float(),
                                     requires_grad=False)
            module.bn = nn.Identity()
    return net.requires_grad_(False).eval().to(memory_format=torch.channels_last)


@functools.cache
def load_inception(path, device, bf16=False):
    """The folded network with the weights of `path`, or of the cache, or downloaded."""
    path = path or find_file("inception", "pt_inception-2015-12-05-6726825d.pth")
    weights = dict(read_checkpoint(path)["model"])
    net = InceptionV3()
    for name, counter in net.state_dict().items():               # some copies of the file lack these
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, counter)
    net = fold_batch_norm(fill_weights(net, weights, path)).to(device)
    return net.bfloat16() if bf16 else net


# ------------------------------------------------------------------------------------------------------------
# Metrics. They take NumPy arrays or tensors of any width and compute in float64, but for the distances.

def feature_statistics(features):
    """Mean (D,) and covariance (D, D), divided by M - 1, of features (M, D): float64, block by block."""
    features = torch.as_tensor(features)
    if len(features) < 2:
        raise InputError(f"{len(features)} image: a covariance needs at least two")
    blocks = features.split(4096)
    mean = sum(block.double().sum(dim=0) for block in blocks) / len(features)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for block in blocks:
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred)
    return mean.cpu().numpy(), (covariance / (len(features) - 1)).cpu().numpy()


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


def squared_distances(a, b):
    """|a - b|^2 of all pairs: (M, D), (L, D) -> (M, L)."""
    return (a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)


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
        return torch.cat([squared_distances(rows, points).topk(k + 1, largest=False).values[:, -1]
                          for rows in points.split(block)])

    def share_inside(points, centres, radius):
        inside = [(squared_distances(rows, centres) <= radius).any(dim=1) for rows in points.split(block)]
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

    def blur(x):
        x = F.conv2d(x.flatten(0, 1)[:, None], line.view(1, 1, 1, 11))
        return F.conv2d(x, line.view(1, 1, 11, 1)).view(*a.shape[:2], -1)

    mean_a, mean_b = blur(a), blur(b)                            # (B, 3, pixels)
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
             / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return value.mean(dim=(1, 2))


# ------------------------------------------------------------------------------------------------------------
# A judge that needs no weights from outside

class Classifier(nn.Module):
    """Four levels of 3x3 convolutions, each halving the picture; the mean over what is left decides.

    Trained on the real training pictures in about a minute. Its last layer but one replaces Inception.
    """

    def __init__(self, num_classes, widths=(32, 64, 128, 128)):
        super().__init__()
        layers, c_in = [], 3
        for width in widths:
            layers += [nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                       nn.MaxPool2d(2)]
            c_in = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(c_in, num_classes)

    def forward(self, images):                                   # images (B, 3, H, W) in [-1, 1]
        pool = self.body(images).mean(dim=(2, 3))                #        (B, D)
        return pool, self.head(pool)                             # logits (B, K)

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def features(self, images):
        """pool (B, D) and logits (B, K), float32, from images uint8 (B, 3, H, W)."""
        pool, logits = self(to_float(images))
        return {"pool": pool, "logits": logits}


class AttributeReader(Classifier):
    """Reads from a picture of one or two shapes what its caption should say: several answers at once.

    The first of two shapes is the left or the upper one; the grid is not averaged, or places would be lost.
    """
    HEADS = {"kind": KINDS, "colour": COLOURS, "kind of second": KINDS, "colour of second": COLOURS,
             "background": BACKGROUNDS, "size": SIZES, "layout": ("alone", "beside", "above")}

    def __init__(self, side):
        super().__init__(sum(map(len, self.HEADS.values())))
        self.head = nn.Linear(128 * (side // 16) ** 2, self.head.out_features)

    def forward(self, images):                                   # images (B, 3, H, W) in [-1, 1]
        grid = self.body(images).flatten(1)
        return grid, self.head(grid)

    def split(self, logits):
        return logits.split([len(words) for words in self.HEADS.values()], dim=1)

    def loss(self, logits, targets):
        """Mean cross-entropy over the answers that a picture has; the others are -100 in targets (B, 7)."""
        return sum(F.cross_entropy(part, target, reduction="sum") for part, target
                   in zip(self.split(logits), targets.T)) / (targets >= 0).sum()

    @classmethod
    def answers(cls, item):
        """The right answers (7,) for a picture's attributes, in the form of parse_caption."""
        shapes = in_reading_order(item)
        found = [shapes[0]["kind"], shapes[0]["colour"], None, None, item["background"], item.get("size"),
                 "alone"]
        if len(shapes) == 2:
            beside = item["relation"] in ("left of", "right of")
            found[2:4] = shapes[1]["kind"], shapes[1]["colour"]
            found[6] = "beside" if beside else "above"
        return [list(words).index(word) if word else -100 for word, words in zip(found, cls.HEADS.values())]


@functools.cache
def train_reader(device, side):
    """An AttributeReader for pictures of `side` pixels: of one and of two shapes, in all combinations."""
    images, items = zip(*(captioned_shapes("train", size=side, seen=seen) for seen in (True, False)))
    images = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
    targets = torch.tensor([AttributeReader.answers(item) for item in items[0] + items[1]])
    key = f"reader {side} {hashlib.sha256(images.numpy().tobytes()).hexdigest()}"
    return train_judge(lambda: AttributeReader(side), images, targets, key, device, epochs=4)


def agreement(images, captions, device):
    """Shares of pictures uint8 (M, 3, H, W) that agree with their captions: kind and colour over all shapes,
    background, size over pictures of one shape, and order: that the first-named of two is where it should be.
    """
    items = [parse_caption(caption) for caption in captions]
    reader = train_reader(device, images.shape[-1])
    logits = torch.cat([reader.features(block.to(device))["logits"].cpu() for block in images.split(500)])
    read = torch.stack([part.argmax(dim=1) for part in reader.split(logits)], dim=1)        # (M, 7)
    right = torch.tensor([reader.answers(item) for item in items])                          # (M, 7)
    same = read == right
    two = right[:, 2] >= 0
    # Of two shapes each counts as itself wherever it stands: read them in the order that fits better.
    swapped = torch.stack([read[:, i] == right[:, j] for i, j in ((2, 0), (3, 1), (0, 2), (1, 3))], dim=1)
    in_place = same[:, :4].sum(dim=1) > swapped.sum(dim=1)
    best = torch.where((in_place | ~two)[:, None], same[:, :4], swapped)                    # (M, 4)
    share = lambda x: x.double().mean().item()
    shares = {"Kind": share(torch.cat([best[:, 0], best[two, 2]])),
              "Colour": share(torch.cat([best[:, 1], best[two, 3]])),
              "Background": share(same[:, 4])}
    sized = right[:, 5] >= 0
    if sized.any():
        shares["Size"] = share(same[sized, 5])
    if two.any():
        shares["Order"] = share(in_place[two] & same[two, 6])
    return shares


def train_classifier(data, device):
    """A Classifier in eval mode, trained on all pictures of `data`."""
    return train_judge(lambda: Classifier(len(data.class_names)), data.images, data.labels,
                       data.fingerprint(), device, epochs=3)


def train_judge(make, images, targets, key, device, epochs, batch_size=64, lr=3e-3, seed=0):
    """The network that make() gives, in eval mode, trained to give these targets (M, ...) for the images
    uint8 (M, 3, H, W). It is kept in the cache, under a name made of `key`, for the next time."""
    torch.manual_seed(seed)
    net = make().to(device)
    key = f"{key} {epochs} {batch_size} {lr} {seed}"
    path = data_module.CACHE / "classifier" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if path.exists():
        return fill_weights(net, read_checkpoint(path)["model"], path).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * len(images) // batch_size
    order = batch_indices(len(images), batch_size, seed)
    for step in tqdm(range(steps), desc="training the classifier", unit=" steps"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, step / steps, warmup=50)
        index = next(order)
        batch = to_float(images[index].to(device))
        # Half of them blurred, half noisy: it shall judge what is drawn, not how sharply a decoder draws it.
        batch[::2] = F.avg_pool2d(batch[::2], 3, 1, 1, count_include_pad=False)
        batch[1::2] += 0.05 * torch.randn_like(batch[1::2])
        loss = net.loss(net(batch)[1], targets[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model=net.state_dict())
    return net.eval()


# ------------------------------------------------------------------------------------------------------------
# What REF and SAMPLES can be

class ImageFolder(torch.utils.data.Dataset):
    """All pictures below a folder. Indexing gives uint8 (3, H, W), or a line that says what is wrong."""

    def __init__(self, root):
        self.files = image_files(root)
        if not self.files:
            raise InputError(f"{root} holds no pictures")

    def __getitem__(self, i):
        try:
            return torch.from_numpy(np.array(read_image(self.files[i]))).permute(2, 0, 1)
        except Exception as error:       # Pillow's readers raise almost anything on a damaged file
            return f"{self.files[i]} cannot be read ({error}): mend or remove it"

    def batches(self, batch_size):
        loader = torch.utils.data.DataLoader(self, batch_sampler=in_order(len(self.files), batch_size),
                                             num_workers=min(8, os.cpu_count() or 1), collate_fn=list)
        shape = None
        for first, batch in zip(range(0, len(self.files), batch_size), loader):
            for file, picture in zip(self.files[first:], batch):
                if isinstance(picture, str):
                    raise InputError(picture)
                shape = shape or picture.shape
                if picture.shape != shape:
                    raise InputError(f"{file} is {picture.shape[2]}x{picture.shape[1]} pixels, others are "
                                     f"{shape[2]}x{shape[1]}: bring all to one size first, as the way of "
                                     f"resizing changes the result")
            yield torch.stack(batch)


def npz_images(path, batch_size):
    """The number of images in an .npz's arr_0, uint8 (M, H, W, 3), and a generator of batches (B, 3, H, W),
    read from the file as they are needed: 50,000 pictures of 256 x 256 are 9.8 GB."""
    archive = zipfile.ZipFile(path)
    file = archive.open("arr_0.npy")
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read_header[version](file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise InputError(f"{path}: arr_0 has to be uint8 (M, H, W, 3), not {dtype} {shape}")

    def batches():
        for first in range(0, shape[0], batch_size):
            rows = min(batch_size, shape[0] - first)
            data = file.read(rows * math.prod(shape[1:]))
            pixels = np.frombuffer(bytearray(data), np.uint8).reshape(rows, *shape[1:])
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return shape[0], batches()


class ImageSet:
    """REF or SAMPLES: pictures, ready-made statistics, or both.

    statistics  what the file brings of mu, sigma, mu_s, sigma_s
    count       the number of pictures; 0 if the file holds statistics only
    """

    def __init__(self, path):
        self.path, self.statistics, self.labels, self.prompts = Path(path), {}, None, None
        self.count, self.features_found = 0, None
        if self.path.is_dir():
            self.count = len(ImageFolder(self.path).files)
            return
        try:
            with np.load(self.path, allow_pickle=False) as file:
                names = ("mu", "sigma", "mu_s", "sigma_s")
                self.statistics = {name: file[name] for name in names if name in file}
                self.labels = file["label"] if "label" in file else None
                self.prompts = file["prompt"].tolist() if "prompt" in file else None
                images = "arr_0" in file
            if images:
                self.count = npz_images(self.path, 1)[0]
        except FileNotFoundError:
            raise InputError(f"{path} does not exist") from None
        except InputError:
            raise
        except Exception as error:           # np.load raises almost anything on a damaged or foreign file
            raise InputError(f"{path} is neither a folder of pictures nor an .npz of plain arrays "
                             f"({error})") from None
        if not images and not {"mu", "sigma"} <= self.statistics.keys():
            raise InputError(f"{path} holds neither arr_0 nor mu and sigma")

    def batches(self, batch_size):
        if self.path.is_dir():
            return ImageFolder(self.path).batches(batch_size)
        return npz_images(self.path, batch_size)[1]

    def features(self, net, device, batch_size, cache_key=None):
        """All pictures through `net`: what net.features gives, stacked, on the CPU. Computed once; with a
        cache_key, which names the network, also kept in a file beside the pictures."""
        if self.features_found is None:
            kept = cache_key and self.path.with_name(f"{self.path.name}.{self.hash(cache_key)}.features.npz")
            if kept and kept.exists():
                with np.load(kept, allow_pickle=False) as file:
                    self.features_found = {name: torch.from_numpy(file[name]) for name in file.files}
            else:
                self.features_found = stack_features(net, self.batches(batch_size), self.count, device,
                                                     self.path.name)
                if kept:
                    np.savez(kept, **{name: x.numpy() for name, x in self.features_found.items()})
        return self.features_found

    def hash(self, key):
        """Of every byte of the pictures, their names, and the key."""
        digest = hashlib.sha256(key.encode())
        for path in ImageFolder(self.path).files if self.path.is_dir() else [self.path]:
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()[:16]

    def find_statistics(self, features):
        """mu, sigma, mu_s, sigma_s: the file's own, and else those of the features, where there are any."""
        if "mu" not in self.statistics:
            self.statistics["mu"], self.statistics["sigma"] = feature_statistics(features["pool"])
        if "mu_s" not in self.statistics and features and "spatial" in features:
            self.statistics["mu_s"], self.statistics["sigma_s"] = feature_statistics(features["spatial"])
        return self.statistics


open_set = functools.cache(ImageSet)                             # REF, whose features are needed only once


def stack_features(net, batches, count, device, name):
    """net.features of all batches: a dict of tensors on the CPU with `count` rows each."""
    found, done = {}, 0
    with tqdm(total=count, desc=f"features of {name}", unit=" images") as bar:
        for images in batches:
            for key, rows in net.features(images.to(device, non_blocking=True)).items():
                if key not in found:
                    found[key] = torch.empty(count, rows.shape[1])
                found[key][done:done + len(rows)] = rows
            done += len(images)
            bar.update(len(images))
    return found


# ------------------------------------------------------------------------------------------------------------
# The commands

def compare(ref, samples, features_of):
    """The metrics that two ImageSets can give, a dict. features_of(set): its features, or None."""
    real, fake = features_of(ref), features_of(samples)
    a, b = ref.find_statistics(real), samples.find_statistics(fake)
    metrics = {"FID": frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])}
    if "mu_s" in a and "mu_s" in b:
        metrics["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
    if fake:
        metrics["IS"] = inception_score(fake["logits"])
    if real and fake:
        metrics["Precision"], metrics["Recall"] = precision_recall(real["pool"], fake["pool"])
    return metrics


@functools.cache                                                 # a sweep asks for the same one many times
def classifier_reference(name, size, limit, data_dir, device):
    """What `judge` compares with: a classifier of the data set, its classes, its pool features of the real
    test pictures and its accuracy on them."""
    train, test = (ArrayData(name, split, size, limit, data_dir) for split in ("train", "test"))
    net = train_classifier(train, device)
    real = stack_features(net, test.images.split(500), len(test), device, name)
    accuracy = (real["logits"].argmax(dim=1) == test.labels).double().mean().item()
    return net, train.class_names, real["pool"], accuracy


def judge(images, labels, reference, device):
    """Metrics of generated images uint8 (M, 3, H, W) with labels (M,) by a classifier_reference."""
    net, class_names, real, accuracy = reference
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise InputError(f"the samples have labels up to {labels.max()}, but there are {len(class_names)} "
                         f"classes")
    fake = stack_features(net, images.split(500), len(images), device, "the samples")
    right = (fake["logits"].argmax(dim=1) == labels).double()
    metrics = {"Real test accuracy": accuracy, "Class accuracy": right.mean().item()}
    for i, class_name in enumerate(class_names):
        if (labels == i).any():
            metrics[f"  {class_name}"] = right[labels == i].mean().item()
    metrics["FID-classifier"] = frechet_distance(*feature_statistics(real), *feature_statistics(fake["pool"]))
    precision, recall = precision_recall(real, fake["pool"])
    return metrics | {"Precision-classifier": precision, "Recall-classifier": recall}


def reconstruct(vq, data, device, args, net=None):
    """How well a tokenizer keeps pictures: metrics over a data set, rFID too where `net` gives features."""
    psnr, similarity, found = [], [], ([], [])
    counts = torch.zeros(vq.config.codebook_size, device=device)
    with tqdm(total=len(data), desc="reconstructing", unit=" images") as bar:
        for images, recon, tokens in reconstructions(vq, data, device, args.batch_size):
            psnr.append(peak_signal_to_noise(images, recon))
            similarity.append(ssim(images.float(), recon.float()))
            counts += torch.bincount(tokens.flatten(), minlength=len(counts))
            if net:
                for pool, pictures in zip(found, (images, recon)):
                    pool.append(net.features(pictures)["pool"].cpu())
            bar.update(len(images))
    metrics = {}
    if net:
        real, fake = (feature_statistics(torch.cat(pool)) for pool in found)
        metrics["rFID-classifier" if isinstance(net, Classifier) else "rFID"] = frechet_distance(*real, *fake)
    usage, perplexity = codebook_statistics(counts)
    return metrics | {"PSNR": torch.cat(psnr).mean().item(), "SSIM": torch.cat(similarity).mean().item(),
                      "Codebook usage": usage, "Codebook perplexity": perplexity,
                      "Codebook entropy": math.log2(perplexity)}


def evaluate_samples(args, device):
    """The metrics of args.samples against args.ref, by the features that args.features names."""
    if args.ref in ARRAY_NAMES:
        samples = ImageSet(args.samples)
        if samples.count and samples.prompts is not None:
            images = torch.cat(list(samples.batches(1000)))
            return agreement(images, samples.prompts, device)
        if not samples.count or samples.labels is None:
            raise InputError(f"{args.samples} needs arr_0 and label to be judged by a classifier: write it "
                             f"with python sample.py --npz")
        images = torch.cat(list(samples.batches(1000)))
        reference = classifier_reference(args.ref, images.shape[-1], args.limit, args.data_dir, device)
        return judge(images, torch.from_numpy(samples.labels), reference, device)
    ref, samples = open_set(args.ref), ImageSet(args.samples)
    for images in (ref, samples):
        if images.count == 1:
            raise InputError(f"{images.path} holds one picture: a covariance needs at least two")
    if 0 < samples.count < 10_000:
        print(f"warning: {samples.count:,} samples make FID too high; it is usually told for 50,000",
              file=sys.stderr)
    net = load_inception(args.inception, device, args.bf16) if ref.count or samples.count else None
    key = f"{weights_hash(net)} {args.bf16}" if net and args.cache else None
    return compare(ref, samples, lambda images: images.features(net, device, args.batch_size, key)
                   if images.count else None)


def save_statistics(args, device):
    """Write mu, sigma, mu_s and sigma_s of REF to --save-stats, to be used as REF from then on."""
    ref = open_set(args.ref)
    features = None
    if ref.count:
        net = load_inception(args.inception, device, args.bf16)
        features = ref.features(net, device, args.batch_size)
    np.savez(args.save_stats, **ref.find_statistics(features))


def plot_lines(table, x, columns, path, size=(300, 240), margin=46):
    """A PNG with one small diagram for each column of the table (a list of dicts) against column x."""
    sheet = Image.new("RGB", (size[0] * len(columns), size[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for i, column in enumerate(columns):
        xs, ys = [row[x] for row in table], [row[column] for row in table]
        left, right, top, bottom = size[0] * i + margin, size[0] * (i + 1) - 16, 30, size[1] - 36
        spread = lambda values: (min(values), (max(values) - min(values)) or 1.0)
        (x0, width), (y0, height) = spread(xs), spread(ys)
        points = [(left + (a - x0) / width * (right - left), bottom - (b - y0) / height * (bottom - top))
                  for a, b in zip(xs, ys)]
        draw.rectangle((left - 6, top - 6, right + 6, bottom + 6), outline="gray")
        draw.line(points, fill="navy", width=2)
        for (px, py), value in zip(points, xs):
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill="navy")
            draw.text((px, bottom + 9), f"{value:g}", "black", font, anchor="mt")
        for value, py in ((max(ys), top), (min(ys), bottom)):
            draw.text((left - 9, py), f"{value:.3g}", "black", font, anchor="rm")
        draw.text(((left + right) / 2, 12), column, "black", font, anchor="mm")
        draw.text(((left + right) / 2, size[1] - 8), x, "black", font, anchor="mm")
    sheet.save(path)


def get_args(argv=None):
    parser = flag_parser(__doc__)
    parser.add_argument("ref", nargs="?", metavar="REF",
                        help="the real pictures: a folder, an .npz, or for the classifier "
                             f"{', '.join(ARRAY_NAMES)}")
    parser.add_argument("samples", nargs="?", metavar="SAMPLES", help="the generated ones: a folder or .npz")
    parser.add_argument("--inception", help="pt_inception-2015-12-05-6726825d.pth, if it is not in the cache")
    parser.add_argument("--save-stats", help="write the statistics of REF to this .npz")
    parser.add_argument("--cache", action="store_true",
                        help="keep the features in a file beside the pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--batch-size", type=positive(int), default=64, help="pictures per pass")
    parser.add_argument("--bf16", action="store_true",
                        help="Inception in bf16: faster, and no longer comparable")
    parser.add_argument("--device", help="cuda, mps or cpu; the best one present if left out")
    group = parser.add_argument_group("a tokenizer's reconstructions")
    group.add_argument("--recon", metavar="VQ", help="rFID, PSNR, SSIM and codebook use of this tokenizer")
    group.add_argument("--data", default="shapes", help="the pictures to reconstruct")
    group.add_argument("--split", default="test", choices=("train", "test"), help="which of them")
    group.add_argument("--image-size", type=positive(int), help="their side; the tokenizer's own if left out")
    group.add_argument("--features", default="inception", choices=("inception", "classifier"),
                       help="whose features rFID compares")
    group = parser.add_argument_group("data sets by name")
    group.add_argument("--data-dir", help="where to look for the data set's files first")
    group.add_argument("--limit", type=positive(int), help="use only so many real pictures of each split")
    args = parser.parse_args(argv)
    if not args.recon and not args.ref or not (args.recon or args.save_stats or args.samples):
        parser.error("give REF and SAMPLES, or REF and --save-stats, or --recon and --data")
    return args


def main(args):
    device = pick_device(args.device)
    if args.recon:
        vq = load_tokenizer(args.recon, device)
        size = args.image_size or read_checkpoint(args.recon, mmap=True).get("image_size", 256)
        data = load_data(args.data, args.split, size, args.limit, args.data_dir)
        metrics = reconstruct(vq, data, device, args, recon_network(args, size, device))
    elif args.save_stats:
        save_statistics(args, device)
        print(f"wrote {args.save_stats}", file=sys.stderr)
        if not args.samples:
            return
        metrics = evaluate_samples(args, device)
    else:
        metrics = evaluate_samples(args, device)
    if any("classifier" in name for name in metrics):
        print("Figures of the small classifier cannot be compared with published FIDs.", file=sys.stderr)
    if args.json:
        print(json.dumps({name.strip(): value for name, value in metrics.items()}))
    else:
        for name, value in metrics.items():
            print(f"{name}: {value:.4f}")


def recon_network(args, size, device):
    """What rFID compares: the classifier, Inception, or None, saying why, if its weights are missing."""
    if args.features == "classifier":
        if args.data not in ARRAY_NAMES:
            raise InputError(f"--features classifier learns one of {', '.join(ARRAY_NAMES)}, not {args.data}")
        return train_classifier(ArrayData(args.data, "train", size, args.limit, args.data_dir), device)
    try:
        return load_inception(args.inception, device, args.bf16)
    except InputError as error:
        if args.inception:
            raise
        print(f"rFID is left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    run(main, get_args)
