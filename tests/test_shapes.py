"""pytest -q tests/test_shapes.py   Pictures are read back by the rules that they are drawn by."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import shapes
from shapes import KINDS, draw_shapes, drawn_kinds, read_pictures, render


def labels_of(items):
    return torch.tensor([list(KINDS).index(item["kind"]) for item in items])


def right(images, labels):
    """Whether each picture has the outline of its kind."""
    return drawn_kinds(images) == labels


def blurred(images, kernel=5):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(pixels, kernel, 1, kernel // 2, count_include_pad=False).permute(0, 2, 3, 1)


def one(kind, size=32, **changes):
    item = dict(kind=kind, colour="red", background="white", radius=0.37, x=0.5, y=0.5, light_angle=1.0,
                light_strength=0.1) | changes
    return render([item], size)


@pytest.mark.parametrize("size", [16, 28, 32, 64, 128])
def test_real_pictures_show_their_own_kind_at_every_size(size):
    images, items = draw_shapes("test", 0, 150, size)
    assert right(images, labels_of(items)).double().mean() >= 0.99
    assert [item["background"] for item in read_pictures(images, False)] == [i["background"] for i in items]


def test_shifts_by_whole_pixels_change_nothing():
    for kind in KINDS:
        found = [shapes.fit_outlines(shapes.see_shape(pixels, backdrop, light)[0])[0]
                 for x, y in ((0.5, 0.5), (0.40625, 0.46875), (0.5625, 0.59375))
                 for pixels, _, light, backdrop in shapes.judged(
                     one(kind, radius=0.3, x=x, y=y, light_strength=0))]
        assert torch.allclose(found[0], found[1], atol=1e-3) and torch.allclose(found[0], found[2], atol=1e-3)
        assert found[0].argmax() == list(KINDS).index(kind) and found[0].max() > 0.9


def test_blurred_pictures_fail():
    images, items = draw_shapes("test", 0, 200)
    passed = right(blurred(images), labels_of(items))
    assert passed.double().mean() < 0.3
    pointed = [list(KINDS).index(kind) for kind in ("star", "triangle", "diamond", "ring", "cross",
                                                    "crescent")]
    assert not passed[torch.isin(labels_of(items), torch.tensor(pointed))].any()


def test_blobs_shapes_with_holes_filled_holes_and_second_shapes_fail():
    def passes(kind, change):
        pixels = one(kind)
        change(pixels)
        return right(pixels, torch.tensor([list(KINDS).index(kind)])).item()
    nothing = lambda pixels: None
    red, white = one("circle")[0, 16, 16], one("circle")[0, 1, 16]
    y, x = np.mgrid[:32, :32] - 15.5
    near = lambda radius: x ** 2 + y ** 2 < radius ** 2
    assert all(passes(kind, nothing) for kind in KINDS)

    def paint(where, colour):
        return lambda pixels: pixels.__setitem__((0, where), colour)
    assert not passes("circle", paint(near(5.5), white))         # a hole
    assert not passes("star", paint(near(10), red))              # no notches
    assert not passes("cross", paint(near(11), red))
    assert not passes("heart", paint(near(11), red))
    assert not passes("ring", paint(near(7), red))               # the hole is filled
    assert not passes("crescent", paint(near(8), red))
    assert not passes("circle", paint((abs(x) > 11) & (abs(y) > 11), red))        # more shapes in the corners
    assert not passes("square", paint(x > 3, white))             # cut off


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_picture_shows_no_kind(value):
    empty = np.full((2, 32, 32, 3), value, np.uint8)
    assert drawn_kinds(empty).tolist() == [-1, -1]
    for item in read_pictures(empty, False):
        assert all(item[word] is None for word in ("kind", "colour", "size"))
    assert all(item["relation"] is None for item in read_pictures(empty, True))
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    assert drawn_kinds(noise).tolist() == [-1] * 4


def test_a_kind_is_not_taken_for_another_one():
    images, items = draw_shapes("test", 0, 300)
    found = drawn_kinds(images)
    assert (found[found >= 0] == labels_of(items)[found >= 0]).all() and (found >= 0).double().mean() >= 0.98


@pytest.mark.parametrize("size", [32, 64])
def test_scenes_of_two_are_read_back_word_by_word(size):
    items = [shapes.scene_attributes("test", i) for i in range(100)]
    for item, found in zip(items, read_pictures(render(items, size), True), strict=True):
        words = [(shape["kind"], shape["colour"]) for shape in shapes.in_reading_order(item)]
        assert [(shape["kind"], shape["colour"]) for shape in found["shapes"]] == words
        assert found["background"] == item["background"]
        assert (found["relation"] == "above") == (item["relation"] in ("above", "below"))


def test_pictures_of_one_shape_are_read_back_word_by_word():
    images, items = draw_shapes("test", 0, 200)
    for item, found in zip(items, read_pictures(images, False), strict=True):
        assert all(found[word] == item[word] for word in ("kind", "colour", "background", "size"))
