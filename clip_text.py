"""CLIP ViT-L/14's text encoder from scratch, and its tokenizer on top of the tokenizers library.

Prompts become token ids (B, 77), and these become text embeddings (B, 77, 768). They are the last
layer's output after the final LayerNorm, without pooling and projection (CompVis/stable-diffusion
@21f890f, ldm/modules/encoders/modules.py 152-159). Module names are those of transformers'
CLIPTextModel in published checkpoints.

    tokenizer = load_tokenizer('path/to/checkpoint')
    encoder = load('path/to/checkpoint')
    context = encoder(tokenizer(['a red star']))
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer as Engine, models, normalizers, pre_tokenizers
from torch import nn

from unet import PREFIX, UserError, check, check_config, fill, locate, open_part, read_json
from unet import config_int, save_part

LENGTH = 77         # tokens of a prompt, with the start and end tokens

# Byte-pair encoding works within words. This pattern of a word is `self.pat` of openai/CLIP
# simple_tokenizer.py: letters, one digit, or other characters; endings such as 's are words too.
WORD = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
        r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
START, END = '<|startoftext|>', '<|endoftext|>'


class Tokenizer:
    """CLIP's lower-cased byte-level BPE. tokenizer(list of B prompts) -> ids (B, 77) int64.

    A prompt becomes the start token, at most 75 tokens of text, and end tokens up to 77: SD pads
    with the end token. The ids that SD 1.5's text_encoder/config.json names are wrong.

    vocab is {token: id}, merges a list of pairs of tokens, and added a list of AddedToken, such as
    those of textual inversion; their ids follow the vocabulary's.

    The ids equal those of transformers 5. The slow tokenizer of transformers 4, which the official
    code uses, also repairs text with ftfy: curly quotes, HTML entities and the like. We do not,
    because ftfy would be a seventh package. It changes none of the 30,000 COCO captions.
    """

    def __init__(self, vocab, merges, added=()):
        self.vocab, self.merges, self.added = vocab, merges, list(added)
        self.start, self.end = vocab[START], vocab[END]
        self.engine = Engine(models.BPE(
            vocab=vocab, merges=merges, end_of_word_suffix='</w>', unk_token=END))
        self.engine.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()])
        self.engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORD), behavior='removed', invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        # A prompt that spells these out gets their ids, as in transformers.
        self.engine.add_special_tokens([START, END])
        self.engine.add_tokens(self.added)
        self.size = self.engine.get_vocab_size()

    def __call__(self, prompts):
        rows = []
        for encoding in self.engine.encode_batch(list(prompts), add_special_tokens=False):
            ids = encoding.ids[:LENGTH - 2]         # cut the text, never the end token
            rows.append([self.start, *ids] + [self.end] * (LENGTH - 1 - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, LENGTH)

    def cut(self, prompt):
        """Return the end of a prompt that does not fit into 77 tokens, '' if all of it fits."""
        encoding = self.engine.encode(prompt, add_special_tokens=False)
        fits = len(encoding) <= LENGTH - 2
        return '' if fits else prompt[encoding.offsets[LENGTH - 2][0]:]


class Attention(nn.Module):
    """Causal self-attention, (B, L, C) -> (B, L, C). Padding is not masked in SD."""

    def __init__(self, width, heads):
        super().__init__()
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
        return self.fc2(h * torch.sigmoid(1.702 * h))      # QuickGELU: openai/CLIP model.py 166-168


class Layer(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.self_attn = Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, hidden)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """CLIP's text transformer. The defaults are ViT-L/14's, with 123 M weights."""

    def __init__(self, vocab=49408, width=768, layers=12, heads=12, hidden=3072):
        super().__init__()
        self.sizes = dict(vocab=vocab, width=width, layers=layers, heads=heads, hidden=hidden)
        # Plain modules give the published names: text_model.embeddings, text_model.encoder, ...
        self.text_model = nn.Module()
        self.text_model.embeddings = nn.Module()
        for name, count in (('token_embedding', vocab), ('position_embedding', LENGTH)):
            # Uniform, because drawing normal numbers on the meta device makes torch import
            # torch._dynamo, which takes two seconds.
            start = torch.empty(count, width).uniform_(-1, 1)
            embedding = nn.Embedding.from_pretrained(start, freeze=False)
            setattr(self.text_model.embeddings, name, embedding)
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(
            Layer(width, heads, hidden) for _ in range(layers))
        self.text_model.final_layer_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, tokens):
        """Embed tokens (B, 77) int64 as text embeddings (B, 77, width)."""
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(tokens) + embeddings.position_embedding.weight
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)


# -------------------------------------------------------------------------------------------------
# Files

# All entries of transformers' config.json, apart from sizes, that change the text embeddings.
FIXED = {'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5, 'max_position_embeddings': LENGTH}
SIZES = {'vocab': 'vocab_size', 'width': 'hidden_size', 'layers': 'num_hidden_layers',
         'heads': 'num_attention_heads', 'hidden': 'intermediate_size'}


def read_prompts(path):
    """Return the lines of a UTF-8 text file, one prompt or caption each, without empty lines."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} must be a UTF-8 text file with one prompt per line ({error}); '
                        'give another file') from None
    prompts = [line.strip() for line in text.split('\n')]
    prompts = [prompt for prompt in prompts if prompt]
    check(prompts, f'{path} has no prompts; it must have one per line')
    check('\0' not in text and prompts[0][0] not in '{[',
          f'{path} holds JSON or binary data; it must be plain text with one prompt per line')
    return prompts


