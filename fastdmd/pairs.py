"""`python -m fastdmd.pairs`: pairs of noise and what a teacher makes of it by Heun's method, for DMD's regression."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.pairs")

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastdmd import quality, teachers
from fastdmd.bars import bar
from fastdmd.data.pairs import LOCK, RECORD, PairFolder, PairRecord, read_record
from fastdmd.memory import half
from fastdmd.networks.identity import identity
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs import cli, continuity, distributed, machine, outputs, terminal
from fastdmd.runs.config import PairsConfig, of_label_emphasis
from fastdmd.runs.lock import locked, require_free
from fastdmd.sampling import HeunSampler


@terminal.command("fastdmd.pairs")
@distributed.command("fastdmd.pairs")
def main(arguments: list[str] | None = None) -> None:
    config = cli.parse(PairsConfig, "fastdmd.pairs", arguments)
    smaller = half(config.batch_size)
    with cli.user_errors("fastdmd.pairs", advice=smaller):
        config, ranks, device = distributed.begin(config)
        ranks.from_first(lambda: outputs.require_folder(config.out))
        machine.prepare(device, batch_size=config.batch_size)
        teacher, metadata = teachers.read(config.teacher, config.adapter, device)
        if metadata["kind"] != "teacher":
            raise ValueError(f"expected --teacher to be a teacher, got a {metadata['kind']} in {config.teacher}")
        label_emphasis, name = of_label_emphasis(config.label_emphasis, config.teacher), identity(teacher)
        distributed.require_same("files", lambda: {"the teacher": name}, ranks)
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
        folder = ranks.from_first(lambda: open_folder(config, record))
    with cli.run_errors("fastdmd.pairs", "making pairs", smaller):
        with contextlib.ExitStack() as held:
            ranks.from_first(lambda: begin(folder, held))
            make(folder, ranks.from_first(lambda: list(folder.missing())), sampler, device, ranks)
    print(f"{config.out}: {config.num} pairs")


def open_folder(config: PairsConfig, record: PairRecord) -> PairFolder:
    """Raises OSError where somebody writes to it, ValueError where it is of other settings."""
    require_free(config.out / LOCK)
    if (config.out / RECORD).exists():
        continuity.require_same_pairs(config, read_record(config.out), record)
    return PairFolder(config.out, record)


def begin(folder: PairFolder, held: contextlib.ExitStack) -> None:
    """Takes the folder for this process, as long as it is held: others may have written to it since it was opened."""
    folder.path.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(folder.path / LOCK))
    PairFolder(folder.path, folder.record).begin()


def make(
    folder: PairFolder, missing: Sequence[int], sampler: HeunSampler, device: torch.device, ranks: Ranks = ALONE
) -> None:
    """Makes the files that are missing: all ranks in turn, the first one writes. Raises ValueError where the teacher
    gives NaN or infinity."""
    record, own = folder.record, missing[ranks.rank :: ranks.size]
    present = record.num_parts - len(missing)

    def made() -> Iterator[tuple[int, Tensor, Tensor | None]]:
        for index in bar(own, unit="batch", initial=present, total=present + len(own)):
            part = record.part(index)
            labels = record.labels(part)
            class_labels = None if labels is None else labels.to(device)
            images = quality.sample(sampler, record.noise(part).to(device), class_labels)
            if num_broken := int((~images.isfinite().flatten(1).all(1)).sum()):
                raise ValueError(
                    f"fastdmd.pairs: expected finite images of the teacher, got NaN or infinity in {num_broken}"
                )
            yield index, images, labels

    ranks.in_order(made(), lambda pairs: folder.write(*pairs))


if __name__ == "__main__":
    main()
