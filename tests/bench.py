"""Compare the speed of this project with diffusers, and count the memory that training needs.

    python tests/bench.py                       # all rows
    python tests/bench.py unet start --turns 2  # some of them
    python tests/bench.py first                 # ten minutes on a new GPU, without diffusers

Both sides take turns with the same random weights of Stable Diffusion 1.5's size, which are made
once in --work. A row shows median seconds, their ratio, and the bar that the ratio must not exceed.
The ceiling is the speed of a large matrix product in the same precision.
"""

import argparse
import contextlib
import gc
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', DIFFUSERS_VERBOSITY='error',
                  TQDM_DISABLE='1')
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
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


def alternate(calls, device, turns):
    """Return the median seconds of each call, over turns of all of them, after one to warm up."""
    times = []
    for call in (turns + 1) * calls:
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    n = len(calls)
    return [statistics.median(times[n + i::n]) for i in range(n)]


def compare(args, work, bar, ours, theirs):
    """Print the median seconds of two calls."""
    seconds = alternate([ours, theirs], args.device, args.turns)
    print_row(f'{work}, {args.precision}', bar, *seconds)


def print_row(work, bar, ours, theirs):
    print(f'{work}: {ours:.4f} s, diffusers {theirs:.4f} s, ratio {ours / theirs:.2f} (bar {bar})',
          flush=True)


# -------------------------------------------------------------------------------------------------
# Networks

def copy_tiny(work):
    """Return a copy of the tiny teacher that is also the folder of a generator, with DDPM."""
    shutil.copytree(TINY, work / 'tiny', dirs_exist_ok=True)
    unet.save_pipeline(work / 'tiny')
    unet.write_json(work / 'tiny' / 'generator.json', {'t_init': 625})
    return work / 'tiny'


def make_sd15(work):
    """Return a folder in SD 1.5's size with random weights in fp16, made once."""
    folder = work / 'sd15'
    if (folder / 'generator.json').exists():        # which is written last
        return folder
    torch.manual_seed(0)
    unet.save(unet.UNet(), folder / 'unet', torch.float16)
    vae_module.save(vae_module.VAE(), folder / 'vae', torch.float16)
    clip_text.save(clip_text.TextEncoder(), folder / 'text_encoder', torch.float16)
    # The tiny teacher's tokenizer, with unused words up to CLIP's 49,408.
    tiny = clip_text.load_tokenizer(TINY)
    unused = {f'word {i}': i for i in range(len(tiny.vocab), 49408)}
    tokenizer = clip_text.Tokenizer({**tiny.vocab, **unused}, tiny.merges)
    make_tiny_sd.write_tokenizer(tokenizer, folder / 'tokenizer')
    unet.save_pipeline(folder)
    shutil.copy(TINY / 'prompts.txt', folder)
    unet.write_json(folder / 'generator.json', {'t_init': 625, 'size': 64})
    return folder


# -------------------------------------------------------------------------------------------------
# Training iterations, here and as the official code arranges them

class TimedRun(sid_lsg.Run):
    """A run that writes nothing, but notes when its iterations end, and their losses."""

    def save_images(self, seen):
        pass

    def end_iteration(self, iteration):
        self.losses.append([self.log.row.pop(name).item() for name in ('loss_fake', 'loss_G')])
        wait(self.device)
        self.ends.append(time.perf_counter())


class OfficialRun(TimedRun):
    """The arrangement of the official code, on diffusers' networks.

    There every forward pass encodes its prompts, Adam stores a first moment, and memory is
    collected after each iteration."""

    def __init__(self, config):
        super().__init__(config)
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        def load(network, folder):
            net = network.from_pretrained(config.teacher, subfolder=folder, dtype=torch.float32)
            return net.to(self.device)
        text = load(CLIPTextModel, 'text_encoder').requires_grad_(False)

        def encoding(forward):
            return lambda x, t, tokens: forward(x, t, text(tokens)[0]).sample
        for name in ('teacher', 'G', 'ema', 'fake'):
            net = load(UNet2DConditionModel, 'unet').requires_grad_(name in ('G', 'fake'))
            net.forward = encoding(net.forward)
            setattr(self, name, net)
        tokenize = self.encoder.tokenizer
        self.encode = lambda texts: tokenize(texts).to(self.device)
        self.null = self.encode([''])
        self.optimizers = {
            name: torch.optim.Adam(getattr(self, name).parameters(), lr, betas=(0.0, 0.999))
            for name, lr in (('fake', config.fake_lr), ('G', config.lr))}

    def update(self, name):
        for p in getattr(self, name).parameters():
            torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def end_iteration(self, iteration):
        free(self.device)
        super().end_iteration(iteration)


