"""From the command line to a checked configuration, and from what a user got wrong to one line on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from fastdmd import data, ops
from fastdmd.diffusion import Denoiser, DenoisingNetwork
from fastdmd.memory import SMALLER, ran_out_of_memory
from fastdmd.networks.user_code import place_in_user_code, reason
from fastdmd.quality import Evaluation
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs import help, machine, outputs, terminal
from fastdmd.runs.config import CommandConfig, CommandSettings
from fastdmd.runs.presets import Preset
from fastdmd.settings import inputs

Config = TypeVar("Config", bound=CommandSettings)
NOT_DETERMINISTIC = "does not have a deterministic implementation"  # in what torch says of an operation
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # that no flag causes


@contextlib.contextmanager
def user_errors(command: str, doing: str = "setting up", advice: str = SMALLER) -> Iterator[None]:
    """One line and exit code 2 for what a user got wrong, 1 where memory or a disk ends. Around set-up, never around
    training."""
    with _one_line(command, doing, advice, 2, lambda error: isinstance(error, (ValueError, TypeError, OSError))):
        yield


@contextlib.contextmanager
def run_errors(command: str, doing: str, advice: str = SMALLER) -> Iterator[None]:
    """One line and exit code 1 where memory ends, for a full disk and the like, for what we say of the user's data and
    networks, and for what their own code raises. Around the run itself: any other error is a fault of ours and keeps
    its traceback."""
    with _one_line(command, doing, advice, 1, lambda e: isinstance(e, OSError) or str(e).startswith("fastdmd.")):
        yield


@contextlib.contextmanager
def _one_line(
    command: str, doing: str, advice: str, code: int, says_it_all: Callable[[BaseException], bool]
) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        if ran_out_of_memory(error):
            line, code = f"out of memory while {doing}; {advice}", 1
        elif isinstance(error, RuntimeError) and NOT_DETERMINISTIC in str(error):
            operation = str(error).partition(NOT_DETERMINISTIC)[0].strip()
            line = f"expected operations that --deterministic allows, got {operation}, while {doing}"
        elif not isinstance(error, SystemExit) and says_it_all(error):
            line = _said(error) if code == 2 else f"{_said(error)} (while {doing})"
            is_fate = isinstance(error, ConnectionError)  # of another process
            code = 1 if is_fate or (isinstance(error, OSError) and error.errno in DISK_ERRORS) else code
        elif place_in_user_code(error) is not None:  # a SystemExit of other code has its reasons
            line = f"expected your code to run, got {reason(error)}, while {doing}"
        else:
            raise
        terminal.report(command, line, error)
        raise SystemExit(code) from None


def _said(error: BaseException) -> str:
    """What an error says; of the system's, which name a file and what is wrong, in the form of ours."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"expected access to {str(error.filename):.400}, got: {error.strerror}"
    return str(error)


def leave(command: str, summary: dict[str, Any], num_iterations: int) -> None:
    """How a run ended, where that needs a word: a line or two, and exit code 1, or 128 + the number of a signal."""
    if skipped := {name: summary[name] for name in ("skipped_updates", "left_out_images") if summary[name]}:
        print("NaN or infinity:", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in skipped.items()))
    if summary["outcome"] == "complete":
        return
    print(f"{summary['outcome']} after {summary['iterations']} of {num_iterations} iterations")
    if summary["outcome"] == "interrupted":
        raise SystemExit(128 + summary["signal"])
    raise SystemExit(
        f"{terminal.typed(command)}: error: {summary['reason']}; the last good snapshot is kept; try lower learning "
        "rates, unless the teacher or the data are broken"
    )


def parse(
    config_class: type[Config],
    command: str,
    arguments: list[str] | None = None,
    presets: Mapping[str, Preset] | None = None,
) -> Config:
    """The preset that `--preset` names (or the first), with every other flag over it; checked."""
    import tyro  # commands alone need it

    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors(command):
        options: dict[str, Any] = {}
        if presets:
            name = next(iter(presets))
            for position, argument in enumerate(arguments):
                if argument == "--preset" and position + 1 < len(arguments):
                    name = arguments[position + 1]
                elif argument.startswith("--preset="):
                    name = argument.removeprefix("--preset=")
            if name not in presets:
                expected = f"expected --preset one of {', '.join(presets)}"
                raise ValueError(f"{expected}, got {name}{terminal.meant(name, presets)}")
            options["default"] = presets[name].config
        shown = help.followed_by_examples(command, arguments, presets or {})
        with terminal.readable_width(), shown, help.errors_as_lines():
            config = tyro.cli(
                config_class,
                args=arguments,
                prog=terminal.usage(command),
                registry=help.registry(),
                **options,
            )
        config.check()
        require_apart(config)
        return config


def require_apart(config: CommandSettings) -> None:
    """Raises ValueError for an --out among what the command reads."""
    if (out := getattr(config, "out", None)) is not None:
        outputs.require_apart(out, (named for named in inputs(config) if named != "mnist"))  # part of the package


def resolve_device(name: str, *, seed: int | None = None, deterministic: bool = False) -> torch.device:
    """`auto` takes a GPU if there is one. torch's own generators begin with `seed`: initial weights, dropout or code of
    the user's own may draw from them. Raises ValueError for a device that is not there, or lacks the backend that the
    environment asks for, and as `machine.be_deterministic` does, before the device is used."""
    if deterministic:
        machine.be_deterministic()
    if seed is not None:
        torch.manual_seed(seed)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    expected = "expected --device auto, cpu or a CUDA device that is there"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise ValueError(f"{expected}, got {name}: not one that the ops know")
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if ran_out_of_memory(error):  # of a GPU that another process fills
            raise
        raise ValueError(f"{expected}, got {name}: {str(error).splitlines()[0]}") from error
    ops.require_environment(device)
    return device


def make_evaluation(
    config: CommandConfig,
    network: Denoiser,
    dataset: data.Dataset | None,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Evaluation | None:
    """What the final figures are measured with; None where the user wants none."""
    settings = config.evaluation
    if settings.num_samples == 0:
        return None
    evaluation = Evaluation(
        network.image_shape,
        network.num_classes,
        num_samples=settings.num_samples,
        dataset=dataset,
        feature_network=settings.feature_network,
        reference=settings.reference,
        seed=config.seed,
        device=device,
        ranks=ranks,
    )
    for notice in evaluation.notices:
        terminal.say(notice)
    if evaluation.floor.num_images:
        real = "the embedded MNIST digits" if dataset is None else f"{len(dataset)} images of {dataset.name}"
        print(f"measured against {real}")
    return evaluation


def to_json(config: Any) -> dict[str, Any]:
    """Every setting, room by room, as JSON can hold it: paths are texts, tuples lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def print_resolved(config: Any, network: DenoisingNetwork, **parts: Any) -> None:
    """What `--dry-run` shows, as JSON."""
    description = network.describe()
    if network.foreign_name:
        description = {"class": network.foreign_name, **description}
        description["options"].pop("alphas_cumprod", None)  # a thousand numbers
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    resolved = {**to_json(config), "network": {**description, "num_parameters": num_parameters}, **parts}
    print(json.dumps(resolved, indent=2))
