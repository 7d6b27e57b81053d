"""The command line as a user has it: train, then sample, on a teacher of random weights; and what is refused, how."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import clip_text
import fid
import sid_lsg
import unet
import vae
from conftest import ROOT, SETTINGS


def command(*arguments, cwd):
    """The program in a process of its own, as a user starts it, with more than one thread."""
    return subprocess.run([sys.executable, ROOT / 'sid_lsg.py', *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '2'})


def call(*arguments, cwd, rank=0, world=1):
    """The same in this process, which is spared the import of torch; the exit code, what was printed, and the errors."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sid_lsg, 'RANK', rank)
        patch.setattr(sid_lsg, 'WORLD', world)
        try:
            sid_lsg.main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def weights(run):
    return load_file(Path(run) / 'generator' / 'unet' / 'diffusion_pytorch_model.safetensors')


def trained(folder, teacher, **changes):
    """The weights of a short run in this process with some settings changed."""
    config = sid_lsg.make_config(sid_lsg.TrainConfig, dict(teacher=str(teacher), out=str(folder), **changes))
    sid_lsg.train(config)
    return weights(folder)


@pytest.fixture(scope='session')
def run(teacher, tmp_path_factory):
    """A folder in which `train` ran once from the command line, and what it printed."""
    folder = tmp_path_factory.mktemp('work')
    return folder, command('train', '--teacher', teacher, '--log-seconds', 0, cwd=folder)


