"""Tests of every layout of Stable Diffusion 1.5: loaded, written for other programs, or refused.

Files with exactly the real layouts are made here, without the loaders: diffusers and transformers
make narrow networks with random weights and write the folder, and keys/ldm_sd15.tsv has every
tensor of v1-5-pruned-emaonly with its name in diffusers.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import clip_text
import sid_lsg
import unet
import vae
from conftest import ROOT
from test_nets import MODULES, SMALL, assert_same_unet, nets, randomise, table  # noqa
from unet import PREFIX, STEM, UserError

POSITIONS = 'text_model.embeddings.position_ids'
SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')


@pytest.fixture(autouse=True)
def small_standard(monkeypatch):
    """Make the narrow networks the size of SD 1.5, which every single file has."""
    for net, small in zip((unet.UNet, vae.VAE, clip_text.TextEncoder), SMALL.values()):
        defaults = net.__init__.__defaults__
        monkeypatch.setattr(net.__init__, '__defaults__', small + defaults[len(small):])


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's own folder, emptied at once, because pytest would keep gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope='session')
def whole_folder(nets, tmp_path_factory):       # noqa: F811
    """A folder of today's diffusers and transformers, for tests that do not change it."""
    folder = tmp_path_factory.mktemp('whole') / 'model-v1'
    StableDiffusionPipeline(
        **nets, tokenizer=CLIPTokenizer.from_pretrained(ROOT / 'tests' / 'tiny_sd' / 'tokenizer'),
        scheduler=PNDMScheduler(**SD15, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def weights(nets):                              # noqa: F811
    """{part: {name in SD 1.5's folder: tensor}}"""
    named = {part: net.state_dict() for part, net in nets.items()}
    text = named['text_encoder']
    named['text_encoder'] = {f'text_model.{key}': w for key, w in text.items()}
    return named


def halves(tensors):
    return {name: w.half() for name, w in tensors.items()}


def official(folder, weights):
    """SD 1.5's own folder. Its fp16 files, and position_ids, have other values here."""
    for part, tensors in weights.items():
        file = folder / part / f'{STEM[part]}.safetensors'
        save_file({key: w.half() + 1 for key, w in tensors.items()},
                  file.with_suffix('.fp16.safetensors'))
        if part == 'vae':               # with the attention's names of diffusers before 0.17
            for new, old in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'),
                             ('to_out.0', 'proj_attn')):
                tensors = {key.replace(new, old): w for key, w in tensors.items()}
            save_file(tensors, file)
        if part == 'text_encoder':
            save_file({**tensors, POSITIONS: torch.zeros(1, 77, dtype=torch.int64)}, file)


def variant(folder, weights):
    for part, tensors in weights.items():
        save_file(halves(tensors), folder / part / f'{STEM[part]}.fp16.safetensors')
        (folder / part / f'{STEM[part]}.safetensors').unlink()


# The tensors of a single file: name, shape, dtype, group, part, name in diffusers.
TABLE = table('ldm_sd15.tsv')


def original(weights):
    """The weights under their original names. The VAE's attention is a 1 x 1 convolution there."""
    tensors = {name: weights[part][key] for name, _, _, _, part, key in TABLE if part}
    return {name: w[:, :, None, None] if '.attn_1.' in name and w.ndim == 2 else w
            for name, w in tensors.items()}


def schedule(**other):
    """The schedule's tensors in a single file. Nobody reads those that are zeros here."""
    scheduler = DDPMScheduler(**{**SD15, **other})
    zeros = {name: torch.zeros(1000) for name, _, _, group, *_ in TABLE if group == 'schedule'}
    return {**zeros, 'betas': scheduler.betas, 'alphas_cumprod': scheduler.alphas_cumprod}


def emaonly(weights):
    """v1-5-pruned-emaonly: the weights, position_ids, the schedule, and two numbers of the EMA."""
    return {**original(weights), **schedule(), 'model_ema.decay': torch.tensor(0.9999),
            'model_ema.num_updates': torch.tensor(470000),
            PREFIX['text_encoder'] + POSITIONS: torch.arange(77)[None]}


def pruned(weights):
    """v1-5-pruned: the UNet at the end of training, and its EMA, which is wanted."""
    tensors = emaonly(weights)
    for name in [name for name in tensors if name.startswith(PREFIX['unet'])]:
        short = name.removeprefix('model.').replace('.', '')
        tensors[f'model_ema.{short}'], tensors[name] = tensors[name], tensors[name] + 1
    return tensors


def web_ui(weights):
    """Half precision, other names of the text encoder, some that it does not use, buffers of a
    sampler, and position_ids as a merge of two models averages them."""
    tensors = {'cond_stage_model.logit_scale': torch.tensor(4.6), 'ddim_sigmas': torch.zeros(50),
               **halves(original(weights)), **halves(schedule()),
               PREFIX['text_encoder'] + 'text_projection.weight': torch.rand(48, 48),
               PREFIX['text_encoder'] + POSITIONS: torch.full((1, 77), 7.5).half()}
    return {name.replace('text_model.', ''): w for name, w in tensors.items()}


HEADER = {'modelspec.architecture': 'stable-diffusion-v1', 'modelspec.predict_key': 'epsilon'}
YAML = """model:    # in the words of v1-inference.yaml
  base_learning_rate: 1.0e-04
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    scale_factor: 0.18215
    first_stage_key: "jpg"
"""


@pytest.mark.parametrize('layout, half', [
    (official, False), (variant, True), (emaonly, False), (pruned, False), (web_ui, True)])
def test_every_layout_gives_the_same_weights(layout, half, whole_folder, weights, tmp_path):
    """Bit for bit, in fp32 and eval mode, with SD 1.5's sizes."""
    path = tmp_path / 'model-v1.safetensors'
    if layout in (official, variant):
        path = shutil.copytree(whole_folder, tmp_path / 'model-v1')
        layout(path, weights)
    else:
        save_file({name: w.contiguous() for name, w in layout(weights).items()}, path, HEADER)
        path.with_suffix('.yaml').write_text(YAML)
    for part, module in MODULES.items():
        net = module.load(str(path))
        with torch.device('meta'):
            assert net.sizes == type(net)().sizes
        assert not net.training and getattr(net, 'scale', 0.18215) == 0.18215
        assert_same_tensors(net.state_dict(), weights[part], half)


def assert_same_tensors(tensors, expected, half=False):
    assert tensors.keys() == expected.keys()
    for name, w in expected.items():
        w = w.half().float() if half else w
        assert tensors[name].dtype == w.dtype and torch.equal(tensors[name], w), name


def into_cache(folder, cache, repo, revision='1'):
    """Copy a folder to where the Hugging Face libraries would put a repo id."""
    shutil.copytree(folder, cache / f'models--{repo}' / 'snapshots' / revision)


@pytest.mark.parametrize('variable, below', [('HF_HUB_CACHE', ''), ('HF_HOME', 'hub')])
def test_a_repo_id_is_found_in_the_cache(variable, below, teacher, tmp_path, monkeypatch):
    """The main revision, or the only one, as where a download named a revision."""
    monkeypatch.delenv('HF_HUB_CACHE')
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(UserError, match='a/b, and no such repo id in the cache .*give a folder'):
        unet.load('a/b')
    into_cache(teacher, tmp_path / below, 'a--b')
    assert unet.load('a/b').sizes['channels'] == [16, 32]
    into_cache(teacher, tmp_path / below, 'a--b', '2')
    with pytest.raises(UserError, match='a--b holds 2 revisions .*give the folder of one'):
        unet.load('a/b')
    (tmp_path / below / 'models--a--b' / 'refs').mkdir()
    (tmp_path / below / 'models--a--b' / 'refs' / 'main').write_text('2')
    assert unet.locate('a/b').name == '2'


# -------------------------------------------------------------------------------------------------
# Values that change what a network computes

def edit(file, **changes):
    """Change entries of a JSON file; ... removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.mark.parametrize('part, key', [
    *((part, key) for part, module in MODULES.items() for key in module.FIXED),
    *(('scheduler', key) for key in unet.SCHEDULE)])
def test_no_value_that_changes_the_arithmetic_is_ignored(part, key, teacher, tmp_path):
    """Neither in a checkpoint nor in the folder of its network alone."""
    own = 'unet' if part == 'scheduler' else part
    fixed, file = MODULES[own].FIXED, tmp_path / part / 'config.json'
    shutil.copytree(teacher / own, tmp_path / own)
    if part == 'scheduler':
        fixed, file = unet.SCHEDULE, tmp_path / part / 'scheduler_config.json'
        file.parent.mkdir()
        unet.write_json(file, fixed)
        unet.load(tmp_path)
    needed = fixed[key]
    found = {bool: not needed, str: 'other', type(None): 2}.get(type(needed), 7)
    edit(file, **{key: [found] * 4 if key.endswith('block_types') else found})
    words = f'{part}/.* says {key} {json.dumps(found)}, but SD 1.5 needs {json.dumps(needed)};'
    for path in (tmp_path, tmp_path / own):
        with pytest.raises(UserError, match=words):
            MODULES[own].load(path)


def test_entries_of_equal_meaning_are_accepted(teacher, tmp_path):
    """Lists of equal numbers, null or nothing for a default, and a square."""
    folder = shutil.copytree(teacher, tmp_path / 'model-v1')
    config = folder / 'unet' / 'config.json'
    edit(config, attention_head_dim=[2, 2], layers_per_block=[1, 1], cross_attention_dim=[16, 16],
         only_cross_attention=[False, False], transformer_layers_per_block=[1, 1], dropout=0.0,
         mid_block_only_cross_attention=None, dual_cross_attention=..., sample_size=[32, 32])
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder='unet')
    t = torch.tensor([9, 800])
    assert_same_unet(unet.load(folder), theirs, t, 8, 8, context_dim=16, seed=1)
    assert unet.load(folder).sample_size == 32
    edit(config, sample_size=None, unknown_to_us=3, **dict.fromkeys(unet.FIXED, ...))
    assert unet.load(folder).sample_size == 64
    edit(folder / 'vae' / 'config.json', scaling_factor=..., latents_mean=..., act_fn=...)
    assert vae.load(folder).scale == 0.18215
    edit(folder / 'text_encoder' / 'config.json', **dict.fromkeys(clip_text.FIXED, ...))
    clip_text.load(folder)
    (folder / 'scheduler').mkdir()
    (folder / 'scheduler' / 'scheduler_config.json').write_text('{}')
    with pytest.raises(UserError, match='says beta_start 0.0001'):      # the default of diffusers
        unet.load(folder)


# -------------------------------------------------------------------------------------------------
# Files that are refused

def tensors_of(part, **changes):
    """A damage that replaces tensors in the weights of a part; ... removes one."""
    def damage(folder):
        file = folder / part / f'{STEM[part]}.safetensors'
        tensors = {**load_file(file), **changes}
        save_file({name: w for name, w in tensors.items() if w is not ...}, file)
    return damage


def config_of(part, **changes):
    return lambda folder: edit(folder / part / 'config.json', **changes)


def bytes_of(name, data):
    """A damage that writes a file of these bytes, or of so many of its own."""
    def damage(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[:data] if isinstance(data, int) else data)
    return damage


def renamed(name, new):
    return lambda folder: (folder / name).rename((folder / name).with_name(new))


UNET_FILE, VAE_FILE = (f'{part}/{STEM[part]}.safetensors' for part in ('unet', 'vae'))
SHARD = 'diffusion_pytorch_model-00001-of-00002.safetensors'
BIAS, ONE = 'conv_in.bias', torch.ones(1)

REFUSED = [                                                 # part, damage, words of the message
    ('unet', tensors_of('unet', **{'conv_in.weight': torch.ones(16, 9, 3, 3), BIAS: ..., 'x': ONE}),
     r'lacks .*conv_in.bias.* more, first x.* shape, first conv_in.weight .*9, 3, 3.*4, 3, 3'),
    ('unet', tensors_of('unet', **{BIAS: torch.ones(16, dtype=torch.int8)}), 'conv_in.bias.*int8'),
    ('unet', bytes_of(UNET_FILE, b'version https://git-lfs'), "begins with b'version https://git"),
    *(('unet', bytes_of(UNET_FILE, keep), 'not a whole .safetensors') for keep in (5, -1)),
    ('unet', renamed('unet/config.json', 'config'), 'must hold config.json .* found config, diff'),
    ('unet', renamed(UNET_FILE, SHARD), f'in one piece.* found config.json, {SHARD}'),
    ('vae', renamed(VAE_FILE, 'diffusion_pytorch_model.bin'), r'found config.json, diff.*\.bin'),
    ('unet', bytes_of('unet/config.json', b'{"a": '), 'unet/config.json is not JSON'),
    ('unet', config_of('unet', attention_head_dim=3), r'\[16, 32\].*attention_head_dim 3'),
    ('unet', config_of('unet', attention_head_dim=[2, 4]), r'attention_head_dim.*\[2, 4\]'),
    ('unet', config_of('unet', down_block_types=['DownBlock2D'] * 2), "down_block_types .*'DownB"),
    ('unet', config_of('unet', sample_size=[32, 64]), r'sample_size .*\[32, 64\]'),
    ('vae', config_of('vae', scaling_factor=0), 'scaling_factor .* 0'),
    ('text_encoder', config_of('text_encoder', num_attention_heads=3), 'num_attention_heads 3')]


@pytest.mark.parametrize('part, damage, words', REFUSED)
def test_a_damaged_folder_is_refused(part, damage, words, teacher, tmp_path):
    """By a UserError with one sentence that names the folder and what is wrong in it."""
    folder = shutil.copytree(teacher, tmp_path / 'model-v1')
    damage(folder)
    with pytest.raises(UserError, match=f'model-v1.*{words}') as error:
        MODULES[part].load(folder)
    assert '\n' not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize('part, name, w, words', [
    ('unet', 'output_blocks.5.0.in_layers.2.weight', ..., 'lacks 1, first {}'),
    ('vae', 'encoder.mid.attn_1.q.weight', torch.ones(96, 95, 1, 1), r'first {} \(96, 95'),
    ('unet', 'out.0.weight', torch.full((32,), torch.nan), 'NaN or infinity in {}')])
def test_a_damaged_single_file_is_refused(part, name, w, words, weights, tmp_path):
    """Under the name that the tensor has in the file."""
    name, file = PREFIX[part] + name, tmp_path / 'model-v1.safetensors'
    tensors = {**halves(original(weights)), name: w}
    save_file({key: v.contiguous() for key, v in tensors.items() if v is not ...}, file)
    with pytest.raises(UserError, match='model-v1.safetensors .*' + words.format(re.escape(name))):
        MODULES[part].load(file)


@pytest.mark.parametrize('where, name, value', [
    *(('tensors', name, schedule(beta_schedule='linear')[name])
      for name in ('betas', 'alphas_cumprod')),
    *(('tensors', name, torch.ones(1)) for name in ('v_pred', 'ztsnr', 'edm_vpred.sigma_max')),
    ('header', 'modelspec.prediction_type', 'v'), ('header', 'modelspec.predict_key', 'v'),
    ('header', 'modelspec.architecture', 'stable-diffusion-xl-v1-base'),
    ('header', 'modelspec.encoder_layer', '2'), ('header', 'rescale_betas_zero_snr', 'True'),
    ('yaml', 'parameterization', '"v"'), ('yaml', 'linear_end', '0.02')])
def test_a_single_file_that_was_trained_in_another_way_is_refused(where, name, value, tmp_path):
    """It says so in its tensors, in its header, or in a .yaml file of its name."""
    file = tmp_path / 'model-v1.safetensors'
    content = dict(tensors=schedule(), header=HEADER, yaml={})
    content[where] = {**content[where], name: value}
    save_file(content['tensors'], file, content['header'])
    lines = [f'    {key}: {said}  # a comment\n' for key, said in content['yaml'].items()]
    file.with_suffix('.yaml').write_text(YAML + ''.join(lines))
    with pytest.raises(UserError, match=f'model-v1.safetensors (says|holds) {name}.*; give a Stab'):
        unet.load(file)


# -------------------------------------------------------------------------------------------------
# Files for other programs

@pytest.fixture(scope='module')
def inverted(whole_folder, tmp_path_factory):
    """The folder after textual inversion of two tokens, as a pipeline of diffusers saves it."""
    folder = tmp_path_factory.mktemp('inverted') / 'teacher'
    pipe = StableDiffusionPipeline.from_pretrained(whole_folder)
    pipe.tokenizer.add_tokens(['<cat-toy>', '<Sks>'])
    torch.manual_seed(0)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    pipe.save_pretrained(folder)
    return folder


def generator(folder, teacher, tokenizer='', **sizes):
    """Write a generator folder as a run does, with other weights than its teacher's."""
    net = randomise(unet.UNet(**sizes), 9)
    net.sample_size = 8
    unet.save(net, folder / 'unet')
    unet.write_json(folder / 'generator.json', dict(
        t_init=450, size=64, images=2, teacher=str(teacher), tokenizer=str(tokenizer)))
    return folder


def sampled(out, *arguments):
    """Return the pixels of the image that `sample` makes."""
    sid_lsg.main(['sample', 'a red <sks> star', *map(str, arguments), '--seeds', '3',
                  '--device', 'cpu', '--out', str(out)])
    return np.asarray(Image.open(out / '000000.png')).astype(int)


def test_an_exported_folder_opens_in_diffusers(inverted, tmp_path):
    """It makes the same image there and here, keeps added tokens, and names the end token right."""
    source, out = generator(tmp_path / 'generator', inverted), tmp_path / 'new' / 'student'
    sid_lsg.main(['export', str(source), str(out), '--precision', 'fp32'])
    info = json.loads((out / 'generator.json').read_text())
    assert info == dict(t_init=450, size=64, images=2)              # and no path
    pipe = StableDiffusionPipeline.from_pretrained(out)
    config = pipe.text_encoder.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (598, 599, 599)
    assert torch.allclose(pipe.scheduler.alphas_cumprod, sid_lsg.ALPHA ** 2, rtol=1e-5)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    image = pipe('a red <sks> star', timesteps=[450], guidance_scale=1.0,
                 latents=sid_lsg.SIGMA[450] * z).images[0]
    ours = sampled(tmp_path / 'a', '--generator', source)
    assert ours.shape == (64, 64, 3) and ours.std() > 10
    assert abs(ours - np.asarray(image)).max() <= 1
    assert abs(sampled(tmp_path / 'b', '--generator', out) - ours).max() <= 1


def test_an_exported_file_opens_everywhere(whole_folder, weights, tmp_path, monkeypatch):
    """In diffusers, and here once more, with what `sample` must know in its header."""
    source, out = generator(tmp_path / 'generator', whole_folder), tmp_path / 'student.safetensors'
    sid_lsg.main(['export', str(source), str(out)])          # in fp16
    pipe = StableDiffusionPipeline.from_single_file(out, config=str(whole_folder),
                                                    local_files_only=True)
    expected = dict(weights, unet=unet.load(source).state_dict())
    for part in MODULES:
        prefix = 'text_model.' if part == 'text_encoder' else ''
        theirs = {prefix + key: w for key, w in getattr(pipe, part).state_dict().items()}
        assert_same_tensors(theirs, expected[part], half=True)
    with pytest.raises(UserError, match='student.safetensors .*no tokenizer; download openai'):
        clip_text.load_tokenizer(out)
    into_cache(whole_folder / 'tokenizer', tmp_path, 'openai--clip-vit-large-patch14')
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))       # SD 1.5 uses the tokenizer of this CLIP
    ours = sampled(tmp_path / 'a', '--generator', out)
    assert abs(sampled(tmp_path / 'b', '--generator', source) - ours).max() <= 1


