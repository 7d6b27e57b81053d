"""FID and CLIP score as the paper's tables compute them, from scratch in one file.

FID (arXiv 1706.08500) is the Fréchet distance of two sets of pictures, each taken as a Gaussian in the
2,048 features of one particular Inception net; CLIP score is the mean cosine of pictures and captions.
Both follow GigaGAN's evaluation.py, which made the paper's numbers. The number alone goes to stdout, all
that it depends on to stderr.

    python fid.py REAL FAKE         # each a folder, .npz statistics, or .npy / .npz of uint8 pictures
    python fid.py val2014 --coco --save-stats coco.npz      # COCO's statistics, once and for all
    python fid.py --clip WEIGHTS FAKE CAPTIONS              # a folder; a text file, one caption a line
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import scipy                # loads scipy.linalg at first use, a third of a second that only scores need
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import clip_text

SUFFIXES = '.bmp .jpeg .jpg .pgm .png .ppm .tif .tiff .webp'.split()
COCO = 40_504       # pictures in COCO val2014; the tables' reference is all of them, not 30,000

INCEPTION = ('FID\'s Inception', '95,628,359 bytes',
             '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
             'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
             'pt_inception-2015-12-05-6726825d.pth')
VIT_G = ('CLIP ViT-g-14', '5.47 GB', '11b3bb58ac0f84f8bce59c4551038a0b288372869e1666ff38224bb71ecc0870',
         'https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/main/'
         'open_clip_pytorch_model.safetensors')
BROKEN = (KeyError, IndexError, TypeError, ValueError, OSError, RuntimeError, AssertionError, EOFError,
          AttributeError, UnpicklingError, SafetensorError, zipfile.BadZipFile,
          zlib.error)                                                 # what reading raises


def check(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def warn(sentence):
    print(f'warning: {sentence}', file=sys.stderr)


def reason(error):
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def out_of_memory(error):
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or 'DefaultCPUAllocator' in str(error)


def usable_device(name, option='--device'):
    """The torch.device of that name. ValueError where this torch or machine has none."""
    try:
        device, count = torch.device(name), torch.cuda.device_count()
        check(device.type != 'cuda' or (device.index or 0) < count,
              f'{option} {name} was asked for, but torch sees {count} CUDA devices; '
              f'leave {option} out to use what is there, or install a CUDA build of torch')
        if device.type != 'cuda' or 'LOCAL_RANK' not in os.environ:     # torchrun: each has its own GPU
            torch.zeros(1, device=device).item()        # meta has shapes, and nothing to read back
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError('expected a device that this torch can use, such as cuda, cuda:1 or cpu, got '
                         f'{option} {name} ({reason(error)})') from None
    return device


def read_lines(path, option):
    """The lines of a UTF-8 file, each a caption or prompt, without outer blanks, byte order mark and empty
    ones. `option` is what names it on the command line; ValueError says so."""
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'expected UTF-8 text, one caption or prompt a line, at {path} '
                         f'({reason(error)}); give another as {option}') from None
    lines = [line.strip() for line in lines if line.strip()]
    check(lines, f'expected one caption or prompt a line in {path}, found none; give another as {option}')
    return lines


# ---------------------------------------------------------------------------------------------------
# Inception: Google's inception-2015-12-05, which is not torchvision's inception_v3. Names are
# torchvision's, as pytorch-fid's file bears them.

class Conv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if padding is None:     # at stride 1 the size is kept, at stride 2 the border left out
            padding = (high // 2, wide // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)       # torch's default is 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


POOLS = {       # averages do not count padding, where torchvision's do
    'average': lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    'max': lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    'halve': lambda x: F.max_pool2d(x, 3, stride=2)}


def family_a(c):
    return dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(c, 1)])


def family_c(c):
    return dict(branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
                branch_pool=[(192, 1)])


FORK = [(384, (1, 3)), (384, (3, 1))]       # both from the same input, their outputs side by side
FAMILY_E = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), FORK],
                branch3x3dbl=[(448, 1), (384, 3), FORK], branch_pool=[(192, 1)])

# name | channels in | how branch_pool pools | branches: chains of convolutions (channels, kernel, stride)
BLOCKS = {
    'Mixed_5b': (192, 'average', family_a(32)),
    'Mixed_5c': (256, 'average', family_a(64)),
    'Mixed_5d': (288, 'average', family_a(64)),
    'Mixed_6a': (288, 'halve', dict(
        branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[])),
    'Mixed_6b': (768, 'average', family_c(128)),
    'Mixed_6c': (768, 'average', family_c(160)),
    'Mixed_6d': (768, 'average', family_c(160)),
    'Mixed_6e': (768, 'average', family_c(192)),
    'Mixed_7a': (768, 'halve', dict(
        branch3x3=[(192, 1), (320, 3, 2)],
        branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[])),
    'Mixed_7b': (1280, 'average', FAMILY_E),
    # "likely an error in this specific Inception implementation" (pytorch-fid inception.py 336-340)
    'Mixed_7c': (2048, 'max', FAMILY_E)}


class Block(nn.Module):
    """Branches from one input, their outputs concatenated."""

    def __init__(self, c_in, pool, branches):
        super().__init__()
        self.pool, self.branches = POOLS[pool], {}
        for branch, chain in branches.items():
            c, self.branches[branch] = c_in, []
            for i, step in enumerate(chain, 1):
                name = f'{branch}_{i}' if len(chain) > 1 else branch
                convs = {f'{name}a': step[0], f'{name}b': step[1]} if step is FORK else {name: step}
                for part, (c_out, *shape) in convs.items():
                    self.add_module(part, Conv(c, c_out, *shape))
                c = c_out
                self.branches[branch].append(list(convs))

    def forward(self, x):
        outputs = []
        for branch, chain in self.branches.items():
            h = [self.pool(x) if branch == 'branch_pool' else x]
            for names in chain:
                h = [getattr(self, name)(h[0]) for name in names]
            outputs += h
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """Pictures (B, 3, 299, 299), resized and scaled (to_input), to features (B, 2048)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        for name, block in BLOCKS.items():
            self.add_module(name, Block(*block))
        self.fc = nn.Linear(2048, 1008)     # 1,008 classes; not used, but in the file

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))   # (B, 64, 147, 147)
        x = self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2))                # (B, 80, 73, 73)
        x = F.max_pool2d(self.Conv2d_4a_3x3(x), 3, stride=2)                # (B, 192, 35, 35)
        for name in BLOCKS:
            x = getattr(self, name)(x)      # 35 x 35 in level 5, 17 x 17 in 6, 8 x 8 in 7
        return x.mean((2, 3))                                               # (B, 2048)


