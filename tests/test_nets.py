"""UNet, VAE and text encoder against diffusers and transformers: same numbers, tensors, settings and files.

Numbers are compared on small nets with random weights, since no real checkpoint fits a repository. What
small nets cannot show (some wrong eps moves the output by less than rounding does) is compared at full size,
module by module, with tables made from the real architecture: keys/diffusers_*.tsv and clip_text.tsv (names
and shapes of the tensors), keys/modules_*.tsv (settings of the modules). Full-size nets are built on the meta
device, which holds no numbers.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

import clip_text
import unet
import vae

KEYS = Path(__file__).parent / 'keys'

# The narrowest widths with a tensor for every tensor of SD 1.5: with (32, 64, 64, 64) level 2 would have no
# conv_shortcut. Level 3 repeats level 2's width, as in the real nets.
WIDTHS = (32, 64, 96, 96)

# Two correct implementations differ by float32 rounding, some 1e-6 of the largest value.
TOLERANCE = 1e-5


def small_unet():
    return unet.UNet(WIDTHS, context_dim=64, heads=8)


def small_vae():
    return vae.VAE(WIDTHS)


def small_text():
    return clip_text.TextEncoder(vocab=600, width=64, layers=12, heads=4, hidden=256)


def randomise(net, seed):
    """Give every parameter a value of its own, norms and biases included: those start as ones and zeros,
    which would hide two of them exchanged. Matrices keep their output's variance near their input's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(net.named_parameters()):
            z = torch.randn(p.shape, generator=generator)
            p.copy_(z / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.3 * z)
    return net.eval()


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= TOLERANCE, f'off by {error:.1e} of the largest value'


def assert_same_unet(ours, theirs, t, height, width, context_dim, seed):
    """Equal noise, and equal gradient of it with respect to the latents: SiD trains through frozen UNets."""
    batch = 3 if t.dim() == 0 else len(t)
    x, context = noise(batch, 4, height, width, seed=seed), noise(batch, 77, context_dim, seed=seed + 1)
    direction = noise(batch, 4, height, width, seed=seed + 2)
    results = []
    for forward in (lambda z: ours(z, t, context), lambda z: theirs(z, t, context).sample):
        z = x.clone().requires_grad_()
        out = forward(z)
        results.append((out.detach(), torch.autograd.grad((out * direction).sum(), z)[0]))
    for mine, reference in zip(*results):
        assert_close(mine, reference)


# ---------------------------------------------------------------------------------------------------
# The same numbers

@pytest.fixture(scope='module')
def unets(tmp_path_factory):
    """diffusers' UNet with random weights, and ours loaded from the folder that diffusers wrote."""
    folder = tmp_path_factory.mktemp('checkpoint')
    theirs = randomise(UNet2DConditionModel(
        block_out_channels=WIDTHS, cross_attention_dim=64, attention_head_dim=8), 1)
    theirs.save_pretrained(folder / 'unet')
    return unet.load(folder), theirs


@pytest.mark.parametrize('t, height, width', [
    (torch.tensor([0, 999, 417]), 16, 24),      # a step of its own for each of the batch, both ends included
    (torch.tensor([625, 20]), 9, 13),           # odd sides: the way up must meet each skip's size
    (torch.tensor(625), 16, 8)])                # one step, without a dimension, for all
def test_unet_equals_diffusers(unets, t, height, width):
    """UNet.forward and its input gradient, on a checkpoint that diffusers wrote."""
    assert_same_unet(*unets, t, height, width, context_dim=64, seed=10)


@torch.no_grad()
def test_nets_compute_in_the_dtype_they_are_loaded_in(unets, vaes, tmp_path):
    """fp32 latents and text in, bf16 arithmetic: as near as its 8 bits allow, and no nearer."""
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([20, 900])
    context = torch.randn(2, 77, 64, generator=generator)
    unet.save(unets[0], tmp_path / 'unet')
    vae.save(vaes[0], tmp_path / 'vae')
    for ours, half, arguments in ((unets[0], unet.load(tmp_path, torch.bfloat16), (x, t, context)),
                                  (vaes[0].decode, vae.load(tmp_path, torch.bfloat16).decode, (x,))):
        expected, found = ours(*arguments), half(*arguments)
        off = (found.float() - expected).abs().max() / expected.abs().max()
        assert found.dtype == torch.bfloat16 and 1e-4 < off < 0.05


