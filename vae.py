"""The VAE of Stable Diffusion 1.5, encoder and decoder, from scratch in one file.

Pictures of (3, H, W) in [-1, 1] become latents of (4, H/8, W/8) and back. Module names are those of
diffusers' AutoencoderKL, so a published checkpoint loads with a strict load_state_dict. Constants
come from CompVis/stable-diffusion @21f890f, ldm/modules/diffusionmodules/model.py ("model.py" below).

    vae = load('path/to/checkpoint');  latents = vae.encode(images);  images = vae.decode(latents)
"""

import re

import torch
import torch.nn.functional as F
from torch import nn


def group_norm(groups, width):
    # eps 1e-6 in every norm (model.py 38-39); torch's default 1e-5 gives plausible, wrong pictures.
    return nn.GroupNorm(groups, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W). Like the UNet's, without a time embedding."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = group_norm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # The key exists in a checkpoint only where the width changes.
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x):
        # In place what nothing else reads: fresh memory was 7 % of a decoding at 512 px on a CPU.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over all pixels, ONE head as wide as the picture's channels (model.py 150-202)."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = group_norm(groups, width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])      # a list, for the name to_out.0

    def forward(self, x):
        b, c, height, width = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)           # (B, H*W, C)
        q, k, v = (proj(h)[:, None] for proj in (self.to_q, self.to_k, self.to_v))      # (B, 1, H*W, C)
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).reshape(b, c, height, width)


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        # Zeros on the right and bottom only (model.py 66-76). Symmetric padding shifts every picture.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode='nearest'))


class DownBlock(nn.Module):
    def __init__(self, c_in, c_out, layers, groups, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])

    def forward(self, x):
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, c_in, c_out, layers, groups, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x):
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, channels, layers, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[i], widths[i + 1], layers, groups, last=i == len(channels) - 1)
            for i in range(len(channels)))
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = group_norm(groups, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 8, 3, padding=1)    # 4 means and 4 log variances

    def forward(self, x):                                           # (B, 3, H, W)
        x = self.conv_in(x)                                         # (B, 128, H, W)
        for block in self.down_blocks:
            x = block(x)                                            # ... (B, 512, H/8, W/8)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))         # (B, 8, H/8, W/8)


