"""`networks.safetensors`: what a run leaves to a second stage of it, with other settings, and how that starts.

Tensors `generator.*`, `fake_score.*`, perhaps `head.*`, and `average.0.*`, `average.1.*`, ..., each a whole state in
the precision that is trained; optimizers are not in it. The metadata say which averages these are, which one was kept,
and what else the generator is besides its network.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastdmd import __version__
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.distill import DMD2
from fastdmd.distill.optimization import Average
from fastdmd.distill.states import digest
from fastdmd.distill.step_codes import codes_of
from fastdmd.files import write_atomically
from fastdmd.networks.states import require_same, tensors_of
from fastdmd.networks.tensor_files import open_tensors
from fastdmd.networks.weights import (
    METADATA_KEY,
    check_generator,
    generator_metadata,
    generator_of,
    load_network,
    on_first,
    stored,
)
from fastdmd.optim import AdamWEMA
from fastdmd.ranks import ALONE, Ranks
from fastdmd.reading import parse_json
from fastdmd.runs.folder import GENERATOR, NETWORKS
from fastdmd.sampling import Generator
from fastdmd.shards import fill_parts, part_of

KIND = "networks"
State = Mapping[str, Tensor]


def save_networks(
    path: Path,
    model: DMD2,
    averages: Sequence[Average],
    *,
    kept: str,
    iteration: int,
    generator: Generator,
    ranks: Ranks = ALONE,
) -> None:
    """Writes what a second stage needs, in one atomic replacement; `averages` are those of the model, in its order, and
    `generator` says at which levels one makes images, and whether these are clamped. Of a model of which each of
    `ranks` has a part, all of them call this, and the first one writes."""
    states = {
        "generator": _state(model.generator_optimizer),
        "fake_score": _state(model.guidance_optimizer),
        **{f"average.{index}": net.state_dict() for index, net in enumerate(model.generator_optimizer.ema_networks)},
    }
    if model.head_optimizer is not None:
        states["head"] = _state(model.head_optimizer)
    metadata = {
        "kind": KIND,
        "network": model.teacher.describe(),
        "averages": [average.name for average in averages],
        "kept": kept,
        "iterations": iteration,
        **generator_metadata(generator),
        "version": __version__,
    }
    found = {part: on_first(state, ranks) for part, state in states.items()}

    def write() -> None:
        tensors = {
            f"{part}.{name}": stored(name, value, value.dtype)
            for part, state in found.items()
            for name, value in state.items()
        }
        content = save(tensors, metadata={METADATA_KEY: json.dumps(metadata)})
        write_atomically(path, lambda file: file.write(content))

    ranks.from_first(write)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a run left."""

    folder: Path
    generator: State
    fake_score: State | None  # None: that of the teacher
    codes: State  # by which it knows the steps of a generator
    head: State | None
    averages: Mapping[str, State]
    kept: State  # the average that was the run's result
    sampler: Generator  # at which levels its generator makes images, and whether they are clamped

    def fill(self, model: DMD2, averages: Sequence[Average], sampler: Generator) -> list[str]:
        """Starts a model, whose averages and sampler are given, from it; returns what to say of it, a line each.

        An average of the same name goes on, another one starts from that which the run kept. Raises ValueError for a
        head of other shapes, for weights that are not finite, and where processes that take their parts have read
        others.
        """
        if model.is_in_parts:
            model.ranks.require_equal("content of --init-from", self._digest)
        said: list[str] = []
        own = [self.averages.get(average.name, self.kept) for average in averages]
        others = [average.name for average in averages if average.name not in self.averages]
        _fill(model.generator_optimizer, self.generator, own)
        if self.fake_score is None:
            said.append(
                f"{self.folder} has no {NETWORKS}: generator and averages start from its {GENERATOR}, the fake score "
                "from the teacher"
            )
        else:
            codes = self._codes_for(model)
            _fill(model.guidance_optimizer, {**self.fake_score, **codes})
            if self.codes.keys() - {name for name, value in codes.items() if value is self.codes.get(name)}:
                said.append(f"what the fake score of {self.folder} knows of the steps of its generator is left out")
            if others:
                said.append(
                    f"{self.folder} has no average of {', '.join(others)}: it starts from the one that was kept"
                )
        samplers = self.sampler, sampler
        if self.sampler.sigmas != sampler.sigmas:
            before, now = (", ".join(f"{sigma:g}" for sigma in each.sigmas) for each in samplers)
            said.append(f"the generator of {self.folder} makes images at sigma {before}, here at {now}")
        if self.sampler.clamped != sampler.clamped:
            before, now = ("are" if each.clamped else "are not" for each in samplers)
            said.append(f"images of the generator of {self.folder} {before} clamped to [-1, 1], here they {now}")
        if model.head_optimizer is not None and self.head is not None:
            require_same(model.head_optimizer.network.state_dict(), self.head, f"the head of {self.folder}")
            _fill(model.head_optimizer, self.head)
        elif model.head_optimizer is not None:
            said.append(f"{self.folder} has no head of a discriminator: it starts anew")
        elif self.head is not None:
            said.append(f"the discriminator's head of {self.folder} is left out: --gan-guidance-weight is 0")
        return said

    def _codes_for(self, model: DMD2) -> State:
        """Those of the model's own steps, by the names of its fake score; zero where this stage has none of as many."""
        own = model.guidance_optimizer.weights
        added = codes_of(own.keys() - model.generator_optimizer.weights.keys())
        fresh = {name: torch.zeros(own[name].shape) for name in added}
        return {
            name: found if (found := self.codes.get(name, zero)).shape == zero.shape else zero
            for name, zero in fresh.items()
        }

    def _digest(self) -> str:
        states = self.generator, self.fake_score or {}, self.codes, self.head or {}, *self.averages.values(), self.kept
        return digest(*(value for state in states for value in state.values()))


