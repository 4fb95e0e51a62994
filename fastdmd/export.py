"""`python -m fastdmd.export`: a generator as a file that runs without fastdmd, or as bare weights."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.export")

import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from fastdmd import __version__, ops
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.files import replacing, write_atomically
from fastdmd.memory import ran_out_of_memory
from fastdmd.networks.accelerate import unaccelerate
from fastdmd.networks.states import tensors_of
from fastdmd.networks.unet_blocks import Conv1x1, Conv3x3, GroupNorm, GroupNormSiLU, Product1x1
from fastdmd.networks.weights import METADATA_KEY, generator_metadata, generator_of, load_network, rounded, save_network
from fastdmd.randomness import Stream, normals
from fastdmd.runs import cli, distributed, folder, terminal
from fastdmd.runs.config import CommandSettings
from fastdmd.sampling import Generator, balanced_labels, step_normals
from fastdmd.settings import Input, Positional, above

Inputs = dict[str, Tensor]  # noise, class_labels and step_noise, those that there are, in this order
Exported = Callable[..., Tensor]  # of `Inputs` by their names: images, computed by what was written
PROGRAM_METADATA = METADATA_KEY + ".json"  # the extra file of a .pt2 that holds what ONNX has in metadata_props
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 5)
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX_BYTES = 1_500_000_000  # protobuf ends at 2 GiB; beyond this PyTorch writes the weights to a second file


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(CommandSettings):
    """Export a generator, sampling included, and check what was written against it."""

    weights: Annotated[Path, Positional, Input]
    """Weight file of a generator (.safetensors)."""
    network: Annotated[str | None, Input] = None
    """package.module:name of the network in the weight file, where that is not fastdmd's own."""
    out: Path
    """A torch.export program (.pt2), an ONNX file (.onnx), or weights and configuration alone (.safetensors)."""
    weights_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights in a .safetensors file; programs are float32."""
    tolerance: Annotated[float, above(0, 1e9)] = 1e-3
    """The file is not kept if its images, in [-1, 1], differ by more from those of the same (rounded) weights."""


@terminal.command("fastdmd.export")
def main(arguments: list[str] | None = None) -> None:
    distributed.require_alone("fastdmd.export")
    config = cli.parse(ExportConfig, "fastdmd.export", arguments)
    with cli.user_errors("fastdmd.export", "exporting", "it needs six times the weights"):
        cli.resolve_device("cpu")
        folder.require_file(config.out)
        network, metadata = load_network(config.weights, network=config.network)
        if metadata["kind"] != "generator":
            raise ValueError(f"expected a generator, got {config.weights}, a {metadata['kind']}")
        difference = export_generator(
            generator_of(network, metadata),
            config.out,
            weights_dtype=getattr(torch, config.weights_dtype),
            tolerance=config.tolerance,
        )
    megabytes = config.out.stat().st_size / 1e6
    print(f"{config.out}: {megabytes:.2f} MB, images differ from those of {config.weights} by at most {difference:.1e}")


def export_generator(
    generator: Generator, path: Path, *, weights_dtype: torch.dtype = torch.float32, tolerance: float = 1e-3
) -> float:
    """Writes the generator in the format of the suffix, atomically, once what was written has been checked.

    Programs (`.pt2`, `.onnx`) take standard normal `noise` `[B, C, H, W]` in float32 and, if the network knows
    classes, `class_labels` (int64 `[B]`), of several steps `step_noise` `[B, num_steps - 1, C, H, W]` like `noise`, for
    any B, and return images in [-1, 1], as the generator does. They hold plain PyTorch and ONNX operations alone.

    Returns the greatest absolute difference between images of the file and of the generator. Raises OSError if the file
    cannot be written, ValueError for a format that cannot be, without the packages of ONNX, or if images differ by more
    than `tolerance` from those of the weights rounded to `weights_dtype`; whatever was at `path` is then still there.
    """
    if path.suffix not in WRITERS:
        raise ValueError(f"fastdmd.export_generator: expected a file ending in {', '.join(WRITERS)}, got {path}")
    if path.suffix != ".safetensors" and weights_dtype != torch.float32:
        raise ValueError(
            f"fastdmd.export_generator: expected weights_dtype float32 for {path.suffix}, got {weights_dtype}"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"fastdmd.export_generator: expected a file in an existing folder, got {path}")
    network = copy.deepcopy(network_of(generator)).cpu().eval().requires_grad_(False)
    generator = dataclasses.replace(generator, network=network)
    with replacing(path) as written:
        exported = WRITERS[path.suffix](generator, written, weights_dtype)
        error = greatest_difference(exported, dataclasses.replace(generator, network=rounded(network, weights_dtype)))
        if not error <= tolerance:  # not a number, too
            raise ValueError(
                f"fastdmd.export_generator: expected images within {tolerance:g} of the generator's, "
                f"got a difference of {error:.1e} from {path.suffix}; nothing was written to {path}"
            )
    return greatest_difference(exported, generator)


@torch.no_grad()
def greatest_difference(exported: Exported, generator: Generator) -> float:
    """Between the images of both, at two batch sizes, neither of them the traced one."""
    differences = []
    for batch_size in CHECKED_BATCHES:
        inputs = make_inputs(generator, batch_size)
        images = generator(inputs["noise"], inputs.get("class_labels"), step_noise=inputs.get("step_noise"))
        differences.append((exported(**inputs) - images).abs().max())
    return torch.stack(differences).max().item()


def network_of(generator: Generator) -> DenoisingNetwork:
    """Raises TypeError for one that is no module, as a compiled network is none."""
    if not isinstance(generator.network, DenoisingNetwork):
        raise TypeError(f"fastdmd.export_generator: expected a network, got a {type(generator.network).__name__}")
    return generator.network


def make_inputs(generator: Generator, batch_size: int) -> Inputs:
    """What a generator takes for so many images: the same for a batch size each time."""
    shape = (batch_size, *generator.network.image_shape)
    inputs = {
        "noise": normals(shape, ops.rng_key(0, stream=Stream.EXPORT)),
        "class_labels": balanced_labels(batch_size, generator.network.num_classes),
        "step_noise": step_normals(generator.num_step_noises, shape, ops.rng_key(0, stream=Stream.EXPORT_STEP_NOISE)),
    }
    return {name: value for name, value in inputs.items() if value is not None}


def program_metadata(generator: Generator) -> dict[str, str]:
    """What a reader of a program may want to know, as text."""
    network = generator.network
    return {
        "fastdmd_version": __version__,
        **{name: json.dumps(value) for name, value in generator_metadata(generator).items()},
        "image_shape": json.dumps(network.image_shape),  # [C, H, W]
        "num_classes": json.dumps(network.num_classes),
    }


class PlainGroupNormSiLU(nn.GroupNorm):
    """`GroupNormSiLU` of operations that every reader of a program knows."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, offset: Tensor | None = None
    ) -> Tensor:
        x = super().forward(x if offset is None else x + offset[..., None, None])
        if scale is not None:
            assert shift is not None  # they come together
            x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(x)


