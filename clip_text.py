"""CLIP ViT-L/14's tokenizer and text encoder, as used by Stable Diffusion 1.5, from scratch in one file.

Prompts become (B, 77) token ids and then (B, 77, 768) states: the last layer's output after the final
LayerNorm, with neither pooling nor projection (ldm/modules/encoders/modules.py 152-159). Module names
are those of transformers' CLIPTextModel as published checkpoints bear them, so loading is a strict
load_state_dict.

    tokenizer, encoder = load_tokenizer(path), load(path);  context = encoder(tokenizer(['a red star']))
"""

import contextlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer as Engine, models, normalizers, pre_tokenizers
from torch import nn

LENGTH = 77         # positions, the start and end tokens included

# One word, before byte-pair encoding: CLIP's own pattern (openai/CLIP simple_tokenizer.py, `self.pat`).
# Digits stand alone; 's and its like are cut off; anything else that is no space keeps together.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """CLIP's lower-cased byte-level BPE over a checkpoint's vocab.json and merges.txt.

    tokenizer(list of str) -> (B, 77) int64: start token, at most 75 tokens of text, end token, and the
    end token again up to 77, for it is SD's padding too. The ids in text_encoder/config.json (bos 0,
    eos 2) are wrong.

    Equal to transformers 5's CLIPTokenizer. The transformers 4 slow class that the paper's code used also
    repaired text with ftfy first (curly quotes, HTML entities, mojibake, full-width letters) and dropped
    control characters; this one does not, since ftfy is a seventh package: none of the 30,000 COCO
    captions is tokenised differently.
    """

    def __init__(self, vocab, merges):
        self.vocab, self.merges = vocab, merges
        self.start, self.end = vocab['<|startoftext|>'], vocab['<|endoftext|>']
        self.engine = Engine(
            models.BPE(vocab=vocab, merges=merges, end_of_word_suffix='</w>', unk_token='<|endoftext|>'))
        self.engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        self.engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORD), behavior='removed', invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        # Spelled out in a prompt these two are their own ids, as in every CLIP tokenizer of transformers.
        self.engine.add_special_tokens(['<|startoftext|>', '<|endoftext|>'])

    def __call__(self, texts):
        assert not isinstance(texts, str), 'expected a list of prompts, got one string'
        rows = []
        for encoding in self.engine.encode_batch(list(texts), add_special_tokens=False):
            ids = encoding.ids[:LENGTH - 2]         # cut the text, never the end token
            rows.append([self.start, *ids] + [self.end] * (LENGTH - 1 - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, LENGTH)

    def lost(self, text):
        """The end of `text` that does not fit into 77 positions and is cut off; '' where all fits."""
        encoding = self.engine.encode(text, add_special_tokens=False)
        return text[encoding.offsets[LENGTH - 2][0]:] if len(encoding) > LENGTH - 2 else ''


class Attention(nn.Module):
    """Causal self-attention (B, L, C) -> (B, L, C). Padding is attended to as text: SD passes no mask."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f'{width} numbers cannot be shared by {heads} heads')
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)   # (B, heads, L, C/heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        h = self.fc1(x)
        # CLIP's "quick GELU": transformers activations.py 123.
        return self.fc2(h * torch.sigmoid(1.702 * h))


class Layer(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)    # layer_norm_eps of text_encoder/config.json
        self.self_attn = Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, hidden)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """CLIP's text transformer: tokens (B, 77) -> states (B, 77, width).

    The defaults are ViT-L/14's 123 M weights."""

    def __init__(self, vocab=49408, width=768, layers=12, heads=12, hidden=3072):
        super().__init__()
        # Bare modules serve as name spaces: published keys begin with text_model.embeddings,
        # text_model.encoder, ...
        self.text_model = nn.Module()
        self.text_model.embeddings = nn.Module()
        for name, size in (('token_embedding', vocab), ('position_embedding', LENGTH)):
            # Uniform, not normal as nn.Embedding itself: on the meta device, where load() builds the net,
            # torch imports all of torch._dynamo to draw that, over two seconds.
            start = torch.empty(size, width).uniform_(-1, 1)
            setattr(self.text_model.embeddings, name, nn.Embedding.from_pretrained(start, freeze=False))
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.text_model.final_layer_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, tokens):
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(tokens) + embeddings.position_embedding.weight   # (B, 77, width)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)


# ---------------------------------------------------------------------------------------------------
# Files

# Where to look in the local cache when a checkpoint has none: all SD 1.x have CLIP ViT-L/14's tokenizer.
TOKENIZERS = ('stable-diffusion-v1-5/stable-diffusion-v1-5', 'openai/clip-vit-large-patch14')


