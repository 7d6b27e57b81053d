"""Time this project beside diffusers, and beside what the device can do.

    python tests/bench.py                       # every row that this machine can fill
    python tests/bench.py unet start            # some

Both sides have the same weights, random ones of Stable Diffusion 1.5's size that are made once in --work,
and take turns, A B A B. A row shows medians, their ratio, the bar that we set ourselves, and of the ceiling
the share: FLOPs, counted by torch, against those of a large matrix product in the same dtype and run.
Where two computations should agree, it is asserted that they do. Needs tests/requirements.txt.
"""

import argparse
import contextlib
import copy
import gc
import importlib.util
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from pathlib import Path
from unittest import mock

os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', DIFFUSERS_VERBOSITY='error',
                  HF_HUB_DISABLE_PROGRESS_BARS='1')
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import clip_text
import sid_lsg
import unet
import vae as vae_module

TINY = ROOT / 'tests' / 'tiny_sd'
PROMPT = 'a red star above a blue ring on a black background'
DTYPES = sid_lsg.DTYPES


# ---------------------------------------------------------------------------------------------------
# Measuring

def wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def precisions(device):
    """What it is measured in. A CPU without bf16 arithmetic would emulate it, diffusers' picture for an hour."""
    return [name for name in ('fp32', 'bf16') if sid_lsg.arithmetic(name, device) == name]


def free(device):
    Timed.last = None
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(call, device):
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def beside(calls, device, repeat):
    """Median seconds of each call, in turns, after those that do not count: they warm up, compile, and record."""
    for call in calls * (2 if device.type == 'cuda' else 1):        # the second call records a CUDA graph
        call()
    times = [[seconds(call, device) for call in calls] for _ in range(repeat)]
    return [statistics.median(column) for column in zip(*times)]


def process(command):
    """stdout of a command."""
    return subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True).stdout


