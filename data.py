"""Data sets, from disk or from the drawing board: downloads, folders, batches, and the code cache.

    shapes                           drawn on the fly, no download: the default
    fashion_mnist, mnist, cifar10    found on this machine or downloaded
    a folder                         one sub-folder per class, as ImageNet has it
    a .jsonl, a folder, .tar files   pictures with captions

Shapes: M images of a data set, B images of a batch, H x W pixels, K crops per image, N tokens per image.
Run:    python data.py               # draws out/shapes.png, 40 pictures of the default data set with captions
        python data.py extract --data imagenet --vq vq_ds16_c2i.pt --image-size 256 --ten-crop 1.1 --out codes
        python data.py check codes/train --vq vq_ds16_c2i.pt
"""
import argparse
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
import textwrap
import threading
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from files import (Listing, TarMember, center_crop, fixed_crops, jsonl_entries, random_crop, read_image,
                   split_folders, tar_entries, text_entries, told, visible, warning)
from runs import (DEVICE_HELP, InputError, SharedArray, alone, check_output, counting, explained, flag_parser,
                  gathered, my_part, on_signals, pick_device, positive, rank_and_world, run, short_hash,
                  wait_for_all, weights_hash, whole_file)
from shapes import KINDS, SHAPES_COUNT, captioned_shapes, draw_shapes, spread
from tokenizer import (codebook_statistics, load_tokenizer, peak_signal_to_noise, to_float, to_pictures,
                       tokenize_in_passes)

ARRAY_NAMES = ("shapes", "fashion_mnist", "mnist", "cifar10")
CACHE = Path(os.environ.get("LLAMAGEN_CACHE", Path.home() / ".cache" / "llamagen"))
DEBIAN = Path("/usr/share/datasets")              # where Debian's dataset-fashion-mnist has its files


# ------------------------------------------------------------------------------------------------------------
# Files: find them on this machine, or download them

FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# (data set, file): (address, checksum). A checksum that is part of the name is the beginning of the sha256,
# the others are the md5 that their authors publish.
PUBLIC_FILES = {
    ("fashion_mnist", "train-images-idx3-ubyte.gz"): (FASHION, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    ("fashion_mnist", "train-labels-idx1-ubyte.gz"): (FASHION, "25c81989df183df01b3e8a0aad5dffbe"),
    ("fashion_mnist", "t10k-images-idx3-ubyte.gz"): (FASHION, "bef4ecab320f06d8554ea6380940ec79"),
    ("fashion_mnist", "t10k-labels-idx1-ubyte.gz"): (FASHION, "bb300cfdad3c16e7a12a480ee83cd310"),
    ("mnist", "train-images-idx3-ubyte.gz"): (MNIST, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    ("mnist", "train-labels-idx1-ubyte.gz"): (MNIST, "d53e105ee54ea40749a09fcbcd1e9432"),
    ("mnist", "t10k-images-idx3-ubyte.gz"): (MNIST, "9fb629c4189551a2d022fa330f9573f3"),
    ("mnist", "t10k-labels-idx1-ubyte.gz"): (MNIST, "ec29112dd5afa0611ce80d1b7f02629c"),
    ("cifar10", "cifar-10-binary.tar.gz"):
        ("https://www.cs.toronto.edu/~kriz/", "c32a1d4ab5d03f1284b67883e8d87530"),
    ("inception", "pt_inception-2015-12-05-6726825d.pth"):
        ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/", "6726825d"),
    ("lpips", "vgg16-397923af.pth"): ("https://download.pytorch.org/models/", "397923af"),
    ("lpips", "vgg.pth"): ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/",
                           "d507d7349b931f0638a25a48a722f98a"),
}
TORCHVISION = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST"}        # its folders have a "raw" in them


def find_file(group, name, data_dir=None):
    """Path of one public file: in data_dir, the cache, Debian's data sets (.gz or not), else downloaded."""
    dashed, raw = group.replace("_", "-"), Path(TORCHVISION.get(group, group), "raw")
    folders = [Path(data_dir) / sub for sub in ("", group, dashed, raw, "raw")] if data_dir else []
    names = [name, name.removesuffix(".gz")]
    names += [other.replace("-idx", ".idx") for other in names]          # as Kaggle's copies are called
    for folder in (*folders, CACHE / group, DEBIAN / dashed):
        for candidate in map(folder.joinpath, names):
            if candidate.is_file():
                return candidate
    return download(group, name)


def download(group, name):
    """Fetch one public file into the cache with a progress bar, check it, and only then give it its name."""
    address, checksum = PUBLIC_FILES[group, name]
    target, patience = CACHE / group / name, socket.getdefaulttimeout()
    cure = f"get {address}{name} and put it into {target.parent}"
    with whole_file(target) as partial, \
            explained(f"{name} is not on this machine and cannot be downloaded", cure, OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub sets none, and a server that falls silent would hold us for ever.
        socket.setdefaulttimeout(20)
        try:
            torch.hub.download_url_to_file(address + name, str(partial))
        finally:
            socket.setdefaulttimeout(patience)
        found = hashlib.new("sha256" if checksum in name else "md5", partial.read_bytes()).hexdigest()
        if not found.startswith(checksum):
            raise InputError(f"{address}{name} arrived damaged (wrong checksum): try again")
    return target


def read_idx(path):
    """An IDX file (MNIST's format): 2 zero bytes, type 8 = uint8, number of axes, their lengths as big-endian
    int32, data. Zipped or not: Debian's are, unpacked copies are not."""
    with explained(f"{path} cannot be read", "delete it and fetch it again"):
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        begin = 4 + 4 * content[3]
        shape = np.frombuffer(content[4:begin], ">i4").tolist()
        if content[:3] != b"\0\0\x08" or not shape or len(content) != begin + math.prod(shape):
            raise ValueError("it is not a complete IDX file")
        return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def load_idx(name, split, data_dir):
    """MNIST or Fashion-MNIST: images uint8 (M, 32, 32, 3), labels int64 (M,). A rim of 2 black pixels around
    the 28 x 28 grey ones makes them divisible by every tokenizer's 4, 8 or 16."""
    part = {"train": "train", "test": "t10k"}[split]
    images = read_idx(find_file(name, f"{part}-images-idx3-ubyte.gz", data_dir))
    labels = read_idx(find_file(name, f"{part}-labels-idx1-ubyte.gz", data_dir))
    if images.ndim != 3 or len(images) != len(labels):
        raise InputError(f"{name}: the image and label files do not belong together; fetch both again")
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(images[..., None], 3, axis=-1), labels.astype(np.int64)


def load_cifar10(split, data_dir):
    """CIFAR-10's binary version: records of 1 label byte and 3 x 32 x 32 pixel bytes. (The version for Python
    is a pickle, and reading a pickle runs what is in it.)"""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    folders = [Path(data_dir) / sub for sub in ("", "cifar-10-batches-bin")] if data_dir else []
    unpacked = next((f for f in folders if all((f / name).is_file() for name in names)), None)
    source = unpacked or find_file("cifar10", "cifar-10-binary.tar.gz", data_dir)
    with explained(f"{source} is not CIFAR-10's binary archive", "delete it and fetch it again"):
        if unpacked:
            raw = b"".join((unpacked / name).read_bytes() for name in names)
        else:
            with tarfile.open(source) as tar:
                raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names)
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        if not len(records):
            raise ValueError("it is empty")
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)       # planes -> (M, 32, 32, 3)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def imagenet_names():
    """The names of ImageNet's 1,000 classes in the order of their ids."""
    return Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


