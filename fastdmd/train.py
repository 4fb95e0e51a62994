"""`python -m fastdmd.train`: distils a teacher into a generator of one step, or a few."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.train")

import dataclasses
import functools
import math
import sys
from typing import Any

import torch

from fastdmd import teachers
from fastdmd.data import Dataset
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.distill.budget import Budget, estimate
from fastdmd.distill.optimization import averages_notice, warm_up_notice
from fastdmd.memory import half, require_memory
from fastdmd.networks.unet import UNet
from fastdmd.report import ending
from fastdmd.runs import cli, continuity, distillation, distributed, machine, resume, terminal, watching
from fastdmd.runs.config import ResolvedTrainConfig, TrainConfig
from fastdmd.runs.contents import contents
from fastdmd.runs.course import Course
from fastdmd.runs.folder import BEST, GENERATOR, PLOT, REPORT, SAMPLES, SUMMARY
from fastdmd.runs.loop import Loop
from fastdmd.runs.presets import PRESETS
from fastdmd.runs.record import Record
from fastdmd.runs.stages import read_stage

BYTES_PER_DRAW = 4 * 4  # of each value of a batch: noise for the generator, of both turns, and what it makes of it
BYTES_PER_STEP = 4  # more for each step after the first: fresh noise
BYTES_PER_JUDGED = 3 * 4  # more with an adversarial term: real images, noise for them and for generated ones
BYTES_PER_PAIR = 3 * 4  # more with a regression: noise, the teacher's images, and the generator's


@terminal.command("fastdmd.train")
@distributed.command("fastdmd.train")
def main(arguments: list[str] | None = None) -> None:
    with cli.user_errors("fastdmd.train"):
        arguments = resume.with_those_of_run(sys.argv[1:] if arguments is None else arguments)
    chosen = cli.parse(TrainConfig, "fastdmd.train", arguments, PRESETS)
    num_processes = distributed.number()
    smaller = half(
        chosen.batch_size // num_processes,
        chosen.compute.accumulation_steps,
        num_processes,
        num_steps=chosen.noise.num_steps,
    )
    with cli.user_errors("fastdmd.train", advice=smaller):
        chosen, ranks, device = distributed.begin(chosen)
        distributed.require_parts(
            chosen.batch_size,
            ranks,
            accumulation_steps=chosen.compute.accumulation_steps,
            num_steps=chosen.noise.num_steps,
        )
        distributed.require_several(chosen.compute.shard, ranks)
        past = None if chosen.dry_run else ranks.from_first(lambda: resume.past_of(chosen))
        if (notice := warm_up_notice(chosen.iterations, chosen.optimizer.warmup_iterations)) is not None:
            terminal.say(notice)
        averages = chosen.optimizer.averages(chosen.batch_size)
        updates = -(-chosen.iterations // chosen.dfake_gen_update_ratio)
        if chosen.init_from is None and (notice := averages_notice(averages, updates)) is not None:
            terminal.say(notice)
        teacher, metadata = load_teacher(chosen, device)
        stage = None
        if chosen.init_from is not None and not (past and past.checkpoints):
            stage = read_stage(chosen.init_from, teacher)
        config = continuity.with_defaults_of_run(
            chosen.replace(resume=None),
            lambda settings: settings.for_teacher(teacher, device),
            None if past is None else past.config,
        )
        if past is not None and ranks.from_first(functools.partial(past.has_nothing_left, config)):
            return
        own_batch = config.batch_size // ranks.size
        machine.prepare(device, precision=config.compute.precision, batch_size=own_batch)
        distributed.require_same("arithmetic", lambda: machine.arithmetic(device), ranks)
        dataset = config.data.load_named(teacher)
        real = distillation.real_images(config, teacher, dataset)
        pairs = distillation.teacher_pairs(config, teacher)
        if config.gan.is_on and config.gan.gan_features != "images":
            teachers.verify_features(teacher)
        if config.method.differentiates_denoisers:
            teachers.verify_derivative(teacher)
        if config.noise.num_steps > 1 and (notice := teachers.verify_level_embedding(teacher)) is not None:
            terminal.say(notice)
        if real is not None:
            notice = unseen_classes(real, teacher.num_classes, are_judged=config.gan.is_on)
            if notice is not None:
                terminal.say(notice)
        budget = budget_of(config, teacher, device, ranks.size)
        if config.dry_run:
            cli.print_resolved(config, teacher, budget=None if budget is None else budget.report())
            return
        num_values = own_batch * math.prod(teacher.image_shape)
        num_more_steps = len(config.noise.generator_sigmas) - 1
        bytes_per_value = BYTES_PER_DRAW + BYTES_PER_JUDGED * config.gan.is_on + BYTES_PER_STEP * num_more_steps
        bytes_per_value += BYTES_PER_PAIR * config.method.has_regression
        require_memory(bytes_per_value * num_values, device, f"--batch-size {config.batch_size}")
        if budget is not None and (advice := budget.advice()) is not None:
            if budget.is_hopeless:
                raise ValueError(advice)
            print(f"{advice} (an estimate)")
        evaluation = cli.make_evaluation(config, teacher, dataset, device, ranks)
        folder = distributed.folder_of(config, past, ranks)
        teacher_record = None if config.measure_teacher else metadata.get("record")
        print(f"distilling {config.teacher} into {folder.path} on {device}{distributed.told(ranks, own_batch)}")
        if "acceleration" in metadata:
            print(metadata["acceleration"])
        with folder.being_set_up():
            training = distillation.Distillation(config, teacher, folder, teacher_record, real, pairs, stage, ranks)
            for notice in training.notices:
                terminal.say(notice)
            course = Course(training, config.monitor, evaluation, folder, config.batch_size)
            watch = watching.make_watch(config, training.model, dataset, ranks)
            made_of = contents(config.evaluation, dataset, pairs=pairs)
            distributed.require_same("files", lambda: made_of, ranks)
            checkpoints = resume.checkpoints_of(
                config, folder, arguments, device, made_of, training.teacher_identity, ranks
            )
            record = Record(folder, config.record) if ranks.is_first else None
            loop = Loop(training, config, folder, course, watch, checkpoints, record, ranks)
    with cli.run_errors("fastdmd.train", "distilling", smaller if budget is None else budget.smaller()):
        summary = loop.run(evaluation)
    measured = [summary[name]["frechet_distance"] for name in ("generator", "floor")]
    if real is not None and None not in measured:
        print(overlap(dataset, "The adversarial term" if config.gan.is_on else "The generator"))
    if summary["teacher"]["recorded"]:
        print("The teacher's distance and accuracy are on record in its weight file; --measure-teacher repeats them.")
    if config.record.report and ranks.is_first:
        is_complete = summary["outcome"] == "complete"
        shown = config.data.load() if dataset is None and config.teacher == "mnist" and is_complete else dataset
        ending.write(folder.path, config, device, teacher=teacher, real=shown, is_complete=is_complete)
    results = (name for name in (GENERATOR, BEST, SAMPLES, PLOT, SUMMARY, REPORT) if (folder.path / name).exists())
    print(f"{folder.path}: {', '.join(results)}")
    cli.leave("fastdmd.train", summary, config.iterations)


def unseen_classes(real: Dataset, num_classes: int, *, are_judged: bool) -> str | None:
    """What to say where some classes have no real image, for an adversarial term or for a generator to start from."""
    num_unseen = 0 if real.labels is None else num_classes - len(real.labels.unique())
    if num_unseen == 0:
        return None
    consequence = "beyond its first step the generator learns nothing of them"
    if are_judged:
        consequence = "the adversarial term takes whatever is generated of them for false"
    return f"{num_unseen} of the teacher's {num_classes} classes have no image in {real.name}: {consequence}"


def overlap(named: Dataset | None, learner: str) -> str:
    """What the reader of the figures should know where training has seen real images."""
    if named is None:
        return (
            f"{learner} trained on the test digits: precision, recall and kernel distance compare with them, "
            "the Fréchet distance does not."
        )
    return f"{learner} trained on {named.name}, with which these figures compare; keep a part for evaluate."


def load_teacher(config: TrainConfig, device: torch.device) -> tuple[DenoisingNetwork, dict[str, Any]]:
    """The teacher and its file's metadata; for a dry run without one, the shapes of the preset's network."""
    preset = PRESETS[config.preset]
    if config.teacher is None:
        if not config.dry_run:
            raise ValueError(f"expected --teacher, for --preset {config.preset} {preset.teacher_file}, got none")
        assert preset.network is not None  # of a preset without a teacher of its own
        with torch.device("meta"):
            return UNet(preset.network).in_best_layout(), {}
    teacher, metadata = teachers.read(config.teacher, config.adapter, device)
    if metadata["kind"] != "teacher":
        raise ValueError(f"expected --teacher to be a teacher, got a {metadata['kind']} in {config.teacher}")
    teachers.verify_training(teacher)
    if preset.network is not None:
        expected, got = (
            f"{'x'.join(map(str, network.image_shape))} images of {network.num_classes or 'no'} classes"
            for network in (preset.network, teacher)
        )
        if expected != got:
            raise ValueError(f"expected a teacher for {expected} with --preset {config.preset}, got one for {got}")
    return teacher, metadata


def budget_of(
    config: ResolvedTrainConfig, teacher: DenoisingNetwork, device: torch.device, num_processes: int = 1
) -> Budget | None:
    """Of each of so many processes; None where the teacher is somebody's module that does not run on meta tensors, and
    of networks in parts."""
    if config.compute.shard:
        return None
    eager = config.replace(execution="eager")  # as meta tensors can be
    try:
        found = estimate(
            teacher,
            lambda network: distillation.build(eager, network),
            config.batch_size // num_processes,
            device,
            generator_inputs=config.noise.generator_inputs,
        )
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        if not teacher.foreign_name:
            raise
        return None
    return dataclasses.replace(found, num_processes=num_processes)


if __name__ == "__main__":
    main()