def tokenizer_folder(path):
    """Return the folder with the tokenizer of a checkpoint, or `path` if that is such a folder.

    An original file has none. All SD 1.x use the tokenizer of CLIP ViT-L/14, so we look for that in
    the local Hugging Face cache."""
    root = locate(path)
    if root.is_file():
        try:
            root = locate('openai/clip-vit-large-patch14')
        except UserError:
            raise UserError(f'{path} is a single file, which has no tokenizer; download openai/'
                            'clip-vit-large-patch14, or give train the --tokenizer of any '
                            'Stable Diffusion 1.5') from None
    return root / 'tokenizer' if (root / 'tokenizer').is_dir() else root


def load_tokenizer(path):
    """Load the tokenizer of a checkpoint: tokenizer.json, or vocab.json and merges.txt."""
    folder = tokenizer_folder(path)
    names = {entry.name for entry in folder.iterdir()}
    check('tokenizer.json' in names or {'vocab.json', 'merges.txt'} <= names,
          f'{folder} must hold vocab.json and merges.txt, or tokenizer.json, found '
          f'{", ".join(sorted(names)) or "nothing"}; download the tokenizer of SD 1.5')
    try:
        if 'tokenizer.json' in names:
            content = read_json(folder / 'tokenizer.json')
            vocab, merges = content['model']['vocab'], content['model']['merges']
            added = content['added_tokens']
        else:
            vocab = read_json(folder / 'vocab.json')
            merges = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
            merges = [line for line in merges if line and not line.startswith('#version')]
            added, old = {}, folder / 'added_tokens.json'     # of transformers before 4.34
            if old.is_file():
                added = {number: {'content': token} for token, number in read_json(old).items()}
            config = folder / 'tokenizer_config.json'
            decoder = read_json(config).get('added_tokens_decoder', {}) if config.is_file() else {}
            added.update((int(number), token) for number, token in decoder.items())
            added = [{'id': number, **token} for number, token in added.items()]
        merges = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in merges]
        added = sorted((token for token in added if token['id'] >= len(vocab)),
                       key=lambda token: token['id'])
        ids = [token.pop('id') for token in added]
        if ids != list(range(len(vocab), len(vocab) + len(added))):
            raise ValueError(f'the ids {ids} of added tokens do not follow the vocabulary')
        return Tokenizer(vocab, merges, [AddedToken(**token) for token in added])
    except Exception as error:          # the tokenizers library raises nothing more specific
        raise UserError(f'{folder} holds no CLIP tokenizer ({type(error).__name__}: {error}); '
                        'download the tokenizer of SD 1.5') from None


def load(path, dtype=torch.float32):
    """Load a text encoder in `dtype` and eval mode; path as in unet.load()."""
    config, tensors, file = open_part(path, 'text_encoder')
    sizes, prefix = {}, PREFIX['text_encoder']
    if config is not None:
        check_config(config, FIXED, file)
        prefix = ''
        sizes = {name: config_int(config, key, file) for name, key in SIZES.items()}
        check(sizes['width'] % sizes['heads'] == 0,
              f'the config of {file} has hidden_size {sizes["width"]}, which must be a multiple of '
              f'num_attention_heads {sizes["heads"]}')
    with torch.device('meta'):
        encoder = TextEncoder(**sizes)
    names = {}
    for key in encoder.state_dict():
        short = prefix + key.removeprefix('text_model.')    # what transformers 5.6 and newer writes
        names[key] = short if short in tensors else prefix + key
    return fill(encoder, tensors, names, file, dtype, prefix)


def original(encoder):
    """Return {name: tensor} of a text encoder as an original file holds it, for load()."""
    with torch.device('meta'):
        sizes = TextEncoder().sizes
    check(encoder.sizes == sizes, f'an original file holds a text encoder of SD 1.5\'s size, not '
                                  f'{encoder.sizes}; write a folder instead')
    tensors = {PREFIX['text_encoder'] + key: w for key, w in encoder.state_dict().items()}
    positions = torch.arange(LENGTH)[None]
    return {**tensors, PREFIX['text_encoder'] + 'text_model.embeddings.position_ids': positions}


def save(encoder, folder, dtype=torch.float32, added=0):
    """Write config.json and weights, for load() and for transformers' CLIPTextModel.

    added is the number of added tokens, which come after the end token."""
    sizes = encoder.sizes
    end = sizes['vocab'] - added - 1
    config = {**FIXED, **{key: sizes[name] for name, key in SIZES.items()},
              'architectures': ['CLIPTextModel'], 'model_type': 'clip_text_model',
              'projection_dim': sizes['width'],
              'bos_token_id': end - 1, 'eos_token_id': end, 'pad_token_id': end}
    save_part('text_encoder', encoder, config, folder, dtype)
