"""The commands of both READMEs parse, the files they name exist, and the first ones run."""

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clip_text
import sid_lsg
import unet
import vae

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
NOTEBOOK = (ROOT / 'tests' / 'README.md').read_text(encoding='utf-8')


def find_commands(text):
    """Return the commands in fenced blocks."""
    blocks = re.findall(r'^```.*?\n(.*?)^```', text, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r'(\S*/)?(python3?|torchrun) ', line)]


def words_of(line):
    """Return script and arguments of a command; '...' is for options given elsewhere."""
    words = [word for word in shlex.split(line, comments=True) if word != '...']
    first = next(i for i, word in enumerate(words) if word.endswith('.py'))
    return words[first], words[first + 1:]


COMMANDS = find_commands(README)
SCRIPTS = [line for line in COMMANDS + find_commands(NOTEBOOK) if '-m venv' not in line]


@pytest.mark.parametrize('line', SCRIPTS)
def test_a_command_parses(line, monkeypatch):
    """The script's own parser accepts the arguments; nothing runs."""
    class Parsed(Exception):
        pass
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None, namespace=None):
        parse_args(parser, arguments, namespace)
        raise Parsed
    script, arguments = words_of(line)
    if 'torchrun' in line:
        from torch.distributed.run import get_args_parser
        words = shlex.split(line, comments=True)
        assert get_args_parser().parse_args(words[1:words.index(script) + 1])
    assert (ROOT / script).is_file()
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    module = importlib.import_module(Path(script).stem)
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)
    with pytest.raises(Parsed):
        module.main(arguments)


def test_the_first_two_commands_install_what_they_run():
    train, test = [line for line in COMMANDS if '-m venv' in line]
    install = 'python3 -m venv .venv && .venv/bin/pip install -r requirements.txt'
    assert train == f'{install} && .venv/bin/python sid_lsg.py train'
    assert test == (f'{install} -r tests/requirements.txt && '
                    '.venv/bin/python -m pytest -q -n 2 --dist loadfile tests')


def test_the_default_commands_run(tmp_path):
    """Train without an argument but for its length, then sample as the README does."""
    samples = [line for line in SCRIPTS if re.search(r'sample --seeds .*"[^"]*"', line)]
    assert len(samples) == 3
    for line in ['x sid_lsg.py train --kimg 0.016', *samples]:
        _, arguments = words_of(line)
        subprocess.run([sys.executable, str(ROOT / 'sid_lsg.py'), *arguments], cwd=tmp_path,
                       check=True, timeout=120)
    assert (tmp_path / 'runs' / '000' / 'generator' / 'unet').is_dir()
    for number in range(len(samples)):
        assert len([*(tmp_path / 'samples' / f'{number:03d}').glob('0*.png')]) == 8


def test_options_in_the_text_exist():
    """Every `--option` that the prose names is an option of some script."""
    options = set(re.findall(r'`[^`\n]*?(--[a-z][a-z-]+)', README))
    texts = [file.read_text(encoding='utf-8')
             for file in (*ROOT.glob('*.py'), *(ROOT / 'tests').glob('*.py'))]
    settings = {'--' + name.replace('_', '-') for config in (
        sid_lsg.TrainConfig, sid_lsg.SampleConfig, sid_lsg.ExportConfig)
        for name in config.__dataclass_fields__}
    missing = [option for option in options - settings - {'--index-url'}       # which is pip's
               if not any(f"'{option}'" in text for text in texts)]
    assert not missing


@pytest.mark.parametrize('steps', [1, 4])
def test_the_code_for_diffusers_samples_what_we_sample(steps, tmp_path, monkeypatch):
    """With the tiny teacher as generator, and as the README says for four steps."""
    generator, tiny = tmp_path / 'runs' / '000' / 'generator', tmp_path / 'tiny'
    shutil.copytree(ROOT / 'tests' / 'tiny_sd', tiny)
    for module, part in ((unet, 'unet'), (vae, 'vae'), (clip_text, 'text_encoder')):
        module.save(module.load(tiny), tiny / part)         # in fp32, as diffusers takes the file's
    unet.save(unet.load(tiny), generator / 'unet')
    unet.write_json(generator / 'generator.json', {
        'teacher': str(tiny), 't_init': 625, 'steps': steps})
    code, = re.findall(r'^```python\n(.*?)^```', README, re.M | re.S)
    code = code.replace('4, 64, 64', '4, 8, 8')
    if steps == 4:
        timesteps, = re.findall(r'`(timesteps=\[625, .*?\])`', README)
        code = code.replace('timesteps=[625]', timesteps)
    monkeypatch.chdir(tmp_path)
    sid_lsg.main(['export', 'runs/000', 'student'])
    exec(code, {})
    sid_lsg.main(['sample', 'a red star', '--out', 'ours'])
    ours, theirs = (np.asarray(Image.open(file)).astype(int)
                    for file in ('ours/000000.png', 'star.png'))
    assert ours.std() > 10 and abs(ours - theirs).max() <= 1


def test_the_table_of_files_has_their_lengths():
    """Rounded to tens, so that it changes only now and then."""
    rows = re.findall(r'^\| `(\w+\.py)` \| ([\d,]+) \|', README, re.M)
    assert len(rows) == 5
    for name, lines in rows:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines.replace(',', ''))) <= 10
