"""Every file layout Stable Diffusion 1.5 is found in: read, converted, opened elsewhere, or refused in one sentence.

No real weights fit a repository, so files of exactly the real layouts are built here from random ones. Nothing in the
builders comes from the loaders they test: the nets are diffusers' and transformers' own, and keys/ldm_sd15.tsv (every
tensor of v1-5-pruned-emaonly.safetensors with its diffusers name) does the renaming. The first tests show that diffusers
reads the built files as the same weights; the rest then relies on them.
"""

import copy
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import clip_text
import sid_lsg
import unet
import vae
from test_nets import WIDTHS, assert_close, noise, randomise

HERE = Path(__file__).parent
TOKENIZER = HERE / 'tiny_sd' / 'tokenizer'                  # 600 words
MODULES = {'unet': unet, 'vae': vae, 'text_encoder': clip_text}
STEMS = {'unet': 'diffusion_pytorch_model', 'vae': 'diffusion_pytorch_model', 'text_encoder': 'model'}

# key, shape, dtype, group, diffusers component, diffusers key
TABLE = [line.split('\t') for line in (HERE / 'keys' / 'ldm_sd15.tsv').read_text().splitlines()[1:]]
WEIGHTS = [row[0] for row in TABLE if row[4]]               # 686 + 248 + 196
POSITIONS = 'cond_stage_model.transformer.text_model.embeddings.position_ids'
UNET, VAE, TEXT = 'model.diffusion_model.', 'first_stage_model.', 'cond_stage_model.transformer.'

SD15 = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
OLD_SD15 = 'runwayml/stable-diffusion-v1-5'
CACHE_SETTINGS = ['HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'HF_HOME', 'XDG_CACHE_HOME']


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's, emptied at once: the files here are 36 MB each, and pytest would keep those of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory, monkeypatch):
    """No test sees the Hugging Face cache of whoever runs it."""
    for name in CACHE_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path_factory.getbasetemp() / 'nobody'))


# ---------------------------------------------------------------------------------------------------
# Builders: random weights into every layout

@pytest.fixture(scope='module')
def nets():
    """diffusers' and transformers' own nets of SD 1.5's make, narrow, every weight random."""
    return {
        'unet': randomise(UNet2DConditionModel(
            block_out_channels=WIDTHS, cross_attention_dim=48, attention_head_dim=8, sample_size=8), 1),
        'vae': randomise(AutoencoderKL(
            block_out_channels=WIDTHS, layers_per_block=2, latent_channels=4,
            down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4), 2),
        'text_encoder': randomise(CLIPTextModel(CLIPTextConfig(
            vocab_size=600, hidden_size=48, intermediate_size=96, num_hidden_layers=12, num_attention_heads=12,
            hidden_act='quick_gelu', bos_token_id=598, eos_token_id=599, pad_token_id=599)), 3)}


@pytest.fixture(scope='module')
def weights(nets):
    """{component: its tensors under the names that the official folder has them under}"""
    named = {part: net.state_dict() for part, net in nets.items()}
    named['text_encoder'] = {f'text_model.{key}': w for key, w in named['text_encoder'].items()}
    return named


def halves(tensors):
    return {key: w.half() if w.is_floating_point() else w for key, w in tensors.items()}


def save(tensors, path, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: w.contiguous() for key, w in tensors.items()}, path, metadata or None)
    return path


def ldm(weights):
    """The 1,130 weights in LDM names; there the VAE's attention is a 1x1 convolution."""
    return {key: weights[part][name].reshape(weights[part][name].shape + (1, 1) * (part == 'vae' and 'attn_1' in key
                                                                                  and shape.count(',') == 3))
            for key, shape, _, _, part, name in TABLE if part}


def emaonly(weights):
    """v1-5-pruned-emaonly: the weights, position_ids, 12 numbers of the schedule, 2 of the moving average."""
    extra = {key: torch.rand(1000) for key, _, _, group, _, _ in TABLE if group == 'schedule'}
    return {**ldm(weights), **extra, POSITIONS: torch.arange(77)[None], 'model_ema.decay': torch.tensor(0.9999),
            'model_ema.num_updates': torch.tensor(470000, dtype=torch.int32)}


def pruned(weights):
    """v1-5-pruned: the weights as they ended training, and again as the moving average, which is wanted."""
    tensors = emaonly(weights)
    for key in [key for key in tensors if key.startswith(UNET)]:
        tensors['model_ema.' + key.removeprefix('model.').replace('.', '')] = tensors[key]
        tensors[key] = tensors[key] + 1
    return tensors


def community(weights, positions=torch.arange(77)[None]):
    """What web UIs save: half precision, the weights and position_ids."""
    return {**halves(ldm(weights)), POSITIONS: positions}


def without_prefix(weights):
    """NAI's naming: no text_model. in the text encoder's names."""
    return {key.replace('text_model.', ''): w for key, w in emaonly(weights).items()}


def linear_attention(weights):
    """What diffusers' script of mid-2023 wrote back: the VAE's attention is linear, with half its names new."""
    new = {'q': 'to_q', 'k': 'to_k', 'v': 'to_v', 'proj_out': 'to_out.0'}
    return {re.sub(r'(?<=attn_1\.)(q|k|v|proj_out)(?=\.)', lambda m: new[m[0]], key):
            w.flatten(1) if VAE in key and 'attn_1' in key and w.dim() == 4 else w
            for key, w in community(weights).items()}


def comfy(weights):
    return {**community(weights), 'cond_stage_model.logit_scale': torch.tensor(4.6),
            TEXT + 'text_projection.weight': torch.rand(48, 48), 'scale_factor': torch.tensor(0.18215),
            'logvar': torch.zeros(1000)}


def single_file(tensors, **metadata):
    """The layout builder (folder, weights) -> path for a single .safetensors."""
    return lambda folder, weights: save(tensors(weights), folder / 'model-v1.safetensors', **metadata)


def torch_file(wrap, **how):
    def build(folder, weights):
        torch.save(wrap(emaonly(weights)), folder / 'model-v1.ckpt', **how)
        return folder / 'model-v1.ckpt'
    return build


def lightning(folder, weights):
    """A .ckpt as pytorch-lightning writes it: its callback's class is a key, numpy's numbers are values, and numpy's
    module has the name it had then. Made by a stand-in that is gone when the file is read."""
    name = 'pytorch_lightning.callbacks.model_checkpoint'
    stand_in = type('ModelCheckpoint', (), {'__module__': name})
    for part in (name.rsplit('.', i)[0] for i in (2, 1, 0)):
        sys.modules[part] = types.ModuleType(part)
    sys.modules[name].ModelCheckpoint = stand_in
    try:
        torch.save({'epoch': 0, 'global_step': 470000, 'pytorch-lightning_version': '1.4.2', 'state_dict': emaonly(weights),
                    'callbacks': {stand_in: {'monitor': 'val/loss_simple_ema', 'best_model_score': np.float64(0.1),
                                             'current_score': torch.tensor(0.2), 'best_model_path': 'epoch=0.ckpt'}},
                    'optimizer_states': [], 'lr_schedulers': [{'last_epoch': 470000, '_last_lr': [np.float64(1e-4)]}]},
                   folder / 'new.ckpt')
    finally:
        for part in (name.rsplit('.', i)[0] for i in (2, 1, 0)):
            del sys.modules[part]
    with zipfile.ZipFile(folder / 'new.ckpt') as new, zipfile.ZipFile(folder / 'model-v1.ckpt', 'w') as old:
        for entry in new.namelist():
            old.writestr(entry, new.read(entry).replace(b'cnumpy._core.', b'cnumpy.core.')
                         if entry.endswith('data.pkl') else new.read(entry))
    return folder / 'model-v1.ckpt'


def deprecated(tensors):
    """The VAE's attention under the names diffusers wrote up to 0.16."""
    old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    return {re.sub(r'(?<=attentions\.0\.)(to_q|to_k|to_v|to_out\.0)', lambda m: old[m[0]], key): w
            for key, w in tensors.items()}