def known_file(path, what, size, sha256, url):
    """The sha256 of the weights in `path`; a loud line where it is not the published file's.

    Raises FileNotFoundError, with the command that fetches it: nothing is downloaded by itself."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f'expected the weights of {what} at {path}, found no file; fetch them ({size}, sha256 '
            f'{sha256}) with\n    curl -L --create-dirs -o {path} {url}')
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        warn(f'{path} is NOT THE PUBLISHED FILE of {what}: sha256 {digest.hexdigest()}, expected '
             f'{sha256}; unless it holds the same tensors, the number compares with no one else\'s')
    return digest.hexdigest()


def default_weights():
    """Where Inception's file lies if torch.hub, and so pytorch-fid, has fetched it."""
    return Path(torch.hub.get_dir(), 'checkpoints', INCEPTION[3].rpartition('/')[2])


def load_inception(path):
    """The net of pytorch-fid's .pth (torch-fidelity's is the same), or of those tensors as .safetensors.

    On the CPU, in eval mode; .sha256 is the file's. Raises FileNotFoundError or ValueError."""
    digest = known_file(path, *INCEPTION)
    with torch.device('meta'):          # no memory or random numbers for weights about to be replaced
        net = Inception()
    try:
        state = (load_file(path) if Path(path).suffix == '.safetensors'
                 else torch.load(path, map_location='cpu', weights_only=True))
        # Without torch's version mark, which dict() drops, num_batches_tracked may be there or not.
        net.load_state_dict(dict(state), strict=True, assign=True)
    except BROKEN as error:
        raise ValueError(f'{path} does not hold FID\'s Inception, which has 1,008 classes '
                         f'(torchvision\'s, with 1,000, is another net); {reason(error)}') from None
    net.sha256 = digest
    return net.float().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------
