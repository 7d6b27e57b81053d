"""Why the loss of SiD works, in one dimension: draws tests/one_dimension.png in seconds.

    python tests/one_dimension.py

The generator is x_g = theta z + mu with one learnable scale theta. The data are normal with scale
1. Both denoisers are then linear and known in closed form. The fake one is perfect all the time:

    f(x_t) = mean + slope (x_t - a mean),    slope = a scale^2 / (a^2 scale^2 + sigma^2)

From that follow the gradients with the fake denoiser frozen, for equal means, in gradient().
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))

import sid_lsg

LOSSES = {'L1, the fake network frozen': (None, 'firebrick'), 'SiD, alpha 0.5': (0.5, 'darkorange'),
          'SiD, alpha 1': (1.0, 'navy'), 'SiD, alpha 1.2': (1.2, 'darkgreen')}
ITERATIONS, RATE = 400, 0.05


def gradient(theta, alpha, t):
    """Return the expected gradient of L2 - alpha L1, or of L1 for alpha None, at timesteps t."""
    a, sigma = (table[t].double().numpy() for table in (sid_lsg.ALPHA, sid_lsg.SIGMA))
    variance = a ** 2 * theta ** 2 + sigma ** 2
    fake, teacher = a * theta ** 2 / variance, a / (a ** 2 + sigma ** 2)
    of_l1 = 2 * a ** 2 * theta * (teacher - fake) ** 2
    of_l2_minus_l1 = -2 * a * theta * sigma ** 2 * (teacher - fake) / variance
    return of_l1 if alpha is None else of_l2_minus_l1 + (1 - alpha) * of_l1


def descend(theta, alpha):
    """Return theta before every iteration of gradient descent."""
    path = [theta]
    for _ in range(ITERATIONS):
        theta -= RATE * gradient(theta, alpha, np.arange(20, 980)).mean()
        path.append(theta)
    return path


def main():
    wide, high, edge, scale = 560, 300, 44, 2
    sheet = Image.new('RGB', (wide * scale, high * scale), 'white')
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12 * scale)

    def place(iteration, theta):
        return (scale * (edge + iteration / ITERATIONS * (wide - edge - 12)),
                scale * (high - edge - theta / 2 * (high - 2 * edge)))
    for theta in (0, 0.5, 1, 1.5, 2):
        color = 'gray' if theta == 1 else 'lightgray'
        pen.line([place(0, theta), place(ITERATIONS, theta)], color, scale)
        pen.text(place(-8, theta), f'{theta:g}', 'black', font, anchor='rm')
    pen.text(place(ITERATIONS / 2, -0.12), f'{ITERATIONS} iterations', 'black', font, anchor='ma')
    pen.text((8 * scale, 8 * scale), 'scale of the generator; 1 is right', 'black', font)
    for i, (name, (alpha, color)) in enumerate(LOSSES.items()):
        for start in (0.4, 2.0):
            path = descend(start, alpha)
            pen.line([place(step, theta) for step, theta in enumerate(path)], color, 2 * scale)
        pen.text((scale * (wide - 210), scale * (edge + 8 + 17 * i)), name, color, font)
    sheet.save(Path(__file__).with_suffix('.png'))


if __name__ == '__main__':
    main()
