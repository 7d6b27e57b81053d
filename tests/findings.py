"""The paper's findings on guidance and alpha, looked for in the tiny world.

    python tests/findings.py [--out findings] [--seeds 0 1 2] [--kimg 3]

Distils the tiny teacher once for every strategy and seed and scores each generator on held-out captions, as
tests/score_tiny.py does: the share of pictures right in every attribute, the Fréchet distance of VAE latents
to drawn pictures, the latents' spread beside those of drawn pictures (root of the covariances' traces), and how far
pictures of one caption lie from each other, in grey levels. All but guidance, alpha, seed and length is as the
teacher's folder has it. The teacher in 25 steps stands beside them. Prints a table and draws OUT/findings.png. What OUT has already is not made
again, so that a run cut off goes on, and several processes may each be given other seeds.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import score_tiny                       # makes the modules above this folder importable, so it comes first
import make_tiny_sd
import sid_lsg
import tiny_world
import unet

# name: kappa1, kappa2 = kappa3, kappa4, alpha. Strategies as in README.md, "Guidance strategies".
STRATEGIES = {
    'no guidance': (1, 1, 1, 1.0),
    'LSG 1.5': (1.5, 1.5, 1.5, 1.0),
    'LSG 2': (2, 2, 2, 1.0),
    'LSG 3': (3, 3, 3, 1.0),
    'LSG 4.5': (4.5, 4.5, 4.5, 1.0),
    'long 3': (1, 1, 3, 1.0),
    'short 0.5': (0.5, 1, 1, 1.0),
    'Zero-CFG': (0, 0, 1, 1.0),
    'Anti-CFG': (-0.5, -0.5, 1, 1.0),
    'alpha 0.5': (1.5, 1.5, 1.5, 0.5),
    'alpha 1.2': (1.5, 1.5, 1.5, 1.2)}
NUMBERS = ('right', 'fd', 'spread', 'diversity')
EACH = 8        # pictures of one caption, for diversity


def repeated(exam):
    """The captions that diversity is measured on, EACH times each."""
    return [text for text in exam.captions[:40] for _ in range(EACH)]


def diversity(pictures, each=EACH):
    """Mean root mean square distance, in grey levels, between pictures of one caption; `each` a caption."""
    groups = pictures.astype(np.float32).reshape(-1, each, pictures[0].size)
    return float(np.mean([np.sqrt(np.square(group[i] - group[j]).mean())
                          for group in groups for i, j in combinations(range(each), 2)]))


def spread(exam, latents):
    """Of latents (N, 4, h, w) about their mean, over that of drawn pictures' latents."""
    return float((latents.var(0).sum() / exam.real.var(0).sum()).sqrt())


def score(exam, make):
    """The NUMBERS of what make(z, context) draws."""
    latents, pictures = exam.draw(make)
    return dict(right=tiny_world.right(pictures, exam.scenes)[0], fd=exam.distance(latents),
                spread=spread(exam, latents), diversity=diversity(exam.draw(make, repeated(exam))[1]))


def once(file, make):
    """What is in a JSON file, else make(), written there."""
    if not file.is_file():
        numbers = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        sid_lsg.write_json(file, numbers)
    return json.loads(file.read_text())


def distil(exam, folder, teacher, kimg, strategy, seed):
    """Train a generator in `folder` and score it; two to three minutes on a CPU core."""
    *kappa, alpha = STRATEGIES[strategy]
    config = sid_lsg.make_config(sid_lsg.TrainConfig, dict(
        teacher=str(teacher), out=str(folder), kappa=tuple(kappa), alpha=alpha, seed=seed, kimg=kimg, grid_kimg=kimg,
        progress_samples=0))
    if not (folder / 'generator').is_dir():
        if any((folder / 'state').glob('[0-9]*')):      # of a run cut off
            config = sid_lsg.make_config(sid_lsg.TrainConfig, dict(resume=str(folder)))
        else:
            sid_lsg.remove(folder)
        sid_lsg.train(config)
    G = unet.load(folder / 'generator').to(exam.device)
    return score(exam, lambda z, c: sid_lsg.generate(G, z, c, config.t_init))


