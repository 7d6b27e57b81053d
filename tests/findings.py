"""Look for the paper's findings on guidance and alpha in the tiny world.

    python tests/findings.py [--out findings] [--seeds 0 1 2] [--kimg 15]

Distils the tiny teacher once for every strategy and seed. Settings that STRATEGIES does not change
are those of the teacher's folder. Scores each generator on held-out captions, after two thirds of
the run and at its end, which shows whether the ranking still changes:

    right       share of images that are right in every attribute, as in score_tiny.py
    FD          Fréchet distance of VAE latents to those of images that the tiny world draws
    spread      standard deviation of the latents, relative to that of drawn images

Prints a table and draws OUT/findings.png. Runs and scores in OUT are kept, so an interrupted call
continues, and several processes can share the work, each with other --seeds or --only.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import spearmanr

import score_tiny                       # first, because it makes the project's modules importable
import fid
import sid_lsg
import tiny_world
import unet

KAPPAS = (1.5, 2, 3, 4.5)
TEACHER_KAPPAS = (1, *KAPPAS)
STRATEGIES = {
    'no guidance': dict(kappa=(1,)),
    **{f'LSG {kappa}': dict(kappa=(kappa,)) for kappa in KAPPAS},
    **{f'long {kappa}': dict(kappa=(1, 1, kappa)) for kappa in KAPPAS},
    'short 0.5': dict(kappa=(0.5, 1, 1)),
    'Zero-CFG': dict(kappa=(0, 0, 1), drop=0.0),
    'Anti-CFG': dict(kappa=(-0.5, -0.5, 1), drop=0.0),
    'alpha 0.5': dict(kappa=(1.5,), alpha=0.5),
    'alpha 1.2': dict(kappa=(1.5,), alpha=1.2),
    'DMD gradient': dict(kappa=(1.5,))}


def dmd_loss(x_g, x_phi, x_psi, alpha):
    """Return a loss with DMD's gradient (arXiv 2311.18828) for x_g: (x_psi - x_phi) / w.

    Unlike in sid_lsg.generator_loss, no gradient passes through the networks."""
    w = (x_g - x_phi).abs().mean((1, 2, 3), keepdim=True)
    gradient = ((x_psi - x_phi) / w).detach()
    return (x_g * gradient).sum() / len(x_g)


def score(exam, images, latents):
    """Return the numbers of the table for an image of every caption, and its latents."""
    _, real = exam.drawn(seed=5)
    right, _ = tiny_world.right(images, exam.scenes)
    distance = fid.frechet_distance(*score_tiny.moments(latents), *score_tiny.moments(real))
    spread = (latents.var(0).sum() / real.var(0).sum()).sqrt().item()
    return dict(right=right, single=score_tiny.share_of_single(images, exam.scenes), fd=distance,
                spread=spread)


def distil(exam, folder, strategy, seed, kimg):
    """Train a generator in a folder, or resume its training. Score it there and at two thirds."""
    loss = dmd_loss if strategy == 'DMD gradient' else sid_lsg.generator_loss

    def train_and_score(kimg):
        with mock.patch.object(sid_lsg, 'generator_loss', loss):
            sid_lsg.train(sid_lsg.train_config(
                resume=str(folder), seed=seed, kimg=kimg, save_kimg=kimg, **STRATEGIES[strategy]))
        return score(exam, *exam.sample(exam.generator(folder)))
    earlier = once(folder / 'earlier.json', lambda: train_and_score(kimg * 2 / 3))
    numbers = dict(train_and_score(kimg), earlier=earlier['right'])
    shutil.rmtree(folder / 'state')     # 78 MB that nothing needs now
    return numbers


def once(file, make):
    """Return the content of a JSON file, or call make() and write its result there."""
    if not file.is_file():
        content = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f'.{os.getpid()}')       # another process may write the same file
        unet.write_json(new, content)
        new.replace(file)
    return json.loads(file.read_text())


# -------------------------------------------------------------------------------------------------
# The chart. Pillow draws lines without anti-aliasing, so we draw at twice the size and shrink it.

WIDTH, HEIGHT = 1800, 1240
LEFT, TOP, RIGHT, BOTTOM = 100, 80, WIDTH - 40, HEIGHT - 110        # of the axes
COLORS = {'LSG': '#17489c', 'long': '#c0392b', 'teacher': '#777777', 'other': '#237a3b'}
LEGEND = {'LSG': 'LSG, numbers are kappa', 'long': 'long guidance, numbers are kappa',
          'teacher': 'teacher in 25 steps, numbers are kappa', 'other': 'everything else'}


def chart(points, file):
    """Draw FD against the share right; points is {name: [(right, fd) of each seed]}.

    Seeds are small dots, their medians are rings. Curves join the medians in order of kappa. Both
    axes are logarithmic, that of the share right in the share wrong."""
    sheet = Image.new('RGB', (WIDTH, HEIGHT), 'white')
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)

    def scale(right, distance):
        wrong = max(1 - right, 0.005)           # 0 would be infinitely far to the right
        return np.array([-np.log(wrong), np.log(distance)])

    scaled = [scale(*point) for seeds in points.values() for point in seeds]
    low, high = np.min(scaled, axis=0) - 0.1, np.max(scaled, axis=0) + 0.1

    def place(right, distance):
        x, y = (scale(right, distance) - low) / (high - low)
        return LEFT + x * (RIGHT - LEFT), BOTTOM - y * (BOTTOM - TOP)

    for right in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98):
        if low[0] < scale(right, 1)[0] < high[0]:
            across, _ = place(right, 1)
            pen.line([across, TOP, across, BOTTOM], '#e4e4e4', 2)
            pen.text((across, BOTTOM + 10), f'{right:.0%}', 'black', font, anchor='ma')
    for distance in (2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 300):
        if low[1] < np.log(distance) < high[1]:
            _, height = place(0.5, distance)
            pen.line([LEFT, height, RIGHT, height], '#e4e4e4', 2)
            pen.text((LEFT - 12, height), f'{distance}', 'black', font, anchor='rm')
    pen.text((WIDTH / 2, HEIGHT - 16), 'captions right', 'black', font, anchor='md')
    pen.text((20, TOP - 50), 'Frechet distance', 'black', font)     # the font has no é

    family = {name: name.split()[0] if name.split()[0] in COLORS else 'other' for name in points}
    medians = {name: place(*np.median(seeds, axis=0)) for name, seeds in points.items()}
    # What labels should not cover. A dot weighs more than a point of a curve, a ring even more.
    busy = 5 * [place(*seed) for seeds in points.values() for seed in seeds]
    busy += 20 * list(medians.values())
    for curve in ('teacher', 'long', 'LSG'):
        start = () if curve == 'teacher' else ('no guidance',)
        joined = [medians[name] for name in points if family[name] == curve or name in start]
        pen.line(joined, COLORS[curve], 4)
        for a, b in zip(joined, joined[1:]):
            busy += [tuple(point) for point in np.linspace(a, b, 50)]
    for name, seeds in points.items():
        color = COLORS[family[name]]
        for seed in seeds:
            pen.circle(place(*seed), 4, color)
        pen.circle(medians[name], 9, 'white', color, 4)
    # The legend has the corner with the fewest points.
    corners = [(left, top) for top in (TOP + 20, BOTTOM - 200) for left in (LEFT + 30, RIGHT - 560)]
    left, top = min(corners, key=lambda corner: sum(
        corner[0] - 30 < x < corner[0] + 560 and corner[1] - 20 < y < corner[1] + 200
        for x, y in busy))
    for i, (name, text) in enumerate(LEGEND.items()):
        height = top + 44 * i + 18
        if name != 'other':
            pen.line([left, height, left + 70, height], COLORS[name], 4)
        pen.circle((left + 35, height), 9, 'white', COLORS[name], 4)
        pen.text((left + 90, height), text, COLORS[name], font, anchor='lm')
    for name, at in medians.items():
        text = name if family[name] == 'other' else name.split()[-1]
        busy += label(pen, font, at, text, COLORS[family[name]], busy)
    sid_lsg.save_png(sheet.reduce(2), file)


def label(pen, font, at, text, color, busy):
    """Write a label next to a point, where it covers the fewest busy points. Return its own."""
    choices = []
    for dx, dy, anchor in ((18, 0, 'lm'), (-18, 0, 'rm'), (0, -18, 'md'), (0, 18, 'ma'),
                           (14, -10, 'ld'), (14, 10, 'la'), (-14, -10, 'rd'), (-14, 10, 'ra')):
        where = at[0] + dx, at[1] + dy
        left, top, right, bottom = pen.textbbox(where, text, font, anchor=anchor)
        covered = sum(left - 8 < x < right + 8 and top - 8 < y < bottom + 8 for x, y in busy)
        own = [(x, y) for x in np.linspace(left, right, 9) for y in (top, bottom)]
        choices.append((right > WIDTH, covered, where, anchor, own))
    *_, where, anchor, own = min(choices, key=lambda choice: choice[:2])
    pen.text(where, text, color, font, anchor, stroke_width=4, stroke_fill='white')
    return own


def cell(values, unit=''):
    """Return 'mean ± standard deviation' over seeds; a single value has no deviation."""
    deviation = f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else ''
    return f'{np.mean(values):.1f}{deviation}{unit}'


def table(rows):
    """Return the lines of the table; rows is {name: [numbers of each seed]}."""
    lines = ['| | kappa1, kappa2, kappa4 | right at 2/3 | right | FD | spread |',
             '|---|---|---|---|---|---|']
    for name, seeds in rows.items():
        kappa = STRATEGIES.get(name, {}).get('kappa', ())
        cells = [name, ', '.join(f'{k:g}' for k in (3 * kappa)[:3])]
        for number, scale, unit in (('earlier', 100, ' %'), ('right', 100, ' %'), ('fd', 1, ''),
                                    ('spread', 100, ' %')):
            values = [scale * row[number] for row in seeds if number in row]
            cells.append(cell(values, unit) if values else '')
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def make_parser(doc, out, captions, strategies):
    """Return the parser of findings.py and few_steps.py."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path(out), help='default: %(default)s')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--kimg', type=float, default=15.0,
                        help='length of each run in thousand images (default: 15)')
    parser.add_argument('--captions', type=int, default=captions,
                        help='captions for the score, on which FD depends (default: %(default)s)')
    parser.add_argument('--only', nargs='+', default=list(strategies), choices=list(strategies),
                        metavar='STRATEGY', help='such as "LSG 1.5" (default: all)')
    return parser


