"""The method: schedule, guidance, generator, both losses, draws, accumulation, EMA."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sid_lsg
import unet


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return unet.UNet((16, 32), context_dim=12, heads=2, layers=1, groups=4, attention=(True, True))


@pytest.fixture
def batch():
    """x (5, 4, 8, 8), another of that shape, t (5,), context (5, 7, 12), null (1, 7, 12)."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=g)
    return (randn(5, 4, 8, 8), randn(5, 4, 8, 8), torch.tensor([20, 979, 500, 1, 625]),
            randn(5, 7, 12), randn(1, 7, 12))


def test_schedule_has_the_published_values():
    """alphas_cumprod[625] of LDM's float64 schedule is 0.137769034; first and last beta give the ends."""
    assert sid_lsg.ALPHA.shape == sid_lsg.SIGMA.shape == (1000,) and sid_lsg.ALPHA.dtype == torch.float32
    assert sid_lsg.ALPHA[625].item() ** 2 == pytest.approx(0.137769034, rel=3e-7)
    assert sid_lsg.ALPHA[0].item() ** 2 == pytest.approx(1 - 0.00085, rel=3e-7)
    assert (sid_lsg.ALPHA[999] / sid_lsg.ALPHA[998]).item() ** 2 == pytest.approx(1 - 0.012, rel=1e-5)
    assert torch.allclose(sid_lsg.ALPHA ** 2 + sid_lsg.SIGMA ** 2, torch.ones(1000), atol=1e-6)


def test_predict_x0_undoes_add_noise(batch):
    x, eps, t, _, _ = batch
    x_t = sid_lsg.add_noise(x, eps, t)
    assert torch.allclose(sid_lsg.predict_x0(eps, x_t, t), x, atol=2e-5)
    assert torch.equal(sid_lsg.add_noise(x, eps, t[2])[2], x_t[2])      # one step for all, t of shape ()


def test_guidance(batch):
    """kappa 1 is the conditional prediction, 0 the unconditional, others extrapolate.

    A dropped prompt is unchanged."""
    x, _, t, context, null = batch
    net = tiny_unet()
    calls = []
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[2])))

    def at(kappa, c=context):
        return sid_lsg.guided(net, x, t, c, null, kappa)
    with torch.no_grad():
        conditional, unconditional = net(x, t, context), net(x, t, null.expand(5, -1, -1))
        assert torch.equal(at(1), conditional) and torch.equal(at(0), unconditional)
        for kappa in (1.5, 0.5, -0.5):
            expected = unconditional + kappa * (conditional - unconditional)
            assert torch.allclose(at(kappa), expected, atol=1e-5)
        calls.clear()
        at(1), at(0.0), at(4.5)
        assert calls == [5, 5, 10]                                      # 1 and 0 cost one half
        dropped = null.expand(5, -1, -1)
        assert torch.allclose(at(7.5, dropped), unconditional, atol=1e-5)


def test_what_comes_before_the_first_text_is_computed_once(batch):
    """One latent with two texts is the latent doubled, and half of it up to the first cross-attention."""
    x, _, t, context, null = batch
    for levels in ((True, True), (False, True)):        # an SD 1.5 begins with attention, the tiny teacher without
        torch.manual_seed(0)
        net, rows = unet.UNet((16, 32), 12, 2, 1, 4, levels), []
        first = net.down_blocks[levels.index(True)]
        for module in (first.resnets[0], first.attentions[0].transformer_blocks[0].attn1,
                       first.attentions[0].transformer_blocks[0].attn2, net.conv_out):
            module.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
        texts = torch.cat([null.expand_as(context), context])
        with torch.no_grad():
            both = net(x, t, texts)
            assert rows == [5, 5, 10, 10]
            assert torch.allclose(both, net(torch.cat([x, x]), t.repeat(2), texts), atol=1e-5)


def test_generator_restores_pure_noise_in_one_step(batch):
    """G(z, c) = (sigma z - sigma eps(sigma z, s, c)) / a at s = 625; sigma z, not z, enters the net."""
    z, _, _, context, _ = batch
    net, s = tiny_unet(), torch.full((5,), 625)
    with torch.no_grad():
        a, sigma = sid_lsg.ALPHA[625], sid_lsg.SIGMA[625]
        expected = (sigma * z - sigma * net(sigma * z, s, context)) / a
        assert torch.allclose(sid_lsg.generate(net, z, context), expected, atol=1e-5)
        noise = [torch.full_like(z, 0.3), torch.full_like(z, -0.2), torch.full_like(z, 0.1)]
        x, source = expected, iter(noise)
        for s, new in zip((468, 312, 156), noise):                      # int(625 (1 - i / 4))
            x_t = sid_lsg.ALPHA[s] * x + sid_lsg.SIGMA[s] * new
            x = (x_t - sid_lsg.SIGMA[s] * net(x_t, torch.full((5,), s), context)) / sid_lsg.ALPHA[s]
        four = sid_lsg.generate(net, z, context, 625, 4, lambda z: next(source))
        assert torch.allclose(four, x, atol=1e-4)


