"""The method: schedule, guidance, generator, both losses, optimiser, random draws, train()."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clip_text
import one_dimension
import sid_lsg
import unet


def small_unet(seed=0):
    torch.manual_seed(seed)
    return unet.UNet((16, 32), context_dim=12, heads=2, layers=1, groups=4, attention=(True, True))


@pytest.fixture
def batch():
    """Return x (5, 4, 8, 8), another of that shape, t (5,), context (5, 7, 12), null (1, 7, 12)."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=g)
    return (randn(5, 4, 8, 8), randn(5, 4, 8, 8), torch.tensor([20, 979, 500, 1, 625]),
            randn(5, 7, 12), randn(1, 7, 12))


def assert_same_gradients(net, plain):
    for p, q in zip(net.parameters(), plain.parameters()):
        close = 1e-4 * q.grad.abs().max().item() + 1e-7
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=close)


def test_the_schedule_has_the_published_values():
    """alphas_cumprod[625] of CompVis is 0.137769034; the ends follow from the two betas."""
    a, sigma = sid_lsg.ALPHA, sid_lsg.SIGMA
    assert a.shape == sigma.shape == (1000,) and a.dtype == sigma.dtype == torch.float32
    assert a[625].item() ** 2 == pytest.approx(0.137769034, rel=3e-7)
    assert a[0].item() ** 2 == pytest.approx(1 - 0.00085, rel=3e-7)
    assert (a[999] / a[998]).item() ** 2 == pytest.approx(1 - 0.012, rel=1e-5)
    assert torch.allclose(a ** 2 + sigma ** 2, torch.ones(1000), atol=1e-6)


def test_guidance_extrapolates_and_skips_the_half_it_does_not_need(batch):
    """Any function of (x, t, context) will do as a network. It is called once."""
    x, _, t, context, null = batch
    net, calls = small_unet(), []

    def counted(x, t, context):
        assert len(x) == len(t) == len(context)
        calls.append(len(x))
        return net(x, t, context)
    with torch.no_grad():
        with_text, without = net(x, t, context), net(x, t, null.expand(5, -1, -1))
        for kappa in (1, 0, 1.5, 0.5, -0.5, 4.5):
            result = sid_lsg.guided(counted, x, t, context, null, kappa)
            expected = without + kappa * (with_text - without)
            assert torch.allclose(result, expected, atol=1e-5), kappa
        assert calls == [5, 5, 10, 10, 10, 10]
        dropped = sid_lsg.guided(net, x, t, null.expand(5, -1, -1), null, 7.5)
        assert torch.allclose(dropped, without, atol=1e-5)


def test_the_fake_score_loss_and_its_gradient_match_the_official_formula(batch):
    """Per sample and per half, written out. Gradients pass through both halves."""
    x_g, eps, t, context, null = batch
    net, plain, kappa, total = small_unet(), small_unet(), 1.5, 0
    loss = sid_lsg.fake_score_loss(net, x_g, t, eps, context, null, kappa)
    loss.backward()
    for i in range(5):
        a, sigma = sid_lsg.ALPHA[t[i]], sid_lsg.SIGMA[t[i]]
        x_t = (a * x_g[i] + sigma * eps[i])[None]
        with_text, without = plain(x_t, t[i], context[i:i + 1]), plain(x_t, t[i], null)
        total = total + torch.sum(((1 - kappa) * without + kappa * with_text - eps[i]) ** 2)
    (total / 5).backward()
    assert loss.item() == pytest.approx(total.item() / 5, rel=1e-5)
    assert_same_gradients(net, plain)


