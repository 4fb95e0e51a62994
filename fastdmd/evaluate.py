"""`python -m fastdmd.evaluate`: measures the samples of a generator or a teacher against real images."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.evaluate")

import dataclasses
import functools
import json

from fastdmd import teachers
from fastdmd.files import write_atomically
from fastdmd.networks.identity import identity
from fastdmd.quality import table
from fastdmd.quality.evaluation import BATCH_SIZE
from fastdmd.runs import cli, distributed, folder, machine, terminal
from fastdmd.runs.config import EvaluateConfig
from fastdmd.runs.contents import contents
from fastdmd.runs.machine import versions
from fastdmd.sampling import with_fewer_steps

ADVICE = f"it samples {BATCH_SIZE} images at a time; use a larger --device"


@terminal.command("fastdmd.evaluate")
@distributed.command("fastdmd.evaluate")
def main(arguments: list[str] | None = None) -> None:
    config = cli.parse(EvaluateConfig, "fastdmd.evaluate", arguments)
    with cli.user_errors("fastdmd.evaluate", advice=ADVICE):
        config, ranks, device = distributed.begin(config)
        if config.out is not None:
            ranks.from_first(functools.partial(folder.require_file, config.out))
        machine.prepare(device)
        network, metadata = teachers.read(config.weights, config.adapter, device)
        distributed.require_same(
            "files", lambda: {"the network": identity(network), **contents(config.evaluation, None)}, ranks
        )
        sampler = teachers.sampler_of(network, metadata, config.evaluation.teacher_steps)
        dataset = config.data.load_named(network)
        evaluation = cli.make_evaluation(config, network, dataset, device, ranks)
        assert evaluation is not None  # at least two samples
    with cli.run_errors("fastdmd.evaluate", "measuring", ADVICE):
        samplers = with_fewer_steps(metadata["kind"], sampler)
        rows = {name: evaluation.measure(sampler, name=name) for name, sampler in samplers.items()}
    if config.out is not None and ranks.is_first:
        figures = {name: dataclasses.asdict(row) for name, row in {**rows, "floor": evaluation.floor}.items()}
        text = json.dumps({**figures, "seed": config.seed, "versions": versions(device)}, indent=2) + "\n"
        with cli.run_errors("fastdmd.evaluate", "writing the figures"):
            write_atomically(config.out, lambda file: file.write(text.encode()))
    print(table({**dict(reversed(rows.items())), "floor: real images": evaluation.floor}))


if __name__ == "__main__":
    main()
