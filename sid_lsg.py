"""SiD-LSG: distil Stable Diffusion 1.5, without any data, into a generator that makes a picture in one step.

Zhou et al., "Long and Short Guidance in Score identity Distillation for One-Step Text-to-Image Generation",
arXiv 2406.01561 (the paper); the loss without guidance is Score identity Distillation, arXiv 2404.04057 (SiD).

    python sid_lsg.py train                 # the tiny teacher of tests/tiny_sd, minutes on a laptop
    python sid_lsg.py train --teacher PATH --prompts FILE       # a Stable Diffusion 1.5, the paper's defaults
    python sid_lsg.py sample "a red star above a blue ring on a black background"

    paper            | here      | shape (SD 1.5, 512 px) | what it is
    -----------------|-----------|------------------------|--------------------------------------------------------
    c                | context   | (B, 77, 768)           | text states of the prompts; `null`, (1, 77, 768), of ""
    z                | z         | (B, 4, 64, 64)         | standard normal seed of the generator
    G_theta          | G         |                        | generator, a UNet; `ema` is its running average
    f_phi            | teacher   |                        | the pretrained UNet, frozen
    f_psi            | fake      |                        | fake score net: a UNet that follows G's pictures
    x_g = G(z, c)    | x_g       | (B, 4, 64, 64)         | latent made by the generator in one step
    t                | t         | (B,)                   | step of the diffusion, uniform in [20, 979]
    epsilon          | eps       | (B, 4, 64, 64)         | standard normal noise
    a_t, sigma_t     | ALPHA[t], SIGMA[t]                 | x_t = a_t x_g + sigma_t eps
    f_phi(x_t, c)    | x_phi     | (B, 4, 64, 64)         | x_g as the teacher would restore it from x_t
    f_psi(x_t, c)    | x_psi     | (B, 4, 64, 64)         | x_g as the fake score net would
    kappa_1          | kappa[0]  |                        | guidance of fake while it learns
    kappa_2, kappa_3 | kappa[1]  |                        | guidance of fake in the generator's loss
    kappa_4          | kappa[2]  |                        | guidance of the teacher in the generator's loss
    alpha            | alpha     |                        | how far the loss corrects for psi's own error

Read train(), then the six functions right above it. All three nets start as copies of the teacher.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import clip_text
import unet
import vae as vae_module

TINY_TEACHER = Path(__file__).resolve().parent / 'tests' / 'tiny_sd'

# ---------------------------------------------------------------------------------------------------
# Settings. An option left out takes the teacher folder's value (its sid_lsg.json), else the paper's, below.


def option(default, help):
    return field(default=default, metadata={'help': help})


@dataclass
class TrainConfig:
    teacher: str = option(str(TINY_TEACHER), 'checkpoint folder in diffusers layout')
    prompts: str = option('', 'text file, one prompt a line (default: prompts.txt in the teacher folder)')
    out: str = option('', 'run folder to make (default: the next free runs/NNN)')
    device: str = option('', 'cuda, cuda:1, cpu ... (default: cuda if there is one, else cpu)')
    precision: str = option('fp32', 'fp32, or autocast to bf16 or fp16 over fp32 weights')
    seed: int = option(0, 'every random draw follows from it')
    size: int = option(0, 'side of the pictures in pixels (default: what the teacher was trained at)')

    kappa: tuple = option((1.5,), 'guidance: one number for all (LSG), or three: kappa1, kappa2 = kappa3, kappa4. '
                                  '1 1 K is long guidance, K 1 1 with K < 1 short, 1 none, 0 0 1 Zero-CFG')
    alpha: float = option(1.0, 'alpha of the generator loss')
    t_init: int = option(625, 'step at which the generator works')
    t_min: int = option(20, 'smallest t of the losses')
    t_max: int = option(980, 'largest t of the losses, exclusive')
    drop: float = option(0.1, 'share of prompts made empty while fake learns (if kappa1 or kappa2 is not 1)')

    kimg: float = option(10_000.0, 'length of the run in thousand images')
    batch: int = option(512, 'images an iteration')
    micro_batch: int = option(0, 'images at a time; gradients add up to the whole batch (default: batch)')
    lr: float = option(1e-6, 'learning rate of the generator')
    fake_lr: float = option(1e-6, 'learning rate of the fake score net')
    ema_kimg: float = option(50.0, 'half-life of the generator average in thousand images')

    grid_kimg: float = option(100.0, 'thousand images between picture grids (and saved generators)')
    log_seconds: float = option(5.0, 'seconds between status lines')


# ---------------------------------------------------------------------------------------------------
# The method

def schedule():
    """a_t and sigma_t of Stable Diffusion 1.5, each (1000,): float64 inside, float32 out.

    betas = linspace(sqrt .00085, sqrt .012, 1000)^2 (CompVis util.py 21-25, v1-inference.yaml 5-6); 1 - beta
    multiplied up is a_t^2."""
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    a2 = np.cumprod(1 - betas)
    return torch.tensor(a2 ** 0.5, dtype=torch.float32), torch.tensor((1 - a2) ** 0.5, dtype=torch.float32)


ALPHA, SIGMA = schedule()


def at(table, t):
    """Entries (B, 1, 1, 1) or (1, 1, 1, 1) of ALPHA or SIGMA at steps t (B,) or ()."""
    return table.to(t.device)[t].reshape(-1, 1, 1, 1)


def add_noise(x0, eps, t):
    """x_t = a_t x_0 + sigma_t eps. All (B, 4, H, W); t (B,) or () int64."""
    return at(ALPHA, t) * x0 + at(SIGMA, t) * eps


def predict_x0(eps_hat, x_t, t):
    """The x_0 that a noise prediction implies: (x_t - sigma_t eps_hat) / a_t. Latents are never clipped."""
    return (x_t - at(SIGMA, t) * eps_hat) / at(ALPHA, t)


def guided(net, x_t, t, context, null, kappa):
    """Noise eps(null) + kappa (eps(c) - eps(null)) at x_t (B, 4, H, W), float32; context (B, 77, D), null (1, 77, D).

    One call on the doubled batch [null, c]; kappa 1 is the conditional half alone, kappa 0 the unconditional one,
    each at half the cost. Where a prompt was dropped, c is null and guidance changes nothing."""
    null = null.expand_as(context)
    if kappa == 1 or kappa == 0:
        return net(x_t, t, context if kappa == 1 else null).float()
    both = net(torch.cat([x_t, x_t]), t.expand(len(x_t)).repeat(2), torch.cat([null, context]))
    eps_null, eps_c = both.float().chunk(2)
    return eps_null + kappa * (eps_c - eps_null)


def generate(G, z, context, t_init=625, steps=1, fresh=torch.randn_like):
    """x_g (B, 4, H, W) from z of the same shape: in one step, G's x_0 at t_init of the pure noise sigma z.

    With more steps (the official code shows 2 and 4), step i noises the result to int(t_init (1 - i / steps)) with
    new noise, `fresh(z)`, and restores it again."""
    x_g = torch.zeros_like(z)
    for i in range(steps):
        t = torch.full((len(z),), int(t_init * (1 - i / steps)), device=z.device)
        x_t = add_noise(x_g, z if i == 0 else fresh(z), t)
        x_g = predict_x0(G(x_t, t, context).float(), x_t, t)
    return x_g


def nan_samples(*tensors):
    """(B, 1, 1, 1) bool: the samples that are NaN somewhere in any of the tensors, and are left out of a loss."""
    return torch.stack([x.detach().isnan().flatten(1).any(1) for x in tensors]).any(0)[:, None, None, None]


def fake_score_loss(fake, x_g, t, eps, context, null, kappa):
    """Sum over pixels / B of |eps_hat - eps|^2, eps_hat guided by kappa_1 with gradient through both its halves.

    x_g (B, 4, H, W) carries no gradient: this is plain diffusion training on the generator's pictures."""
    eps_hat = guided(fake, add_noise(x_g, eps, t), t, context, null, kappa)
    error = (eps_hat - eps).masked_fill(nan_samples(eps_hat), 0)
    return error.square().sum() / len(x_g)