def configs(folder, nets):
    """A diffusers folder but for the weights, as the official one: no scaling_factor, a scheduler of another kind."""
    for part, net in nets.items():
        (folder / part).mkdir(parents=True)
        config = json.loads(net.to_json_string() if part != 'text_encoder' else net.config.to_json_string())
        if part == 'vae':
            del config['scaling_factor'], config['force_upcast']
        if part == 'text_encoder':
            config.update(bos_token_id=0, eos_token_id=2, pad_token_id=1, architectures=['CLIPTextModel'])
        (folder / part / 'config.json').write_text(json.dumps(config))
    shutil.copytree(TOKENIZER, folder / 'tokenizer')
    (folder / 'scheduler').mkdir()
    (folder / 'scheduler' / 'scheduler_config.json').write_text(json.dumps({
        '_class_name': 'PNDMScheduler', 'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear',
        'num_train_timesteps': 1000, 'set_alpha_to_one': False, 'skip_prk_steps': True, 'steps_offset': 1,
        'clip_sample': False, 'trained_betas': None}))
    (folder / 'model_index.json').write_text(json.dumps({
        '_class_name': 'StableDiffusionPipeline', 'unet': ['diffusers', 'UNet2DConditionModel'],
        'vae': ['diffusers', 'AutoencoderKL'], 'text_encoder': ['transformers', 'CLIPTextModel'],
        'tokenizer': ['transformers', 'CLIPTokenizer'], 'scheduler': ['diffusers', 'PNDMScheduler'],
        'safety_checker': [None, None], 'feature_extractor': [None, None]}))


def with_positions(tensors):
    return {**tensors, 'text_model.embeddings.position_ids': torch.arange(77)[None]}


def official(nets):
    """The folder stable-diffusion-v1-5: fp32 with the VAE's deprecated names, fp16 with its current ones, here also of
    other values; the unaveraged UNet; position_ids throughout."""
    def build(folder, weights):
        configs(folder, nets)
        wrong = {part: {key: w + 1 for key, w in tensors.items()} for part, tensors in weights.items()}
        for part, stem in STEMS.items():
            plain, half = weights[part], halves(wrong[part])
            if part == 'vae':
                plain = deprecated(plain)
            if part == 'text_encoder':
                plain, half = with_positions(plain), with_positions(half)
            save(plain, folder / part / f'{stem}.safetensors', format='pt')
            save(half, folder / part / f'{stem}.fp16.safetensors', format='pt')
        save(wrong['unet'], folder / 'unet' / 'diffusion_pytorch_model.non_ema.safetensors', format='pt')
        return folder
    return build


def plain_folder(nets, change=lambda part, tensors: tensors, suffix='.safetensors'):
    """A diffusers folder with one file a component, of the changed tensors."""
    def build(folder, weights):
        configs(folder, nets)
        for part, stem in STEMS.items():
            tensors = change(part, weights[part])
            if suffix.endswith('.bin'):
                stem = 'pytorch_model' if part == 'text_encoder' else stem
                torch.save(tensors, folder / part / f'{stem}{suffix}')
            else:
                save(tensors, folder / part / f'{stem}{suffix}', format='pt')
        return folder
    return build


def half_folder(part, tensors):
    return with_positions(halves(tensors)) if part == 'text_encoder' else halves(tensors)


def old_bin(part, tensors):
    return {'unet': lambda: tensors, 'vae': lambda: deprecated(tensors), 'text_encoder': lambda: with_positions(tensors)}[part]()


def fresh_export(part, tensors):
    """What transformers 5 writes: a text encoder without text_model. and without position_ids."""
    return {key.removeprefix('text_model.'): w for key, w in tensors.items()}


