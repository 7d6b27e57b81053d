"""A run loses nothing: when interrupted, killed, resumed, shared by processes, or short of disk."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import clip_text
import fid
import sid_lsg
import unet
import vae
from conftest import ROOT, SIGNALS
from unet import UserError

LENGTH = dict(kimg=0.096, save_kimg=0.032)      # 12 iterations of 8, states after 4, 8 and 12
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='needs fork and signals of Linux')


def train(folder, teacher=None, **given):
    """Begin a run of a teacher in a folder, or resume it; an interrupted one raises SystemExit."""
    given |= dict(teacher=str(teacher)) if teacher else {}
    sid_lsg.train(sid_lsg.train_config(resume=str(folder), **given))


def tensors(folder):
    """Return all tensors in and below a folder. A state has one file per network and moment."""
    return {f'{file.stem}.{key}': w for file in folder.rglob('*.safetensors')
            for key, w in load_file(file).items()}


def assert_same_run(folder, other):
    """Assert that two runs have equal states, generators and logs, but for the time."""
    for part in ('state/000000096', 'generator'):
        one, two = tensors(folder / part), tensors(other / part)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert rows(folder) == rows(other)
    assert {path.name for path in other.iterdir()} <= {path.name for path in folder.iterdir()}


def rows(folder):
    """Return log.jsonl without the times."""
    lines = (folder / 'log.jsonl').read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if 'seconds' not in name}
            for line in lines]


@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train(folder, teacher, **LENGTH)
    return folder


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_saves_a_state_and_the_run_resumes_to_the_bit(number, whole, teacher, tmp_path,
                                                               monkeypatch, capsys):
    """It comes in an iteration that saves nothing (the sixth) or in one that does (the eighth)."""
    folder, calls, update_ema = tmp_path / 'run', [], sid_lsg.update_ema
    last = 6 if number == signal.SIGTERM else 8

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == last:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)        # Slurm's own, and the one that torchrun passes on
        update_ema(*arguments)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sid_lsg, 'update_ema', interrupted)
        train(folder, teacher, **LENGTH)
    assert stop.value.code == 128 + number and len(calls) == last
    assert f'--resume {folder}' in capsys.readouterr().out
    assert max(os.listdir(folder / 'state')) == f'{8 * last:09d}'
    with open(folder / 'log.jsonl', 'a') as file:           # a kill can cut off a line
        file.write('{"images": 88, "sec')
    train(folder)
    assert_same_run(folder, whole)
    seconds = [json.loads(line)['seconds'] for line in open(folder / 'log.jsonl')]
    assert seconds == sorted(seconds)                       # the clock continues
    assert (folder / f'grid_{8 * last:09d}.png').exists()   # drawn on resume if it was missing


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import sid_lsg, unet
folder, teacher = Path(sys.argv[1]), sys.argv[2]
random.seed(0)

def newest():
    return max((int(path.name) for path in folder.glob('state/[0-9]*')), default=0)

def dies_while_writing(tensors, file, **metadata):
    write_tensors(tensors, file, **metadata)
    if newest() > begun and file.name == 'adam_G.safetensors':
        os.truncate(file, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

for kill in range(4):
    begun, child = newest(), os.fork()
    if not child:
        if kill % 2:
            write_tensors, unet.write_tensors = unet.write_tensors, dies_while_writing
        sid_lsg.train(sid_lsg.train_config(
            resume=str(folder), teacher=teacher, kimg=0.096, save_kimg=0.008))
        os._exit(0)
    if kill % 2 == 0:
        while newest() <= begun:
            time.sleep(0.005)
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit('the run ended without a state')
        time.sleep(random.random() * 0.1)
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert newest() > begun, 'nothing was saved'
    assert (folder / 'state' / 'unfinished').exists() or kill % 2 == 0
"""