def generator_loss(x_g, x_phi, x_psi, alpha):
    """Sum over pixels / B of (x_phi - x_psi) ((x_phi - x_g) - alpha (x_phi - x_psi)) / w, w = mean |x_g - x_phi|.

    All (B, 4, H, W), all with gradient: through x_t it flows into both nets and on to the generator, which is where
    SiD differs from DMD. Only the weight w, per sample and at least 1e-5, carries none."""
    leave_out = nan_samples(x_g, x_phi, x_psi)
    difference = (x_phi - x_psi).masked_fill(leave_out, 0)
    residual = (x_phi - x_g).masked_fill(leave_out, 0)
    w = residual.detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return (difference * (residual - alpha * difference) / w).sum() / len(x_g)


def train(config):
    """Distil config.teacher; leaves a run folder (see open_run). The whole method is the loop below."""
    teacher, vae, encode, prompts, out, device = open_run(config)
    teacher.requires_grad_(False)
    G, ema, fake = (copy.deepcopy(teacher) for _ in range(3))
    G.requires_grad_(True)
    opt_G = torch.optim.Adam(G.parameters(), config.lr, betas=(0.0, 0.999), eps=adam_eps(config))
    opt_fake = torch.optim.Adam(fake.parameters(), config.fake_lr, betas=(0.0, 0.999), eps=adam_eps(config))
    kappa1, kappa2, kappa4 = config.kappa
    drop = config.drop if (kappa1, kappa2) != (1, 1) else 0.0
    null = encode([''])
    micro_batches = torch.arange(config.batch).split(config.micro_batch)
    draw = functools.partial(draw_samples, config, prompts, encode, null, latent_shape(config, teacher, vae), device)
    log = Log(config, out)
    save_progress(config, out, ema, vae, encode, prompts, seen=0)

    for iteration in range(math.ceil(config.kimg * 1000 / config.batch)):
        seen = iteration * config.batch

        # psi-step: the fake score net learns the noise in what the generator makes at present.
        fake.requires_grad_(True)
        for rows in micro_batches:
            context, z, t, eps = draw(iteration, 0, rows, drop)
            with autocast(config, device):
                with torch.no_grad():           # theta gets no gradient from this loss
                    x_g = generate(G, z, context, config.t_init)
                loss_fake = fake_score_loss(fake, x_g, t, eps, context, null, kappa1) * len(rows) / config.batch
            loss_fake.backward()
            log.add(loss_fake=loss_fake)
        log.add(grad_fake=step(opt_fake))
        fake.requires_grad_(False)              # its weights rest, but its INPUT must pass gradients on, as teacher's

        # theta-step: the generator moves so that teacher and fake agree on its pictures.
        for rows in micro_batches:
            context, z, t, eps = draw(iteration, 1, rows)
            with autocast(config, device):
                x_g = generate(G, z, context, config.t_init)
                x_t = add_noise(x_g, eps, t)    # no detach: the gradient reaches x_g through both nets
                x_psi = predict_x0(guided(fake, x_t, t, context, null, kappa2), x_t, t)
                x_phi = predict_x0(guided(teacher, x_t, t, context, null, kappa4), x_t, t)
                loss_G = generator_loss(x_g, x_phi, x_psi, config.alpha) * len(rows) / config.batch
            loss_G.backward()
            share = len(rows) / config.batch
            log.add(loss_G=loss_G, xg_xphi=(x_g - x_phi).abs().mean() * share, xphi_xpsi=(x_phi - x_psi).abs().mean() * share)
        log.add(grad_G=step(opt_G, clip=1.0 if config.precision == 'fp16' else 0.0))

        update_average(ema, G, ema_beta(config, seen))
        seen += config.batch
        log.status(seen)
        if due(config.grid_kimg, seen, config.batch):
            save_progress(config, out, ema, vae, encode, prompts, seen)

    log.status(seen, last=True)
    save_progress(config, out, ema, vae, encode, prompts, seen)
    print(f'The generator is in {out}/generator, its pictures from first to last in {out}/grid_*.png. Try it:\n'
          f'    python sid_lsg.py sample --generator {out} "{prompts[0]}"')