def into_cache(folder, hub, repo=SD15):
    """Move a folder to where huggingface_hub would have put it: blobs, and relative links in a snapshot."""
    commit = '451f4fe16113bff5a5d2269ed5ad43b0592e9a14'
    root = Path(hub) / f'models--{repo.replace("/", "--")}'
    (root / 'blobs').mkdir(parents=True)
    (root / 'refs').mkdir()
    (root / 'refs' / 'main').write_text(commit)
    for number, file in enumerate(sorted(p for p in Path(folder).rglob('*') if p.is_file())):
        link = root / 'snapshots' / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = root / 'blobs' / f'{number:064x}'
        shutil.move(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root / 'snapshots' / commit


@pytest.fixture(scope='module')
def whole_folder(nets, weights, tmp_path_factory):
    """A folder in half precision for tests that do not change it."""
    folder = tmp_path_factory.mktemp('whole') / 'model-v1'
    yield plain_folder(nets, half_folder)(folder, weights)
    shutil.rmtree(folder.parent)


# ---------------------------------------------------------------------------------------------------
# The builders are right: diffusers reads the same weights out of what they build

def same(tensors, expected):
    assert tensors.keys() == expected.keys()
    wrong = [key for key, w in expected.items() if tensors[key].dtype != w.dtype or not torch.equal(tensors[key], w)]
    assert not wrong, f'{len(wrong)} differ, such as {wrong[0]}'


def converted_by_diffusers(tensors):
    """{component: tensors} of a single file by diffusers' own converters; it names the text encoder's as they are."""
    config = {'layers_per_block': 2, 'down_block_types': [None] * 4, 'up_block_types': [None] * 4}     # only counted
    return {'unet': single_file_utils.convert_ldm_unet_checkpoint(tensors, config, extract_ema=True),
            'vae': single_file_utils.convert_ldm_vae_checkpoint(tensors, config),
            'text_encoder': {key.removeprefix(TEXT): w for key, w in tensors.items()
                             if key.startswith(TEXT) and key != POSITIONS}}


@pytest.mark.parametrize('build, count', [(emaonly, 1145), (pruned, 1831), (community, 1131)])
def test_built_single_files_are_what_diffusers_reads(weights, build, count):
    tensors = build(weights)
    assert len(tensors) == count
    if build is emaonly:
        assert set(tensors) == {row[0] for row in TABLE}
        assert all(str(tensors[key].dtype) == f'torch.{kind}' and tensors[key].dim() == len(json.loads(shape))
                   for key, shape, kind, *_ in TABLE)
    for part, converted in converted_by_diffusers(tensors).items():
        same(converted, halves(weights[part]) if build is community else weights[part])


def test_built_folders_are_what_diffusers_reads(nets, weights, tmp_path):
    folder = official(nets)(tmp_path, weights)
    same(UNet2DConditionModel.from_pretrained(folder / 'unet').state_dict(), weights['unet'])
    same(AutoencoderKL.from_pretrained(folder / 'vae').state_dict(), weights['vae'])
    same(CLIPTextModel.from_pretrained(folder / 'text_encoder').state_dict(), nets['text_encoder'].state_dict())


# ---------------------------------------------------------------------------------------------------
# Reading: every layout gives the same tensors

ALL = ('unet', 'vae', 'text_encoder')
LAYOUTS = {                             # layout: (builder, or what makes one from the nets; fp16 or not; what to load of it)
    'v1-5-pruned-emaonly': (single_file(emaonly, format='pt'), False, ALL),
    'v1-5-pruned': (single_file(pruned, format='pt'), False, ALL),
    'community fp16': (single_file(community), True, ALL),
    'community fp16, position_ids averaged to floats': (
        single_file(lambda weights: community(weights, torch.full((1, 77), 7.5).half())), True, ALL[2:]),
    'community fp16 without position_ids': (single_file(lambda weights: halves(ldm(weights))), True, ALL[2:]),
    'text names without text_model.': (single_file(without_prefix), False, ALL[1:]),
    'linear VAE attention': (single_file(linear_attention), True, ALL[1:]),
    'ComfyUI': (single_file(comfy, workflow='{"nodes": "' + 'x' * 200_000 + '"}'), True, ALL),
    'ckpt': (torch_file(lambda tensors: {'state_dict': tensors, 'global_step': 470000, 'epoch': 0}), False, ALL),
    'ckpt wrapped twice': (torch_file(lambda tensors: {'state_dict': {'state_dict': tensors}}), False, ALL[1:2]),
    'ckpt not wrapped': (torch_file(lambda tensors: tensors), False, ALL[1:2]),
    'ckpt of before torch 1.6': (
        torch_file(lambda tensors: {'state_dict': tensors}, _use_new_zipfile_serialization=False), False, ALL[1:2]),
    'ckpt of pytorch-lightning': (lightning, False, ALL[1:]),
    'official folder': (official, False, ALL),
    'folder of fp16 files': (lambda nets: plain_folder(nets, half_folder, '.fp16.safetensors'), True, ALL[1:]),
    'folder of .bin': (lambda nets: plain_folder(nets, old_bin, '.bin'), False, ALL),
    'folder of .fp16.bin': (lambda nets: plain_folder(nets, half_folder, '.fp16.bin'), True, ALL[1:]),
    'folder of a fresh export': (lambda nets: plain_folder(nets, fresh_export), False, ALL[2:]),
}


def build_layout(name, folder, nets, weights):
    """The layout `name` in `folder`: its path, and the tensors that are to come out of it."""
    build, half, _ = LAYOUTS[name]
    build = build(nets) if 'folder' in name else build
    return build(folder, weights), {part: expect(tensors, 'fp16' if half else 'fp32') for part, tensors in weights.items()}


def expect(tensors, precision):
    """As written in that precision and read again."""
    return {key: w.half().float() for key, w in tensors.items()} if precision == 'fp16' else tensors


@pytest.mark.parametrize('name', LAYOUTS)
def test_every_layout_loads_to_the_same_tensors(name, nets, weights, tmp_path, capsys):
    """Bit for bit, in fp32 and eval mode, without a random number drawn; what was chosen between is said."""
    path, expected = build_layout(name, tmp_path, nets, weights)
    dice = torch.get_rng_state()
    for part in LAYOUTS[name][2]:
        net = MODULES[part].load(path if part == 'vae' else str(path))
        same(net.state_dict(), expected[part])
        assert not net.training
        output = capsys.readouterr()
        assert ('EMA' in output.err) == (name == 'v1-5-pruned' and part == 'unet') and not output.out
    assert torch.equal(torch.get_rng_state(), dice)


@pytest.mark.parametrize('name', ['v1-5-pruned-emaonly', 'official folder'])
def test_loaded_nets_are_diffusers_nets(name, nets, weights, tmp_path):
    """A single file says nothing of heads, groups and the VAE's scale: the outputs show that they are right."""
    path, _ = build_layout(name, tmp_path, nets, weights)
    x, t, context = noise(2, 4, 8, 8, seed=4), torch.tensor([625, 20]), noise(2, 77, 48, seed=5)
    images, tokens = noise(1, 3, 32, 32, seed=6), torch.arange(77)[None]
    decoder = vae.load(path)
    with torch.no_grad():
        assert_close(unet.load(path)(x, t, context), nets['unet'](x, t, context).sample)
        assert_close(clip_text.load(path)(tokens), nets['text_encoder'](tokens).last_hidden_state)
        assert_close(decoder.encode(images), nets['vae'].encode(images).latent_dist.mean * 0.18215)
        assert_close(decoder.decode(x), nets['vae'].decode(x / 0.18215).sample)


@pytest.mark.parametrize('part', MODULES)
def test_a_components_own_folder_serves_as_well(part, whole_folder, weights):
    same(MODULES[part].load(whole_folder / part).state_dict(), expect(weights[part], 'fp16'))


@pytest.mark.parametrize('kind', ['vae-ft-mse', 'with loss', 'ckpt'])
def test_a_lone_vae_loads_as_a_vae(kind, weights, tmp_path):
    """vae-ft-mse-840000-ema-pruned: LDM names without first_stage_model. and the two numbers of the average."""
    tensors = {key.removeprefix(VAE): w for key, w in ldm(weights).items() if key.startswith(VAE)}
    tensors.update({'model_ema.decay': torch.tensor(0.9999), 'model_ema.num_updates': torch.tensor(1, dtype=torch.int32)})
    if kind == 'with loss':
        tensors.update({'loss.logvar': torch.zeros(()), 'loss.discriminator.main.0.weight': torch.rand(64, 3, 4, 4)})
    path = tmp_path / ('vae.ckpt' if kind == 'ckpt' else 'vae.safetensors')
    torch.save({'state_dict': tensors}, path) if kind == 'ckpt' else save(tensors, path)
    same(vae.load(path).state_dict(), weights['vae'])


def test_a_safetensors_that_begins_as_a_pickle_does(weights, tmp_path):
    """Its first byte is the lowest of its header's length, and 1 in 32 of them is a pickle's 0x80."""
    path = save(community(weights), tmp_path / 'model-v1.safetensors', note='')
    path = save(community(weights), path, note='x' * ((0x80 - path.open('rb').read(1)[0]) % 256))
    assert path.open('rb').read(1) == b'\x80'
    same(unet.load(path).state_dict(), expect(weights['unet'], 'fp16'))
    assert convert(path, tmp_path / 'out.safetensors') == 0


@pytest.mark.parametrize('setting, below', [
    ('HF_HUB_CACHE', ''), ('HUGGINGFACE_HUB_CACHE', ''), ('HF_HOME', 'hub'), ('XDG_CACHE_HOME', 'huggingface/hub'),
    ('HOME', '.cache/huggingface/hub')])
def test_a_repo_id_is_found_in_the_cache(setting, below, whole_folder, weights, tmp_path, monkeypatch):
    """Wherever the settings say the cache is, and each of the names that SD 1.5 has had finds the other's snapshot."""
    stored, asked = (OLD_SD15, SD15) if setting == 'HF_HOME' else (SD15, OLD_SD15) if setting == 'HOME' else (SD15, SD15)
    into_cache(shutil.copytree(whole_folder, tmp_path / 'made'), tmp_path / 'cache' / below, stored)
    monkeypatch.setenv(setting, str(tmp_path / 'cache'))
    for part, module in list(MODULES.items())[-3 if setting == 'HF_HOME' else -1:]:
        same(module.load(asked).state_dict(), expect(weights[part], 'fp16'))
    assert clip_text.load_tokenizer(asked)(['a red star']).shape == (1, 77)


def test_the_cache_settings_rank_as_in_huggingface_hub(whole_folder, weights, tmp_path, monkeypatch):
    into_cache(shutil.copytree(whole_folder, tmp_path / 'made'), tmp_path / 'first')
    for setting, place in zip(CACHE_SETTINGS, ['first', 'second', 'third', 'fourth']):
        monkeypatch.setenv(setting, str(tmp_path / place))
    same(vae.load(SD15).state_dict(), expect(weights['vae'], 'fp16'))


@pytest.mark.parametrize('repo', [SD15, OLD_SD15, 'openai/clip-vit-large-patch14'])
def test_the_tokenizer_of_a_single_file_comes_from_the_cache(repo, weights, tmp_path, monkeypatch):
    """From a Stable Diffusion 1.5 there, or from the CLIP that its tokenizer is of."""
    file = single_file(community)(tmp_path, weights)
    shutil.copytree(TOKENIZER, tmp_path / 'made' / ('' if 'clip' in repo else 'tokenizer'))
    into_cache(tmp_path / 'made', tmp_path / 'cache', repo)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'cache'))
    texts = ['a red star above a blue ring', '']
    assert torch.equal(clip_text.load_tokenizer(file)(texts), clip_text.load_tokenizer(TOKENIZER)(texts))


def test_without_a_tokenizer_the_user_learns_where_to_get_one(weights, tmp_path):
    refused(clip_text.load_tokenizer, single_file(community)(tmp_path, weights), 'vocab.json', 'merges.txt', '--tokenizer')


# ---------------------------------------------------------------------------------------------------
# Refusals: one sentence that names the file, what it is and what is wanted; nothing written

def assert_sentence(text, path, *words):
    text = text.strip()
    assert '\n' not in text and 'Traceback' not in text and 'Errno' not in text and len(text) < 700, text
    for word in (re.escape(Path(path).name), *words):
        assert re.search(word, text, re.IGNORECASE), f'no {word!r} in: {text}'


def refused(load, path, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(path)
    assert_sentence(str(error.value), path, *words)


def convert(*arguments):
    """Exit code of `sid_lsg.py convert`, run in this process."""
    try:
        sid_lsg.main(['convert', *map(str, arguments)])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def refused_by_convert(capsys, folder, source, *words, out='out.safetensors', more=(), named=None):
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob('*') if not path.is_dir()}
    capsys.readouterr()
    code = convert(source, folder / out, *more)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith('sid_lsg: '), error
    assert_sentence(error, named or source, *words)
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob('*') if not path.is_dir()} == before


def edited(change, tensors=community, name='model-v1.safetensors'):
    """Builder of a single file of which `change` altered the dict of tensors."""
    def build(folder, weights):
        altered = dict(tensors(weights))
        change(altered)
        return save(altered, folder / name)
    return build


