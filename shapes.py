"""The drawn world: pictures of coloured shapes with captions, from nothing but a seed, and back to words.

    (seed, split, index) --shape_attributes--> words and places --render--> picture
    words --describe--> caption --parse_caption--> words
    picture --see_ground, see_shape, fit_outlines--> words: by the drawing rules, nothing is learnt

Ten kinds x eight colours x six backgrounds x two sizes, anywhere in the picture, lit from any side; for text
also scenes of two. Every picture is drawn when it is asked for, the same on every machine: no download.

Shapes: M pictures of size x size pixels; for judging, of S x S; K kinds, R radii.
"""
import functools
import re

import numpy as np
import torch
import torch.nn.functional as F
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


# ------------------------------------------------------------------------------------------------------------
# From pictures back to words, by the rules of `render` read backwards. A network that learnt to tell kinds
# forgives whatever still hints at the right one; here a shape has to be what the rules would have drawn.

JUDGED_SIDE = 32                     # larger pictures are averaged to this side: masks and times stay
RADII = np.linspace(0.17, 0.41, 25)  # from below the 0.2 of scenes to above SIZES; steps of 0.3 pixels
SHIFTS = np.arange(-2, 3) / 3        # of pixels; whole pixels are moves of the window
REACH = 2                            # a shape is looked for so many pixels around its centre of mass
TRIED = 8                            # so many of the nearest masks get their soft IoU computed
BOUND = 0.8                          # of the soft IoU: below it a shape does not count as the kind


