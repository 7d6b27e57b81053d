"""FID and CLIP score against the public implementations, the numbers themselves, and the command line.

No real weights fit a repository, so nets are compared on random ones, drawn by numpy's RandomState, whose
stream never changes. What pytorch-fid 0.3.0, torch-fidelity 0.4.0, clean-fid 0.1.35 and open_clip 3.3.0 make of
them (with torch 2.13.0, torchvision 0.28.0, Pillow 13.0.0) is stored in fid_reference.npz, which this made in a
virtual environment of its own:

    pip install torch==2.13.0 scipy safetensors tokenizers
    pip install --no-deps torchvision==0.28.0 pytorch-fid==0.3.0 torch-fidelity==0.4.0 clean-fid==0.1.35 \\
        open_clip_torch==3.3.0 ftfy regex wcwidth tqdm pytest pluggy iniconfig packaging
    python tests/test_fid.py
"""

import argparse
import json
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
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import clip_text
import fid

REFERENCE = HERE / 'fid_reference.npz'
TOKENIZER = HERE / 'tiny_sd' / 'tokenizer'
WORDS = len(json.loads((TOKENIZER / 'vocab.json').read_text()))

# Two correct implementations differ by float32 rounding, some 1e-6 of the largest value.
TOLERANCE = 1e-5

# Heights and widths whose centre crops round differently in the presets: (300 - 213) / 2 = 43.5.
SIZES = {'clean': (300, 213), 'tf': (213, 300), 'pytorch': (120, 90)}
CAPTIONS = ['a red star above a blue ring on a black background', 'Two GREEN squares', 'a blue ring']
VISION, TEXT = (48, 3, 209, 14, 2), (32, 2, 128)        # width, layers, hidden (int(48 * 4.3637)); patch, grid


def random_state(shapes):
    """Weights for every name, by name alone: matrices keep the size of what passes through, the rest has values
    of its own that show when two are exchanged."""
    state = {}
    for name, shape in shapes.items():
        u = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
        if len(shape) == 4 or len(shape) == 2 and 'embedding' not in name:
            u *= (6 / (np.prod(shape) / shape[0])) ** 0.5       # ReLU halves the variance
        elif name.endswith(('running_var', 'norm.weight', 'bn.weight')) or re.search(r'ln_\w+\.weight', name):
            u = 1 + u / 2
        else:
            u *= 0.3
        state[name] = torch.tensor(u, dtype=torch.float32)
    return state


def picture(seed, height, width):
    """uint8 (height, width, 3): waves with noise on them, every level from 0 to 255 in it."""
    r = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width][..., None] / 20
    waves = np.sin(x * r.uniform(-1, 1, 3) + y * r.uniform(-1, 1, 3) + r.uniform(0, 6, 3))
    return (128 + 110 * waves + r.uniform(-40, 40, (height, width, 3))).clip(0, 255).astype(np.uint8)