def only(*keys):
    """Builder of a file with a few tensors of these names."""
    return lambda folder, weights: save({key: torch.rand(8, 8) for key in keys}, folder / 'model-v1.safetensors')


def content(data, name='model-v1.safetensors'):
    def build(folder, weights):
        (folder / name).write_bytes(data)
        return folder / name
    return build


def cut(keep, build=single_file(community)):
    """Builder of a download that broke off: after `keep` bytes, or that share of them."""
    def broken(folder, weights):
        path = build(folder, weights)
        data = path.read_bytes()
        path.write_bytes(data[:keep if isinstance(keep, int) else int(len(data) * keep)])
        return path
    return broken


def as_sdxl(tensors):
    for key in [key for key in tensors if key.startswith('cond_stage_model.')]:
        tensors[key.replace('cond_stage_model.', 'conditioner.embedders.0.')] = tensors.pop(key)
    tensors.update({'conditioner.embedders.1.model.ln_final.weight': torch.rand(1280),
                    UNET + 'label_emb.0.0.weight': torch.rand(128, 96)})


def as_sd2(tensors):
    for key in [key for key in tensors if key.startswith('cond_stage_model.')]:
        del tensors[key]
    for key, w in tensors.items():
        if re.search(r'attn2\.to_[kv]', key):
            tensors[key] = torch.rand(len(w), 1024).half()
        if re.search(r'\.proj_(in|out)\.weight', key) and key.startswith(UNET):
            tensors[key] = w.flatten(1)
    tensors.update({'cond_stage_model.model.ln_final.weight': torch.rand(1024),
                    'cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight': torch.rand(3072, 1024)})


def set_tensor(key, w):
    return lambda tensors: tensors.update({key: w})


def poison(key, value):
    def change(tensors):
        tensors[key] = tensors[key].clone()
        tensors[key].flatten()[-1] = value
    return change


def keep_only(prefix, strip=''):
    def change(tensors):
        kept = {key.removeprefix(strip): w for key, w in tensors.items() if key.startswith(prefix)}
        tensors.clear()
        tensors.update(kept)
    return change


CONV_IN = UNET + 'input_blocks.0.0.weight'
LFS = (b'version https://git-lfs.github.com/spec/v1\n'
       b'oid sha256:6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa\nsize 4265146304\n')
HTML = b'<!DOCTYPE html>\n<html class=""><head><title>Log in</title></head></html>\n'
XL, TWO = 'Stable Diffusion XL|SDXL', 'Stable Diffusion 2|SD ?2'
UNET_ONLY = ('unet',)

FILES = {                                                   # what it is: (builder, which loaders refuse it, words said)
    'git-lfs pointer': (content(LFS), ALL, 'git-lfs'),
    'git-lfs pointer, ckpt': (content(LFS, 'model-v1.ckpt'), ALL, 'git-lfs'),
    'HTML page': (content(HTML), ALL, 'HTML'),
    'HTML page, ckpt': (content(b'\n  <html><body>404</body></html>', 'model-v1.ckpt'), ALL, 'HTML'),
    'empty': (content(b''), ALL, 'empty|cut'),
    'noise': (content(bytes(range(256)) * 50), ALL),
    'noise, ckpt': (content(bytes(range(256)) * 50, 'model-v1.ckpt'), ALL),
    'safetensors cut off in its first 8 bytes': (cut(5), ALL, 'cut'),
    'safetensors cut off in its header': (cut(5000), ALL, 'cut'),
    'safetensors cut off in its middle': (cut(0.5), ALL, 'cut'),
    'safetensors cut off in its last byte': (cut(-1), ALL, 'cut'),
    'ckpt cut off in its middle': (cut(0.5, torch_file(halves)), ALL, 'cut'),
    'ckpt cut off in its last byte': (cut(-1, torch_file(halves)), ALL, 'cut'),
    'ckpt of the old kind, cut off': (cut(1000, torch_file(halves, _use_new_zipfile_serialization=False)), ALL, 'cut'),
    'a single byte': (content(b'\x80', 'model-v1.ckpt'), ALL, 'cut'),
    'a list of tensors': (torch_file(lambda weights: [torch.zeros(1)]), ALL, 'by name'),
    'tensors by number': (torch_file(lambda weights: {1: torch.zeros(1)}), ALL),
    'SDXL': (edited(as_sdxl), ALL, XL),
    'SD 2': (edited(as_sd2), ('unet', 'text_encoder'), TWO),
    'inpainting': (edited(set_tensor(CONV_IN, torch.rand(32, 9, 3, 3))), UNET_ONLY, 'inpaint'),
    'depth': (edited(set_tensor(CONV_IN, torch.rand(32, 5, 3, 3))), UNET_ONLY, 'depth'),
    'pix2pix': (edited(set_tensor(CONV_IN, torch.rand(32, 8, 3, 3))), UNET_ONLY, 'pix2pix'),
    'LoRA of kohya': (only('lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight', 'lora_unet_mid_block_attentions_0_'
                           'proj_in.lora_up.weight', 'lora_te_text_model_encoder_layers_0_mlp_fc1.alpha'), ALL, 'LoRA'),
    'LoRA of peft': (only('unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight'), ALL, 'LoRA'),
    'LoRA of diffusers': (only('unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight'),
                          ALL, 'LoRA'),
    'ControlNet': (only('control_model.input_blocks.0.0.weight', 'control_model.zero_convs.0.0.weight'), ALL, 'ControlNet'),
    'ControlNet of diffusers': (only('controlnet_cond_embedding.conv_in.weight', 'controlnet_down_blocks.0.weight',
                                     'conv_in.weight', 'mid_block.resnets.0.conv1.weight'), ALL, 'ControlNet'),
    'Flux': (only('double_blocks.0.img_attn.qkv.weight', 'single_blocks.0.linear1.weight', 'img_in.weight'), ALL, 'Flux'),
    'Flux in a whole checkpoint': (only(UNET + 'double_blocks.0.img_attn.qkv.weight', UNET + 'single_blocks.0.linear1.weight',
                                        'vae.decoder.conv_in.weight'), UNET_ONLY, 'Flux'),
    'SD 3': (only(UNET + 'joint_blocks.0.context_block.attn.qkv.weight', UNET + 'x_embedder.proj.weight',
                  'first_stage_model.decoder.conv_in.weight'), UNET_ONLY, 'Stable Diffusion 3|SD ?3'),
    'another program\'s': (only('bert.encoder.layer.0.output.dense.weight'), ALL),
    'lone VAE': (edited(keep_only(VAE, VAE)), ('unet', 'text_encoder'), 'VAE'),
    'VAE and no more, with its prefix': (edited(keep_only(VAE)), ('unet', 'text_encoder'), 'VAE'),
    'lone UNet': (edited(keep_only(UNET)), ('vae', 'text_encoder'), 'UNet'),
    'no text encoder': (edited(lambda tensors: [tensors.pop(key) for key in list(tensors) if 'cond_stage' in key]),
                        ('text_encoder',), 'text.encoder'),
}


@pytest.mark.parametrize('name', FILES)
def test_files_that_are_something_else(name, weights, tmp_path, capsys):
    build, parts, *words = FILES[name]
    path = build(tmp_path, weights)
    for part in parts:
        refused(MODULES[part].load, path, *words)
    refused_by_convert(capsys, tmp_path, path, *words)


TENSORS = {                                                 # which component: tensors to lose
    'unet': ['input_blocks.0.0.weight', 'input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight', 'output_blocks.2.1.conv.bias'],
    'vae': ['encoder.conv_in.weight', 'decoder.mid.attn_1.proj_out.weight'],
    'text_encoder': ['text_model.embeddings.token_embedding.weight', 'text_model.encoder.layers.11.layer_norm2.bias'],
}
PREFIX = {'unet': UNET, 'vae': VAE, 'text_encoder': TEXT}


@pytest.mark.parametrize('part, key', [(part, key) for part, keys in TENSORS.items() for key in keys])
def test_a_missing_tensor_is_named(part, key, weights, tmp_path):
    """By either of its names; the tensors that tell the net's size are no exception."""
    theirs = next(row[5] for row in TABLE if row[0] == PREFIX[part] + key)
    path = edited(lambda tensors: tensors.pop(PREFIX[part] + key))(tmp_path, weights)
    refused(MODULES[part].load, path, f'{re.escape(key)}|{re.escape(theirs)}', 'miss|lack|no ')


