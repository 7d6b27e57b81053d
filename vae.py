"""The VAE of Stable Diffusion 1.5, encoder and decoder, from scratch.

Images (3, H, W) in [-1, 1] become latents (4, H/8, W/8) and back. Module names are those of
diffusers' AutoencoderKL, so that published weights load with a strict load_state_dict. Constants
come from CompVis/stable-diffusion @21f890f, ldm/modules/diffusionmodules/model.py ("model.py").

    vae = load('path/to/checkpoint')
    latents = vae.encode(images)
    images = vae.decode(latents)
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from unet import PREFIX, check, check_config, config_int, config_ints, fill, open_part, save_part


def group_norm(groups, width):
    # eps is 1e-6 in every norm (model.py 38-39). torch's default of 1e-5 gives wrong images.
    return nn.GroupNorm(groups, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W). Like the UNet's, without a time embedding."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = group_norm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # A checkpoint has this key only where the number of channels changes.
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x):
        # In place: allocating new memory took 7 % of the time to decode 512 px on a CPU.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over all pixels, with ONE head of the full width (model.py 150-202)."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = group_norm(groups, width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])      # a list, for the name to_out.0

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)           # (B, H * W, C)
        q, k, v = (proj(h)[:, None] for proj in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]           # of (B, 1, H * W, C)
        return x + self.to_out[0](h).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        # Zeros at the right and bottom only (model.py 66-76). Symmetric padding shifts the image.
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
        self.up_blocks = nn.ModuleList(                           # one more resnet than the encoder
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
    """Stable Diffusion's autoencoder. The defaults are SD 1.5's, with 83.7 M weights.

    channels are those of the levels, finest first. Every level but the last halves the resolution.
    layers is the number of resnets per level in the encoder, groups that of every GroupNorm.
    Latents are multiplied by scale, for about unit variance; 0.18215 is from v1-inference.yaml 17.
    """

    def __init__(self, channels=(128, 256, 512, 512), layers=2, groups=32, scale=0.18215):
        super().__init__()
        self.sizes = dict(channels=list(channels), layers=layers, groups=groups)
        self.scale = scale
        self.factor = 2 ** (len(channels) - 1)          # of pixels per latent, in each direction
        self.encoder = Encoder(channels, layers, groups)
        self.decoder = Decoder(channels, layers, groups)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def moments(self, images):
        """Return mean and log variance of images' latents, each (B, 4, H/8, W/8), unscaled."""
        images = images.to(self.quant_conv.weight.dtype)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)        # ldm/modules/distributions/distributions.py 27-28

    def encode(self, images):
        """Encode images (B, 3, H, W) in [-1, 1] as latents (B, 4, H/8, W/8): mean times scale."""
        return self.moments(images)[0] * self.scale

    def decode(self, latents):
        """Decode latents (B, 4, h, w) to images (B, 3, 8h, 8w), about [-1, 1] but not clamped."""
        latents = (latents / self.scale).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(latents))


# -------------------------------------------------------------------------------------------------
# Files

# All entries of diffusers' config.json, apart from sizes, that change what the VAE computes.
FIXED = {
    '_class_name': 'AutoencoderKL', 'in_channels': 3, 'out_channels': 3, 'latent_channels': 4,
    'act_fn': 'silu', 'down_block_types': 'DownEncoderBlock2D',
    'up_block_types': 'UpDecoderBlock2D', 'shift_factor': None, 'latents_mean': None,
    'latents_std': None, 'use_quant_conv': True, 'use_post_quant_conv': True,
    'mid_block_add_attention': True}

# The layers of the attention: here, in diffusers before 0.17 (SD 1.5's folder mixes both), and in
# original files.
ATTENTION = {'group_norm': ('group_norm', 'norm'), 'to_q': ('query', 'q'), 'to_k': ('key', 'k'),
             'to_v': ('value', 'v'), 'to_out.0': ('proj_attn', 'proj_out')}


