"""Weight files: safetensors that carry the configuration of their network."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastdmd import __version__, diffusers_unet
from fastdmd.adapters import Adapted, AdapterOptions
from fastdmd.files import write_atomically
from fastdmd.imports import import_network, make_network
from fastdmd.unet import UNet, UNetConfig

METADATA_KEY = "fastdmd"
ASSETS = Path(__file__).parent / "assets"


def save_network(path: Path, network: UNet | Adapted, *, kind: str, dtype: torch.dtype = torch.float32,
                 **information: Any) -> None:  # fmt: skip
    """Writes weights and configuration to a safetensors file, in one atomic replacement.

    `kind` is "teacher" or "generator"; `dtype` is that of the weights in the file; `information` is anything JSON can
    hold and is read back by `load_network`. The file can be read by any safetensors reader; the tensors of an adapted
    network have the names that the network itself gives them.
    """
    if isinstance(network, Adapted):
        description, state = network.describe(), network.network.state_dict()
    elif isinstance(network, UNet):
        description, state = dataclasses.asdict(network.config), network.state_dict()
    else:
        raise TypeError(f"fastdmd.save_network: expected a UNet or an Adapted network, got a {type(network).__name__}")
    metadata = {
        "kind": kind,
        "network": description,
        "version": __version__,
        **information,
    }
    tensors = {name: _stored(value, dtype) for name, value in state.items()}
    content = save(tensors, metadata={METADATA_KEY: json.dumps(metadata, default=str)})
    write_atomically(path, lambda file: file.write(content))


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, as the format wants it also where weights are tied; numbers that count keep their dtype."""
    dtype = dtype if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=dtype).copy_(value.detach())


def load_network(path: str | Path, *, device: str | torch.device = "cpu",
                 network: str | nn.Module | Callable[[], nn.Module] | None = None
                 ) -> tuple[UNet | Adapted, dict[str, Any]]:  # fmt: skip
    """Reads a network written by `save_network`: the network in eval mode, and the metadata.

    A file holds no code, and the name of some is no reason to import it: a network that is neither fastdmd's nor of
    diffusers must be named again, as `network`: `package.module:name`, a module, or what makes one without arguments.

    A UNet is channels_last, which was measured faster for every width tried (16 to 192). Raises FileNotFoundError or
    ValueError with the path, what was expected and what came.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"fastdmd.load_network: expected a .safetensors file, got {path}, which does not exist")
    tensors, metadata = _read_safetensors(path)
    known = isinstance(metadata, dict) and "kind" in metadata and isinstance(metadata.get("network"), dict)
    if not known:
        raise ValueError(f"fastdmd.load_network: expected a file written by fastdmd, got {path} without its metadata")
    loaded = _rebuild(metadata["network"], network, path)
    _load_state(loaded.network if isinstance(loaded, Adapted) else loaded, tensors, path)
    loaded = loaded.float().to(device)
    if isinstance(loaded, UNet):
        loaded = loaded.to(memory_format=torch.channels_last)
    return loaded.eval().requires_grad_(False), metadata


def _rebuild(description: dict[str, Any], code: str | nn.Module | Callable[[], nn.Module] | None,
             path: Path) -> UNet | Adapted:  # fmt: skip
    """The network that `description`, from a weight file, stands for, with initial weights."""
    if "source" in description and code is None:
        raise ValueError(
            f"fastdmd.load_network: expected --network package.module:name for {path}, whose network is "
            f"{description['source']}, got none; code runs only where you name it"
        )
    if "source" not in description and code is not None:
        raise ValueError(f"fastdmd.load_network: expected no --network for {path}, which needs no code, got {code}")
    adapted = bool({"source", "diffusers"} & description.keys())
    known = {field.name for field in dataclasses.fields(AdapterOptions if adapted else UNetConfig)}
    options = description.get("options", {}) if adapted else description
    if unknown := set(options) - known:
        raise ValueError(f"fastdmd.load_network: expected a known network in {path}, got the fields {sorted(unknown)}")
    if not adapted:
        return UNet(UNetConfig(**options))
    if "diffusers" in description:
        return Adapted(diffusers_unet.build(description["diffusers"]), origin={"diffusers": description["diffusers"]},
                       **options)  # fmt: skip
    if isinstance(code, str):
        return Adapted(import_network(code, "load_network"), origin={"source": code}, **options)
    return Adapted(make_network(code, "load_network", "network"), **options)


def load_weights(network: nn.Module, path: Path) -> None:
    """Fills a network with the tensors of a `.safetensors` file, or of a `.pt` file, read without running its code.

    Raises FileNotFoundError or ValueError with the path, what was expected and what came.
    """
    if not path.is_file():
        raise FileNotFoundError(f"fastdmd.load_weights: expected a file, got {path}, which does not exist")
    if path.suffix == ".safetensors":
        state, _ = _read_safetensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"fastdmd.load_weights: expected .safetensors, or .pt that holds tensors alone, got {path}: {reason}"
            ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        got = f"the entries {sorted(map(str, state))[:5]}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"fastdmd.load_weights: expected a state dict, tensors by name, got {got} in {path}")
    _load_state(network, state, path)


def _load_state(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 400)  # it names every tensor
        raise ValueError(
            f"fastdmd.load_network: expected the tensors of {type(network).__name__} in {path}, got {reason}"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors, and fastdmd's metadata or None."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"fastdmd.load_network: expected a safetensors file, got {path}: {error}") from error
