"""Compare the speed of this project with diffusers, and count the memory that training needs.

    python tests/bench.py                       # all rows
    python tests/bench.py unet start --turns 2  # some of them

Both sides take turns with the same random weights of Stable Diffusion 1.5's size, which are made
once in --work. A row shows median seconds, their ratio, and the bar that the ratio must not exceed.
The ceiling is the speed of a large matrix product in the same precision. Rows also check that both
sides compute the same.
"""

import argparse
import contextlib
import functools
import gc
import io
import os
import platform
import shutil
import signal
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
                  TQDM_DISABLE='1')
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import clip_text
import make_tiny_sd
import sid_lsg
import unet
import vae as vae_module

TINY = make_tiny_sd.TINY
PROMPT = 'a red star above a blue ring on a black background'
DTYPES = sid_lsg.DTYPES


# -------------------------------------------------------------------------------------------------
# Measuring

def wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def free(device):
    """Free the memory that nothing uses any more, and forget its peak."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def seconds(call, device):
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def alternate(calls, device, turns):
    """Return the median seconds of each call, over turns of all of them, after one to warm up."""
    for call in calls:
        call()
    times = [[seconds(call, device) for call in calls] for _ in range(turns)]
    return [statistics.median(column) for column in zip(*times)]


def flops(call):
    """Count the FLOPs of matrix products, convolutions and attention in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@functools.cache
def ceiling(device, precision):
    """Return the FLOP/s of ten products of large matrices."""
    n = 8192 if device.type == 'cuda' else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[precision])
    took, = alternate([lambda: [a @ b for _ in range(10)]], device, 5)
    speed = 10 * 2 * n ** 3 / took
    print(f'ceiling: {speed / 1e12:.3f} TFLOP/s in a {precision} matrix product', flush=True)
    return speed


def print_row(work, ours, theirs, bar, note=''):
    """Print the seconds of both sides."""
    print(f'{work}: {ours:.4f} s, diffusers {theirs:.4f} s, ratio {ours / theirs:.2f} (bar {bar})'
          f'{note}', flush=True)


# -------------------------------------------------------------------------------------------------
# Networks

def copy_tiny(work):
    """Return a copy of the tiny teacher that is also the folder of a generator."""
    shutil.copytree(TINY, work / 'tiny', dirs_exist_ok=True)
    unet.write_json(work / 'tiny' / 'generator.json', {'t_init': 625})
    return work / 'tiny'


def make_sd15(work):
    """Return a folder in SD 1.5's size with random weights in fp16, made once."""
    folder = work / 'sd15'
    if folder.exists():
        return folder
    torch.manual_seed(0)
    new = work / 'unfinished'
    shutil.rmtree(new, ignore_errors=True)
    unet.save(unet.UNet(), new / 'unet', torch.float16)
    vae_module.save(vae_module.VAE(), new / 'vae', torch.float16)
    clip_text.save(clip_text.TextEncoder(), new / 'text_encoder', torch.float16)
    # The tiny teacher's tokenizer, with unused words up to CLIP's 49,408.
    tiny = clip_text.load_tokenizer(TINY)
    unused = {f'word {i}': i for i in range(len(tiny.vocab), 49408)}
    tokenizer = clip_text.Tokenizer({**tiny.vocab, **unused}, tiny.merges)
    make_tiny_sd.write_tokenizer(tokenizer, new / 'tokenizer')
    unet.save_pipeline(new)
    shutil.copy(TINY / 'prompts.txt', new)
    unet.write_json(new / 'generator.json', {'t_init': 625, 'size': 64})
    new.rename(folder)
    return folder


def on_meta(folder):
    """Return UNet, VAE, latents, timestep and text embeddings of an image, on the meta device.

    They have shapes without content, which is enough to count FLOPs."""
    net, vae = (module.load(folder, torch.float16).to('meta').float()
                for module in (unet, vae_module))
    h = net.sample_size
    return (net, vae, torch.zeros(1, 4, h, h, device='meta'),
            torch.zeros(1, dtype=torch.int64, device='meta'),
            torch.zeros(1, clip_text.LENGTH, net.sizes['context_dim'], device='meta'))


