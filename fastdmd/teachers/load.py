"""Where teachers come from: files, folders and code of many kinds, each taken as a `Denoiser` and tried once."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdmd.diffusion import Denoiser, per_sample, preconditioning
from fastdmd.networks import diffusers_unet
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.options import NO_OPTIONS, TeacherOptions, flag
from fastdmd.networks.unet import UNet
from fastdmd.networks.user_code import import_network, make_network, user_code
from fastdmd.networks.weight_files import infinite_buffers, require_finite
from fastdmd.networks.weights import ASSETS, load_network, load_weights
from fastdmd.optim.flat import check_network
from fastdmd.sampling import Generator, HeunSampler, Sampler
from fastdmd.teachers import edm

ACCEPTED = "mnist, a .safetensors file that fastdmd wrote, a .pkl of EDM, a folder of diffusers, or package.module:name"
WEIGHTS_OF_RUNS = ("generator.safetensors", "teacher.safetensors")
VERIFIED_SIGMAS = (0.002, 0.5, 5.0)
# A denoiser returns an image without noise as it is, and at the greatest of these levels it errs about as the best
# linear one does (c_out of EDM). The embedded teacher, recast: under its own name it changes 1 % and errs 1.9 times as
# much; 320 % where another network claims x0, 12 to 18 times where it claims epsilon; most other confusions come to 1.8
# to 3.2 and are not told from a good teacher on images that it does not know.
TOLERATED_CHANGE, TOLERATED_ERROR = 0.5, 3.0


def load(source: str | Path | nn.Module | Callable[[], nn.Module], *, device: str | torch.device = "cpu",
         network: nn.Module | Callable[[], nn.Module] | str | None = None, **options: Any) -> nn.Module:  # fmt: skip
    """A teacher, ready for `trainer.build`: in eval mode, without gradients, on `device`; a `Denoiser`.

    `source`: `mnist`, the embedded one; a `.safetensors` file that fastdmd wrote; a `.pkl` of EDM; a folder of
    diffusers (`UNet2DModel`); `package.module:name`, or what that names: a module, or a class or function that makes
    one without arguments. A module is taken over, not copied. `options` are those of `TeacherOptions`; `network` may
    here be a module or what makes one, too. A network that is not fastdmd's runs once, and a copy of it takes a
    gradient once; see `verify` and `verify_training`.

    Raises ValueError, TypeError or OSError, one line long, with what was expected and what came.
    """
    teacher, metadata = read(source, TeacherOptions(**options), device, network=network)
    if metadata["kind"] != "teacher":
        raise ValueError(f"fastdmd.teachers: expected a teacher, got a {metadata['kind']} in {source}")
    verify_training(teacher)
    return teacher


def load_generator(path: str | Path, *, device: str | torch.device = "cpu",
                   network: nn.Module | Callable[[], nn.Module] | str | None = None) -> Generator:  # fmt: skip
    """A generator from a weight file that fastdmd wrote, on `device`: `load_generator(path)(noise, class_labels)`.

    `network` makes one that is not fastdmd's, as in `load`. Raises ValueError, TypeError or OSError, one line long.
    """
    found, metadata = read(path, device=device, network=network)
    if metadata["kind"] != "generator":
        raise ValueError(f"fastdmd.load_generator: expected a generator, got a {metadata['kind']} in {path}")
    return Generator(found, (metadata["conditioning_sigma"],))


def sampler_of(network: Denoiser, metadata: Mapping[str, Any], num_steps: int) -> Sampler:
    """What `read` gave, as what makes images: a generator, or Heun's method of so many steps for a teacher."""
    if metadata["kind"] == "generator":
        return Generator(network, (metadata["conditioning_sigma"],))
    return HeunSampler(network, num_steps)