# From a picture to the net

PRESETS = {     # the tables', the one while training, pytorch-fid's; one does not compare with another
    'clean': 'centre crop, LANCZOS to 256, antialiased bicubic to 299, (x - 128) / 128',
    'tf': 'centre crop, LANCZOS to 256, TensorFlow 1 bilinear to 299, (x - 128) / 128',
    'pytorch': 'bilinear to 299 without antialiasing, 2 x / 255 - 1'}


def shrink(image, preset):
    """A PIL picture as uint8 (256, 256, 3), for pytorch at its own size. Twice does no more than once."""
    image = image.convert('RGB')
    if preset != 'pytorch':
        side = min(image.size)
        # torchvision's CenterCrop rounds half to even, as round() does; the official cocodataset_tool.py
        # 230-235, behind the number while training, rounds down: one pixel apart at 640 x 425.
        left, top = ((int if preset == 'tf' else round)((n - side) / 2) for n in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((256, 256), Image.LANCZOS)
    return np.array(image)


def tf1_bilinear(x, side=299):
    """TensorFlow 1's resize of (B, C, H, W): output i lies at i H / side, not centred, not smoothed."""
    for axis in (2, 3):
        place = torch.arange(side, device=x.device) * (x.shape[axis] / side)
        low = place.long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        weight = (place - low).reshape((-1, 1) if axis == 2 else (1, -1))
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return x


def to_input(image, preset, device='cpu'):
    """Inception's input (1, 3, 299, 299) of a uint8 picture (H, W, 3) that went through shrink()."""
    x = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float()
    if preset == 'pytorch':             # pytorch-fid inception.py 148-151
        return 2 * F.interpolate(x / 255, (299, 299), mode='bilinear', align_corners=False) - 1
    if preset == 'tf':
        x = tf1_bilinear(x)
    else:       # clean-fid lets Pillow resize each channel in float; this is the same to 0.003 of 255
        x = F.interpolate(x, (299, 299), mode='bicubic', antialias=True).clamp(0, 255)
    return (x - 128) / 128


@torch.no_grad()
def features(inception, images, preset='clean'):
    """Float32 (B, 2048) on the CPU, of B uint8 pictures (H, W, 3): a list or array, sizes may differ."""
    check(all(image.dtype == np.uint8 for image in images),
          f'expected uint8 pictures, 0 ... 255, found {images[0].dtype}; nothing is scaled by guess')
    device = next(inception.parameters()).device
    inputs = [to_input(shrink(Image.fromarray(image), preset), preset, device) for image in images]
    return inception(torch.cat(inputs)).float().cpu()


# ---------------------------------------------------------------------------------------------------
# Statistics and their distance

class Moments:
    """Mean and unbiased covariance of features (B, D) that are added a batch at a time.

    Only the sums of x and x x^T are kept, in float64: memory stays flat, and shards merge by adding.
    Features are of order 1, so little is lost to cancellation: numpy.cov differs by some 1e-15."""

    def __init__(self):
        self.n, self.sum, self.product = 0, 0.0, 0.0

    def add(self, rows):
        x = np.asarray(rows, dtype=np.float64)
        bad = ~np.isfinite(x).all(1)
        check(not bad.any(), f'expected finite features, found NaN or infinity in picture '
              f'{self.n + bad.argmax()}; the weights are broken, or computed in too low a precision')
        self.merge(len(x), x.sum(0), x.T @ x)

    def merge(self, n, sum, product):
        self.n, self.sum, self.product = self.n + n, self.sum + sum, self.product + product

    @property
    def mu(self):
        return self.sum / self.n

    @property
    def sigma(self):        # over N - 1, as in the tables; the number while training has N, 2e-4 less
        return (self.product - self.n * np.outer(self.mu, self.mu)) / (self.n - 1)


def save_stats(path, mu, sigma, n, preset, weights_sha256):
    """An .npz for load_stats, and for pytorch-fid and its kin, which read mu and sigma."""
    part = Path(f'{path}.tmp')
    try:
        with open(part, 'wb') as file:
            np.savez(file, mu=mu, sigma=sigma, n=n, preset=preset, res=0 if preset == 'pytorch' else 256,
                     weights_sha256=weights_sha256)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f'could not write {path} ({reason(error)}); free space or choose another') from None


