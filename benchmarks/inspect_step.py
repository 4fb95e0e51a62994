"""What a turn launches on an H100, read from the code that torch.compile generates for it: no GPU is needed.

    python -m benchmarks.inspect_step --preset mnist|cifar10-cond|imagenet64 [--batch-size N] [--json out.json]

Whole turns of `distill.DMD2` run on fake CUDA tensors: Inductor compiles the networks for sm_90, the wrappers that it
generates are executed, and every call that they make is recorded with the shapes and strides that it is given. Nothing
is computed or timed. Launches are at least those counted: a library may launch several for a call. Bytes are those of
inputs and outputs, once each, as Inductor states them for its own kernels, and the time is what bytes and FLOPs take at
the data sheet's rates: no rate that is reached, but no strict bound either, since the cache can serve a second read.
Not covered: what torch.compile's max-autotune modes decide by timing on the device (Triton templates with fused
epilogues instead of cuDNN and cuBLAS, padded shapes).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks import fake_cuda  # its load comes before torch is imported
from benchmarks.sources import source_hashes

KIND = "estimate from generated code, nothing was run on a GPU"
BYTES_PER_S, FLOPS_PER_S = 3.35e12, 989e12  # the data sheet's, H100 SXM, dense bfloat16
LAUNCHES = (
    "convolution",
    "convolution backward",
    "matrix product",
    "attention",
    "attention backward",
    "generated pointwise",
    "generated reduction",
    "fastdmd op",
    "eager",
)
LIBRARY = LAUNCHES[:5]
ARITHMETIC = r"tmp\d+ = (-|\(?tmp\d+ [-+*/]|libdevice|tl_math|triton_helpers|tl\.s)"

BATCHES = {"mnist": 48, "cifar10-cond": 64, "imagenet64": 40}

# What decides about the launches: a stored result holds for these files as they were.
SOURCES = (
    "fastdmd/networks/unet*.py",
    "fastdmd/diffusion.py",
    "fastdmd/sampling.py",
    "fastdmd/optim/adamw_ema.py",
    "fastdmd/optim/averages.py",
    "fastdmd/optim/buffers.py",
    "fastdmd/optim/flat.py",
    "fastdmd/optim/gradients.py",
    "fastdmd/optim/groups.py",
    "fastdmd/distill/starts.py",
    "fastdmd/distill/draws.py",
    "fastdmd/distill/buffers.py",
    "fastdmd/distill/guard.py",
    "fastdmd/distill/matching.py",
    "fastdmd/distill/statistics.py",
    "fastdmd/distill/tally.py",
    "fastdmd/distill/losses.py",
    "fastdmd/distill/methods.py",
    "fastdmd/distill/turns.py",
    "fastdmd/distill/execution.py",
    "fastdmd/runs/presets.py",
    "fastdmd/ops/*.py",
    "fastdmd/kernels/*.py",
    "benchmarks/fake_cuda/*",
    "benchmarks/inspect_step.py",
)


def record_turns(config, batch_size: int) -> dict[str, list]:
    """The launches of a generator turn and of a guidance turn, compiled, in bfloat16."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.fake_cuda.inductor import Record
    from fastdmd.distill.draws import Draws
    from fastdmd.distill.turns import DMD2
    from fastdmd.networks.unet import UNet

    with torch.device("meta"):
        teacher = UNet(config).to(memory_format=torch.channels_last)
    with FakeTensorMode():

        def images():
            return torch.empty(batch_size, *config.image_shape, device="cuda")

        def levels():
            return torch.empty(batch_size, device="cuda")

        def key():
            return torch.empty(4, dtype=torch.int64, device="cuda")

        labels = torch.empty(batch_size, dtype=torch.int64, device="cuda") if config.num_classes else None
        draws = Draws(images(), labels, levels(), levels(), dm_key=key(), fake_key=key())
        options = dict(learning_rate=1e-4, max_grad_norm=10.0)
        model = DMD2(
            fake_cuda.fake(teacher),
            generator_sigmas=(80.0,),
            sigma_data=config.sigma_data,
            dfake_gen_update_ratio=1,
            generator_options=dict(ema_decay=0.999, **options),
            guidance_options=options,
            execution="compiled",
            compute_dtype=torch.bfloat16,
        )
        model.iterate(0, lambda step: draws)  # compiles
        turns = {"generator turn": model.generator_turn, "guidance turn": model.guidance_turn}
        launches = {}
        for name, turn in turns.items():
            with Record() as record:
                turn()
            launches[name] = record.launches
    return launches


def summarize(launches: list) -> dict:
    """Counts, traffic, arithmetic, the time they imply, and what looks like waste."""
    kinds = {}
    for kind in LAUNCHES:
        members = [launch for launch in launches if launch.kind == kind]
        kinds[kind] = {
            "calls": len(members),
            "launches": sum(launch.num_launches for launch in members),
            "bytes": sum(launch.num_bytes for launch in members),
            "flops": sum(launch.flops for launch in members),
        }
    assert sum(kind["calls"] for kind in kinds.values()) == len(launches)
    flops = sum(kind["flops"] for kind in kinds.values())
    num_bytes = sum(kind["bytes"] for name, kind in kinds.items() if name not in LIBRARY)
    memory_ms, compute_ms = 1e3 * num_bytes / BYTES_PER_S, 1e3 * flops / FLOPS_PER_S
    return {
        "kinds": kinds,
        "launches": sum(kind["launches"] for kind in kinds.values()),
        "flops": flops,
        "bytes_outside_libraries": num_bytes,
        "estimate_ms": {
            "memory": round(memory_ms, 3),
            "compute": round(compute_ms, 3),
            "sum": round(memory_ms + compute_ms, 3),
        },
        "fastdmd_ops": dict(Counter(f"{x.name}: {x.num_launches}" for x in launches if x.kind == "fastdmd op")),
        "eager": dict(Counter(launch.name for launch in launches if launch.kind == "eager")),
        "convolutions_not_channels_last": convolutions_not_channels_last(launches),
        "layout_changes": layout_changes(launches),
        "copies": grouped(launch for launch in launches if is_copy(launch)),
        "atomics": grouped(launch for launch in launches if "tl.atomic" in launch.source),
        "float32_feature_maps": grouped(launch for launch in launches if writes_float32_maps(launch)),
    }


