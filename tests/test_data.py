"""pytest -q tests/test_data.py"""
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.error
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import shapes
import tokenizer
from conftest import ROOT
from data import (KINDS, ArrayData, FolderData, batch_indices, center_crop, draw_shapes, extract_codes,
                  fixed_crops, load_array, load_data, random_crop, read_codes, read_idx, read_image)
from model import GPT, GPT_SIZES, GPTConfig
from notebooks import emoji
from runs import InputError, weights_hash
from shapes import in_reading_order, parse_caption, shape_attributes
from tokenizer import VQ_SIZES, VQConfig, VQModel


# shapes

def test_shapes_are_the_same_for_the_same_seed_and_index_however_they_are_asked_for():
    images, items = draw_shapes("train", 0, 30)
    again, more = draw_shapes("train", 20, 5)
    assert np.array_equal(images[20:25], again) and items[20:25] == more
    assert not np.array_equal(images, draw_shapes("train", 0, 30, seed=1)[0])


def test_train_and_test_shapes_never_overlap_and_no_two_are_equal():
    pictures = [hashlib.sha256(image.tobytes()).digest() for split, count in shapes.SHAPES_COUNT.items()
                for image in draw_shapes(split, 0, count)[0]]
    assert len(set(pictures)) == len(pictures) == 30_000


def test_load_array_gives_what_the_contract_says():
    images, labels, captions = load_array("shapes", "test", n=50)
    assert images.shape == (50, 32, 32, 3) and images.dtype == np.uint8
    assert labels.shape == (50,) and labels.dtype == np.int64
    for i, caption in enumerate(captions):
        item = shape_attributes("test", i)
        assert list(KINDS)[labels[i]] == item["kind"] == caption.split()[3]


# A picture told by hand: what it must look like and be called does not come from the code that draws it.
STAR = dict(kind="star", colour="red", background="navy", size="large", radius=0.37, x=0.5, y=0.5,
            light_angle=0.0, light_strength=0.1)
RING = dict(kind="ring", colour="orange", radius=0.2, x=0.27, y=0.5)
SQUARE = dict(kind="square", colour="blue", radius=0.2, x=0.73, y=0.5)
SCENE = dict(shapes=[RING, SQUARE], relation="left of", background="white", light_angle=0.0,
             light_strength=0.0)


def test_pixels_have_the_colours_that_the_words_say():
    star, scene = shapes.render([STAR | {"light_strength": 0.0}, SCENE], 64)       # both kinds in one call
    assert star[32, 32].tolist() == [222, 40, 44] and star[2, 2].tolist() == [20, 28, 84]
    assert scene[32, 47].tolist() == [56, 100, 236]                                # the middle of the square
    assert scene[32, 17].tolist() == scene[2, 2].tolist() == [240, 240, 238]       # the hole of the ring
    assert scene[32, 8].tolist() == [247, 140, 22]                                 # left of the hole


def test_captions_are_these_sentences_and_are_read_back():
    assert shapes.describe(STAR) == "a large red star on a navy background"
    assert shapes.describe(SCENE) == "an orange ring left of a blue square on a white background"
    assert parse_caption("a large red star on a navy background") == {
        "kind": "star", "colour": "red", "background": "navy", "size": "large"}
    scene = parse_caption("an orange ring right of a blue square on a white background")
    assert scene == {"background": "white", "relation": "right of",
                     "shapes": [{"kind": "ring", "colour": "orange"}, {"kind": "square", "colour": "blue"}]}
    assert [shape["kind"] for shape in in_reading_order(scene)] == ["square", "ring"]
    for wrong in ("a large red star", "a large mauve star on a navy background", ""):
        with pytest.raises(InputError, match="not a caption of shapes"):
            parse_caption(wrong)


def test_a_caption_names_what_its_picture_shows():
    for item in [*(shape_attributes("train", i) for i in range(300)),
                 *(shapes.scene_attributes("train", i) for i in range(300))]:
        words = parse_caption(item["caption"])
        assert words["background"] == item["background"] and words.get("size") == item.get("size")
        for said, shown in zip(words.get("shapes", [words]), item.get("shapes", [item]), strict=True):
            assert (said["kind"], said["colour"]) == (shown["kind"], shown["colour"])


def test_all_words_occur_and_shapes_stay_inside_at_any_size():
    images, items = draw_shapes("train", 0, 400, size=64)
    assert images.shape == (400, 64, 64, 3)
    for key, count in (("kind", 10), ("colour", 8), ("background", 6), ("size", 2)):
        assert len({item[key] for item in items}) == count
    for image, item in zip(images, items):
        rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(float)
        ratio = rim / np.maximum(shapes.BACKGROUNDS[item["background"]], 1)
        assert ratio.max() < 1.6, item               # background times light: nothing of the shape is cut off