def make_reference():
    """Everything in fid_reference.npz, by other people's code."""
    library = torch.library.Library('torchvision', 'DEF')       # torchvision asks for it, beside a CPU build of torch
    for name in ('nms', 'qnms'):
        library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    import open_clip
    import pytorch_fid.inception
    import torchvision.transforms.functional as TF
    from cleanfid.resize import make_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    made = {}

    net = pytorch_fid.inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    shapes = {k: tuple(w.shape) for k, w in net.state_dict().items() if 'tracked' not in k}
    made['inception_names'] = np.array([f'{k} {list(s)}' for k, s in shapes.items()])
    weights = random_state(shapes)
    pytorch_fid.inception.load_state_dict_from_url = lambda *a, **k: weights
    theirs = pytorch_fid.inception.InceptionV3([3], resize_input=True, normalize_input=True).eval()
    torch.save(weights, '/tmp/random_inception.pth')
    fidelity = FeatureExtractorInceptionV3(
        'inception', ['2048'], feature_extractor_weights_path='/tmp/random_inception.pth').eval()

    def chw(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]

    with torch.no_grad():
        image = Image.fromarray(picture(1, *SIZES['clean']))
        image = TF.center_crop(image, min(image.size)).resize((256, 256), Image.LANCZOS)
        resized = chw(make_resizer('PIL', False, 'bicubic', (299, 299))(np.array(image)))
        theirs.resize_input = theirs.normalize_input = False
        made['clean'] = theirs((resized - 128) / 128)[0].flatten(1).numpy()
        a = picture(2, *SIZES['tf'])        # cocodataset_tool.py 230-235
        crop = min(a.shape[:2])
        a = a[(a.shape[0] - crop) // 2:(a.shape[0] + crop) // 2, (a.shape[1] - crop) // 2:(a.shape[1] + crop) // 2]
        image = chw(Image.fromarray(a).resize((256, 256), Image.LANCZOS))
        made['tf'] = fidelity(image)[0].numpy()
        theirs.resize_input = theirs.normalize_input = True
        made['pytorch'] = theirs(TF.to_tensor(picture(3, *SIZES['pytorch']))[None])[0].flatten(1).numpy()
        same = chw(picture(4, 299, 299))
        theirs.resize_input = theirs.normalize_input = False
        a, b = theirs((same.float() - 128) / 128)[0].flatten(1), fidelity(same)[0]
        print(f'pytorch-fid and torch-fidelity differ by {(a - b).abs().max() / a.abs().max():.1e}; features are '
              f'{a.mean():.2f} in the mean, {a.std():.2f} apart, {a.max():.2f} at most')

        config = json.loads((Path(open_clip.__file__).parent / 'model_configs/ViT-g-14.json').read_text())
        with torch.device('meta'):
            full = open_clip.CLIP(**config).state_dict()
        made['clip_names'] = np.array([f'{k} {list(w.shape)}' for k, w in full.items()])
        clip = open_clip.CLIP(
            24, dict(layers=VISION[1], width=VISION[0], head_width=VISION[0] // 16, mlp_ratio=4.3637, patch_size=14,
                     image_size=28),
            dict(context_length=77, vocab_size=WORDS, width=TEXT[0], heads=16, layers=TEXT[1])).eval()
        clip.load_state_dict(random_state({k: tuple(w.shape) for k, w in clip.state_dict().items()}))
        prepare = open_clip.image_transform(28, is_train=False)
        inputs = []
        for i in range(3):      # GigaGAN data_util.py 62-69, evaluation.py 22-31, evaluation.py 56-79
            image = TF.center_crop(Image.fromarray(picture(10 + i, 300, 213)), 213)
            x = TF.to_tensor(TF.resize(image, 256, TF.InterpolationMode.LANCZOS))
            x = ((TF.normalize(x, [0.5] * 3, [0.5] * 3) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
            inputs.append(prepare(Image.fromarray(x.permute(1, 2, 0).numpy())))
        tokenizer = clip_text.load_tokenizer(TOKENIZER)
        tokens = tokenizer(['A photo depicts ' + text for text in CAPTIONS])
        for row in tokens:
            row[row.tolist().index(tokenizer.end) + 1:] = 0
        made['clip_inputs'], made['clip_tokens'] = torch.stack(inputs).numpy(), tokens.numpy()
        seen, read = clip.encode_image(torch.stack(inputs)), clip.encode_text(tokens)
        made['clip_seen'], made['clip_read'] = seen.numpy(), read.numpy()
        made['clip_score'] = torch.nn.functional.cosine_similarity(seen, read).mean().numpy()
    np.savez_compressed(REFERENCE, **made)
    print(REFERENCE.stat().st_size, 'bytes,', {k: v.shape for k, v in made.items()}, made['clip_score'])


@pytest.fixture(scope='module')
def reference():
    with np.load(REFERENCE) as file:
        return {key: file[key] for key in file.files}


def assert_close(ours, theirs):
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= TOLERANCE, f'off by {error:.1e} of the largest value'


# ---------------------------------------------------------------------------------------------------
# The nets and the way to them

def inception_weights():
    return random_state({k: tuple(w.shape) for k, w in fid.Inception().state_dict().items() if 'tracked' not in k})


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    """The net of random weights, from a .pth of the kind of 2019, as the published one is."""
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    torch.save(inception_weights(), path, _use_new_zipfile_serialization=False)
    return fid.load_inception(path)


def names(net):
    return sorted(f'{k} {list(w.shape)}' for k, w in net.state_dict().items() if 'tracked' not in k)


def test_names_and_shapes_are_the_published_ones(reference):
    with torch.device('meta'):
        inception, clip = fid.Inception(), fid.CLIP()
    assert names(inception) == sorted(reference['inception_names'])
    assert names(clip) == sorted(reference['clip_names']) and len(reference['clip_names']) == 782
    # Random weights do not show CLIP's eps: what passes through its norms is of order 1.
    assert {m.eps for m in clip.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize('preset', SIZES)
def test_features_equal_the_reference(preset, inception, reference):
    """From an upright, a lying and an odd picture to 2,048 numbers: crop, resizes, scale and net. clean: torchvision,
    Pillow, clean-fid, pytorch-fid's net; tf: the official crop, torch-fidelity; pytorch: pytorch-fid."""
    seed = list(SIZES).index(preset) + 1
    assert_close(fid.features(inception, [picture(seed, *SIZES[preset])], preset), reference[preset])


@pytest.mark.parametrize('side', [256, 512])
def test_resizes_equal_their_models(side):
    """Pillow's float bicubic, and NVIDIA's way to TensorFlow's bilinear, to 0.01 of 255."""
    image = picture(5, side, side)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    channels = [Image.fromarray(c.numpy()).resize((299, 299), Image.BICUBIC) for c in x[0]]
    theirs = torch.from_numpy(np.stack([np.array(c).clip(0, 255) for c in channels]))[None]
    assert (fid.to_input(image, 'clean') * 128 + 128 - theirs).abs().max() < 0.01
    theta = torch.eye(2, 3)[None]
    theta[:, 0, 2] = theta[:, 1, 2] = 1 / side - 1 / 299
    grid = torch.nn.functional.affine_grid(theta, (1, 3, 299, 299), align_corners=False)
    theirs = torch.nn.functional.grid_sample(x, grid, padding_mode='border', align_corners=False)
    assert (fid.to_input(image, 'tf') * 128 + 128 - theirs).abs().max() < 0.01


@pytest.fixture(scope='module')
def clip_path(tmp_path_factory):
    with torch.device('meta'):
        net = fid.CLIP(VISION, TEXT, vocab=WORDS, out=24)
    path = tmp_path_factory.mktemp('clip') / 'clip.safetensors'
    save_file(random_state({k: tuple(w.shape) for k, w in net.state_dict().items()}), path)
    return path


def test_clip_towers_equal_open_clip(clip_path, reference):
    clip = fid.load_clip(clip_path)
    assert_close(clip.visual(torch.from_numpy(reference['clip_inputs'])), reference['clip_seen'])
    assert_close(clip.text(torch.from_numpy(reference['clip_tokens'])), reference['clip_read'])


def test_clip_that_is_not_whole_is_refused(clip_path, tmp_path):
    whole = load_file(clip_path)
    for tensors in (whole | {'more': torch.zeros(1)}, {k: w for k, w in whole.items() if k != 'ln_final.bias'}):
        save_file(tensors, tmp_path / 'other.safetensors')
        with pytest.raises(ValueError, match='does not hold CLIP .*"(more|ln_final.bias)"'):
            fid.load_clip(tmp_path / 'other.safetensors')


def test_clip_input_takes_the_path_of_the_tables(reference):
    """Crop, LANCZOS, the off-by-one, bicubic and scale against torchvision and open_clip; the prompt's beginning."""
    for i, theirs in enumerate(reference['clip_inputs']):
        image = fid.shrink(Image.fromarray(picture(10 + i, 300, 213)), 'clean')
        assert np.abs(fid.to_clip(image, 28)[0].numpy() - theirs).max() < 1e-6
    tokens = fid.clip_tokens(clip_text.load_tokenizer(TOKENIZER), CAPTIONS)
    assert tokens.tolist() == reference['clip_tokens'].tolist()


def test_clip_score_on_the_command_line(clip_path, reference, tmp_path, capsys):
    (tmp_path / 'fake').mkdir()
    for i in range(3):      # 8, 9, 10: in natural order
        Image.fromarray(picture(10 + i, 300, 213)).save(tmp_path / 'fake' / f'{8 + i}.png')
    (tmp_path / 'captions.txt').write_text('\n'.join([*CAPTIONS, '', 'one too many']), encoding='utf-8-sig')
    arguments = ['--clip', clip_path, tmp_path / 'fake', tmp_path / 'captions.txt', '--tokenizer', TOKENIZER]
    fid.main([*map(str, arguments), '--num', '3', '--batch', '2'])
    out, err = capsys.readouterr()
    assert float(out) == pytest.approx(float(reference['clip_score']), abs=2e-6)
    assert 'NOT THE PUBLISHED FILE' in err


# ---------------------------------------------------------------------------------------------------
# The distance

def test_distance_with_known_answers():
    """A shift; commuting covariances, a fifth of whose eigenvalues are 0; and nothing at all."""
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


def samples(n, seed, d=200):
    r = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) / d ** 0.5
    return np.maximum(r.standard_normal((n, d)) @ mix + seed / 10, 0)


def test_distance_equals_sqrtm_and_the_nuclear_norm():
    """Full rank: scipy's matrix root, to 1e-9. Rank 99 of 200, where that goes complex: with centred rows X and Y the
    trace of the root is the sum of singular values of X Y^T / (n - 1), to 1e-5."""
    import scipy.linalg
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (samples(3000, 1), samples(3000, 2)))
    known = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(known, rel=1e-9)
    x, y = samples(100, 1), samples(100, 2)
    root = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T, compute_uv=False).sum() / 99
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    known = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * root
    assert fid.frechet_distance(x.mean(0), s1, y.mean(0), s2) == pytest.approx(known, abs=1e-5)


def test_what_is_no_covariance_is_told(capsys):
    eye = np.eye(4)
    fid.frechet_distance(np.zeros(4), np.diag([1.0, 1, 1, -1e-4]), np.zeros(4), eye)
    assert 'below 0' in capsys.readouterr().err
    with pytest.raises(ValueError, match='below 0'):
        fid.frechet_distance(np.zeros(4), eye, np.zeros(4), np.diag([1.0, 1, 1, -4]))
    with pytest.raises(ValueError, match='dimension'):
        fid.frechet_distance(np.zeros(4), eye, np.zeros(5), np.eye(5))


def test_moments_in_batches_and_shards_equal_numpy():
    """Float64 throughout: in float32 the mean alone would be 1e-6 off."""
    x = samples(1000, 1, 50).astype(np.float32)
    moments, shard = fid.Moments(), fid.Moments()
    for rows in np.split(x, [1, 300, 600]):
        (moments if len(rows) < 400 else shard).add(torch.from_numpy(rows))
    moments.merge(shard.n, shard.sum, shard.product)
    assert moments.n == 1000 and np.abs(moments.mu - x.astype(np.float64).mean(0)).max() < 1e-13
    assert np.abs(moments.sigma - np.cov(x.astype(np.float64), rowvar=False)).max() < 1e-12
    with pytest.raises(ValueError, match='picture 1001'):
        moments.add([[0.0] * 50, [np.nan] * 50])


# ---------------------------------------------------------------------------------------------------
# The command line. Inception takes a second a picture here, so a stand-in looks at 12 colours of each.

class StandIn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.sha256 = torch.nn.Parameter(torch.ones(())), 'stand-in'

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) * self.weight


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(fid, 'load_inception', lambda path: StandIn())


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """Two folders of 12 pictures, made hard to list and to read; and their statistics by numpy."""
    folder = tmp_path_factory.mktemp('sets')
    for k, name in enumerate(('real', 'fake')):
        for below in (name, f'{name} elsewhere', f'{name}/.hidden'):
            (folder / below).mkdir()
        (folder / name / 'below').symlink_to(folder / f'{name} elsewhere')
        for i in range(12):
            image = Image.fromarray(picture(100 * k + i, 40 + i % 3, 50))
            image = image.convert({3: 'L', 4: 'RGBA', 5: 'P'}.get(i, 'RGB'))
            below, suffix = 'below/' * (i > 9), {6: 'PNG', 7: 'jpeg', 8: 'BMP'}.get(i, 'png')
            image.save(folder / name / f'{below}{i}.{suffix}')
        (folder / name / 'again.png').symlink_to(folder / name / '0.png')
        (folder / name / 'notes.txt').write_text('no picture')
        (folder / name / 'loop').symlink_to(folder / name)          # two would have been followed 2^40 ways
        (folder / name / 'below' / 'loop').symlink_to(folder / name)
        for copy in ('.hidden/1.png', '._2.png'):       # by Jupyter and macOS
            image.save(folder / name / copy)
    np.save(folder / 'real.npy', np.stack([picture(i, 40, 50) for i in range(12)]))
    np.savez(folder / 'fake.npz', images=np.stack([picture(100 + i, 40, 50) for i in range(12)]))
    return folder


