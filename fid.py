"""Compute FID as in the paper's tables, from scratch.

FID (arXiv 1706.08500) is the Fréchet distance between two sets of images. Each set is modelled as
a Gaussian in the 2,048 features of one particular Inception network. The protocol is that of
GigaGAN's evaluation.py, which the paper used. Only the number goes to stdout.

    python fid.py REAL FAKE                         # each a folder of images or .npz statistics
    python fid.py val2014 --save-stats coco.npz     # computes COCO's statistics once
"""

import hashlib
import os
import re
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy                # imports scipy.linalg, a third of a second, only when a score needs it
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from unet import UserError, check

FEATURES = 2048
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
       'pt_inception-2015-12-05-6726825d.pth')


def warn(message):
    print(f'warning: {message}', file=sys.stderr)


def conv(c_in, c_out, kernel, stride=1, padding='same'):
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU()))        # torch's default eps is 1e-5


class Block(nn.Module):
    """Concatenate branches, which are chains of convolutions. branch_pool reads pooled input."""

    def __init__(self, c_in, pool, branches):
        super().__init__()
        self.pool = pool
        self.branches = {branch: [] for branch in branches}     # the names of each step's modules
        for branch, chain in branches.items():
            c = c_in
            for i, step in enumerate(chain, 1):
                name = f'{branch}_{i}' if len(chain) > 1 else branch
                steps = {f'{name}a': step[0], f'{name}b': step[1]} if step is FORK else {name: step}
                for module, arguments in steps.items():
                    self.add_module(module, conv(c, *arguments))
                self.branches[branch].append(list(steps))
                c = step[0]     # not used after a fork, which is always last

    def forward(self, x):
        outputs = []
        for branch, chain in self.branches.items():
            h = [self.pool(x) if branch == 'branch_pool' else x]
            for names in chain:
                h = [getattr(self, name)(h[0]) for name in names]
            outputs += h
        return torch.cat(outputs, 1)


AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)    # torchvision counts the padding
HALVE = nn.MaxPool2d(3, 2)
# The branches in Mixed_5 to Mixed_7. Each tuple holds the arguments of conv() after c_in.
FORK = [(384, (1, 3)), (384, (3, 1))]       # both read the same input
BRANCHES_5 = dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                  branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
BRANCHES_6 = {c: dict(
    branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
    branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
    branch_pool=[(192, 1)]) for c in (128, 160, 192)}
BRANCHES_7 = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), FORK],
                  branch3x3dbl=[(448, 1), (384, 3), FORK], branch_pool=[(192, 1)])