def test_edges_are_antialiased():
    mask = shapes.shape_mask(shape_attributes("train", 3), 32)
    assert ((mask > 0) & (mask < 255)).any() and (mask == 255).any()


@pytest.mark.parametrize("angle", [0.0, 0.5, 2.0, 4.4])
def test_the_light_comes_from_one_side(angle):
    picture, = shapes.render([STAR | {"background": "white", "light_angle": angle}], 65)
    x, y = np.meshgrid(np.linspace(-1, 1, 65), np.linspace(-1, 1, 65))
    flat = shapes.render([STAR | {"background": "white", "light_strength": 0.0}], 65)[0].astype(float)
    light = 1 + 0.1 * (x * np.cos(angle) + y * np.sin(angle))
    dark = flat * light[..., None] < 254                         # brighter pixels are clipped
    assert abs(picture - flat * light[..., None])[dark].max() <= 1.1
    # measured: the slope of the brightness of the white around the star, per unit of x and of y
    ground = (flat == (240, 240, 238)).all(-1) & (picture.max(-1) < 255)
    slope = np.linalg.lstsq(np.stack([x[ground], y[ground], np.ones(ground.sum())], 1),
                            picture[ground][:, 0] / 240, rcond=None)[0]
    assert slope == pytest.approx([0.1 * np.cos(angle), 0.1 * np.sin(angle), 1], abs=0.003)


# files

def write_idx(path, array, zipped=True):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape,
                                                      ">i4").tobytes() + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    calls = []

    def no_network(request):
        calls.append(request.full_url)
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    return calls


@pytest.mark.parametrize("place", ["dir", "dir/fashion_mnist", "cache/fashion_mnist", "debian/fashion-mnist"])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_found_zipped_or_not_and_padded_to_32(tmp_path, offline, place, zipped):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(256, size=(7, 28, 28))
    suffix = ".gz" if zipped else ""
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", images, zipped)
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", np.arange(7), zipped)
    out, labels, captions = load_array("fashion_mnist", "test", n=5, data_dir=tmp_path / "dir")
    assert out.shape == (5, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3, 4] and captions is None
    assert np.array_equal(out[:, 2:30, 2:30, 1], images[:5]) and out[:, :2].max() == 0
    assert not offline


def test_without_network_one_line_says_which_file_to_put_where(tmp_path, offline):
    with pytest.raises(InputError) as error:
        load_array("mnist", "train")
    message = str(error.value)
    assert "\n" not in message and "train-images-idx3-ubyte.gz" in message
    assert str(tmp_path / "cache" / "mnist") in message
    assert len(offline) == 1 and not list((tmp_path / "cache" / "mnist").iterdir())


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_download_is_checked_and_only_then_kept(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    digest = hashlib.new(kind, b"some bytes").hexdigest()
    checksum, name = (digest, "x.gz") if kind == "md5" else (digest[:8], f"x-{digest[:8]}.pth")
    (tmp_path / name).write_bytes(b"some bytes")
    monkeypatch.setitem(data.PUBLIC_FILES, ("mnist", name), (tmp_path.as_uri() + "/", checksum))
    assert data.find_file("mnist", name).read_bytes() == b"some bytes"
    (tmp_path / "cache" / "mnist" / name).unlink()
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(InputError, match="checksum"):
        data.find_file("mnist", name)
    assert not list((tmp_path / "cache" / "mnist").iterdir())


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x01", b"\0\0\x08\x01\0\0\0\x09abc", b"\x1f\x8bnot gzip",
                                     b"<html>"])
def test_a_damaged_idx_file_is_told_in_one_line(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match="fetch it again"):
        read_idx(tmp_path / "x")


@pytest.mark.parametrize("unpacked", [True, False])
def test_cifar10_is_read_from_its_binary_archive(tmp_path, offline, unpacked):
    rng = np.random.default_rng(0)
    records = rng.integers(256, size=(5, 4, 3073)).astype(np.uint8)
    records[:, :, 0] %= 10
    files = {f"cifar-10-batches-bin/data_batch_{i + 1}.bin": records[i].tobytes() for i in range(5)}
    if unpacked:
        (tmp_path / "cifar-10-batches-bin").mkdir()
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
    else:
        with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    images, labels, _ = load_array("cifar10", "train", data_dir=tmp_path)
    assert images.shape == (20, 32, 32, 3) and labels.tolist() == records[:, :, 0].ravel().tolist()
    assert images[6, 2, 3].tolist() == [records[1, 2, 1 + c * 1024 + 2 * 32 + 3] for c in range(3)]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    if not unpacked:
        with pytest.raises(InputError, match="binary archive"):
            load_array("cifar10", "train", data_dir=tmp_path)


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(InputError, match="neither a folder"):
        load_data("no-such-thing", "train")
    with pytest.raises(InputError, match="unknown data set"):
        load_array("imagenet")
    with pytest.raises(InputError, match="32x32"):
        load_array("mnist", size=64)


