"""Compare fid.py with public implementations and numpy, and test its command line.

Networks are compared on random weights. fid_reference.npz holds the results of pytorch-fid 0.3.0,
clean-fid 0.1.35 and open_clip 3.3.0 with torch 2.13.0, torchvision 0.28.0 and Pillow 13.0.0. The
script that wrote it is make_reference() in tests/test_fid.py of commit e8265e7.
"""

import os
import re
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import fid
from unet import UserError

REFERENCE = np.load(HERE / 'fid_reference.npz')
# Seed, height and width of an image per preset. The crop rounds (300 - 213) / 2 = 43.5.
IMAGES = {'clean': (1, 300, 213), 'pytorch': (3, 120, 90)}


def random_state(net):
    """Return weights that depend only on each name and shape and keep the size of activations."""
    state = {}
    for name, w in net.state_dict().items():
        u = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, w.shape)
        if w.ndim == 4 or w.ndim == 2 and 'embedding' not in name:
            u *= (6 / (w.numel() / len(w))) ** 0.5      # ReLU halves the variance
        elif re.search(r'running_var$|norm\.weight$|bn\.weight$|ln_\w+\.weight', name):
            u = 1 + u / 2
        else:
            u *= 0.3
        if 'num_batches_tracked' not in name:
            state[name] = torch.tensor(u, dtype=torch.float32)
    return state


def make_image(seed, height, width):
    """Return uint8 (height, width, 3): waves with noise, at all levels from 0 to 255."""
    r = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width][..., None] / 20
    waves = np.sin(x * r.uniform(-1, 1, 3) + y * r.uniform(-1, 1, 3) + r.uniform(0, 6, 3))
    noise = r.uniform(-40, 40, (height, width, 3))
    return (128 + 110 * waves + noise).clip(0, 255).astype(np.uint8)


def assert_close(ours, theirs):
    """Two correct implementations differ by float32 rounding, about 1e-6 of the largest value."""
    assert ours.shape == theirs.shape
    assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * np.abs(theirs).max()


def names(net):
    return sorted(f'{k} {list(w.shape)}' for k, w in net.state_dict().items() if 'tracked' not in k)


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    """Return the network of random weights, from a .pth in the old format of the published one."""
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    torch.save(random_state(fid.Inception()), path, _use_new_zipfile_serialization=False)
    return fid.load_inception(path)


def test_names_and_shapes_are_the_published_ones(inception):
    assert names(inception) == sorted(REFERENCE['inception_names'])


@pytest.mark.parametrize('preset', IMAGES)
def test_features_equal_the_reference(preset, inception):
    """Test crop, resizes, scale and network against torchvision, clean-fid and pytorch-fid."""
    features = fid.features(inception, [make_image(*IMAGES[preset])], preset)
    assert_close(features, REFERENCE[preset])


def test_safetensors_hold_the_same_network(inception, tmp_path, capsys):
    """num_batches_tracked may be there or not; another file than the published one is reported."""
    path, state = tmp_path / 'random.safetensors', inception.state_dict()
    save_file({k: w for k, w in state.items() if 'tracked' not in k or '6' in k}, path)
    again = fid.load_inception(path)
    assert 'NOT THE PUBLISHED FILE' in capsys.readouterr().err and again.sha256 != inception.sha256
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(w, state[k]) for k, w in again.state_dict().items())