class Inception(nn.Module):
    """Google's inception-2015-12-05: images (B, 3, 299, 299) of to_input() -> (B, 2048)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv(3, 32, 3, 2, 0)                           # (B, 32, 149, 149)
        self.Conv2d_2a_3x3 = conv(32, 32, 3, 1, 0)                          # (B, 32, 147, 147)
        self.Conv2d_2b_3x3 = conv(32, 64, 3)                                # (B, 64, 147, 147)
        self.maxpool1 = nn.MaxPool2d(3, 2)                                  # (B, 64, 73, 73)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)                                # (B, 80, 73, 73)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, 1, 0)                         # (B, 192, 71, 71)
        self.maxpool2 = nn.MaxPool2d(3, 2)                                  # (B, 192, 35, 35)
        self.Mixed_5b = Block(192, AVERAGE, BRANCHES_5 | dict(branch_pool=[(32, 1)]))
        self.Mixed_5c = Block(256, AVERAGE, BRANCHES_5 | dict(branch_pool=[(64, 1)]))
        self.Mixed_5d = Block(288, AVERAGE, BRANCHES_5 | dict(branch_pool=[(64, 1)]))
        self.Mixed_6a = Block(288, HALVE, dict(                             # (B, 768, 17, 17)
            branch3x3=[(384, 3, 2, 0)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)],
            branch_pool=[]))
        self.Mixed_6b = Block(768, AVERAGE, BRANCHES_6[128])
        self.Mixed_6c = Block(768, AVERAGE, BRANCHES_6[160])
        self.Mixed_6d = Block(768, AVERAGE, BRANCHES_6[160])
        self.Mixed_6e = Block(768, AVERAGE, BRANCHES_6[192])
        self.Mixed_7a = Block(768, HALVE, dict(                             # (B, 1280, 8, 8)
            branch3x3=[(192, 1), (320, 3, 2, 0)],
            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)], branch_pool=[]))
        self.Mixed_7b = Block(1280, AVERAGE, BRANCHES_7)                    # (B, 2048, 8, 8)
        # "likely an error in this specific Inception implementation" (pytorch-fid inception.py 336)
        self.Mixed_7c = Block(2048, nn.MaxPool2d(3, 1, 1), BRANCHES_7)       # (B, 2048, 8, 8)
        self.fc = nn.Linear(2048, 1008)                                     # the classes, not used

    def forward(self, x):
        for layer in list(self.children())[:-1]:    # all but fc
            x = layer(x)
        return x.mean((2, 3))


def default_weights():
    """Return where torch.hub, and so pytorch-fid, stores the published file."""
    return Path(torch.hub.get_dir(), 'checkpoints', URL.rpartition('/')[2])


def load_inception(path):
    """Read the published .pth, or its tensors in .safetensors; .sha256 is the hash of the file."""
    check(Path(path).is_file(), f'{path} does not exist; fetch it with\n'
                                f'    curl -L --create-dirs -o {path} {URL}')
    with torch.device('meta'):      # allocates no weights, because the file's replace them
        net = Inception()
    net.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if net.sha256 != SHA256:
        warn(f'{path} (sha256 {net.sha256}) is NOT THE PUBLISHED FILE: its FID may differ')
    try:
        state = (load_file(path) if str(path).endswith('.safetensors')
                 else torch.load(path, map_location='cpu', weights_only=True))
        net.load_state_dict(dict(state), assign=True)   # dict() makes num_batches_tracked optional
    except Exception as error:      # the two readers raise many types
        raise UserError(f'{path} is damaged or not the Inception of FID; fetch {URL}') from error
    return net.float().eval().requires_grad_(False)


PRESETS = {'clean': 'centre crop, Lanczos to 256, antialiased bicubic to 299, (x - 128) / 128',
           'pytorch': 'bilinear to 299 without antialiasing, 2 x / 255 - 1'}    # of pytorch-fid
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')


def find_images(folder, parents=()):
    """List the paths of images in and below a folder in natural order: 2.png before 10.png."""
    check(Path(folder).is_dir(), f'{folder} is not a folder; give a folder of images')
    real = os.path.realpath(folder)
    if real in parents:     # a link back to a folder that contains it
        return []
    paths = []
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith('.') or path.name == 'grid.png':    # by `sid_lsg.py sample`
            continue
        if path.is_dir():
            paths += find_images(path, (*parents, real))
        elif path.suffix.lower() in SUFFIXES:
            paths.append(path)
    return sorted(paths, key=lambda path: re.sub(     # as if all numbers had 20 digits
        '[0-9]+', lambda number: number[0].zfill(20), str(path)))


def read_image(path):
    """Return an image file as uint8 (H, W, 3), and whether it has an alpha channel."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:      # Pillow raises OSError, SyntaxError, struct.error ...
        raise UserError(f'{path} is not a complete image ({error}); replace it') from error
    check(image.mode[0] not in 'IF', f'{path} has {image.mode} pixels; convert it to 8 bits')
    return np.array(image.convert('RGB')), image.has_transparency_data


def shrink(image):
    """Crop the centre of a uint8 image (H, W, 3) and resize it to (256, 256, 3)."""
    image = Image.fromarray(image)
    size = min(image.size)
    left, top = (round((n - size) / 2) for n in image.size)     # half to even, as torchvision does
    image = image.crop((left, top, left + size, top + size))
    return np.array(image.resize((256, 256), Image.LANCZOS))


