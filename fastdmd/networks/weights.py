"""Weight files: safetensors that carry the configuration of their network."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastdmd import __version__
from fastdmd.diffusion import Denoiser, DenoisingNetwork
from fastdmd.files import write_atomically
from fastdmd.networks import diffusers_unet
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.options import AdapterOptions
from fastdmd.networks.states import fill, require_same, tensors_of
from fastdmd.networks.tensor_files import TensorFile, open_tensors
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.networks.user_code import Code, make_network, user_code
from fastdmd.ranks import ALONE, Ranks
from fastdmd.reading import parse_json
from fastdmd.sampling import Generator
from fastdmd.shards import local, whole

METADATA_KEY = "fastdmd"
KINDS = ("teacher", "generator")
MIN_SIGMA, MAX_SIGMA = 2.0**-126, 1e30  # that a generator starts from: a float32, which JSON does not promise
# Of a measurement that is on record, with the types that JSON gives; the first two in any case.
RECORDED = {
    "frechet_distance": (float, int),
    "class_accuracy": (float, int),
    "images_per_second": (float, int),
    "evaluations": (int,),
    "num_images": (int,),
    "recorded": (bool,),
    "frechet_means": (float, int),
    "frechet_covariances": (float, int),
    "precision": (float, int),
    "recall": (float, int),
    "kernel_distance": (float, int),
    "num_compared": (int,),
    "classifier_score": (float, int),
    "class_variance": (float, int),
}
ASSETS = Path(__file__).parents[1] / "assets"


def save_network(
    path: Path,
    network: DenoisingNetwork,
    *,
    kind: str,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
    **information: Any,
) -> None:
    """Writes weights and configuration to a safetensors file, in one atomic replacement.

    `kind` is "teacher" or "generator"; `dtype` is that of the parameters in the file, where buffers, such as the
    frequencies of an embedding, keep their own; `information` is anything JSON can hold and is read back by
    `load_network`. The file can be read by any safetensors reader; the tensors of an adapted network have the names
    that the network itself gives them. Of a network of which each of `ranks` has a part, all of them call this, and the
    first one writes. Raises TypeError for what is no `DenoisingNetwork`, ValueError for weights that `dtype` cannot
    hold.
    """
    if not isinstance(network, DenoisingNetwork):
        raise TypeError(f"fastdmd.save_network: expected a UNet or an Adapted network, got a {type(network).__name__}")
    state = network.inner.state_dict()
    buffers = {name for name, _ in network.inner.named_buffers(remove_duplicate=False)} - _fixed_names(network)
    metadata = {"kind": kind, "network": network.describe(), "version": __version__, **information}
    found = on_first(state, ranks)

    def write() -> None:
        own = {name: found[name].dtype for name in buffers & found.keys()}
        tensors = {name: stored(name, value, own.get(name, dtype)) for name, value in found.items()}
        content = save(tensors, metadata={METADATA_KEY: json.dumps(metadata, default=str)})
        write_atomically(path, lambda file: file.write(content))

    ranks.from_first(write)


def rounded(network: DenoisingNetwork, dtype: torch.dtype) -> DenoisingNetwork:
    """A copy with the weights that `save_network` writes in this dtype."""
    copied, fixed = copy.deepcopy(network), _fixed_names(network)
    weights = [buffer for name, buffer in copied.inner.named_buffers() if name in fixed]
    for weight in (*copied.parameters(), *weights):
        weight.data = weight.data.to(dtype).to(weight.dtype)
    return copied


def _fixed_names(network: DenoisingNetwork) -> frozenset[str]:
    """Of weights that are buffers, as nobody trains them."""
    return getattr(network, "fixed_names", frozenset())


def on_first(state: Mapping[str, Any], ranks: Ranks) -> dict[str, Tensor]:
    """Its tensors, those of which each process has a part gathered on the host of the first one, one at a time; nothing
    on others."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):  # what else somebody's module says of its state
            continue
        gathered = value if local(value) is value else whole(value)
        if ranks.is_first:
            found[name] = gathered
    return found


def stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, as the format wants it also where weights are tied; numbers that count keep their dtype.

    Raises ValueError for a value that `dtype` cannot hold.
    """
    dtype = dtype if value.is_floating_point() else value.dtype
    stored = torch.empty(value.shape, dtype=dtype).copy_(value.detach())
    if dtype != value.dtype and stored.isinf().sum() > value.isinf().sum():
        raise ValueError(
            f"fastdmd.save_network: expected weights that {dtype} can hold, got {value.abs().max():.4g} in {name}"
        )
    return stored


def generator_metadata(generator: Generator) -> dict[str, Any]:
    """What a file says of a generator besides its network: its levels, and whether its images are clamped.

    Of one level, `conditioning_sigma`. Of several, `generator_sigmas` alone: who knows of one only, as former versions,
    must not take the first for all of them.
    """
    sigmas = generator.sigmas
    levels = {"conditioning_sigma": sigmas[0]} if len(sigmas) == 1 else {"generator_sigmas": list(sigmas)}
    return {**levels, "clamped": generator.clamped}


def generator_of(network: Denoiser, metadata: Mapping[str, Any]) -> Generator:
    """The generator that `metadata`, as `load_network` returns it, makes of the network."""
    sigmas = metadata.get("generator_sigmas") or (metadata["conditioning_sigma"],)
    return Generator(network, tuple(sigmas), clamped=metadata.get("clamped", False))


def load_network(
    path: str | Path, *, device: str | torch.device = "cpu", network: Code | None = None
) -> tuple[DenoisingNetwork, dict[str, Any]]:
    """Reads a network written by `save_network`: in eval mode, in the layout in which it is fastest; and the metadata.

    A file holds no code, and the name of some is no reason to import it: a network that is neither fastdmd's nor of
    diffusers must be named again, as `network`: `package.module:name`, a module, or what makes one without arguments.

    Raises FileNotFoundError or ValueError with the path, what was expected and what came.
    """
    weights = open_tensors(Path(path))
    metadata = _metadata(weights)
    loaded = _rebuild(metadata["network"], network, weights)
    fill(loaded.inner, weights, {name: name for name in weights.described})
    with user_code("load_network", f"the network of {path} on {device}, in eval mode"):
        loaded = loaded.float().to(device).eval().requires_grad_(False)
    return loaded.in_best_layout(), metadata


def iterations_of(path: Path) -> int:
    """After how many a file was written; 0 where it does not say so."""
    try:
        iterations = _metadata(open_tensors(path)).get("iterations")
    except (OSError, ValueError):
        return 0
    return iterations if type(iterations) is int else 0


def _metadata(weights: TensorFile) -> dict[str, Any]:
    try:
        metadata = parse_json(weights.metadata.get(METADATA_KEY, "null"))
    except ValueError as error:
        raise ValueError(f"fastdmd.load_network: expected JSON in {weights.path}, got {error}") from error
    if not isinstance(metadata, dict) or "kind" not in metadata or not isinstance(metadata.get("network"), dict):
        raise ValueError(
            f"fastdmd.load_network: expected a file written by fastdmd, got {weights.path} without its metadata"
        )
    if metadata["kind"] not in KINDS:
        raise ValueError(f"fastdmd.load_network: expected a {' or '.join(KINDS)} in {weights.path}, got another kind")
    check_generator(metadata, weights.path)
    record = metadata.get("record") if metadata["kind"] == "teacher" else None  # of a generator, nobody reads it
    if record is not None and not _is_record(record):
        raise ValueError(
            f"fastdmd.load_network: expected a record of settings and figures in {weights.path}, got {record!r:.80}"
        )
    return metadata


def check_generator(metadata: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError unless a generator has one level or several, the highest first, and says whether it clamps."""
    given = {"conditioning_sigma", "generator_sigmas"} & metadata.keys()
    if metadata["kind"] == "generator" and not given:
        raise ValueError(f"fastdmd.load_network: expected a generator's conditioning_sigma, got {path} without")
    if len(given) > 1:
        raise ValueError(f"fastdmd.load_network: expected conditioning_sigma or generator_sigmas in {path}, got both")
    bounds = f"from {MIN_SIGMA:.3g} to {MAX_SIGMA:g}"
    if not isinstance(clamped := metadata.get("clamped", False), bool):
        raise ValueError(f"fastdmd.load_network: expected clamped, true or false, in {path}, got {clamped!s:.80}")
    sigma = metadata.get("conditioning_sigma", 1.0)
    if not _is_level(sigma):
        raise ValueError(f"fastdmd.load_network: expected conditioning_sigma {bounds} in {path}, got {sigma!s:.80}")
    sigmas = metadata.get("generator_sigmas", [1.0])
    are_levels = isinstance(sigmas, list) and len(sigmas) > 0 and all(map(_is_level, sigmas))
    if not are_levels or any(a <= b for a, b in itertools.pairwise(sigmas)):
        raise ValueError(
            f"fastdmd.load_network: expected generator_sigmas, a list {bounds}, the highest first, in {path}, got "
            f"{sigmas!s:.80}"
        )