def convolutions_not_channels_last(launches: list) -> list[dict]:
    from benchmarks.fake_cuda.inductor import layout

    return grouped(
        launch
        for launch in launches
        if launch.kind.startswith("convolution")
        and any(layout(x) not in ("channels_last", "either") for x in launch.inputs if x.dim() == 4)
    )


def layout_changes(launches: list) -> list[dict]:
    """Kernels of which one feature map, read or written, is channels_last and another is not."""
    from benchmarks.fake_cuda.inductor import layout

    found = []
    for launch in launches:
        layouts = {layout(x) for x in launch.inputs + launch.outputs if x.dim() == 4} - {"either"}
        if launch.kind not in LIBRARY and len(layouts) > 1:
            found.append(launch)
    return grouped(found)


def is_copy(launch) -> bool:
    """Generated code that only moves numbers, or converts them."""
    return launch.kind == "generated pointwise" and re.search(ARITHMETIC, launch.source) is None


def writes_float32_maps(launch) -> bool:
    import torch

    return launch.kind.startswith("generated") and any(
        x.dim() == 4 and x.dtype == torch.float32 and min(x.shape[2:]) > 1 for x in launch.outputs
    )


def grouped(launches) -> list[dict]:
    """Launches of the same kernel on the same shapes, the most expensive first."""

    def form(tensors) -> list[str]:
        return [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{list(x.stride())}" for x in tensors]

    groups = defaultdict(list)
    for launch in launches:
        inputs = form(x for x in launch.inputs if x.dim() > 1)
        groups[launch.name, tuple(inputs), tuple(form(launch.outputs))].append(launch)
    rows = [
        {
            "kernel": name,
            "calls": len(group),
            "bytes": sum(x.num_bytes for x in group),
            "inputs": inputs,
            "outputs": outputs,
        }
        for (name, inputs, outputs), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def report(turn: str, summary: dict) -> str:
    lines = [f"{turn}: {KIND}", f"  {'':<22}{'calls':>7}{'launches':>10}{'MB':>10}{'GFLOP':>10}"]
    for kind, row in summary["kinds"].items():
        numbers = f"{row['calls']:7}{row['launches']:10}{row['bytes'] / 1e6:10.1f}{row['flops'] / 1e9:10.1f}"
        lines.append(f"  {kind:<22}{numbers}")
    estimate = summary["estimate_ms"]
    lines.append(
        f"  ESTIMATE {estimate['sum']:.2f} ms: {estimate['memory']:.2f} for"
        f" {summary['bytes_outside_libraries'] / 1e9:.2f} GB outside the libraries at 3.35 TB/s,"
        f" {estimate['compute']:.2f} for {summary['flops'] / 1e12:.2f} TFLOP at 989 TFLOP/s;"
        f" {summary['launches']} launches"
    )
    wrong = sum(row["calls"] for row in summary["convolutions_not_channels_last"])
    lines.append(f"  convolutions given anything but channels_last: {wrong}")
    for name in ("layout_changes", "copies", "atomics", "float32_feature_maps"):
        rows = summary[name]
        total = sum(row["calls"] for row in rows), sum(row["bytes"] for row in rows) / 1e6
        lines.append(f"  {name.replace('_', ' ')}: {total[0]} calls, {total[1]:.1f} MB")
        lines += [f"    {row['bytes'] / 1e6:8.1f} MB, {row['calls']} x {row['kernel']}" for row in rows[:4]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(BATCHES), default="mnist")
    parser.add_argument("--batch-size", type=int, help="default: 48, 64 and 40 images")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    arguments = parser.parse_args()
    batch_size = arguments.batch_size or BATCHES[arguments.preset]
    sources = source_hashes(SOURCES)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        fake_cuda.load(Path(folder))
        from benchmarks.environment import describe
        from benchmarks.fake_cuda import inductor
        from fastdmd import teachers
        from fastdmd.runs.presets import PRESETS

        environment = {key: value for key, value in describe("cpu").items() if key in ("commit", "torch", "triton")}
        config = PRESETS[arguments.preset].network or teachers.load("mnist").config
        inductor.install()
        turns = {name: summarize(launches) for name, launches in record_turns(config, batch_size).items()}
    print("\n\n".join(report(name, summary) for name, summary in turns.items()))
    if arguments.json:
        result = {
            "kind": KIND,
            **environment,
            "device": "H100 (fake)",
            "preset": arguments.preset,
            "batch_size": batch_size,
            "precision": "bf16",
            "sources": sources,
            "turns": turns,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the engine's thread for the fake device cannot be joined


if __name__ == "__main__":
    main()
