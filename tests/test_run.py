"""A run that loses nothing: interrupted, killed, resumed, shared by processes, short of memory, disk or sense."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clip_text
import fid
import sid_lsg
import unet
import vae
from conftest import ROOT

# 12 iterations of 8, pictures after 5 and 10 (and 12), a state after every third.
LENGTH = dict(kimg=0.096, grid_kimg=0.04, save_every=0.024, log_seconds=0)


def train(folder, teacher=None, moved=None, **given):
    """A new run, or without a teacher (or with one that has moved) one to go on with."""
    given |= dict(teacher=str(moved)) if moved else {}
    given = dict(resume=str(folder)) | given if teacher is None else dict(teacher=str(teacher), out=str(folder)) | given
    sid_lsg.train(sid_lsg.make_config(sid_lsg.TrainConfig, given))


def state(folder, seen=96):
    return load_file(folder / 'state' / f'{seen:09d}' / 'tensors.safetensors')


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder):
    """log.jsonl without its times."""
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return [{name: value for name, value in row.items() if 'seconds' not in name} for row in rows]


@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train(folder, teacher, **LENGTH)
    return folder


def interrupt_at(iteration, monkeypatch, number=signal.SIGTERM):
    """Send this process a signal in the middle of an iteration (of those of the next run, from 0)."""
    calls, update_average = [], sid_lsg.update_average

    def update(*arguments):
        for _ in range(2 * (len(calls) == iteration)):          # Slurm's own, and the one that torchrun passes on
            os.kill(os.getpid(), number)
        calls.append(1)
        update_average(*arguments)
    monkeypatch.setattr(sid_lsg, 'update_average', update)


@pytest.mark.parametrize('iteration, number', [(3, signal.SIGTERM), (9, signal.SIGINT)])
def test_an_interrupted_run_resumes_to_the_bit(iteration, number, whole, teacher, tmp_path, monkeypatch, capsys):
    """Weights, average, optimisers' state and log; at 9 pictures are due in the very iteration of the signal."""
    folder, before = tmp_path / 'run', signal.getsignal(number)
    interrupt_at(iteration, monkeypatch, number)
    with pytest.raises(SystemExit) as stop:
        train(folder, teacher, **LENGTH)
    assert stop.value.code == 128 + number and f'--resume {folder}' in capsys.readouterr().out
    assert signal.getsignal(number) == before
    with open(folder / 'log.jsonl', 'a') as file:               # what a kill in the middle of a line leaves
        file.write('{"images": 88, "sec')
    monkeypatch.undo()
    train(folder)
    assert same(state(folder), state(whole)) and rows(folder) == rows(whole)
    seconds = [json.loads(line)['seconds'] for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert seconds == sorted(seconds)                           # the clock goes on, too
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))
    assert same(load_file(folder / 'generator' / 'unet' / 'diffusion_pytorch_model.safetensors'),
                load_file(whole / 'generator' / 'unet' / 'diffusion_pytorch_model.safetensors'))


def test_a_signal_some_seconds_after_the_first_stops_at_once(teacher, tmp_path, monkeypatch):
    now, before = time.monotonic, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)    # in a shell's background it is ignored

    def slow(run, seen):
        if seen == 40:
            os.kill(os.getpid(), signal.SIGINT)
            while not run.interrupted:          # another thread may have received it
                time.sleep(0.01)
            monkeypatch.setattr(time, 'monotonic', lambda: now() + 4)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)                       # cut short
    monkeypatch.setattr(sid_lsg.Run, 'save_pictures', slow)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / 'run', teacher, **LENGTH)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)


def test_a_signal_amid_pictures_loses_nothing(whole, teacher, tmp_path, monkeypatch):
    """No state is due then: the run stops after the next iteration, with one."""
    folder, save_pictures = tmp_path / 'run', sid_lsg.Run.save_pictures

    def interrupted(run, seen):
        if seen == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        save_pictures(run, seen)
    monkeypatch.setattr(sid_lsg.Run, 'save_pictures', interrupted)
    with pytest.raises(SystemExit) as stop:
        train(folder, teacher, **{**LENGTH, 'save_every': 1.0})
    assert stop.value.code == 128 + signal.SIGTERM and os.listdir(folder / 'state') == ['000000048']
    monkeypatch.undo()
    train(folder)
    assert same(state(folder), state(whole)) and rows(folder) == rows(whole)


