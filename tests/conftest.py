"""Fixtures of all tests: a small teacher, and a GPU that only some tests may see."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))       # `import unet` works wherever pytest is started

# Libraries read these when they are imported. Nothing here may use the network or print advice.
# With one thread per process, two processes on two cores do not wait for each other.
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1',
                  HF_HUB_DISABLE_PROGRESS_BARS='1', TRANSFORMERS_VERBOSITY='error',
                  DIFFUSERS_VERBOSITY='error', HF_HUB_CACHE='/nowhere')

import pytest
import torch

import clip_text
import sid_lsg
import unet
import vae

# Tests run on the CPU, which always adds in the same order. The fixture `cuda` gives the GPU back.
GPU = torch.cuda.is_available
torch.cuda.is_available = lambda: False

SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
           if hasattr(signal, name)]
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}

SETTINGS = dict(kimg=0.024, batch=8, lr=1e-3, fake_lr=1e-3, ema_kimg=0.1, save_kimg=0.016, seed=1)


@pytest.fixture(scope='session', autouse=True)
def hidden_gpu():
    """Hide the GPU from programs that tests start. Return whether there is one, and its variable.

    This must not happen at import: pytest-xdist's main process imports this file first, and its
    workers inherit its environment, so they would believe that there is no GPU."""
    found, visible = GPU(), os.environ.get('CUDA_VISIBLE_DEVICES')
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    return found, visible


@pytest.fixture
def cuda(hidden_gpu, monkeypatch):
    """Return the GPU's torch.device, and let programs see it."""
    found, visible = hidden_gpu
    if not found:
        pytest.skip('no CUDA device')
    monkeypatch.setattr(torch.cuda, 'is_available', GPU)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    return sid_lsg.choose_device('cuda')


@pytest.fixture(autouse=True)
def handlers():
    """Give back the signal handlers that a run replaces, so that Ctrl-C still stops pytest."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope='session')
def teacher(tmp_path_factory):
    """Return a checkpoint folder of random weights, of 32 pixels, with settings and prompts."""
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0)
    net = unet.UNet((16, 32), context_dim=16, heads=2, layers=1, groups=4, attention=(True, True))
    net.sample_size = 4
    unet.save(net, folder / 'unet')
    vae.save(vae.VAE((8, 8, 16, 16), layers=1, groups=4), folder / 'vae')
    shutil.copytree(ROOT / 'tests' / 'tiny_sd' / 'tokenizer', folder / 'tokenizer')
    words = len(json.loads((folder / 'tokenizer' / 'vocab.json').read_text()))
    text = clip_text.TextEncoder(words, width=16, layers=1, heads=2, hidden=32)
    clip_text.save(text, folder / 'text_encoder')
    (folder / 'prompts.txt').write_text('\n'.join(f'a red star {i}' for i in range(20)) + '\n\n')
    (folder / 'sid_lsg.json').write_text(json.dumps(SETTINGS))
    return folder


def assert_close(ours, theirs):
    """Two correct implementations differ by float32 rounding, about 1e-6 of the largest value."""
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= 1e-5, f'the error is {error:.1e} of the largest value'