def test_unet_saved_opens_in_diffusers(tmp_path):
    """unet.save's config.json describes a net of other settings than the default, to both loaders."""
    ours = unet.UNet((32, 64), context_dim=48, heads=4, layers=1, groups=16, attention=(False, True))
    randomise(ours, 2)
    ours.sample_size = 8
    unet.save(ours, tmp_path / 'unet')
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, subfolder='unet')
    loaded = unet.load(tmp_path / 'unet')           # the folder itself serves as well as the one around it
    assert theirs.config.sample_size == loaded.sample_size == 8
    assert not loaded.training
    assert_same_unet(ours, theirs, torch.tensor([3, 700]), 8, 6, context_dim=48, seed=20)
    assert_same_unet(loaded, theirs, torch.tensor([3, 700]), 8, 6, context_dim=48, seed=20)


@pytest.fixture(scope='module')
def vaes(tmp_path_factory):
    """diffusers' VAE with random weights, and ours loaded from the folder that diffusers wrote."""
    folder = tmp_path_factory.mktemp('checkpoint')
    theirs = randomise(AutoencoderKL(
        block_out_channels=WIDTHS, layers_per_block=2, latent_channels=4,
        down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4), 3)
    theirs.save_pretrained(folder / 'vae')
    config = json.loads((folder / 'vae' / 'config.json').read_text())
    del config['scaling_factor']                    # SD 1.5's own vae/config.json has none; it means 0.18215
    (folder / 'vae' / 'config.json').write_text(json.dumps(config))
    return vae.load(folder), theirs


def assert_same_vae(ours, theirs, images, latents):
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, logvar = ours.moments(images)
        assert_close(mean, posterior.mean)
        assert_close(logvar, posterior.logvar)
        assert_close(ours.encode(images), posterior.mean * theirs.config.scaling_factor)
        assert_close(ours.decode(latents), theirs.decode(latents / theirs.config.scaling_factor).sample)


def test_vae_equals_diffusers(vaes):
    """VAE.encode and decode, on a checkpoint that diffusers wrote; sides are no multiple of 8 on purpose."""
    ours, theirs = vaes
    assert ours.scale == 0.18215
    assert_same_vae(ours, theirs, noise(2, 3, 36, 44, seed=30), 0.18215 * noise(2, 4, 5, 7, seed=31))


def test_vae_saved_opens_in_diffusers(tmp_path):
    """vae.save's config.json describes a VAE of other settings than the default, to both loaders."""
    ours = randomise(vae.VAE((16, 32, 48), layers=1, groups=8, scale=0.9), 4)
    vae.save(ours, tmp_path / 'vae')
    theirs = AutoencoderKL.from_pretrained(tmp_path, subfolder='vae')
    for net in (ours, vae.load(tmp_path / 'vae')):
        assert_same_vae(net, theirs, noise(1, 3, 24, 20, seed=40), noise(1, 4, 6, 5, seed=41))


def test_text_equals_transformers(tmp_path):
    """TextEncoder, on weights that clip_text.save wrote and both sides opened."""
    ours = randomise(small_text(), 5)
    clip_text.save(ours, tmp_path / 'text_encoder')
    theirs = CLIPTextModel.from_pretrained(tmp_path / 'text_encoder').eval()
    tokens = torch.randint(600, (3, 77), generator=torch.Generator().manual_seed(50))
    tokens[:, 0], tokens[0, 9:], tokens[1, 76:] = 598, 599, 599     # start, end: a short row and a full one
    with torch.no_grad():
        expected, pooled = theirs(tokens)[:2]
        assert_close(ours(tokens), expected)
        assert_close(clip_text.load(tmp_path)(tokens), expected)
    end = (tokens == 599).int().argmax(1)
    assert torch.equal(pooled, expected[torch.arange(3), end])      # by the end token that config.json names


