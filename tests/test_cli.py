"""The command line as a user has it: train, sample, export, and what is refused."""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sid_lsg
import unet
from conftest import ROOT, SETTINGS


def call(*arguments, cwd='.', rank=0, world=1):
    """Run main() in this process; return its exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        for name, value in dict(RANK=rank, WORLD=world, TORCHRUN=world > 1).items():
            patch.setattr(sid_lsg, name, value)
        try:
            sid_lsg.main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def python(script, *arguments, cwd):
    """Run a script as a user does, in a process of its own."""
    return subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True)


def pixels(folder, count):
    return [np.asarray(Image.open(folder / f'{i:06d}.png')).astype(int) for i in range(count)]


def difference(images, others):
    return np.abs(np.subtract(images, others)).max()


@pytest.fixture(scope='session')
def work(teacher, tmp_path_factory):
    """Return a folder in which `train` ran once from the command line, and what it printed."""
    folder = tmp_path_factory.mktemp('work')
    return folder, python(ROOT / 'sid_lsg.py', 'train', '--teacher', teacher, cwd=folder)


def test_train_leaves_a_whole_run_folder(work, teacher):
    folder, result = work
    assert result.returncode == 0, result.stderr
    run = folder / 'runs' / '000'
    assert sorted(os.listdir(run)) == ['config.json', 'generator', 'grid_000000000.png',
                                       'grid_000000016.png', 'grid_000000024.png', 'log.jsonl',
                                       'state']
    # safetensors makes files that only their owner can read, unless one prevents it.
    assert len({path.stat().st_mode for path in run.rglob('*') if path.is_file()}) == 1
    rows = [json.loads(line) for line in open(run / 'log.jsonl')]
    assert [row['images'] for row in rows] == [8, 16, 24]
    assert set(rows[0]) == {'images', 'seconds', 'loss_fake', 'grad_fake', 'loss_G', 'xg_xphi',
                            'xphi_xpsi', 'grad_G', 'nan_grads'}
    settings = json.loads((run / 'config.json').read_text())
    assert settings['lr'] == SETTINGS['lr'] and settings['kappa'] == [1.5, 1.5, 1.5]
    info = json.loads((run / 'generator' / 'generator.json').read_text())
    assert len(info.pop('run')) == 64           # a hash of the settings
    assert info == dict(teacher=str(teacher), tokenizer='', t_init=625, steps=1, size=32,
                        images=24)
    assert 'sample --generator runs/000' in result.stdout
    file = 'unet/diffusion_pytorch_model.safetensors'
    before, after = load_file(teacher / file), load_file(run / 'generator' / file)
    assert all((w != before[key]).any() for key, w in after.items() if w.ndim == 4)


@pytest.mark.parametrize('options', ['--kappa 0 0 1', '--size 40 --alpha 1.2'])
def test_every_guidance_and_size_trains(options, teacher, tmp_path):
    result = call('train', '--teacher', teacher, '--out', 'run', *options.split(), cwd=tmp_path)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in open(tmp_path / 'run' / 'log.jsonl')]
    assert all(math.isfinite(row['loss_G']) and row['grad_G'] > 0 for row in rows)


def test_a_bug_shows_its_traceback(teacher, tmp_path):
    """A ValueError is a programmer's mistake. A user's is a UserError."""
    (tmp_path / 'buggy.py').write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import sid_lsg

def generate(G, z, context, *more, **options):
    batch, height = z.shape
sid_lsg.generate = generate
sid_lsg.main()
""")
    result = python('buggy.py', 'train', '--teacher', teacher, cwd=tmp_path)
    assert result.returncode == 1 and 'batch, height = z.shape' in result.stderr
    assert 'Traceback' in result.stderr and 'ValueError: too many values' in result.stderr


