"""The world of the tiny teacher: 64 x 64 images of one or two coloured shapes, with captions.

Place, size and rotation vary, so many images have the same caption. `read` measures, without a
trained network, what an image shows: the background and the color, shape, size and place of every
object. `judge` and `right` compare that with a caption.
"""

import functools
import math
from itertools import product

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

SIDE = 64
SHAPES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
COLORS = {'red': (220, 30, 30), 'green': (30, 160, 50), 'blue': (50, 100, 255),
          'yellow': (250, 220, 30), 'purple': (140, 40, 190), 'orange': (255, 130, 0),
          'cyan': (0, 215, 215), 'pink': (255, 120, 190)}
# White is missing because its latents lie far from all others. With it, white was involved in 126
# of the 197 errors of a generator.
BACKGROUNDS = {'black': (0, 0, 0), 'brown': (90, 50, 20), 'gray': (128, 128, 128),
               'navy': (10, 20, 90)}
ATTRIBUTES = ('background', 'count', 'place', 'size', 'color', 'shape')


# -------------------------------------------------------------------------------------------------
# Captions. A scene is (background, relation, objects). Its relation is 'small' or 'large' with one
# object, 'left of' or 'above' with two. An object is (color, shape).

@functools.cache
def all_scenes():
    """Return every scene: 384 with one object, 16,128 with two of different colors."""
    things = list(product(COLORS, SHAPES))
    single = [(b, size, (a,)) for b in BACKGROUNDS for size in ('small', 'large') for a in things]
    pair = [(b, r, (a, c)) for b in BACKGROUNDS for r in ('left of', 'above')
            for a in things for c in things if a[0] != c[0]]
    return single + pair


def caption(scene):
    """Return the caption of a scene."""
    background, relation, objects = scene
    first, *rest = [f'{color} {shape}' for color, shape in objects]
    what = f'{first} {relation} a {rest[0]}' if rest else f'{relation} {first}'
    return f'a {what} on a {background} background'.replace('a orange', 'an orange')


@functools.cache
def scenes_by_caption():
    return {caption(scene): scene for scene in all_scenes()}


def scene_of(text):
    """Return the scene of a caption."""
    return scenes_by_caption()[text]


def misdescribe(scene, rng, wrong=0.06, unrelated=0.02):
    """Return a scene whose caption `scene` gets: usually the scene itself, sometimes a wrong one.

    With probability `unrelated` it is a random scene. Then each attribute changes with probability
    `wrong`; two objects keep different colors.

    Captions on the web are often wrong, so Stable Diffusion learns a mixture of images that follow
    the prompt and images that do not. It needs guidance because guidance sharpens the mixture.
    Wrong captions give the tiny teacher the same need."""
    if rng.random() < unrelated:
        scene = all_scenes()[rng.integers(len(all_scenes()))]

    def other(value, values):
        left = [v for v in values if v != value]
        return left[rng.integers(len(left))] if rng.random() < wrong else value
    background, relation, objects = scene
    background = other(background, BACKGROUNDS)
    relation = other(relation, ('small', 'large') if len(objects) == 1 else ('left of', 'above'))
    objects = [(color, other(shape, SHAPES)) for color, shape in objects]
    for i, (color, shape) in enumerate(objects):
        taken = {c for c, _ in objects} - {color}
        objects[i] = (other(color, [c for c in COLORS if c not in taken]), shape)
    return background, relation, tuple(objects)


# -------------------------------------------------------------------------------------------------
# Drawing. Lengths are relative to a shape's radius, that of the circle around it. Only the tips of
# a star reach further, which makes it look as large as the other shapes.

RADIUS = {'small': (10.0, 12.0), 'large': (18.0, 22.0), 'pair': (11.0, 12.5)}       # in pixels
TURN = 10                       # degrees of rotation either way
HOLE = 0.5                      # inner radius of a ring
TIP, DENT = 1.12, 0.55          # radii of a star's corners
ARM, WIDTH = 0.95, 0.3          # length and half the width of an arm of a cross
# (radius, share of a turn) of each corner. Circles and rings have none.
CORNERS = {'square': [(1, (i + 0.5) / 4) for i in range(4)],
           'triangle': [(1, i / 3) for i in range(3)],
           'star': [(DENT if i % 2 else TIP, i / 10) for i in range(10)],
           'cross': [(math.hypot(u, v), i / 4 + math.atan2(v, u) / (2 * math.pi)) for i in range(4)
                     for u, v in ((ARM, -WIDTH), (ARM, WIDTH), (WIDTH, WIDTH))]}
AREA = {'circle': math.pi, 'square': 2.0, 'triangle': 0.75 * math.sqrt(3),
        'star': 10 * 0.5 * TIP * DENT * math.sin(math.pi / 5), 'ring': math.pi * (1 - HOLE ** 2),
        'cross': 4 * WIDTH * (2 * ARM - WIDTH)}


def draw_shape(canvas, shape, x, y, radius, turn, fill, behind):
    """Draw a shape, turned by `turn` radians, on a background of the color `behind`."""
    pen = ImageDraw.Draw(canvas)
    if shape in CORNERS:
        corners = [(radius * r, turn + 2 * math.pi * share) for r, share in CORNERS[shape]]
        pen.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for r, a in corners], fill=fill)
        return
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    if shape == 'ring':
        inner = HOLE * radius
        pen.ellipse([x - inner, y - inner, x + inner, y + inner], fill=behind)