def make_exam(args):
    """Return the Exam, unless --out has scores of another length or of other captions."""
    settings = dict(kimg=args.kimg, captions=args.captions)
    exam = score_tiny.Exam(sid_lsg.TINY_TEACHER, args.captions)
    unet.check(once(args.out / 'settings.json', lambda: settings) == settings,
               f'{args.out} has scores of other settings (settings.json); give another --out')
    return exam


def main(arguments=None):
    args = make_parser(__doc__, 'findings', 1000, STRATEGIES).parse_args(arguments)
    with unet.user_errors('findings'):
        run(args)


def run(args):
    exam, rows = make_exam(args), {}
    for strategy in args.only:
        for seed in args.seeds:
            folder = args.out / f'{strategy.replace(" ", "-")}-{seed}'
            rows.setdefault(strategy, []).append(once(
                folder / 'score.json', lambda: distil(exam, folder, strategy, seed, args.kimg)))
    for kappa in TEACHER_KAPPAS:
        rows[f'teacher {kappa:g}'] = [once(args.out / f'teacher-{kappa:g}.json',
                                           lambda: score(exam, *exam.sample(exam.ddim(kappa))))]
    rows['drawn images'] = [score(exam, *exam.drawn(seed=6))]
    print(f'{args.kimg:g} thousand images, {args.captions} captions, seeds {args.seeds}; mean ± '
          'standard deviation over seeds', *table(rows), sep='\n')
    earlier, end = ([np.mean([row[number] for row in rows[name]]) for name in args.only]
                    for number in ('earlier', 'right'))
    if len(args.only) > 1:
        print(f'rank correlation of right at 2/3 and right: {spearmanr(earlier, end)[0]:.2f}')
    points = {name: [(row['right'], row['fd']) for row in seeds] for name, seeds in rows.items()
              if name != 'drawn images'}
    chart(points, args.out / 'findings.png')
    print(args.out / 'findings.png')


if __name__ == '__main__':
    main()
