"""SiD-LSG: distil Stable Diffusion 1.5, without data, into a one-step generator.

Zhou et al., "Long and Short Guidance in Score identity Distillation for One-Step Text-to-Image
Generation", arXiv 2406.01561 (the paper). Without guidance it is Score identity Distillation (SiD),
arXiv 2404.04057. "Official" is the authors' code, mingyuanzhou/SiD-LSG @709fc22.

    python sid_lsg.py train                 # tests/tiny_sd with the settings in its sid_lsg.json
    python sid_lsg.py train --teacher PATH --prompts FILE       # SD 1.5, with the paper's defaults
    python sid_lsg.py sample "a red star above a blue ring on a black background"
    python sid_lsg.py export runs/000 student                   # for diffusers and web UIs

Read train(), then add_noise, predict_x0, guided, generate and the two losses, directly above it.

    paper            | here      | shape (SD 1.5, 512 px) | meaning
    -----------------|-----------|------------------------|----------------------------------------
    c                | context   | (B, 77, 768)           | text embeddings of the prompts
                     | null      | (1, 77, 768)           | text embeddings of the empty prompt
    z                | z         | (B, 4, 64, 64)         | standard normal noise
    G_theta          | G         |                        | generator, a UNet; `ema` is its EMA
    f_phi            | teacher   |                        | the pretrained UNet, frozen
    f_psi            | fake      |                        | fake score network, a UNet that learns
                     |           |                        | to denoise the generator's images
    x_g = G(z, c)    | x_g       | (B, 4, 64, 64)         | generated latents
    t                | t         | (B,)                   | timesteps, uniform in [20, 979]
    epsilon          | eps       | (B, 4, 64, 64)         | standard normal noise
    a_t, sigma_t     | ALPHA[t], SIGMA[t]                 | noise schedule; ALPHA is not alpha below
    x_t              | x_t       | (B, 4, 64, 64)         | a_t x_g + sigma_t eps
    s                | t_init    |                        | the generator's timestep, 625
    epsilon hat      | eps_hat   | (B, 4, 64, 64)         | predicted noise
    f_phi(x_t, c)    | x_phi     | (B, 4, 64, 64)         | the teacher's x0-prediction, guided
    f_psi(x_t, c)    | x_psi     | (B, 4, 64, 64)         | the fake network's x0-prediction, guided
    kappa_1          | kappa1    |                        | guidance of fake while it learns
    kappa_2, kappa_3 | kappa2    |                        | guidance of fake in G's loss
    kappa_4          | kappa4    |                        | guidance of teacher in G's loss
    alpha            | alpha     |                        | alpha |x_phi - x_psi|^2 is subtracted

    guidance         | kappa1 | kappa2 | kappa4 | with K > 1
    -----------------|--------|--------|--------|----------------------------------------------
    none             |   1    |   1    |   1    |
    long and short   |   K    |   K    |   K    | LSG, the paper's
    long             |   1    |   1    |   K    | that of earlier methods
    short            |  1 / K |   1    |   1    |
    Zero-CFG         |   0    |   0    |   1    | fake ignores the prompt; arXiv 2505.12674

The goal is that x_psi, the mean of x_g given x_t, agrees with x_phi for every x_t. Then the images
of G have the teacher's distribution. README.md derives the loss of G from that.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import os
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
from safetensors import safe_open
from torch.optim.adam import adam
from torch.utils.checkpoint import checkpoint

import clip_text
import fid
import unet
import vae as vae_module
from unet import UserError, check

PROJECT = Path(__file__).resolve().parent
TINY_TEACHER = PROJECT / 'tests' / 'tiny_sd'
# torchrun sets LOCAL_RANK. The other two alone may come from other tools.
TORCHRUN = 'LOCAL_RANK' in os.environ
WORLD = int(os.environ['WORLD_SIZE']) if TORCHRUN else 1
RANK = int(os.environ['RANK']) if TORCHRUN else 0
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


# -------------------------------------------------------------------------------------------------
# Settings. Each field is an option of the command line. The defaults of train come from the paper.
# A file sid_lsg.json in the teacher's folder can replace them, as in tests/tiny_sd.

def option(default, help, **more):
    return field(default=default, metadata={'help': help, **more})


DEVICE = option('', 'cuda, cuda:1, cpu ... (default: cuda if available)', group='machine')


@dataclass
class TrainConfig:
    teacher: str = option(str(TINY_TEACHER), 'Stable Diffusion 1.5: diffusers folder, original '
                          '.safetensors, or repo id in the Hugging Face cache (default: '
                          'tests/tiny_sd)', group='task', metavar='PATH')
    tokenizer: str = option('', 'tokenizer folder (default: the teacher\'s)', metavar='FOLDER')
    prompts: str = option('', 'text file, one prompt per line (default: the teacher\'s '
                          'prompts.txt)', metavar='FILE')
    size: int = option(0, 'image height and width in pixels (default: the teacher\'s)')

    kappa: tuple = option((1.5,), 'guidance: one number (LSG), or kappa1 kappa2 kappa4, such as '
                          '1 1 3 for long guidance; 1 disables it', group='method')
    alpha: float = option(1.0, 'the generator\'s loss subtracts alpha times |x_phi - x_psi|^2')
    steps: int = option(1, 'steps of the generator', choices=[1, 2, 4])
    t_init: int = option(625, 'timestep of the generator\'s first step')
    t_min: int = option(20, 'timesteps of the losses are at least this')
    t_max: int = option(980, 'timesteps of the losses are below this')
    drop: float = option(0.1, 'share of prompts replaced by "" while the fake score network '
                         'learns, if it is guided')

    kimg: float = option(8_806.0, 'length in thousand images', group='optimisation')
    batch: int = option(512, 'images per iteration, over all processes')
    lr: float = option(1e-6, 'learning rate of the generator')
    fake_lr: float = option(1e-6, 'learning rate of the fake score network')
    ema_kimg: float = option(50.0, 'half-life of the EMA in thousand images')
    ema_rampup: float = option(0.05, 'the half-life is at most this share of the images seen')
    seed: int = option(0, 'seed of all random numbers')

    out: str = option('', 'run folder (default: the next free runs/NNN)', group='run',
                      metavar='FOLDER')
    resume: str = option('', 'run folder to resume, or to begin if it is not there; options that '
                         'do not change the result may differ', metavar='FOLDER')
    save_kimg: float = option(200.0, 'thousand images between states, each with the generator and '
                              'an image grid; two states are kept')
    fid_stats: str = option('', 'statistics from fid.py --save-stats, to compute FID while '
                            'training', metavar='FILE')
    fid_kimg: float = option(500.0, 'thousand images between FIDs')
    fid_num: int = option(10_000, 'generated images for each FID, prompt i with seed i')
    fid_prompts: str = option('', 'prompts of these images (default: those of training)',
                              metavar='FILE')
    fid_weights: str = option('', 'Inception weights (default: where fid.py looks)', metavar='FILE')

    device: str = DEVICE
    precision: str = option('fp32', 'fp32, or autocast to bf16 or fp16 with fp32 weights',
                            choices=[*DTYPES])
    micro_batch: int = option(0, 'images at a time on each device (default: its part of the batch)')
    recompute: bool = option(False, 'gradient checkpointing: less memory, one more forward pass')
    ema_device: str = option('', 'cpu keeps the EMA off the GPU (default: the device)',
                             choices=['cpu'])
    compile: bool = option(False, 'torch.compile the networks: faster after some minutes')

    def __post_init__(self):
        self.kappa = tuple(self.kappa) * (3 if len(self.kappa) == 1 else 1)


@dataclass
class SampleConfig:
    texts: tuple = option((), 'prompts, in quotes', group='images', positional=True)
    prompts: str = option('', 'text file with more prompts, one per line', metavar='FILE')
    seeds: str = option('', 'such as 0-7,42: every prompt with each seed (default: prompt i with '
                        'seed i)', metavar='LIST')
    out: str = option('', 'image folder, new or to be completed (default: the next samples/NNN)',
                      metavar='FOLDER')

    generator: str = option('', 'run folder, generator folder or exported file (default: the '
                            'newest in runs/)', group='generator', metavar='PATH')
    steps: int = option(0, 'steps of the generator (default: those it was trained for)',
                        choices=[1, 2, 4])
    teacher: str = option('', 'checkpoint with VAE and text encoder (default: the generator\'s '
                          'teacher)', metavar='PATH')
    teacher_steps: int = option(0, 'sample from the teacher instead, with this many DDIM steps')
    kappa: float = option(1.5, 'guidance of the teacher, for --teacher-steps')

    device: str = DEVICE
    batch: int = option(8, 'images at a time')
    precision: str = option('fp32', 'of weights and arithmetic', choices=[*DTYPES])


@dataclass
class ExportConfig:
    generator: str = option('', 'run folder, generator folder or exported file', positional=True)
    target: str = option('', 'for web UIs a name that ends in .safetensors, for diffusers a folder',
                         positional=True)
    teacher: str = option('', 'checkpoint with VAE and text encoder (default: the generator\'s '
                          'teacher)', metavar='PATH')
    precision: str = option('', 'of the weights (default: fp16 in a file, fp32 in a folder)',
                            choices=['fp32', 'fp16'])


# -------------------------------------------------------------------------------------------------
# The method

# The noise schedule, (1000,) float32, computed in float64: a_t^2 is the cumulative product of
# 1 - beta (CompVis util.py 21-25).
A2 = torch.tensor(np.cumprod(1 - unet.BETAS))
ALPHA, SIGMA = A2.sqrt().float(), (1 - A2).sqrt().float()


@functools.lru_cache
def schedule_on(device):
    """Return ALPHA and SIGMA on a device. Copied once, because a copy waits for all queued work."""
    return ALPHA.to(device), SIGMA.to(device)


def coefficients(t):
    """Return a_t and sigma_t at timesteps t (B,) or (), each (B, 1, 1, 1) or (1, 1, 1, 1)."""
    return (table[t].reshape(-1, 1, 1, 1) for table in schedule_on(t.device))


def add_noise(x0, eps, t):
    """Return x_t = a_t x_0 + sigma_t eps. All are (B, 4, H, W); t is (B,) or () int64."""
    a, sigma = coefficients(t)
    return a * x0 + sigma * eps


def predict_x0(eps_hat, x_t, t):
    """Return the x0-prediction (x_t - sigma_t eps_hat) / a_t. Latents are never clipped."""
    a, sigma = coefficients(t)
    return (x_t - sigma * eps_hat) / a


def guided(net, x_t, t, context, null, kappa):
    """Predict the noise in x_t (B, 4, H, W) with guidance: eps(null) + kappa (eps(c) - eps(null)).

    t is (B,), context (B, 77, D), null (1, 77, D); the result is float32. The network is called
    once, on the doubled batch [null, c]. kappa 1 needs only c, and kappa 0 only null, at half the
    cost."""
    null = null.expand_as(context)
    if kappa == 1 or kappa == 0:
        return net(x_t, t, context if kappa == 1 else null).float()
    doubled = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, context])).float()
    eps_null, eps_c = doubled.chunk(2)
    return eps_null + kappa * (eps_c - eps_null)


def generate(G, z, context, t_init=625, steps=1, noise=None):
    """Generate latents x_g (B, 4, H, W) from noise z of that shape.

    One step is the x0-prediction of G at timestep s = t_init for pure noise:
    (sigma_s z - sigma_s G(sigma_s z, s, c)) / a_s. Step i of several adds noise[i - 1], like z, at
    timestep int(t_init (1 - i / steps)) and denoises again (official sid_sd_util.py 186-204). A
    shorter list of noise stops early. Only the last step carries a gradient."""
    noise = [torch.randn_like(z) for _ in range(steps - 1)] if noise is None else noise
    x_g, with_gradient = torch.zeros_like(z), torch.is_grad_enabled()
    for i, new in enumerate([z, *noise]):
        t = torch.full((len(z),), int(t_init * (1 - i / steps)), device=z.device)
        x_t = add_noise(x_g, new, t)
        if i > 0:
            torch.clear_autocast_cache()        # of weights that were cast without gradient
        with torch.set_grad_enabled(with_gradient and i == len(noise)):
            x_g = predict_x0(G(x_t, t, context).float(), x_t, t)
    return x_g


def fake_score_loss(fake, x_g, t, eps, context, null, kappa):
    """Return sum((eps_hat - eps)^2) / B, where kappa_1 guides eps_hat.

    With kappa 1 this is ordinary diffusion training on generated latents x_g (B, 4, H, W). With
    others it fits the guided prediction, and both halves of the doubled batch get a gradient."""
    eps_hat = guided(fake, add_noise(x_g, eps, t), t, context, null, kappa)
    return (eps_hat - eps).square().sum() / len(x_g)


def generator_loss(x_g, x_phi, x_psi, alpha):
    """Return sum((x_phi - x_psi) (x_phi - x_g - alpha (x_phi - x_psi)) / w) / B.

    This is SiD's loss (arXiv 2404.04057) of guided predictions, all (B, 4, H, W). The gradient
    reaches G through x_g and, by way of both networks, through x_t. Only w carries no gradient: it
    is the mean of |x_g - x_phi| over a sample, at least 1e-5."""
    w = (x_g - x_phi).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return ((x_phi - x_psi) * (x_phi - x_g - alpha * (x_phi - x_psi)) / w).sum() / len(x_g)


def train(config):
    """Distil config.teacher into a generator. Networks, data, optimisers and files are in Run."""
    run = Run(config)
    teacher, G, ema, fake, null = run.teacher, run.G, run.ema, run.fake, run.null
    kappa1, kappa2, kappa4 = config.kappa
    # Guidance evaluates fake at the empty prompt, so fake must learn it: in the psi-step, a share
    # `drop` of the prompts is empty, for the generator as well.
    drop = config.drop if (kappa1, kappa2) != (1, 1) else 0.0
    share = config.micro_batch / config.batch       # micro-batches' losses add up to the batch's

    for iteration in range(run.first, run.iterations):
        # psi-step: the fake score network learns to denoise the generator's current images.
        fake.requires_grad_(True)
        for indices in run.micro_batches:
            context, z, noise, t, eps = run.draw(iteration, 'fake', indices, drop)
            with run.autocast():                    # its end frees G's weights in bf16
                x_g = generate(G, z, context, config.t_init, config.steps, noise)
                # This loss does not train the generator. detach() needs no graph of its own under
                # --compile, as no_grad would.
                x_g = x_g.detach()
            with run.autocast():
                loss_fake = fake_score_loss(fake, x_g, t, eps, context, null, kappa1) * share
            loss_fake.backward()
            run.log.add(loss_fake=loss_fake)
        run.update('fake')

        # theta-step: the generator learns to make images that teacher and fake denoise alike. Of
        # several steps it learns a random one per iteration, `noise` being as long as it needs.
        fake.requires_grad_(False)                  # its input gets a gradient, its weights do not
        for indices in run.micro_batches:
            context, z, noise, t, eps = run.draw(iteration, 'G', indices)
            with run.autocast():
                x_g = generate(G, z, context, config.t_init, config.steps, noise)
                x_t = add_noise(x_g, eps, t)        # not detached: gradients pass both networks
                x_psi = predict_x0(guided(fake, x_t, t, context, null, kappa2), x_t, t)
                x_phi = predict_x0(guided(teacher, x_t, t, context, null, kappa4), x_t, t)
                loss_G = generator_loss(x_g, x_phi, x_psi, config.alpha) * share
            loss_G.backward()
            run.log.add(loss_G=loss_G, xg_xphi=(x_g - x_phi).abs().mean() * share,
                        xphi_xpsi=(x_phi - x_psi).abs().mean() * share)
        run.update('G')

        # The EMA is what we sample from, evaluate and release.
        update_ema(ema, G, ema_beta(config, iteration * config.batch))
        if run.end_iteration(iteration):            # log, state, images, FID
            break
    run.close()


# -------------------------------------------------------------------------------------------------
# The rest of an iteration: optimiser, EMA, random numbers

class Adam:
    """torch.optim.Adam with betas (0, 0.999), bit-equal, without memory for the first moment.

    For beta_1 = 0 the first moment is the gradient itself. torch stores it: 3.4 GB per network."""

    def __init__(self, net, lr, eps):
        self.names, self.parameters = zip(*net.named_parameters())
        self.lr, self.eps = lr, eps
        self.squares = [torch.zeros_like(p) for p in self.parameters]       # second moments
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        gradients = [p.grad for p in self.parameters]
        # The gradients are also given as first moments, which Adam overwrites with the same values.
        adam(list(self.parameters), gradients, gradients, self.squares, [], self.steps, fused=True,
             amsgrad=False, beta1=0.0, beta2=0.999, lr=self.lr, weight_decay=0.0, eps=self.eps,
             maximize=False)


@torch.no_grad()
def update(optimizer, clip=math.inf):
    """Step the optimiser with the gradients of all processes, then clear them.

    As in the official code, NaN becomes 0, infinity becomes 1e5, and `clip` bounds each element.
    Returns the norm of all finite gradient tensors, and how many tensors have NaN."""
    gradients = [p.grad for p in optimizer.parameters]
    if TORCHRUN:
        for gradient in gradients:
            dist.all_reduce(gradient)
    norms = torch.stack(torch._foreach_norm(gradients))
    for gradient in gradients:
        torch.nan_to_num_(gradient, nan=0.0, posinf=1e5, neginf=-1e5)
        if clip < math.inf:
            gradient.clamp_(-clip, clip)
    optimizer.step()
    for p in optimizer.parameters:
        p.grad = None
    return norms.masked_fill(~norms.isfinite(), 0).norm(), norms.isnan().sum()


def ema_beta(config, seen):
    """Return the weight of the old EMA after `seen` images: half-life ema_kimg, after a ramp-up."""
    halflife = min(config.ema_kimg * 1000, config.ema_rampup * seen)
    return 0.5 ** (config.batch / max(halflife, 1e-8))


@torch.no_grad()
def update_ema(ema, G, beta):
    for average, parameter in zip(ema.parameters(), G.parameters()):
        average.lerp_(parameter.to(average.device), 1 - beta)


def to_device(x, device):
    """Copy x to the device without waiting for queued work, which needs pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def draw_samples(config, prompts, shape, iteration, half, indices, drop=0.0):
    """Draw B prompts, z (B, *shape), noise for more steps, t (B,) and eps (B, *shape).

    The random numbers of sample i depend only on (seed, iteration, half, i), not on micro-batches
    or devices; half is 'fake' or 'G', the network that learns. An epoch takes each prompt once, in
    a new order, half by half. A share `drop` of the prompts becomes ''.

    A generator of several steps learns one of them, uniformly drawn, per iteration: step n needs a
    list of n - 1 more noises (arXiv 2505.12674)."""
    number = ('fake', 'G').index(half)
    n = 1 + int(np.random.default_rng((config.seed, iteration)).integers(config.steps))
    texts, timesteps, noise = [], [], []
    for i in indices.tolist():
        rng = np.random.default_rng((config.seed, iteration, number, i))
        epoch, position = divmod((2 * iteration + number) * config.batch + i, len(prompts))
        text = prompts[epoch_order(config.seed, epoch, len(prompts))[position]]
        texts.append('' if rng.random() < drop else text)
        timesteps.append(int(rng.integers(config.t_min, config.t_max)))
        noise.append(rng.standard_normal((n + 1, *shape), dtype=np.float32))
    z, eps, *more = torch.from_numpy(np.stack(noise, axis=1)).unbind()
    return texts, z, more, torch.tensor(timesteps), eps


