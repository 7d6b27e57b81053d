"""The tiny world, its judge, and the checkpoint folder that everything runs on by default."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import findings
import make_tiny_sd
import score_tiny
import sid_lsg
import tiny_world
import unet

TINY = make_tiny_sd.TINY
HELD_OUT = (TINY / 'held_out.txt').read_text().splitlines()


def test_captions_and_scenes_are_each_others_inverse():
    scenes = tiny_world.all_scenes()
    assert len(scenes) == 384 + 16128 and len({tiny_world.caption(s) for s in scenes}) == len(scenes)
    assert all(tiny_world.scene_of(tiny_world.caption(s)) == s for s in scenes[::7])


def test_the_judge_knows_right_from_wrong():
    """Drawn pictures are right; with any single attribute of the caption exchanged, they are wrong."""
    scenes = tiny_world.all_scenes()
    scenes = scenes[:384:4] + scenes[384::80]
    pictures = tiny_world.pictures(scenes, seed=7)
    share, each = tiny_world.right(pictures, scenes)
    assert share == 1.0 and set(each.values()) == {1.0}

    def other(name, names):
        names = list(names)
        return names[(names.index(name) + 1) % len(names)]
    for (background, relation, objects), picture in zip(scenes, pictures):
        (color, shape), rest = objects[0], objects[1:]
        relations = ('left of', 'above') if rest else ('small', 'large')
        for wrong in [(other(background, tiny_world.BACKGROUNDS), relation, objects),
                      (background, other(relation, relations), objects),
                      (background, relation, ((other(color, tiny_world.COLORS), shape), *rest)),
                      (background, relation, ((color, other(shape, tiny_world.SHAPES)), *rest)),
                      (background, relation, objects[:1] if rest else objects * 2)]:
            assert not all(tiny_world.judge(picture, wrong).values())
    assert not any(all(tiny_world.judge(np.roll(p, 32, (0, 1)), s).values())       # torn apart at the edges
                   for p, s in zip(pictures, scenes) if len(s[2]) == 2)


def test_held_out_captions_are_not_trained_on():
    prompts = (TINY / 'prompts.txt').read_text().splitlines()
    assert len(HELD_OUT) == len(set(HELD_OUT)) == 2000 and not set(HELD_OUT) & set(prompts)
    held_out, training = make_tiny_sd.split()
    assert [tiny_world.caption(s) for s in held_out] == HELD_OUT
    assert set(prompts) <= {tiny_world.caption(s) for s in training}


def test_settings_and_prompts_are_as_the_script_writes_them(tmp_path):
    make_tiny_sd.write_rest(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (TINY / file.name).read_text(), file.name
    assert len([*tmp_path.iterdir()]) == 3


def test_another_teacher_can_be_made_and_distilled(tmp_path, monkeypatch, capsys):
    """All stages, of a few pictures and iterations; one cut off goes on, one done begins anew."""
    (held_out, training), some = make_tiny_sd.split(), make_tiny_sd.training_scenes
    monkeypatch.setattr(make_tiny_sd, 'split', lambda: (held_out[:8], training[:400]))
    monkeypatch.setattr(make_tiny_sd, 'training_scenes', lambda count, seed: some(64, seed))
    before = {file: file.stat().st_mtime_ns for file in TINY.rglob('*')}

    report = make_tiny_sd.report_vae

    def make(stage, iterations=2):
        def report_and_leave(vae):
            report(vae)
            (tmp_path / f'{stage}.pt').touch()  # as train() does every 500 iterations
        monkeypatch.setattr(make_tiny_sd, 'report_vae', report_and_leave)
        make_tiny_sd.main([stage, '--out', str(tmp_path / 'sd'), '--work', str(tmp_path), '--iterations', str(iterations)])
        return capsys.readouterr().out
    with pytest.raises(SystemExit, match='2'):
        make('vae', -1)
    with pytest.raises(SystemExit, match='2'):
        make('decoder')                         # of a VAE that is not there
    make('vae')
    assert 'loss' in make('decoder')
    model = torch.nn.Linear(1, 1)
    average = make_tiny_sd.train(model, lambda _: model.weight.square().sum(), 500, 0.1, tmp_path / 'teacher.pt', 0)
    state = torch.load(tmp_path / 'teacher.pt', weights_only=True)
    assert state['iteration'] == 500 and torch.equal(state['average']['weight'], average.weight)
    make_tiny_sd.train(model, lambda _: 1 / 0, 500, 0.1, tmp_path / 'teacher.pt', 0)
    assert 'going on from iteration 500' in capsys.readouterr().out
    (tmp_path / 'teacher.pt').unlink()
    make('teacher')
    assert not [*tmp_path.glob('*.pt')] and before == {file: file.stat().st_mtime_ns for file in TINY.rglob('*')}
    sid_lsg.main(['train', '--teacher', str(tmp_path / 'sd'), '--kimg', '0.016', '--progress-samples', '0',
                  '--out', str(tmp_path / 'run')])
    assert Image.open(tmp_path / 'run' / 'grid_000000016.png').height > 4 * 128


def test_the_folder_is_small_and_its_settings_are_settings():
    assert sum(f.stat().st_size for f in TINY.rglob('*') if f.is_file()) <= 10_000_000
    settings = json.loads((TINY / 'sid_lsg.json').read_text())
    assert set(settings) <= {f.name for f in dataclasses.fields(sid_lsg.TrainConfig)}


@torch.no_grad()
def test_the_teacher_draws_what_captions_say():
    """15 of 16 held-out captions at the least; a net that ignores the text gets none right."""
    teacher = unet.load(TINY)
    vae, encode, _ = sid_lsg.load_parts(TINY, torch.device('cpu'))
    texts, null = HELD_OUT[:16], encode([''])
    pictures = sid_lsg.draw_pictures(lambda z, fresh, c: sid_lsg.ddim(teacher, z, c, null, 3.0, 15), vae,
                                     encode(texts), range(16), sid_lsg.latent_shape(0, teacher, vae))
    assert tiny_world.right(pictures, [tiny_world.scene_of(text) for text in texts])[0] >= 15 / 16


def test_a_score_is_the_mean_over_sets_of_other_noise_and_other_pictures(tmp_path, capsys):
    score_tiny.main(['--captions', '16', '--sets', '2', '--kappa'])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('teacher, 1 step'))
    teacher, exam, distances = unet.load(TINY), score_tiny.Exam(TINY, 16), []
    for seed, real in (0, exam.drawn(seed=5)), (16, exam.drawn(seed=7)):
        latents, _ = exam.draw(lambda z, c: sid_lsg.generate(teacher, z, c), seeds=range(seed, seed + 16))
        distances.append(score_tiny.fid.frechet_distance(*score_tiny.moments(latents), *score_tiny.moments(real)))
    assert distances[0] != pytest.approx(distances[1], abs=0.1)
    assert [float(x) for x in row.split()[-10:-8]] == pytest.approx([np.mean(distances), np.std(distances)], abs=0.006)
    other = tmp_path / 'other'                  # a generator that takes other text than this teacher's
    unet.save(unet.UNet((8, 8), 16, 2, 1, 4, (False, True)), other / 'unet')
    for wrong, fact in ((['--sets', '0'], '--sets'), (['--steps', '1000'], '--steps'), (['--kappa', 'nan'], '--kappa'),
                        (['--captions', '1'], 'from 2 to 2000'), (['nowhere'], 'nowhere'), ([str(other)], 'expected text states of 16'),
                        (['--teacher', str(other)], 'other'), (['--picture', str(tmp_path)], '--picture')):
        with pytest.raises(SystemExit, match='2'):
            score_tiny.main(['--captions', '16', *wrong])
        assert fact in capsys.readouterr().err


@pytest.mark.parametrize('kappa, rows', [([], 2), (['1.5'], 3)])
def test_the_picture_has_a_row_for_teacher_and_run(kappa, rows, tmp_path, monkeypatch):
    """Whatever the run's name; and of the teacher in many steps, if it was drawn."""
    labels = []
    monkeypatch.setattr(sid_lsg, 'make_grid', lambda images, names, columns: labels.extend(names) or images[0])
    monkeypatch.chdir(tmp_path)
    unet.save(unet.load(TINY), tmp_path / 'kappa 2' / 'unet')
    score_tiny.main(['kappa 2', '--captions', '8', '--steps', '1', '--picture', 'p.png', '--kappa', *kappa])
    names = [label.rpartition(': ')[0] for label in labels[::8]]
    assert names == ['teacher, 1 step', 'kappa 2, 1 step', 'teacher, 1 steps, kappa 1.5'][:rows] and len(labels) == 8 * rows