def chart(points, file):
    """Right (to the right) against Fréchet distance (upwards): every run a dot, every mean a labelled ring.

    points: {name: [(right, fd) of each seed]}. LSG's and the teacher's are joined in order of kappa."""
    wide, high, edge, scale = 720, 500, 40, 2
    sheet = Image.new('RGB', (wide * scale, high * scale), 'white')
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11 * scale)
    x, y = np.array([point for several in points.values() for point in several]).T
    # Distances span a decade or more, hence their logarithm.
    left, right, low, top = min(x) - 0.03, max(x) + 0.03, np.log(min(y)) - 0.1, np.log(max(y)) + 0.1

    def place(share, distance):
        return (scale * (edge + (share - left) / (right - left) * (wide - edge - 90)),
                scale * (high - edge - (np.log(distance) - low) / (top - low) * (high - 2 * edge)))

    def dot(at, radius, **how):
        pen.ellipse([at[0] - radius * scale, at[1] - radius * scale,
                     at[0] + radius * scale, at[1] + radius * scale], **how)

    for share in np.arange(np.ceil(left * 10), np.floor(right * 10) + 1) / 10:
        pen.line([place(share, np.exp(low)), place(share, np.exp(top))], '#e4e4e4', scale)
        pen.text(place(share, np.exp(low)), f'{share:.0%}', 'black', font, anchor='ma')
    for distance in [n for n in (2, 3, 5, 10, 20, 30, 50, 100, 200, 300) if low < np.log(n) < top]:
        pen.line([place(left, distance), place(right, distance)], '#e4e4e4', scale)
        pen.text(place(left, distance), f'{distance} ', 'black', font, anchor='rm')
    pen.text((wide * scale / 2, high * scale - 6), 'captions drawn right', 'black', font, anchor='md')
    pen.text((8, 8), 'Frechet distance of latents; lower is nearer to the world', 'black', font)
    colors = {'teacher': 'gray', 'no gui': 'navy', 'LSG': 'navy', 'alpha': 'darkgreen'}
    means = {name: place(*np.mean(several, axis=0)) for name, several in points.items()}
    for family in (('teacher',), ('no guidance', 'LSG')):
        pen.line([at for name, at in means.items() if name.startswith(family)],
                 'gray' if family == ('teacher',) else 'navy', 2 * scale)
    for name, several in points.items():
        color = next((c for start, c in colors.items() if name.startswith(start)), 'firebrick')
        for point in several if len(several) > 1 else ():
            dot(place(*point), 2, fill=color)
        dot(means[name], 4, outline=color, fill='white', width=2 * scale)
        left_of = name in ('alpha 0.5', 'alpha 1.2', 'long 3', 'Anti-CFG', 'teacher 1')      # where there is room
        side = -1 if left_of else 1
        pen.text((means[name][0] + 7 * scale * side, means[name][1]), name, color, font, anchor='lm' if side > 0 else 'rm')
    sid_lsg.save_png(sheet, file)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('findings'), help='folder for runs, scores and chart')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: %(default)s')
    parser.add_argument('--kimg', type=float, default=3.0,
                        help='length of every run in thousand images, default: %(default)s')
    parser.add_argument('--captions', type=int, default=1000,
                        help='held-out captions to score on; the Fréchet distance depends on it, default: %(default)s')
    parser.add_argument('--teacher', type=Path, default=make_tiny_sd.TINY, help='default: %(default)s')
    parser.add_argument('--kappa', type=float, nargs='*', default=[1.0, 1.5, 2.0],
                        help='the teacher\'s guidance, default: %(default)s')
    parser.add_argument('--only', nargs='+', default=list(STRATEGIES), choices=list(STRATEGIES), metavar='STRATEGY',
                        help='such as "LSG 1.5"; default: all')
    args = parser.parse_args(arguments)
    if not args.kimg > 0 or not np.isfinite(args.kappa).all():
        parser.error(f'expected --kimg above 0 and finite --kappa, not {args.kimg} and {args.kappa}')
    settings = dict(kimg=args.kimg, captions=args.captions, teacher=str(args.teacher.resolve()))
    with sid_lsg.user_errors():
        exam = score_tiny.Exam(args.teacher, args.captions)
        if once(args.out / 'settings.json', lambda: settings) != settings:
            parser.error(f'{args.out} has findings of other settings (settings.json there); give another --out')
    teacher, null = exam.teacher, exam.encode([''])

    rows = {}
    for strategy in args.only:
        for seed in args.seeds:
            folder = args.out / f'{strategy.replace(" ", "-")}-{seed}'
            rows.setdefault(strategy, []).append(once(folder / 'score.json', lambda: distil(
                exam, folder, args.teacher, args.kimg, strategy, seed)))
    for kappa in args.kappa:
        rows[f'teacher {kappa:g}'] = [once(args.out / f'teacher-{kappa:g}.json', lambda: score(
            exam, lambda z, c: sid_lsg.ddim(teacher, z, c, null, kappa, 25)))]

    drawn = tiny_world.pictures([tiny_world.scene_of(text) for text in repeated(exam)], seed=7)
    again = exam.drawn(seed=6)
    right, _ = tiny_world.right(tiny_world.pictures(exam.scenes, seed=6), exam.scenes)
    rows['drawn pictures'] = [dict(right=right, fd=exam.distance(again), spread=spread(exam, again),
                                   diversity=diversity(drawn))]
    print(f'{args.kimg:g} thousand images a run, seeds {args.seeds}, {len(exam.captions)} captions; mean +- half the '
          f'range of the seeds\n\n| | kappa1, 2 = 3, 4 | alpha | right | FD | spread | diversity |\n|---|---|---|---|---|---|---|')
    for name, several in rows.items():
        *kappa, alpha = STRATEGIES.get(name, ('', '', '', ''))
        cells = []
        for number in NUMBERS:
            percent = number in ('right', 'spread')
            values = [row[number] * (100 if percent else 1) for row in several]
            cells.append(f'{np.mean(values):.1f}' + (f' +- {np.ptp(values) / 2:.1f}' if len(values) > 1 else '')
                         + (' %' if percent else ''))
        print(f'| {name} | {", ".join(f"{k:g}" for k in kappa if k != "")} | {alpha} | {" | ".join(cells)} |')
    chart({name: [(row['right'], row['fd']) for row in several] for name, several in rows.items()
           if name != 'drawn pictures'}, args.out / 'findings.png')
    print(f'\n{args.out / "findings.png"}')


if __name__ == '__main__':
    main()
