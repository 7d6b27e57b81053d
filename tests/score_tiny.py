"""Score generators of the tiny world, and their teacher, on captions that neither was trained on.

    python tests/score_tiny.py runs/000 [--captions 2000] [--sets 4] [--kappa 1 1.5 2 3]

Prints the share of images that are right in every attribute, then of those with a single object,
then the share for each attribute. tests/tiny_world.py judges the pixels, without a network. FD is
the Fréchet distance of the images' VAE latents to those of images that the tiny world draws. With
--sets there are several images of every caption, from other noise. FD is then the mean over sets,
each compared with other drawn images, and sd their standard deviation.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip_text
import fid
import make_tiny_sd
import sid_lsg
import tiny_world
import unet
import vae as vae_module


def moments(latents):
    """Return mean and covariance of latents (N, 4, h, w), in double precision."""
    x = latents.flatten(1).double().cpu().numpy()
    return x.mean(0), np.cov(x, rowvar=False)


class Exam:
    """A teacher's first `count` held-out captions, and the networks to score images of them."""

    def __init__(self, teacher, count):
        self.device = sid_lsg.choose_device('')
        self.teacher = sid_lsg.place(unet.load(teacher), self.device)
        self.vae = sid_lsg.place(vae_module.load(teacher), self.device)
        self.encode = sid_lsg.PromptEncoder(teacher, '', self.teacher, self.device)
        self.null = self.encode([''])
        held_out = clip_text.read_prompts(Path(teacher) / 'held_out.txt')
        unet.check(2 <= count <= len(held_out),
                   f'--captions must be 2 to {len(held_out)}, found {count}')
        self.captions = held_out[:count]
        self.scenes = [tiny_world.scene_of(caption) for caption in self.captions]
        self.shape = sid_lsg.latent_shape(0, self.teacher, self.vae)

    def generator(self, run, steps=0):
        """Load the generator of a run as a function of (z, noise, context).

        It makes the steps that it was trained for, or another number of them."""
        path, info = sid_lsg.find_generator(run)
        G, steps = sid_lsg.place(unet.load(path), self.device), steps or info.get('steps', 1)
        return lambda z, noise, context: sid_lsg.generate(
            G, z, context, info['t_init'], steps, noise[:steps - 1])

    def ddim(self, kappa, steps=25):
        """Return the teacher with guidance and DDIM as a function of (z, noise, context)."""
        return lambda z, noise, context: sid_lsg.ddim(
            self.teacher, z, context, self.null, kappa, steps)

    @torch.no_grad()
    def drawn(self, seed):
        """Return images (count, 64, 64, 3) that the tiny world draws, and their latents."""
        images = tiny_world.pictures(self.scenes, seed)
        x = make_tiny_sd.to_net(images).to(self.device)
        return images, torch.cat([self.vae.encode(part) for part in x.split(100)])

    @torch.no_grad()
    def sample(self, make, first=0):
        """Return images and latents of make(z, noise, context), with seeds from `first`."""
        images, latents = [], []

        def keep(*arguments):
            latents.append(make(*arguments))
            return latents[-1]
        for i in range(0, len(self.captions), 100):
            part = self.captions[i:i + 100]
            seeds = range(first + i, first + i + len(part))
            images.append(sid_lsg.sample_images(
                keep, self.vae, self.encode(part), seeds, self.shape, steps=4))
        return np.concatenate(images), torch.cat(latents)


def share_of_single(images, scenes):
    """Return the share of images that are right among those that should show a single object."""
    single = [i for i, (_, _, objects) in enumerate(scenes) if len(objects) == 1]
    return tiny_world.right(images[single], [scenes[i] for i in single])[0] if single else math.nan


def table_row(name, exam, sets, real):
    """Return a row of the table: sets holds (images, latents) each, real the drawn latents."""
    images = np.concatenate([images for images, _ in sets])
    right, each = tiny_world.right(images, len(sets) * exam.scenes)
    single = share_of_single(images, len(sets) * exam.scenes)
    distances = [fid.frechet_distance(*moments(latents), *moments(other))
                 for (_, latents), other in zip(sets, real)]
    return (f'{name:34s} {right:6.1%} {single:6.1%} {np.mean(distances):7.2f} '
            f'{np.std(distances):5.2f}  ' + ' '.join(f'{x:10.1%}' for x in each.values()))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', metavar='RUN', help='folders of runs or generators')
    parser.add_argument('--teacher', default=make_tiny_sd.TINY, help='default: %(default)s')
    parser.add_argument('--captions', type=int, default=2000, help='default: %(default)s')
    parser.add_argument('--sets', type=int, default=1, help='images per caption (default: 1)')
    parser.add_argument('--kappa', type=float, nargs='*', default=[1.0, 1.5, 2.0, 3.0],
                        help='guidance of the teacher (default: 1 1.5 2 3)')
    parser.add_argument('--grid', help='PNG to write: rows of 8 images by teacher and runs')
    args = parser.parse_args(arguments)
    with unet.user_errors('score_tiny'):
        score(args)


def score(args):
    exam = Exam(args.teacher, args.captions)
    makers = {'teacher, 1 step': lambda z, noise, context: sid_lsg.generate(
        exam.teacher, z, context)}
    for run in args.runs:
        steps = sid_lsg.find_generator(run)[1].get('steps', 1)
        makers[f'generator, {steps} step{"s" * (steps > 1)}, {run}'] = exam.generator(run)
    makers |= {f'teacher, 25 steps, kappa {kappa:g}': exam.ddim(kappa) for kappa in args.kappa}
    print(f'{len(exam.captions)} held-out captions, {args.sets} images of each\n'
          f'{"":34s} {"right":>6s} {"single":>6s} {"FD":>7s} {"sd":>5s}  '
          + ' '.join(f'{name:>10s}' for name in tiny_world.ATTRIBUTES))
    real = [exam.drawn(seed=5 + 2 * i)[1] for i in range(args.sets)]
    drawn = [exam.drawn(seed=6 + 2 * i) for i in range(args.sets)]
    print(table_row('drawn images', exam, drawn, real), flush=True)
    images, labels = [], []
    for name, make in makers.items():
        sets = [exam.sample(make, first=i * len(exam.captions)) for i in range(args.sets)]
        print(table_row(name, exam, sets, real), flush=True)
        images += list(sets[0][0][:8])
        labels += [name, *7 * ['']]
    if args.grid:
        sid_lsg.save_png(sid_lsg.make_grid(images, labels, columns=8), args.grid)


if __name__ == '__main__':
    main()
