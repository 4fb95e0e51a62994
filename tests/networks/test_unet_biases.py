"""Biases as a GPU adds them, in what follows a convolution, on a CPU."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from fastdmd import ops
from fastdmd.networks import unet_blocks
from fastdmd.networks.unet_blocks import Conv1x1, Conv3x3, Product1x1
from fastdmd.ops import _registry
from tests.helpers.networks import make_network
from tests.networks.test_unet import VARIANTS, inputs


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_biases_as_a_gpu_adds_them(monkeypatch, name, layout):
    """And their gradients: of convolutions and products, of embeddings, and of two that share one."""
    network = make_network(VARIANTS[name]).double().to(memory_format=layout).requires_grad_()
    x, sigma, labels = inputs(VARIANTS[name])

    def run():
        given = x.double().requires_grad_()
        D_x = network(given, sigma.double(), labels)
        return D_x, *torch.autograd.grad(D_x.square().sum(), [given, *network.parameters()])

    expected = run()
    asked = []
    monkeypatch.setattr(unet_blocks, "on_gpu", lambda x: asked.append(x) or True)
    for got, wanted in zip(run(), expected, strict=True):
        assert_close(got, wanted)
    assert len(asked) > 10


@pytest.mark.parametrize("name", VARIANTS)
def test_biases_as_a_gpu_adds_them_can_be_compiled(monkeypatch, name):
    """Whole, to the gradients that autograd itself finds."""
    network = make_network(VARIANTS[name]).to(memory_format=torch.channels_last).requires_grad_()
    x, sigma, labels = inputs(VARIANTS[name])

    def run(function):
        given = x.clone().requires_grad_()
        D_x = function(given, sigma, labels)
        return D_x, *torch.autograd.grad(D_x.square().sum(), [given, *network.parameters()])

    expected = run(network)
    monkeypatch.setattr(unet_blocks, "on_gpu", lambda x: True)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, wanted in zip(run(compiled), expected, strict=True):
        assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


LAYERS = {"Conv3x3": (Conv3x3, 3, 1), "Conv1x1": (Conv1x1, 1, 0), "Product1x1": (Product1x1, 1, 0)}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_as_a_gpu_computes_them(monkeypatch, name, bias):
    """Second derivatives, forward mode, autocast, frozen and missing biases, and the backends that were asked for."""
    kind, side, padding = LAYERS[name]
    layer = kind(16, 16, side, padding=padding, bias=bias).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()

    def penalty():
        grads = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), [x, *layer.parameters()])

    def tangent():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent

    def autocast():
        own = copy.deepcopy(layer).float()
        with torch.autocast("cpu"):
            y = own(x.float())
        return y, *torch.autograd.grad(y.float().mean(), [x, *own.parameters()])

    def frozen():
        y = layer.requires_grad_(False)(x)
        return y, *torch.autograd.grad(y.square().sum(), [x])

    def without_gradients():
        with torch.no_grad():
            return layer(x)

    cases = (penalty, tangent, autocast, without_gradients, frozen)
    expected = [case() for case in cases]
    layer.requires_grad_()
    monkeypatch.setattr(unet_blocks, "on_gpu", lambda x: True)
    for case, wanted in zip(cases, expected, strict=True):
        assert_close(case(), wanted, **({"rtol": 2e-2, "atol": 2e-2} if case is autocast else {}))


def test_gradients_of_biases_are_computed_by_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(unet_blocks, "on_gpu", lambda x: True)
    layer, found = Conv3x3(4, 4, 3, padding=1), []
    forward = ops.implementations("bias_gradient")["reference"]
    monkeypatch.setitem(_registry._OPS, "bias_gradient", ("bias_gradient", lambda x: found.append(x) or forward(x)))
    with ops.use_backend("reference"):
        y = layer(torch.randn(2, 4, 5, 5))
    y.sum().backward()
    assert len(found) == 1
    assert_close(layer.bias.grad, torch.full((4,), 50.0))
