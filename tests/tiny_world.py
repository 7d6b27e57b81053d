"""The tiny teacher's world: 64 x 64 pictures of one or two coloured shapes, their captions, their judge.

Pictures are drawn with Pillow at four times the size and box-filtered down; position, size and rotation
vary, so one caption has many pictures. The judge sees nothing but pixels: `read` finds the background and
every object with its colour, shape, size and place, by measuring, with no trained weights, and `right`
compares that with the caption.
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
# No white, whose latents lie far from all others': it once made 126 of the 197 errors of a student in 1,000
# captions, a quarter of them on white.
BACKGROUNDS = {'black': (0, 0, 0), 'brown': (90, 50, 20), 'gray': (128, 128, 128), 'navy': (10, 20, 90)}
# Of a shape, in pixels: of the circle around it, but a star's points reach TIP times as far.
RADIUS = {'small': (10.0, 12.0), 'large': (18.0, 22.0), 'pair': (11.0, 12.5)}
HOLE = 0.5                      # inner radius of a ring / outer
TIP, DENT = 1.12, 0.55          # a star's corners: with these it is as large as the others, to the eye
TURN = 10                       # degrees either way


# ---------------------------------------------------------------------------------------------------
# Captions. A scene is (background, relation, objects): relation is 'small' or 'large' with one object,
# 'left of' or 'above' with two; an object is (color, shape).

@functools.cache
def all_scenes():
    """Every scene of the world: 384 with one object, 16,128 with two of different colours."""
    things = list(product(COLORS, SHAPES))
    single = [(b, size, (a,)) for b in BACKGROUNDS for size in ('small', 'large') for a in things]
    pair = [(b, r, (a, c)) for b in BACKGROUNDS for r in ('left of', 'above')
            for a in things for c in things if a[0] != c[0]]
    return single + pair


def caption(scene):
    background, relation, objects = scene
    words = [f'{color} {shape}' for color, shape in objects]
    what = f'a {relation} {words[0]}' if len(words) == 1 else f'a {words[0]} {relation} a {words[1]}'
    return f'{what} on a {background} background'.replace('a orange', 'an orange')


def scene_of(text):
    """The inverse of caption()."""
    what, background = (text.replace('an orange', 'a orange')
                        .removesuffix(' background').rsplit(' on a ', 1))
    for relation in ('left of', 'above'):
        if f' {relation} ' in what:
            parts = what.split(f' {relation} ')
            return background, relation, tuple(tuple(part.split()[1:]) for part in parts)
    _, size, color, shape = what.split()
    return background, size, ((color, shape),)


def misdescribe(scene, rng, wrong=0.06, unrelated=0.02):
    """A scene to caption `scene` with: often itself, sometimes wrong. Drawn from the numpy Generator `rng`.

    With probability `unrelated` it is a random other scene. Then each attribute is replaced by another value
    with probability `wrong`; the two objects keep different colors.

    The captions of the web are often wrong, so what Stable Diffusion learns for a prompt is a mixture of
    images that follow it and images that do not. Guidance sharpens that mixture, which is why Stable Diffusion
    needs it. Captions that are wrong in the same way give the tiny teacher the same need."""
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


# ---------------------------------------------------------------------------------------------------
# Drawing

def outline(shape, turn):
    """Corners of a shape in the unit circle, turned by `turn` radians; None for circle and ring."""
    def at(radius, steps, of):
        return (radius * math.sin(turn + 2 * math.pi * steps / of),
                -radius * math.cos(turn + 2 * math.pi * steps / of))
    if shape == 'square':
        return [at(1, i + 0.5, 4) for i in range(4)]
    if shape == 'triangle':
        return [at(1, i, 3) for i in range(3)]
    if shape == 'star':
        return [at(DENT if i % 2 else TIP, i, 10) for i in range(10)]
    if shape == 'cross':
        arm = math.atan2(0.3, 0.95)         # half the width of an arm over its length
        tip, notch = math.hypot(0.3, 0.95), math.hypot(0.3, 0.3)
        return [at(r, i / 4 + d / (2 * math.pi), 1) for i in range(4)
                for r, d in ((tip, -arm), (tip, arm), (notch, math.pi / 4))]
    return None


def draw_shape(canvas, shape, x, y, radius, turn, fill, behind):
    pen = ImageDraw.Draw(canvas)
    corners = outline(shape, turn)
    if corners:
        pen.polygon([(x + radius * u, y + radius * v) for u, v in corners], fill=fill)
        return
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    if shape == 'ring':
        inner = HOLE * radius
        pen.ellipse([x - inner, y - inner, x + inner, y + inner], fill=behind)


def draw(scene, rng):
    """One picture of the scene, uint8 (64, 64, 3); the numpy Generator `rng` varies place, size, turn."""
    background, relation, objects = scene
    behind, k = BACKGROUNDS[background], 4
    canvas = Image.new('RGB', (k * SIDE, k * SIDE), behind)
    for i, (color, shape) in enumerate(objects):
        radius = rng.uniform(*RADIUS[relation if len(objects) == 1 else 'pair'])
        turn = math.radians(rng.uniform(-TURN, TURN))
        if len(objects) == 1:
            room = SIDE / 2 - TIP * radius - 1
            x, y = rng.uniform(SIDE / 2 - room, SIDE / 2 + room, 2)
        else:                               # two columns, or two rows, two pixels apart at the least
            along, across = 16 + 32 * i + rng.uniform(-1.2, 1.2), rng.uniform(20, 44)
            x, y = (along, across) if relation == 'left of' else (across, along)
        draw_shape(canvas, shape, k * x, k * y, k * radius, turn, COLORS[color], behind)
    return np.asarray(canvas.reduce(k))


def pictures(scenes, seed):
    """(N, 64, 64, 3) uint8, one picture a scene; picture i depends on (seed, i) alone."""
    return np.stack([draw(scene, np.random.default_rng((seed, i))) for i, scene in enumerate(scenes)])


# ---------------------------------------------------------------------------------------------------
# The judge

FRAME = 1.75        # half the side of the frame for comparing shapes, in radii of a disc of equal area
GRID = 32           # its side in samples
MATCH = 0.65        # overlap (intersection over union) with the best template that a shape must reach;
                    # drawn ones reach 0.82
SPECK = 12.0        # pixels; anything smaller is no object


def framed(alpha):
    """A coverage map (H, W) in [0, 1] -> (GRID, GRID), centred on its mass and scaled to equal area."""
    mass = alpha.sum()
    rows, columns = np.indices(alpha.shape)
    center = np.array([(alpha * rows).sum(), (alpha * columns).sum()]) / mass
    step = 2 * FRAME * math.sqrt(mass / math.pi) / GRID
    return ndimage.affine_transform(
        alpha, [step, step], center - step * (GRID - 1) / 2, (GRID, GRID), order=1)


def make_templates():
    """{shape: (turns, GRID, GRID)}, each shape drawn by the same hand at turns from -TURN to TURN degrees."""
    templates = {}
    for shape in SHAPES:
        templates[shape] = []
        for turn in np.radians(range(-TURN, TURN + 1, 5)):
            canvas = Image.new('RGB', (256, 256))
            draw_shape(canvas, shape, 127.5, 127.5, 100, turn, (255, 255, 255), (0, 0, 0))
            templates[shape].append(framed(np.asarray(canvas.convert('L')) / 255.0))
        templates[shape] = np.stack(templates[shape])
    return templates


TEMPLATES = make_templates()


def nearest(rgb, palette):
    return min(palette, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, palette[name])))


def read(image):
    """What a picture (64, 64, 3) uint8 shows: (background, [object, ...]).

    An object is a dict of color, shape ('?' where no shape fits), overlap, radius, x, y."""
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
        # With its soft edge, not a neighbour's.
        reach = ndimage.binary_dilation(own, iterations=2) & ((labels == 0) | own)
        alpha = np.where(reach, np.clip(distance / np.linalg.norm(rgb - behind), 0, 1), 0)
        patch = framed(alpha)
        overlap = {shape: (np.minimum(patch, t).sum((1, 2)) / np.maximum(patch, t).sum((1, 2))).max()
                   for shape, t in TEMPLATES.items()}
        shape = max(overlap, key=overlap.get)
        rows, columns = np.indices(alpha.shape)
        objects.append(dict(color=nearest(rgb, COLORS), shape=shape if overlap[shape] >= MATCH else '?',
                            overlap=overlap[shape], radius=math.sqrt(alpha.sum() / AREA[shape]),
                            x=(alpha * columns).sum() / alpha.sum(),
                            y=(alpha * rows).sum() / alpha.sum()))
    return nearest(behind, BACKGROUNDS), objects


AREA = {'circle': math.pi, 'square': 2.0, 'triangle': 0.75 * math.sqrt(3),
        'star': 10 * 0.5 * TIP * DENT * math.sin(math.pi / 5), 'ring': math.pi * (1 - HOLE ** 2),
        'cross': 4 * 0.3 * (2 * 0.95 - 0.3)}        # of each in the unit circle


def judge(image, scene):
    """The attributes of a scene and whether the picture has each right: {name: bool}.

    A picture is right if all are."""
    background, relation, wanted = scene
    found_background, found = read(image)
    result = {'background': found_background == background, 'count': len(found) == len(wanted)}
    if not result['count']:
        return result
    if len(found) == 2:
        axis = 'x' if relation == 'left of' else 'y'
        found.sort(key=lambda thing: thing[axis])
        dx, dy = abs(found[0]['x'] - found[1]['x']), abs(found[0]['y'] - found[1]['y'])
        result['place'] = (dx > dy) if axis == 'x' else (dy > dx)
    else:
        result['size'] = ('large' if found[0]['radius'] > 15.5 else 'small') == relation
    result['color'] = all(thing['color'] == color for thing, (color, _) in zip(found, wanted))
    result['shape'] = all(thing['shape'] == shape for thing, (_, shape) in zip(found, wanted))
    return result


def right(images, scenes):
    """Share of pictures right in every attribute, and {attribute: share of those where it was judged}."""
    judged = [judge(image, scene) for image, scene in zip(images, scenes)]
    names = ('background', 'count', 'place', 'size', 'color', 'shape')
    shares = {name: float(np.mean([j[name] for j in judged if name in j] or [np.nan])) for name in names}
    return float(np.mean([all(j.values()) for j in judged])), shares