def load_stats(path):
    """dict(mu, sigma, n, preset, weights_sha256) of an .npz by save_stats, or by others, who leave the
    last three out (0 and '' then) and may say mean and cov. None: it holds no statistics."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, cov = ('mu', 'sigma') if 'mu' in file else ('mean', 'cov')
            if mean not in file and cov not in file:
                return None
            stats = dict(mu=np.float64(file[mean]), sigma=np.float64(file[cov]), n=0)
            for key, kind in dict(n=int, preset=str, weights_sha256=str).items():
                stats[key] = kind(file[key]) if key in file else kind()
    except BROKEN as error:
        raise ValueError(f'expected an .npz with statistics (mu, sigma) or pictures at {path}; '
                         f'{reason(error)}') from None
    mu, sigma = stats['mu'], stats['sigma']
    check(mu.ndim == 1 and sigma.shape == 2 * mu.shape and np.isfinite(mu.sum() + sigma.sum()),
          f'expected mu (D,) and sigma (D, D) in {path}, without NaN or infinity; found {mu.shape} and '
          f'{sigma.shape}, with {np.isnan(mu).sum() + np.isnan(sigma).sum()} NaN')
    check(abs(sigma - sigma.T).max() <= 1e-3 * abs(sigma).max(),
          f'expected a covariance in {path}, found a sigma that is not symmetric')
    return stats


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); mu (D,), sigma (D, D), float64; a float.

    The trace of the root comes from symmetric eigenvalues: with one of the two A A^T, the eigenvalues of
    S1 S2 are those of A^T (the other) A, real and not negative. scipy.linalg.sqrtm of the product is
    slower, and goes complex or astray when a covariance is singular (scipy issues 19415 and 20178)."""
    check(mu1.shape == mu2.shape and sigma1.shape == sigma2.shape,
          f'expected two statistics of one dimension, found {len(mu1)} and {len(mu2)}')
    try:        # A from Cholesky's factors of the second: half the time, where it has full rank
        squares, values = scipy.linalg.eigvalsh(sigma1, sigma2, type=2), np.zeros(1)
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(sigma1)
        root = vectors * np.sqrt(values.clip(min=0))
        squares = scipy.linalg.eigvalsh(root.T @ sigma2 @ root)
    if values[0] < -1e-6 * values[-1] or squares[0] < -1e-6 * squares[-1]:      # rounding leaves 1e-15
        warn('a covariance has eigenvalues well below 0: were the statistics made in float32?')
    trace_of_root = np.sqrt(squares.clip(min=0)).sum()
    distance = float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)
    check(distance > -1e-3, f'the Fréchet distance is {distance:.3g}, too far below 0 for rounding')
    return max(distance, 0.0)


# ---------------------------------------------------------------------------------------------------
# Sets of pictures

def find_pictures(folder):
    """The pictures in and below a folder, each once, in natural order: 2.png before 10.png.

    Without hidden ones, as in clean-fid, and grid.png, the overview that sid_lsg.py sample makes."""
    paths, seen = [], set()
    for here, below, names in os.walk(folder, followlinks=True):    # sets may be put together of links
        real = os.path.realpath(here)
        if real in seen:                # a link back, which would be followed without end
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name[0] != '.')
        paths += (Path(here, name) for name in names if name[0] != '.')
    found = {path.resolve(): path for path in sorted(paths, reverse=True)
             if path.suffix.lower() in SUFFIXES and path.name != 'grid.png' and path.is_file()}
    check(found, f'no pictures found in or below {folder} (looked for {" ".join(SUFFIXES)})')
    # split() gives text and digits in turn, so that like meets like when two names are compared.
    return sorted(found.values(), key=lambda path: [
        int(part) if i % 2 else part for i, part in enumerate(re.split('([0-9]+)', path.as_posix()))])