def test_default_weights_are_where_pytorch_fid_stores_them(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert fid.default_weights() == tmp_path / 'hub' / 'checkpoints' / Path(fid.URL).name


def test_distance_with_known_answers():
    """Test a shift, commuting covariances with a fifth of the eigenvalues 0, and equal sets."""
    r = np.random.default_rng(0)
    eye, zero = np.eye(64), np.zeros(64)
    assert fid.frechet_distance(zero, eye, zero + 1, eye) == pytest.approx(64, abs=1e-9)
    basis = np.linalg.qr(r.standard_normal((500, 500)))[0]
    a, b = r.uniform(0, 1, (2, 500)) * (np.arange(500) >= 100)
    s1, s2 = basis * a @ basis.T, basis * b @ basis.T
    known = ((a ** 0.5 - b ** 0.5) ** 2).sum()
    mu = r.standard_normal(500)
    assert fid.frechet_distance(mu, s1, mu, s2) == pytest.approx(known, abs=2e-6)
    assert 0 <= fid.frechet_distance(mu, s1, mu, s1) < 2e-6
    for sigmas in ((eye, eye - 1.1 * np.diag(eye[0])), (eye - 1.1 * np.diag(eye[0]), eye)):
        with pytest.raises(UserError, match='below 0'):
            fid.frechet_distance(zero, sigmas[0], zero, sigmas[1])


def samples(n, seed, d=200):
    r = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) / d ** 0.5
    return np.maximum(r.standard_normal((n, d)) @ mix + seed / 10, 0)


def test_distance_equals_sqrtm_and_the_nuclear_norm():
    """Test full rank with sqrtm, and rank 99 of 200 with the nuclear norm of X Y^T / (n - 1)."""
    import scipy.linalg
    for n in (3000, 100):
        x, y = samples(n, 1), samples(n, 2)
        m1, m2, s1, s2 = x.mean(0), y.mean(0), np.cov(x.T), np.cov(y.T)
        if n == 3000:
            root = np.trace(scipy.linalg.sqrtm(s1 @ s2).real)
        else:
            root = np.linalg.svd((x - m1) @ (y - m2).T, compute_uv=False).sum() / (n - 1)
        known = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * root
        assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(known, rel=1e-9, abs=1e-5)


def test_moments_in_batches_and_shards_equal_numpy():
    """All is in float64: in float32 the mean alone would be wrong by 1e-6."""
    x = samples(1000, 1, 50).astype(np.float32)
    moments, shard = fid.Moments(), fid.Moments()
    for rows in np.split(x, [1, 300, 600]):
        (moments if len(rows) < 400 else shard).add(torch.from_numpy(rows))
    for key in ('n', 'sum', 'product'):
        vars(moments)[key] += vars(shard)[key]
    x = x.astype(np.float64)
    assert moments.n == 1000 and np.abs(moments.mu - x.mean(0)).max() < 1e-13
    assert np.abs(moments.sigma - np.cov(x.T)).max() < 1e-12
    with pytest.raises(UserError, match='NaN'):
        moments.add([[0.0] * 50, [np.nan] * 50])


class StandIn(torch.nn.Linear):
    """Average 12 colours of an image, because Inception takes a second per image here."""
    sha256 = 'stand-in'

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(fid, 'load_inception', lambda path: StandIn(1, 1))
    monkeypatch.setattr(fid, 'FEATURES', 12)


FILES = [*'0.png 1.png 2.png 3.png 4.png 5.png 6.PNG 7.jpeg 8.BMP 9.png again.png'.split(),
         'below/10.png', 'below/11.png', 'twice/10.png', 'twice/11.png']


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """Make two folders of FILES with links, endless loops and files to skip."""
    folder = tmp_path_factory.mktemp('sets')
    for k, name in enumerate(('real', 'fake')):
        other = folder / f'{name} elsewhere'
        other.mkdir()
        (folder / name / '.hidden').mkdir(parents=True)
        for link in ('below', 'twice'):
            (folder / name / link).symlink_to(other)
        for i, file in enumerate(FILES[:10] + FILES[11:13]):
            image = Image.fromarray(make_image(100 * k + i, 40 + i % 3, 50))
            image.convert({3: 'L', 4: 'RGBA', 5: 'P'}.get(i, 'RGB')).save(folder / name / file)
        (folder / name / 'again.png').symlink_to(folder / name / '0.png')
        (folder / name / 'loop').symlink_to(folder / name)
        (other / 'loop').symlink_to(folder / name)
        for skipped in ('.hidden/1.png', '._2.png', 'grid.png'):
            image.save(folder / name / skipped)
    return folder


def answer(capsys, *arguments):
    """Run fid.py; return the number, which must be alone on stdout, and stderr."""
    fid.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return float(out), err