def _is_level(sigma: Any) -> bool:
    return type(sigma) in (int, float) and MIN_SIGMA <= sigma <= MAX_SIGMA


def _is_record(record: Any) -> bool:
    """Whether it is what `Evaluation.record` makes of a measurement."""
    if not isinstance(record, dict) or not all(isinstance(record.get(name), dict) for name in ("settings", "quality")):
        return False
    quality = record["quality"]
    if not set(list(RECORDED)[:2]) <= quality.keys() <= RECORDED.keys():
        return False
    known = {name: value for name, value in quality.items() if value is not None}
    return all(type(value) in RECORDED[name] and abs(value) < math.inf for name, value in known.items())


def _rebuild(description: dict[str, Any], code: Code | None, weights: TensorFile) -> DenoisingNetwork:
    """The network that `description`, from a weight file, stands for, with initial weights for each of its tensors.

    A network whose size the description decides is compared with the tensors before it takes memory.
    """
    path = weights.path
    needs_code = "source" in description
    if needs_code and code is None:
        raise ValueError(
            f"fastdmd.load_network: expected --network package.module:name for {path}, whose network is "
            f"{description['source']}, got none; code runs only where you name it"
        )
    if not needs_code and code is not None:
        raise ValueError(f"fastdmd.load_network: expected no --network for {path}, which needs no code, got {code}")
    if not needs_code and "diffusers" not in description:
        return _unet(description, weights)
    options = description.get("options", {})
    _require_known(options, AdapterOptions, path)
    origin = None
    if "diffusers" in description:
        network = diffusers_unet.build(description["diffusers"], weights.described, path)
        origin = {"diffusers": description["diffusers"]}
    else:
        assert code is not None
        network = make_network(code, "load_network")
        origin = {"source": code} if isinstance(code, str) else None
        require_same(tensors_of(network), weights.described, f"the tensors of {type(network).__name__} in {path}")
    with user_code("load_network", f"the options of {type(network).__name__} in {path}"):
        return Adapted(network, origin=origin, **options)


def _unet(description: Mapping[str, Any], weights: TensorFile) -> UNet:
    _require_known(description, UNetConfig, weights.path)
    try:
        config = UNetConfig(**description)
        blueprint = UNet.blueprint(config, len(weights.described))
    except ValueError as error:
        raise ValueError(f"{error} in {weights.path}") from error
    require_same(blueprint.state_dict(), weights.described, f"the tensors of UNet in {weights.path}")
    return UNet(config)


def _require_known(options: Any, owner: type, path: Path) -> None:
    """Raises ValueError for what are no fields of the dataclass that they are for."""
    known = {field.name for field in dataclasses.fields(owner)}
    if not isinstance(options, dict) or (unknown := sorted(options.keys() - known)):
        got = f"the fields {unknown}" if isinstance(options, dict) else f"options that are a {type(options).__name__}"
        raise ValueError(f"fastdmd.load_network: expected a known network in {path}, got {got}")