def test_an_export_that_cannot_be_right_is_refused(whole_folder, inverted, tmp_path, capsys):
    """What fp16 cannot hold, parts that do not fit, and a name that is taken."""
    source, big = generator(tmp_path / 'a', whole_folder), generator(tmp_path / 'b', whole_folder)
    tensors_of('unet', **{BIAS: torch.full((32,), 7e4)})(big)
    narrow = generator(tmp_path / 'c', whole_folder, context_dim=40)
    other = generator(tmp_path / 'd', inverted, whole_folder / 'tokenizer')
    for path, teacher, target, words in (
            (big, whole_folder, 'new', 'conv_in.bias .*float16.* fp32'),
            (other, inverted, 'new', 'has 602 tokens, but its tokenizer has 600'),
            (narrow, whole_folder, 'new', '48 numbers per token, but the UNet needs 40'),
            (source, inverted, 'new.safetensors', "SD 1.5's size, not .*602.*folder instead"),
            (source, whole_folder, 'b', 'b exists already')):
        with pytest.raises(SystemExit):
            sid_lsg.main(['export', str(path), str(tmp_path / target), '--teacher', str(teacher),
                          '--precision', 'fp16'])
        assert re.search(words, capsys.readouterr().err)
        assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'b', 'c', 'd']
