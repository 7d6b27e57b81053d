"""Tests of the tiny world and its judge, of the tiny teacher's folder, and of three scripts."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import clip_text
import fid
import few_steps
import findings
import make_tiny_sd
import score_tiny
import sid_lsg
import tiny_world
import unet

TINY = make_tiny_sd.TINY
# The committed teacher must get this share of 16 held-out captions right, in 15 steps at kappa 3.
SHARE = 12 / 16


def refused(main, arguments, capsys, sentence):
    """Check that a script exits with code 2 and one sentence that contains this."""
    with pytest.raises(SystemExit, match='2'):
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert sentence in error and 'Traceback' not in error, error


def test_every_scene_has_its_own_caption():
    scenes = tiny_world.all_scenes()
    assert len(set(scenes)) == 384 + 16128
    assert [tiny_world.scene_of(tiny_world.caption(scene)) for scene in scenes] == scenes


def test_the_judge_knows_right_from_wrong():
    """Drawn images are right, and wrong for a caption with any one attribute exchanged."""
    scenes = tiny_world.all_scenes()
    scenes = scenes[:384:4] + scenes[384::80]
    images = tiny_world.pictures(scenes, seed=7)
    share, each = tiny_world.right(images, scenes)
    assert share == 1.0 and set(each.values()) == {1.0}

    def other(name, names):
        names = list(names)
        return names[(names.index(name) + 1) % len(names)]
    for (background, relation, objects), image in zip(scenes, images):
        (color, shape), rest = objects[0], objects[1:]
        relations = ('left of', 'above') if rest else ('small', 'large')
        for wrong in [(other(background, tiny_world.BACKGROUNDS), relation, objects),
                      (background, other(relation, relations), objects),
                      (background, relation, ((other(color, tiny_world.COLORS), shape), *rest)),
                      (background, relation, ((color, other(shape, tiny_world.SHAPES)), *rest)),
                      (background, relation, objects[:1] if rest else objects * 2)]:
            assert not all(tiny_world.judge(image, wrong).values())


def test_captions_are_wrong_as_often_as_planned():
    """A pair is right if its 6 attributes are, and it was not replaced by another scene."""
    rng, scenes = np.random.default_rng(0), tiny_world.all_scenes()
    pairs = [scenes[i] for i in rng.integers(384, len(scenes), 4000)]
    described = [tiny_world.misdescribe(scene, rng) for scene in pairs]
    share = np.mean([a == b for a, b in zip(pairs, described)])
    assert share == pytest.approx(0.98 * 0.94 ** 6, abs=0.03)
    assert set(described) <= set(scenes)    # the two objects keep different colors
    for scene in pairs[:200]:
        changed = tiny_world.misdescribe(scene, rng, wrong=1, unrelated=0)
        assert changed[0] != scene[0] and changed[1] != scene[1]
        assert all(a != b for old, new in zip(scene[2], changed[2]) for a, b in zip(old, new))


def test_held_out_captions_are_not_trained_on():
    scenes = make_tiny_sd.training_scenes(3000, seed=0)
    assert 0.14 < np.mean([len(objects) == 1 for _, _, objects in scenes]) < 0.2
    captions = {tiny_world.caption(scene) for scene in scenes}
    captions |= set(make_tiny_sd.captions_of(scenes, seed=0))
    assert not captions & set((TINY / 'held_out.txt').read_text().splitlines())


def test_the_folder_is_as_the_script_writes_it(tmp_path):
    make_tiny_sd.write_rest(tmp_path)
    make_tiny_sd.write_tokenizer(clip_text.load_tokenizer(TINY), tmp_path / 'tokenizer')
    unet.save_pipeline(tmp_path, 'DDIM')
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob('*') if file.is_file()]
    assert len(files) == 8
    for file in files:
        assert (tmp_path / file).read_text() == (TINY / file).read_text(), file
    assert sum(f.stat().st_size for f in TINY.rglob('*') if f.is_file()) <= 10_000_000


def test_another_teacher_can_be_made_and_distilled(tmp_path, monkeypatch):
    """All stages, with few images and iterations."""
    (held_out, training), scenes = make_tiny_sd.split(), make_tiny_sd.training_scenes
    monkeypatch.setattr(make_tiny_sd, 'split', lambda: (held_out[:8], training[:400]))
    monkeypatch.setattr(make_tiny_sd, 'training_scenes', lambda count, seed: scenes(64, seed))
    options = ['--out', str(tmp_path / 'sd'), '--iterations', '2']
    for stage in ('vae', 'decoder', 'teacher', 'teacher'):      # the last continues from weights
        make_tiny_sd.main([stage, *options])
    sid_lsg.main(['train', '--teacher', str(tmp_path / 'sd'), '--kimg', '0.016', '--out',
                  str(tmp_path / 'run')])
    assert Image.open(tmp_path / 'run' / 'grid_000000016.png').height > 4 * 128


def test_the_teacher_samples_what_captions_say():
    exam = score_tiny.Exam(TINY, 16)
    images, _ = exam.sample(exam.ddim(3.0, steps=15))
    assert tiny_world.right(images, exam.scenes)[0] >= SHARE


def test_a_score_is_the_mean_over_sets(tmp_path, monkeypatch, capsys):
    """Sets have other noise and other drawn images. The grid has a row per teacher and run."""
    unet.save(unet.load(TINY), tmp_path / 'a run' / 'unet')
    unet.write_json(tmp_path / 'a run' / 'generator.json', {'t_init': 625, 'teacher': str(TINY)})
    monkeypatch.chdir(tmp_path)
    score_tiny.main(['a run', '--captions', '16', '--sets', '2', '--kappa', '2', '--grid',
                     'grid.png'])
    lines = capsys.readouterr().out.splitlines()
    row, = (line for line in lines if line.startswith('teacher, 1 step '))
    same, = (line for line in lines if line.startswith('generator, 1 step, a run '))
    assert row.split()[3:] == same.split()[5:]              # the run's generator is the teacher
    exam, distances = score_tiny.Exam(TINY, 16), []
    for i in range(2):
        _, latents = exam.sample(exam.generator('a run'), first=16 * i)
        _, real = exam.drawn(seed=5 + 2 * i)
        distances.append(fid.frechet_distance(*score_tiny.moments(latents),
                                              *score_tiny.moments(real)))
    assert [float(x) for x in row.split()[5:7]] == pytest.approx(
        [np.mean(distances), np.std(distances)], abs=0.006)
    assert Image.open('grid.png').size == (8 + 8 * (128 + 8), 8 + 3 * (128 + 8 + 26))
    refused(score_tiny.main, ['--captions', '1'], capsys, '--captions must be 2 to 2000, found 1')


def test_dmd_moves_images_towards_the_teacher():
    x_g, x_phi, x_psi = torch.randn(3, 2, 4, 8, 8).requires_grad_(True).unbind()
    x_g.retain_grad(), x_phi.retain_grad()
    findings.dmd_loss(x_g, x_phi, x_psi, 1.0).backward()
    w = (x_g - x_phi).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x_g.grad, (x_psi - x_phi) / w / 2)
    assert x_phi.grad is None


@pytest.mark.filterwarnings('ignore:An input array is constant')     # nothing is right yet
def test_findings_are_computed_once(tmp_path, monkeypatch, capsys):
    arguments = ['--out', str(tmp_path / 'f'), '--seeds', '0', '--kimg', '0.032', '--captions',
                 '40', '--only', 'no guidance', 'LSG 2', 'DMD gradient']
    monkeypatch.setattr(findings, 'TEACHER_KAPPAS', (1,))
    update, losses = sid_lsg.Run.update, []

    def interrupted(run, name):
        losses.append(sid_lsg.generator_loss)
        if len(losses) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        update(run, name)
    monkeypatch.setattr(sid_lsg.Run, 'update', interrupted)
    with pytest.raises(SystemExit, match='130'):
        findings.main(arguments)
    findings.main(arguments)
    assert losses.count(findings.dmd_loss) == 4 and len(losses) == 3 * 4
    output = capsys.readouterr().out
    table = [line for line in output.splitlines() if line.startswith('| ')]
    assert [line.split(' | ')[0] for line in table[1:]] == [
        '| no guidance', '| LSG 2', '| DMD gradient', '| teacher 1', '| drawn images']
    assert Image.open(tmp_path / 'f' / 'findings.png').size == (900, 620)
    assert not [*tmp_path.rglob('state')] and len([*tmp_path.rglob('score.json')]) == 3
    findings.main(arguments)
    assert table == [line for line in capsys.readouterr().out.splitlines() if line[:2] == '| ']
    assert len(losses) == 3 * 4
    refused(findings.main, [*arguments, '--kimg', '0.016'], capsys, 'give another --out')


def test_generators_of_few_steps_are_compared(tmp_path, monkeypatch, capsys):
    arguments = ['--out', str(tmp_path), '--seeds', '0', '--kimg', '0.016', '--captions', '40',
                 '--steps', '1', '2', '--only', 'Zero-CFG']
    few_steps.main(arguments)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert [line.split(' | ')[1:3] for line in table[1:]] == [['1', '1'], ['1', '4'], ['2', '2']]
    assert len({line.split(' | ')[5] for line in table}) == 4       # FD
    assert sid_lsg.find_generator(tmp_path / 'Zero-CFG-2-steps-0')[1]['steps'] == 2
    monkeypatch.setattr(sid_lsg, 'train', None)
    few_steps.main(arguments)
    assert table == [line for line in capsys.readouterr().out.splitlines() if line[:2] == '| ']
    refused(few_steps.main, [*arguments, '--kimg', '0.032'], capsys, 'give another --out')