@pytest.mark.parametrize('alpha, n', [(1.0, 1), (0.5, 1), (1.2, 1), (1.0, 2), (1.2, 4)])
def test_the_generator_loss_and_its_gradient_match_the_official_formula(batch, alpha, n):
    """Gradients reach the generator through x_g, x_t and both frozen networks.

    A generator of four steps that trains step n gets them from that step alone."""
    z, eps, t, context, null = batch
    more = list(torch.randn(n - 1, *z.shape, generator=torch.Generator().manual_seed(1)))
    teacher, fake = small_unet(1).requires_grad_(False), small_unet(2).requires_grad_(False)
    G, plain = small_unet(3), small_unet(3)
    x_g = sid_lsg.generate(G, z, context, 625, 4, more)
    x_t = sid_lsg.add_noise(x_g, eps, t)
    x_psi = sid_lsg.predict_x0(sid_lsg.guided(fake, x_t, t, context, null, 1.5), x_t, t)
    x_phi = sid_lsg.predict_x0(sid_lsg.guided(teacher, x_t, t, context, null, 3.0), x_t, t)
    loss = sid_lsg.generator_loss(x_g, x_phi, x_psi, alpha)
    loss.backward()

    total = 0
    for i in range(5):
        g, c = torch.zeros_like(z[:1]), context[i:i + 1]
        for s, new in zip([625, 468, 312, 156], [z, *more]):
            a, sigma = sid_lsg.ALPHA[s], sid_lsg.SIGMA[s]
            noisy = a * g.detach() + sigma * new[i:i + 1]
            g = (noisy - sigma * plain(noisy, torch.tensor(s), c)) / a
        a, sigma = sid_lsg.ALPHA[t[i]], sid_lsg.SIGMA[t[i]]
        noisy = a * g + sigma * eps[i]
        e_psi = -0.5 * fake(noisy, t[i], null) + 1.5 * fake(noisy, t[i], c)
        e_phi = -2.0 * teacher(noisy, t[i], null) + 3.0 * teacher(noisy, t[i], c)
        f_psi, f_phi = (noisy - sigma * e_psi) / a, (noisy - sigma * e_phi) / a
        weight = max((g - f_phi).abs().mean().item(), 1e-5)
        if alpha == 1:                      # the paper's shorter form
            total = total + torch.sum((f_phi - f_psi) * (f_psi - g)) / weight
        else:
            total = total + torch.sum(
                (f_phi - f_psi) * (f_phi - g) - alpha * (f_phi - f_psi) ** 2) / weight
    (total / 5).backward()
    assert loss.item() == pytest.approx(total.item() / 5, rel=1e-4)
    assert_same_gradients(G, plain)


@pytest.mark.parametrize('alpha', [0.5, 1.0, 1.2])
def test_the_loss_has_the_gradient_that_the_readme_derives(alpha):
    """On a Gaussian, where the perfect fake denoiser is known. All samples are pixels of one image,
    so that w is one number, as the derivation needs. alpha 0.5 is half the gradient of J."""
    theta, t, n = torch.tensor(0.7, requires_grad=True), torch.tensor([300]), 1_000_000
    a, sigma = sid_lsg.ALPHA[300], sid_lsg.SIGMA[300]
    z, eps = torch.randn(2, 1, 1, n, 1, generator=torch.Generator().manual_seed(0))

    def distance(theta):
        """J and the slopes of teacher and fake: |x_phi - x_psi|^2 on average."""
        variance = a ** 2 * theta ** 2 + sigma ** 2
        teacher, fake = a / (a ** 2 + sigma ** 2), a * theta ** 2 / variance
        return (teacher - fake) ** 2 * variance, teacher, fake
    x_g = theta * z
    x_t = sid_lsg.add_noise(x_g, eps, t)
    _, teacher, fake = distance(theta.detach())
    loss = sid_lsg.generator_loss(x_g, teacher * x_t, fake * x_t, alpha)
    loss.backward()
    w = (x_g - teacher * x_t).detach().abs().mean()
    found = theta.grad.item() * w.item() / n
    assert found == pytest.approx(one_dimension.gradient(0.7, alpha, np.array([300]))[0], rel=0.02)
    if alpha == 0.5:
        slope = (distance(0.701)[0] - distance(0.699)[0]) / 0.002
        assert found == pytest.approx(slope.item() / 2, rel=0.02)
    if alpha == 1.0:                            # the loss itself is zero, whatever theta is
        assert abs(loss.item() * w.item() / n) < 0.01


