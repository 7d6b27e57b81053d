"""Every command of the README runs, in tiny form where the real one needs real weights or days, in its order."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import bench
import fid
import findings
import score_tiny
import sid_lsg
from conftest import ROOT
from test_checkpoints import nets, no_cache, official_pickle, weights, whole_folder     # noqa: F401, fixtures among them
from test_fid import TEXT, VISION, WORDS, inception_weights, random_state

README = (ROOT / 'README.md').read_text(encoding='utf-8')
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith('    .venv/bin/')]
SHORT = '--kimg 0.016 --grid-kimg 0.016 --batch 8 --size 64 --device cpu --micro-batch'
MODULES = {'sid_lsg.py': sid_lsg, 'fid.py': fid, 'tests/score_tiny.py': score_tiny, 'tests/findings.py': findings,
           'tests/bench.py': bench}

# What a command names or asks for, and its tiny form, applied in this order.
TINY = {
    'stable-diffusion-v1-5/stable-diffusion-v1-5': 'teacher', 'PATH': 'teacher', 'SD15_FOLDER': 'teacher/tokenizer',
    'FILE': 'captions.txt', 'train ...': f'train --teacher teacher --prompts captions.txt {SHORT} 4',
    '--micro-batch 8': f'{SHORT} 2',
    '--fid-every 500 --fid-num 10000': '--fid-every 1 --fid-num 4 --fid-weights inception.safetensors',
    'fid.py val2014': 'fid.py val2014 --weights inception.safetensors',
    'fid.py coco': 'fid.py --weights inception.safetensors coco',
    '--nproc_per_node=8': '--nproc_per_node=2', '--nnodes=4': '--nnodes=1', 'HOST:29500': 'localhost:0',
    'torchrun --nproc': 'torchrun --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nproc',
    '--teacher-steps 25': '--teacher-steps 2',
    'score_tiny.py runs/000': 'score_tiny.py tiny --captions 16 --kappa 2 --steps 2',
    'findings.py': 'findings.py --kimg 0.016 --captions 40 --kappa --seeds 0 --only Zero-CFG',
    'bench.py': 'bench.py unet --small --repeat 1 --work bench'}


@pytest.fixture(scope='module')
def place(nets, whole_folder, tmp_path_factory):
    """A folder in which all that the README names is there, in tiny form; runs of its first command, too."""
    place = tmp_path_factory.mktemp('readme')
    (place / 'teacher').symlink_to(whole_folder)
    (place / 'captions.txt').write_text('a red star\na blue ring\nan orange cross\na green circle\n')
    short = SHORT.replace('0.016', '0.008')
    sid_lsg.main(['train', '--teacher', str(place / 'teacher'), '--prompts', str(place / 'captions.txt'), '--out',
                  str(place / 'runs' / '000'), *short.split(), '4'])
    sid_lsg.main(['train', '--out', str(place / 'tiny'), '--progress-samples', '0', *short.split(), '4'])
    (place / 'val2014').mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (300, 280, 3), np.uint8)
        Image.fromarray(pixels).save(place / 'val2014' / f'{i}.jpg')
    save_file(inception_weights(), place / 'inception.safetensors')
    with torch.device('meta'):
        clip = fid.CLIP(VISION, TEXT, vocab=WORDS, out=24)
    save_file(random_state({name: tuple(w.shape) for name, w in clip.state_dict().items()}),
              place / 'open_clip_pytorch_model.safetensors')
    (place / 'official.pkl').write_bytes(official_pickle(nets['unet']))
    return place


@pytest.mark.parametrize('line', COMMANDS)
def test_a_command_of_the_readme_runs(line, place, monkeypatch, capsys):
    for real, tiny in TINY.items():
        line = line.replace(real, tiny)
    program, *words = shlex.split(line, comments=True)
    monkeypatch.chdir(place)
    if 'convert' in words:                      # the README writes one file twice
        sid_lsg.remove(place / words[words.index('convert') + 2])
    if program.endswith('torchrun'):
        words[words.index('sid_lsg.py')] = str(ROOT / 'sid_lsg.py')
        subprocess.run([sys.executable, '-m', 'torch.distributed.run', *words], check=True, timeout=120)
    else:
        MODULES[words[0]].main(words[1:])


def test_the_first_two_commands_install_what_they_run():
    train, test = [line.strip() for line in README.splitlines() if line.startswith('    python3 ')]
    install = 'python3 -m venv .venv && .venv/bin/pip install -r requirements.txt'
    assert train == f'{install} && .venv/bin/python sid_lsg.py train'
    assert test == f'{install} -r tests/requirements.txt && .venv/bin/python -m pytest -q -n 2 --dist loadfile tests'


def test_the_file_guide_counts_right():
    counted = 0
    for names, counts in re.findall(r'^\| ((?:`\w+\.py` ?)+) \| ([\d,]+(?:, \d+)?) \|', README, re.M):
        for name, count in zip(names.split(), counts.split(', ')):
            lines = len((ROOT / name.strip('`')).read_text(encoding='utf-8').splitlines())
            assert abs(lines - int(count.replace(',', ''))) <= 0.02 * lines, (name, lines)
            counted += 1
    assert counted == 5
    first, last = map(int, re.search(r'the method \(lines (\d+) to (\d+)\)', README).groups())
    code = (ROOT / 'sid_lsg.py').read_text(encoding='utf-8').splitlines()
    assert code[first - 1] == '# The method' and 'What train() calls' in code[last + 1]          # below a bar
