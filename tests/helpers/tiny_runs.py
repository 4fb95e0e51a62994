"""Tiny runs of `fastdmd.train`, what they are fed, and commands that refuse to begin."""

import json
import re

import numpy as np
import pytest
from torch import nn

from fastdmd import train

QUIET = ["--record", "none", "--no-report"]  # nothing beside what a run is about
QUICK = [
    "--iterations",
    "4",
    "--batch-size",
    "4",
    "--dfake-gen-update-ratio",
    "2",
    "--warmup-iterations",
    "0",
    "--log-every",
    "2",
    "--snapshots",
    "2",
    "--num-samples",
    "40",
    "--teacher-steps",
    "2",
    "--device",
    "cpu",
    *QUIET,
]


def run_train(teacher_file, out, *options):
    train.main(["--teacher", str(teacher_file), "--out", str(out), *QUICK, *options])
    return json.loads((out / "summary.json").read_text())


def digits(num=40):
    """Random images `[num, 1, 28, 28]` of three classes, sorted by class."""
    images = np.random.default_rng(0).integers(0, 256, (num, 1, 28, 28), np.uint8)
    return images, np.sort(np.arange(num) % 3)


INFORMED = {"image_shape": (1, 8, 8), "num_classes": 3, "labels": "one_hot", "sigma_data": 0.5}


class Colour(nn.Sequential):
    """A feature network of images in colour."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten())


def distill(out, *options):
    """The generator's file."""
    train.main(["--out", str(out), *QUICK, *options])
    return out / "generator.safetensors"


def refuses(command, arguments, message, capsys):
    """That a command ends with exit code 2 and one line."""
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and re.fullmatch(r"fastdmd\.\w+: error: [^\n]*\n", error), error
    assert re.search(message, error), error