def test_autocast_loses_no_gradient_of_a_later_step(batch):
    """Autocast keeps weights that it cast in a step without gradient, and would use them again."""
    z, _, _, context, _ = batch
    G = small_unet()
    with torch.autocast('cpu', torch.bfloat16):
        sid_lsg.generate(G, z, context, 625, 4, [z, z]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in G.parameters())


def draw(iteration, half, indices, drop=0.0, prompts=10, **settings):
    config = sid_lsg.TrainConfig(**dict(batch=8, seed=3) | settings)
    prompts = [f'prompt {i}' for i in range(prompts)]
    return sid_lsg.draw_samples(config, prompts, (4, 8, 8), iteration, half, torch.tensor(indices),
                                drop)


def test_random_draws_depend_on_the_sample_and_not_on_the_micro_batch():
    texts, z, noise, t, eps = draw(5, 'G', range(8))
    part_texts, part_z, _, part_t, part_eps = draw(5, 'G', [3, 4])
    assert part_texts == texts[3:5] and torch.equal(part_z, z[3:5])
    assert torch.equal(part_t, t[3:5]) and torch.equal(part_eps, eps[3:5]) and noise == []
    others = (draw(5, 'fake', range(8)), draw(6, 'G', range(8)),
              draw(5, 'G', range(8), seed=4))
    for other in others:
        assert not torch.equal(other[1], z) and not torch.equal(other[4], eps)
    assert not torch.equal(z, eps) and abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


def test_several_steps_draw_one_number_per_iteration_and_leave_the_rest_as_it_is():
    counts = []
    for iteration in range(200):
        _, z, noise, _, eps = draw(iteration, 'G', range(2), steps=4)
        for half, indices in (('fake', range(2)), ('G', [1])):
            assert len(draw(iteration, half, indices, steps=4)[2]) == len(noise)
        counts.append(len(noise))
    assert set(counts) == {0, 1, 2, 3} and min(map(counts.count, range(4))) > 30
    assert torch.equal(z, draw(199, 'G', range(2))[1])
    assert torch.equal(eps, draw(199, 'G', range(2))[4])
    _, z, noise, _, eps = draw(counts.index(3), 'G', range(2), steps=4)
    assert len({x.sum().item() for x in (z, eps, *noise)}) == 5


def test_an_epoch_uses_every_prompt_once_and_a_tenth_is_dropped():
    seen, timesteps, dropped = [], [], 0
    for iteration in range(100):
        for half in ('fake', 'G'):
            texts, _, _, t, _ = draw(iteration, half, range(8))
            seen += texts
            timesteps += t.tolist()
            dropped += draw(iteration, half, range(8), drop=0.1)[0].count('')
    epochs = [seen[i:i + 10] for i in range(0, 1600, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs) and epochs[0] != epochs[1]
    assert 20 <= min(timesteps) < 30 and 970 < max(timesteps) <= 979
    assert abs(np.mean(timesteps) - 499.5) < 25
    assert 120 < dropped < 200              # 160 expected, with a standard deviation of 12


def test_the_ema_has_the_published_half_life():
    def beta(seen, **settings):
        return sid_lsg.ema_beta(sid_lsg.TrainConfig(**settings), seen)
    assert beta(0) == 0.0                   # the first EMA is the first generator
    assert beta(100_000) == pytest.approx(0.5 ** (512 / 5_000))
    assert beta(10_000_000) == pytest.approx(0.5 ** (512 / 50_000))
    assert beta(100_000, ema_rampup=0.3) == pytest.approx(0.5 ** (512 / 30_000))
    ema, G = small_unet(0), small_unet(1)
    before = ema.conv_in.weight.detach().clone()
    sid_lsg.update_ema(ema, G, 0.9)
    assert torch.allclose(ema.conv_in.weight, 0.9 * before + 0.1 * G.conv_in.weight, atol=1e-6)


@pytest.mark.parametrize('gradient, clip, expected, norm', [
    ([math.nan, math.inf, 3, -4], math.inf, [0, 1e5, 3, -4], 0),    # its norm is not finite
    ([math.nan, math.inf, 3, -4], 1.0, [0, 1, 1, -1], 0),
    ([0, 0.5, 3, -4], 1.0, [0, 0.5, 1, -1], math.sqrt(25.25))])
def test_update_replaces_nan_and_infinity_then_clips(gradient, clip, expected, norm):
    p, other = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(1))
    p.grad, other.grad = torch.tensor(gradient).float(), torch.tensor([0.1])
    seen = []
    optimizer = SimpleNamespace(parameters=[p, other], step=lambda: seen.extend(p.grad.tolist()))
    total, nan = sid_lsg.update(optimizer, clip)
    assert seen == expected and p.grad is None
    assert nan == any(map(math.isnan, gradient))                        # a count of tensors
    assert total.item() == pytest.approx(math.hypot(norm, 0.1))


