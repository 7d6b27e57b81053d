"""Tests of the tokenizer against transformers' CLIPTokenizer, and of files of prompts.

The real vocabulary of 49,408 tokens is too big for a repository, so both have the 600 tokens of the
tiny teacher. What is compared is everything around them: normalisation, word splitting, bytes,
merges, added tokens, cutting, padding.
"""

import random
import re
import shutil

import pytest
from transformers import AddedToken, CLIPTokenizer

import clip_text
from conftest import ROOT
from unet import UserError, read_json, write_json

FOLDER = ROOT / 'tests' / 'tiny_sd' / 'tokenizer'


@pytest.fixture(scope='module')
def ours():
    return clip_text.load_tokenizer(FOLDER.parent)


@pytest.fixture(scope='module')
def theirs():
    return CLIPTokenizer.from_pretrained(FOLDER)


def assert_same(ours, theirs, texts):
    expected = theirs(texts, padding='max_length', max_length=77, truncation=True).input_ids
    wrong = [case for case in zip(texts, ours(texts).tolist(), expected) if case[1] != case[2]]
    shortest = min(wrong, key=lambda case: len(case[0]), default=None)
    assert not wrong, f'{len(wrong)} differ; text, our ids, their ids of the shortest: {shortest}'


CAPTIONS = [
    'A man riding a wave on top of a surfboard.',
    'A plate of food with broccoli, meat & potatoes on a white table ',
    "A cat's paw on the window sill; it's raining outside and they're sleeping",
    'An orange ring left of a blue star on a gray background',
    'A clock tower at 10:45, with "Big Ben" written below it (in London).',
]

PIECES = [
    # Scripts. NFC makes composed and decomposed accents the same; some marks compose with nothing.
    'cat', 'Window', 'UMBRELLA', 'café', 'cafe\u0301', 'MAN\u0303ANA', 'Ångström', 'A\u030a',
    '\u212b', '\u0301', 'x\u0301\u0327', 'naïve', 'GROßER', 'Straße', 'İstanbul', 'ſ', 'ﬁn', 'ｆｕｌｌ',
    'Сегодня', 'ГАТА', 'и\u0306', 'ΟΔΟΣ', 'γάτα', '猫', '一只猫坐在窗台上', 'ひらがな', 'か\u3099', '한국어',
    '\u1112\u1161\u11ab', 'हिन्दी', 'مرحبا', 'ไทย', '\U00020000',
    # Contractions, straight and curly, in both cases, and after something that is no letter.
    "should've", "it's", "I'LL", "DON'T", "we'd", "I'm", "'S", "'re", "''s", "!'m", 'it’s',
    "rock'n'roll", "'", '“quoted”', '‘', '…',
    # Digits, each a token of its own, and characters that resemble them.
    '1', '2024', '3d', '50%', '½', 'x²', 'Ⅷ', '٣', '①',
    # Emoji with skin tone, joiners and flags.
    '👍', '👍🏽', '👨\u200d👩\u200d👧', '🇫🇷', '🐱🐱',
    # Punctuation; markup and entities, which are not interpreted.
    '?!', '...', '--', '_', '(', ')', '$5.99', '#tag', '@user', 'a/b', '<b>', 'x</w>', '&#39;',
    # The two special tokens spelled out, whole and in part.
    '<|ENDOFTEXT|>?! ', "<|StartOfText|>'S",
    '<|endoftext|>', '<|startoftext|>', '<|', '|>', 'endoftext', '<|endoftext', 'startoftext|>',
    # Spaces of every kind, and invisible characters that are none.
    ' ', '   ', '\n', '\t', '\r\n', '\u00a0', '\u3000', '\u2028', '\x1c', '\x85', '\u200b',
    '\ufeff', '\u00ad', '\x00', '\ufffd',
]


def test_captions_nasty_strings_and_long_prompts(ours, theirs):
    """Each piece alone, between two words and joined to them; and the empty prompt.

    75 tokens of text fit, and the last place has the end token however long the prompt is."""
    long = [' '.join('1' * count) for count in (74, 75, 76, 200)]
    assert_same(ours, theirs, [
        '', *CAPTIONS, *PIECES, *(f'a {p} star' for p in PIECES), *(f'red{p}ring' for p in PIECES),
        *long, *(f'{text} {CAPTIONS[0]}' for text in long), *(CAPTIONS[0] + text for text in long),
        *(f'{text}<|endoftext|>' for text in long)])


def test_pieces_in_random_order(ours, theirs):
    """Pieces that meet in ways nobody thought of; some of the strings exceed 77 tokens."""
    rng = random.Random(0)
    assert_same(ours, theirs, [''.join(rng.choice(PIECES) + rng.choice(['', '', ' '])
                                       for _ in range(rng.randint(2, 15))) for _ in range(2000)])