@pytest.fixture
def two_threads():
    """As `run` had: rounding hangs on how work is shared out."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_train_leaves_a_whole_run_folder(run, teacher):
    folder, result = run
    assert result.returncode == 0, result.stderr
    out = folder / 'runs' / '000'
    assert sorted(p.name for p in out.iterdir()) == [
        'config.json', 'curves.png', 'generator', 'grid_000000000.png', 'grid_000000016.png', 'grid_000000024.png',
        'log.jsonl', 'state']
    # Weights too are open to whom the umask lets: safetensors' own way is 0600.
    assert len({p.stat().st_mode for p in out.rglob('*') if p.is_file()}) == 1
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [row['images'] for row in rows] == [8, 16, 24]
    assert set(rows[0]) == {'images', 'seconds', 'loss_fake', 'grad_fake', 'loss_G', 'xg_xphi', 'xphi_xpsi', 'grad_G',
                            'nan_samples', 'bad_grads', 'lost_grads'}
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert 0 < rows[0]['seconds'] < rows[2]['seconds'] < 3600           # since the start, not since 1970
    settings = json.loads((out / 'config.json').read_text())
    assert settings['lr'] == SETTINGS['lr'] and settings['kappa'] == [1.5] * 3 and settings['t_init'] == 625
    assert 'sample --generator runs/000' in result.stdout and '24 images' in result.stdout
    before = load_file(teacher / 'unet' / 'diffusion_pytorch_model.safetensors')
    assert all(not torch.equal(w, before[key]) for key, w in weights(out).items() if w.ndim == 4)
    pixels = [np.asarray(Image.open(out / f'grid_{n:09d}.png')) for n in (0, 16, 24)]
    assert (pixels[0] != pixels[1]).any() and (pixels[1] != pixels[2]).any()


def test_same_seed_same_weights_and_micro_batches_add_up(run, two_threads, teacher, tmp_path):
    """Accumulation over micro-batches gives the weights of one batch, up to rounding; another seed does not."""
    once = weights(run[0] / 'runs' / '000')
    again, parts = trained(tmp_path / 'a', teacher), trained(tmp_path / 'b', teacher, micro_batch=2)
    other = trained(tmp_path / 'c', teacher, seed=2)
    for key, w in once.items():
        assert torch.equal(again[key], w)
    # Adam divides by the gradient's own size, so rounding shows most where a gradient is almost zero: compare in the mean.
    def distance(a):
        return sum((a[key] - w).abs().sum() for key, w in once.items()).item()
    assert distance(parts) < 0.02 * distance(other) and distance(other) > 0


# No prompt is dropped where the fake net is not guided, whatever --drop says.
@pytest.mark.parametrize('kappas, dropped', [((0.5, 2.0, 3.0), 0.5), ((1.0, 1.0, 2.0), 0.0)])
def test_train_is_the_method_written_out(kappas, dropped, teacher, tmp_path):
    """Two iterations of train() against the whole method in a second hand: one batch instead of micro-batches, no
    frozen weights, gradients by autograd.grad, Adam by its formula. Losses, distances, norms and the averaged weights."""
    (kappa1, kappa2, kappa4), alpha, batch, lr = kappas, 1.2, 4, 1e-3
    out = tmp_path / 'run'
    config = sid_lsg.make_config(sid_lsg.TrainConfig, dict(
        teacher=str(teacher), out=str(out), kappa=[kappa1, kappa2, kappa4], alpha=alpha, batch=batch, micro_batch=2, lr=lr,
        fake_lr=2 * lr, drop=0.5, kimg=0.008, log_seconds=0.0, ema_rampup=2.0))
    sid_lsg.train(config)
    log = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]

    phi, psi, G = unet.load(teacher), unet.load(teacher), unet.load(teacher)
    _, encode, _ = sid_lsg.load_parts(teacher, torch.device('cpu'))
    prompts = (teacher / 'prompts.txt').read_text().split('\n')[:20]
    moments = {net: [torch.zeros_like(p) for p in net.parameters()] for net in (psi, G)}
    average = [0.0] * len(moments[G])

    def guided(net, x_t, t, c, kappa):
        return (1 - kappa) * net(x_t, t, encode([''] * batch)) + kappa * net(x_t, t, c)

    def picture(z, c):
        s = torch.full((batch,), 625)
        return (sid_lsg.SIGMA[625] * z - sid_lsg.SIGMA[625] * G(sid_lsg.SIGMA[625] * z, s, c)) / sid_lsg.ALPHA[625]

    def adam(net, loss, rate, n):
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g, v in zip(net.parameters(), gradients, moments[net]):
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p -= rate * g / ((v / (1 - 0.999 ** n)).sqrt() + 1e-8)
        return torch.cat([g.flatten() for g in gradients]).norm().item()

    for n in (1, 2):
        def draw(half, drop):
            c, z, t, eps = sid_lsg.draw_samples(config, prompts, encode, (4, 4, 4), torch.device('cpu'), n - 1, half,
                                                torch.arange(batch), drop)
            return c, z, t, eps, sid_lsg.ALPHA[t][:, None, None, None], sid_lsg.SIGMA[t][:, None, None, None]
        c, z, t, eps, a, sigma = draw(0, dropped)
        loss_fake = ((guided(psi, a * picture(z, c).detach() + sigma * eps, t, c, kappa1) - eps) ** 2).sum() / batch
        expected = dict(loss_fake=loss_fake.item(), grad_fake=adam(psi, loss_fake, 2 * lr, n))
        c, z, t, eps, a, sigma = draw(1, 0.0)
        x_g = picture(z, c)
        x_t = a * x_g + sigma * eps
        x_psi = (x_t - sigma * guided(psi, x_t, t, c, kappa2)) / a
        x_phi = (x_t - sigma * guided(phi, x_t, t, c, kappa4)) / a
        w = (x_g - x_phi).abs().mean((1, 2, 3), keepdim=True).detach()
        loss_G = ((x_phi - x_psi) * (x_phi - x_g - alpha * (x_phi - x_psi)) / w).sum() / batch
        expected.update(loss_G=loss_G.item(), xg_xphi=(x_g - x_phi).abs().mean().item(),
                        xphi_xpsi=(x_phi - x_psi).abs().mean().item(), grad_G=adam(G, loss_G, lr, n))
        # Each step of Adam turns rounding of tiny gradients into whole steps, so the second iteration agrees less.
        assert {k: log[n - 1][k] for k in expected} == pytest.approx(expected, rel=1e-4 if n == 1 else 2e-2), n
        # A half-life of twice the images seen before: none, then one batch.
        old = 0.0 if n == 1 else 0.5 ** 0.5
        average = [old * a + (1 - old) * p.detach() for a, p in zip(average, G.parameters())]
    start, end = load_file(teacher / 'unet' / 'diffusion_pytorch_model.safetensors'), weights(out)
    moved = sum((end[key] - start[key]).abs().sum() for key in end)
    apart = sum((end[key] - a).abs().sum() for (key, _), a in zip(G.named_parameters(), average))
    assert apart < 0.03 * moved


@pytest.mark.parametrize('changes', [dict(kappa=[0, 0, 1]), dict(kappa=[1]), dict(kappa=[0.5, 1, 1]), dict(precision='bf16'),
                                     dict(precision='fp16'), dict(alpha=1.2, size=64)])
def test_every_strategy_and_precision_trains(changes, teacher, tmp_path):
    before = load_file(teacher / 'unet' / 'diffusion_pytorch_model.safetensors')
    after = trained(tmp_path / 'run', teacher, kimg=0.008, **changes)
    assert all(w.isfinite().all() and w.dtype == torch.float32 for w in after.values())
    assert not torch.equal(after['conv_in.weight'], before['conv_in.weight'])


def test_sample_takes_the_newest_run_and_labels_its_pictures(run):
    folder, _ = run
    prompt = 'a red star above a blue ring on a black background'
    result = command('sample', prompt, 'ünï', '--seeds', '0-1,7', '--out', 'pictures', cwd=folder)
    assert result.returncode == 0, result.stderr
    names = [f'pictures/{i:06d}.png' for i in range(6)] + ['pictures/grid.png']
    assert result.stdout.split() == names and result.stderr == ''
    first, last = Image.open(folder / names[1]), Image.open(folder / names[5])
    assert first.size == (32, 32) and first.text['prompt'] == prompt and first.text['seed'] == '1'
    assert last.text['prompt'] == 'ünï' and last.text['seed'] == '7' and last.text['generator'] == str(folder / 'runs' / '000' / 'generator')
    assert not list(folder.glob('pictures/*.tmp'))
    again = call('sample', 'something else', '--out', 'pictures', cwd=folder)
    assert again.returncode == 2 and 'nothing was overwritten' in again.stderr


def test_sample_goes_on_where_it_was_cut_off_and_shares_work(run, tmp_path):
    """What is there is not drawn again; two processes, as torchrun starts them, draw the same pictures together."""
    folder, _ = run
    prompts = tmp_path / 'prompts.txt'
    prompts.write_text('\n'.join(f'a red star {i}' for i in range(5)))
    ask = ['sample', '--prompts', prompts, '--generator', folder / 'runs' / '000', '--batch', 2]
    assert call(*ask, '--out', 'all', cwd=tmp_path).returncode == 0
    pixels = [np.asarray(Image.open(tmp_path / 'all' / f'{i:06d}.png')).astype(int) for i in range(5)]
    (tmp_path / 'all' / '000003.png').unlink()
    kept = (tmp_path / 'all' / '000002.png').stat().st_mtime_ns
    result = call(*ask, '--out', 'all', '--steps', 2, cwd=tmp_path)
    assert result.returncode == 2 and 'with another steps' in result.stderr
    result = call(*ask, '--out', 'all', cwd=tmp_path)
    assert result.stdout.split() == ['all/000003.png', 'all/grid.png'] and '4 of 5' in result.stderr
    assert (tmp_path / 'all' / '000002.png').stat().st_mtime_ns == kept
    for rank, own in ((0, [0, 2, 4]), (1, [1, 3])):
        result = call(*ask, '--out', 'shared', cwd=tmp_path, rank=rank, world=2)
        paths = [f'shared/{i:06d}.png' for i in own] + ['shared/grid.png'] * rank       # the last one draws the grid
        assert result.stdout.split() == paths, result.stderr
    for name in ('all', 'shared'):
        for i in range(5):
            assert abs(np.asarray(Image.open(tmp_path / name / f'{i:06d}.png')) - pixels[i]).max() <= 1
    broken = tmp_path / 'all' / '000001.png'    # a full disk while copying, say
    broken.write_bytes(broken.read_bytes()[:-200])
    result = call(*ask, '--out', 'all', cwd=tmp_path)
    assert result.returncode == 2 and 'all/000001.png' in result.stderr and 'delete it' in result.stderr


def test_sample_says_how_far_it_is(run, now, tmp_path, monkeypatch):
    draw = sid_lsg.draw_pictures

    def slow(*arguments):
        now[0] += 4
        return draw(*arguments)
    monkeypatch.setattr(sid_lsg, 'draw_pictures', slow)
    result = call('sample', 'a red star 1', '--seeds', '0-7', '--batch', 2, '--out', tmp_path, cwd=run[0])
    assert result.stderr == '4 of 8 pictures, 0.5 a second, 0:00:08 left\n', result.stderr


def test_sample_keeps_apart_what_other_settings_drew(run, teacher, tmp_path):
    """One name for two generators, from two places; another folder of words. And what cannot be written is told."""
    folder, _ = run
    ask = ['sample', 'a red star', '--out', tmp_path / 'out', '--generator', 'runs/000']
    assert call(*ask, cwd=folder).returncode == 0
    shutil.copytree(folder / 'runs', tmp_path / 'runs')
    shutil.copytree(teacher / 'tokenizer', tmp_path / 'words')
    for more, cwd, fact in (([], tmp_path, 'generator'), (['--tokenizer', tmp_path / 'words'], folder, 'tokenizer')):
        result = call(*ask, *more, cwd=cwd)
        assert result.returncode == 2 and f'with another {fact};' in result.stderr, result.stderr
    (tmp_path / 'out' / 'grid.png').unlink()
    (tmp_path / 'out' / 'grid.png').mkdir()
    result = call(*ask, cwd=folder)
    assert result.returncode == 2 and 'grid.png' in result.stderr and 'Traceback' not in result.stderr
    assert sorted(os.listdir(tmp_path / 'out')) == ['000000.png', 'grid.png']


def test_a_picture_depends_on_its_prompt_and_seed_alone(run):
    """Not on its neighbours, nor (up to the rounding of one level) on the batch size; multi-step noise included."""
    folder, _ = run

    def pixels(name, *arguments):
        result = call('sample', *arguments, '--steps', 2, '--out', name, cwd=folder)
        assert result.returncode == 0, result.stderr
        return [np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob(f'{name}/0*.png'))]
    together = pixels('p1', 'a red star 1', 'a blue ring', '--seeds', '3-5')
    alone = pixels('p2', 'a blue ring', '--seeds', '4')
    single = pixels('p3', 'a red star 1', 'a blue ring', '--seeds', '3-5', '--batch', 1)
    assert abs(alone[0] - together[4]).max() <= 1
    assert max(abs(a - b).max() for a, b in zip(together, single)) <= 1
    assert abs(together[3] - together[4]).max() > 1


def test_sample_draws_with_the_teacher_and_from_a_file(run, teacher):
    folder, _ = run
    (folder / 'some.txt').write_text('a red star 1\n\na blue ring\n')
    result = call('sample', '--prompts', 'some.txt', '--teacher', teacher, '--teacher-steps', 3, '--kappa', 2, '--out', 'drawn',
                  cwd=folder)
    assert result.returncode == 0, result.stderr
    text = Image.open(folder / 'drawn' / '000001.png').text
    assert text['prompt'] == 'a blue ring' and text['seed'] == '1' and text['kappa'] == '2.0' and text['teacher_steps'] == '3'
    assert 't_init' not in text                 # that is the generator's
    config = sid_lsg.SampleConfig(texts=('x',), teacher=str(teacher), teacher_steps=2, out=str(folder / 'as_told'))
    sid_lsg.open_sample(config)
    assert config.kappa == 1.5                  # as --help says


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_sample_draws_the_same_in_half_precision(precision, run, tmp_path):
    for name in ('fp32', precision):
        sid_lsg.main(['sample', 'a red star 1', '--seeds', '0-3', '--precision', name, '--generator',
                      str(run[0] / 'runs' / '000'), '--out', str(tmp_path / name)])
    whole, half = (np.stack([np.asarray(Image.open(tmp_path / name / f'{i:06d}.png')).astype(int) for i in range(4)])
                   for name in ('fp32', precision))
    able = sid_lsg.arithmetic(precision, torch.device('cpu')) != 'fp32'
    assert Image.open(tmp_path / precision / '000000.png').text['precision'] == (precision if able else 'fp32')
    assert (abs(whole - half).max() > 0) == able and abs(whole - half).mean() < 0.02 * whole.std()


def test_a_cpu_computes_in_what_it_can(monkeypatch):
    def able(**abilities):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(avx512_f=True, **abilities), raising=False)
        return [sid_lsg.arithmetic(precision, torch.device('cpu')) for precision in sid_lsg.DTYPES]
    assert able(avx512_bf16=False) == ['fp32'] * 3
    assert able(avx512_bf16=True) == ['fp32', 'bf16', 'fp32']
    assert sid_lsg.arithmetic('fp16', torch.device('cuda')) == 'fp16'


def test_big_weights_stay_as_their_file_has_them_and_compute_as_if_converted():
    tiny = sid_lsg.TINY_TEACHER         # of fp16
    x, context = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) for shape in ((4, 8, 8), (77, 96)))
    for dtype in (torch.float32, torch.bfloat16):
        exact = unet.load(tiny, dtype).to(memory_format=torch.channels_last)
        net = sid_lsg.place(unet.load(tiny, None), torch.device('cpu'), dtype)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(net(x, torch.tensor(500), context), exact(x, torch.tensor(500), context))
        kept = {(type(layer).__name__, layer.weight.numel() > 2 ** 16) for layer in net.modules()
                if getattr(layer, 'weight', None) is not None and layer.weight.dtype == torch.float16}
        assert kept == ({('Conv2d', True), ('Linear', True)} if dtype == torch.float32 else set())


def compile_with(backend, monkeypatch):
    """Module.compile with a backend that needs no C++ compiler; what it is to compile is traced and guarded all the same."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda net, mode=None, **more: real(net, backend=backend, **more))


