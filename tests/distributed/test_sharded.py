"""Processes of which each has a part of every network learn what those learn that have all of it; what that costs."""

import copy
import dataclasses
import functools
import gc
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastdmd.distill.gan import GANSettings
from fastdmd.distill.turns import DMD2
from fastdmd.optim import AdamWEMA
from fastdmd.optim.sharded import ShardedAdamWEMA
from fastdmd.ranks import Ranks
from fastdmd.runs import distillation
from fastdmd.runs.stages import Stage
from fastdmd.sampling import Generator
from fastdmd.shards import Sharding, local, whole
from tests.distributed.test_collectives import TAIL, Told
from tests.distributed.test_equal import CASES, CPU, FULL, PLAIN, no_global_dtype, shown, train  # noqa: F401
from tests.helpers.adversarial import CONFIG, TINY, real_images
from tests.helpers.gloo import in_processes
from tests.helpers.networks import make_network

NUM_ITERATIONS = 5
UNITS = 12  # of the tiny network: its blocks, of which five are the decoder's, a linear layer, and the network itself
OF_ENCODER = UNITS - 5


@pytest.mark.parametrize(
    ("name", "size"), [("plain", 3), ("f-divergence", 2), ("everything", 2), ("score identity", 2)]
)
def test_parts_learn_what_one_process_learns(name, size, tmp_path):
    """Weights, moments and averages in float64, to 1e-10, as copies do (`test_equal`). Three processes do not divide
    any parameter: the last ones have less, or nothing."""
    config = CASES[name].replace(batch_size=3) if size == 3 else CASES[name]
    alone = train(config, num_iterations=NUM_ITERATIONS)
    task = functools.partial(train, config, num_iterations=NUM_ITERATIONS, shard=True)
    found = in_processes(size, task, tmp_path)
    assert all(torch.equal(one["state"], found[0]["state"]) for one in found)
    assert (found[0]["state"] - alone["state"]).abs().max() < 1e-10
    assert alone["moved"].abs().max() > 5e-4
    for one in found:
        for mine, theirs in zip(one["readings"], alone["readings"], strict=True):
            assert shown(mine) == pytest.approx(shown(theirs), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 0.2)])
def test_parts_learn_what_copies_learn_to_rounding(precision, bound, tmp_path):
    """Of how far the generator went. In bf16, FSDP2 adds up gradients of parts of a batch in float32."""
    config = FULL.replace(precision=precision)
    task = functools.partial(train, config, dtype=torch.float32, num_iterations=NUM_ITERATIONS)
    copies = in_processes(2, task, tmp_path / "copies")[0]["moved"]
    first, second = (one["moved"] for one in in_processes(2, functools.partial(task, shard=True), tmp_path / "parts"))
    assert torch.equal(first, second) and copies.norm() > 1e-2
    assert 0 < (first - copies).norm() < bound * copies.norm(), (first - copies).norm() / copies.norm()


# What each process holds, and what is exchanged.


def spans_in_use():
    """First and last byte of the memory of all tensors on the host."""
    spans = set()
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter, DTensor) and found.layout == torch.strided:
            part = local(found.detach())
            storage = part.untyped_storage()
            if part.device == CPU and storage.nbytes():
                spans.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return spans