def test_sample_takes_the_newest_run_and_labels_its_images(work):
    folder, _ = work
    prompt = 'a red star above a blue ring on a black background'
    result = call('sample', prompt, 'ünï', '--seeds', '0-1,7', '--out', 'images', cwd=folder)
    names = [f'images/{i:06d}.png' for i in range(6)] + ['images/grid.png']
    assert result.code == 0 and result.out.split() == names and result.err == ''
    first, last = Image.open(folder / names[1]), Image.open(folder / names[5])
    assert first.size == (32, 32) and first.text == dict(prompt=prompt, seed='1')
    assert last.text == dict(prompt='ünï', seed='7')
    info = json.loads((folder / 'images' / 'sample.json').read_text())
    assert len(info.pop('run')) == 64
    assert info == dict(
        t_init=625, size=32, images=24, steps=1, precision='fp32',
        jobs=[[text, seed] for text in (prompt, 'ünï') for seed in (0, 1, 7)])


def test_sample_completes_a_folder_and_shares_it_among_processes(work, teacher, tmp_path):
    def ask(count, *more, **options):
        (tmp_path / 'p.txt').write_text('\n'.join(f'a red star {i}' for i in range(count)))
        return call('sample', '--prompts', 'p.txt', '--generator', work[0] / 'runs' / '000',
                    '--batch', 2, *more, cwd=tmp_path, **options)
    assert ask(5, '--out', 'all').code == 0
    images, kept = pixels(tmp_path / 'all', 5), tmp_path / 'all' / '000002.png'
    (tmp_path / 'all' / '000003.png').unlink()
    before = kept.stat().st_mtime_ns
    result = ask(5, '--out', 'all', '--teacher', teacher)       # the one it would take anyway
    assert result.out.split() == ['all/000003.png', 'all/grid.png']
    assert '4 of 5 images are there already' in result.err
    result = ask(6, '--out', 'all')
    assert result.out.split() == ['all/000005.png', 'all/grid.png']
    result = ask(2, '--out', 'all')
    assert result.code == 0 and 'holds 6 images, more than the 2 asked for' in result.err
    assert kept.stat().st_mtime_ns == before
    for more, fact in ((['--steps', 2], 'another steps'), (['--seeds', '7'], 'other prompts or'),
                       (['--precision', 'bf16'], 'another precision')):
        result = ask(6, '--out', 'all', *more)
        assert result.code == 2 and fact in result.err
    for rank, own in ((0, [0, 2, 4]), (1, [1, 3])):
        result = ask(5, '--out', 'shared', rank=rank, world=2)
        assert result.out.split() == [f'shared/{i:06d}.png' for i in own], result.err
    assert difference(pixels(tmp_path / 'all', 5), images) == 0
    assert ask(5, world=2).code == 2            # without --out, each would make a folder


def test_an_image_depends_on_its_prompt_and_seed_alone(work, tmp_path):
    """Not on its neighbours or the batch, including later noise. Half precision is close."""
    def images(name, count, *arguments):
        result = call('sample', *arguments, '--steps', 2, '--generator', work[0] / 'runs' / '000',
                      '--out', tmp_path / name)
        assert result.code == 0, result.err
        return np.stack(pixels(tmp_path / name, count))
    two = 'a red star 1', 'a blue ring', '--seeds', '3-5'
    together, single = images('a', 6, *two), images('b', 6, *two, '--batch', 1)
    alone = images('c', 1, 'a blue ring', '--seeds', '4')
    assert difference(alone[0], together[4]) <= 1 and difference(single, together) <= 1
    assert difference(together[3], together[4]) > 1
    for precision in ('bf16', 'fp16'):
        half = images(precision, 6, *two, '--precision', precision)
        assert 0 < abs(half - together).mean() < 0.02 * together.std()


def test_sample_can_use_the_teacher(teacher, tmp_path):
    ask = ['sample', 'x', '--teacher', teacher, '--teacher-steps', 3, '--out', tmp_path / 'images']
    assert call(*ask).code == 0
    saved = json.loads((tmp_path / 'images' / 'sample.json').read_text())
    assert saved == dict(teacher_steps=3, kappa=1.5, precision='fp32', jobs=[['x', 0]],
                         source=str(teacher))
    assert 'another kappa' in call(*ask, '--kappa', 2).err
    ask[ask.index(teacher)] = shutil.copytree(teacher, tmp_path / 'other')
    assert 'another source' in call(*ask).err