def test_adam_equals_torch_to_the_bit():
    """Over 20 steps in channels-last memory, one of them with a zero gradient."""
    torch.manual_seed(0)
    start = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ours, theirs = torch.nn.ParameterDict(dict(w=start.clone())), torch.nn.Parameter(start.clone())
    adam = sid_lsg.Adam(ours, lr=1e-2, eps=1e-8)
    reference = torch.optim.Adam([theirs], lr=1e-2, betas=(0.0, 0.999), eps=1e-8, fused=True)
    for step in range(20):
        gradient = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        gradient *= 0 if step == 7 else 10.0 ** (step % 5 - 2)
        ours.w.grad, theirs.grad = gradient.clone(), gradient.clone()
        adam.step(), reference.step()
        assert torch.equal(ours.w, theirs), step
    assert adam.names == ('w',)
    assert torch.equal(adam.squares[0], reference.state[theirs]['exp_avg_sq'])


# No prompt is dropped if the fake score network is not guided, whatever --drop says.
@pytest.mark.parametrize('kappas, dropped, steps', [
    ((0.5, 2.0, 3.0), 0.5, 1), ((1.0, 1.0, 2.0), 0.0, 1), ((1.5, 1.5, 1.5), 0.5, 4)])
def test_train_is_the_method_written_out(kappas, dropped, steps, teacher, tmp_path):
    """Two iterations of train() equal the whole method, written a second time.

    Here are no micro-batches, frozen weights or recompute, but autograd.grad and Adam's formula."""
    (kappa1, kappa2, kappa4), alpha, batch, lr = kappas, 1.2, 4, 1e-3
    out = tmp_path / 'run'
    config = sid_lsg.train_config(
        teacher=str(teacher), out=str(out), kappa=kappas, alpha=alpha, batch=batch, micro_batch=2,
        lr=lr, fake_lr=2 * lr, drop=0.5, kimg=0.008, ema_rampup=2.0, steps=steps, seed=1,
        recompute=steps > 1)
    sid_lsg.train(config)
    log = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]

    phi, psi, G = unet.load(teacher), unet.load(teacher), unet.load(teacher)
    tokenizer, text_encoder = clip_text.load_tokenizer(teacher), clip_text.load(teacher)
    prompts = (teacher / 'prompts.txt').read_text().split('\n')[:20]
    squares = {net: [torch.zeros_like(p) for p in net.parameters()] for net in (psi, G)}
    ema = [0.0] * len(squares[G])

    def encode(texts):
        with torch.no_grad():
            return text_encoder(tokenizer(texts))

    def guided(net, x_t, t, c, kappa):
        return (1 - kappa) * net(x_t, t, encode([''] * batch)) + kappa * net(x_t, t, c)

    def generate(z, c, noise):
        x = 0
        for s, new in zip([625, 468, 312, 156], [z, *noise]):
            a, sigma = sid_lsg.ALPHA[s], sid_lsg.SIGMA[s]
            x_t = a * (x.detach() if s < 625 else 0) + sigma * new
            x = (x_t - sigma * G(x_t, torch.full((batch,), s), c)) / a
        return x

    def adam(net, loss, rate, n):
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g, v in zip(net.parameters(), gradients, squares[net]):
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p -= rate * g / ((v / (1 - 0.999 ** n)).sqrt() + 1e-8)
        return torch.cat([g.flatten() for g in gradients]).norm().item()

    for n in (1, 2):
        def draw(half, drop):
            texts, z, noise, t, eps = sid_lsg.draw_samples(
                config, prompts, (4, 4, 4), n - 1, half, torch.arange(batch), drop)
            assert len(noise) == (n if steps > 1 else 0)        # of this seed
            a, sigma = (table[t][:, None, None, None] for table in (sid_lsg.ALPHA, sid_lsg.SIGMA))
            return encode(texts), z, noise, t, eps, a, sigma
        c, z, noise, t, eps, a, sigma = draw('fake', dropped)
        x_t = a * generate(z, c, noise).detach() + sigma * eps
        loss_fake = ((guided(psi, x_t, t, c, kappa1) - eps) ** 2).sum() / batch
        expected = dict(loss_fake=loss_fake.item(), grad_fake=adam(psi, loss_fake, 2 * lr, n))
        c, z, noise, t, eps, a, sigma = draw('G', 0.0)
        x_g = generate(z, c, noise)
        x_t = a * x_g + sigma * eps
        x_psi = (x_t - sigma * guided(psi, x_t, t, c, kappa2)) / a
        x_phi = (x_t - sigma * guided(phi, x_t, t, c, kappa4)) / a
        w = (x_g - x_phi).abs().mean((1, 2, 3), keepdim=True).detach()
        loss_G = ((x_phi - x_psi) * (x_phi - x_g - alpha * (x_phi - x_psi)) / w).sum() / batch
        expected.update(loss_G=loss_G.item(), xg_xphi=(x_g - x_phi).abs().mean().item(),
                        xphi_xpsi=(x_phi - x_psi).abs().mean().item(),
                        grad_G=adam(G, loss_G, lr, n))
        # Adam turns the rounding of tiny gradients into whole steps, so iteration 2 agrees less.
        close = 1e-4 if n == 1 else 2e-2
        assert {key: log[n - 1][key] for key in expected} == pytest.approx(expected, rel=close), n
        old = 0.0 if n == 1 else 0.5 ** 0.5     # the half-life is twice the images seen before
        ema = [old * a + (1 - old) * p.detach() for a, p in zip(ema, G.parameters())]
    file = 'unet/diffusion_pytorch_model.safetensors'
    start, end = load_file(teacher / file), load_file(out / 'generator' / file)
    moved = sum((end[key] - start[key]).abs().sum() for key in end)
    apart = sum((end[key] - a).abs().sum() for (key, _), a in zip(G.named_parameters(), ema))
    assert apart < 0.03 * moved


def test_ddim_equals_that_of_diffusers(batch):
    from diffusers import DDIMScheduler
    z, _, _, context, null = batch
    net, x = small_unet(), z
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear',
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(7)
    with torch.no_grad():
        for t in scheduler.timesteps:
            e0, e1 = net(x, t, null.expand(5, -1, -1)), net(x, t, context)
            x = scheduler.step(e0 + 2.5 * (e1 - e0), t, x).prev_sample
        ours = sid_lsg.ddim(net, z, context, null, 2.5, 7)
    assert (ours - x).abs().max() < 1e-5 * x.abs().max()
