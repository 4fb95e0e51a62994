"""The state of a model: another one goes on from it as the first does."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdmd.distill.states import digest, load_state, state_of
from fastdmd.networks.adapted import Adapted
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from tests.helpers import foreign
from tests.helpers.networks import make_network

CONFIG = TrainConfig().replace(
    teacher="another",
    batch_size=4,
    dfake_gen_update_ratio=4,
    warmup_iterations=3,
    iterations=12,
    beta1=0.9,
    ema_halflives=(3.0, 50.0),
)


def networks():
    torch.manual_seed(0)
    options = {"parameterization": "x0", "image_shape": (1, 8, 8), "num_classes": 3, "sigma_data": 0.5}
    return {"ours": make_network(), "somebody's": Adapted(foreign.build(), **options).eval()}


def saved(model):
    """As a checkpoint keeps it."""
    return tree_map_only(torch.Tensor, lambda value: value.detach().clone().contiguous(), state_of(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ours", "somebody's"])
def test_a_model_goes_on_from_the_state_of_another(name, precision):
    """At any iteration, images made ahead among them; with buffers that change, ties and weights of low precision."""
    teacher = networks()[name]
    config = CONFIG.replace(precision=precision, gan_guidance_weight=0)
    draws = distillation.make_draws(config, teacher, torch.device("cpu"))
    model, states = distillation.build(config, copy.deepcopy(teacher)), []
    for step in range(9):
        for buffer in model.fake_score.buffers():  # as a network's own code may
            buffer.add_(1)
        states.append(saved(model))
        model.iterate(step, draws)
    expected = saved(model)
    assert len(tree_leaves(expected)) > 60
    for start in (0, 3, 5, 6):
        other = distillation.build(config, copy.deepcopy(teacher))
        load_state(other, states[start])
        for step in range(start, 9):
            if step > start:
                for buffer in other.fake_score.buffers():
                    buffer.add_(1)
            other.iterate(step, draws)
        leaves = zip(tree_leaves(expected), tree_leaves(saved(other)), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in leaves), start


def test_a_digest_tells_draws_apart():
    teacher = make_network()
    first, again = (
        distillation.make_draws(CONFIG.replace(gan_guidance_weight=0), teacher, torch.device("cpu")) for _ in range(2)
    )
    other = distillation.make_draws(CONFIG.replace(gan_guidance_weight=0, seed=1), teacher, torch.device("cpu"))
    assert digest(first(3)) == digest(again(3)) and len({digest(first(3)), digest(first(4)), digest(other(3))}) == 3
