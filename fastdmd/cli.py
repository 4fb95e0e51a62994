"""From the command line to a checked configuration, and from what a user got wrong to one line on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import tyro

from fastdmd import data
from fastdmd.adapters import Adapted
from fastdmd.config import EvaluationConfig
from fastdmd.diffusion import Denoiser
from fastdmd.quality import Evaluation
from fastdmd.unet import UNet

Config = TypeVar("Config")


@contextlib.contextmanager
def user_errors(command: str, kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError)) -> Iterator[None]:
    """One line and exit code 2 for what a user got wrong: any kind around set-up, the disk alone around training."""
    try:
        yield
    except kinds as error:
        print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


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
        f"{command}: error: {summary['reason']}; the last good snapshot is kept; try lower learning rates, unless the "
        "teacher or the data are broken"
    )


def parse(config_class: type[Config], command: str, arguments: list[str] | None = None,
          presets: dict[str, Config] | None = None) -> Config:  # fmt: skip
    """The preset that `--preset` names (or the first), with every other flag over it; checked."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors(command):
        default = None
        if presets:
            name = next(iter(presets))
            for position, argument in enumerate(arguments):
                if argument == "--preset" and position + 1 < len(arguments):
                    name = arguments[position + 1]
                elif argument.startswith("--preset="):
                    name = argument.removeprefix("--preset=")
            if name not in presets:
                raise ValueError(f"expected --preset one of {', '.join(presets)}, got {name}")
            default = presets[name]
        config = tyro.cli(config_class, args=arguments, prog=f"python -m {command}", default=default)
        config.check()
        return config


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected --device auto, cpu or a CUDA device that is there, got {name}: {reason}") from error
    return device


def make_evaluation(config: EvaluationConfig, network: Denoiser, dataset: data.Dataset | None,
                    device: torch.device) -> Evaluation | None:  # fmt: skip
    """What the final figures are measured with; None where the user wants none."""
    if config.num_samples == 0:
        return None
    evaluation = Evaluation(
        network.image_shape, network.num_classes, num_samples=config.num_samples, dataset=dataset,
        feature_network=config.feature_network, reference=config.reference, seed=config.seed, device=device,
    )  # fmt: skip
    if evaluation.notice:
        print(evaluation.notice)
    elif dataset is not None:
        print(f"measured against {len(dataset)} images of {dataset.name}")
    return evaluation


def load_data(config: EvaluationConfig, network: Denoiser) -> data.Dataset | None:
    """The user's images, checked against the network; None where none were named. They need no labels."""
    if config.data is None:
        return None
    dataset = data.load(config.data, labels=config.labels, resize=config.resize, crop=config.crop)
    num_classes = None if dataset.labels is None else network.num_classes
    return dataset.require(image_shape=network.image_shape, num_classes=num_classes)


def to_json(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def print_resolved(config: Any, network: UNet | Adapted, **parts: Any) -> None:
    """What `--dry-run` shows, as JSON."""
    if isinstance(network, UNet):
        description = dataclasses.asdict(network.config)
    else:
        description = {"class": type(network.network).__name__, **network.describe()}
        description["options"].pop("alphas_cumprod", None)  # a thousand numbers
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    resolved = {**to_json(config), "network": {**description, "num_parameters": num_parameters}, **parts}
    print(json.dumps(resolved, indent=2))
