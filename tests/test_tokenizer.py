"""The tokenizer against transformers' CLIPTokenizer, both on the same vocab.json and merges.txt.

The real vocabulary of 49,408 entries is too big to commit, so a small one of the same format is learned here
from a few sentences. What is compared is everything around it: normalisation, word splitting, bytes, merges,
cutting, padding.
"""

import json
import random
import re
from collections import Counter

import pytest
import torch
from transformers import CLIPTokenizer

import clip_text

TEXT = """
    a man riding a wave on top of a surfboard . a plate of food with broccoli and meat on a white table
    two dogs playing with a frisbee in the green grass while people are watching them from the street
    a woman holding an umbrella standing next to the red bus that is parked on the side of the road
    a cat sitting on the window sill looking at birds outside ; it's raining , they're sleeping
    the end of the text starts here , should've could've i'll you'll don't can't that's !! ... ?! 1 2 0 9
    le café est très bon à noël , l'été déjà passé . el niño comió una piña mañana
    über die straße fährt ein großer bär . сегодня хорошая погода , собака бежит по улице
    η γάτα κοιμάται στο παράθυρο . 一只猫坐在窗台上 猫が窓辺に座っています 👍 🐱 🐱 👍 🏽
    “a quoted word” it’s a dog’s life – “quoted” … & ; &amp; &quot; < | > / </w>
"""


