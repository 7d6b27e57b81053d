"""SiD-LSG: distil Stable Diffusion 1.5, without data, into a generator that makes a picture in one step.

Zhou et al., "Long and Short Guidance in Score identity Distillation for One-Step Text-to-Image
Generation", arXiv 2406.01561 (the paper); the loss without guidance is Score identity Distillation,
arXiv 2404.04057 (SiD).

    python sid_lsg.py train                 # the tiny teacher of tests/tiny_sd, minutes on a laptop
    python sid_lsg.py train --teacher PATH --prompts FILE   # a Stable Diffusion 1.5, the paper's defaults
    python sid_lsg.py sample "a red star above a blue ring on a black background"
    python sid_lsg.py convert runs/000 student.safetensors  # for other programs

    paper            | here      | shape (SD 1.5, 512 px) | what it is
    -----------------|-----------|------------------------|-----------------------------------------------
    c                | context   | (B, 77, 768)           | text states of the prompts
                     | null      | (1, 77, 768)           | text states of ""
    z                | z         | (B, 4, 64, 64)         | standard normal seed of the generator
    G_theta          | G         |                        | generator, a UNet; `ema` is its moving average
    f_phi            | teacher   |                        | the pretrained UNet, frozen
    f_psi            | fake      |                        | fake score net: a UNet following G's pictures
    x_g = G(z, c)    | x_g       | (B, 4, 64, 64)         | latent made by the generator in one step
    t                | t         | (B,)                   | step of the diffusion, uniform in [20, 979]
    epsilon          | eps       | (B, 4, 64, 64)         | standard normal noise
    a_t, sigma_t     | ALPHA[t], SIGMA[t]                 | x_t = a_t x_g + sigma_t eps
    f_phi(x_t, c)    | x_phi     | (B, 4, 64, 64)         | x_g as the teacher would restore it from x_t
    f_psi(x_t, c)    | x_psi     | (B, 4, 64, 64)         | x_g as the fake score net would
    kappa_1          | kappa[0]  |                        | guidance of fake while it learns
    kappa_2, kappa_3 | kappa[1]  |                        | guidance of fake in the generator's loss
    kappa_4          | kappa[2]  |                        | guidance of teacher in the generator's loss
    alpha            | alpha     |                        | how far the loss corrects for psi's own error

Read train(), then the six functions right above it. All three nets start as copies of the teacher.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import pickle
import shutil
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import clip_text
import unet
import vae as vae_module

TINY_TEACHER = Path(__file__).resolve().parent / 'tests' / 'tiny_sd'

# ---------------------------------------------------------------------------------------------------
# Settings: each field is a command line option. For train, what is left out comes from sid_lsg.json in
# the teacher's folder if there is one, and else is the paper's, which stands here.

def option(default, help, **more):
    return field(default=default, metadata={'help': help, **more})


PRECISION = option('fp32', 'fp32, or autocast to bf16 or fp16 over fp32 weights',
                   choices=['fp32', 'bf16', 'fp16'])
TOKENIZER = option('', 'folder with vocab.json and merges.txt (default: the teacher\'s, or the local '
                   'Hugging Face cache\'s if the teacher is a single file)')
DEVICE = option('', 'cuda, cuda:1, cpu ... (default: cuda if there is one, else cpu)')


@dataclass
class TrainConfig:
    teacher: str = option(str(TINY_TEACHER), 'Stable Diffusion 1.5 to distil: folder in diffusers '
                          'layout, original .safetensors or .ckpt, or repo id in the local Hugging Face cache')
    tokenizer: str = TOKENIZER
    prompts: str = option('', 'text file, one prompt a line (default: prompts.txt in the teacher folder)')
    out: str = option('', 'run folder to make (default: the next free runs/NNN)')
    device: str = DEVICE
    precision: str = PRECISION
    seed: int = option(0, 'every random draw follows from it')
    size: int = option(0, 'side of the pictures in pixels (default: what the teacher was trained at)')

    kappa: tuple = option((1.5,), 'guidance: one number for all (LSG), or three: kappa1, kappa2 = '
                          'kappa3, kappa4. 1 is none, 1 1 K long, K 1 1 with K < 1 short, 0 0 1 Zero-CFG')
    alpha: float = option(1.0, 'alpha of the generator loss')
    t_init: int = option(625, 'step at which the generator works')
    t_min: int = option(20, 'smallest t of the losses')
    t_max: int = option(980, 'largest t of the losses, exclusive')
    drop: float = option(0.1, 'share of prompts made empty while fake learns, '
                         'if kappa1 or kappa2 is not 1')

    kimg: float = option(10_000.0, 'length of the run in thousand images')
    batch: int = option(512, 'images an iteration')
    micro_batch: int = option(0, 'images at a time, whose gradients add up to the batch\'s '
                              '(default: batch)')
    lr: float = option(1e-6, 'learning rate of the generator')
    fake_lr: float = option(1e-6, 'learning rate of the fake score net')
    ema_kimg: float = option(50.0, 'half-life of the generator\'s average in thousand images')

    grid_kimg: float = option(100.0, 'thousand images between picture grids, '
                              'with each of which the generator is saved')
    log_seconds: float = option(5.0, 'seconds between status lines')


@dataclass
class SampleConfig:
    texts: tuple = option((), 'prompts, in quotes')
    prompts: str = option('', 'text file, one prompt a line, after those on the command line')
    generator: str = option('', 'run folder or generator folder (default: the newest run in runs/)')
    teacher: str = option('', 'checkpoint whose VAE and text encoder to use '
                          '(default: the generator\'s teacher)')
    tokenizer: str = TOKENIZER
    seeds: str = option('', 'such as 0-7,42: every prompt with each of them '
                        '(default: prompt i with seed i)')
    steps: int = option(1, 'steps of the generator', choices=[1, 2, 4])
    teacher_steps: int = option(0, 'draw with the teacher itself instead, in so many DDIM steps')
    kappa: float = option(None, 'guidance of the teacher, with --teacher-steps (default: 1.5)')
    size: int = option(0, 'side of the pictures in pixels (default: what the generator was trained at)')
    batch: int = option(8, 'pictures at a time')
    out: str = option('', 'folder to make (default: the next free samples/NNN)')
    device: str = DEVICE
    precision: str = PRECISION


@dataclass
class ConvertConfig:
    source: str = option('', 'what to read: any checkpoint that train takes as teacher, a run or '
                         'generator folder, or an official SiD-LSG generator (.pkl)')
    target: str = option('', 'what to write: one original-style file if it ends in .safetensors, '
                         'else a folder in diffusers layout')
    teacher: str = option('', 'checkpoint whose VAE and text encoder go with a generator '
                          '(default: what it was distilled from)')
    tokenizer: str = TOKENIZER
    precision: str = option('fp16', 'of the weights written', choices=['fp32', 'fp16'])
    overwrite: bool = option(False, 'replace what is at the target')


# ---------------------------------------------------------------------------------------------------
# The method

def schedule():
    """a_t and sigma_t of Stable Diffusion 1.5, each (1000,): float64 inside, float32 out.

    betas = linspace(sqrt .00085, sqrt .012, 1000)^2 (CompVis util.py 21-25, v1-inference.yaml 5-6);
    1 - beta multiplied up is a_t^2."""
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    a2 = np.cumprod(1 - betas)
    return (torch.tensor(a2 ** 0.5, dtype=torch.float32),
            torch.tensor((1 - a2) ** 0.5, dtype=torch.float32))


ALPHA, SIGMA = schedule()


def at(table, t):
    """Entries (B, 1, 1, 1) or (1, 1, 1, 1) of ALPHA or SIGMA at steps t (B,) or ()."""
    return table.to(t.device)[t].reshape(-1, 1, 1, 1)


def add_noise(x0, eps, t):
    """x_t = a_t x_0 + sigma_t eps. All (B, 4, H, W); t (B,) or () int64."""
    return at(ALPHA, t) * x0 + at(SIGMA, t) * eps


def predict_x0(eps_hat, x_t, t):
    """The x_0 a noise prediction implies: (x_t - sigma_t eps_hat) / a_t. Latents are never clipped."""
    return (x_t - at(SIGMA, t) * eps_hat) / at(ALPHA, t)


def guided(net, x_t, t, context, null, kappa):
    """Noise eps(null) + kappa (eps(c) - eps(null)) at x_t (B, 4, H, W), float32.

    context (B, 77, D), null (1, 77, D). One call on the doubled batch [null, c]; kappa 1 is the
    conditional half alone, kappa 0 the unconditional one, each at half the cost. Where a prompt was
    dropped, c is null and guidance changes nothing."""
    null = null.expand_as(context)
    if kappa == 1 or kappa == 0:
        return net(x_t, t, context if kappa == 1 else null).float()
    both = net(torch.cat([x_t, x_t]), t.expand(len(x_t)).repeat(2), torch.cat([null, context]))
    eps_null, eps_c = both.float().chunk(2)
    return eps_null + kappa * (eps_c - eps_null)


def generate(G, z, context, t_init=625, steps=1, fresh=torch.randn_like):
    """x_g (B, 4, H, W) from z of that shape: in one step, G's x_0 at t_init of the pure noise sigma z.

    With more steps (the official code shows 2 and 4), step i noises the result to
    int(t_init (1 - i / steps)) with new noise, `fresh(z)`, and restores it again."""
    x_g = torch.zeros_like(z)
    for i in range(steps):
        t = torch.full((len(z),), int(t_init * (1 - i / steps)), device=z.device)
        x_t = add_noise(x_g, z if i == 0 else fresh(z), t)
        x_g = predict_x0(G(x_t, t, context).float(), x_t, t)
    return x_g


def nan_samples(*tensors):
    """(B, 1, 1, 1) bool: the samples with a NaN in any of the tensors, which a loss leaves out."""
    return torch.stack(
        [x.detach().isnan().flatten(1).any(1) for x in tensors]).any(0)[:, None, None, None]


def fake_score_loss(fake, x_g, t, eps, context, null, kappa):
    """Sum over pixels / B of |eps_hat - eps|^2; kappa_1 guides eps_hat, gradient through both halves.

    x_g (B, 4, H, W) carries no gradient: this is plain diffusion training on the generator's pictures."""
    eps_hat = guided(fake, add_noise(x_g, eps, t), t, context, null, kappa)
    error = (eps_hat - eps).masked_fill(nan_samples(eps_hat), 0)
    return error.square().sum() / len(x_g)


