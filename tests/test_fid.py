"""Compare fid.py with public implementations and numpy, and test its command line.

Networks are compared on random weights. fid_reference.npz holds the results of pytorch-fid 0.3.0,
clean-fid 0.1.35 and open_clip 3.3.0 with torch 2.13.0, torchvision 0.28.0 and Pillow 13.0.0. The
script that wrote it is make_reference() in tests/test_fid.py of commit e8265e7.
"""

import os
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fid
from conftest import ROOT, assert_close
from unet import UserError

REFERENCE = np.load(ROOT / 'tests' / 'fid_reference.npz')


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


def names(net):
    return sorted(f'{k} {list(w.shape)}' for k, w in net.state_dict().items() if 'tracked' not in k)


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    """Return the network of random weights, from a .pth in the old format of the published one."""
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    torch.save(random_state(fid.Inception()), path, _use_new_zipfile_serialization=False)
    return fid.load_inception(path)


@pytest.mark.parametrize('preset, seed, height, width', [
    ('clean', 1, 300, 213), ('pytorch', 3, 120, 90)])       # the crop rounds (300 - 213) / 2 = 43.5
def test_features_equal_the_reference(preset, seed, height, width, inception):
    """Test crop, resizes, scale and network against torchvision, clean-fid and pytorch-fid."""
    assert names(inception) == sorted(REFERENCE['inception_names'])
    features = fid.features(inception, [make_image(seed, height, width)], preset)
    assert_close(features, REFERENCE[preset])


def test_safetensors_hold_the_same_network(inception, tmp_path, capsys):
    """num_batches_tracked may be there or not; another file than the published one is reported."""
    path, state = tmp_path / 'random.safetensors', inception.state_dict()
    save_file({k: w for k, w in state.items() if 'tracked' not in k or '6' in k}, path)
    again = fid.load_inception(path)
    assert 'NOT THE PUBLISHED FILE' in capsys.readouterr().err and again.sha256 != inception.sha256
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(w, state[k]) for k, w in again.state_dict().items())


@pytest.mark.parametrize('n', [300, 100])
def test_distance_equals_that_by_the_nuclear_norm(n):
    """The trace of the root is that norm of X Y^T / (n - 1), at full rank and at rank 99 of 200."""
    r = np.random.default_rng(0)
    x, y = np.maximum(r.standard_normal((2, n, 200)) @ r.standard_normal((2, 200, 200)) / 14, 0)
    m1, m2, s1, s2 = x.mean(0), y.mean(0), np.cov(x.T), np.cov(y.T)
    root = np.linalg.svd((x - m1) @ (y - m2).T, compute_uv=False).sum() / (n - 1)
    known = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * root
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(known, rel=1e-9, abs=1e-5)
    assert 0 <= fid.frechet_distance(m1, s1, m1, s1) < 1e-5


def test_features_that_are_nan_are_refused():
    with pytest.raises(UserError, match='NaN'):
        fid.Moments().add([[0.0], [np.nan]])


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
    """Make a folder of FILES with links, endless loops and files to skip, and a plain one."""
    folder = tmp_path_factory.mktemp('sets')
    for name in ('real/.hidden', 'fake', 'elsewhere'):
        (folder / name).mkdir(parents=True)
    for link, target in {'real/below': 'elsewhere', 'real/twice': 'elsewhere', 'real/loop': 'real',
                         'elsewhere/loop': 'real', 'real/again.png': 'real/0.png'}.items():
        (folder / link).symlink_to(folder / target)
    for i, file in enumerate(FILES[:10] + FILES[11:13]):
        image = Image.fromarray(make_image(i, 40 + i % 3, 50))
        image.convert({3: 'L', 4: 'RGBA', 5: 'P'}.get(i, 'RGB')).save(folder / 'real' / file)
        image = Image.fromarray(make_image(100 + i, 41, 50))
        image.save(folder / 'fake' / f'COCO_val2014_{i:012}.png')
    for skipped in ('.hidden/1.png', '._2.png', 'grid.png'):
        image.save(folder / 'real' / skipped)
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
    assert fid.find_images(sets / 'real') == [sets / 'real' / file for file in FILES]
    for name in ('real', 'fake'):
        files = fid.find_images(sets / name)
        images = [np.array(Image.open(file).convert('RGB')) for file in files]
        x = fid.features(StandIn(1, 1), images, preset).double().numpy()
        moments += [x.mean(0), np.cov(x.T)]
    known = fid.frechet_distance(*moments)
    for batch in (32, 4, 1):
        options = ['--preset', preset, '--batch', batch]
        value, err = answer(capsys, sets / 'real', sets / 'fake', *options)
        assert value == pytest.approx(known, abs=1e-6) and known > 0.01
    for fact in ('real: 15 images', f'preset {preset}: {fid.PRESETS[preset]}', 'stand-in',
                 'the alpha channel of 1 images', 'fake has 12 images of COCO val2014'):
        assert fact in err


