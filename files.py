"""Other people's files: what lies in a folder, and how to read a picture, a text or an archive.

    folder --Listing--> pictures, archives, a table --entries--> (file, class id, captions) of each picture
    file --read_image--> RGB picture --crops--> uint8 (size, size, 3)

Nothing that is found is left out without a word, and nothing that cannot be read ends a run.

Shapes: K crops of a picture, size x size pixels.
"""
import codecs
import functools
import io
import json
import math
import os
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from runs import InputError, explained, rank_and_world


def warning(message):
    if rank_and_world()[0] == 0:
        print(f"warning: {message}", file=sys.stderr)


def told(words, counts):
    """The words and what a Counter holds, such as "; not used: 50 .HEIC, 1 a.tar"; nothing if it is empty.
    The eight most frequent, the others as a sum; names may hold anything, such as line breaks."""
    found = [(what, count) for what, count in counts.most_common() if count > 0]
    parts = [f"{count:,} " + "".join(filter(str.isprintable, what))[:200] for what, count in found[:8]]
    parts += [f"{sum(count for _, count in found[8:]):,} others"] if found[8:] else []
    return words + ", ".join(parts) if parts else ""


# ------------------------------------------------------------------------------------------------------------
# What lies where

# Beside names with a dot in front: what Macs, archivers, Synology's disks and Windows put among the files
HIDDEN = (".", "__MACOSX", "PaxHeaders", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def hidden(name):
    """Whether a file or folder of this name is none of the user's."""
    return name.startswith(HIDDEN) and name != ".."


def visible(folder):
    """What is in a folder, in order, without hidden things."""
    return sorted((entry for entry in os.scandir(folder) if not hidden(entry.name)), key=lambda e: e.name)


def files_below(folder, above=()):
    """Every visible file below a folder, in order. Links are followed wherever they stand, but never back to
    a folder that they lie in."""
    above = (*above, os.path.realpath(folder))
    for entry in visible(folder):
        if not entry.is_dir():
            yield entry
        elif os.path.realpath(entry) not in above:
            yield from files_below(entry.path, above)


class Listing:
    """What --data names, or lies below it: pictures and archives (.tar), lists of Paths in order; the table
    of captions, a .jsonl, in a folder Hugging Face's metadata.jsonl; unused, all else, counted by ending; and
    of that texts, {path without its ending: {ending: path}}."""

    def __init__(self, root):
        self.root, self.pictures, self.archives, self.table = Path(root), [], [], None
        self.unused, self.texts = Counter(), {}
        for path in map(Path, files_below(root) if self.root.is_dir() else [root]):
            ending = path.suffix.lower()
            if not path.is_file():
                self.unused["links that lead nowhere" if path.is_symlink() else "special files"] += 1
            elif ending in image_endings():
                self.pictures.append(path)
            elif ending == ".tar":
                self.archives.append(path)
            elif path in (self.root, self.root / "metadata.jsonl"):
                self.table = path
            else:
                self.unused[path.suffix or path.name] += 1
                if ending in (".txt", ".json"):
                    self.texts.setdefault(path.with_suffix(""), {})[ending] = path

    def by_folder(self):
        """{name of a sub-folder: the pictures below it}; those that lie beside the sub-folders under ""."""
        groups, depth = {}, len(self.root.parts)
        for path in self.pictures:
            groups.setdefault(path.parts[depth] if len(path.parts) > depth + 1 else "", []).append(path)
        return groups


@functools.cache
def image_endings():
    """.jpg, .png and so on: all that this machine's Pillow can open. Of five formats it knows no more than
    the name: features.h5 is no picture."""
    known = Image.registered_extensions()                # this call fills Image.OPEN as well
    return {ending for ending, kind in known.items()
            if kind in Image.OPEN.keys() - {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}}


# Which sub-folders are the parts of a data set. One of the first kind alone could as well be a class.
TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("val", "valid", "validation", "test", "testing")


def split_folders(root):
    """(where the training pictures are, where the held-out ones are): both the root itself if it is a file or
    has no such parts."""
    entries = visible(root) if root.is_dir() else []
    folders = {entry.name.lower(): Path(entry.path) for entry in entries if entry.is_dir()}
    train, test = (next((folders[name] for name in names if name in folders), None)
                   for names in (TRAIN_NAMES, TEST_NAMES))
    alone = len(folders) == 1 and not any(Path(entry.name).suffix.lower() in image_endings()
                                          for entry in entries)
    return (train, test or train) if train and (test or alone) else (root, root)


# ------------------------------------------------------------------------------------------------------------
# Pictures

@dataclass(frozen=True)
class TarMember:
    """A file inside a .tar archive, read where it lies."""
    tar: Path
    name: str
    offset: int                          # of its first byte in the archive
    size: int                            # bytes
    changed: int                         # when the archive was last changed, in nanoseconds

    def read_bytes(self):
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:             # half a caption would pass for a whole one
            raise OSError(f"{self} ends early")
        return content

    def __str__(self):
        return f"{self.tar}/{self.name}"


TURNS = dict(enumerate(map(Image.Transpose.__getitem__, (                # {EXIF's number: what to do}
    "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90").split()), 2))


def read_image(file):
    """Any picture that Pillow reads, from a Path or a TarMember: RGB, the right way up, on white where it is
    transparent; of several frames the first."""
    # Pillow refuses twice as many pixels, 1 GB once decoded; by default 179 million, and phones have 200 now.
    Image.MAX_IMAGE_PIXELS = 2 ** 27
    image = Image.open(file if isinstance(file, Path) else io.BytesIO(file.read_bytes()))
    image.load()
    # Cameras store how they were held instead of turning the picture. ImageOps.exif_transpose would write all
    # their notes anew, and fails at any odd one; this reads one number. Damaged: the picture stays.
    with suppress(Exception):
        image = image.transpose(TURNS[image.getexif()[0x0112]])
    if image.mode.startswith(("I", "F")):
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image):
    """16- or 32-bit or float grey as "L", scaled: convert would clip it at 255. White is 65,535 for integers
    (255 for those of 32 bits that end there) and 1 for floats, whose highlights go beyond it; 255 if any is
    above 16. What exceeds 65,535 or 255 is scaled by the largest. NaN becomes black."""
    values = np.asarray(image)
    peak = values.max(where=np.isfinite(values), initial=0)
    if image.mode == "F":
        usual = 1 if peak < 16 else 255
    else:
        usual = 255 if image.mode == "I" and peak < 256 else 65535
    white = usual if usual == 1 or peak <= 1.1 * usual else peak
    # 0.001: k / 255 x 255 may come out just below k. One value may be transparent: white.
    grey = np.nan_to_num((values / np.float32(white / 255)).clip(0, 255) + 0.001).astype(np.uint8)
    return Image.fromarray(np.where(values == image.info.get("transparency"), np.uint8(255), grey))


