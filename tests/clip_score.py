"""Compute the paper's CLIP score: the mean cosine similarity of images and captions under ViT-g-14.

It follows GigaGAN's evaluation.py, which the paper used. Image i, in natural order, has caption i.

    python tests/clip_score.py open_clip_pytorch_model.safetensors IMAGES CAPTIONS --tokenizer SD15
"""

import hashlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip_text
import fid
import unet
from unet import UserError, check

SHA256 = '11b3bb58ac0f84f8bce59c4551038a0b288372869e1666ff38224bb71ecc0870'
URL = 'https://huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K'


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)           # (B, L, 3 C)
        q, k, v = qkv.unflatten(2, (3, 16, -1)).permute(2, 0, 3, 1, 4)      # 16 heads
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)       # (B, 16, L, C / 16)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, c, hidden):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c, eps=1e-5)
        self.attn = Attention(c)
        self.ln_2 = nn.LayerNorm(c, eps=1e-5)
        self.mlp = nn.ModuleDict({'c_fc': nn.Linear(c, hidden), 'c_proj': nn.Linear(hidden, c)})

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        # The exact GELU: only OpenAI's own weights use quick GELU (open_clip ViT-g-14.json).
        return x + self.mlp['c_proj'](F.gelu(self.mlp['c_fc'](self.ln_2(x))))


class Vision(nn.Module):
    """Map images (B, 3, size, size) to (B, 1024), the projection of the class token."""

    def __init__(self, width, count, hidden, patch, grid, out):
        super().__init__()
        self.size = patch * grid
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(grid ** 2 + 1, width))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width, eps=1e-5)
        resblocks = nn.ModuleList(Layer(width, hidden) for _ in range(count))
        self.transformer = nn.ModuleDict({'resblocks': resblocks})
        self.ln_post = nn.LayerNorm(width, eps=1e-5)
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)                        # (B, 256, 1408)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)   # (B, 257, 1408)
        x = self.ln_pre(x + self.positional_embedding)
        for layer in self.transformer['resblocks']:
            x = layer(x, causal=False)
        return self.ln_post(x[:, 0]) @ self.proj                            # (B, 1024)


class CLIP(nn.Module):
    """Both towers, with open_clip's names and ViT-g-14's sizes. 1.37 G weights."""

    def __init__(self, vision=(1408, 40, 6144, 14, 16, 1024), text=(1024, 24, 4096), vocab=49408):
        super().__init__()
        self.visual = Vision(*vision)
        width, count, hidden = text
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.empty(clip_text.LENGTH, width))
        resblocks = nn.ModuleList(Layer(width, hidden) for _ in range(count))
        self.transformer = nn.ModuleDict({'resblocks': resblocks})
        self.ln_final = nn.LayerNorm(width, eps=1e-5)
        self.text_projection = nn.Parameter(torch.empty(width, vision[-1]))
        self.logit_scale = nn.Parameter(torch.empty(()))        # of training, not used here

    def text(self, tokens):
        """Map tokens (B, 77) to (B, 1024), the projection of the end token, the largest id."""
        x = self.token_embedding(tokens) + self.positional_embedding
        for layer in self.transformer['resblocks']:
            x = layer(x, causal=True)
        return self.ln_final(x[torch.arange(len(x)), tokens.argmax(1)]) @ self.text_projection


def load_clip(path):
    """Read ViT-g-14 from open_clip's .safetensors in float32; refuse any other model."""
    try:
        state = load_file(path)
    except Exception as error:      # safetensors raises several types
        raise UserError(f'{path} is not .safetensors ({error}); fetch it from {URL}') from error
    if hashlib.sha256(np.memmap(path, mode='r')).hexdigest() != SHA256:
        fid.warn(f'{path} is NOT THE PUBLISHED FILE: its CLIP score may differ')
    with torch.device('meta'):
        net = CLIP()
    needed = net.state_dict()
    for name in [*needed, *state]:
        found, need = (tuple(w[name].shape) if name in w else 'none' for w in (state, needed))
        check(found == need, f'{path} is not ViT-g-14 of open_clip, because the shape of {name} is '
                             f'{found} instead of {need}; fetch it from {URL}')
    net.load_state_dict(state, assign=True)
    return net.float().eval().requires_grad_(False)


def to_clip(image, size):
    """Convert a uint8 image (256, 256, 3) to CLIP's input (1, 3, size, size)."""
    # GigaGAN's evaluation.py 22-31 scales to [-1, 1] and back, which darkens levels 1 to 63 by one.
    x = (((torch.from_numpy(image) / 255 - 0.5) / 0.5 + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    x = np.array(Image.fromarray(x.numpy()).resize((size, size), Image.BICUBIC))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])        # open_clip constants.py 1-2
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.from_numpy(x) / 255 - mean) / std).permute(2, 0, 1)[None]


def clip_tokens(tokenizer, captions):
    """Return tokens (B, 77) of 'A photo depicts ' + caption, as in the paper, padded with 0."""
    tokens = tokenizer(['A photo depicts ' + caption for caption in captions])
    end = (tokens == tokenizer.end).int().argmax(1, keepdim=True)   # the first end token
    return tokens.masked_fill(torch.arange(tokens.shape[1]) > end, 0)


def main(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name in ('weights', 'folder', 'captions'):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument('--tokenizer', help='(default: the folder of WEIGHTS)')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False     # torch computes convolutions in TF32 by default
    paths, texts = fid.find_images(args.folder), clip_text.read_prompts(args.captions)
    check(len(paths) == len(texts), f'{len(paths)} images need one caption each, not {len(texts)}')
    tokenizer = clip_text.load_tokenizer(args.tokenizer or Path(args.weights).parent)
    clip = load_clip(args.weights).to(args.device)
    check(tokenizer.end == len(clip.token_embedding.weight) - 1, 'give the --tokenizer of CLIP')
    cosines = []
    for i in range(0, len(paths), args.batch):
        images = [fid.shrink(fid.read_image(path)[0]) for path in paths[i:i + args.batch]]
        x = torch.cat([to_clip(image, clip.visual.size) for image in images])
        tokens = clip_tokens(tokenizer, texts[i:i + args.batch])
        seen, read = clip.visual(x.to(args.device)), clip.text(tokens.to(args.device))
        cosines += F.cosine_similarity(seen, read).tolist()
    print(f'{np.mean(cosines):.6f}')


if __name__ == '__main__':
    with unet.user_errors('clip_score'):
        main()