def read_array(path):
    """The count, then one by one the pictures of a uint8 array (N, H, W, 3) in .npy, or .npz as arr_0."""
    try:
        file = open(path, 'rb')
        if zipfile.is_zipfile(file):
            names = zipfile.ZipFile(path).namelist()
            file = zipfile.ZipFile(path).open('arr_0.npy' if 'arr_0.npy' in names else names[0])
        else:
            file.seek(0)
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header[np.lib.format.read_magic(file)[0]](file)
        check(dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and 0 not in shape and not fortran,
              f'it holds {dtype} {shape}, and nothing is scaled or turned by guess')
    except BROKEN as error:
        raise ValueError(f'expected a folder of pictures, an .npz of statistics (mu, sigma), or uint8 '
                         f'pictures (N, H, W, 3) as .npy or .npz at {path}; {reason(error)}') from None
    yield shape[0]
    for i in range(shape[0]):
        try:
            data = file.read(size := shape[1] * shape[2] * 3)
            check(len(data) == size, 'cut off')
        except BROKEN as error:
            raise ValueError(f'expected {shape[0]} whole pictures in {path}, number {i} is not one '
                             f'({reason(error)}); replace the file') from None
        yield np.frombuffer(data, np.uint8).reshape(shape[1:])


def decode(item, preset, skip_bad):
    """(uint8 picture after shrink(), 'format mode size') of a path or array; None: bad, and left out."""
    if isinstance(item, np.ndarray):
        return shrink(Image.fromarray(item), preset), 'array RGB {1}x{0}'.format(*item.shape)
    try:
        with Image.open(item) as image:
            mode = image.mode + 'A' * ('transparency' in image.info)        # a PNG's tRNS
            return shrink(image, preset), f'{image.format} {mode} {image.width}x{image.height}'
    except Exception as error:      # Pillow's decoders raise OSError, SyntaxError, struct.error ...
        check(skip_bad, f'expected a whole picture in {item}, found none ({reason(error)}); replace it, '
                        'or leave such out with --skip-bad')
        return warn(f'left out {item} ({reason(error)})')


def read_pictures(path, args, preset, num=0):
    """The count of the first `num` pictures (0: all) in a folder or array file, then lists of args.batch
    uint8 arrays. What they are goes to stderr. Memory stays flat, however many there are."""
    items, ends = (find_pictures(path), True) if Path(path).is_dir() else (read_array(path), False)
    found = len(items) if ends else next(items)
    count = min(num or found, found)
    print(f'{path}: {"all" if count == found else f"the first {count} of"} {found} pictures'
          + (f', {items[0].name} ... {items[count - 1].name}' if ends else ''), file=sys.stderr)
    yield count
    kinds, began, printed, done = Counter(), time.time(), time.time(), 0
    items, work = islice(items, count), partial(decode, preset=preset, skip_bad=args.skip_bad)
    with ThreadPoolExecutor(max(args.workers, 1)) as pool:      # Pillow lets go of the GIL
        ahead = pool.map(work, islice(items, args.batch))
        while group := list(ahead):
            ahead = pool.map(work, islice(items, args.batch))   # decoded while the net sees this batch
            done += len(group)
            kinds.update(kind for _, kind in filter(None, group))
            yield [image for image, _ in filter(None, group)]
            if time.time() - printed > 5 and done < count:
                printed, pace = time.time(), done / (time.time() - began)
                print(f'{done} of {count} pictures, {pace:.1f} a second, '
                      f'{(count - done) / pace:.0f} s left', file=sys.stderr)
    print(f'{path}: ' + ', '.join(f'{n} {kind}' for kind, n in kinds.most_common(4))
          + f' and {len(kinds) - 4} more kinds' * (len(kinds) > 4), file=sys.stderr)
    modes = {kind.split()[1] for kind in kinds} - {'RGB', 'L', 'P', '1', 'CMYK', 'YCbCr', 'HSV', 'LAB'}
    if modes:
        warn(f'{path} has pictures of mode {", ".join(modes)}: alpha is dropped, levels above 255 cut')
    if any(kind.startswith('JPEG') for kind in kinds):
        warn(f'{path} has JPEGs: right for COCO itself, but what is generated belongs in PNG')


