"""Checkpoints that processes write together: read by more and by fewer, left out where a file of them is not known, and
not there at all where the disk of one process is full."""

import errno
import functools
import resource

import pytest
import torch
from torch import nn

from fastdmd.files import SUMS
from fastdmd.ranks import Ranks
from fastdmd.runs import checkpoint
from fastdmd.shards import Sharding, whole
from tests.helpers.gloo import in_processes


def network_of(width):
    """Rows that no number of processes above one divides, and a bias of a single one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 5), nn.Linear(5, 1))


def write(path, width, group, most_bytes=None):
    network = network_of(width)
    cut = Sharding(network, group).cut_(network)
    if most_bytes is not None and Ranks.of(group).rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    state = {"weights": dict(cut.named_parameters()), "step": torch.tensor(7), "name": "own"}
    checkpoint.write(path, state, ranks=Ranks.of(group))


def read(path, group):
    content = checkpoint.read(path, Ranks.of(group))
    return {name: whole(value) for name, value in content["weights"].items()}, content["step"], content["name"]


def test_three_write_what_two_and_four_read(tmp_path):
    path = tmp_path / "00000001"
    in_processes(3, functools.partial(write, path, 3), tmp_path / "written")
    for size in (2, 4):
        for weights, step, name in in_processes(size, functools.partial(read, path), tmp_path / str(size)):
            assert step == 7 and name == "own"
            for own, expected in network_of(3).named_parameters():
                assert torch.equal(weights.pop(own), expected)
            assert not weights


def refused(path, group):
    with pytest.raises(ValueError) as error:
        read(path, group)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("__1_0.distcp", f"expected parts that {SUMS} names, got __1_0.distcp"), (".metadata", f".metadata in {SUMS}")],
)
def test_a_file_without_a_checksum_is_none_of_it(tmp_path, name, message):
    path = tmp_path / "00000001"
    in_processes(2, functools.partial(write, path, 3), tmp_path / "written")
    lines = [line for line in (path / SUMS).read_text().splitlines(keepends=True) if line.split()[1] != name]
    (path / SUMS).write_text("".join(lines))
    for said in in_processes(2, functools.partial(refused, path), tmp_path / "read"):
        assert said.startswith(f"expected a whole checkpoint in {path}, got ") and message in said


def not_written(path, group):
    with pytest.raises(OSError) as error:
        write(path, 4000, group, most_bytes=20_000)  # of 32,000 for its two rows
    return error.value.errno, error.value.filename


def test_where_one_disk_is_full_nothing_is_left_and_all_know(tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "00000001"
    for number, _ in in_processes(2, functools.partial(not_written, path), tmp_path / "said"):
        assert number == errno.EIO
    assert list((tmp_path / "run").iterdir()) == []