def training_flops(folder, kappa, recompute=False):
    """Count the FLOPs of training, per image."""
    net, _, x, t, context = on_meta(folder)
    if recompute:
        sid_lsg.recompute_in_backward(net)

    def forward_and_backward(trains, scale):
        """A network that trains needs gradients of its weights, the others of their input."""
        net.requires_grad_(trains)
        n = 1 if scale in (0, 1) else 2
        latents = x.repeat(n, 1, 1, 1).requires_grad_(not trains)
        return flops(lambda: net(latents, t, context.repeat(n, 1, 1)).sum().backward())
    with torch.no_grad():
        generated = flops(lambda: net(x, t, context))               # in the psi-step
    return (generated + forward_and_backward(True, kappa[0])        # the fake score network
            + forward_and_backward(True, 1)                         # the theta-step: G, fake, ...
            + forward_and_backward(False, kappa[1]) + forward_and_backward(False, kappa[2]))


# -------------------------------------------------------------------------------------------------
# Training iterations, here and as the official code arranges them

class TimedRun(sid_lsg.Run):
    """A run that writes nothing, notes when its iterations end, and stops after `count` + 1."""
    count = 1

    def __init__(self, config):
        self.ends, self.losses = [], []
        super().__init__(config)
        TimedRun.last = self

    def save_images(self, seen):
        pass

    def end_iteration(self, iteration):
        wait(self.device)
        self.ends.append(time.perf_counter())
        self.losses.append([self.log.row[name].item() for name in ('loss_fake', 'loss_G')])
        super().end_iteration(iteration)
        return len(self.ends) > self.count


def train(count, work, **settings):
    """Run sid_lsg.train(). Return its config, the seconds of `count` iterations, and the losses.

    The first iteration, which warms up, is not timed; its losses are returned."""
    out = tempfile.mkdtemp(dir=work)
    config = sid_lsg.train_config(out=out, kimg=1e6, save_kimg=1e6, drop=0.0, **settings)
    TimedRun.count = count
    try:
        with mock.patch.object(sid_lsg, 'Run', TimedRun), contextlib.redirect_stdout(io.StringIO()):
            sid_lsg.train(config)
        ends, losses = TimedRun.last.ends, TimedRun.last.losses[0]
    finally:
        TimedRun.last = None                    # its networks would stay in memory
        signal.signal(signal.SIGINT, signal.default_int_handler)        # a run has its own
        shutil.rmtree(out)
    return config, [b - a for a, b in zip(ends, ends[1:])], losses


