"""`python -m fastdmd.completion`: a script that completes `fastdmd`, its commands and flags, in bash, zsh or fish."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
from typing import Annotated, Any, Literal, get_args

import tyro

from fastdmd.__main__ import COMMANDS
from fastdmd.export import ExportConfig
from fastdmd.report.__main__ import ReportConfig
from fastdmd.runs import help, terminal
from fastdmd.runs.config import EvaluateConfig, PairsConfig, SampleConfig, TrainConfig
from fastdmd.runs.pretraining import PretrainConfig
from fastdmd.settings import Positional, Switch

Shell = Literal["bash", "zsh", "fish"]


@dataclasses.dataclass(frozen=True)
class Ops:
    """What `fastdmd.ops` takes, without tyro."""

    all: Switch = False


@dataclasses.dataclass(frozen=True)
class Completion:
    shell: Annotated[Shell, Positional]


CONFIGS: dict[str, type] = {
    "train": TrainConfig,
    "pretrain": PretrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "pairs": PairsConfig,
    "ops": Ops,
    "completion": Completion,
}


@terminal.command("fastdmd.completion")
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        terminal.usage("fastdmd.completion"),
        description="Print a script that completes `fastdmd`, its commands and flags.",
        epilog=help.examples("fastdmd.completion"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=get_args(Shell), help="the one that is to run it")
    shell = parser.parse_args(arguments).shell
    tyro.cli(all_commands(), prog="fastdmd", args=["--tyro-print-completion", shell], registry=help.registry())


def all_commands() -> Any:
    """The union of what the commands take, each under its name."""
    return functools.reduce(
        operator.or_,
        (
            Annotated[config, tyro.conf.subcommand(name, description=COMMANDS[name], prefix_name=False)]
            for name, config in CONFIGS.items()
        ),
    )


if __name__ == "__main__":
    main()