def test_compiled_nets_train_and_draw_as_others_do(run, two_threads, teacher, tmp_path, monkeypatch):
    """Also the last pictures, whose batch is filled up to the compiled shape. The whole UNet is one graph, and training
    needs four: G without gradients, G and fake with their weights', the frozen two with their input's. After eight torch gives up
    without a word."""
    folder, _ = run
    compile_with('eager', monkeypatch)
    torch.compiler.reset()
    counters.clear()
    compiled, plain = trained(tmp_path / 'compiled', teacher, compile=True), weights(folder / 'runs' / '000')
    assert not counters['graph_break'] and counters['stats']['unique_graphs'] == 4
    assert all(torch.allclose(compiled[key], plain[key], rtol=1e-4, atol=1e-5) for key in plain)
    counters.clear()
    pictures = []
    for *more, graphs in ([0], ['--compile', 2], ['--compile', '--batch', '1', 5]):     # the text encoder, too, for single ones
        out = tmp_path / f'pictures{graphs}'
        sid_lsg.main(['sample', 'a red star 1', '--seeds', '0-4', '--batch', '4', '--generator', str(folder / 'runs' / '000'),
                      '--out', str(out), *more])
        assert counters['stats']['unique_graphs'] == graphs
        pictures.append([np.asarray(Image.open(out / f'{i:06d}.png')).astype(int) for i in range(5)])
    assert abs(np.subtract(pictures, pictures[:1])).max() <= 1 and abs(pictures[0][4] - pictures[0][3]).max() > 1


