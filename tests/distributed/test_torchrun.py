"""torchrun itself: a process that dies is started again with the others, and the run ends as if nothing had been."""

import json
import random
import sys

import pytest
from safetensors.torch import load_file

from benchmarks import ranks
from benchmarks.soak import differences, prepare

SHORT = ["--iterations", "16", "--num-samples", "0", "--eval-every", "0", "--no-report"]


def test_parts_of_networks(tmp_path):
    arguments = [*prepare(tmp_path), *SHORT, "--iterations", "4", "--shard"]
    assert ranks.torchrun(arguments, tmp_path / "parts", 2).wait() == 0, (tmp_path / "parts" / "stderr").read_text()
    run = tmp_path / "parts" / "run"
    assert json.loads((run / "summary.json").read_text())["outcome"] == "complete"
    parts = sorted(path.name for path in (run / "checkpoints" / "00000004").glob("*.distcp"))
    assert parts == ["__0_0.distcp", "__1_0.distcp"]
    assert all(value.isfinite().all() for value in load_file(run / "generator.safetensors").values())


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_two_kills_leave_what_none_leaves(tmp_path):
    """`python -m benchmarks.ranks` has more of them, at any moment."""
    arguments = [*prepare(tmp_path), *SHORT]
    assert ranks.torchrun(arguments, tmp_path / "whole", 2).wait() == 0, (tmp_path / "whole" / "stderr").read_text()

    def has_checkpoint(iteration):
        return lambda run: any(int(path.name) >= iteration for path in run.glob("checkpoints/[0-9]*[0-9]"))

    kills = ranks.killed(arguments, tmp_path / "killed", 2, [has_checkpoint(2), has_checkpoint(8)], random.Random(0))
    assert kills == 2
    assert differences(tmp_path / "whole" / "run", tmp_path / "killed" / "run") == []