# pictures on disk

def test_every_mode_becomes_rgb_the_right_way_up(tmp_path):
    grey = np.linspace(0, 255, 16 * 8).reshape(16, 8).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.gif")
    Image.new("CMYK", (8, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    transparent = Image.new("RGBA", (8, 16), (255, 0, 0, 0))
    transparent.putpixel((0, 0), (255, 0, 0, 255))
    transparent.save(tmp_path / "rgba.png")
    turned = Image.fromarray(grey)
    exif = turned.getexif()
    exif[0x0112] = 6                                         # the camera was held upright: turn by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    read = lambda name: np.asarray(read_image(tmp_path / name))
    for name in ("grey.png", "grey16.png", "palette.gif"):
        assert read(name).shape == (16, 8, 3) and np.array_equal(read(name)[..., 0], grey), name
    assert abs(read("cmyk.jpg")[4, 4].astype(int) - (255, 0, 0)).max() < 12
    assert read("rgba.png")[0, 0].tolist() == [255, 0, 0]
    assert read("rgba.png")[5, 5].tolist() == [255, 255, 255]
    assert np.array_equal(read("turned.png")[..., 0], np.rot90(grey, -1))


@pytest.mark.parametrize("width, height", [(32, 32), (33, 47), (300, 64), (20, 90), (5, 5), (64, 1)])
def test_crops_have_the_asked_size_for_any_picture(width, height):
    image = Image.new("RGB", (width, height), (10, 20, 30))
    rng = np.random.default_rng(0)
    for crop in (center_crop(image, 32), *(random_crop(image, 32, rng) for _ in range(5))):
        assert crop.shape == (32, 32, 3) and (crop == (10, 20, 30)).all()


def test_the_centre_crop_of_a_double_size_picture_is_its_box_average():
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3)).astype(np.uint8)
    expected = pixels.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert abs(center_crop(Image.fromarray(pixels),
                           32) - expected).max() <= 1         # Pillow rounds after each axis


def make_folder(root, count=12, classes=("cat", "dog")):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 50), (label * 200, i * 5, 0)).save(root / name / f"{i:02d}.png")


def test_a_folder_has_its_classes_in_order_and_holds_out_a_part(tmp_path):
    make_folder(tmp_path, count=30)
    train, test = (FolderData(tmp_path, split) for split in ("train", "test"))
    assert train.class_names == ["cat", "dog"] and (len(train), len(test)) == (57, 3)
    assert not {path for path, _ in train.files} & {path for path, _ in test.files}
    assert [label for _, label in FolderData(tmp_path, "train", n=4).files] == [0, 0, 1, 1]
    images, labels = zip(*test.passes(2))
    assert torch.cat(images).shape == (3, 2, 3, 32, 32) and torch.cat(labels).tolist() == [0, 0, 1]


def test_train_and_val_folders_are_the_splits_where_they_exist(tmp_path):
    make_folder(tmp_path / "train", 5)
    make_folder(tmp_path / "val", 2, ("dog",))
    assert len(FolderData(tmp_path, "train")) == 10
    assert [label for _, label in FolderData(tmp_path, "test").files] == [1, 1]


def test_broken_files_are_skipped_counted_and_named_in_one_warning(tmp_path, capsys):
    make_folder(tmp_path)
    (tmp_path / "cat" / "05.png").write_bytes(b"no picture")
    (tmp_path / "dog" / "07.png").write_bytes((tmp_path / "dog" / "07.png").read_bytes()[:60])
    (tmp_path / "dog" / "notes.txt").write_text("not a picture, and not counted as a broken one")
    folder = FolderData(tmp_path, "train")
    labels = torch.cat([labels for _, labels in folder.passes(5)])
    assert len(labels) == len(folder) - 2
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and "2 of 22" in error and "05.png" in error and "07.png" in error
    batches = folder.batches(8, seed=0)
    assert all(next(batches).shape == (8, 3, 32, 32) for _ in range(6))


def test_a_training_run_tells_once_what_it_could_not_read(tmp_path, capsys):
    make_folder(tmp_path)
    (tmp_path / "cat" / "05.png").write_bytes(b"no picture")
    batches = FolderData(tmp_path, "train").batches(22, seed=0)  # one batch is one epoch
    for _ in range(3):
        next(batches)
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and "1 of 22" in error and "05.png" in error