def train(run, args, **settings):
    """Run three iterations of sid_lsg.train() with a subclass of Run.

    Returns the losses of the first iteration, and the seconds of the other two."""
    run.ends, run.losses = [], []
    with (tempfile.TemporaryDirectory(dir=args.work) as out, mock.patch.object(sid_lsg, 'Run', run),
          contextlib.redirect_stdout(io.StringIO())):
        config = sid_lsg.train_config(out=out, device=str(args.device), drop=0.0, **settings)
        config.kimg = 3 * config.batch / 1000
        sid_lsg.train(config)
    first, second, third = run.ends
    return run.losses[0], [second - first, third - second]


# -------------------------------------------------------------------------------------------------
# Counting

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


class RunWithoutContent(sid_lsg.Run):
    """One iteration with networks of the sizes of `like`, on tensors that have a shape only.

    The generator makes the given number of steps."""
    first, iterations, device = 0, 1, torch.device('cpu')

    def __init__(self, like, config, steps):
        self.config, batch = config, config.micro_batch
        self.G, self.ema, self.fake = (unet.UNet(**like.sizes) for _ in range(3))
        torch.set_default_dtype(torch.bfloat16 if config.precision == 'bf16' else torch.float32)
        self.teacher = unet.UNet(**like.sizes).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        for net in (self.teacher, self.G, self.fake) if config.recompute else ():
            sid_lsg.recompute_in_backward(net)
        # Adam keeps second moments.
        self.kept = [torch.empty_like(w) for net in (self.G, self.fake) for w in net.parameters()]
        shape = 4, like.sample_size, like.sample_size
        self.z, self.eps = torch.empty(batch, *shape), torch.empty(batch, *shape)
        self.context, self.null = (torch.empty(n, clip_text.LENGTH, like.sizes['context_dim'])
                                   for n in (batch, 1))
        self.t = torch.empty(batch, dtype=torch.int64)
        self.micro_batches = range(config.batch // batch)
        self.log = SimpleNamespace(add=lambda **numbers: None)
        noise = [torch.empty_like(self.z) for _ in range(steps - 1)]
        self.draw = lambda *_: (self.context, self.z, noise, self.t, self.eps)
        self.update = lambda name: getattr(self, name).zero_grad()
        self.end_iteration = self.close = lambda *_: None


def train_without_content(like, config, steps):
    with mock.patch.object(sid_lsg, 'Run', lambda config: RunWithoutContent(like, config, steps)):
        sid_lsg.train(config)


def training_flops(folder, config):
    """Count the FLOPs of matrix products, convolutions and attention in training, per image.

    A generator of several steps makes each number of them equally often."""
    like, config = unet.load(folder), replace(config, precision='fp32')
    # Other kinds of attention are not counted on every device.
    with (torch.device('meta'), sdpa_kernel(SDPBackend.MATH),
          FlopCounterMode(display=False) as counter):
        for steps in range(1, config.steps + 1):
            train_without_content(like, config, steps)
    return counter.get_total_flops() / config.batch / config.steps


def training_memory(folder, config):
    """Return the peak of train()'s memory on a GPU, in GB, but for CUDA's and cuDNN's own."""
    like, *others = (module.load(folder) for module in (unet, vae_module, clip_text))
    fixed = sum(w.nbytes for net in others for w in net.parameters())

    def in_fp32(norm):
        return lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs)
    with (contextlib.ExitStack() as stack, FakeTensorMode(allow_non_fake_inputs=True),
          Storages() as storages):
        # CUDA's autocast runs the norms in fp32, that of the CPU does not.
        for name in ('group_norm', 'layer_norm') if config.precision != 'fp32' else ():
            stack.enter_context(mock.patch.object(F, name, in_fp32(getattr(F, name))))
        train_without_content(like, config, config.steps)
    ema = sum(w.nbytes for w in like.parameters()) if config.ema_device else 0
    return (fixed + storages.peak - ema) / 1e9


# -------------------------------------------------------------------------------------------------
# Rows

def unet_row(args):
    from diffusers import UNet2DConditionModel
    device, dtype = args.device, DTYPES[args.precision]
    ours = sid_lsg.place(unet.load(args.folder, dtype), device)
    theirs = UNet2DConditionModel.from_pretrained(
        args.folder, subfolder='unet', dtype=dtype).to(device)
    batch, h = 8 if device.type == 'cuda' else 1, ours.sample_size
    torch.manual_seed(0)
    x = torch.randn(batch, 4, h, h).to(device, dtype)
    context = torch.randn(batch, clip_text.LENGTH, ours.sizes['context_dim']).to(device, dtype)
    t = torch.full((batch,), 625, device=device)
    with torch.no_grad():
        compare(args, f'UNet, {batch} x {8 * h} px', 1.0, lambda: ours(x, t, context),
                lambda: theirs(x, t, context))


