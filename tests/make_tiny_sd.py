"""Make the teacher in tests/tiny_sd from nothing: draw its world, train VAE, then UNet and text encoder.

    python tests/make_tiny_sd.py vae        # about 30 minutes on 2 cores; writes tiny_sd/vae
    python tests/make_tiny_sd.py decoder    # about 20 minutes; trains that VAE's decoder on
    python tests/make_tiny_sd.py teacher    # about an hour on one core; writes everything else

With --out they make another, to be given to train as --teacher. Each stage keeps a checkpoint in --work
every few minutes and goes on from it when started again, until it is done. The nets
are this project's own, in SD's architecture at a two-hundredth of its size: Stable Diffusion itself is
trained like this. The UNet attends to text on its lower level only, which makes an iteration of the
distillation about 1.6 times faster than with attention on both.

The teacher in the repository came from these three commands in a world that had white where brown is now, and
was then trained on in this one: the VAE for the last 1,100 iterations of its stage, UNet and text encoder
for the last 2,400 of theirs. White was given up for what it did to students, see tests/tiny_world.py.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer as Engine, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip_text
import sid_lsg
import tiny_world
import unet
import vae as vae_module

TINY = Path(__file__).parent / 'tiny_sd'
HELD_OUT = 2000


def split():
    """All scenes in a fixed random order: (held out, to train on).

    No score ever uses a caption that was trained on."""
    scenes = tiny_world.all_scenes()
    order = np.random.default_rng(20240603).permutation(len(scenes))
    scenes = [scenes[i] for i in order]
    return scenes[:HELD_OUT], scenes[HELD_OUT:]


def training_scenes(count, seed):
    """`count` scenes to train on. One in six has a single object, though of all scenes only one in forty has."""
    rng = np.random.default_rng(seed)
    single = [s for s in split()[1] if len(s[2]) == 1]
    pair = [s for s in split()[1] if len(s[2]) == 2]
    return [single[rng.integers(len(single))] if rng.random() < 1 / 6 else pair[rng.integers(len(pair))]
            for _ in range(count)]


def captions_of(scenes, seed):
    """A caption for each scene, sometimes wrong (tiny_world.misdescribe); never one of those held out."""
    rng, held_out = np.random.default_rng(seed), set(split()[0])
    captions = []
    for scene in scenes:
        while (described := tiny_world.misdescribe(scene, rng)) in held_out:
            pass
        captions.append(tiny_world.caption(described))
    return captions


def to_net(pictures):
    """uint8 (N, 64, 64, 3) -> float (N, 3, 64, 64) in [-1, 1], inverse of sid_lsg.to_uint8's scale."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 128) / 127.5


def train(model, step, iterations, lr, checkpoint, seed, ema=0.0):
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
        print(f'going on from iteration {first} of {checkpoint}', flush=True)
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
            torch.save(dict(model=model.state_dict(), average=average.state_dict(),
                            optimizer=optimizer.state_dict(), iteration=i + 1), part)
            part.replace(checkpoint)
    return average.eval()


def make_vae(args):
    torch.manual_seed(1)
    pictures = tiny_world.pictures(training_scenes(40_000, seed=1), seed=1)
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
        return error.abs().mean() + 2 * (error ** 2).mean() + 2e-4 * kl

    vae = train(vae, step, args.iterations or 2400, 2e-3, args.work / 'vae.pt', seed=1, ema=0.995)
    vae = vae.to(memory_format=torch.contiguous_format)
    with torch.no_grad():                       # as SD's 0.18215 was found: latents of unit variance
        vae.scale = round(1 / vae.moments(to_net(pictures[:512]))[0].std().item(), 5)
    vae_module.save(vae, args.out / 'vae', torch.float16)
    report_vae(vae_module.load(args.out))


def report_vae(vae):
    held_out = split()[0]
    with torch.no_grad():
        x = to_net(tiny_world.pictures(held_out, seed=2))
        y = torch.cat([vae.decode(vae.encode(part)) for part in x.split(100)])
    share, attributes = tiny_world.right(sid_lsg.to_uint8(y), held_out)
    print(f'scale {vae.scale}; reconstructions right {share:.4f}, mean error {(x - y).abs().mean():.4f}; '
          f'{attributes}', flush=True)


def make_decoder(args):
    """Train the VAE's decoder on, alone: latents, and with them any UNet, stay what they are.

    Noise of up to a fifth of the latents' deviation teaches it to make clean shapes of latents that a
    UNet got slightly wrong."""
    torch.manual_seed(3)
    pictures = tiny_world.pictures(training_scenes(40_000, seed=3), seed=4)
    vae = vae_module.load(args.out).to(memory_format=torch.channels_last)
    latents = latents_of(vae, pictures)
    vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)

    def step(generator):
        rows = torch.randint(len(pictures), (32,), generator=generator)
        x, z = to_net(pictures[rows.numpy()]), latents[rows]
        sigma = 0.2 * torch.rand((32, 1, 1, 1), generator=generator)
        z = (z + sigma * torch.randn(z.shape, generator=generator)).contiguous(memory_format=torch.channels_last)
        error = vae.decode(z) - x
        return error.abs().mean() + 2 * (error ** 2).mean()

    halves = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    vae.post_quant_conv, vae.decoder = train(
        halves, step, args.iterations or 2000, 1e-3, args.work / 'decoder.pt', seed=3, ema=0.995)
    report_vae(vae)
    vae_module.save(vae, args.out / 'vae', torch.float16)