def num_bytes(spans):
    """Each byte counts once."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def held(group):
    """Of a model, over the bytes of one network; and how many there would be if each process had all of it."""
    config = CONFIG.replace(gan=GANSettings(), batch_size=2, ema_halflives=(8.0, 40.0), shard=True)
    network = dataclasses.replace(TINY, num_classes=0, model_channels=32, num_blocks=2)
    gc.collect()
    before = spans_in_use()  # of other tests, which may go meanwhile
    model = distillation.build(config, make_network(network), group)
    draws = distillation.make_draws(config, make_network(network), CPU)
    for step in range(2):
        model.iterate(step, draws)
    gc.collect()
    size = sum(4 * own.numel() for own in make_network(network).parameters())
    return num_bytes(spans_in_use() - before) / size


@pytest.mark.parametrize("size", [2, 4])
def test_no_process_holds_more_than_its_part(size, tmp_path):
    """Teacher; generator and fake score, of each weights and two moments; gradients; two averages: ten networks."""
    for found in in_processes(size, held, tmp_path):
        assert 10 / size < found < 10 / size * 1.1, found


def exchanged(accumulation_steps, group):
    """The collectives of each iteration, and the bytes of the head's gradient."""
    config = CONFIG.replace(divergence="reverse-kl", accumulation_steps=accumulation_steps, shard=True)
    model = distillation.build(config, make_network(TINY), group)
    draws = distillation.make_draws(config, make_network(TINY), CPU, real_images())
    found = []
    for step in range(4):
        with Told() as told:
            model.iterate(step, draws)
        found.append(told.collectives)
    return found, 4 * (sum(-(-own.numel() // 16) * 16 for own in model.head_optimizer.parameters) + TAIL)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_what_is_exchanged(accumulation_steps, tmp_path):
    """Every forward gathers its network, and so does every backward pass; who is trained reduces each part of a batch.
    Updates exchange two numbers, that of the head, which all have, its gradient.

    Not in this process: what torch keeps of a mesh of a fake group, by its shape, forks would take for theirs.
    """
    for found, head in in_processes(2, functools.partial(exchanged, accumulation_steps), tmp_path):
        for step, collectives in enumerate(found):
            moves = step % CONFIG.dfake_gen_update_ratio == 0
            names = [name for name, _ in collectives]
            gathers, reductions = 2 * UNITS, UNITS  # the fake score's
            if (
                moves
            ):  # generator, teacher, fake score and its encoder; back through generator and encoder; images ahead
                gathers += 3 * UNITS + OF_ENCODER + UNITS + OF_ENCODER + UNITS
                reductions += UNITS
            assert names.count("_allgather_base_") == accumulation_steps * gathers
            assert names.count("_reduce_scatter_base_") == accumulation_steps * reductions
            rest = [size for name, size in collectives if name == "allreduce_"]
            assert sorted(rest) == [16] * (1 + moves) + [head]
            assert len(names) == accumulation_steps * (gathers + reductions) + len(rest)


# The optimizer by itself.


def small(group):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    return network, Sharding(network, group)


def moved_in_memory(group):
    """Outputs before and after the flat buffer was changed behind FSDP2's back."""
    network, sharding = small(group)
    optimizer = ShardedAdamWEMA(sharding.cut_(network), sharding=sharding, learning_rate=0.1, ema_decay=0.5)
    x = torch.ones(2, 3)
    before = network(x), optimizer.ema_network(x)
    for part in map(local, optimizer.weights.values()):
        part.zero_()
    return before[0].detach(), before[1].detach(), network(x).detach(), optimizer.ema_network(x).detach()


def test_networks_gather_from_the_flat_buffer(tmp_path):
    """Where torch does not find parameters in the memory that they were given, nothing that is learned arrives."""
    for before, average, after, average_after in in_processes(3, moved_in_memory, tmp_path):
        assert before.abs().min() > 0 and torch.equal(before, average)
        assert after.count_nonzero() == 0 and torch.equal(average_after, average)


def as_torch_does(group):
    """Weights after `zero_grad`, `loss.backward()` and `step` of a network in parts, and of AdamWEMA of a copy."""
    network, sharding = small(group)
    options = {"learning_rate": 0.1, "max_grad_norm": 0.5, "groups": {"bias": {"weight_decay": 0.0}}}
    whole_one = AdamWEMA(copy.deepcopy(network), process_group=group, **options)
    optimizer = ShardedAdamWEMA(sharding.cut_(network), sharding=sharding, **options)
    norms = []
    for step in range(3):
        x = torch.full((2, 3), 1.0 + step + Ranks.of(group).rank)
        optimizer.zero_grad()
        network(x).square().sum().backward()
        whole_one.backward(whole_one.network(x).square().sum())
        norms.append((optimizer.step().item(), whole_one.step().item()))
    weights = [{name: whole(x) for name, x in one.state_dict()["param"].items()} for one in (optimizer, whole_one)]
    return weights, norms


def test_torch_s_own_calls_and_groups(tmp_path):
    for (mine, theirs), norms in in_processes(2, as_torch_does, tmp_path):
        assert all(own == pytest.approx(other, rel=1e-5) and own > 0.5 for own, other in norms)
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)


class Tied(nn.Sequential):
    """Layers of which two have one weight, each with a share that would be gathered by itself; the first has fixed
    parameters, and a buffer."""

    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        self[2].weight = self[0].weight
        self[0].bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 4.0]))

    def forward(self, x):
        return super().forward(x * self.scale).tanh()