CLASS_NAMES = {
    "shapes": list(KINDS),
    "fashion_mnist": "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split(),
    "mnist": [str(digit) for digit in range(10)],
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
}


def check_split(split):
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}: use train or test")


def load_array(name, split="train", n=None, data_dir=None, size=32, captioned=False):
    """A data set that fits in memory: images uint8 (M, H, W, 3), labels int64 (M,), M captions or None.

    name: one of ARRAY_NAMES. n: only the first n images. size: side in pixels. captioned: of shapes, those
    for text: scenes of two as well, without the held-out pairs, and n of them evenly spread.
    """
    if name not in ARRAY_NAMES:
        raise InputError(f"unknown data set {name!r}: use one of {', '.join(ARRAY_NAMES)}, or a folder")
    check_split(split)
    if name == "shapes":
        count = SHAPES_COUNT[split] if n is None else min(n, SHAPES_COUNT[split])
        images, items = captioned_shapes(split, n, size) if captioned else draw_shapes(split, 0, count, size)
        # Of a scene the class is that of its first shape.
        kinds = [item.get("shapes", [item])[0]["kind"] for item in items]
        labels = np.array([list(KINDS).index(kind) for kind in kinds], np.int64)
        return images, labels, [item["caption"] for item in items]
    if captioned:
        raise InputError(f"{name} has no captions: leave --cond text, or use shapes or your own pictures")
    if size != 32:
        raise InputError(f"{name} has pictures of 32x32 pixels: leave --image-size at 32")
    images, labels = load_cifar10(split, data_dir) if name == "cifar10" else load_idx(name, split, data_dir)
    return images[:n], labels[:n], None


# ------------------------------------------------------------------------------------------------------------
# Data sets for training

def shuffled(places, count, seed):
    """What stands at these places (n,) of a random order of 0 .. count - 1, without the others: a million
    pictures or a thousand millions take the same memory.

    A Feistel network (Luby 1988): of a number's two halves one is changed by a random function of the other,
    in turns. Whatever that function is, each turn can be undone, so no two places get the same number. It
    orders 4^k >= count numbers; one that is too large goes in again until it is not.
    """
    keys = np.random.default_rng(seed).integers(1 << 32, size=8, dtype=np.uint64)
    half = np.uint64(max(1, math.ceil(math.log2(max(count, 2)) / 2)))
    mask, result = (np.uint64(1) << half) - np.uint64(1), places.astype(np.uint64)
    beyond = np.ones(len(places), bool)
    while beyond.any():
        left, right = result[beyond] >> half, result[beyond] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)        # two odd numbers, well mixed bits
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        result[beyond] = left << half | right
        beyond = result >= count
    return result.astype(np.int64)