def deprecated_name(key):
    """Return the name of a tensor in a folder of diffusers before 0.17."""
    return re.sub(r'(attentions\.0)\.(\w+(\.0)?)', lambda m: f'{m[1]}.{ATTENTION[m[2]][0]}', key)


def original_name(key):
    """Return the name of a tensor in an original file. It counts the decoder's levels backwards."""
    for pattern, name in (
            (r'down_blocks\.(\d)\.resnets', r'down.\1.block'),
            (r'down_blocks\.(\d)\.downsamplers\.0', r'down.\1.downsample'),
            (r'up_blocks\.(\d)\.resnets', lambda m: f'up.{3 - int(m[1])}.block'),
            (r'up_blocks\.(\d)\.upsamplers\.0', lambda m: f'up.{3 - int(m[1])}.upsample'),
            (r'mid_block\.resnets\.(\d)', lambda m: f'mid.block_{int(m[1]) + 1}'),
            (r'mid_block\.attentions\.0\.(\w+(\.0)?)',
             lambda m: f'mid.attn_1.{ATTENTION[m[1]][1]}'),
            (r'\bconv_norm_out\b', 'norm_out'),
            (r'\bconv_shortcut\b', 'nin_shortcut')):
        key = re.sub(pattern, name, key)
    return PREFIX['vae'] + key


def from_config(config, file):
    """Build the VAE of a diffusers config on the meta device."""
    check_config(config, FIXED, file)
    channels = config_ints(config, 'block_out_channels', file)
    groups = config_int(config, 'norm_num_groups', file, default=32)
    scale = config.get('scaling_factor', 0.18215)       # SD 1.5's config.json does not have it
    for key in ('down_block_types', 'up_block_types'):
        types = config.get(key)
        check(isinstance(types, list) and len(types) == len(channels),
              f'the config of {file} must give {len(channels)} {key}, found {types}')
    check(all(c % groups == 0 for c in channels), f'the config of {file} has block_out_channels '
          f'{channels}, which must be multiples of norm_num_groups {groups}')
    check(type(scale) in (int, float) and 0 < scale < float('inf'),
          f'the config of {file} must give scaling_factor as a number above 0, found {scale}')
    with torch.device('meta'):
        return VAE(channels, config_int(config, 'layers_per_block', file), groups, scale)


def load(path, dtype=torch.float32):
    """Load a VAE in `dtype` and eval mode; path as in unet.load(). UserError says what is wrong."""
    config, tensors, file = open_part(path, 'vae')
    if config is not None:
        vae = from_config(config, file)
        names = {key: key if key in tensors else deprecated_name(key) for key in vae.state_dict()}
        return fill(vae, tensors, names, file, dtype)
    with torch.device('meta'):
        vae = VAE()
    names = {key: original_name(key) for key in vae.state_dict()}
    return fill(vae, tensors, names, file, dtype, PREFIX['vae'])


def original(vae):
    """Return {name: tensor} of a VAE as an original file holds it: the inverse of load()."""
    with torch.device('meta'):
        standard = VAE()
    check(vae.sizes == standard.sizes and vae.scale == standard.scale,
          f'an original file holds a VAE of SD 1.5\'s size and scale, not {vae.sizes} and '
          f'{vae.scale}; write a folder instead')
    # The Linear layers of the attention are convolutions of 1 x 1 there.
    return {original_name(key): w[:, :, None, None] if '.attentions.' in key and w.ndim == 2 else w
            for key, w in vae.state_dict().items()}


def save(vae, folder, dtype=torch.float32):
    """Write config.json and weights, for load() and for diffusers' AutoencoderKL."""
    channels = vae.sizes['channels']
    config = {**FIXED, 'block_out_channels': channels, 'layers_per_block': vae.sizes['layers'],
              'norm_num_groups': vae.sizes['groups'], 'scaling_factor': vae.scale,
              'down_block_types': ['DownEncoderBlock2D'] * len(channels),
              'up_block_types': ['UpDecoderBlock2D'] * len(channels)}
    save_part('vae', vae, config, folder, dtype)