# -------------------------------------------------------------------------------------------------
# A run: its log, its state, its images. Nothing below is the method.

class Log:
    """One row of log.jsonl per iteration, and a status line every five seconds.

    Numbers stay on the device until a status line is due, so that no iteration waits for them."""

    def __init__(self, file, config):
        self.file, self.config = file, config
        self.row, self.waiting, self.nan_rows = {}, [], 0
        self.start, self.earlier = 0, 0.0       # images and seconds before this process
        self.began = self.printed = time.time()

    def seconds(self):
        return self.earlier + time.time() - self.began

    def add(self, **values):
        """Add to the numbers of this iteration, which sum over micro-batches and processes."""
        for name, value in values.items():
            self.row[name] = self.row.get(name, 0) + value.detach()

    def end(self, seen, now):
        """End an iteration after `seen` images. `now` writes at once, not after five seconds."""
        if TORCHRUN:
            for name in self.row:
                if 'grad' not in name:          # gradients are sums over all processes already
                    dist.all_reduce(self.row[name])
        if RANK == 0:
            self.waiting.append(dict(images=seen, seconds=self.seconds(), **self.row))
            if now or time.time() - self.printed > 5:
                rows = [{name: value if name == 'images' else float(f'{float(value):.6g}')
                         for name, value in row.items()} for row in self.waiting]
                self.waiting = []
                self.write(*rows)
                self.show(seen, rows)
                self.stop_at_nan(rows)
        self.row = {}

    def stop_at_nan(self, rows):
        for row in rows:
            self.nan_rows = self.nan_rows + 1 if row['nan_grads'] else 0
            check(self.nan_rows < 10, 'gradients were NaN for 10 iterations, so the run stopped; '
                                      'start a new one with smaller --lr and --fake-lr')

    def write(self, *rows):
        """Append rows to log.jsonl. NaN is not JSON and becomes null."""
        lines = [json.dumps({name: value if math.isfinite(value) else None
                             for name, value in row.items()}) + '\n' for row in rows]
        try:
            with open(self.file, 'a', encoding='utf-8') as file:
                file.writelines(lines)
        except OSError as error:        # a full disk may leave room for the state
            say(f'warning: {self.file} could not be written ({error})')

    def show(self, seen, rows):
        self.printed = time.time()
        pace = (self.printed - self.began) / (seen - self.start)
        left = timedelta(seconds=int(pace * max(self.config.kimg * 1000 - seen, 0)))
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        nan = sum(row['nan_grads'] for row in rows)
        say(f'{seen:8d} images  {pace * 1000:6.1f} s per 1,000  {left} left  '
            f'loss fake {mean["loss_fake"]:7.1f} G {mean["loss_G"]:7.1f}  '
            f'|xg-xphi| {mean["xg_xphi"]:.3f} |xphi-xpsi| {mean["xphi_xpsi"]:.3f}  '
            f'grad fake {mean["grad_fake"]:6.1f} G {mean["grad_G"]:6.1f}'
            + (f'  {nan:.0f} gradients NaN' if nan else ''))

    def resume(self, seen, seconds):
        """Continue the log of a run that has a state after `seen` images; drop all later rows."""
        self.start, self.earlier = seen, seconds
        if RANK == 0 and self.file.is_file():
            kept = []
            for line in self.file.read_text(encoding='utf-8', errors='replace').splitlines():
                with contextlib.suppress(ValueError):       # a crash may have cut off a line
                    if json.loads(line)['images'] <= seen:
                        kept.append(line + '\n')
            new = self.file.with_suffix('.tmp')
            new.write_text(''.join(kept), encoding='utf-8')
            new.replace(self.file)


