"""The adversarial term in the turns: against plain PyTorch, however it is executed, copied and cut in parts."""

import copy
import dataclasses
import functools
import pickle
import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from fastdmd import ops
from fastdmd.distill.draws import materialised
from fastdmd.distill.gan import GANSettings
from fastdmd.distill.methods import R1_DEVIATION, Matched
from fastdmd.distill.starts import map_tensors, same_start
from fastdmd.distill.turns import DMD2
from fastdmd.runs import distillation
from tests.helpers.adversarial import CONFIG, TINY, real_images, shifted
from tests.helpers.networks import make_network

CPU = torch.device("cpu")
OFF = {"gan": GANSettings()}


@pytest.fixture
def teacher():
    return make_network(TINY)


def make(teacher, **changes) -> tuple[DMD2, object]:
    config = CONFIG.replace(**changes)
    draws = distillation.make_draws(config, teacher, next(teacher.parameters()).device, real_images())
    return distillation.build(config, copy.deepcopy(teacher)), draws


def state(model):
    networks = model.generator, model.fake_score, model.method.head
    return torch.cat([p.detach().double().flatten() for network in networks for p in network.parameters()])


def run(teacher, num_iterations, **changes):
    model, draws = make(teacher, **changes)
    metrics = [{k: v.item() for k, v in model.iterate(step, draws).items()} for step in range(num_iterations)]
    return model, metrics


def assert_close_metrics(got, expected, rel):
    assert [metrics.keys() for metrics in got] == [metrics.keys() for metrics in expected]
    for mine, theirs in zip(got, expected, strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=rel, abs=1e-7), name


def moved(model, teacher, **changes):
    """How far everything went that is trained, of a model that was made with these changes."""
    return state(model) - state(make(teacher, **changes)[0])


def relative(a, b):
    assert b.norm() > 0
    return ((a - b).norm() / b.norm()).item()


# The terms, written down once more.


def per_image(values):
    return values[:, None, None, None]


def plain_logit(head, network, x, sigma, noise, labels, extra=0.0):
    if network is None:
        return head(x + per_image(sigma) * noise + extra, sigma, labels)
    features = []
    handle = network.middle[-1].register_forward_hook(lambda module, arguments, output: features.append(output))
    network(x + per_image(sigma) * noise + extra, sigma, labels)
    handle.remove()
    return head(features[0])


WEIGHTS = {"forward-kl": lambda r: r, "jensen-shannon": lambda r: r / (1 + r), "hellinger": lambda r: r**0.5 / 4}


def in_float64(teacher, draws, **changes):
    """The method of a model whose networks differ, in float64, and draws of that precision."""
    model, _ = make(teacher, **changes)
    fake_score = make_network(TINY, seed=1).double().requires_grad_(True)
    method = model.method
    method.head.double()
    draws = map_tensors(lambda x: x.double() if x.is_floating_point() else x, draws)
    return method, teacher.double(), fake_score, draws


