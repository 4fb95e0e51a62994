"""What torch.library, torch.compile and torch.export make of the ops, and which layouts come out."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

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


class Dispatched(TorchDispatchMode):
    """The names of what reaches torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.name())
        return function(*arguments, **(keywords or {}))


class Called(TorchFunctionMode):
    """The same of what is called in Python."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.name() if isinstance(function, torch._ops.OpOverload) else str(function))
        return function(*arguments, **(keywords or {}))


class Own(torch.Tensor):
    """A tensor of somebody's, which torch asks before it calls an op."""


def test_who_looks_on_sees_every_op():
    """Eager ops go past the dispatcher, but not past those who watch it; values, gradients and nodes are the same."""
    table = {"x": (2, 4, 6, 6), "D_real": (2, 4, 6, 6), "D_fake": (2, 4, 6, 6), "noise": (2, 4, 6, 6), "scale": (2, 8)}
    images = {name: random(*shape, dtype=torch.float32, seed=seed) for seed, (name, shape) in enumerate(table.items())}
    weight, results, nodes = random(4, dtype=torch.float32), [], []
    for mode in (contextlib.nullcontext(), Dispatched(), Called()):
        x, D_real, D_fake, noise, scale = (image.clone() for image in images.values())
        leaves = x.requires_grad_(), weight.clone().requires_grad_()
        with mode:
            y = ops.group_norm_silu(x, leaves[1], leaves[1], num_groups=2)
            loss = one_of_each(y, torch.tensor([0.3, 2.0]), D_real, D_fake, noise, leaves[1], scale, ops.rng_state(5))
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        nodes.append(y.grad_fn.name())
        if not isinstance(mode, contextlib.nullcontext):
            expected = {"add_noise", "group_norm_silu", "dm_loss", "dm_loss_raw", "denoising_loss", "fake_loss"}
            assert {f"fastdmd::{name}" for name in (*expected, "fake_loss_raw", "dm_gradient")} <= mode.names
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert_close(results[0], results[2], rtol=0, atol=0)
    assert len(set(nodes)) == 1


def test_tensors_of_others_tracers_and_devices_without_kernels_keep_the_op():
    x, weight = torch.rand(1, 16, 16, 16).to(memory_format=torch.channels_last), torch.rand(16, 16, 3, 3)
    assert isinstance(ops.conv3x3(x.as_subclass(Own), weight), Own)
    traced = torch.jit.trace(lambda x: ops.conv3x3(x, weight), x)
    assert "fastdmd::conv3x3" in str(traced.graph)
    assert_close(traced(x), ops.conv3x3(x, weight), rtol=0, atol=0)
    with FakeTensorMode() as mode:
        assert isinstance(ops.conv3x3(mode.from_tensor(x), mode.from_tensor(weight)), FakeTensor)
    assert ops.group_norm_silu(x.to("meta"), num_groups=4).is_meta


@pytest.mark.parametrize("backend", ops.implementations("fake_loss"))
def test_a_lazy_negation_counts(backend):
    """A tensor whose memory holds the opposite: torch makes them of conjugates, and gradients of such, too."""
    image, sigma = random(2, 8, 4, 4, dtype=torch.float32), torch.tensor([0.3, 2.0])
    lazy, lazy_sigma = torch._neg_view(-image), torch.complex(sigma, -sigma).conj().imag
    assert lazy.is_neg() and lazy_sigma.is_neg()
    with ops.use_backend(backend):
        for function in (
            lambda image, sigma: ops.add_noise(image, sigma, noise=image, scale=sigma),
            lambda image, sigma: ops.fake_loss(image, image.detach() * 2, sigma),
            lambda image, sigma: ops.dm_gradient(image, image + 1, image * 2),
            lambda image, sigma: ops.group_norm_silu(image, num_groups=2),
        ):
            assert_close(function(lazy, lazy_sigma), function(image, sigma), rtol=0, atol=0)
        grads = []
        for of_loss in (lambda loss: 2 * loss, lambda loss: 2 * torch.complex(torch.zeros(()), loss).conj().abs()):
            x = image.clone().requires_grad_()
            grads += torch.autograd.grad(of_loss(ops.fake_loss(x, image * 2, sigma)), x)
    assert_close(*grads)


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
    "bias_gradient": lambda x, a, b, sigma: ops.bias_gradient(x),
    "conv1x1": lambda x, a, b, sigma: ops.conv1x1(x, KERNEL[..., :1, :1], WEIGHT),
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
        expected = EXPORTS[name](*arguments(B))
        assert_close(program(*arguments(B)), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