def square(image, size, target, place):
    """Of a picture whose shorter side is made `target` pixels, a square, uint8 (size, size, 3). place: how
    many of so many spare pixels lie above it, and on its left. Halved with a box filter while possible, then
    bicubic: so ADM and the paper do it, and FID notices how pictures were made smaller."""
    while min(image.size) >= 2 * target:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = target / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    top, left = place(height - size), place(width - size)
    if max(width, height) <= 32 * target:
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        return pixels[top:top + size, left:left + size]
    # 16,000 x 1 pixels would become 4,096,000 x 256, 12 GB. So of what is longer than 32 squares only this
    # one is made. (Not of all: a box, in 32 bits, is not exact, and a pixel here and there differs by 1.)
    (W, H), x, y = image.size, image.width / width, image.height / height
    box = (left * x, top * y, min((left + size) * x, W), min((top + size) * y, H))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))


def center_crop(image, size):
    """The middle square of a picture at size x size pixels, uint8 (size, size, 3)."""
    return square(image, size, size, lambda spare: spare // 2)


def fixed_crops(image, size, flip=True, ranges=()):
    """Every version of a picture that is tokenized, uint8 (K, size, size, 3).

    ranges  for each factor r, five crops: the centre crop at r * size, of it the four corners and the middle;
            ten with flip, their mirror images too. The paper's GPTs saw ten at 1.1, or at 1.1 and 1.05.
            Without ranges: the centre crop (K = 1) and, with flip, its mirror image (K = 2).
    """
    views = []
    for scale in ranges or (1,):
        pixels = center_crop(image, int(size * scale))
        end = len(pixels) - size
        corners = [(0, 0), (0, end), (end, 0), (end, end), (round(end / 2),) * 2] if ranges else [(0, 0)]
        views += [pixels[top:top + size, left:left + size] for top, left in corners]
        if flip:
            views += [view[:, ::-1] for view in views[-len(corners):]]
    return np.stack(views)


def random_crop(image, size, rng, min_share=0.8):
    """A random square that covers between `min_share` and all of the shorter side, uint8 (size, size, 3)."""
    # The share is drawn as the side to which the whole picture is shrunk; of that a square of `size` is cut.
    target = int(rng.integers(size, math.ceil(size / min_share) + 1))
    return square(image, size, target, lambda spare: rng.integers(spare + 1))


# ------------------------------------------------------------------------------------------------------------
# Texts

def read_text(data):
    """The text in these bytes: UTF-8, or what their byte order mark says. ValueError for anything else: to
    guess the alphabet would be to train on garbage."""
    # UTF-32's first: what is UTF-32 LE begins like UTF-16 LE.
    wide = data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) and "utf-32"
    wide = wide or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and "utf-16"
    text = data.decode(wide or "utf-8")
    if "\0" in text:
        raise ValueError("it has zero bytes, as UTF-16 without a byte order mark has")
    return text.replace("\ufeff", "")            # UTF-8's mark; joined files have it in the middle, too


def text_lines(data):
    """The lines of a text in bytes. Of a str, splitlines knows more ends, such as U+2028 or a form feed:
    captions from web pages have these in the middle, so they become blanks."""
    return [" ".join(line.decode().splitlines()) for line in read_text(data).encode().splitlines()]


