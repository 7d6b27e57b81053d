"""SiD-LSG: distil Stable Diffusion 1.5, without data, into a generator that makes a picture in one step.

Zhou et al., "Long and Short Guidance in Score identity Distillation for One-Step Text-to-Image
Generation", arXiv 2406.01561 (the paper); the loss without guidance is Score identity Distillation,
arXiv 2404.04057 (SiD).

    python sid_lsg.py train                 # the tiny teacher of tests/tiny_sd, minutes on a laptop
    python sid_lsg.py train --teacher PATH --prompts FILE   # a Stable Diffusion 1.5, the paper's defaults
    python sid_lsg.py sample "a red star above a blue ring on a black background"
    python sid_lsg.py convert runs/000 student              # for other programs

    paper            | here      | shape (SD 1.5, 512 px) | what it is
    -----------------|-----------|------------------------|-----------------------------------------------
    c                | context   | (B, 77, 768)           | text states of the prompts
                     | null      | (1, 77, 768)           | text states of ""
    z                | z         | (B, 4, 64, 64)         | standard normal noise, the generator's input
    G_theta          | G         |                        | generator, a UNet; `ema` is its moving average
    f_phi            | teacher   |                        | the pretrained UNet, frozen
    f_psi            | fake      |                        | fake score net: a UNet following G's pictures
    x_g = G(z, c)    | x_g       | (B, 4, 64, 64)         | latent made by the generator in one step
    t                | t         | (B,)                   | step of the diffusion, uniform in [20, 979]
    epsilon          | eps       | (B, 4, 64, 64)         | standard normal noise
    a_t, sigma_t     | ALPHA[t], SIGMA[t]                 | the noise schedule; has nothing to do with alpha
    x_t              | x_t       | (B, 4, 64, 64)         | a_t x_g + sigma_t eps
    s                | t_init    |                        | the one step given to the generator, 625
    epsilon hat      | eps_hat   | (B, 4, 64, 64)         | noise in x_t as a net predicts it, guided
    f_phi(x_t, c)    | x_phi     | (B, 4, 64, 64)         | x_g as the teacher restores it from x_t, guided
    f_psi(x_t, c)    | x_psi     | (B, 4, 64, 64)         | x_g as fake restores it from x_t, guided
    kappa_1          | kappa[0]  |                        | guidance of fake while it learns
    kappa_2, kappa_3 | kappa[1]  |                        | guidance of fake in the generator's loss
    kappa_4          | kappa[2]  |                        | guidance of teacher in the generator's loss
    alpha            | alpha     |                        | weight of the subtracted |x_phi - x_psi|^2

Read train(), then the six functions right above it. G, ema and fake start as copies of the teacher.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from torch.optim.adam import adam
from torch.utils.checkpoint import checkpoint

import clip_text
import fid
import unet
import vae as vae_module
from fid import check, usable_device

TINY_TEACHER = Path(__file__).resolve().parent / 'tests' / 'tiny_sd'
WORLD = int(os.environ.get('WORLD_SIZE', 1))        # torchrun sets it and RANK, which alone means nothing
RANK = int(os.environ.get('RANK', 0)) if WORLD > 1 else 0

# ---------------------------------------------------------------------------------------------------
# Settings: each field is a command line option. For train, what is left out comes from sid_lsg.json in
# the teacher's folder if there is one, and else is the paper's, which stands here.

def option(default, help, **more):
    """A setting: default and help; and for the command line `choices`, `metavar`, the `group` it opens."""
    return field(default=default, metadata={'help': help, **more})


DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
TOKENIZER = option('', 'folder with vocab.json and merges.txt (default: the teacher\'s, or the local '
                   'Hugging Face cache\'s if the teacher is a single file)', metavar='FOLDER')
COMPILE = option(False, 'torch.compile the nets: minutes at the start, then faster; for GPUs')
DEVICE = option('', 'cuda, cuda:1, cpu ... (default: cuda if there is one, else cpu)', group='the machine')


@dataclass
class TrainConfig:
    teacher: str = option(str(TINY_TEACHER), 'Stable Diffusion 1.5: folder in diffusers layout, original '
                          '.safetensors or .ckpt, or repo id in the Hugging Face cache (default: the tiny '
                          'one of tests/tiny_sd)', group='what is distilled', metavar='PATH')
    tokenizer: str = TOKENIZER
    prompts: str = option('', 'text file, one prompt a line (default: prompts.txt in the teacher folder)',
                          metavar='FILE')
    size: int = option(0, 'side of the pictures in pixels (default: what the teacher was trained at)')

    kappa: tuple = option((1.5,), 'guidance: one number for all (LSG), or three: kappa1, kappa2 = '
                          'kappa3, kappa4. 1 is none, 1 1 K long, K 1 1 with K < 1 short, 0 0 1 Zero-CFG',
                          group='the method')
    alpha: float = option(1.0, 'weight of the subtracted |x_phi - x_psi|^2 in the generator\'s loss')
    t_init: int = option(625, 'step at which the generator works, of 0 to 999')
    t_min: int = option(20, 'smallest step t of the losses')
    t_max: int = option(980, 'largest step t of the losses, exclusive')
    drop: float = option(0.1, 'share of prompts made empty while the fake net learns, '
                         'if kappa1 or kappa2 is not 1')

    kimg: float = option(8_806.0, 'length in thousand images', group='the optimisation')
    batch: int = option(512, 'images an iteration, over all processes')
    lr: float = option(1e-6, 'learning rate of the generator')
    fake_lr: float = option(1e-6, 'learning rate of the fake score net')
    ema_kimg: float = option(50.0, 'half-life of the generator\'s average in thousand images')
    ema_rampup: float = option(0.05, 'that half-life is at most this share of the images seen so far')
    seed: int = option(0, 'every random draw of training follows from it')

    out: str = option('', 'run folder to make (default: the next free runs/NNN)', group='the run folder',
                      metavar='FOLDER')
    resume: str = option('', 'run folder to go on with, by its own settings; only where teacher and prompts '
                         'lie, length, intervals, FID, device, --micro-batch, --checkpoint, '
                         '--ema-device and --compile may be given anew, and are kept', metavar='FOLDER')
    grid_kimg: float = option(100.0, 'thousand images between picture grids, '
                              'with each of which the generator is saved')
    log_seconds: float = option(5.0, 'seconds between status lines')
    save_every: float = option(50.0, 'thousand images between training states, of which the last two are '
                               'kept; also saved at the end and when interrupted')

    progress_samples: int = option(0, 'generated latents to compare with as many of the teacher\'s in 25 '
                                   'steps at each picture grid, by Frechet distance', group='measures')
    fid_stats: str = option('', 'statistics that fid.py --save-stats wrote, to score the generator '
                            'against as it trains', metavar='FILE')
    fid_every: float = option(500.0, 'thousand images between such scores')
    fid_num: int = option(10_000, 'pictures for each, prompt i with seed i')
    fid_prompts: str = option('', 'their captions, one a line (default: those of training)',
                              metavar='FILE')
    fid_weights: str = option('', 'Inception weights (default: as fid.py finds them)', metavar='FILE')

    device: str = DEVICE
    precision: str = option('fp32', 'fp32, or autocast to bf16 or fp16 over fp32 weights '
                            '(with bf16 the teacher\'s, which never change, are bf16, too)',
                            choices=[*DTYPES])
    micro_batch: int = option(0, 'images at a time on each device, whose gradients add up to the '
                              'batch\'s (default: all that is its part)')
    checkpoint: bool = option(False, 'gradient checkpointing: less memory, one more forward pass')
    ema_device: str = option('', 'cpu keeps the generator\'s average there (default: where training is)')
    compile: bool = COMPILE


@dataclass
class SampleConfig:
    texts: tuple = option((), 'prompts, in quotes', group='what is drawn')
    prompts: str = option('', 'text file, one prompt a line, after those on the command line',
                          metavar='FILE')
    seeds: str = option('', 'such as 0-7,42: every prompt with each of them '
                        '(default: prompt i with seed i)', metavar='LIST')
    size: int = option(0, 'side of the pictures in pixels (default: what the generator was trained at)')
    out: str = option('', 'folder to make (default: the next free samples/NNN)', metavar='FOLDER')

    generator: str = option('', 'run folder, generator folder, or file that convert wrote (default: the '
                            'newest run in runs/)', group='what draws', metavar='PATH')
    steps: int = option(1, 'steps of the generator', choices=[1, 2, 4])
    teacher: str = option('', 'checkpoint whose VAE and text encoder to use '
                          '(default: the generator\'s teacher)', metavar='PATH')
    tokenizer: str = TOKENIZER
    teacher_steps: int = option(0, 'draw with the teacher itself instead, in so many DDIM steps '
                                '(default: 0, with the generator)')
    kappa: float = option(None, 'guidance of the teacher, with --teacher-steps (default: 1.5)')

    device: str = DEVICE
    batch: int = option(8, 'pictures at a time')
    precision: str = option('fp32', 'of the arithmetic; fp32 on a CPU that could only emulate it',
                            choices=[*DTYPES])
    compile: bool = COMPILE


@dataclass
class ConvertConfig:
    source: str = option('', 'what to read: any checkpoint that train takes as teacher, a run or '
                         'generator folder, or an official SiD-LSG generator (.pkl)')
    target: str = option('', 'what to write: one original-style file if it ends in .safetensors, '
                         'else a folder in diffusers layout')
    teacher: str = option('', 'checkpoint whose VAE and text encoder go with a generator '
                          '(default: what it was distilled from)', metavar='PATH')
    tokenizer: str = TOKENIZER
    precision: str = option('', 'of the weights written (default: fp16 in a file, fp32 in a folder, '
                            'as it is opened without further settings)', choices=['fp32', 'fp16'])
    overwrite: bool = option(False, 'replace what is at the target')


# ---------------------------------------------------------------------------------------------------
# The method

def schedule():
    """a_t and sigma_t of Stable Diffusion 1.5, each (1000,): float64 inside, float32 out.

    betas = linspace(sqrt .00085, sqrt .012, 1000)^2 (CompVis util.py 21-25, v1-inference.yaml 5-6);
    a_t^2 is the cumulative product of 1 - beta."""
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    a2 = np.cumprod(1 - betas)
    return (torch.tensor(a2 ** 0.5, dtype=torch.float32),
            torch.tensor((1 - a2) ** 0.5, dtype=torch.float32))


ALPHA, SIGMA = schedule()


@functools.lru_cache
def copy_on(device, table):
    """ALPHA or SIGMA on a device, copied once: a copy makes the host wait for all work that is queued."""
    return table.to(device)


def at(table, t):
    """Entries (B, 1, 1, 1) or (1, 1, 1, 1) of ALPHA or SIGMA at steps t (B,) or ()."""
    return copy_on(t.device, table)[t].reshape(-1, 1, 1, 1)


def nan_samples(*tensors):
    """(B, 1, 1, 1) bool: the samples with a NaN in any of the tensors, which a loss leaves out.

    As in the official loop. A net in which such a sample was NaN has NaN in most weights' gradients all the
    same (0 times NaN), which update() makes 0: an iteration with one hardly moves anything."""
    return torch.stack(
        [x.detach().isnan().flatten(1).any(1) for x in tensors]).any(0)[:, None, None, None]


def add_noise(x0, eps, t):
    """x_t = a_t x_0 + sigma_t eps. All (B, 4, H, W); t (B,) or () int64."""
    return at(ALPHA, t) * x0 + at(SIGMA, t) * eps


def predict_x0(eps_hat, x_t, t):
    """The x_0 a noise prediction implies: (x_t - sigma_t eps_hat) / a_t. Latents are never clipped."""
    return (x_t - at(SIGMA, t) * eps_hat) / at(ALPHA, t)


def guided(net, x_t, t, context, null, kappa):
    """Noise eps(null) + kappa (eps(c) - eps(null)) in x_t (B, 4, H, W), float32; kappa_1 ... kappa_4 of
    long and short guidance are its kappa in train().

    context (B, 77, D), null (1, 77, D). One call for both texts, [null, c]: a net given 2 B texts takes
    its B latents twice. kappa 1 needs c alone, kappa 0 null, at half the cost. Where a prompt was
    dropped, c is null and guidance changes nothing."""
    null = null.expand_as(context)
    if kappa == 1 or kappa == 0:
        return net(x_t, t, context if kappa == 1 else null).float()
    eps_null, eps_c = net(x_t, t, torch.cat([null, context])).float().chunk(2)
    return eps_null + kappa * (eps_c - eps_null)


def generate(G, z, context, t_init=625, steps=1, fresh=torch.randn_like):
    """x_g (B, 4, H, W) from z of that shape: (sigma_s z - sigma_s G(sigma_s z, s, c)) / a_s, s = t_init,
    that is G's x_0 at step s of pure noise (official sid_sd_util.py 186-204).

    With more steps (the official code shows 2 and 4), step i noises the result to
    int(t_init (1 - i / steps)) with new noise, `fresh(z)`, and restores it again."""
    x_g = torch.zeros_like(z)
    for i in range(steps):
        t = torch.full((len(z),), int(t_init * (1 - i / steps)), device=z.device)
        x_t = add_noise(x_g, z if i == 0 else fresh(z), t)
        x_g = predict_x0(G(x_t, t, context).float(), x_t, t)
    return x_g


def fake_score_loss(fake, x_g, t, eps, context, null, kappa):
    """Sum over pixels / B of |eps_hat - eps|^2; kappa_1 guides eps_hat, gradient through both halves.

    For kappa_1 = 1 this is plain diffusion training on the generator's pictures; else it is the guided
    prediction that is fitted to eps. x_g (B, 4, H, W) carries no gradient."""
    eps_hat = guided(fake, add_noise(x_g, eps, t), t, context, null, kappa)
    error = (eps_hat - eps).masked_fill(nan_samples(eps_hat), 0)
    return error.square().sum() / len(x_g)


def generator_loss(x_g, x_phi, x_psi, alpha):
    """Sum over pixels / B of (x_phi - x_psi) ((x_phi - x_g) - alpha (x_phi - x_psi)) / w: the loss of SiD
    (arXiv 2404.04057), here of guided predictions.

    All (B, 4, H, W), all with gradient, which reaches the generator directly through x_g, and through x_t
    by way of both nets. Only w = mean |x_g - x_phi|, per sample and at least 1e-5, carries none."""
    leave_out = nan_samples(x_g, x_phi, x_psi)
    difference = (x_phi - x_psi).masked_fill(leave_out, 0)
    residual = (x_phi - x_g).masked_fill(leave_out, 0)
    w = residual.detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return (difference * (residual - alpha * difference) / w).sum() / len(x_g)


def train(config):
    """Distil config.teacher into a run folder. The method is the loop below; Run keeps the books."""
    run = Run(config)
    teacher, G, ema, fake, null = run.teacher, run.G, run.ema, run.fake, run.null
    kappa1, kappa2, kappa4 = config.kappa
    drop = config.drop if (kappa1, kappa2) != (1, 1) else 0.0     # "" is learnt for guidance
    share = config.micro_batch / config.batch   # with it micro-batches' losses add up to the batch's mean

    for iteration in range(run.first, run.iterations):
        # psi-step: the fake score net learns to denoise what the generator makes at present.
        fake.requires_grad_(True)
        for rows in run.micro_batches:
            context, z, t, eps = run.draw(iteration, 0, rows, drop)     # 0: the first half's numbers
            with autocast(config.precision, run.device):
                with torch.no_grad():           # no gradient from this loss to the generator
                    x_g = generate(G, z, context, config.t_init)
                loss_fake = fake_score_loss(fake, x_g, t, eps, context, null, kappa1) * share
            loss_fake.backward()
            run.log.add(loss_fake=loss_fake)
        run.update('fake')

        # theta-step: the generator moves so that fake and teacher restore its pictures alike.
        fake.requires_grad_(False)              # weights rest; gradients pass to its INPUT, as in teacher
        for rows in run.micro_batches:
            context, z, t, eps = run.draw(iteration, 1, rows)
            with autocast(config.precision, run.device):
                x_g = generate(G, z, context, config.t_init)
                x_t = add_noise(x_g, eps, t)    # not detached: the gradient reaches x_g through both nets
                x_psi = predict_x0(guided(fake, x_t, t, context, null, kappa2), x_t, t)
                x_phi = predict_x0(guided(teacher, x_t, t, context, null, kappa4), x_t, t)
                loss_G = generator_loss(x_g, x_phi, x_psi, config.alpha) * share
            loss_G.backward()
            run.log.add(loss_G=loss_G, xg_xphi=(x_g - x_phi).abs().mean() * share,
                        xphi_xpsi=(x_phi - x_psi).abs().mean() * share,
                        nan_samples=nan_samples(x_g, x_phi, x_psi).sum())
        run.update('G')

        # The average is what is drawn with, scored and released.
        update_average(ema, G, ema_beta(config, iteration * config.batch))
        if run.end_iteration(iteration):        # log, pictures, state
            break
    run.close()


# ---------------------------------------------------------------------------------------------------
# What train() calls besides the method

class Adam:
    """torch.optim.Adam with betas (0, 0.999), to the bit, without its first moment.

    For beta_1 = 0 that is the gradient itself; torch stores it all the same, 3.4 GB a net of SD 1.5."""

    def __init__(self, parameters, lr, eps):
        self.parameters, self.lr, self.eps = list(parameters), lr, eps
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        gradients = [p.grad for p in self.parameters]
        # The gradients stand for the first moments, too: beta_1 = 0 makes Adam overwrite these with them.
        # Fused is one kernel, which needs no memory beside its arguments and counts the steps itself.
        adam(self.parameters, gradients, gradients, self.squares, [], self.steps, fused=True,
             amsgrad=False, beta1=0.0, beta2=0.999, lr=self.lr, weight_decay=0.0, eps=self.eps,
             maximize=False)


def autocast(precision, device):
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != 'fp32')


def sum_over_processes(tensors, at_once=2 ** 24):
    """Replace each tensor by its sum over all processes; about `at_once` numbers a call, through a copy.

    A call costs gloo a millisecond whatever it carries, and a net has hundreds of small tensors."""
    calls = {}
    for end, x in zip(np.cumsum([x.numel() for x in tensors]), tensors):
        calls.setdefault(end // at_once, []).append(x)
    for parts in calls.values():
        flat = torch.cat([x.flatten() for x in parts])
        dist.all_reduce(flat)
        for x, total in zip(parts, flat.split([x.numel() for x in parts])):
            x.copy_(total.view_as(x))


@torch.no_grad()
def update(optimizer, clip=math.inf):
    """One optimizer step from the gradients of all processes. Clears them.

    As in the official loop, NaN becomes 0 and infinity 1e5; `clip` bounds every element, at 1 in fp16.
    Returns the gradients' norm, leaving out tensors with such numbers, how many tensors these are, and
    whether more than nine in ten have NaN, so that next to nothing is learnt."""
    gradients = [p.grad for p in optimizer.parameters]
    if dist.is_initialized():
        sum_over_processes(gradients)
    norms = torch.stack(torch._foreach_norm(gradients))
    broken = ~norms.isfinite()
    for g in gradients:
        torch.nan_to_num_(g, nan=0.0, posinf=1e5, neginf=-1e5)
        if clip < math.inf:
            g.clamp_(-clip, clip)
    optimizer.step()
    for p in optimizer.parameters:
        p.grad = None
    return norms.masked_fill(broken, 0).norm(), broken.sum(), norms.isnan().float().mean() > 0.9


def ema_beta(config, seen):
    """Weight of the old average after `seen` images: half-life ema_kimg, at first ema_rampup of `seen`."""
    halflife = min(config.ema_kimg * 1000, config.ema_rampup * seen)
    return 0.5 ** (config.batch / max(halflife, 1e-8))


@torch.no_grad()
def update_average(ema, G, beta):
    for average, parameter in zip(ema.parameters(), G.parameters()):
        average.lerp_(parameter.to(average.device), 1 - beta)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def send(x, device):
    """x on the device, from page-locked memory: only such a copy can be queued, any other is waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)