def draw(scene, rng):
    """Draw an image (64, 64, 3) uint8. A numpy Generator varies place, size and rotation."""
    background, relation, objects = scene
    behind, k = BACKGROUNDS[background], 4      # Pillow has no anti-aliasing: draw large and shrink
    canvas = Image.new('RGB', (k * SIDE, k * SIDE), behind)
    for i, (color, shape) in enumerate(objects):
        radius = rng.uniform(*RADIUS[relation if len(objects) == 1 else 'pair'])
        turn = math.radians(rng.uniform(-TURN, TURN))
        if len(objects) == 1:
            room = SIDE / 2 - TIP * radius - 1
            x, y = rng.uniform(SIDE / 2 - room, SIDE / 2 + room, 2)
        else:                                   # two columns or rows, at least two pixels apart
            along, across = 16 + 32 * i + rng.uniform(-1.2, 1.2), rng.uniform(20, 44)
            x, y = (along, across) if relation == 'left of' else (across, along)
        draw_shape(canvas, shape, k * x, k * y, k * radius, turn, COLORS[color], behind)
    return np.asarray(canvas.reduce(k))


def pictures(scenes, seed):
    """Draw images (N, 64, 64, 3) uint8, one per scene. Image i depends only on (seed, i)."""
    return np.stack([draw(scene, np.random.default_rng((seed, i)))
                     for i, scene in enumerate(scenes)])


# -------------------------------------------------------------------------------------------------
# The judge

FRAME = 1.75        # half the side of the frame to compare shapes in; a disc of equal area has 1
GRID = 32           # samples along that side
MATCH = 0.65        # least intersection over union with a template; drawn shapes reach 0.82
SPECK = 12.0        # anything of fewer pixels is no object


def framed(alpha):
    """Resample a coverage map (H, W) in [0, 1] to (GRID, GRID), centred and of standard area.

    Also returns its center (y, x)."""
    mass = alpha.sum()
    rows, columns = np.indices(alpha.shape)
    center = np.array([(alpha * rows).sum(), (alpha * columns).sum()]) / mass
    step = 2 * FRAME * math.sqrt(mass / math.pi) / GRID
    corner = center - step * (GRID - 1) / 2
    return ndimage.affine_transform(alpha, [step, step], corner, (GRID, GRID), order=1), center


@functools.cache
def templates(shape):
    """Return (turns, GRID, GRID), the shape drawn at several turns."""
    drawn = []
    for turn in np.radians(range(-TURN, TURN + 1, 5)):
        canvas = Image.new('L', (256, 256))
        draw_shape(canvas, shape, 127.5, 127.5, 100, turn, 255, 0)
        drawn.append(framed(np.asarray(canvas) / 255.0)[0])
    return np.stack(drawn)


def nearest(rgb, palette):
    return min(palette, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, palette[name])))


def read(image):
    """Return what an image (64, 64, 3) uint8 shows: (background, [object, ...]).

    An object is a dict of color, shape ('?' where no shape fits), radius, x, y."""
    image = image.astype(np.float64)
    frame = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3),
                            image[:, :2].reshape(-1, 3), image[:, -2:].reshape(-1, 3)])
    behind = np.median(frame, axis=0)
    distance = np.linalg.norm(image - behind, axis=2)
    labels, count = ndimage.label(distance > 50)
    objects = []
    for k in range(1, count + 1):
        own = labels == k
        if own.sum() < SPECK:
            continue
        inside = own & (distance >= np.median(distance[own]))
        rgb = np.median(image[inside], axis=0)
        # The soft edge of this object belongs to it, that of a neighbour does not.
        reach = ndimage.binary_dilation(own, iterations=2) & ((labels == 0) | own)
        alpha = np.where(reach, np.clip(distance / np.linalg.norm(rgb - behind), 0, 1), 0)
        (patch, (y, x)), overlap = framed(alpha), {}
        for shape in SHAPES:
            drawn = templates(shape)
            both, either = np.minimum(patch, drawn), np.maximum(patch, drawn)
            overlap[shape] = (both.sum((1, 2)) / either.sum((1, 2))).max()
        shape = max(overlap, key=overlap.get)
        objects.append(dict(
            color=nearest(rgb, COLORS), shape=shape if overlap[shape] >= MATCH else '?',
            radius=math.sqrt(alpha.sum() / AREA[shape]), x=x, y=y))
    return nearest(behind, BACKGROUNDS), objects


def judge(image, scene):
    """Return {attribute: whether it is right}. A wrong count ends the judgement."""
    background, relation, wanted = scene
    found_background, found = read(image)
    result = {'background': found_background == background, 'count': len(found) == len(wanted)}
    if not result['count']:
        return result
    if len(found) == 2:
        axis = 'x' if relation == 'left of' else 'y'
        found.sort(key=lambda thing: thing[axis])
        gap = {a: abs(found[0][a] - found[1][a]) for a in 'xy'}
        result['place'] = max(gap, key=gap.get) == axis
    else:
        result['size'] = ('large' if found[0]['radius'] > 15.5 else 'small') == relation
    result['color'] = all(thing['color'] == color for thing, (color, _) in zip(found, wanted))
    result['shape'] = all(thing['shape'] == shape for thing, (_, shape) in zip(found, wanted))
    return result


def right(images, scenes):
    """Return the share of images right in every attribute, and {attribute: share where judged}."""
    judged = [judge(image, scene) for image, scene in zip(images, scenes)]
    shares = {name: float(np.mean([j[name] for j in judged if name in j] or [np.nan]))
              for name in ATTRIBUTES}
    return float(np.mean([all(j.values()) for j in judged])), shares
