"""What runs leave, and go on from: a good one, how it is read, and what is right."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fuzz import truth
from benchmarks.fuzz.kind import Kind
from benchmarks.fuzz.weights import STATE, make_network
from fastdmd import train
from fastdmd.data.pairs import PairFolder, load_pairs
from fastdmd.networks.weights import save_network
from fastdmd.runs import checkpoint
from fastdmd.runs.stages import read_stage
from tests.helpers import small_datasets

RECORD = dataclasses.replace(small_datasets.TINY_PAIRS, num=5)
TRAIN = (
    "--iterations 4 --batch-size 2 --dfake-gen-update-ratio 2 --warmup-iterations 0 --log-every 1 --snapshots 2 "
    "--num-samples 0 --checkpoint-every 2 --device cpu"
).split()


def _write_checkpoint(folder: Path) -> None:
    state = {"weights": STATE, "columns": [torch.zeros(2), 0.5], "numbers": [1, None, True, "text", {"nested": [7]}]}
    checkpoint.write(folder / "00000004", {"iteration": 4, "run": state})


def _right_checkpoint(path: Path) -> Any:
    tensors, _ = truth.safetensors(path / checkpoint.TENSORS)

    def put(part: Any) -> Any:
        if isinstance(part, dict):
            return tensors[part["$tensor"]] if part.keys() == {"$tensor"} else {k: put(v) for k, v in part.items()}
        return [put(inner) for inner in part] if isinstance(part, list) else part

    return put(json.loads((path / checkpoint.REST).read_text())["state"])


def _write_pairs(folder: Path) -> None:
    pairs = PairFolder(folder / "pairs", RECORD)
    pairs.begin()
    for index in list(pairs.missing()):
        part = RECORD.part(index)
        pairs.write(index, RECORD.noise(part) / 2, RECORD.labels(part))


def _pairs(path: Path) -> dict[str, Any]:
    found = load_pairs(path, teacher=RECORD.teacher, image_shape=(1, 4, 4), num_classes=3, sigma=80.0)
    return {"images": found.images, "labels": found.labels, "num": len(found)}


def _right_pairs(path: Path) -> dict[str, Any]:
    record = json.loads((path / "pairs.json").read_text())
    num_files = -(-record["num"] // record["batch_size"])
    parts = [truth.safetensors(path / f"pairs-{index:05d}.safetensors")[0] for index in range(num_files)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in ("images", "labels")}
    return joined | {"num": record["num"]}


def _write_run(folder: Path) -> None:
    """One that was killed after its second iteration of four; what it comes to lies beside the folder."""
    teacher, whole = folder.parent / "of a run.safetensors", folder.parent / "whole run"
    save_network(teacher, make_network(), kind="teacher")
    images = folder.parent / "of a run.npz"
    small_datasets.write_npz(images, images=small_datasets.pixels(1, 8), labels=small_datasets.LABELS)
    run = folder / "run"
    train.main(["--teacher", str(teacher), "--data", str(images), "--out", str(run), *TRAIN])
    shutil.copytree(run, whole)
    shutil.rmtree(run / "checkpoints" / "00000004")
    (run / "summary.json").unlink()


def _go_on(path: Path) -> dict[str, Any]:
    train.main(["--resume", str(path)])
    return truth.safetensors(path / "generator.safetensors")[0]


def _right_run(path: Path) -> dict[str, Any]:
    good = path.parents[2] / "good" / "whole run"
    return truth.safetensors(good / "generator.safetensors")[0]


def _write_stage(folder: Path) -> None:
    whole = folder.parent / "whole run"
    shutil.copytree(
        whole, folder / "run", ignore=shutil.ignore_patterns("*.png", "checkpoints", "generator*", "*.json*")
    )


def _stage(path: Path) -> dict[str, Any]:
    found = read_stage(path, make_network())
    states = {"generator": found.generator, "fake_score": found.fake_score, "kept": found.kept}
    return states | {"sigmas": found.sampler.sigmas}


def _right_stage(path: Path) -> dict[str, Any]:
    tensors, metadata = truth.safetensors(path / "networks.safetensors")
    description = json.loads(metadata["fastdmd"])
    kept = description["averages"].index(description["kept"])
    prefixes = {"generator": "generator.", "fake_score": "fake_score.", "kept": f"average.{kept}."}
    states = {
        part: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for part, prefix in prefixes.items()
    }
    one = [description["conditioning_sigma"]] if "conditioning_sigma" in description else None
    return states | {"sigmas": one or description["generator_sigmas"]}


KINDS = (
    Kind("checkpoint", _write_checkpoint, "00000004", checkpoint.read, _right_checkpoint),
    Kind("pairs", _write_pairs, "pairs", _pairs, _right_pairs),
    Kind("run", _write_run, "run", _go_on, _right_run, is_command=True, goes_on=True),
    Kind("stage", _write_stage, "run", _stage, _right_stage),
)