def test_generators_are_found_and_exported(work, tmp_path):
    """By a run, its folders, and an exported folder."""
    run = work[0] / 'runs' / '000'
    for path in (run, run / 'generator', run / 'generator' / 'unet'):
        assert sid_lsg.find_generator(path)[0] == run / 'generator'
    result = call('export', run, tmp_path / 'student')
    assert result.code == 0 and result.out.strip() == str(tmp_path / 'student')
    root, info = sid_lsg.find_generator(tmp_path / 'student')
    assert info['teacher'] == str(root) == str(tmp_path / 'student') and info['t_init'] == 625


def test_pixels_are_quantised_as_in_the_official_code():
    """x 127.5 + 128, clipped and cut: -0.75 becomes 32, where (x + 1) 127.5 would give 31."""
    x = torch.tensor([-2.0, -1.0, -0.75, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert sid_lsg.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 32, 128, 255, 255]


TRAIN = ['train', '--teacher', 'TEACHER']
DDIM = ['sample', 'x', '--teacher', 'TEACHER', '--teacher-steps', '2']
REFUSALS = [
    (['train', '--teacher', 'nowhere'], 'found nothing at nowhere'),
    ([*TRAIN, '--prompts', 'none.txt'], 'none.txt'),
    ([*TRAIN, '--prompts', 'used/config.json'], 'holds JSON'),
    ([*TRAIN, '--out', 'used'], 'used already holds a run'),
    ([*TRAIN, '--size', '36'], 'multiple of 8 pixels, found 36'),
    ([*TRAIN, '--kappa', '1', '2'], 'one number or three, found 2'),
    ([*TRAIN, '--alpha', 'nan'], '--alpha must be finite'),
    ([*TRAIN, '--batch', '8', '--micro-batch', '3'], '--batch 8 must be a multiple'),
    ([*TRAIN, '--device', 'abacus'], '--device abacus'),
    ([*TRAIN, '--t-min', '500', '--t-max', '500'], '--t-min 500'),
    ([*TRAIN, '--seed', '-1'], 'must not be negative'),
    ([*TRAIN, '--fid-stats', 'empty.txt'], 'empty.txt'),
    (['train', '--teacher', 'unknown'], 'learning_rate, which is no setting'),
    (['train', '--teacher', 'text'], "lr '1e-4', which must be of type float"),
    (['train', '--resume', 'used', '--lr', '1'], '--lr cannot change when used is resumed'),
    (['sample', 'x'], 'runs/ holds no generator yet'),
    (['sample', 'x', '--generator', 'late'], '0 to 999, found 5000'),
    (['sample', '--teacher', 'TEACHER', '--teacher-steps', '2'], 'needs a prompt'),
    ([*DDIM, '--seeds', '1-'], 'found 1-'),
    ([*DDIM, '--generator', 'late'], 'without --generator'),
    ([*DDIM, '--out', 'images'], 'images holds images but no sample.json')]


@pytest.fixture(scope='module')
def mess(tmp_path_factory):
    """A folder with everything in it that a refusal needs."""
    folder = tmp_path_factory.mktemp('mess')
    for name, text in {
            'empty.txt': '', 'used/config.json': '{"lr": 0.5}', 'images/000000.png': '',
            'late/generator.json': '{"t_init": 5000}', 'text/sid_lsg.json': '{"lr": "1e-4"}',
            'unknown/sid_lsg.json': '{"learning_rate": 1}'}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize('arguments, fact', REFUSALS, ids=[f'{a[-2]}_{a[-1]}' for a, _ in REFUSALS])
def test_a_mistake_is_refused_before_a_weight_is_read(arguments, fact, mess, teacher, monkeypatch):
    """One sentence with the fact in it, exit code 2, and nothing written."""
    monkeypatch.setattr(unet, 'read_tensors', lambda file: pytest.fail(f'{file} was read'))
    before, began = sorted(mess.rglob('*')), time.process_time()
    result = call(*(str(teacher) if a == 'TEACHER' else a for a in arguments), cwd=mess)
    assert result.code == 2 and fact in result.err, result.err
    assert 'usage' in result.err or result.err.startswith('sid_lsg: ')
    assert 'usage' in result.err or result.err.count('\n') == 1
    assert time.process_time() - began < 2 and sorted(mess.rglob('*')) == before


@pytest.mark.parametrize('error, code, sentence', [
    (KeyboardInterrupt, 130, 'interrupted'), (torch.OutOfMemoryError, 2, 'out of memory')])
def test_what_is_no_bug_is_one_sentence(error, code, sentence, monkeypatch):
    def fails(config):
        raise error
    monkeypatch.setitem(sid_lsg.COMMANDS, 'sample', (fails, *sid_lsg.COMMANDS['sample'][1:]))
    result = call('sample', 'x')
    assert result.code == code and result.err.startswith(f'sid_lsg: {sentence}')


def test_the_defaults_are_the_papers():
    c = sid_lsg.TrainConfig()
    assert (c.kimg, c.lr, c.fake_lr, c.batch, c.alpha, c.t_init, c.t_min, c.t_max, c.ema_kimg,
            c.ema_rampup, c.kappa) == (8806, 1e-6, 1e-6, 512, 1, 625, 20, 980, 50, 0.05, 3 * (1.5,))


def test_workers_of_xdist_know_the_gpu_that_is_hidden_from_programs(tmp_path):
    """A GPU that is there if CUDA_VISIBLE_DEVICES is 7 stands in for a real one."""
    shutil.copy(ROOT / 'tests' / 'conftest.py', tmp_path)
    (tmp_path / 'stand_in.py').write_text("""
import os, torch
torch.cuda.is_available = lambda: os.environ.get('CUDA_VISIBLE_DEVICES') == '7'
import sid_lsg
sid_lsg.choose_device = torch.device
""")
    (tmp_path / 'test_gpu.py').write_text("""
import os, torch

def test_given_back(cuda):
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '7' and torch.cuda.is_available()
    assert cuda == torch.device('cuda')
""")
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '7', 'PYTHONPATH': f'{tmp_path}:{ROOT}'}
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '1', '-p', 'stand_in', '-p',
         'no:cacheprovider', 'test_gpu.py'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert '1 passed' in result.stdout and 'skipped' not in result.stdout, result.stdout


