"""A command that torchrun, or who sets the variables that it sets, has started several times: one run of them all."""

from __future__ import annotations

import datetime
import functools
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs import cli, terminal
from fastdmd.runs.cli import to_json
from fastdmd.runs.folder import RunFolder, SilentFolder
from fastdmd.runs.resume import Past, open_folder
from fastdmd.settings import flags

RANK, SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
NEEDED = (RANK, SIZE, LOCAL_RANK, "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = datetime.timedelta(minutes=30)  # for the slowest that one does while others wait: distances of many features
WAIT_SECONDS = 0.02
FIRST_TO_FAIL = "fastdmd/first_to_fail"  # whose error is said, a key of the store

Chosen = TypeVar("Chosen", bound=Any)
_store: Any = None  # of torch.distributed, which all processes reach


def number() -> int:
    """Of processes, before they have met: at least one, whatever the environment says."""
    size = os.environ.get(SIZE, "1")
    return int(size) if size.isdecimal() and size.strip("0") else 1


def is_alone() -> bool:
    return os.environ.get(SIZE, "1") == "1"


def require_alone(command: str) -> None:
    """For commands that one process runs. Raises SystemExit, once said, where there are more."""
    if not is_alone():
        if os.environ.get(RANK, "0") == "0":
            terminal.report(
                command, f"expected one process, got {os.environ[SIZE]} ({SIZE}); start it without torchrun"
            )
        raise SystemExit(2)


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Around the `main` of a command that may have several processes: they meet first, all but the first are silent, an
    error is said by the process that has it first, and the group ends with the work."""

    def decorate(main: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(main)
        def one_of_several(arguments: list[str] | None = None) -> Any:
            if is_alone():
                return main(arguments)
            is_first = os.environ.get(RANK, "0") == "0"
            with terminal.one_of_several(_may_report, is_silent=not is_first):
                try:
                    with cli.user_errors(name):
                        _meet()
                    result = main(arguments)
                except SystemExit as exit_:
                    if isinstance(exit_.code, str) and not is_first:
                        raise SystemExit(1) from None  # the first one says it
                    raise
                except BaseException:
                    _may_report()  # as good as said: this one shows its traceback
                    raise
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
                return result

        return one_of_several

    return decorate


def _may_report() -> bool:
    """Whether no other process has had an error before."""
    own = os.environ.get(RANK, "0")
    if _store is None:  # they have not met
        return own == "0"
    try:
        return _store.compare_set(FIRST_TO_FAIL, "", own) == own.encode()
    except RuntimeError:  # without torchrun the first process holds it, which has ended, and has said why
        return own == "0"


def join(device: str) -> Ranks:
    """The processes that run this command on `--device`, which waits for all of them; `ALONE` where there is one.

    NCCL joins GPUs, gloo CPUs, and what the hosts tell each other. Raises ValueError for a GPU that is not there or
    that all would share.
    """
    if is_alone():
        return ALONE
    size = int(os.environ[SIZE])
    rank = int(os.environ[RANK])
    found = device_of(device)
    if found != "cpu":
        torch.cuda.set_device(found)
    backend = "gloo" if found == "cpu" else "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=TIMEOUT)
    return Ranks.of(torch.distributed.group.WORLD)


def _meet() -> None:
    """At a store, before anything else: what is wrong may be so with one process alone, as on a machine without the
    folder of a run. Raises ValueError for an environment without what torch needs to know."""
    global _store
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise ValueError(f"expected {', '.join(NEEDED)} in the environment, as torchrun sets them, got no {missing[0]}")
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
        _store = torch.distributed.PrefixStore(name_of_start(store, rank, size), store)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"expected {os.environ[SIZE]} processes to meet at {place}, got {error!s:.200}") from error


def begin(config: Chosen) -> tuple[Chosen, Ranks, torch.device]:
    """Joins the processes of a command: their settings, with the place of results that the first one decides, and the
    device of this one. Raises ValueError as `join`, `require_same_settings` and `cli.resolve_device` do, and for a
    place among what the command reads."""
    ranks = join(config.device)
    require_same_settings(config, ranks)
    config = ranks.from_first(config.placed)
    cli.require_apart(config)
    place = device_of(config.device)
    return config, ranks, cli.resolve_device(place, seed=config.seed, deterministic=config.deterministic)


def name_of_start(store: Any, rank: int, size: int) -> str:
    """A name for this start of all processes, the same in all of them.

    torchrun keeps its store when it starts them again, and counts its starts on each machine apart: without a name of
    its own, a start would find the addresses of processes that are gone. The first process takes a new name; the others
    answer to what they find, until it is one that has heard them.
    """
    own, place = secrets.token_hex(8), "fastdmd/start"
    if rank == 0:
        store.set(place, own)
        answers = [store.get(f"{place}/{own}/{other}").decode() for other in range(1, size)]  # waits for each
        store.set(f"{place}/{own}/heard", ",".join(answers))
        return own
    end = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < end:
        name = store.get(place).decode()
        store.set(f"{place}/{name}/{rank}", own)
        heard = f"{place}/{name}/heard"
        if store.check([heard]) and own in store.get(heard).decode().split(","):
            return name
        time.sleep(WAIT_SECONDS)
    raise ValueError(f"no answer of the first process in {TIMEOUT}")


def device_of(name: str) -> str:
    """`--device`, of several processes that of this one. Raises ValueError for one that all would share."""
    if is_alone() or name == "cpu":
        return name
    if name not in ("auto", "cuda"):
        raise ValueError(f"expected --device auto, cuda or cpu of {os.environ[SIZE]} processes, got {name}")
    num_devices = torch.cuda.device_count()
    if name == "auto" and num_devices == 0:
        return "cpu"
    local = int(os.environ[LOCAL_RANK])
    if local >= num_devices:
        raise ValueError(f"expected a GPU for each process of a machine, got {num_devices} for {LOCAL_RANK} {local}")
    return f"cuda:{local}"


def require_same_settings(config: Any, ranks: Ranks) -> None:
    """Raises ValueError where a process was started with others than the first one."""
    if ranks.is_alone:
        return
    settings = to_json(config)
    own = {flag: functools.reduce(dict.__getitem__, place, settings) for place, flag in flags(config)}
    first = ranks.from_first(lambda: own)
    others = [f"{flag} {value}" for flag, value in own.items() if value != first[flag]]
    ranks.require_equal("settings", lambda: ", ".join(others))


def require_same(what: str, describe: Callable[[], Mapping[str, Any]], ranks: Ranks) -> None:
    """Raises ValueError where a process has another description than the first one, by what is another in it."""
    if ranks.is_alone:
        return
    own = describe()
    first = ranks.from_first(lambda: own)
    others = [f"{name} {own.get(name)}" for name in {**first, **own} if own.get(name) != first.get(name)]
    ranks.require_equal(what, lambda: "; ".join(others))


def require_parts(batch_size: int, ranks: Ranks, *, accumulation_steps: int = 1, num_steps: int = 1) -> None:
    """Raises ValueError for a batch that ranks, accumulation steps and steps of a generator do not divide."""
    if batch_size % (ranks.size * accumulation_steps * num_steps):
        counts = {"--accumulation-steps": accumulation_steps, "steps of --generator-sigmas": num_steps}
        each = " and ".join(f"{count} {name}" for name, count in counts.items() if count > 1)
        each = each and f", with {each} each"
        raise ValueError(f"expected --batch-size that {ranks.size} processes divide{each}, got {batch_size}")


def require_several(shard: bool, ranks: Ranks) -> None:
    """Raises ValueError where one process is to have parts of networks."""
    if shard and ranks.is_alone:
        raise ValueError("expected several processes for --shard, as torchrun starts them, got one")


def told(ranks: Ranks, own_batch: int) -> str:
    """Behind the name of a device."""
    return "" if ranks.is_alone else f", {ranks.size} processes of {own_batch} images each"


def folder_of(config: Any, past: Past | None, ranks: Ranks) -> RunFolder:
    """The run's, which the first process writes to. Raises as `resume.open_folder` does, in all of them."""
    opened: list[RunFolder] = []
    ranks.from_first(lambda: opened.append(open_folder(config, past)))
    return opened[0] if opened else SilentFolder(config.out, to_json(config))