def byte_characters():
    """CLIP's printable stand-ins for the 256 bytes, in its order: simple_tokenizer.py, bytes_to_unicode."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def learn(text, count):
    """Byte-pair encoding of the words of `text`: vocabulary and `count` merges, as CLIP's files hold them."""
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
    tokens = [*characters.values(), *(c + '</w>' for c in characters.values()), *(a + b for a, b in merges),
              '<|startoftext|>', '<|endoftext|>']
    assert len(set(tokens)) == len(tokens)
    return {token: i for i, token in enumerate(tokens)}, merges


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A checkpoint folder with the learned vocabulary in tokenizer/."""
    path = tmp_path_factory.mktemp('checkpoint') / 'tokenizer'
    path.mkdir()
    vocab, merges = learn(TEXT, 250)                # some 390 would make every word of it one token
    (path / 'vocab.json').write_text(json.dumps(vocab, ensure_ascii=False), encoding='utf-8')
    lines = ['#version: 0.2', *(' '.join(pair) for pair in merges)]
    (path / 'merges.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path.parent


@pytest.fixture(scope='module')
def ours(folder):
    return clip_text.load_tokenizer(folder)


@pytest.fixture(scope='module')
def theirs(folder):
    return CLIPTokenizer.from_pretrained(folder / 'tokenizer')


def assert_same(ours, theirs, texts):
    expected = theirs(texts, padding='max_length', max_length=77, truncation=True).input_ids
    found = ours(texts).tolist()
    wrong = [case for case in zip(texts, found, expected) if case[1] != case[2]]
    shortest = min(wrong, key=lambda case: len(case[0]), default=None)
    assert not wrong, f'{len(wrong)} of {len(texts)} differ; text, ours, theirs of the shortest: {shortest}'


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
    # scripts; the same accent composed and decomposed (NFC makes them one); marks that compose with nothing
    'cat', 'Window', 'UMBRELLA', 'café', 'cafe\u0301', 'MAN\u0303ANA', 'Ångström', 'A\u030a', '\u212b',
    '\u0301', 'x\u0301\u0327', 'naïve', 'GROßER', 'Straße', 'İstanbul', 'ſ', 'ﬁn', 'ｆｕｌｌ', 'Сегодня', 'ГАТА',
    'и\u0306', 'ΟΔΟΣ', 'γάτα', '猫', '一只猫坐在窗台上', 'ひらがな', 'か\u3099', '한국어', '\u1112\u1161\u11ab', 'हिन्दी',
    'مرحبا', 'ไทย', '\U00020000',
    # contractions, straight and curly, in both cases, and after what is no letter
    "should've", "it's", "I'LL", "DON'T", "we'd", "I'm", "'S", "'re", "''s", "!'m", 'it’s', "rock'n'roll",
    "'", '“quoted”', '‘', '…',
    # digits, each a token of its own, and what resembles them
    '1', '2024', '3d', '50%', '½', 'x²', 'Ⅷ', '٣', '①',
    # emoji, with skin tone, joiners and flags
    '👍', '👍🏽', '👨\u200d👩\u200d👧', '🇫🇷', '🐱🐱',
    # runs of signs; markup and entities, which stay spelled out
    '!!!', '?!', '...', '--', '_', '(', ')', '$5.99', '#tag', '@user', 'a/b', '<b>', '</w>', 'x</w>', '&amp;',
    '&quot;', '&#39;',
    # the two special tokens spelled out, whole and in part
    '<|ENDOFTEXT|>?! ', "<|StartOfText|>'S",
    '<|endoftext|>', '<|startoftext|>', '<|', '|>', 'endoftext', '<|endoftext', 'startoftext|>',
    # spaces of every kind, and invisible characters that are none
    ' ', '   ', '\n', '\t', '\r\n', '\u00a0', '\u3000', '\u2028', '\x1c', '\x85', '\u200b', '\ufeff',
    '\u00ad', '\x00', '\ufffd',
]


def test_captions(ours, theirs):
    """What training and evaluation feed in: plain English captions."""
    assert_same(ours, theirs, CAPTIONS + [text.strip() for text in TEXT.split('\n')])


def test_nasty_strings(ours, theirs):
    """Each piece alone, between two words and glued to them; and the empty prompt, the unconditional one."""
    assert_same(ours, theirs, ['', *PIECES, *(f'a {p} dog' for p in PIECES), *(f'a{p}dog' for p in PIECES)])


def test_pieces_in_random_order(ours, theirs):
    """Pieces that meet in ways nobody thought of; some of the strings exceed 77 tokens."""
    rng = random.Random(0)
    assert_same(ours, theirs, [''.join(rng.choice(PIECES) + rng.choice(['', '', ' '])
                                       for _ in range(rng.randint(2, 15))) for _ in range(2000)])


@pytest.mark.parametrize('count', [74, 75, 76, 200])
def test_long_prompts_keep_the_end_token(ours, theirs, count):
    """75 tokens of text fit; position 76 holds the end token however long the prompt is."""
    text = ' '.join('1' for _ in range(count))
    assert_same(ours, theirs, [text, text + ' ' + CAPTIONS[0], CAPTIONS[0] + text, text + '<|endoftext|>'])
    ids = ours([text])[0]
    assert ids[76] == ours.end and (ids[1:76] != ours.end).sum() == min(count, 75)


def test_layout(ours, folder):
    """(B, 77) int64: start, text, end tokens to the last; a row does not depend on its neighbours."""
    vocab = json.loads((folder / 'tokenizer' / 'vocab.json').read_text(encoding='utf-8'))
    assert (ours.start, ours.end) == (len(vocab) - 2, len(vocab) - 1)
    ids = ours(['', 'a 7', *CAPTIONS])
    assert ids.shape == (2 + len(CAPTIONS), 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == [ours.start] + [ours.end] * 76
    assert ids[1].tolist() == [ours.start, vocab['a</w>'], vocab['7</w>']] + [ours.end] * 74
    assert torch.equal(ids, torch.cat([ours([text]) for text in ['', 'a 7', *CAPTIONS]]))
    assert ours([]).shape == (0, 77)


def test_lost_is_what_does_not_fit(ours):
    """lost() is '' as long as nothing is cut off, and then the end of the text."""
    fits = ' '.join('1' for _ in range(75))
    for text in ('', CAPTIONS[0], fits):
        assert ours.lost(text) == ''
    assert ours.lost(fits + ' a red bus') == 'a red bus'
    assert ours.lost(fits + " It's a  DON'T, café") == "It's a  DON'T, café"       # as written, not as tokenised
    assert ours.lost(fits + '<|endoftext|>') == '<|endoftext|>'
    assert torch.equal(ours([fits + ' a red bus']), ours([fits]))


def test_load_tokenizer_names_the_missing_file(folder, tmp_path):
    """The folder around tokenizer/ and tokenizer/ itself both load; the error names a missing file."""
    inner, outer = clip_text.load_tokenizer(folder / 'tokenizer'), clip_text.load_tokenizer(folder)
    assert torch.equal(inner(CAPTIONS), outer(CAPTIONS))
    with pytest.raises(FileNotFoundError, match='vocab.json'):
        clip_text.load_tokenizer(tmp_path)
    (tmp_path / 'vocab.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='merges.txt'):
        clip_text.load_tokenizer(tmp_path)