def test_a_worker_hands_over_one_tensor_for_all_pictures_of_a_batch(tmp_path):
    """Each tensor from a worker needs a file descriptor: 2,048 of them, one per picture, are too many."""
    make_folder(tmp_path)
    (tmp_path / "cat" / "05.png").write_bytes(b"no picture")
    folder = FolderData(tmp_path, "train", 32)
    for keys, shape in (([4, 0, 12], (3, 2, 3, 32, 32)), ([(4, 0), (0, 0), (12, 0)], (3, 3, 32, 32))):
        images, labels = next(iter(folder.loader([keys])))
        assert images.shape == shape and labels.tolist() == [-1, 0, 1] and not images[0].any()


def test_pictures_that_belong_to_no_class_are_counted_in_one_line(tmp_path):
    make_folder(tmp_path / "train", 3)
    make_folder(tmp_path / "val", 2, ("dog", "wolf"))
    Image.new("RGB", (40, 50)).save(tmp_path / "train" / "beside.png")
    assert "not used: 1 pictures in no class folder" in str(FolderData(tmp_path, "train"))
    test = FolderData(tmp_path, "test")
    assert [label for _, label in test.files] == [1, 1]
    assert f"2 pictures in no class folder of {tmp_path / 'train'}" in str(test)


def test_empty_and_wholly_broken_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        load_data(str(tmp_path / "empty"), "train")
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "broken" / "cat" / f"{i}.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the"):
        load_data(str(tmp_path / "broken"), "train")


def test_batches_go_through_every_picture_and_a_resumed_run_sees_the_same(tmp_path):
    order = batch_indices(10, 3, seed=0)
    epoch = torch.cat([next(order) for _ in range(3)])
    assert len(set(epoch.tolist())) == 9
    following = [next(order) for _ in range(4)]
    resumed = batch_indices(10, 3, seed=0, start=3)
    assert all(torch.equal(a, next(resumed)) for a in following)
    make_folder(tmp_path)
    folder = FolderData(tmp_path, "train")
    batches = folder.batches(4, seed=0)
    seen = [next(batches) for _ in range(7)]
    assert torch.equal(next(folder.batches(4, seed=0, start=6)), seen[6])


# codes

@pytest.fixture
def vq():
    return VQModel(VQConfig(codebook_size=64, ch=32, ch_mult=(1, 2), z_channels=32)).eval()


def test_codes_are_the_tokens_and_are_computed_only_once(tmp_path, monkeypatch, vq):
    calls, tokenize = [], vq.tokenize
    monkeypatch.setattr(vq, "tokenize", lambda x: calls.append(1) or tokenize(x))
    pictures = ArrayData("shapes", "test", 32, 40)
    extract_codes(vq, "a", pictures, tmp_path / "a", "cpu")
    codes, labels, about = read_codes(tmp_path / "a")
    assert codes.dtype == np.uint16 and codes.shape == (40, 1, 256)
    assert np.array_equal(labels, pictures.labels)
    assert about["class_names"] == list(KINDS) and about["skipped"] == []
    assert np.array_equal(codes[:32, 0], tokenize(tokenizer.to_float(pictures.images[:32])).numpy())
    assert len(calls) == 2
    extract_codes(vq, "a", pictures, tmp_path / "a", "cpu")
    assert len(calls) == 2                                       # reused
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"about.json", "codes.npy", "labels.npy"}
    with pytest.raises(InputError, match="other pictures or of another tokenizer"):
        extract_codes(vq, "b", pictures, tmp_path / "a", "cpu")
    with pytest.raises(InputError, match="other pictures or of another tokenizer"):
        extract_codes(vq, "a", ArrayData("shapes", "test", 32, 39), tmp_path / "a", "cpu")


def test_codes_of_a_folder_skip_broken_files_and_keep_the_labels_in_step(tmp_path, capsys, vq):
    make_folder(tmp_path / "set", 3)
    (tmp_path / "set" / "cat" / "01.png").write_bytes(b"broken")
    folder = FolderData(tmp_path / "set", "train", 16)
    extract_codes(vq, "a", folder, tmp_path / "a", "cpu", batch_size=2)
    codes, labels, about = read_codes(tmp_path / "a")
    assert codes.shape == (5, 2, 64) and labels.tolist() == [-1, 0, 1, 1, 1] and about["skipped"] == [0]
    assert "skipped 1 of 5" in capsys.readouterr().err
    images, _ = next(folder.passes(5))
    assert np.array_equal(codes[1:], data.tokenize_in_passes(vq, images.flatten(0, 1), "cpu").view(4, 2, 64))
    with pytest.raises(InputError, match="65,536"):
        vq.config.codebook_size = 65537
        extract_codes(vq, "a", folder, tmp_path / "b", "cpu")


