"""`python -m fastdmd.train`: distils a teacher into a one-step generator."""

from __future__ import annotations

import sys

from fastdmd import cli, teachers, trainer
from fastdmd.checkpoint import RunFolder
from fastdmd.config import TRAIN_PRESETS, TrainConfig


def main(arguments: list[str] | None = None) -> None:
    config = cli.parse(TrainConfig, "fastdmd.train", arguments, TRAIN_PRESETS)
    with cli.user_errors("fastdmd.train"):
        device = cli.resolve_device(config.device)
        teacher, metadata = teachers.read(config.teacher, config.adapter, device)
        if metadata["kind"] != "teacher":
            raise ValueError(f"expected --teacher to be a teacher, got a {metadata['kind']} in {config.teacher}")
        config = config.for_teacher(teacher)
        dataset = cli.load_data(config, teacher)
        if config.dry_run:
            cli.print_resolved(config, teacher)
            return
        evaluation = cli.make_evaluation(config, teacher, dataset, device)
        run = RunFolder(config.resolved_out, cli.to_json(config))
    print(f"distilling {config.teacher} into {run.path} on {device}")
    teacher_record = None if config.measure_teacher else metadata.get("record")
    summary = trainer.distill(config, teacher, run, evaluation, teacher_record)
    print(f"{run.path}: generator.safetensors, samples.png, summary.json")
    if summary["outcome"] != "complete":
        print(f"{summary['outcome']} after {summary['iterations']} of {config.iterations} iterations")
    if summary["outcome"] == "diverged":
        sys.exit("fastdmd.train: error: the losses are not finite; the last snapshot is kept; try lower learning rates")
    if summary["outcome"] == "interrupted":
        sys.exit(130)


if __name__ == "__main__":
    main()