# ---------------------------------------------------------------------------------------------------
# What train() calls besides the method

def autocast(config, device):
    dtype = torch.float16 if config.precision == 'fp16' else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=config.precision != 'fp32')


def adam_eps(config):
    return 1e-6 if config.precision == 'fp16' else 1e-8     # the published runs' (facts: 1e-8 vanishes in fp16)


def step(optimizer, clip=0.0):
    """One update from finite gradients, clipped element by element if clip > 0. Returns their norm before clipping.

    NaN becomes 0 and infinity 1e5, as the official loop has it; clipping at 1 is what kept its fp16 runs alive."""
    parameters = optimizer.param_groups[0]['params']
    for p in parameters:
        torch.nan_to_num_(p.grad, nan=0.0, posinf=1e5, neginf=-1e5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip:
        torch.nn.utils.clip_grad_value_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def ema_beta(config, seen):
    """Weight of the old average after `seen` images: half-life ema_kimg, at most a twentieth of what was seen (EDM)."""
    halflife = min(config.ema_kimg * 1000, seen * 0.05)
    return 0.5 ** (config.batch / max(halflife, 1e-8))


@torch.no_grad()
def update_average(ema, G, beta):
    for average, parameter in zip(ema.parameters(), G.parameters()):
        average.lerp_(parameter, 1 - beta)


def due(every_kimg, seen, batch):
    """Whether the last `batch` of the `seen` images crossed a multiple of every_kimg thousand."""
    return seen // (every_kimg * 1000) > (seen - batch) // (every_kimg * 1000)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def draw_samples(config, prompts, encode, null, shape, device, iteration, half, rows, drop=0.0):
    """Prompts, z, t and eps for `rows` of the batch of one half-iteration: context, z, t, eps on the device.

    Sample i depends on (seed, iteration, half, i) alone, not on micro-batch or device; prompts come without
    replacement, epoch by epoch, a new order each."""
    texts, draws = [], []
    for i in rows.tolist():
        epoch, place = divmod((2 * iteration + half) * config.batch + i, len(prompts))
        rng = np.random.default_rng((config.seed, iteration, half, i))
        texts.append('' if rng.random() < drop else prompts[epoch_order(config.seed, epoch, len(prompts))[place]])
        t = rng.integers(config.t_min, config.t_max)
        draws.append((t, rng.standard_normal((2, *shape), dtype=np.float32)))
    noise = torch.from_numpy(np.stack([pair for _, pair in draws])).to(device)
    return encode(texts), noise[:, 0], torch.tensor([int(t) for t, _ in draws], device=device), noise[:, 1]


class Log:
    """One row an iteration in log.jsonl, a status line every few seconds. Values stay on the device until then,
    so that no iteration waits for a number."""

    def __init__(self, config, out):
        self.config, self.file = config, out / 'log.jsonl'
        self.row, self.rows = {}, []
        self.began = self.printed = time.time()

    def add(self, **values):
        for name, value in values.items():
            self.row[name] = self.row.get(name, 0) + value.detach()

    def status(self, seen, last=False):
        self.rows.append((seen, time.time() - self.began, self.row))
        self.row = {}
        if not last and time.time() - self.printed < self.config.log_seconds:
            return
        self.printed = time.time()
        rows = [dict(images=n, seconds=round(s, 2), **{k: float(f'{v.item():.6g}') for k, v in row.items()})
                for n, s, row in self.rows if row]
        with open(self.file, 'a') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)
        self.rows = []
        if not rows:
            return
        elapsed, total = time.time() - self.began, self.config.kimg * 1000
        mean = {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}
        print(f'{seen / 1000:9.2f}k images  {elapsed / seen * 1000:6.1f} s/k  {clock(elapsed / seen * max(total - seen, 0))} '
              f'left  loss fake {mean["loss_fake"]:8.2f}  G {mean["loss_G"]:8.2f}  |xg-xphi| {mean["xg_xphi"]:.4f}  '
              f'|xphi-xpsi| {mean["xphi_xpsi"]:.4f}  grad fake {mean["grad_fake"]:8.2f}  G {mean["grad_G"]:8.2f}', flush=True)


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


