"""How networks are compiled, and what a turn as a CUDA graph rests on, as far as a CPU shows it."""

import gc
import weakref

import pytest
import torch
from conftest import make_network

from fastdmd.execution import CompiledNetwork
from fastdmd.unet import UNetConfig

TINY = UNetConfig(
    image_size=8, num_classes=3, model_channels=8, channel_multipliers=(1,), num_blocks=1, attention_resolutions=()
)


@pytest.fixture
def traced(monkeypatch):
    """`torch.compile` that traces as ever, and generates no code; forgets what it knew."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **options, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def inputs(batch_size):
    torch.manual_seed(0)
    return torch.randn(batch_size, 1, 8, 8), torch.rand(batch_size) + 0.1, torch.arange(batch_size) % 3


class Small(torch.nn.Module):
    """Somebody else's denoiser; a look at a value breaks its graph where it is asked to."""

    dynamics = "flow"

    def __init__(self, breaks=False, dtype=torch.float32):
        super().__init__()
        self.breaks, self.weight = breaks, torch.nn.Parameter(torch.full((), 3, dtype=dtype))

    def forward(self, x, sigma, class_labels=None):
        if self.breaks and sigma.sum().item() > 1e9:
            return x
        return x.to(self.weight.dtype) * self.weight / (1 + sigma)[:, None, None, None]


def test_networks_of_one_class_do_not_share_a_limit(traced):
    """Nine batch sizes of each, where one function may have eight."""
    networks = [Small(), Small().requires_grad_(False), Small(dtype=torch.bfloat16)]
    compiled = [CompiledNetwork(network, None) for network in networks]
    for batch_size in range(2, 11):
        for network, function in zip(networks, compiled, strict=True):
            assert torch.equal(function(*inputs(batch_size)), network(*inputs(batch_size)))
    assert num_graphs() == 27
    with torch.no_grad():
        compiled[0](*inputs(10))
    assert num_graphs() == 28
    for batch_size in (10, 2):  # nothing is compiled again
        compiled[0](*inputs(batch_size)).sum().backward()
    assert num_graphs() == 28 and networks[0].weight.grad.abs() > 0


def test_networks_of_others_may_break_the_graph_and_ours_may_not(traced):
    network = Small(breaks=True)
    compiled = CompiledNetwork(network, None)
    assert compiled.dynamics == "flow" and CompiledNetwork(make_network(TINY), None).dynamics == "edm"
    for batch_size in (2, 3):
        assert torch.equal(compiled(*inputs(batch_size)), network(*inputs(batch_size)))
    ours = make_network(TINY)
    ours.conv_out.register_forward_hook(lambda module, inputs, output: output if output.sum() > 0 else -output)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="branching"):
        CompiledNetwork(ours, None)(*inputs(2))


def test_hooks_on_a_compiled_network_run(traced):
    network, sizes = make_network(TINY), []
    network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    compiled = CompiledNetwork(network, None)
    for batch_size in (2, 2, 3):
        compiled(*inputs(batch_size))
    assert sizes == [2, 2, 3]


def test_a_compiled_network_can_be_freed(traced):
    network = make_network(TINY).requires_grad_(True)
    compiled = CompiledNetwork(network, None)
    compiled(*inputs(2)).sum().backward()
    codes = [weakref.ref(function) for function in compiled._forwards.values()]
    dead = weakref.ref(network), weakref.ref(network.conv_in.weight)
    del network, compiled
    gc.collect()
    assert [ref() for ref in (*dead, *codes)] == [None] * 3
