"""The UNet of Stable Diffusion 1.5 from scratch in one file: noise in a latent at step t, given text.

Module names are those of diffusers' UNet2DConditionModel, so a published checkpoint or student loads with
a strict load_state_dict. Every constant that differs from torch's default names its source:
"openaimodel.py", "attention.py" and "util.py" are CompVis/stable-diffusion @21f890f,
ldm/modules/{diffusionmodules/,}.

    unet = load('path/to/checkpoint');  eps_hat = unet(x, t, context)

Shapes: B batch, C channels, H and W the latent's sides, N = H*W, L = 77 text positions, D = 768.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


def timestep_embedding(t, width):
    """Integer t (B,) -> (B, width) float32: cosines then sines of t at geometric frequencies 1 ... 1e-4.

    The order [cos | sin] and the division by width/2 (not width/2 - 1) are util.py 161-166 (diffusers:
    flip_sin_to_cos, freq_shift 0). Always float32: t = 999 times a frequency needs its digits.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
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
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)           # torch's default: util.py 199-216
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # The key exists in a checkpoint only where the width changes.
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]  # its own SiLU, before the projection
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) on context (B, L, D), or on itself when context is None."""

    def __init__(self, width, context_dim, heads):
        super().__init__()
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
        x = x + self.attn1(self.norm1(x))
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
        h = h.transpose(1, 2).reshape(x.shape)                      # (B, C, H, W)
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
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)    # x, then skip: openaimodel.py 735-737
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

        t is integer, (B,) or (), in [0, 999]."""
        temb = timestep_embedding(t.expand(len(x)), self.conv_in.out_channels)          # (B, 320) float32
        temb = self.time_embedding(temb.to(x.dtype))                # (B, 1280)
        x = self.conv_in(x)                                         # (B, 320, H, W)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, temb, context)                       # 320 H, 640 H/2, 1280 H/4, 1280 H/8
            skips += more
        x = self.mid_block(x, temb, context)                        # (B, 1280, H/8, W/8)
        for block in self.up_blocks:
            x = block(x, skips, temb, context)                      # and back, each level with its skips
        return self.conv_out(F.silu(self.conv_norm_out(x)))         # (B, 4, H, W)


# ---------------------------------------------------------------------------------------------------
# Files: a folder in diffusers layout, config.json beside diffusion_pytorch_model.safetensors

def load(path):
    """The UNet in `path`, a folder with a unet/ inside (a checkpoint, a student) or that folder itself.

    In fp32, eval mode, sized by config.json. Raises FileNotFoundError or ValueError with a sentence."""
    folder = Path(path)
    if (folder / 'unet').is_dir():
        folder = folder / 'unet'
    for name in ('config.json', 'diffusion_pytorch_model.safetensors'):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f'expected a UNet folder in diffusers layout at {folder}, found no {name} there; '
                'give the folder that holds unet/ or that folder itself')
    try:
        config = json.loads((folder / 'config.json').read_text())
        with torch.device('meta'):          # no memory or random numbers for weights about to be replaced
            net = UNet(
                tuple(config['block_out_channels']), config['cross_attention_dim'],
                config['attention_head_dim'], config['layers_per_block'], config['norm_num_groups'],
                tuple(kind == 'CrossAttnDownBlock2D' for kind in config['down_block_types']))
        net.sample_size = config.get('sample_size', 64)
        weights = load_file(folder / 'diffusion_pytorch_model.safetensors')
        net.load_state_dict({key: w.float() for key, w in weights.items()}, strict=True, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise ValueError(
            f'{folder} does not hold the UNet that its config.json describes; {reason}') from None
    return net.eval()


def save(net, folder, dtype=torch.float32):
    """Write config.json and safetensors, for load() here and diffusers' UNet2DConditionModel to open."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
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
    weights = {key: w.detach().to('cpu', dtype).contiguous() for key, w in net.state_dict().items()}
    save_file(weights, folder / 'diffusion_pytorch_model.safetensors.tmp', metadata={'format': 'pt'})
    (folder / 'config.json.tmp').write_text(json.dumps(config, indent=2) + '\n')
    # A name appears only once its file is whole.
    for name in ('diffusion_pytorch_model.safetensors', 'config.json'):
        (folder / f'{name}.tmp').replace(folder / name)