def save_progress(config, out, ema, vae, encode, prompts, seen):
    """grid_*.png from 16 fixed seeds and prompts, and the averaged generator as a folder that diffusers opens."""
    texts = prompts[::max(1, len(prompts) // 16)][:16]
    with torch.no_grad(), autocast(config, ema.conv_in.weight.device):
        shape = latent_shape(config, ema, vae)
        images = [draw_pictures(lambda z, fresh, c: generate(ema, z, c, config.t_init), vae, encode([text]), [seed], shape)[0]
                  for seed, text in enumerate(texts)]
    save_png(make_grid(images, texts, 4), out / f'grid_{seen:09d}.png')
    if seen:
        unet.save(ema, out / 'generator' / 'unet')
        facts = dict(teacher=config.teacher, t_init=config.t_init, size=shape[1] * vae.factor, images=seen)
        write_text(out / 'generator' / 'generator.json', json.dumps(facts, indent=2) + '\n')


# ---------------------------------------------------------------------------------------------------
# Pictures

def to_uint8(images):
    """(B, 3, H, W) in about [-1, 1] -> numpy uint8 (B, H, W, 3), by the official code's rule: x 127.5 + 128, cut off."""
    return (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def ddim(net, z, context, null, kappa, steps):
    """The teacher's own sampler, for comparison: deterministic DDIM (arXiv 2010.02502), x_0 (B, 4, H, W) from z.

    Its steps are diffusers' for SD: t = 1 + i (1000 // steps), and the last one ends at t = 0, not beyond."""
    stride, x = 1000 // steps, z
    for i in reversed(range(steps)):
        t = torch.full((len(z),), 1 + i * stride, device=z.device)
        eps_hat = guided(net, x, t, context, null, kappa)
        x = add_noise(predict_x0(eps_hat, x, t), eps_hat, (t - stride).clamp(min=0))
    return x


def draw_pictures(make, vae, context, seeds, shape):
    """uint8 pictures (B, H, W, 3) of make(z, fresh, context), the noise of each from a CPU generator of its own seed."""
    device = context.device
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def fresh(_=None):
        return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)
    return to_uint8(vae.decode(make(fresh(), fresh, context)))


def save_png(image, path, **text):
    """Write a picture (array or Image) under a temporary name, then rename it; `text` goes into its text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(f'{path}.tmp', format='PNG', pnginfo=info)
    Path(f'{path}.tmp').replace(path)


def write_text(path, text):
    Path(f'{path}.tmp').write_text(text, encoding='utf-8')
    Path(f'{path}.tmp').replace(path)


def make_grid(images, labels, columns):
    """One picture of all, each over its label. Small pictures are enlarged without smoothing, to 128 pixels or more."""
    side = images[0].shape[0]
    cell, font, lines = side * max(1, math.ceil(128 / side)), ImageFont.load_default(11), 4
    rows = math.ceil(len(images) / columns)
    sheet = Image.new('RGB', (columns * (cell + 8) + 8, rows * (cell + 8 + 13 * lines) + 8), 'white')
    pen = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels)):
        x, y = 8 + i % columns * (cell + 8), 8 + i // columns * (cell + 8 + 13 * lines)
        sheet.paste(Image.fromarray(image).resize((cell, cell), Image.NEAREST), (x, y))
        words = textwrap.wrap(label, cell // 6, max_lines=lines, placeholder=' ...')
        pen.multiline_text((x, y + cell), '\n'.join(words), 'black', font, spacing=2)
    return sheet


@torch.no_grad()
def sample(config):
    """Pictures of every prompt with every seed (without --seeds: prompt i with seed i) into a folder; paths to stdout."""
    net, vae, encode, jobs, out, shape, facts, device = open_sample(config)
    null = encode([''])

    def make(z, fresh, context):
        if config.teacher_steps:
            return ddim(net, z, context, null, facts['kappa'], config.teacher_steps)
        return generate(net, z, context, facts['t_init'], config.steps, fresh)

    began = printed = time.time()
    shown = []
    for first in range(0, len(jobs), config.batch):
        texts, seeds = zip(*jobs[first:first + config.batch])
        with autocast(config, device):
            images = draw_pictures(make, vae, encode(texts), seeds, shape)
        for i, image in enumerate(images, start=first):
            path = out / f'{i:06d}.png'
            save_png(image, path, prompt=jobs[i][0], seed=jobs[i][1], **facts)
            print(path, flush=True)
            if len(shown) < 64:
                shown.append(image)
        done = first + len(images)
        if time.time() - printed > 5 and done < len(jobs):
            printed, pace = time.time(), (time.time() - began) / done
            print(f'{done} / {len(jobs)} pictures, {1 / pace:.1f} a second, {clock(pace * (len(jobs) - done))} left', file=sys.stderr)
    labels = [f'{text} [{seed}]' for text, seed in jobs]
    columns = min(8, len(parse_seeds(config.seeds)) if config.seeds else math.ceil(len(shown) ** 0.5))
    save_png(make_grid(shown, labels, columns), out / 'grid.png')
    print(out / 'grid.png')


@dataclass
class SampleConfig:
    prompts_file: str = option('', 'text file, one prompt a line, beside or instead of those on the command line')
    generator: str = option('', 'run folder or generator folder (default: the newest run in runs/)')
    teacher: str = option('', 'checkpoint with the VAE and text encoder (default: the one the generator was distilled from)')
    seeds: str = option('', 'such as 0-7,42: every prompt with each of them (default: prompt i with seed i)')
    steps: int = option(1, 'steps of the generator: 1, 2 or 4')
    teacher_steps: int = option(0, 'draw with the teacher itself instead, in so many DDIM steps')
    kappa: float = option(math.nan, 'guidance of the teacher, with --teacher-steps (default: 1.5)')
    size: int = option(0, 'side of the pictures in pixels (default: what the generator was trained at)')
    batch: int = option(8, 'pictures at a time')
    out: str = option('', 'folder to make (default: the next free samples/NNN)')
    device: str = option('', 'cuda, cuda:1, cpu ... (default: cuda if there is one, else cpu)')
    precision: str = option('fp32', 'fp32, or autocast to bf16 or fp16')


# ---------------------------------------------------------------------------------------------------
# The door: everything the user can get wrong is found here, before any work, and answered in one sentence

@contextlib.contextmanager
def user_errors():
    """Turns what is wrong with files and settings into a sentence and exit code 2; only for opening, not for running."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f'sid_lsg: {error}', file=sys.stderr)
        sys.exit(2)


def choose_device(name):
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'expected a device such as cuda, cuda:1 or cpu, got --device {name}') from None
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'--device {name} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; '
                         'leave --device out to run on the CPU, or install a CUDA build of torch')
    if device.type == 'cuda':       # fp32 means fp32: the published runs had TF32 off, torch's default has it on in convolutions
        torch.backends.cudnn.allow_tf32 = False
    return device