def read_stage(folder: Path, teacher: DenoisingNetwork) -> Stage:
    """What the run in `folder` left, for a distillation of `teacher`.

    A run from before there was such a file gives its generator alone. Raises FileNotFoundError where there is no run,
    ValueError where it is of another network than the teacher's or broken.
    """
    path = folder / NETWORKS
    if not path.is_file():
        return _from_generator(folder, teacher)
    weights = open_tensors(path)
    metadata = _metadata(weights.metadata, path)
    _require_network(teacher, metadata["network"], path)
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.read({name: name for name in weights.described}).items():
        part, _, rest = name.partition(".")
        if part == "average":
            number, _, rest = rest.partition(".")
            part = f"average.{number}"
        states.setdefault(part, {})[rest] = value
    fake_score = states.get("fake_score", {})
    expected = tensors_of(teacher)
    codes = {name: fake_score.pop(name) for name in codes_of(fake_score.keys() - expected.keys())}
    of_averages = [f"average.{index}" for index in range(len(metadata["averages"]))]
    for part in ("generator", "fake_score", *of_averages):
        require_same(expected, states.get(part, {}), f"the tensors of {part} in {path}")
    averages = {name: states[part] for name, part in zip(metadata["averages"], of_averages, strict=True)}
    return Stage(
        folder,
        states["generator"],
        fake_score,
        codes,
        states.get("head"),
        averages,
        averages[metadata["kept"]],
        generator_of(teacher, metadata),
    )


def _from_generator(folder: Path, teacher: DenoisingNetwork) -> Stage:
    path = folder / GENERATOR
    if not path.is_file():
        raise FileNotFoundError(
            f"expected --init-from to be the folder of a run of fastdmd.train, got {folder} without {NETWORKS} or "
            f"{GENERATOR}"
        )
    code = copy.deepcopy(teacher.inner) if "source" in teacher.describe() else None
    generator, metadata = load_network(path, network=code)
    if metadata["kind"] != "generator":
        raise ValueError(f"expected a generator in {path}, got a {metadata['kind']}")
    # Code that was named is not of the network; what the file lacks of others, a description has.
    _require_network(teacher, metadata["network"] if code is not None else generator.describe(), path)
    state = tensors_of(generator)
    return Stage(folder, state, None, {}, None, {}, state, generator_of(generator, metadata))


def _metadata(found: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        metadata = parse_json(found.get(METADATA_KEY, "null"))
        names = metadata["averages"]
        is_whole = metadata["kind"] == KIND and isinstance(metadata["network"], dict)
        is_whole = is_whole and isinstance(names, list) and metadata["kept"] in names and len({*names}) == len(names)
    except (ValueError, TypeError, KeyError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"expected the networks of a run in {path}, got other metadata than fastdmd.train writes")
    check_generator(metadata | {"kind": "generator"}, path)
    return metadata


def _require_network(teacher: DenoisingNetwork, description: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError that names the first difference."""
    expected = json.loads(json.dumps(teacher.describe(), default=str))
    got = json.loads(json.dumps(description, default=str))
    for name in expected | got:
        if expected.get(name) != got.get(name):
            raise ValueError(
                f"expected --init-from to be of a network like the teacher's, with {name} "
                f"{str(expected.get(name)):.80}, got {str(got.get(name)):.80} in {path}"
            )


def _state(optimizer: AdamWEMA) -> dict[str, Tensor]:
    """Of the network that it trains, in the precision in which it does."""
    return optimizer.network.state_dict() | optimizer.weights


def _fill(optimizer: AdamWEMA, weights: State, averages: Sequence[State] = ()) -> None:
    """Weights and averages of an optimizer, and buffers and fixed parameters of its network; its moments stay."""
    fill_parts(optimizer.network, weights)
    state = optimizer.state_dict()
    kinds = ["param", *(kind for kind in state if kind.startswith("ema"))]
    for kind, values in zip(kinds, (weights, *averages), strict=True):
        state[kind] = {name: part_of(values[name], like) for name, like in state[kind].items()}
    optimizer.load_state_dict(state)