@pytest.mark.parametrize('preset', fid.PRESETS)
def test_folders_are_read_whole_and_in_order(preset, sets, stand_in, capsys):
    """Equal images behind links count as often as they are listed, whatever the batch size is."""
    moments = []
    for name in ('real', 'fake'):
        assert fid.find_images(sets / name) == [sets / name / file for file in FILES]
        images = [np.array(Image.open(sets / name / file).convert('RGB')) for file in FILES]
        x = fid.features(StandIn(1, 1), images, preset).double().numpy()
        moments += [x.mean(0), np.cov(x.T)]
    known = fid.frechet_distance(*moments)
    for batch in (32, 4, 1):
        options = ['--preset', preset, '--batch', batch]
        value, err = answer(capsys, sets / 'real', sets / 'fake', *options)
        assert value == pytest.approx(known, abs=1e-6) and known > 0.01
    for fact in ('real: 15 images', f'preset {preset}: {fid.PRESETS[preset]}', 'stand-in',
                 'the alpha channel of 1 images'):
        assert fact in err


def test_statistics_are_stored_and_reused(sets, stand_in, capsys, tmp_path):
    path, bare, other = (tmp_path / f'{name}.npz' for name in ('real', 'bare', 'other'))
    for _ in range(2):      # statistics may be replaced
        fid.main([str(sets / 'real'), '--save-stats', str(path)])
    assert capsys.readouterr().out == '' and os.listdir(tmp_path) == ['real.npz']
    whole, _ = answer(capsys, sets / 'real', sets / 'fake')
    value, err = answer(capsys, path, sets / 'fake')
    assert value == whole and f'warning: {path}' not in err
    stats = fid.load_stats(path)
    assert [*stats.values()][2:] == [15, 'clean', 'stand-in']
    np.savez(bare, mu=stats['mu'], sigma=stats['sigma'])
    value, err = answer(capsys, bare, sets / 'fake')
    assert value == whole and f'{bare} does not name its preset; clean is assumed' in err
    fid.save_stats(other, **stats | {'n': 11, 'weights_sha256': 'another'})
    err = answer(capsys, path, other)[1]
    assert 'different weights' in err and 'other.npz has fewer than 12 images' in err


def test_a_part_of_coco_is_reported(sets, stand_in, capsys, tmp_path):
    for i in range(3):
        (tmp_path / f'COCO_val2014_{i:012}.png').symlink_to(sets / 'real' / f'{i}.png')
    assert 'has 3 images of COCO val2014' in answer(capsys, tmp_path, sets / 'fake')[1]