def test_a_failing_compiler_gets_a_sentence(run, tmp_path, monkeypatch, capsys):
    def fails(graph, inputs):
        raise OSError('no C++ compiler')
    compile_with(fails, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        sid_lsg.main(['sample', 'a red star', '--compile', '--generator', str(run[0] / 'runs' / '000'), '--out', str(tmp_path / 'p')])
    assert stop.value.code == 2 and 'give --no-compile' in capsys.readouterr().err


def test_the_benchmark_runs(tmp_path):
    """On small nets; it asserts by itself that both sides train the same. The README's test runs the row of the UNet."""
    result = subprocess.run([sys.executable, ROOT / 'tests' / 'bench.py', '--small', '--repeat', '1', '--batch', '4',
                             '--micro-batch', '2', '--pictures', '2', '--work', tmp_path, 'iteration', 'tricks', 'sampling'],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('(bar') == 2 and 'off by' in result.stdout
    assert result.stdout.count(' else ') == 2 + len(bench.precisions(torch.device('cpu')))


def test_the_benchmark_names_mistakes(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    for wrong, fact in ((['no-row'], 'no-row'), (['--repeat', '0'], '--repeat'), (['--batch', '4'], '4 and 8'),
                        (['--device', 'banana'], '--device banana'), (['--work', str(tmp_path / 'file')], 'file')):
        with pytest.raises(SystemExit, match='2'):
            bench.main(['--small', '--work', str(tmp_path), *wrong])
        assert fact in capsys.readouterr().err
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='2'):
        bench.main(['--small', '--work', str(tmp_path)])
    assert 'pip install -r tests/requirements.txt' in capsys.readouterr().err and os.listdir(tmp_path) == ['file']


def test_memory_is_counted_as_the_readme_explains_it(teacher):
    """bf16, average on the CPU: teacher in bf16, G and fake, their second moments and one net's gradients in fp32."""
    count = {part.__name__: sum(w.numel() for w in part.load(teacher).parameters()) for part in (unet, vae, clip_text)}
    state, peak = bench.predicted_peak(teacher, 'bf16', 'cpu')
    assert state == count['unet'] * (2 + 8 + 8 + 4) + 4 * (count['vae'] + count['clip_text'])
    assert state < peak


def test_peaks_are_counted_as_they_are():
    with bench.Storages() as storages:
        a = torch.zeros(1000)
        b = a.view(10, 100)                     # no memory of its own
        c = a + 1
        del a, b
        d = c.double()
        del c
    assert (storages.live, storages.peak) == (8000, 12000) and d.nbytes == 8000


def test_a_long_prompt_is_cut_with_a_warning(run):
    folder, _ = run
    result = call('sample', 'a red star ' * 25 + 'and the end', '星' * 39 + '月', 'İ' * 30, '--out', 'long', cwd=folder)
    assert result.returncode == 0 and 'cut: "' in result.stderr
    assert 'and the end"' in result.stderr and '星月"' in result.stderr     # few characters, three bytes each
    assert 'İİİİİ"' in result.stderr        # 60 bytes, and 90 in lower case
    result = call('sample', *['a red star ' * 30] * 5, '--out', 'five', cwd=folder)
    assert result.stderr.count('cut: "') == 3 and '2 more prompts' in result.stderr
    result = call('sample', 'a red star ' * 5000, '--out', 'longer', cwd=folder)
    assert result.returncode == 0 and 'cut: "' in result.stderr and len(result.stderr) < 1000


def test_text_files_of_any_editor_are_read(tmp_path):
    for name, text in {'prompts.txt': 'a red star\r\n\r\n  ein grüner Ring\r\n', 'sid_lsg.json': '{"lr": 1}\r\n'}.items():
        (tmp_path / name).write_bytes(text.encode('utf-8-sig'))
    assert fid.read_lines(tmp_path / 'prompts.txt', '--prompts') == ['a red star', 'ein grüner Ring']
    assert unet.read_json(tmp_path / 'sid_lsg.json') == {'lr': 1}


REFUSALS = {
    'no such teacher': (['train', '--teacher', 'nowhere'], 'nowhere'),
    'no such prompt file': (['train', '--teacher', 'TEACHER', '--prompts', 'none.txt'], 'none.txt'),
    'empty prompt file': (['train', '--teacher', 'TEACHER', '--prompts', 'empty.txt'], 'found none'),
    'run folder in use': (['train', '--teacher', 'TEACHER', '--out', 'used'], 'nothing was overwritten'),
    'resolution': (['train', '--teacher', 'TEACHER', '--size', '40'], 'multiple of 16'),
    'kappa with two numbers': (['train', '--teacher', 'TEACHER', '--kappa', '1', '2'], 'one number, or three'),
    'batch and micro-batch': (['train', '--teacher', 'TEACHER', '--batch', '8', '--micro-batch', '3'], 'multiple of --micro-batch'),
    'device': (['train', '--teacher', 'TEACHER', '--device', 'abacus'], 'abacus'),
    'device of another torch': (['train', '--teacher', 'TEACHER', '--device', 'xpu'], '--device xpu'),
    'device of the average': (['train', '--teacher', 'TEACHER', '--ema-device', 'abacus'], '--ema-device abacus'),
    'precision': (['train', '--teacher', 'TEACHER', '--precision', 'fp8'], 'fp8'),
    'tokenizer too large': (['train', '--teacher', 'TEACHER', '--tokenizer', 'many'], 'found one with 600; give --tokenizer'),
    'tokenizer too small': (['train', '--teacher', 'TEACHER', '--tokenizer', 'few'], 'found one with 1; give --tokenizer'),
    'statistics of another net': (['train', '--teacher', 'TEACHER', '--fid-stats', 'other.npz'], 'found 3 features, preset clean'),
    'steps out of range': (['train', '--teacher', 'TEACHER', '--t-init', '1000'], '--t-init 1000'),
    'negative seed': (['train', '--teacher', 'TEACHER', '--seed', '-1'], '--seed to be a whole number, 0 or more, got -1'),
    'endless length': (['train', '--teacher', 'TEACHER', '--kimg', 'inf'], '--kimg to be a finite number'),
    'kappa not a number': (['train', '--teacher', 'TEACHER', '--kappa', '1', '1', 'nan'], '--kappa to be a finite number, got'),
    'unknown setting beside the teacher': (['train', '--teacher', 'odd'], 'learning_rate'),
    'text beside the teacher': (['train', '--teacher', 'text'], '--lr to be a finite number, 0 or more, got 1e-4'),
    'several for one beside the teacher': (['train', '--teacher', 'several'], '--lr to be a finite number, 0 or more, got [1, 2]'),
    'half a batch beside the teacher': (['train', '--teacher', 'half'], '--batch to be a whole number'),
    'precision beside the teacher': (['train', '--teacher', 'fp8'], '--precision to be one of fp32, bf16, fp16, got fp8'),
    'switch beside the teacher': (['train', '--teacher', 'switch'], '--checkpoint to be true or false, got 1'),
    'run of no name': (['train', '--teacher', 'TEACHER', '--resume', ''], 'expected a run folder at --resume'),
    'cut-off weights': (['train', '--teacher', 'cut'], 'cut'),
    'no generator yet': (['sample', 'a red star'], 'train'),
    'no such generator': (['sample', 'x', '--generator', 'nowhere'], 'checkpoint at nowhere'),
    'generator of a run just begun': (['sample', 'x', '--generator', 'begun'], 'found none yet'),
    'conversion of a run just begun': (['convert', 'begun', 'student'], 'found none yet'),
    'generator of no such step': (['sample', 'x', '--generator', 'late'], 't_init of 0 to 999'),
    'a file for a folder': (['sample', 'x', '--teacher', 'TEACHER', '--teacher-steps', '2', '--out', 'empty.txt'], 'a file at empty.txt'),
    'no prompt': (['sample', '--teacher', 'TEACHER', '--teacher-steps', '2'], 'expected a prompt'),
    'seeds': (['sample', 'x', '--teacher', 'TEACHER', '--teacher-steps', '2', '--seeds', '1-'], '1-'),
    'seeds backwards': (['sample', 'x', '--teacher', 'TEACHER', '--teacher-steps', '2', '--seeds', '7-0'], 'from low to high'),
    'seeds without end': (['sample', 'x', '--teacher', 'TEACHER', '--teacher-steps', '2', '--seeds', '0-99999999999'], 'a million at most'),
    'kappa of no number': (['sample', 'x', '--teacher', 'TEACHER', '--teacher-steps', '2', '--kappa', 'nan'], 'finite number for --kappa'),
    'text encoder of another UNet': (['sample', 'x', '--generator', 'TEACHER', '--teacher', 'wide'], 'expected text states of 16'),
    'prompt not UTF-8': (['sample', 'a red \udcff', '--teacher', 'TEACHER', '--teacher-steps', '2'], 'UTF-8'),
    'convert in the way': (['convert', 'TEACHER', 'new'], 'killed; remove it, then do this again'),
    'convert in the way of removal': (['convert', 'TEACHER', 'wide', '--overwrite'], 'remove it once wide is whole'),
    'seed too large': (['sample', 'x', '--teacher', 'TEACHER', '--teacher-steps', '2', '--seeds', str(2 ** 64)], 'below 2^64'),
    'kappa without a teacher': (['sample', 'x', '--kappa', '2'], '--teacher-steps'),
}


@pytest.fixture(scope='session')
def mess(teacher, tmp_path_factory):
    """A working folder with everything in it that a refusal needs."""
    folder = tmp_path_factory.mktemp('mess')
    (folder / 'empty.txt').write_text('\n  \n')
    (folder / 'used').mkdir()
    (folder / 'used' / 'config.json').write_text('{}')
    for name, file, text in (('begun', 'config.json', '{"kimg": 1}'), ('late', 'generator.json', '{"t_init": 5000}')):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
    for name, settings in dict(odd='{"learning_rate": 1}', text='{"lr": "1e-4"}', several='{"lr": [1, 2]}', half='{"batch": 8.5}',
                               fp8='{"precision": "fp8"}', switch='{"checkpoint": 1}').items():
        (folder / name).mkdir()
        (folder / name / 'sid_lsg.json').write_text(settings)
    words = json.loads((teacher / 'tokenizer' / 'vocab.json').read_text())
    for name, vocab in dict(many=list(words)[:-2] + ['one more', *list(words)[-2:]], few=list(words)[-2:]).items():
        clip_text.save_tokenizer(clip_text.Tokenizer({word: i for i, word in enumerate(vocab)}, []), folder / name)
    fid.save_stats(folder / 'other.npz', np.zeros(3), np.eye(3), 9, 'clean', '')
    shutil.copytree(teacher, folder / 'wide')
    shutil.rmtree(folder / 'wide' / 'text_encoder')
    clip_text.save(clip_text.TextEncoder(len(words), width=24, layers=1, heads=2, hidden=32), folder / 'wide' / 'text_encoder')
    (folder / 'new.tmp').mkdir()
    (folder / 'wide.old').mkdir()
    shutil.copytree(teacher, folder / 'cut')
    file = folder / 'cut' / 'unet' / 'diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


@pytest.mark.parametrize('name', REFUSALS)
def test_refusals(name, mess, teacher, monkeypatch, capsys):
    """One sentence on stderr with the fact in it, exit code 2, no traceback, nothing made."""
    arguments, fact = REFUSALS[name]
    monkeypatch.chdir(mess)
    before = sorted(mess.rglob('*'))
    with pytest.raises(SystemExit) as stop:
        sid_lsg.main([str(teacher) if a == 'TEACHER' else a for a in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and fact in error and 'Traceback' not in error
    assert sorted(mess.rglob('*')) == before


def test_settings_at_their_limits_are_no_mistake():
    low = sid_lsg.TrainConfig(kappa=(1.5,) * 3, batch=1, micro_batch=1, t_min=0, t_max=1, t_init=0, drop=0.0, kimg=1e-9, fid_num=2)
    high = dataclasses.replace(low, batch=8, t_min=999, t_max=1000, t_init=999, drop=1.0, progress_samples=17)
    for config in (low, high):
        sid_lsg.check_kinds(config)
        sid_lsg.check_numbers(config)


@pytest.mark.parametrize('error, code, said', [
    (KeyboardInterrupt, 130, 'interrupted'),
    (torch.OutOfMemoryError, 2, 'the device is out of memory; try --precision bf16')])      # there is one picture only
def test_what_stops_sampling_is_no_traceback(error, code, said, run, tmp_path, monkeypatch, capsys):
    def stopped(*arguments):
        raise error
    monkeypatch.setattr(sid_lsg, 'draw_pictures', stopped)
    with pytest.raises(SystemExit) as stop:
        sid_lsg.main(['sample', 'x', '--generator', str(run[0] / 'runs' / '000'), '--out', str(tmp_path / 'out')])
    assert stop.value.code == code and capsys.readouterr().err == f'sid_lsg: {said}\n'


def test_cuda_without_one_is_refused(teacher, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    with pytest.raises(SystemExit) as stop:
        sid_lsg.main(['train', '--teacher', str(teacher), '--device', 'cuda'])
    assert stop.value.code == 2 and '0 CUDA devices' in capsys.readouterr().err


@pytest.mark.parametrize('command, groups', [('train', 6), ('sample', 3), ('convert', 0)])
def test_help_is_grouped_and_says_every_default(command, groups, capsys):
    with pytest.raises(SystemExit) as stop:
        sid_lsg.main([command, '--help'])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and sum(line.startswith(('what', 'the ', 'measures')) for line in said.splitlines()) == groups
    # What has no default is a switch, or names what is to be written, read or gone on with.
    without = {part.split()[0].rstrip(',') for part in re.split(r'\n  (?=--)', said)[1:] if '(default' not in part}
    assert without <= {'--resume', '--fid-stats', '--checkpoint', '--compile', '--prompts', '--overwrite'}


def test_the_default_settings_are_the_papers():
    c = sid_lsg.TrainConfig()
    assert (c.kimg, c.lr, c.fake_lr, c.batch, c.alpha, c.t_init, c.t_min, c.t_max, c.ema_kimg, c.ema_rampup,
            c.kappa) == (8806.0, 1e-6, 1e-6, 512, 1.0, 625, 20, 980, 50.0, 0.05, (1.5,))


class Copies(TorchDispatchMode):
    """Lists the shapes of all tensors that are copied to another device."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        result = function(*arguments, **(more or {}))
        if function is torch.ops.aten._to_copy.default and arguments[0].device != result.device:
            self.shapes.append(tuple(result.shape))
        return result


def test_an_iteration_asks_nothing_of_the_device(teacher, tmp_path, monkeypatch):
    """Noise, text and steps go to it, and nothing else; nothing comes back, for which the host would wait. Meta stands
    in for a GPU: no number can be read from it, and an attempt is an error."""
    copies = Copies()

    class OnMeta(sid_lsg.Run):
        def __init__(self, config):
            super().__init__(config)
            encode, self.device = self.encode, torch.device('meta')
            self.encode = lambda texts: encode(texts).to('meta')
            self.null = self.null.to('meta')
            for net in (self.teacher, self.G, self.ema, self.fake):
                net.to('meta')
            self.optimizers = {name: sid_lsg.Adam(net.parameters(), 1e-3, 1e-8)
                               for name, net in (('G', self.G), ('fake', self.fake))}

        def end_iteration(self, iteration):
            self.log.end((iteration + 1) * 8, False)
            if iteration == 0:                  # in which the schedule is copied, once for good
                copies.__enter__()
            else:
                copies.__exit__(None, None, None)
            return iteration == 1

        def close(self):
            pass
    monkeypatch.setattr(sid_lsg, 'Run', OnMeta)
    monkeypatch.setattr(sid_lsg, 'autocast', lambda *_: contextlib.nullcontext())      # there is none on meta
    sid_lsg.train(sid_lsg.make_config(sid_lsg.TrainConfig, dict(
        teacher=str(teacher), out=str(tmp_path / 'run'), micro_batch=4, log_seconds=1e9)))
    # z and eps, text states, t; in 2 halves of 2 micro-batches
    assert copies.shapes == 4 * [(2, 4, 4, 4, 4), (4, 77, 16), (4,)]


@pytest.mark.parametrize('precision, off', [('fp32', 1e-3), ('bf16', 0.05)])
def test_no_iteration_waits_for_cuda(precision, off, cuda, teacher, tmp_path, monkeypatch):
    """From the second iteration on, whatever makes the host wait is an error; the log's lines, between them, may. And the
    first iteration's losses are those of the CPU in fp32."""
    class Watched(sid_lsg.Run):
        def end_iteration(self, iteration):
            torch.cuda.set_sync_debug_mode('default')
            done = super().end_iteration(iteration)
            torch.cuda.set_sync_debug_mode('default' if iteration == self.iterations - 1 else 'error')
            return done

    def rows(device, precision):
        sid_lsg.main(['train', '--teacher', str(teacher), '--out', str(tmp_path / device), '--device', device, '--precision', precision,
                      '--micro-batch', '4'])
        return [json.loads(line) for line in (tmp_path / device / 'log.jsonl').read_text().splitlines()]
    expected = rows('cpu', 'fp32')[0]
    monkeypatch.setattr(sid_lsg, 'Run', Watched)
    try:
        found = rows('cuda', precision)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len(found) == 3
    for name in 'loss_fake', 'grad_fake', 'xg_xphi':
        assert found[0][name] == pytest.approx(expected[name], rel=off), name


def test_cuda_draws_what_the_cpu_draws(cuda, run, tmp_path):
    for device in 'cpu', 'cuda':
        result = call('sample', 'a red star 1', '--seeds', '0-2', '--batch', 2, '--steps', 2, '--generator', run[0] / 'runs' / '000',
                      '--device', device, '--out', device, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    ours, theirs = ([np.asarray(Image.open(tmp_path / device / f'{i:06d}.png')).astype(int) for i in range(3)]
                    for device in ('cuda', 'cpu'))
    assert abs(np.subtract(ours, theirs)).max() <= 1


def test_a_process_more_than_gpus_is_refused(monkeypatch):
    """By torchrun's number of it; CUDA's own message for such a one is 'invalid device ordinal'."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for rank, fits in (('1', True), ('2', False)):
        monkeypatch.setenv('LOCAL_RANK', rank)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match='cuda:2 .* sees 2'):
            assert sid_lsg.choose_device('').index == int(rank)


def test_cuda_agrees_with_the_cpu(cuda, teacher):
    """fp32 on the GPU, TF32 off, within 1e-4 of the CPU's largest value: noise prediction and decoded picture."""
    g = torch.Generator().manual_seed(0)
    x, t, context = torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0, 500, 999]), torch.randn(3, 77, 16, generator=g)
    net, decoder = unet.load(teacher), vae.load(teacher)
    with torch.no_grad():
        eps, image = net(x, t, context), decoder.decode(x)
        eps_gpu = net.to(cuda)(x.to(cuda), t.to(cuda), context.to(cuda)).cpu()
        image_gpu = decoder.to(cuda).decode(x.to(cuda)).cpu()
    assert (eps - eps_gpu).abs().max() < 1e-4 * eps.abs().max()
    assert (image - image_gpu).abs().max() < 1e-4 * image.abs().max()