def answer(capsys, *arguments):
    """The number on stdout, alone there, and what is on stderr."""
    fid.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return float(out), err


def test_folders_are_read_whole_and_in_order(sets, stand_in, capsys):
    """Recursive through links, any case of suffix, no file twice, none that is hidden; result independent of batch and threads, the last batch counts;
    what was read is told, with warnings where it moves the number."""
    def moments(name):
        paths = [sets / name / f for f in ('0.png 1.png 2.png 3.png 4.png 5.png 6.PNG 7.jpeg 8.BMP 9.png '
                                           'below/10.png below/11.png').split()]
        x = torch.cat([StandIn()(fid.to_input(fid.shrink(Image.open(p), 'clean'), 'clean')) for p in paths])
        x = x.detach().double().numpy()
        return x.mean(0), np.cov(x, rowvar=False)
    known = fid.frechet_distance(*moments('real'), *moments('fake'))
    assert known > 0.01
    for options in ([], ['--batch', 5, '--workers', 0], ['--batch', 1, '--workers', 3]):
        value, err = answer(capsys, sets / 'real', sets / 'fake', *options)
        assert value == pytest.approx(known, abs=1e-6)
    for told in ('all 12 pictures, 0.png ... 11.png', '3 PNG RGB 50x40', 'RGBA: alpha', 'has JPEGs', 'preset clean',
                 'has 12 pictures, fewer', 'LANCZOS to 256'):
        assert told in err, told
    assert 'the first 10 of 12 pictures, 0.png ... 9.png' in answer(capsys, sets / 'real', sets / 'fake', '--num', 10)[1]


