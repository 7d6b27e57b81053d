"""Make the tiny teacher of tests/tiny_sd, or another one, in three stages.

    python tests/make_tiny_sd.py vae        # half an hour on 2 cores: trains the VAE
    python tests/make_tiny_sd.py decoder    # 20 minutes: trains the decoder of that VAE further
    python tests/make_tiny_sd.py teacher    # 20 minutes on one core: trains UNet and text encoder

The networks have the architecture of Stable Diffusion at a two-hundredth of its size. The UNet
attends to the text on its lower level only, which makes distillation about 1.6 times faster.

The last stage learns captions that are sometimes wrong (tiny_world.misdescribe), so the teacher
needs guidance, as Stable Diffusion does. If --out holds a UNet and a text encoder already, it
continues from their weights. The committed teacher was made that way, from one that had learnt
correct captions.
"""

import argparse
import copy
import json
import sys
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


def split():
    """Return all scenes in two lists: held out for scores, and to train on."""
    scenes = tiny_world.all_scenes()
    order = np.random.default_rng(20240603).permutation(len(scenes))
    return [scenes[i] for i in order[:2000]], [scenes[i] for i in order[2000:]]


def training_scenes(count, seed):
    """Draw scenes to train on. One in six has a single object; of all scenes only one in 43 has."""
    rng, scenes = np.random.default_rng(seed), split()[1]
    single = [scene for scene in scenes if len(scene[2]) == 1]
    pairs = [scene for scene in scenes if len(scene[2]) == 2]
    kinds = (single if rng.random() < 1 / 6 else pairs for _ in range(count))
    return [kind[rng.integers(len(kind))] for kind in kinds]


def captions_of(scenes, seed):
    """Return a caption for each scene: sometimes a wrong one, but never one that is held out."""
    rng, held_out = np.random.default_rng(seed), set(split()[0])
    captions = []
    for scene in scenes:
        while (described := tiny_world.misdescribe(scene, rng)) in held_out:
            pass
        captions.append(tiny_world.caption(described))
    return captions


