"""The drawn world: pictures of coloured shapes with captions, from nothing but a seed, and back to words.

    (seed, split, index) --shape_attributes--> words and places --render--> picture
    words --describe--> caption --parse_caption--> words

Ten kinds x eight colours x six backgrounds x two sizes, anywhere in the picture, lit from any side; for text
also scenes of two. Every picture is drawn when it is asked for, the same on every machine: no download.

Shapes: M pictures of size x size pixels.
"""
import functools
import re

import numpy as np
from PIL import Image, ImageDraw

from runs import InputError


def ngon(n, start=-90, radius=1.0, x=0.0, y=0.0):
    """The n corners of a regular polygon, (n, 2); start: degrees; -90 is up, as y grows downwards."""
    angle = np.deg2rad(start + np.arange(n) * 360 / n)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def star(points=5, inner=0.42):
    """Corners by turns on a circle of radius 1 and, half a step on, of radius `inner`."""
    return np.stack([ngon(points), ngon(points, -90 + 180 / points, inner)], axis=1).reshape(-1, 2)


def heart():
    """x = 16 sin^3 t,  y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t: the best known heart curve, 32 units
    wide; moved up by 2.5 so that its middle, and not its notch, lies where the shape is said to be."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16


def cross(arm=0.34):
    """One quarter, (-a, -1), (a, -1), (a, -a), and its three turns by 90 degrees: (x, y) -> (-y, x)."""
    quarter = np.array([(-arm, -1), (arm, -1), (arm, -arm)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Each kind is one outline, or an outline and a hole, in units of the shape's radius. The factors beside 1
# make them look equally large: what fills little of its circle, as a triangle or a star does, is enlarged.
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
# Every shape can be told from every background, under the strongest light too (17 % at the corners).
COLOURS = {"red": (222, 40, 44), "orange": (247, 140, 22), "yellow": (252, 222, 48), "green": (52, 178, 74),
           "cyan": (64, 208, 232), "blue": (56, 100, 236), "purple": (150, 64, 200), "pink": (248, 132, 190)}
BACKGROUNDS = {"black": (18, 18, 22), "white": (240, 240, 238), "gray": (122, 124, 128), "navy": (20, 28, 84),
               "brown": (92, 54, 32), "forest": (18, 72, 46)}
SIZES = {"small": 0.26, "large": 0.37}                           # radius as a share of the picture's side
SHAPES_COUNT = {"train": 20_000, "test": 10_000}
RELATIONS = ("left of", "right of", "above", "below")            # in scenes of two shapes
SCENES_COUNT = {"train": 10_000, "test": 2_000}


def shape_attributes(split, index, seed=0):
    """What picture `index` of a split shows: words and continuous parameters, from (seed, split, index)
    alone. Train and test are different streams; pictures whose words agree differ in place and light."""
    rng = np.random.default_rng((seed, ("train", "test").index(split), index))
    pick = lambda names: list(names)[rng.integers(len(names))]
    item = dict(kind=pick(KINDS), colour=pick(COLOURS), background=pick(BACKGROUNDS), size=pick(SIZES))
    item["radius"] = radius = SIZES[item["size"]]
    # As shares of the side. Corners reach out to 1.2 radii: that far from the rim nothing is cut off.
    item["x"], item["y"] = rng.uniform(1.2 * radius, 1 - 1.2 * radius, size=2)
    item["light_angle"], item["light_strength"] = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.12)
    return item | {"caption": describe(item)}


def draw_shapes(split="train", start=0, n=100, size=32, seed=0):
    """Pictures start .. start+n-1 of a split: images uint8 (n, size, size, 3), n dicts of attributes."""
    items = [shape_attributes(split, i, seed) for i in range(start, start + n)]
    return render(items, size), items


def render(items, size):
    """Draw what M items tell of, uint8 (M, size, size, 3), be it one shape each, several, or both.

    over    pixel <- pixel + alpha (colour - pixel), shape by shape; alpha: the share of the pixel it covers
    light   pixel <- pixel (1 + strength (x cos angle + y sin angle)), x and y from -1 to 1 across the picture
    """
    images = np.empty((len(items), size, size, 3), np.uint8)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    column = lambda values: np.array(values, np.float32)[:, None, None]        # (M, ...) -> (M, 1, 1, ...)
    for first in range(0, len(items), 1000):          # in blocks: the float pictures need 12 times the memory
        block = items[first:first + 1000]
        pixels = column([BACKGROUNDS[item["background"]] for item in block])   # (M, 1, 1, 3)
        shapes = [item.get("shapes", [item]) for item in block]
        for layer in range(max(map(len, shapes))):
            there = [len(drawn) > layer for drawn in shapes]                   # others keep what they have
            drawn = [own[layer] if has else own[0] for own, has in zip(shapes, there)]
            alpha = np.stack([shape_mask(shape, size) * np.uint8(has) for shape, has in zip(drawn, there)])
            colour = column([COLOURS[shape["colour"]] for shape in drawn])
            pixels = pixels + alpha[..., None] / np.float32(255) * (colour - pixels)   # (M, size, size, 3)
        angle = column([item["light_angle"] for item in block])
        strength = column([item["light_strength"] for item in block])
        light = 1 + strength * (np.cos(angle) * axis[None, None] + np.sin(angle) * axis[None, :, None])
        images[first:first + 1000] = np.clip(pixels * light[..., None] + 0.5, 0, 255)
    return images


def shape_mask(item, size, oversample=4):
    """How much of each pixel the shape covers, uint8 (size, size): drawn 4 times too large, then averaged."""
    scale = size * oversample
    canvas = Image.new("L", (scale, scale))
    for outline, fill in zip(KINDS[item["kind"]], (255, 0)):
        points = (outline * item["radius"] + (item["x"], item["y"])) * scale - 0.5
        ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=fill)
    return np.asarray(canvas.reduce(oversample))


# ------------------------------------------------------------------------------------------------------------
# For text: two shapes beside or above one another, and pairs of kind and colour that are never trained on.
# Which word belongs to which shape is what a model of captions has to learn; unseen pairs show if it did.

def scene_attributes(split, index, seed=0):
    """As shape_attributes, of two "shapes" in the caption's order; "relation": where the first one lies."""
    rng = np.random.default_rng((seed, 2 + ("train", "test").index(split), index))
    pairs = [(kind, colour) for kind in KINDS for colour in COLOURS]
    # 0.46 +- 0.04 apart and of radius 0.2, the two never touch, whichever kinds they are.
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
    return item | {"caption": describe(item)}


