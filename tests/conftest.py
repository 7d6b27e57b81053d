import json
import os
import shutil
import sys
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
import unet
import vae

SETTINGS = dict(kimg=0.024, batch=8, lr=1e-3, fake_lr=1e-3, ema_kimg=0.1, grid_kimg=0.016, seed=1)


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
