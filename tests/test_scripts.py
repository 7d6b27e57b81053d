"""Tests of read_official.py, which must not run any code in a file, and of curves.py."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from PIL import Image

import curves
import read_official
import unet

HERE = Path(__file__).parent


def assert_refused(capsys, file, word):
    """Assert that one line has this word, and that no file is left behind."""
    before = sorted(file.parent.rglob('*'))
    with pytest.raises(SystemExit, match='2'):
        read_official.main([str(file), str(file.parent / 'out')])
    error = capsys.readouterr().err
    assert error.startswith('read_official: ') and error.count('\n') == 1 and word in error
    assert sorted(file.parent.rglob('*')) == before


@pytest.fixture(scope='module')
def generator():
    """A narrow UNet with the architecture of SD 1.5, every weight random."""
    torch.manual_seed(9)
    net = UNet2DConditionModel(block_out_channels=(32, 64, 96, 96), cross_attention_dim=48,
                               attention_head_dim=8, sample_size=8)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.1)
    return net


def official(net, processor=AttnProcessor2_0, dtype=torch.float32):
    """Pickle a generator as the official code does (training/sid_training_loop.py 641-650)."""
    net = copy.deepcopy(net).eval().requires_grad_(False).to(dtype)
    net.set_attn_processor(processor())
    return pickle.dumps({'ema': net})


@pytest.mark.parametrize('processor, dtype', [(AttnProcessor2_0, torch.float32),
                                              (XFormersAttnProcessor, torch.float16)])
def test_a_generator_is_read_without_diffusers(processor, dtype, generator, tmp_path):
    (tmp_path / 'network.pkl').write_bytes(official(generator, processor, dtype))
    code = ('import sys; sys.modules.update(dict.fromkeys(["diffusers", "xformers", "peft"])); '
            'import read_official; read_official.main(["network.pkl", "a/student"])')
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True,
                   env={**os.environ, 'PYTHONPATH': str(HERE)})
    folder, = (tmp_path / 'a').iterdir()
    about = json.loads((folder / 'generator.json').read_text())
    assert about == {'t_init': 625, 'size': 64, 'steps': 1}
    ours, theirs = unet.load(folder), generator.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, w in ours.state_dict().items():
        assert torch.equal(w, theirs[name].to(dtype).float())
    assert ours.sample_size == 8 and ours.sizes['heads'] == 8


class Evil:
    """Makes a file in the current folder when it is unpickled carelessly."""

    def __reduce__(self):
        return os.system, ('touch executed',)


def calling(module, name, argument):
    """Pickle a call of a function by its name; pickle itself would require that it exists."""
    parts = [pickle.dumps(part, 3)[2:-1] for part in ('ema', module, name, argument)]
    return b'\x80\x04}' + b''.join(parts[:3]) + b'\x93' + parts[3] + b'\x85Rs.'


@pytest.mark.parametrize('data, word', [
    (pickle.dumps({'ema': Evil()}), 'system'),
    (calling('torch.storage', '_load_from_bytes', pickle.dumps(Evil(), 2)), 'system'),
    (calling('builtins', 'eval', 'open("executed", "w")'), 'builtins.eval'),
    (calling('torch.nn.modules.module', 'warnings.sys.modules', 'x'), 'UNet'),
    (calling('diffusers.utils.import_utils', 'os.system', 'touch executed'), 'UNet'),
    (calling('collections', 'OrderedDict.fromkeys', 'x'), 'OrderedDict.fromkeys'),
    (pickle.dumps({'ema': {}}), 'UNet')],
    ids=lambda value: 'pickle' if isinstance(value, bytes) else value)
def test_a_pickle_that_is_no_generator_is_refused(data, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'network.pkl').write_bytes(data)
    assert_refused(capsys, tmp_path / 'network.pkl', word)


@pytest.mark.parametrize('change, word', [
    (lambda net: net.conv_out.bias.data[0].fill_(float('nan')), 'conv_out.bias'),
    (lambda net: net.conv_out.register_parameter('bias', None), 'conv_out.bias'),
    (lambda net: setattr(net, 'conv_in', torch.nn.Conv2d(9, 32, 3)), 'conv_in.weight'),
    (lambda net: net.register_to_config(cross_attention_dim=1024), '2.1')])
def test_weights_that_do_not_fit_are_refused(change, word, generator, tmp_path):
    net = copy.deepcopy(generator)
    change(net)
    (tmp_path / 'network.pkl').write_bytes(official(net))
    with pytest.raises(unet.UserError, match=f'network.pkl .*{word}'):
        read_official.read_generator(tmp_path / 'network.pkl')


def test_other_files_are_refused(generator, tmp_path, capsys):
    whole, file = official(generator), tmp_path / 'network.pkl'
    assert_refused(capsys, file, 'there is no file')
    for keep in (0, 100, len(whole) // 2):
        file.write_bytes(whole[:keep])
        assert_refused(capsys, file, 'cut off')
    weights = HERE / 'tiny_sd' / 'unet' / 'diffusion_pytorch_model.safetensors'
    file.write_bytes(weights.read_bytes()[:9999])
    assert_refused(capsys, file, 'safetensors')
    torch.save({'ema': torch.zeros(1)}, file)
    assert_refused(capsys, file, 'zip')
    (tmp_path / 'out').mkdir()
    assert_refused(capsys, file, 'out exists already')


def test_curves_follow_the_numbers(tmp_path):
    rows = [{'images': 8 * i, 'loss_fake': float(i), 'grad_G': None if i == 3 else 200.0 - i}
            for i in range(1, 200)]
    rows[25]['loss_fake'] = 1e9         # A spike must not flatten the rest.
    lines = [json.dumps(row) for row in rows] + ['{"images": 1600, "fid": 20.0}', '{"images": 16']
    (tmp_path / 'log.jsonl').write_text('\n'.join(lines))
    curves.main([str(tmp_path)])
    image = np.asarray(Image.open(tmp_path / 'curves.png'))
    dark = (image == [0x17, 0x48, 0x9c]).all(2)
    high, wide = dark.shape[0] // 3, dark.shape[1] // 2
    for panel, rises in ((dark[:high, :wide], True), (dark[2 * high:, wide:], False)):
        y, x = np.nonzero(panel)
        climb = y[x < x.min() + 20].mean() - y[x > x.max() - 20].mean()
        assert (climb > high / 2) if rises else (climb < -high / 2)
        assert x.max() - x.min() > 0.8 * wide
    assert not dark[high:2 * high].any()
