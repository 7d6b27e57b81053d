"""Compare clip_score.py with open_clip and torchvision; test_fid.py describes the reference."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clip_score
import clip_text
import fid
from conftest import ROOT, assert_close
from test_fid import REFERENCE, make_image, names, random_state
from unet import UserError

TOKENIZER = ROOT / 'tests' / 'tiny_sd' / 'tokenizer'
WORDS = len(json.loads((TOKENIZER / 'vocab.json').read_text()))
CAPTIONS = [
    'a red star above a blue ring on a black background', 'Two GREEN squares', 'a blue ring']
FULL = clip_score.CLIP


def tiny_clip():
    """Return towers of the sizes that made the reference; 209 is int(48 * 4.3637)."""
    return FULL(vision=(48, 3, 209, 14, 2, 24), text=(32, 2, 128), vocab=WORDS)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_score, 'CLIP', tiny_clip)
    save_file(random_state(tiny_clip()), tmp_path / 'clip.safetensors')
    return tmp_path / 'clip.safetensors'


def test_names_shapes_and_eps_are_those_of_open_clip():
    """Random weights do not show eps, because the inputs of the norms are of order 1."""
    with torch.device('meta'):
        clip = FULL()
    assert names(clip) == sorted(REFERENCE['clip_names']) and len(names(clip)) == 782
    assert {m.eps for m in clip.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_towers_equal_open_clip(weights):
    clip = clip_score.load_clip(weights)
    assert_close(clip.visual(torch.from_numpy(REFERENCE['clip_inputs'])), REFERENCE['clip_seen'])
    assert_close(clip.text(torch.from_numpy(REFERENCE['clip_tokens'])), REFERENCE['clip_read'])


def test_input_takes_the_path_of_the_paper():
    """Test crop, Lanczos, the darkened levels, bicubic, scale and the beginning of the prompt."""
    for i, theirs in enumerate(REFERENCE['clip_inputs']):
        image = fid.shrink(make_image(10 + i, 300, 213))
        assert np.abs(clip_score.to_clip(image, 28)[0].numpy() - theirs).max() < 1e-6
    tokens = clip_score.clip_tokens(clip_text.load_tokenizer(TOKENIZER), CAPTIONS)
    assert tokens.tolist() == REFERENCE['clip_tokens'].tolist()


def test_score_on_the_command_line(weights, tmp_path, capsys):
    (tmp_path / 'fake').mkdir()
    (tmp_path / 'captions.txt').write_text('\n'.join(CAPTIONS))
    arguments = [weights, tmp_path / 'fake', tmp_path / 'captions.txt', '--tokenizer', TOKENIZER]
    for i in range(3):      # 8, 9, 10: in natural order
        with pytest.raises(UserError, match=f'{i} images need one caption each, not 3'):
            clip_score.main([*map(str, arguments)])
        Image.fromarray(make_image(10 + i, 300, 213)).save(tmp_path / 'fake' / f'{8 + i}.png')
    clip_score.main([*map(str, arguments), '--batch', '2'])
    out, err = capsys.readouterr()
    assert float(out) == pytest.approx(float(REFERENCE['clip_score']), abs=2e-6)
    assert 'NOT THE PUBLISHED FILE' in err


def test_any_other_clip_is_refused(weights, monkeypatch):
    whole = load_file(weights)
    short = {name: w for name, w in whole.items() if name != 'ln_final.bias'}
    for state, message in ((whole | {'more': torch.zeros(2)}, r'more is \(2,\) instead of none'),
                           (short, r'ln_final.bias is none instead of \(32,\)')):
        save_file(state, weights)
        with pytest.raises(UserError, match=message):
            clip_score.load_clip(weights)
    monkeypatch.setattr(clip_score, 'CLIP', FULL)
    with pytest.raises(UserError, match=r'embedding is \(77, 32\) instead of \(77, 1024\)'):
        clip_score.load_clip(weights)