def load_parts(path, device):
    """The VAE and `encode` of a checkpoint folder: encode(list of B str) -> context (B, 77, D) on the device."""
    vae, tokenizer, text = vae_module.load(path), clip_text.load_tokenizer(path), clip_text.load(path)
    vae.to(device).requires_grad_(False), text.to(device).requires_grad_(False)

    def encode(texts):
        return text(tokenizer(texts).to(device))
    encode.lost = tokenizer.lost
    return vae, encode


def read_prompts(path, encode):
    """The prompts of a text file, one a line, outer blanks and empty lines dropped."""
    try:
        text = Path(path).read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'expected UTF-8 text, one prompt a line, in {path}; {error}') from None
    except OSError as error:
        raise ValueError(f'expected a text file of prompts, one a line, at {path}: {error.strerror}') from None
    prompts = [line.strip() for line in text.split('\n') if line.strip()]
    if not prompts:
        raise ValueError(f'expected one prompt a line in {path}, found none')
    warn_of_cuts(prompts, encode)
    return prompts


def warn_of_cuts(prompts, encode):
    cut = [(p, encode.lost(p)) for p in prompts if len(p) > clip_text.LENGTH - 2]    # fewer characters cannot be more tokens
    cut = [(p, lost) for p, lost in cut if lost]
    for prompt, lost in cut[:3]:
        print(f'warning: cut to {clip_text.LENGTH} tokens: "{textwrap.shorten(prompt, 60)}" loses "... {lost}"', file=sys.stderr)
    if len(cut) > 3:
        print(f'warning: {len(cut) - 3} more prompts are longer than {clip_text.LENGTH} tokens and cut', file=sys.stderr)