def held_out(shape):
    """Whether this pair of kind and colour is kept from text-conditional training: 8 of the 80, one kind of
    each colour. (3 and 10 have no common factor: 3 kind + colour = 0 mod 10 has one solution per colour.)"""
    return (3 * list(KINDS).index(shape["kind"]) + list(COLOURS).index(shape["colour"])) % 10 == 0


def spread(items, n):
    """n of the items, evenly spread over the list; all if n is None or not smaller."""
    return [items[i * len(items) // n] for i in range(n)] if n and n < len(items) else items


@functools.cache                     # it takes seconds, and a judge of captions asks for the same items again
def every_item(split, seed, singles, scenes):
    """What all pictures of a split show: those of one shape, then those of two."""
    return ([shape_attributes(split, i, seed) for i in range(singles)] +
            [scene_attributes(split, i, seed) for i in range(scenes)])


def captioned_items(split="train", n=None, seen=True, seed=0):
    """What the pictures of one, then those of two shapes show; n of them, evenly spread. seen: those without
    a held-out pair; else only those with one."""
    items = [item for item in every_item(split, seed, SHAPES_COUNT[split], SCENES_COUNT[split])
             if seen != any(map(held_out, item.get("shapes", [item])))]
    return spread(items, n)


def captioned_shapes(split="train", n=None, size=32, seen=True, seed=0):
    """Pictures for text-conditional training: images uint8 (M, size, size, 3), and their items."""
    items = captioned_items(split, n, seen, seed)
    return render(items, size), items


# ------------------------------------------------------------------------------------------------------------
# From words to captions and back

def describe(item):
    """The caption of a picture; parse_caption is its inverse."""
    if "shapes" not in item:
        return "a {size} {colour} {kind} on a {background} background".format(**item)
    article = lambda word: "an" if word[0] in "aeiou" else "a"
    first, second = (f"{article(s['colour'])} {s['colour']} {s['kind']}" for s in item["shapes"])
    return f"{first} {item['relation']} {second} on a {item['background']} background"


def in_reading_order(item):
    """The shapes of a picture: the only one, or the left or upper one first."""
    shapes = item.get("shapes", [item])
    return shapes[::-1] if item.get("relation") in ("right of", "below") else shapes


SHAPE = r"an? (?:(?P<size{0}>small|large) )?(?P<colour{0}>\w+) (?P<kind{0}>\w+)"
CAPTION = re.compile(f"{SHAPE.format(0)}(?: (?P<relation>{'|'.join(RELATIONS)}) {SHAPE.format(1)})?"
                     r" on a (?P<background>\w+) background")


def parse_caption(caption):
    """The attributes that a caption names: the inverse of `describe`."""
    match = CAPTION.fullmatch(caption)
    known = dict(kind0=KINDS, kind1=KINDS, colour0=COLOURS, colour1=COLOURS, background=BACKGROUNDS)
    if not match or any(match[name] not in (*words, None) for name, words in known.items()):
        raise InputError(f'"{caption}" is not a caption of shapes, such as "a large red star on a navy '
                         'background" or "a red circle left of a blue square on a white background"')
    first, second = ({"kind": match[f"kind{i}"], "colour": match[f"colour{i}"]} for i in (0, 1))
    item = {"background": match["background"]}
    if match["relation"]:
        return item | {"shapes": [first, second], "relation": match["relation"]}
    return item | first | {"size": match["size0"]}