def test_memory_stays_flat(sets):
    peaks = []
    for n in (40, 400):
        tracemalloc.start()
        fid.measure([sets / 'real' / '0.png'] * n, StandIn(1, 1), 'pytorch', batch=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_progress_is_shown_every_five_seconds(sets, capsys, monkeypatch):
    times = iter(range(0, 99, 3))       # the clock advances 3 seconds per question
    monkeypatch.setattr(fid.time, 'time', lambda: next(times))
    fid.measure([sets / 'real' / '0.png'] * 7, StandIn(1, 1), 'pytorch', batch=2)
    assert capsys.readouterr().err == '4 of 7 images, 7 s left\n7 of 7 images, 0 s left\n'


class Code:
    def __reduce__(self):       # unpickling this makes a folder
        return os.mkdir, ('made by a pickle',)


@pytest.fixture(scope='module')
def mess(sets, tmp_path_factory):
    """Make a folder with the files that REFUSALS names."""
    folder = tmp_path_factory.mktemp('mess')
    (folder / 'real').symlink_to(sets / 'real')
    (folder / 'empty').mkdir()
    for name in ('one', 'cut', 'int16', 'float'):
        (folder / name).mkdir()
        Image.fromarray(make_image(1, 40, 50)).save(folder / name / '0.png')
    (folder / 'cut' / '1.png').write_bytes((folder / 'cut' / '0.png').read_bytes()[:3000])
    Image.fromarray(np.full((9, 9), 9000, np.uint16)).save(folder / 'int16' / '1.png')
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(folder / 'float' / '1.tiff')
    mu, sigma = np.zeros(12), np.eye(12)
    fid.save_stats(folder / 'clean.npz', mu, sigma, 9, 'clean', 'x')
    fid.save_stats(folder / 'pytorch.npz', mu, sigma, 9, 'pytorch', 'x')
    np.savez(folder / 'nan.npz', mu=mu * np.nan, sigma=sigma)
    np.savez(folder / 'small.npz', mu=mu[:5], sigma=sigma[:5, :5])
    np.savez(folder / 'pickled.npz', mu=np.array([Code()], dtype=object), sigma=sigma)
    np.savez(folder / 'askew.npz', mu=mu, sigma=np.triu(np.ones((12, 12))))
    torch.save({'fc.weight': torch.zeros(1000, 2048)}, folder / 'imagenet.pth')
    torch.save(Code(), folder / 'pickle.pth')
    return folder


REFUSALS = {        # arguments: part of the message
    'real': 'got 1 sets',
    'real nowhere': 'nowhere is not a folder',
    'nowhere.npz real': 'nowhere.npz is not an .npz of statistics',
    'one real': 'one has 1 images',
    'cut empty': 'empty has 0 images',      # before the first set is read
    'cut real': 'cut/1.png is not a complete image',
    'int16 real': 'int16/1.png has I;16 pixels',
    'float real': 'float/1.tiff has F pixels',
    'pickled.npz real': 'pickled.npz is not an .npz of statistics',
    'nan.npz real': 'nan.npz has no mean and covariance of 12',
    'askew.npz real': 'askew.npz has no mean',
    'small.npz real': 'small.npz has no mean',
    'clean.npz pytorch.npz': "['clean', 'pytorch'] differ",
    'pytorch.npz real': "['clean', 'pytorch'] differ",
    'clean.npz --save-stats new.npz': 'not clean.npz',
    'real --save-stats no/new.npz': 'no/new.npz must be an .npz in a folder',
    'real --save-stats new': 'new must be an .npz',
    'real --save-stats pickled.npz': 'pickled.npz is not an .npz of statistics',
    'real real --device abacus': '--device abacus',
    'real real --batch 0': '--batch 0',
    'real real --weights none.pth': 'curl -L --create-dirs -o none.pth https',
    'real real --weights imagenet.pth': 'imagenet.pth is damaged or not the Inception',
    'real real --weights pickle.pth': 'pickle.pth is damaged or not'}


@pytest.mark.parametrize('arguments', REFUSALS)
def test_refusals(arguments, mess, stand_in, monkeypatch, capsys):
    """Each is one sentence on stderr with exit code 2, nothing on stdout and no new file."""
    if '--weights' in arguments:
        monkeypatch.undo()
    monkeypatch.chdir(mess)
    before = sorted(mess.rglob('*'))
    with pytest.raises(SystemExit) as stop:
        fid.main(arguments.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and REFUSALS[arguments] in err[err.index('fid: '):] and out == ''
    assert sorted(mess.rglob('*')) == before


@pytest.mark.parametrize('error, code, message', [
    (torch.OutOfMemoryError('CUDA out of memory'), 2, 'fid: out of memory; give a --batch under 8'),
    (RuntimeError('DefaultCPUAllocator: not enough memory'), 2, 'fid: out of memory'),
    (OSError(28, 'No space left on device'), 2, 'fid: [Errno 28] No space left'),
    (KeyboardInterrupt(), 130, 'fid: interrupted'),
    (ValueError('a bug'), None, ''),
    (RuntimeError('a bug'), None, '')])
def test_only_bugs_keep_their_traceback(error, code, message, sets, stand_in, monkeypatch, capsys):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(fid, 'features_of', fail)
    with pytest.raises(SystemExit if code else type(error)) as stop:
        fid.main([str(sets / 'real'), str(sets / 'fake'), '--batch', '8'])
    assert stop.value.code == code if code else stop.value is error
    assert message in capsys.readouterr().err