def batch_indices(count, batch_size, seed, start=0):
    """Endless batches of indices, (B,): a new order every epoch, the same for the same (seed, step), so that
    a resumed run sees what an uninterrupted one would have seen. `start`: the first step."""
    per_epoch = max(count // batch_size, 1)
    for step in itertools.count(start):
        epoch, i = divmod(step, per_epoch)
        places = np.arange(i * batch_size, min((i + 1) * batch_size, count))
        yield torch.from_numpy(shuffled(places, count, (seed, epoch)))


def in_order(count, batch_size):
    """0 .. count-1 cut into lists."""
    return [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]


class Pictures:
    """What a data set has: labels, class_names, captions, crops, size, arguments (load_data's, to open it
    again), a fingerprint, and three ways through its pictures: batches (endless, for training), take (chosen
    ones), passes (each once). Nothing else is asked of it, so arrays, folders and archives are exchangeable.
    """
    # Where they are, how many there are before any are held out, what else is there; of arrays no files
    place, found, unused, files = "", 0, Counter(), ()

    def __len__(self):
        return len(self.labels)

    def __str__(self):
        """One line of what was found and what was not used, so that nothing is left out without a word."""
        K, seen = len(self.class_names), len(self.labels[self.labels >= 0].unique())
        part = f" of {self.found:,}" if self.found > len(self) else ""
        some = f"{seen} of " if seen < K else ""
        classes = f" of {some}{K} class{'es' * (K > 1)}" if not self.captions else ""
        names = f" ({', '.join(filter(str.isprintable, self.class_names))})" if classes and K < 6 else ""
        return (f"{len(self):,}{part} pictures{classes}{names} in {self.place}" +
                told("; not used: ", self.unused))

    def identity(self):
        """What a resumed run has to find again, wherever the folder is by then."""
        root = Path(self.arguments["name"])          # the paths in a .jsonl are seen from where it lies
        root = str(root.parent if root.suffix.lower() == ".jsonl" else root)
        names = [str(file).removeprefix(root).lstrip("/") for file, _ in self.files]
        order = short_hash([names, self.labels.tolist(), self.captions])
        return {"class_names": list(self.class_names), "pictures": len(self), "names, order, captions": order}

    def passes(self, batch_size):
        """One pass in order: uint8 (B, K, 3, H, W) and labels (B,), without the unreadable pictures."""
        batches, skipped = in_order(len(self), batch_size), []
        for batch, (images, labels) in zip(batches, self.take(batches)):
            good = labels >= 0
            skipped += torch.tensor(batch)[~good].tolist()
            if good.any():
                yield images[good], labels[good]
        self.warn(skipped)

    def warn(self, skipped):
        """One warning that counts the pictures with these indices, which cannot be read, and names five."""
        if len(skipped):
            names = [str(self.files[i][0]) for i in sorted(skipped)]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            warning(f"skipped {len(names)} of {len(self)} pictures that cannot be read: "
                    f"{', '.join(names[:5])}{more}")


class ArrayData(Pictures):
    """A data set held in memory: a batch is one indexing operation on the device that holds the pixels."""

    def __init__(self, name, split, size=32, n=None, data_dir=None, captioned=False):
        images, labels, captions = load_array(name, split, n, data_dir, size, captioned)
        self.captions = [[caption] for caption in captions] if captioned else None   # a list for each picture
        self.class_names, self.size, self.place = CLASS_NAMES[name], size, f"{name} ({split})"
        self.images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # (M, 3, H, W) uint8
        self.labels = torch.from_numpy(labels)                                               # (M,)
        self.crops = 1                              # one version of each picture: these have no margin to cut
        self.arguments = dict(name=name, split=split, size=size, n=n, data_dir=data_dir, captioned=captioned)

    def fingerprint(self):
        return short_hash([self.images.numpy().tobytes(), self.labels.numpy().tobytes(), self.captions])

    def batches(self, batch_size, seed, start=0, device="cpu"):
        """Endless training batches (B, 3, H, W) in [-1, 1]; under torchrun this process's part of each."""
        images = self.images.to(device)
        for index in batch_indices(len(self), batch_size, seed, start):
            yield to_float(images[to_device(my_part(index), device)])

    def take(self, batches):
        """The pictures of each list of indices: uint8 (B, K=1, 3, H, W) and labels (B,)."""
        for batch in batches:
            yield self.images[batch][:, None], self.labels[batch]


def to_device(tensor, device):
    """Copy to the device; to a GPU from pinned memory, so that nothing waits for the copy to end."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def hold_out(entries, split):
    """Of (file, class id, captions) every 20th for the test split, the others to train on; but never the only
    picture of a class, as long as that leaves any."""
    left, held_out, every = Counter(label for _, label, _ in entries), set(), range(0, len(entries), 20)
    for i in every:
        label = entries[i][1]
        if left[label] > 1:
            left[label] -= 1
            held_out.add(i)
    held_out = held_out or set(every)
    return [entry for i, entry in enumerate(entries) if (i in held_out) == (split == "test")]


class FolderData(Pictures):
    """Pictures in files, read when they are needed: in folders, one for each class, or with captions.

    class folders   root/cat/1.jpg; without sub-folders, or with more pictures beside them, one class
    .jsonl          a line {"image": path, "text": caption} each, paths as seen from the file; also a folder
                    with Hugging Face's metadata.jsonl
    texts           picture.txt beside picture.png; several lines are several captions
    .tar            picture.jpg and picture.txt or .json ("text" or "caption"), and perhaps .cls, a class id:
                    one archive, or a folder of them. They are read where they lie, in any order

    Parts of their own, root/train and root/val or test, are the splits; else every 20th picture is held out.
    With captioned, what has no caption is left out, and nothing is mirrored unless asked: captions speak of
    left and right. A file that cannot be read is skipped; `warn` counts these and names the first five.
    """

    def __init__(self, root, split, size=32, n=None, flip=True, ranges=(), captioned=False):
        self.size, self.flip, self.ranges, self.captioned = size, flip, tuple(ranges), captioned
        self.crops = (5 * len(self.ranges) or 1) * (2 if flip else 1)       # see fixed_crops
        self.arguments = dict(name=str(root), split=split, size=size, n=n, flip=flip, ranges=list(ranges),
                              captioned=captioned)
        base, held_out = split_folders(Path(root))
        self.place = held_out if split == "test" else base
        entries = self.find_files(base, self.place)
        if not entries:
            cure = ('a .jsonl of {"image": path, "text": caption}, a folder with picture.txt beside '
                    "picture.png, or .tar archives of such pairs" if captioned else
                    f"one sub-folder per class, as in {self.place / 'cat' / 'photo.jpg'}")
            raise InputError(f"{self.place} holds no pictures{' with captions' * captioned}"
                             f"{told('. Found: ', self.unused)}. Give {cure}")
        self.found = len(entries)
        if base != Path(root):
            self.unused.update(f"{entry.name}/ beside them" for entry in visible(root)
                               if entry.is_dir() and Path(entry.path) not in (base, held_out))
        if held_out == base and len(entries) > 1:
            entries = hold_out(entries, split)
        # n: every so many-th file, because the first n of an ordered list would all be of the first class.
        entries = spread(entries, n)
        self.files = [(file, label) for file, label, _ in entries]
        self.captions = [captions for _, _, captions in entries] if captioned else None
        self.labels = torch.tensor([label for _, label in self.files])
        # This ends at the first picture that can be read.
        if all(self.read(i, center_crop) is None for i in range(len(self.files))):
            raise InputError(f"none of the {len(self.files)} pictures in {root} can be read (the first is "
                             f"{self.files[0][0].name}): are they whole, and of a format that Pillow knows?")

    def find_files(self, base, source):
        """(file, class id, captions) of every picture below `source`, not yet read. base: where the training
        pictures are; their classes count. Sets class_names and unused."""
        found = Listing(source)
        self.unused, folders = found.unused, found.by_folder()
        if found.archives and folders.keys() == {""}:
            raise InputError(f"{source} holds {len(found.pictures)} pictures beside {len(found.archives)} "
                             ".tar archives: which are meant? Move the others elsewhere")
        if folders:
            self.unused.update(path.name if len(found.archives) < 4 else ".tar" for path in found.archives)
            if not self.captioned:
                self.unused["metadata.jsonl"] += found.table is not None
                return self.class_files(base, source, folders)
        entries = list(jsonl_entries(found.table) if found.table else text_entries(found) if folders else
                       tar_entries(found))
        pictures = [entry for entry in entries if entry[0]]
        # For captions an entry has to have a caption, for classes an id; an unreadable text gives None.
        files = [(file, label or 0, captions) for file, label, captions in pictures
                 if (captions if self.captioned else label is not None)]
        self.unused["without a picture"] += len(entries) - len(pictures)
        self.unused[f"without a {'caption' if self.captioned else 'class id'}"] += len(pictures) - len(files)
        self.unused["of these in another encoding than UTF-8"] += sum(found is None for *_, found in pictures)
        if found.table and folders:
            named = {file for file, _, _ in pictures}
            self.unused["pictures that the table does not name"] = len(set(found.pictures) - named)
        self.class_names = [str(i) for i in range(1 + max((label for _, label, _ in files), default=0))]
        return files

    def class_files(self, base, source, folders):
        """The pictures of class folders. folders: those of `source`, see Listing.by_folder."""
        train = folders if base == source else Listing(base).by_folder()
        self.class_names = [name for name in train if name]
        # One name may be written in two ways: Dog and dog, or with its accent as a letter of its own.
        plain = lambda name: unicodedata.normalize("NFC", name).casefold()
        number = {form(name): i for form in (plain, str) for i, name in enumerate(self.class_names)}
        if len(train.get("", ())) > sum(len(train[name]) for name in self.class_names):
            # Pictures with a few more in a sub-folder, such as thumbnails, are one class.
            self.class_names, number = [base.resolve().name], {"": 0}
        else:
            self.unused["empty class folders"] = sum(
                entry.is_dir() and entry.name not in train for entry in visible(base))
        files, strange = [], []
        for name, paths in folders.items():
            label = number.get(name, number.get(plain(name)))
            files += [(path, label, None) for path in paths if label is not None]
            strange += paths if label is None else []
        if strange:
            self.unused[f"pictures in no class folder of {base}, as {strange[0]}"] = len(strange)
        return files

    def fingerprint(self):
        """Of every file path, length and time of change: reading ImageNet's pixels would take hours."""
        stats = [file if isinstance(file, TarMember) or not file.is_file() else          # gone by now
                 (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file, _ in self.files]
        return short_hash([self.size, self.flip, self.ranges, self.captions, self.labels.tolist(), stats])

    def read(self, i, crop, *more):
        """One picture as uint8 (size, size, 3), or None if it cannot be read."""
        try:
            return crop(read_image(self.files[i][0]), self.size, *more)
        except Exception:   # Pillow's readers raise almost anything on a damaged file; no file may stop a run
            return None

    def __getitems__(self, keys):
        """A whole batch, made in a worker: each key is an index, for all fixed crops of that picture, or
        (index, seed), for one random crop. Images uint8 (B, K, 3, H, W) or (B, 3, H, W), labels (B,). What
        cannot be read is black and has the label -1.

        As one tensor a batch needs one file descriptor on its way out of the worker. One tensor per picture
        would need as many: 8 workers with 2 batches of 128 are beyond the usual limit of 1,024.
        """
        random = isinstance(keys[0], tuple)
        shape = (3, self.size, self.size) if random else (self.crops, 3, self.size, self.size)
        images = torch.zeros(len(keys), *shape, dtype=torch.uint8)
        labels = torch.full((len(keys),), -1)
        for row, key in enumerate(keys):
            i, rng = (key[0], np.random.default_rng(key)) if random else (key, None)
            crop = (random_crop, rng) if random else (fixed_crops, self.flip, self.ranges)
            pixels = self.read(i, *crop)
            if pixels is not None:
                pixels = pixels[:, ::-1] if random and self.flip and rng.random() >= 0.5 else pixels
                images[row] = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))
                labels[row] = self.files[i][1]
        return images, labels

    def loader(self, batch_sampler):
        """What a DataLoader with worker processes reads. They leave Ctrl-C to the main one: it saves before
        it ends. InputError where nothing can be read any more."""
        # A generator of its own: else every loader would take a number from the one that training uses, and
        # a resumed run would draw others than one that went through.
        workers = max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=batch_sampler, num_workers=workers, collate_fn=tuple,
            worker_init_fn=ignore_interrupts, generator=torch.Generator())
        lost, late = 0, []                                       # lost: pictures in a row
        # No signal while half of the workers are there; they are born with SIGTERM blocked.
        mask = getattr(signal, "pthread_sigmask", lambda *_: None)           # Windows has none
        with on_signals(lambda number, _: late.append(number)):
            before = mask(signal.SIG_BLOCK, {signal.SIGTERM})
            batches = iter(loader)
            mask(signal.SIG_SETMASK, before)
        for number in late:
            signal.raise_signal(number)
        for images, labels in batches:
            lost = 0 if (labels >= 0).any() else lost + len(labels)
            if lost >= min(len(self), 1000):
                raise InputError(f"{lost} pictures of {self.arguments['name']} in a row cannot be read: has "
                                 "the folder gone?")
            yield images, labels

    def batches(self, batch_size, seed, start=0, device="cpu"):
        """Endless training batches (B, 3, H, W) in [-1, 1], cropped at random the same way for the same
        (seed, step); under torchrun this process's part of each. What could not be read in the first epoch is
        told at its end."""
        # The loader takes its batches ahead of time; the second iterator is where this loop has come to.
        order, again = itertools.tee(map(my_part, batch_indices(len(self), batch_size, seed, start)))
        keys = ([(i, seed + step) for i in index.tolist()] for step, index in enumerate(order, start))
        skipped = []
        for count, (index, (images, labels)) in enumerate(zip(again, self.loader(keys)), 1):
            skipped += index[labels < 0].tolist()
            if count == max(len(self) // batch_size, 1):
                self.warn(sum(gathered(skipped), []))
            # Unreadable pictures are replaced by others of the batch, so that its size, and with it the
            # compiled step, stays the same. Without others they stay black.
            good = images[labels >= 0] if (labels >= 0).any() else images
            yield to_float(to_device(good[torch.arange(len(images)) % len(good)], device))

    def take(self, batches):
        """The pictures of each list of indices: uint8 (B, K, 3, H, W) and labels (B,). What cannot be read is
        black and has the label -1."""
        return self.loader(batches)


def ignore_interrupts(worker):
    """In a worker: Ctrl-C, a closed terminal or a kill sent to all processes is for the main one to answer.
    Only its own SIGTERM, at its exit, ends the worker: a thread asks each one who has sent it."""
    def obey():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    # The threads that pass tensors on would print a traceback when the main process ends in between.
    sys.excepthook = lambda *_: None
    for name in {"SIGINT", "SIGHUP"} & set(dir(signal)):         # Windows has no SIGHUP
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):                           # the Mac has not
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, daemon=True).start()


