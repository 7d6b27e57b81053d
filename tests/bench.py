"""Compare the speed of this project with diffusers, and count the memory that training needs.

    python tests/bench.py                       # all rows
    python tests/bench.py unet start --turns 2  # some of them
    python tests/bench.py first                 # ten minutes on a new GPU, without diffusers

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


def flops(call):
    """Count the FLOPs of matrix products, convolutions and attention in a call."""
    # Other kinds of attention are not counted on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@functools.cache
def ceiling(device, precision):
    """Return the FLOP/s of ten products of large matrices."""
    n = 8192 if device.type == 'cuda' else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[precision])
    took, = alternate([lambda: [a @ b for _ in range(10)]], device, 5)
    return 10 * 2 * n ** 3 / took


def print_row(device, precision, work, ours, theirs, bar, count=0):
    """Print the seconds of both sides, and the speed at which ours did `count` FLOPs."""
    line = f'{work}, {precision}: {ours:.4f} s, diffusers {theirs:.4f} s, '
    line += f'ratio {ours / theirs:.2f} (bar {bar})'
    if count:
        line += f', {count / ours / ceiling(device, precision):.0%} of ceiling'
    print(line, flush=True)


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


# -------------------------------------------------------------------------------------------------
# Training iterations, here and as the official code arranges them

class TimedRun(sid_lsg.Run):
    """A run that writes nothing, but notes when its iterations end, and their losses."""
    ends, losses, replaced = [], [], {}

    def save_images(self, seen):
        pass

    def end_iteration(self, iteration):
        self.losses.append([self.log.row.pop(name).item() for name in ('loss_fake', 'loss_G')])
        wait(self.device)
        self.ends.append(time.perf_counter())


def add_noise_one_by_one(x0, eps, t):
    a, sigma = sid_lsg.schedule_on(t.device)
    return torch.stack([a[t[i]] * x0[i] + sigma[t[i]] * eps[i] for i in range(len(t))])


def predict_x0_one_by_one(eps_hat, x_t, t):
    a, sigma = sid_lsg.schedule_on(t.device)
    return torch.stack([(x_t[i] - sigma[t[i]] * eps_hat[i]) / a[t[i]] for i in range(len(t))])


class OfficialRun(TimedRun):
    """The arrangement of the official code, on diffusers' networks.

    There every forward pass encodes its prompts, samples are noised and denoised one by one, Adam
    stores a first moment, and memory is collected after each iteration."""
    replaced = dict(add_noise=add_noise_one_by_one, predict_x0=predict_x0_one_by_one)

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


def train(run, work, **settings):
    """Run three iterations of sid_lsg.train() with a subclass of Run.

    Returns its config, the losses of the first iteration, and the seconds of the other two."""
    run.ends.clear()
    run.losses.clear()
    with (tempfile.TemporaryDirectory(dir=work) as out, contextlib.redirect_stdout(io.StringIO()),
          mock.patch.multiple(sid_lsg, Run=run, **run.replaced)):
        config = sid_lsg.train_config(out=out, drop=0.0, **settings)
        config.kimg = 3 * config.batch / 1000
        sid_lsg.train(config)
    first, second, third = run.ends
    return config, run.losses[0], [second - first, third - second]


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
    """One iteration with networks of the sizes of `like`, on tensors that have a shape only."""
    first, iterations, device = 0, 1, torch.device('cpu')

    def __init__(self, like, config):
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

    def draw(self, *_):
        return self.context, self.z, [], self.t, self.eps

    def update(self, name):
        getattr(self, name).zero_grad()

    def end_iteration(self, iteration):
        pass

    def close(self):
        pass


def train_without_content(like, config):
    with mock.patch.object(sid_lsg, 'Run', functools.partial(RunWithoutContent, like)):
        sid_lsg.train(config)


def training_flops(folder, config):
    """Count the FLOPs of training, per image."""
    like, config = unet.load(folder), replace(config, precision='fp32')
    with torch.device('meta'):
        return flops(lambda: train_without_content(like, config)) / config.batch


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
        train_without_content(like, config)
    ema = sum(w.nbytes for w in like.parameters()) if config.ema_device else 0
    return (fixed + storages.peak - ema) / 1e9


# -------------------------------------------------------------------------------------------------
# Rows

def unet_row(args):
    """a forward pass of the UNet"""
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
        y, expected = ours(x, t, context), theirs(x, t, context).sample
        difference = ((y - expected).abs().max() / expected.abs().max()).item()
        count = flops(lambda: ours(x, t, context))
        a, b = alternate([lambda: ours(x, t, context), lambda: theirs(x, t, context).sample],
                         device, args.turns)
    print_row(device, args.precision, f'UNet, {batch} x {8 * h} px', a, b, 1.0, count)
    assert difference < (1e-4 if args.precision == 'fp32' else 0.05), difference


@torch.no_grad()
def image_row(args):
    """a prompt to a uint8 image in one step"""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    device, dtype = args.device, DTYPES[args.precision]
    net = sid_lsg.place(unet.load(args.folder, dtype), device)
    vae = sid_lsg.place(vae_module.load(args.folder, dtype), device)
    encode = sid_lsg.PromptEncoder(args.folder, '', net, device, dtype)
    pipe = StableDiffusionPipeline.from_pretrained(args.folder, dtype=dtype).to(device)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def ours():
        sid_lsg.sample_images(lambda z, noise, context: sid_lsg.generate(net, z, context), vae,
                              encode([PROMPT]), [0], sid_lsg.latent_shape(0, net, vae))

    def theirs():
        pipe(PROMPT, timesteps=[625], guidance_scale=1.0)
    a, b = alternate([ours, theirs], device, args.turns)
    print_row(device, args.precision, f'{8 * net.sample_size} px in one step', a, b, 1.0,
              flops(ours))


def iteration_row(args):
    """a training iteration, compared with the arrangement of the official code"""
    device, cases = args.device, [(TINY, {}, 0.65)]
    if device.type == 'cuda' and not args.tiny:     # on a CPU it would take many minutes
        cases.append((args.folder, dict(batch=2 * args.micro_batch, micro_batch=args.micro_batch,
                                        precision=args.precision), 0.9))
    for folder, settings, bar in cases:
        ours, theirs = [], []
        for _ in range(args.turns):
            free(device)
            settings |= dict(teacher=str(folder), device=str(device))
            config, losses, times = train(TimedRun, args.work, **settings)
            ours += times
            free(device)
            _, expected, times = train(OfficialRun, args.work, **settings)
            theirs += times
            # The generator's loss can be near zero; the other one shows the scale of the sums.
            off = max(abs(x - y) for x, y in zip(losses, expected)) / expected[0]
            assert off < (1e-4 if config.precision == 'fp32' else 0.02), (losses, expected)
        a, b = statistics.median(ours), statistics.median(theirs)
        print_row(device, config.precision, f'training iteration, {folder.name}, batch '
                  f'{config.batch}', a, b, bar, config.batch * training_flops(folder, config))


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
        print_row(args.device, args.precision, f'start of sample, {folder.name}', a, b, 0.7)


def memory_row(args):
    """the memory of training with several options: counted, and measured if there is a GPU"""
    options = dict(micro_batch=1)
    for more in ({}, dict(precision='bf16'), dict(micro_batch=8), dict(recompute=True),
                 dict(ema_device='cpu'), dict(micro_batch=1)):
        options |= more
        settings = dict(options, batch=2 * options['micro_batch'])
        config, measured = sid_lsg.TrainConfig(**settings), ''
        count, peak = training_flops(args.folder, config), training_memory(args.folder, config)
        if args.device.type == 'cuda':
            free(args.device)
            train(TimedRun, args.work, teacher=str(args.folder), device=str(args.device),
                  **settings)
            gigabytes = torch.cuda.max_memory_allocated(args.device) / 1e9
            measured = f', measured {gigabytes:.1f}, ratio {gigabytes / peak:.2f}'
        print(f'training, {options}: {count / 1e12:.4g} TFLOP per image, peak of memory '
              f'{peak:.4f} GB{measured}', flush=True)


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
    backends = dict(default=None, cudnn=SDPBackend.CUDNN_ATTENTION,
                    flash=SDPBackend.FLASH_ATTENTION, efficient=SDPBackend.EFFICIENT_ATTENTION)
    on_gpu = args.device.type == 'cuda'
    batch, shapes = 2, [(64, 40)]
    if on_gpu:
        batch, shapes = 16, [(4096, 40), (1024, 80), (256, 160), (64, 160)]
    for n, d in shapes:
        for length in (n, clip_text.LENGTH):
            q, k, v = (torch.randn(batch, 8, size, d, device=args.device, dtype=torch.bfloat16,
                                   requires_grad=True) for size in (n, length, length))
            with torch.no_grad():
                first_q, first_k, first_v = (x[:1].float() for x in (q, k, v))
                exact = (first_q @ first_k.mT * d ** -0.5).softmax(-1) @ first_v
            for name, backend in backends.items():
                def call():
                    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                        out = F.scaled_dot_product_attention(q, k, v)
                    return out, torch.autograd.grad(out.float().square().sum(), (q, k, v))
                try:
                    out, gradients = call()
                    seconds, = alternate([call], args.device, args.turns)
                except RuntimeError as problem:
                    print(f'attention {n} x {length}, d {d}, {name}: not available '
                          f'({str(problem).splitlines()[0][:60]})', flush=True)
                    continue
                error = (out[:1].float() - exact).abs().max() / exact.abs().max()
                nan = sum(x.isnan().sum().item() for x in (out, *gradients))
                print(f'attention {n} x {length}, d {d}, {name}: forward and backward '
                      f'{1000 * seconds:.2f} ms, error {error:.0e}, {nan} NaN', flush=True)


def first_training(args):
    """One eager iteration, and the memory that it needs."""
    batch = args.micro_batch if args.device.type == 'cuda' else 2
    config, _, times = train(
        TimedRun, args.work, teacher=str(args.folder), device=str(args.device), precision='bf16',
        batch=2 * batch, micro_batch=batch)
    args.precision, seconds = 'bf16', min(times)
    speed = training_flops(args.folder, config) * config.batch / seconds
    line = (f'training, eager, bf16, micro-batch {batch}: '
            f'{1000 * seconds / config.batch:.1f} ms per image, '
            f'{speed / ceiling(args.device, "bf16"):.0%} of ceiling, memory counted '
            f'{training_memory(args.folder, config):.1f} GB')
    if args.device.type == 'cuda':
        line += f', measured {torch.cuda.max_memory_allocated(args.device) / 1e9:.1f} GB'
    print(line, flush=True)


@torch.no_grad()
def first_sampling(args):
    net = sid_lsg.place(unet.load(args.folder, torch.bfloat16), args.device)
    vae = sid_lsg.place(vae_module.load(args.folder, torch.bfloat16), args.device)
    encode = sid_lsg.PromptEncoder(args.folder, '', net, args.device, torch.bfloat16)

    def sample():
        sid_lsg.sample_images(lambda z, noise, context: sid_lsg.generate(net, z, context), vae,
                              encode(16 * [PROMPT]), range(16), sid_lsg.latent_shape(0, net, vae))
    seconds, = alternate([sample], args.device, args.turns)
    print(f'sampling 16 images of {8 * net.sample_size} px in bf16: {16 / seconds:.1f} per second',
          flush=True)


ROWS = {'unet': unet_row, 'image': image_row, 'iteration': iteration_row, 'start': start_row,
        'memory': memory_row}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='*', metavar='ROW',
                        help=', '.join(ROWS) + ' (default: all of these), or first')
    parser.add_argument('--work', type=Path, default=Path(tempfile.gettempdir(), 'sid_lsg_bench'),
                        help='folder of the random weights, 2.1 GB (default: %(default)s)')
    parser.add_argument('--device', default='', help='default: cuda if available')
    parser.add_argument('--precision', choices=[*DTYPES], default='fp32', help='default: fp32')
    parser.add_argument('--turns', type=int, default=5, help='default: 5')
    parser.add_argument('--micro-batch', type=int, default=8,
                        help='half the batch of the iteration at full size (default: 8)')
    parser.add_argument('--tiny', action='store_true', help='only the tiny teacher, to try it out')
    args = parser.parse_args(arguments)
    try:
        rows = {**ROWS, 'first': first}
        unet.check(set(args.rows) <= set(rows), f'a row must be one of {", ".join(rows)}')
        args.work = args.work.resolve()
        args.work.mkdir(parents=True, exist_ok=True)
        args.device = sid_lsg.choose_device(args.device)
        tiny = args.tiny or args.rows == ['first'] and args.device.type == 'cpu'
        args.folder = copy_tiny(args.work) if tiny else make_sd15(args.work)
    except (unet.UserError, OSError) as problem:
        print(f'bench: {problem}', file=sys.stderr)
        sys.exit(2)
    for name in args.rows or ROWS:
        rows[name](args)
        free(args.device)


if __name__ == '__main__':
    main()
