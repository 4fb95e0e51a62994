"""`fastdmd.train --shard`: processes of which each has a part of every network write what one would have written."""

import json
import os
import pickle
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.soak import differences, prepare
from fastdmd import train
from fastdmd.files import SUMS, sum_line
from fastdmd.quality import evaluation
from fastdmd.runs import checkpoint
from tests.distributed.test_commands import (
    AUTO,
    alone,  # noqa: F401
    at_iteration,
    refused,
    require_same_run,
    several,
    with_a_budget,  # noqa: F401
)
from tests.helpers.kills import training
from tests.helpers.tiny_runs import QUIET

SHARD = ["--shard"]
TINY = ["--iterations", "6", "--snapshots", "1", "--num-samples", "0", "--eval-every", "0", *QUIET]


def test_parts_are_one_run(alone, tmp_path):  # noqa: F811
    """With measurements, in the last round of which one process has no batch, and a best that is read again."""
    arguments, run = alone
    codes, said = several(tmp_path, [*arguments, *SHARD], 2)
    assert codes == [0, 0], said
    require_same_run(tmp_path / "run", run)
    files = {path.name for path in next((tmp_path / "run" / "checkpoints").iterdir()).iterdir()}
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "state.json", "state.safetensors", "SHA256SUMS"} <= files


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A training without measurements: its arguments, the run that two processes leave, and one ended at its fourth
    iteration, of which a checkpoint is there."""
    folder = tmp_path_factory.mktemp("parts")
    arguments = [*prepare(folder), *TINY, *SHARD]
    kill = at_iteration(4, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "budget_of", train.budget_of)  # put back
        codes, said = several(folder / "whole", arguments, 2)
        assert codes == [0, 0], said
        codes, said = several(folder / "killed", arguments, 2, kill)
    assert codes == [1, -signal.SIGKILL]
    assert said[0].count("error: fastdmd: expected an answer of all 2 processes, got one that ended") == 1, said
    return arguments, folder


def test_as_many_go_on_to_the_bit_and_others_to_rounding(parts, tmp_path):
    arguments, folder = parts
    shutil.copytree(folder / "killed" / "run", tmp_path / "2" / "run")
    codes, said = several(tmp_path / "2", [*arguments, *AUTO], 2)
    assert codes == [0, 0], said
    assert differences(folder / "whole" / "run", tmp_path / "2" / "run") == []
    shutil.copytree(folder / "killed" / "run", tmp_path / "4" / "run")
    codes, said = several(tmp_path / "4", [*arguments, *AUTO], 4)
    assert codes == [0] * 4, said
    assert "processes 2, now 4" in said[0]
    weights, others = (load_file(path / "run" / "generator.safetensors") for path in (folder / "whole", tmp_path / "4"))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-3)


def test_a_process_that_dies_in_a_measurement_ends_all_with_one_line(alone, tmp_path):  # noqa: F811
    """In which the others wait for its parts of networks."""

    def die(*given):
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare_rank(rank):
        if rank == 1:
            evaluation.sample = die

    codes, said = several(tmp_path, [*alone[0], *SHARD], 2, prepare_rank)
    assert codes == [1, -signal.SIGKILL], said
    assert said[0].count("error: fastdmd: expected an answer of all 2 processes, got one that ended") == 1, said
    assert "Traceback" not in said[0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 6


def end_otherwise(checkpoint):
    broken = checkpoint / "__1_0.distcp"
    broken.write_bytes(broken.read_bytes()[:-8] + b"otherend")


class Called:
    def __reduce__(self):
        return os.mkdir, ("called",)


def forge(checkpoint):
    """With the checksum that belongs to it."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Called()))
    lines = (checkpoint / SUMS).read_text().splitlines(keepends=True)
    lines = [sum_line(checkpoint / ".metadata") if line.split()[1] == ".metadata" else line for line in lines]
    (checkpoint / SUMS).write_text("".join(lines))


@pytest.mark.parametrize("spoil", [end_otherwise, forge])
def test_a_broken_part_is_left_out_by_all(parts, tmp_path, spoil):
    """Of the newest checkpoint: all go on with the one before, and nothing in it is called."""
    arguments, folder = parts
    shutil.copytree(folder / "killed" / "run", tmp_path / "run")
    first, second = sorted((tmp_path / "run" / "checkpoints").iterdir())[-2:]
    spoil(second)
    codes, said = several(tmp_path, [*arguments, *AUTO], 2)
    assert codes == [0, 0], said
    assert not list(tmp_path.rglob("called"))
    assert f"{second.name} left out" in said[0] and f"going on from {first.name}" in said[0]
    assert differences(folder / "whole" / "run", tmp_path / "run") == []


def test_what_is_refused(parts, alone, tmp_path, capfd):  # noqa: F811
    arguments, folder = parts
    code, said = training(tmp_path / "one", arguments)
    assert code == 2 and "expected several processes for --shard, as torchrun starts them, got one" in said
    refused(tmp_path / "compiled", [*arguments, "--compile"], "--shard")
    shutil.copytree(folder / "killed" / "run", tmp_path / "copies" / "run")
    plain = [argument for argument in arguments if argument != "--shard"]
    codes, said = several(tmp_path / "copies", [*plain, *AUTO], 2)
    assert codes == [2, 2] and "--shard True, got False" in "".join(said)
    newest = max((folder / "killed" / "run" / "checkpoints").iterdir())
    with pytest.raises(ValueError, match="expected several processes with --shard"):
        checkpoint.read(newest)


def test_a_second_stage_starts_from_parts(parts, tmp_path):
    """And what parts have left, one process reads: `networks.safetensors` is whole."""
    arguments, folder = parts
    first = folder / "whole" / "run"
    weights = load_file(first / "networks.safetensors")
    assert any(name.startswith("fake_score.") for name in weights)
    for name, options, size in (("parts", arguments, 2), ("one", [x for x in arguments if x != "--shard"], 1)):
        codes, said = several(tmp_path / name, [*options, "--init-from", str(first)], size)
        assert codes == [0] * size, said
    lines = ((tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()[0] for name in ("parts", "one"))
    mine, theirs = map(json.loads, lines)
    assert mine["loss_fake"] == pytest.approx(theirs["loss_fake"], rel=2e-3)