def load_data(name, split, size=32, n=None, data_dir=None, flip=None, ranges=(), captioned=False):
    """The data set that --data names: one of ARRAY_NAMES, a folder of pictures, a .jsonl or .tar archives.
    Tells in one line what was found and what was not used.

    captioned  only pictures with captions, and with those
    flip       with mirror images; if left out, only where there are no captions
    """
    check_split(split)
    if not all(1 <= scale <= 8 for scale in ranges):
        raise InputError("--ten-crop: a range has to be from 1, which leaves room for the crops, to 8")
    if not (isinstance(size, int) and 0 < size <= 8192 and (n is None or n > 0)):
        raise InputError(f"size {size}, n {n}: pictures have 1 to 8,192 pixels a side, n is above 0 or None")
    if name in ARRAY_NAMES:
        if ranges:
            raise InputError(f"{name} has no margin to cut: ten crops are for folders of larger pictures")
        data = ArrayData(name, split, size, n, data_dir, captioned)
    else:
        path, flip = Path(name), not captioned if flip is None else flip
        if not path.is_dir() and not (path.is_file() and path.suffix.lower() in (".jsonl", ".tar")):
            raise InputError(f"--data {name}: neither a folder, a .jsonl or .tar file, nor one of "
                             f"{', '.join(ARRAY_NAMES)}" + " (unpack it first)" * path.is_file())
        data = FolderData(path, split, size, n, flip, ranges, captioned)
    if rank_and_world()[0] == 0:
        print(data, file=sys.stderr)
    return data


