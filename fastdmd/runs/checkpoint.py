"""One checkpoint on the disk: a folder of tensors, of everything else and of their checksums; whole, or not there.

state.safetensors    tensors, by their place in the state: training.model.generator.optimizer.param.conv_in.weight
state.json           the state, with the names of tensors where these were
best.safetensors     the run's, as it was at that moment, if there was one
SHA256SUMS           of these files, as `sha256sum -c` reads it
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdmd import reading
from fastdmd.files import SUMS, copy, digest, new_folder, read_sums, sum_line
from fastdmd.networks.weights import stored

TENSORS, REST = "state.safetensors", "state.json"
FORMAT = 2  # of what is in here, and of the random numbers of a run (1: torch's); another one is refused
MAX_REST_BYTES = 1 << 26
TENSOR = "$tensor"  # the one key of what stands for a tensor in state.json


def write(path: Path, state: Mapping[str, Any], beside: Sequence[Path] = ()) -> None:
    """Writes a state, dictionaries and lists of tensors, numbers and texts, to a folder that is new.

    Files named in `beside` are kept with it, as they are now: by a second name where the disk knows such, else by copy.
    Raises OSError, and leaves nothing then.
    """
    tensors: dict[str, Tensor] = {}
    rest = json.dumps({"format": FORMAT, "state": _taken_apart(state, "", tensors)})
    with new_folder(path) as folder:
        try:
            save_file({name: stored(name, value, value.dtype) for name, value in tensors.items()}, folder / TENSORS)
        except SafetensorError as error:  # which has no errno, of a full disk neither
            raise OSError(errno.EIO, str(error), str(path)) from error
        (folder / REST).write_text(rest, encoding="utf-8")
        for file in beside:
            copy(file, folder / file.name)
        names = sorted(file.name for file in folder.iterdir())
        sums = "".join(sum_line(folder / name) for name in names)
        (folder / SUMS).write_text(sums, encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The state in a folder. Raises OSError or ValueError for one that is not whole or of another format."""
    with _refusing(path):
        rest = _rest(path, dict.fromkeys([REST, TENSORS, *read_sums(path)]))
        reading.require_safetensors(path / TENSORS)
        return _put_together(rest, load_file(path / TENSORS))


def read_rest(path: Path) -> dict[str, Any]:
    """The state without tensors, at which nobody has looked. Raises as `read` does."""
    with _refusing(path):
        return _rest(path, {REST})


def _rest(path: Path, names: Iterable[str]) -> Any:
    sums = read_sums(path)
    for name in names:
        if name not in sums:
            raise _refusal(path, f"{SUMS} without {name}")
        if digest(path / name) != sums[name]:
            raise _refusal(path, f"another {name} than its {SUMS} says")
    content = reading.read_json(path / REST, MAX_REST_BYTES)
    found = content.get("format") if isinstance(content, dict) else content
    if found != FORMAT:
        raise ValueError(f"expected a checkpoint of format {FORMAT}, of Philox's numbers, in {path}, got {found!s:.40}")
    return content["state"]


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """One line that names the checkpoint, whatever is wrong with it."""
    try:
        yield
    except FileNotFoundError as error:
        raise _refusal(path, f"it without {Path(error.filename).name}") from error
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        if str(error).startswith("expected "):
            raise
        raise _refusal(path, f"{type(error).__name__}: {error}") from error


def _taken_apart(part: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(part, Tensor):
        assert place not in tensors
        tensors[place] = part
        return {TENSOR: place}
    inside = f"{place}." if place else ""
    if isinstance(part, Mapping):
        return {key: _taken_apart(value, f"{inside}{key}", tensors) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [_taken_apart(value, f"{inside}{index}", tensors) for index, value in enumerate(part)]
    return part


def _put_together(part: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(part, dict):
        if part.keys() == {TENSOR}:
            return tensors[part[TENSOR]]
        return {key: _put_together(value, tensors) for key, value in part.items()}
    if isinstance(part, list):
        return [_put_together(value, tensors) for value in part]
    return part


def _refusal(path: Path, got: str) -> ValueError:
    return ValueError(f"expected a whole checkpoint in {path}, got {got}")