PLAIN = {
    GroupNormSiLU: PlainGroupNormSiLU,
    GroupNorm: nn.GroupNorm,
    Conv3x3: nn.Conv2d,
    Conv1x1: nn.Conv2d,
    Product1x1: nn.Conv2d,
}


class PlainGenerator(nn.Module):
    """A generator as a module of plain PyTorch, on a copy of its network."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.network = copy.deepcopy(network_of(generator))
        unaccelerate(self.network)
        self.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as torch documents it
        self.sigmas, self.clamped = generator.sigmas, generator.clamped
        for module in self.network.modules():
            module.__class__ = PLAIN.get(module.__class__, module.__class__)

    def forward(self, noise: Tensor, class_labels: Tensor | None = None, step_noise: Tensor | None = None) -> Tensor:
        generator = Generator(self.network, self.sigmas, clamped=self.clamped)
        return generator(noise, class_labels, step_noise=step_noise)


class PlainUnconditional(PlainGenerator):
    """Without `class_labels`, so that what there is can be given by position."""

    def forward(self, noise: Tensor, step_noise: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(noise, None, step_noise)


def trace(generator: Generator) -> ExportedProgram:
    """The program `noise, class_labels, step_noise -> images`, of those that there are, for any batch size."""
    kind = PlainGenerator if generator.network.num_classes else PlainUnconditional
    inputs = make_inputs(generator, TRACED_BATCH)
    with translating("torch.export traces"):
        program = torch.export.export(
            kind(generator).eval(), tuple(inputs.values()), dynamic_shapes=dynamic_shapes(generator)
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source lines, and folders of this machine
    return program


def dynamic_shapes(generator: Generator) -> dict[str, dict[int, Dim]]:
    """The first axis of each input is a batch of any size."""
    return dict.fromkeys(make_inputs(generator, TRACED_BATCH), {0: Dim("batch")})


def write_weights(generator: Generator, path: Path, weights_dtype: torch.dtype) -> Exported:
    """Weights and configuration alone: what training noted about itself stays behind."""
    own, network = generator_metadata(generator), network_of(generator)
    save_network(path, network, kind="generator", dtype=weights_dtype, **own)
    code = copy.deepcopy(network.inner) if "source" in getattr(network, "origin", {}) else None
    loaded, metadata = load_network(path, network=code)
    return generator_of(loaded, metadata)


def write_program(generator: Generator, path: Path, _: torch.dtype) -> Exported:
    metadata = json.dumps(program_metadata(generator))
    buffer = io.BytesIO()  # on a disk that fills up, PyTorch's own writer aborts the process
    with quiet():
        torch.export.save(trace(generator), buffer, extra_files={PROGRAM_METADATA: metadata})
        write_atomically(path, lambda file: file.write(buffer.getbuffer()))
        with open(path, "rb") as file:  # by its name, which has no suffix yet, it would be remarked upon
            program = torch.export.load(file).module()
    return torch.no_grad()(lambda **inputs: program(*inputs.values()))


def write_onnx(generator: Generator, path: Path, _: torch.dtype) -> Exported:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'.onnx needs {", ".join(missing)}: pip install "fastdmd[export]"')
    num_bytes = 4 * sum(value.numel() for value in tensors_of(network_of(generator)).values())
    if num_bytes > ONNX_BYTES:
        raise ValueError(f"expected at most {ONNX_BYTES / 1e9} GB of weights for .onnx, got {num_bytes / 1e9:.1f} GB")
    import onnxruntime  # an extra

    with quiet():
        traced = trace(generator)
        with translating("ONNX has operations for, as .pt2 needs none"):
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                output_names=["images"],
                dynamic_shapes=dynamic_shapes(generator),
            )
        assert program is not None  # as dynamo=True promises
        program.model.metadata_props.update(program_metadata(generator))
        for node in program.model.graph:
            node.metadata_props.clear()  # half a megabyte of where in torch each came from
        program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def sampler(**inputs: Tensor) -> Tensor:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(None, arrays)[0])

    return sampler


@contextlib.contextmanager
def translating(to: str) -> Iterator[None]:
    """Raises ValueError, with the first line of the last cause, for a network that cannot be written so."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if ran_out_of_memory(cause):
            raise cause from None
        line = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ValueError(f"fastdmd.export_generator: expected a network that {to}, got {line:.200}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PyTorch's remarks on its own internals and on packages that nobody asked for, and without the graph that
    it prints before it raises."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


Writer = Callable[[Generator, Path, torch.dtype], Exported]
WRITERS: dict[str, Writer] = {".safetensors": write_weights, ".pt2": write_program, ".onnx": write_onnx}


if __name__ == "__main__":
    main()