def test_presets_differ_and_arrays_equal_folders(sets, stand_in, capsys, tmp_path):
    """.npy, .npz and a folder of the same pixels give the same; three presets give three numbers."""
    (tmp_path / 'real').mkdir()
    for i, image in enumerate(np.load(sets / 'real.npy')):
        Image.fromarray(image).save(tmp_path / 'real' / f'{i}.png')
    values = set()
    for preset in fid.PRESETS:
        value, err = answer(capsys, sets / 'real.npy', sets / 'fake.npz', '--preset', preset, '--batch', 5)
        assert answer(capsys, tmp_path / 'real', sets / 'fake.npz', '--preset', preset)[0] == value
        assert f'preset {preset}, pipeline {fid.PRESETS[preset]}' in err
        values.add(value)
    assert len(values) == 3


def test_statistics_are_stored_whole_and_reused(sets, stand_in, capsys, tmp_path):
    path = tmp_path / 'real.npz'
    fid.main([str(sets / 'real'), '--save-stats', str(path), '--coco'])
    out, err = capsys.readouterr()
    assert out == '' and '--coco expects all 40504' in err and [p.name for p in tmp_path.iterdir()] == ['real.npz']
    whole, _ = answer(capsys, sets / 'real', sets / 'fake')
    stored, err = answer(capsys, path, sets / 'fake')
    assert stored == whole and 'does not say' not in err
    fid.main([str(path), str(sets / 'fake'), '--json'])
    result = json.loads(capsys.readouterr().out)
    assert result['fid'] == pytest.approx(whole, abs=1e-6) and result['n'] == [12, 12]
    assert result['preset'] == 'clean' and result['weights_sha256'] == ['stand-in']
    file = dict(np.load(path))
    assert (file['n'], file['preset'], file['res'], file['weights_sha256']) == (12, 'clean', 256, 'stand-in')
    for keys in (('mu', 'sigma'), ('mean', 'cov')):        # other people's: ADM's has mu_s and pictures, too
        np.savez(tmp_path / 'bare.npz', arr_0=np.load(sets / 'real.npy'), mu_s=0, **dict(zip(keys, (file['mu'], file['sigma']))))
        value, err = answer(capsys, tmp_path / 'bare.npz', sets / 'fake')
        assert value == whole and 'does not say how its pictures were resized' in err
    np.savez(tmp_path / 'other.npz', **{**file, 'weights_sha256': 'another'})
    assert 'different files of weights' in answer(capsys, path, tmp_path / 'other.npz')[1]