@pytest.mark.parametrize('part, key, shape', [
    ('unet', 'output_blocks.5.0.in_layers.2.weight', (96, 191, 3, 3)), ('vae', 'decoder.up.1.block.0.norm1.weight', (95,)),
    ('vae', 'encoder.mid.attn_1.q.weight', (96, 95, 1, 1)),
    ('text_encoder', 'text_model.encoder.layers.3.self_attn.q_proj.weight', (48, 47))])
def test_a_misshapen_tensor_is_named_with_both_shapes(part, key, shape, weights, tmp_path):
    full, theirs = PREFIX[part] + key, next(row[5] for row in TABLE if row[0] == PREFIX[part] + key)
    right = ldm(weights)[full].shape
    path = edited(set_tensor(full, torch.rand(shape)))(tmp_path, weights)
    # A 1x1 convolution of the VAE's attention may be told as the linear map that it becomes.
    words = [r',? ?'.join(map(str, numbers[:2] if part == 'vae' else numbers)) for numbers in (shape, right)]
    refused(MODULES[part].load, path, *words, f'{re.escape(key)}|{re.escape(theirs)}')


@pytest.mark.parametrize('part, key', [
    ('unet', UNET + 'input_blocks.1.0.skip_connection.weight'), ('vae', VAE + 'stray.weight'),
    ('text_encoder', TEXT + 'text_model.encoder.layers.12.mlp.fc1.bias'), ('unet', 'stray.weight')])
def test_an_extra_tensor_is_named(part, key, weights, tmp_path, capsys):
    path = edited(set_tensor(key, torch.rand(32)))(tmp_path, weights)
    short = re.escape(key.removeprefix(PREFIX[part]))
    words = [short if 'skip' not in key else short + '|' + re.escape('down_blocks.0.resnets.0.conv_shortcut.weight')]
    refused(MODULES[part].load, path, *words)
    refused_by_convert(capsys, tmp_path, path, *words)


@pytest.mark.parametrize('part, key, value', [
    ('unet', UNET + 'out.0.weight', float('nan')), ('vae', VAE + 'decoder.mid.attn_1.q.weight', float('inf')),
    ('text_encoder', TEXT + 'text_model.final_layer_norm.bias', float('-inf'))])
def test_weights_that_are_not_finite(part, key, value, weights, tmp_path, capsys):
    theirs = next(row[5] for row in TABLE if row[0] == key)
    path = edited(poison(key, value))(tmp_path, weights)
    words = 'NaN|infinit|not finite', f'{re.escape(key.removeprefix(PREFIX[part]))}|{re.escape(theirs)}'
    refused(MODULES[part].load, path, *words)
    refused_by_convert(capsys, tmp_path, path, *words)


def config_of(folder, part, **changes):
    file = folder / part / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit(folder, part, change):
    file = folder / part / f'{STEMS[part]}.safetensors'
    tensors = load_file(file)
    change(tensors)
    save(tensors, file)


FOLDERS = {                                                 # what is wrong: (how to do it to a folder, which loader, words)
    'no config.json': (lambda f: (f / 'unet' / 'config.json').unlink(), 'unet', 'config.json'),
    'no config.json, vae': (lambda f: (f / 'vae' / 'config.json').unlink(), 'vae', 'config.json'),
    'no config.json, text': (lambda f: (f / 'text_encoder' / 'config.json').unlink(), 'text_encoder', 'config.json'),
    'config.json cut off': (lambda f: (f / 'unet' / 'config.json').write_text('{"a": '), 'unet', 'config.json'),
    'config.json a list': (lambda f: (f / 'unet' / 'config.json').write_text('[1]'), 'unet', 'by name'),
    'config.json a pointer': (lambda f: (f / 'unet' / 'config.json').write_bytes(LFS), 'unet', 'config.json'),
    'no weights': (lambda f: (f / 'unet' / 'diffusion_pytorch_model.safetensors').unlink(), 'unet', 'diffusion_pytorch_model'),
    'only unaveraged weights': (lambda f: (f / 'unet' / 'diffusion_pytorch_model.safetensors').rename(
        f / 'unet' / 'diffusion_pytorch_model.non_ema.safetensors'), 'unet', 'diffusion_pytorch_model'),
    'weights a git-lfs pointer': (
        lambda f: (f / 'vae' / 'diffusion_pytorch_model.safetensors').write_bytes(LFS), 'vae', 'git-lfs'),
    'weights an HTML page': (lambda f: (f / 'text_encoder' / 'model.safetensors').write_bytes(HTML), 'text_encoder', 'HTML'),
    'heads that do not divide': (lambda f: config_of(f, 'unet', attention_head_dim=7), 'unet', 'heads'),
    'heads level by level': (lambda f: config_of(f, 'unet', attention_head_dim=[8] * 4), 'unet', 'sizes'),
    'no groups': (lambda f: config_of(f, 'unet', norm_num_groups=0), 'unet', 'sizes'),
    'heads that do not divide, text': (lambda f: config_of(f, 'text_encoder', num_attention_heads=7), 'text_encoder', 'heads'),
    'latents of no size': (lambda f: config_of(f, 'vae', scaling_factor=0), 'vae', 'scaled by 0'),
    'latents scaled by a word': (lambda f: config_of(f, 'vae', scaling_factor='x'), 'vae', 'sizes'),
    'merges not UTF-8': (lambda f: (f / 'tokenizer' / 'merges.txt').write_bytes(b'caf\xe9'), 'tokenizer', 'merges.txt'),
    'no VAE': (lambda f: shutil.rmtree(f / 'vae'), 'vae', 'vae'),
    'a UNet that predicts v': (lambda f: (f / 'scheduler' / 'scheduler_config.json').write_text('{"prediction_type": "v_prediction"}'),
                               'unet', 'v_prediction'),
    'no UNet': (lambda f: shutil.rmtree(f / 'unet'), 'unet', 'unet'),
    'no text encoder': (lambda f: shutil.rmtree(f / 'text_encoder'), 'text_encoder', 'text.encoder'),
    'no tokenizer': (lambda f: shutil.rmtree(f / 'tokenizer'), 'tokenizer', 'tokenizer'),
    'inpainting': (lambda f: config_of(f, 'unet', in_channels=9) or edit(f, 'unet', set_tensor(
        'conv_in.weight', torch.rand(32, 9, 3, 3))), 'unet', 'inpaint'),
    'SDXL': (lambda f: config_of(f, 'unet', cross_attention_dim=2048, addition_embed_type='text_time', use_linear_projection=True,
                                 attention_head_dim=[5, 10, 20, 20]), 'unet', XL),
    'SD 2': (lambda f: config_of(f, 'unet', cross_attention_dim=1024, use_linear_projection=True,
                                 attention_head_dim=[5, 10, 20, 20]), 'unet', TWO),
    'ControlNet': (lambda f: config_of(f, 'unet', _class_name='ControlNetModel') or edit(f, 'unet', set_tensor(
        'controlnet_cond_embedding.conv_in.weight', torch.rand(16, 3, 3, 3))), 'unet', 'ControlNet'),
}


@pytest.mark.parametrize('name', FOLDERS)
def test_folders_that_are_not_whole(name, whole_folder, tmp_path, capsys):
    damage, part, *words = FOLDERS[name]
    folder = shutil.copytree(whole_folder, tmp_path / 'model-v1')
    damage(folder)
    refused(clip_text.load_tokenizer if part == 'tokenizer' else MODULES[part].load, folder, *words)
    refused_by_convert(capsys, tmp_path, folder, *words, out='out')


def test_a_path_that_is_not_there(tmp_path, capsys):
    for path in (tmp_path / 'nowhere', tmp_path / 'nowhere.safetensors', 'no_such_folder/nowhere', 'x/y/nowhere.ckpt'):
        for module in MODULES.values():
            refused(module.load, path)
        refused_by_convert(capsys, tmp_path, path)
    refused(unet.load, 'nobody/nowhere', 'cache')


