"""AdamWEMA as one of torch's optimizers: precision, stale graphs, averages, schedulers, files, processes."""

import copy
import functools
import gc
import math
import time

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdmd import ops
from fastdmd.optim import AdamWEMA
from fastdmd.optim.states import fixed_options
from tests.helpers.gloo import in_processes
from tests.helpers.optimizers import LOW, adamw, assert_alike, images, loss_of, network, pair, saved, train


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_follows_float32(dtype):
    wide, low = (AdamWEMA(network(), learning_rate=1e-2, ema_decay=0.9, compute_dtype=d) for d in (None, dtype))
    norms = [train(optimizer, num_steps=5) for optimizer in (wide, low)]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=0.02)
    assert {p.dtype for p in low.network.parameters()} == {dtype}
    for name, value in low.state_dict()["param"].items():
        torch.testing.assert_close(value, wide.state_dict()["param"][name], rtol=0.02, atol=0.03)
        assert torch.equal(low.network.get_parameter(name), value.to(dtype))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_a_stale_graph_raises(compute_dtype):
    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=0.9, compute_dtype=compute_dtype)
    x = images(compute_dtype or torch.float32).requires_grad_()
    for module, change in (
        (optimizer.network, optimizer.step),
        (optimizer.network, lambda: optimizer.load_state_dict(optimizer.state_dict())),
        (optimizer.ema_network, optimizer.step),
    ):
        y = module(x if module is optimizer.network else x.float()).sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("backend", ops.implementations("adamw_ema_"))
def test_ops_count_what_they_write(backend):
    n = 4
    flats = [torch.ones(n) for _ in range(5)]
    shadow, step, rate = torch.ones(n, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64), torch.tensor(0.1)
    *state, ema = flats
    state_of_noise = ops.rng_state(seed=0)
    factor = torch.ones(n, requires_grad=True)
    stale = (flats[0] * factor).sum()
    with ops.use_backend(backend):
        ops.adamw_ema_(*state, step, rate, ema=ema, shadow=shadow, zero_grad=True)
        ops.add_noise(torch.zeros(1, 1, 2, 2), torch.ones(1), rng_state=state_of_noise)
        with torch.inference_mode():  # whose tensors count nothing
            ops.adamw_ema_(*(torch.ones(n) for _ in range(4)), torch.zeros(1, dtype=torch.int64), rate)
    assert all(tensor._version > 0 for tensor in (*flats, shadow, step, state_of_noise)) and rate._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


class Statistics(nn.Module):
    """Buffers of every kind: batch statistics, one reassigned, one that appears, a constant; and a fixed weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.instance = nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)
        self.scale, self.shift = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("last", None)
        self.register_buffer("constant", torch.arange(3))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
            self.last = x.detach()[: 1 + self.norm.num_batches_tracked].mean(dim=(2, 3))
        return self.scale * self.instance(self.norm(x)) + self.shift


def test_averages_have_the_buffers_of_the_network():
    net = Statistics()
    optimizer = AdamWEMA(net, learning_rate=0.1, ema_decay=0.9)
    for step in range(3):
        x = 1 + step + images()
        optimizer.backward(net(x).square().mean() + net.norm.weight.sum())
        with torch.no_grad():
            net.shift.add_(1)
        optimizer.step()
        average = optimizer.ema_network
        assert torch.equal(average.shift, net.shift) and not average.training
        for (name, value), (_, copied) in zip(net.named_buffers(), average.named_buffers(), strict=True):
            assert torch.equal(value, copied) and value is not copied, name
    assert average.norm.running_mean.norm() > 0 and average.mean > 0 and average.last.shape == (3, 3)
    copied = copy.deepcopy(optimizer)
    copied.backward(copied.network(x).mean())
    copied.step()
    assert torch.equal(copied.ema_network.norm.running_mean, copied.network.norm.running_mean)
    assert not torch.equal(copied.network.norm.running_mean, net.norm.running_mean)


class Launches(TorchDispatchMode):
    """Names of the ops that run, but those that only make views."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), function._schema.name]
        return function(*args, **(kwargs or {}))

    def work(self):
        return [name for name in self.names if name not in ("aten::slice", "aten::detach", "aten::alias")]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_an_update_is_one_launch_a_group(compute_dtype):
    """One for the fused op, and one for all buffers; groups take the clipping upon themselves."""
    clip = ["aten::mul_"] if compute_dtype is None else ["aten::_to_copy", "aten::mul_"]
    clear = [] if compute_dtype is None else ["aten::zero_"]
    for groups, expected in (
        (None, ["fastdmd::adamw_ema_", "aten::_foreach_copy_"]),
        ({"bias": {"weight_decay": 0.0}}, 2 * [*clip, "fastdmd::adamw_ema_"] + clear + ["aten::_foreach_copy_"]),
    ):
        net = network()
        net.register_buffer("frequencies", torch.ones(4))
        optimizer = AdamWEMA(net, learning_rate=0.1, ema_decay=0.9, compute_dtype=compute_dtype, groups=groups)
        for _ in range(2):
            optimizer.backward(loss_of(net))
            optimizer.advance()
            with Launches() as launches:
                optimizer.update()
            assert launches.work()[-len(expected) :] == expected
            assert launches.work().count("fastdmd::adamw_ema_") == len(optimizer.param_groups)
            assert groups or launches.work() == expected


