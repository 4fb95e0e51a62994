"""A generator of several steps in the turns: each sample at its own, against plain PyTorch, however executed."""

import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from torch.testing import assert_close

from fastdmd.data import Dataset
from fastdmd.distill.budget import estimate
from fastdmd.distill.draws import materialised
from fastdmd.distill.gan import GANSettings
from fastdmd.distill.starts import map_tensors
from fastdmd.randomness import Stream
from fastdmd.runs import distillation
from tests.helpers.adversarial import CONFIG as ADVERSARIAL
from tests.helpers.adversarial import TINY, real_images
from tests.helpers.networks import make_network

SIGMAS = (80.0, 5.0, 0.5)
CPU = torch.device("cpu")
OFF = {"gan": GANSettings()}
CONFIG = ADVERSARIAL.replace(**OFF, generator_sigmas=SIGMAS, clamp_images=False, seed=1)  # all steps come at once
INPUTS = ["simulated", "noised-data"]


@pytest.fixture
def teacher():
    return make_network(TINY)


def make_draws(teacher, config=CONFIG, device=CPU):
    return distillation.make_draws(config, teacher, device, real_images())


def make(teacher, **changes):
    """A model whose fake score is not its teacher, and knows the steps apart, and the draws."""
    config = CONFIG.replace(**changes)
    model = distillation.build(config, copy.deepcopy(teacher))
    others = dict(make_network(teacher.config, seed=1).to(model.device).named_parameters())
    with torch.no_grad():
        for name, parameter in model.fake_score.named_parameters():
            other = others.get(name)
            if other is None:  # codes
                other = torch.linspace(-2, 2, parameter.numel(), device=model.device).view_as(parameter)
            parameter.lerp_(other, 0.1)
    return model, make_draws(teacher, config, model.device)


def levels(sigma, x):
    return torch.full(x.shape[:1], sigma, device=x.device)


def plain_images(network, draws, sigmas=SIGMAS):
    """`x_gen`, as anyone would write it down, a sample at a time."""
    images = []
    for i in range(len(draws.noise)):
        one, last = slice(i, i + 1), i % len(sigmas)
        x, labels = sigmas[0] * draws.noise[one], None if draws.class_labels is None else draws.class_labels[one]
        with torch.no_grad():
            if last > 0 and draws.start_images is not None:
                x = draws.start_images[one] + sigmas[last] * draws.noise[one]
            else:
                for k in range(last):
                    x_0 = network(x, levels(sigmas[k], x), labels)
                    x = x_0 + sigmas[k + 1] * draws.step_noise[one, k]
        images.append(network(x, levels(sigmas[last], x), labels))
    return torch.cat(images)


def test_nothing_that_one_step_draws_depends_on_the_others(teacher):
    draws, again = make_draws(teacher), make_draws(teacher)
    other = make_draws(teacher, CONFIG.replace(seed=2))
    single = make_draws(teacher, CONFIG.replace(generator_sigmas=None))
    one = materialised(draws(7))
    assert one.step_noise.shape == (6, 2, 1, 8, 8) and one.start_images is None and single(7).is_of_one_step
    assert torch.equal(one.step_noise, again(7).step_noise)
    noises = [*one.step_noise.unbind(1), *draws(8).step_noise.unbind(1), *other(7).step_noise.unbind(1)]
    noises += [one.noise, one.dm_noise, one.fake_noise]
    assert all(not torch.equal(a, b) and (a - b).std() > 1 for a, b in itertools.combinations(noises, 2))
    for name in ("noise", "class_labels", "dm_sigma", "dm_key", "fake_sigma", "fake_key"):
        assert torch.equal(getattr(draws(7), name), getattr(single(7), name))


def test_real_images_come_with_their_labels_and_are_those_of_no_discriminator(teacher):
    """But at the first step, which has the labels that are drawn."""
    noised = CONFIG.replace(generator_inputs="noised-data")
    draws, simulated = make_draws(teacher, noised), make_draws(teacher)
    both = make_draws(teacher, ADVERSARIAL.replace(generator_sigmas=SIGMAS, generator_inputs="noised-data", seed=1))
    for step in range(3):
        images, labels = real_images().random_batch(6, seed=1, step=step, stream=Stream.START_IMAGE)
        found, drawn = draws(step), simulated(step).class_labels
        assert found.step_noise is None and torch.equal(found.start_images, images)
        assert found.class_labels.tolist() == [drawn[i] if i % 3 == 0 else labels[i] for i in range(6)]
        assert torch.equal(both(step).start_images, images) and not torch.equal(both(step).real_images, images)
        assert torch.equal(both(step).class_labels, found.class_labels)
    bare = Dataset(real_images().images, None, "bare")
    unconditional = make_network(dataclasses.replace(TINY, num_classes=0))
    found = distillation.make_draws(noised, unconditional, CPU, bare)
    assert all(found(step).class_labels is None for step in range(5))
    with pytest.raises(ValueError, match="expected real images for --generator-inputs noised-data, got none"):
        distillation.make_draws(noised, teacher, CPU)