def test_a_cache_that_is_not_whole(whole_folder, weights, tmp_path, monkeypatch, capsys):
    """refs/main naming a snapshot that is gone, a component never downloaded, a link whose blob is gone."""
    snapshot = into_cache(shutil.copytree(whole_folder, tmp_path / 'made'), tmp_path / 'cache')
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'cache'))
    shutil.rmtree(snapshot / 'vae')
    refused(vae.load, SD15, 'vae')
    refused_by_convert(capsys, tmp_path, SD15, 'vae', out='out')
    same(unet.load(SD15).state_dict(), expect(weights['unet'], 'fp16'))     # partial: what is there serves
    link = snapshot / 'text_encoder' / 'model.safetensors'
    link.resolve().unlink()
    refused(clip_text.load, SD15, 'model.safetensors')
    snapshot.rename(snapshot.with_name('0' * 40))
    refused(unet.load, SD15, 'refs/main')
    refused_by_convert(capsys, tmp_path, SD15, 'refs/main', out='out')
    (snapshot.parent.parent / 'refs' / 'main').unlink()
    refused(unet.load, SD15, 'refs/main')


def test_fp8_is_read_as_fp16_which_computes(weights, tmp_path):
    """Where a file's own type is asked for, as `sample` does on a CPU."""
    fp8 = {key: w.to(torch.float8_e4m3fn) for key, w in emaonly(weights).items() if w.is_floating_point()}
    net = unet.load(save(fp8, tmp_path / 'fp8.safetensors'), None)
    same(net.state_dict(), {key: w.to(torch.float8_e4m3fn).half() for key, w in weights['unet'].items()})


# ---------------------------------------------------------------------------------------------------
# Writing: any layout in, a folder or a single file out, and diffusers opens both

def assert_single_file(path, weights, precision, **about):
    """The 1,131 names of the real files, their ranks and types, and by diffusers' conversion the right tensors.

    `about` is what the header says of a student."""
    kind = {'fp16': torch.float16, 'fp32': torch.float32}[precision]
    tensors = load_file(path)
    assert sorted(tensors) == sorted(WEIGHTS + [POSITIONS]) and len(tensors) == 1131
    assert torch.equal(tensors[POSITIONS], torch.arange(77)[None]) and tensors[POSITIONS].dtype == torch.int64
    assert {w.dtype for key, w in tensors.items() if key != POSITIONS} == {kind}
    ranks = {row[0]: len(json.loads(row[1])) for row in TABLE}
    assert all(w.dim() == ranks[key] for key, w in tensors.items())
    with safe_open(path, 'pt') as file:
        assert file.metadata() == {'format': 'pt', **about}
    for part, converted in converted_by_diffusers(tensors).items():
        same(converted, halves(weights[part]) if precision == 'fp16' else weights[part])


def assert_folder(folder, weights, precision):
    """As stored, and as diffusers and transformers open it."""
    for part in MODULES:
        stored = load_file(folder / part / f'{STEMS[part]}.safetensors')
        same(stored, halves(weights[part]) if precision == 'fp16' else weights[part])
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    same(pipe.unet.state_dict(), expect(weights['unet'], precision))
    same(pipe.vae.state_dict(), expect(weights['vae'], precision))
    text = pipe.text_encoder.float().state_dict()           # transformers keeps a file's half precision, diffusers does not
    same({f'text_model.{key}': w for key, w in text.items()}, expect(weights['text_encoder'], precision))
    assert pipe.vae.config.scaling_factor == 0.18215 and pipe.unet.config.attention_head_dim == 8
    assert not pipe.scheduler.config.clip_sample and pipe.scheduler.config.prediction_type == 'epsilon'
    assert torch.allclose(pipe.scheduler.alphas_cumprod, sid_lsg.ALPHA ** 2, rtol=1e-5)
    texts = ['a red star above a blue ring on a black background', '']
    ids = pipe.tokenizer(texts, padding='max_length', truncation=True, return_tensors='pt').input_ids
    assert torch.equal(ids, clip_text.load_tokenizer(TOKENIZER)(texts))
    assert torch.equal(ids, clip_text.load_tokenizer(folder)(texts))


# Reading is one code path, tested above with every layout; these are each kind of source, each target and precision.
CONVERSIONS = [('v1-5-pruned-emaonly', 'file', 'fp32'), ('v1-5-pruned', 'file', 'fp16'),
               ('ckpt of pytorch-lightning', 'file', 'fp32'), ('official folder', 'folder', 'fp32'),
               ('community fp16', 'folder', 'fp16')]


@pytest.mark.parametrize('name, to, precision', CONVERSIONS)
def test_convert(name, to, precision, nets, weights, tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    source, expected = build_layout(name, tmp_path / 'in', nets, weights)
    before = sorted(tmp_path.rglob('*'))
    out = tmp_path / ('out.safetensors' if to == 'file' else 'out')
    tokenizer = [] if source.is_dir() or to == 'file' else ['--tokenizer', TOKENIZER]
    assert convert(source, out, '--precision', precision, *tokenizer) == 0, capsys.readouterr().err
    (assert_single_file if to == 'file' else assert_folder)(out, expected, precision)
    for part, module in MODULES.items() if precision == 'fp32' else ():
        same(module.load(out).state_dict(), expected[part])
    assert sorted(p for p in tmp_path.rglob('*') if out not in (p, *p.parents)) == before


def test_the_default_is_fp16_and_a_repo_id_will_do(whole_folder, weights, tmp_path, monkeypatch):
    into_cache(shutil.copytree(whole_folder, tmp_path / 'made'), tmp_path / 'cache')
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'cache'))
    assert convert(SD15, tmp_path / 'out.safetensors') == 0
    assert_single_file(tmp_path / 'out.safetensors', weights, 'fp16')


def test_diffusers_opens_the_single_file_as_a_pipeline(nets, whole_folder, tmp_path):
    assert convert(whole_folder, tmp_path / 'out.safetensors', '--precision', 'fp32') == 0
    pipe = StableDiffusionPipeline.from_single_file(tmp_path / 'out.safetensors', config=str(whole_folder), local_files_only=True)
    for part, net in nets.items():
        same(getattr(pipe, part).state_dict(), expect(net.state_dict(), 'fp16'))


def test_nothing_is_overwritten_unless_asked(weights, tmp_path, capsys):
    """Then what is replaced stays whole until the new one is, so that a file may be converted onto itself."""
    source = single_file(emaonly)(tmp_path, weights)
    tokenizer = ['--tokenizer', TOKENIZER]
    for out in ('out.safetensors', 'out'):
        (tmp_path / 'out').mkdir(exist_ok=True)
        (tmp_path / 'out' / 'note.txt').write_text('mine')
        (tmp_path / 'out.safetensors').write_bytes(b'mine')
        refused_by_convert(capsys, tmp_path, source, 'overwrit', out=out, more=tokenizer, named=tmp_path / out)
    shutil.rmtree(tmp_path / 'out')
    for out in ('out.safetensors', 'out', 'out'):
        assert convert(source, tmp_path / out, '--overwrite', *tokenizer) == 0
        same(vae.load(tmp_path / out).state_dict(), expect(weights['vae'], 'fp16' if 'safe' in out else 'fp32'))
    for path, precision in ((tmp_path / 'out', 'fp32'), (source, 'fp16')):          # the defaults
        assert convert(path, path, '--overwrite') == 0
        same(vae.load(path).state_dict(), expect(weights['vae'], precision))
    (tmp_path / 'was a file').write_bytes(b'mine')
    assert convert(source, tmp_path / 'was a file', '--overwrite', *tokenizer) == 0
    broken = content(b'', 'broken.safetensors')(tmp_path, weights)
    for out in ('out.safetensors', 'out'):                  # refused, so what was to be replaced stays
        refused_by_convert(capsys, tmp_path, broken, out=out, more=['--overwrite', *tokenizer])
    for name in ('out', 'nothing'):                         # a link is replaced, not what it leads to
        (tmp_path / f'to {name}').symlink_to(name)
        assert convert(source, tmp_path / f'to {name}', '--overwrite', *tokenizer) == 0
        assert not (tmp_path / f'to {name}').is_symlink()
    (tmp_path / 'new.old').mkdir()                          # in the way of what is put aside only
    assert convert(source, tmp_path / 'new', *tokenizer) == 0
    assert (tmp_path / 'out').is_dir() and [path.name for path in tmp_path.glob('*.old')] == ['new.old']