SCHEDULERS = {
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=8),
    "ExponentialLR": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch(name):
    """Their rates, and where they cycle them their betas; also on from a saved state."""
    optimizer, reference, (net, other) = pair(max_grad_norm=math.inf)
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, reference)]

    def go(optimizer, net, scheduler):
        for _ in range(3):
            train(optimizer, net, 1)
            scheduler.step()

    go(optimizer, net, schedulers[0]), go(reference, other, schedulers[1])
    assert_alike(net, other, rtol=1e-4, atol=1e-6)
    resumed = AdamWEMA(network(), learning_rate=1e-2)
    scheduler = SCHEDULERS[name](resumed)
    resumed.load_state_dict(torch.load(saved(optimizer.state_dict()), weights_only=True))
    scheduler.load_state_dict(schedulers[0].state_dict())
    go(resumed, resumed.network, scheduler), go(optimizer, net, schedulers[0])
    assert_alike(net, resumed.network, rtol=0, atol=0)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 1e-2


def test_rates_of_groups_multiply():
    groups = {"bias": {"learning_rate_factor": 0.1}}
    optimizer = AdamWEMA(network(), learning_rate=0.5, warmup_steps=4, groups=groups)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    optimizer.advance()
    assert [group.learning_rate.item() for group in optimizer._groups] == pytest.approx([0.00625, 0.0625])
    optimizer.peak_learning_rate = 0.1
    assert optimizer.learning_rate(0) == pytest.approx(0.025)
    optimizer.advance()
    assert [group.learning_rate.item() for group in optimizer._groups] == pytest.approx([0.005, 0.05])


def test_states_without_groups_are_read():
    optimizer, other = (AdamWEMA(network(), learning_rate=rate, ema_decay=0.9) for rate in (0.1, 0.2))
    train(optimizer)
    state = optimizer.state_dict()
    del state["param_groups"]
    other.load_state_dict(state)
    assert_alike(other.network, optimizer.network, rtol=0, atol=0)
    assert other.peak_learning_rate == 0.2 and other.num_updates == 2


