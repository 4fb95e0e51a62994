"""Weight files, foreign networks, feature networks and statistics: a good one, how it is read, and what is right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.fuzz import truth
from benchmarks.fuzz.kind import Kind
from fastdmd import teachers
from fastdmd.networks.tensor_files import open_tensors
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.networks.weights import METADATA_KEY, load_network, save_network
from fastdmd.quality.features import load_feature_network, verify
from fastdmd.quality.frechet import FeatureStatistics
from fastdmd.teachers import edm
from fastdmd.teachers.edm_pickle import load_pickle
from tests.helpers import edm_pickles
from tests.helpers.diffusers_folders import diffusers_folder
from tests.helpers.edm_reference import random_state

SHAPE = (1, 8, 8)
NETWORK = UNetConfig(
    image_size=8,
    num_classes=3,
    patch_size=2,
    model_channels=8,
    channel_multipliers=(1,),
    num_blocks=1,
    attention_resolutions=(),
)
STATE = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor([1, 2**40]), "c.half": torch.ones(5).half()}


def _write_teacher(folder: Path) -> None:
    save_network(folder / "teacher.safetensors", make_network(), kind="teacher", record=None)


def make_network() -> UNet:
    torch.manual_seed(0)
    return UNet(NETWORK)


def _write_generator(folder: Path) -> None:
    save_network(
        folder / "generator.safetensors", make_network(), kind="generator", conditioning_sigma=80.0, clamped=True
    )


def _weights(path: Path) -> dict[str, Any]:
    network, metadata = load_network(path)
    return {"state": network.inner.state_dict(), "network": network.describe(), "kind": metadata["kind"]}


def _right_weights(path: Path) -> dict[str, Any]:
    tensors, metadata = truth.safetensors(path)
    found = json.loads(metadata[METADATA_KEY])
    state = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in tensors.items()}
    return {"state": state, "network": dataclasses.asdict(UNetConfig(**found["network"])), "kind": found["kind"]}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    found = open_tensors(path)
    return found.read({name: name for name in found.described})


def _flat(found: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in found.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        flat |= {key: array for key, array in inner.items() if isinstance(array, np.ndarray)}
    return flat


def _right_tensors(path: Path) -> dict[str, np.ndarray]:
    """Of whatever format the file is, whose name does not count."""
    start = path.read_bytes()[:9]
    if start[8:] == b"{":
        return truth.safetensors(path)[0]
    return _flat(truth.torch_archive(path) if start.startswith(b"PK") else truth.legacy(path))


def _write_index(folder: Path) -> None:
    parts = [{"a.weight": STATE["a.weight"]}, {name: STATE[name] for name in ("b", "c.half")}]
    for index, part in enumerate(parts):
        save_file(part, folder / f"part-{index}.safetensors")
    places = {name: f"part-{index}.safetensors" for index, part in enumerate(parts) for name in part}
    (folder / "model.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _right_index(path: Path) -> dict[str, Any]:
    places = json.loads(path.read_text())["weight_map"]
    return {name: truth.safetensors(path.parent / place)[0][name] for name, place in places.items()}


def _edm(path: Path) -> Any:
    edm.load(path)
    return load_pickle(path)


def _diffusers(path: Path) -> dict[str, Any]:
    network, _ = teachers.read(path)
    config = json.loads((path / "unet" / "config.json").read_bytes())
    known = {name: value for name, value in network.inner.config.items() if name in config and name[0] != "_"}
    return {"state": network.inner.state_dict(), "config": known, "parameterization": network.parameterization}


def _right_diffusers(path: Path) -> dict[str, Any]:
    config, scheduler = (
        json.loads((path / name).read_bytes()) for name in ("unet/config.json", "scheduler/scheduler_config.json")
    )
    tensors, _ = truth.safetensors(path / "unet" / "diffusion_pytorch_model.safetensors")
    known = {name: value for name, value in config.items() if name[0] != "_" and name in _DIFFUSERS_ARGUMENTS}
    prediction = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}[scheduler["prediction_type"]]
    state = {name: array.astype(np.float32) for name, array in tensors.items()}
    return {"state": state, "config": known, "parameterization": prediction}


_DIFFUSERS_ARGUMENTS: set[str] = set()  # filled where such a folder is made


def _write_diffusers(folder: Path) -> None:
    network, _ = diffusers_folder(folder / "model")
    _DIFFUSERS_ARGUMENTS.update(name for name in network.config if name[0] != "_")


class Features(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


IMAGES = torch.linspace(-1, 1, 128).view(2, *SHAPE)


def _features(path: Path) -> Any:
    network = load_feature_network(path)
    verify(network, SHAPE, str(path))
    return network(IMAGES)[0]


def _right_features(path: Path) -> Any:
    """Those of torch itself, of the file as zipfile reads it: of members that have the checksums they were given."""
    members = truth.zipfile.ZipFile(path)
    assert members.testzip() is None
    return torch.jit.load(str(path))(IMAGES).detach()


def _reference(path: Path) -> dict[str, Any]:
    found = FeatureStatistics.from_npz(path)
    return {"mean": found.mean, "covariance": found.covariance, "num_images": found.num_images}


def _write_statistics(folder: Path) -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    np.savez(folder / "reference.npz", mu=rng.normal(size=6), sigma=root @ root.T, num_images=np.int64(2))


def _write_torch(folder: Path, name: str, *, is_archive: bool) -> None:
    torch.save({"model": STATE, "step": 3, "name": "w"}, folder / name, _use_new_zipfile_serialization=is_archive)


def _write_edm(folder: Path) -> None:
    content = edm_pickles.dumps(edm_pickles.published(edm_pickles.TINY, random_state(edm_pickles.TINY)))
    (folder / "edm.pkl").write_bytes(content)


def _write_script(folder: Path) -> None:
    torch.jit.script(Features()).save(str(folder / "features.pt"))


SAMPLE = ("fastdmd.sample", "{}", "--num", "2", "--teacher-steps", "2", "--out", "{out}.npz", "--device", "cpu")
KINDS = (
    Kind("teacher", _write_teacher, "teacher.safetensors", _weights, _right_weights, command=SAMPLE),
    Kind("generator", _write_generator, "generator.safetensors", _weights, _right_weights, command=SAMPLE),
    Kind("index", _write_index, "model.index.json", _tensors, _right_index),
    Kind("pt", lambda folder: _write_torch(folder, "w.pt", is_archive=True), "w.pt", _tensors,
         _right_tensors),
    Kind("former pt", lambda folder: _write_torch(folder, "w.pth", is_archive=False), "w.pth", _tensors,
         _right_tensors),
    Kind("edm pickle", _write_edm, "edm.pkl", _edm, truth.edm, command=SAMPLE),
    Kind("diffusers", _write_diffusers, "model", _diffusers, _right_diffusers, command=SAMPLE),
    Kind("torchscript", _write_script, "features.pt", _features, _right_features),
    Kind("statistics", _write_statistics, "reference.npz", _reference, truth.statistics),
)  # fmt: skip