def one_step(args, dtype, prompts):
    """Return a function that makes uint8 images of prompts in one step."""
    net = sid_lsg.place(unet.load(args.folder, dtype), args.device)
    vae = sid_lsg.place(vae_module.load(args.folder, dtype), args.device)
    encode = sid_lsg.PromptEncoder(args.folder, '', net, args.device, dtype)
    return lambda: sid_lsg.sample_images(
        lambda z, noise, context: sid_lsg.generate(net, z, context), vae, encode(prompts),
        range(len(prompts)), sid_lsg.latent_shape(0, net, vae))


def image_row(args):
    from diffusers import StableDiffusionPipeline
    dtype = DTYPES[args.precision]
    pipe = StableDiffusionPipeline.from_pretrained(args.folder, dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    compare(args, 'image in one step', 1.0, one_step(args, dtype, [PROMPT]),
            lambda: pipe(PROMPT, timesteps=[625], guidance_scale=1.0))


def iteration_row(args):
    """a training iteration, compared with the arrangement of the official code"""
    cases = [(TINY, dict(precision='fp32'), 0.65)]
    if args.device.type == 'cuda' and not args.tiny:    # on a CPU it would take many minutes
        cases.append((args.folder, dict(batch=16, micro_batch=8, precision=args.precision), 0.9))
    for folder, settings, bar in cases:
        seconds, losses = {TimedRun: [], OfficialRun: []}, {}
        for run in args.turns * [*seconds]:
            free(args.device)
            losses[run], times = train(run, args, teacher=str(folder), **settings)
            seconds[run] += times
        ours, theirs = losses.values()
        # The generator's loss can be near zero; the other one shows the scale of the sums.
        off = max(abs(x - y) for x, y in zip(ours, theirs)) / theirs[0]
        assert off < (1e-4 if settings['precision'] == 'fp32' else 0.02), (ours, theirs)
        print_row(f'training iteration, {folder.name}, {settings["precision"]}', bar,
                  *map(statistics.median, seconds.values()))


THEIRS = """
import sys, torch
from diffusers import StableDiffusionPipeline
folder, dtype, device, prompt, path = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
pipe.set_progress_bar_config(disable=True)
pipe(prompt, height=64, width=64, timesteps=[625], guidance_scale=1.0).images[0].save(path)
"""


def start_row(args):
    """`sample` from its start to an image of 64 px on the disk, most of which is loading"""
    for folder in sorted({copy_tiny(args.work), args.folder}):
        ours = [ROOT / 'sid_lsg.py', 'sample', PROMPT, '--generator', folder, '--device',
                args.device, '--precision', args.precision]
        theirs = ['-c', THEIRS, folder, str(DTYPES[args.precision])[6:], args.device, PROMPT,
                  'start.png']

        def start(words):
            subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL,
                           cwd=args.work, check=True)
        # The turn that warms up brings the weights into the page cache.
        compare(args, f'start of sample, {folder.name}', 0.7, lambda: start(ours),
                lambda: start(theirs))


def memory_row(args):
    """the memory of training with several options: counted, and measured if there is a GPU"""
    options = dict(micro_batch=1)
    for more in ({}, dict(precision='bf16'), dict(micro_batch=8), dict(steps=4),
                 dict(steps=1, recompute=True), dict(ema_device='cpu'), dict(micro_batch=1)):
        options |= more
        training(args, options, run=args.device.type == 'cuda')


def training(args, options, run):
    """Print FLOPs and memory of training by counting, and what three eager iterations need."""
    config = sid_lsg.TrainConfig(batch=2 * options['micro_batch'], **options)
    count, peak = training_flops(args.folder, config), training_memory(args.folder, config)
    line = f'training, {options}: {count / 1e12:.4g} TFLOP per image, peak of memory {peak:.4f} GB'
    if run:
        free(args.device)
        _, times = train(TimedRun, args, teacher=str(args.folder), batch=config.batch, **options)
        if args.device.type == 'cuda':
            gigabytes = torch.cuda.max_memory_allocated(args.device) / 1e9
            line += f', measured {gigabytes:.1f}, ratio {gigabytes / peak:.2f}'
        seconds, n = min(times) / config.batch, 8192 if args.device.type == 'cuda' else 1024
        a, b = torch.randn(2, n, n, device=args.device, dtype=DTYPES[config.precision])
        took, = alternate([lambda: [a @ b for _ in range(10)]], args.device, 5)
        share = count / seconds / (10 * 2 * n ** 3 / took)
        line += f', {1000 * seconds:.1f} ms per image, {share:.0%} of ceiling'
    print(line, flush=True)


