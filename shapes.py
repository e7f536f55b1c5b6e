"""The drawn world: pictures of coloured shapes with captions, from nothing but a seed, and captions read back.

    (seed, split, index) --shape_attributes--> words and places --render--> picture, caption
    caption --parse_caption--> words

Ten kinds x eight colours x six backgrounds x two sizes, anywhere in the picture, lit from any side; for text
also scenes of two. Every picture is drawn when it is asked for, the same on every machine: no download.

Shapes: M pictures of size x size pixels.
"""
import re

import numpy as np
from PIL import Image, ImageDraw

from runs import InputError


def ngon(n, start=-90, radius=1.0, x=0.0, y=0.0):
    """The n corners of a regular polygon, (n, 2); start in degrees, -90 is straight up (y grows downwards).
    """
    angle = np.deg2rad(start + np.arange(n) * 360 / n)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def star(points=5, inner=0.42):
    return np.stack([ngon(points), ngon(points, -90 + 180 / points, inner)], axis=1).reshape(-1, 2)


def heart():
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16


def cross(arm=0.34):
    a = arm
    return np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
                     (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)])


# Each kind is one outline, or an outline and a hole, in units of the shape's radius.
KINDS = {
    "circle": [ngon(64)],
    "square": [ngon(4, -45, 1.15)],
    "triangle": [ngon(3, radius=1.15, y=0.15)],
    "diamond": [ngon(4) * (0.72, 1.1)],
    "pentagon": [ngon(5, radius=1.05)],
    "star": [star() * 1.15],
    "heart": [heart() * 1.05],
    "ring": [ngon(64), ngon(64, radius=0.5)],
    "cross": [cross()],
    "crescent": [ngon(64), ngon(64, radius=0.85, x=0.5)],
}
COLOURS = {"red": (222, 40, 44), "orange": (247, 140, 22), "yellow": (252, 222, 48), "green": (52, 178, 74),
           "cyan": (64, 208, 232), "blue": (56, 100, 236), "purple": (150, 64, 200), "pink": (248, 132, 190)}
BACKGROUNDS = {"black": (18, 18, 22), "white": (240, 240, 238), "gray": (122, 124, 128), "navy": (20, 28, 84),
               "brown": (92, 54, 32), "forest": (18, 72, 46)}
SIZES = {"small": 0.26, "large": 0.37}                           # radius as a share of the picture's side
SHAPES_COUNT = {"train": 20_000, "test": 10_000}
RELATIONS = ("left of", "right of", "above", "below")            # in scenes of two shapes
SCENES_COUNT = {"train": 10_000, "test": 2_000}


def shape_attributes(split, index, seed=0):
    """What picture `index` of a split shows: its words and its continuous parameters, from (seed, split,
    index) alone.

    The split is part of the key of the random generator, so train and test are different streams, and two
    pictures differ in position, light direction and light strength even where all their words agree.
    """
    rng = np.random.default_rng((seed, ("train", "test").index(split), index))
    pick = lambda names: list(names)[rng.integers(len(names))]
    item = dict(kind=pick(KINDS), colour=pick(COLOURS), background=pick(BACKGROUNDS), size=pick(SIZES))
    item["radius"] = radius = SIZES[item["size"]]
    item["x"], item["y"] = rng.uniform(1.2 * radius, 1 - 1.2 * radius, size=2)   # shares of the side
    item["light_angle"], item["light_strength"] = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.12)
    item["caption"] = "a {size} {colour} {kind} on a {background} background".format(**item)
    return item


def draw_shapes(split="train", start=0, n=100, size=32, seed=0):
    """Pictures start .. start+n-1 of a split: images uint8 (n, size, size, 3) and their attributes, a list of
    n dicts."""
    items = [shape_attributes(split, i, seed) for i in range(start, start + n)]
    return render(items, [items], size), items


def render(pictures, layers, size):
    """Draw M pictures, uint8 (M, size, size, 3): their backgrounds and light from `pictures`, a list of M
    dicts, and on them one shape of every layer, each a list of M dicts."""
    images = np.empty((len(pictures), size, size, 3), np.uint8)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    for first in range(0, len(images), 1000):         # in blocks: the float pictures need 12 times the memory
        rows = slice(first, first + 1000)
        column = lambda values: np.array(values, np.float32)[:, None, None]
        pixels = column([BACKGROUNDS[item["background"]] for item in pictures[rows]])
        for layer in layers:
            alpha = np.stack([shape_mask(item, size) for item in layer[rows]])[..., None] / np.float32(255)
            colour = column([COLOURS[item["colour"]] for item in layer[rows]])
            pixels = pixels + alpha * (colour - pixels)
        angle = column([item["light_angle"] for item in pictures[rows]])
        strength = column([item["light_strength"] for item in pictures[rows]])
        light = 1 + strength * (np.cos(angle) * axis[None, None] + np.sin(angle) * axis[None, :, None])
        images[rows] = np.clip(pixels * light[..., None] + 0.5, 0, 255)
    return images