def test_what_was_there_is_put_aside_until_the_new_has_its_name(whole_folder, tmp_path, monkeypatch):
    """Onto itself: whatever a kill leaves, a folder of the target's name is a whole one."""
    out = shutil.copytree(whole_folder, tmp_path / 'out')
    remove, removed = sid_lsg.remove, []

    def watched(path):
        unet.load(out)
        removed.append(path.name)
        remove(path)
    monkeypatch.setattr(sid_lsg, 'remove', watched)
    assert convert(out, out, '--overwrite') == 0
    assert removed == ['out.old', 'out.tmp'] and os.listdir(tmp_path) == ['out']


def test_folders_on_the_way_to_the_target_are_made(weights, tmp_path):
    source = single_file(emaonly)(tmp_path, weights)
    assert convert(source, tmp_path / 'some' / 'where' / 'out.safetensors') == 0
    assert_single_file(tmp_path / 'some' / 'where' / 'out.safetensors', weights, 'fp16')
    (tmp_path / 'any').touch()
    assert (tmp_path / 'some' / 'where' / 'out.safetensors').stat().st_mode == (tmp_path / 'any').stat().st_mode


def test_a_single_file_without_a_tokenizer_makes_no_folder(weights, tmp_path, capsys):
    refused_by_convert(capsys, tmp_path, single_file(community)(tmp_path, weights), 'vocab.json', '--tokenizer', out='out')


def test_parts_that_do_not_fit_are_not_put_into_one_file(weights, tmp_path, capsys):
    """Text states of another width than the UNet takes: the file could not be drawn with."""
    unet.save(unet.UNet((32, 64, 96, 96), 40), tmp_path / 'narrow')
    teacher = single_file(emaonly)(tmp_path, weights)
    refused_by_convert(capsys, tmp_path, tmp_path / 'narrow', 'expected text states of 40', named=teacher,
                       more=['--teacher', teacher])


def test_what_half_precision_cannot_hold_is_not_written(weights, tmp_path, capsys):
    """70,000 would become infinite."""
    key = UNET + 'out.0.weight'
    source = edited(poison(key, 70_000.0), emaonly)(tmp_path, weights)
    refused_by_convert(capsys, tmp_path, source, 'fp32')
    assert convert(source, tmp_path / 'out.safetensors', '--precision', 'fp32') == 0


def test_other_architectures_do_not_fit_a_single_file(tmp_path, capsys):
    """Its format cannot say that a net has two levels; the tiny teacher's has."""
    refused_by_convert(capsys, tmp_path, HERE / 'tiny_sd', 'Stable Diffusion 1.5|SD 1.5')
    assert convert(HERE / 'tiny_sd', tmp_path / 'out') == 0
    for part, module in MODULES.items():
        same(module.load(tmp_path / 'out').state_dict(), module.load(HERE / 'tiny_sd').state_dict())


# ---------------------------------------------------------------------------------------------------
# The official one-step generators: pickles of diffusers modules