def test_the_rest_of_the_interface():
    optimizer, reference, (net, other) = pair()
    seen = []
    optimizer.register_step_post_hook(lambda *arguments: seen.append("step"))

    def closure(opt, module):
        def call():
            opt.zero_grad()
            loss = loss_of(module)
            loss.backward()
            return loss

        return call

    losses = optimizer.step(closure(optimizer, net)), reference.step(closure(reference, other))
    torch.testing.assert_close(*losses)
    assert_alike(net, other)
    assert seen == ["step"] and "lr: 0.01" in repr(optimizer)
    with pytest.raises(ValueError, match="expected its groups at construction, got add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer._captured_options = fixed_options(optimizer.param_groups)  # as a capture does
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.advance()
    optimizer.param_groups[0]["weight_decay"] = 0.2
    with pytest.raises(ValueError, match="expected lr alone to change under a captured graph"):
        optimizer.advance()


@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
def test_a_norm_that_is_not_finite_stops_every_group(bad, max_grad_norm):
    """Also where the gradients are finite and the sum of their squares is not."""
    groups = {"bias": {"weight_decay": 0.5}}
    optimizer = AdamWEMA(network(), learning_rate=0.1, max_grad_norm=max_grad_norm, groups=groups)
    start = copy.deepcopy(optimizer.state_dict())
    optimizer.network[0].weight.grad[0] = bad
    assert not optimizer.step().isfinite()
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(value, start[kind][name]) for name, value in optimizer.state_dict()[kind].items())
    assert [step.item() for step in optimizer.state_dict()["steps"]] == [0, 0]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_files_hold_parameters_as_tensors_of_their_own(compute_dtype, tmp_path):
    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=0.9, compute_dtype=compute_dtype)
    train(optimizer)
    for name in ("network", "ema_network"):
        module = getattr(optimizer, name)
        save_model(module, str(tmp_path / "weights.safetensors"))
        read = network().to(next(module.parameters()).dtype)
        load_model(read, str(tmp_path / "weights.safetensors"))
        assert_alike(read, module, rtol=0, atol=0)
    parameter = optimizer.network[1].bias
    assert len(saved(parameter.detach()).getvalue()) < 2000  # not the whole buffer
    assert parameter.untyped_storage().nbytes() == 8 * parameter.itemsize


@pytest.fixture
def two_processes():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_gradients_that_nobody_would_reduce_raise(two_processes):
    optimizer = AdamWEMA(network(), learning_rate=0.1)
    with pytest.raises(ValueError, match="AdamWEMA.backward: expected one process, got 2, whose gradients"):
        optimizer.backward(loss_of(optimizer.network))
    wrapped = nn.parallel.DistributedDataParallel(optimizer.network)
    with pytest.raises(TypeError, match="expected the network inside DistributedDataParallel, its .module, got"):
        AdamWEMA(wrapped, learning_rate=0.1)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_gradients_of_a_data_parallel_wrapper_arrive(bucket_view, wrapped_first):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        net, other = network(), network()
        wrap = functools.partial(nn.parallel.DistributedDataParallel, net, gradient_as_bucket_view=bucket_view)
        wrapper = wrap() if wrapped_first else None
        optimizer, reference = AdamWEMA(net, learning_rate=1e-2), adamw(other)
        wrapper = wrapper or wrap()
        for _ in range(3):
            loss_of(wrapper).backward()
            norm = optimizer.step()
            reference.zero_grad()
            loss_of(other).backward()
            torch.testing.assert_close(norm, nn.utils.get_total_norm([p.grad for p in other.parameters()]))
            reference.step()
        assert_alike(net, other)
    finally:
        # Gloo's threads let go of what they did, for which they need the interpreter's lock, before the group waits for
        # them with it: else both were seen to wait for ever.
        del wrapper, wrap
        gc.collect()
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def refused_in_parts(group):
    from torch.distributed.fsdp import fully_shard

    net = network()
    optimizer = AdamWEMA(net, learning_rate=0.1)
    fully_shard(net)
    with pytest.raises(ValueError, match="expected 0.weight where the optimizer put it, got it moved or replaced"):
        optimizer.step()
    with pytest.raises(TypeError, match="expected plain tensors as parameters, got 0.weight, a DTensor"):
        AdamWEMA(net, learning_rate=0.1)
    return True


def test_sharded_parameters_are_refused(tmp_path):
    """In processes of its own: torch keeps for a whole process where its part of such a shape lies, and those that
    other tests fork from this one as another rank would take it for theirs."""
    assert in_processes(2, refused_in_parts, tmp_path) == [True, True]
