"""NaN and infinity in a turn: its update moves nothing, and what was broken first has a name."""

import copy
import dataclasses
import math

import pytest
import torch

from fastdmd.distill.guard import Fault, Guard, marks
from fastdmd.distill.methods import Matched
from fastdmd.distill.states import first_not_finite, optimizers_of
from fastdmd.distill.tally import Tally
from fastdmd.optim import AdamWEMA
from fastdmd.runs import distillation
from tests.distill.test_turns import CONFIG, CPU
from tests.helpers import adversarial
from tests.helpers.networks import make_network

NAN = math.nan
AT = 3  # the iteration that breaks, with a generator turn


@dataclasses.dataclass(frozen=True)
class Overflowing(Matched):
    """A loss beyond float32, whose gradient is not."""

    def guidance_terms(self, x_gen, draws, **options):
        terms = super().guidance_terms(x_gen, draws, **options)
        return dataclasses.replace(terms, scalars={"loss_fake": terms.total * math.inf})


def spoil_output(network, value):
    return network.register_forward_hook(lambda module, given, x: x + value)


def spoil_gradient(parameter):
    return parameter.register_hook(lambda grad: grad * NAN)


def overflow(model):
    method = model.method
    model.method = Overflowing(method.sigma_data)
    return type("Handle", (), {"remove": lambda self: setattr(model, "method", method)})()


# How it breaks; what is said to be broken first; whose updates are left out.
KINDS = {
    "teacher": (lambda m: spoil_output(m.teacher, NAN), "teacher's output", {"generator"}),
    "fake score": (lambda m: spoil_output(m.fake_score, math.inf), "fake score's output", {"generator", "fake_score"}),
    "generator": (lambda m: spoil_output(m.generator, NAN), "generated image", {"generator", "fake_score"}),
    "gradient": (
        lambda m: spoil_gradient(m.generator.conv_in.weight),
        "gradient of the generator",
        {"generator"},
    ),
    "gradient of the fake score": (
        lambda m: spoil_gradient(m.fake_score.conv_in.weight),
        "gradient of the fake score",
        {"fake_score"},
    ),
    "loss": (overflow, "loss_fake", {"fake_score"}),
}


def states(model):
    """All tensors that updates move, by whose they are; not the number of updates that were asked for."""
    kinds = ("param", "exp_avg", "exp_avg_sq", "ema", "ema_2")
    found = {}
    for name, optimizer in optimizers_of(model).items():
        state = optimizer.state_dict()
        found[name] = [x for kind in kinds for x in state.get(kind, {}).values()] + state["steps"]
    return found


def moved(before, after):
    return {name for name in before if not all(map(torch.equal, before[name], after[name]))}


def run(teacher, spoil, num_iterations, policy="skip", **changes):
    """The model, and whose state each iteration moved."""
    config = CONFIG.replace(ema_halflives=(4.0, 40.0), nan_policy=policy, **changes)
    draws = distillation.make_draws(config, teacher, CPU)
    model, found = distillation.build(config, copy.deepcopy(teacher)), []
    for step in range(num_iterations):
        before = states(model)
        handle = spoil(model) if step == AT else None
        model.iterate(step, draws)
        if handle is not None:
            handle.remove()
        found.append(moved(before, states(model)))
    return model, found


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_with_nan_moves_nothing_and_the_next_one_does(teacher, kind, parts):
    spoil, name, left_out = KINDS[kind]
    model, found = run(teacher, spoil, 7, accumulation_steps=parts)
    both = {"generator", "fake_score"}
    expected = [both if step % 3 == 0 else {"fake_score"} for step in range(7)]
    expected[AT] = both - left_out
    num_left_out = 1
    if kind == "generator":  # which has made the images of the next two iterations, too
        expected[AT + 1 : AT + 3] = [set(), set()]
        num_left_out = 3
    assert found == expected
    generator, guidance = model.generator_tally.read(), model.guidance_tally.read()
    assert (generator.num_good, generator.num_bad) == ((2, 1) if "generator" in left_out else (3, 0))
    assert (guidance.num_good, guidance.num_bad) == (
        (7 - num_left_out, num_left_out) if "fake_score" in left_out else (7, 0)
    )
    first = generator.fault or guidance.fault
    assert first == Fault(AT + 1, name) and str(first) == f"NaN or infinity in {name}, iteration 4"
    assert model.generator_tally.fault() is None and first_not_finite(optimizers_of(model)) is None


