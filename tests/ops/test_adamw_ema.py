"""adamw_ema_ against the reference in float64 and against torch's own AdamW, clipping and averaging."""

import math

import pytest
import torch
from torch.testing import assert_close

from fastdmd import ops
from tests.helpers.op_cases import (
    DEVICES,
    TOLERANCES,
    adamw_arguments,
    assert_within_budget,
    available,
    run_adamw,
    slack,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_grad_norm", [5.0, math.inf])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "shadow_dtype"),
    [
        (torch.float32, torch.float32, None),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float64, torch.float64, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_adamw_error_budget(dtype, grad_dtype, shadow_dtype, max_grad_norm, device):
    tensors, scalars = adamw_arguments(dtype, grad_dtype, shadow_dtype, device, max_grad_norm=max_grad_norm)
    found = ops.implementations("adamw_ema_", device)
    expected = run_adamw(found["reference"], tensors, scalars)
    truth = run_adamw(found["reference"], tensors, scalars, torch.float64)
    assert expected["step"].item() == 4 and expected["norm"] > 5
    for implementation in available("adamw_ema_", device):
        results = run_adamw(found[implementation], tensors, scalars)
        for name, result in results.items():
            if result is not None:
                tolerance = slack(implementation, device) * TOLERANCES.get(result.dtype, 0)
                assert_within_budget(result, expected[name], truth[name].double(), tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_adamw_is_torch_adamw(device):
    """Clipping, three steps of AdamW and the average, on several tensors, against torch's own."""
    torch.manual_seed(0)
    flat = torch.randn(1000, device=device, dtype=torch.float64)
    parameters = [torch.nn.Parameter(part.clone()) for part in flat.split([400, 350, 250])]
    reference = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.3)
    average = [p.detach().clone() for p in parameters]
    state = [torch.zeros_like(flat) for _ in range(2)]
    step, learning_rate = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor(1e-2, device=device)
    ema = flat.clone()
    for _ in range(3):
        grad = torch.randn_like(flat) * 3
        for p, g in zip(parameters, grad.split([400, 350, 250]), strict=True):
            p.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 20.0)
        reference.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.1)
        mine = ops.adamw_ema_(
            flat,
            grad,
            *state,
            step,
            learning_rate.double(),
            ema=ema,
            betas=(0.8, 0.95),
            eps=1e-7,
            weight_decay=0.3,
            max_grad_norm=20.0,
            ema_decay=0.9,
        )
        assert_close(mine, norm)
    assert_close(flat, torch.cat([p.detach() for p in parameters]))
    assert_close(ema, torch.cat(average))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_gradient_moves_nothing(bad, device):
    tensors, scalars = adamw_arguments(torch.float32, torch.float32, torch.bfloat16, device)
    tensors["grad"][12_345] = bad
    for implementation in ops.implementations("adamw_ema_", device).values():
        results = run_adamw(implementation, tensors, scalars)
        assert not results.pop("norm").isfinite()
        assert results.pop("grad").eq(0).all()
        for name, result in results.items():
            assert torch.equal(result, tensors[name]), name
