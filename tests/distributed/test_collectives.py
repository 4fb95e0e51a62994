"""What processes tell each other, and how often: counted by the operations that torch's dispatcher sees."""

import concurrent.futures
import functools
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdmd.distill.exchange import exchange
from fastdmd.distill.gan import GANSettings
from fastdmd.distill.turns import DMD2
from fastdmd.optim import AdamWEMA
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs import distillation, distributed
from tests.helpers.adversarial import CONFIG, TINY, real_images
from tests.helpers.gloo import in_processes
from tests.helpers.networks import make_network

CPU = torch.device("cpu")
NOTHING = lambda network, rank: None  # noqa: E731
TAIL = 16  # elements behind the gradients, by which processes decide together


class Told(TorchDispatchMode):
    """The collectives inside, by name, and the bytes of each."""

    def __init__(self):
        super().__init__()
        self.collectives = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if str(function).startswith("c10d."):
            tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
            self.collectives.append((str(function).split(".")[1], sum(x.nbytes for x in tensors)))
        return function(*arguments, **(options or {}))


@pytest.fixture
def two_processes():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.parametrize("divergence", ["reverse-kl", "jensen-shannon"])
def test_one_flat_gradient_an_update_and_nothing_else(two_processes, accumulation_steps, divergence):
    """Of 2-byte gradients; an f-divergence needs its mean, a number for each part of a generator turn's batch."""
    config = CONFIG.replace(divergence=divergence, accumulation_steps=accumulation_steps, precision="bf16")
    model = distillation.build(config, make_network(TINY), two_processes)
    draws = distillation.make_draws(config, make_network(TINY), CPU, real_images())
    optimizers = model.generator_optimizer, model.guidance_optimizer, model.head_optimizer
    generator, fake_score, head = (
        ("allreduce_", 2 * (sum(-(-p.numel() // 16) * 16 for p in optimizer.parameters) + TAIL))
        for optimizer in optimizers
    )
    means = [] if divergence == "reverse-kl" else [("allreduce_", 4)] * accumulation_steps
    for step in range(4):
        with Told() as told:
            model.iterate(step, draws)
        turn = [*means, generator] if step % config.dfake_gen_update_ratio == 0 else []
        expected = [*turn, fake_score, head]
        assert [name for name, _ in told.collectives] == [name for name, _ in expected]
        assert sorted(n for _, n in told.collectives)[len(means) * bool(turn) :] == sorted(
            n for _, n in expected if n > 8
        )
    with Told() as told:
        exchange([model.generator_tally, model.guidance_tally, model.class_sums], model.ranks)
    assert [name for name, _ in told.collectives] == ["allgather_"]


def test_one_process_tells_nobody():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        group = torch.distributed.group.WORLD
        model = distillation.build(CONFIG, make_network(TINY), group)
        draws = distillation.make_draws(CONFIG, make_network(TINY), CPU, real_images())
        with Told() as told:
            model.iterate(0, draws)
            exchange([model.generator_tally], model.ranks)
        assert told.collectives == [] and model.ranks.is_alone and Ranks.of(None) is ALONE
    finally:
        torch.distributed.destroy_process_group()


# What one process alone has seen.


def broken_at(iteration, group):
    """Weights before and after, and the first fault, where one process has a NaN among its images."""
    ranks = Ranks.of(group)
    config = CONFIG.replace(batch_size=6 // ranks.size, divergence="reverse-kl")
    draws = distillation.make_draws(config, make_network(TINY), CPU, real_images(), first_sample=3 * ranks.rank)
    model: DMD2 = distillation.build(config, make_network(TINY), group)

    def spoiled(step):
        found = draws(step)
        if step == iteration and ranks.rank == ranks.size - 1:
            found.real_images[0] = torch.nan
        return found

    states = []
    for step in range(iteration + 2):
        states.append(torch.cat([x.flatten().clone() for x in model.guidance_optimizer.weights.values()]))
        model.iterate(step, spoiled)
    exchange([model.generator_tally, model.guidance_tally], ranks)
    reading = model.guidance_tally.read()
    return torch.equal(states[iteration], states[iteration + 1]), reading.fault, reading.num_bad, reading.num_good


def test_a_fault_of_one_process_stays_the_update_of_all_and_has_its_name(tmp_path):
    alone = broken_at(2, None)
    assert alone == (True, (3, "real image"), 1, 3)
    assert in_processes(2, functools.partial(broken_at, 2), tmp_path) == [alone, alone]


def balanced(shares, group):
    """How far weights move where each process has left out such a share of its samples."""
    network = torch.nn.Linear(2, 2)
    optimizer = AdamWEMA(network, learning_rate=0.1, process_group=group)
    moved = []
    for row in shares:
        before = [value.clone() for value in optimizer.weights.values()]
        optimizer.backward(network(torch.ones(1, 2)).sum())
        optimizer.advance()
        norm = optimizer.update(torch.tensor(True), balance=torch.tensor(row[Ranks.of(group).rank] - 0.5))
        is_moved = not torch.equal(before[0], next(iter(optimizer.weights.values())))
        moved.append(is_moved)
        assert norm.isnan() != is_moved
    return moved


def begun(spoil, group):
    """The weights that an optimizer begins with, and which weights and buffers the process had brought."""
    torch.manual_seed(Ranks.of(group).rank)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4))
    network.to(memory_format=torch.channels_last)
    network[1].running_mean.fill_(Ranks.of(group).rank)
    spoil(network, Ranks.of(group).rank)
    own = network[0].weight.detach().clone()
    optimizer = AdamWEMA(network, learning_rate=0.1, ema_decay=0.9, process_group=group)
    averaged = optimizer.ema_network[0].weight.detach()
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(optimizer.weights["0.weight"], network[0].weight) and torch.equal(averaged, network[0].weight)
    return own, network[0].weight.detach(), network[1].running_mean


def test_all_begin_with_the_weights_and_buffers_of_the_first(tmp_path):
    """As in DistributedDataParallel: weights that differ would stay apart, unseen."""
    (first, taken, mean), (second, other, other_mean) = in_processes(2, functools.partial(begun, NOTHING), tmp_path)
    assert torch.equal(first, taken) and torch.equal(first, other) and not torch.equal(first, second)
    assert mean.tolist() == other_mean.tolist() == [0.0] * 4


KINDS = [torch.bool, torch.int16, torch.uint16, torch.int64, torch.float8_e4m3fn, torch.bfloat16, torch.complex64]


def with_buffers(group):
    """Of every kind of number, empty, of no dimension, laid out in another order, and expanded."""
    ranks = Ranks.of(group)
    network = torch.nn.Linear(2, 2)
    for index, kind in enumerate(KINDS):
        network.register_buffer(f"own_{index}", torch.tensor([1 - ranks.rank, 0, 1 - ranks.rank]).to(kind))
    network.register_buffer("empty", torch.zeros(0))
    network.register_buffer("number", torch.tensor(float(ranks.rank)))
    network.register_buffer("turned", torch.arange(6.0).add(ranks.rank).view(2, 3).t())
    network.register_buffer("wide", torch.arange(2.0).add(ranks.rank)[:, None].expand(2, 3))
    ranks.spread_(network)
    with pytest.raises(TypeError) as error:
        AdamWEMA(network, learning_rate=0.1, process_group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
    return dict(network.named_buffers()), str(error.value)


def test_buffers_of_any_kind_are_those_of_the_first(tmp_path):
    """gloo alone knows no int16 and no float8. A process that is not in a group has none, which is said."""
    for found, said in in_processes(2, with_buffers, tmp_path):
        assert all(found[f"own_{i}"].to(torch.complex64).tolist() == [1, 0, 1] for i in range(len(KINDS)))
        assert [found[f"own_{i}"].dtype for i in range(len(KINDS))] == KINDS
        assert found["number"].item() == 0 and found["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert found["wide"].tolist() == [[0, 0, 0], [1, 1, 1]]
        assert said == "fastdmd.Ranks: expected a process group that this process is in, got -100"


def test_networks_of_other_shapes_are_refused_and_the_first_teacher_is_taken(tmp_path):
    def reshape(network, rank):
        network[1].running_var = torch.ones(4, dtype=torch.float64 if rank else torch.float32)

    def made(group):
        with pytest.raises(ValueError) as error:
            begun(reshape, group)
        teacher = make_network(TINY)
        teacher.conv_in.bias.data += Ranks.of(group).rank
        return str(error.value), distillation.build(CONFIG, teacher, group).teacher.conv_in.bias.detach()

    expected = "fastdmd: expected the same names, shapes and dtypes of tensors in all processes, got others of ranks 1"
    for said, bias in in_processes(2, made, tmp_path):
        assert said.startswith(expected) and torch.equal(bias, make_network(TINY).conv_in.bias)


def test_processes_judge_together_how_many_samples_were_left_out(tmp_path):
    shares = [(0.0, 0.0), (1.0, 0.0), (0.75, 0.125), (0.5, 0.25), (1.0, 0.25)]
    found = in_processes(2, functools.partial(balanced, shares), tmp_path)
    assert found == [[True, False, True, True, False]] * 2


def shared(group):
    """What the methods of ranks give each process."""
    ranks = Ranks.of(group)
    rows = [
        ranks.rows(6),
        ranks.mean_(torch.tensor([1.0, 2.0]) * (ranks.rank + 1)),
        ranks.gather(torch.tensor(ranks.rank)),
    ]
    made = iter([f"{ranks.rank} a", f"{ranks.rank} b"][: 2 - ranks.rank])
    taken: list[str] = []
    ranks.in_order(made, taken.append)
    rows += [taken, ranks.from_first(lambda: ranks.rank), ranks.gather_objects(ranks.rank)]
    errors = []

    def refuse(value):
        if value == "b":
            raise ValueError(f"took {value} of {ranks.rank}")

    def fail():
        raise ValueError(f"of {ranks.rank}")
        yield

    for attempt in (
        lambda: ranks.from_first(lambda: next(fail())),
        lambda: ranks.in_order(fail() if ranks.rank == 1 else iter("abc"), taken.append),
        lambda: ranks.in_order(iter("ab"), refuse),  # in their last round, by the first process alone
        lambda: ranks.rows(7),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        errors.append(str(error.value))
    return rows, errors


def test_what_ranks_share(tmp_path):
    """Also the errors of one."""
    (first, errors), (second, other_errors) = in_processes(2, shared, tmp_path)
    refused = "fastdmd.Ranks: expected a batch that 2 processes divide, got 7"
    assert errors == other_errors == ["of 0", "of 1", "took b of 0", refused]
    assert first[0] == slice(0, 3) and second[0] == slice(3, 6)
    for found in (first, second):
        assert found[1].tolist() == [1.5, 3.0] and found[2].tolist() == [0, 1]
        assert found[4] == 0 and found[5] == [0, 1]
    assert first[3] == ["0 a", "1 a", "0 b"] and second[3] == []


def test_without_an_adversarial_term_there_is_no_other_optimizer(two_processes):
    config = CONFIG.replace(gan=GANSettings(), batch_size=2)
    model = distillation.build(config, make_network(TINY), two_processes)
    with Told() as told:
        model.iterate(0, distillation.make_draws(config, make_network(TINY), CPU))
    assert [name for name, _ in told.collectives] == ["allreduce_"] * 2


def test_each_start_has_a_name_of_its_own():
    """In a store that is kept, whoever comes first to it."""
    store, names = torch.distributed.HashStore(), []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            found = []
            for rank in order:
                found.append(pool.submit(distributed.name_of_start, store, rank, 3))
                time.sleep(0.05)
        names.append({future.result() for future in found})
    assert [len(own) for own in names] == [1, 1, 1] and len(set.union(*names)) == 3
