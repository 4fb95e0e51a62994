"""group_norm_silu however the kernels cut an image: tiles, clusters, teams of lanes; and values far from the others."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from fastdmd import ops
from tests.helpers.op_cases import (
    DEVICES,
    LAYOUTS,
    Inputs,
    assert_all_within_budget,
)

HALVES = [torch.float32, torch.bfloat16, torch.float16]  # have kernels that move 16 bytes at a time
CUTS = [  # shape, groups
    ((1, 24, 16, 16), 4),
    ((2, 48, 17, 9), 8),
    ((3, 32, 4, 4), 4),  # tiles of some groups, of some pixels
    ((3, 8, 9, 9), 8),  # a group per channel
    ((5, 16, 3, 5), 2),
    ((1, 40, 7, 5), 1),  # fewer pixels than a block has rows of threads
    ((1, 768, 4, 4), 32),
    ((2, 96, 33, 1), 4),  # wide tiles, high ones
    ((1, 2048, 2, 3), 1),
    ((1, 4096, 2, 3), 1),
    ((2, 2048, 3, 7), 1),  # rows wider than any tile; a shorter last chunk
    ((2, 96, 8, 8), 4),
    ((1, 36, 32, 32), 3),
    ((2, 48, 12, 10), 2),
    ((1, 96, 16, 16), 4),  # teams of 8 to 32 lanes
]


def assert_budget(x, num_groups, *, adaptive, silu, device, moved=0):
    """Forward, and backward from the same moments; `moved` as in `Inputs.group_norm`."""
    i = Inputs(x.shape, x.dtype, device=device)
    C = x.shape[1]
    tables = i.vector(x.shape[0], 2 * C).chunk(2, dim=1) if adaptive else (None, None)
    offset = 3 * i.vector(moved, C) if moved else None
    parameters = i.vector(C), i.vector(C, dtype=torch.float32), *tables, offset, num_groups
    forward = x, *parameters, 1e-5, silu
    reference = ops.implementations("group_norm_silu", device)["reference"]
    _, mean, rstd = reference(*forward)
    grad_y = i.image().contiguous(memory_format=ops_layout(x))
    backward = grad_y, x, mean, rstd, *parameters, silu
    for name, arguments in (("group_norm_silu", forward), ("group_norm_silu_backward", backward)):
        assert_all_within_budget(name, arguments, device, torch.float64)  # as coarse as each result, not as `x`


def ops_layout(x):
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "num_groups"), CUTS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
def test_error_budget_of_every_cut(dtype, shape, num_groups, layout, device):
    x = Inputs(shape, dtype, layout, device).image() + 2
    for moved in (0, shape[0] if shape[1] % 3 else 1):
        assert_budget(x, num_groups, adaptive=shape[0] > 1, silu=shape[0] != 3, device=device, moved=moved)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_error_budget_of_a_group_that_fits_nowhere(layout, device):
    """Not on a multiprocessor, nor on eight: several rows of threads take two launches."""
    x = Inputs((1, 512, 48, 40), torch.float32, layout, device).image()
    for moved in (0, 1):
        assert_budget(x, 1, adaptive=False, silu=True, device=device, moved=moved)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["offset", "outlier"])
def test_error_budget_far_from_zero(case, layout, device):
    """A mean of a hundred standard deviations, and one value that makes up the variance: the first, or another.

    In groups that fit on a multiprocessor, and in one that does not.
    """
    for (row, column), (C, size, num_groups) in itertools.product(((0, 0), (5, 3)), ((96, 16, 4), (4, 128, 1))):
        x = Inputs((1, C, size, size), torch.float32, layout, device).image()
        if case == "offset":
            x = x + 100
        else:
            x[:, :: C // num_groups, row, column] = 1e4
        assert_budget(x, num_groups, adaptive=False, silu=False, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_an_offset_is_as_if_it_were_in_the_image(layout, device):
    """Values, and all gradients, of an offset of each sample and of one for all; the sum is never rounded."""
    i = Inputs((3, 24, 6, 10), torch.float64, layout, device)
    x, weight, table = i.image(), i.vector(24), i.vector(3, 48)
    for offset in (i.vector(3, 48)[:, ::2], i.vector(24), i.vector(1, 24).expand(3, 24)):
        results = []
        for as_image in (False, True):
            given = [t.detach().clone().requires_grad_() for t in (x, weight, table, offset)]
            moved, parameter, both, added = given
            scale, shift = both.chunk(2, dim=1)
            options = {"num_groups": 4, "scale": scale, "shift": shift}
            if as_image:
                moved = moved + (added if added.dim() == 2 else added[None])[:, :, None, None]
            else:
                options["offset"] = added
            y = ops.group_norm_silu(moved, parameter, **options)
            results.append((y, *torch.autograd.grad(y.square().sum(), given)))
        for own, expected in zip(*results, strict=True):
            assert_close(own, expected, rtol=1e-9, atol=1e-9)
    whole = torch.full((1, 4, 8, 8), 256.0, device=device).bfloat16()
    spread = torch.tensor([[-0.75, -0.25, 0.25, 0.75]], device=device)
    y = ops.group_norm_silu(whole, num_groups=1, offset=spread)  # no bfloat16 at 256 holds a quarter
    expected = F.silu(F.group_norm(spread.view(1, 4, 1, 1), 1)).expand(whole.shape)
    assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(4, 8), (3, 7), (1, 8), (7,), (8, 1), ()])
def test_an_offset_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="expected offset of shape"):
        ops.group_norm_silu(torch.zeros(3, 8, 2, 2), num_groups=2, offset=torch.zeros(shape))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_special_values_stay_in_their_group(layout, device):
    x = Inputs((2, 96, 16, 16), torch.float32, layout, device).image()
    ones = torch.ones(96, device=device)
    arguments = ones, ones, None, None, None, 4, 1e-5, True
    for name, implementation in ops.implementations("group_norm_silu", device).items():
        clean, _, _ = implementation(x, *arguments)
        for special in (torch.nan, torch.inf):
            spoiled = x.clone()
            spoiled[1, 30, 7, 7] = special
            y, mean, rstd = implementation(spoiled, *arguments)
            assert y[1, 24:48].isnan().all() and rstd[1, 1].isnan() and not mean[1, 1].isfinite(), name
            y[1, 24:48] = clean[1, 24:48]
            assert torch.equal(y, clean), name