def to_input(image, preset):
    """Resize and scale a uint8 image (H, W, 3) to Inception's input (1, 3, 299, 299)."""
    if preset == 'clean':
        image = shrink(image)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    if preset == 'pytorch':         # pytorch-fid inception.py 148-151
        return 2 * F.interpolate(x / 255, (299, 299), mode='bilinear') - 1
    # clean-fid resizes each channel in float with Pillow. The results differ by 0.003 of 255.
    return (F.interpolate(x, (299, 299), mode='bicubic', antialias=True).clamp(0, 255) - 128) / 128


def features(inception, images, preset='clean'):
    """Return float32 features (B, 2048) on the CPU of B uint8 images (H, W, 3) of any sizes."""
    return features_of(inception, [to_input(image, preset) for image in images])


@torch.no_grad()
def features_of(inception, inputs):
    x = torch.cat(inputs).to(next(inception.parameters()).device)
    return inception(x).float().cpu()


class Moments:
    """Sum features (B, D) in float64. To merge shards, add their n, sum and product."""

    def __init__(self):
        self.n, self.sum, self.product = 0, 0.0, 0.0

    def add(self, rows):
        x = np.asarray(rows, dtype=np.float64)
        check(np.isfinite(x).all(), 'features are NaN or infinite; check the weights')
        self.n += len(x)
        self.sum = self.sum + x.sum(0)
        self.product = self.product + x.T @ x

    @property
    def mu(self):
        return self.sum / self.n

    @property
    def sigma(self):        # unbiased, as in the paper; mu is of order 1, so little cancels
        return (self.product - self.n * np.outer(self.mu, self.mu)) / (self.n - 1)


def save_stats(path, mu, sigma, n, preset, weights_sha256):
    """Write statistics as .npz; pytorch-fid can read its mu and sigma."""
    part = f'{path}.tmp.npz'        # a crash leaves no incomplete file under the final name
    np.savez(part, mu=mu, sigma=sigma, n=n, preset=preset, weights_sha256=weights_sha256)
    os.replace(part, path)