def generator_loss(x_g, x_phi, x_psi, alpha):
    """Sum over pixels / B of (x_phi - x_psi) ((x_phi - x_g) - alpha (x_phi - x_psi)) / w.

    All (B, 4, H, W), all with gradient: through x_t it flows into both nets and on to the generator,
    which is where SiD differs from DMD. Only the weight w = mean |x_g - x_phi|, per sample and at least
    1e-5, carries none."""
    leave_out = nan_samples(x_g, x_phi, x_psi)
    difference = (x_phi - x_psi).masked_fill(leave_out, 0)
    residual = (x_phi - x_g).masked_fill(leave_out, 0)
    w = residual.detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return (difference * (residual - alpha * difference) / w).sum() / len(x_g)


def train(config):
    """Distil config.teacher into a run folder (see open_run). The whole method is the loop below."""
    teacher, vae, encode, prompts, shape, out, device = open_run(config)
    G, ema, fake = (copy.deepcopy(teacher) for _ in range(3))
    G.requires_grad_(True)                      # teacher and ema stay frozen, fake half of each iteration
    adam_eps = 1e-6 if config.precision == 'fp16' else 1e-8
    opt_G = torch.optim.Adam(G.parameters(), config.lr, betas=(0.0, 0.999), eps=adam_eps, fused=True)
    opt_fake = torch.optim.Adam(
        fake.parameters(), config.fake_lr, betas=(0.0, 0.999), eps=adam_eps, fused=True)
    kappa1, kappa2, kappa4 = config.kappa
    drop = config.drop if (kappa1, kappa2) != (1, 1) else 0.0
    null = encode([''])
    draw = functools.partial(draw_samples, config, prompts, encode, shape, device)
    save_progress(config, ema, vae, encode, prompts, shape, out, seen=0)
    log = Log(config, out)

    iterations = math.ceil(config.kimg * 1000 / config.batch)
    for iteration in range(iterations):
        # psi-step: the fake score net learns to denoise what the generator makes at present.
        fake.requires_grad_(True)
        for rows in torch.arange(config.batch).split(config.micro_batch):
            share = len(rows) / config.batch
            context, z, t, eps = draw(iteration, 0, rows, drop)
            with autocast(config, device):
                with torch.no_grad():           # no gradient from this loss to the generator
                    x_g = generate(G, z, context, config.t_init)
                loss_fake = fake_score_loss(fake, x_g, t, eps, context, null, kappa1) * share
            loss_fake.backward()
            log.add(loss_fake=loss_fake)
        log.add(grad_fake=update(opt_fake))

        # theta-step: the generator moves to where fake and teacher restore its pictures alike.
        fake.requires_grad_(False)              # weights rest; gradients pass to its INPUT, as in teacher
        for rows in torch.arange(config.batch).split(config.micro_batch):
            share = len(rows) / config.batch
            context, z, t, eps = draw(iteration, 1, rows)
            with autocast(config, device):
                x_g = generate(G, z, context, config.t_init)
                x_t = add_noise(x_g, eps, t)    # not detached: the gradient reaches x_g through both nets
                x_psi = predict_x0(guided(fake, x_t, t, context, null, kappa2), x_t, t)
                x_phi = predict_x0(guided(teacher, x_t, t, context, null, kappa4), x_t, t)
                loss_G = generator_loss(x_g, x_phi, x_psi, config.alpha) * share
            loss_G.backward()
            log.add(loss_G=loss_G, xg_xphi=(x_g - x_phi).abs().mean() * share,
                    xphi_xpsi=(x_phi - x_psi).abs().mean() * share)
        log.add(grad_G=update(opt_G, clip=1.0 if config.precision == 'fp16' else math.inf))

        # The average is what is drawn with, scored and released.
        seen, last = (iteration + 1) * config.batch, iteration == iterations - 1
        update_average(ema, G, ema_beta(config, iteration * config.batch))
        log.status(seen, last)
        if last or crosses(config.grid_kimg * 1000, seen, config.batch):
            save_progress(config, ema, vae, encode, prompts, shape, out, seen)

    print(f'The generator is in {out}/generator, its pictures from first to last in {out}/grid_*.png. '
          f'Try it:\n    python sid_lsg.py sample --generator {out} "{prompts[0]}"')


