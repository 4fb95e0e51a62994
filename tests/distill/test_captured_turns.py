"""Captured turns on a CPU: the same bits as eager ones, whatever happens between iterations and around them."""

import copy

import pytest
import torch
from torch import nn

from fastdmd import ops
from fastdmd.distill.execution import Executor
from fastdmd.networks.adapted import Adapted
from fastdmd.runs import distillation
from tests.helpers.adversarial import CONFIG, TINY, real_images
from tests.helpers.networks import make_network

CPU = torch.device("cpu")
TURNS = {"generator", "guidance", "generation"}
PLAIN = {"gan_guidance_weight": 0.0, "gan_generator_weight": None, "gan_r1_weight": 0.0, "divergence": "reverse-kl"}
PLAIN |= {"gan_features": None, "gan_translation": 0.0}


class OneConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, level):
        return self.conv(x)


def make(execution, **changes):
    config = CONFIG.replace(execution=execution, **changes)
    teacher = make_network(TINY)
    return distillation.build(config, teacher), distillation.make_draws(config, teacher, CPU, real_images())


def iterate(model, draws, steps):
    return [{name: value.item() for name, value in model.iterate(step, draws).items()} for step in steps]


def state(model):
    networks = [model.generator, model.average, model.fake_score, model.method.head]
    return torch.cat(
        [own.flatten().float() for network in networks if network is not None for own in network.parameters()]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**PLAIN},
        {"gan_features": "images", "divergence": "hellinger"},
        {"gan_features": "teacher", "accumulation_steps": 2},
        {"generator_sigmas": (80.0, 5.0, 1.0)},
        {"generator_sigmas": (80.0, 2.0), "generator_inputs": "noised-data"},
        {"precision": "bf16"},
        {"method": "sid", "sid_alpha": 1.2},
        {"ema_halflives": (20.0, 100.0)},
        {"dfake_gen_update_ratio": 1, "fake_loss_weight": "none", "clamp_images": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:--precision bf16")
def test_replayed_turns_have_the_bits_of_eager_ones(changes):
    (eager, draws), (captured, same_draws) = (make(execution, **changes) for execution in ("eager", "captured"))
    assert iterate(eager, draws, range(30)) == iterate(captured, same_draws, range(30))
    assert torch.equal(state(eager), state(captured))
    assert eager.captured_turns == set() and {"generator", "guidance"} <= captured.captured_turns
    turns = captured.executor._turns
    assert turns.keys() == TURNS and all(turn.reason is None for turn in turns.values())


def test_what_changes_between_iterations_is_seen():
    """A learning rate, options that a replay holds, the ratio, a batch of another size; and copies go on alike."""
    models = [make(execution) for execution in ("eager", "captured")]
    others = [make(execution, batch_size=4) for execution in ("eager", "captured")]
    found = []
    for (model, draws), (_, other_draws) in zip(models, others, strict=True):
        metrics = iterate(model, draws, range(12))
        for group in model.generator_optimizer.param_groups:
            group["lr"] = 3e-3
        metrics += iterate(model, draws, range(12, 16))
        for group in (*model.generator_optimizer.param_groups, *model.head_optimizer.param_groups):
            group["weight_decay"], group["betas"] = 0.3, (0.5, 0.9)
        metrics += iterate(model, draws, range(16, 30))
        with torch.no_grad():
            next(model.fake_score.parameters()).mul_(1.5)
            next(model.teacher.parameters()).mul_(0.9)
        metrics += iterate(model, draws, range(30, 34))
        metrics += iterate(model, other_draws, range(34, 48))
        model.dfake_gen_update_ratio = 3
        metrics += iterate(model, draws, range(48, 64))
        twin = copy.deepcopy(model)
        found.append(
            (metrics + iterate(model, draws, range(64, 76)), iterate(twin, draws, range(64, 76)), state(model), twin)
        )
    assert models[1][0].captured_turns == TURNS == found[1][3].captured_turns
    assert found[0][0] == found[1][0] and found[0][1] == found[1][1] == found[1][0][-12:]
    assert torch.equal(found[0][2], found[1][2]) and torch.equal(found[1][2], state(found[1][3]))


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        lambda: ops.use_backend("reference"),
        lambda: torch.autograd.set_detect_anomaly(True),
    ],
)
def test_what_is_around_an_iteration_counts(around):
    """Entered and left once turns are captured."""
    found = []
    for execution in ("eager", "captured"):
        model, draws = make(execution, **PLAIN)
        metrics = iterate(model, draws, range(12))
        with around():
            metrics += iterate(model, draws, range(12, 22))
        metrics += iterate(model, draws, range(22, 40))
        found.append((metrics, state(model), model.captured_turns))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert found[1][2] == TURNS
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        model.iterate(40, draws)


def test_networks_of_others_run_as_they_are():
    config = CONFIG.replace(**PLAIN)
    teacher = Adapted(OneConvolution(), parameterization="x0", image_shape=(1, 8, 8), num_classes=0)
    model = distillation.build(config, teacher)
    iterate(model, distillation.make_draws(config, teacher, CPU), range(12))
    assert config.for_teacher(teacher).compute.execution == model.executor.name == "eager"
    assert Executor("captured", CPU, records=False).name == Executor("captured", torch.device("meta")).name == "eager"


def test_a_graph_from_before_an_update_is_refused_after_a_replay():
    model, draws = make("captured")
    iterate(model, draws, range(12))
    assert model.captured_turns == TURNS
    loss = model.fake_score(torch.randn(2, 1, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.int64)).square().mean()
    iterate(model, draws, [12])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_update_that_is_left_out_is_left_out_by_a_replay():
    found = []
    for execution in ("eager", "captured"):
        model, draws = make(execution)

        def broken(step, draws=draws):
            drawn = draws(step)
            if step in (14, 17):
                drawn.real_images[0, 0, 0, 0] = torch.nan
            return drawn

        metrics = iterate(model, broken, range(20))
        assert [step for step, one in enumerate(metrics) if one["head_grad_norm"] != one["head_grad_norm"]] == [14, 17]
        found.append((state(model), model.guidance_tally.scalars().keys()))
        assert torch.isfinite(found[-1][0]).all()
    assert torch.equal(found[0][0], found[1][0])