def next_folder(given, parent, holds):
    """The folder to write: `given`, refused if something in it matches `holds`, or the next free parent/NNN."""
    if given:
        if any(Path(given).glob(holds)):
            raise ValueError(f'{given} already holds {holds}; nothing was overwritten: give another --out, or remove it')
        return Path(given)
    taken = [int(p.name) for p in Path(parent).glob('[0-9][0-9][0-9]*') if p.name.isdigit()]
    return Path(parent) / f'{max(taken, default=-1) + 1:03d}'


def latent_shape(config, net, vae):
    """(4, h, w) for config.size pixels, or for what the net was trained at where that is 0."""
    size, factor = config.size or net.sample_size * vae.factor, vae.factor * 2 ** (len(net.down_blocks) - 1)
    if size <= 0 or size % factor:
        raise ValueError(f'--size {size} is not a multiple of {factor}, the VAE\'s factor {vae.factor} times the '
                         f'UNet\'s {factor // vae.factor}; try {max(1, round(size / factor)) * factor}')
    return 4, size // vae.factor, size // vae.factor


def check(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def open_run(config):
    """Checks every setting, loads the teacher, makes the run folder. Returns what train() works on.

    The folder: config.json (settings), log.jsonl, grid_*.png, generator/unet (diffusers layout) and generator.json."""
    with user_errors():
        config.kappa = tuple(config.kappa) * (3 if len(config.kappa) == 1 else 1)
        config.micro_batch = config.micro_batch or config.batch
        check(len(config.kappa) == 3, f'--kappa takes one number, or three (kappa1, kappa2 = kappa3, kappa4), got {len(config.kappa)}')
        check(config.batch > 0 and config.micro_batch > 0 and config.batch % config.micro_batch == 0,
              f'--batch {config.batch} is not a multiple of --micro-batch {config.micro_batch}')
        check(config.precision in ('fp32', 'bf16', 'fp16'), f'--precision is fp32, bf16 or fp16, got {config.precision}')
        check(0 <= config.t_min < config.t_max <= 1000, f'steps lie in 0 ... 999, got --t-min {config.t_min} --t-max {config.t_max}')
        check(0 <= config.t_init < 1000, f'steps lie in 0 ... 999, got --t-init {config.t_init}')
        check(0 <= config.drop <= 1, f'--drop is a share between 0 and 1, got {config.drop}')
        check(config.kimg > 0 and config.grid_kimg > 0, 'expected --kimg and --grid-kimg above 0')
        device = choose_device(config.device)
        teacher = unet.load(config.teacher).to(device)
        vae, encode = load_parts(config.teacher, device)
        with torch.no_grad():       # the text encoder's output is data here
            latent_shape(config, teacher, vae)
        prompts = config.prompts or Path(config.teacher) / 'prompts.txt'
        check(Path(prompts).is_file(), f'expected a text file of prompts, one a line, at {prompts}; give --prompts FILE')
        prompts = read_prompts(prompts, encode)
        out = next_folder(config.out, 'runs', 'config.json')
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / 'config.json', json.dumps(asdict(config), indent=2) + '\n')
    weights = sum(p.numel() for p in teacher.parameters())
    print(f'Distilling {config.teacher} ({weights / 1e6:.1f} M weights) with kappa {config.kappa} on {device} in {config.precision}, '
          f'{len(prompts)} prompts, {config.kimg:g}k images, into {out}', flush=True)
    return teacher, vae, torch.no_grad()(encode), prompts, out, device