def test_a_new_net_can_be_trained():
    """As make_tiny_sd.py does: tokens and positions begin apart, every weight takes part."""
    torch.manual_seed(0)
    text = small_text()
    assert all((p.std(0) > 0.1).all() for p in text.text_model.embeddings.parameters())
    context = text(torch.tensor([[598, *range(75), 599]]))
    net, autoencoder = small_unet(), small_vae()
    latents = autoencoder.encode(noise(1, 3, 16, 16, seed=60))
    pictures = autoencoder.decode(net(torch.cat([latents] * 4, 3), torch.tensor([500]), context))
    pictures.square().mean().backward()
    for part in (text, net, autoencoder):
        for name, p in part.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_text_ignores_stored_position_ids(tmp_path):
    """SD 1.5's own file holds position_ids, some merged model's wrong ones; positions are 0 ... 76."""
    ours = randomise(small_text(), 6)
    clip_text.save(ours, tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    weights['text_model.embeddings.position_ids'] = torch.zeros(1, 77, dtype=torch.int64)
    save_file(weights, tmp_path / 'model.safetensors')
    tokens = torch.arange(77)[None]
    with torch.no_grad():
        assert torch.equal(clip_text.load(tmp_path)(tokens), ours(tokens))


@pytest.mark.parametrize('module, make', [(unet, small_unet), (vae, small_vae), (clip_text, small_text)])
def test_half_precision_file_loads_as_float32(tmp_path, module, make):
    """save(..., torch.float16) halves the file; load gives float32 all the same, each weight rounded once."""
    ours = randomise(make(), 7)
    module.save(ours, tmp_path, torch.float16)
    assert {w.dtype for w in load_file(next(tmp_path.glob('*.safetensors'))).values()} == {torch.float16}
    loaded = module.load(tmp_path).state_dict()
    assert {w.dtype for w in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[key], w.half().float()) for key, w in ours.state_dict().items())
    assert not list(tmp_path.glob('*.tmp'))


# ---------------------------------------------------------------------------------------------------
# The same tensors and settings, at full size

def table(name):
    """{first column: second column} of a keys/*.tsv."""
    lines = (KEYS / name).read_text().splitlines()
    return dict(line.split('\t')[:2] for line in lines if not line.startswith('#'))


FULL = [pytest.param(unet.UNet, small_unet, 'unet', id='unet'),
        pytest.param(vae.VAE, small_vae, 'vae', id='vae'),
        pytest.param(clip_text.TextEncoder, small_text, 'text', id='text')]


@pytest.mark.parametrize('full, small, name', FULL)
def test_tensors_are_the_published_ones(full, small, name):
    """Every name and shape is that of SD 1.5's files, and the small nets have a tensor for each of them."""
    files = {'unet': 'diffusers_unet.tsv', 'vae': 'diffusers_vae.tsv', 'text': 'clip_text.tsv'}
    expected = table(files[name])
    expected.pop('text_model.embeddings.position_ids', None)        # no weight: 0 ... 76, see above
    assert len(expected) == {'unet': 686, 'vae': 248, 'text': 196}[name]
    with torch.device('meta'):
        tensors, few = full().state_dict(), small().state_dict()
    assert {key: json.dumps(list(w.shape), separators=(',', ':')) for key, w in tensors.items()} == expected
    assert few.keys() == tensors.keys()


def one(pair):
    return pair[0] if pair[0] == pair[1] else pair


def settings(module):
    """A module's kind and settings in the words of keys/modules_*.tsv; None for kinds not compared."""
    bias = f'bias={getattr(module, "bias", None) is not None}'
    if isinstance(module, nn.GroupNorm):
        return f'GroupNorm groups={module.num_groups} ch={module.num_channels} eps={module.eps:g}'
    if isinstance(module, nn.LayerNorm):
        return f'LayerNorm dim={module.normalized_shape[0]} eps={module.eps:g}'
    if isinstance(module, nn.Linear):
        return f'Linear in={module.in_features} out={module.out_features} {bias}'
    if isinstance(module, nn.Embedding):
        return f'Embedding {module.num_embeddings}x{module.embedding_dim}'
    if isinstance(module, nn.Conv2d):
        return (f'Conv2d in={module.in_channels} out={module.out_channels} k={one(module.kernel_size)} '
                f'stride={one(module.stride)} pad={one(module.padding)} {bias}')
    return None


