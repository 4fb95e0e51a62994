"""A group of one process among others; copies and pickles of what has a group; errors and settings of one process."""

import copy
import errno
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdmd.optim import AdamWEMA
from fastdmd.ranks import Ranks
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.distributed import require_same_settings
from tests.helpers.gloo import in_processes


def step(optimizer, x):
    """What it moves, after an update by a gradient of x."""
    optimizer.backward(optimizer.network(x).sum())
    optimizer.step()
    return optimizer.network.weight.detach().clone()


def network_of(rank=0):
    network = nn.Linear(2, 1)
    nn.init.constant_(network.weight, 1.0 + rank)
    return network


def of_each(group):
    """In a group of its own, in that of all, and a copy of the latter. Adam's first step is the sign of the gradient:
    of inputs that cancel out over all ranks there is none."""
    rank = Ranks.of(group).rank
    own = [torch.distributed.new_group([other]) for other in range(2)][rank]  # all of them make each
    x = torch.tensor([[1.0, -1.0]]) * (1 - 2 * rank)
    options = {"learning_rate": 0.25, "weight_decay": 0.0}
    alone = AdamWEMA(network_of(rank), process_group=own, **options)
    shared = AdamWEMA(network_of(), process_group=group, **options)
    twin = copy.deepcopy(shared)
    said = []
    for optimizer in (alone, shared):
        with pytest.raises(TypeError) as error:
            pickle.dumps(optimizer)
        said.append(str(error.value))
    return step(alone, x), step(shared, x), step(twin, x), said


def test_a_group_of_one_among_others_is_alone_and_copies_share_theirs(tmp_path):
    found = in_processes(2, of_each, tmp_path)
    for rank, (alone, shared, twin, said) in enumerate(found):
        moved = torch.tensor([[0.25, -0.25]]) * (1 - 2 * rank)
        torch.testing.assert_close(alone, 1.0 + rank - moved)
        assert torch.equal(shared, torch.ones(1, 2)) and torch.equal(twin, shared)
        for text, size in zip(said, (1, 2), strict=True):
            expected = f"fastdmd.Ranks: expected what is pickled to have no process_group, got one of {size} process"
            assert text.startswith(expected) and "state_dict()" in text


def full():
    """As `outputs` names it: an error of the system with other words."""
    error = OSError("expected --out to be writable, got run: No space left on device")
    error.errno = errno.ENOSPC
    raise error


def of_one(group):
    """The number and the words of an error that one process has, in each of them."""
    ranks, found = Ranks.of(group), []

    def make():
        yield full() if ranks.rank else None

    for attempt in (
        lambda: ranks.from_first(full),
        lambda: ranks.together(full if ranks.rank else lambda: None),
        lambda: ranks.in_order(make(), print),
    ):
        with pytest.raises(OSError) as error:
            attempt()
        found.append((error.value.errno, str(error.value)))
    return found


def test_an_error_keeps_its_number_in_all_processes(tmp_path):
    """By which a full disk is told from a mistake: exit code 1, not 2."""
    expected = errno.ENOSPC, "expected --out to be writable, got run: No space left on device"
    assert in_processes(2, of_one, tmp_path) == [[expected] * 3] * 2


def of_settings(group):
    ranks, said = Ranks.of(group), []
    require_same_settings(TrainConfig(), ranks)
    for change in (
        {"out": Path("here" if ranks.is_first else "there")},
        {"out": None if ranks.is_first else Path("a")},
    ):
        with pytest.raises(ValueError) as error:
            require_same_settings(TrainConfig().replace(**change), ranks)
        said.append(str(error.value))
    return said


def test_another_out_of_one_process_is_refused(tmp_path):
    """The default has the time in it, which the first process decides."""
    refused = "fastdmd: expected the same settings in all processes, got others of ranks 1: --out "
    assert in_processes(2, of_settings, tmp_path) == [[f"{refused}there", f"{refused}a"]] * 2