def test_killed_extraction_goes_on_and_batches_of_any_size_give_the_same_bytes(tmp_path, monkeypatch, vq):
    make_folder(tmp_path / "set", 30)
    (tmp_path / "set" / "cat" / "11.png").write_bytes(b"broken")
    folder = FolderData(tmp_path / "set", "train", 16, ranges=(1.1,))
    extract_codes(vq, "a", folder, tmp_path / "whole", "cpu", batch_size=57)
    tokenize, done = data.tokenize_in_passes, []

    def die_in_the_third_batch(*args):
        done.append(1)
        if len(done) % 3 == 0:
            raise RuntimeError("killed")
        return tokenize(*args)
    monkeypatch.setattr(data, "tokenize_in_passes", die_in_the_third_batch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            extract_codes(vq, "a", folder, tmp_path / "parts", "cpu", batch_size=7)
        with pytest.raises(InputError, match="no complete codes"):
            read_codes(tmp_path / "parts")
    monkeypatch.setattr(data, "tokenize_in_passes", lambda *args: done.append(2) or tokenize(*args))
    extract_codes(vq, "a", folder, tmp_path / "parts", "cpu", batch_size=7)
    assert done.count(2) == -(-(57 - 4 * 7) // 7)                # the four whole batches were not done again
    for name in ("codes.npy", "labels.npy"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    codes, labels, _ = read_codes(tmp_path / "parts")
    assert codes.shape == (57, 10, 64) and (labels < 0).sum() == 1


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("last", ["labels.npy", "about.json", "codes.npy"])
def test_killed_while_files_get_their_names_the_same_call_just_finishes(tmp_path, monkeypatch, vq, last):
    pictures = ArrayData("shapes", "test", 32, 40)
    extract_codes(vq, "a", pictures, tmp_path / "whole", "cpu")
    replace, save = Path.replace, np.save

    def die_after_naming(self, target):
        named = replace(self, target)
        if Path(target).name == last:
            raise Killed
        return named

    def die_after_saving(file, array):
        save(file, array)
        if getattr(file, "name", None) == last:
            raise Killed
    calls, tokenize = [], data.tokenize_in_passes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_after_naming)
        patch.setattr(np, "save", die_after_saving)
        with pytest.raises(Killed):
            extract_codes(vq, "a", pictures, tmp_path / "parts", "cpu")
    monkeypatch.setattr(data, "tokenize_in_passes", lambda *args: calls.append(1) or tokenize(*args))
    extract_codes(vq, "a", pictures, tmp_path / "parts", "cpu")
    assert not calls                                             # nothing was tokenized again
    for name in ("codes.npy", "labels.npy", "about.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_codes_that_nothing_tells_about_are_never_taken_for_those_of_this_call(tmp_path, monkeypatch, vq):
    pictures = ArrayData("shapes", "test", 32, 4)
    (tmp_path / "codes").mkdir()
    np.save(tmp_path / "codes" / "codes.npy", np.zeros((4, 1, 256), np.uint16))
    with monkeypatch.context() as patch:
        patch.setattr(data.SharedArray, "finish", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            extract_codes(vq, "a", pictures, tmp_path / "codes", "cpu")
    with pytest.raises(InputError, match="extract them again"):
        read_codes(tmp_path / "codes")
    extract_codes(vq, "a", pictures, tmp_path / "codes", "cpu")
    assert read_codes(tmp_path / "codes")[0].any()


def test_ten_crops_are_the_corners_and_the_middle_of_the_larger_centre_crop_and_their_mirror_images():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (52, 70, 3), np.uint8))
    big = center_crop(image, 35)                                 # int(32 * 1.1)
    views = fixed_crops(image, 32, ranges=(1.1, 1.05))
    assert views.shape == (20, 32, 32, 3)
    corners = [big[:32, :32], big[:32, 3:], big[3:, :32], big[3:, 3:], big[2:34, 2:34]]
    assert np.array_equal(views[:5], corners)
    assert np.array_equal(views[5:10], views[:5, :, ::-1])
    assert np.array_equal(views[10], center_crop(image, 33)[:32, :32])
    assert np.array_equal(fixed_crops(image, 32), [center_crop(image, 32), center_crop(image, 32)[:, ::-1]])


def test_two_processes_extract_and_sample_what_one_does(tmp_path, vq):
    make_folder(tmp_path / "set", 15)
    torch.save({"model": vq.state_dict()}, tmp_path / "vq.pt")
    gpt = GPT(GPTConfig(**GPT_SIZES["tiny"], vocab_size=64, block_size=64, num_classes=4))
    torch.save({"model": gpt.state_dict(), "config": asdict(gpt.config), "class_names": list("abcd")},
               tmp_path / "gpt.pt")
    extract = ["data.py", "extract", "--data", tmp_path / "set", "--image-size", 16, "--device", "cpu",
               "--vq", tmp_path / "vq.pt", "--splits", "train", "--out"]
    sample = ["sample.py", "--gpt", tmp_path / "gpt.pt", "--vq", tmp_path / "vq.pt", "--num-samples", 30,
              "--batch-size", 4, "--device", "cpu", "--image-size-eval", 12, "--npz"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for start, name in (([], "one"), (torchrun, "two")):
        for command, out in ((extract, tmp_path / name), (sample, tmp_path / f"{name}.npz")):
            result = subprocess.run([sys.executable, *start, *map(str, command), str(out)], cwd=ROOT,
                                    text=True, capture_output=True,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert result.returncode == 0, result.stderr[-2000:]
    for name in ("codes.npy", "labels.npy"):
        assert (tmp_path / "one/train" / name).read_bytes() == (tmp_path / "two/train" / name).read_bytes()
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert one["arr_0"].shape == (30, 12, 12, 3) and one["arr_0"].std() > 0
    assert np.array_equal(one["label"], np.arange(30) % 4) and np.array_equal(one["label"], two["label"])
    assert np.array_equal(one["arr_0"], two["arr_0"])


def test_check_measures_the_codes_draws_them_and_notices_another_tokenizer(tmp_path, capsys):
    vq = VQModel(VQConfig(**VQ_SIZES["VQ-tiny"])).eval()
    pictures = ArrayData("shapes", "test", 32, 40)
    extract_codes(vq, weights_hash(vq), pictures, tmp_path / "codes", "cpu")
    counts = torch.bincount(vq.tokenize(tokenizer.to_float(pictures.images)).flatten(), minlength=512)
    used, p = (counts > 0).float().mean(), counts[counts > 0] / counts.sum()
    data.check_codes(tmp_path / "codes", vq, weights_hash(vq), "cpu", tmp_path / "a.png")
    first = capsys.readouterr()
    assert f"{used:.1%} of 512" in first.out
    assert f"entropy {-(p * p.log2()).sum():.2f} of at most 9.00" in first.out
    assert "warning" not in first.err and Image.open(tmp_path / "a.png").width > 500
    psnr = lambda text: float(re.search(r"drawn: ([\d.]+) dB", text)[1])
    # the right pictures, decoded: what the tokenizer makes of exactly these
    rows = np.arange(0, 40, 5)
    images = pictures.images[rows]
    decoded = tokenizer.to_uint8(vq.detokenize(vq.tokenize(tokenizer.to_float(images)))).permute(0, 3, 1, 2)
    mse = (images.double() - decoded).square().mean(dim=(1, 2, 3))
    assert psnr(first.out) == pytest.approx((10 * (255 ** 2 / mse).log10()).mean().item(), abs=0.02)
    other = VQModel(VQConfig(**VQ_SIZES["VQ-tiny"])).eval()
    data.check_codes(tmp_path / "codes", other, weights_hash(other), "cpu", tmp_path / "b.png")
    assert "another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("change", [dict(codebook_size=64), dict(ch_mult=(1, 1, 2)), dict(ch_mult=(1,))])
def test_check_refuses_a_tokenizer_whose_codebook_or_grid_does_not_fit_in_one_line(tmp_path, change):
    vq = VQModel(VQConfig(codebook_size=512, ch=32, ch_mult=(1, 2), z_channels=32)).eval()
    extract_codes(vq, "a", ArrayData("shapes", "test", 32, 40), tmp_path / "codes", "cpu")
    other = VQModel(VQConfig(**{**asdict(vq.config), **change})).eval()
    with pytest.raises(InputError, match="pass the one they were made with") as error:
        data.check_codes(tmp_path / "codes", other, "b", "cpu", tmp_path / "a.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size, entries, message", [(30, 64, "multiple of 4"), (32, 65_537, "65,536")])
def test_a_tokenizer_that_cannot_make_codes_is_refused(vq, size, entries, message):
    vq.config.codebook_size, vq.config.ch_mult = entries, (1, 1, 2)
    with pytest.raises(InputError, match=message):
        data.check_tokenizer(vq, size, "vq.pt")


# captions

def test_scenes_show_two_shapes_where_their_captions_say():
    for i in range(200):
        item = shapes.scene_attributes("train", i)
        first, second = item["shapes"]
        assert (first["kind"], first["colour"]) != (second["kind"], second["colour"])
        dx, dy = first["x"] - second["x"], first["y"] - second["y"]
        distance = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[item["relation"]]
        assert distance > 0.4 and f" {item['relation']} " in item["caption"]


def test_held_out_pairs_are_a_tenth_and_never_in_the_pictures_to_train_on():
    pairs = [dict(kind=kind, colour=colour) for kind in KINDS for colour in shapes.COLOURS]
    out = [pair for pair in pairs if shapes.held_out(pair)]
    assert len(out) == 8 and len({pair["colour"] for pair in out}) == 8
    shown = lambda items: [shape for item in items for shape in item.get("shapes", [item])]
    images, seen = shapes.captioned_shapes("train", 2000)
    assert len(images) == len(seen) == 2000 and 400 < sum("shapes" in item for item in seen) < 900
    assert not any(shapes.held_out(shape) for shape in shown(seen))
    _, unseen = shapes.captioned_shapes("test", 300, seen=False)
    assert all(any(shapes.held_out(shape) for shape in item.get("shapes", [item])) for item in unseen)


def test_captioned_pictures_are_in_step_with_their_captions():
    images, items = shapes.captioned_shapes("test", 40, 64)
    for image, item in zip(images, items):
        for shape in item.get("shapes", [item]):
            # the ring and the crescent are open in their middles: look at a place 0.75 radii to the left
            x, y = (int(64 * place) for place in (shape["x"] - 0.75 * shape["radius"], shape["y"]))
            if shape["kind"] in ("circle", "ring", "crescent"):
                colour = parse_caption(item["caption"]).get("colour", shape["colour"])
                assert abs(image[y, x] / np.array(shapes.COLOURS[colour]) - 1).max() < 0.25
    assert len(images) == len(items) == 40


def make_pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(folder / name)


def test_jsonl_paths_are_relative_to_it_and_what_lacks_a_part_is_left_out_and_counted(tmp_path, capsys,
                                                                                     monkeypatch):
    make_pictures(tmp_path / "set" / "p", [f"{i}.png" for i in range(6)])
    lines = [{"image": f"p/{i}.png", "text": f"picture {i}"} for i in range(4)]
    lines += [{"image": "p/4.png", "text": ["short", " ", "a longer one"]},
              {"image": "p/none.png", "text": "x"}, {"image": "p/5.png", "text": ""}, {"image": "p/5.png"},
              {"text": "no picture"}, [1], "nonsense",
              {"image": "p/0.png", "text": "again"}]
    text = "\n".join(json.dumps(line) if line != "nonsense" else line for line in lines)
    (tmp_path / "set" / "a.jsonl").write_text(text + "\n\n")
    monkeypatch.chdir(tmp_path)
    train, test = (load_data("set/a.jsonl", split, 16, captioned=True) for split in ("train", "test"))
    assert train.captions == [["picture 1"], ["picture 2"], ["picture 3"], ["short", "a longer one"],
                              ["again"]]
    assert test.captions == [["picture 0"]] and train.crops == 1
    images, _ = next(train.passes(5))
    assert images[:, 0, 0, 0, 0].tolist() == [10, 20, 30, 40, 0]
    error = capsys.readouterr().err
    assert "5 of 6 pictures" in error
    assert "not used: 4 without a picture, 2 without a caption" in error
    assert len(load_data("set/a.jsonl", "train", 16)) == 7       # without captions asked for, pictures count


def test_a_folder_with_texts_beside_its_pictures(tmp_path):
    make_pictures(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "c.txt").write_text("three")
    assert load_data(tmp_path, "train", 16, captioned=True).captions == [["three"]]
    assert load_data(tmp_path, "test", 16, captioned=True).captions == [["one", "two"]]
    before = load_data(tmp_path, "train", 16, captioned=True).fingerprint()
    (tmp_path / "c.txt").write_text("four")
    assert load_data(tmp_path, "train", 16, captioned=True).fingerprint() != before


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def test_tar_shards_are_read_where_they_lie(tmp_path, capsys):
    make_tar(tmp_path / "0.tar", [("a/1.png", png(1)), ("a/1.txt", b"one"),
                                  ("a/1.json", b'{"caption": "no"}'),
                                  ("b/1.PNG", png(2)), ("b/1.json", b'{"text": ["two", "zwei"]}'),
                                  ("2.png", png(3)), ("2.json", b"[1]")])
    make_tar(tmp_path / "1.tar", [("3.txt", b"three"), ("3.png", png(4)), ("3.cls", b"7"), ("4.txt", b"lost"),
                                  ("5.png", b"broken"), ("5.txt", b"five")])
    train = load_data(tmp_path, "train", 16, captioned=True)
    assert train.captions == [["two", "zwei"], ["three"], ["five"]] and train.labels.tolist() == [0, 7, 0]
    assert "not used: 1 without a picture, 1 without a caption" in capsys.readouterr().err
    batches = list(train.passes(2))
    assert torch.cat([images for images, _ in batches])[:, 0, 0, 0, 0].tolist() == [2, 4]
    assert "1.tar/5.png" in capsys.readouterr().err              # counted and named as a broken one
    one = load_data(tmp_path / "1.tar", "test", 16)
    assert len(one) == 1 and one.captions is None and len(one.class_names) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"0.tar", "1.tar"}


def test_damaged_and_compressed_tars_are_told_in_one_line(tmp_path, capsys):
    make_tar(tmp_path / "a.tar", [(f"{i}.{kind}", content) for i in range(4)
                                  for kind, content in (("png", png(i)), ("txt", b"x"))])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:512 * 4 + 700])
    assert len(load_data(tmp_path / "a.tar", "test", 16, captioned=True)) == 1
    for content in (gzip.compress(whole), b"junk"):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(InputError, match="not a .tar archive"):
            load_data(tmp_path / "a.tar", "train", 16, captioned=True)


def test_data_without_captions_are_refused_when_captions_are_asked_for(tmp_path):
    make_folder(tmp_path / "set")
    with pytest.raises(InputError, match="no pictures with captions. Found: 24 without a caption"):
        load_data(tmp_path / "set", "train", captioned=True)
    with pytest.raises(InputError, match="mnist has no captions"):
        load_data("mnist", "train", captioned=True)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="no pictures with captions. Found: 1 without a picture"):
        load_data(tmp_path / "a.jsonl", "train", captioned=True)


