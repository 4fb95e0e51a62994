"""Processes of one group, forked from the test: cheap, as what it has imported is there."""

import functools
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch

from fastdmd import teachers

MOST_SECONDS = 300  # then a process that waits for another is killed
FAILED = 99


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


def started_as_torchrun_does(size, command, arguments, folder, before=lambda rank: None):
    """Exit codes, and what each process said on stderr, of a command with `--out run` in a folder, started `size`
    times. `before(rank)` is called in each of them first."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            os._exit(_command(command, [*arguments, "--out", "run"], folder, functools.partial(before, rank), rank))
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return codes, [(folder / f"stderr-{rank}").read_text() for rank in range(size)]


def _command(command, arguments, folder, before, rank) -> int:
    os.chdir(folder)
    signal.alarm(MOST_SECONDS)
    with open(f"stderr-{rank}", "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        try:
            before()
            command.main(arguments)
            return 0
        except SystemExit as exit_:
            if isinstance(exit_.code, str):
                print(exit_.code, file=sys.stderr)
            return exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return FAILED


def spoil_teacher():
    """Lets this process read other weights than there are."""
    read = teachers.read

    def changed(*given):
        network, metadata = read(*given)
        next(network.parameters()).data.mul_(1.0001)
        return network, metadata

    teachers.read = changed