def read(
    source: str | Path | nn.Module | Callable[[], nn.Module],
    options: TeacherOptions = NO_OPTIONS,
    device: str | torch.device = "cpu",
    *,
    network: nn.Module | Callable[[], nn.Module] | str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """As `load`, a teacher or a generator; and what its weight file says of it, its `kind` at the least."""
    code = options.network if network is None else network
    weights, key, given = options.weights, options.weights_key, options.given()
    kind = _kind(source)
    if kind != "file" and code is not None:
        raise ValueError(f"fastdmd.teachers: expected --network with a .safetensors file only, got {source}")
    if kind != "code" and weights is not None:
        raise ValueError(f"fastdmd.teachers: expected --teacher-weights with package.module:name only, got {source}")
    if key is not None and weights is None:
        raise ValueError(f"fastdmd.teachers: expected --weights-key with --teacher-weights only, got {source}")
    if given and kind in ("file", "pickle"):
        raise ValueError(f"fastdmd.teachers: expected no {_flags(given)} with {source}, which brings its own")
    if kind == "file":
        path = ASSETS / "teacher.safetensors" if source == "mnist" else source
        network, metadata = load_network(path, device=device, network=code)
        sigma = metadata.get("conditioning_sigma")
        if metadata["kind"] == "generator" and sigma is None:
            raise ValueError(f"fastdmd.teachers: expected a generator's conditioning_sigma, got {source} without")
        if isinstance(network, Adapted):
            verify(network, None if metadata["kind"] == "teacher" else sigma)
        return network, metadata
    if kind == "pickle":
        network = edm.load(source)
    elif kind == "folder":
        if weights := [file for name in WEIGHTS_OF_RUNS if (file := Path(source) / name).is_file()]:
            raise ValueError(f"fastdmd.teachers: expected {ACCEPTED}, got the run {source}, which holds {weights[0]}")
        module, arguments, found = diffusers_unet.load_folder(Path(source))
        network = Adapted(module, origin={"diffusers": arguments}, **{**found, **given})
    else:
        with user_code("teachers", f"{_name(source)} to be a teacher"):
            network = _from_code(source, weights, key, given)
    with user_code("teachers", f"{_name(source)} on {device}, in eval mode"):
        network = network.to(device).eval().requires_grad_(False)
    if isinstance(network, Adapted):
        verify(network)
    return network, {"kind": "teacher"}


@torch.no_grad()
def verify(denoiser: Adapted, conditioning_sigma: float | None = None) -> None:
    """Runs a denoiser once, on smooth images with noise of three levels; a generator at the one that it starts from.

    Raises ValueError if it fails, if what its network gives is not floating point of the images' shape, or not finite,
    or if it changes its input. Warns where what it gives is not what a denoiser would give: it may be a network of
    another parameterization, or one that is not trained.
    """
    sigmas = VERIFIED_SIGMAS if conditioning_sigma is None else (conditioning_sigma,) * 2
    images, inputs = _trial(denoiser, sigmas)
    device, name = next(denoiser.parameters()).device, type(denoiser.network).__name__
    passed = [tensor.to(device, copy=True) for tensor in inputs]
    shapes = _shapes(inputs)
    with user_code("teachers", f"{name} to denoise {shapes}"):
        D_x = denoiser(*passed)
    for before, after, argument in zip(inputs, passed, ("x", "sigma", "labels"), strict=False):
        if not torch.equal(before, after.cpu()):
            raise ValueError(f"fastdmd.teachers: expected {name} to leave its input as it is, got another {argument}")
    D_x = D_x.cpu()
    if not D_x.isfinite().all():
        levels = sorted({level for level, D in zip(sigmas, D_x, strict=True) if not D.isfinite().all()})
        raise ValueError(f"fastdmd.teachers: expected finite images of {name}, got NaN or infinity at sigma {levels}")
    if conditioning_sigma is not None:
        return
    sigma = inputs[1]
    change = ((D_x - inputs[0])[0].norm() / inputs[0][0].norm()).item()
    c_out = preconditioning(sigma, denoiser.sigma_data)[1]
    error = ((D_x - images)[-1].square().mean().sqrt() / c_out[-1]).item()
    if change > TOLERATED_CHANGE or error > TOLERATED_ERROR:
        warnings.warn(
            f"{name} does not denoise as --parameterization {denoiser.parameterization}: it changes an image without "
            f"noise by {change:.0%}, and at sigma {VERIFIED_SIGMAS[-1]:g} errs {error:.1f} times as much as the best "
            "linear denoiser. Expected of a network that is not trained; else its parameterization is another",
            stacklevel=2,
        )


def verify_training(network: nn.Module) -> None:
    """Copies somebody's network and takes a gradient of the copy, as its distillation does; nothing of it is kept.

    Raises ValueError or TypeError if either fails, if its parameters are none that `AdamWEMA` takes, if the copy shares
    any with the network, and where none gets a gradient. The batch is another than in `verify`.
    """
    if not isinstance(network, Adapted):
        return
    name, device = type(network.network).__name__, next(network.parameters()).device
    _, inputs = _trial(network, VERIFIED_SIGMAS[1:])
    with user_code("teachers", f"{name} to be copied and trained"):
        twin = copy.deepcopy(network).requires_grad_(True)
        check_network(twin)
        copy.deepcopy(twin).requires_grad_(False)  # its average
    places = {parameter.data_ptr() for parameter in network.parameters() if parameter.numel()}
    if shared := [name for name, parameter in twin.network.named_parameters() if parameter.data_ptr() in places]:
        raise ValueError(f"fastdmd.teachers: expected a copy of {name} with weights of its own, got {shared[0]} shared")
    with torch.enable_grad(), user_code("teachers", f"a gradient of {name} for {_shapes(inputs)}"):
        D_x = twin(*(tensor.to(device) for tensor in inputs))
        is_on = torch.is_grad_enabled()
        if D_x.requires_grad:
            D_x.square().mean().backward()
    if not is_on:
        raise ValueError(f"fastdmd.teachers: expected {name} to leave gradients on, got set_grad_enabled(False)")
    if all(parameter.grad is None for parameter in twin.parameters()):
        raise ValueError(
            f"fastdmd.teachers: expected a gradient for the parameters of {name}, got none: of no_grad, inference_mode "
            "or detach, or of a copy that computes with the weights of another"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for those who ask how much is free


def _trial(denoiser: Adapted, sigmas: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """Smooth images `[B, C, H, W]`, and the inputs of the denoiser for them, one of each level."""
    (C, H, W), B, generator = denoiser.image_shape, len(sigmas), torch.Generator().manual_seed(0)
    images = F.interpolate(torch.randn(B, C, 4, 4, generator=generator), (H, W), mode="bilinear")
    images = images * (denoiser.sigma_data / images.std())
    noise = torch.randn(images.shape, generator=generator)
    sigma = torch.tensor(sigmas)
    class_labels = [torch.arange(B) % denoiser.num_classes] if denoiser.num_classes else []
    return images, [images + per_sample(sigma) * noise, sigma, *class_labels]


def _shapes(inputs: Iterable[Tensor]) -> str:
    return ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in inputs)


def _kind(source: Any) -> str:
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


def _name(source: str | Path | nn.Module | Callable[[], nn.Module]) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"


def _from_code(source: str | nn.Module | Callable[[], nn.Module], weights: Path | None, key: str | None,
               options: Mapping[str, Any]) -> nn.Module:  # fmt: skip
    named = isinstance(source, (str, Path))
    network = import_network(str(source), "teachers") if named else make_network(source, "teachers", "the source")
    if weights is not None:
        load_weights(network, Path(weights), key)
    else:
        require_finite(network, type(network).__name__, infinite_buffers(network))
    if not isinstance(network, (UNet, Adapted)):
        return Adapted(network.float(), origin={"source": str(source)} if named else None, **options)
    if options:
        raise ValueError(
            f"fastdmd.teachers: expected no {_flags(options)} with a {type(network).__name__}, which brings its own"
        )
    return network.to(memory_format=torch.channels_last) if isinstance(network, UNet) else network


def _flags(options: Iterable[str]) -> str:
    return ", ".join(map(flag, options))