def see_ground(pixels, rounds=5):
    """Background colour (M, 3) and light (M, S, S) of pictures, float (M, S, S, 3).

    A background under the light is a plane, c (1 + a x + b y). It is fitted to the rim, which shapes hardly
    touch, by least squares weighted with 1 / residual, which makes them least absolute deviations: what does
    touch the rim is out-voted. White is often cut off at 255, where it is no plane: such pixels hardly count.
    """
    side = pixels.shape[1]
    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    plane = torch.stack([torch.ones(side, side), x, y], dim=2)   # (S, S, 3)
    inside = slice(max(side // 16, 1), -max(side // 16, 1))
    rim = torch.ones(side, side, dtype=torch.bool)
    rim[inside, inside] = False
    x, y = plane[rim], pixels[:, rim]                            # (n, 3), (M, n, 3)
    trust = weight = (y.amax(dim=2) < 254) + 1e-3                # (M, n)
    for _ in range(rounds):
        weighted = x.T * weight[:, None]                         # (M, 3, n)
        slopes = torch.linalg.solve(weighted @ x, weighted @ y)  # (M, 3 of the plane, 3 colours)
        weight = trust / (y - x @ slopes).norm(dim=2).clamp(min=1)
    ground = slopes[:, 0]
    # One a and b for all three colours, by least squares again; the light is never stronger than 0.12.
    a_b = (slopes[:, 1:] @ ground[:, :, None])[..., 0] / ground.square().sum(dim=1, keepdim=True).clamp(min=1)
    return ground, 1 + (plane[..., 1:] @ a_b.clamp(-0.13, 0.13).T).permute(2, 0, 1)


def see_shape(pixels, backdrop, light):
    """How much of each pixel a shape covers, alpha (M, S, S), and which of COLOURS it has, (M,).

    pixel = backdrop + alpha d  =>  alpha = (pixel - backdrop).d / d.d,  d = colour - backdrop
    for the colour that leaves the least of the picture unexplained.
    """
    best = None
    for i, rgb in enumerate(COLOURS.values()):
        d = (torch.tensor(rgb) * light[..., None]).clamp(0, 255) - backdrop        # (M, S, S, 3)
        alpha = ((pixels - backdrop) * d).sum(dim=3) / d.square().sum(dim=3).clamp(min=1)
        alpha = alpha.clamp(0, 1)                                                  # (M, S, S)
        rest = (pixels - backdrop - alpha[..., None] * d).square().sum(dim=(1, 2, 3))
        best = best or (rest, alpha, torch.zeros(len(rest), dtype=torch.long))
        better = rest < best[0]
        best = (torch.where(better, rest, best[0]), torch.where(better[:, None, None], alpha, best[1]),
                torch.where(better, i, best[2]))
    return best[1:]


@functools.cache
def outline_masks(kind, side):
    """A kind as it would be drawn with its centre of mass in the middle: (R, shifts, S * S) in 0 .. 1."""
    large = shape_mask(dict(kind=kind, radius=0.25, x=0.5, y=0.5), 8 * side) * 1.0
    axis = (np.arange(8 * side) + 0.5) / (2 * side) - 2          # in units of the radius
    x, y = large.sum(axis=0) @ axis / large.sum(), large.sum(axis=1) @ axis / large.sum()
    masks = [shape_mask(dict(kind=kind, radius=r, x=0.5 + a / side - r * x, y=0.5 + b / side - r * y), side)
             for r in RADII for b in SHIFTS for a in SHIFTS]
    return torch.from_numpy(np.stack(masks)).float().view(len(RADII), -1, side * side) / 255


def fit_outlines(alpha):
    """Soft IoU of alpha (M, S, S) with each kind at its best place and size, (M, K), and that radius, (M, K).

    IoU = sum min(alpha, ideal) / sum max(alpha, ideal). Candidates are the masks that differ least in
    squares, which are one matmul for all masks. A shape that is worth anything has its centre of mass near
    the ideal one's: there the search starts, in whole pixels at all radii, then in thirds of a pixel.
    """
    (M, side, _), mass, every = alpha.shape, alpha.sum(dim=(1, 2)), torch.arange(len(alpha))
    axis, window = torch.arange(side) + 0.5, torch.arange(side + 2 * REACH)
    y, x = ((alpha.sum(dim=k) @ axis / mass.clamp(min=1)).round().long() for k in (2, 1))
    # Behind a rim of S/2 + REACH, index 0 of these windows lies S/2 + REACH before the centre of mass.
    near = F.pad(alpha, (side // 2 + REACH,) * 4)[every[:, None, None], (y[:, None] + window)[:, :, None],
                                                  (x[:, None] + window)[:, None]]
    near = near.unfold(1, side, 1).unfold(2, side, 1).reshape(M, -1, side ** 2)    # (M, places, S * S)
    ious, radii = [], []
    for kind in KINDS:
        masks = outline_masks(kind, side)                                          # (R, shifts, S * S)
        centred, masks = masks[:, masks.shape[1] // 2], masks.flatten(0, 1)
        nearest = torch.cdist(near.flatten(0, 1), centred).amin(dim=1)             # (M * places,)
        place = nearest.view(M, -1).argmin(dim=1)
        there = near[every, place]                                                 # (M, S * S)
        best = torch.cdist(there, masks).topk(TRIED, largest=False).indices        # (M, tried)
        both, either = (f(there[:, None], masks[best]).sum(dim=2) for f in (torch.minimum, torch.maximum))
        outside = mass - there.sum(dim=1)                        # of the window: none of it should be there
        iou, i = (both / (either + outside[:, None])).max(dim=1)
        ious.append(iou)
        radii.append(torch.from_numpy(RADII)[best[every, i] // len(SHIFTS) ** 2])
    return torch.stack(ious, dim=1), torch.stack(radii, dim=1)


def judged(images):
    """Pictures uint8 (M, H, W, 3) as float (m, S, S, 3), block by block, with background, light and both."""
    if min(images.shape[1:3]) < 16:
        raise InputError("shapes need pictures of at least 16 x 16 pixels to be judged")
    for block in torch.as_tensor(images).split(500):
        side = min(JUDGED_SIDE, *block.shape[1:3])
        pixels = F.adaptive_avg_pool2d(block.permute(0, 3, 1, 2).float(), side).permute(0, 2, 3, 1)
        ground, light = see_ground(pixels)
        yield pixels, ground, light, (ground[:, None, None] * light[..., None]).clamp(0, 255)


def drawn_kinds(images):
    """The kind that each picture (M, H, W, 3) of one shape shows, (M,), an index into KINDS: that of the
    highest soft IoU. -1 if this is below BOUND: nobody would call it one. (The highest, too: a circle is a
    square to 0.8, and a pentagon.)"""
    kinds = []
    for pixels, _, light, backdrop in judged(images):
        iou, kind = fit_outlines(see_shape(pixels, backdrop, light)[0])[0].max(dim=1)
        kinds.append(torch.where(iou >= BOUND, kind, -1))
    return torch.cat(kinds)


def name_shapes(pixels, backdrop, light):
    """Kind, colour and size of the only shape of each picture: M dicts. None: the kind of a blob, everything
    of a shape that is not there. The bound is BOUND for large shapes; smaller ones have less area for the
    same width of blurred edge, so 1 - IoU may grow with 1 / radius (to 0.37, where the radius is 0.2)."""
    alpha, colour = see_shape(pixels, backdrop, light)
    (iou, kind), radius = (found := fit_outlines(alpha))[0].max(dim=1), found[1]
    radius = radius[torch.arange(len(kind)), kind]
    is_kind = iou >= 1 - (1 - BOUND) * SIZES["large"] / radius
    size = (radius[:, None] - torch.tensor(list(SIZES.values()))).abs().argmin(dim=1)
    names = [dict(kind=list(KINDS)[k] if ok else None, colour=list(COLOURS)[c], size=list(SIZES)[s])
             for k, ok, c, s in zip(kind, is_kind, colour, size)]
    there = alpha.sum(dim=(1, 2)) > (pixels.shape[1] / 8) ** 2   # less than 1/64 of the picture is no shape
    return [name if ok else dict.fromkeys(name) for name, ok in zip(names, there)]


def read_pictures(images, two):
    """What pictures (M, H, W, 3) of one shape, or of two, show: M dicts in the form of parse_caption, the
    left or the upper shape first. The inverse of `render`, as far as words go."""
    items = []
    for pixels, ground, light, backdrop in judged(images):
        words = torch.tensor(list(BACKGROUNDS.values())).float()
        grounds = [list(BACKGROUNDS)[i] for i in torch.cdist(ground, words).argmin(dim=1)]
        if not two:
            items += [{"background": name, **shape} for name, shape
                      in zip(grounds, name_shapes(pixels, backdrop, light))]
            continue
        # Two shapes never touch. They lie along the axis of the larger variance: there the picture is cut, at
        # the emptiest row or column near its middle, and each part judged as a picture of one shape.
        side = pixels.shape[1]
        axis, middle = torch.arange(side), slice(round(0.42 * side), round(0.58 * side) + 1)
        drawn = (pixels - backdrop).norm(dim=3)                                    # (M, S, S)
        lines = torch.stack([drawn.sum(dim=1), drawn.sum(dim=2)])                  # (2, M, S): columns, rows
        share = lines / lines.sum(dim=2, keepdim=True).clamp(min=1)
        variance = share @ axis.float() ** 2 - (share @ axis.float()) ** 2         # (2, M)
        above = variance[1] > variance[0]
        cut = torch.where(above[:, None], lines[1], lines[0])[:, middle].argmin(dim=1) + middle.start
        along = torch.where(above[:, None, None], axis[:, None], axis)             # (M, S, S)
        first = (along < cut[:, None, None])[..., None]
        parts = [name_shapes(torch.where(part, pixels, backdrop), backdrop, light)
                 for part in (first, ~first)]
        for name, is_above, *shapes in zip(grounds, above, *parts):
            whole = all(shape["colour"] for shape in shapes)     # an empty half has no place
            relation = ("left of", "above")[is_above] if whole else None
            items.append({"background": name, "shapes": shapes, "relation": relation})
    return items
