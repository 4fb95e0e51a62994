"""`python -m fastdmd.pairs`: pairs of noise and what a teacher makes of it by Heun's method, for DMD's regression."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.pairs")

from collections.abc import Sequence

import torch

from fastdmd import quality, teachers
from fastdmd.bars import bar
from fastdmd.data.pairs import RECORD, PairFolder, PairRecord, read_record
from fastdmd.memory import half
from fastdmd.networks.identity import identity
from fastdmd.runs import cli, continuity, machine, outputs, terminal
from fastdmd.runs.config import PairsConfig, of_label_emphasis
from fastdmd.runs.lock import locked, require_free
from fastdmd.sampling import HeunSampler


@terminal.command("fastdmd.pairs")
def main(arguments: list[str] | None = None) -> None:
    config = cli.parse(PairsConfig, "fastdmd.pairs", arguments)
    smaller = half(config.batch_size)
    with cli.user_errors("fastdmd.pairs", advice=smaller):
        device = cli.resolve_device(config.device, seed=config.seed, deterministic=config.deterministic)
        outputs.require_folder(config.out)
        machine.prepare(device, batch_size=config.batch_size)
        teacher, metadata = teachers.read(config.teacher, config.adapter, device)
        if metadata["kind"] != "teacher":
            raise ValueError(f"expected --teacher to be a teacher, got a {metadata['kind']} in {config.teacher}")
        label_emphasis, name = of_label_emphasis(config.label_emphasis, config.teacher), identity(teacher)
        if label_emphasis != 1:
            teacher.emphasize_labels(label_emphasis)
        sampler = HeunSampler(teacher, config.teacher_steps)
        record = PairRecord(
            teacher=name,
            image_shape=teacher.image_shape,
            num_classes=teacher.num_classes,
            sigma=sampler.sigma_max,
            teacher_steps=config.teacher_steps,
            num=config.num,
            batch_size=config.batch_size,
            seed=config.seed,
            device=device.type,
            label_emphasis=label_emphasis,
        )
        require_free(config.out / RECORD)
        if (config.out / RECORD).exists():
            continuity.require_same_pairs(config, read_record(config.out), record)
        folder = PairFolder(config.out, record)
    with cli.run_errors("fastdmd.pairs", "making pairs", smaller):
        folder.begin()
        with locked(config.out / RECORD):
            make(folder, list(folder.missing()), sampler, device)
    print(f"{config.out}: {config.num} pairs")


def make(folder: PairFolder, missing: Sequence[int], sampler: HeunSampler, device: torch.device) -> None:
    """Makes the files that are missing. Raises ValueError where the teacher gives NaN or infinity."""
    record = folder.record
    present = record.num_parts - len(missing)
    for index in bar(missing, unit="batch", initial=present, total=record.num_parts):
        part = record.part(index)
        labels = record.labels(part)
        class_labels = None if labels is None else labels.to(device)
        images = quality.sample(sampler, record.noise(part).to(device), class_labels)
        if num_broken := int((~images.isfinite().flatten(1).all(1)).sum()):
            raise ValueError(
                f"fastdmd.pairs: expected finite images of the teacher, got NaN or infinity in {num_broken}"
            )
        folder.write(index, images, labels)


if __name__ == "__main__":
    main()