@LINUX
def test_a_run_that_was_killed_four_times_resumes_to_the_bit(whole, teacher, tmp_path):
    """kill -9 at any moment, and while a state is written. The same command begins and resumes."""
    result = subprocess.run([sys.executable, '-c', KILLER, tmp_path / 'run', teacher], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    train(tmp_path / 'run', save_kimg=0.032)
    assert_same_run(tmp_path / 'run', whole)
    assert not (tmp_path / 'run' / 'state' / 'unfinished').exists()


def test_an_error_while_saving_images_costs_no_state(whole, teacher, tmp_path, monkeypatch):
    """Log and state come first. The images that are missing are made up on resume."""
    folder, save_images = tmp_path / 'run', sid_lsg.Run.save_images

    def full(run, seen):
        if seen == 64:
            raise OSError('no space left')
        save_images(run, seen)
    with monkeypatch.context() as patch, pytest.raises(OSError, match='no space left'):
        patch.setattr(sid_lsg.Run, 'save_images', full)
        train(folder, teacher, **LENGTH)
    assert sorted(os.listdir(folder / 'state')) == ['000000032', '000000064']
    assert rows(folder)[-1]['images'] == 64
    train(folder)
    assert_same_run(folder, whole)


@pytest.mark.parametrize('error', [
    ValueError('I/O operation on closed file'), UnicodeEncodeError('charmap', 'κ', 0, 1, '?')])
def test_a_line_that_cannot_be_written_costs_no_state(error, teacher, tmp_path, monkeypatch):
    """Neither on the terminal nor in the log."""
    def fails(*_, **__):
        raise error
    monkeypatch.setattr(sid_lsg, 'print', fails, raising=False)
    (tmp_path / 'run' / 'log.jsonl').mkdir(parents=True)
    train(tmp_path / 'run', teacher)
    assert (tmp_path / 'run' / 'state' / '000000024').is_dir()


@pytest.mark.parametrize('damage', ['weights', 'json'])
def test_a_damaged_state_is_refused_and_the_one_before_it_resumes(damage, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / 'run')
    newest = folder / 'state' / '000000096'
    file = newest / dict(weights='adam_fake.safetensors', json='state.json')[damage]
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match='000000096 is damaged .*; remove it'):
        train(folder)
    shutil.rmtree(newest)
    train(folder)
    assert_same_run(folder, whole)


@pytest.mark.parametrize('part', ['unet', 'vae', 'text_encoder', 'tokenizer', 'prompts'])
def test_a_run_resumes_with_its_own_teacher_and_prompts_alone(part, whole, teacher, tmp_path):
    """A moved teacher is found by --teacher. One that differs deep inside is refused."""
    folder = shutil.copytree(whole, tmp_path / 'run')
    other = shutil.copytree(teacher, tmp_path / 'other')
    settings = (folder / 'config.json').read_text()
    train(folder, other)
    if part in ('tokenizer', 'prompts'):        # one merge or one prompt less
        file = other / dict(tokenizer='tokenizer/merges.txt', prompts='prompts.txt')[part]
        file.write_text(file.read_text().strip().rpartition('\n')[0])
    else:
        module = dict(unet=unet, vae=vae, text_encoder=clip_text)[part]
        net = module.load(other)
        with torch.no_grad():
            next(w for name, w in net.named_parameters()
                 if name.endswith(('to_v.weight', 'v_proj.weight'))).add_(0.01)
        module.save(net, other / part)
    config = (folder / 'config.json').read_text()
    fault = 'prompts' if part == 'prompts' else 'teacher'
    with pytest.raises(UserError, match=f'made with different {fault}; give --{fault} as before'):
        train(folder, other, prompts=str(other / 'prompts.txt'), kimg=1.0)
    assert (folder / 'config.json').read_text() == config != settings   # a refusal changes nothing


def test_other_settings_may_change_on_resume_and_equal_ones_be_given_again(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / 'run')
    assert json.loads((folder / 'config.json').read_text())['micro_batch'] == 0     # for more GPUs
    train(folder, kimg=0.112, save_kimg=0.016, micro_batch=4, kappa=(1.5,), lr=1e-3)
    assert rows(folder)[-1]['images'] == 112 and (folder / 'grid_000000112.png').exists()
    kept = sid_lsg.train_config(resume=str(folder))
    assert (kept.kimg, kept.micro_batch, kept.kappa) == (0.112, 4, (1.5, 1.5, 1.5))


def test_a_teacher_in_the_project_is_found_wherever_the_project_lies(tmp_path):
    settings = sid_lsg.stored(sid_lsg.TrainConfig())
    assert settings['teacher'] == 'tests/tiny_sd'
    unet.write_json(tmp_path / 'config.json', settings)
    assert sid_lsg.train_config(resume=str(tmp_path)).teacher == str(ROOT / 'tests' / 'tiny_sd')