def test_diversity_is_the_mean_distance_within_captions():
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    pictures[1], pictures[2:] = 10, 99          # two of one caption, 10 apart everywhere; two of another, the same
    assert findings.diversity(pictures, 2) == 5


def test_findings_are_found_once(tmp_path, monkeypatch, capsys):
    arguments = ['--out', str(tmp_path), '--seeds', '0', '--kimg', '0.032', '--captions', '40', '--kappa',
                 '--only', 'no guidance', 'Zero-CFG']
    for wrong in ['--teacher', 'nowhere'], ['--captions', '1'], ['--kimg', 'nan']:
        with pytest.raises(SystemExit, match='2'):
            findings.main([*arguments, *wrong])
    capsys.readouterr()
    assert not [*tmp_path.iterdir()]            # so that another try may have the folder

    update = sid_lsg.Run.update

    def interrupted(run, name):
        if name == 'G':                         # once: seconds later another would stop it at once
            os.kill(os.getpid(), signal.SIGINT)
        update(run, name)
    with monkeypatch.context() as patch:
        patch.setattr(sid_lsg.Run, 'update', interrupted)
        with pytest.raises(SystemExit, match='130'):
            findings.main([*arguments, '--only', 'no guidance'])
    capsys.readouterr()
    findings.main(arguments)
    said = capsys.readouterr().out
    assert said.count('Resuming') == 1
    table = [line for line in said.splitlines() if line.startswith('| ')]
    assert len(table) == 4 and table[1].startswith('| no guidance | 1, 1, 1 | 1.0 | ')
    assert Image.open(tmp_path / 'findings.png').size == (1440, 1000)
    findings.main(arguments)                    # from what is there
    said = capsys.readouterr().out
    assert 'Distilling' not in said and table == [line for line in said.splitlines() if line.startswith('| ')]
    with pytest.raises(SystemExit, match='2'):  # numbers of other settings are not mixed with these
        findings.main([*arguments, '--kimg', '0.016'])
    assert 'give another --out' in capsys.readouterr().err
