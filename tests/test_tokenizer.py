"""Tests of the tokenizer against transformers' CLIPTokenizer, and of files of prompts.

The real vocabulary of 49,408 tokens is too big for a repository, so a small one of the same format
is learned here from a few sentences. What is compared is everything around it: normalisation, word
splitting, bytes, merges, added tokens, cutting, padding.
"""

import json
import random
import re
import shutil
from collections import Counter

import pytest
import torch
from transformers import AddedToken, CLIPTokenizer

import clip_text
from unet import UserError

TEXT = """
    a man riding a wave on top of a surfboard . a plate of food with broccoli on a white table
    two dogs playing with a frisbee in the green grass while people are watching from the street
    a woman holding an umbrella standing next to the red bus that is parked on the side of the road
    a cat sitting on the window sill looking at birds outside ; it's raining , they're sleeping
    the end of the text starts here , should've could've i'll you'll don't can't that's
    !! ... ?! 1 2 0 9
    le café est très bon à noël , l'été déjà passé . el niño comió una piña mañana
    über die straße fährt ein großer bär . сегодня хорошая погода , собака бежит по улице
    η γάτα κοιμάται στο παράθυρο . 一只猫坐在窗台上 猫が窓辺に座っています 👍 🐱 🐱 👍 🏽
    “a quoted word” it’s a dog’s life – “quoted” … & ; &amp; &quot; < | > / </w>
"""