@pytest.mark.parametrize('count, stops', [(9, False), (10, True)])
def test_ten_iterations_of_nan_stop_a_run_and_leave_its_weights_alone(count, stops, teacher,
                                                                      tmp_path, monkeypatch):
    """One bad sample makes all gradients of its batch NaN, and update() turns them into zero."""
    draw_samples, folder = sid_lsg.draw_samples, tmp_path / 'run'

    def broken(config, prompts, shape, iteration, half, indices, drop=0.0):
        texts, z, *others = draw_samples(config, prompts, shape, iteration, half, indices, drop)
        if 4 <= iteration < 4 + count:
            z[0, 0, 0, 0] = torch.nan
        return texts, z, *others
    monkeypatch.setattr(sid_lsg, 'draw_samples', broken)
    with pytest.raises(UserError, match='NaN') if stops else contextlib.nullcontext():
        train(folder, teacher, **{**LENGTH, 'kimg': 0.128})
    bad = rows(folder)[4:4 + count]
    assert all(row['loss_G'] is None and row['nan_grads'] > 100 and row['grad_G'] == 0
               for row in bad)
    if stops:
        assert sorted(os.listdir(folder / 'state')) == ['000000064', '000000096']
        assert torch.equal(*(tensors(state)['G.conv_in.weight']
                             for state in (folder / 'state').iterdir()))
    else:
        assert all(w.isfinite().all() for w in tensors(max((folder / 'state').iterdir())).values())


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_keeps_fp32_weights(precision, teacher, tmp_path, monkeypatch):
    """Only the teacher, which never changes, is in bf16. fp16 has a larger eps and a clip.

    The teacher in bf16 predicts what the fake score network, its copy, predicts under autocast."""
    runs, clips, update, close = [], [], sid_lsg.update, sid_lsg.Run.close
    monkeypatch.setattr(sid_lsg, 'update', lambda o, clip: clips.append(clip) or update(o, clip))
    monkeypatch.setattr(sid_lsg.Run, 'close', lambda run: runs.append(run) or close(run))
    train(tmp_path / 'run', teacher, kimg=0.016, precision=precision)
    run = runs[0]
    assert {p.dtype for net in (run.G, run.fake) for p in net.parameters()} == {torch.float32}
    half = torch.bfloat16 if precision == 'bf16' else torch.float32
    assert run.teacher.conv_in.weight.dtype == half
    x, t, copy = torch.randn(2, 4, 4, 4), torch.tensor([20, 900]), unet.load(teacher)
    with run.autocast(), torch.no_grad():
        context = run.encode(['a red star', ''])
        assert torch.equal(run.teacher(x, t, context), copy(x, t, context))
    clip, eps = dict(bf16=(math.inf, 1e-8), fp16=(1.0, 1e-6))[precision]
    assert clips == 2 * [math.inf, clip] and runs[0].optimizers['G'].eps == eps
    assert all(w.isfinite().all() for w in tensors(tmp_path / 'run').values())


def stand_in_for_inception(setattr=setattr):
    """Let FID use the mean colours of an image's quarters. Inception needs seconds per image."""
    def features(inception, images, preset):
        assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3) and preset == 'clean'
        x = torch.tensor(images).permute(0, 3, 1, 2) / 255
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    stats = dict(mu=np.zeros(12), sigma=np.eye(12), n=9, preset='', weights_sha256='')
    setattr(fid, 'load_stats', lambda path: stats)
    inception = torch.nn.Identity()
    inception.sha256 = ''
    setattr(fid, 'load_inception', lambda path: inception)
    setattr(fid, 'features', features)


SCORING = dict(fid_stats='stats.npz', fid_weights='weights.pth', fid_kimg=0.064, fid_num=20)


