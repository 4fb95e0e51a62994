"""Folders of pairs, noise and what a teacher makes of it: how they are written, continued, checked and read.

`pairs.json` says what the pairs are of, `pairs-00000.safetensors`, ... hold the images `[n, C, H, W]`, float32, and
the labels `[n]`, int64, of as many pairs as a batch has, `SHA256SUMS` the checksums of these files. Noise is not
stored: it is a function of (seed, index).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fastdmd import ops, reading
from fastdmd.data.content import decoding, mismatch
from fastdmd.files import SUMS, digest, read_sums, write_atomically
from fastdmd.memory import require_memory
from fastdmd.randomness import RANDOM_NUMBERS, Stream, integers, normals

RECORD = "pairs.json"
LOCK = "pairs.lock"  # empty; locked as long as somebody writes here, as the others are replaced
MAX_PAIRS = 10**7
MAX_PARTS = 100_000  # whose checksums are read at once, after every file
MAX_RECORD_BYTES = 2**14
AGAIN = "the same fastdmd.pairs command makes it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairRecord:
    """What decides the pairs of a folder, to the last bit on one machine."""

    teacher: str  # which network it is
    image_shape: tuple[int, int, int]  # C, H, W
    num_classes: int  # 0: without labels
    sigma: float  # what the noise is scaled with
    teacher_steps: int
    num: int
    batch_size: int
    seed: int
    device: str
    label_emphasis: float = 1.0  # of the teacher, before it samples
    random_numbers: str = RANDOM_NUMBERS

    @property
    def num_parts(self) -> int:
        """Files."""
        return -(-self.num // self.batch_size)

    def part(self, index: int) -> slice:
        """The pairs of a file."""
        return slice(index * self.batch_size, min((index + 1) * self.batch_size, self.num))

    def noise(self, part: slice) -> Tensor:
        """Standard normal, of the pairs of a part, float32 `[n, C, H, W]`."""
        rng_key = ops.rng_key(self.seed, stream=Stream.PAIR_NOISE, first_sample=part.start)
        return normals((part.stop - part.start, *self.image_shape), rng_key)

    def labels(self, part: slice) -> Tensor | None:
        """All classes in turn, int64 `[n]`; None without classes."""
        return torch.arange(part.start, part.stop) % self.num_classes if self.num_classes else None


class PairFolder:
    """A folder of pairs that are being made: new, or one that the same record was begun in.

    Raises ValueError for a folder of pairs of another record, naming what differs, for files of pairs without one, and
    for a record of too many files.
    """

    def __init__(self, path: Path, record: PairRecord):
        self.path, self.record = path, record
        if record.num_parts > MAX_PARTS:
            raise mismatch(
                f"at most {MAX_PARTS} files of pairs",
                f"{record.num_parts} of {record.batch_size} pairs; a larger --batch-size makes fewer",
            )
        if (path / RECORD).exists():
            found = read_record(path)
            for name, value in vars(record).items():
                if getattr(found, name) != value:
                    raise mismatch(f"pairs of {name} {value} in {path}", f"some of {name} {getattr(found, name)}")
        elif any(path.glob("pairs-*.safetensors")):
            raise mismatch(f"{RECORD} beside the pairs in {path}", "none")

    def missing(self) -> Iterator[int]:
        """The files that are not there, or not as they were written."""
        sums = _sums(self.path)
        for index in range(self.record.num_parts):
            try:
                read_part(self.path, self.record, index)
                require_as_written(_file(self.path, index), sums)
            except ValueError:
                yield index

    def begin(self) -> None:
        """Makes the folder, with its record in it, where it is new; checksums, where it is from before there were."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / RECORD).exists():
            text = json.dumps(dataclasses.asdict(self.record), indent=2) + "\n"
            write_atomically(self.path / RECORD, lambda file: file.write(text.encode()))
        if _sums(self.path) is None:
            missing = set(self.missing())
            whole = (_file(self.path, index) for index in range(self.record.num_parts) if index not in missing)
            self._write_sums({file.name: digest(file) for file in whole})

    def write(self, index: int, images: Tensor, labels: Tensor | None) -> None:
        """A file, in one atomic replacement, and its checksum."""
        tensors = {"images": images.float().cpu().contiguous()} | ({} if labels is None else {"labels": labels.cpu()})
        write_atomically(_file(self.path, index), lambda file: file.write(save(tensors)))
        self._write_sums({**(_sums(self.path) or {}), _file(self.path, index).name: digest(_file(self.path, index))})

    def _write_sums(self, sums: Mapping[str, str]) -> None:
        text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
        write_atomically(self.path / SUMS, lambda file: file.write(text.encode()))


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs of a folder, on the host. Made by `load_pairs`."""

    noise: Tensor  # [N, C, H, W], standard normal
    images: Tensor  # [N, C, H, W]
    labels: Tensor | None  # int64 [N]

    def __len__(self) -> int:
        return len(self.images)

    def random_batch(
        self,
        batch_size: int,
        *,
        seed: int,
        step: int,
        device: torch.device | str = "cpu",
        first_sample: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Noise, images and labels of pairs drawn with replacement, those of samples from `first_sample` on.

        Each is a function of (seed, step, sample).
        """
        indices = integers(
            0, len(self), batch_size, seed=seed, stream=Stream.PAIR, iteration=step, first_sample=first_sample
        )
        noise, images = (tensor.index_select(0, indices).to(device) for tensor in (self.noise, self.images))
        return noise, images, None if self.labels is None else self.labels.index_select(0, indices).to(device)