def caption_list(found):
    """The captions in a value of a .json: a string, a list of strings, or anything else, which is none."""
    texts = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def json_dict(text):
    """The dict that a piece of JSON holds; empty for anything else, so a bad line costs only itself."""
    record = None
    with suppress(ValueError, RecursionError):
        record = json.loads(text)
    return record if isinstance(record, dict) else {}


def json_captions(record):
    """The captions in a dict, under the names that web data sets use."""
    return caption_list(record.get("text")) or caption_list(record.get("caption"))


def captions_of(parts):
    """From .txt, a caption a line, else from .json; None if they cannot be read. parts: {ending: file}."""
    captions = []
    for ending in (".txt", ".json"):
        if parts.get(ending) and not captions:
            captions = None
            with suppress(ValueError, OSError):
                data = parts[ending].read_bytes()
                captions = (caption_list(text_lines(data)) if ending == ".txt" else
                            json_captions(json_dict(read_text(data))))
    return captions


# ------------------------------------------------------------------------------------------------------------
# Pictures with their captions

# Each of the three yields (file or None, class id or None, captions or None) per picture. What is missing is
# not left out here: find_files counts it.

def jsonl_entries(path):
    """A line is a picture. Its path is seen from the .jsonl, so that both can be moved together."""
    with explained(f"--data {path} cannot be read", "is it a text file?", OSError):
        content = path.read_bytes()
    with suppress(ValueError):           # a line that is not UTF-8 is to cost only itself, see json_dict
        content = read_text(content).encode()
    for line in filter(bytes.strip, content.splitlines()):
        record = json_dict(line)
        image = record.get("image") or record.get("file_name")           # as Hugging Face calls it
        file = path.parent / image if isinstance(image, str) else ""
        # Unlike Path's, this isfile knows any string: a data URI, thousands of letters, a zero byte.
        yield file if os.path.isfile(file) else None, 0, json_captions(record)


def text_entries(found):
    """Of a Listing: a picture's captions are in the .txt or .json of the same name, if any."""
    for file in found.pictures:
        beside = found.texts.get(file.with_suffix(""), {})
        found.unused.subtract(text.suffix for text in beside.values())
        yield file, 0, captions_of(beside)


def tar_entries(found):
    """Of a Listing: members with the same name but for its endings are one picture, as WebDataset has it."""
    samples = []
    for shard in found.archives:
        # Members may come in any order, so all are found before any is read. What a name has already begins
        # another picture: joined archives may both count from 0. newest: {name: {ending: file}}
        newest = {}
        for path, file in tar_files(shard, len(found.archives) == 1):
            folder, name = os.path.split(path)
            stem, _, ending = name.partition(".")
            ending = f".{ending.lower()}"
            if ending in newest.get((folder, stem), {ending}):
                newest[folder, stem] = {}
                samples.append(newest[folder, stem])
            newest[folder, stem][ending] = file
    classes = any(".cls" in parts for parts in samples)
    for parts in samples:
        images = [file for ending, file in parts.items() if ending in image_endings()]
        found.unused["second pictures of one name"] += len(images[1:])
        yield next(iter(images), None), class_id(parts) if classes else 0, captions_of(parts)


def tar_files(shard, alone):
    """(path, TarMember) of each visible file in an archive; only headers are read. Of a damaged one what can
    be found is used, and a warning tells; of the only one that --data names something has to be found."""
    members = []
    try:
        # ignore_zeros: joined archives go on behind the end of the first. Blocks of zeros are an end.
        with tarfile.open(shard, "r:", ignore_zeros=True) as tar, open(shard, "rb") as file:
            for member in tar:
                members.append(member)
            file.seek(-512, os.SEEK_END)
            reason = "it has no end mark" if any(file.read()) or not members else ""
    except Exception as error:           # tarfile raises almost anything on damaged headers
        reason = str(error) or type(error).__name__
    if alone and not members:
        raise InputError(f"{shard} is not a .tar archive ({reason}): if it is compressed, unpack it")
    if reason:
        warning(f"{shard} {'ends early' if members else 'is left out, it is no archive'} ({reason})")
    paths, changed = [os.path.normpath(member.name) for member in members], shard.stat().st_mtime_ns
    files = [TarMember(shard, member.name, member.offset_data, member.size, changed)
             if member.isfile() and not member.issparse() else None for member in members]
    by_path = dict(zip(paths, files))
    for path, member, file in zip(paths, members, files):
        if member.issym() or member.islnk():    # the same file again; symbolic links start where they lie
            start = os.path.dirname(path) if member.issym() else ""
            file = by_path[path] = by_path.get(os.path.normpath(os.path.join(start, member.linkname)))
        if not member.isdir() and not any(map(hidden, path.split("/"))):
            yield path, file


def class_id(parts):
    """The number in .cls; None if there is none below a million: the table of classes has to fit."""
    with suppress(KeyError, ValueError, OSError):
        text = read_text(parts[".cls"].read_bytes()).strip()
        return int(text) if text.isdecimal() and int(text) < 1_000_000 else None
