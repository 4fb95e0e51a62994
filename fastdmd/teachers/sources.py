"""Where teachers come from: files, folders and code of many kinds, each taken as a `Denoiser` and tried once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastdmd.diffusion import Denoiser, DenoisingNetwork
from fastdmd.networks import diffusers_unet
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.options import NO_OPTIONS, TeacherOptions, flag
from fastdmd.networks.states import infinite_buffers, load_weights, require_finite
from fastdmd.networks.user_code import Code, make_network, user_code
from fastdmd.networks.weights import ASSETS, generator_of, load_network
from fastdmd.sampling import Generator, HeunSampler, Sampler
from fastdmd.teachers import edm
from fastdmd.teachers.trial import accelerate_network, verify, verify_training

ACCEPTED = "mnist, a .safetensors file that fastdmd wrote, a .pkl of EDM, a folder of diffusers, or package.module:name"
WEIGHTS_OF_RUNS = ("generator.safetensors", "teacher.safetensors")


def load(
    source: Code | Path, *, device: str | torch.device = "cpu", network: Code | None = None, **options: Any
) -> DenoisingNetwork:
    """A teacher, ready to be distilled: in eval mode, without gradients, on `device`.

    `source`: `mnist`, the embedded one; a `.safetensors` file that fastdmd wrote; a `.pkl` of EDM; a folder of
    diffusers (`UNet2DModel`); `package.module:name`, or what that names: a module, or a class or function that makes
    one without arguments. A module is taken over, not copied. `options` are those of `TeacherOptions`; `network` may
    here be a module or what makes one, too. A network that is not fastdmd's runs once, and a copy of it takes a
    gradient once; see `verify` and `verify_training`. Without `accelerate=False` it computes with our ops from then on;
    see `fastdmd.accelerate`.

    Raises ValueError, TypeError or OSError, one line long, with what was expected and what came.
    """
    teacher, metadata = read(source, TeacherOptions(**options), device, network=network)
    if metadata["kind"] != "teacher":
        raise ValueError(f"fastdmd.teachers: expected a teacher, got a {metadata['kind']} in {source}")
    verify_training(teacher)
    return teacher


def load_generator(path: str | Path, *, device: str | torch.device = "cpu", network: Code | None = None) -> Generator:
    """A generator from a weight file that fastdmd wrote, on `device`: `load_generator(path)(noise, class_labels)`.

    `network` makes one that is not fastdmd's, as in `load`. Raises ValueError, TypeError or OSError, one line long.
    """
    found, metadata = read(path, device=device, network=network)
    if metadata["kind"] != "generator":
        raise ValueError(f"fastdmd.load_generator: expected a generator, got a {metadata['kind']} in {path}")
    return generator_of(found, metadata)


def is_code(source: str) -> bool:
    """Whether it names some to be imported. Raises ValueError for what is no teacher's name."""
    return _kind(source) == "code"


def sampler_of(network: Denoiser, metadata: Mapping[str, Any], num_steps: int) -> Sampler:
    """What `read` gave, as what makes images: a generator, or Heun's method of so many steps for a teacher."""
    if metadata["kind"] == "generator":
        return generator_of(network, metadata)
    return HeunSampler(network, num_steps)


def read(
    source: Code | Path,
    options: TeacherOptions = NO_OPTIONS,
    device: str | torch.device = "cpu",
    *,
    network: Code | None = None,
) -> tuple[DenoisingNetwork, dict[str, Any]]:
    """As `load`, a teacher or a generator; and what its weight file says of it, its `kind` at the least, and the
    `acceleration` of a network that is not fastdmd's.

    `network`, if it is given, stands for that of `options`. Raises as `load` does.
    """
    kind, given = _kind(source), options.given()
    code = options.network if network is None else network
    if kind != "file" and code is not None:
        raise ValueError(f"fastdmd.teachers: expected --network with a .safetensors file only, got {source}")
    if kind != "code" and options.weights is not None:
        raise ValueError(f"fastdmd.teachers: expected --teacher-weights with package.module:name only, got {source}")
    if options.weights_key is not None and options.weights is None:
        raise ValueError(f"fastdmd.teachers: expected --weights-key with --teacher-weights only, got {source}")
    if given and kind in ("file", "pickle"):
        raise ValueError(f"fastdmd.teachers: expected no {_flags(given)} with {source}, which brings its own")
    if kind == "code":
        with user_code("teachers", f"{_name(source)} to be a teacher"):
            teacher = _from_code(source, options)
    else:
        assert isinstance(source, (str, Path))
        if kind == "file":
            return _from_file(source, code, device, options)
        teacher = edm.load(source) if kind == "pickle" else _from_folder(Path(source), given)
    with user_code("teachers", f"{_name(source)} on {device}, in eval mode"):
        teacher = teacher.to(device).eval().requires_grad_(False)
    if teacher.foreign_name:
        verify(teacher)
    return teacher, {"kind": "teacher", **_accelerated(teacher, options)}


def _from_file(
    source: str | Path, code: Code | None, device: str | torch.device, options: TeacherOptions
) -> tuple[DenoisingNetwork, dict[str, Any]]:
    path = ASSETS / "teacher.safetensors" if source == "mnist" else source
    network, metadata = load_network(path, device=device, network=code)
    if network.foreign_name:
        verify(network, generator_of(network, metadata).sigmas if metadata["kind"] == "generator" else None)
    return network, {**metadata, **_accelerated(network, options)}


def _accelerated(network: DenoisingNetwork, options: TeacherOptions) -> dict[str, str]:
    """Lets somebody's network compute with our ops, and says what of it does, as `acceleration`."""
    if not network.foreign_name or not options.accelerate:
        return {}
    return {"acceleration": f"{network.foreign_name}: {accelerate_network(network)}"}


def _from_folder(path: Path, options: Mapping[str, Any]) -> Adapted:
    if weights := [file for name in WEIGHTS_OF_RUNS if (file := path / name).is_file()]:
        raise ValueError(f"fastdmd.teachers: expected {ACCEPTED}, got the run {path}, which holds {weights[0]}")
    module, arguments, found = diffusers_unet.load_folder(path)
    return Adapted(module, origin={"diffusers": arguments}, **{**found, **options})


def _from_code(source: Code | Path, options: TeacherOptions) -> DenoisingNetwork:
    code = str(source) if isinstance(source, Path) else source
    network = make_network(code, "teachers", "the source")
    if options.weights is not None:
        load_weights(network, Path(options.weights), options.weights_key)
    else:
        require_finite(network, type(network).__name__, infinite_buffers(network))
    given = options.given()
    if not isinstance(network, DenoisingNetwork):
        return Adapted(network.float(), origin={"source": code} if isinstance(code, str) else None, **given)
    if given:
        raise ValueError(
            f"fastdmd.teachers: expected no {_flags(given)} with a {type(network).__name__}, which brings its own"
        )
    return network.in_best_layout()


def _kind(source: Code | Path) -> str:
    if not isinstance(source, (str, Path)):
        return "code"
    path = Path(source)
    if source == "mnist" or path.suffix.lower() == ".safetensors":
        return "file"
    if path.suffix.lower() == ".pkl":
        return "pickle"
    if path.is_dir():
        return "folder"
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", str(source)):
        return "code"
    raise ValueError(f"fastdmd.teachers: expected {ACCEPTED}, got {source}")


def _name(source: Code | Path) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"


def _flags(options: Iterable[str]) -> str:
    return ", ".join(map(flag, options))
