"""What torch.library, torch.compile and torch.export make of the ops, and which layouts come out."""

import pytest
import torch
from torch.testing import assert_close

from fastdmd import ops
from tests.helpers.op_cases import CASES, Inputs, adamw_arguments, random


@pytest.mark.parametrize("case", [*CASES, "add_noise_rng", "take_rng_key", "philox", "adamw_ema_"])
def test_opcheck(case):
    name = case.split()[0]
    if case == "add_noise_rng":
        arguments = (random(2, 3, 4, 4), torch.ones(2), ops.rng_key(1), None, torch.float32)
    elif case == "take_rng_key":
        arguments = (ops.rng_state(1),)
    elif case == "philox":
        arguments = (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    elif case == "adamw_ema_":
        tensors, scalars = adamw_arguments(torch.float32, torch.float32, torch.bfloat16, "cpu", n=100)
        arguments = (*tensors.values(), *scalars.values())
    else:
        arguments = CASES[case](Inputs((3, 4, 5, 6), layout=torch.channels_last))
    differentiable = name in (
        "add_noise",
        "add_noise_rng",
        "denoising_loss",
        "fake_loss",
        "fake_loss_raw",
        "group_norm_silu",
    )
    if differentiable:
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    op = getattr(torch.ops.fastdmd, name).default
    torch.library.opcheck(op, arguments)
    if name.startswith("dm_loss"):  # torch would ask for the derivative of the gradient, too, which there is not
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
        torch.library.opcheck(
            op, arguments, test_utils=["test_schema", "test_autograd_registration", "test_faketensor"]
        )


def one_of_each(x, sigma, D_real, D_fake, noise, weight, table, state):
    x_t = ops.add_noise(x, sigma, noise=noise, scale=sigma)
    x_s = ops.add_noise(x.detach(), sigma, rng_state=state, dtype=torch.float32)
    scale, shift = table.chunk(2, dim=1)
    y = ops.group_norm_silu(x_t + x_s, weight, weight, num_groups=2, scale=scale, shift=shift)
    return (
        ops.dm_loss(y, D_real, D_fake)
        + ops.dm_loss_raw(y, x_t, sigma, D_real, D_fake)
        + ops.denoising_loss(y, D_real, sigma)
        + ops.fake_loss(y, D_real, sigma)
        + ops.fake_loss_raw(y, x, x_t, sigma)
        + ops.dm_gradient(x, D_real, D_fake).mean()
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_graph_break(backend):
    def inputs():
        x, D_real, D_fake, noise = (random(2, 4, 6, 6, dtype=torch.float32, seed=k) for k in range(4))
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        weight, table = random(4, dtype=torch.float32).requires_grad_(), random(2, 8, dtype=torch.float32)
        leaves = (x, weight)
        return leaves, (x, torch.tensor([0.3, 2.0]), D_real, D_fake, noise, weight, table, ops.rng_state(5))

    results = []
    torch._dynamo.reset()
    for function in (one_of_each, torch.compile(one_of_each, fullgraph=True, backend=backend)):
        leaves, arguments = inputs()
        loss = function(*arguments)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves), arguments[-1]])
    assert_close(*results, rtol=1e-5, atol=1e-5)


def test_layouts_are_kept_and_what_is_not_dense_is_copied():
    sigma, state = torch.tensor([0.3, 2.0]), ops.rng_state(1)
    dense = [random(2, 4, 6, 5, dtype=torch.float32, seed=k) for k in range(3)]
    strided = [torch.randn(2, 9, 6, 10)[:, 1::2, :, ::2].copy_(x) for x in dense]
    assert not strided[0].is_contiguous()
    mixed = [dense[0].to(memory_format=torch.channels_last), dense[1], strided[2]]
    weight = torch.ones(4)
    for x, a, b in (strided, mixed):
        assert_close(ops.add_noise(x, sigma, noise=a), ops.add_noise(dense[0], sigma, noise=dense[1]))
        assert_close(ops.dm_gradient(x, a, b), ops.dm_gradient(*dense))
        assert_close(ops.fake_loss(x, a, sigma), ops.fake_loss(*dense[:2], sigma))
        normalised = ops.group_norm_silu(x, weight, weight, num_groups=2)
        assert_close(normalised, ops.group_norm_silu(dense[0], weight, weight, num_groups=2))
        x.requires_grad_()
        ops.dm_loss(x, a, b).backward()
        assert_close(x.grad, ops.dm_gradient(*dense) / x.numel())
    for result in (
        ops.add_noise(mixed[0], sigma, noise=a),
        ops.dm_gradient(mixed[0], a, b),
        ops.group_norm_silu(mixed[0], weight, weight, num_groups=2),
        ops.add_noise(mixed[0].detach(), sigma, rng_state=state, dtype=torch.bfloat16),
    ):
        assert result.is_contiguous(memory_format=torch.channels_last) and not result.is_contiguous()


class Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


WEIGHT, KERNEL = random(16, dtype=torch.float32), random(16, 16, 3, 3, dtype=torch.float32)
EXPORTS = {
    "add_noise": lambda x, a, b, sigma: ops.add_noise(x, sigma, noise=a, scale=sigma),
    "dm_gradient": lambda x, a, b, sigma: ops.dm_gradient(x, a, b),
    "dm_loss": lambda x, a, b, sigma: ops.dm_loss(x, a, b),
    "dm_loss_raw": lambda x, a, b, sigma: ops.dm_loss_raw(x, x, sigma, a, b),
    "denoising_loss": lambda x, a, b, sigma: ops.denoising_loss(x, a, sigma),
    "fake_loss": lambda x, a, b, sigma: ops.fake_loss(x, a, sigma),
    "fake_loss_raw": lambda x, a, b, sigma: ops.fake_loss_raw(x, a, b, sigma),
    "group_norm_silu": lambda x, a, b, sigma: ops.group_norm_silu(x, WEIGHT, WEIGHT, num_groups=4),
    "group_norm": lambda x, a, b, sigma: ops.group_norm(x, num_groups=4),
    "conv3x3": lambda x, a, b, sigma: ops.conv3x3(x, KERNEL, WEIGHT),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_export_with_a_dynamic_batch(name):
    def arguments(B):
        i = Inputs((B, 16, 8, 8), layout=torch.channels_last)
        return i.image(), i.image(), i.image(), i.level()

    batch = {0: torch.export.Dim("B")}
    program = torch.export.export(Exported(EXPORTS[name]), arguments(4), dynamic_shapes=((batch,) * 4,)).module()
    for B in (2, 9):
        assert_close(program(*arguments(B)), EXPORTS[name](*arguments(B)), rtol=1e-5, atol=1e-5)
