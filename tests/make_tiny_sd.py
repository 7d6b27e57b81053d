"""Make the tiny teacher in tests/tiny_sd from nothing: draw its world, train its VAE, then its UNet and text encoder.

    python tests/make_tiny_sd.py vae        # about 25 minutes on 2 cores; writes tiny_sd/vae
    python tests/make_tiny_sd.py teacher    # about 60 minutes more; writes everything else

Each stage keeps a checkpoint in --work every few minutes and goes on from it when started again. The nets are this
project's own, in SD's architecture at a thousandth of its size: this is how Stable Diffusion itself is trained.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip_text
import sid_lsg
import tiny_world
import unet
import vae as vae_module

TINY = Path(__file__).parent / 'tiny_sd'
HELD_OUT = 2000


def split():
    """All scenes in a fixed random order: (held out, to train on). No score ever uses a caption that was trained on."""
    scenes = tiny_world.all_scenes()
    order = np.random.default_rng(20240603).permutation(len(scenes))
    scenes = [scenes[i] for i in order]
    return scenes[:HELD_OUT], scenes[HELD_OUT:]


def training_scenes(count, seed):
    """`count` scenes to train on, one in eight of them with a single object (of all captions it is one in forty)."""
    rng = np.random.default_rng(seed)
    single = [s for s in split()[1] if len(s[2]) == 1]
    pair = [s for s in split()[1] if len(s[2]) == 2]
    return [single[rng.integers(len(single))] if rng.random() < 1 / 8 else pair[rng.integers(len(pair))]
            for _ in range(count)]


def to_net(pictures):
    """uint8 (N, 64, 64, 3) -> float (N, 3, 64, 64) in [-1, 1], the inverse of sid_lsg.to_uint8's scale."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 128) / 127.5


def train(model, step, iterations, batch, lr, checkpoint, seed, ema=0.0):
    """Adam with a linear decay to zero over `iterations`; `step(generator)` gives the loss of one batch.

    Returns the model, or with ema > 0 its average. Continues from `checkpoint` where that file exists."""
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    first, mean, began = 0, 0.0, time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state['model']), average.load_state_dict(state['average'])
        optimizer.load_state_dict(state['optimizer'])
        first = state['iteration']
    for i in range(first, iterations):
        for group in optimizer.param_groups:
            group['lr'] = lr * min(1.0, (i + 1) / 100) * (1 - i / iterations)
        loss = step(torch.Generator().manual_seed(seed * 10_000_000 + i))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            beta = min(ema, i / (i + 10))
            for a, p in zip(average.parameters(), model.parameters()):
                a.lerp_(p, 1 - beta)
        mean += 0.02 * (loss.item() - mean) if mean else loss.item()
        if i % 50 == 0:
            print(f'{i:6d} / {iterations}  loss {mean:.4f}  {time.time() - began:.0f} s', flush=True)
        if i % 500 == 499:
            part = checkpoint.with_suffix('.part')
            torch.save(dict(model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict(),
                            iteration=i + 1), part)
            part.replace(checkpoint)
    return average.eval()


def make_vae(args):
    torch.manual_seed(1)
    pictures = tiny_world.pictures(training_scenes(args.pictures, 1), seed=1)
    print(f'{len(pictures)} pictures drawn', flush=True)
    # channels_last is the faster layout for convolutions on a CPU: 0.59 s a step instead of 0.83.
    vae = vae_module.VAE((16, 32, 64, 64), layers=1, groups=8).to(memory_format=torch.channels_last)

    def step(generator):
        rows = torch.randint(len(pictures), (32,), generator=generator).numpy()
        x = to_net(pictures[rows]).contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.moments(x)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        error = vae.decode(z * vae.scale) - x
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + 2 * (error ** 2).mean() + args.kl * kl

    vae = train(vae, step, args.iterations or 2400, 32, 2e-3, args.work / 'vae.pt', seed=1, ema=0.995)
    vae = vae.to(memory_format=torch.contiguous_format)
    with torch.no_grad():                       # as SD's 0.18215 was found: latents of unit standard deviation
        vae.scale = round(1 / vae.moments(to_net(pictures[:512]))[0].std().item(), 5)
    vae_module.save(vae, TINY / 'vae', torch.float16)
    vae = vae_module.load(TINY)
    held_out = split()[0]
    with torch.no_grad():
        x = to_net(tiny_world.pictures(held_out, seed=2))
        y = torch.cat([vae.decode(vae.encode(part)) for part in x.split(100)])
    share, attributes = tiny_world.right(sid_lsg.to_uint8(y), held_out)
    print(f'scale {vae.scale}; reconstructions right {share:.4f}, mean error {(x - y).abs().mean():.4f}; {attributes}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', choices=['vae', 'teacher'])
    parser.add_argument('--work', type=Path, default=Path('/tmp/make_tiny_sd'), help='where the checkpoints lie')
    parser.add_argument('--iterations', type=int, default=0, help='optimizer steps (default: the stage\'s own)')
    parser.add_argument('--pictures', type=int, default=40_000, help='training pictures drawn')
    parser.add_argument('--kl', type=float, default=2e-4, help='weight of the VAE\'s KL term')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    dict(vae=make_vae, teacher=None)[args.stage](args)
