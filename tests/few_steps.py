"""Distil the tiny teacher into generators of one, two and four steps, and compare them.

    python tests/few_steps.py [--out few_steps] [--seeds 0 1 2] [--kimg 15]

Prints a table. Its columns are those of score_tiny.py, and how long training took. The generators
of one step are sampled in four as well. Runs and scores in OUT are kept, so an interrupted call
continues, and several processes can share the work, each with other --seeds or --only.
"""

import json

import findings                         # first, because it makes the project's modules importable
import sid_lsg
import unet
from findings import cell

STRATEGIES = {'LSG 1.5': dict(kappa=(1.5,)),
              'Zero-CFG': dict(kappa=(0, 0, 1), drop=0.0),
              'Zero-CFG, drop 0.1': dict(kappa=(0, 0, 1), drop=0.1)}


def distil(exam, folder, **settings):
    """Train a generator and return {number of steps in sampling: score}, and the seconds it took."""
    sid_lsg.train(sid_lsg.train_config(
        resume=str(folder), save_kimg=settings['kimg'], **settings))
    seconds = json.loads((folder / 'log.jsonl').read_text().splitlines()[-1])['seconds']
    sampled = (1, 4) if settings['steps'] == 1 else (settings['steps'],)
    scores = {steps: findings.score(exam, *exam.sample(exam.generator(folder, steps)))
              for steps in sampled}
    return dict(scores=scores, seconds=seconds)


def main(arguments=None):
    parser = findings.make_parser(__doc__, 'few_steps', 2000, STRATEGIES)
    parser.add_argument('--steps', type=int, nargs='+', default=[1, 2, 4], choices=[1, 2, 4],
                        help='steps to train for (default: 1 2 4)')
    args = parser.parse_args(arguments)
    with unet.user_errors('few_steps'):
        run(args)


def run(args):
    exam = findings.make_exam(args)
    lines = ['| | steps | sampled in | right | single | FD | minutes of training |',
             '|---|---|---|---|---|---|---|']
    for strategy in args.only:
        for steps in args.steps:
            results = []
            for seed in args.seeds:
                settings = dict(STRATEGIES[strategy], steps=steps, seed=seed, kimg=args.kimg)
                folder = args.out / f'{strategy.replace(" ", "-")}-{steps}-steps-{seed}'
                results.append(findings.once(folder / 'score.json',
                                             lambda: distil(exam, folder, **settings)))
            minutes = cell([result['seconds'] / 60 for result in results])
            for sampled in results[0]['scores']:
                scores = [result['scores'][sampled] for result in results]
                lines.append(f'| {strategy} | {steps} | {sampled} | '
                             f'{cell([100 * score["right"] for score in scores], " %")} | '
                             f'{cell([100 * score["single"] for score in scores], " %")} | '
                             f'{cell([score["fd"] for score in scores])} | {minutes} |')
    print(f'{args.kimg:g} thousand images, {args.captions} captions, seeds {args.seeds}; mean ± '
          'standard deviation over seeds', *lines, sep='\n')


if __name__ == '__main__':
    main()