def official(folder, config, device):
    """Return a function that runs an iteration on diffusers' networks, as the official code does.

    There every forward pass encodes its prompts, samples are noised and denoised one by one, Adam
    stores a first moment, and memory is collected after each iteration."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel
    text = CLIPTextModel.from_pretrained(folder, subfolder='text_encoder', dtype=torch.float32)
    text.to(device).requires_grad_(False)
    teacher, fake, G, ema = (
        UNet2DConditionModel.from_pretrained(folder, subfolder='unet', dtype=torch.float32)
        .to(device) for _ in range(4))
    teacher.requires_grad_(False)
    ema.requires_grad_(False)
    for net in (teacher, fake, G) if config.compile else ():
        net.compile(dynamic=False)
    optimizers = {net: torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999))
                  for net, lr in ((fake, config.fake_lr), (G, config.lr))}
    prompts = clip_text.read_prompts(folder / 'prompts.txt')
    tokenize = clip_text.load_tokenizer(folder)
    shape = (4, G.config.sample_size, G.config.sample_size)
    a, sigma = sid_lsg.ALPHA.to(device), sid_lsg.SIGMA.to(device)

    def add_noise(x0, eps, t):
        return torch.stack([a[t[i]] * x0[i] + sigma[t[i]] * eps[i] for i in range(len(t))])

    def predict_x0(eps_hat, x_t, t):
        return torch.stack([(x_t[i] - sigma[t[i]] * eps_hat[i]) / a[t[i]] for i in range(len(t))])

    def encoding(net):
        return lambda x, t, tokens: net(x, t, text(tokens)[0]).sample

    def loss_of(half, texts, z, t, eps):
        tokens, null = tokenize(texts).to(device), tokenize(['']).to(device)
        with torch.set_grad_enabled(half == 'G'):
            x_g = sid_lsg.generate(encoding(G), z, tokens, config.t_init)
        if half == 'fake':
            return sid_lsg.fake_score_loss(
                encoding(fake), x_g, t, eps, tokens, null, config.kappa[0])
        x_t = add_noise(x_g, eps, t)
        x_psi, x_phi = (
            predict_x0(sid_lsg.guided(encoding(net), x_t, t, tokens, null, kappa), x_t, t)
            for net, kappa in ((fake, config.kappa[1]), (teacher, config.kappa[2])))
        return sid_lsg.generator_loss(x_g, x_phi, x_psi, config.alpha)

    def iterate(iteration):
        losses = []
        for half, net in (('fake', fake), ('G', G)):
            fake.requires_grad_(half == 'fake')
            losses.append(0.0)
            for indices in torch.arange(config.batch).split(config.micro_batch):
                texts, z, _, t, eps = sid_lsg.draw_samples(
                    config, prompts, shape, iteration, half, indices)
                with torch.autocast(device.type, DTYPES[config.precision],
                                    enabled=config.precision != 'fp32'):
                    loss = loss_of(half, texts, *(x.to(device) for x in (z, t, eps)))
                loss = loss * len(indices) / config.batch
                loss.backward()
                losses[-1] += loss.item()
            for p in net.parameters():
                torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
            optimizers[net].step()
            optimizers[net].zero_grad(set_to_none=True)
        sid_lsg.update_ema(ema, G, sid_lsg.ema_beta(config, iteration * config.batch))
        gc.collect()
        if device.type == 'cuda':
            torch.cuda.empty_cache()
        return losses
    patched = mock.patch.multiple(sid_lsg, add_noise=add_noise, predict_x0=predict_x0)
    return patched(iterate)


# -------------------------------------------------------------------------------------------------
# Memory

class Storages(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are in use (`live`), and their `peak`."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.remove, storage._cdata)
        return result

    def remove(self, key):
        self.live -= self.known.pop(key)


def count_memory(folder, precision='fp32', ema_device='', recompute=False, batch=1, kappa=1.5):
    """Return the peak of train()'s memory on a GPU, in GB, for micro-batches of `batch` images.

    Counted on tensors without content, in an iteration of two micro-batches. Not included are
    CUDA's own memory, cuDNN's workspaces, and gaps between allocations."""
    like, vae, x, _, context = on_meta(folder)
    text = clip_text.load(folder, torch.float16).float()
    fixed = sum(w.nbytes for net in (vae, text) for w in net.parameters())

    def in_fp32(norm):
        return lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs)
    with (contextlib.ExitStack() as stack, FakeTensorMode(allow_non_fake_inputs=True),
          Storages() as storages):
        # CUDA's autocast runs the norms in fp32, that of the CPU does not.
        for name in ('group_norm', 'layer_norm') if precision != 'fp32' else ():
            stack.enter_context(mock.patch.object(F, name, in_fp32(getattr(F, name))))
        G, fake = unet.UNet(**like.sizes), unet.UNet(**like.sizes)
        torch.set_default_dtype(torch.bfloat16 if precision == 'bf16' else torch.float32)
        teacher = unet.UNet(**like.sizes).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        for net in (teacher, G, fake) if recompute else ():
            sid_lsg.recompute_in_backward(net)
        copied = (G, fake) if ema_device else (G, fake, G)      # Adam's second moments, and EMA
        kept = [torch.empty_like(w) for net in copied for w in net.parameters()]
        storages.peak = storages.live
        z, context, null = (torch.empty(n, *like.shape[1:])
                            for n, like in ((batch, x), (batch, context), (1, context)))
        eps, t = torch.empty_like(z), torch.empty(batch, dtype=torch.int64)
        autocast = torch.autocast('cpu', DTYPES[precision], enabled=precision != 'fp32')
        for half in ('fake', 'fake', 'G', 'G'):
            with autocast, torch.set_grad_enabled(half == 'G'):
                x_g = sid_lsg.generate(G, z, context)
            with autocast:
                if half == 'fake':
                    loss = sid_lsg.fake_score_loss(fake, x_g, t, eps, context, null, kappa)
                else:
                    fake.requires_grad_(False)
                    fake.zero_grad()
                    x_t = sid_lsg.add_noise(x_g, eps, t)
                    x_psi, x_phi = (sid_lsg.predict_x0(
                        sid_lsg.guided(net, x_t, t, context, null, kappa), x_t, t)
                        for net in (fake, teacher))
                    loss = sid_lsg.generator_loss(x_g, x_phi, x_psi, 1.0)
            loss.backward()
            del loss, x_g
        del kept
    return (fixed + storages.peak) / 1e9


# -------------------------------------------------------------------------------------------------
# Rows

def unet_row(args):
    """a forward pass of the UNet"""
    from diffusers import UNet2DConditionModel
    device, dtype = args.device, DTYPES[args.precision]
    net, _, x, t, context = on_meta(args.folder)
    batch = 8 if device.type == 'cuda' else 1
    with torch.no_grad():
        count = batch * flops(lambda: net(x, t, context))
    rng = torch.Generator().manual_seed(0)
    x, context = (torch.randn(batch, *like.shape[1:], generator=rng).to(device, dtype)
                  for like in (x, context))
    t = torch.full((batch,), 625, device=device)
    ours = sid_lsg.place(unet.load(args.folder, dtype), device)
    theirs = UNet2DConditionModel.from_pretrained(
        args.folder, subfolder='unet', dtype=dtype).to(device)
    if args.compile:
        ours.compile(dynamic=False)
        theirs.compile(dynamic=False)
    with torch.no_grad():
        y, expected = ours(x, t, context), theirs(x, t, context).sample
        difference = ((y - expected).abs().max() / expected.abs().max()).item()
        a, b = alternate([lambda: ours(x, t, context), lambda: theirs(x, t, context).sample],
                         device, args.turns)
    print_row(f'UNet, {batch} x {8 * x.shape[2]} px, {args.precision}', a, b,
              0.9 if args.compile else 1.0,
              f', {count / a / ceiling(device, args.precision):.0%} of ceiling')
    assert difference < (1e-4 if args.precision == 'fp32' else 0.05), difference


@torch.no_grad()
def image_row(args):
    """prompts to uint8 images in one step"""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    device, dtype, prompts = args.device, DTYPES[args.precision], args.images * [PROMPT]
    net, vae, x, t, context = on_meta(args.folder)
    count = args.images * flops(lambda: vae.decode(net(x, t, context)))
    net = sid_lsg.place(unet.load(args.folder, dtype), device)
    vae = sid_lsg.place(vae_module.load(args.folder, dtype), device)
    encode = sid_lsg.PromptEncoder(args.folder, '', net, device, dtype)
    pipe = StableDiffusionPipeline.from_pretrained(args.folder, dtype=dtype).to(device)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def ours():
        sid_lsg.sample_images(lambda z, noise, context: sid_lsg.generate(net, z, context), vae,
                              encode(prompts), range(args.images), tuple(x.shape[1:]))

    def theirs():
        pipe(prompts, timesteps=[625], guidance_scale=1.0)
    a, b = alternate([ours, theirs], device, args.turns)
    print_row(f'{args.images} x {8 * x.shape[2]} px in one step, {args.precision}', a, b, 1.0,
              f', {count / a / ceiling(device, args.precision):.0%} of ceiling')


def iteration_row(args):
    """a training iteration, compared with the arrangement of the official code"""
    device, cases = args.device, [(TINY, {}, 0.65)]
    if device.type == 'cuda' and not args.tiny:     # on a CPU it would take many minutes
        cases.append((args.folder, dict(
            batch=2 * args.micro_batch, micro_batch=args.micro_batch, precision=args.precision,
            compile=args.compile), 0.9))
    for folder, settings, bar in cases:
        ours, theirs = [], []
        for _ in range(args.turns):
            free(device)
            config, times, losses = train(2, args.work, teacher=str(folder), device=str(device),
                                          **settings)
            ours += times
            free(device)
            iterate = official(folder, config, device)
            expected = iterate(0)
            theirs += [seconds(lambda: iterate(i), device) for i in (1, 2)]
            del iterate
            # The generator's loss can be near zero; the other one shows the scale of the sums.
            off = max(abs(x - y) for x, y in zip(losses, expected)) / expected[0]
            assert off < (1e-4 if config.precision == 'fp32' else 0.02), (losses, expected)
        a, b = statistics.median(ours), statistics.median(theirs)
        count = config.batch * training_flops(folder, config.kappa)
        print_row(f'training iteration, {folder.name}, batch {config.batch}, {config.precision}',
                  a, b, bar, f', {count / a / ceiling(device, config.precision):.0%} of ceiling')


THEIRS = """
import sys, torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
folder, dtype, device, prompt, path = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
pipe(prompt, height=64, width=64, timesteps=[625], guidance_scale=1.0).images[0].save(path)
"""


def start_row(args):
    """`sample` from its start to an image of 64 px on the disk, most of which is loading"""
    out = args.work / 'start'
    for folder in sorted({copy_tiny(args.work), args.folder}):
        ours = ['sid_lsg.py', 'sample', PROMPT, '--generator', folder, '--device', args.device,
                '--precision', args.precision, '--out', out]
        theirs = ['-c', THEIRS, folder, str(DTYPES[args.precision])[6:], args.device, PROMPT,
                  args.work / 'start.png']

        def start(words):
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, cwd=ROOT,
                           check=True)
        # The turn that warms up brings the weights into the page cache.
        a, b = alternate([lambda: start(ours), lambda: start(theirs)], args.device, args.turns)
        print_row(f'start of sample, {folder.name}, {args.precision}', a, b, 0.7)


def memory_row(args):
    """the memory of training with several options: counted, and measured if there is a GPU"""
    for recompute in (False, True):
        count = training_flops(args.folder, (1.5, 1.5, 1.5), recompute) / 1e12
        print(f'training, recompute {recompute}: {count:.4g} TFLOP per image', flush=True)
    options = dict(precision='fp32', batch=1)
    for more in ({}, dict(precision='bf16'), dict(batch=8), dict(recompute=True),
                 dict(ema_device='cpu'), dict(batch=1)):
        options |= more
        peak = count_memory(args.folder, **options)
        measured = ''
        if args.device.type == 'cuda':
            free(args.device)
            train(2, args.work, teacher=str(args.folder), device=str(args.device),
                  **{**options, 'micro_batch': options['batch'], 'batch': 2 * options['batch']})
            gigabytes = torch.cuda.max_memory_allocated(args.device) / 1e9
            measured = f', measured {gigabytes:.1f}, ratio {gigabytes / peak:.2f}'
        print(f'peak of memory, {options}: {peak:.1f} GB{measured}', flush=True)


# -------------------------------------------------------------------------------------------------

def main(arguments=None):
    rows = {'unet': unet_row, 'image': image_row, 'iteration': iteration_row, 'start': start_row,
            'memory': memory_row}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='rows:\n' + '\n'.join(f'  {name:10s} {row.__doc__}' for name, row in rows.items()))
    parser.add_argument('rows', nargs='*', metavar='ROW', help='default: all')
    parser.add_argument('--work', type=Path, default=Path(tempfile.gettempdir(), 'sid_lsg_bench'),
                        help='folder of the random weights, 2.1 GB (default: %(default)s)')
    parser.add_argument('--device', default='', help='default: cuda if available')
    parser.add_argument('--precision', choices=[*DTYPES], default='fp32', help='default: fp32')
    parser.add_argument('--turns', type=int, default=5, help='default: 5')
    parser.add_argument('--micro-batch', type=int, default=8,
                        help='half the batch of the iteration at full size (default: 8)')
    parser.add_argument('--images', type=int, default=1, help='sampled at a time (default: 1)')
    parser.add_argument('--compile', action='store_true', help='torch.compile, which takes minutes')
    parser.add_argument('--tiny', action='store_true', help='only the tiny teacher, to try it out')
    args = parser.parse_args(arguments)
    try:
        unet.check(set(args.rows) <= set(rows), f'a row must be one of {", ".join(rows)}')
        unet.check(min(args.turns, args.images) > 0, '--turns and --images must be above 0')
        args.work = args.work.resolve()
        args.work.mkdir(parents=True, exist_ok=True)
        args.device = sid_lsg.choose_device(args.device)
        args.folder = copy_tiny(args.work) if args.tiny else make_sd15(args.work)
    except (unet.UserError, OSError) as problem:
        print(f'bench: {problem}', file=sys.stderr)
        sys.exit(2)
    hardware = f'{platform.machine()}, {torch.get_num_threads()} threads'
    if args.device.type == 'cuda':
        hardware = torch.cuda.get_device_name(args.device)
    print(f'{time.strftime("%Y-%m-%d")}, {hardware}, torch {torch.__version__}', flush=True)
    failed = []
    for name in args.rows or rows:
        try:
            rows[name](args)
        except Exception:               # one row must not cost the others on a rented GPU
            traceback.print_exc()
            failed.append(name)
        torch.compiler.reset()          # compiled code of one row would count for the next
        free(args.device)
    if failed:
        sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