# ------------------------------------------------------------------------------------------------------------
# Codes: every picture as tokens, computed once

def check_tokenizer(vq, size, name="the tokenizer"):
    """Refuse a tokenizer that cannot make codes of pictures of size x size pixels."""
    if vq.config.codebook_size > 65536:
        raise InputError(f"{name} has a codebook of {vq.config.codebook_size:,} entries: with 16 bits for a "
                         "token it may have at most 65,536")
    if size % vq.config.downsample:
        raise InputError(f"--image-size {size} is not a multiple of {vq.config.downsample}, the pixels that "
                         f"{name} makes one token of")


@torch.inference_mode()
def extract_codes(vq, vq_hash, data, folder, device, batch_size=32):
    """Fill `folder` with the tokens of a whole data set, unless they are there. Under torchrun each process
    does its share; killed at any moment, the same call goes on where it was.

    labels.npy   int64 (M,); -1: this picture could not be read, and its codes are those of a black one
    captions.json  for captioned pictures, a list of M lists of strings
    about.json   the data set, its class names, the tokenizer's hash, the numbers of the unreadable pictures
    codes.npy    uint16 (M, K, N), for np.load(..., mmap_mode="r"); named last, so with it all is complete
    """
    check_tokenizer(vq, data.size)
    folder, key = Path(folder), code_key(vq_hash, data)
    with alone(folder / "codes.npy", wait=True):
        if (folder / "about.json").exists():
            if read_about(folder)["key"] != key:
                raise InputError(f"{folder} holds the codes of other pictures or of another tokenizer: "
                                 "choose another folder, or delete it")
            if (folder / "codes.npy").exists():
                return
        fill_codes(vq, vq_hash, data, folder, key, device, batch_size)