def test_as_if_the_iteration_had_no_update():
    """What follows is what an optimizer makes of the other gradients alone."""
    network = torch.nn.Linear(3, 2)
    torch.manual_seed(0)
    inputs = torch.randn(5, 4, 3)
    results = []
    for permitted in ([True, True, False, True, True], [True, True, None, True, True]):
        one = copy.deepcopy(network)
        optimizer = AdamWEMA(one, learning_rate=0.1, ema_decay=(0.5, 0.9), groups={"bias": {"weight_decay": 0.0}})
        for x, permit in zip(inputs, permitted, strict=True):
            if permit is not None:
                optimizer.backward(one(x).square().sum())
                optimizer.advance()
                norm = optimizer.update(torch.tensor(permit))
                assert norm.isfinite() == permit
        state = optimizer.state_dict()
        results.append([x for kind in ("param", "exp_avg", "exp_avg_sq", "ema", "ema_2") for x in state[kind].values()])
        assert [step.item() for step in state["steps"]] == [4, 4]
    assert all(map(torch.equal, *results)) and len(results[0]) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_fault_is_the_last_thing_that_happens(teacher, kind):
    """With "stop", whenever the host looks: the weights are those of before, the fault is the first one."""
    spoil, name, left_out = KINDS[kind]
    model, found = run(teacher, spoil, 8, "stop")
    after = set() if "generator" in left_out else {"generator"}
    assert found[AT] == after and found[AT + 1 :] == [set()] * 4 and found[AT - 1] == {"fake_score"}
    faults = [fault for fault in (model.generator_tally.fault(), model.guidance_tally.fault()) if fault is not None]
    assert faults == [Fault(AT + 1, name)]


def test_one_image_of_the_teacher_costs_that_image_or_the_run(teacher):
    """Of a batch of six: the others are matched with "skip"."""

    def spoil(model):
        return model.teacher.register_forward_hook(lambda module, given, x: torch.cat([x[:1] * NAN, x[1:]]))

    model, found = run(teacher, spoil, 5)
    assert found[AT] == {"generator", "fake_score"}
    reading = model.generator_tally.read()
    assert reading.left_out == pytest.approx(1 / 6) and reading.num_bad == 0
    assert reading.fault == Fault(AT + 1, "teacher's output")
    model, found = run(teacher, spoil, 5, "stop")
    assert found[AT:] == [set(), set()] and model.generator_tally.fault() == Fault(AT + 1, "teacher's output")


def test_a_real_image_is_named():
    network = make_network(adversarial.TINY)
    draws = distillation.make_draws(adversarial.CONFIG, network, CPU, adversarial.real_images())
    model = distillation.build(adversarial.CONFIG, network)
    before = states(model)
    broken = lambda step: dataclasses.replace(draws(step), real_images=draws(step).real_images * math.inf)  # noqa: E731
    model.iterate(1, broken)
    assert moved(before, states(model)) == set()
    assert model.guidance_tally.read().fault == Fault(2, "real image")


@pytest.mark.parametrize("kind", ["weights", "exp_avg_sq", "ema_2"])
def test_broken_weights_moments_and_averages_have_names(teacher, kind):
    model, _ = run(teacher, lambda model: None, 1)
    name = "param" if kind == "weights" else kind
    model.generator_optimizer.state_views()[name]["conv_in.weight"][1, 0, 2, 2] = NAN
    assert first_not_finite(optimizers_of(model)) == f"{kind} of the generator, conv_in.weight"


def test_marks_see_every_element_whatever_its_size():
    images = torch.full((2, 3, 4, 4), 3e38)
    assert marks(images, None, None, None).tolist() == [0, 0, 0, 0]
    for value in (NAN, math.inf, -math.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            broken = images.to(dtype).contiguous(memory_format=torch.channels_last)
            broken[1, 2, 3, 3] = value
            found = marks(images, None, broken, images.double())
            assert found.isfinite().tolist() == [True, True, False, True]


def test_a_tally_keeps_its_first_fault_when_a_run_goes_on():
    guard = Guard(CPU)
    tally, other = (Tally(("loss", "grad_norm"), CPU, guard=guard) for _ in range(2))
    for iteration, (loss, norm) in enumerate([(1, 1), (1, math.inf), (NAN, 1)]):
        guard.begin(iteration)
        tally.add(torch.tensor(float(loss)), torch.tensor(float(norm)))
    other.load_state_dict(tally.state_dict())
    assert tally.fault() == other.fault() == Fault(2, "gradient")
    assert other.read().num_bad == 2 and other.read().fault is None