def test_cut_is_what_does_not_fit(ours):
    """cut() returns '' if nothing is cut off, and otherwise the end of the text as written."""
    fits = ' '.join('1' for _ in range(75))
    assert ours.cut('') == ours.cut(CAPTIONS[0]) == ours.cut(fits) == ''
    for end in ('a red bus', "It's a  DON'T, café", '<|endoftext|>'):
        assert ours.cut(f'{fits} {end}') == end


# -------------------------------------------------------------------------------------------------
# Files

def with_added_tokens(target, layout):
    """Write a tokenizer folder with added tokens, as textual inversion does; return their number.

    layout: 'tokenizer.json', which transformers 5 writes, 'tokenizer_config.json', which
    transformers 4 wrote, or 'added_tokens.json', which it wrote before 4.34."""
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER)
    tokens = ['<cat-toy>', '<Big  Cat>']
    if layout != 'added_tokens.json':           # which has no settings of tokens
        tokens += [AddedToken('wow', single_word=True), AddedToken('<S>', special=True)]
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(target)
    added = read_json(target / 'tokenizer.json')['added_tokens']
    content = {token['content']: token['id'] for token in added[2:]}
    if layout == 'tokenizer_config.json':       # with the start and end tokens, as it was
        content = {'added_tokens_decoder': {token.pop('id'): token for token in added}}
    if layout != 'tokenizer.json':
        shutil.rmtree(target)
        shutil.copytree(FOLDER, target)
        write_json(target / layout, content)
    return len(tokens)


@pytest.mark.parametrize('layout', ['tokenizer.json', 'tokenizer_config.json', 'added_tokens.json'])
def test_added_tokens(tmp_path, layout):
    """Their ids follow the vocabulary, and prompts use them as in transformers."""
    count = with_added_tokens(tmp_path / 'tokenizer', layout)
    ours = clip_text.load_tokenizer(tmp_path)
    assert ours.size == len(ours.vocab) + count == ours.end + 1 + count
    assert ours(['a <cat-toy>.'])[0, 2] == ours.end + 1
    theirs = CLIPTokenizer.from_pretrained(tmp_path / 'tokenizer')
    assert_same(ours, theirs, [
        'a <cat-toy> dog', 'a<CAT-toy>dog', '<big \n Cat>.', '<big cat>', 'Wow', 'wowed', '<S><s>',
        '<cat-toy', '1 '.join(['<cat-toy>'] * 60), *CAPTIONS, *PIECES, ''.join(PIECES)])


def spoil(file, old, new):
    text = file.read_text(encoding='utf-8')
    assert old in text
    file.write_text(text.replace(old, new), encoding='utf-8')


@pytest.mark.parametrize('layout, damage, word', [
    ('', lambda f: (f / 'vocab.json').unlink(), 'merges.txt'),
    ('', lambda f: spoil(f / 'vocab.json', ',', ''), 'vocab.json is not JSON'),
    ('', lambda f: spoil(f / 'vocab.json', '<|end', '<|END'), 'endoftext'),
    ('tokenizer.json', lambda f: spoil(f / 'tokenizer.json', '"merges"', '"scores"'), 'merges'),
    ('added_tokens.json', lambda f: spoil(f / 'added_tokens.json', '600', '9999'), '9999')])
def test_a_folder_without_a_whole_tokenizer_is_refused(tmp_path, layout, damage, word):
    folder = shutil.copytree(FOLDER, tmp_path / 'model')
    if layout:
        with_added_tokens(folder, layout)
    damage(folder)
    with pytest.raises(UserError, match=f'(?s)model .*{re.escape(word)}'):
        clip_text.load_tokenizer(folder)


@pytest.mark.parametrize('data', [
    'a red star\nzwei Füße'.encode('utf-8-sig'), '\na red star \r\n \r\nzwei Füße\r\n'.encode()])
def test_prompts_are_the_lines_of_a_file(data, tmp_path):
    (tmp_path / 'prompts.txt').write_bytes(data)
    assert clip_text.read_prompts(tmp_path / 'prompts.txt') == ['a red star', 'zwei Füße']


@pytest.mark.parametrize('data, word', [
    (b' \n\n', 'no prompts'), (b'caf\xe9\n', 'UTF-8'), (None, 'No such file'),
    ('a red star\n'.encode('utf-16-le'), 'binary'), (b'[{"caption": "a red star"}]', 'JSON')])
def test_a_file_that_holds_no_prompts_is_refused(data, word, tmp_path):
    if data is not None:
        (tmp_path / 'prompts.txt').write_bytes(data)
    with pytest.raises(UserError, match=f'prompts.txt .*{word}'):
        clip_text.read_prompts(tmp_path / 'prompts.txt')
