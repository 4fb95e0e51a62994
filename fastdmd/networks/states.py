"""A network's state: found among the tensors of a file under whatever wrappers, compared, filled in, finite."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdmd.networks.tensor_files import MAX_NAMED, TensorFile, listed, open_tensors, refusal
from fastdmd.networks.user_code import user_code
from fastdmd.shards import fill_parts

COMPILED = "_orig_mod."  # what torch.compile writes before the names inside; no module of anybody's is called so


def load_weights(network: nn.Module, path: Path, key: str | None = None) -> None:
    """Fills a network with the tensors of a weight file of any kind that `open_tensors` reads, found as `find` does.

    Raises FileNotFoundError or ValueError with the path, what was expected and what came.
    """
    weights = open_tensors(path)
    fill(network, weights, find(weights, network, key))


def find(weights: TensorFile, network: nn.Module, key: str | None = None) -> dict[str, str]:
    """Names in the file by the network's own, for all of its tensors.

    They may lie under one prefix: of a wrapper (`module.`, `model.`) or an entry (`state_dict`, `ema`), or of several;
    the notice says which was taken. `key` names the entry where several fit. A tensor that the network has under two
    names may be there under one. Raises ValueError with the candidates, or with what is missing, left over or other.
    """
    expected = tensors_of(network)
    ours = _without_wrappers(expected)
    names = weights.renamed(lambda name: name.replace(COMPILED, ""))
    inside = "" if key is None else key.removesuffix(".") + "."
    if inside:
        names = {name.removeprefix(inside): own for name, own in names.items() if name.startswith(inside)}
        if not names:
            entries = sorted({name.split(".")[0] for name in weights.described if "." in name})
            raise refusal(f"--weights-key out of {listed(entries)} for {weights.path}", key)
    twins = _twins(network)
    hits = Counter(prefix for name in names for prefix in _prefixes(name) if name[len(prefix) :] in ours)
    needed = len({twins.get(name, name) for name in expected})
    whole = [prefix for prefix, count in hits.items() if needed <= count]
    if len(whole) > 1:
        entries = [f"{inside}{prefix}".rstrip(".") for prefix in whole]
        raise refusal(f"--weights-key out of {listed(entries)} for {weights.path}", key or "none")
    prefix = whole[0] if whole else max(hits, key=lambda prefix: (hits[prefix], -len(prefix)), default="")
    under = {name[len(prefix) :]: own for name, own in names.items() if name.startswith(prefix)}
    found = {ours.get(name, name): own for name, own in under.items()}
    for name, twin in twins.items():
        for absent, present in ((name, twin), (twin, name)):
            if absent not in found and present in found:
                found[absent] = found[present]
    place = (inside + prefix).rstrip(".")
    subject = f"the tensors of {type(network).__name__} in {weights.path}" + (f" under {place}" if place else "")
    require_same(expected, {name: weights.described[own] for name, own in found.items()}, subject)
    if place:
        others = len(weights.described) - len(under)
        weights.notice = f"{weights.path}: took the {len(under)} tensors under {place}, left {others} others"
    return found


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network, without what it may hold that is no tensor."""
    return {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}


def require_same(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], subject: str) -> None:
    """Compares names, shapes and kinds of numbers. Raises ValueError that names the first that differ."""
    missing = [name for name in expected if name not in got]
    left_over = [name for name in got if name not in expected]
    other = []
    for name, want in expected.items():
        have = got.get(name, want)
        if want.shape != have.shape:
            other.append(f"{name} of shape {tuple(have.shape)}, not {tuple(want.shape)}")
        elif _kind(want) != _kind(have):
            other.append(f"{name} of {_kind(have)}, not {_kind(want)}")
    differences = [f"it without {listed(missing)}"] * bool(missing) + [f"also {listed(left_over)}"] * bool(left_over)
    if differences or other:
        raise refusal(subject, "; ".join([*differences, *other[:MAX_NAMED]]))


def fill(network: nn.Module, weights: TensorFile, names: Mapping[str, str]) -> None:
    """Reads tensors into a network, by its own names, and prints the notice. Raises ValueError if one is not finite."""
    masks = infinite_buffers(network)
    with user_code("weights", f"{type(network).__name__} to take the tensors of {weights.path}"):
        fill_parts(network, weights.read(names))
    require_finite(network, weights.path, masks)
    if weights.notice:
        print(weights.notice, file=sys.stderr)


def require_finite(network: nn.Module, source: object, masks: Container[str] = ()) -> None:
    """Raises ValueError for parameters and buffers that are not finite, naming the first.

    The buffers in `masks` may hold infinity, but no NaN.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise refusal(f"weights with values in {source}", f"{name} without, on the meta device")
        if tensor.is_floating_point():
            bad = tensor.isnan() if name in masks else ~tensor.isfinite()
            if num_bad := int(bad.sum()):
                kind = "NaN" if tensor.isnan().any() else "infinity"
                raise refusal(
                    f"finite weights in {source}", f"{kind} in {name} ({num_bad} of {tensor.numel()} numbers)"
                )


def infinite_buffers(network: nn.Module) -> set[str]:
    """Buffers that the network's own code fills with infinity, as that of attention masks does."""
    buffers = dict(network.named_buffers())
    return {name for name, buffer in buffers.items() if buffer.is_floating_point() and buffer.isinf().any()}


def _without_wrappers(expected: Mapping[str, Tensor]) -> dict[str, str]:
    """The network's names by those that they would have if nothing wrapped it."""
    bare = {name.replace(COMPILED, ""): name for name in expected}
    while bare and all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): own for name, own in bare.items()}
    return bare


def _twins(network: nn.Module) -> dict[str, str]:
    """The first name of each parameter that the network has under several, by the others."""
    first: dict[int, str] = {}
    twins: dict[str, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            twins[name] = first[id(parameter)]
    return twins


def _prefixes(name: str) -> list[str]:
    return [""] + [name[: dot.end()] for dot in re.finditer(r"\.", name)]


def _kind(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"{tensor.layout} layout" if not tensor.is_quantized else f"{tensor.dtype}"
    if tensor.dtype == torch.bool or tensor.is_complex():
        return f"{tensor.dtype}"
    return "floating point" if tensor.is_floating_point() else "whole numbers"
