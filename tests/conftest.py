import json
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))       # `import unet` works wherever pytest is started

# Nothing here may reach for the network, and the output is the tests' own: no progress bars, no advice. One thread a
# process, since two processes of two threads each on two cores wait for one another (72 seconds for what takes 11).
# The libraries read these at import, hence here, before any test module is.
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_HUB_DISABLE_PROGRESS_BARS='1',
                  TRANSFORMERS_VERBOSITY='error', DIFFUSERS_VERBOSITY='error')

import pytest
import torch

import clip_text
import sid_lsg
import unet
import vae

# With or without a GPU tests run on the CPU, which adds in the same order each time; the fixture `cuda` gives the GPU back.
GPU, VISIBLE = torch.cuda.is_available, os.environ.get('CUDA_VISIBLE_DEVICES')
THERE = GPU()                       # asked before it is hidden, from programs that tests start too
torch.cuda.is_available = lambda: False
os.environ['CUDA_VISIBLE_DEVICES'] = ''

SETTINGS = dict(kimg=0.024, batch=8, lr=1e-3, fake_lr=1e-3, ema_kimg=0.1, grid_kimg=0.016, seed=1)


@pytest.fixture
def cuda(monkeypatch):
    """The GPU's torch.device."""
    if not THERE:
        pytest.skip('no CUDA device')
    monkeypatch.setattr(torch.cuda, 'is_available', GPU)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    if VISIBLE is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', VISIBLE)
    return sid_lsg.choose_device('cuda')


@pytest.fixture
def now(monkeypatch):
    """The time, a list of one number: it stands still but where a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(time, 'time', lambda: now[0])
    return now


@pytest.fixture(scope='session')
def teacher(tmp_path_factory):
    """A checkpoint folder of random weights, a thirtieth of the tiny teacher's size, with settings and prompts beside it."""
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0)
    net = unet.UNet((16, 32), context_dim=16, heads=2, layers=1, groups=4, attention=(True, True))
    net.sample_size = 4
    unet.save(net, folder / 'unet')
    vae.save(vae.VAE((8, 8, 16, 16), layers=1, groups=4), folder / 'vae')
    shutil.copytree(ROOT / 'tests' / 'tiny_sd' / 'tokenizer', folder / 'tokenizer')
    words = len(json.loads((folder / 'tokenizer' / 'vocab.json').read_text()))
    clip_text.save(clip_text.TextEncoder(words, width=16, layers=1, heads=2, hidden=32), folder / 'text_encoder')
    (folder / 'prompts.txt').write_text('\n'.join(f'a red star {i}' for i in range(20)) + '\n\n')
    (folder / 'sid_lsg.json').write_text(json.dumps(SETTINGS))
    return folder