@pytest.mark.parametrize(
    ("generator_inputs", "accumulation_steps"), [("simulated", 1), ("simulated", 2), ("noised-data", 1)]
)
def test_images_and_gradient(teacher, generator_inputs, accumulation_steps):
    """Of a generator turn: the gradient goes through the last evaluation of each sample alone."""
    changes = {"generator_inputs": generator_inputs, "accumulation_steps": accumulation_steps}
    for step in range(3):
        model, draws = make(teacher, **changes, dfake_gen_update_ratio=1)
        found, update, drawn = [], model.generator_optimizer.update, materialised(draws(step))

        def keep(permitted, found=found, update=update, model=model):
            found.extend(parameter.grad.clone() for parameter in model.generator.parameters())
            return update(permitted)

        model.generator_optimizer.update = keep
        generator, fake_score = copy.deepcopy(model.generator), copy.deepcopy(model.fake_score)
        model.iterate(step, draws)

        x_gen = plain_images(generator, drawn)
        assert_close(model.buffers.x_gen, x_gen.detach(), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            x_t = x_gen + drawn.dm_sigma.view(-1, 1, 1, 1) * drawn.dm_noise
            D_real, D_fake = (D(x_t, drawn.dm_sigma, drawn.class_labels) for D in (model.teacher, fake_score))
            grad = (D_fake - D_real) / (x_gen - D_real).abs().mean((1, 2, 3), keepdim=True)
        x_gen.backward(grad / grad.numel())
        expected = torch.cat([parameter.grad.flatten() for parameter in generator.parameters()])
        got = torch.cat([gradient.flatten() for gradient in found])
        assert expected.norm() > 1e-4 and (got - expected).norm() < 1e-3 * expected.norm(), step


@pytest.mark.parametrize(
    ("ratio", "generator_inputs"), [(1, "simulated"), (2, "simulated"), (5, "simulated"), (2, "noised-data")]
)
def test_guidance_turns_have_images_of_every_step(teacher, ratio, generator_inputs):
    """Between generator turns, too, where they are made ahead, and after a jump; of the generator as it is then."""
    model, draws = make(teacher, dfake_gen_update_ratio=ratio, generator_inputs=generator_inputs)
    for step in (*range(6), 20, 23, 24):
        generator, fake_score = copy.deepcopy(model.generator), copy.deepcopy(model.fake_score)
        drawn = materialised(draws(step))
        metrics = model.iterate(step, draws)
        assert ("loss_dm" in metrics) == (step % ratio == 0) and model.images_ahead == max(1, ratio - 1)
        with torch.no_grad():
            x_gen = plain_images(generator, drawn)
            assert_close(model.buffers.x_gen, x_gen, rtol=1e-4, atol=1e-5)
            sigma = drawn.fake_sigma.view(-1, 1, 1, 1)
            D_fake = fake_score(x_gen + sigma * drawn.fake_noise, drawn.fake_sigma, drawn.class_labels)
            loss = ((sigma**-2 + 0.5**-2) * (D_fake - x_gen) ** 2).mean().item()
        assert metrics["loss_fake"].item() == pytest.approx(loss, rel=1e-3)


def losses(model, draws, steps):
    return [{name: value.item() for name, value in model.iterate(step, draws).items()} for step in steps]


def assert_same(found, expected, tolerance):
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, rel=tolerance, abs=1e-4)


@pytest.mark.parametrize("generator_inputs", INPUTS)
def test_accumulation_gives_the_losses_of_the_whole_batch(teacher, generator_inputs):
    whole = losses(*make(teacher, generator_inputs=generator_inputs), range(8))
    parts = losses(*make(teacher, generator_inputs=generator_inputs, accumulation_steps=2), range(8))
    assert_same(parts, whole, 5e-3)


def test_the_middle_of_a_run_draws_what_its_whole_does(teacher):
    """A model that is copied at iteration 5 and asked anew, by a function made anew, goes on with the same numbers."""
    model, draws = make(teacher)
    losses(model, draws, range(5))
    twin = copy.deepcopy(model)
    assert losses(model, draws, range(5, 9)) == losses(twin, make_draws(teacher), range(5, 9))