@pytest.mark.parametrize('when', [40, 96])
def test_a_full_disk_amid_pictures_loses_nothing(when, whole, teacher, tmp_path, monkeypatch, capsys):
    """No state is due at 40: one is written all the same. And the pictures are made up for, the last ones, too."""
    folder, save_pictures = tmp_path / 'run', sid_lsg.Run.save_pictures

    def full(*_):
        raise OSError('no space left')

    def fails(run, seen):
        with monkeypatch.context() as patch:
            if seen == when:
                patch.setattr(unet, 'save', full)
            save_pictures(run, seen)
    monkeypatch.setattr(sid_lsg.Run, 'save_pictures', fails)
    with pytest.raises(SystemExit) as stop:
        train(folder, teacher, **{**LENGTH, 'save_every': 1.0}, progress_samples=17)
    assert stop.value.code == 2 and 'no space left' in capsys.readouterr().err
    assert os.listdir(folder / 'state') == [f'{when:09d}']
    monkeypatch.undo()
    train(folder)
    assert same(state(folder), state(whole))
    assert [row for row in rows(folder) if 'progress_fd' not in row] == rows(whole)
    assert [row['images'] for row in rows(folder) if 'progress_fd' in row] == [0, 40, 80, 96]   # each noted once
    assert (folder / f'grid_{when:09d}.png').exists()
    assert json.loads((folder / 'generator' / 'generator.json').read_text())['images'] == 96
    monkeypatch.setattr(sid_lsg.Run, 'save_pictures', fails)
    train(folder)                               # only once


def test_a_signal_after_the_last_iteration_comes_too_late(teacher, tmp_path, monkeypatch, capsys):
    def interrupted(run, seen):
        if seen == 16:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(sid_lsg.Run, 'save_pictures', interrupted)
    train(tmp_path / 'run', teacher, **{**LENGTH, 'kimg': 0.016})
    assert 'Interrupted' not in capsys.readouterr().out and os.listdir(tmp_path / 'run' / 'state') == ['000000016']


def test_the_state_holds_every_tensor_and_the_last_two_are_kept(whole, teacher):
    assert sorted(os.listdir(whole / 'state')) == ['000000072', '000000096']
    count = len(unet.load(teacher).state_dict())
    names = [name.partition('.')[0] for name in state(whole)]
    assert {name: names.count(name) for name in names} == dict(G=count, ema=count, fake=count, adam_G=count, adam_fake=count)
    assert sorted(os.listdir(whole / 'state' / '000000096')) == ['state.json', 'tensors.safetensors']


KILLS = 20
KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import sid_lsg
random.seed(0)
teacher, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = dict(kimg=100.0, save_every=0.008, grid_kimg=100.0, log_seconds=0)
def newest():
    states = sorted(p for p in os.listdir(folder + '/state') if p.isdigit()) if os.path.isdir(folder + '/state') else []
    return int(states[-1]) if states else 0
