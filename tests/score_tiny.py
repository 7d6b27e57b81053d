"""Score a run of the tiny world against its teacher, on captions that neither was trained on.

    python tests/score_tiny.py runs/000 [--captions 2000] [--sets 4] [--kappa 1.5 2]

Prints, for the untouched teacher in one step, the teacher in 25 DDIM steps at each kappa, and the run's
generator in one step: the share of pictures right in every attribute, of all captions and of those with one
object, and in each attribute (tests/tiny_world.py judges pixels, it is no network), and the Fréchet distance
of their VAE latents to those of as many freshly drawn real pictures.

All of it on every caption once for each of --sets, with other noise and other real pictures each time: between
sets of 2,000 the distance of one generator was seen to differ by 0.03 to 0.3 (standard deviation).
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import fid
import make_tiny_sd
import sid_lsg
import tiny_world
import unet


def moments(latents):
    x = latents.flatten(1).double().cpu().numpy()
    return x.mean(0), np.cov(x, rowvar=False)


class Exam:
    """The first `count` captions that a teacher was not trained on, with what it takes to draw and to score them."""

    def __init__(self, teacher, count):
        self.device = sid_lsg.choose_device('')
        self.teacher = unet.load(teacher).to(self.device)
        self.vae, self.encode, self.tokenizer = sid_lsg.load_parts(teacher, self.device, self.teacher)
        held_out = fid.read_lines(Path(teacher) / 'held_out.txt', '--teacher, which takes one of the tiny world')
        sid_lsg.check(2 <= count <= len(held_out), f'expected --captions from 2 to {len(held_out)}, got {count}')
        self.captions = held_out[:count]
        self.scenes = [tiny_world.scene_of(text) for text in self.captions]
        self.real = self.drawn(seed=5)
        self.shape = tuple(self.real.shape[1:])

    @torch.no_grad()
    def drawn(self, seed):
        """Latents (count, 4, h, w) of freshly drawn pictures, one a caption."""
        pictures = make_tiny_sd.to_net(tiny_world.pictures(self.scenes, seed))
        return torch.cat([self.vae.encode(x.to(self.device)) for x in pictures.split(100)])

    @torch.no_grad()
    def draw(self, make, captions=None, seeds=None):
        """Latents and pictures of the captions, by make(z, context); caption i with seed i unless told."""
        captions, latents, pictures = captions or self.captions, [], []
        seeds = seeds or range(len(captions))
        for i in range(0, len(captions), 100):
            def keep(z, fresh, context):
                latents.append(make(z, context))
                return latents[-1]
            pictures.append(sid_lsg.draw_pictures(
                keep, self.vae, self.encode(captions[i:i + 100]), seeds[i:i + 100], self.shape))
        return torch.cat(latents), np.concatenate(pictures)

    def distance(self, latents, real=None):
        """Fréchet distance of latents (count, 4, h, w) to those of drawn pictures, self.real unless told."""
        return fid.frechet_distance(*moments(latents), *moments(self.real if real is None else real))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', metavar='RUN', help='run folders that sid_lsg.py train made')
    parser.add_argument('--teacher', default=make_tiny_sd.TINY, help='default: %(default)s')
    parser.add_argument('--captions', type=int, default=2000,
                        help='held-out captions to use, default: %(default)s')
    parser.add_argument('--sets', type=int, default=1,
                        help='pictures of each caption; the Fréchet distance is the mean over the sets of one each, '
                             'with their standard deviation, default: %(default)s')
    parser.add_argument('--kappa', type=float, nargs='*', default=[1.5, 2.0],
                        help='the teacher\'s guidance, default: %(default)s')
    parser.add_argument('--steps', type=int, default=25,
                        help='the teacher\'s DDIM steps, default: %(default)s')
    parser.add_argument('--picture', help='PNG to write: the first 8 captions by teacher and runs, side by side')
    args = parser.parse_args(arguments)
    if args.sets < 1 or not 1 <= args.steps <= 999 or not np.isfinite(args.kappa).all():
        parser.error('expected --sets of 1 or more, --steps from 1 to 999, finite --kappa; '
                     f'not {args.sets}, {args.steps}, {args.kappa}')

    with sid_lsg.user_errors():         # before the minutes that drawing takes
        exam, generators = Exam(args.teacher, args.captions), []
        for run in args.runs:
            folder, facts = sid_lsg.generator_in(run)
            generators.append((run, unet.load(folder), facts.get('t_init', 625)))
            sid_lsg.check_parts(exam.encode.net, exam.tokenizer, generators[-1][1], args.teacher)
        if args.picture:
            sid_lsg.check(os.access(Path(args.picture).absolute().parent, os.W_OK) and not Path(args.picture).is_dir(),
                          f'expected a PNG to write for --picture, in a folder that can be written, got {args.picture}')
    count, sets = len(exam.captions), range(args.sets)
    teacher, null = exam.teacher, exam.encode([''])
    reals = [exam.real] + [exam.drawn(seed=5 + 2 * s) for s in sets[1:]]
    attributes = ('background', 'count', 'place', 'size', 'color', 'shape')
    single = [i for i, (_, _, objects) in enumerate(exam.scenes) if len(objects) == 1]
    print(f'{count} held-out captions, {len(single)} of them with one object; {args.sets} pictures of each\n'
          f'{"":34s} {"right":>6s} {"of one":>6s} {"FD":>7s} {"sd":>5s}  '
          + ' '.join(f'{a:>10s}' for a in attributes))

    rows = []

    def report(name, latents, pictures, began):
        """A line of the table; latents and pictures are lists, one entry a set."""
        rows.append((name, pictures[0][:8]))
        share, each = tiny_world.right(np.concatenate(pictures), exam.scenes * len(pictures))
        alone = math.nan if not single else tiny_world.right(
            np.concatenate([p[single] for p in pictures]), [exam.scenes[i] for i in single] * len(pictures))[0]
        distances = [exam.distance(x, real) for x, real in zip(latents, reals)] or [math.nan]
        deviation = f'{np.std(distances):5.2f}' if len(distances) > 1 else 5 * ' '
        print(f'{name:34s} {share:6.1%} {alone:6.1%} {np.mean(distances):7.2f} {deviation}  '
              + ' '.join(f'{each[a]:10.1%}' for a in attributes)
              + f'   {time.time() - began:.0f} s', flush=True)

    def draw(name, make):
        began = time.time()
        drawn = [exam.draw(make, seeds=range(s * count, (s + 1) * count)) for s in sets]
        report(name, *zip(*drawn), began)

    began = time.time()
    report('drawn pictures', [exam.drawn(seed=6 + 2 * s) for s in sets],
           [tiny_world.pictures(exam.scenes, seed=5 + 2 * s) for s in sets], began)
    began = time.time()
    with torch.no_grad():
        kept = [np.concatenate([sid_lsg.to_uint8(exam.vae.decode(x)) for x in real.split(100)]) for real in reals]
    report('the same through the VAE', [], kept, began)
    draw('teacher, 1 step', lambda z, c: sid_lsg.generate(teacher, z, c))
    for run, G, t_init in generators:
        G.to(exam.device)
        draw(f'{run}, 1 step', lambda z, c: sid_lsg.generate(G, z, c, t_init))
    for kappa in args.kappa:
        draw(f'teacher, {args.steps} steps, kappa {kappa:g}',
             lambda z, c: sid_lsg.ddim(teacher, z, c, null, kappa, args.steps))
    if args.picture:
        rows = rows[2:3 + len(generators)] + rows[-1:] * bool(args.kappa)           # the teacher at its last kappa
        sid_lsg.save_png(sid_lsg.make_grid([image for _, pictures in rows for image in pictures],
                                           [f'{name}: {text}' for name, _ in rows for text in exam.captions[:8]], 8),
                         args.picture)


if __name__ == '__main__':
    main()