@pytest.mark.parametrize("divergence", ["reverse-kl", *WEIGHTS])
@pytest.mark.parametrize("whose", ["fake", "teacher", "images"])
def test_generator_terms_are_the_plain_ones(teacher, whose, divergence):
    drawn = make(teacher)[1](3)
    method, teacher, fake, draws = in_float64(teacher, drawn, gan_features=whose, divergence=divergence)
    encoder, labels = {"fake": fake, "teacher": teacher, "images": None}[whose], draws.class_labels
    x_gen = torch.randn(6, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    terms = method.generator_terms(x_gen, draws, teacher=teacher, fake_score=fake, generate=None)
    draws = materialised(draws)

    x_t = x_gen.detach() + per_image(draws.dm_sigma) * draws.dm_noise
    D_real, D_fake = (network(x_t, draws.dm_sigma, labels).detach() for network in (teacher, fake))
    grad = ops.dm_gradient(x_gen.detach(), D_real, D_fake)
    assert terms.scalars["loss_dm"].item() == pytest.approx(0.5 * (grad**2).mean().item(), rel=1e-9)
    if divergence != "reverse-kl":
        r = plain_logit(method.head, encoder, x_gen, draws.dm_sigma, draws.dm_noise, labels).detach().exp()
        h = WEIGHTS[divergence](r)
        assert h.std() > 1e-3 and r.max() < 100
        grad = per_image(h / h.mean()) * grad
    moved = shifted(x_gen, draws.gan_shift)
    logit = plain_logit(method.head, encoder, moved, draws.gan_sigma, draws.gan_noise, labels)
    loss = F.softplus(-logit).mean()
    assert terms.scalars.keys() == {"loss_dm", "loss_gan_generator"} == set(method.generator_scalars)
    assert_close(terms.scalars["loss_gan_generator"], loss)
    (adversarial,) = torch.autograd.grad(CONFIG.gan.gan_generator_weight * loss, x_gen)
    assert adversarial.abs().max() > 1e-8
    (got,) = torch.autograd.grad(terms.total, x_gen)
    assert_close(got, grad / grad.numel() + adversarial)


@pytest.mark.parametrize("r1_weight", [0.0, 0.5])
@pytest.mark.parametrize("whose", ["fake", "teacher", "images"])
def test_guidance_terms_are_the_plain_ones(teacher, whose, r1_weight):
    """Gradients of the fake score and of the head, from one pass and from passes apart."""
    drawn = make(teacher)[1](3)
    method, teacher, fake, draws = in_float64(teacher, drawn, gan_features=whose, gan_r1_weight=r1_weight)
    head = method.head
    x_gen = torch.randn(6, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    terms = method.guidance_terms(x_gen, draws, teacher=teacher, fake_score=fake)
    draws = materialised(draws)

    sigma, encoder = draws.fake_sigma, {"fake": fake, "teacher": teacher, "images": None}[whose]
    D_fake = fake(x_gen.detach() + per_image(sigma) * draws.fake_noise, sigma, draws.class_labels)
    loss_fake = (per_image(sigma**-2 + 0.5**-2) * (D_fake - x_gen.detach()) ** 2).mean()
    moved, real_images = shifted(x_gen.detach(), draws.gan_shift), shifted(draws.real_images, draws.real_shift)
    logit_gen = plain_logit(head, encoder, moved, draws.gan_sigma, draws.gan_noise, draws.class_labels)
    real = real_images, draws.real_sigma, draws.real_noise, draws.real_labels
    logit_real = plain_logit(head, encoder, *real)
    loss_gan = F.softplus(logit_gen).mean() + F.softplus(-logit_real).mean()
    right = ((logit_gen < 0).sum() + (logit_real > 0).sum()) / 12
    scalars, total = {"loss_fake": loss_fake, "loss_gan_guidance": loss_gan, "gan_right": right}, loss_gan
    if r1_weight:
        small = R1_DEVIATION * per_image((draws.real_sigma**2 + 0.25).sqrt()) * draws.gan_noise
        scalars["gan_r1"] = ((logit_real - plain_logit(head, encoder, *real, extra=small)) ** 2).mean()
        assert scalars["gan_r1"] > 1e-8
        total = total + r1_weight * scalars["gan_r1"]
    assert terms.scalars.keys() == scalars.keys() == set(method.guidance_scalars)
    for name, value in scalars.items():
        assert_close(terms.scalars[name], value, msg=name)

    total = CONFIG.gan.gan_guidance_weight * total
    for loss, expected, network in ((terms.total, loss_fake + total, fake), (terms.head, total, head)):
        weights = list(network.parameters())
        got = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        want = torch.autograd.grad(expected, weights, allow_unused=True, retain_graph=True)
        for mine, theirs in zip(got, want, strict=True):
            assert_close(mine, theirs)
    for loss in (terms.total, terms.head):
        assert torch.autograd.grad(loss, x_gen, allow_unused=True, retain_graph=True) == (None,)


def test_without_weights_there_is_no_term(teacher):
    """The method, the scalars and the random inputs are those of distribution matching alone."""
    off = CONFIG.replace(**OFF)
    model, draws = distillation.build(off, teacher), distillation.make_draws(off, teacher, CPU)
    assert model.method == Matched(sigma_data=0.5) and model.head_optimizer is None
    assert model.iterate(0, draws).keys() == {"loss_dm", "generator_grad_norm", "loss_fake", "fake_grad_norm"}
    off.for_teacher(teacher).check()  # levels and a rate that are filled in are no settings of a term
    both = make(teacher)[1](4)
    assert same_start(draws(4), both)
    for name in ("dm_sigma", "dm_key", "fake_sigma", "fake_key"):
        assert torch.equal(getattr(draws(4), name), getattr(both, name))


@pytest.mark.parametrize("dynamics", ["edm", "flow"])
def test_the_other_loss_is_what_it_was(dynamics):
    """Of the first iteration, where every network is still its teacher, from one pass of the encoder."""
    teacher = make_network(dataclasses.replace(TINY, dynamics=dynamics))
    off, on = (run(teacher, 1, **changes)[1][0] for changes in (OFF, {}))
    assert on["loss_fake"] == pytest.approx(off["loss_fake"], rel=1e-5) and off["loss_fake"] > 0.1
    assert 0 < on["loss_gan_guidance"] < 10


def test_draws_are_a_function_of_seed_and_step(teacher):
    draws, again, other = (make(teacher, seed=seed)[1] for seed in (0, 0, 1))
    images, labels = real_images().random_batch(6, seed=0, step=5)
    assert torch.equal(draws(5).real_images, images) and torch.equal(draws(5).real_labels, labels)
    names = {name for name, value in vars(draws(5)).items() if isinstance(value, torch.Tensor)}
    names -= {"class_labels", "real_labels"}
    for name in names:
        value = getattr(draws(5), name)
        assert torch.equal(value, getattr(again(5), name))
        assert not torch.equal(value, getattr(draws(6), name)) and not torch.equal(value, getattr(other(5), name))
    noises = [getattr(materialised(draws(5)), f"{name}noise") for name in ("", "dm_", "fake_", "gan_", "real_")]
    assert all(not torch.equal(a, b) for a in noises for b in noises if a is not b)


def test_levels_are_those_up_to_the_greatest(teacher):
    limits = {"num_train_timesteps": 10, "divergence": "reverse-kl"}
    levels = CONFIG.replace(**limits).noise.for_teacher(teacher).levels(CPU)
    for limit, expected in ((None, 10), (levels[3].item(), 4), (levels[0].item(), 1)):
        drawn = [make(teacher, gan_max_sigma=limit, batch_size=60, **limits)[1](step) for step in range(4)]
        for name in ("gan_sigma", "real_sigma"):
            assert torch.equal(torch.cat([getattr(d, name) for d in drawn]).unique(), levels[:expected])


def test_the_greatest_level_as_it_is_written(teacher):
    """What an error names is enough, though levels are float32."""
    levels = CONFIG.noise.for_teacher(teacher).levels(CPU)
    for divergence, index, too_low in (("reverse-kl", 0, 1e-3), ("forward-kl", 980, 72.0)):
        with pytest.raises(ValueError, match=f"got {too_low}") as error:
            CONFIG.replace(divergence=divergence, gan_max_sigma=too_low).for_teacher(teacher)
        named = float(re.search(r"--gan-max-sigma >= ([0-9.]+),", str(error.value)).group(1))
        gan = CONFIG.replace(divergence=divergence, gan_max_sigma=named).for_teacher(teacher).gan
        assert gan.num_levels(levels) == index + 1


def test_everything_is_trained_and_nothing_else(teacher):
    model, metrics = run(teacher, 2)
    first = {"loss_dm", "loss_gan_generator", "generator_grad_norm", "loss_fake", "loss_gan_guidance", "gan_r1"}
    first |= {"gan_right"}
    assert metrics[0].keys() == first | {"fake_grad_norm", "head_grad_norm"}
    assert all(0 < value < 100 for name, value in metrics[0].items() if name != "loss_dm")  # which begins at 0
    assert model.head_optimizer.num_updates == 2 and model.head_optimizer.learning_rate(0) == 2e-3
    start, change = list(make(teacher)[0].method.head.parameters()), list(model.method.head.parameters())
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(start, change, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.teacher.parameters(), teacher.parameters(), strict=True))
    model.generator_turn()
    for network in (model.fake_score, model.method.head):
        assert all(parameter.grad.eq(0).all() for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_a_head_of_its_own_rate(teacher):
    fixed, _ = run(teacher, 3, gan_lr=1e-30)
    for a, b in zip(fixed.method.head.parameters(), make(teacher)[0].method.head.parameters(), strict=True):
        assert_close(a, b)
    assert fixed.guidance_optimizer.learning_rate(0) == 2e-3


def test_the_discriminator_learns(teacher):
    """Real images of noise, which no generator makes: told apart within a few iterations."""
    _, metrics = run(teacher, 20, gan_max_sigma=1.0, gan_guidance_weight=1.0, divergence="reverse-kl")
    losses = [metric["loss_gan_guidance"] for metric in metrics]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_accumulation_gives_the_gradient_of_the_whole_batch(teacher):
    whole, metrics = run(teacher, 5, divergence="reverse-kl")
    parts, same = run(teacher, 5, divergence="reverse-kl", accumulation_steps=3)
    assert len(parts.buffers.parts[0].draws.real_images) == 2
    assert_close_metrics(same, metrics, 2e-3)
    assert relative(moved(parts, teacher), moved(whole, teacher)) < 5e-3


def test_compiled_equals_eager(monkeypatch):
    """Traced and differentiated as a whole, without the minutes that kernels take."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    teacher = make_network(dataclasses.replace(TINY, channel_multipliers=(1,)))
    eager, metrics = run(teacher, 6, divergence="reverse-kl")
    compiled, same = run(teacher, 6, divergence="reverse-kl", execution="compiled")
    assert_close_metrics(same, metrics, 1e-3)
    assert relative(moved(compiled, teacher), moved(eager, teacher)) < 2e-3


@pytest.mark.cuda
@pytest.mark.parametrize(
    "changes", [{}, {"gan_features": "teacher", "accumulation_steps": 2}, {"gan_features": "images"}], ids=str
)
def test_captured_equals_eager_on_a_gpu(teacher, changes, float32_units):
    eager, metrics = run(teacher.cuda(), 20, precision="fp32", execution="eager", **changes)
    captured, same = run(teacher.cuda(), 20, precision="fp32", execution="captured", **changes)
    assert captured.captured_turns == {"generator", "guidance", "generation"}
    assert_close_metrics(same, metrics, 1e-2)
    teacher, alike = teacher.cuda(), {"precision": "fp32", **changes}
    assert relative(moved(captured, teacher, **alike), moved(eager, teacher, **alike)) < 1e-2


def test_bfloat16_follows_float32(teacher):
    wide, metrics = run(teacher, 4)
    narrow, same = run(teacher, 4, precision="bf16")
    assert {p.dtype for p in narrow.method.head.parameters()} == {torch.bfloat16}
    for mine, theirs in zip(same, metrics, strict=True):
        assert mine["loss_gan_guidance"] == pytest.approx(theirs["loss_gan_guidance"], rel=0.05)
    assert F.cosine_similarity(moved(narrow, teacher), moved(wide, teacher), dim=0) > 0.8


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_go_on_by_themselves(teacher, copy_of):
    model, draws = make(teacher)
    for step in range(3):
        model.iterate(step, draws)
    twin = copy_of(model)
    assert twin.head_optimizer.network is twin.method.head is not model.method.head
    before = state(model)
    for step in range(3, 6):
        twin.iterate(step, draws)
    assert torch.equal(state(model), before)
    for step in range(3, 6):
        model.iterate(step, draws)
    assert torch.equal(state(model), state(twin)) and not torch.equal(state(model), before)


def test_buffers_follow_the_kind_of_draws(teacher):
    """Real images are read where they are; draws without are refused, and the next ones with them serve again."""
    model, draws = make(teacher)
    model.iterate(0, draws)
    inputs = model.buffers.inputs
    model.iterate(1, draws)
    assert model.buffers.inputs is inputs and torch.equal(inputs.real_images, draws(1).real_images)
    plain = distillation.make_draws(CONFIG.replace(**OFF), teacher, CPU)
    with pytest.raises(ValueError, match="fastdmd.Adversarial: expected draws with real images, got some without"):
        model.iterate(2, plain)
    assert "loss_gan_generator" in model.iterate(2, draws)
