"""N processes of a part of the batch each learn what one of the whole batch learns."""

import copy
import dataclasses
import functools

import pytest
import torch

from fastdmd.distill.draws import materialised
from fastdmd.distill.exchange import exchange
from fastdmd.distill.gan import GANSettings
from fastdmd.distill.starts import map_tensors
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs import distillation
from tests.helpers.adversarial import CONFIG, TINY, real_images
from tests.helpers.gloo import in_processes
from tests.helpers.networks import make_network

NUM_ITERATIONS = 50
CPU = torch.device("cpu")
PLAIN = CONFIG.replace(batch_size=4, gan=GANSettings(), clamp_images=False, ema_halflives=(8.0, 40.0))
FULL = CONFIG.replace(batch_size=8, accumulation_steps=2, ema_halflives=(8.0, 40.0), divergence="reverse-kl")
CASES = {
    "plain": PLAIN,
    "adversarial, f-divergence": CONFIG.replace(batch_size=4),
    "adversarial, accumulation, averages, steps": FULL.replace(generator_sigmas=(80.0, 5.0, 0.5)),
    "score identity": PLAIN.replace(method="sid", sid_alpha=1.2, dfake_gen_update_ratio=3),
}


@pytest.fixture(autouse=True)
def no_global_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def make(config, ranks, dtype):
    """A model, and the draws of its rows."""
    torch.set_default_dtype(dtype)  # of the head
    teacher = make_network(TINY).to(dtype)
    rows = ranks.rows(config.batch_size)
    own = config.replace(batch_size=rows.stop - rows.start)
    draws = distillation.make_draws(own, teacher, CPU, real_images(), first_sample=rows.start)
    model = distillation.build(config, copy.deepcopy(teacher), process_group=ranks.group)
    if dtype == torch.float32:
        return model, draws
    return model, lambda step: materialised(
        map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, draws(step))
    )


def train(config, group=None, dtype=torch.float64, num_iterations=NUM_ITERATIONS):
    """All weights and averages after so many iterations, and what the tallies and class sums came to."""
    ranks = Ranks.of(group)
    model, draws = make(config, ranks, dtype)
    for step in range(num_iterations):
        model.iterate(step, draws)
    tallies = model.generator_tally, model.guidance_tally
    exchange([*tallies, model.class_sums], ranks)
    optimizers = [model.generator_optimizer, model.guidance_optimizer, model.head_optimizer]
    states = [optimizer.state_dict() for optimizer in optimizers if optimizer is not None]
    kinds = [part for state in states for part in state.values() if isinstance(part, dict)]
    return {
        "weights": torch.cat([value.flatten() for part in kinds for value in part.values()]),
        "start": torch.cat(
            [value.flatten() for value in make(config, ALONE, dtype)[0].generator_optimizer.weights.values()]
        ),
        "readings": [dataclasses.asdict(tally.read()) for tally in tallies],
        "class_sums": model.class_sums.state_dict()["sums"],
    }


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_processes_learn_what_one_learns(name, size, tmp_path):
    """In float64 to 1e-10, of weights, moments and averages."""
    config = CASES[name]
    alone = train(config)
    found = in_processes(size, functools.partial(train, config), tmp_path)
    moved = (alone["weights"][: len(alone["start"])] - alone["start"]).abs().max()
    assert moved > 1e-3
    for one in found:
        assert torch.equal(one["weights"], found[0]["weights"])
    assert (found[0]["weights"] - alone["weights"]).abs().max() < 1e-10
