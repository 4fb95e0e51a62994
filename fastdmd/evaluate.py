"""`python -m fastdmd.evaluate`: Fréchet distance and class accuracy of a weight file's samples."""

from __future__ import annotations

from fastdmd import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.evaluate")

import dataclasses
import json

from fastdmd import cli, machine, teachers
from fastdmd.config import EvaluateConfig
from fastdmd.files import write_atomically
from fastdmd.machine import versions
from fastdmd.quality import table
from fastdmd.sample import sampler_of


def main(arguments: list[str] | None = None) -> None:
    config = cli.parse(EvaluateConfig, "fastdmd.evaluate", arguments)
    with cli.user_errors("fastdmd.evaluate"):
        device = cli.resolve_device(config.device)
        machine.prepare(device)
        network, metadata = teachers.read(config.weights, config.adapter, device)
        sampler, evaluations = sampler_of(network, metadata, config.teacher_steps)
        dataset = cli.load_data(config, network)
        if config.out is not None and not config.out.parent.is_dir():
            raise FileNotFoundError(f"expected --out in an existing folder, got {config.out}")
        evaluation = cli.make_evaluation(config, network, dataset, device)
    row = evaluation.measure(sampler, evaluations=evaluations, name=metadata["kind"])
    print(table({metadata["kind"]: row, "floor: real images": evaluation.floor}))
    if config.out is not None:
        figures = {metadata["kind"]: dataclasses.asdict(row), "floor": dataclasses.asdict(evaluation.floor)}
        text = json.dumps({**figures, "seed": config.seed, "versions": versions(device)}, indent=2) + "\n"
        write_atomically(config.out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