def newest_generator():
    found = sorted(Path('runs').glob('*/generator/generator.json'), key=lambda p: p.stat().st_mtime)
    check(found, 'found no generator under runs/; run `python sid_lsg.py train` first, or give --generator FOLDER, '
                 'or --teacher-steps 25 to see the teacher itself')
    return found[-1].parent


def parse_seeds(text):
    """'0-7,42' -> [0, 1, ... 7, 42]"""
    seeds = []
    for part in text.split(','):
        first, _, last = part.strip().partition('-')
        check(first.isdecimal() and (last.isdecimal() or not _), f'--seeds takes numbers and ranges such as 0-7,42, got {text}')
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def open_sample(config):
    """Checks every setting, loads the net that draws, makes the folder. Returns what sample() works on."""
    with user_errors():
        facts = dict(t_init=625)
        if config.teacher_steps:
            check(0 < config.teacher_steps < 1000, f'--teacher-steps lies in 1 ... 999, got {config.teacher_steps}')
            check(config.steps == 1 and not config.generator, '--teacher-steps draws with the teacher: leave out --steps and --generator')
            config.teacher = config.teacher or str(TINY_TEACHER)
            source = config.teacher
            facts = dict(teacher_steps=config.teacher_steps, kappa=1.5 if math.isnan(config.kappa) else config.kappa)
        else:
            check(math.isnan(config.kappa), '--kappa guides the teacher (--teacher-steps N); a one-step generator has its guidance built in')
            check(config.steps in (1, 2, 4), f'--steps is 1, 2 or 4, got {config.steps}')
            source = Path(config.generator) if config.generator else newest_generator()
            source = source / 'generator' if (source / 'generator').is_dir() else source
            if (source / 'generator.json').is_file():
                facts = json.loads((source / 'generator.json').read_text(encoding='utf-8'))
                config.teacher = config.teacher or facts['teacher']
                config.size = config.size or facts['size']
            check(config.teacher, f'{source} does not say which teacher it was distilled from (no generator.json); give --teacher FOLDER')
            facts = dict(t_init=facts['t_init'], steps=config.steps)
        check(config.batch > 0, f'--batch is 1 or more, got {config.batch}')
        check(config.precision in ('fp32', 'bf16', 'fp16'), f'--precision is fp32, bf16 or fp16, got {config.precision}')
        device = choose_device(config.device)
        net = unet.load(source).to(device).requires_grad_(False)
        vae, encode = load_parts(config.teacher, device)
        shape = latent_shape(config, net, vae)
        warn_of_cuts(config.texts, encode)
        texts = config.texts + (read_prompts(config.prompts_file, encode) if config.prompts_file else [])
        check(texts, 'expected a prompt; give it in quotes, or --prompts FILE')
        if config.seeds:
            jobs = [(text, seed) for text in texts for seed in parse_seeds(config.seeds)]
        else:
            jobs = [(text, i) for i, text in enumerate(texts)]
        out = next_folder(config.out, 'samples', '*.png')
        out.mkdir(parents=True, exist_ok=True)
    facts['generator'] = source
    return net, vae, encode, jobs, out, shape, facts, device