def load_tokenizer(path):
    """The tokenizer in `path`: a folder with vocab.json and merges.txt, or with such a tokenizer/ inside.

    A repo id in the local Hugging Face cache will do as well. A single file has no tokenizer; then the
    cache's is taken, if there is one."""
    import unet
    folder = unet.locate(path)
    if folder.is_file():
        for name in TOKENIZERS:
            with contextlib.suppress(FileNotFoundError):
                return load_tokenizer(unet.locate(name))
        raise FileNotFoundError(
            f'{folder} is a single file, which has no tokenizer; give a folder with the vocab.json and '
            'merges.txt of SD 1.5 (the tokenizer/ of its repository, 1.6 MB) with --tokenizer')
    if (folder / 'tokenizer').is_dir():
        folder = folder / 'tokenizer'
    for name in ('vocab.json', 'merges.txt'):
        if not (folder / name).is_file():
            raise FileNotFoundError(f'expected a CLIP tokenizer at {folder}, found no {name} there; '
                                    'give the folder that holds tokenizer/ or that folder itself')
    vocab = unet.read_json(folder / 'vocab.json')
    lines = (folder / 'merges.txt').read_text(encoding='utf-8', errors='replace').split('\n')
    merges = [tuple(line.split()) for line in lines if line and not line.startswith('#version')]
    try:
        return Tokenizer(vocab, merges)
    except Exception as error:          # tokenizers raises nothing more special
        raise ValueError(f'vocab.json and merges.txt in {folder} are not a CLIP tokenizer '
                         f'({" ".join(str(error).split())[:200]}); download both again') from None


def save_tokenizer(tokenizer, folder):
    """Write vocab.json, merges.txt and a config, for load_tokenizer() here and transformers to open."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ['#version: 0.2', *(f'{a} {b}' for a, b in tokenizer.merges)]
    facts = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': LENGTH, 'do_lower_case': True,
             'bos_token': '<|startoftext|>', 'eos_token': '<|endoftext|>', 'pad_token': '<|endoftext|>',
             'unk_token': '<|endoftext|>'}
    (folder / 'vocab.json').write_text(
        json.dumps(tokenizer.vocab, ensure_ascii=False) + '\n', encoding='utf-8')
    (folder / 'merges.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    (folder / 'tokenizer_config.json').write_text(json.dumps(facts, indent=2) + '\n')


def load(path, dtype=torch.float32):
    """The text encoder in `path`, in that dtype (None: the file's) and eval mode.

    path: a folder in diffusers layout (with a text_encoder/ inside, or that folder itself) whose
    config.json sizes the net; an original .safetensors or .ckpt, sized by its tensors' shapes; or a repo
    id in the local Hugging Face cache. Raises FileNotFoundError or ValueError with a sentence."""
    import unet         # reads all files; here, since the net above needs nothing of it
    config, tensors, file = unet.open_part(path, 'text_encoder')
    prefix = '' if config is not None else unet.PREFIX['text_encoder'] + 'transformer.'

    def names(key):     # without the first component in what transformers since 5.6 writes, and NAI wrote
        return [prefix + key, prefix + key.removeprefix('text_model.')]
    if config is None:
        def side(key, axis, default):
            return next((tensors[name].shape[axis] for name in names(key) if name in tensors), default)
        config = dict(
            vocab_size=side('text_model.embeddings.token_embedding.weight', 0, 49408),
            hidden_size=side('text_model.embeddings.token_embedding.weight', 1, 768),
            intermediate_size=side('text_model.encoder.layers.0.mlp.fc1.weight', 0, 3072),
            num_hidden_layers=12, num_attention_heads=12)
    encoder = unet.sized(lambda: TextEncoder(
        config['vocab_size'], config['hidden_size'], config['num_hidden_layers'],
        config['num_attention_heads'], config['intermediate_size']), file)
    return unet.fill(encoder, tensors, names, file, dtype, scope=prefix and unet.PREFIX['text_encoder'])


def save(encoder, folder, dtype=torch.float32):
    """Write config.json and safetensors, for load() here and transformers' CLIPTextModel to open."""
    import unet
    model = encoder.text_model
    vocab, width = model.embeddings.token_embedding.weight.shape
    config = {
        'architectures': ['CLIPTextModel'], 'model_type': 'clip_text_model', 'vocab_size': vocab,
        'hidden_size': width, 'num_hidden_layers': len(model.encoder.layers),
        'num_attention_heads': model.encoder.layers[0].self_attn.heads,
        'intermediate_size': model.encoder.layers[0].mlp.fc1.out_features,
        'max_position_embeddings': LENGTH, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5,
        'projection_dim': width, 'bos_token_id': vocab - 2, 'eos_token_id': vocab - 1,
        'pad_token_id': vocab - 1}
    unet.write_part('text_encoder', encoder, config, folder, dtype)