def test_a_jsonl_loses_only_its_damaged_lines(tmp_path, capsys):
    make_pictures(tmp_path, ["a.png"])
    good = '{"image": "a.png", "text": "one\u2028two"}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b'{"image": "a.png", "text": "\xff"}\n' +
                                       2 * good)
    pictures = load_data(tmp_path / "a.jsonl", "train", 16, captioned=True)
    assert pictures.captions == [["one\u2028two"]] * 2
    assert "2 of 3 pictures" in (line := capsys.readouterr().err) and "1 without a picture" in line


def test_a_bad_shard_among_others_is_left_out(tmp_path, capsys):
    make_tar(tmp_path / "a.tar", [("1.png", png(1)), ("1.txt", b"one")])
    (tmp_path / "b.tar").write_bytes(b"")
    assert load_data(tmp_path, "train", 16, captioned=True).captions == [["one"]]
    assert "b.tar is left out" in capsys.readouterr().err


def test_other_captions_for_the_same_pictures_are_another_data_set(monkeypatch):
    before = ArrayData("shapes", "test", 16, 4, captioned=True).fingerprint()
    monkeypatch.setattr(data, "captioned_shapes", lambda *given, real=data.captioned_shapes: (
        lambda images, items: (images, [item | {"caption": "a thing"} for item in items]))(*real(*given)))
    assert ArrayData("shapes", "test", 16, 4, captioned=True).fingerprint() != before