def test_a_run_logs_the_fid_of_what_sample_makes(teacher, tmp_path, monkeypatch):
    """Image i has prompt i and seed i. They are made in micro-batches."""
    stand_in_for_inception(monkeypatch.setattr)
    run, features, sizes = tmp_path / 'run', fid.features, []
    captions = [f'a blue ring {i}' for i in range(3)]
    (tmp_path / 'captions.txt').write_text('\n'.join(captions))
    settings = dict(SCORING, fid_prompts=str(tmp_path / 'captions.txt'))

    def counted(inception, images, preset):
        sizes.append(len(images))
        return features(inception, images, preset)
    monkeypatch.setattr(fid, 'features', counted)
    train(run, teacher, **LENGTH, **settings)
    found = {row['images']: row['fid'] for row in rows(run) if 'fid' in row}
    assert list(found) == [64, 96] and sizes == 2 * [8, 8, 4]

    (tmp_path / 'all.txt').write_text('\n'.join(captions[i % 3] for i in range(20)))
    sid_lsg.main(['sample', '--prompts', str(tmp_path / 'all.txt'), '--generator', str(run),
                  '--out', str(tmp_path / 'images')])
    images = [np.asarray(Image.open(tmp_path / 'images' / f'{i:06d}.png')) for i in range(20)]
    moments, stats = fid.Moments(), fid.load_stats('')
    moments.add(features(None, np.stack(images), 'clean'))
    expected = fid.frechet_distance(moments.mu, moments.sigma, stats['mu'], stats['sigma'])
    assert found[96] == pytest.approx(expected, rel=1e-3)


def test_a_signal_while_scoring_costs_no_state(teacher, tmp_path, monkeypatch):
    """The run stops after the next iteration. A FID that was cut off is not logged."""
    stand_in_for_inception(monkeypatch.setattr)
    features, calls = fid.features, []

    def interrupted(*arguments):
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return features(*arguments)
    monkeypatch.setattr(fid, 'features', interrupted)
    with pytest.raises(SystemExit):
        train(tmp_path / 'run', teacher, **LENGTH, **SCORING)
    assert len(calls) == 1 and rows(tmp_path / 'run')[-1]['images'] == 72
    assert not any('fid' in row for row in rows(tmp_path / 'run'))


PAIR = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import sid_lsg, test_run
calls, update_ema = [], sid_lsg.update_ema

def interrupted(*arguments):
    calls.append(1)
    if len(calls) == 5 and sid_lsg.RANK == 1 and not os.path.exists('again'):
        os.kill(os.getpid(), signal.SIGUSR1)
    update_ema(*arguments)
sid_lsg.update_ema = interrupted
test_run.stand_in_for_inception()
sid_lsg.main()
"""


# Adam makes a whole step of a gradient that is rounding alone, hence a smaller learning rate.
SLOW = dict(LENGTH, lr=1e-4, fake_lr=1e-4)


@LINUX
def test_two_processes_equal_one(teacher, tmp_path, monkeypatch):
    """torchrun, interrupted by a signal to one of the two, which both stop, and resumed."""
    settings = {**SLOW, **SCORING, 'teacher': teacher, 'resume': 'run'}
    options = [f'--{name.replace("_", "-")}={value}' for name, value in settings.items()]
    (tmp_path / 'pair.py').write_text(PAIR.format(root=str(ROOT), tests=str(ROOT / 'tests')))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
                '--master_port=0', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', 'pair.py',
                'train', *options]
    first = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert first.returncode and first.stdout.count('Interrupted') == 1, first.stderr
    assert sorted(os.listdir(tmp_path / 'run' / 'state')) == ['000000032', '000000040']
    (tmp_path / 'again').touch()
    second = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0 and second.stdout.count('Distilling') == 1, second.stderr

    stand_in_for_inception(monkeypatch.setattr)
    train(tmp_path / 'one', teacher, **SLOW, **SCORING)
    one, two = (tensors(tmp_path / run / 'state' / '000000096') for run in ('one', 'run'))
    for net in ('G.', 'fake.', 'ema.'):
        a, b = (torch.cat([w.flatten() for key, w in sorted(x.items()) if key.startswith(net)])
                for x in (one, two))
        assert (a - b).norm() < 1e-5 * a.norm()
    for one, two in zip(rows(tmp_path / 'one'), rows(tmp_path / 'run'), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_only_torchrun_makes_several_processes():
    """A pod may set WORLD_SIZE for reasons of its own, and have no user and no HOME."""
    script = """