def load_stats(path):
    """Read a dict of mu, sigma, n, preset, weights_sha256; other tools omit the last three."""
    try:
        with np.load(path) as file:
            mu, sigma = (file[key].astype(np.float64) for key in ('mu', 'sigma'))
            n = int(file.get('n', 0))
            preset, weights = (str(file.get(key, '')) for key in ('preset', 'weights_sha256'))
    except Exception as error:      # numpy and zipfile raise many types
        raise UserError(f'{path} is not an .npz of statistics ({error}); give another') from error
    check(mu.shape == (FEATURES,) and sigma.shape == (FEATURES, FEATURES) and np.isfinite(mu).all()
          and abs(sigma - sigma.T).max() <= 1e-3 * abs(sigma).max(),
          f'{path} has no mean and covariance of {FEATURES} finite features; give another')
    check(preset in ('', *PRESETS), f'{path} has the preset {preset}; make it again with fid.py')
    return dict(mu=mu, sigma=sigma, n=n, preset=preset, weights_sha256=weights)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of mu (D,) and sigma (D, D) in float64.

    Factor S1 = A A^T. Then S1 S2 has the eigenvalues of the symmetric matrix A^T S2 A. They are
    non-negative, and their square roots sum to the trace of the root. The alternative,
    scipy.linalg.sqrtm, can fail on singular covariances (scipy issues 19415 and 20178)."""
    values, vectors = scipy.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0))
    squares = scipy.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace1, trace2 = np.trace(sigma1), np.trace(sigma2)
    check(values[0] >= -1e-6 * trace1 and squares[0] >= -1e-6 * trace1 * trace2,
          'a covariance has eigenvalues below 0, more than by rounding; compute it in float64')
    trace_of_root = np.sqrt(squares.clip(min=0)).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + trace1 + trace2 - 2 * trace_of_root), 0.0)


# --------------------------------------------------------------------------------------------------
# Command line

def measure(paths, inception, preset, batch):
    """Return the statistics of image files as load_stats() does. Memory does not grow with them."""
    moments, transparent = Moments(), 0
    began = printed = time.time()

    def read(path):
        image, alpha = read_image(path)
        return to_input(image, preset), alpha
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), batch):
            inputs, alphas = zip(*pool.map(read, paths[start:start + batch]))
            transparent += sum(alphas)
            moments.add(features_of(inception, inputs))
            if time.time() > printed + 5:
                printed = time.time()
                left = (printed - began) * (len(paths) / moments.n - 1)
                print(f'{moments.n} of {len(paths)} images, {left:.0f} s left', file=sys.stderr)
    if transparent:
        warn(f'the alpha channel of {transparent} images is dropped; flatten them if it matters')
    return dict(mu=moments.mu, sigma=moments.sigma, n=moments.n, preset=preset,
                weights_sha256=inception.sha256)


def run(args):
    """Print the FID of two sets, or store the statistics of one, after checking the arguments."""
    target = args.save_stats
    check(len(args.sets) == 2 or len(args.sets) == 1 and target,
          f'got {len(args.sets)} sets; give REAL and FAKE, or one set and --save-stats FILE')
    check(args.batch > 0, f'--batch {args.batch} must be at least 1')
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'torch cannot use --device {args.device}; give another') from error
    stats = {path: load_stats(path) for path in args.sets if path.endswith('.npz')}
    folders = {path: find_images(path) for path in args.sets if path not in stats}
    for path, images in folders.items():
        check(len(images) > 1, f'{path} has {len(images)} images; give at least 2')
        if images[0].name.startswith('COCO_val2014_') and len(images) != 40504:
            warn(f'{path} has {len(images)} images of COCO val2014; the paper uses all 40,504')
    presets = {args.preset for _ in folders} | {s['preset'] or args.preset for s in stats.values()}
    check(len(presets) == 1, f'presets {sorted(presets)} differ; give the --preset of the .npz')
    if target:
        check(args.sets[0] in folders, f'--save-stats needs a folder of images, not {args.sets[0]}')
        check(target.endswith('.npz') and os.access(Path(target).parent, os.W_OK),
              f'--save-stats {target} must be an .npz in a folder that you can write to')
        if Path(target).exists():
            load_stats(target)      # refuses to replace another kind of file
    inception = load_inception(args.weights).to(args.device) if folders else None
    for path, images in folders.items():
        stats[path] = measure(images, inception, args.preset, args.batch)
        if target and path == args.sets[0]:
            save_stats(target, **stats[path])
    for path in args.sets:
        n, preset, weights = (stats[path][key] for key in ('n', 'preset', 'weights_sha256'))
        print(f'{path}: {n or "unknown number of"} images, preset {preset or "unknown"}: '
              f'{PRESETS.get(preset)}, weights sha256 {weights or "unknown"}', file=sys.stderr)
        if not preset:
            warn(f'{path} does not name its preset; {args.preset} is assumed')
        if 0 < n < FEATURES:
            warn(f'{path} has fewer than {FEATURES} images, so its FID is far too high')
    if len({s['weights_sha256'] for s in stats.values()} - {''}) > 1:
        warn('the two sets come from different weights, so their FID means little')
    if len(args.sets) == 2:
        fid = frechet_distance(*(stats[path][k] for path in args.sets for k in ('mu', 'sigma')))
        print(f'{fid:.6f}', flush=True)


def main(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, default = parser.add_argument, '(default: %(default)s)'
    add('sets', nargs='+', metavar='SET', help='REAL and FAKE: a folder of images or an .npz each')
    add('--preset', choices=PRESETS, default='clean', help=f'the paper uses clean {default}')
    add('--save-stats', metavar='FILE', help='store the statistics of the first set as .npz')
    add('--weights', default=default_weights(), help=f'of Inception {default}')
    add('--batch', type=int, default=32, help=f'images per forward pass {default}')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help=default)
    args = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False     # torch computes convolutions in TF32 by default
    try:
        return run(args)
    except (UserError, OSError) as error:
        message, code = error, 2
    except KeyboardInterrupt:
        message, code = 'interrupted', 130
    except (RuntimeError, MemoryError) as error:
        if not re.search('MemoryError|DefaultCPUAllocator', repr(error)):
            raise
        message, code = f'out of memory; give a --batch under {args.batch} or another --device', 2
    print(f'fid: {message}', file=sys.stderr)
    sys.exit(code)


if __name__ == '__main__':
    main()
