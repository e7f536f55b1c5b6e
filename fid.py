"""Judge generated images with a small CNN of our own: which share is recognised as the class that was asked
for?

The CNN is trained on the real training pictures, so nothing has to be downloaded. It says whether an image
looks like its class, not whether the images are varied. (The Inception-based FID of the paper is not part of
this file yet.)

Shapes: B images, H x W pixels, K classes.
Run:    python sample.py --npz out/samples.npz
        python fid.py shapes out/samples.npz
"""
import argparse
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import ARRAY_NAMES, ArrayData, batch_indices, to_float
from tokenizer import InputError
from train_vq import learning_rate, pick_device, run


class Classifier(nn.Module):
    """Four levels of 3x3 convolutions, each halving the picture; the mean over what is left decides."""

    def __init__(self, num_classes, widths=(32, 64, 128, 128)):
        super().__init__()
        layers, c_in = [], 3
        for width in widths:
            layers += [nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                       nn.MaxPool2d(2)]
            c_in = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(c_in, num_classes)

    def forward(self, images):                                   # images (B, 3, H, W) in [-1, 1]
        return self.head(self.features(images).mean(dim=(2, 3)))     #    (B, K)


def train_classifier(data, device, epochs=3, batch_size=64, lr=3e-3, seed=0):
    """A Classifier in eval mode, trained on all pictures of `data`."""
    torch.manual_seed(seed)
    net = Classifier(len(data.class_names)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * len(data) // batch_size
    order = batch_indices(len(data), batch_size, seed)
    for step in tqdm(range(steps), desc="training the classifier", unit=" steps"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, step / steps, warmup=50)
        index = next(order)
        loss = F.cross_entropy(net(to_float(data.images[index].to(device))), data.labels[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.inference_mode()
def predict(net, images, device, batch_size=500):
    """Class ids (M,) for images uint8 (M, 3, H, W)."""
    batches = (to_float(batch.to(device)) for batch in images.split(batch_size))
    return torch.cat([net(batch).argmax(dim=1).cpu() for batch in batches])


def read_samples(path):
    """arr_0 and label of an .npz that sample.py wrote, as tensors: uint8 (M, 3, H, W) and int64 (M,)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["label"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, TypeError) as error:
        raise InputError(f"{path} is not an .npz with arr_0 and label ({error}): write one with "
                         "python sample.py --npz") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(labels):
        raise InputError(f"{path}: arr_0 has to be uint8 (M, H, W, 3) with one label each, not "
                         f"{images.dtype} {images.shape}")
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", choices=ARRAY_NAMES, help="the data set that the classifier learns")
    parser.add_argument("samples", help="an .npz of generated images with their labels")
    parser.add_argument("--data-dir", help="where to look for the data set's files first")
    parser.add_argument("--limit", type=int, help="use only the first so many real pictures of each split")
    parser.add_argument("--device", help="cuda, mps or cpu; the best one present if left out")
    return parser.parse_args(argv)


def main(args):
    device = pick_device(args.device)
    images, labels = read_samples(args.samples)
    train, test = (ArrayData(args.ref, split, images.shape[-1], args.limit,
                             args.data_dir) for split in ("train", "test"))
    if labels.min() < 0 or labels.max() >= len(train.class_names):
        raise InputError(f"{args.samples} has labels up to {labels.max()}, but {args.ref} has "
                         f"{len(train.class_names)} classes")
    net = train_classifier(train, device)
    real = (predict(net, test.images, device) == test.labels).float().mean()
    right = (predict(net, images, device) == labels).float()
    print(f"Real test accuracy: {real:.4f}")
    print(f"Class accuracy: {right.mean():.4f}")
    for i, name in enumerate(train.class_names):
        if (labels == i).any():
            print(f"  {name}: {right[labels == i].mean():.4f}")


if __name__ == "__main__":
    run(main, get_args)