import pwd
pwd.getpwuid = {}.__getitem__
import sid_lsg
print(sid_lsg.RANK, sid_lsg.WORLD, sid_lsg.TORCHRUN)
sid_lsg.main(['train', '--teacher', 'nobody/nothing'])
"""
    env = {name: value for name, value in os.environ.items() if name != 'HOME'}
    result = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True,
                            text=True, env=env | dict(RANK='3', WORLD_SIZE='4'))
    assert result.stdout.strip() == '0 1 False' and result.returncode == 2
    assert result.stderr.startswith('sid_lsg: found nothing at nobody/nothing')


def test_a_run_needs_no_posix_and_no_rights(whole, teacher, tmp_path, monkeypatch):
    """Windows has two of the signals and syncs no folder and no file that is open for reading. Some
    file systems refuse chmod."""
    sync, fcntl = os.fsync, pytest.importorskip('fcntl')

    def sync_as_windows(handle):
        assert fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR)
        sync(handle)

    def refuse(*arguments, **options):
        raise PermissionError('Operation not permitted')
    for name in ('SIGHUP', 'SIGUSR1'):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(os, 'fsync', sync_as_windows)
    monkeypatch.setattr(os, 'chmod', refuse)
    train(tmp_path / 'run', teacher, **LENGTH)
    assert_same_run(whole, tmp_path / 'run')


@LINUX
def test_nohup_keeps_ignoring_a_closed_terminal(teacher, tmp_path, monkeypatch):
    handlers, update = [], sid_lsg.update
    monkeypatch.setattr(sid_lsg, 'update', lambda *arguments: handlers.append(
        signal.getsignal(signal.SIGHUP)) or update(*arguments))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tmp_path / 'run', teacher, kimg=0.008)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert handlers == 2 * [signal.SIG_IGN]


def test_prompts_that_the_terminal_cannot_show_are_no_error(teacher, tmp_path):
    (tmp_path / 'prompts.txt').write_text('猫 🐈\n', encoding='utf-8')
    result = subprocess.run(
        [sys.executable, 'sid_lsg.py', 'train', '--teacher', teacher, '--kimg', '0.008', '--prompts',
         tmp_path / 'prompts.txt', '--out', tmp_path / 'run'], cwd=ROOT, capture_output=True,
        env=os.environ | dict(PYTHONIOENCODING='cp1252', OMP_NUM_THREADS='1'))
    assert result.returncode == 0 and b'"? ?"' in result.stdout


def test_a_repo_id_in_the_cache_brings_its_settings_and_prompts(teacher, tmp_path, monkeypatch):
    shutil.copytree(teacher, tmp_path / 'models--org--name' / 'snapshots' / 'a1')
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    train(tmp_path / 'run', 'org/name', kimg=0.008)
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['teacher'] == 'org/name' and config['lr'] == sid_lsg.train_config(
        teacher=str(teacher)).lr
    assert sid_lsg.find_generator(tmp_path / 'run')[1]['teacher'] == 'org/name'


# Of its speed on a GPU, what can be counted without one.

class Reads(TorchDispatchMode):
    """Counts operations that hand a tensor's content to Python, for which a GPU has to be waited."""
    names = 'aten._local_scalar_dense', 'aten.nonzero', 'aten.equal', 'aten.masked_select'

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += str(operation).startswith(self.names)
        return operation(*args, **(kwargs or {}))


def test_an_iteration_waits_for_the_device_only_if_a_status_line_is_due(teacher, tmp_path,
                                                                        monkeypatch):
    counts, end = [], sid_lsg.Log.end

    def counted(log, seen, now):
        before = reads.count
        end(log, seen, now)
        counts.append((before, reads.count - before))       # in the iteration, for the status line
        reads.count = 0
    monkeypatch.setattr(sid_lsg.Log, 'end', counted)
    monkeypatch.setattr(sid_lsg.Run, 'stopping', lambda run: False)     # its number is on the CPU
    with Reads() as reads:
        train(tmp_path / 'run', teacher, kimg=0.024, save_kimg=1, micro_batch=4, steps=2)
    (_, first), (second, none), (third, last) = counts      # the first one also builds the networks
    assert (first, second, none, third) == (0, 0, 0, 0) and last > 0


def test_compiling_needs_four_graphs_and_none_for_a_second_run(teacher, tmp_path, monkeypatch):
    """The generator, the fake network as it learns and frozen, and the teacher in bf16."""
    made, compile = [], torch.nn.Module.compile

    def backend(module, inputs):
        made.append(module)
        return module.forward
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda net, **options: compile(
        net, backend=backend, **options))
    torch.compiler.reset()
    for name in ('one', 'two'):
        train(tmp_path / name, teacher, compile=True, precision='bf16', kappa=(1.5,), kimg=0.016)
        assert len(made) == 4
