"""The UNet of Stable Diffusion 1.5 from scratch in one file: noise in a latent at step t, given text.

Module names are those of diffusers' UNet2DConditionModel, so a published checkpoint or student loads with
a strict load_state_dict. Every constant that differs from torch's default names its source:
"openaimodel.py", "attention.py" and "util.py" are CompVis/stable-diffusion @21f890f,
ldm/modules/{diffusionmodules/,}.

    unet = load('path/to/checkpoint');  eps_hat = unet(x, t, context)

Shapes: B batch, C channels, H and W the latent's sides, N = H*W, L = 77 text positions, D = 768.

Below the net stands what finds, reads and writes checkpoints, for vae.py and clip_text.py too.
"""

import json
import math
import os
import pickle
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def timestep_embedding(t, width):
    """Integer t (B,) -> (B, width) float32: cosines then sines of t at geometric frequencies from 1 down.

    The order [cos | sin] and the division by width/2 (not width/2 - 1) are util.py 161-166 (diffusers:
    flip_sin_to_cos, freq_shift 0). Always float32: t = 999 times a frequency needs its digits.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def for_each_text(x, like):
    """x (B, ...) if `like` has B rows, [x, x] if it has 2 B: a copy for each text of every latent."""
    return x if len(x) == len(like) else torch.cat([x] * (len(like) // len(x)))


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
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)           # torch's default: util.py 199-216
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # The key exists in a checkpoint only where the width changes.
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        temb = self.time_emb_proj(F.silu(temb))                     # its own SiLU, before the projection
        h = h + for_each_text(temb, h)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) on context (B, L, D), or on itself when context is None."""

    def __init__(self, width, context_dim, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f'{width} channels cannot be shared by {heads} heads')
        self.heads = heads
        # No bias but in the output: attention.py 158-168.
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])      # a list for to_out.0 (1 was dropout)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2)     # (B, heads, N or L, C/heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)                 # scaled by (C/heads) ** -0.5
        return self.to_out[0](h.transpose(1, 2).flatten(2))         # (B, N, C)


class GEGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)                 # in this order: attention.py 40-44
        return value * F.gelu(gate)                                 # exact, not the tanh approximation


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(width), nn.Identity(), nn.Linear(4 * width, width)])     # 1 was dropout

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward (attention.py 196-215).

    Each comes after a LayerNorm, and each is added."""

    def __init__(self, width, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.attn2 = Attention(width, context_dim, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        x = for_each_text(x + self.attn1(self.norm1(x)), context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """The transformer block over the pixels of x (B, C, H, W). attention.py 218-261."""

    def __init__(self, width, context_dim, heads, groups):
        super().__init__()
        # eps is NOT 1e-5 as in the resnets: attention.py 76-77.
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_dim, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))                              # (B, C, H, W)
        h = h.flatten(2).transpose(1, 2)                            # (B, N, C)
        h = self.transformer_blocks[0](h, context)
        h = self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))      # (B, C, H, W)
        return for_each_text(x, h) + h


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
        # `size` is the next skip's: twice x's, or one less where the way down rounded an odd side up.
        return self.conv(F.interpolate(x, size=size, mode='nearest'))


class DownBlock(nn.Module):
    """`layers` resnets (+ transformers), then a downsampling unless last. Returns x and all its skips."""

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
    """One resnet (+ transformer) for each skip it consumes, then an upsampling unless last."""

    def __init__(self, c_in, c_out, c_skips, c_time, context_dim, heads, groups, attention, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock((c_in if i == 0 else c_out) + c_skip, c_out, c_time, groups)
            for i, c_skip in enumerate(c_skips))
        self.attentions = nn.ModuleList(
            SpatialTransformer(c_out, context_dim, heads, groups) for _ in (c_skips if attention else []))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x, skips, temb, context):
        for i, resnet in enumerate(self.resnets):
            skip = for_each_text(skips.pop(), x)
            x = resnet(torch.cat([x, skip], dim=1), temb)           # in this order: openaimodel.py 735-737
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """Stable Diffusion's UNet; the defaults are SD 1.5's 860 M weights.

        level | side at 512 px | channels | text attention | resnets down / up
          0   |      64        |    320   |      yes       |      2 / 3
          1   |      32        |    640   |      yes       |      2 / 3
          2   |      16        |   1280   |      yes       |      2 / 3
          3   |       8        |   1280   |      no        |      2 / 3
         mid  |       8        |   1280   |      yes       |        2

    heads: the NUMBER of heads, 8 at every width, though config.json names it attention_head_dim
    (openaimodel.py 542-543, v1-inference.yaml 39). layers: resnets a level on the way down.
    """

    def __init__(self, channels=(320, 640, 1280, 1280), context_dim=768, heads=8, layers=2, groups=32,
                 attention=(True, True, True, False)):
        super().__init__()
        self.sample_size = 64       # side of the latents it was trained on; nothing here depends on it
        c_time, levels = 4 * channels[0], len(channels)
        self.conv_in = nn.Conv2d(4, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], c_time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        c, c_skips = channels[0], [channels[0]]                     # the widths that the way up will meet
        for i in range(levels):
            last = i == levels - 1
            self.down_blocks.append(DownBlock(
                c, channels[i], c_time, context_dim, heads, layers, groups, attention[i], last))
            c = channels[i]
            c_skips += [c] * (layers if last else layers + 1)
        self.mid_block = MidBlock(c, c_time, context_dim, heads, groups)
        for i in reversed(range(levels)):
            skips = [c_skips.pop() for _ in range(layers + 1)]
            self.up_blocks.append(UpBlock(
                c, channels[i], skips, c_time, context_dim, heads, groups, attention[i], last=i == 0))
            c = channels[i]
        self.conv_norm_out = nn.GroupNorm(groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, 4, 3, padding=1)

    def forward(self, x, t, context):
        """The noise (B, 4, H, W) in latents x (B, 4, H, W) at steps t, given text states (B, L, D).

        t is integer, (B,) or (), in [0, 999]. The net computes in its weights' dtype, or autocast's. With
        2 B text states x is taken with the first B and again with the last B, the noise is (2 B, 4, H, W),
        and what comes before the first look at a text is computed once (for_each_text)."""
        dtype = self.conv_in.weight.dtype
        x, context = x.to(dtype), context.to(dtype)
        temb = timestep_embedding(t.expand(len(x)), self.conv_in.out_channels)          # (B, 320) float32
        temb = self.time_embedding(temb.to(dtype))                  # (B, 1280)
        x = self.conv_in(x)                                         # (B, 320, H, W)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, temb, context)                       # 320 H/2, 640 H/4, 1280 H/8 twice
            skips += more
        x = self.mid_block(x, temb, context)                        # (B, 1280, H/8, W/8)
        for block in self.up_blocks:
            x = block(x, skips, temb, context)                      # and back, each level with its skips
        return self.conv_out(F.silu(self.conv_norm_out(x)))         # (B, 4, H, W)


# ---------------------------------------------------------------------------------------------------
# Files. What comes first serves vae.py and clip_text.py too: it finds and reads every layout that Stable
# Diffusion 1.5 is found in, and says in a sentence what a file is that is something else. Names of
# files and tensors are those of the real ones; where they are from stands in tests/test_checkpoints.py.

class UserError(Exception):
    """A user's mistake, told in one plain sentence: what was found, what is needed, what to do.

    The command lines print it and exit with code 2. Every other exception is a bug and keeps its traceback."""


def check(condition, message):
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


# In an original file, one for everything, a part's tensors begin with its prefix.
PREFIX = {'unet': 'model.diffusion_model.', 'vae': 'first_stage_model.',
          'text_encoder': 'cond_stage_model.'}
STEM = {'unet': 'diffusion_pytorch_model', 'vae': 'diffusion_pytorch_model', 'text_encoder': 'model'}

# What real files hold beside the weights: the schedule, EMA copies and counters, a VAE's loss, and of
# CLIP the positions (0 ... 76, but wrong in some merged files) and what serves its image half.
BESIDE = re.compile(
    r'betas|((sqrt|log)_)?((one_minus|recip|recipm1)_)?alphas_cumprod(_prev)?|lvlb_weights|logvar|'
    r'posterior_(variance|log_variance_clipped|mean_coef[12])|scale_factor|model_ema\..*|loss\..*|'
    r'(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?)')

# What else is found under such names: part of a tensor's name, and what its owner is.
FOREIGN = {'lora': 'a LoRA', 'control_model.': 'a ControlNet', 'controlnet_': 'a ControlNet',
           'conditioner.embedders.': 'Stable Diffusion XL',
           'cond_stage_model.model.': 'Stable Diffusion 2', 'double_blocks.': 'Flux',
           'joint_blocks.': 'Stable Diffusion 3'}
CHANNELS = {9: 'an inpainting model', 8: 'InstructPix2Pix', 5: 'a depth model'}     # of conv_in
CONTEXT = {1024: 'Stable Diffusion 2', 2048: 'Stable Diffusion XL'}                 # of cross-attention


def read_tensors(file):
    """{name: tensor} of a .safetensors, .ckpt or .bin file, memory-mapped; its content decides which.

    Nothing in the file is run. ValueError says what it is instead."""
    with open(file, 'rb') as opened:
        head = opened.read(512)
    if head[8:9] == b'{':                   # safetensors: 8 bytes of length, then JSON
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f'{file} is a safetensors file cut off or damaged ({error}); '
                             'download it again') from None
    if head.startswith(b'version https://git-lfs'):
        raise ValueError(f'{file} is a git-lfs pointer, not the weights; '
                         'run `git lfs pull` where it lies, or download the file itself')
    if head.lstrip().startswith(b'<'):
        raise ValueError(f'{file} is an HTML page, not weights; '
                         'download it again, logged in if the site asks for it')
    if head[:2] != b'PK' and head[:1] != b'\x80':
        raise ValueError(f'{file} is neither safetensors nor a torch file, or cut off at its very start; '
                         'expected .safetensors, .ckpt or .bin')

    class Skipped:                          # stands for what .ckpt files hold beside weights
        def __init__(self, *_): pass
        def __setstate__(self, _): pass
    names = ['pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint', 'numpy.dtype',
             'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar']
    try:
        with torch.serialization.safe_globals([(Skipped, name) for name in names]):
            state = torch.load(file, map_location='cpu', weights_only=True, mmap=head[:2] == b'PK')
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'{file} is a pickle that {asked_for(error) or "holds more than tensors"}, so it was '
            'not opened; an official SiD-LSG generator is read safely by `python sid_lsg.py convert`, '
            'of anything else look for a .safetensors') from None
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = ' '.join(str(error).split())[:120]
        raise ValueError(f'{file} is a torch file cut off or damaged ({reason}); '
                         'download it again') from None
    while isinstance(state, dict) and 'state_dict' in state:
        state = state['state_dict']
    if not isinstance(state, dict):
        raise ValueError(f'{file} holds a {type(state).__name__}; expected tensors by name')
    return {name: tensor for name, tensor in state.items()
            if isinstance(name, str) and torch.is_tensor(tensor)}


def asked_for(error):
    """Which name torch.load(weights_only=True) refused, in two words more; None of other errors."""
    asked = re.search(r'GLOBAL (\S+)', str(error))
    return asked and f'asks for {asked[1]}'


# One repository, before and after it moved.
SAME = ('stable-diffusion-v1-5/stable-diffusion-v1-5', 'runwayml/stable-diffusion-v1-5')


def locate(path):
    """The Path that `path` names: a file, a folder, or a repo id in the local Hugging Face cache."""
    if Path(path).exists():
        return Path(path)
    names = [str(path)]
    if names[0] in SAME:
        names = [names[0], *(name for name in SAME if name != names[0])]
    home = os.environ.get('HF_HOME') or Path(
        os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'huggingface'
    cache = Path(os.environ.get('HF_HUB_CACHE') or os.environ.get('HUGGINGFACE_HUB_CACHE')
                 or Path(home) / 'hub')     # the order of huggingface_hub/constants.py 160-181
    for name in names if re.fullmatch(r'[\w.-]+/[\w.-]+', names[0]) else ():
        repo = cache / f'models--{name.replace("/", "--")}'
        if not repo.is_dir():
            continue
        main = repo / 'refs' / 'main'
        if not main.is_file():
            raise FileNotFoundError(f'{repo} has no refs/main, its download never finished; repeat it')
        snapshot = repo / 'snapshots' / main.read_text().strip()
        if not snapshot.is_dir():
            raise FileNotFoundError(f'{main} names the snapshot {snapshot.name}, which is not there; '
                                    'download the repository again')
        return snapshot
    raise FileNotFoundError(
        f'expected a checkpoint at {path}, found nothing there; give a folder in diffusers layout, '
        f'a .safetensors or .ckpt file, or a repo id in {cache}')


def read_metadata(file):
    """The {str: str} in the header of a .safetensors file; {} of any other."""
    try:
        with safe_open(file, 'pt') as opened:
            return opened.metadata() or {}
    except SafetensorError:
        return {}


def read_json(file):
    """The dict in a JSON file."""
    try:
        content = json.loads(Path(file).read_text(encoding='utf-8-sig'))
    except ValueError as error:
        raise ValueError(f'{file} is not JSON ({error}); put back a whole one') from None
    if not isinstance(content, dict):
        raise ValueError(f'{file} holds a {type(content).__name__}; expected settings by name')
    return content


def open_part(path, part):
    """What load() needs of a checkpoint's part, 'unet', 'vae' or 'text_encoder': (config, tensors, file).

    config is a folder's config.json, None for a single file. Raises FileNotFoundError or ValueError."""
    place = locate(path)
    if place.is_file():
        return None, open_single(place, part), place
    folder = place / part if (place / part).is_dir() else place
    if folder == place and not (place / 'config.json').is_file():
        index = place / 'model_index.json'
        kind = read_json(index).get('_class_name') if index.is_file() else None
        there = ', '.join(sorted(f'{p.name}/' for p in place.iterdir() if p.is_dir())) or 'no folder'
        raise FileNotFoundError(
            f'expected {part}/ or a config.json in {place}, found {there}'
            + (f'; its model_index.json says {kind}' if kind else '')
            + '; give a whole Stable Diffusion 1.5, or download what is missing')
    if not (folder / 'config.json').is_file():
        raise FileNotFoundError(f'expected config.json beside the weights in {folder}; download it too')
    config = read_json(folder / 'config.json')
    scheduler = place / 'scheduler' / 'scheduler_config.json'
    kind = read_json(scheduler).get('prediction_type') if scheduler.is_file() else None
    if part == 'unet' and kind not in (None, 'epsilon'):            # the weights do not tell
        raise ValueError(f'{scheduler} says that the UNet predicts {kind}; expected epsilon, as that of '
                         'Stable Diffusion 1.5 does')
    stem = STEM[part]
    old = 'pytorch_model' if part == 'text_encoder' else stem
    names = [f'{stem}.safetensors', f'{stem}.fp16.safetensors', f'{old}.bin', f'{old}.fp16.bin']
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f'expected weights in {folder}, found none of {", ".join(names)}; '
                                'download one of them, or give another folder')
    tensors = read_tensors(file)
    check_kind(tensors, file, config)
    return config, tensors, file


