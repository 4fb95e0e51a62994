"""Arguments off the common path: pairs of dtypes, memory that is not aligned, samples of odd sizes, many channels."""

import pytest
import torch

from fastdmd import ops
from tests.helpers.op_cases import (
    CASES,
    DEVICES,
    DTYPES,
    LAYOUTS,
    TOLERANCES,
    Inputs,
    adamw_arguments,
    assert_all_within_budget,
    assert_within_budget,
    available,
    ops_wide,
    run_adamw,
    slack,
)

HALVES = [torch.float32, torch.bfloat16, torch.float16]  # have kernels that move 16 bytes at a time


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_pair_of_dtypes(dtype, out_dtype, device):
    i = Inputs((3, 4, 17, 23), dtype, device=device)
    x, level, noise, scale = i.image(), i.level(), i.image(), i.level()
    # Computed in float64 or float32, and rounded once; normals are of float32 always.
    assert_all_within_budget("add_noise", (x, level, noise, scale, out_dtype), device, ops_wide(dtype))
    key = ops.rng_key(1, device=device)
    assert_all_within_budget("add_noise_rng", (x, level, key, scale, out_dtype), device, torch.float32)
    factor = level[0].to(ops_wide(dtype))
    assert_all_within_budget("scale_gradient", (x, factor, out_dtype), device, ops_wide(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("group_norm")])
def test_samples_that_end_inside_a_vector(case, dtype, device):
    assert_all_within_budget(case.split()[0], CASES[case](Inputs((5, 3, 7, 9), dtype, device=device)), device, dtype)


def unaligned(tensor):
    """The same values and strides, one element behind a boundary of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride())
    assert memory.data_ptr() % 16 == tensor.element_size()
    return memory.copy_(tensor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_images_that_are_not_aligned(case, dtype, layout, device):
    arguments = CASES[case](Inputs((3, 8, 6, 10), dtype, layout, device))
    images = [isinstance(a, torch.Tensor) and a.dim() == 4 for a in arguments]
    assert any(images)
    arguments = [unaligned(a) if is_image else a for a, is_image in zip(arguments, images, strict=True)]
    assert_all_within_budget(case.split()[0], arguments, device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad_dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
def test_weights_that_are_not_aligned(grad_dtype, device):
    tensors, scalars = adamw_arguments(torch.float32, grad_dtype, torch.bfloat16, device, n=5_001)
    found = ops.implementations("adamw_ema_", device)
    expected = run_adamw(found["reference"], tensors, scalars)
    truth = run_adamw(found["reference"], tensors, scalars, torch.float64)
    for implementation in available("adamw_ema_", device):
        copies = {name: unaligned(t) if t.numel() > 1 else t.clone() for name, t in tensors.items()}
        copies["norm"] = found[implementation](*copies.values(), *scalars.values())
        for name, result in copies.items():
            tolerance = slack(implementation, device) * TOLERANCES.get(result.dtype, 0)
            assert_within_budget(result, expected[name], truth[name].double(), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(2, 40, 19, 31), (3, 192, 8, 8), (1, 2064, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("group_norm")])
def test_many_channels(case, dtype, shape, device):
    """Groups across warps, chunks of an image that end unevenly, and more channels than a block has threads for."""
    arguments = CASES[case](Inputs(shape, dtype, torch.channels_last, device))
    assert_all_within_budget(case.split()[0], arguments, device, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_far_more_calls_than_there_are_places_to_count_blocks(device):
    """On a GPU a thousand calls have a counter each, which has to be as before for the next thousand."""
    x, real, fake = (Inputs((3, 1, 8, 8), torch.float32, device=device).image() + k for k in range(3))
    sigma, param, rate = torch.ones(3, device=device), torch.ones(2500, device=device), torch.tensor(0.0, device=device)
    moments, step = (torch.zeros_like(param), torch.zeros_like(param)), torch.zeros(1, dtype=torch.int64, device=device)
    for name in available("dm_loss", device):
        if (name, device) == ("triton", "cpu"):  # interpreted, and without counters
            continue
        with ops.use_backend(name, device):
            results = torch.stack(
                [
                    torch.stack(
                        [
                            ops.dm_loss(x, real, fake),
                            ops.fake_loss(fake, x, sigma, sigma_data=0.5),
                            ops.adamw_ema_(param, param, *moments, step.zero_(), rate),
                        ]
                    )
                    for _ in range(1030)
                ]
            )
        assert torch.equal(results, results[:1].expand_as(results)) and results[0, 2] == 50, name
