"""What torch's own operations do without thinking, at edges where ours once did not."""

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdmd import ops
from fastdmd.ops._devices import on_device_of_tensors

LOSSES = {
    "dm_loss": lambda x, a, b: ops.dm_loss(x, a, b),
    "dm_loss_raw": lambda x, a, b: ops.dm_loss_raw(x, a, torch.ones(3), a, b, sigma_data=0.5),
    "fake_loss": lambda x, a, b: ops.fake_loss(x, a, torch.ones(3)),
    "fake_loss_raw": lambda x, a, b: ops.fake_loss_raw(x, a, b, torch.ones(3)),
    "denoising_loss": lambda x, a, b: ops.denoising_loss(x, a, torch.ones(3)),
}


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_of_a_loss_is_of_no_graph(name, factor):
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3))
    x.requires_grad_()
    seen = []
    x.register_hook(lambda grad: seen.append(grad.requires_grad))
    (grad,) = torch.autograd.grad(factor * LOSSES[name](x, a, b), x)
    assert not grad.requires_grad and grad.grad_fn is None and seen == [False]
    assert np.isfinite(grad.numpy()).all() and grad.abs().max() > 0
    leaf = torch.ones((), requires_grad=True)
    (leaf * grad).sum().backward()  # the graph of the loss is gone by now
    assert leaf.grad == grad.sum()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_gradients_of_a_loss(name):
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3))
    x.requires_grad_()
    outer = torch.tensor([1.0, 2.0, -1.0])
    (grads,) = torch.autograd.grad(LOSSES[name](x, a, b), x, outer, is_grads_batched=True)
    (one,) = torch.autograd.grad(LOSSES[name](x, a, b), x)
    torch.testing.assert_close(grads, outer[:, None, None, None, None] * one)


@pytest.mark.parametrize("convolution", [ops.conv1x1, ops.conv3x3])
def test_saved_tensors_may_come_back_in_another_layout(convolution):
    """As from `save_on_cpu(pin_memory=True)`, or by way of numpy."""
    side = 1 if convolution is ops.conv1x1 else 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 6, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 16, side, side, generator=generator).requires_grad_()
    grads = []
    for pack in (lambda t: t.detach(), lambda t: torch.from_numpy(t.detach().numpy().copy(order="C"))):
        images = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            convolution(images, weight).square().sum().backward()
        grads.append((images.grad, weight.grad.clone()))
        weight.grad = None
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", list(ops.implementations("philox")))
def test_words_of_a_key_have_32_bits(backend):
    """An int32 word that is negative as int64."""
    counter = torch.arange(8).reshape(2, 4)
    philox = ops.implementations("philox")[backend]
    for given, meant in (([-1, 5], [2**32 - 1, 5]), ([3, -2], [3, 2**32 - 2]), ([2**32 + 7, 2**33 + 1], [7, 1])):
        assert torch.equal(philox(counter, torch.tensor(given)), philox(counter, torch.tensor(meant)))


def test_a_kernel_of_triton_runs_where_its_tensors_are(monkeypatch):
    current, seen = [0], []

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    class On(Tensor):
        @property
        def device(self):
            return torch.device("cuda", self.index)

    def tensor(index):
        made = torch.zeros(1).as_subclass(On)
        made.index = index
        return made

    @on_device_of_tensors
    def kernel(*arguments):
        seen.append(current[-1])
        return arguments

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    for index in (0, 1, 0, 2):
        given = tensor(index), 1.0
        assert kernel(*given) is not None and seen[-1] == index and current == [0]


def test_tickets_are_taken_by_a_thread_of_their_own(monkeypatch):
    """What torch.compile allocates while it warms up for a CUDA graph is that graph's, thread by thread."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from fastdmd.kernels import _common

    zeros, threads = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: threads.append(threading.get_ident()) or zeros(*a, **k))
    for on_gpu in (True, False):
        monkeypatch.setattr(_common, "_tickets", {})
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda on_gpu=on_gpu: on_gpu)
        first = [_common.ticket(torch.device("cpu")) for _ in range(3)]
        assert len(threads) == 1 and (threads.pop() != threading.get_ident()) == on_gpu
        assert all(ticket.eq(0).all() for ticket in first)
