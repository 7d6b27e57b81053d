"""Tests of the three networks against diffusers and transformers: outputs, tensors and settings.

Outputs are compared with small networks and random weights, because real checkpoints do not fit
into a repository. Small networks cannot show everything: some wrong eps moves the output by less
than rounding does. So tables made from the real networks are compared at full size, on the meta
device: names and shapes of all tensors (keys/diffusers_*, clip_text, ldm_sd15) and settings of all
modules (keys/modules_*).
"""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import clip_text
import unet
import vae
from conftest import ROOT, assert_close
from unet import PREFIX

MODULES = {'unet': unet, 'vae': vae, 'text_encoder': clip_text}

# The narrowest widths that have every tensor of SD 1.5. With (32, 64, 64, 64), level 2 would have
# no conv_shortcut. Level 3 has the width of level 2, as in the real networks.
WIDTHS = (32, 64, 96, 96)
SMALL = {'unet': (WIDTHS, 48, 8), 'vae': (WIDTHS,), 'text_encoder': (600, 48, 12, 12, 96)}


def randomise(net, seed):
    """Give every parameter random values. Norms and biases start as ones and zeros, which would
    hide two of them exchanged. The variance stays about the same from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(net.named_parameters()):
            z = torch.randn(p.shape, generator=generator)
            p.copy_(z / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.3 * z)
    return net.eval()


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='session')
def nets():
    """The networks of diffusers and transformers with SD 1.5's architecture, narrow and random."""
    return {
        'unet': randomise(UNet2DConditionModel(
            block_out_channels=WIDTHS, cross_attention_dim=48, attention_head_dim=8,
            sample_size=8), 1),
        'vae': randomise(AutoencoderKL(
            block_out_channels=WIDTHS, layers_per_block=2, latent_channels=4,
            down_block_types=['DownEncoderBlock2D'] * 4,
            up_block_types=['UpDecoderBlock2D'] * 4), 2),
        'text_encoder': randomise(CLIPTextModel(CLIPTextConfig(
            vocab_size=600, hidden_size=48, intermediate_size=96, num_hidden_layers=12,
            num_attention_heads=12, bos_token_id=598, eos_token_id=599, pad_token_id=599)), 3)}


# -------------------------------------------------------------------------------------------------
# The same outputs

def assert_same_unet(ours, theirs, t, height, width, context_dim, seed):
    """Compare the noise, and its gradient with respect to the latents, which SiD trains through."""
    batch = 3 if t.dim() == 0 else len(t)
    x = noise(batch, 4, height, width, seed=seed)
    context = noise(batch, 77, context_dim, seed=seed + 1)
    direction = noise(batch, 4, height, width, seed=seed + 2)
    results = []
    for forward in (lambda z: ours(z, t, context), lambda z: theirs(z, t, context).sample):
        z = x.clone().requires_grad_()
        out = forward(z)
        results.append((out.detach(), torch.autograd.grad((out * direction).sum(), z)[0]))
    for mine, reference in zip(*results):
        assert_close(mine, reference)


@torch.no_grad()
def assert_same_vae(ours, theirs, images, latents):
    posterior, scale = theirs.encode(images).latent_dist, theirs.config.scaling_factor
    mean, logvar = ours.moments(images)
    assert_close(mean, posterior.mean)
    assert_close(logvar, posterior.logvar)
    assert_close(ours.encode(images), posterior.mean * scale)
    assert_close(ours.decode(latents), theirs.decode(latents / scale).sample)


@torch.no_grad()
def assert_same_text(ours, theirs, start):
    """Compare text embeddings, and that transformers pools where the config has the end token."""
    end = start + 1
    tokens = torch.randint(start, (3, 77), generator=torch.Generator().manual_seed(50))
    tokens[:, 0], tokens[0, 9:], tokens[1, 76:] = start, end, end   # a short row and a full one
    expected, pooled = theirs(tokens)[:2]
    assert_close(ours(tokens), expected)
    first = (tokens == end).int().argmax(1)
    assert torch.equal(pooled, expected[torch.arange(3), first])


@pytest.mark.parametrize('t, height, width', [
    (torch.tensor([0, 999, 417]), 16, 24),      # a timestep for each image, with both ends
    (torch.tensor([625, 20]), 9, 13),           # with odd sizes, upsampling must match the skips
    (torch.tensor(625), 16, 8)])                # one timestep, without a dimension, for all
def test_unet_equals_diffusers(nets, t, height, width):
    ours = unet.UNet(*SMALL['unet'])
    ours.load_state_dict(nets['unet'].state_dict())
    assert_same_unet(ours, nets['unet'], t, height, width, context_dim=48, seed=10)


