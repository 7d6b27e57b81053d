"""Draw the numbers that a training run logs, as six curves over the images seen so far.

    python tests/curves.py RUN

Reads RUN/log.jsonl and draws RUN/curves.png. Light lines show every iteration, dark lines a moving
average.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TITLES = {'loss_fake': 'loss of the fake score network', 'loss_G': 'loss of the generator',
          'xg_xphi': 'mean |x_g - x_phi|', 'xphi_xpsi': 'mean |x_phi - x_psi|',
          'grad_fake': 'gradient norm, fake score network', 'grad_G': 'gradient norm, generator'}
# Pillow draws lines without anti-aliasing, so we draw at twice the size and shrink the image.
WIDTH, HEIGHT = 1200, 480                   # of a panel
INSIDE = 128, 72, WIDTH - 48, HEIGHT - 84   # left, top, right and bottom of its axes
INK, GRID, RAW, SMOOTH = '#333333', '#e4e4e4', '#b7d0ee', '#17489c'


def ticks(low, high):
    """Choose two to seven round numbers between low and high."""
    unit = 10 ** np.floor(np.log10((high - low) / 6))
    step = next(unit * n for n in (1, 2, 5, 10, 20) if unit * n >= (high - low) / 6)
    return step * np.arange(np.ceil(low / step), np.floor(high / step) + 1)


def draw_panel(pen, corner, title, points, end):
    """Draw one curve over 0 to `end` thousand images, with its title and its axes."""
    small = ImageFont.load_default(24)
    left, top, right, bottom = np.add(corner + corner, INSIDE)
    pen.text((left, top - 20), title, INK, ImageFont.load_default(28), anchor='ls')
    pen.text(((left + right) / 2, bottom + 44), 'thousand images', INK, small, anchor='mt')
    if points:
        x, y = np.array(sorted(points.items()), dtype=float).T
        # The axis spans percentiles 1 to 99, so that a few spikes do not flatten the rest.
        low, high = np.percentile(y, [1, 99])
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
        low, high = low - margin, high + margin
        y = np.clip(y, low, high)
        for value in ticks(low, high):
            height = bottom - (bottom - top) * (value - low) / (high - low)
            pen.line([left, height, right, height], GRID, 2)
            pen.text((left - 12, height), f'{value:.5g}', INK, small, anchor='rm')
        for value in ticks(0, end):
            across = left + (right - left) * value / end
            pen.text((across, bottom + 14), f'{value:.5g}', INK, small, anchor='mt')
        window = np.ones(len(y) // 30 + 1)
        smooth = np.convolve(y, window, 'same') / np.convolve(np.ones(len(y)), window, 'same')
        for line, color, width in ((y, RAW, 2), (smooth, SMOOTH, 5)):
            heights = bottom - (bottom - top) * (line - low) / (high - low)
            pen.line(list(zip(left + (right - left) * x / end, heights)), color, width, 'curve')
    pen.line([left, top, left, bottom, right, bottom], INK, 2)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('run', type=Path, help='folder of a training run')
    args = parser.parse_args(arguments)
    log = args.run / 'log.jsonl'
    if not log.is_file():
        parser.exit(2, f'curves: {log} does not exist; give the folder of a run\n')
    lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
    rows = [json.loads(line) for line in lines if line[:1] + line[-1:] == '{}']     # whole ones
    if not rows:
        parser.exit(2, f'curves: {log} has no rows yet; wait for the first status line\n')
    curves = [{row['images'] / 1000: row[name] for row in rows if row.get(name) is not None}
              for name in TITLES]
    end = max(max(points, default=0) for points in curves)
    sheet = Image.new('RGB', (2 * WIDTH, 3 * HEIGHT), 'white')
    for i, (title, points) in enumerate(zip(TITLES.values(), curves)):
        draw_panel(ImageDraw.Draw(sheet), (i % 2 * WIDTH, i // 2 * HEIGHT), title, points, end)
    sheet.reduce(2).save(args.run / 'curves.png')


if __name__ == '__main__':
    main()