def open_single(file, part):
    """The tensors of an original file in which `part` must be; a VAE may also be alone in its file."""
    tensors = read_tensors(file)
    check_kind(tensors, file, {})
    if not any(name.startswith(PREFIX[part]) for name in tensors):
        if part == 'vae' and 'decoder.conv_in.weight' in tensors:
            return {PREFIX['vae'] + name if not BESIDE.fullmatch(name) else name: tensor
                    for name, tensor in tensors.items()}
        what = [kind for kind, names in {
            'a UNet': ('conv_in.weight', 'input_blocks.0.0.weight', PREFIX['unet'] + 'out.2.weight'),
            'a VAE': ('decoder.conv_in.weight', PREFIX['vae'] + 'decoder.conv_in.weight'),
            'a text encoder': tuple(n for n in tensors if n.endswith('final_layer_norm.weight'))}.items()
            if any(name in tensors for name in names)]
        found, wanted = ' and '.join(what) or f'{len(tensors)} other tensors', part.replace('_', ' ')
        raise ValueError(f'{file} holds {found}, but no {wanted} ({PREFIX[part]}*); '
                         'expected a whole Stable Diffusion 1.5')
    for name in tensors:
        if not name.startswith(tuple(PREFIX.values())) and not BESIDE.fullmatch(name):
            raise ValueError(f'{file} has a tensor {name}, which has no place in a Stable Diffusion 1.5; '
                             f'expected only {", ".join(PREFIX.values())} and what belongs to them')
    return tensors


