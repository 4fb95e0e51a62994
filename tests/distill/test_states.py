"""The state of a model: another one goes on from it as the first does."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdmd.distill.states import (
    digest,
    digest_of_draws,
    first_not_finite,
    load_state,
    optimizers_of,
    require_same_draws,
    state_of,
)
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
    for step in range(7):
        for buffer in model.fake_score.buffers():  # as a network's own code may
            buffer.add_(1)
        states.append(saved(model))
        model.iterate(step, draws)
    expected = saved(model)
    assert len(tree_leaves(expected)) > 60
    for start in (0, 3):
        other = distillation.build(config, copy.deepcopy(teacher))
        load_state(other, states[start], start)
        for step in range(start, 7):
            if step > start:
                for buffer in other.fake_score.buffers():
                    buffer.add_(1)
            other.iterate(step, draws)
        leaves = zip(tree_leaves(expected), tree_leaves(saved(other)), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in leaves), start


def test_a_model_that_has_run_takes_over_another_state():
    """Without images that it had made ahead."""
    teacher, device = make_network(), torch.device("cpu")
    config = CONFIG.replace(gan_guidance_weight=0)
    draws, others = (distillation.make_draws(config.replace(seed=seed), teacher, device) for seed in (0, 1))
    model, other, fresh = (distillation.build(config, copy.deepcopy(teacher)) for _ in range(3))
    for step in range(2):
        model.iterate(step, draws)
        other.iterate(step, others)
    state = saved(other)
    for each in (model, fresh):
        load_state(each, state, 2)
        each.iterate(2, draws)
    leaves = zip(tree_leaves(saved(model)), tree_leaves(saved(fresh)), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in leaves)


def test_a_mask_of_infinity_is_no_fault():
    teacher = networks()["somebody's"]
    teacher.network.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    config = CONFIG.replace(gan_guidance_weight=0)
    model, other = (distillation.build(config, copy.deepcopy(teacher)) for _ in range(2))
    assert first_not_finite(optimizers_of(model), {"network.mask"}) is None
    state = saved(model)
    load_state(other, state, 0)
    assert other.fake_score.network.mask.isinf().tolist() == [False, True]
    state["generator"]["untrained"]["network.mask"][0] = torch.inf
    with pytest.raises(ValueError, match="expected generator.untrained.network.mask to be finite, got NaN or infinity"):
        load_state(other, state, 0)
    model.fake_score.network.mask[0] = torch.nan
    for masks in ((), {"network.mask"}):
        whose = "fake score" if masks else "generator"
        assert first_not_finite(optimizers_of(model), masks) == f"buffers of the {whose}, network.mask"


def test_a_digest_tells_draws_apart():
    x, y = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    assert digest(x, None, y) == digest(x.clone(), None, y)
    assert len({digest(x, y), digest(x + 1e-7, y), digest(y, x), digest(x, None)}) == 4


def test_what_an_iteration_draws_is_known_on_any_device():
    """Which draws the same but for roundings, of which a digest of all bits would know nothing but that they differ."""
    pixels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    draws = {
        "noise": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        "class_labels": torch.arange(4),
        "dm_sigma": torch.tensor([0.1, 1.0, 10.0, 80.0]),
        "dm_key": torch.tensor([1, 2, 3, 4]),
        "dm_noise": None,
        "real_images": pixels.float().div(127.5).sub(1),
    }
    expected = digest_of_draws(draws)
    rounded = {
        "noise": draws["noise"].nextafter(torch.tensor(9.0)),
        "dm_sigma": draws["dm_sigma"].nextafter(torch.tensor(99.0)),
        "real_images": pixels.float().mul(1 / 127.5).sub(1),  # as a GPU divides by a number
    }
    assert not torch.equal(rounded["real_images"], draws["real_images"])
    require_same_draws(3, expected, {**draws, **rounded})
    other = pixels.clone()
    other[2, 0, 3, 3] += 1
    for name, value in {
        "class_labels": torch.tensor([0, 1, 2, 2]),
        "dm_key": torch.tensor([1, 2, 3, 5]),
        "real_images": other.float().div(127.5).sub(1),
    }.items():
        with pytest.raises(ValueError, match="expected iteration 3 to draw what it would have, got something else"):
            require_same_draws(3, expected, {**draws, name: value})