def test_captioned_pictures_are_cropped_without_mirror_images(tmp_path):
    ramp = Image.linear_gradient("L").rotate(90)          # from dark on the left to bright on the right
    ramp.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("bright on the right")
    pictures = load_data(tmp_path, "train", 16, ranges=(1.1,), captioned=True)
    (crops, _), = pictures.passes(1)                             # (1, 5, 3, 16, 16)
    assert pictures.crops == crops.shape[1] == 5
    assert (crops[..., -1].int() > crops[..., 0].int() + 200).all()


def test_captions_stay_in_step_with_the_codes_when_pictures_are_broken(tmp_path, vq):
    make_pictures(tmp_path / "set", [f"{i}.png" for i in range(6)])
    for i in range(6):
        (tmp_path / "set" / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "set" / "3.png").write_bytes(b"broken")
    pictures = load_data(tmp_path / "set", "train", 16, captioned=True)
    extract_codes(vq, "a", pictures, tmp_path / "a", "cpu")
    assert data.read_captions(tmp_path / "a") == [[f"picture {i}"] for i in range(1, 6)]
    codes, labels, _ = read_codes(tmp_path / "a")
    assert len(codes) == 5 and labels.tolist() == [0, 0, -1, 0, 0]
    extract_codes(vq, "a", ArrayData("shapes", "test", 32, 4), tmp_path / "b", "cpu")
    with pytest.raises(InputError, match="without captions"):
        data.read_captions(tmp_path / "b")


EMOJI = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


@pytest.mark.skipif(not EMOJI.exists(), reason="needs Debian's fonts-noto-color-emoji")
def test_emoji_become_captioned_pictures(tmp_path):
    assert emoji.draw_emoji(EMOJI, tmp_path, size=16) > 1000
    assert (tmp_path / "1f600.txt").read_text() == "grinning face"
    heart = np.asarray(Image.open(tmp_path / "2764.png"), float)[8, 8]
    assert heart.argmax() == 0 and heart[0] > heart[1:].max() + 80      # red
    assert not (tmp_path / "41.png").exists()                    # letters are no emoji


def test_a_font_that_is_missing_is_told_with_where_to_get_one(tmp_path):
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        emoji.draw_emoji(tmp_path / "none.ttf", tmp_path)