def test_cuda_agrees_with_the_cpu_and_no_iteration_waits_for_it(cuda, teacher, tmp_path,
                                                                monkeypatch):
    """From the second iteration on, making the host wait is an error. The log may wait."""
    end_iteration, rows = sid_lsg.Run.end_iteration, {}

    def watched(run, iteration):
        torch.cuda.set_sync_debug_mode('default')
        stop = end_iteration(run, iteration)
        going_on = run.device.type == 'cuda' and iteration < run.iterations - 1
        torch.cuda.set_sync_debug_mode('error' if going_on else 'default')
        return stop
    monkeypatch.setattr(sid_lsg.Run, 'end_iteration', watched)
    for name, *more in (('cpu',), ('cuda',), ('cuda_bf16', '--precision', 'bf16')):
        device, run = name.split('_')[0], tmp_path / name
        result = call('train', '--teacher', teacher, '--out', run, '--device', device,
                      '--micro-batch', 4, *more)
        assert result.code == 0, result.err
        rows[name] = [json.loads(line) for line in open(run / 'log.jsonl')]
        assert call('sample', 'a red star 1', '--seeds', '0-2', '--steps', 2, '--generator',
                    tmp_path / 'cpu', '--device', device, '--out', tmp_path / name / 'x').code == 0
        assert difference(pixels(tmp_path / 'cpu' / 'x', 3), pixels(run / 'x', 3)) <= 1
    for name in ('loss_fake', 'grad_fake', 'xg_xphi'):
        assert rows['cuda'][0][name] == pytest.approx(rows['cpu'][0][name], rel=1e-3), name
        assert rows['cuda_bf16'][0][name] == pytest.approx(rows['cpu'][0][name], rel=0.05), name