def test_memory_stays_flat(tmp_path):
    """Ten times the pictures take no more memory, though they are read ahead by threads and lie in one .npz."""
    args, peaks = argparse.Namespace(batch=4, workers=2, skip_bad=False), []
    for n in (40, 400):
        np.savez(tmp_path / f'{n}.npz', np.zeros((n, 100, 100, 3), np.uint8))
        tracemalloc.start()
        pictures = fid.read_pictures(tmp_path / f'{n}.npz', args, 'pytorch')
        assert next(pictures) == n and sum(len(batch) for batch in pictures) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_how_far_it_is(now, tmp_path, capsys):
    np.save(tmp_path / '8.npy', np.zeros((8, 10, 10, 3), np.uint8))
    pictures = fid.read_pictures(tmp_path / '8.npy', argparse.Namespace(batch=2, workers=1, skip_bad=False), 'pytorch')
    for _ in pictures:                          # their number, and four times two
        now[0] += 4
    assert re.findall('.* left$', capsys.readouterr().err, re.M) == ['4 of 8 pictures, 0.5 a second, 8 s left']


class Code:
    def __reduce__(self):       # who unpickles this makes a folder
        return os.mkdir, ('made by a pickle',)


@pytest.fixture(scope='module')
def mess(sets, clip_path, tmp_path_factory):
    """A working folder with everything in it that a refusal needs."""
    folder = tmp_path_factory.mktemp('mess')
    for name in ('real', 'fake', 'real.npy'):
        (folder / name).symlink_to(sets / name)
    for name in ('empty', 'one', 'cut', 'clip'):
        (folder / name).mkdir()
    image = Image.fromarray(picture(1, 40, 50))
    image.save(folder / 'one' / '0.png')
    for i in range(3):
        image.save(folder / 'cut' / f'{i}.png')
    data = (folder / 'cut' / '1.png').read_bytes()
    (folder / 'cut' / '1.png').write_bytes(data[:len(data) // 2])
    (folder / 'bad').mkdir()
    for i in range(2):
        (folder / 'bad' / f'{i}.png').write_bytes(data[:len(data) // 2])
    stats = dict(mu=np.zeros(12), sigma=np.eye(12))
    np.savez(folder / 'clean.npz', n=9, preset='clean', weights_sha256='x', **stats)
    np.savez(folder / 'tf.npz', n=9, preset='tf', weights_sha256='x', **stats)
    np.savez(folder / 'nan.npz', mu=stats['mu'] * np.nan, sigma=stats['sigma'])
    np.savez(folder / 'small.npz', mu=np.zeros(5), sigma=np.eye(5))
    np.savez(folder / 'pickled.npz', mu=np.array([{}], dtype=object), sigma=np.eye(12))
    np.savez(folder / 'odd.npz', a=np.zeros(3), b=np.zeros(3))
    (folder / 'broken.npz').write_bytes((folder / 'clean.npz').read_bytes()[:500])
    np.savez(folder / 'askew.npz', mu=np.zeros(12), sigma=np.triu(np.ones((12, 12))))
    np.save(folder / 'float.npy', np.zeros((4, 9, 9, 3)))
    np.save(folder / 'flat.npy', np.zeros((4, 0, 9, 3), np.uint8))
    (folder / 'pictures.npz').symlink_to(sets / 'fake.npz')
    data = bytearray((sets / 'fake.npz').read_bytes())
    data[30_000] ^= 1
    (folder / 'changed.npz').write_bytes(data)
    (folder / 'short.npy').write_bytes((sets / 'real.npy').read_bytes()[:30_000])
    (folder / 'stats.pkl').write_bytes(b'no matter')
    (folder / 'captions.txt').write_text('a\nb\n')
    (folder / 'latin.txt').write_bytes(b'caf\xe9\n')
    torch.save({'fc.weight': torch.zeros(1000, 2048)}, folder / 'imagenet.pth')
    torch.save(Code(), folder / 'pickle.pth')
    (folder / 'cut.pth').write_bytes((folder / 'imagenet.pth').read_bytes()[:5000])
    (folder / 'clip' / 'clip.safetensors').symlink_to(clip_path)
    save_file({'vision_model.embeddings.class_embedding': torch.zeros(1)}, folder / 'transformers.safetensors')
    return folder


CLIP = ['--tokenizer', str(TOKENIZER), '--clip']
REFUSALS = {
    'one set': (['real'], '--save-stats'),
    'no such set': (['real', 'nowhere'], 'nowhere'),
    'empty folder': (['empty', 'real'], 'no pictures found in or below empty'),
    'one picture': (['one', 'real'], '2 pictures or more in one'),
    'one of many': (['real', 'fake', '--num', '1'], '2 pictures or more in fake'),
    'a picture for a set': (['real', 'one/0.png'], 'one/0.png'),
    'no picture that opens': (['real', 'bad', '--skip-bad'], '2 pictures or more'),
    'truncated picture': (['cut', 'real'], '1.png'),
    'pickle': (['stats.pkl', 'real'], 'stats.pkl'),
    'pickle in npz': (['pickled.npz', 'real'], 'pickled.npz'),
    'npz of neither': (['odd.npz', 'real'], 'odd.npz'),
    'truncated npz': (['broken.npz', 'real'], 'broken.npz'),
    'float pictures': (['real', 'float.npy'], 'float64'),
    'truncated pictures': (['real', 'short.npy'], 'number 4 is not one'),
    'changed pictures': (['real', 'changed.npz'], 'changed.npz, number'),
    'pictures without height': (['real', 'flat.npy'], '(4, 0, 9, 3)'),
    'the second set, before the first is read': (['cut', 'empty'], 'no pictures found in or below empty'),
    'presets of two files': (['clean.npz', 'tf.npz'], 'clean and tf'),
    'preset of file and run': (['tf.npz', 'real'], '--preset'),
    'NaN in statistics': (['nan.npz', 'real'], 'NaN'),
    'not symmetric': (['askew.npz', 'real'], 'askew.npz'),
    'another dimension': (['small.npz', 'real'], '5 and 12'),
    'statistics of statistics': (['clean.npz', '--save-stats', 'new.npz'], 'as pictures'),
    'nowhere to save': (['real', '--save-stats', 'no/new.npz'], 'no/new.npz'),
    'a name that no set can have': (['real', '--save-stats', 'coco'], 'got coco'),
    'statistics over pictures': (['real', '--save-stats', 'pictures.npz'], 'replace pictures.npz'),
    'device': (['real', 'fake', '--device', 'abacus'], 'abacus'),
    'device without memory': (['real', 'fake', '--device', 'meta'], '--device meta'),
    'batch': (['real', 'fake', '--batch', '0'], '--batch'),
    'no weights': (['real', 'fake', '--weights', 'none.pth'], 'curl -L --create-dirs -o none.pth https'),
    'ImageNet weights': (['real', 'fake', '--weights', 'imagenet.pth'], '1,008 classes'),
    'code in weights': (['real', 'fake', '--weights', 'pickle.pth'], 'pickle.pth'),
    'truncated weights': (['real', 'fake', '--weights', 'cut.pth'], 'cut.pth'),
    'statistics of captions': ([*CLIP, 'clip/clip.safetensors', 'real', 'captions.txt', '--save-stats', 'new.npz'], 'for FID'),
    'weights of FID and CLIP': ([*CLIP, 'clip/clip.safetensors', 'real', 'captions.txt', '--weights', 'cut.pth'], 'for FID'),
    'preset of CLIP': ([*CLIP, 'clip/clip.safetensors', 'real', 'captions.txt', '--preset', 'tf'], 'for FID'),
    'captions too few': ([*CLIP, 'clip/clip.safetensors', 'real', 'captions.txt'], '2 captions'),
    'no captions': ([*CLIP, 'clip/clip.safetensors', 'real', 'none.txt'], 'none.txt'),
    'captions not UTF-8': ([*CLIP, 'clip/clip.safetensors', 'real', 'latin.txt'], 'latin.txt'),
    'no CLIP weights': ([*CLIP, 'none.safetensors', 'real', 'captions.txt', '--num', '2'], '5.47 GB'),
    'CLIP of transformers': ([*CLIP, 'transformers.safetensors', 'real', 'captions.txt', '--num', '2'], 'open_clip'),
    'no tokenizer': (['--clip', 'clip/clip.safetensors', 'real', 'captions.txt', '--num', '2'], 'vocab.json'),
}


@pytest.mark.parametrize('name', REFUSALS)
def test_refusals(name, mess, monkeypatch, capsys):
    """One sentence on stderr with the fact in it, exit code 2, no traceback, nothing made, nothing on stdout."""
    arguments, fact = REFUSALS[name]
    if '--weights' not in arguments:
        monkeypatch.setattr(fid, 'load_inception', lambda path: StandIn())
    monkeypatch.chdir(mess)
    before = sorted(mess.rglob('*'))
    with pytest.raises(SystemExit) as stop:
        fid.main(arguments)
    out, error = capsys.readouterr()
    last = error[error.index('fid: '):]
    assert stop.value.code == 2 and fact in last and 'Traceback' not in error and out == ''
    assert sorted(mess.rglob('*')) == before


def test_broken_pictures_are_left_out_on_request(mess, stand_in, capsys, monkeypatch):
    monkeypatch.chdir(mess)
    _, err = answer(capsys, 'real', 'cut', '--skip-bad')
    assert 'left out cut/1.png' in err and "n [12, 2]" in err


def test_failures_amid_the_work(sets, stand_in, tmp_path, monkeypatch, capsys):
    """A full disk leaves nothing half-written, out of memory is answered with what to do, Ctrl-C with no traceback."""
    def full(file, **arrays):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    def short(self, x):
        raise torch.OutOfMemoryError('CUDA out of memory')

    def pressed(self, x):
        raise KeyboardInterrupt
    for module, name, broken, code, fact in ((np, 'savez', full, 2, 'new.npz (OSError'), (StandIn, 'forward', short, 2, '--batch 4'),
                                             (StandIn, 'forward', pressed, 130, 'fid: interrupted')):
        monkeypatch.setattr(module, name, broken)
        with pytest.raises(SystemExit) as stop:
            fid.main([str(sets / 'real'), '--save-stats', str(tmp_path / 'new.npz'), '--batch', '8'])
        assert stop.value.code == code and fact in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_broken_weights_are_noticed_in_the_features(sets, monkeypatch, capsys):
    net = StandIn()
    net.weight.data.fill_(float('nan'))
    monkeypatch.setattr(fid, 'load_inception', lambda path: net)
    with pytest.raises(SystemExit) as stop:
        fid.main([str(sets / 'real'), str(sets / 'fake')])
    assert stop.value.code == 2 and 'NaN or infinity in picture 0' in capsys.readouterr().err


def test_weights_lie_where_pytorch_fid_leaves_them(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert fid.default_weights() == tmp_path / 'hub' / 'checkpoints' / 'pt_inception-2015-12-05-6726825d.pth'


def test_safetensors_hold_the_same_net(inception, tmp_path, capsys):
    """The same tensors under the other suffix, some with BatchNorm's counter; told to be none of the published files."""
    path, state = tmp_path / 'random.safetensors', inception.state_dict()
    save_file({k: w for k, w in state.items() if 'tracked' not in k or '6' in k}, path)
    again = fid.load_inception(path)
    assert 'NOT THE PUBLISHED FILE' in capsys.readouterr().err and again.sha256 != inception.sha256
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(w, state[k]) for k, w in again.state_dict().items())


if __name__ == '__main__':
    make_reference()