# ---------------------------------------------------------------------------------------------------
# CLIP ViT-g-14, both towers; names are open_clip's

class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)           # (B, L, 3 C)
        q, k, v = qkv.unflatten(2, (3, 16, -1)).permute(2, 0, 3, 1, 4)      # both towers have 16 heads
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)       # (B, 16, L, C / 16)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, hidden), c_proj=nn.Linear(hidden, width)))

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        # The exact GELU; quick GELU is for OpenAI's own weights (open_clip model_configs/ViT-g-14.json).
        return x + self.mlp['c_proj'](F.gelu(self.mlp['c_fc'](self.ln_2(x))))


def layers(width, count, hidden):
    return nn.ModuleDict(dict(resblocks=nn.ModuleList(Layer(width, hidden) for _ in range(count))))


class Vision(nn.Module):
    """Pictures (B, 3, side, side) of to_clip() to (B, 1024): the class token's last state, projected."""

    def __init__(self, width, count, hidden, patch, grid, out):
        super().__init__()
        self.side = patch * grid
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(grid ** 2 + 1, width))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width, eps=1e-5)
        self.transformer = layers(width, count, hidden)
        self.ln_post = nn.LayerNorm(width, eps=1e-5)
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)                            # (B, 256, 1408)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)       # (B, 257, 1408)
        x = self.ln_pre(x + self.positional_embedding)
        for layer in self.transformer['resblocks']:
            x = layer(x, causal=False)
        return self.ln_post(x[:, 0]) @ self.proj                                # (B, 1024)


class CLIP(nn.Module):
    """The defaults are ViT-g-14's 1.37 G weights: giant, which the official scripts spell "ViT-G/14"."""

    def __init__(self, vision=(1408, 40, 6144, 14, 16), text=(1024, 24, 4096), vocab=49408, out=1024):
        super().__init__()
        self.visual = Vision(*vision, out)
        self.token_embedding = nn.Embedding(vocab, text[0])
        self.positional_embedding = nn.Parameter(torch.empty(clip_text.LENGTH, text[0]))
        self.transformer = layers(*text)
        self.ln_final = nn.LayerNorm(text[0], eps=1e-5)
        self.text_projection = nn.Parameter(torch.empty(text[0], out))
        self.logit_scale = nn.Parameter(torch.empty(()))        # of training's loss; the score has none

    def text(self, tokens):
        """(B, 77) to (B, 1024): the end token's last state, projected; it has the largest id."""
        x = self.token_embedding(tokens) + self.positional_embedding
        for layer in self.transformer['resblocks']:
            x = layer(x, causal=True)
        return self.ln_final(x[torch.arange(len(x)), tokens.argmax(1)]) @ self.text_projection


def load_clip(path):
    """CLIP in fp32, eval mode, from open_clip's .safetensors, sized by the tensors."""
    known_file(path, *VIT_G)
    try:
        state = {key: w.float() for key, w in load_file(path).items()}
        check('visual.proj' in state, 'it lacks open_clip\'s names (transformers\' file has others)')
        sizes = []
        for tower in ('visual.', ''):
            count = sum(key.startswith(f'{tower}transformer.') for key in state) // 12
            hidden, width = state[f'{tower}transformer.resblocks.0.mlp.c_fc.weight'].shape
            sizes.append((width, count, hidden))
        grid = round((len(state['visual.positional_embedding']) - 1) ** 0.5)
        with torch.device('meta'):
            net = CLIP((*sizes[0], state['visual.conv1.weight'].shape[-1], grid), sizes[1],
                       *(len(state['token_embedding.weight']), state['visual.proj'].shape[1]))
        net.load_state_dict(state, strict=True, assign=True)
    except BROKEN as error:
        raise ValueError(f'{path} does not hold CLIP with open_clip\'s names; {reason(error)}') from None
    return net.eval().requires_grad_(False)