def test_compiled_equals_eager_in_a_graph_for_each_number_of_images(monkeypatch):
    """Of all samples with gradients and without, by each network, and of those that go on to further steps."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    teacher = make_network(dataclasses.replace(TINY, channel_multipliers=(1,)))
    eager = losses(*make(teacher, execution="eager"), range(10))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_same(losses(*make(teacher, execution="compiled"), range(10)), eager, 2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 7


@pytest.mark.cuda
@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 2}, {"generator_inputs": "noised-data"}], ids=str)
def test_captured_equals_eager_on_a_gpu(teacher, changes, float32_units):
    teacher = teacher.cuda()
    steps = range(60)
    eager = losses(*make(teacher, precision="fp32", execution="eager", **changes), steps)
    model, draws = make(teacher, precision="fp32", execution="captured", **changes)
    assert_same(losses(model, draws, steps), eager, 2e-2)
    assert model.captured_turns == {"generator", "generation", "guidance"}


def test_with_an_adversarial_term(teacher):
    for generator_inputs in INPUTS:
        config = ADVERSARIAL.replace(generator_sigmas=SIGMAS, generator_inputs=generator_inputs, clamp_images=False)
        model, draws = distillation.build(config, copy.deepcopy(teacher)), make_draws(teacher, config)
        for step in range(6):
            generator, drawn = copy.deepcopy(model.generator), draws(step)
            metrics = model.iterate(step, draws)
            assert_close(model.buffers.x_gen, plain_images(generator, drawn).detach(), rtol=1e-4, atol=1e-5)
            assert torch.equal(model.buffers.inputs.real_images, drawn.real_images)
            assert 0 < metrics["loss_gan_guidance"] < 10


def test_draws_of_other_steps_are_refused(teacher):
    model, draws = make(teacher)
    single = make_draws(teacher, CONFIG.replace(generator_sigmas=None))
    longer = make_draws(teacher, CONFIG.replace(generator_sigmas=(80.0, 5.0), batch_size=6))
    with pytest.raises(ValueError, match=r"^fastdmd.Generator: expected .* \(6, 2, .*, got \(6, 1, 1, 8, 8\)"):
        model.iterate(0, longer)
    one = distillation.build(CONFIG.replace(generator_sigmas=None), copy.deepcopy(teacher))
    noised = make_draws(teacher, CONFIG.replace(generator_inputs="noised-data"))
    for source in (draws, noised):
        with pytest.raises(ValueError, match=r"draws for generator_sigmas \(80.0,\), got some for several"):
            one.iterate(0, source)
    with pytest.raises(ValueError, match=r"draws for generator_sigmas \(80.0, 5.0, 0.5\), got some for one"):
        model.iterate(0, single)


def test_a_batch_that_the_steps_do_not_divide_is_refused(teacher):
    for generator_inputs in INPUTS:
        model, draws = make(teacher, generator_inputs=generator_inputs)
        with pytest.raises(ValueError, match="^fastdmd.make_images: expected a batch that 3 steps divide, got 4"):
            model.iterate(0, lambda step, draws=draws: map_tensors(lambda x: x[:4], draws(step)))
    with pytest.raises(ValueError, match="expected --batch-size that the 3 steps of --generator-sigmas divide, got 64"):
        CONFIG.replace(batch_size=64).check()
    parts = "in each of --accumulation-steps, divide, got 12"
    with pytest.raises(ValueError, match=f"expected --batch-size that the 3 steps of --generator-sigmas, {parts}"):
        CONFIG.replace(batch_size=12, accumulation_steps=6).check()


def test_the_budget_counts_what_is_simulated(teacher):
    """On average over three steps one evaluation more, in every iteration; noised images need none."""

    def budget(**changes):
        config = CONFIG.replace(**changes)
        return estimate(
            teacher,
            lambda network: distillation.build(config, network),
            6,
            CPU,
            generator_inputs=config.noise.generator_inputs,
        )

    one, several, noised = budget(generator_sigmas=None), budget(), budget(generator_inputs="noised-data")
    assert several.forward_flops == noised.forward_flops == one.forward_flops > 0
    # but for the few of statistics, which are of one of the steps
    assert several.iteration_flops - one.iteration_flops == pytest.approx(6 * one.forward_flops, rel=1e-3)
    assert noised.iteration_flops == pytest.approx(one.iteration_flops, rel=1e-3)