def test_saved_networks_of_other_sizes_open_in_diffusers(tmp_path):
    """The config.json of save() describes the network, for their loaders and for ours."""
    net = randomise(unet.UNet((32, 64), context_dim=48, heads=4, layers=1, groups=16,
                              attention=(False, True)), 2)
    net.sample_size = 8
    autoencoder = randomise(vae.VAE((16, 32, 48), layers=1, groups=8, scale=0.9), 4)
    text = randomise(clip_text.TextEncoder(300, width=32, layers=2, heads=4, hidden=48), 5)
    unet.save(net, tmp_path / 'unet')
    vae.save(autoencoder, tmp_path / 'vae')
    clip_text.save(text, tmp_path / 'text_encoder')
    assert not list(tmp_path.rglob('*.tmp'))

    theirs = UNet2DConditionModel.from_pretrained(tmp_path, subfolder='unet')
    loaded = unet.load(tmp_path / 'unet')       # the network's own folder will do
    assert theirs.config.sample_size == loaded.sample_size == 8
    for mine in (net, loaded):
        assert_same_unet(mine, theirs, torch.tensor([3, 700]), 8, 6, context_dim=48, seed=20)
    theirs = AutoencoderKL.from_pretrained(tmp_path, subfolder='vae')
    for mine in (autoencoder, vae.load(tmp_path)):      # not multiples of 4: where padding goes
        assert_same_vae(mine, theirs, noise(1, 3, 26, 23, seed=40), noise(1, 4, 6, 5, seed=41))
    theirs = CLIPTextModel.from_pretrained(tmp_path / 'text_encoder').eval()
    for mine in (text, clip_text.load(tmp_path)):
        assert_same_text(mine, theirs, start=298)


# -------------------------------------------------------------------------------------------------
# The same tensors and settings, at full size

def table(name):
    """Return the rows of a table in keys/."""
    lines = (ROOT / 'tests' / 'keys' / name).read_text().splitlines()
    return [line.split('\t') for line in lines if not line.startswith('#')]


def shapes(tensors):
    return {key: json.dumps(list(w.shape), separators=(',', ':')) for key, w in tensors.items()}


def settings(module):
    """Return a module's settings in the words of keys/modules_*; None for kinds not compared."""
    if isinstance(module, nn.GroupNorm):
        return (f'GroupNorm groups={module.num_groups} ch={module.num_channels} '
                f'eps={module.eps:g}')
    if type(module).__name__ == 'Attention':
        heads = getattr(module, 'heads', 1)                 # the VAE always has one
        width = getattr(module, 'to_q', getattr(module, 'q_proj', None)).out_features
        return f'Attention heads={heads} head_dim={width // heads}'
    if isinstance(module, nn.LayerNorm):
        return f'LayerNorm dim={module.normalized_shape[0]} eps={module.eps:g}'
    if isinstance(module, nn.Conv2d):
        return (f'Conv2d in={module.in_channels} out={module.out_channels} '
                f'k={module.kernel_size[0]} stride={module.stride[0]} '
                f'pad={module.padding[0]} bias={module.bias is not None}')
    return None


@pytest.mark.parametrize('part, network, tensors, modules', [
    ('unet', unet.UNet, 'diffusers_unet.tsv', 'modules_unet.tsv'),
    ('vae', vae.VAE, 'diffusers_vae.tsv', 'modules_vae.tsv'),
    ('text_encoder', clip_text.TextEncoder, 'clip_text.tsv', 'modules_text.tsv')])
def test_tensors_and_settings_are_the_published_ones(part, network, tensors, modules):
    """Names and shapes are those of SD 1.5's folder and single file. Small networks have all.

    A wrong eps, number of groups or heads, stride or padding gives images that look right and are
    not. The one-sided padding of the VAE is no setting of a module; the outputs show it."""
    folder = {key: shape for key, shape, *_ in table(tensors) if not key.endswith('position_ids')}
    single = {row[0]: row[1] for row in table('ldm_sd15.tsv') if row[0].startswith(PREFIX[part])}
    rows = [(key, text.removeprefix('CLIP').split(' scale=')[0]) for key, text in table(modules)]
    kinds = 'Attention ', 'GroupNorm ', 'LayerNorm ', 'Conv2d '
    with torch.device('meta'):
        net, few = network(), network(*SMALL[part])
        assert shapes(net.state_dict()) == folder
        assert shapes(MODULES[part].original(net)) == single
    assert few.state_dict().keys() == net.state_dict().keys()
    found = {key: settings(module) for key, module in net.named_modules() if settings(module)}
    assert found == {key: text for key, text in rows if text.startswith(kinds)}