def to_net(images):
    """Convert uint8 (B, 64, 64, 3) to float (B, 3, 64, 64) in [-1, 1], undoing sid_lsg.to_uint8."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 128) / 127.5


def train(model, step, iterations, lr, seed, decay):
    """Train a model with Adam and a learning rate that falls to zero, and return its EMA.

    step(generator) computes the loss of a batch."""
    ema = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    for i in range(iterations):
        optimizer.param_groups[0]['lr'] = lr * min(1.0, (i + 1) / 100) * (1 - i / iterations)
        loss = step(torch.Generator().manual_seed(seed * 10_000_000 + i))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            beta = min(decay, i / (i + 10))
            for average, parameter in zip(ema.parameters(), model.parameters()):
                average.lerp_(parameter, 1 - beta)
        if i % 50 == 0:
            print(f'{i:6d} / {iterations}  loss {loss.item():.4f}', flush=True)
    return ema.eval()


def distance(x, y):
    return (x - y).abs().mean() + 2 * F.mse_loss(x, y)


def make_vae(args):
    torch.manual_seed(1)
    images = tiny_world.pictures(training_scenes(40_000, seed=1), seed=1)
    # Channels last makes convolutions faster on a CPU.
    vae = vae_module.VAE((16, 32, 64, 64), layers=1, groups=8).to(memory_format=torch.channels_last)

    def step(generator):
        rows = torch.randint(len(images), (32,), generator=generator).numpy()
        x = to_net(images[rows])
        mean, logvar = vae.moments(x)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return distance(vae.decode(z * vae.scale), x) + 2e-4 * kl

    vae = train(vae, step, args.iterations or 2400, 2e-3, seed=1, decay=0.995)
    with torch.no_grad():
        # Latents get unit variance, as with Stable Diffusion's 0.18215.
        vae.scale = round(1 / vae.moments(to_net(images[:512]))[0].std().item(), 5)
    vae_module.save(vae, args.out / 'vae', torch.float16)


def make_decoder(args):
    """Train only the decoder of the VAE in --out, so latents and any UNet remain valid.

    Noise of up to a fifth of the latents' standard deviation teaches it to decode clean shapes from
    latents that a UNet got slightly wrong."""
    torch.manual_seed(3)
    images = tiny_world.pictures(training_scenes(40_000, seed=3), seed=4)
    vae = vae_module.load(args.out).to(memory_format=torch.channels_last)
    latents = encode(vae, images)

    def step(generator):
        rows = torch.randint(len(images), (32,), generator=generator)
        x, z = to_net(images[rows.numpy()]), latents[rows]
        sigma = 0.2 * torch.rand((32, 1, 1, 1), generator=generator)
        z = z + sigma * torch.randn(z.shape, generator=generator)
        return distance(vae.decode(z), x)

    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    vae.post_quant_conv, vae.decoder = train(decoder, step, args.iterations or 2000, 1e-3, seed=3,
                                             decay=0.995)
    vae_module.save(vae, args.out / 'vae', torch.float16)


@torch.no_grad()
def encode(vae, images):
    return torch.cat([vae.encode(to_net(images[i:i + 500])) for i in range(0, len(images), 500)])


def make_tokenizer(captions):
    """Learn a tokenizer of CLIP's kind. Each word of this world becomes one token."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned = Engine(models.BPE(end_of_word_suffix='</w>'))
    learned.pre_tokenizer = pre_tokenizers.Split(
        Regex(clip_text.WORD), behavior='removed', invert=True)
    learned.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix='</w>', show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learned.to_str())['model']['merges']]
    tokens = [*characters, *(c + '</w>' for c in characters), *(a + b for a, b in merges),
              clip_text.START, clip_text.END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return clip_text.Tokenizer(vocab, merges)


def write_tokenizer(tokenizer, folder):
    """Write the three files that clip_text.load_tokenizer and transformers read."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = json.dumps(tokenizer.vocab, ensure_ascii=False)
    merges = ['#version: 0.2', *(f'{a} {b}' for a, b in tokenizer.merges)]
    (folder / 'vocab.json').write_text(vocab + '\n', encoding='utf-8')
    (folder / 'merges.txt').write_text('\n'.join(merges) + '\n', encoding='utf-8')
    unet.write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'CLIPTokenizer', 'model_max_length': clip_text.LENGTH,
        'do_lower_case': True, 'bos_token': clip_text.START, 'eos_token': clip_text.END,
        'pad_token': clip_text.END, 'unk_token': clip_text.END})


def make_teacher(args):
    """Train UNet and text encoder on images with captions of which some are wrong."""
    torch.manual_seed(2)
    scenes = training_scenes(60_000, seed=2)
    captions = captions_of(scenes, seed=6)
    vae = vae_module.load(args.out)
    latents = encode(vae, tiny_world.pictures(scenes, seed=3))
    if (args.out / 'unet').is_dir():
        net, text = unet.load(args.out), clip_text.load(args.out)
        tokenizer = clip_text.load_tokenizer(args.out)
    else:
        tokenizer = make_tokenizer(captions)
        net = unet.UNet((64, 112), context_dim=96, heads=4, layers=1, groups=8,
                        attention=(False, True))
        net.sample_size = tiny_world.SIDE // vae.factor
        text = clip_text.TextEncoder(tokenizer.size, width=96, layers=2, heads=4, hidden=384)
        for embedding in text.text_model.embeddings.children():
            torch.nn.init.normal_(embedding.weight, std=0.05)
    net.to(memory_format=torch.channels_last)
    tokens, empty = tokenizer(captions), tokenizer([''])

    def step(generator):
        rows = torch.randint(len(latents), (64,), generator=generator)
        # A tenth of the captions is dropped, so that the UNet learns the empty prompt.
        dropped = torch.rand(64, 1, generator=generator) < 0.1
        context = text(torch.where(dropped, empty, tokens[rows]))
        eps = torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(1000, (64,), generator=generator)
        return F.mse_loss(net(sid_lsg.add_noise(latents[rows], eps, t), t, context), eps)

    both = torch.nn.ModuleList([net, text])
    net_ema, text_ema = train(both, step, args.iterations or 3000, 6e-4, seed=2, decay=0.998)
    unet.save(net_ema, args.out / 'unet', torch.float16)
    clip_text.save(text_ema, args.out / 'text_encoder', torch.float16)
    write_tokenizer(tokenizer, args.out / 'tokenizer')
    unet.save_pipeline(args.out, 'DDIM')
    write_rest(args.out)


def write_rest(folder):
    """Write prompts and settings for `train`, and the captions that are held out for scores."""
    for name, scenes in (('prompts', training_scenes(6000, seed=4)), ('held_out', split()[0])):
        lines = [tiny_world.caption(scene) + '\n' for scene in scenes]
        (folder / f'{name}.txt').write_text(''.join(lines))
    # These settings are chosen for ten minutes on two cores. High learning rates make the mean of
    # the latents wander, and an EMA over much of the run evens that out. The generator gets less
    # noise than the paper's 625, because noise hides more of 8 x 8 latents than of 64 x 64.
    unet.write_json(folder / 'sid_lsg.json', {
        'kappa': [1.5], 't_init': 450, 'kimg': 25.0, 'batch': 16, 'lr': 7e-5, 'fake_lr': 1.4e-4,
        'ema_rampup': 0.3, 'save_kimg': 5.0})


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', choices=['vae', 'decoder', 'teacher'])
    parser.add_argument('--out', type=Path, default=TINY,
                        help='folder of the teacher (default: %(default)s)')
    parser.add_argument('--iterations', type=int, default=0,
                        help='training iterations (default: depends on the stage)')
    args = parser.parse_args(arguments)
    with unet.user_errors('make_tiny_sd'):
        dict(vae=make_vae, decoder=make_decoder, teacher=make_teacher)[args.stage](args)


if __name__ == '__main__':
    main()