def to_clip(image, side):
    """CLIP's input (1, 3, side, side) of a uint8 picture (256, 256, 3), on the very path of the tables.

    Between [-1, 1] and uint8 again levels are cut, not rounded (GigaGAN evaluation.py 22-31): float32
    leaves 1 ... 63 just below their whole number, and each of these becomes one darker."""
    x = (torch.from_numpy(image) / 255 - 0.5) / 0.5
    x = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    x = np.array(Image.fromarray(x.numpy()).resize((side, side), Image.BICUBIC))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])        # open_clip constants.py 1-2
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.from_numpy(x) / 255 - mean) / std).permute(2, 0, 1)[None]


def clip_tokens(tokenizer, captions):
    """(B, 77) of 'A photo depicts ' + caption, as the tables have it; 0 after the end token."""
    tokens = tokenizer(['A photo depicts ' + caption for caption in captions])
    end = (tokens == tokenizer.end).int().argmax(1, keepdim=True)       # the first; clip_text pads so
    return tokens.masked_fill(torch.arange(tokens.shape[1]) > end, 0)


# ---------------------------------------------------------------------------------------------------
# The command line: what a user can get wrong is answered in one sentence

@torch.no_grad()
def run_clip(args):
    """The mean over pictures i of their cosine with caption i: not scaled, nothing cut off."""
    check(len(args.sets) == 2, f'expected FAKE and CAPTIONS with --clip, got {" ".join(args.sets)}')
    check(not (args.skip_bad or args.save_stats or args.coco or args.preset != 'clean'
               or args.weights != default_weights()),
          '--skip-bad, --save-stats, --coco, --preset and --weights are for FID; leave them out with --clip')
    pictures = read_pictures(args.sets[0], args, 'clean', args.num)
    count = next(pictures)
    captions = read_lines(args.sets[1], 'CAPTIONS')[:args.num or None]
    check(len(captions) == count, f'expected a caption for each picture, found {len(captions)} captions '
          f'in {args.sets[1]} and {count} pictures in {args.sets[0]}; --num N takes the first N of both, '
          'which is right only if no picture is missing between them')
    tokenizer = clip_text.load_tokenizer(args.tokenizer or Path(args.clip).parent)
    clip, cosines = load_clip(args.clip).to(args.device), []
    check(tokenizer.end == clip.token_embedding.num_embeddings - 1,
          f'expected the tokenizer of {args.clip}, whose last id is its end token; give --tokenizer')
    for images in pictures:
        texts = captions[len(cosines):len(cosines) + len(images)]
        inputs = torch.cat([to_clip(image, clip.visual.side) for image in images])
        seen = clip.visual(inputs.to(args.device))
        read = clip.text(clip_tokens(tokenizer, texts).to(args.device))
        cosines += F.cosine_similarity(seen, read).tolist()
    check(np.isfinite(cosines).all(), f'expected finite cosines, found NaN; is {args.clip} whole?')
    return dict(clip_score=float(np.mean(cosines)), n=count)


def enough(count, path):
    check(count > 1, f'expected 2 pictures or more in {path}, for a covariance, found {count}')


def measure(path, pictures, preset, inception):
    """What save_stats stores, of the rest that read_pictures(path, ...) yields."""
    moments = Moments()
    for images in filter(None, pictures):
        moments.add(features(inception, images, preset))
    enough(moments.n, path)
    return dict(mu=moments.mu, sigma=moments.sigma, n=moments.n, preset=preset,
                weights_sha256=inception.sha256)


