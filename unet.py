"""The UNet of Stable Diffusion 1.5, from scratch. It predicts the noise in a latent.

Module names are those of diffusers' UNet2DConditionModel, so that published weights load with a
strict load_state_dict. Constants that differ from torch's defaults name their source.
"openaimodel.py", "attention.py" and "util.py" are files of CompVis/stable-diffusion @21f890f,
ldm/modules.

    net = load('path/to/checkpoint')
    eps_hat = net(x, t, context)

Shapes: B batch, C channels, H and W of the latent, N = H * W, L = 77 tokens, D = 768.

The second half of this file finds, reads and writes checkpoints, also for vae.py and clip_text.py.
"""

import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def timestep_embedding(t, width):
    """Embed integer timesteps t (B,) as (B, width) float32: cosines, then sines, of t * frequency.

    The frequencies fall geometrically from 1 towards 1 / 10000. The order [cos | sin] and the
    division by width / 2 (not width / 2 - 1) are util.py 161-166. diffusers calls them
    flip_sin_to_cos and freq_shift 0.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    frequencies = torch.exp(-math.log(10000) * exponents)
    angles = t.float()[:, None] * frequencies           # float32, because bf16 cannot hold 999
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """x (B, C_in, H, W), temb (B, C_time) -> (B, C_out, H, W). openaimodel.py 198-275."""

    def __init__(self, c_in, c_out, c_time, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)         # torch's default: util.py 199-216
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # A checkpoint has this key only where the number of channels changes.
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]  # SiLU before the projection
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) to context (B, L, D), or to itself without context."""

    def __init__(self, width, context_dim, heads):
        super().__init__()
        self.heads = heads
        # Only the output has a bias: attention.py 158-168.
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])      # a list, for the name to_out.0

    def forward(self, x, context=None):
        q = self.to_q(x)
        # The norm before this returns float32 under autocast, which would cast it for k and for v.
        context = (x if context is None else context).to(q.dtype)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or L, C / heads)
                   for y in (q, self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)                 # scaled by (C / heads) ** -0.5
        return self.to_out[0](h.transpose(1, 2).flatten(2))         # (B, N, C)


class GEGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)              # in this order: attention.py 40-44
        return value * F.gelu(gate)                              # exact, not the tanh approximation


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        # The Identity takes the place of a dropout, so that the last layer is named net.2.
        self.net = nn.ModuleList([GEGLU(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward. attention.py 196-215."""

    def __init__(self, width, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.attn2 = Attention(width, context_dim, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """The transformer block over the pixels of x (B, C, H, W). attention.py 218-261."""

    def __init__(self, width, context_dim, heads, groups):
        super().__init__()
        # eps is 1e-6 here, NOT 1e-5 as in the resnets: attention.py 76-77.
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_dim, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))                              # (B, C, H, W)
        h = h.flatten(2).transpose(1, 2)                            # (B, N, C)
        h = self.transformer_blocks[0](h, context)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])             # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        # Padded on all four sides, unlike the VAE's: openaimodel.py 151-152.
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, size):
        # `size` is the next skip's. It is not always twice x's: a downsampling rounds odd sizes up.
        return self.conv(F.interpolate(x, size=size, mode='nearest'))


class DownBlock(nn.Module):
    """`layers` resnets, each with a transformer if `attention`, then a downsampling unless `last`.

    Returns x and the list of its outputs after every layer, which the way up uses as skips."""

    def __init__(self, c_in, c_out, c_time, context_dim, heads, layers, groups, attention, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, c_time, groups) for i in range(layers))
        self.attentions = nn.ModuleList(
            SpatialTransformer(c_out, context_dim, heads, groups)
            for _ in range(layers if attention else 0))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])

    def forward(self, x, temb, context):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, width, c_time, context_dim, heads, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, c_time, groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, context_dim, heads, groups)])

    def forward(self, x, temb, context):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, temb), context), temb)


class UpBlock(nn.Module):
    """A resnet for each skip, each with a transformer if `attention`, then an upsampling.

    The `last` block has no upsampling."""

    def __init__(self, c_in, c_out, c_skips, c_time, context_dim, heads, groups, attention, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock((c_in if i == 0 else c_out) + c_skip, c_out, c_time, groups)
            for i, c_skip in enumerate(c_skips))
        self.attentions = nn.ModuleList(
            SpatialTransformer(c_out, context_dim, heads, groups)
            for _ in (c_skips if attention else []))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x, skips, temb, context):
        for i, resnet in enumerate(self.resnets):
            # x comes first: openaimodel.py 735-737.
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """Stable Diffusion's UNet. The defaults are SD 1.5's, with 860 M weights.

        level | H at 512 px | channels | transformers | resnets down / up
          0   |     64      |    320   |     yes      |      2 / 3
          1   |     32      |    640   |     yes      |      2 / 3
          2   |     16      |   1280   |     yes      |      2 / 3
          3   |      8      |   1280   |     no       |      2 / 3
         mid  |      8      |   1280   |     yes      |        2

    heads is the NUMBER of heads, 8 at every level (openaimodel.py 542-543, v1-inference.yaml 39).
    config.json calls it attention_head_dim. layers counts the resnets per level on the way down.
    """

    def __init__(self, channels=(320, 640, 1280, 1280), context_dim=768, heads=8, layers=2,
                 groups=32, attention=(True, True, True, False)):
        super().__init__()
        self.sizes = dict(channels=list(channels), context_dim=context_dim, heads=heads,
                          layers=layers, groups=groups, attention=list(attention))
        self.sample_size = 64       # H and W of the training latents; the UNet itself takes any
        c_time, levels = 4 * channels[0], len(channels)
        self.conv_in = nn.Conv2d(4, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], c_time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        c, c_skips = channels[0], [channels[0]]                    # channels of the skips, in order
        for i in range(levels):
            last = i == levels - 1
            self.down_blocks.append(DownBlock(
                c, channels[i], c_time, context_dim, heads, layers, groups, attention[i], last))
            c = channels[i]
            c_skips += [c] * (layers if last else layers + 1)
        self.mid_block = MidBlock(c, c_time, context_dim, heads, groups)
        for i in reversed(range(levels)):
            skips = [c_skips.pop() for _ in range(layers + 1)]
            last = i == 0
            self.up_blocks.append(UpBlock(
                c, channels[i], skips, c_time, context_dim, heads, groups, attention[i], last))
            c = channels[i]
        self.conv_norm_out = nn.GroupNorm(groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, 4, 3, padding=1)

    def forward(self, x, t, context):
        """Predict the noise (B, 4, H, W) in latents x (B, 4, H, W) at timesteps t, given the text.

        t is integer, (B,) or (), in [0, 999]; context is the text embeddings (B, L, D). The network
        computes in the dtype of its weights, or of autocast."""
        dtype = self.conv_in.weight.dtype
        x, context = x.to(dtype), context.to(dtype)
        temb = timestep_embedding(t.expand(len(x)), self.conv_in.out_channels)    # (B, 320) float32
        temb = self.time_embedding(temb.to(dtype))                  # (B, 1280)
        x = self.conv_in(x)                                         # (B, 320, H, W)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, temb, context)                     # 320 H/2, 640 H/4, 1280 H/8 twice
            skips += more
        x = self.mid_block(x, temb, context)                        # (B, 1280, H/8, W/8)
        for block in self.up_blocks:
            x = block(x, skips, temb, context)                  # back up, taking skips from the end
        return self.conv_out(F.silu(self.conv_norm_out(x)))         # (B, 4, H, W)


# -------------------------------------------------------------------------------------------------
# Checkpoints, for all three networks. A checkpoint is a folder in diffusers layout, with a folder
# for each network, or one original .safetensors file with all three in the size of SD 1.5.

# How the tensor names of a network begin in an original file, and how its weights are named in a
# folder.
PREFIX = {'unet': 'model.diffusion_model.', 'vae': 'first_stage_model.',
          'text_encoder': 'cond_stage_model.transformer.'}
STEM = {'unet': 'diffusion_pytorch_model', 'vae': 'diffusion_pytorch_model',
        'text_encoder': 'model'}

# CLIP's tensors that Stable Diffusion does not use.
UNUSED = ('position_ids', 'logit_scale', 'text_projection', 'text_projection.weight')


class UserError(Exception):
    """A user's mistake, told in one plain sentence: what was found, what is needed, what to do.

    The command lines print it and exit with code 2. Every other exception is a bug and keeps its
    traceback."""


def check(condition, message):
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def user_errors(program):
    """Print a UserError or OSError raised inside in one line to stderr, and exit with code 2."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f'{program}: {error}', file=sys.stderr)
        sys.exit(2)


def locate(path):
    """Return the Path of a file, a folder, or a repo id that is in the local Hugging Face cache."""
    if Path(path).exists():
        return Path(path)
    home = os.environ.get('HF_HOME') or os.path.expanduser('~/.cache/huggingface')
    cache = Path(os.environ.get('HF_HUB_CACHE') or os.path.join(home, 'hub'))
    repo = cache / f'models--{str(path).replace("/", "--")}'
    main = repo / 'refs' / 'main'
    snapshots = sorted(repo.glob('snapshots/*'))
    if main.is_file():                  # absent if the download named a revision
        snapshots = [repo / 'snapshots' / main.read_text().strip()]
    check(snapshots and snapshots[0].is_dir(),
          f'found nothing at {path}, and no such repo id in the cache {cache}; give a folder in '
          'diffusers layout, an original .safetensors file, or a repo id that is in the cache')
    check(len(snapshots) == 1,
          f'{repo} holds {len(snapshots)} revisions and does not say which of them is main; '
          'give the folder of one of them')
    return snapshots[0]


def read_json(file):
    """Return the dict in a JSON file."""
    try:
        content = json.loads(Path(file).read_text(encoding='utf-8-sig'))
    except ValueError as error:
        raise UserError(f'{file} is not JSON ({error}); replace it') from None
    check(isinstance(content, dict), f'{file} must hold values by name, found {str(content)[:40]}')
    return content


def read_tensors(file):
    """Return {name: tensor} of a .safetensors file, memory-mapped. Pickles are never opened."""
    try:
        return load_file(file)
    except SafetensorError as error:
        with open(file, 'rb') as opened:
            start = opened.read(40)     # enough to recognise a git-lfs pointer or an HTML page
        raise UserError(
            f'{file} is not a whole .safetensors file ({error}) and begins with {start}; '
            'replace it with a whole one') from None


def open_part(path, part):
    """Open 'unet', 'vae' or 'text_encoder' of a checkpoint: (config, {name: tensor}, file).

    config is the folder's config.json, and None for an original file."""
    root = locate(path)
    if root.is_file():
        return None, read_tensors(root), root
    folder = root / part if (root / part).is_dir() else root
    names = [f'{STEM[part]}.safetensors', f'{STEM[part]}.fp16.safetensors']
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None or not (folder / 'config.json').is_file():
        found = ', '.join(sorted(entry.name for entry in folder.iterdir())[:20]) or 'nothing'
        raise UserError(
            f'{folder} must hold config.json and {names[0]} (in one piece) for the {part}, '
            f'found {found}; download the missing file')
    return read_json(folder / 'config.json'), read_tensors(file), file


def one(value):
    """Return the entry of a list of equal entries, and any other value as it is."""
    equal = isinstance(value, list) and value and all(entry == value[0] for entry in value)
    return value[0] if equal else value


def check_config(config, fixed, file):
    """Raise UserError if a config has a value that the network here does not support."""
    for key, needed in fixed.items():
        found = one(config.get(key, needed))
        check(found == needed or (found is None and needed is False),
              f'the config of {file} says {key} {json.dumps(found)}, but SD 1.5 needs '
              f'{json.dumps(needed)}; give a Stable Diffusion 1.5')


def config_int(config, key, file, default=None):
    """Return a size in a config: an integer above 0, or a list of equal ones."""
    value = one(config.get(key, default))
    check(type(value) is int and 0 < value < 2 ** 17,
          f'the config of {file} must give {key} as an integer above 0, found {json.dumps(value)}')
    return value


def config_ints(config, key, file):
    """Return the list of sizes in a config."""
    values = config.get(key)
    check(isinstance(values, list) and 0 < len(values) < 10,
          f'the config of {file} must give {key} as a list of integers, found {json.dumps(values)}')
    return [config_int({key: value}, key, file) for value in values]


def fill(net, tensors, names, file, dtype, prefix=''):
    """Return `net`, built on the meta device, with its weights, in `dtype` and in eval mode.

    names is {key of the network: name in the file}. UserError names the first tensor that is
    missing, extra (among names that start with `prefix`), of another shape, or not finite."""
    empty = net.state_dict()
    needed = {name: empty[key] for key, name in names.items()}
    weights = {name: w for name, w in tensors.items()
               if name.startswith(prefix) and not name.endswith(UNUSED)}
    for name, like in needed.items():
        w = weights.get(name)
        if w is not None and like.ndim == 2 and w.shape[2:] == (1, 1):
            weights[name] = w.flatten(1)            # a 1 x 1 convolution is a Linear
    missing = [name for name in needed if name not in weights]
    extra = [name for name in weights if name not in needed]
    other = [name for name in needed
             if name in weights and weights[name].shape != needed[name].shape]
    faults = []
    if missing:
        faults.append(f'lacks {len(missing)}, first {missing[0]} {tuple(needed[missing[0]].shape)}')
    if extra:
        faults.append(f'has {len(extra)} more, first {extra[0]} {tuple(weights[extra[0]].shape)}')
    if other:
        faults.append(f'has {len(other)} of another shape, first {other[0]} '
                      f'{tuple(weights[other[0]].shape)}, not {tuple(needed[other[0]].shape)}')
    check(not faults, f'{file} does not hold the tensors that are needed: it '
                      f'{"; it ".join(faults)}; give a Stable Diffusion 1.5')
    for name, w in weights.items():
        check(w.is_floating_point(), f'{file} has {name} as {w.dtype}, which cannot be weights')
        layout = torch.channels_last if w.ndim == 4 else torch.preserve_format      # the fastest
        weights[name] = w = w.to(dtype, memory_format=layout)
        low, high = torch.aminmax(w)           # NaN if there is one; faster than isfinite() in fp16
        check(math.isfinite(low) and math.isfinite(high),
              f'{file} has NaN or infinity in {name} (as {dtype}); download it again, or use fp32')
    state = {key: weights[name] for key, name in names.items()}
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval()


def write_tensors(tensors, file, **metadata):
    """Write {name: tensor} as a .safetensors file, with metadata {name: text} in its header."""
    file.touch()
    rights = file.stat().st_mode
    try:
        save_file({name: w.contiguous().cpu() for name, w in tensors.items()}, file,
                  {'format': 'pt', **metadata})
    except SafetensorError as error:
        raise OSError(f'{file} could not be written ({error})') from None
    with contextlib.suppress(OSError):              # not every file system has rights
        file.chmod(rights)                    # save_file makes files that only their owner can read
    sync(file)


def write_json(file, content):
    """Write a JSON file, whole or not at all."""
    new = Path(f'{file}.tmp')
    new.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    sync(new)
    new.replace(file)


def sync(file):
    """Wait until a file's content is on the disk."""
    with open(file, 'rb+') as opened:          # Windows syncs no file that is open for reading only
        os.fsync(opened.fileno())


def save_part(part, net, config, folder, dtype):
    """Write config.json and the weights of 'unet', 'vae' or 'text_encoder' to a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: w.detach().to(dtype) for key, w in net.state_dict().items()}
    write_tensors(weights, folder / 'weights.tmp')
    write_json(folder / 'config.json', config)
    (folder / 'weights.tmp').replace(folder / f'{STEM[part]}.safetensors')


# -------------------------------------------------------------------------------------------------
# The UNet's own files

# All entries of diffusers' config.json, apart from sizes, that change what the UNet computes.
FIXED = {
    '_class_name': 'UNet2DConditionModel', 'in_channels': 4, 'out_channels': 4, 'act_fn': 'silu',
    'norm_eps': 1e-5, 'flip_sin_to_cos': True, 'freq_shift': 0, 'center_input_sample': False,
    'downsample_padding': 1, 'mid_block_scale_factor': 1,
    'mid_block_type': 'UNetMidBlock2DCrossAttn', 'num_attention_heads': None,
    'transformer_layers_per_block': 1, 'reverse_transformer_layers_per_block': None,
    'only_cross_attention': False, 'mid_block_only_cross_attention': False,
    'dual_cross_attention': False, 'use_linear_projection': False, 'attention_type': 'default',
    'cross_attention_norm': None, 'resnet_time_scale_shift': 'default',
    'resnet_skip_time_act': False, 'resnet_out_scale_factor': 1,
    'time_embedding_type': 'positional', 'time_embedding_dim': None,
    'time_embedding_act_fn': None, 'timestep_post_act': None, 'time_cond_proj_dim': None,
    'class_embed_type': None, 'num_class_embeds': None, 'class_embeddings_concat': False,
    'addition_embed_type': None, 'encoder_hid_dim': None, 'encoder_hid_dim_type': None,
    'conv_in_kernel': 3, 'conv_out_kernel': 3, 'dropout': 0}

# The noise schedule that SD 1.5 was trained with (v1-inference.yaml 5-8), under diffusers' names.
SCHEDULE = {'num_train_timesteps': 1000, 'beta_start': 0.00085, 'beta_end': 0.012,
            'beta_schedule': 'scaled_linear', 'prediction_type': 'epsilon', 'trained_betas': None,
            'rescale_betas_zero_snr': False}
BETAS = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2        # "scaled_linear"; (1000,)

# Entries that describe the training of an original file, with the values that are right for SD 1.5.
# They are in its header (by ComfyUI and kohya), in its .yaml file, or names of marker tensors.
TRAINING = {
    'modelspec.architecture': ('stable-diffusion-v1', 'stable-diffusion-v1-5'),
    'modelspec.prediction_type': ('epsilon', 'eps'), 'modelspec.predict_key': ('epsilon', 'eps'),
    'modelspec.encoder_layer': ('1',), 'parameterization': ('eps',), 'beta_schedule': ('linear',),
    'linear_start': ('0.00085', '8.5e-4', '8.5e-04'), 'linear_end': ('0.0120', '0.012', '1.2e-2'),
    'timesteps': ('1000',), 'scale_factor': ('0.18215',),
    'rescale_betas_zero_snr': ('False', 'false'), 'v_pred': (), 'ztsnr': (),
    'edm_vpred.sigma_max': ()}

# The layers of a resnet in original files.
RESNET = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1',
          'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection'}


def original_names(net):
    """Return {key of the network: name in an original file} for all of its tensors.

    diffusers numbers the blocks level by level, CompVis through all levels. A level has n blocks on
    each way: down, its resnets and a downsampling; up, one more resnet than down."""
    table = {'conv_in': 'input_blocks.0.0', 'conv_norm_out': 'out.0', 'conv_out': 'out.2',
             'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
             'mid_block.resnets.0': 'middle_block.0', 'mid_block.attentions.0': 'middle_block.1',
             'mid_block.resnets.1': 'middle_block.2'}
    n = len(net.up_blocks[0].resnets)
    for i, up in enumerate(net.up_blocks):
        for j in range(n):
            for k, kind in enumerate(('resnets', 'attentions')):
                table[f'down_blocks.{i}.{kind}.{j}'] = f'input_blocks.{n * i + j + 1}.{k}'
                table[f'up_blocks.{i}.{kind}.{j}'] = f'output_blocks.{n * i + j}.{k}'
        table[f'down_blocks.{i}.downsamplers.0.conv'] = f'input_blocks.{n * (i + 1)}.0.op'
        last = 2 if up.attentions else 1      # its place in the block, after resnet and transformer
        table[f'up_blocks.{i}.upsamplers.0.conv'] = f'output_blocks.{n * i + n - 1}.{last}.conv'
    names = {}
    for key in net.state_dict():
        module = next(module for module in table if key.startswith(module + '.'))
        layer, dot, rest = key[len(module) + 1:].partition('.')
        names[key] = PREFIX['unet'] + f'{table[module]}.{RESNET.get(layer, layer)}{dot}{rest}'
    return names


def from_config(config, tensors, file, dtype=torch.float32):
    """Build the UNet of a diffusers config, with {name: tensor} under diffusers' names."""
    check_config(config, FIXED, file)
    channels = config_ints(config, 'block_out_channels', file)
    heads = config_int(config, 'attention_head_dim', file)
    groups = config_int(config, 'norm_num_groups', file, default=32)
    down, up = config.get('down_block_types'), config.get('up_block_types')
    kinds = down if isinstance(down, list) else []
    attention = [kind == 'CrossAttnDownBlock2D' for kind in kinds]
    check((down, up) == block_types(attention) and len(attention) == len(channels),
          f'the config of {file} has down_block_types {down} and up_block_types {up}; they must be '
          f'{len(channels)} known types each, in opposite order')
    check(all(c % groups == 0 and c % heads == 0 and c % 2 == 0 for c in channels),
          f'the config of {file} has block_out_channels {channels}, which must be even multiples '
          f'of attention_head_dim {heads} and norm_num_groups {groups}')
    with torch.device('meta'):   # no memory and no random numbers for weights that will be replaced
        net = UNet(channels, config_int(config, 'cross_attention_dim', file), heads,
                   config_int(config, 'layers_per_block', file), groups, attention)
    if config.get('sample_size') is not None:
        net.sample_size = config_int(config, 'sample_size', file)
    return fill(net, tensors, {key: key for key in net.state_dict()}, file, dtype)


def block_types(attention):
    """Return diffusers' names of the blocks on the way down and on the way up."""
    return (['CrossAttnDownBlock2D' if a else 'DownBlock2D' for a in attention],
            ['CrossAttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attention)])


def load(path, dtype=torch.float32):
    """Load a UNet in `dtype` and eval mode. UserError says what is wrong with a checkpoint.

    path: a folder in diffusers layout, which holds unet/ or is that folder itself; an original
    .safetensors file; or a repo id in the local Hugging Face cache. If a file has both training and
    EMA weights, we load the EMA weights, which are also those in SD 1.5's folder."""
    config, tensors, file = open_part(path, 'unet')
    check_schedule(locate(path), tensors)
    if config is not None:
        return from_config(config, tensors, file, dtype)
    with torch.device('meta'):
        net = UNet()
    names, prefix = original_names(net), PREFIX['unet']
    if any(name.startswith('model_ema.diffusion_model') for name in tensors):
        prefix = 'model_ema.diffusion_model'        # CompVis wrote these without dots: ema.py 16-21
        names = {key: prefix + name.removeprefix(PREFIX['unet']).replace('.', '')
                 for key, name in names.items()}
    return fill(net, tensors, names, file, dtype, prefix)


def check_schedule(root, tensors):
    """Raise UserError if a checkpoint says that it was trained in another way than SD 1.5.

    A pipeline says so in its scheduler's config. An original file can say so in its tensors, in its
    header, or in a .yaml file of its name."""
    for folder in (root, root.parent):          # the parent, because the path may be X/unet
        file = folder / 'scheduler' / 'scheduler_config.json'
        if file.is_file():
            # diffusers' defaults, which hold where a key is absent, are those of another schedule.
            defaults = {'beta_start': 0.0001, 'beta_end': 0.02, 'beta_schedule': 'linear'}
            check_config({**defaults, **read_json(file)}, SCHEDULE, file)
    for name, needed in (('betas', BETAS), ('alphas_cumprod', np.cumprod(1 - BETAS))):
        found = tensors.get(name, torch.tensor(needed)).double().numpy()    # in fp16, 0.1 % off
        check(found.shape == needed.shape and np.allclose(found, needed, rtol=0.01),
              f'{root} holds {name} of another noise schedule; give a Stable Diffusion 1.5')
    said = {name: 'yes' for name in tensors if name in TRAINING}
    if root.is_file():
        with safe_open(root, 'pt') as opened:
            said |= opened.metadata() or {}
    yaml = root.with_suffix('.yaml')
    if root.is_file() and yaml.is_file():
        said |= re.findall(r'^ *(\w+): *["\']?([^\s"\']+)', yaml.read_text(encoding='utf-8'), re.M)
    for key in TRAINING.keys() & said.keys():
        check(said[key] in TRAINING[key], f'{root} says {key}: {said[key]}, but SD 1.5 has '
              f'{" or ".join(TRAINING[key]) or "no such entry"}; give a Stable Diffusion 1.5')


def original(net):
    """Return {name: tensor} of a UNet as an original file holds it: the inverse of load()."""
    with torch.device('meta'):
        sizes = UNet().sizes
    check(net.sizes == sizes, f'an original file holds a UNet of SD 1.5\'s size, not {net.sizes}; '
                              'write a folder instead')
    state = net.state_dict()
    return {name: state[key] for key, name in original_names(net).items()}


def save(net, folder, dtype=torch.float32):
    """Write config.json and weights, for load() and for diffusers' UNet2DConditionModel."""
    sizes = net.sizes
    down, up = block_types(sizes['attention'])
    config = {**FIXED, 'block_out_channels': sizes['channels'], 'layers_per_block': sizes['layers'],
              'norm_num_groups': sizes['groups'], 'cross_attention_dim': sizes['context_dim'],
              'attention_head_dim': sizes['heads'], 'down_block_types': down, 'up_block_types': up,
              'sample_size': net.sample_size}
    save_part('unet', net, config, folder, dtype)


def save_pipeline(folder, scheduler='DDPM'):
    """Write the files that make a folder with all networks a StableDiffusionPipeline of diffusers.

    With timesteps=[t_init] and latents=sigma * z, DDPM makes a generator's one step, and LCM makes
    several, because it adds new noise to each x0-prediction."""
    (folder / 'scheduler').mkdir(exist_ok=True)
    write_json(folder / 'scheduler' / 'scheduler_config.json', {
        **SCHEDULE, '_class_name': f'{scheduler}Scheduler', 'clip_sample': False,
        'set_alpha_to_one': False, 'steps_offset': 1})
    write_json(folder / 'model_index.json', {
        '_class_name': 'StableDiffusionPipeline', 'unet': ['diffusers', 'UNet2DConditionModel'],
        'vae': ['diffusers', 'AutoencoderKL'], 'text_encoder': ['transformers', 'CLIPTextModel'],
        'tokenizer': ['transformers', 'CLIPTokenizer'],
        'scheduler': ['diffusers', f'{scheduler}Scheduler'], 'safety_checker': [None, None],
        'feature_extractor': [None, None], 'requires_safety_checker': False})