# -------------------------------------------------------------------------------------------------
# The first hour on a GPU: what must be right, then what may be slow, each printed when it is known

def first(args):
    """Run all rows that need no diffusers: CUDA against the CPU, attention, training, sampling."""
    for row in (first_tests, first_attention, first_training, first_sampling):
        began = time.perf_counter()
        try:
            row(args)
        except (RuntimeError, subprocess.SubprocessError) as problem:   # the other rows still run
            print(f'{row.__name__} failed: {str(problem).splitlines()[0]}', flush=True)
        print(f'  ({row.__name__}: {time.perf_counter() - began:.0f} s)', flush=True)
        free(args.device)


def first_tests(args):
    command = [sys.executable, '-m', 'pytest', '-q', '-k', 'cuda', '-p', 'no:xdist', 'tests']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    last = (result.stdout + result.stderr).strip().splitlines()[-1]
    print(f'CUDA tests against the CPU: {last}', flush=True)


def first_attention(args):
    """Speed, error and NaN of each backend, at the shapes of SD 1.5 with micro-batch 8, guided."""
    backends = dict(cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION,
                    efficient=SDPBackend.EFFICIENT_ATTENTION, default=None)
    batch, shapes = 2, [(64, 40)]
    if args.device.type == 'cuda':
        batch, shapes = 16, [(4096, 40), (1024, 80), (256, 160), (64, 160)]
    for n, d in shapes:
        for length in (n, clip_text.LENGTH):
            q, k, v = (torch.randn(batch, 8, size, d, device=args.device, dtype=torch.bfloat16,
                                   requires_grad=True) for size in (n, length, length))
            exact = F.scaled_dot_product_attention(*(x[:1].detach().float() for x in (q, k, v)))
            for name, backend in backends.items():
                def call():
                    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                        out = F.scaled_dot_product_attention(q, k, v)
                    return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))
                try:
                    results = call()
                    nan = sum(x.isnan().sum().item() for x in results)
                    error = (results[0][:1].float() - exact).abs().max() / exact.abs().max()
                    seconds, = alternate([call], args.device, args.turns)
                    found = (f'forward and backward {1000 * seconds:.2f} ms, error {error:.0e}, '
                             f'{nan} NaN')
                except RuntimeError as problem:
                    found = f'not available ({str(problem).splitlines()[0][:60]})'
                print(f'attention {n} x {length}, d {d}, {name}: {found}', flush=True)


def first_training(args):
    batch = 8 if args.device.type == 'cuda' else 2
    training(args, dict(precision='bf16', micro_batch=batch), run=True)


def first_sampling(args):
    call = one_step(args, torch.bfloat16, 16 * [PROMPT])
    seconds, = alternate([call], args.device, args.turns)
    print(f'sampling 16 images in bf16: {16 / seconds:.1f} per second', flush=True)


ROWS = dict(unet=unet_row, image=image_row, iteration=iteration_row, start=start_row,
            memory=memory_row, first=first)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='*', metavar='ROW',
                        help=', '.join(ROWS) + ' (default: all but first)')
    parser.add_argument('--work', type=Path, default=Path(tempfile.gettempdir(), 'sid_lsg_bench'),
                        help='folder of the random weights, 2.1 GB (default: %(default)s)')
    parser.add_argument('--device', default='', help='default: cuda if available')
    parser.add_argument('--precision', choices=[*DTYPES], default='fp32', help='default: fp32')
    parser.add_argument('--turns', type=int, default=5, help='default: 5')
    parser.add_argument('--tiny', action='store_true', help='only the tiny teacher, to try it out')
    args = parser.parse_args(arguments)
    if not ROWS.keys() >= {*args.rows}:     # argparse would refuse an empty list before Python 3.12
        parser.error(f'ROW must be one of {", ".join(ROWS)}')
    with unet.user_errors('bench'):
        args.work = args.work.resolve()
        args.work.mkdir(parents=True, exist_ok=True)
        args.device = sid_lsg.choose_device(args.device)
        tiny = args.tiny or args.rows == ['first'] and args.device.type == 'cpu'
        args.folder = copy_tiny(args.work) if tiny else make_sd15(args.work)
    for name in args.rows or [*ROWS][:-1]:
        ROWS[name](args)
        free(args.device)


if __name__ == '__main__':
    main()