def official_pickle(net, processor=AttnProcessor2_0, dtype=torch.float32):
    """The bytes of a generator as the official training loop saves it (training/sid_training_loop.py 641-650)."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    net = net.half() if dtype == torch.float16 else net
    net.set_attn_processor(processor())
    return pickle.dumps(dict(ema=net))


@pytest.fixture(scope='module')
def student():
    """Of a seed of its own, so that a pipeline shows whose UNet it holds."""
    return randomise(UNet2DConditionModel(
        block_out_channels=WIDTHS, cross_attention_dim=48, attention_head_dim=8, sample_size=8), 9)


@pytest.fixture(scope='module')
def pickled(student):
    return official_pickle(student, XFormersAttnProcessor)


def assert_student(folder, expected):
    """A folder with a UNet and no more, for this loader and diffusers."""
    same(unet.load(folder).state_dict(), expected)
    assert not [name for name in ('vae', 'text_encoder', 'tokenizer') if (folder / name).exists()]
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder='unet')
    same(theirs.state_dict(), expected)
    assert theirs.config.attention_head_dim == 8 and theirs.config.sample_size == 8
    assert json.loads((folder / 'generator.json').read_text())['t_init'] == 625     # the paper's, if nothing else is said


@pytest.mark.parametrize('processor, dtype', [(AttnProcessor2_0, torch.float32), (XFormersAttnProcessor, torch.float16)])
def test_official_pickles_convert(processor, dtype, student, whole_folder, weights, tmp_path):
    """Alone they become a student folder, with a teacher a whole checkpoint. (The third kind is further down.)"""
    file = content(official_pickle(student, processor, dtype), 'network-snapshot-1.500000-004096.pkl')(tmp_path, None)
    expected = expect(student.state_dict(), 'fp16' if dtype == torch.float16 else 'fp32')
    if processor is AttnProcessor2_0:
        assert convert(file, tmp_path / 'alone', '--precision', 'fp32') == 0
        assert_student(tmp_path / 'alone', expected)
        assert convert(tmp_path / 'alone', tmp_path / 'again') == 0
        assert_student(tmp_path / 'again', expected)
    else:
        assert convert(file, tmp_path / 'out.safetensors', '--teacher', whole_folder, '--precision', 'fp32') == 0
        parts = {part: expect(tensors, 'fp16') for part, tensors in weights.items()}
        assert_single_file(tmp_path / 'out.safetensors', {**parts, 'unet': expected}, 'fp32', t_init='625')


def test_a_pickle_alone_makes_no_single_file(pickled, tmp_path, capsys):
    refused_by_convert(capsys, tmp_path, content(pickled, 'network.pkl')(tmp_path, None), '--teacher')
    assert convert(tmp_path / 'network.pkl', tmp_path / 'alone') == 0
    refused_by_convert(capsys, tmp_path, tmp_path / 'alone', '--teacher')


def test_pickles_convert_where_diffusers_is_not_installed(student, pickled, tmp_path):
    content(pickled, 'network.pkl')(tmp_path, None)
    code = ('import sys; sys.modules.update(dict.fromkeys(["diffusers", "transformers", "xformers", "peft"])); '
            'import sid_lsg; sid_lsg.main(["convert", "network.pkl", "out", "--precision", "fp32"])')
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': str(HERE.parent)})
    assert result.returncode == 0, result.stderr
    assert_student(tmp_path / 'out', student.state_dict())


class Evil:
    """Unpickled carelessly, it makes a file in the current folder."""

    def __reduce__(self):
        return os.system, ('touch executed',)


def asking_for(module, name, argument):
    """A pickle that calls what it finds under this name."""
    def text(word):
        return b'X' + len(word).to_bytes(4, 'little') + word.encode()
    return b'\x80\x04}' + text('ema') + text(module) + text(name) + b'\x93' + text(argument) + b'\x85Rs.'


class Nested:
    """Tensor bytes that are themselves a torch.save of something evil."""

    def __reduce__(self):
        torch.save(Evil(), buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)


EVIL = {
    'os.system': (lambda: pickle.dumps(dict(ema=Evil())), 'system'),
    'os.system beside': (lambda: pickle.dumps(dict(ema=1, note=Evil())), 'system'),
    'old protocol': (lambda: pickle.dumps(dict(ema=Evil()), 2), 'system'),
    'os.system inside a storage': (lambda: pickle.dumps(dict(ema=Nested())), 'system'),
    'builtins.eval': (lambda: asking_for('builtins', 'eval', 'open("executed", "w")'), 'eval'),
    'builtins.getattr': (lambda: asking_for('builtins', 'getattr', 'x'), 'getattr'),
    'subprocess': (lambda: asking_for('subprocess', 'getoutput', 'touch executed'), 'getoutput'),
    'torch.load': (lambda: asking_for('torch.serialization', 'load', 'executed'), 'torch.*load'),
    'a path through torch.nn': (lambda: asking_for('torch.nn.modules.module', 'warnings.sys.modules', 'x'),),
    'a path through diffusers': (lambda: asking_for('diffusers.utils.import_utils', 'os.system', 'touch executed'),),
    'a path through OrderedDict': (lambda: asking_for('collections', 'OrderedDict.fromkeys', 'x'), 'OrderedDict.fromkeys'),
}


@pytest.mark.parametrize('name', EVIL)
def test_pickles_that_ask_for_more_are_refused(name, tmp_path, monkeypatch, capsys):
    """By name, and nothing in them has run."""
    monkeypatch.chdir(tmp_path)
    make, *words = EVIL[name]
    file = tmp_path / 'network.pkl'
    file.write_bytes(make())
    refused_by_convert(capsys, tmp_path, file, *words, out='out')
    assert not (tmp_path / 'executed').exists()


def test_torch_files_that_ask_for_more_are_refused(tmp_path, monkeypatch, capsys):
    """A .ckpt and a .bin are pickles too."""
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save({'state_dict': {UNET + 'x': torch.zeros(1)}, 'callbacks': Evil()}, tmp_path / 'model.ckpt',
                   _use_new_zipfile_serialization=zipped)
        for module in MODULES.values():
            refused(module.load, tmp_path / 'model.ckpt', 'system')
        refused_by_convert(capsys, tmp_path, tmp_path / 'model.ckpt', 'system')
    (tmp_path / 'unet').mkdir()
    (tmp_path / 'unet' / 'config.json').write_text((HERE / 'tiny_sd' / 'unet' / 'config.json').read_text())
    torch.save(Evil(), tmp_path / 'unet' / 'diffusion_pytorch_model.bin')
    refused(unet.load, tmp_path / 'unet', 'system')
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('change, words', [
    (lambda net: net.conv_out.weight.data.view(-1)[0].fill_(float('nan')), ('NaN|infinit|not finite', 'conv_out.weight')),
    (lambda net: net.conv_out.register_parameter('bias', None), ('conv_out.bias',)),
    (lambda net: setattr(net, 'conv_in', torch.nn.Conv2d(9, 32, 3, padding=1)), ('conv_in.weight|inpaint',))])
def test_pickles_whose_weights_do_not_fit(change, words, pickled, tmp_path, capsys):
    net = pickle.loads(pickled)['ema']
    change(net)
    refused_by_convert(capsys, tmp_path, content(pickle.dumps(dict(ema=net)), 'network.pkl')(tmp_path, None), *words, out='out')


@pytest.mark.parametrize('keep', [1, 100, 0.5, -1])
def test_pickles_cut_off(keep, pickled, tmp_path, capsys):
    file = cut(keep, content(pickled, 'network.pkl'))(tmp_path, None)
    refused_by_convert(capsys, tmp_path, file, out='out')


# ---------------------------------------------------------------------------------------------------
# From a single file to a student that opens elsewhere, as a user goes

ABOUT = dict(t_init='450', size='64', images='2')      # what is said of the run's generator


@pytest.fixture(scope='module')
def run(weights, tmp_path_factory):
    """A folder with a teacher in one file, and runs/000 that `train` distilled from it."""
    folder = tmp_path_factory.mktemp('work')
    single_file(emaonly)(folder, weights).rename(folder / 'teacher.safetensors')
    (folder / 'prompts.txt').write_text('a red star\na blue ring\n')
    sid_lsg.main(['train', *map(str, ['--teacher', folder / 'teacher.safetensors', '--tokenizer', TOKENIZER, '--prompts',
                                      folder / 'prompts.txt', '--out', folder / 'runs' / '000', '--size', 64, '--t-init', 450, '--kimg', 0.002,
                                      '--batch', 2, '--lr', 1e-3, '--fake-lr', 1e-3, '--ema-kimg', 0.001])])
    yield folder
    shutil.rmtree(folder)


def drawn(folder, name, *arguments):
    """The pixels of the picture `sample` draws."""
    sid_lsg.main(['sample', 'a red star above a blue ring', *map(str, arguments), '--seeds', '3', '--out', str(folder / name)])
    return np.asarray(Image.open(folder / name / '000000.png')).astype(int)


def test_train_convert_sample(run, weights, tmp_path, monkeypatch):
    """A run becomes a single file and a folder with its generator and its teacher's other parts; both draw as it does.

    At its own step and size, which the file's header says, and a folder made of that file."""
    generator = load_file(run / 'runs' / '000' / 'generator' / 'unet' / 'diffusion_pytorch_model.safetensors')
    assert not torch.equal(generator['conv_in.weight'], weights['unet']['conv_in.weight'])
    for source, out in (('runs/000', 'out.safetensors'), ('runs/000/generator', 'out')):
        tokenizer = [] if out.endswith('safetensors') else ['--tokenizer', TOKENIZER]
        assert convert(run / source, tmp_path / out, '--precision', 'fp32', *tokenizer) == 0
    assert_folder(tmp_path / 'out', {**weights, 'unet': generator}, 'fp32')
    assert_single_file(tmp_path / 'out.safetensors', {**weights, 'unet': generator}, 'fp32', **ABOUT)
    assert {'t_init', 'size', 'images'} == set(json.loads((tmp_path / 'out' / 'generator.json').read_text()))    # no paths
    # Mapped weights lie at any multiple of 4 bytes, where MKL may add a product of one row in another order.
    mapped = unet.read_tensors
    monkeypatch.setattr(unet, 'read_tensors', lambda file: {name: w.clone() for name, w in mapped(file).items()})
    expected = drawn(tmp_path, 'a', '--generator', run / 'runs' / '000', '--tokenizer', TOKENIZER)
    single = tmp_path / 'out.safetensors'
    assert convert(single, tmp_path / 'again', '--tokenizer', TOKENIZER) == 0
    for name, how in {'b': ['--generator', single, '--tokenizer', TOKENIZER], 'c': ['--generator', tmp_path / 'out'],
                      'd': ['--generator', tmp_path / 'again']}.items():
        assert expected.shape == (64, 64, 3) and np.array_equal(drawn(tmp_path, name, *how), expected)


def test_another_teachers_parts_may_go_with_a_run(run, whole_folder, weights, tmp_path):
    """Here told from the run's own by being rounded to half precision."""
    assert convert(run / 'runs' / '000', tmp_path / 'out.safetensors', '--teacher', whole_folder, '--precision', 'fp32') == 0
    parts = {part: expect(tensors, 'fp16') for part, tensors in weights.items()}
    parts['unet'] = load_file(run / 'runs' / '000' / 'generator' / 'unet' / 'diffusion_pytorch_model.safetensors')
    assert_single_file(tmp_path / 'out.safetensors', parts, 'fp32', **ABOUT)


def test_a_run_whose_teacher_is_gone(run, tmp_path, capsys):
    shutil.copytree(run / 'runs', tmp_path / 'runs')
    said = tmp_path / 'runs' / '000' / 'generator' / 'generator.json'
    said.write_text(json.dumps({**json.loads(said.read_text()), 'teacher': str(tmp_path / 'gone.safetensors')}))
    refused_by_convert(capsys, tmp_path, tmp_path / 'runs' / '000', named='gone.safetensors')


# As in the README.
SNIPPET = '''\
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained('runs/000/generator/unet')
pipe = StableDiffusionPipeline.from_pretrained(
    'stable-diffusion-v1-5/stable-diffusion-v1-5', unet=unet, safety_checker=None)
pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
z = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
sigma = (1 - pipe.scheduler.alphas_cumprod[625]).sqrt()
image = pipe('a red star', timesteps=[625], guidance_scale=1.0, latents=sigma * z).images[0]
image.save('star.png')
'''


def test_the_readmes_snippet_draws_the_same_picture(run, nets, weights, tmp_path, monkeypatch):
    """One-step sampling with diffusers, on the generator folder that `train` made: at most one grey level apart."""
    monkeypatch.chdir(run)
    teacher = official(nets)(tmp_path / 'teacher', weights)
    assert f"'{SD15}'" in SNIPPET and '64, 64' in SNIPPET
    exec(SNIPPET.replace(f"'{SD15}'", repr(str(teacher))).replace('64, 64', '8, 8'), {})
    theirs = np.asarray(Image.open('star.png')).astype(int)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = clip_text.load(teacher)(clip_text.load_tokenizer(teacher)(['a red star']))
        x = sid_lsg.generate(unet.load('runs/000/generator'), z, context)
        ours = sid_lsg.to_uint8(vae.load(teacher).decode(x))[0].astype(int)
    assert ours.std() > 10 and abs(ours - theirs).max() <= 1


def test_the_snippet_stands_in_the_readme():
    readme = (HERE.parent / 'README.md').read_text(encoding='utf-8')
    assert '\n'.join(f'    {line}'.rstrip() for line in SNIPPET.splitlines()) in readme or SNIPPET in readme