def shape_mask(item, size, oversample=4):
    """How much of each pixel the shape covers, uint8 (size, size): drawn 4 times too large, then averaged."""
    canvas = Image.new("L", (size * oversample,) * 2)
    draw = ImageDraw.Draw(canvas)
    scale = size * oversample
    for outline, fill in zip(KINDS[item["kind"]], (255, 0)):
        points = (outline * item["radius"] + (item["x"], item["y"])) * scale - 0.5
        draw.polygon(points.ravel().tolist(), fill=fill)
    return np.asarray(canvas.reduce(oversample))


# For text, two shapes beside or above one another, and pairs of kind and colour that are never trained on.

def scene_attributes(split, index, seed=0):
    """What scene `index` of a split shows, as shape_attributes tells it for one shape: "shapes" are the two
    in the caption's order, "relation" is where the first one lies."""
    rng = np.random.default_rng((seed, 2 + ("train", "test").index(split), index))
    pairs = [(kind, colour) for kind in KINDS for colour in COLOURS]
    near, far = 0.27 + rng.uniform(-0.02, 0.02), 0.73 + rng.uniform(-0.02, 0.02)
    relation = RELATIONS[rng.integers(4)]
    along = (near, far) if relation in ("left of", "above") else (far, near)
    across = rng.uniform(0.35, 0.65, size=2)
    shapes = []
    for place, a, b in zip(rng.choice(len(pairs), 2, replace=False), along, across):
        x, y = (a, b) if relation in ("left of", "right of") else (b, a)
        shapes.append(dict(kind=pairs[place][0], colour=pairs[place][1], radius=0.2, x=x, y=y))
    item = dict(shapes=shapes, relation=relation, background=rng.choice(list(BACKGROUNDS)).item(),
                light_angle=rng.uniform(0, 2 * np.pi), light_strength=rng.uniform(0.03, 0.12))
    article = lambda word: "an" if word[0] in "aeiou" else "a"
    first, second = (f"{article(s['colour'])} {s['colour']} {s['kind']}" for s in shapes)
    item["caption"] = f"{first} {relation} {second} on a {item['background']} background"
    return item


def held_out(shape):
    """Whether this pair of kind and colour is kept from text-conditional training: 8 of the 80, one kind of
    each colour."""
    return (3 * list(KINDS).index(shape["kind"]) + list(COLOURS).index(shape["colour"])) % 10 == 0


def captioned_items(split="train", n=None, seen=True, seed=0):
    """What the pictures of one, then those of two shapes show, dicts with their captions. seen: those without
    a held-out pair; else only those with one. n: so many of them, evenly spread."""
    keep = lambda item: seen != any(held_out(shape) for shape in item.get("shapes", [item]))
    items = [shape_attributes(split, i, seed) for i in range(SHAPES_COUNT[split])]
    items += [scene_attributes(split, i, seed) for i in range(SCENES_COUNT[split])]
    items = [item for item in items if keep(item)]
    return [items[i * len(items) // n] for i in range(n)] if n and n < len(items) else items


def captioned_shapes(split="train", n=None, size=32, seen=True, seed=0):
    """The pictures for text-conditional training: images uint8 (M, size, size, 3) and their
    captioned_items."""
    items = captioned_items(split, n, seen, seed)
    singles, scenes = ([item for item in items if ("shapes" in item) == two] for two in (False, True))
    images = [render(singles, [singles], size)]
    images += [render(scenes, list(zip(*(item["shapes"] for item in scenes))), size)] if scenes else []
    return np.concatenate(images), singles + scenes


# ------------------------------------------------------------------------------------------------------------
# Back from captions to words

def in_reading_order(item):
    """The shapes of a picture: the only one, or the left or upper one first."""
    shapes = item.get("shapes", [item])
    return shapes[::-1] if item.get("relation") in ("right of", "below") else shapes


SHAPE = r"an? (?:(?P<size{0}>small|large) )?(?P<colour{0}>\w+) (?P<kind{0}>\w+)"
CAPTION = re.compile(f"{SHAPE.format(0)}(?: (?P<relation>{'|'.join(RELATIONS)}) {SHAPE.format(1)})?"
                     r" on a (?P<background>\w+) background")


def parse_caption(caption):
    """The attributes that a caption of `shapes` names: the inverse of its making in data.py."""
    match = CAPTION.fullmatch(caption)
    known = {"kind0": KINDS, "kind1": KINDS, "colour0": COLOURS, "colour1": COLOURS,
             "background": BACKGROUNDS}
    if not match or any(match[name] not in (*words, None) for name, words in known.items()):
        raise InputError(f'"{caption}" is not a caption of shapes, such as "a large red star on a navy '
                         'background" or "a red circle left of a blue square on a white background"')
    first, second = ({"kind": match[f"kind{i}"], "colour": match[f"colour{i}"]} for i in (0, 1))
    item = {"background": match["background"]}
    if match["relation"]:
        return item | {"shapes": [first, second], "relation": match["relation"]}
    return item | first | {"size": match["size0"]}
