"""What AdamWEMA and adamw_ema_ refuse: options and networks that cannot be meant."""

import math

import pytest
import torch
from torch import nn

from fastdmd import ops
from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import network

NAN = math.nan
BAD_OPTIONS = [
    ("learning_rate", [-1.0, NAN, math.inf], [None, "1", True, torch.tensor(1.0)]),
    ("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN)], [None, 0.9, (0.9,), (0.9, 0.9, 0.9), (None, 0.9)]),
    ("eps", [-1e-8, NAN, math.inf], [None]),
    ("weight_decay", [-1.0, NAN, math.inf], [None, "0"]),
    ("max_grad_norm", [-1.0, NAN], [None]),
    ("ema_decay", [-0.1, 1.5, NAN], ["0.9"]),
    ("warmup_steps", [-1], [None, 1.5, NAN]),
    ("decay_steps", [0, -1], [1.5, "10"]),
    ("compute_dtype", [torch.int8, torch.float64], []),
]


@pytest.mark.parametrize(("name", "values", "other_types"), BAD_OPTIONS, ids=[name for name, *_ in BAD_OPTIONS])
def test_options_out_of_range_are_named(name, values, other_types):
    for error, bad in ((ValueError, values), (TypeError, other_types)):
        for value in bad:
            net = network()
            before = net[0].weight.data_ptr()
            with pytest.raises(error, match=rf"^fastdmd.AdamWEMA: expected {name} .*got "):
                AdamWEMA(net, **{"learning_rate": 0.1, name: value})
            assert net[0].weight.data_ptr() == before


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"no_such_name": {"weight_decay": 0.0}}, r"match trained parameters .* got \['no_such_name'\]"),
        ({"weight|bias": {}, "bias": {}}, r"which no earlier one matches, got \['bias'\]"),
        ({"(": {}}, "expected a regular expression, got '\\('"),
        ({"bias": {"weight_decay": -1.0}}, "expected weight_decay of 'bias' >= 0 and finite, got -1.0"),
        ({"bias": {"learning_rate_factor": NAN}}, "expected learning_rate_factor of 'bias' >= 0 and finite, got nan"),
        ({"bias": {"lr": 1.0}}, "expected groups with weight_decay or learning_rate_factor, got"),
    ],
)
def test_groups_that_cannot_be_meant_are_named(groups, message):
    with pytest.raises(ValueError, match="^fastdmd.AdamWEMA: .*" + message):
        AdamWEMA(network(), learning_rate=0.1, groups=groups)


def test_options_of_the_op_are_checked():
    n = 4
    flat, step, rate = torch.ones(n), torch.zeros(1, dtype=torch.int64), torch.tensor(0.1)
    for name, values, other_types in [*BAD_OPTIONS[1:6], ("ema_warmup", [-1.0, NAN], [None])]:
        for error, bad in ((ValueError, values), (TypeError, other_types)):
            for value in bad:
                with pytest.raises(error, match=rf"^fastdmd.adamw_ema_: expected {name} .*got "):
                    ops.adamw_ema_(flat, flat.clone(), flat.clone(), flat.clone(), step, rate, **{name: value})
    assert flat.eq(1).all() and step.item() == 0


def test_tensors_of_the_op_are_checked():
    def arguments():
        return [torch.ones(4) for _ in range(4)] + [torch.zeros(1, dtype=torch.int64), torch.tensor(0.1)]

    for index, bad, error, message in (
        (0, None, TypeError, "expected param to be a tensor, got NoneType"),
        (0, torch.ones(2, 2), ValueError, r"expected param of shape \[n\], got \(2, 2\)"),
        (1, torch.ones(4).half().long(), TypeError, "expected grad of dtype .* or torch.float16, got torch.int64"),
        (1, torch.ones(8)[::2], ValueError, r"expected grad contiguous, got strides \(2,\)"),
        (2, torch.ones(3), ValueError, r"expected exp_avg of shape \(4,\), got \(3,\)"),
        (3, torch.ones(4, device="meta"), ValueError, "expected exp_avg_sq on cpu, got meta"),
        (5, 0.1, TypeError, "expected learning_rate of dtype torch.float32 or torch.float64, got float"),
    ):
        given = arguments()
        given[index] = bad
        with pytest.raises(error, match="^fastdmd.adamw_ema_: " + message):
            ops.adamw_ema_(*given)


BAD_NETWORKS = {
    "no module": (lambda: [nn.Parameter(torch.zeros(1))], TypeError, "network to be a torch.nn.Module, got list"),
    "no parameters": (nn.SiLU, ValueError, "with parameters that require a gradient, got a SiLU without"),
    "all fixed": (lambda: network().requires_grad_(False), ValueError, "require a gradient, got a Sequential without"),
    "bfloat16": (lambda: network().bfloat16(), TypeError, r"float32 or float64 \(.*, got 0.weight in torch.bfloat16"),
    "mixed": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()),
        TypeError,
        "expected parameters of one dtype, torch.float32 as 0.weight, got 1.weight in torch.float64",
    ),
    "two devices": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")),
        ValueError,
        "expected parameters on one device, cpu as 0.weight, got 1.weight on meta",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), ValueError, "got 0.weight, which waits for a first forward"),
}


@pytest.mark.parametrize("kind", BAD_NETWORKS)
def test_networks_that_cannot_be_flat_are_refused(kind):
    make, error, message = BAD_NETWORKS[kind]
    with pytest.raises(error, match=message):
        AdamWEMA(make(), learning_rate=0.1)