class Run:
    """The networks, optimisers, prompts and folder of a run. With torchrun each process has a Run.

    The first process writes config.json, log.jsonl, state/, generator/ and grid_*.png there."""

    def __init__(self, config):
        # First what a user can get wrong, before a weight is read.
        check_settings(config)
        settings = stored(config)       # --micro-batch as given: more GPUs may resume the run
        self.config, self.device = config, choose_device(config.device)
        config.micro_batch = config.micro_batch or config.batch // WORLD
        self.prompts = clip_text.read_prompts(config.prompts or prompts_of(config.teacher))
        self.stats = fid.load_stats(config.fid_stats) if config.fid_stats else None
        self.captions = self.prompts
        if config.fid_prompts:
            self.captions = clip_text.read_prompts(config.fid_prompts)
        if TORCHRUN:
            dist.init_process_group('cpu:gloo,cuda:nccl' if self.device.type == 'cuda' else 'gloo',
                                    timeout=timedelta(hours=2))     # while the first one saves
        self.out = Path(config.resume or config.out)
        if RANK == 0:
            self.out = new_folder(config.resume or config.out, 'runs')
            check(config.resume or not (self.out / 'config.json').exists(),
                  f'{self.out} already holds a run; give another --out, or --resume {self.out}')

        # Then the networks.
        if self.stats:
            weights = config.fid_weights or fid.default_weights()
            self.inception = fid.load_inception(weights).to(self.device)
            if self.stats['weights_sha256'] not in ('', self.inception.sha256):
                fid.warn(f'{config.fid_stats} comes from other Inception weights than {weights}')
        self.teacher = place(unet.load(config.teacher), self.device)
        self.vae = place(vae_module.load(config.teacher), self.device)
        self.encoder = PromptEncoder(config.teacher, config.tokenizer, self.teacher, self.device)
        self.fingerprints = dict(
            teacher=fingerprint(self.encoder.tokenizer, self.teacher, self.vae, self.encoder.net),
            prompts=hashlib.sha256('\n'.join(self.prompts).encode()).hexdigest())
        self.null = self.encode([''])
        self.shape = latent_shape(config.size, self.teacher, self.vae)
        self.G, self.ema, self.fake = (copy.deepcopy(self.teacher) for _ in range(3))
        self.G.requires_grad_(True)     # teacher and ema stay frozen, train() switches fake
        self.ema.to(config.ema_device or self.device)
        if config.precision == 'bf16':
            # Its weights never change, so they need no fp32. Autocast keeps norms in fp32.
            for module in self.teacher.modules():
                if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                    module.to(torch.bfloat16)
        for net in (self.teacher, self.G, self.fake):
            if config.recompute:
                recompute_in_backward(net)
            if config.compile:
                net.compile(dynamic=False, fullgraph=True)
        eps = 1e-6 if config.precision == 'fp16' else 1e-8      # as the official code has it
        self.optimizers = dict(G=Adam(self.G, config.lr, eps),
                               fake=Adam(self.fake, config.fake_lr, eps))
        self.micro_batches = torch.arange(config.batch)[RANK::WORLD].split(config.micro_batch)
        self.iterations = math.ceil(round(config.kimg * 1000, 6) / config.batch)

        torch.backends.cudnn.benchmark = True   # shapes are fixed, so the fastest kernels pay off

        # Last the state, if there is one.
        self.first, self.signal = 0, 0
        self.log = Log(self.out / 'log.jsonl', config)
        if config.resume:
            self.load_state()
        seen = self.first * config.batch
        if RANK == 0:
            unet.write_json(self.out / 'config.json', settings)
            say(f'Distilling {config.teacher} into {self.out} on {self.device} in '
                f'{config.precision}: kappa {config.kappa}, {len(self.prompts)} prompts, images '
                f'{seen} to {self.iterations * config.batch}')
            warn_of_long_prompts(self.prompts[:1000], self.encoder.tokenizer)
            self.save_images(seen)              # the start, or those that an interruption left out
        self.handlers = {}
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'):
            number = getattr(signal, name, None)        # Windows has only the first two
            if number and signal.getsignal(number) != signal.SIG_IGN:       # nohup ignores SIGHUP
                self.handlers[number] = signal.signal(number, self.ask_to_stop)
        self.log.earlier = self.log.seconds()
        self.log.began = self.log.printed = time.time()     # the pace is that of iterations alone

    def autocast(self):
        return torch.autocast(self.device.type, DTYPES[self.config.precision],
                              enabled=self.config.precision != 'fp32')

    def encode(self, prompts):
        with self.autocast():
            return self.encoder(prompts)

    def draw(self, iteration, half, indices, drop=0.0):
        """Draw context, z, noise (a list), t and eps of a micro-batch, on the device."""
        texts, z, noise, t, eps = draw_samples(
            self.config, self.prompts, self.shape, iteration, half, indices, drop)
        z, t, eps, *noise = (to_device(x, self.device) for x in (z, t, eps, *noise))
        return self.encode(texts), z, noise, t, eps

    def update(self, name):
        """Step the optimiser of 'G' or 'fake'."""
        # The losses are sums, so that fp16 needs no loss scaling. As in the official code, G's
        # gradient is clipped in fp16.
        clip = 1.0 if name == 'G' and self.config.precision == 'fp16' else math.inf
        norm, nan = update(self.optimizers[name], clip)
        self.log.add(**{f'grad_{name}': norm, 'nan_grads': nan})

    def ask_to_stop(self, number, frame):
        """Handle a signal: finish the iteration, save a state, stop. Later signals do nothing."""
        self.signal = self.signal or number

    def stopping(self):
        """Return whether a signal came to any process. They all stop after the same iteration."""
        number = torch.tensor(self.signal)
        if TORCHRUN:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.signal = number.item()
        return self.signal > 0

    def end_iteration(self, iteration):
        """Write log, state, images and FID as they are due. Return whether the run must stop."""
        seen, last = (iteration + 1) * self.config.batch, iteration == self.iterations - 1

        def due(kimg):                          # whether this iteration passed a multiple of kimg
            return last or seen // (kimg * 1000) > (seen - self.config.batch) // (kimg * 1000)
        stop, save = self.stopping(), due(self.config.save_kimg)
        self.log.end(seen, now=save or stop)
        if RANK == 0 and (save or stop):
            self.save_state(seen)               # before anything else can fail
        if RANK == 0 and save:
            self.save_images(seen)
        if self.stats and due(self.config.fid_kimg) and not stop:
            self.score(seen)
        return stop

    def state(self):
        """Return {file: {name: tensor}} of everything that training changes."""
        nets = dict(G=self.G, ema=self.ema, fake=self.fake)
        state = {name: dict(net.named_parameters()) for name, net in nets.items()}
        for name, optimizer in self.optimizers.items():
            state[f'adam_{name}'] = dict(zip(optimizer.names, optimizer.squares))
        return state

    def save_state(self, seen):
        """Write the folder state/IMAGES, whole or not at all, and keep the two newest ones.

        It gets its name when its files are on the disk, so a kill at any moment does no harm."""
        states = self.out / 'state'
        new = states / 'unfinished'
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name, tensors in self.state().items():      # one network at a time: 3.4 GB for SD 1.5
            unet.write_tensors(tensors, new / f'{name}.safetensors')
        unet.write_json(new / 'state.json', dict(
            images=seen, seconds=self.log.seconds(), **self.fingerprints))
        new.rename(states / f'{seen:09d}')
        for old in sorted(states.glob('[0-9]*'))[:-2]:
            shutil.rmtree(old)

    @torch.no_grad()
    def load_state(self):
        """Resume from the newest state, if there is one."""
        states = sorted((self.out / 'state').glob('[0-9]*'))
        if not states:
            self.log.resume(0, 0.0)
            return
        folder = states[-1]
        try:
            saved = unet.read_json(folder / 'state.json')
            loaded = {name: unet.read_tensors(folder / f'{name}.safetensors')
                      for name in self.state()}
        except (UserError, OSError) as error:
            raise UserError(f'{folder} is damaged ({error}); remove it to resume from the state '
                            'before it') from None
        for name, value in self.fingerprints.items():
            check(saved.get(name) == value, f'{folder} was made with different {name}; give '
                                            f'--{name} as before, or start a new run')
        for name, tensors in self.state().items():
            for key, tensor in tensors.items():
                tensor.copy_(loaded[name][key])
        self.first = saved['images'] // self.config.batch
        for optimizer in self.optimizers.values():
            for step in optimizer.steps:
                step.fill_(self.first)
        self.log.resume(saved['images'], saved['seconds'])

    def sample(self, prompts, seeds):
        """Sample uint8 images (B, H, W, 3) from the EMA."""
        def sampler(z, noise, context):
            with self.autocast():
                return generate(self.ema, z, context, self.config.t_init, self.config.steps, noise)
        self.ema.to(self.device)
        return sample_images(sampler, self.vae, self.encode(prompts), seeds, self.shape,
                             self.config.steps)

    @torch.no_grad()
    def save_images(self, seen):
        """Save the EMA as generator/, for diffusers, and a grid of 16 fixed prompts and seeds.

        After an interruption this completes what is missing."""
        grid = self.out / f'grid_{seen:09d}.png'
        if grid.exists():
            return
        if seen:
            unet.save(self.ema, self.out / 'generator' / 'unet')
            settings = {name: value for name, value in asdict(self.config).items()
                        if name not in FREE}
            run = hashlib.sha256(json.dumps([settings, self.fingerprints]).encode()).hexdigest()
            unet.write_json(self.out / 'generator' / 'generator.json', dict(
                teacher=relative(self.config.teacher), tokenizer=relative(self.config.tokenizer),
                t_init=self.config.t_init, steps=self.config.steps,
                size=self.shape[1] * self.vae.factor, images=seen, run=run))
        prompts = self.prompts[::max(1, len(self.prompts) // 16)][:16]
        images = [self.sample([prompt], [i])[0] for i, prompt in enumerate(prompts)]
        self.ema.to(self.config.ema_device or self.device)
        save_png(make_grid(images, prompts, columns=4), grid)

    @torch.no_grad()
    def score(self, seen):
        """Compute the FID of the EMA, with images from all processes, and log it."""
        began, moments = time.time(), fid.Moments()
        batch = min(self.config.micro_batch, 16)        # decoding needs more memory than training
        for indices in torch.arange(self.config.fid_num)[RANK::WORLD].split(batch):
            seeds = indices.tolist()
            images = self.sample([self.captions[i % len(self.captions)] for i in seeds], seeds)
            moments.add(fid.features(self.inception, images, self.stats['preset'] or 'clean'))
            if self.signal:                     # the time before a kill is for the state
                break
        self.ema.to(self.config.ema_device or self.device)
        if TORCHRUN:
            sums = [torch.as_tensor(x, dtype=torch.float64)
                    for x in (moments.n, moments.sum, moments.product)]
            for x in sums:
                dist.all_reduce(x)
            moments.n, moments.sum, moments.product = int(sums[0]), sums[1].numpy(), sums[2].numpy()
        if RANK == 0 and moments.n == self.config.fid_num:
            value = fid.frechet_distance(
                moments.mu, moments.sigma, self.stats['mu'], self.stats['sigma'])
            say(f'{seen:8d} images  FID {value:.4f} of {moments.n} generated images')
            self.log.write(dict(images=seen, seconds=self.log.seconds(), fid=value,
                                fid_seconds=time.time() - began))

    def close(self):
        """Say how the run ended. Exit with 128 + the number of a signal that stopped it."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if TORCHRUN:
            dist.destroy_process_group()
        if self.signal:
            if RANK == 0:
                say('Interrupted. The state is saved; resume with\n'
                    f'    python sid_lsg.py train --resume {self.out}')
            sys.exit(128 + self.signal)
        if RANK == 0:
            say(f'The generator is in {self.out}/generator. Compare the first and last of '
                f'{self.out}/grid_*.png, then try\n'
                f'    python sid_lsg.py sample --generator {self.out} "{self.prompts[0]}"')


def fingerprint(tokenizer, *nets):
    """Return a SHA-256 of a tokenizer and of one column of every weight of fp32 networks."""
    weights = [w for net in nets for w in net.state_dict().values()]
    columns = [w.flatten(1)[:, 0] if w.ndim > 1 else w for w in weights]
    added = [token.content for token in tokenizer.added]
    words = json.dumps([tokenizer.vocab, tokenizer.merges, added], sort_keys=True)
    return hashlib.sha256(torch.cat(columns).cpu().numpy().tobytes() + words.encode()).hexdigest()


def recompute_in_backward(net):
    """Keep only the inputs of large blocks for the backward pass, which runs them again.

    This changes the modules, so it comes after all copies were made."""
    for module in net.modules():
        if isinstance(module, (unet.ResnetBlock, unet.SpatialTransformer)):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


# -------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def sample(config):
    """Sample an image for every prompt and seed into a folder, and print the paths.

    Images that are there already are kept. The processes of torchrun share the rest."""
    # First what a user can get wrong, before a weight is read.
    texts = list(config.texts)
    if config.prompts:
        texts += clip_text.read_prompts(config.prompts)
    check(texts, 'sample needs a prompt, in quotes, or --prompts FILE')
    check(all(text.encode(errors='replace').decode() == text for text in texts),
          'prompts must be UTF-8; set the terminal to it')
    check(config.batch > 0, f'--batch must be above 0, found {config.batch}')
    check(config.out or not TORCHRUN, 'torchrun needs --out, one folder for all processes')
    seeds = parse_seeds(config.seeds) if config.seeds else None
    jobs = [(text, seed) for i, text in enumerate(texts) for seed in (seeds or [i])]
    device, dtype = choose_device(config.device), DTYPES[config.precision]
    if config.teacher_steps:
        check(0 < config.teacher_steps <= 500 and not config.generator and not config.steps,
              '--teacher-steps must be 1 to 500, without --generator and --steps')
        check(math.isfinite(config.kappa), f'--kappa must be finite, found {config.kappa}')
        path = config.teacher or str(TINY_TEACHER)
        info = dict(teacher=path, teacher_steps=config.teacher_steps, kappa=config.kappa,
                    source=relative(path))      # so that images of two teachers never mix
    else:
        path, info = find_generator(config.generator, config.teacher)
        info['steps'] = config.steps or info.get('steps', 1)
    teacher, tokenizer = info.pop('teacher'), info.pop('tokenizer', '')
    out = new_folder(config.out, 'samples')
    todo = open_samples(out, jobs, dict(info, precision=config.precision))

    # Then the networks.
    net = place(unet.load(path, dtype), device)
    vae = place(vae_module.load(teacher, dtype), device)
    encode = PromptEncoder(teacher, tokenizer, net, device, dtype)
    shape, null = latent_shape(info.get('size', 0), net, vae), encode([''])
    warn_of_long_prompts(texts, encode.tokenizer)

    def sampler(z, noise, context):
        if config.teacher_steps:
            return ddim(net, z, context, null, config.kappa, config.teacher_steps)
        return generate(net, z, context, info['t_init'], info['steps'], noise)

    # Last the images. Threads write them while the next batch is computed.
    began = printed = time.time()
    with ThreadPoolExecutor() as pool:
        saving = []
        for start in range(0, len(todo), config.batch):
            indices = todo[start:start + config.batch]
            batch = [jobs[i] for i in indices]
            images = sample_images(sampler, vae, encode([text for text, _ in batch]),
                                   [seed for _, seed in batch], shape, info.get('steps', 1))
            saving += [pool.submit(save_png, image, out / f'{i:06d}.png', prompt=text, seed=seed)
                       for i, image, (text, seed) in zip(indices, images, batch)]
            while len(saving) > 2 * config.batch:           # two batches wait for the threads
                print(saving.pop(0).result(), flush=True)
            if time.time() - printed > 5:
                printed, done = time.time(), start + len(indices)
                pace = (printed - began) / done
                left = timedelta(seconds=int(pace * (len(todo) - done)))
                say(f'{done} of {len(todo)} images, {1 / pace:.1f} per second, {left} left',
                    sys.stderr)
        for path in saving:
            print(path.result(), flush=True)
    if not TORCHRUN:
        first = jobs[:64]
        images = [np.asarray(Image.open(out / f'{i:06d}.png')) for i in range(len(first))]
        labels = [f'{text} [{seed}]' for text, seed in first]
        columns = min(8, len(seeds or first))
        print(save_png(make_grid(images, labels, columns), out / 'grid.png'))


def open_samples(out, jobs, info):
    """Return the indices of jobs, (prompt, seed) each, that have no image in the folder yet.

    sample.json says how the folder's images were made; others are refused."""
    file, jobs = out / 'sample.json', [list(job) for job in jobs]
    if file.exists():
        saved = unet.read_json(file)
        known = saved.pop('jobs')
        other = sorted(key for key in {*saved, *info} if saved.get(key) != info.get(key))
        check(not other, f'{out} holds images that were made with another {", ".join(other)}: '
                         f'{[saved.get(key) for key in other]}; give another --out')
        same = min(len(known), len(jobs))
        check(known[:same] == jobs[:same], f'{out} holds images of other prompts or seeds; give '
                                           'another --out')
        if len(known) > len(jobs):
            say(f'{out} holds {len(known)} images, more than the {len(jobs)} asked for', sys.stderr)
    else:
        check(not any(out.glob('[0-9]*.png')), f'{out} holds images but no sample.json; give '
                                               'another --out')
        known = []
    if RANK == 0:
        unet.write_json(file, dict(info, jobs=max(known, jobs, key=len)))
    own = range(RANK, len(jobs), WORLD)     # first, because other processes may be ahead by images
    todo = [i for i in own if not (out / f'{i:06d}.png').exists()]
    if len(todo) < len(own):
        say(f'{len(own) - len(todo)} of {len(own)} images are there already', sys.stderr)
    return todo


def sample_images(sampler, vae, context, seeds, shape, steps=1):
    """Sample uint8 images (B, H, W, 3): decode the latents of sampler(z, noise, context).

    z and noise, a list of steps - 1 tensors, come from the CPU and seeds[i], so that image i does
    not depend on batch and device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z, *noise = (to_device(torch.stack([torch.randn(shape, generator=g) for g in generators]),
                           context.device) for _ in range(steps))
    return to_uint8(vae.decode(sampler(z, noise, context)))


def to_uint8(images):
    """Convert (B, 3, H, W), about [-1, 1], to numpy uint8 (B, H, W, 3): x 127.5 + 128, clipped.

    As in the official generate_onestep.py 300."""
    images = (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def ddim(net, z, context, null, kappa, steps):
    """Sample latents (B, 4, H, W) from the teacher with deterministic DDIM (arXiv 2010.02502).

    The timesteps are those of diffusers for SD: 1 + i (1000 // steps). The last step ends at 0."""
    stride, x = 1000 // steps, z
    for i in reversed(range(steps)):
        t = torch.full((len(z),), 1 + i * stride, device=z.device)
        eps_hat = guided(net, x, t, context, null, kappa)
        x = add_noise(predict_x0(eps_hat, x, t), eps_hat, (t - stride).clamp(min=0))
    return x


def parse_seeds(text):
    """'0-7,42' -> [0, 1, ... 7, 42]"""
    seeds = []
    for part in text.split(','):
        first, dash, last = part.strip().partition('-')
        last = last if dash else first
        check(first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 2 ** 63
              and int(last) - int(first) < 10 ** 6,
              f'--seeds must be numbers and ranges such as 0-7,42, found {text}')
        seeds += range(int(first), int(last) + 1)
    return seeds


def save_png(image, file, **text):
    """Write an array or Image as PNG, with `text` in it, whole or not at all. Return its path."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    new = Path(f'{file}.tmp')
    # Compression at the default level would take longer than sampling the image on a GPU.
    image.save(new, format='PNG', pnginfo=info, compress_level=1)
    return new.replace(file)


def make_grid(images, labels, columns):
    """Put images (H, W, 3) uint8 into one Image, each above its label; small ones are enlarged."""
    height, font = len(images[0]), ImageFont.load_default(11)
    cell = height * math.ceil(128 / height)
    texts = [textwrap.wrap(label, cell // 6, max_lines=4, placeholder=' ...') for label in labels]
    wide, high = cell + 8, cell + 8 + 13 * max(len(lines) for lines in texts)
    rows = math.ceil(len(images) / columns)
    grid = Image.new('RGB', (columns * wide + 8, rows * high + 8), 'white')
    pen = ImageDraw.Draw(grid)
    for i, (image, lines) in enumerate(zip(images, texts)):
        x, y = 8 + i % columns * wide, 8 + i // columns * high
        grid.paste(Image.fromarray(image).resize((cell, cell), Image.NEAREST), (x, y))
        pen.multiline_text((x, y + cell), '\n'.join(lines), 'black', font, spacing=2)
    return grid


# -------------------------------------------------------------------------------------------------
# Generators for other programs

def find_generator(path, teacher=''):
    """Return where a generator's weights are, and the dict of its generator.json.

    path is a run folder, generator folder or exported file; '' is the newest in runs/."""
    if not path:
        newest = sorted(Path('runs').glob('*/generator'), key=lambda folder: folder.stat().st_mtime)
        check(newest, 'runs/ holds no generator yet; run `python sid_lsg.py train` first, or give '
                      '--generator, or --teacher-steps 25 to sample from the teacher')
        path = newest[-1]
    root = unet.locate(path)
    if root.is_file():
        unet.read_tensors(root)                         # says what is wrong with other files
        with safe_open(root, 'pt') as file:             # export() writes generator.json there
            info = json.loads((file.metadata() or {}).get('generator', '{}'))
    else:
        folders = [folder for folder in (root / 'generator', root, root.parent)
                   if (folder / 'generator.json').is_file()]
        check(folders, f'{path} holds no generator.json; give the folder of a generator, or of a '
                       'run that has saved one (it does so every --save-kimg)')
        root = folders[0]
        info = unet.read_json(root / 'generator.json')
    check(info.get('t_init') in range(1000),
          f'{path} must name t_init, 0 to 999, found {info.get("t_init")}; give a generator')
    if root.is_file() or (root / 'vae').is_dir():
        info['teacher'] = str(root)                     # exported together with the generator
    check(teacher or info.get('teacher'), f'{path} does not name its teacher; give --teacher, the '
                                          'checkpoint that has its VAE and text encoder')
    info['teacher'] = teacher or absolute(info['teacher'])
    info['tokenizer'] = absolute(info.get('tokenizer', ''))
    return root, info


def export(config):
    """Write a generator with its teacher's VAE and text encoder: a diffusers folder or a file."""
    target = Path(config.target)
    check(not target.exists(), f'{target} exists already; give another name')
    path, info = find_generator(config.generator, config.teacher)
    teacher = info.pop('teacher')
    tokenizer = info.pop('tokenizer') or teacher
    single = target.suffix == '.safetensors'
    dtype = DTYPES[config.precision or ('fp16' if single else 'fp32')]
    net, vae = unet.load(path, dtype), vae_module.load(teacher, dtype)
    new = target.with_name(target.name + '.tmp')
    shutil.rmtree(new, ignore_errors=True)              # of an export that was interrupted
    new.parent.mkdir(parents=True, exist_ok=True)
    if single:
        text = clip_text.load(teacher, dtype)
        tensors = {**unet.original(net), **vae_module.original(vae), **clip_text.original(text)}
        unet.write_tensors(tensors, new, generator=json.dumps(info))
    else:
        encode = PromptEncoder(teacher, tokenizer, net, torch.device('cpu'), dtype)
        unet.save(net, new / 'unet', dtype)
        vae_module.save(vae, new / 'vae', dtype)
        clip_text.save(encode.net, new / 'text_encoder', dtype, len(encode.tokenizer.added))
        shutil.copytree(clip_text.tokenizer_folder(tokenizer), new / 'tokenizer')
        unet.save_pipeline(new, 'LCM' if info.get('steps', 1) > 1 else 'DDPM')
        unet.write_json(new / 'generator.json', info)
    new.replace(target)
    print(target)


# -------------------------------------------------------------------------------------------------
# Opening and checking

def choose_device(name):
    """Return the torch.device of that name; '' is CUDA if available, one GPU per process."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    if name == 'cuda' and TORCHRUN:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    check(name.startswith(('cuda', 'cpu')), f'--device {name} is not supported; give cuda or cpu')
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'torch cannot use --device {name} ({str(error).splitlines()[0]}); give '
                        'another device, or install a torch for it') from None
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    # fp32 means fp32: official sid_training_loop.py 241-242. torch would use TF32 in convolutions.
    torch.backends.cudnn.allow_tf32 = False
    return device


def place(net, device):
    """Move a network to the device and freeze it."""
    return net.requires_grad_(False).to(device)


class PromptEncoder:
    """encode(list of B prompts) -> text embeddings (B, 77, D) on the device."""

    def __init__(self, path, tokenizer, net, device, dtype=torch.float32):
        self.tokenizer = clip_text.load_tokenizer(tokenizer or path)
        self.net, self.device = place(clip_text.load(path, dtype), device), device
        sizes, context_dim = self.net.sizes, net.sizes['context_dim']
        check(self.tokenizer.size == sizes['vocab'],
              f'the text encoder of {path} has {sizes["vocab"]} tokens, but its tokenizer has '
              f'{self.tokenizer.size}; give the tokenizer that was saved with it')
        check(sizes['width'] == context_dim,
              f'the text encoder of {path} makes {sizes["width"]} numbers per token, but the UNet '
              f'needs {context_dim}; give the --teacher that it was made from')

    @torch.no_grad()
    def __call__(self, prompts):
        return self.net(to_device(self.tokenizer(prompts), self.device))


def warn_of_long_prompts(prompts, tokenizer):
    """Say how many prompts do not fit into 77 tokens, and show the lost end of the first."""
    # A token has at least one byte, so most prompts need no closer look.
    long = [prompt for prompt in prompts if len(prompt.encode()) > clip_text.LENGTH - 2]
    cut = [end for end in map(tokenizer.cut, long) if end]
    if cut:
        say(f'warning: {len(cut)} prompts are longer than {clip_text.LENGTH} tokens and are cut; '
            f'the first loses "{textwrap.shorten(cut[0], 200)}"', sys.stderr)


def latent_shape(pixels, net, vae):
    """Return (4, h, w) of the latents of square images; 0 pixels mean the UNet's training size."""
    h = pixels // vae.factor if pixels else net.sample_size
    return 4, h, h


def new_folder(given, parent):
    """Make and return the folder `given`, or the next free parent/NNN."""
    taken = [int(entry.name) for entry in Path(parent).glob('[0-9]*') if entry.name.isdecimal()]
    folder = Path(given or f'{parent}/{max(taken, default=-1) + 1:03d}')
    check(folder.is_dir() or not folder.exists(), f'{folder} is a file; give a folder')
    folder.mkdir(parents=True, exist_ok=bool(given))        # two runs never share a numbered folder
    return folder


def prompts_of(teacher):
    """Return the prompts.txt in a teacher's folder."""
    file = unet.locate(teacher) / 'prompts.txt'
    check(file.is_file(), f'{teacher} has no prompts.txt; give --prompts, a file with one per line')
    return file


def check_settings(config):
    """Raise UserError for settings of train that make no sense."""
    c = config
    check(not (c.out and c.resume), '--resume names the run folder; leave out --out')
    check(len(c.kappa) == 3, f'--kappa must be one number or three, found {len(c.kappa)}')
    numbers = {f.name: (getattr(c, f.name),) for f in fields(c) if f.type is float}
    for name, values in {**numbers, 'kappa': c.kappa}.items():
        check(all(type(x) in (int, float) and math.isfinite(x) for x in values),
              f'--{name.replace("_", "-")} must be finite, found {", ".join(map(str, values))}')
    micro_batch = c.micro_batch or max(c.batch // WORLD, 1)
    check(c.batch > 0 and micro_batch > 0 and c.batch % (micro_batch * WORLD) == 0,
          f'--batch {c.batch} must be a multiple of --micro-batch {micro_batch}, times the number '
          f'of processes, {WORLD}')
    check(0 <= c.t_min < c.t_max <= 1000 and 0 <= c.t_init < 1000,
          f'timesteps must be 0 to 999 and --t-min below --t-max, found --t-min {c.t_min} --t-max '
          f'{c.t_max} --t-init {c.t_init}')
    check(0 <= c.drop <= 1, f'--drop must be a share from 0 to 1, found {c.drop}')
    check(min(c.kimg, c.save_kimg, c.fid_kimg) > 0,
          '--kimg, --save-kimg and --fid-kimg must be above 0')
    check(min(c.lr, c.fake_lr, c.ema_kimg, c.ema_rampup, c.seed) >= 0,
          '--lr, --fake-lr, --ema-kimg, --ema-rampup and --seed must not be negative')
    check(c.size >= 0 and c.size % 8 == 0, f'--size must be a multiple of 8 pixels, found {c.size}')
    check(c.fid_num >= 2 * WORLD, f'--fid-num must be at least 2 per process, found {c.fid_num}')


def relative(path):
    """Return a path as files keep it: relative to the project if inside, otherwise absolute."""
    if not path or not Path(path).exists():             # a repo id
        return path
    path = Path(path).resolve()
    return path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) else str(path)


def absolute(path):
    """Return a path that relative() has made for use in any working directory."""
    return str(PROJECT / path) if path and (PROJECT / path).exists() else path


def say(text, stream=None):
    """Print progress. A closed terminal or a full disk must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, flush=True)


# -------------------------------------------------------------------------------------------------
# The command line

PATHS = ('teacher', 'tokenizer', 'prompts', 'fid_stats', 'fid_prompts', 'fid_weights')
# These may differ when a run is resumed, because the generator does not depend on them. Another
# teacher and other prompts are noticed by their fingerprints.
FREE = (*PATHS, 'out', 'resume', 'kimg', 'save_kimg', 'fid_kimg', 'fid_num', 'device',
        'micro_batch', 'recompute', 'ema_device', 'compile')


def train_config(**given):
    """Return a TrainConfig. A setting that is not given comes from the run to resume or from the
    teacher's folder, and otherwise from the paper."""
    check(given.get('resume') != '', '--resume needs the name of a run folder')
    run = Path(given['resume']) / 'config.json' if 'resume' in given else None
    if run and run.is_file():
        file = run
    else:
        file = unet.locate(given.get('teacher', TINY_TEACHER)) / 'sid_lsg.json'
    saved = unet.read_json(file) if file.is_file() else {}
    settings = {f.name: f for f in fields(TrainConfig)}
    for name, value in saved.items():
        check(name in settings, f'{file} has {name}, which is no setting of train; remove it')
        kind, choices = settings[name].type, settings[name].metadata.get('choices')
        value = tuple(value) if kind is tuple and isinstance(value, list) else value
        value = float(value) if kind is float and type(value) is int else value
        check(type(value) is kind, f'{file} has {name} {value!r}, which must be of type '
                                   f'{"list" if kind is tuple else kind.__name__}')
        check(not choices or value in (*choices, settings[name].default),
              f'{file} has {name} {value!r}, which must be one of {choices}')
        saved[name] = absolute(value) if name in PATHS else value
    config = TrainConfig(**{**saved, **given})
    if file == run:
        for name in sorted(set(given) - set(FREE)):
            check(getattr(config, name) == saved.get(name),
                  f'--{name.replace("_", "-")} cannot change when {given["resume"]} is resumed (it '
                  f'was {saved.get(name)}); leave it out, or start a new run')
    return config


def stored(config):
    """Return the settings of a run for its config.json."""
    return {name: relative(value) if name in PATHS else value
            for name, value in asdict(config).items() if name not in ('out', 'resume')}


COMMANDS = {
    'train': (train, train_config, TrainConfig, 'Distil a teacher into a one-step generator.'),
    'sample': (sample, SampleConfig, SampleConfig, 'Sample from a generator, or from its teacher.'),
    'export': (export, ExportConfig, ExportConfig, 'Write a generator for other programs.')}


def parse(arguments):
    """Return the command and {setting: value} of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for name, (_, _, config, purpose) in COMMANDS.items():
        group = command = commands.add_parser(name, help=purpose, description=purpose,
                                              argument_default=argparse.SUPPRESS)
        for f in fields(config):
            text, more = f.metadata['help'], {}
            if 'group' in f.metadata:
                group = command.add_argument_group(f.metadata['group'])
            if f.type in (int, float, tuple) and f.default != () and 'default' not in text:
                text += f' (default: {f.default[0] if f.type is tuple else f.default})'
            if f.type is bool:
                more = dict(action='store_true')
            elif f.type is tuple:
                more = dict(nargs='*' if f.name == 'texts' else '+', type=type((*f.default, '')[0]))
            else:
                more = dict(type=f.type, choices=f.metadata.get('choices'),
                            metavar=f.metadata.get('metavar'))
            flag = f.name if 'positional' in f.metadata else '--' + f.name.replace('_', '-')
            group.add_argument(flag, help=text, **more)
    given = vars(parser.parse_args(arguments))
    return given.pop('command'), given


def main(arguments=None):
    name, given = parse(arguments)
    command, make_config, _, _ = COMMANDS[name]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):       # closed, or not a terminal
            stream.reconfigure(errors='replace')        # not every terminal can show every prompt
    try:
        command(make_config(**given))
    except (UserError, OSError) as error:
        say(f'sid_lsg: {error}', sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and (
                'DefaultCPUAllocator' not in str(error)):
            raise
        say('sid_lsg: out of memory; use --precision bf16, then a smaller --micro-batch (sample: '
            '--batch), then --recompute, then --ema-device cpu', sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        say('sid_lsg: interrupted', sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
