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
from fastdmd.shards import whole
from tests.helpers.adversarial import CONFIG, TINY, real_images
from tests.helpers.gloo import in_processes
from tests.helpers.networks import make_network

NUM_ITERATIONS = 50
CPU = torch.device("cpu")
PLAIN = CONFIG.replace(batch_size=4, gan=GANSettings(), clamp_images=False, ema_halflives=(8.0, 40.0))
FULL = CONFIG.replace(batch_size=8, accumulation_steps=2, ema_halflives=(8.0, 40.0), divergence="reverse-kl")
CASES = {
    "plain": PLAIN,
    "f-divergence": CONFIG.replace(batch_size=4),
    "everything": FULL.replace(generator_sigmas=(80.0, 5.0), batch_size=16),
    "score identity": PLAIN.replace(method="sid", sid_alpha=1.2, dfake_gen_update_ratio=3),
}


@pytest.fixture(autouse=True)
def no_global_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def make(config, ranks, dtype, shard=False):
    """A model, of which each process has all or a part, and the draws of its rows."""
    torch.set_default_dtype(dtype)  # of the head
    teacher = make_network(TINY).to(dtype)
    rows = ranks.rows(config.batch_size)
    config = config.replace(shard=shard)
    own = config.replace(batch_size=rows.stop - rows.start)
    draws = distillation.make_draws(own, teacher, CPU, real_images(), first_sample=rows.start)
    model = distillation.build(config, copy.deepcopy(teacher), process_group=ranks.group)
    if dtype == torch.float32:
        return model, draws
    return model, lambda step: materialised(
        map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, draws(step))
    )


def train(config, group=None, dtype=torch.float64, num_iterations=NUM_ITERATIONS, shard=False):
    """All weights and averages after so many iterations, and what the tallies and class sums came to."""
    ranks = Ranks.of(group)
    model, draws = make(config, ranks, dtype, shard)
    for step in range(num_iterations):
        model.iterate(step, draws)
    tallies = model.generator_tally, model.guidance_tally
    exchange([*tallies, model.class_sums], ranks)
    optimizers = [model.generator_optimizer, model.guidance_optimizer, model.head_optimizer]
    states = [optimizer.state_dict() for optimizer in optimizers if optimizer is not None]
    kinds = [part for state in states for part in state.values() if isinstance(part, dict)]
    start = make(config, ALONE, dtype)[0].generator_optimizer.weights
    return {
        "state": torch.cat([whole(value).flatten() for part in kinds for value in part.values()]),
        "moved": torch.cat([(whole(value) - start[name]).flatten() for name, value in states[0]["param"].items()]),
        "readings": [dataclasses.asdict(tally.read()) for tally in tallies],
        "class_sums": model.class_sums.state_dict()["sums"],
    }


def shown(reading):
    """What a line of the log says of it, as numbers, but for the spread of images, which a process knows of its own."""
    assert reading["fault"] is None
    found = {**reading["means"], **{name: value for name, value in reading.items() if name not in ("means", "fault")}}
    return {name: value for name, value in found.items() if name != "spread"}


@pytest.mark.parametrize(
    ("name", "size"), [("plain", 4), ("f-divergence", 2), ("everything", 2), ("score identity", 2)]
)
def test_processes_learn_what_one_learns(name, size, tmp_path):
    """Weights, moments and averages in float64, to 1e-10; what the log tells to the rounding of its sums, float32."""
    config = CASES[name]
    alone = train(config)
    found = in_processes(size, functools.partial(train, config), tmp_path)
    assert all(torch.equal(one["state"], found[0]["state"]) for one in found)
    assert (found[0]["state"] - alone["state"]).abs().max() < 1e-10
    assert alone["moved"].abs().max() > 1e-3
    for one in found:
        for mine, theirs in zip(one["readings"], alone["readings"], strict=True):
            assert shown(mine) == pytest.approx(shown(theirs), rel=1e-5, abs=1e-7)
        if config.batch_size > size:
            spread = alone["readings"][0]["means"]["spread"]
            assert one["readings"][0]["means"]["spread"] == pytest.approx(spread, rel=0.2)
    sums = [one["class_sums"] for one in found]
    torch.testing.assert_close(sums[0], alone["class_sums"])
    assert all(other.count_nonzero() == 0 for other in sums[1:])


def test_float32_to_rounding(tmp_path):
    """Of how far the generator went in ten iterations, a thousandth. Where a gradient is little more than its rounding,
    Adam, which divides by its size, takes a weight elsewhere by up to the rate, 1e-3: no bound of single weights."""
    alone = train(FULL, None, torch.float32, 10)["moved"]
    task = functools.partial(train, FULL, dtype=torch.float32, num_iterations=10)
    found = [one["moved"] for one in in_processes(2, task, tmp_path)]
    assert torch.equal(*found) and alone.norm() > 1e-2
    assert (found[0] - alone).norm() < 1e-3 * alone.norm(), (found[0] - alone).norm() / alone.norm()