def check_kind(tensors, file, config):
    """ValueError where a file or its folder's config is of another model than Stable Diffusion 1.5."""
    kinds = [kind for part, kind in FOREIGN.items() if any(part in name.lower() for name in tensors)]
    for name, w in tensors.items():
        if name.endswith(('input_blocks.0.0.weight', 'conv_in.weight')) and w.ndim == 4:
            kinds += [CHANNELS[w.shape[1]]] if w.shape[1] in CHANNELS and 'decoder' not in name else []
        if name.endswith('attn2.to_k.weight') and w.shape[-1] in CONTEXT:
            kinds.append(CONTEXT[w.shape[-1]])
    if 'UNet' in config.get('_class_name', '') and config.get('cross_attention_dim') in CONTEXT:
        kinds.append(CONTEXT[config['cross_attention_dim']])
    if kinds:
        raise ValueError(f'{file} is {kinds[0]}; expected Stable Diffusion 1.5')


def fill(net, tensors, names, file, dtype, scope=''):
    """`net`, built on the meta device, with its weights: each the first of names(key) that there is.

    Strict: within `scope` every tensor must be used. No copy of what has that dtype; None keeps the
    file's. ValueError names a tensor that is missing, left over, of another shape, or not finite."""
    weights, used = {}, set()
    for key, empty in net.state_dict().items():
        name = next((name for name in names(key) if name in tensors), None)
        if name is None:
            raise ValueError(f'{file} lacks the tensor {names(key)[0]}, '
                             f'expected with shape {tuple(empty.shape)}')
        w = tensors[name]
        if empty.ndim == 2 and w.ndim > 2 and set(w.shape[2:]) == {1}:
            w = w.flatten(1)                # original VAEs have their attention as convolutions
        if w.shape != empty.shape:
            raise ValueError(f'{file} has the tensor {name} with shape {tuple(w.shape)}, '
                             f'expected {tuple(empty.shape)}')
        # torch cannot compute in fp8; fp16 holds all of its numbers.
        weights[key] = w = w.detach().to(dtype or (torch.float16 if w.itemsize == 1 else w.dtype))
        # NaN is both the least and the most; ten times faster than isfinite() of half precision.
        if not all(math.isfinite(end) for end in torch.aminmax(w)):
            raise ValueError(f'{file} has NaN or infinite numbers in the tensor {name}; '
                             'expected finite weights, download it again')
        used.add(name)
    for name in tensors:
        if name.startswith(scope) and name not in used and not BESIDE.fullmatch(name):
            raise ValueError(f'{file} has a tensor {name} of shape {tuple(tensors[name].shape)} '
                             'that has no place in the model')
    net.load_state_dict(weights, strict=True, assign=True)
    return net.eval()