def peak_memory():
    """This process's own so far, in GB. On Linux getrusage's may be that of the process it was forked from."""
    status = Path('/proc/self/status')
    if status.exists():
        return int(status.read_text().partition('VmHWM:')[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def flops(call):
    """Of one call: multiplications and additions in matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def error(a, b):
    """Largest difference over largest value."""
    a, b = a.float(), b.float()
    return ((a - b).abs().max() / b.abs().max()).item()


class Table:
    def __init__(self, device):
        self.device, self.ceilings = device, {}

    def ceiling(self, precision):
        """FLOP/s of a large square matrix product: of side 8192, or the first to take a tenth of a second."""
        if precision not in self.ceilings:
            n, took = 128, 0.0
            while n < 8192 and took < 0.1:      # a CPU takes seconds for 8192
                n *= 2
                a, b = (torch.randn(n, n, device=self.device).to(DTYPES[precision]) for _ in range(2))
                took = beside([lambda: a @ b], self.device, 1)[0]
            self.ceilings[precision] = 2 * n ** 3 / beside([lambda: a @ b], self.device, 5)[0]
            print(f'a matrix product, {precision}: {self.ceilings[precision] / 1e12:.3f} TFLOP/s', flush=True)
        return self.ceilings[precision]

    def row(self, work, precision, ours, theirs, bar, count=0, note=''):
        """Seconds of both; `count` FLOPs."""
        share = f'{count / ours / self.ceiling(precision):4.0%} of ceiling' if count else ''
        print(f'{work:52s} {ours:9.4f} s, diffusers {theirs:9.4f} s, ratio {ours / theirs:.2f} (bar {bar})  '
              f'{share}  {note}', flush=True)


# ---------------------------------------------------------------------------------------------------
# Nets

def make_folder(work, small):
    """A whole student of random weights, fp16, in diffusers layout, with prompts; made once."""
    folder = work / ('small' if small else 'full')
    if not (folder / 'prompts.txt').exists():
        torch.manual_seed(0)
        net = unet.UNet((32, 64), 32, 4, 1, 8, (True, True)) if small else unet.UNet()
        vae = vae_module.VAE((8, 8, 16, 16), 1, 4) if small else vae_module.VAE()
        text = (clip_text.TextEncoder(width=32, layers=1, heads=4, hidden=64) if small
                else clip_text.TextEncoder())
        net.sample_size = 8 if small else 64
        tiny = clip_text.load_tokenizer(TINY)           # and words that nobody says, up to CLIP's 49,408
        words = [*sorted(tiny.vocab, key=tiny.vocab.get)[:-2], *(f'word {i}' for i in range(49408 - len(tiny.vocab))),
                 '<|startoftext|>', '<|endoftext|>']
        tokenizer = clip_text.Tokenizer({word: i for i, word in enumerate(words)}, tiny.merges)
        sid_lsg.write_pipeline(folder, net, vae, text, tokenizer, torch.float16, 'DDPM')
        (folder / 'generator.json').write_text(json.dumps({'t_init': 625}))
        shutil.copy(TINY / 'prompts.txt', folder)
    return folder


def generator(folder, dtype, device):
    """The nets, and how sample() draws: a function of prompts and side in pixels to uint8 pictures."""
    device = sid_lsg.choose_device(str(device))
    stored = dtype if device.type == 'cuda' else None          # as open_sample() has it
    net = sid_lsg.place(unet.load(folder, stored), device, dtype)
    vae, encode, _ = sid_lsg.load_parts(folder, device, dtype=dtype, stored=stored)

    @torch.no_grad()
    def draw(prompts, side):
        return sid_lsg.draw_pictures(lambda z, fresh, context: sid_lsg.generate(net, z, context), vae,
                                     encode(prompts), range(len(prompts)), (4, side // 8, side // 8))
    return (net, vae.decoder, encode.net), draw


def pipeline(folder, dtype, device):
    """The same with diffusers."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar
    disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompts, side):
        return pipe(prompts, height=side, width=side, timesteps=[625], guidance_scale=1.0).images
    return (pipe.unet, pipe.vae.decoder, pipe.text_encoder), draw


def meta(folder):
    """UNet, VAE, latents of one picture, a step and text states on the meta device, to count FLOPs."""
    # In the file's own fp16: read, not copied. FLOPs know no dtype.
    net, vae = (module.load(folder, torch.float16).to('meta').float() for module in (unet, vae_module))
    side, width = net.sample_size, json.loads((folder / 'text_encoder' / 'config.json').read_text())['hidden_size']
    return (net, vae, torch.zeros(1, 4, side, side, device='meta'),
            torch.zeros(1, dtype=torch.int64, device='meta'), torch.zeros(1, 77, width, device='meta'))


def picture_flops(folder):
    net, vae, x, t, context = meta(folder)
    with torch.no_grad():
        return flops(lambda: vae.decode(net(x, t, context)))


def training_flops(folder, kappa, checkpoint=False):
    """Of one image. The fake net's loss goes back to its weights, the generator's through two nets to theirs."""
    net, _, x, t, context = meta(folder)
    if checkpoint:
        sid_lsg.recompute_in_backward(net)

    def there_and_back(weights, scale):
        net.requires_grad_(weights)
        texts = torch.cat([context] * (1 if scale in (0, 1) else 2))
        return flops(lambda: net(x.clone().requires_grad_(not weights), t, texts).sum().backward())
    with torch.no_grad():
        there = flops(lambda: net(x, t, context))
    return there + there_and_back(True, kappa[0]) + there_and_back(True, 1) + sum(
        there_and_back(False, scale) for scale in kappa[1:])


# ---------------------------------------------------------------------------------------------------
# Training iterations, here and arranged as the official loop arranges them

class Timed(sid_lsg.Run):
    """A run that notes when iterations end and stops after `count` more than one; no pictures, no state."""
    count, last = 0, None

    def __init__(self, config):
        self.ends, Timed.last = [], self
        super().__init__(config)

    def save_pictures(self, seen):
        pass

    def end_iteration(self, iteration):
        super().end_iteration(iteration)
        wait(self.device)
        self.ends.append(time.perf_counter())
        return len(self.ends) > self.count


def train(count, work, **settings):
    """sid_lsg.train() itself, for one iteration and `count` more: (its config, their seconds, first losses)."""
    out = tempfile.mkdtemp(dir=work)
    config = sid_lsg.make_config(sid_lsg.TrainConfig, dict(
        out=f'{out}/run', progress_samples=0, grid_kimg=1e9, save_every=1e9, log_seconds=0.0, kimg=1e6,
        drop=0.0, **settings))
    Timed.count, real, sid_lsg.Run = count, sid_lsg.Run, Timed
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            sid_lsg.train(config)
        row = json.loads(Path(out, 'run', 'log.jsonl').read_text().splitlines()[0])
    finally:
        sid_lsg.Run = real
        shutil.rmtree(out)
    ends = Timed.last.ends
    return config, [b - a for a, b in zip(ends, ends[1:])], [row['loss_fake'], row['loss_G']]


def official(folder, config, device):
    """The same iteration on diffusers' nets, arranged as in the official loop: a function of its number to losses.

    There the text encoder runs in every net call, x_0 is made sample by sample, Adam stores a first moment,
    and memory is collected at every end. What is drawn is drawn as here, so that losses must agree."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder='tokenizer')
    text = CLIPTextModel.from_pretrained(folder, subfolder='text_encoder', dtype=torch.float32).to(device)
    teacher, fake, G, ema = (UNet2DConditionModel.from_pretrained(
        folder, subfolder='unet', dtype=torch.float32).to(device) for _ in range(4))
    for net in (teacher, ema, text):
        net.requires_grad_(False)
    for net in (teacher, fake, G) if config.compile else ():
        net.compile(dynamic=False)
    optimizers = {net: torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999))
                  for net, lr in ((fake, config.fake_lr), (G, config.lr))}
    prompts = (folder / 'prompts.txt').read_text().splitlines()
    side, (a, sigma) = G.config.sample_size, (table.to(device) for table in (sid_lsg.ALPHA, sid_lsg.SIGMA))

    def encode(texts):
        tokens = tokenizer(texts, padding='max_length', max_length=77, truncation=True, return_tensors='pt')
        return text(tokens.input_ids.to(device))[0]

    def call(net, x, t, texts, kappa):
        if kappa == 1:
            eps = net(x, t, encode(texts)).sample
        else:
            states = torch.cat([encode([''] * len(x)), encode(texts)])
            null, eps = net(torch.cat([x, x]), torch.cat([t, t]), states).sample.chunk(2)
            eps = null + kappa * (eps - null)
        return eps, torch.stack([(x[i] - sigma[t[i]] * eps[i]) / a[t[i]] for i in range(len(x))])

    def noised(x, eps, t):
        return torch.stack([a[t[i]] * x[i] + sigma[t[i]] * eps[i] for i in range(len(x))])

    def picture(z, texts):
        return call(G, sigma[config.t_init] * z, torch.full((len(z),), config.t_init, device=device), texts, 1)[1]

    def iterate(number):
        losses = [0.0, 0.0]
        for half, net in enumerate((fake, G)):
            fake.requires_grad_(net is fake)
            for rows in torch.arange(config.batch).split(config.micro_batch):
                texts, z, t, eps = sid_lsg.draw_samples(
                    config, prompts, lambda texts: texts, (4, side, side), device, number, half, rows)
                with sid_lsg.autocast(config.precision, device):
                    with torch.set_grad_enabled(net is G):
                        x_g = picture(z, texts)
                    if net is fake:
                        loss = (call(fake, noised(x_g, eps, t), t, texts, config.kappa[0])[0] - eps).square().sum()
                    else:
                        x_t = noised(x_g, eps, t)
                        x_psi = call(fake, x_t, t, texts, config.kappa[1])[1]
                        x_phi = call(teacher, x_t, t, texts, config.kappa[2])[1]
                        w = (x_g - x_phi).detach().abs().mean((1, 2, 3), keepdim=True)
                        loss = ((x_phi - x_psi) * (x_phi - x_g - config.alpha * (x_phi - x_psi)) / w).sum()
                    loss = loss / config.batch
                loss.backward()
                losses[half] += loss.item()
            for p in net.parameters():
                torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
            optimizers[net].step()
            optimizers[net].zero_grad(set_to_none=True)
        with torch.no_grad():
            beta = sid_lsg.ema_beta(config, number * config.batch)
            for average, p in zip(ema.parameters(), G.parameters()):
                average.copy_(p.lerp(average, beta))
        gc.collect()
        if device.type == 'cuda':
            torch.cuda.empty_cache()
        return losses
    return iterate


# ---------------------------------------------------------------------------------------------------
# Memory

class Storages(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive (`live`), and the most there were (`peak`)."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata)
        return result

    def gone(self, which):
        self.live -= self.known.pop(which)


def predicted_peak(folder, precision='fp32', ema_device='', checkpoint=False, batch=1, kappa=1.5):
    """(bytes of weights, averages and gradients, bytes of GPU memory at the peak) of train() at micro-batch `batch`.

    Found by running the iteration on tensors without content. Not in it: CUDA's own context, cuDNN's
    workspaces, and what the allocator loses between its blocks."""
    like, vae, x, _, context = meta(folder)
    text = clip_text.load(folder, torch.float16).float()
    fixed = sum(w.nbytes for net in (vae, text) for w in net.parameters())
    teacher, G, fake = (copy.deepcopy(like) for _ in range(3))
    cpu = torch.device('cpu')

    def in_fp32(norm):
        return lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs)
    with contextlib.ExitStack() as stack, FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
        # CUDA's autocast runs the norms in fp32, the CPU's does not.
        for name in ('group_norm', 'layer_norm') if precision != 'fp32' else ():
            stack.enter_context(mock.patch.object(F, name, in_fp32(getattr(F, name))))

        for net in (teacher, G, fake):
            dtype = torch.bfloat16 if net is teacher and precision == 'bf16' else torch.float32
            for module in net.modules():
                for name, w in module._parameters.items():
                    if w is not None:
                        module._parameters[name] = torch.nn.Parameter(
                            torch.empty(w.shape, dtype=dtype), requires_grad=net is not teacher)
        averaged = () if ema_device else (G,)
        kept = [torch.empty_like(w) for net in (*averaged, G, fake) for w in net.parameters()]    # and Adam's squares
        if checkpoint:
            for net in (teacher, G, fake):
                sid_lsg.recompute_in_backward(net)
        state = storages.live
        z, context, null = (torch.empty(n, *y.shape[1:]) for n, y in ((batch, x), (batch, context), (1, context)))
        eps, t = torch.empty_like(z), torch.empty(batch, dtype=torch.int64)
        for half in 'psi', 'psi', 'theta', 'theta':     # of the second micro-batch gradients of the first are there
            with sid_lsg.autocast(precision, cpu), torch.set_grad_enabled(half == 'theta'):
                x_g = sid_lsg.generate(G, z, context)
            with sid_lsg.autocast(precision, cpu):
                if half == 'psi':
                    loss = sid_lsg.fake_score_loss(fake, x_g, t, eps, context, null, kappa)
                else:
                    fake.requires_grad_(False)
                    for w in fake.parameters():
                        w.grad = None
                    x_t = sid_lsg.add_noise(x_g, eps, t)
                    x_psi, x_phi = (sid_lsg.predict_x0(sid_lsg.guided(net, x_t, t, context, null, kappa), x_t, t)
                                    for net in (fake, teacher))
                    loss = sid_lsg.generator_loss(x_g, x_phi, x_psi, 1.0)
            loss.backward()
            del loss, x_g
    gradients = sum(w.nbytes for w in like.parameters())
    return fixed + state + gradients, fixed + storages.peak


# ---------------------------------------------------------------------------------------------------
# Rows

def unet_row(table, args):
    """one call of the UNet, without gradients"""
    from diffusers import UNet2DConditionModel
    device, exact, wrong = table.device, None, []
    net, _, x, t, context = meta(args.folder)
    batch = 8 if device.type == 'cuda' else 1
    with torch.no_grad():
        count = batch * flops(lambda: net(x, t, context))
    rng = torch.Generator().manual_seed(0)
    x, context = (torch.randn(batch, *y.shape[1:], generator=rng).to(device) for y in (x, context))
    t = torch.full((batch,), 625, device=device)
    for precision in precisions(device):
        for compiled in (False, True) if args.compile and precision == 'bf16' else (False,):
            dtype = DTYPES[precision]
            ours = unet.load(args.folder, dtype).to(device, memory_format=torch.channels_last)
            theirs = UNet2DConditionModel.from_pretrained(
                args.folder, subfolder='unet', dtype=dtype).to(device)
            for net in (ours, theirs) if compiled else ():
                net.compile(dynamic=False)

            @torch.no_grad()
            def left():
                return ours(x, t, context)

            @torch.no_grad()
            def right():
                return theirs(x.to(dtype), t, context.to(dtype)).sample
            exact = left() if exact is None else exact
            off = [error(side(), exact) for side in (left, right)]
            a, b = beside([left, right], device, args.repeat)
            table.row(f'UNet, {batch} x {8 * x.shape[2]} px, {precision}{", compiled" * compiled}', precision, a, b,
                      0.9 if compiled else 1.0, count, f'off by {off[0]:.0e}, diffusers {off[1]:.0e}')
            if max(off) >= (1e-5 if precision == 'fp32' else 0.05):
                wrong.append((precision, off))
            del ours, theirs
            free(device)
    assert not wrong, wrong                     # at the end: time on a rented GPU is dear


# Nothing else may happen in this process, whose peak of memory is compared.
DRAW = """
import sys, torch
sys.path.insert(0, 'tests')
import bench
make, folder, precision, device, side, repeat = sys.argv[1:]
device = torch.device(device)
_, draw = getattr(bench, make)(bench.Path(folder), bench.DTYPES[precision], device)
print(bench.beside([lambda: draw([bench.PROMPT], int(side))], device, int(repeat))[0], bench.peak_memory())
"""


def picture_row(table, args):
    """CPU: a picture, text to uint8 in one step, each side in a process of its own for the peak of memory"""
    precision, side = precisions(table.device)[-1], 8 * meta(args.folder)[2].shape[2]
    found = {'generator': [], 'pipeline': []}
    for _ in range(2):
        for make, results in found.items():
            said = process([sys.executable, '-c', DRAW, make, args.folder, precision, table.device, side, args.repeat])
            results.append([float(number) for number in said.split()[-2:]])
    (a, ours), (b, theirs) = ([statistics.median(column) for column in zip(*rows)] for rows in found.values())
    table.row(f'text to uint8, {side} px, one step, {precision}', precision, a, b, 0.85, picture_flops(args.folder),
              f'peak memory {ours:.2f} GB, diffusers {theirs:.2f} GB')


def iteration_row(table, args):
    """a training iteration, beside the same mathematics arranged as the official loop arranges it"""
    device, cases = table.device, [] if args.small else [('tiny teacher', TINY, dict(precision='fp32'))]
    cuda = device.type == 'cuda'
    turns, each = (2, args.repeat) if cuda else (args.repeat, 2)    # to load, and to compile, takes minutes there
    if cuda or args.small:
        cases.append((args.folder.name, args.folder, dict(
            batch=args.batch, micro_batch=args.micro_batch, precision=precisions(device)[-1], compile=args.compile)))
    for name, folder, settings in cases:
        ours, theirs, off = [], [], []
        for _ in range(turns):
            free(device)
            config, times, losses = train(each, args.work, teacher=str(folder), device=str(device),
                                          prompts=str(folder / 'prompts.txt'), **settings)
            ours += times
            if cuda:                            # what is known if time or memory runs out on the other side
                print(f'{name}: {statistics.median(times):.3f} s', flush=True)
            free(device)
            iterate = official(folder, config, device)
            expected = iterate(0)
            # The generator's loss may be near zero; the fake net's, a sum of squares over the same numbers, is not.
            off += [abs(x - y) / max(abs(y), expected[0]) for x, y in zip(losses, expected)]
            theirs += [seconds(lambda: iterate(i), device) for i in range(1, each + 1)]
            del iterate
        a, b = statistics.median(ours), statistics.median(theirs)
        table.row(f'training iteration, {name}, batch {config.batch}, {config.precision}'
                  f'{", compiled" * config.compile}', config.precision, a, b, 0.6 if folder == TINY else 0.9,
                  config.batch * training_flops(folder, config.kappa), f'{1000 / config.batch * a:.1f} s per 1,000 images, '
                  f'losses off by {max(off):.0e}')
        assert all(x < (1e-4 if config.precision == 'fp32' else 0.02) for x in off), off


THEIRS = """
import sys, torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
disable_progress_bar()
folder, dtype, device, prompt, path = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
pipe(prompt, height=64, width=64, timesteps=[625], guidance_scale=1.0).images[0].save(path)
"""


def start_row(table, args):
    """from the start of the process to a picture on disk, one of 64 px, so that loading is what counts"""
    cases = [('tiny teacher', TINY, 'fp32')]
    cases += [(args.folder.name, args.folder, precision) for precision in precisions(table.device)]
    for name, folder, precision in cases:
        out = args.work / 'start'
        ours = [sys.executable, 'sid_lsg.py', 'sample', PROMPT, '--generator', folder, '--size', 64, '--device',
                table.device, '--precision', precision, '--out', out / 'ours']
        theirs = [sys.executable, '-c', THEIRS, folder, str(DTYPES[precision]).split('.')[1], table.device, PROMPT,
                  out / 'theirs.png']

        def left():
            shutil.rmtree(out, ignore_errors=True)
            process(ours)
        # The turn that does not count brings the weights into the page cache.
        a, b = beside([left, lambda: process(theirs)], table.device, args.repeat)
        table.row(f'sample, start to picture, {name}, {precision}', precision, a, b, 0.5)


# A process each, since what one keeps of memory, or has ever held, stays. Plainly: without the trick.
DECODE = """
import sys, torch
sys.path.insert(0, 'tests')
import bench
from bench import F, sid_lsg, vae_module
folder, side, plainly = bench.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == 'plainly'
def forward(self, x):
    h = self.conv1(F.silu(self.norm1(x)))
    h = self.conv2(F.silu(self.norm2(h)))
    return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
if plainly:
    vae_module.ResnetBlock.forward = forward
else:
    sid_lsg.choose_device('cpu')
vae, z = sid_lsg.place(vae_module.load(folder), torch.device('cpu')), torch.randn(1, 4, side, side)
with torch.no_grad():
    print(bench.beside([lambda: vae.decode(z)], torch.device('cpu'), 2)[0], bench.peak_memory())
"""
START = """
import sys, torch
sys.path.insert(0, 'tests')
import bench
from bench import sid_lsg, time, unet
folder, plainly = bench.Path(sys.argv[1]), sys.argv[3] == 'plainly'
device, began = sid_lsg.choose_device('cpu'), time.perf_counter()
net = sid_lsg.place(unet.load(folder, torch.float32 if plainly else None), device)
takes = net.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features
with torch.no_grad():
    net(torch.randn(1, 4, 8, 8), torch.tensor([625]), torch.randn(1, 77, takes))
print(time.perf_counter() - began, bench.peak_memory())
"""


def tricks_row(table, args):
    """what some tricks gain: the same without them"""
    for name, folder in (('tiny teacher', TINY), (args.folder.name, args.folder)):
        net, _, x, t, context = meta(folder)
        with torch.no_grad():
            shared, twice = (flops(lambda: net(x, t.expand(len(x)), torch.cat([context, context])))
                             for x in (x, torch.cat([x, x])))
        print(f'both texts in one call, {name}: {1 - shared / twice:.1%} of FLOPs saved')
    z = torch.randn(1, 4, *x.shape[2:], device=table.device)
    for dtype in map(DTYPES.get, precisions(table.device)):
        vae = vae_module.load(args.folder, dtype).requires_grad_(False).to(table.device)
        last = copy.deepcopy(vae).to(memory_format=torch.channels_last)
        a, b = beside([lambda: last.decode(z), lambda: vae.decode(z)], table.device, args.repeat)
        print(f'VAE in channels_last, {dtype}: {a:.3f} s, else {b:.3f} s, ratio {a / b:.2f}', flush=True)
    for name, program in (('VAE in place and freed memory kept', DECODE), ('UNet from fp16, widened layer by layer', START)):
        found = {'as it is': [], 'plainly': []}
        for _ in range(args.repeat if table.device.type == 'cpu' else 0):
            for how, results in found.items():
                said = process([sys.executable, '-c', program, args.folder, x.shape[2], how])
                results.append([float(number) for number in said.split()[-2:]])
        if found['plainly']:
            (a, less), (b, more) = ([statistics.median(column) for column in zip(*rows)] for rows in found.values())
            print(f'{name}: {a:.3f} s, {less:.2f} GB, else {b:.3f} s, {more:.2f} GB, ratio {a / b:.2f}', flush=True)


def compiled_pictures(table, args, batch, bar):
    precision = precisions(table.device)[-1]
    ours, left = generator(args.folder, DTYPES[precision], table.device)
    theirs, right = pipeline(args.folder, DTYPES[precision], table.device)
    side = 8 * ours[0].sample_size
    for parts in (ours, theirs) if args.compile else ():
        sid_lsg.compile_to_draw(*parts, batch)
    a, b = beside([lambda: left([PROMPT] * batch, side), lambda: right([PROMPT] * batch, side)],
                  table.device, args.repeat)
    table.row(f'text to uint8, {batch} x {side} px, one step, {precision}{", compiled" * args.compile}', precision,
              a, b, bar, batch * picture_flops(args.folder), f'{batch / a:.1f} pictures a second')


def sampling_row(table, args):
    """GPU: text to uint8 in one step, bf16, compiled, many pictures at once"""
    compiled_pictures(table, args, args.pictures, 0.8)


def latency_row(table, args):
    """GPU: the same for a single picture"""
    compiled_pictures(table, args, 1, '15 ms')


def memory_row(table, args):
    """peak memory of training, option by option: counted, and on a GPU measured, where the largest that fits is sought"""
    options, cuda = dict(precision='fp32', batch=1), table.device.type == 'cuda'
    for checkpoint in (False, True):
        count = training_flops(args.folder, (1.5, 1.5, 1.5), checkpoint)
        print(f'an image {"with --checkpoint " * checkpoint}costs {count / 1e12:.4g} TFLOP', flush=True)
    for more in ({}, dict(precision='bf16'), dict(batch=8), dict(checkpoint=True), dict(ema_device='cpu'), dict(batch=1)):
        options |= more
        state, peak = predicted_peak(args.folder, **options)
        measured = ''
        if cuda:
            free(table.device)
            settings = {**options, 'micro_batch': options['batch'], 'batch': 2 * options['batch']}
            train(2, args.work, teacher=str(args.folder), device=str(table.device), **settings)
            most = torch.cuda.max_memory_allocated()
            measured = f', measured {most / 1e9:.1f}, ratio {most / peak:.2f} (bar 0.9 to 1.1)'
        print(f'memory, {options}: at rest {state / 1e9:.1f} GB, counted at the peak '
              f'{peak / 1e9:.1f}{measured}', flush=True)
    for size in (2 ** i for i in range(1, 12) if cuda):
        free(table.device)
        try:
            train(1, args.work, teacher=str(args.folder), device=str(table.device), batch=size, precision='bf16')
        except RuntimeError as error:           # or cuDNN's, which finds no engine for want of memory
            print(f'memory, bf16: micro-batch {size} does not fit: {str(error).splitlines()[0]}')
            break
        print(f'memory, bf16: micro-batch {size} fits', flush=True)


def main(arguments=None):
    rows = {name.removesuffix('_row'): row for name, row in globals().items() if name.endswith('_row')}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='rows:\n' + '\n'.join(f'  {name:10s} {row.__doc__}' for name, row in rows.items()))
    parser.add_argument('rows', nargs='*', help='default: all')
    parser.add_argument('--work', type=Path, default=Path(tempfile.gettempdir()) / 'sid_lsg_bench',
                        help='where the random weights, 2.1 GB, are kept (default: %(default)s)')
    parser.add_argument('--device', default='', help='default: cuda if there is one, else cpu')
    parser.add_argument('--repeat', type=int, default=5, help='turns (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=32, help='of the full-size training iteration (default: %(default)s)')
    parser.add_argument('--micro-batch', type=int, default=8, help='likewise (default: %(default)s)')
    parser.add_argument('--pictures', type=int, default=16, help='at once, in sampling (default: %(default)s)')
    parser.add_argument('--no-compile', action='store_true', help='on a GPU: compiling takes minutes a row')
    parser.add_argument('--small', action='store_true', help='nets of no use but to see that all rows run')
    args = parser.parse_args(arguments)
    unknown = set(args.rows) - set(rows)
    if unknown:
        parser.error(f'no such row: {", ".join(sorted(unknown))}')
    if min(args.repeat, args.pictures, args.micro_batch) < 1 or args.batch % args.micro_batch or args.batch < 1:
        parser.error('expected --repeat and --pictures of 1 or more, --batch a multiple of --micro-batch, not '
                     f'{args.repeat}, {args.pictures}, {args.batch} and {args.micro_batch}')
    if missing := [name for name in ('diffusers', 'transformers') if not importlib.util.find_spec(name)]:
        parser.error(f'{" and ".join(missing)} not found; pip install -r tests/requirements.txt')
    with sid_lsg.user_errors():
        args.work = args.work.resolve()         # the processes are started elsewhere
        args.work.mkdir(parents=True, exist_ok=True)
        table = Table(sid_lsg.choose_device(args.device))
        args.folder = make_folder(args.work, args.small)
    cuda = table.device.type == 'cuda'
    args.compile = cuda and not args.no_compile
    where = (torch.cuda.get_device_name(table.device) if cuda
             else f'{platform.machine()}, {torch.get_num_threads()} threads')
    print(f'{time.strftime("%Y-%m-%d")}, {where}, torch {torch.__version__}', flush=True)
    default = [name for name, row in rows.items() if not row.__doc__.startswith('CPU' if cuda else 'GPU')]
    failed = []
    for name in args.rows or default:
        try:
            rows[name](table, args)
        except (Exception, SystemExit):         # time on a rented GPU is dear: go on
            traceback.print_exc()
            failed.append(name)
        torch.compiler.reset()                  # it compiles a function for eight cases at most
        free(table.device)
    if failed:
        sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