@pytest.mark.parametrize('full, small, name', FULL)
def test_settings_are_the_published_ones(full, small, name):
    """Every eps, group count, kernel, stride, padding and bias: a wrong one gives plausible, wrong pictures.

    Both ways round: no module of these kinds may be missing here, nor may one be here that the table lacks.
    The VAE's one-sided padding is no setting of a module; the comparison of its numbers covers it."""
    kinds = ('GroupNorm ', 'LayerNorm ', 'Conv2d ', 'Linear ', 'Embedding ')
    expected = {key: text for key, text in table(f'modules_{name}.tsv').items() if text.startswith(kinds)}
    assert len(expected) == {'unet': 391, 'vae': 124, 'text': 99}[name]
    with torch.device('meta'):
        net = full()
    assert {key: settings(module) for key, module in net.named_modules() if settings(module)} == expected


@pytest.mark.parametrize('full, small, name', FULL)
def test_attention_heads_are_the_published_ones(full, small, name, monkeypatch):
    """Number and width of the heads as each attention uses them: in the UNet always 8, in the VAE 1."""
    rows = [(key, text.split()) for key, text in table(f'modules_{name}.tsv').items()]
    expected = {key: words[1:3] for key, words in rows if words[0] in ('Attention', 'CLIPAttention')}
    assert len(expected) == {'unet': 32, 'vae': 2, 'text': 12}[name]
    with torch.device('meta'):
        net = full()
        inputs = {'unet': [torch.zeros(1, 4, 8, 8), torch.tensor(0), torch.zeros(1, 77, 768)],
                  'vae': [torch.zeros(1, 3, 16, 16)], 'text': [torch.zeros(1, 77, dtype=torch.int64)]}[name]
    found, running = {}, []
    for key, module in net.named_modules():
        if type(module).__name__ == 'Attention':
            module.register_forward_pre_hook(lambda module, args, key=key: running.append(key))

    def attention(q, k, v, is_causal=False, **scale):
        assert not scale                            # torch's own is 1 / sqrt(head_dim), and so is the nets'
        assert is_causal == (name == 'text')
        found[running[-1]] = [f'heads={q.shape[1]}', f'head_dim={q.shape[3]}']
        return q                                    # of the output's shape, all that matters here

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)
    net.decode(net.encode(*inputs)) if name == 'vae' else net(*inputs)
    assert found == expected


# ---------------------------------------------------------------------------------------------------
# A folder that is none, or whose halves do not fit

LOADERS = [pytest.param(unet, small_unet, 'unet', id='unet'),
           pytest.param(vae, small_vae, 'vae', id='vae'),
           pytest.param(clip_text, small_text, 'text_encoder', id='text')]


@pytest.mark.parametrize('module, make, part', LOADERS)
def test_load_names_the_missing_file(tmp_path, module, make, part):
    """A wrong path is a FileNotFoundError that says which file was looked for."""
    with pytest.raises(FileNotFoundError, match='nowhere'):
        module.load(tmp_path / 'nowhere')
    module.save(make(), tmp_path / part)
    weights = next((tmp_path / part).glob('*.safetensors'))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=weights.name):
        module.load(tmp_path)
    (tmp_path / part / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='config.json'):
        module.load(tmp_path)


@pytest.mark.parametrize('module, make, part', LOADERS)
def test_load_refuses_tensors_that_do_not_fit(tmp_path, module, make, part):
    """One tensor missing, misshapen or too many is a ValueError that names it, never a net half filled."""
    module.save(make(), tmp_path / part)
    file = next((tmp_path / part).glob('*.safetensors'))
    whole = load_file(file)
    key = max(whole)
    for weights in ({k: w for k, w in whole.items() if k != key}, {**whole, key: torch.zeros(5)}):
        save_file(weights, file)
        with pytest.raises(ValueError, match=key):
            module.load(tmp_path)
    save_file({**whole, 'stray.weight': torch.zeros(1)}, file)
    with pytest.raises(ValueError, match='stray.weight'):
        module.load(tmp_path)


@pytest.mark.parametrize('module, make, part', LOADERS)
def test_load_refuses_a_file_cut_off(tmp_path, module, make, part):
    """A download that broke off is a ValueError that names the folder."""
    module.save(make(), tmp_path / part)
    file = next((tmp_path / part).glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=part):
        module.load(tmp_path)