def tied(group):
    torch.manual_seed(0)
    network = Tied()
    options = {"learning_rate": 0.1, "ema_decay": 0.5}
    sharding, twin = Sharding(network, group), AdamWEMA(copy.deepcopy(network), process_group=group, **options)
    optimizer = ShardedAdamWEMA(sharding.cut_(network), sharding=sharding, **options)
    for step in range(2):
        x = torch.full((2, 3), 0.25 + step + Ranks.of(group).rank)
        for each in (optimizer, twin):
            each.backward(each.network(x).square().sum())
            each.step()
    x = torch.ones(1, 3)
    outputs = [(each.network(x).detach(), each.ema_network(x).detach()) for each in (optimizer, twin)]
    return *outputs, optimizer.ema_network[2].weight is optimizer.ema_network[0].weight


def test_tied_weights_stay_tied_and_fixed_ones_fixed(tmp_path):
    for mine, theirs, is_tied in in_processes(2, tied, tmp_path):
        for own, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        assert is_tied


def not_permitted(group):
    network, sharding = small(group)
    optimizer = ShardedAdamWEMA(sharding.cut_(network), sharding=sharding, learning_rate=0.1)
    is_first, found = Ranks.of(group).is_first, []
    for permitted, balance in ((is_first, None), (True, 0.5 - 0.75 * is_first), (True, 0.25 - 0.75 * is_first)):
        before = [local(part).clone() for part in optimizer.weights.values()]
        optimizer.backward(network(torch.ones(1, 3)).sum())
        optimizer.advance()
        options = {} if balance is None else {"balance": torch.tensor(balance)}
        norm = optimizer.update(torch.tensor(permitted), **options)
        stays = all(map(torch.equal, before, map(local, optimizer.weights.values())))
        assert bool(norm.isnan()) == stays
        found.append(stays)
    return found


def test_what_one_process_may_not_do_none_does(tmp_path):
    assert in_processes(2, not_permitted, tmp_path) == [[True, True, False]] * 2


def refused(group):
    network, sharding = small(group)
    said = []

    def refuse(make):
        with pytest.raises((TypeError, ValueError)) as error:
            make()
        said.append(str(error.value))

    refuse(lambda: ShardedAdamWEMA(network, sharding=sharding, learning_rate=0.1))
    optimizer = ShardedAdamWEMA(sharding.cut_(network), sharding=sharding, learning_rate=0.1)
    refuse(lambda: AdamWEMA(network, learning_rate=0.1))
    refuse(lambda: copy.deepcopy(optimizer))
    refuse(lambda: pickle.dumps(optimizer))
    refuse(lambda: ShardedAdamWEMA(network, sharding=sharding, learning_rate=0.1, compute_dtype=torch.bfloat16))
    network.load_state_dict({name: x.clone() for name, x in network.state_dict().items()}, assign=True)
    refuse(optimizer.step)
    options = {"generator_options": {"learning_rate": 0.1}, "guidance_options": {"learning_rate": 0.1}}
    options |= {"conditioning_sigma": 80.0, "sigma_data": 0.5, "dfake_gen_update_ratio": 2, "execution": "compiled"}
    refuse(lambda: DMD2(make_network(TINY), **options, process_group=group, shard=True))
    network.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))
    refuse(lambda: Sharding(network, group))
    options["execution"] = "eager"
    model = DMD2(make_network(TINY), **options, process_group=group, shard=True)
    state = {"own": torch.tensor([float(Ranks.of(group).rank)])}
    sampler = Generator(model.generator, (80.0,))
    refuse(lambda: Stage(Path("run"), state, None, {}, None, {}, state, sampler).fill(model, [], sampler))
    return said


def test_what_is_refused(tmp_path):
    expected = [
        "fastdmd.AdamWEMA: expected a network that is cut, got 0.weight whole",
        "fastdmd.AdamWEMA: expected plain tensors as parameters, got 0.weight, a DTensor",
        "fastdmd.AdamWEMA: expected no copies or pickles of a network that is cut, got one",
        "fastdmd.AdamWEMA: expected no copies or pickles of a network that is cut, got one",
        "fastdmd.AdamWEMA: expected compute_dtype where the network is cut, got torch.bfloat16 here",
        "fastdmd.AdamWEMA: expected 0.weight where the optimizer put it, got it moved or replaced",
        "fastdmd.DMD2: expected eager execution of networks that are cut, got compiled",
        "fastdmd.Sharding: expected parameters with a dimension to cut, got gain without; one of shape ",
        "fastdmd: expected the same content of --init-from in all processes, got others of ranks 1: ",
    ]
    for said in in_processes(2, refused, tmp_path):
        assert len(said) == len(expected) and all(map(str.startswith, said, expected)), said
    with pytest.raises(ValueError, match="expected a process group of several processes, got one process"):
        distillation.build(PLAIN.replace(shard=True), make_network(TINY))