def load_pairs(
    path: Path,
    *,
    teacher: str | None,
    image_shape: tuple[int, int, int],
    num_classes: int,
    sigma: float,
    label_emphasis: float = 1.0,
) -> Pairs:
    """The pairs of a folder, of this teacher (None: of any) with labels emphasized so, and of noise that it scales with
    `sigma`, read whole.

    Raises FileNotFoundError for what is no such folder, ValueError for pairs of another teacher and for files that are
    missing or broken, with what was expected and what came.
    """
    if not (path / RECORD).is_file():
        raise FileNotFoundError(f"fastdmd.data: expected a folder of fastdmd.pairs, got {path}, without {RECORD}")
    record = read_record(path)
    for what, expected, got in (
        ("images of shape", tuple(image_shape), record.image_shape),
        ("a number of classes of", num_classes, record.num_classes),
        ("noise scaled with --conditioning-sigma", sigma, record.sigma),
        ("images of the teacher", record.teacher if teacher is None else teacher, record.teacher),
        ("images of the teacher with --label-emphasis", label_emphasis, record.label_emphasis),
    ):
        if expected != got:
            raise mismatch(f"{what} {expected} in {path}", got)
    num_bytes = 2 * 4 * record.num * math.prod(image_shape)
    require_memory(num_bytes, torch.device("cpu"), f"the pairs of {path}", "use fewer")
    images = torch.empty(record.num, *image_shape)
    noise = torch.empty_like(images)
    labels = torch.empty(record.num, dtype=torch.int64) if num_classes else None
    sums = _sums(path)
    for index in range(record.num_parts):
        part = record.part(index)
        images[part], found = read_part(path, record, index)
        require_as_written(_file(path, index), sums)
        noise[part] = record.noise(part)  # not before: there may be no such pairs
        if labels is not None and found is not None:
            labels[part] = found
    return Pairs(noise, images, labels)


def read_record(path: Path) -> PairRecord:
    """That of a folder. Raises ValueError for any other content than `PairFolder.begin` writes."""
    file = path / RECORD
    with decoding("JSON", file):
        content = reading.read_json(file, MAX_RECORD_BYTES)
        if (found := content.get("random_numbers", "torch's generators")) != RANDOM_NUMBERS:
            raise mismatch(f"noise of {RANDOM_NUMBERS} in {file}", f"noise of {found}")
        content["image_shape"] = tuple(content["image_shape"])
        record = PairRecord(**content)
        types = get_type_hints(PairRecord)
        if wrong := [n for n, value in vars(record).items() if type(value) is not (get_origin(types[n]) or types[n])]:
            raise mismatch(f"{wrong[0]} of another type in {file}", f"{content[wrong[0]]!r:.80}")
        counts = *record.image_shape, record.teacher_steps, record.batch_size, record.num, record.num_classes + 1
        are_counts = all(type(count) is int and count >= 1 for count in counts) and record.num <= MAX_PAIRS
        if len(record.image_shape) != 3 or not are_counts or not 0 <= record.seed < 2**32:
            raise mismatch(f"counts that can be in {file}", f"{content!r:.300}")
        if not 0 < record.sigma < math.inf:
            raise mismatch(f"a noise level in {file}", record.sigma)
        if not 0 < record.label_emphasis < math.inf:
            raise mismatch(f"a label_emphasis above 0 in {file}", record.label_emphasis)
    return record


def read_part(path: Path, record: PairRecord, index: int) -> tuple[Tensor, Tensor | None]:
    """Images and labels of one file. Raises ValueError where it is missing, broken or of other shapes."""
    file, part = _file(path, index), record.part(index)
    if not file.is_file():
        raise mismatch(f"{record.num_parts} files of pairs in {path}", f"none that is called {file.name}; {AGAIN}")
    num = part.stop - part.start
    expected: dict[str, Any] = {"images": (torch.float32, (num, *record.image_shape))}
    if record.num_classes:
        expected["labels"] = (torch.int64, (num,))
    with decoding("safetensors", file):
        reading.require_safetensors(file)
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
    if (got := {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}) != expected:
        raise mismatch(f"{expected} in {file}", f"{got!s:.300}")
    images, labels = tensors["images"], tensors.get("labels")
    if not images.isfinite().all():
        raise mismatch(f"finite images in {file}", "NaN or infinity")
    if labels is not None and not 0 <= labels.min() <= labels.max() < record.num_classes:
        raise mismatch(f"labels from 0 to {record.num_classes - 1} in {file}", f"{labels.min()} to {labels.max()}")
    return images, labels


def require_as_written(file: Path, sums: Mapping[str, str] | None) -> None:
    """Raises ValueError where a file has another checksum than there was, or none; None: of a folder without any."""
    if sums is None or sums.get(file.name) == digest(file):
        return
    raise mismatch(f"{file} as it was written", f"another than {SUMS} says; {AGAIN}")


def _sums(path: Path) -> dict[str, str] | None:
    """Of a folder; None where it is from before there were any."""
    with decoding("text", path / SUMS):
        return read_sums(path) if (path / SUMS).exists() else None


def _file(path: Path, index: int) -> Path:
    return path / f"pairs-{index:05d}.safetensors"