def draw_samples(config, prompts, encode, shape, device, iteration, half, rows, drop=0.0):
    """context, z, t and eps for `rows` of the batch of one half (0 psi, 1 theta) of an iteration.

    All on the device, yet sample i's noise and t depend on (seed, iteration, half, i) alone, neither on
    micro-batch nor device. Prompts come without replacement, batch after batch, each epoch in a new
    order; a share `drop` of them becomes ''."""
    texts, steps, noise = [], [], []
    for i in rows.tolist():
        rng = np.random.default_rng((config.seed, iteration, half, i))
        epoch, place = divmod((2 * iteration + half) * config.batch + i, len(prompts))
        text = prompts[epoch_order(config.seed, epoch, len(prompts))[place]]
        texts.append('' if rng.random() < drop else text)
        steps.append(int(rng.integers(config.t_min, config.t_max)))
        noise.append(rng.standard_normal((2, *shape), dtype=np.float32))
    z, eps = send(torch.from_numpy(np.stack(noise, axis=1)), device)
    return encode(texts), z, send(torch.tensor(steps), device), eps


class Log:
    """A row of log.jsonl for each iteration and a status line every few seconds.

    Numbers stay on the device until a status line is due, so that no iteration waits for one. Of many
    processes the first writes."""

    def __init__(self, config, file):
        self.config, self.file = config, file
        self.row, self.waiting, self.failing = {}, [], 0
        self.began = self.printed = time.time()
        self.images, self.seconds = 0, 0.0      # of the run before this process took it up

    def elapsed(self):
        return self.seconds + time.time() - self.began

    def add(self, **values):
        """Add to this iteration's numbers; what micro-batches and processes give sums up."""
        for name, value in values.items():
            self.row[name] = self.row.get(name, 0) + value.detach()

    def end(self, seen, now):
        """End the iteration after which `seen` images lie behind; `now` writes at once."""
        if dist.is_initialized():
            parts = [name for name in self.row if 'grad' not in name]       # gradients are summed already
            numbers = torch.stack([self.row[name].float() for name in parts])
            dist.all_reduce(numbers)
            self.row.update(zip(parts, numbers))
        if RANK == 0:
            self.waiting.append(dict(images=seen, seconds=self.elapsed(), **self.row))
            if now or time.time() - self.printed >= self.config.log_seconds:
                self.write(seen)
        self.row = {}

    def write(self, seen):
        self.printed = time.time()
        rows = [{name: value if isinstance(value, int) else float(f'{float(value):.6g}')
                 for name, value in row.items()} for row in self.waiting]
        self.waiting = []
        with open(self.file, 'a', encoding='utf-8') as file:
            for row in rows:                    # NaN is no JSON
                file.write(json.dumps({name: value if math.isfinite(value) else None
                                       for name, value in row.items()}) + '\n')
        for row in rows:
            lost = row['nan_samples'] >= self.config.batch or row['lost_grads'] > 0
            self.failing = self.failing + 1 if lost else 0
            if self.failing == 10:
                raise FloatingPointError(
                    'all samples or nearly all gradients of a net were NaN for 10 iterations, so it learns '
                    'no more; begin a new run with a smaller --lr and --fake-lr, and not in fp16')
        pace = (self.printed - self.began) / (seen - self.images)
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        trouble = sum(row['nan_samples'] + row['bad_grads'] for row in rows)
        print(f'{seen:8d} images  {pace * 1000:6.1f} s per 1,000  '
              f'{clock(pace * max(self.config.kimg * 1000 - seen, 0))} left  '
              f'loss fake {mean["loss_fake"]:7.1f} G {mean["loss_G"]:7.1f}  '
              f'|xg-xphi| {mean["xg_xphi"]:.3f} |xphi-xpsi| {mean["xphi_xpsi"]:.3f}  '
              f'grad fake {mean["grad_fake"]:6.1f} G {mean["grad_G"]:6.1f}'
              + (f'  {trouble:.0f} NaN' if trouble else ''), flush=True)

    def note(self, seen, **values):
        """A row of its own for what is measured now and then."""
        with open(self.file, 'a', encoding='utf-8') as file:
            file.write(json.dumps(dict(images=seen, seconds=self.elapsed(), **values)) + '\n')


