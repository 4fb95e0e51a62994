"""One checkpoint on the disk: a folder of tensors, of everything else and of their checksums; whole, or not there.

state.safetensors    tensors, by their place in the state: training.model.generator.optimizer.param.conv_in.weight
state.json           the state, with the names of tensors where these were
best.safetensors     the run's, as it was at that moment, if there was one
.metadata, *.distcp  tensors of which each process has a part, see `checkpoint_parts`
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
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs import checkpoint_parts

TENSORS, REST = "state.safetensors", "state.json"
FORMAT = 2  # of what is in here, and of the random numbers of a run (1: torch's); another one is refused
MAX_REST_BYTES = 1 << 26
TENSOR = "$tensor"  # the one key of what stands for a tensor in state.json


def write(path: Path, state: Mapping[str, Any], beside: Sequence[Path] = (), ranks: Ranks = ALONE) -> None:
    """Writes a state, dictionaries and lists of tensors, numbers and texts, to a folder that is new.

    Files named in `beside` are kept with it, as they are now: by a second name where the disk knows such, else by copy.
    Of tensors that are cut, all `ranks` write their part; all else is the first one's. Raises OSError, in all of them,
    and leaves nothing then.
    """
    tensors: dict[str, Tensor] = {}
    rest = json.dumps({"format": FORMAT, "state": _taken_apart(state, "", tensors)})
    parts = {name: value for name, value in tensors.items() if checkpoint_parts.is_part(value)}

    def write_own(folder: Path, sums: Sequence[str] = ()) -> None:
        own = {name: stored(name, value, value.dtype) for name, value in tensors.items() if name not in parts}
        before = {line.split()[1] for line in sums}
        try:
            save_file(own, folder / TENSORS)
        except SafetensorError as error:  # which has no errno, of a full disk neither
            raise OSError(errno.EIO, str(error), str(path)) from error
        (folder / REST).write_text(rest, encoding="utf-8")
        for file in beside:
            copy(file, folder / file.name)
        names = sorted(file.name for file in folder.iterdir() if file.name not in before)
        (folder / SUMS).write_text("".join([*sums, *(sum_line(folder / name) for name in names)]), encoding="utf-8")

    with contextlib.ExitStack() as opened:  # of the first process alone
        folder = ranks.from_first(lambda: opened.enter_context(new_folder(path)))
        sums = checkpoint_parts.write(folder, parts, ranks) if parts else []
        ranks.from_first(lambda: write_own(folder, sums))
        ranks.from_first(opened.close)  # it takes its place


def read(path: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The state in a folder, of which `ranks` each take their parts. Raises OSError or ValueError, in all of them, for
    one that is not whole or of another format."""
    parts: dict[str, Tensor] = {}

    def read_own() -> dict[str, Any]:
        with _refusing(path):
            rest = _rest(path, dict.fromkeys([REST, TENSORS, *read_sums(path)]))
            reading.require_safetensors(path / TENSORS)
            return _put_together(rest, load_file(path / TENSORS), parts, ranks)

    content = ranks.together(read_own)
    if parts:
        with _refusing(path):
            checkpoint_parts.read(path, parts, ranks)
    return content


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
        return checkpoint_parts.described(place, part) if checkpoint_parts.is_part(part) else {TENSOR: place}
    inside = f"{place}." if place else ""
    if isinstance(part, Mapping):
        return {key: _taken_apart(value, f"{inside}{key}", tensors) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [_taken_apart(value, f"{inside}{index}", tensors) for index, value in enumerate(part)]
    return part


def _put_together(part: Any, tensors: Mapping[str, Tensor], parts: dict[str, Tensor], ranks: Ranks) -> Any:
    """With tensors in their places; those in `parts` are still to be read."""
    if isinstance(part, dict):
        if part.keys() == {TENSOR}:
            return tensors[part[TENSOR]]
        if checkpoint_parts.PART in part:
            if ranks.is_alone:
                raise ValueError("expected several processes with --shard, as have written it, got one")
            return parts.setdefault(part[checkpoint_parts.PART], checkpoint_parts.empty(part, ranks))
        return {key: _put_together(value, tensors, parts, ranks) for key, value in part.items()}
    if isinstance(part, list):
        return [_put_together(value, tensors, parts, ranks) for value in part]
    return part


def _refusal(path: Path, got: str) -> ValueError:
    return ValueError(f"expected a whole checkpoint in {path}, got {got}")