def test_fake_score_loss_and_gradient_against_a_plain_transcription(batch):
    """Per sample and half, with loops and formulas written out; gradients pass through both halves."""
    x_g, eps, t, context, null = batch
    net, plain, kappa = tiny_unet(), tiny_unet(), 1.5
    loss = sid_lsg.fake_score_loss(net, x_g, t, eps, context, null, kappa)
    loss.backward()
    total = 0
    for i in range(5):
        a, sigma = sid_lsg.ALPHA[t[i]], sid_lsg.SIGMA[t[i]]
        x_t = (a * x_g[i] + sigma * eps[i])[None]
        with_text, without = plain(x_t, t[i], context[i:i + 1]), plain(x_t, t[i], null)
        total = total + torch.sum(((1 - kappa) * without + kappa * with_text - eps[i]) ** 2)
    (total / 5).backward()
    assert loss.item() == pytest.approx(total.item() / 5, rel=1e-5)
    for p, q in zip(net.parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize('alpha', [1.0, 0.5, 1.2])
def test_generator_loss_and_gradient_against_a_plain_transcription(batch, alpha):
    """Gradients of the generator's weights, through x_g, x_t and both frozen nets, sample by sample."""
    z, eps, t, context, null = batch
    teacher, fake = tiny_unet(1).requires_grad_(False), tiny_unet(2).requires_grad_(False)
    G, plain = tiny_unet(3), tiny_unet(3)
    x_g = sid_lsg.generate(G, z, context)
    x_t = sid_lsg.add_noise(x_g, eps, t)
    x_psi = sid_lsg.predict_x0(sid_lsg.guided(fake, x_t, t, context, null, 1.5), x_t, t)
    x_phi = sid_lsg.predict_x0(sid_lsg.guided(teacher, x_t, t, context, null, 3.0), x_t, t)
    loss = sid_lsg.generator_loss(x_g, x_phi, x_psi, alpha)
    loss.backward()

    a625, s625, total = sid_lsg.ALPHA[625], sid_lsg.SIGMA[625], 0
    for i in range(5):
        noise, c, a, sigma = s625 * z[i:i + 1], context[i:i + 1], sid_lsg.ALPHA[t[i]], sid_lsg.SIGMA[t[i]]
        g = (noise - s625 * plain(noise, torch.tensor(625), c)) / a625
        noisy = a * g + sigma * eps[i]
        e_psi = -0.5 * fake(noisy, t[i], null) + 1.5 * fake(noisy, t[i], c)
        e_phi = -2.0 * teacher(noisy, t[i], null) + 3.0 * teacher(noisy, t[i], c)
        f_psi, f_phi = (noisy - sigma * e_psi) / a, (noisy - sigma * e_phi) / a
        weight = max((g - f_phi).abs().mean().item(), 1e-5)
        if alpha == 1:                      # the shorter form that the paper's alpha = 1 allows
            total = total + torch.sum((f_phi - f_psi) * (f_psi - g)) / weight
        else:
            total = total + torch.sum(
                (f_phi - f_psi) * (f_phi - g) - alpha * (f_phi - f_psi) ** 2) / weight
    (total / 5).backward()
    assert loss.item() == pytest.approx(total.item() / 5, rel=1e-4)
    for p, q in zip(G.parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item() + 1e-7)


def test_a_nan_sample_is_left_out_of_value_and_gradient(batch):
    x, y, *_ = batch
    x_g, x_phi, x_psi = x.clone(), (x + y).clone(), (x - 0.5 * y).clone()
    x_psi[2, 1, 3, 3] = math.nan
    for tensor in (x_g, x_phi, x_psi):
        tensor.requires_grad_()
    loss = sid_lsg.generator_loss(x_g, x_phi, x_psi, 1.0)
    loss.backward()
    keep = [0, 1, 3, 4]
    rest = sid_lsg.generator_loss(x_g[keep], x_phi[keep], x_psi[keep], 1.0)
    assert loss.item() == pytest.approx(rest.item() * 4 / 5, rel=1e-5)  # still divided by the whole batch
    assert all(tensor.grad.isfinite().all() and (tensor.grad[2] == 0).all()
               for tensor in (x_g, x_phi, x_psi))


def test_a_nan_sample_is_left_out_of_the_fake_score_loss(batch):
    x_g, eps, t, context, null = batch
    net, broken, keep = tiny_unet(), x_g.clone(), [0, 1, 3, 4]
    broken[2, 0, 0, 0] = math.nan
    with torch.no_grad():
        loss = sid_lsg.fake_score_loss(net, broken, t, eps, context, null, 1.5)
        rest = sid_lsg.fake_score_loss(net, x_g[keep], t[keep], eps[keep], context[keep], null, 1.5)
    assert loss.item() == pytest.approx(rest.item() * 4 / 5, rel=1e-5)


def config(**changes):
    return dataclasses.replace(sid_lsg.TrainConfig(batch=8, micro_batch=8, seed=3), **changes)


def test_draws_depend_on_the_sample_and_not_on_the_micro_batch():
    prompts = [f'prompt {i}' for i in range(6)]

    def draw(iteration, half, rows, drop=0.0, seed=3):
        return sid_lsg.draw_samples(config(seed=seed), prompts, list, (4, 8, 8), torch.device('cpu'),
                                    iteration, half, torch.tensor(rows), drop)
    texts, z, t, eps = draw(5, 1, range(8))
    part_texts, part_z, part_t, part_eps = draw(5, 1, [3, 4])
    assert part_texts == texts[3:5] and torch.equal(part_z, z[3:5])
    assert torch.equal(part_t, t[3:5]) and torch.equal(part_eps, eps[3:5])
    for other in (draw(5, 0, range(8)), draw(6, 1, range(8)), draw(5, 1, range(8), seed=4)):
        assert not torch.equal(other[1], z) and not torch.equal(other[3], eps)
    assert not torch.equal(z, eps) and abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


def test_prompts_come_without_replacement_steps_in_range_and_a_tenth_is_dropped():
    prompts = [str(i) for i in range(10)]
    seen, steps, dropped = [], [], 0
    for iteration in range(100):
        for half in (0, 1):
            texts, _, t, _ = sid_lsg.draw_samples(config(), prompts, list, (1, 1, 1), torch.device('cpu'),
                                                  iteration, half, torch.arange(8))
            seen += texts
            steps += t.tolist()
            dropped += sid_lsg.draw_samples(config(), prompts, list, (1, 1, 1), torch.device('cpu'),
                                            iteration, half, torch.arange(8), 0.1)[0].count('')
    epochs = [seen[i:i + 10] for i in range(0, 1600, 10)]
    assert all(sorted(epoch) == prompts for epoch in epochs) and epochs[0] != epochs[1]
    assert (min(steps) >= 20 and max(steps) <= 979 and max(steps) > 970
            and abs(np.mean(steps) - 499.5) < 25)
    assert 120 < dropped < 200                  # of 1,600, 160 expected, 12 a standard deviation


def test_average_follows_the_published_half_life():
    c = config(ema_kimg=50.0, batch=512)
    assert sid_lsg.ema_beta(c, 0) == 0.0        # the first average is the first generator
    assert sid_lsg.ema_beta(c, 100_000) == pytest.approx(0.5 ** (512 / 5_000))
    assert sid_lsg.ema_beta(c, 10_000_000) == pytest.approx(0.5 ** (512 / 50_000))
    assert sid_lsg.ema_beta(config(ema_rampup=0.3, batch=512), 100_000) == pytest.approx(0.5 ** (512 / 30_000))
    average, G = tiny_unet(0), tiny_unet(1)
    before = average.conv_in.weight.detach().clone()
    sid_lsg.update_average(average, G, 0.9)
    assert torch.allclose(average.conv_in.weight, 0.9 * before + 0.1 * G.conv_in.weight, atol=1e-6)


class PlainDescent:
    """p -= gradient: shows what update() hands on."""

    def __init__(self, *parameters):
        self.parameters = parameters

    def step(self):
        for p in self.parameters:
            p -= p.grad


def test_update_mends_gradients_clips_and_reports_their_norm():
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = PlainDescent(p)
    p.grad = torch.tensor([math.nan, math.inf, 3.0, -4.0])
    norm, broken, lost = sid_lsg.update(optimizer)
    assert norm == 0 and broken == 1 and lost             # of one tensor, which had what no norm can be had of
    q = torch.nn.Parameter(torch.zeros(2))
    p.grad, q.grad = torch.tensor([math.nan, 0.0, 0.0, 0.0]), torch.tensor([3.0, 4.0])
    norm, broken, lost = sid_lsg.update(PlainDescent(p, q))
    assert norm.item() == pytest.approx(5.0) and broken == 1 and not lost and q.tolist() == [-3.0, -4.0]
    assert p.tolist() == [0.0, -1e5, -3.0, 4.0] and p.grad is None
    p.grad = torch.tensor([0.0, 0.0, 3.0, -4.0])
    norm, broken, _ = sid_lsg.update(optimizer, clip=1.0)
    assert norm.item() == pytest.approx(5.0) and broken == 0
    assert p.tolist() == [0.0, -1e5, -4.0, 5.0]
    p.grad = torch.tensor([-math.inf, 0.0, 0.0, 0.0])
    assert not sid_lsg.update(optimizer)[2]     # infinity becomes 1e5, which moves a weight
    assert p.tolist() == [1e5, -1e5, -4.0, 5.0]


def test_adam_is_torchs_to_the_bit():
    """Over 20 steps, one with a zero gradient, in both layouts of memory; torch's fused kernel, which is ours."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).to(
        memory_format=torch.channels_last)) for _ in range(2))
    adam = sid_lsg.Adam([ours], lr=1e-2, eps=1e-8)
    reference = torch.optim.Adam([theirs], lr=1e-2, betas=(0.0, 0.999), eps=1e-8, fused=True)
    for step in range(20):
        gradient = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) * (0 if step == 7 else 10.0 ** (step % 5 - 2))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        adam.step(), reference.step()
        assert torch.equal(ours, theirs), step
    assert torch.equal(adam.squares[0], reference.state[theirs]['exp_avg_sq'])


def test_ddim_agrees_with_diffusers(batch):
    from diffusers import DDIMScheduler
    z, _, _, context, null = batch
    net = tiny_unet()
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear',
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(7)
    x = z
    with torch.no_grad():
        for t in scheduler.timesteps:
            e0, e1 = net(x, t, null.expand(5, -1, -1)), net(x, t, context)
            x = scheduler.step(e0 + 2.5 * (e1 - e0), t, x).prev_sample
        ours = sid_lsg.ddim(net, z, context, null, 2.5, 7)
    assert (ours - x).abs().max() < 1e-5 * x.abs().max()


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    a, b = rng.uniform(0, 2, 64), rng.uniform(0, 2, 64)
    a[:8] = 0                                   # singular: where sqrtm of the product goes astray
    mu = rng.standard_normal(64)
    one, two = basis * a @ basis.T, basis * b @ basis.T
    exact = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid.frechet_distance(mu, one, mu, two) == pytest.approx(exact, abs=2e-6)
    assert fid.frechet_distance(mu, one, mu + 1, one) == pytest.approx(64, abs=1e-5)


def test_pixels_are_quantised_as_the_official_code_does():
    """(x 127.5 + 128), clipped, cut: -0.75 becomes 32 (the common (x + 1) 127.5 would give 31)."""
    x = torch.tensor([-2.0, -1.0, -0.75, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert sid_lsg.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 32, 128, 255, 255]


def test_a_grid_shows_every_picture_whole_in_its_place_over_its_label():
    side, columns = 32, 3
    images = np.random.default_rng(0).integers(0, 255, (5, side, side, 3), dtype=np.uint8)
    grid = np.asarray(sid_lsg.make_grid(list(images), ['a red ring', '', 'x', 'x', 'y'], columns))
    cell = 4 * side                             # enlarged to 128, unsmoothed
    high = (grid.shape[0] - 8) // 2
    labels = []
    for i, image in enumerate(images):
        y, x = 8 + i // columns * high, 8 + i % columns * (cell + 8)
        assert np.array_equal(grid[y:y + cell:4, x:x + cell:4], image)
        assert np.array_equal(grid[y + 3:y + cell:4, x + 3:x + cell:4], image)
        labels.append((grid[y + cell:y + high, x:x + cell] < 128).any((0, 2)).sum())        # columns with ink
    assert labels[0] > labels[2] == labels[3] > labels[1] == 0 and labels[4] > 0
    assert grid.shape[1] == 8 + columns * (cell + 8)
    assert (grid[:8] == 255).all() and (grid[:, :8] == 255).all()


def test_curves_rise_where_the_numbers_do(tmp_path):
    """Two panels: up is more, right is later; a single spike does not flatten the rest."""
    rows = [dict(images=8 * i, seconds=i, loss_G=float(i), w=None if i == 3 else 200.0 - i) for i in range(1, 200)]
    rows[25]['loss_G'] = 1e9
    (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    sid_lsg.draw_curves(tmp_path / 'log.jsonl', tmp_path / 'curves.png')
    sheet = np.asarray(Image.open(tmp_path / 'curves.png')).astype(int)
    assert sheet.shape == (120, 640, 3)
    for panel, rises in ((sheet[:, :320], True), (sheet[:, 320:], False)):
        y, x = np.nonzero((panel == [0, 0, 128]).all(2))
        first, last = y[x < x.min() + 20].mean(), y[x > x.max() - 20].mean()
        assert (first - last > 60) == rises and (last - first > 60) != rises
        assert x.max() - x.min() > 250 and 20 < y.min() and y.max() < 110