class Run:
    """A run's nets, optimisers, data and folder; and all that train() does besides the method.

    With torchrun every process has one. They share each batch, and the first of them writes."""

    def __init__(self, config):
        self.config = config
        (self.teacher, self.vae, self.encode, self.prompts, self.shape, self.scoring, self.out,
         self.device, settings) = open_run(config)
        self.null = self.encode([''])
        self.marks = dict(teacher=fingerprint(self.teacher, self.vae, self.encode.net),
                          prompts=hashlib.sha256('\n'.join(self.prompts).encode()).hexdigest())
        self.G, self.ema, self.fake = (copy.deepcopy(self.teacher) for _ in range(3))
        self.G.requires_grad_(True)             # teacher and ema stay frozen, fake half of each iteration
        self.ema.to(config.ema_device or self.device)
        if config.precision == 'bf16':          # its weights never change, so they need no fp32
            self.teacher.to(torch.bfloat16)
        for net in (self.teacher, self.G, self.fake):
            if config.checkpoint:
                recompute_in_backward(net)
            if config.compile:
                net.compile(dynamic=False)
        eps = 1e-6 if config.precision == 'fp16' else 1e-8
        self.optimizers = dict(G=Adam(self.G.parameters(), config.lr, eps),
                               fake=Adam(self.fake.parameters(), config.fake_lr, eps))
        self.micro_batches = torch.arange(config.batch)[RANK::WORLD].split(config.micro_batch)
        self.first, self.iterations = 0, math.ceil(round(config.kimg * 1000, 6) / config.batch)
        self.log = Log(config, self.out / 'log.jsonl')
        self.interrupted = self.told = 0        # the number of a signal; and once it counts
        self.first_signal = math.inf            # when it came
        with user_errors():
            if config.progress_samples and RANK == 0:
                began = time.time()
                self.progress = self.latent_moments(lambda z, fresh, context: ddim(
                    self.teacher, z, context, self.null, config.kappa[2], 25))
                print(f'{config.progress_samples} latents of the teacher in {clock(time.time() - began)}')
            if config.resume:
                self.load_state(settings)
            elif RANK == 0:
                self.save_pictures(0)
        self.log.seconds = self.log.elapsed()
        self.log.began = self.log.printed = time.time()         # the pace is that of iterations
        self.handlers = {number: signal.signal(number, self.interrupt)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def draw(self, iteration, half, rows, drop=0.0):
        return draw_samples(self.config, self.prompts, self.encode, self.shape, self.device,
                            iteration, half, rows, drop)

    def update(self, name):
        """Step the optimizer of 'G' or 'fake'."""
        # No loss scaling in fp16: the losses are sums over pixels, not means.
        clip = 1.0 if name == 'G' and self.config.precision == 'fp16' else math.inf
        norm, broken, lost = update(self.optimizers[name], clip)
        self.log.add(**{f'grad_{name}': norm, 'bad_grads': broken, 'lost_grads': lost})

    def interrupt(self, number, _):
        """Stop after this iteration; another signal, 3 seconds later or more, stops at once.

        Sooner it is the same one: torchrun passes on what Ctrl-C or a scheduler sent to all processes."""
        self.interrupted, now = number, time.monotonic()
        self.first_signal = min(self.first_signal, now)
        if now - self.first_signal > 3:
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)

    def heard(self):
        """The number of a signal that any process was sent so far, else 0: all stop if one is told to."""
        told = self.interrupted
        if dist.is_initialized():
            most = torch.tensor(told)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            told = most.item()
            self.interrupted = told or self.interrupted     # one may have come meanwhile: for next time
        return told

    def end_iteration(self, iteration):
        """Log, pictures, score, state, as they are due. Returns whether the run was interrupted.

        A signal amid pictures counts after the next iteration, so that a state is saved for it; a score it
        cuts off. What is due and not done is owed: the state says so, and resuming begins with it."""
        config, seen, self.told = self.config, (iteration + 1) * self.config.batch, self.heard()

        def due(kimg):
            """Whether this is the last iteration, or one that crossed a multiple of so many images."""
            every, last = kimg * 1000, iteration == self.iterations - 1
            return last or seen // every > (seen - config.batch) // every
        owed = ['pictures'] * due(config.grid_kimg)
        if config.fid_stats and due(config.fid_every):
            owed.append('score')
        state = self.told or due(config.save_every)
        with user_errors():
            self.log.end(seen, owed or state)
            try:
                if owed:
                    self.measure(seen, owed)
            except Exception:
                state = True                    # what was learnt since the last one is not lost with them
                raise
            finally:
                if (state or self.told) and RANK == 0:
                    self.save_state(seen, owed)
        return bool(self.told)

    def measure(self, seen, owed):
        """Draw and score what is owed after `seen` images; what is done leaves the list."""
        if 'pictures' in owed:
            if RANK == 0:
                self.save_pictures(seen)
            owed.remove('pictures')
        # Not when interrupted: ten thousand pictures are more than a machine about to vanish grants.
        if 'score' in owed and self.config.fid_stats and not self.told:
            if self.score(seen):
                owed.remove('score')
            else:
                self.told = self.heard()
        if RANK == 0:
            draw_curves(self.log.file, self.out / 'curves.png')

    def one_step(self, z, fresh, context):
        return generate(self.ema, z, context, self.config.t_init)

    @torch.no_grad()
    def save_pictures(self, seen):
        """A grid from 16 fixed seeds and prompts, the averaged generator as a folder diffusers opens."""
        config, texts = self.config, self.prompts[::max(1, len(self.prompts) // 16)][:16]
        self.ema.to(self.device)
        with autocast(config.precision, self.device):
            images = [draw_pictures(self.one_step, self.vae, self.encode([text]), [i], self.shape)[0]
                      for i, text in enumerate(texts)]
        if config.progress_samples:
            began = time.time()
            distance = fid.frechet_distance(*self.latent_moments(self.one_step), *self.progress)
            progress = dict(progress_fd=round(distance, 4), progress_seconds=round(time.time() - began, 2))
        self.ema.to(config.ema_device or self.device)
        save_png(make_grid(images, texts, 4), self.out / f'grid_{seen:09d}.png')
        if seen:
            unet.save(self.ema, self.out / 'generator' / 'unet')
            facts = dict(teacher=config.teacher, tokenizer=config.tokenizer, t_init=config.t_init,
                         size=self.shape[1] * self.vae.factor, images=seen)
            write_json(self.out / 'generator' / 'generator.json', facts)
        if config.progress_samples:             # last, so that what fails and is done again is noted once
            self.log.note(seen, **progress)

    @torch.no_grad()
    def score(self, seen):
        """FID of the average, its pictures shared among the processes, as a row of the log.

        Returns whether it was done: a signal cuts it off."""
        began, moments, (stats, inception, captions) = time.time(), fid.Moments(), self.scoring
        self.ema.to(self.device)
        preset = stats['preset'] or 'clean'
        for rows in torch.arange(self.config.fid_num)[RANK::WORLD].split(16):
            context = self.encode([captions[i % len(captions)] for i in rows.tolist()])
            with autocast(self.config.precision, self.device):
                images = draw_pictures(self.one_step, self.vae, context, rows.tolist(), self.shape)
            moments.add(fid.features(inception, images, preset))
            if self.interrupted:
                break
        self.ema.to(self.config.ema_device or self.device)
        if dist.is_initialized():
            n, total, product = (torch.as_tensor(x, dtype=torch.float64)
                                 for x in (moments.n, moments.sum, moments.product))
            for x in (n, total, product):
                dist.all_reduce(x)
            moments = fid.Moments()
            moments.merge(int(n), total.numpy(), product.numpy())
        if moments.n < self.config.fid_num:
            return False
        if RANK == 0:
            value = fid.frechet_distance(moments.mu, moments.sigma, stats['mu'], stats['sigma'])
            print(f'{seen:8d} images  FID {value:.4f}, {preset}, of {moments.n} pictures', flush=True)
            self.log.note(seen, fid=round(value, 4), fid_seconds=round(time.time() - began, 2))
        return True

    @torch.no_grad()
    def latent_moments(self, make):
        """Mean (16,) and covariance of pooled latents make(z, None, context), prompt i with seed i."""
        moments = fid.Moments()
        for rows in torch.arange(self.config.progress_samples).split(min(self.config.micro_batch, 64)):
            z = torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(i))
                             for i in rows.tolist()])
            texts = [self.prompts[i % len(self.prompts)] for i in rows.tolist()]
            with autocast(self.config.precision, self.device):
                x = make(z.to(self.device), None, self.encode(texts))
            moments.add(torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1).cpu())
        return moments.mu, moments.sigma

    def tensors(self):
        """Everything that training changes, by name."""
        nets = dict(G=self.G, ema=self.ema, fake=self.fake)
        tensors = {f'{name}.{key}': p.data for name, net in nets.items()
                   for key, p in net.named_parameters()}
        return tensors | {f'adam_{name}.{i:04d}': square for name, optimizer in self.optimizers.items()
                          for i, square in enumerate(optimizer.squares)}

    def save_facts(self, folder, seen, owed):
        write_json(folder / 'state.json', dict(images=seen, seconds=self.log.elapsed(), owed=owed,
                                               log_bytes=self.log.file.stat().st_size, **self.marks))

    def save_state(self, seen, owed):
        """state/IMAGES with tensors.safetensors and state.json, whole or not at all; keeps the last two.

        A folder gets its name by a rename once it is on the disk, so a kill at any moment leaves the last
        one as it was."""
        states = self.out / 'state'
        new, folder = states / 'unfinished', states / f'{seen:09d}'
        remove(new)
        new.mkdir(parents=True)
        try:
            unet.write_tensors({name: w.cpu() for name, w in self.tensors().items()},
                               new / 'tensors.safetensors')
            self.save_facts(new, seen, owed)
            for file in (self.log.file, *new.iterdir(), new):
                handle = os.open(file, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            remove(folder)
            new.rename(folder)
        except (OSError, SafetensorError) as error:
            remove(new)
            raise ValueError(f'the training state could not be written to {states} ({error}); the one '
                             'before is intact: make room, then go on with --resume') from None
        for old in sorted(states.glob('[0-9]*'))[:-2]:
            remove(old)

    def load_state(self, settings):
        """Go on from the newest state: weights, optimisers, counters, log, and what is still owed."""
        states = sorted((self.out / 'state').glob('[0-9]*'))
        check(states, f'expected a training state in {self.out}/state, found none; start the run anew')
        try:
            facts = unet.read_json(states[-1] / 'state.json')
            tensors, own = unet.read_tensors(states[-1] / 'tensors.safetensors'), self.tensors()
            found, wanted = ({name: w.shape for name, w in some.items()} for some in (tensors, own))
            check(found == wanted, 'its tensors are not those of this teacher')
            for name, kind in dict(images=int, log_bytes=int, seconds=float, owed=list).items():
                check(type(facts.get(name)) is kind and facts[name] >= kind(), f'its state.json lacks {name}')
        except (ValueError, OSError) as error:
            raise ValueError(f'the training state {states[-1]} cannot be resumed: {error}; remove that '
                             'folder to go on from the one before, if there is one') from None
        for name, mark in self.marks.items():
            check(facts.get(name) == mark, f'expected the {name} that {self.out} was begun with, found other '
                                           f'contents; give the old as --{name}, or start a new run')
        for name, w in own.items():
            w.copy_(tensors[name])
        self.first = facts['images'] // self.config.batch
        for optimizer in self.optimizers.values():
            for step in optimizer.steps:
                step.fill_(self.first)
        self.log.images, self.log.seconds = facts['images'], facts['seconds']
        if RANK == 0:                           # rows after the state will be written again
            self.log.file.touch()
            kept = self.log.file.read_bytes()[:facts['log_bytes']]
            os.truncate(self.log.file, kept.rfind(b'\n') + 1)
            write_json(self.out / 'config.json', settings)      # with what was given anew
            print(f'Resuming {self.out} at {facts["images"]} images', flush=True)
        owed, drawn_at = facts['owed'], generator_in(self.out / 'generator')[1].get('images')
        if self.first >= self.iterations and drawn_at != facts['images'] and 'pictures' not in owed:
            owed.insert(0, 'pictures')          # it ends here, since a shorter --kimg was given, say
        if owed:
            self.measure(facts['images'], owed)
            if RANK == 0:
                self.save_facts(states[-1], facts['images'], owed)

    def close(self):
        """The last word, and the exit code of an interruption."""
        if RANK == 0 and self.told:
            print(f'Interrupted; the state is saved. Go on with:\n    python sid_lsg.py train '
                  f'--resume {self.out}', flush=True)
        elif RANK == 0:
            print(f'The generator is in {self.out}/generator, its pictures from first to last in '
                  f'{self.out}/grid_*.png. Try it:\n    python sid_lsg.py sample --generator {self.out} '
                  f'"{self.prompts[0]}"')
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.told:
            sys.exit(128 + self.told)


def fingerprint(*nets):
    """SHA-256 of a column of every tensor of fp32 nets: enough to know them by, and soon computed."""
    columns = [w[(slice(None), *[0] * (w.ndim - 1))] for net in nets for w in net.state_dict().values()]
    return hashlib.sha256(torch.cat(columns).cpu().numpy().tobytes()).hexdigest()


def recompute_in_backward(net):
    """Let the big blocks of a net keep only their inputs, and run again in the backward pass."""
    for module in net.modules():
        if isinstance(module, (unet.ResnetBlock, unet.SpatialTransformer)):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def draw_curves(log_file, path):
    """All numbers of a log.jsonl over the images seen, one small panel each, as PNG."""
    lines = Path(log_file).read_text(encoding='utf-8', errors='replace').splitlines()
    rows = [json.loads(line) for line in lines if line[:1] == '{' and line[-1:] == '}']     # others are torn
    names = [name for name in dict.fromkeys(name for row in rows for name in row)
             if name != 'images' and 'seconds' not in name]
    wide, high = 320, 120
    sheet = Image.new('RGB', (2 * wide, math.ceil(len(names) / 2) * high), 'white')
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, name in enumerate(names):
        points = [(row['images'], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        x, y = np.array(points, dtype=float).T
        low, top = np.percentile(y, [1, 99])    # a single spike shall not flatten the rest
        left, bottom = i % 2 * wide + 12, i // 2 * high + high - 14
        across = left + (wide - 24) * x / max(x.max(), 1)
        up = bottom - (high - 40) * np.clip((y - low) / max(top - low, 1e-12), 0, 1)
        pen.line([left, bottom, left + wide - 24, bottom], 'lightgray')
        pen.line(list(zip(across, up)), 'navy')
        text = f'{name}: {y[-1]:.4g}, from {low:.4g} to {top:.4g}'
        pen.text((left, bottom - high + 18), text, 'black', font)
    save_png(sheet, path)


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


# ---------------------------------------------------------------------------------------------------
# Pictures

@torch.no_grad()
def sample(config):
    """Pictures of every prompt with every seed (without seeds: prompt i with seed i) in a folder.

    Their paths go to stdout. Pictures that are there already are not drawn again; the processes of a
    torchrun share what is left."""
    net, vae, encode, jobs, todo, shape, facts, out = open_sample(config)
    null = encode([''])
    config.batch = max(min(config.batch, len(todo)), 1)
    if config.compile:
        compile_to_draw(net, vae.decoder, encode.net, config.batch)

    def make(z, fresh, context):
        if config.teacher_steps:
            return ddim(net, z, context, null, config.kappa, config.teacher_steps)
        return generate(net, z, context, int(facts['t_init']), config.steps, fresh)

    began = printed = time.time()
    saving = []

    def finish_saving():
        with user_errors():
            for path in saving:
                print(path.result(), flush=True)

    with ThreadPoolExecutor() as pool:          # encodes PNGs while the next batch is computed
        for done in range(0, len(todo), config.batch):
            if time.time() - printed > 5:
                printed, pace = time.time(), (time.time() - began) / done
                print(f'{done} of {len(todo)} pictures, {1 / pace:.1f} a second, '
                      f'{clock(pace * (len(todo) - done))} left', file=sys.stderr)
            rows = todo[done:done + config.batch]
            # Compiled for one shape: the last batch is filled up, and what fills it is not kept.
            filled = rows + rows[-1:] * (config.batch - len(rows)) if config.compile else rows
            texts, seeds = zip(*(jobs[i] for i in filled))
            images = draw_pictures(make, vae, encode(texts), seeds, shape)
            finish_saving()
            saving = [pool.submit(save_png, image, out / f'{i:06d}.png', prompt=text, seed=seed, **facts)
                      for i, image, text, seed in zip(rows, images, texts, seeds)]
        finish_saving()
    first = [out / f'{i:06d}.png' for i in range(min(len(jobs), 64))]
    if all(path.is_file() for path in first):   # else another process is still at it, and will do this
        columns = min(8, len(parse_seeds(config.seeds)) if config.seeds else math.ceil(len(first) ** 0.5))
        with user_errors():
            print(save_png(make_grid([np.asarray(Image.open(path)) for path in first],
                                     [f'{text} [{seed}]' for text, seed in jobs], columns),
                           out / 'grid.png'), flush=True)


def compile_to_draw(net, decoder, text, batch):
    """torch.compile the nets that draw `batch` pictures at a time; a single one in CUDA graphs."""
    # The text encoder is little work in many kernels: it counts where these wait for the host to start them.
    for part in (net, decoder, text) if batch == 1 else (net, decoder):
        part.compile(dynamic=False, mode='reduce-overhead' if batch == 1 else 'default')


def draw_pictures(make, vae, context, seeds, shape):
    """uint8 (B, H, W, 3) of the latents make(z, fresh, context), picture i's noise drawn with seeds[i].

    The noise is the CPU's: a picture depends on prompt and seed, not on neighbours, batch or device."""
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fresh(_=None):
        return send(torch.stack([torch.randn(shape, generator=source) for source in sources]), context.device)
    return to_uint8(vae.decode(make(fresh(), fresh, context)))


def ddim(net, z, context, null, kappa, steps):
    """The teacher's own sampler: deterministic DDIM (arXiv 2010.02502), x_0 (B, 4, H, W) from z.

    For comparison. Its steps are those of diffusers for SD: t = 1 + i (1000 // steps), and the last ends
    at t = 0, not beyond."""
    stride, x = 1000 // steps, z
    for i in reversed(range(steps)):
        t = torch.full((len(z),), 1 + i * stride, device=z.device)
        eps_hat = guided(net, x, t, context, null, kappa)
        x = add_noise(predict_x0(eps_hat, x, t), eps_hat, (t - stride).clamp(min=0))
    return x


def to_uint8(images):
    """(B, 3, H, W), about [-1, 1], -> numpy uint8 (B, H, W, 3): x 127.5 + 128, cut.

    As in the official generate_onestep.py 300."""
    return (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_png(image, path, **text):
    """Write an array or Image under a temporary name, then rename it; `text` goes into text chunks.

    Returns the path."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    new = f'{path}.{RANK}.tmp'          # of torchrun's processes each may write the grid
    try:
        image.save(new, format='PNG', pnginfo=info)
        return Path(new).replace(path)
    except OSError:
        Path(new).unlink(missing_ok=True)
        raise


def full_path(name):
    """An absolute path, for use from elsewhere; '' and repo ids stay what they are."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def write_json(path, content):
    """Whole or not at all, whatever goes out in the middle."""
    with open(f'{path}.tmp', 'w', encoding='utf-8') as file:
        file.write(json.dumps(content, indent=2) + '\n')
        file.flush()
        os.fsync(file.fileno())
    Path(f'{path}.tmp').replace(path)


def make_grid(images, labels, columns):
    """All pictures in one, each over its label; small ones enlarged unsmoothed to 128 pixels or more."""
    side, lines, font = images[0].shape[0], 4, ImageFont.load_default(11)
    cell = side * math.ceil(128 / side)
    wide, high = cell + 8, cell + 8 + 13 * lines
    sheet = Image.new('RGB', (columns * wide + 8, math.ceil(len(images) / columns) * high + 8), 'white')
    pen = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels)):
        x, y = 8 + i % columns * wide, 8 + i // columns * high
        sheet.paste(Image.fromarray(image).resize((cell, cell), Image.NEAREST), (x, y))
        words = textwrap.wrap(label, cell // 6, max_lines=lines, placeholder=' ...')
        pen.multiline_text((x, y + cell), '\n'.join(words), 'black', font, spacing=2)
    return sheet


# ---------------------------------------------------------------------------------------------------
# Checkpoints in other shapes

def convert(config):
    """Any checkpoint or generator, to a folder in diffusers layout or to one original-style file."""
    with user_errors():
        source, target = unet.locate(config.source), Path(config.target)
        check(config.overwrite or not target.exists(),
              f'{target} exists already, nothing was overwritten; give another name, or --overwrite')
        check((target / 'unet').is_dir() or not target.is_dir(),
              f'{target} is a folder that holds no checkpoint, so it is not replaced; give another name')
        single = target.suffix == '.safetensors'
        folder, facts = generator_in(source)
        pickled = source.is_file() and is_official_pickle(source)
        student = bool(facts) or pickled
        net = read_official_pickle(source) if pickled else unet.load(folder if facts else config.source)
        alone = pickled or (folder.is_dir() and not (folder / 'vae').is_dir()       # a UNet, and nothing else
                            and (bool(facts) or (source / 'config.json').is_file()))
        teacher = config.teacher or facts.get('teacher') or ('' if alone else config.source)
        check(teacher or not single,
              f'{source} is a UNet alone, and {target} needs a VAE and a text encoder too; '
              'give --teacher, the checkpoint to take them from')
        config.precision = config.precision or ('fp16' if single else 'fp32')
        vae, text = (vae_module.load(teacher), clip_text.load(teacher)) if teacher else (None, None)
        tokenizer = None if single or not teacher else clip_text.load_tokenizer(
            config.tokenizer or facts.get('tokenizer') or teacher)
        if teacher:
            check_parts(text, tokenizer, net, teacher)
        dtype = DTYPES[config.precision]
        biggest = max((w.abs().max().item(), name) for part in (net, vae, text) if part is not None
                      for name, w in part.state_dict().items())
        check(biggest[0] <= torch.finfo(dtype).max,
              f'{source} has {biggest[0]:g} in the tensor {biggest[1]}, more than fp16 holds; '
              'use --precision fp32')
        new, old = (target.with_name(target.name + end) for end in ('.tmp', '.old'))
        aside = os.path.lexists(target) and not (single and target.is_file())      # a rename replaces a file
        for path in (new, old) if aside else (new,):
            check(not path.exists(), f'{path} is in the way, perhaps of a convert that was killed; remove it'
                  + f' once {target} is whole' * (path == old) + ', then do this again')
        target.parent.mkdir(parents=True, exist_ok=True)
        facts = {'t_init': 625, **facts} if student else {}
        for part in ('teacher', 'tokenizer'):           # they are in the folder or file, or nowhere
            facts.pop(part, None)
        try:
            if single:
                unet.write_tensors(original_tensors(net, vae, text, dtype, source, target), new, facts)
            elif teacher:
                write_pipeline(new, net, vae, text, tokenizer, dtype, 'DDPM' if student else 'DDIM')
            else:
                unet.save(net, new / 'unet', dtype)
            if student and not single:
                write_json(new / 'generator.json', facts)
            if aside:
                target.replace(old)
            new.replace(target)
            if aside:
                remove(old)
        finally:
            remove(new)
    print(f'{target}: {"a one-step generator" if student else "a diffusion model"} in {config.precision}')


def remove(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def original_tensors(net, vae, text, dtype, source, target):
    """The 1,131 tensors of an original single file, as web UIs open it: {name: tensor}.

    ValueError where the nets are not built as SD 1.5 is, since such a file cannot say so."""
    with torch.device('meta'):
        like = unet.UNet(), vae_module.VAE(), clip_text.TextEncoder()
    heads = (net.mid_block.attentions[0].transformer_blocks[0].attn2.heads,
             text.text_model.encoder.layers[0].self_attn.heads)
    check(all(a.state_dict().keys() == b.state_dict().keys() for a, b in zip((net, vae, text), like))
          and (heads, net.conv_norm_out.num_groups, vae.scale) == ((8, 12), 32, 0.18215),
          f'{source} does not fit into {target}: such a file does not say how its nets are built, so '
          'expected SD 1.5\'s way, 4 levels of 2 resnets and 8 heads; found another, write a folder')
    names, prefix = unet.original_names(net), unet.PREFIX
    tensors = {prefix['unet'] + names[key]: w for key, w in net.state_dict().items()}
    for key, w in vae.state_dict().items():     # there the attention is convolutions of 1 x 1
        w = w[:, :, None, None] if '.attentions.' in key and w.ndim == 2 else w
        tensors[prefix['vae'] + vae_module.original_name(key)] = w
    text_prefix = prefix['text_encoder'] + 'transformer.'
    tensors |= {text_prefix + key: w for key, w in text.state_dict().items()}
    tensors = {name: w.to(dtype) for name, w in tensors.items()}
    tensors[text_prefix + 'text_model.embeddings.position_ids'] = torch.arange(clip_text.LENGTH)[None]
    return tensors


def write_pipeline(folder, net, vae, text, tokenizer, dtype, scheduler):
    """A whole checkpoint in diffusers layout; `scheduler` is the class it opens with there, less its end.

    DDPM makes one step from t_init to 0 exact; DDIM is for what takes many steps."""
    unet.save(net, folder / 'unet', dtype)
    vae_module.save(vae, folder / 'vae', dtype)
    clip_text.save(text, folder / 'text_encoder', dtype)
    clip_text.save_tokenizer(tokenizer, folder / 'tokenizer')
    (folder / 'scheduler').mkdir(exist_ok=True)
    write_json(folder / 'scheduler' / 'scheduler_config.json', {
        '_class_name': f'{scheduler}Scheduler', 'beta_start': 0.00085, 'beta_end': 0.012,
        'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000, 'clip_sample': False,
        'set_alpha_to_one': False, 'steps_offset': 1, 'prediction_type': 'epsilon'})
    write_json(folder / 'model_index.json', {
        '_class_name': 'StableDiffusionPipeline', 'unet': ['diffusers', 'UNet2DConditionModel'],
        'vae': ['diffusers', 'AutoencoderKL'], 'text_encoder': ['transformers', 'CLIPTextModel'],
        'tokenizer': ['transformers', 'CLIPTokenizer'], 'scheduler': ['diffusers', f'{scheduler}Scheduler'],
        'safety_checker': [None, None], 'feature_extractor': [None, None], 'requires_safety_checker': False})


def is_official_pickle(file):
    """Whether a file is a bare pickle, as the official code writes generators, not one by torch.save."""
    with open(file, 'rb') as opened:
        head = opened.read(64)
    # Safetensors may begin with that byte too, but have { at byte 8; torch.save's old format has a magic.
    return (head[:1] == b'\x80' and head[8:9] != b'{'
            and b'l\xfc\x9cF\xf9 j\xa8P\x19' not in head)


class OfficialUnpickler(pickle.Unpickler):
    """Reads pickle.dump(dict(ema=UNet2DConditionModel)) without running anything that is in it.

    Every class of diffusers and torch.nn becomes an empty one that only keeps its attributes; tensors are
    rebuilt by torch's own functions; any other name is refused."""

    def find_class(self, module, name):
        known = {
            'collections.OrderedDict': dict,
            'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
            'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
            # torch's own is a complete torch.load, which would unpickle anything.
            'torch.storage._load_from_bytes': lambda b: torch.load(io.BytesIO(b), weights_only=True)}
        if f'{module}.{name}' in known:
            return known[f'{module}.{name}']
        check(module.startswith(('diffusers.', 'torch.nn.modules.', 'xformers.', 'peft.')),
              f'asks for {module}.{name}, which no generator needs')
        return type(name, (dict,), {'__init__': lambda self, *_: None})


def read_official_pickle(file):
    """The UNet in an official SiD-LSG generator (training/sid_training_loop.py 641-650), fp32."""
    def tensors(module, prefix=''):
        for kind in ('_parameters', '_buffers'):
            for name, tensor in module.__dict__[kind].items():
                if tensor is not None:
                    yield prefix + name, tensor
        for name, child in module.__dict__['_modules'].items():
            if child is not None:
                yield from tensors(child, f'{prefix}{name}.')
    try:
        with open(file, 'rb') as opened:
            module = OfficialUnpickler(opened).load()['ema']
        config, weights = module.__dict__['_internal_dict'], dict(tensors(module))
    except Exception as error:          # whatever a damaged or hostile file brings about
        reason = unet.asked_for(error) or ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise ValueError(f'{file} is no official SiD-LSG generator, or cut off ({reason}); '
                         'expected a pickle of a diffusers UNet under "ema"') from None
    return unet.from_config(config, weights, file)


# ---------------------------------------------------------------------------------------------------
# Nets on a device

def choose_device(name):
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    if name == 'cuda' and 'LOCAL_RANK' in os.environ:           # torchrun: a GPU each
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    device = usable_device(name)
    # fp32 is fp32, as in the official sid_training_loop.py 241-242; torch's default is TF32 in convolutions.
    torch.backends.cudnn.allow_tf32 = False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)       # glibc's
    if device.type == 'cpu' and mallopt:
        # M_MMAP_MAX 0, M_TRIM_THRESHOLD at its most (malloc.h): memory that big tensors free is kept for
        # the next ones. From the system it would come as new pages, a tenth of the VAE's time at 512 px.
        mallopt(-4, 0)
        mallopt(-1, 2 ** 31 - 1)
    return device


def arithmetic(precision, device):
    """That precision, or fp32 where a CPU could only emulate it, two to three times slower."""
    # A CPU that can has, say, avx512_bf16, bf16 or fp16_arith. Older torch has no such function.
    abilities = getattr(torch.cpu, 'get_capabilities', dict)()
    able = device.type != 'cpu' or any(has and precision in what for what, has in abilities.items())
    return precision if able else 'fp32'


def place(net, device, dtype=torch.float32):
    """A frozen net on the device, to draw with in that dtype.

    On a CPU, big layers that would grow stay as they are, mapped from their file, and each is converted
    for its own call, into memory that all share: SD 1.5 from an fp16 file draws in fp32 with 3.4 GB less,
    and starts sooner, since conversion is cheap and fresh memory is not."""
    net.requires_grad_(False)
    kept = {layer: layer.weight.data for layer in net.modules() if device.type == 'cpu'
            and isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
            and layer.weight.itemsize < dtype.itemsize and layer.weight.numel() > 2 ** 16}
    for layer in kept:
        layer.weight.data = torch.empty(0)
    net.to(device, dtype, memory_format=torch.channels_last)
    memory = torch.empty(max((w.numel() for w in kept.values()), default=0), dtype=dtype)

    def convert(layer, inputs):
        w = kept[layer]
        wide = memory[:w.numel()].view(w.movedim(1, -1).shape).movedim(-1, 1)      # channels last
        layer.weight.data = wide.copy_(w)

    def restore(layer, *_):
        layer.weight.data = kept[layer]
    for layer in kept:
        restore(layer)
        layer.register_forward_pre_hook(convert)
        layer.register_forward_hook(restore)
    return net


def check_parts(text, tokenizer, net, path):
    """ValueError where the text encoder of the checkpoint `path` does not fit the tokenizer or the UNet."""
    words, width = text.text_model.embeddings.token_embedding.weight.shape
    end = min(words, 49408) - 1         # tokens that a fine-tuning added come after CLIP's, and are not used
    if tokenizer:
        check(tokenizer.end == end, f'expected the tokenizer of {path}, whose end token is {end}, found one '
                                    f'with {tokenizer.end}; give --tokenizer, the folder of its own')
    takes = net.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features
    check(width == takes, f'expected text states of {takes} numbers for this UNet, found {width} in {path}; '
                          'give --teacher, the checkpoint that it was made from')


def load_parts(path, device, net=None, tokenizer='', dtype=torch.float32, stored=torch.float32):
    """The VAE and `encode` of a checkpoint: encode(list of B str) -> context (B, 77, D) on the device.

    Its tokenizer is third; `tokenizer` may name another one's folder. They shall fit the UNet `net`. They
    compute in dtype; `stored` is what they are loaded in, None for the file's own. encode.net is the
    text encoder."""
    tokenizer = clip_text.load_tokenizer(tokenizer or path)
    vae, text = (place(part.load(path, stored), device, dtype) for part in (vae_module, clip_text))
    if net:
        check_parts(text, tokenizer, net, path)

    @torch.no_grad()
    def encode(texts):
        return text(send(tokenizer(texts), device)).clone()     # a CUDA graph's next call writes over it
    encode.net = text
    return vae, encode, tokenizer


# ---------------------------------------------------------------------------------------------------
# The door: what a user can get wrong is found here, before any work, and answered in one sentence

@contextlib.contextmanager
def user_errors():
    """Turns what is wrong with files, settings or numbers into a sentence and exit code 2.

    It goes around opening, measuring and saving, never around the two steps of an iteration."""
    try:
        yield
    except (ValueError, OSError, SafetensorError, FloatingPointError) as error:
        print(f'sid_lsg: {error}', file=sys.stderr)
        sys.exit(2)


def warn_of_cuts(prompts, tokenizer):
    """Say on stderr which prompts do not fit into CLIP's 77 positions, and what of them is lost."""
    # A token is a byte at least; only what is not ASCII can grow by being normalised.
    long = [prompt for prompt in prompts if len(prompt) > clip_text.LENGTH - 2 or not prompt.isascii()]
    cut = [(prompt, lost) for prompt in long if (lost := tokenizer.lost(prompt))]
    for prompt, lost in cut[:3]:
        fid.warn(f'"{textwrap.shorten(prompt, 60)}" is longer than {clip_text.LENGTH} tokens, '
                 f'this is cut: "{textwrap.shorten(lost, 200)}"')
    if len(cut) > 3:
        fid.warn(f'{len(cut) - 3} more prompts are longer than {clip_text.LENGTH} tokens and are cut')


def new_folder(given, parent):
    """The folder to write: `given`, or the next free parent/NNN."""
    taken = [int(p.name) for p in Path(parent).glob('[0-9]*') if p.name.isdigit()]
    folder = Path(given or f'{parent}/{max(taken, default=-1) + 1:03d}')
    check(folder.is_dir() or not folder.exists(),
          f'expected a folder for --out, found a file at {folder}; give another')
    folder.mkdir(parents=True, exist_ok=bool(given))    # runs started together shall not share one
    return folder


def latent_shape(size, net, vae):
    """(4, h, w) of the latents for pictures `size` pixels wide; 0 means what the net was trained at."""
    size, below = size or net.sample_size * vae.factor, 2 ** (len(net.down_blocks) - 1)
    check(size > 0 and size % (vae.factor * below) == 0,
          f'expected --size to be a multiple of {vae.factor * below}, the VAE\'s factor {vae.factor} '
          f'times the UNet\'s {below}, got {size}')
    return 4, size // vae.factor, size // vae.factor


def check_kinds(config):
    """ValueError for a setting that is not of its field's kind; a sid_lsg.json may hold anything."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get('choices')
        if choices:
            good, kind = value in choices, f'one of {", ".join(choices)}'
        elif f.type in (str, bool):
            good, kind = isinstance(value, f.type), 'text' if f.type is str else 'true or false'
        else:
            numbers, whole, signed = np.atleast_1d(value), f.type is int, f.name in ('kappa', 'alpha')
            good = (np.ndim(value) <= (f.type is tuple) and numbers.dtype.kind in ('iu' if whole else 'iuf')
                    and np.isfinite(numbers).all() and (signed or numbers.min() >= 0))
            kind = f'a {"whole" if whole else "finite"} number' + ('' if signed else ', 0 or more')
        check(good, f'expected --{f.name.replace("_", "-")} to be {kind}, got {value}')


def check_numbers(config):
    """ValueError for a setting of train that makes no sense, or not among so many processes."""
    check(len(config.kappa) == 3,
          'expected --kappa with one number, or three (kappa1, kappa2 = kappa3, kappa4), '
          f'got {len(config.kappa)}')
    check(min(config.batch, config.micro_batch) > 0 and config.batch % (config.micro_batch * WORLD) == 0,
          'expected --batch to be a multiple of --micro-batch'
          + (f' times the {WORLD} processes' if WORLD > 1 else '')
          + f', got {config.batch} and {config.micro_batch}')
    check(0 <= config.t_min < config.t_max <= 1000 and 0 <= config.t_init < 1000,
          'steps lie in 0 ... 999 and --t-min below --t-max, got '
          f'--t-min {config.t_min} --t-max {config.t_max} --t-init {config.t_init}')
    check(0 <= config.drop <= 1, f'expected --drop to be a share from 0 to 1, got {config.drop}')
    check(min(config.kimg, config.grid_kimg, config.save_every, config.fid_every) > 0,
          'expected --kimg, --grid-kimg, --save-every and --fid-every above 0')
    check(config.fid_num >= 2 * WORLD,
          f'expected --fid-num to be 2 a process or more, got {config.fid_num}')
    check(config.progress_samples == 0 or config.progress_samples > 16,
          'expected --progress-samples to be 0 or more than the 16 numbers that each is pooled to, '
          f'got {config.progress_samples}')


def open_scoring(config, prompts, device):
    """For FID while training: statistics to compare with, Inception, and the captions to draw."""
    stats, path = fid.load_stats(config.fid_stats), config.fid_stats
    check(stats and len(stats['mu']) == 2048 and stats['preset'] in ('', *fid.PRESETS),
          f'expected statistics of Inception\'s 2,048 features by fid.py --save-stats in {path}, found '
          + (f'{len(stats["mu"])} features, preset {stats["preset"] or "unknown"}' if stats else 'none'))
    inception = fid.load_inception(config.fid_weights or fid.default_weights()).to(device)
    if stats['weights_sha256'] not in ('', inception.sha256):
        fid.warn(f'{path} was measured with another file of weights')
    if not stats['preset']:
        fid.warn(f'{path} does not say how its pictures were resized; clean is assumed')
    captions = fid.read_lines(config.fid_prompts, '--fid-prompts') if config.fid_prompts else prompts
    return stats, inception, captions


def open_run(config):
    """Check every setting, load the teacher and its parts, make or find the run folder.

    The folder: config.json (settings), log.jsonl, curves.png, grid_*.png, state/ (for --resume) and
    generator/ with unet/ (diffusers layout) and generator.json."""
    with user_errors():
        check_kinds(config)
        config.kappa = tuple(np.atleast_1d(config.kappa).tolist())
        config.kappa *= 3 if len(config.kappa) == 1 else 1
        for name in PATHS:              # to be found from elsewhere, too
            setattr(config, name, full_path(getattr(config, name)))
        settings = {name: value for name, value in asdict(config).items() if name != 'resume'}
        config.micro_batch = config.micro_batch or max(config.batch // WORLD, 1)
        check_numbers(config)
        device = choose_device(config.device)
        if config.ema_device:
            usable_device(config.ema_device, '--ema-device')
        if WORLD > 1:
            if device.type == 'cuda':
                torch.cuda.set_device(device)
            dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo',
                                    timeout=timedelta(hours=2))     # while the first draws and saves
        teacher = place(unet.load(config.teacher), device)
        vae, encode, tokenizer = load_parts(config.teacher, device, teacher, config.tokenizer)
        shape = latent_shape(config.size, teacher, vae)
        prompts = fid.read_lines(config.prompts or Path(config.teacher) / 'prompts.txt', '--prompts')
        scoring = open_scoring(config, prompts, device) if config.fid_stats else None
        out = Path(config.resume)               # a new run's folder only the first process knows
        if RANK == 0:
            warn_of_cuts(prompts, tokenizer)
            if not config.resume:
                out = new_folder(config.out, 'runs')
                check(not (out / 'config.json').exists(),
                      f'expected a new folder for --out, found config.json in {out}; '
                      'nothing was overwritten, give another')
                write_json(out / 'config.json', settings)
            print(f'Distilling {config.teacher} ({sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} '
                  f'M weights) into {out} on {device} in {config.precision}: kappa {config.kappa}, '
                  f'{len(prompts)} prompts, {config.kimg:g} thousand images', flush=True)
    return teacher, vae, encode, prompts, shape, scoring, out, device, settings


def parse_seeds(text):
    """'0-7,42' -> [0, 1, ... 7, 42]"""
    seeds = []
    for part in text.split(','):
        first, dash, last = part.strip().partition('-')
        check(first.isdecimal() and (last.isdecimal() or not dash)
              and int(first) <= int(last or first) < min(2 ** 64, int(first) + 10 ** 6),
              'expected --seeds as numbers below 2^64 and ranges from low to high, of a million at most, '
              f'such as 0-7,42, got {text}')
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def generator_in(path):
    """The generator's folder in a run folder, or `path` itself, and what its generator.json says.

    Of a single file that convert wrote: what its header says."""
    folder = Path(path, 'generator') if Path(path, 'generator').is_dir() else Path(path)
    said, settings = folder / 'generator.json', folder / 'config.json'
    if folder.is_file():
        about = unet.read_metadata(folder)
        facts = {name: int(about[name]) if about[name].isdecimal() else about[name]
                 for name in ('t_init', 'size', 'images') if {name, 't_init'} <= about.keys()}
    else:
        facts = unet.read_json(said) if said.is_file() else {}
        check(facts or not settings.is_file() or 'kimg' not in unet.read_json(settings),
              f'expected a generator in the run folder {folder}, found none yet; it comes with the first '
              'picture grid after the start')
    check(facts.get('t_init', 0) in range(1000) and facts.get('size', 0) in range(2 ** 20)
          and all(isinstance(facts.get(name, ''), str) for name in ('teacher', 'tokenizer')),
          f'expected of the generator {folder} a t_init of 0 to 999, a size in pixels and paths as text, '
          f'found {facts}; correct its generator.json, or convert it anew')
    return folder, facts


def open_generator(config):
    """The folder of the generator to draw with and what its generator.json says.

    Settles config.teacher and config.size."""
    newest = sorted(Path('runs').glob('*/generator'), key=lambda folder: folder.stat().st_mtime)
    check(config.generator or newest,
          'expected a trained generator, found none under runs/; run `python sid_lsg.py train` first, '
          'give --generator FOLDER, or --teacher-steps 25 for the teacher itself')
    folder, facts = generator_in(unet.locate(config.generator or newest[-1]))
    facts = {'t_init': 625, **facts}
    whole = folder.is_file() or (folder / 'vae').is_dir()       # convert writes such
    config.teacher = config.teacher or (str(folder) if whole else facts.get('teacher'))
    config.tokenizer = config.tokenizer or facts.get('tokenizer', '')
    config.size = config.size or int(facts.get('size', 0))
    check(config.teacher, f'expected {folder}/generator.json to name the teacher, '
                          'whose VAE and text encoder are needed; give --teacher FOLDER')
    return folder, facts


def open_sample(config):
    """Check every setting, load the drawing net and the rest, make the folder; what sample() works on."""
    with user_errors():
        check(config.batch > 0, f'expected --batch of 1 or more, got {config.batch}')
        if config.teacher_steps:
            check(0 < config.teacher_steps < 1000,
                  f'expected --teacher-steps from 1 to 999, got {config.teacher_steps}')
            check(config.steps == 1 and not config.generator,
                  '--teacher-steps draws with the teacher: leave out --steps and --generator')
            folder = config.teacher = config.teacher or str(TINY_TEACHER)
            config.kappa = 1.5 if config.kappa is None else config.kappa
            check(math.isfinite(config.kappa), f'expected a finite number for --kappa, got {config.kappa}')
            facts = dict(teacher_steps=config.teacher_steps, kappa=config.kappa)
        else:
            check(config.kappa is None, '--kappa guides the teacher, with --teacher-steps; '
                                        'a one-step generator was trained with its own')
            folder, facts = open_generator(config)
            facts = dict(steps=config.steps, t_init=facts['t_init'], images=facts.get('images', 'unknown'))
        check(config.out or WORLD == 1, 'expected --out with torchrun, for all processes to write to')
        device = choose_device(config.device)
        precision = arithmetic(config.precision, device)
        dtype = DTYPES[precision]
        stored = None if device.type == 'cpu' and not config.compile else dtype
        net = place(unet.load(folder, stored), device, dtype)
        vae, encode, tokenizer = load_parts(config.teacher, device, net, config.tokenizer, dtype, stored)
        shape = latent_shape(config.size, net, vae)
        for text in config.texts:
            check(text == text.encode(errors='replace').decode(), f'expected prompts in UTF-8, got {text!a}')
        texts = [*config.texts, *(fid.read_lines(config.prompts, '--prompts') if config.prompts else [])]
        warn_of_cuts(texts, tokenizer)
        check(texts, 'expected a prompt, in quotes, or --prompts FILE')
        seeds = parse_seeds(config.seeds) if config.seeds else None
        jobs = ([(text, seed) for text in texts for seed in seeds] if seeds
                else [(text, i) for i, text in enumerate(texts)])
        facts |= dict(generator=full_path(folder), teacher=full_path(config.teacher),
                      tokenizer=full_path(config.tokenizer), precision=precision, size=shape[1] * vae.factor)
        facts = {name: str(value) for name, value in facts.items()}
        out = new_folder(config.out, 'samples')
        todo = [i for i in range(RANK, len(jobs), WORLD)
                if not drawn(out / f'{i:06d}.png', prompt=jobs[i][0], seed=str(jobs[i][1]), **facts)]
        if len(todo) < len(jobs) and WORLD == 1:
            print(f'{len(jobs) - len(todo)} of {len(jobs)} pictures are there already', file=sys.stderr)
    return net, vae, encode, jobs, todo, shape, facts, out


def drawn(path, **facts):
    """Whether a picture is there. ValueError where it is one of other settings."""
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            text = getattr(image, 'text', {})   # another format than PNG has none
    except Exception as error:      # Pillow's decoders raise OSError, SyntaxError, struct.error ...
        raise ValueError(f'expected a whole picture at {path}, found none ({fid.reason(error)}); delete '
                         'it, and it is drawn again') from None
    other = [name for name, value in facts.items() if text.get(name) != value]
    check(not other, f'{path} is there already, with another {" and ".join(other)}; '
                     'nothing was overwritten, give another --out')
    return True


# ---------------------------------------------------------------------------------------------------
# The command line

# What may change when a run goes on: where things lie, its length, what is shown and saved when, and what
# holds it.
PATHS = ('teacher', 'tokenizer', 'prompts', 'fid_stats', 'fid_prompts', 'fid_weights')
FREE = (*PATHS, 'resume', 'kimg', 'grid_kimg', 'log_seconds', 'save_every', 'micro_batch', 'device',
        'checkpoint', 'compile', 'ema_device', 'fid_every', 'fid_num')


def make_config(kind, given):
    """The dataclass `kind` from the command line and, behind it, a run's or teacher's own settings."""
    resume = given.get('resume')
    file = (Path(given.get('teacher', TINY_TEACHER)) / 'sid_lsg.json' if resume is None else
            Path(resume) / 'config.json')       # an empty shell variable's, too, is no new run's
    check(resume is None or file.is_file(),
          f'expected a run folder at --resume {resume}, found no config.json there')
    beside = unet.read_json(file) if kind is TrainConfig and file.is_file() else {}
    unknown = set(beside) - {f.name for f in fields(kind)}
    check(not unknown, f'expected settings of train in {file}, found {", ".join(sorted(unknown))}')
    for name, value in given.items() if resume else ():
        old, new = (list(np.atleast_1d(x)) for x in (beside.get(name), value))
        check(name in FREE or old in (new, 3 * new),
              f'--{name.replace("_", "-")} {value} would make it another run than {resume}, where it is '
              f'{beside.get(name)}; leave it out, or start a new run')
    return kind(**{**beside, **given})


COMMANDS = {
    'train': (train, TrainConfig, 'Distil a teacher into a one-step generator. Defaults are the paper\'s; a '
              'file sid_lsg.json in the teacher\'s folder may bring others, as the tiny one\'s does.'),
    'sample': (sample, SampleConfig, 'Draw pictures with a generator, or with its teacher.'),
    'convert': (convert, ConvertConfig, 'Rewrite a checkpoint or generator for other programs.')}


def parse(arguments):
    """The command and {setting: value} of what was given. Options are the fields of its dataclass."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0],
                                     epilog='See train --help, sample --help and convert --help.')
    commands = parser.add_subparsers(dest='command', required=True, metavar=' | '.join(COMMANDS))
    for name, (_, kind, does) in COMMANDS.items():
        group = command = commands.add_parser(
            name, help=does, description=does, argument_default=argparse.SUPPRESS)
        for f in fields(kind):
            text, several, flag = f.metadata['help'], f.type is tuple, '--' + f.name.replace('_', '-')
            if 'group' in f.metadata:
                group = command.add_argument_group(f.metadata['group'])
            if f.name == 'texts':
                group.add_argument('texts', nargs='*', metavar='PROMPT', help=text)
            elif f.name in ('source', 'target'):
                group.add_argument(f.name, metavar=dict(source='IN', target='OUT')[f.name], help=text)
            elif f.type is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            else:
                default, choices = f.default[0] if several else f.default, f.metadata.get('choices')
                if '(default' not in text and default != '':
                    text += f' (default: {default if choices else format(default, "g")})'
                metavar = f.metadata.get('metavar', {int: 'N', str: 'NAME'}.get(f.type, 'X'))
                group.add_argument(
                    flag, type=float if several else f.type, nargs='+' if several else None, help=text,
                    choices=choices, metavar=None if choices else metavar)
    given = vars(parser.parse_args(arguments))
    return given.pop('command'), given


def main(arguments=None):
    command, given = parse(arguments)
    run, kind, _ = COMMANDS[command]
    with user_errors():
        config = make_config(kind, given)
    try:
        run(config)
    except KeyboardInterrupt:
        print('sid_lsg: interrupted', file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if fid.out_of_memory(error):
            said = f'the device is out of memory; {less_memory(config)}'
        elif isinstance(error, dist.DistError) or 'gloo' in str(error):
            said = ('another process of this run has ended, so this one does; unless that one said why, '
                    f'start all again with --resume, from the last state ({str(error).splitlines()[0]})')
        elif type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            said = (f'torch.compile failed ({str(error).splitlines()[0]}); it needs a C++ compiler, '
                    'and Triton on a GPU: give --no-compile to go on without')
        else:
            raise
        print(f'sid_lsg: {said}', file=sys.stderr)
        sys.exit(2)


def less_memory(config):
    """The next thing to try, in order of what it costs."""
    if isinstance(config, ConvertConfig):
        return 'close other programs: all weights are held at once'
    if isinstance(config, SampleConfig):
        return (f'try --batch {config.batch // 2}' if config.batch > 1 else
                'try --precision bf16' if config.precision == 'fp32' else 'try a smaller --size')
    if config.precision == 'fp32' and not config.resume:        # which it cannot change
        return 'try --precision bf16'
    if config.micro_batch > 1:
        half = next(n for n in range(config.micro_batch // 2, 0, -1) if config.micro_batch % n == 0)
        return f'try --micro-batch {half}'
    if not config.checkpoint:
        return 'try --checkpoint'
    if not config.ema_device:
        return 'try --ema-device cpu'
    return 'every option that saves memory is in use' + ('; try a smaller --size' * (not config.resume))


if __name__ == '__main__':
    main()
