"""Processes of one group, forked from the test: cheap, as what it has imported is there."""

import os
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

MOST_SECONDS = 100  # then a process that waits for another is killed


def in_processes(size, function, folder):
    """What `function(group)` returns in each of `size` processes that gloo joins, in the order of their ranks."""
    if torch.cuda.is_initialized():
        pytest.skip("a fork of a process that has used a GPU differentiates nothing")
    folder.mkdir(parents=True, exist_ok=True)
    processes = [_fork(rank, size, function, folder) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    said = "".join((folder / f"{rank}.txt").read_text() for rank in range(size))
    assert codes == [0] * size, said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _fork(rank: int, size: int, function, folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    with open(folder / f"{rank}.txt", "w") as sys.stderr:
        try:
            signal.alarm(MOST_SECONDS)
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            store = torch.distributed.FileStore(str(folder / "store"), size)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
            torch.save(function(torch.distributed.group.WORLD), folder / f"{rank}.pt")
            torch.distributed.barrier()
            code = 0
        except BaseException:
            traceback.print_exc()
    os._exit(code)