# ---------------------------------------------------------------------------------------------------
# What train() calls besides the method

def autocast(config, device):
    dtype = {'fp32': torch.bfloat16, 'bf16': torch.bfloat16, 'fp16': torch.float16}[config.precision]
    return torch.autocast(device.type, dtype, enabled=config.precision != 'fp32')


def update(optimizer, clip=math.inf):
    """One optimizer step; returns the norm of the gradients as they came. Clears them.

    As in the official loop, NaN becomes 0 and infinity 1e5; `clip` bounds every element, at 1 in fp16."""
    parameters = optimizer.param_groups[0]['params']
    for p in parameters:
        torch.nan_to_num_(p.grad, nan=0.0, posinf=1e5, neginf=-1e5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip < math.inf:
        torch.nn.utils.clip_grad_value_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def ema_beta(config, seen):
    """Weight of the old average after `seen` images: half-life ema_kimg, at first a 20th of `seen`."""
    halflife = min(config.ema_kimg * 1000, seen * 0.05)
    return 0.5 ** (config.batch / max(halflife, 1e-8))


@torch.no_grad()
def update_average(ema, G, beta):
    for average, parameter in zip(ema.parameters(), G.parameters()):
        average.lerp_(parameter, 1 - beta)


def crosses(every, seen, batch):
    """Whether the last `batch` of the `seen` images crossed a multiple of `every`."""
    return seen // every > (seen - batch) // every


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def draw_samples(config, prompts, encode, shape, device, iteration, half, rows, drop=0.0):
    """context, z, t and eps for `rows` of the batch of one half (0 psi, 1 theta) of an iteration.

    All on the device, yet sample i depends on (seed, iteration, half, i) alone, neither on micro-batch
    nor device. Prompts come without replacement, each epoch in a new order; a share `drop` of them
    becomes ''."""
    texts, steps, noise = [], [], []
    for i in rows.tolist():
        rng = np.random.default_rng((config.seed, iteration, half, i))
        epoch, place = divmod((2 * iteration + half) * config.batch + i, len(prompts))
        text = prompts[epoch_order(config.seed, epoch, len(prompts))[place]]
        texts.append('' if rng.random() < drop else text)
        steps.append(int(rng.integers(config.t_min, config.t_max)))
        noise.append(rng.standard_normal((2, *shape), dtype=np.float32))
    z, eps = torch.from_numpy(np.stack(noise, axis=1)).to(device)
    return encode(texts), z, torch.tensor(steps, device=device), eps


class Log:
    """A row of log.jsonl for each iteration and a status line every few seconds.

    Numbers stay on the device until a status line is due, so that no iteration waits for one."""

    def __init__(self, config, out):
        self.config, self.file = config, out / 'log.jsonl'
        self.row, self.waiting = {}, []
        self.began = self.printed = time.time()

    def add(self, **values):
        """Add to this iteration's numbers; what micro-batches give sums up."""
        for name, value in values.items():
            self.row[name] = self.row.get(name, 0) + value.detach()

    def status(self, seen, last):
        """End the iteration after which `seen` images lie behind."""
        self.waiting.append(dict(images=seen, seconds=time.time() - self.began, **self.row))
        self.row = {}
        if not last and time.time() - self.printed < self.config.log_seconds:
            return
        self.printed = time.time()
        rows = [{name: value if isinstance(value, int) else float(f'{float(value):.6g}')
                 for name, value in row.items()} for row in self.waiting]
        self.waiting = []
        with open(self.file, 'a', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)
        pace = (self.printed - self.began) / seen
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        print(f'{seen:8d} images  {pace * 1000:6.1f} s per 1,000  '
              f'{clock(pace * max(self.config.kimg * 1000 - seen, 0))} left  '
              f'loss fake {mean["loss_fake"]:7.1f} G {mean["loss_G"]:7.1f}  '
              f'|xg-xphi| {mean["xg_xphi"]:.3f} |xphi-xpsi| {mean["xphi_xpsi"]:.3f}  '
              f'grad fake {mean["grad_fake"]:6.1f} G {mean["grad_G"]:6.1f}', flush=True)


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


@torch.no_grad()
def save_progress(config, ema, vae, encode, prompts, shape, out, seen):
    """A grid from 16 fixed seeds and prompts, and the averaged generator as a folder diffusers opens."""
    texts = prompts[::max(1, len(prompts) // 16)][:16]
    with autocast(config, ema.conv_in.weight.device):
        images = [draw_pictures(lambda z, fresh, c: generate(ema, z, c, config.t_init),
                                vae, encode([text]), [i], shape)[0] for i, text in enumerate(texts)]
    save_png(make_grid(images, texts, 4), out / f'grid_{seen:09d}.png')
    if seen:
        unet.save(ema, out / 'generator' / 'unet')
        facts = dict(teacher=full_path(config.teacher), tokenizer=full_path(config.tokenizer),
                     t_init=config.t_init, size=shape[1] * vae.factor, images=seen)
        write_text(out / 'generator' / 'generator.json', json.dumps(facts, indent=2) + '\n')


# ---------------------------------------------------------------------------------------------------
# Pictures

@torch.no_grad()
def sample(config):
    """Pictures of every prompt with every seed (without seeds: prompt i with seed i) in a folder.

    Their paths go to stdout."""
    net, vae, encode, jobs, shape, facts, out, device = open_sample(config)
    null = encode([''])

    def make(z, fresh, context):
        if config.teacher_steps:
            return ddim(net, z, context, null, config.kappa, config.teacher_steps)
        return generate(net, z, context, facts['t_init'], config.steps, fresh)

    began = printed = time.time()
    shown = []
    for first in range(0, len(jobs), config.batch):
        texts, seeds = zip(*jobs[first:first + config.batch])
        with autocast(config, device):
            images = draw_pictures(make, vae, encode(texts), seeds, shape)
        for i, image in enumerate(images):
            path = out / f'{first + i:06d}.png'
            save_png(image, path, prompt=texts[i], seed=seeds[i], **facts)
            print(path, flush=True)
        shown += list(images[:64 - len(shown)])
        done = first + len(images)
        if time.time() - printed > 5 and done < len(jobs):
            printed, pace = time.time(), (time.time() - began) / done
            print(f'{done} of {len(jobs)} pictures, {1 / pace:.1f} a second, '
                  f'{clock(pace * (len(jobs) - done))} left', file=sys.stderr)
    columns = min(8, len(parse_seeds(config.seeds)) if config.seeds else math.ceil(len(shown) ** 0.5))
    save_png(make_grid(shown, [f'{text} [{seed}]' for text, seed in jobs], columns), out / 'grid.png')
    print(out / 'grid.png')


def draw_pictures(make, vae, context, seeds, shape):
    """uint8 (B, H, W, 3) of the latents make(z, fresh, context), picture i's noise drawn with seeds[i].

    The noise is the CPU's: a picture depends on prompt and seed, not on neighbours, batch or device."""
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fresh(_=None):
        return torch.stack(
            [torch.randn(shape, generator=source) for source in sources]).to(context.device)
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
    """Write an array or Image under a temporary name, then rename it; `text` goes into text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(f'{path}.tmp', format='PNG', pnginfo=info)
    Path(f'{path}.tmp').replace(path)


def full_path(name):
    """An absolute path, for use from elsewhere; '' and repo ids stay what they are."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def write_text(path, text):
    Path(f'{path}.tmp').write_text(text, encoding='utf-8')
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
        source, target = Path(config.source), Path(config.target)
        check(config.overwrite or not target.exists(),
              f'{target} exists already, nothing was overwritten; give another name, or --overwrite')
        single = target.suffix == '.safetensors'
        folder = source / 'generator' if (source / 'generator').is_dir() else source
        said = folder / 'generator.json'
        facts = unet.read_json(said) if said.is_file() else {}
        pickled = source.is_file() and is_official_pickle(source)
        student = bool(facts) or pickled
        net = read_official_pickle(source) if pickled else unet.load(folder if facts else config.source)
        alone = pickled or source.is_dir() and not (source / 'vae').is_dir()
        teacher = config.teacher or facts.get('teacher') or ('' if alone else config.source)
        check(teacher or not single,
              f'{source} is a UNet alone, and {target} needs a VAE and a text encoder too; '
              'give --teacher, the checkpoint to take them from')
        vae, text = (vae_module.load(teacher), clip_text.load(teacher)) if teacher else (None, None)
        dtype = {'fp32': torch.float32, 'fp16': torch.float16}[config.precision]
        new = target.with_name(target.name + '.tmp')
        remove(new)
        try:
            if single:
                save_file(original_tensors(net, vae, text, dtype), new, metadata={'format': 'pt'})
            elif teacher:
                tokenizer = clip_text.load_tokenizer(
                    config.tokenizer or facts.get('tokenizer') or teacher)
                write_pipeline(new, net, vae, text, tokenizer, dtype, 'DDPM' if student else 'DDIM')
            else:
                unet.save(net, new / 'unet', dtype)
            if student and not single:
                facts = {'t_init': 625, **facts}
                facts.pop('teacher', None)  # its VAE and text encoder are in the folder, or nowhere
                write_text(new / 'generator.json', json.dumps(facts, indent=2) + '\n')
            if target.is_dir():             # with --overwrite
                check((target / 'unet').is_dir(), f'{target} is a folder that holds no checkpoint, '
                                                  'so it is not replaced; give another name')
            remove(target)
            new.rename(target)
        finally:
            remove(new)
    print(f'{target}: {"a one-step generator" if student else "a diffusion model"} in {config.precision}')


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def original_tensors(net, vae, text, dtype):
    """The 1,131 tensors of an original single file, as web UIs open it: {name: tensor}.

    ValueError where the nets are not built as SD 1.5 is, since such a file cannot say so."""
    with torch.device('meta'):
        like = unet.UNet(), vae_module.VAE(), clip_text.TextEncoder()
    heads = (net.mid_block.attentions[0].transformer_blocks[0].attn2.heads,
             text.text_model.encoder.layers[0].self_attn.heads)
    check(all(a.state_dict().keys() == b.state_dict().keys() for a, b in zip((net, vae, text), like))
          and (heads, net.conv_norm_out.num_groups, vae.scale) == ((8, 12), 32, 0.18215),
          'an original-style file cannot say how its nets are built, so expected SD 1.5\'s way, 4 levels '
          'of 2 resnets and 8 heads; these are built otherwise, write a folder instead')
    names, prefix = unet.original_names(net), unet.PREFIX
    tensors = {prefix['unet'] + names[key]: w for key, w in net.state_dict().items()}
    for key, w in vae.state_dict().items():     # there the attention is convolutions of 1 x 1
        w = w[:, :, None, None] if '.attentions.' in key and w.ndim == 2 else w
        tensors[prefix['vae'] + vae_module.original_name(key)] = w
    text_prefix = prefix['text_encoder'] + 'transformer.'
    tensors |= {text_prefix + key: w for key, w in text.state_dict().items()}
    tensors = {name: w.to(dtype).contiguous() for name, w in tensors.items()}
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
    write_text(folder / 'scheduler' / 'scheduler_config.json', json.dumps(
        {'_class_name': f'{scheduler}Scheduler', 'beta_start': 0.00085, 'beta_end': 0.012,
         'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000, 'clip_sample': False,
         'set_alpha_to_one': False, 'steps_offset': 1, 'prediction_type': 'epsilon'}, indent=2) + '\n')
    write_text(folder / 'model_index.json', json.dumps(
        {'_class_name': 'StableDiffusionPipeline', 'unet': ['diffusers', 'UNet2DConditionModel'],
         'vae': ['diffusers', 'AutoencoderKL'], 'text_encoder': ['transformers', 'CLIPTextModel'],
         'tokenizer': ['transformers', 'CLIPTokenizer'],
         'scheduler': ['diffusers', f'{scheduler}Scheduler'], 'safety_checker': [None, None],
         'feature_extractor': [None, None], 'requires_safety_checker': False}, indent=2) + '\n')


def is_official_pickle(file):
    """Whether a file is a bare pickle, as the official code writes generators, not one by torch.save."""
    with open(file, 'rb') as opened:
        head = opened.read(64)
    # torch.save's old format begins with its magic number, its present one is a zip.
    return head[:1] == b'\x80' and b'l\xfc\x9cF\xf9 j\xa8P\x19' not in head


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
        raise ValueError(f'{file} is no official SiD-LSG generator, or cut off ({type(error).__name__}: '
                         f'{error}); expected a pickle of a diffusers UNet under "ema"') from None
    return unet.from_config(config, weights, file)


# ---------------------------------------------------------------------------------------------------
# The door: what a user can get wrong is found here, before any work, and answered in one sentence

@contextlib.contextmanager
def user_errors():
    """Turns what is wrong with files and settings into a sentence and exit code 2.

    It goes around opening, never around running."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f'sid_lsg: {error}', file=sys.stderr)
        sys.exit(2)


def check(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def choose_device(name):
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'expected a device such as cuda, cuda:1 or cpu, got --device {name}') from None
    check(device.type != 'cuda' or (device.index or 0) < torch.cuda.device_count(),
          f'--device {name} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; '
          'leave --device out to use what is there, or install a CUDA build of torch')
    # fp32 is fp32, as in the published runs; torch's default is TF32 in convolutions.
    torch.backends.cudnn.allow_tf32 = False
    return device


def load_parts(path, device, tokenizer=''):
    """The VAE and `encode` of a checkpoint: encode(list of B str) -> context (B, 77, D) on the device.

    Its tokenizer is third; `tokenizer` may name another one's folder."""
    tokenizer = clip_text.load_tokenizer(tokenizer or path)
    vae, text = vae_module.load(path), clip_text.load(path)
    vae.to(device).requires_grad_(False), text.to(device)

    @torch.no_grad()
    def encode(texts):
        return text(tokenizer(texts).to(device))
    return vae, encode, tokenizer


def read_prompts(path, tokenizer):
    """The prompts of a text file, one a line, without outer blanks and empty lines."""
    try:
        lines = Path(path).read_text(encoding='utf-8').split('\n')
    except UnicodeDecodeError:
        raise ValueError(f'expected UTF-8 text, one prompt a line, in {path}; '
                         'found bytes that are none') from None
    except OSError as error:
        raise ValueError(f'expected a text file, one prompt a line, at {path}: {error.strerror}; '
                         'give one with --prompts') from None
    prompts = [line.strip() for line in lines if line.strip()]
    check(prompts, f'expected one prompt a line in {path}, found none')
    warn_of_cuts(prompts, tokenizer)
    return prompts


def warn_of_cuts(prompts, tokenizer):
    """Say on stderr which prompts do not fit into CLIP's 77 positions, and what of them is lost."""
    # A token is a character at least.
    long = [prompt for prompt in prompts if len(prompt) > clip_text.LENGTH - 2]
    cut = [(prompt, lost) for prompt in long if (lost := tokenizer.lost(prompt))]
    for prompt, lost in cut[:3]:
        print(f'warning: "{textwrap.shorten(prompt, 60)}" is longer than {clip_text.LENGTH} tokens, '
              f'this is cut: "{lost}"', file=sys.stderr)
    if len(cut) > 3:
        print(f'warning: {len(cut) - 3} more prompts are longer than {clip_text.LENGTH} tokens '
              'and are cut', file=sys.stderr)


def new_folder(given, parent, pattern):
    """The folder to write: `given` unless files in it match `pattern`, or the next free parent/NNN."""
    taken = [int(p.name) for p in Path(parent).glob('[0-9]*') if p.name.isdigit()]
    folder = Path(given) if given else Path(parent) / f'{max(taken, default=-1) + 1:03d}'
    check(not any(folder.glob(pattern)),
          f'expected a new folder for --out, found {pattern} in {folder}; '
          'nothing was overwritten, give another')
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def latent_shape(size, net, vae):
    """(4, h, w) of the latents for pictures `size` pixels wide; 0 means what the net was trained at."""
    size, below = size or net.sample_size * vae.factor, 2 ** (len(net.down_blocks) - 1)
    check(size > 0 and size % (vae.factor * below) == 0,
          f'expected --size to be a multiple of {vae.factor * below}, the VAE\'s factor {vae.factor} '
          f'times the UNet\'s {below}, got {size}')
    return 4, size // vae.factor, size // vae.factor


def open_run(config):
    """Check every setting, load the teacher and its parts, make the run folder; what train() works on.

    The folder: config.json (settings), log.jsonl, grid_*.png, generator/unet (diffusers layout) and
    generator.json."""
    with user_errors():
        config.kappa = tuple(np.atleast_1d(config.kappa).tolist())
        config.kappa *= 3 if len(config.kappa) == 1 else 1
        check(len(config.kappa) == 3,
              'expected --kappa with one number, or three (kappa1, kappa2 = kappa3, kappa4), '
              f'got {len(config.kappa)}')
        config.micro_batch = config.micro_batch or config.batch
        check(min(config.batch, config.micro_batch) > 0 and config.batch % config.micro_batch == 0,
              'expected --batch to be a multiple of --micro-batch, '
              f'got {config.batch} and {config.micro_batch}')
        check(0 <= config.t_min < config.t_max <= 1000 and 0 <= config.t_init < 1000,
              'steps lie in 0 ... 999 and --t-min below --t-max, got '
              f'--t-min {config.t_min} --t-max {config.t_max} --t-init {config.t_init}')
        check(0 <= config.drop <= 1, f'expected --drop to be a share from 0 to 1, got {config.drop}')
        check(min(config.kimg, config.grid_kimg) > 0, 'expected --kimg and --grid-kimg above 0')
        device = choose_device(config.device)
        teacher = unet.load(config.teacher).to(device).requires_grad_(False)
        vae, encode, tokenizer = load_parts(config.teacher, device, config.tokenizer)
        shape = latent_shape(config.size, teacher, vae)
        prompts = read_prompts(config.prompts or Path(config.teacher) / 'prompts.txt', tokenizer)
        out = new_folder(config.out, 'runs', 'config.json')
        write_text(out / 'config.json', json.dumps(asdict(config), indent=2) + '\n')
    print(f'Distilling {config.teacher} ({sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} '
          f'M weights) into {out} on {device} in {config.precision}: kappa {config.kappa}, '
          f'{len(prompts)} prompts, {config.kimg:g} thousand images', flush=True)
    return teacher, vae, encode, prompts, shape, out, device


def parse_seeds(text):
    """'0-7,42' -> [0, 1, ... 7, 42]"""
    seeds = []
    for part in text.split(','):
        first, dash, last = part.strip().partition('-')
        check(first.isdecimal() and (last.isdecimal() or not dash),
              f'expected --seeds as numbers and ranges such as 0-7,42, got {text}')
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def open_generator(config):
    """The folder of the generator to draw with and what its generator.json says.

    Settles config.teacher and config.size."""
    newest = sorted(Path('runs').glob('*/generator'), key=lambda folder: folder.stat().st_mtime)
    check(config.generator or newest,
          'expected a trained generator, found none under runs/; run `python sid_lsg.py train` first, '
          'give --generator FOLDER, or --teacher-steps 25 for the teacher itself')
    folder = Path(config.generator or newest[-1])
    folder = folder / 'generator' if (folder / 'generator').is_dir() else folder
    said = folder / 'generator.json'
    facts = json.loads(said.read_text(encoding='utf-8')) if said.is_file() else dict(t_init=625)
    whole = folder.is_file() or (folder / 'vae').is_dir()       # convert writes such
    config.teacher = config.teacher or (str(folder) if whole else facts.get('teacher'))
    config.tokenizer = config.tokenizer or facts.get('tokenizer', '')
    config.size = config.size or facts.get('size', 0)
    check(config.teacher, f'expected {said} to name the teacher, '
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
            facts = dict(generator=folder, teacher_steps=config.teacher_steps, kappa=config.kappa)
        else:
            check(config.kappa is None, '--kappa guides the teacher, with --teacher-steps; '
                                        'a one-step generator was trained with its own')
            folder, facts = open_generator(config)
            facts = dict(generator=folder, steps=config.steps, t_init=facts['t_init'])
        device = choose_device(config.device)
        net = unet.load(folder).to(device).requires_grad_(False)
        vae, encode, tokenizer = load_parts(config.teacher, device, config.tokenizer)
        shape = latent_shape(config.size, net, vae)
        warn_of_cuts(config.texts, tokenizer)
        texts = [*config.texts, *(read_prompts(config.prompts, tokenizer) if config.prompts else [])]
        check(texts, 'expected a prompt, in quotes, or --prompts FILE')
        seeds = parse_seeds(config.seeds) if config.seeds else None
        jobs = ([(text, seed) for text in texts for seed in seeds] if seeds
                else [(text, i) for i, text in enumerate(texts)])
        out = new_folder(config.out, 'samples', '*.png')
    return net, vae, encode, jobs, shape, facts, out, device


def make_config(kind, given):
    """The dataclass `kind` from the command line and, for train, the teacher's sid_lsg.json behind it."""
    file = Path(given.get('teacher', TINY_TEACHER)) / 'sid_lsg.json'
    beside = (json.loads(file.read_text(encoding='utf-8'))
              if kind is TrainConfig and file.is_file() else {})
    unknown = set(beside) - {f.name for f in fields(kind)}
    check(not unknown, f'expected settings of train in {file}, found {", ".join(sorted(unknown))}')
    return kind(**{**beside, **given})


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0],
                                     epilog='See train --help, sample --help and convert --help.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='train | sample | convert')
    for name, kind, does in (
            ('train', TrainConfig, 'distil a teacher into a one-step generator'),
            ('sample', SampleConfig, 'draw pictures with a generator, or with its teacher'),
            ('convert', ConvertConfig, 'rewrite a checkpoint or generator for other programs')):
        command = commands.add_parser(
            name, help=does, description=does, argument_default=argparse.SUPPRESS)
        for f in fields(kind):
            text, several = f.metadata['help'], f.type is tuple
            if f.name == 'texts':
                command.add_argument('texts', nargs='*', metavar='PROMPT', help=text)
                continue
            if f.name in ('source', 'target'):
                command.add_argument(f.name, metavar=dict(source='IN', target='OUT')[f.name], help=text)
                continue
            if f.type is bool:
                command.add_argument('--' + f.name, action='store_true', help=text)
                continue
            if '(default' not in text:
                text += f' (default: {f.default[0] if several else f.default})'
            command.add_argument(
                '--' + f.name.replace('_', '-'), type=float if several else f.type, help=text,
                nargs='+' if several else None, choices=f.metadata.get('choices'))
    given = vars(parser.parse_args(arguments))
    run, kind = dict(train=(train, TrainConfig), sample=(sample, SampleConfig),
                     convert=(convert, ConvertConfig))[given.pop('command')]
    with user_errors():
        config = make_config(kind, given)
    run(config)


if __name__ == '__main__':
    main()
