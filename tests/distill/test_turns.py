"""The turns: eager, compiled, captured, accumulated, in bfloat16, and from whichever iteration they start."""

import copy
import dataclasses
import gc

import pytest
import torch

from fastdmd.distill import ahead as ahead_module
from fastdmd.distill.turns import DMD2
from fastdmd.networks.unet import UNetConfig
from fastdmd.runs import distillation, precision
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.precision import resolve_execution, resolve_precision
from tests.helpers.networks import make_network

CONFIG = TrainConfig().replace(
    batch_size=6,
    dfake_gen_update_ratio=3,
    warmup_iterations=2,
    iterations=12,
    generator_lr=1e-3,
    fake_score_lr=2e-3,
    beta1=0.9,  # without, the first updates are the signs of gradients, where those are near zero of their rounding
    ema_decay=0.9,
)
CPU = torch.device("cpu")


def run(teacher, num_iterations=7, change=lambda step, model: None, **changes):
    """A model after some iterations, and the losses on the way."""
    config = CONFIG.replace(**changes)
    draws = distillation.make_draws(config, teacher, next(teacher.parameters()).device)
    model, losses = distillation.build(config, copy.deepcopy(teacher)), []
    for step in range(num_iterations):
        change(step, model)
        metrics = model.iterate(step, draws)
        losses.append([metrics["loss_fake"].item(), metrics["loss_dm"].item() if "loss_dm" in metrics else None])
    return model, losses


def movement(model, teacher):
    """How far generator, fake score and average went, as one vector."""
    start = torch.cat([p.flatten() for p in teacher.parameters()])
    networks = (model.generator, model.fake_score, model.generator_optimizer.ema_network)
    return torch.cat([torch.cat([p.detach().float().flatten() for p in n.parameters()]) - start for n in networks])


def difference(model, other, teacher):
    a, b = movement(model, teacher), movement(other, teacher)
    assert b.norm() > 0
    return ((a - b).norm() / b.norm()).item()


def test_images_made_ahead_are_the_same(teacher, monkeypatch):
    """Chunks of two iterations against one at a time: the same numbers to rounding."""
    ahead, losses = run(teacher)
    assert ahead.images_ahead == 2
    monkeypatch.setattr(ahead_module, "MAX_IMAGES_AHEAD", 6)
    single, expected = run(teacher)
    assert single.images_ahead == 1
    for got, want in zip(losses, expected, strict=True):
        assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert difference(ahead, single, teacher) < 1e-3


def test_chunks_end_where_the_generator_moves(teacher, monkeypatch):
    """A ratio of 10 has 9 iterations between: chunks of 9, 3 or 1, never one that reaches past a generator turn."""
    for limit, chunk in ((60, 9), (53, 3), (17, 1), (1, 1)):
        monkeypatch.setattr(ahead_module, "MAX_IMAGES_AHEAD", limit)
        assert run(teacher, 1, dfake_gen_update_ratio=10)[0].images_ahead == chunk


def test_accumulation_gives_the_gradient_of_the_whole_batch(teacher):
    whole, losses = run(teacher)
    parts, same_losses = run(teacher, accumulation_steps=3)
    assert len(parts.buffers.parts) == 3 and len(parts.buffers.parts[0].draws.noise) == 2
    torch.testing.assert_close(torch.tensor([a for a, _ in losses]), torch.tensor([a for a, _ in same_losses]))
    assert difference(parts, whole, teacher) < 2e-3


def test_batch_that_does_not_divide(teacher):
    model = distillation.build(CONFIG.replace(accumulation_steps=3, batch_size=6), teacher)
    with pytest.raises(ValueError, match="expected a batch that 3 accumulation steps divide, got 4"):
        model.iterate(0, distillation.make_draws(CONFIG.replace(batch_size=4), teacher, CPU))


def test_iterations_may_start_anywhere(teacher):
    """Iteration 5 lies inside a chunk; its x_gen does not depend on what ran before, since no generator moved."""
    draws = distillation.make_draws(CONFIG, teacher, CPU)
    model = distillation.build(CONFIG, copy.deepcopy(teacher))
    model.iterate(5, draws)
    fresh = distillation.build(CONFIG, copy.deepcopy(teacher))
    x_gen = fresh.generator(80 * draws(5).noise, torch.full((6,), 80.0), draws(5).class_labels)
    torch.testing.assert_close(model.buffers.x_gen, x_gen.detach(), rtol=1e-4, atol=1e-4)