def make_tokenizer(captions):
    """A tokenizer of CLIP's kind, learned from the captions.

    Each word of this world becomes one token."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned = Engine(models.BPE(end_of_word_suffix='</w>'))
    learned.pre_tokenizer = pre_tokenizers.Split(Regex(clip_text.WORD), behavior='removed', invert=True)
    learned.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix='</w>', show_progress=False))
    merges = json.loads(learned.to_str())['model']['merges']
    tokens = (characters + [c + '</w>' for c in characters] + [a + b for a, b in merges]
              + ['<|startoftext|>', '<|endoftext|>'])
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return clip_text.Tokenizer(vocab, [tuple(pair) for pair in merges])


@torch.no_grad()
def latents_of(vae, pictures):
    return torch.cat([vae.encode(to_net(pictures[i:i + 500])) for i in range(0, len(pictures), 500)])


def make_teacher(args):
    """Train UNet and text encoder on images with partly wrong captions.

    Where --out holds a teacher already, its weights and tokenizer are the start."""
    torch.manual_seed(2)
    scenes = training_scenes(60_000, seed=2)
    captions = captions_of(scenes, seed=6)
    vae = vae_module.load(args.out)
    latents = latents_of(vae, tiny_world.pictures(scenes, seed=3))
    if (args.out / 'unet').is_dir():
        net, text = unet.load(args.out), clip_text.load(args.out)
        tokenizer = clip_text.load_tokenizer(args.out)
    else:
        tokenizer = make_tokenizer(captions)
        net = unet.UNet((64, 112), context_dim=96, heads=4, layers=1, groups=8, attention=(False, True))
        net.sample_size = tiny_world.SIDE // vae.factor
        text = clip_text.TextEncoder(
            len(tokenizer.engine.get_vocab()), width=96, layers=2, heads=4, hidden=384)
        torch.nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.05)
        torch.nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.05)
    net.to(memory_format=torch.channels_last)
    tokens, empty = tokenizer(captions), tokenizer([''])
    right = np.mean([tiny_world.caption(s) == c for s, c in zip(scenes, captions)])
    print(f'{len(latents)} latents, deviation {latents.std():.3f}, {right:.1%} of the captions right, '
          f'vocabulary {len(tokenizer.engine.get_vocab())}', flush=True)

    def step(generator):
        rows = torch.randint(len(latents), (64,), generator=generator)
        x0, words = latents[rows].contiguous(memory_format=torch.channels_last), tokens[rows]
        # A tenth of the prompts is dropped, for guidance.
        words = torch.where(torch.rand(64, 1, generator=generator) < 0.1, empty, words)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (64,), generator=generator)
        return F.mse_loss(net(sid_lsg.add_noise(x0, eps, t), t, text(words)), eps)

    both = torch.nn.ModuleList([net, text])
    net_average, text_average = train(
        both, step, args.iterations or 3000, 6e-4, args.work / 'teacher.pt', seed=2, ema=0.998)
    net_average.sample_size = net.sample_size
    sid_lsg.write_pipeline(args.out, net_average, vae, text_average, tokenizer, torch.float16, 'DDIM')
    write_rest(args.out)


def write_rest(folder):
    """What train and the scores read: settings, prompts and held-out captions."""
    prompts = [tiny_world.caption(s) for s in training_scenes(6000, seed=4)]
    (folder / 'prompts.txt').write_text('\n'.join(prompts) + '\n')
    (folder / 'held_out.txt').write_text('\n'.join(tiny_world.caption(s) for s in split()[0]) + '\n')
    # Not the paper's: made for eight minutes of two slow cores. This teacher is sure of its captions, so that little
    # guidance is enough; more makes latents larger than the world's, by 6 % at the paper's 1.5 (tests/findings.py). And
    # noise hides more of latents of 8 x 8 than of 64 x 64: the generator does better at less of it than at 625. The
    # latents' mean wanders while rates are high, and falling rates would freeze it wherever it is; an average that
    # reaches back over much of the run evens it out.
    sid_lsg.write_json(folder / 'sid_lsg.json', {
        'kappa': 1.1, 't_init': 450, 'kimg': 15.0, 'batch': 16, 'lr': 7e-5, 'fake_lr': 1.4e-4,
        'ema_rampup': 0.3, 'grid_kimg': 3.0, 'progress_samples': 100})


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', choices=['vae', 'decoder', 'teacher'])
    parser.add_argument('--out', type=Path, default=TINY,
                        help='folder of the teacher, whose parts are replaced (default: %(default)s)')
    parser.add_argument('--work', type=Path, default=Path(tempfile.gettempdir(), 'make_tiny_sd'),
                        help='where the checkpoint of a stage lies until it is done (default: %(default)s)')
    parser.add_argument('--iterations', type=int, default=0,
                        help='optimizer steps (default: the stage\'s own)')
    args = parser.parse_args(arguments)
    if args.iterations < 0:
        parser.error(f'expected --iterations of 1 or more, got {args.iterations}')
    with sid_lsg.user_errors():
        args.work.mkdir(parents=True, exist_ok=True)
        dict(vae=make_vae, decoder=make_decoder, teacher=make_teacher)[args.stage](args)
    (args.work / f'{args.stage}.pt').unlink(missing_ok=True)


if __name__ == '__main__':
    main()