def test_statistics_are_stored_and_reused(sets, stand_in, capsys, tmp_path):
    path, bare = tmp_path / 'real.npz', tmp_path / 'bare.npz'
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


class Code:
    def __reduce__(self):       # unpickling this makes a folder
        return os.mkdir, ('made by a pickle',)


@pytest.fixture(scope='module')
def mess(sets, tmp_path_factory):
    """Make a folder with the files that REFUSALS names."""
    folder = tmp_path_factory.mktemp('mess')
    (folder / 'real').symlink_to(sets / 'real')
    (folder / 'empty').mkdir()
    for name in ('cut', 'int16'):
        (folder / name).mkdir()
        Image.fromarray(make_image(1, 40, 50)).save(folder / name / '0.png')
    (folder / 'cut' / '1.png').write_bytes((folder / 'cut' / '0.png').read_bytes()[:3000])
    Image.fromarray(np.full((9, 9), 9000, np.uint16)).save(folder / 'int16' / '1.png')
    mu, sigma = np.zeros(12), np.eye(12)
    fid.save_stats(folder / 'clean.npz', mu, sigma, 9, 'clean', 'x')
    fid.save_stats(folder / 'pytorch.npz', mu, sigma, 9, 'pytorch', 'x')
    np.savez(folder / 'nan.npz', mu=mu * np.nan, sigma=sigma)
    np.savez(folder / 'pickled.npz', mu=np.array([Code()], dtype=object), sigma=sigma)
    np.savez(folder / 'negative.npz', mu=mu, sigma=sigma - 1.1 * np.diag(sigma[0]))
    torch.save(Code(), folder / 'pickle.pth')
    return folder


REFUSALS = {        # arguments: part of the message
    'real': 'got 1 sets',
    'real nowhere': 'nowhere is not a folder',
    'cut empty': 'empty has 0 images',      # before the first set is read
    'cut real': 'cut/1.png is not a complete image',
    'int16 real': 'int16/1.png has I;16 pixels',
    'pickled.npz real': 'pickled.npz is not an .npz of statistics',
    'nan.npz real': 'nan.npz has no mean and covariance of 12',
    'clean.npz negative.npz': 'eigenvalues below 0',
    'pytorch.npz real': "['clean', 'pytorch'] differ",
    'real --save-stats no/new.npz': 'no/new.npz must be an .npz in a folder',
    # where pytorch-fid stores it
    'real real': 'curl -L --create-dirs -o home/hub/checkpoints/pt_inception-2015-12-05-6726825d',
    'real real --weights pickle.pth': 'pickle.pth is damaged or not'}


@pytest.mark.parametrize('arguments', REFUSALS)
def test_refusals(arguments, mess, stand_in, monkeypatch, capsys):
    """Each is one sentence on stderr with exit code 2, nothing on stdout and no new file."""
    if 'real real' in arguments:
        monkeypatch.undo()
    monkeypatch.chdir(mess)
    monkeypatch.setenv('TORCH_HOME', 'home')
    before = sorted(mess.rglob('*'))
    with pytest.raises(SystemExit) as stop:
        fid.main(arguments.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and REFUSALS[arguments] in err[err.index('fid: '):] and out == ''
    assert sorted(mess.rglob('*')) == before


@pytest.mark.parametrize('error, code', [(torch.OutOfMemoryError(), 2), (KeyboardInterrupt(), 130)])
def test_what_is_no_bug_is_one_sentence(error, code, sets, stand_in, monkeypatch, capsys):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(fid, 'features_of', fail)
    with pytest.raises(SystemExit) as stop:
        fid.main([str(sets / 'real'), str(sets / 'fake')])
    assert stop.value.code == code and 'Traceback' not in capsys.readouterr().err
