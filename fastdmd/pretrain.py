"""`python -m fastdmd.pretrain`: trains a teacher, with EDM's objective or that of flow matching."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.pretrain")

import dataclasses
import functools
import sys

import torch

from fastdmd import teachers
from fastdmd.distill.budget import training_bytes
from fastdmd.distill.optimization import warm_up_notice
from fastdmd.memory import half, require_memory
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.ranks import ALONE, Ranks
from fastdmd.report import ending
from fastdmd.runs import cli, distributed, machine, resume, terminal
from fastdmd.runs.contents import contents
from fastdmd.runs.folder import REPORT, SAMPLES, SUMMARY
from fastdmd.runs.loop import Loop
from fastdmd.runs.pretraining import PretrainConfig, Pretraining
from fastdmd.runs.record import Record

ADVICE = "a smaller --batch-size or --model-channels needs less"


@terminal.command("fastdmd.pretrain")
@distributed.command("fastdmd.pretrain")
def main(arguments: list[str] | None = None) -> None:
    with cli.user_errors("fastdmd.pretrain"):
        arguments = resume.with_those_of_run(sys.argv[1:] if arguments is None else arguments)
    config = cli.parse(PretrainConfig, "fastdmd.pretrain", arguments)
    num_processes = distributed.number()
    own = half(config.batch_size // num_processes, num_processes=num_processes)
    smaller = f"{own} or a smaller --model-channels"
    with cli.user_errors("fastdmd.pretrain", advice=smaller):
        config, ranks, device = distributed.begin(config)
        distributed.require_parts(config.batch_size, ranks)
        past = None if config.dry_run else ranks.from_first(lambda: resume.past_of(config))
        config = config.replace(resume=None)
        if (notice := warm_up_notice(config.iterations, config.warmup_iterations)) is not None:
            terminal.say(notice)
        machine.prepare(device, batch_size=config.batch_size // ranks.size)
        distributed.require_same("arithmetic", lambda: machine.arithmetic(device), ranks)
        network = None if config.init is None else initial_network(config.init)
        if network is None:
            dataset = config.data.load(device=device)
            architecture = config.architecture.network(config.objective, dataset)
            config = dataclasses.replace(config, architecture=config.architecture.of(architecture))
            try_architecture(config, architecture, device, ranks)
            network = UNet(architecture)
        else:
            objective, architecture_of_init = config.objective.of(network), config.architecture.of(network.config)
            config = dataclasses.replace(config, objective=objective, architecture=architecture_of_init)
            dataset = config.data.load(image_shape=network.image_shape, num_classes=network.num_classes, device=device)
        if past is not None and ranks.from_first(functools.partial(past.has_nothing_left, config)):
            return
        if config.dry_run:
            cli.print_resolved(config, network)
            return
        network = network.to(device).in_best_layout()
        if config.label_emphasis != 1 and network.num_classes == 0:
            raise ValueError(f"expected --label-emphasis 1 without class labels, got {config.label_emphasis}")
        named = dataset if config.data.path else None
        evaluation = cli.make_evaluation(config, network, named, device, ranks)
        folder = distributed.folder_of(config, past, ranks)
        with folder.being_set_up():
            training = Pretraining(config, network, dataset, folder, ranks)
            made_of = contents(config.evaluation, named, init=network if config.init else None)
            distributed.require_same("files", lambda: made_of, ranks)
            checkpoints = resume.checkpoints_of(config, folder, arguments, device, made_of, ranks=ranks)
            record = Record(folder, config.record) if ranks.is_first else None
            loop = Loop(training, config, folder, checkpoints=checkpoints, record=record, ranks=ranks)
    parts = distributed.told(ranks, config.batch_size // ranks.size)
    print(f"training a teacher on {len(dataset)} images of {dataset.name}, in {folder.path}, on {device}{parts}")
    with cli.run_errors("fastdmd.pretrain", "training", smaller):
        summary = loop.run(evaluation)
    if config.record.report and ranks.is_first:
        is_complete = summary["outcome"] == "complete"
        ending.write(folder.path, config, device, teacher=None, real=dataset, is_complete=is_complete)
    results = (name for name in ("teacher.safetensors", SAMPLES, SUMMARY, REPORT) if (folder.path / name).exists())
    print(f"{folder.path}: {', '.join(results)}")
    cli.leave("fastdmd.pretrain", summary, config.iterations)


def initial_network(init: str) -> UNet:
    """The teacher to go on from. Raises ValueError for one that is not ours."""
    network = teachers.load(init)
    if not isinstance(network, UNet):
        raise ValueError(f"expected --init to be a network of fastdmd, got a {type(network).__name__}")
    return network.requires_grad_(True)


def try_architecture(
    config: PretrainConfig, architecture: UNetConfig, device: torch.device, ranks: Ranks = ALONE
) -> None:
    """Before either is made: ValueError where parts do not fit together, or network and batch not into memory."""
    try:
        num_bytes = training_bytes(lambda: UNet(architecture), config.batch_size // ranks.size)
    except RuntimeError as error:
        raise ValueError(f"expected a network whose parts fit together, got {error}") from error
    require_memory(num_bytes, device, f"this network with --batch-size {config.batch_size}", ADVICE)


if __name__ == "__main__":
    main()