def byte_characters():
    """Return CLIP's characters for the 256 bytes, in the order of its bytes_to_unicode()."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def learn(text, count):
    """Return the vocabulary and `count` merges of byte-pair encoding on the words of `text`."""
    characters = byte_characters()
    words = Counter()
    for word in re.findall(r'\w+|[^\w\s]+', text):
        *first, last = [characters[b] for b in word.encode()]
        words[(*first, last + '</w>')] += 1
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            parts, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                parts.append(''.join(word[i:i + step]))
                i += step
            merged[tuple(parts)] += n
        words = merged
    tokens = [*characters.values(), *(c + '</w>' for c in characters.values()),
              *(a + b for a, b in merges), '<|startoftext|>', '<|endoftext|>']
    assert len(set(tokens)) == len(tokens)
    return {token: i for i, token in enumerate(tokens)}, merges


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tokenizer folder with the learned vocabulary, as SD 1.5 has it."""
    path = tmp_path_factory.mktemp('checkpoint') / 'tokenizer'
    path.mkdir()
    vocab, merges = learn(TEXT, 250)                # about 390 would make every word one token
    (path / 'vocab.json').write_text(json.dumps(vocab, ensure_ascii=False), encoding='utf-8')
    lines = ['#version: 0.2', *(' '.join(pair) for pair in merges)]
    (path / 'merges.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def ours(folder):
    return clip_text.load_tokenizer(folder.parent)


@pytest.fixture(scope='module')
def theirs(folder):
    return CLIPTokenizer.from_pretrained(folder)


def assert_same(ours, theirs, texts):
    expected = theirs(texts, padding='max_length', max_length=77, truncation=True).input_ids
    wrong = [case for case in zip(texts, ours(texts).tolist(), expected) if case[1] != case[2]]
    shortest = min(wrong, key=lambda case: len(case[0]), default=None)
    assert not wrong, f'{len(wrong)} differ; text, our ids, their ids of the shortest: {shortest}'


CAPTIONS = [
    'A man riding a wave on top of a surfboard.',
    'Two dogs playing with a frisbee in the grass, while people are watching.',
    'A plate of food with broccoli, meat & potatoes on a white table ',
    'A woman holding an umbrella standing next to a red double-decker bus.',
    "A cat's paw on the window sill; it's raining outside and they're sleeping",
    'a large purple cross on a navy background',
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
    '!!!', '?!', '...', '--', '_', '(', ')', '$5.99', '#tag', '@user', 'a/b', '<b>', '</w>',
    'x</w>', '&amp;', '&quot;', '&#39;',
    # The two special tokens spelled out, whole and in part.
    '<|ENDOFTEXT|>?! ', "<|StartOfText|>'S",
    '<|endoftext|>', '<|startoftext|>', '<|', '|>', 'endoftext', '<|endoftext', 'startoftext|>',
    # Spaces of every kind, and invisible characters that are none.
    ' ', '   ', '\n', '\t', '\r\n', '\u00a0', '\u3000', '\u2028', '\x1c', '\x85', '\u200b',
    '\ufeff', '\u00ad', '\x00', '\ufffd',
]


def test_captions(ours, theirs):
    assert_same(ours, theirs, CAPTIONS + [text.strip() for text in TEXT.split('\n')])


def test_nasty_strings(ours, theirs):
    """Each piece alone, between two words and joined to them; and the empty prompt."""
    assert_same(ours, theirs, ['', *PIECES, *(f'a {p} dog' for p in PIECES),
                               *(f'a{p}dog' for p in PIECES)])


def test_pieces_in_random_order(ours, theirs):
    """Pieces that meet in ways nobody thought of; some of the strings exceed 77 tokens."""
    rng = random.Random(0)
    assert_same(ours, theirs, [''.join(rng.choice(PIECES) + rng.choice(['', '', ' '])
                                       for _ in range(rng.randint(2, 15))) for _ in range(2000)])


@pytest.mark.parametrize('count', [74, 75, 76, 200])
def test_long_prompts_keep_the_end_token(ours, theirs, count):
    """75 tokens of text fit, and the last place has the end token however long the prompt is."""
    text = ' '.join('1' for _ in range(count))
    assert_same(ours, theirs, [text, text + ' ' + CAPTIONS[0], CAPTIONS[0] + text,
                               text + '<|endoftext|>'])
    ids = ours([text])[0]
    assert ids[76] == ours.end and (ids[1:76] != ours.end).sum() == min(count, 75)


def test_layout_of_the_ids(ours):
    """(B, 77) int64: start, text, end tokens to the last. Rows do not depend on one another."""
    assert (ours.start, ours.end) == (len(ours.vocab) - 2, len(ours.vocab) - 1)
    ids = ours(['', 'a 7', *CAPTIONS])
    assert ids.shape == (2 + len(CAPTIONS), 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == [ours.start] + [ours.end] * 76
    words = [ours.vocab['a</w>'], ours.vocab['7</w>']]
    assert ids[1].tolist() == [ours.start, *words] + [ours.end] * 74
    assert torch.equal(ids, torch.cat([ours([text]) for text in ['', 'a 7', *CAPTIONS]]))
    assert ours([]).shape == (0, 77)


def test_cut_is_what_does_not_fit(ours):
    """cut() returns '' if nothing is cut off, and otherwise the end of the text as written."""
    fits = ' '.join('1' for _ in range(75))
    for text in ('', CAPTIONS[0], fits):
        assert ours.cut(text) == ''
    for end in ('a red bus', "It's a  DON'T, café", '<|endoftext|>'):
        assert ours.cut(f'{fits} {end}') == end
    assert torch.equal(ours([fits + ' a red bus']), ours([fits]))


# -------------------------------------------------------------------------------------------------
# Files of tokenizers

def with_added_tokens(source, target, layout):
    """Add tokens to the tokenizer in a folder, as textual inversion does, and save it to another.

    layout: 'tokenizer.json', which transformers 5 writes, 'tokenizer_config.json', which
    transformers 4 wrote, or 'added_tokens.json', which it wrote before 4.34. Return the tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(source)
    tokens = ['<cat-toy>', '<Big  Cat>']
    if layout != 'added_tokens.json':           # which has no settings of tokens
        tokens += [AddedToken('wow', single_word=True), AddedToken('<S>', special=True)]
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(target)
    added = json.loads((target / 'tokenizer.json').read_text(encoding='utf-8'))['added_tokens']
    if layout != 'tokenizer.json':
        shutil.rmtree(target)
        shutil.copytree(source, target)
    if layout == 'tokenizer_config.json':       # with the start and end tokens, as it was
        content = {'added_tokens_decoder': {token.pop('id'): token for token in added}}
        (target / layout).write_text(json.dumps(content), encoding='utf-8')
    if layout == 'added_tokens.json':
        content = {token['content']: token['id'] for token in added[2:]}
        (target / layout).write_text(json.dumps(content), encoding='utf-8')
    return [str(token) for token in tokens]


LAYOUTS = ['tokenizer.json', 'tokenizer_config.json', 'added_tokens.json']


@pytest.mark.parametrize('layout', LAYOUTS)
def test_added_tokens(folder, tmp_path, layout):
    """Their ids follow the vocabulary, and prompts use them as in transformers."""
    count = len(with_added_tokens(folder, tmp_path / 'tokenizer', layout))
    ours = clip_text.load_tokenizer(tmp_path)
    assert ours.size == len(ours.vocab) + count == ours.end + 1 + count
    assert ours(['a <cat-toy>.'])[0, 2] == ours.end + 1
    theirs = CLIPTokenizer.from_pretrained(tmp_path / 'tokenizer')
    assert_same(ours, theirs, [
        'a <cat-toy> dog', 'a<CAT-toy>dog', '<big \n Cat>.', '<big cat>', 'Wow', 'wowed', '<S><s>',
        '<cat-toy', '1 '.join(['<cat-toy>'] * 60), *CAPTIONS, *PIECES, ''.join(PIECES)])


def test_the_files_of_transformers_5_give_the_same_ids(folder, theirs, ours, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / 'merges.txt').exists()
    found = clip_text.load_tokenizer(tmp_path)
    assert torch.equal(found(CAPTIONS + PIECES), ours(CAPTIONS + PIECES)) and not found.added
    assert torch.equal(clip_text.load_tokenizer(folder)(CAPTIONS), ours(CAPTIONS))


def spoil(file, old, new):
    text = file.read_text(encoding='utf-8')
    assert old in text
    file.write_text(text.replace(old, new), encoding='utf-8')


@pytest.mark.parametrize('layout, damage, word', [
    ('vocab.json', lambda f: (f / 'vocab.json').unlink(), 'merges.txt'),
    ('vocab.json', lambda f: (f / 'merges.txt').unlink(), 'found vocab.json'),
    ('vocab.json', lambda f: (f / 'merges.txt').write_bytes(b'caf\xe9'), 'UnicodeDecodeError'),
    ('vocab.json', lambda f: spoil(f / 'vocab.json', ',', ''), 'vocab.json is not JSON'),
    ('vocab.json', lambda f: spoil(f / 'vocab.json', '<|end', '<|END'), 'endoftext'),
    ('vocab.json', lambda f: spoil(f / 'merges.txt', 't h', 't Z9'), 'Token'),
    ('tokenizer.json', lambda f: spoil(f / 'tokenizer.json', '"merges"', '"scores"'), 'merges'),
    ('tokenizer.json', lambda f: spoil(f / 'tokenizer.json', '"added_tokens"', '"x"'), 'added'),
    ('added_tokens.json', lambda f: (f / 'added_tokens.json').write_text('{"<a>": 9999}'), '9999')])
def test_a_folder_without_a_whole_tokenizer_is_refused(folder, tmp_path, layout, damage, word):
    target = shutil.copytree(folder, tmp_path / 'model')
    if layout != 'vocab.json':
        with_added_tokens(folder, target, layout)
    damage(target)
    with pytest.raises(UserError, match=f'(?s)model .*{re.escape(word)}'):
        clip_text.load_tokenizer(target)


# -------------------------------------------------------------------------------------------------
# Files of prompts

@pytest.mark.parametrize('data', [
    'a red star\nzwei Füße\n'.encode(), 'a red star\nzwei Füße'.encode('utf-8-sig'),
    '\r\na red star \r\n \r\nzwei Füße\r\n'.encode()])
def test_prompts_are_the_lines_of_a_file(data, tmp_path):
    (tmp_path / 'prompts.txt').write_bytes(data)
    assert clip_text.read_prompts(tmp_path / 'prompts.txt') == ['a red star', 'zwei Füße']


@pytest.mark.parametrize('data, word', [
    (b'', 'no prompts'), (b' \n\n', 'no prompts'), (b'caf\xe9\n', 'UTF-8'), (None, 'No such file'),
    ('a red star\n'.encode('utf-16'), 'UTF-8'), ('a red star\n'.encode('utf-16-le'), 'binary'),
    (b'[{"caption": "a red star"}]', 'JSON'), (b'\n {"a": 1}', 'JSON'), (b'a\0b\n', 'binary')])
def test_a_file_that_holds_no_prompts_is_refused(data, word, tmp_path):
    if data is not None:
        (tmp_path / 'prompts.txt').write_bytes(data)
    with pytest.raises(UserError, match=f'prompts.txt .*{word}'):
        clip_text.read_prompts(tmp_path / 'prompts.txt')