def sized(make, file):
    """make() on the meta device: no memory or random numbers for weights about to be replaced."""
    try:
        with torch.device('meta'):
            return make()
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f'the sizes given with {file} are not those of a Stable Diffusion 1.5 '
                         f'({type(error).__name__}: {error})') from None


def write_tensors(tensors, file, about={}):
    """A .safetensors file of {name: tensor}, with {name: value} `about` it in its header.

    Open to whom a new file here is: the library's own are for their owner alone, so that a web UI under
    another name could not read them."""
    file.touch()
    rights = file.stat().st_mode
    save_file({name: w.contiguous() for name, w in tensors.items()}, file,
              metadata={'format': 'pt', **{name: str(value) for name, value in about.items()}})
    file.chmod(rights)


def write_part(part, net, config, folder, dtype):
    """config.json and the weights of 'unet', 'vae' or 'text_encoder', each named only once it is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors({key: w.detach().to('cpu', dtype) for key, w in net.state_dict().items()},
                  folder / 'weights.tmp')
    (folder / 'config.tmp').write_text(json.dumps(config, indent=2) + '\n')
    (folder / 'weights.tmp').replace(folder / f'{STEM[part]}.safetensors')
    (folder / 'config.tmp').replace(folder / 'config.json')


# ---------------------------------------------------------------------------------------------------
# The UNet's own files

RESNET = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1',
          'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection'}


def original_names(net):
    """{name here, which is diffusers': name in the original files} of every tensor.

    diffusers counts blocks level by level, CompVis through all levels: on each way `n` a level, since
    down there is a downsampler after the resnets, and up there is a resnet more."""
    table, n = {
        'conv_in': 'input_blocks.0.0', 'time_embedding.linear_1': 'time_embed.0',
        'time_embedding.linear_2': 'time_embed.2', 'mid_block.resnets.0': 'middle_block.0',
        'mid_block.attentions.0': 'middle_block.1', 'mid_block.resnets.1': 'middle_block.2',
        'conv_norm_out': 'out.0', 'conv_out': 'out.2'}, len(net.up_blocks[0].resnets)
    for i, up in enumerate(net.up_blocks):
        for j in range(n):
            for k, kind in enumerate(('resnets', 'attentions')):
                table[f'down_blocks.{i}.{kind}.{j}'] = f'input_blocks.{n * i + j + 1}.{k}'
                table[f'up_blocks.{i}.{kind}.{j}'] = f'output_blocks.{n * i + j}.{k}'
        table[f'down_blocks.{i}.downsamplers.0.conv'] = f'input_blocks.{n * (i + 1)}.0.op'
        table[f'up_blocks.{i}.upsamplers.0.conv'] = (
            f'output_blocks.{n * i + n - 1}.{2 if up.attentions else 1}.conv')
    names = {}
    for key in net.state_dict():
        here = next(here for here in table if key.startswith(here + '.'))
        first, _, rest = key[len(here) + 1:].partition('.')
        names[key] = f'{table[here]}.{RESNET.get(first, first)}' + ('.' + rest if rest else '')
    return names


def from_config(config, tensors, file, dtype=torch.float32):
    """The UNet that diffusers' `config` describes, with `tensors` under its names; load() says more."""
    net = sized(lambda: UNet(
        tuple(config['block_out_channels']), config['cross_attention_dim'], config['attention_head_dim'],
        config['layers_per_block'], config.get('norm_num_groups', 32),
        tuple(kind == 'CrossAttnDownBlock2D' for kind in config['down_block_types'])), file)
    net.sample_size = config.get('sample_size', 64)
    return fill(net, tensors, lambda key: [key], file, dtype)


def load(path, dtype=torch.float32):
    """The UNet in `path`, in that dtype (None: the file's) and eval mode.

    path: a folder in diffusers layout (with a unet/ inside, or that folder itself) whose config.json
    sizes the net; an original .safetensors or .ckpt, sized by its tensors' shapes; or a repo id in the
    local Hugging Face cache. Of a file with both training and EMA weights the EMA ones are taken, as
    the diffusers folder does. Raises FileNotFoundError or ValueError with a sentence."""
    config, tensors, file = open_part(path, 'unet')
    if config is not None:
        return from_config(config, tensors, file, dtype)

    def side(name, axis, default):
        tensor = tensors.get(PREFIX['unet'] + name)
        return default if tensor is None else tensor.shape[axis]
    channels = [side(f'input_blocks.{1 + 3 * i}.0.out_layers.3.weight', 0, c)
                for i, c in enumerate((320, 640, 1280, 1280))]
    context = side('input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight', 1, 768)
    net = sized(lambda: UNet(tuple(channels), context), file)
    names = original_names(net)
    prefix = PREFIX['unet']
    if sum(name.startswith('model_ema.diffusion_model') for name in tensors) >= len(names):
        print(f'note: {file} holds training and EMA weights of the UNet; the EMA ones are taken',
              file=sys.stderr)
        # CompVis wrote them without dots (ldm/modules/ema.py 16-21).
        return fill(net, tensors, lambda key: ['model_ema.diffusion_model' + names[key].replace('.', '')],
                    file, dtype, scope='model_ema.diffusion')
    return fill(net, tensors, lambda key: [prefix + names[key]], file, dtype, scope=prefix)


def save(net, folder, dtype=torch.float32):
    """Write config.json and safetensors, for load() here and diffusers' UNet2DConditionModel to open."""
    attention = [bool(block.attentions) for block in net.down_blocks]
    cross = net.mid_block.attentions[0].transformer_blocks[0].attn2
    config = {
        '_class_name': 'UNet2DConditionModel', 'in_channels': 4, 'out_channels': 4, 'act_fn': 'silu',
        'block_out_channels': [block.resnets[0].conv1.out_channels for block in net.down_blocks],
        'layers_per_block': len(net.down_blocks[0].resnets),
        'norm_num_groups': net.conv_norm_out.num_groups,
        'cross_attention_dim': cross.to_k.in_features, 'attention_head_dim': cross.heads,
        'down_block_types': ['CrossAttnDownBlock2D' if a else 'DownBlock2D' for a in attention],
        'up_block_types': ['CrossAttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attention)],
        'sample_size': net.sample_size, 'flip_sin_to_cos': True, 'freq_shift': 0, 'norm_eps': 1e-5,
        'downsample_padding': 1, 'mid_block_scale_factor': 1, 'center_input_sample': False}
    write_part('unet', net, config, folder, dtype)
