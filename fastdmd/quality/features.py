"""Feature networks: the embedded digit classifier, and those that a user names."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastdmd.memory import ran_out_of_memory
from fastdmd.networks.tensor_files import require_whole_archive
from fastdmd.networks.user_code import make_network, user_code
from fastdmd.quality.frechet import MAX_FEATURES

ASSETS = Path(__file__).parents[1] / "assets"
REFUSALS = (RuntimeError, ValueError, torch.jit.Error)  # of TorchScript: its ops, `to_levels`, its `raise` and `assert`
FeatureNetwork = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]  # features [B, D], logits


class DigitClassifier(torch.nn.Module):
    """Small convolutional network for 28 x 28 digits; its last hidden layer serves as features."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for num_in, num_out, size, stride in ((1, 24, 5, 2), (24, 32, 3, 1), (32, 48, 3, 2), (48, 64, 3, 1)):
            layers.append(torch.nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False))
            layers += [torch.nn.BatchNorm2d(num_out), torch.nn.SiLU()]
        layers += [torch.nn.AvgPool2d(2), torch.nn.Flatten()]  # [B, 64, 7, 7] to [B, 576]
        layers += [torch.nn.Linear(576, 64, bias=False), torch.nn.BatchNorm1d(64), torch.nn.SiLU()]
        self.body = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 1, 28, 28], float in [-1, 1], to features [B, 64] and logits [B, 10]."""
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            raise _error("images of shape (B, 1, 28, 28)", tuple(images.shape))
        features = self.body(images)
        return features, self.head(features)


def load_feature_network(
    source: str | Path | torch.nn.Module | None = None, device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """Makes a function of images [B, C, H, W], float in [-1, 1]: (features [B, D], logits [B, K] or None).

    The network is put on `device` in evaluation mode and runs without gradients. It may return features alone
    or the tuple (features, logits); every call checks their shapes. A TorchScript file or an import runs the
    code it holds: name only what you trust.

    TorchScript whose `forward` has an argument `return_features`, as the published Inception detector's has, is given
    uint8 images [B, 3, H, W] in 0..255, ``(x * 127.5 + 128).clip(0, 255)``, one channel repeated to three, and
    `return_features=True`. If it refuses those when it first runs, it is given floats as others are, with a warning.

    Args:
        source: None for the embedded digit classifier; the path of a TorchScript file (.pt, .ts);
            "package.module:name" of a module, or of a class or function that makes one without arguments;
            or the module itself.
        device: where the network runs; images are moved there.

    Raises FileNotFoundError; ValueError if a string is neither a TorchScript file nor an import, or (from the
    returned function, at any call) if the network fails or its output is wrong; TypeError if the import gives something
    else than a module. `verify` tries what was loaded.
    """
    name = "the digit classifier" if source is None else str(source)
    module: torch.nn.Module
    if source is None:
        with torch.device("meta"):  # draws no initial weights: the caller's random state stays as it was
            module = DigitClassifier()
        module.load_state_dict(load_file(ASSETS / "feature_network.safetensors"), assign=True)
    elif isinstance(source, torch.nn.Module):
        module, name = source, type(source).__name__
    elif is_script(source):
        module = _load_script(Path(source))
    elif not all(str(source).partition(":")):
        raise _error("a .pt or .ts file or 'package.module:name'", repr(source))
    else:
        module = make_network(str(source), "features")
    with user_code("features", f"{name} to run on {device}"):
        module = module.eval().to(device)
    call = _detector(module, name) if _has_return_features(module) else module

    @torch.no_grad()
    def feature_network(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with user_code("features", f"{name} to take images of shape {tuple(images.shape)}"):
            output = call(images.to(device))
        features, logits = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
        _expect_matrix("features", features, len(images))
        if logits is not None:
            _expect_matrix("logits", logits, len(images))
        return features, logits

    return feature_network


def is_script(source: str | Path) -> bool:
    """Whether it names a TorchScript file, not code to import."""
    return Path(source).suffix in (".pt", ".ts")


def verify(feature_network: FeatureNetwork, image_shape: tuple[int, int, int], name: str) -> int:
    """Runs a network once, on two images of a run's shape, and returns D, its number of features.

    Raises ValueError, one line long, if it fails, gives something else than features (and logits), more of them than
    a covariance can hold, NaN or infinity.
    """
    images = torch.randint(0, 256, (2, *image_shape), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    features, logits = feature_network(images)
    num_features = features.shape[1]
    if not 1 <= num_features <= MAX_FEATURES:
        raise _error(f"1 to {MAX_FEATURES} features of {name}", num_features)
    for kind, values in (("features", features), ("logits", logits)):
        if values is not None and not values.isfinite().all():
            raise _error(f"finite {kind} of {name}", "NaN or infinity")
    if torch.equal(*features):
        raise _error(f"features of {name} that tell two images apart", "the same of both")
    return num_features


def to_levels(images: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W], float in [-1, 1], C 1 or 3, to uint8 [B, 3, H, W]."""
    C = images.shape[1]
    if C not in (1, 3):
        raise _error("1 or 3 channels for a network of uint8 images", C)
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).repeat(1, 3 // C, 1, 1)


def _has_return_features(module: torch.nn.Module) -> bool:
    schema = getattr(getattr(module, "forward", None), "schema", None)  # TorchScript has one
    return schema is not None and any(argument.name == "return_features" for argument in schema.arguments)


def _detector(module: torch.nn.Module, name: str) -> Callable[[torch.Tensor], Any]:
    """The network as a function of float images, once it has been asked whether it takes uint8 ones."""
    takes_levels: bool | None = None

    def call(images: torch.Tensor) -> Any:
        nonlocal takes_levels
        if takes_levels is None:
            takes_levels = _takes_levels(module, images)
            if not takes_levels:
                warnings.warn(f"{name} refuses uint8 images, and is given floats in [-1, 1]", stacklevel=2)
        return module(to_levels(images), return_features=True) if takes_levels else module(images)

    return call


def _takes_levels(module: torch.nn.Module, images: torch.Tensor) -> bool:
    """Whether it runs on uint8 images, or on no others either: its error is then the one to show.

    Two images are enough to ask with. Where memory ends is no answer, and raises.
    """
    images = images[:2]
    try:
        module(to_levels(images), return_features=True)
    except REFUSALS as error:
        if ran_out_of_memory(error):
            raise
        try:
            module(images)
        except REFUSALS:
            return True
        return False
    return True


def _expect_matrix(kind: str, found: Any, num_images: int) -> None:
    is_tensor = isinstance(found, torch.Tensor)
    if not is_tensor or not found.is_floating_point() or found.ndim != 2 or len(found) != num_images:
        got = (tuple(found.shape), found.dtype) if is_tensor else type(found)
        raise _error(f"{kind} ({num_images}, D), floating point", got)


def _load_script(path: Path) -> torch.nn.Module:
    if path.exists() and not path.is_file():
        raise _error("a TorchScript file", f"{path}, which is no regular file")
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise _error("a TorchScript file, as torch.jit.save writes it", f"another format in {path}")
        file.seek(0)
        require_whole_archive(path)
        try:
            return torch.jit.load(file, map_location="cpu")
        except Exception as error:  # RuntimeError, ValueError and others, ten lines long
            got = f"what torch.save wrote, weights perhaps, in {path}"
            raise _error("a TorchScript file, as torch.jit.save writes it", got) from error


def _error(expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.features: expected {expected}, got {got}")