for kill in range(kills):
    begun = newest()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        given = dict(resume=folder) if begun else dict(teacher=teacher, out=folder, **settings)
        sid_lsg.train(sid_lsg.make_config(sid_lsg.TrainConfig, given))
        os._exit(0)
    while newest() <= begun:                    # a state was written, so there is something to lose
        time.sleep(0.01)
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit('the child ended by itself')
    time.sleep(random.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines = open(folder + '/log.jsonl').read().split('\\n')
    logged = [json.loads(line)['images'] for line in lines if line.endswith('}')]
    print(begun, newest(), logged[-1], flush=True)
"""


def test_killed_at_any_moment_a_run_loses_no_more_than_since_the_last_save(teacher, tmp_path):
    """kill -9, twenty times, while a state is saved after every iteration: half of the time is saving."""
    folder = tmp_path / 'run'
    result = subprocess.run([sys.executable, '-c', KILLER, str(teacher), str(folder), str(KILLS)], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [[int(number) for number in line.split()] for line in result.stdout.splitlines()]
    assert len(lines) == KILLS
    for begun, newest, logged in lines:
        assert begun < newest <= logged <= newest + 16          # an iteration done, and one whose save was cut off
    train(folder, kimg=(lines[-1][1] + 8) / 1000)
    images = [row['images'] for row in rows(folder)]
    assert images == list(range(8, lines[-1][1] + 9, 8))        # no iteration twice, none missing


def test_gradients_are_summed_over_processes_in_few_calls(monkeypatch):
    """Small tensors share a call, a copy stays small, and each gets its own sum, however it lies in memory."""
    noise = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=noise) for shape in ((), (7,), (4, 3, 2, 2), (90,), (2,))]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    before, calls = [x.clone() for x in tensors], []

    def doubled(flat):                          # two processes with the same gradients
        calls.append(len(flat))
        flat.mul_(2)
    monkeypatch.setattr(sid_lsg.dist, 'all_reduce', doubled)
    sid_lsg.sum_over_processes(tensors, at_once=60)
    assert calls == [1 + 7 + 48, 90 + 2]
    assert all(torch.equal(x, 2 * old) for x, old in zip(tensors, before))


def torchrun(script, teacher, folder, settings):
    """Two processes that train in `folder`."""
    options = [f'--{name.replace("_", "-")}={value}' for name, value in settings.items()]
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0', '--rdzv_backend=c10d',
         '--rdzv_endpoint=localhost:0', script, 'train', '--teacher', teacher, '--out', folder, *options],
        capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=120)


@pytest.mark.parametrize('sets, found', [(dict(RANK='3'), '0 1'), (dict(RANK='3', WORLD_SIZE='4'), '3 4')])
def test_a_rank_counts_among_several(sets, found):
    """Left in the environment alone, it would share a batch with nobody and write nothing."""
    result = subprocess.run([sys.executable, '-c', 'import sid_lsg; print(sid_lsg.RANK, sid_lsg.WORLD)'], cwd=ROOT,
                            capture_output=True, text=True, env={**os.environ, **sets})
    assert result.stdout.strip() == found, result.stderr


def test_two_processes_are_one(teacher, tmp_path):
    """torchrun with gloo: the same total batch gives the same weights up to the order of summation."""
    settings = {**LENGTH, 'lr': 1e-4, 'fake_lr': 1e-4}
    train(tmp_path / 'one', teacher, **settings)
    result = torchrun(ROOT / 'sid_lsg.py', teacher, tmp_path / 'run', settings)
    assert result.returncode == 0, result.stderr
    ours, theirs = state(tmp_path / 'one'), state(tmp_path / 'run')
    for net in ('G.', 'fake.', 'ema.'):         # in norm: where a gradient is rounding alone, Adam makes a step of it
        one, two = (torch.cat([w.flatten() for name, w in sorted(x.items()) if name.startswith(net)]) for x in (ours, theirs))
        assert (one - two).norm() < 1e-5 * one.norm(), net
    for one, two in zip(rows(tmp_path / 'one'), rows(tmp_path / 'run'), strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
    assert result.stdout.count('Distilling') == 1


def test_a_signal_amid_the_talk_of_processes_counts_the_next_time(monkeypatch):
    """What was agreed is the same everywhere, and what came in meanwhile is not forgotten."""
    run = object.__new__(sid_lsg.Run)
    run.interrupted = 0
    monkeypatch.setattr(sid_lsg.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(sid_lsg.dist, 'all_reduce', lambda most, op: setattr(run, 'interrupted', signal.SIGTERM))
    assert [run.heard(), run.heard()] == [0, signal.SIGTERM]


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import sid_lsg
calls, update_average = [], sid_lsg.update_average
def update(*arguments):
    calls.append(1)
    if len(calls) == 5 and os.environ['RANK'] == '1':
        os.kill(os.getpid(), signal.SIGKILL)
    update_average(*arguments)
sid_lsg.update_average = update
sid_lsg.main()
"""


def test_a_process_that_dies_takes_the_others_down(whole, teacher, tmp_path):
    (tmp_path / 'dying.py').write_text(DYING.format(root=str(ROOT)))
    result = torchrun(tmp_path / 'dying.py', teacher, tmp_path / 'run', LENGTH)
    said = [line for line in result.stderr.splitlines() if line.startswith('sid_lsg: ')]
    assert result.returncode and len(said) == 1 and '--resume' in said[0], result.stderr
    train(tmp_path / 'run')                     # alone, from what was saved after three iterations
    assert [row['images'] for row in rows(tmp_path / 'run') if 'loss_G' in row] == list(range(8, 97, 8))


def refused(capsys, *words, **given):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, sid_lsg.user_errors():
        train(**given)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and error.startswith('sid_lsg: '), error
    for word in words:
        assert word in error


def copy_of(run, folder):
    subprocess.run(['cp', '-r', run, folder], check=True)
    return folder


def test_states_that_cannot_be_resumed(whole, teacher, tmp_path, capsys):
    refused(capsys, 'config.json', folder=tmp_path / 'nowhere')
    folder = copy_of(whole, tmp_path / 'run')
    weights = folder / 'state' / '000000096' / 'tensors.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(capsys, '000000096', 'cut off', folder=folder)
    subprocess.run(['rm', '-r', folder / 'state' / '000000096'], check=True)    # as the sentence advises
    train(folder)
    assert same(state(folder), state(whole)) and rows(folder) == rows(whole)
    save_file({'G.conv_in.weight': torch.zeros(1)}, weights)
    refused(capsys, '000000096', 'not those of this teacher', folder=folder)
    facts = folder / 'state' / '000000096' / 'state.json'
    shutil.copy(whole / 'state' / '000000096' / 'tensors.safetensors', weights)
    for seconds in (None, 'a', -1.0):
        facts.write_text(json.dumps({**json.loads(facts.read_text()), 'seconds': seconds}))
        refused(capsys, '000000096', 'lacks seconds', folder=folder)
    subprocess.run(['rm', '-r', folder / 'state'], check=True)
    refused(capsys, 'state', 'found none', folder=folder)


@pytest.mark.parametrize('part', ['unet', 'vae', 'text_encoder'])
def test_a_run_goes_on_with_its_teacher_alone(part, whole, teacher, tmp_path, capsys):
    """Moved, it is found by --teacher; one that differs in a layer deep inside, as with a LoRA merged into it, is refused."""
    folder, other = copy_of(whole, tmp_path / 'run'), copy_of(teacher, tmp_path / 'other')
    (other / 'prompts.txt').rename(tmp_path / 'moved.txt')
    given = dict(folder=folder, moved=other, prompts=str(tmp_path / 'moved.txt'))
    settings = (folder / 'config.json').read_text()
    (tmp_path / 'moved.txt').write_text((teacher / 'prompts.txt').read_text() + 'a blue ring\n')
    refused(capsys, 'expected the prompts', '--prompts', **given)
    shutil.copy(teacher / 'prompts.txt', tmp_path / 'moved.txt')
    module = dict(unet=unet, vae=vae, text_encoder=clip_text)[part]
    net = module.load(other)
    with torch.no_grad():
        next(w for name, w in net.named_parameters() if name.endswith(('to_v.weight', 'v_proj.weight'))).add_(0.01)
    module.save(net, other / part)
    refused(capsys, 'expected the teacher', '--teacher', **given)
    assert (folder / 'config.json').read_text() == settings     # nothing is kept of what was refused
    shutil.rmtree(other / part)
    shutil.copytree(teacher / part, other / part)
    train(kimg=0.104, **given)
    train(folder, kimg=0.112)
    assert rows(folder)[-1]['images'] == 112


def test_a_status_line_has_the_pace_and_the_means_since_the_last(now, tmp_path, capsys):
    """It comes every few seconds, the pace is that of this process, and the log has every iteration."""
    log = sid_lsg.Log(sid_lsg.TrainConfig(batch=8, kimg=1, log_seconds=5), tmp_path / 'log.jsonl')
    log.images, log.seconds = 400, 50.0         # of the run that it goes on with
    for i in range(5):
        now[0] += 2
        for half in (0, 1):                     # micro-batches add up
            log.add(**{name: torch.tensor(k * i / 2) for k, name in enumerate(
                ('loss_fake', 'loss_G', 'xg_xphi', 'xphi_xpsi', 'grad_fake', 'grad_G', 'nan_samples', 'bad_grads', 'lost_grads'))})
        log.end(408 + 8 * i, now=i == 4)
    lines = capsys.readouterr().out.splitlines()
    assert [' '.join(line.split()) for line in lines] == [
        '424 images 250.0 s per 1,000 0:02:24 left loss fake 0.0 G 1.0 |xg-xphi| 2.000 |xphi-xpsi| 3.000 grad fake 4.0 G 5.0 39 NaN',
        '440 images 250.0 s per 1,000 0:02:20 left loss fake 0.0 G 3.5 |xg-xphi| 7.000 |xphi-xpsi| 10.500 grad fake 14.0 G 17.5'
        ' 91 NaN']
    assert [(row['images'], row['seconds'], row['loss_G']) for row in map(json.loads, open(tmp_path / 'log.jsonl'))] == [
        (408 + 8 * i, 52 + 2 * i, i) for i in range(5)]


def test_a_log_that_a_crash_tore_or_took_is_no_hindrance(whole, tmp_path):
    folder = copy_of(whole, tmp_path / 'run')
    log = folder / 'log.jsonl'
    for seen, damage in ((104, lambda: os.truncate(log, 1000)),         # in the middle of a row
                         (112, log.unlink),
                         (120, lambda: log.write_bytes(bytes(50) + log.read_bytes()[50:]))):    # a lost block reads as zeros
        damage()
        train(folder, kimg=seen / 1000)
        assert (folder / f'grid_{seen:09d}.png').exists()


def test_a_run_cut_short_has_its_generator(teacher, tmp_path, monkeypatch):
    """Going on with less than is done already ends the run, with pictures and a generator."""
    interrupt_at(4, monkeypatch)
    with pytest.raises(SystemExit):
        train(tmp_path / 'run', teacher, **{**LENGTH, 'grid_kimg': 10.0})
    monkeypatch.undo()
    train(tmp_path / 'run', kimg=0.02)
    assert json.loads((tmp_path / 'run' / 'generator' / 'generator.json').read_text())['images'] == 40


@pytest.mark.parametrize('change', [dict(lr=0.5), dict(batch=16), dict(kappa=(2.0,)), dict(seed=2), dict(size=64)])
def test_settings_that_would_make_it_another_run_are_refused(change, whole, capsys):
    name, = change
    refused(capsys, f'--{name}', 'another run', folder=whole, **change)


def test_length_intervals_and_micro_batch_may_change(whole, tmp_path):
    folder = copy_of(whole, tmp_path / 'run')
    assert json.loads((folder / 'config.json').read_text())['micro_batch'] == 0     # so another number of GPUs may go on
    train(folder, kimg=0.112, grid_kimg=0.016, micro_batch=4, kappa=(1.5,))     # kappa as it was, in its short form
    assert rows(folder)[-1]['images'] == 112 and (folder / 'grid_000000112.png').exists()
    kept = sid_lsg.make_config(sid_lsg.TrainConfig, dict(resume=str(folder)))
    assert (kept.kimg, kept.micro_batch, kept.kappa) == (0.112, 4, [1.5] * 3)       # so the command printed at the end holds


def test_a_full_disk_stops_the_run_and_keeps_the_state(whole, teacher, tmp_path, capsys):
    """A limit on the size of files stands for the disk: the log fits, the state does not."""
    folder = copy_of(whole, tmp_path / 'run')
    before, limits = state(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        refused(capsys, 'could not be written', folder=folder, kimg=0.12, grid_kimg=100.0, save_every=0.008)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(state(folder), before) and sorted(os.listdir(folder / 'state')) == ['000000072', '000000096']
    train(folder, kimg=0.12)
    assert [row['images'] for row in rows(folder) if 'loss_G' in row] == list(range(8, 121, 8))


def test_a_folder_that_cannot_be_written_is_named(teacher, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    refused(capsys, str(tmp_path / 'file'), folder=tmp_path / 'file' / 'run', teacher=teacher)


def as_nobody(function):
    """`function` as a user whom permissions hold, which they do not do with root."""
    def call(*arguments):
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            return function(*arguments)
        finally:
            if root:
                os.seteuid(0)
    return call


def test_a_read_only_folder_is_named(whole, teacher, tmp_path, monkeypatch, capsys):
    folder = Path(tempfile.mkdtemp())           # pytest's own are closed to others
    try:
        folder.chmod(0o555)
        monkeypatch.setattr(sid_lsg, 'new_folder', as_nobody(sid_lsg.new_folder))
        refused(capsys, 'Permission denied', str(folder), folder=folder / 'run', teacher=teacher)
        folder.chmod(0o777)
        train(folder / 'run', teacher, **LENGTH)
        before = state(folder / 'run')
        (folder / 'run').chmod(0o555)
        (folder / 'run' / 'log.jsonl').chmod(0o444)
        monkeypatch.setattr(sid_lsg.Log, 'write', as_nobody(sid_lsg.Log.write))
        refused(capsys, 'Permission denied', 'log.jsonl', folder=folder / 'run', kimg=0.12)
        assert same(state(folder / 'run'), before)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize('samples', [8, 1])
def test_a_run_of_nothing_but_nan_stops_with_its_last_good_state(samples, teacher, tmp_path, monkeypatch, capsys):
    """One such sample in each batch suffices: it makes all gradients NaN, which update() makes 0."""
    generate, calls = sid_lsg.generate, []

    def broken(*arguments):
        calls.append(1)
        x_g = generate(*arguments)
        bad = torch.arange(len(x_g)) < samples * (len(calls) > 40)     # 16 pictures first, then 2 an iteration
        return torch.where(bad[:, None, None, None], torch.nan, x_g)
    monkeypatch.setattr(sid_lsg, 'generate', broken)
    refused(capsys, 'NaN', folder=tmp_path / 'run', teacher=teacher, **{**LENGTH, 'kimg': 0.4})
    states = sorted(os.listdir(tmp_path / 'run' / 'state'))
    logged = rows(tmp_path / 'run')
    assert len([row for row in logged if row['nan_samples'] == samples]) == 10
    assert all(torch.isfinite(w).all() for w in state(tmp_path / 'run', int(states[-1])).values())


def test_options_that_save_memory_change_next_to_nothing(whole, teacher, tmp_path):
    train(tmp_path / 'run', teacher, **LENGTH, checkpoint=True, ema_device='cpu')
    ours = state(tmp_path / 'run')
    for name, w in state(whole).items():
        assert torch.allclose(ours[name], w, rtol=1e-4, atol=1e-5), name


def test_bf16_holds_the_teacher_in_bf16_and_the_rest_in_fp32(teacher, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(sid_lsg.Run, 'close', lambda run: kept.append(run))
    train(tmp_path / 'run', teacher, **LENGTH, precision='bf16')
    run, = kept
    types = {name: {p.dtype for p in getattr(run, name).parameters()} for name in ('teacher', 'G', 'fake', 'ema')}
    assert types == dict(teacher={torch.bfloat16}, G={torch.float32}, fake={torch.float32}, ema={torch.float32})
    assert rows(tmp_path / 'run')[-1]['images'] == 96


def test_out_of_memory_names_the_next_option(teacher, tmp_path, monkeypatch, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setitem(sid_lsg.COMMANDS, 'train', (no_memory, sid_lsg.TrainConfig, ''))
    options, tried = [], []
    for _ in range(5):
        with pytest.raises(SystemExit) as stop:
            sid_lsg.main(['train', '--teacher', str(teacher), '--micro-batch', '2', *options])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and 'out of memory' in error
        tried.append(error.strip().partition('; ')[2].removeprefix('try '))
        options += tried[-1].split() if tried[-1].startswith('--') else []
    assert tried[:4] == ['--precision bf16', '--micro-batch 1', '--checkpoint', '--ema-device cpu'] and '--size' in tried[4]
    assert [sid_lsg.less_memory(sid_lsg.SampleConfig(batch=batch, precision=precision)) for batch, precision in (
        (8, 'bf16'), (1, 'fp32'), (1, 'bf16'))] == ['try --batch 4', 'try --precision bf16', 'try a smaller --size']


def test_a_run_can_score_itself_by_fid(teacher, tmp_path, monkeypatch, capsys):
    """The FID that it logs is fid.py's of the pictures that its generator draws, prompt i with seed i."""
    class Eyes(torch.nn.Module):                # stands for Inception, which takes seconds a picture on a CPU
        sha256 = 'none'

        def forward(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1).repeat(1, 171)[:, :2048]

    eyes = Eyes()
    eyes.weight = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(sid_lsg.fid, 'load_inception', lambda path: eyes)
    whole = fid.frechet_distance                # takes ten seconds for 2,048 numbers, of which 12 are not repeated
    monkeypatch.setattr(fid, 'frechet_distance', lambda *stats: whole(*(x[:12] if x.ndim == 1 else x[:12, :12] for x in stats)))
    rng = np.random.default_rng(0)
    fid.save_stats(tmp_path / 'stats.npz', rng.normal(size=2048), np.eye(2048), 40, 'clean', 'none')
    (tmp_path / 'captions.txt').write_text('a red star\na blue ring\n')
    settings = dict(fid_stats=str(tmp_path / 'stats.npz'), fid_every=0.064, fid_num=20, fid_prompts=str(tmp_path / 'captions.txt'))
    train(tmp_path / 'run', teacher, **LENGTH, **settings, progress_samples=20)
    found = {row['images']: row['fid'] for row in rows(tmp_path / 'run') if 'fid' in row}
    assert sorted(found) == [64, 96]
    seconds = [json.loads(line)['seconds'] for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()]
    assert seconds == sorted(seconds)           # from the first note, of before the first iteration, on
    progress = {row['images']: row['progress_fd'] for row in rows(tmp_path / 'run') if 'progress_fd' in row}
    assert sorted(progress) == [0, 40, 80, 96] and progress[0] != progress[96]

    vae, encode, _ = sid_lsg.load_parts(teacher, torch.device('cpu'))
    net, moments = unet.load(tmp_path / 'run' / 'generator'), fid.Moments()
    with torch.no_grad():
        for i in range(20):
            context = encode([['a red star', 'a blue ring'][i % 2]])
            images = sid_lsg.draw_pictures(lambda z, fresh, c: sid_lsg.generate(net, z, c), vae, context, [i], (4, 4, 4))
            moments.add(fid.features(eyes, list(images), 'clean'))
    stats = fid.load_stats(tmp_path / 'stats.npz')
    expected = fid.frechet_distance(moments.mu, moments.sigma, stats['mu'], stats['sigma'])
    assert found[96] == pytest.approx(expected, rel=1e-3)

    run = sid_lsg.Run(sid_lsg.make_config(sid_lsg.TrainConfig, dict(resume=str(tmp_path / 'run'))))
    with monkeypatch.context() as patch:        # two processes draw every other picture, one after the other here
        parts = []
        patch.setattr(sid_lsg, 'WORLD', 2)
        patch.setattr(sid_lsg.dist, 'is_initialized', lambda: True)
        for rank, talk in (1, lambda x: parts.append(x.clone())), (0, lambda x: x.add_(parts.pop(0))):
            patch.setattr(sid_lsg, 'RANK', rank)
            patch.setattr(sid_lsg.dist, 'all_reduce', talk)
            assert run.score(96) == (rank == 0)         # half of the pictures are no score
    run.close()
    again = [row['fid'] for row in rows(tmp_path / 'run') if 'fid' in row]
    assert len(again) == 3 and again[2] == pytest.approx(found[96], rel=1e-3)

    fid.save_stats(tmp_path / 'bare.npz', np.zeros(2048), np.eye(2048), 0, '', 'another')
    sid_lsg.open_scoring(dataclasses.replace(run.config, fid_stats=str(tmp_path / 'bare.npz')), [], run.device)
    said = capsys.readouterr().err
    assert 'another file of weights' in said and 'clean is assumed' in said

    with monkeypatch.context() as patch:        # a score that fails costs no state
        patch.setattr(sid_lsg.Run, 'score', lambda run, seen: sid_lsg.check(False, 'no score'))
        with pytest.raises(SystemExit):
            train(tmp_path / 'broken', teacher, **{**LENGTH, 'save_every': 0.032}, **settings)
    assert (tmp_path / 'broken' / 'state' / '000000064').is_dir()

    features, asked = fid.features, []

    def interrupted(*arguments):
        asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return features(*arguments)
    with monkeypatch.context() as patch:        # a score that a signal cuts off is what the run goes on with
        patch.setattr(fid, 'features', interrupted)
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / 'late', teacher, **LENGTH, **{**settings, 'fid_every': 1.0})
    assert stop.value.code == 128 + signal.SIGTERM and len(asked) == 1
    for _ in range(2):                          # and only once
        train(tmp_path / 'late')
        assert [row['fid'] for row in rows(tmp_path / 'late') if 'fid' in row] == [found[96]]

    interrupt_at(0, monkeypatch)                # then the state goes first: no time is spent on pictures to score
    with pytest.raises(SystemExit):
        train(tmp_path / 'cut', teacher, **LENGTH, **{**settings, 'fid_every': 0.008})
    assert (tmp_path / 'cut' / 'state' / '000000008').is_dir() and not any('fid' in row for row in rows(tmp_path / 'cut'))
    train(tmp_path / 'cut')
    assert [row['images'] for row in rows(tmp_path / 'cut') if 'fid' in row] == list(range(8, 97, 8))