def test_change_of_shape_and_ratio(teacher):
    """Buffers follow the batch, chunks the ratio; nothing stale is read."""
    small = CONFIG.replace(batch_size=4)
    model, draws = distillation.build(CONFIG, copy.deepcopy(teacher)), distillation.make_draws(CONFIG, teacher, CPU)
    model.iterate(0, draws)
    model.iterate(1, distillation.make_draws(small, teacher, CPU))
    assert model.buffers.x_gen.shape[0] == 4
    model.dfake_gen_update_ratio = 2
    metrics = model.iterate(2, draws)
    assert "loss_dm" in metrics and model.buffers.x_gen.shape[0] == 6 and model.images_ahead == 1


def test_change_of_parts_and_labels(teacher):
    """Another number of parts leaves the gradient that of the whole batch; labels that are gone are missed."""

    def halve(step, model):
        if step == 3:
            model.accumulation_steps = 2

    halved, _ = run(teacher, change=halve)
    whole, _ = run(teacher)
    assert len(halved.buffers.parts) == 2
    torch.testing.assert_close(halved.guidance_tally.latest, whole.guidance_tally.latest, rtol=1e-3, atol=0)
    torch.testing.assert_close(halved.generator_tally.latest, whole.generator_tally.latest, rtol=1e-3, atol=0)
    draws = distillation.make_draws(CONFIG, teacher, CPU)
    with pytest.raises(ValueError, match="fastdmd.UNet: expected class_labels"):
        whole.iterate(6, lambda step: dataclasses.replace(draws(step), class_labels=None))


def test_learning_rate_follows_the_host(teacher):
    def stop(step, model):
        if step == 3:
            model.generator_optimizer.peak_learning_rate = model.guidance_optimizer.peak_learning_rate = 0.0

    stopped, _ = run(teacher, 7, change=stop)
    early, _ = run(teacher, 3)
    assert torch.equal(stopped.generator.conv_in.weight, early.generator.conv_in.weight)
    assert torch.equal(stopped.fake_score.conv_in.weight, early.fake_score.conv_in.weight)


def test_bfloat16_follows_float32(teacher):
    """Networks in bfloat16, master weights in float32: the losses agree to the precision of the networks."""
    wide, losses = run(teacher)
    narrow, same = run(teacher, precision="bf16")
    for network in (narrow.teacher, narrow.generator, narrow.fake_score):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in narrow.generator_optimizer.ema_network.parameters()} == {torch.float32}
    for (fake, dm), (expected_fake, expected_dm) in zip(same, losses, strict=True):
        assert fake == pytest.approx(expected_fake, rel=0.05)
        assert dm is None or dm == pytest.approx(expected_dm, rel=0.05)
    a, b = movement(narrow, teacher), movement(wide, teacher)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.8


TINY = UNetConfig(image_size=8, model_channels=8, channel_multipliers=(1,), num_blocks=1, attention_resolutions=())


def test_a_new_function_of_the_same_draws_makes_no_image_again():
    """A lambda written in the loop: the same losses, and as many images through the generator."""

    teacher = make_network(TINY)

    def iterate(wrap):
        draws, model = distillation.make_draws(CONFIG, teacher, CPU), distillation.build(CONFIG, copy.deepcopy(teacher))
        sizes = []
        model.generator.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        return [model.iterate(step, wrap(draws))["loss_fake"].item() for step in range(5)], sum(sizes)

    assert iterate(lambda draws: draws) == iterate(lambda draws: lambda step: draws(step))


@pytest.mark.parametrize("change", ["noise", "fake_key", "everything"])
@pytest.mark.parametrize("others_at", [{1}, {2, 3}], ids=str)
def test_a_new_function_of_other_draws_is_followed(change, others_at):
    """In the middle of a chunk, whichever of its tensors differs, there and back: as one function all along."""
    teacher = make_network(TINY)
    draws, others = (distillation.make_draws(CONFIG.replace(seed=seed), teacher, CPU) for seed in (0, 1))

    def changed(step):
        other = others(step)
        return other if change == "everything" else dataclasses.replace(draws(step), **{change: getattr(other, change)})

    def choose(step):
        return changed if step in others_at else draws

    def iterate(function_at, steps=range(5)):
        model = distillation.build(CONFIG, copy.deepcopy(teacher))
        return [model.iterate(step, function_at(step))["loss_fake"].item() for step in steps]

    got, first = iterate(choose), min(others_at)
    assert got == iterate(lambda _: lambda step: choose(step)(step))
    unchanged = iterate(lambda _: draws)
    assert got[:first] == unchanged[:first] and got[first] != unchanged[first]
    # Iteration 2 after 4: what was drawn ahead for it by another function is forgotten.
    jump = iterate(lambda step: draws if step == 1 else changed, (1, 4, 2))
    assert jump == iterate(lambda _: lambda step: (draws if step == 1 else changed)(step), (1, 4, 2))