class Decoder(nn.Module):
    def __init__(self, channels, layers, groups):
        super().__init__()
        widths = [channels[-1], *reversed(channels)]
        self.conv_in = nn.Conv2d(4, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(                             # one resnet a level more than encoder
            UpBlock(widths[i], widths[i + 1], layers + 1, groups, last=i == len(channels) - 1)
            for i in range(len(channels)))
        self.conv_norm_out = group_norm(groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z):                                           # (B, 4, H/8, W/8)
        x = self.mid_block(self.conv_in(z))                         # (B, 512, H/8, W/8)
        for block in self.up_blocks:
            x = block(x)                                            # ... (B, 128, H, W)
        return self.conv_out(F.silu(self.conv_norm_out(x)))         # (B, 3, H, W)


class VAE(nn.Module):
    """Stable Diffusion's autoencoder; the defaults are SD 1.5's 83.7 M weights.

    channels: widths of the levels, finest first; each level but the last halves the side (8 = 2^3).
    layers: resnets a level in the encoder (the decoder has one more). groups: of every GroupNorm.
    scale: latents are multiplied by it so that the diffusion sees unit variance; 0.18215 is from
    configs/stable-diffusion/v1-inference.yaml 17. It is no part of the weights.
    """

    def __init__(self, channels=(128, 256, 512, 512), layers=2, groups=32, scale=0.18215):
        super().__init__()
        if not 0 < scale < float('inf'):
            raise ValueError(f'latents cannot be scaled by {scale}')
        self.scale = scale
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels, layers, groups)
        self.decoder = Decoder(channels, layers, groups)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def moments(self, images):
        """(B, 3, H, W) in [-1, 1] -> posterior mean and log variance, each (B, 4, H/8, W/8), unscaled."""
        images = images.to(self.quant_conv.weight.dtype)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)          # ldm/modules/distributions/distributions.py 27-28

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8): the posterior mean times scale."""
        return self.moments(images)[0] * self.scale

    def decode(self, latents):
        """Latents (B, 4, h, w), scaled -> images (B, 3, 8h, 8w), about [-1, 1] but not clamped."""
        latents = (latents / self.scale).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(latents))


# ---------------------------------------------------------------------------------------------------
# Files

# The attention's modules here, in diffusers before 0.17 (SD 1.5's own folder mixes both), and in
# CompVis' files.
ATTENTION = {'group_norm': ('group_norm', 'norm'), 'to_q': ('query', 'q'), 'to_k': ('key', 'k'),
             'to_v': ('value', 'v'), 'to_out.0': ('proj_attn', 'proj_out')}


def original_name(key, levels=4):
    """The name of tensor `key` in CompVis' files, which count the decoder's levels from the finest."""
    for here, there in (
            (r'down_blocks\.(\d+)\.resnets', r'down.\1.block'),
            (r'down_blocks\.(\d+)\.downsamplers\.0', r'down.\1.downsample'),
            (r'up_blocks\.(\d+)\.resnets', lambda m: f'up.{levels - 1 - int(m[1])}.block'),
            (r'up_blocks\.(\d+)\.upsamplers\.0', lambda m: f'up.{levels - 1 - int(m[1])}.upsample'),
            (r'mid_block\.resnets\.(\d)', lambda m: f'mid.block_{int(m[1]) + 1}'),
            (r'mid_block\.attentions\.0\.(\w+(\.0)?)', lambda m: f'mid.attn_1.{ATTENTION[m[1]][1]}'),
            (r'\bconv_norm_out\b', 'norm_out'), (r'\bconv_shortcut\b', 'nin_shortcut')):
        key = re.sub(here, there, key)
    return key


def load(path, dtype=torch.float32):
    """The VAE in `path`, in that dtype (None: the file's) and eval mode.

    path: a folder in diffusers layout (with a vae/ inside, or that folder itself) whose config.json sizes
    the net; an original .safetensors or .ckpt with a whole model or a VAE alone; or a repo id in the
    local Hugging Face cache. Raises FileNotFoundError or ValueError with a sentence."""
    import unet         # reads all files; here, since the net above needs nothing of it
    config, tensors, file = unet.open_part(path, 'vae')
    if config is not None:
        vae = unet.sized(lambda: VAE(
            tuple(config['block_out_channels']), config['layers_per_block'],
            config.get('norm_num_groups', 32),
            config.get('scaling_factor', 0.18215)), file)           # absent from SD 1.5's own config.json

        def names(key):
            old = re.sub(r'(attentions\.0)\.(\w+(\.0)?)',
                         lambda m: f'{m[1]}.{ATTENTION[m[2]][0]}', key)
            return [key, old]
        return unet.fill(vae, tensors, names, file, dtype)

    prefix = unet.PREFIX['vae']
    first = [tensors.get(f'{prefix}encoder.down.{i}.block.0.conv1.weight') for i in range(4)]
    channels = [w.shape[0] if w is not None else c for w, c in zip(first, (128, 256, 512, 512))]
    vae = unet.sized(lambda: VAE(tuple(channels)), file)

    def names(key):
        name = original_name(key)
        # Files converted back from diffusers in 2023 kept its names within the attention.
        here = re.sub(r'.*attentions\.0', '', key)
        return [prefix + name, prefix + re.sub(r'(mid\.attn_1)\..*', rf'\1{here}', name)]
    return unet.fill(vae, tensors, names, file, dtype, scope=prefix)


def save(vae, folder, dtype=torch.float32):
    """Write config.json and safetensors, for load() here and diffusers' AutoencoderKL to open."""
    import unet
    channels = [block.resnets[0].conv1.out_channels for block in vae.encoder.down_blocks]
    config = {
        '_class_name': 'AutoencoderKL', 'in_channels': 3, 'out_channels': 3, 'latent_channels': 4,
        'act_fn': 'silu', 'block_out_channels': channels,
        'layers_per_block': len(vae.encoder.down_blocks[0].resnets),
        'norm_num_groups': vae.encoder.conv_norm_out.num_groups, 'scaling_factor': vae.scale,
        'sample_size': 512, 'down_block_types': ['DownEncoderBlock2D'] * len(channels),
        'up_block_types': ['UpDecoderBlock2D'] * len(channels)}
    unet.write_part('vae', vae, config, folder, dtype)