def make_config(kind, given):
    """The dataclass `kind` from the command line's dict; for training, the teacher's sid_lsg.json stands behind it."""
    beside = Path(given.get('teacher', TINY_TEACHER)) / 'sid_lsg.json'
    defaults = json.loads(beside.read_text(encoding='utf-8')) if kind is TrainConfig and beside.is_file() else {}
    unknown = set(defaults) - {f.name for f in fields(kind)}
    check(not unknown, f'{beside} sets {sorted(unknown)}, which are no settings of train')
    return kind(**{**defaults, **given})


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], epilog='See `train --help` and `sample --help`.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='train|sample')
    for name, kind, text in (('train', TrainConfig, 'distil a teacher into a one-step generator'),
                             ('sample', SampleConfig, 'draw pictures with a generator, or with its teacher')):
        command = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        if name == 'sample':
            command.add_argument('texts', nargs='*', metavar='PROMPT', help='prompts, in quotes')
        for f in fields(kind):
            flag = '--prompts' if f.name == 'prompts_file' else '--' + f.name.replace('_', '-')
            note = '' if 'default' in f.metadata['help'] or f.default != f.default else \
                f' (default: {f.default[0] if f.type is tuple else f.default})'
            command.add_argument(flag, dest=f.name, type=float if f.type is tuple else f.type,
                                 nargs='+' if f.type is tuple else None, help=f.metadata['help'] + note)
    given = vars(parser.parse_args(arguments))
    command, texts = given.pop('command'), given.pop('texts', [])
    with user_errors():
        config = make_config(TrainConfig if command == 'train' else SampleConfig, given)
    config.texts = texts
    train(config) if command == 'train' else sample(config)


if __name__ == '__main__':
    main()