def run_fid(args):
    """The FID of the two sets (None: there is one, to be stored), and what it depends on."""
    check(len(args.sets) == 2 or len(args.sets) == 1 and args.save_stats,
          f'expected REAL and FAKE, or one set and --save-stats FILE, got {" ".join(args.sets)}')
    if target := args.save_stats:
        folder = Path(target).absolute().parent
        check(target.lower().endswith('.npz') and os.access(folder, os.W_OK),
              f'expected an .npz for --save-stats in a folder that can be written, got {target}')
        known = not Path(target).exists()
        with contextlib.suppress(ValueError):
            known = known or load_stats(target)
        check(known, f'--save-stats would replace {target}, which is there already and holds no whole '
                     'statistics; remove it, or give another name')
    for path in args.sets:
        check(Path(path).exists(), f'expected pictures or statistics at {path}, found nothing')
    sets = [load_stats(path) if path.lower().endswith('.npz') else None for path in args.sets]
    check(not (sets[0] and args.save_stats or sets[-1] and args.num),
          '--save-stats takes its first set, and --num its last, as pictures; found statistics')
    presets = {stats['preset'] if stats else args.preset for stats in sets} - {''}
    check(len(presets) < 2, f'expected one preset, found {" and ".join(sorted(presets))} (this run\'s is '
          f'{args.preset}), between which FID means nothing; give --preset, or make the statistics anew')
    preset = ' '.join(presets) or 'unknown'
    pictures = [None if stats else read_pictures(path, args, preset, num)
                for path, stats, num in zip(args.sets, sets, [0, args.num][-len(sets):])]
    for path, some in zip(args.sets, pictures):     # both are opened before hours go into the first
        if some:
            enough(next(some), path)
    inception = load_inception(args.weights).to(args.device) if None in sets else None
    for i, path in enumerate(args.sets):
        sets[i] = sets[i] or measure(path, pictures[i], preset, inception)
        if i == 0 and args.save_stats:
            save_stats(args.save_stats, **sets[0])
        if not sets[i]['preset']:
            warn(f'{path} does not say how its pictures were resized; {preset} is assumed')
        if 0 < sets[i]['n'] < 2048:
            warn(f'{path} has {sets[i]["n"]} pictures, fewer than features: its FID is far too high')
    if args.coco and sets[0]['n'] != COCO:
        warn(f'--coco expects all {COCO} pictures of val2014, found {sets[0]["n"] or "no count"}')
    weights = {stats['weights_sha256'] for stats in sets} - {''}
    if len(weights) > 1:
        warn('the two sets were measured with different files of weights')
    fid = frechet_distance(*(stats[k] for stats in sets for k in ('mu', 'sigma'))) if sets[1:] else None
    return dict(fid=fid, n=[stats['n'] for stats in sets], preset=preset, pipeline=PRESETS.get(preset),
                weights_sha256=sorted(weights))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='presets:\n' + '\n'.join(f'  {name:8s}{does}' for name, does in PRESETS.items()))
    # Where torch keeps what it fetches: users of pytorch-fid have the file there.
    weights = default_weights()
    add, default = parser.add_argument, '(default: %(default)s)'
    add('sets', nargs='+', metavar='SET', help='REAL FAKE; with --clip, FAKE CAPTIONS')
    add('--preset', choices=PRESETS, default='clean', help=default)
    add('--num', type=int, default=0, help='only the first so many pictures of the last set')
    add('--coco', action='store_true', help=f'REAL is COCO val2014: warn unless it has {COCO} pictures')
    add('--save-stats', metavar='FILE', help='store the statistics of the first set as .npz')
    add('--skip-bad', action='store_true', help='leave out pictures that do not open')
    add('--weights', default=weights, help=f'Inception\'s {default}')
    add('--clip', metavar='WEIGHTS', help='CLIP score instead, with open_clip\'s .safetensors')
    add('--tokenizer', help='folder of CLIP\'s vocab.json and merges.txt (default: beside its weights)')
    add('--batch', type=int, default=32, help=f'pictures at a time {default}')
    add('--workers', type=int, default=min(8, os.cpu_count() or 1), help=f'threads that decode {default}')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help=default)
    add('--json', action='store_true', help='print all of the result, as a line of JSON')
    args = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False     # fp32 is fp32; torch's default is TF32 in convolutions
    try:
        check(args.batch > 0 and min(args.num, args.workers) >= 0,
              'expected --batch of 1 or more, --num and --workers of 0 or more')
        usable_device(args.device)
        result = run_clip(args) if args.clip else run_fid(args)
        print(', '.join(f'{key} {value}' for key, value in result.items()), file=sys.stderr)
        number = next(iter(result.values()))
        if args.json or number is not None:
            print(json.dumps(result) if args.json else f'{number:.6f}', flush=True)
    except (ValueError, OSError) as error:
        print(f'fid: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('fid: interrupted', file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print('fid: the device is out of memory; '
              + (f'try --batch {args.batch // 2}' if args.batch > 1 else 'use another --device, or free it'),
              file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