def fill_codes(vq, vq_hash, data, folder, key, device, batch_size):
    """The work of extract_codes."""
    N = (data.size // vq.config.downsample) ** 2
    codes = SharedArray(folder / "codes.npy", (len(data), data.crops, N), np.uint16, key)
    batches = [codes.mine[i:i + batch_size].tolist() for i in range(0, len(codes.mine), batch_size)]
    with tqdm(total=len(codes.mine), desc="tokenizing", unit=" images") as bar:
        for batch, (images, labels) in zip(batches, data.take(batches)):                 # (B, K, 3, H, W)
            tokens = tokenize_in_passes(vq, images.flatten(0, 1), device)                # (B K, N)
            codes.rows[batch] = tokens.unflatten(0, images.shape[:2]).cpu().numpy()      # (B, K, N)
            codes.done[batch] = np.where(labels.numpy() < 0, codes.SKIPPED, codes.DONE)
            bar.update(len(batch))
    wait_for_all()
    if rank_and_world()[0] == 0:
        skipped = np.flatnonzero(codes.done == codes.SKIPPED)
        data.warn(skipped)
        labels = data.labels.numpy().copy()
        labels[skipped] = -1
        # Codes from before that nothing tells about would pass for these ones if all ended here.
        (folder / "codes.npy").unlink(missing_ok=True)
        about = dict(key=key, vq_hash=vq_hash, data=data.arguments, class_names=data.class_names,
                     identity=data.identity(), skipped=skipped.tolist())
        with whole_file(folder / "labels.npy") as partial:
            np.save(partial, labels)
        for name, content in (("captions.json", data.captions), ("about.json", about)):
            if content:
                with whole_file(folder / name) as partial:
                    partial.write_text(json.dumps(content), encoding="utf-8")
    codes.finish()


def code_key(vq_hash, data):
    """A name for these pictures, crops and tokenizer weights: codes with the same key are the same."""
    return short_hash([vq_hash, data.fingerprint()])


def read_about(folder):
    """What is known about the codes in a folder: see extract_codes."""
    cure = "make them with python data.py extract"
    with explained(f"{folder} holds no complete codes", cure, (OSError, ValueError)):
        about = json.loads((Path(folder) / "about.json").read_text(encoding="utf-8"))
        lacking = {"key", "vq_hash", "data", "class_names", "skipped"} - dict(about).keys()
        if lacking:
            raise ValueError(f"about.json lacks {', '.join(sorted(lacking))}")
        return about


def read_codes(folder):
    """What extract_codes left: codes uint16 (M, K, N), memory-mapped, labels int64 (M,), -1 where the picture
    could not be read and the codes mean nothing, and about (a dict)."""
    about, folder = read_about(folder), Path(folder)
    with explained(f"{folder}: the codes cannot be read", "extract them again", (OSError, ValueError)):
        return np.load(folder / "codes.npy", mmap_mode="r"), np.load(folder / "labels.npy"), about


def read_captions(folder):
    """The captions of the pictures whose codes are in `folder`: a list of M lists of strings."""
    cure = "extract them from captioned pictures, with data.py extract --cond text"
    with explained(f"{folder} has codes without captions", cure, (OSError, ValueError)):
        return json.loads((Path(folder) / "captions.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------
# Pictures for people

PICTURE_NAMES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"    # how --out may end


def image_grid(images, columns, row_names=(), titles=(), scale=4, gap=2):
    """A labelled picture, ready for a PNG, of uint8 images (M, H, W, 3), row by row; row_names are written on
    the left, titles (one per image) above each."""
    M, H, W, _ = images.shape
    scale = max(1, min(scale, 512 // H))
    rows = math.ceil(M / columns)
    font = ImageFont.load_default(size=max(12, min(22, H * scale // 5)))
    # So many lines of a name fit beside a row of pictures.
    lines, ellipsis = max(1, H * scale // (font.size + 6)), "\N{HORIZONTAL ELLIPSIS}"
    wrap = textwrap.TextWrapper(24, max_lines=lines, placeholder=ellipsis).wrap
    row_names = [wrap(name) or [""] for name in row_names]
    margin = max((int(font.getlength(line)) + 16 for name in row_names for line in name), default=0)
    head = 24 if titles else 0
    cell_h, cell_w = head + H * scale + gap, W * scale + gap
    sheet = Image.new("RGB", (margin + columns * cell_w + gap, rows * cell_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(images):
        x, y = margin + gap + i % columns * cell_w, gap + i // columns * cell_h
        tile = Image.fromarray(pixels).resize((W * scale, H * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y + head))
        if titles:
            title = titles[i][:200]
            while font.getlength(title) > cell_w - 4:
                title = title[:-2].rstrip() + ellipsis
            draw.text((x + 2, y + head // 2), title, "black", font, anchor="lm")
    for row, name in enumerate(row_names):
        draw.text((8, gap + row * cell_h + H * scale // 2), "\n".join(name), "black", font, anchor="lm")
    return sheet


def save_picture(sheet, path):
    # In memory first: on a full disk Pillow writes a part of a JPEG and does not say so.
    content = io.BytesIO()
    sheet.save(content, Image.registered_extensions()[Path(path).suffix.lower()])
    with whole_file(path) as partial:
        partial.write_bytes(content.getvalue())


def check_codes(folder, vq, vq_hash, device, path, count=8):
    """Are these codes right? Draws a few source pictures above what their codes decode to, a PNG at `path`,
    and prints how the codebook is used. A wrong tokenizer, mixed-up rows or a shifted crop show at once."""
    codes, labels, about = read_codes(folder)                    # (M, K, N), (M,)
    M, K, N = codes.shape
    data, V = load_data(**about["data"]), vq.config.codebook_size
    good = np.flatnonzero(labels >= 0)
    # In blocks, and in one pass: ImageNet's codes need not fit in memory. 65,536: all that 16 bits can hold.
    blocks = np.array_split(good, math.ceil(len(good) / 10_000))
    counts = sum(np.bincount(codes[block].ravel(), minlength=65536) for block in blocks)
    if (data.size / vq.config.downsample) ** 2 != N or counts[V:].any():
        raise InputError(f"{folder} holds {N} tokens of each crop of {data.size} pixels, up to number "
                         f"{np.flatnonzero(counts).max()}. This tokenizer has {V:,} entries and makes "
                         f"one token of every {vq.config.downsample} pixels: pass the one they were made "
                         "with")
    if about["vq_hash"] != vq_hash:
        # Not an error: the grid fits, and how badly the codes of another tokenizer decode is worth seeing.
        warning(f"{folder} was made with another tokenizer than this one")
    if code_key(about["vq_hash"], data) != about["key"]:
        warning(f"the pictures of {about['data']['name']} have changed since the extraction")
    usage, perplexity = codebook_statistics(torch.from_numpy(counts[:V]))
    print(f"{M:,} pictures x {K} crops x {N} tokens, {len(about['class_names'])} classes, "
          f"{len(about['skipped'])} pictures skipped")
    print(f"{usage:.1%} of {V:,} codebook entries used; entropy {math.log2(perplexity):.2f} of at most "
          f"{math.log2(V):.2f} bits per token")
    rows = np.array(spread(good.tolist(), count))
    # Another crop of every picture shown: a crop that was cut elsewhere would show as a shift.
    crops = np.arange(len(rows)) % K
    images, _ = next(iter(data.take([rows.tolist()])))
    images = images[np.arange(len(rows)), crops]                 # (count, 3, H, W)
    tokens = torch.from_numpy(codes[rows, crops].astype(np.int64)).to(device)
    decoded = to_pictures(vq, tokens).cpu()                      # (count, H, W, 3)
    psnr = peak_signal_to_noise(images, decoded.permute(0, 3, 1, 2)).mean()
    print(f"PSNR of the {len(rows)} pictures drawn: {psnr:.2f} dB")
    both = torch.cat([images.permute(0, 2, 3, 1), decoded]).numpy()
    save_picture(image_grid(both, len(rows), ("source", "decoded")), path)


# ------------------------------------------------------------------------------------------------------------
# The command

def get_args(argv=None):
    parser = flag_parser(__file__, __doc__)
    commands = parser.add_subparsers(dest="command", parser_class=argparse.ArgumentParser)
    draw = commands.add_parser("draw", help="draw 40 pictures of the default data set (the default)")
    draw.add_argument("--out", default="out/shapes.png", help="the PNG")
    extract = commands.add_parser("extract", help="tokenize a data set once, for train_gpt.py --codes")
    add = extract.add_argument
    add("--data", required=True, help=f"{', '.join(ARRAY_NAMES)}, a folder of pictures, a .jsonl or .tar")
    add("--data-dir", help="where to look for the data set's files first")
    add("--out", required=True, help="folder of the codes; train/ and test/ are made in it")
    add("--cond", default="class", choices=("class", "text"), help="what comes with a picture")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror images too; left out: if no captions")
    add("--splits", nargs="+", default=["train", "test"], choices=["train", "test"], help="parts to tokenize")
    add("--image-size", type=counting, default=32, help="side of a crop in pixels")
    add("--ten-crop", type=positive, nargs="+", default=[], metavar="RANGE",
        help="ten crops for each RANGE (1.1 1.05), of RANGE x the size; else the centre and its mirror image")
    add("--limit", type=counting, help="only so many pictures of each split")
    add("--batch-size", type=counting, default=32, help="pictures read at a time; does not change the codes")
    check = commands.add_parser("check", help="decode a few codes beside their source pictures")
    check.add_argument("codes", help="a folder that extract wrote, such as codes/train")
    check.add_argument("--out", default="out/check.png", help="the PNG")
    for command in (extract, check):
        command.add_argument("--vq", default="out/vq.pt", help="the tokenizer")
        command.add_argument("--device", help=DEVICE_HELP)
    return parser.parse_args((sys.argv[1:] if argv is None else argv) or ["draw"])


def main(args):
    out = Path(args.out)
    if args.command != "extract":
        check_output(args.out, PICTURE_NAMES)
    if args.command == "draw":
        images, items = draw_shapes("train", 0, 40)
        save_picture(image_grid(images, columns=8), out)
        print(f"shapes   {images.shape} {images.dtype}; 40 of {SHAPES_COUNT['train']:,} for train -> {out}",
              *(item["caption"] for item in items[:4]), sep="\n         ")
        return
    device = pick_device(args.device)
    vq = load_tokenizer(args.vq, device)
    vq_hash = weights_hash(vq)
    if args.command == "check":
        check_codes(args.codes, vq, vq_hash, device, out)
        print(f"wrote {out}")
        return
    # At once, not after a million files were found.
    check_tokenizer(vq, args.image_size, args.vq)
    check_output(out / args.splits[0] / "codes.npy")
    for split in args.splits:
        data = load_data(args.data, split, args.image_size, args.limit, args.data_dir, args.flip,
                         ranges=args.ten_crop, captioned=args.cond == "text")
        extract_codes(vq, vq_hash, data, out / split, device, args.batch_size)
        codes, _, _ = read_codes(out / split)
        if rank_and_world()[0] == 0:
            print(f"{split}: codes {codes.shape} {codes.dtype}, {codes.nbytes / 1e6:,.1f} MB "
                  f"-> {out / split}")


if __name__ == "__main__":
    run(main, get_args)