def assert_same_training(teacher, num_iterations, execution, *, tolerance, **changes):
    """Losses and weights after these iterations, against eager execution."""
    eager, losses = run(teacher, num_iterations, **changes, execution="eager")
    other, same = run(teacher, num_iterations, **changes, execution=execution)
    assert other.executor.name == execution
    for got, want in zip(same, losses, strict=True):
        assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert difference(other, eager, teacher) < 10 * tolerance


def test_compiled_equals_eager_after_50_iterations():
    """Measured: losses to 3e-7, the movement of the weights to 2e-4."""
    assert_same_training(make_network(TINY), 50, "compiled", tolerance=1e-4, dfake_gen_update_ratio=2)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("execution", ["compiled", "captured"])
def test_executions_agree_on_a_gpu(teacher, execution, precision, float32_units):
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    assert_same_training(teacher.cuda(), 50, execution, tolerance=tolerance, precision=precision)


@pytest.mark.cuda
def test_captured_turns_see_what_changes(teacher, float32_units):
    """Learning rate, ratio and shape, changed between replays."""
    draws = [distillation.make_draws(CONFIG.replace(batch_size=B), teacher, torch.device("cuda")) for B in (6, 4)]
    models = [
        distillation.build(CONFIG.replace(execution=execution, precision="fp32"), copy.deepcopy(teacher).cuda())
        for execution in ("eager", "captured")
    ]
    for step in range(30):
        for model in models:
            if step == 10:
                model.generator_optimizer.peak_learning_rate *= 2
            if step == 20:
                model.dfake_gen_update_ratio = 2
        eager, captured = (model.iterate(step, draws[step >= 25]) for model in models)
        assert captured["loss_fake"].item() == pytest.approx(eager["loss_fake"].item(), rel=1e-3), step


def test_nothing_grows(teacher):
    """After the first cycle an iteration leaves no tensor behind, and the buffers stay where they are."""
    draws = distillation.make_draws(CONFIG, teacher, CPU)
    model = distillation.build(CONFIG, copy.deepcopy(teacher))

    def state():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return len(tensors), model.buffers.x_gen.data_ptr(), model.buffers.inputs.noise.data_ptr()

    for step in range(12):  # until all turns are captured
        model.iterate(step, draws)
    assert len(model.captured_turns) == 3
    before = state()
    for step in range(12, 24):
        model.iterate(step, draws)
    assert state() == before


def test_defaults_per_device(monkeypatch):
    cuda = torch.device("cuda")
    assert resolve_execution("auto", CPU) == resolve_execution("auto", cuda) == "captured"
    assert (
        resolve_execution("auto", CPU, "a.UNet") == "eager" and resolve_execution("auto", cuda, "a.UNet") == "captured"
    )
    with pytest.raises(ValueError, match="expected --execution eager or compiled with a.UNet on cpu, got captured"):
        resolve_execution("captured", CPU, "a.UNet")
    assert resolve_precision("auto", CPU) == "fp32" and resolve_precision("auto", cuda) == "bf16"
    monkeypatch.setattr(precision, "has_bfloat16_arithmetic", lambda: False)
    with pytest.warns(UserWarning, match="--precision bf16: this CPU only emulates it"):
        assert resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(ValueError, match="expected --precision fp32 or bf16 on cpu, got tf32"):
        resolve_precision("tf32", CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution": "fast"}, "expected execution out of eager, compiled, captured, got fast"),
        ({"dfake_gen_update_ratio": 0}, "expected dfake_gen_update_ratio >= 1, got 0"),
        ({"accumulation_steps": 0}, "expected accumulation_steps >= 1, got 0"),
    ],
)
def test_turns_that_cannot_be(options, message):
    usual = {"generator_sigmas": (80.0,), "sigma_data": 0.5, "dfake_gen_update_ratio": 1}
    with pytest.raises(ValueError, match=f"fastdmd.DMD2: {message}"):
        DMD2(make_network(TINY), **(usual | options), generator_options={}, guidance_options={})
