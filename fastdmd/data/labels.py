"""Classes of images: from a dataset.json, subfolders, prefixes of names or a CSV; and what every label must be."""

from __future__ import annotations

import collections
import csv
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from fastdmd.data.content import decoding, mismatch, open_regular
from fastdmd.data.members import SUFFIXES, Members, canonical_name
from fastdmd.reading import parse_json, read_all

Found = TypeVar("Found")
MAX_CLASSES = 100_000  # a network holds a few hundred numbers for each, an optimizer three times as many
TEXT_BYTES = (2**27, 1024)  # of a dataset.json or CSV: for any, and more for each image; ImageNet's has 2^26
TEXT_VALUES = (2**22, 8)  # in it; an image has two in a CSV and three in a dataset.json, and each takes 100 bytes
INTEGER = re.compile(r"-?[0-9]{1,300}(\.0*)?")  # "3.0": of a float column


def require_choice(choice: str | None) -> None:
    """Raises ValueError for what `--labels` cannot be."""
    if choice not in (None, "prefix", "none") and not choice.lower().endswith(".csv"):
        raise mismatch("--labels prefix, none or FILE.csv", choice)


def checked(labels: np.ndarray, path: Path) -> np.ndarray:
    """Labels `[N]` of any integer dtype as int64, bounded; a warning where a class has no image."""
    if labels.min() < 0:
        raise mismatch("labels >= 0", f"{labels.min()} in {path}")
    if labels.max() >= MAX_CLASSES:  # in their own dtype: as int64, 2^63 would be negative
        raise mismatch(f"labels from 0 to {MAX_CLASSES - 1}", f"{labels.max()} in {path}")
    labels = labels.astype(np.int64)
    empty = np.flatnonzero(np.bincount(labels) == 0)
    if len(empty):
        classes = f"{', '.join(map(str, empty[:3]))}{', ...' if len(empty) > 3 else ''}"
        _warn(f"{len(empty)} of the classes 0 to {labels.max()} have no image in {path}: {classes}")
    return labels


def warn_of_unread(names: list[str], path: Path) -> None:
    """Says which of the files beside unlabelled images are not read, if any: they may hold labels."""
    if names:
        some = f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
        _warn(f"no labels for the images of {path}; beside them, unread: {some}")


def of_images(members: Members, images: list[str], choice: str | None) -> np.ndarray | None:
    """Labels int64 `[N]` of images by their names, as `choice`, `fastdmd.data.load`'s `labels`, has it."""
    if choice == "none":
        return None
    labels: np.ndarray | None
    path = members.path
    if choice == "prefix":
        labels = _prefix_labels(images, path)
    elif choice is not None:
        path = Path(choice)
        labels = _csv_labels(path, images, members.path)
    elif members.description:
        path = members.path / members.description
        with decoding("JSON", path), members.open(members.description) as file:
            description = parse_json(_read_text(file, b",:[{", len(images)))
        labels = _json_labels(description, images, path)
    else:
        labels = _subfolder_labels(members, images)
    return None if labels is None else checked(labels, path)


def _read_text(stream: IO[bytes], separators: bytes, num_images: int) -> bytes:
    """A stream that describes so many images, once it cannot become many more values than they need.

    Three bytes of JSON can become a hundred in memory, and a byte of a zip a thousand of JSON. Raises ValueError.
    """
    max_bytes, max_values = (least + each * num_images for least, each in (TEXT_BYTES, TEXT_VALUES))
    text = read_all(stream, max_bytes)
    num_values = sum(text.count(separator) for separator in separators)
    if num_values > max_values:
        raise ValueError(f"it has {num_values} values, for {num_images} images")
    return text


def _json_labels(description: object, images: list[str], path: Path) -> np.ndarray | None:
    """Labels as EDM writes them: {"labels": [["00000/img00000000.png", 6], ...]}, or null for none."""
    if isinstance(description, dict) and "labels" not in description:
        _warn(f"no 'labels' in {path}: the images are unlabelled")
        return None
    labels = description.get("labels") if isinstance(description, dict) else ()
    if labels is None:
        return None
    if not (isinstance(labels, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in labels)):
        raise mismatch("'labels', null or a list of [name, class]", f"something else in {path}")
    for name, label in labels:
        if type(label) is not int:
            raise mismatch("an integer class for each image", f"{label!r:.40} for {name!s:.200} in {path}")
    known = {name.casefold() for name in images}
    outer_names = _outer_names(path.parent)
    names = (_inner_name(canonical_name(str(name)), known, outer_names) for name, _ in labels)
    by_name = _by_name(zip(names, (label for _, label in labels), strict=True), path)
    folded: dict[str, set[int]] = {}  # for a system that does not tell A.png from a.png
    for name, label in by_name.items():
        folded.setdefault(name.casefold(), set()).add(label)
    found = [by_name[name] if name in by_name else _only(folded.get(name.casefold())) for name in images]
    numbers = _require_all(found, images, path)
    _warn_of_absent([name for name in by_name if name.casefold() not in known], path)
    return _integers(numbers, path)


def _csv_labels(path: Path, images: list[str], source: Path) -> np.ndarray:
    """Labels of a CSV with lines `name,class`; classes are integers, or names that stand for their sorted place.

    A name is an image's path inside the dataset, `source`, or its last part, with suffix or without. A first line that
    names no image is a heading.
    """
    with decoding("CSV", path), open_regular(path) as file:
        text = _read_text(file, b",;\t\r\n", len(images)).decode("utf-8-sig")
        delimiter = next((mark for mark in ",;\t" if mark in text.partition("\n")[0]), ",")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    for row in rows:
        if len(row) != 2 or not all(cell.strip() for cell in row):
            raise mismatch("lines of name,class", f"{delimiter.join(row)[:200]!r} in {path}")
    keys = [_spellings(name) for name in images]
    known = {key for spellings in keys for key in spellings}
    outer_names = _outer_names(source)
    pairs = [(_inner_name(canonical_name(name.strip()), known, outer_names), label.strip()) for name, label in rows]
    if pairs and pairs[0][0] not in known and not pairs[0][0].lower().endswith(SUFFIXES):
        del pairs[0]
    by_name = _by_name(pairs, path)
    found = [next((key for key in spellings if key in by_name), None) for spellings in keys]
    used = _require_all(found, images, path)
    if len(set(used)) < len(used):
        (name, number), *_ = collections.Counter(used).most_common(1)
        raise mismatch("names that tell the images apart", f"{name} for {number} images in {path}")
    _warn_of_absent(sorted(set(by_name) - set(used)), path)
    classes = set(by_name.values())
    integers = {label for label in classes if INTEGER.fullmatch(label)}
    if integers == classes:
        return _integers([int(by_name[key].partition(".")[0]) for key in used], path)
    numbers = {label for label in classes - integers if _is_number(label)}
    if integers or numbers:  # sorted as names, 1e1 would come before 2e0
        got = " and ".join(min(group) for group in (integers, numbers or classes - integers) if group)
        raise mismatch("classes that are all integers or all names, integers in digits 0 to 9", f"{got} in {path}")
    return _places([by_name[key] for key in used], classes, path)


def _is_number(label: str) -> bool:
    """Whether it is a number in any spelling: 1e0, +10, 0.5, digits of any script, or a missing value, nan."""
    try:
        float(label)
    except ValueError:
        return False
    return "_" not in label  # which Python, but nobody else, takes inside a number


def _prefix_labels(images: list[str], path: Path) -> np.ndarray:
    """The place of what stands before the first underscore of each file's name among the sorted prefixes."""
    prefixes = []
    for name in images:
        prefix, underscore, _ = name.rpartition("/")[2].partition("_")
        if not (prefix and underscore):
            raise mismatch("names such as class_1.png for --labels prefix", f"{name} in {path}")
        prefixes.append(prefix)
    return _places(prefixes, prefixes, path)


def _subfolder_labels(members: Members, images: list[str]) -> np.ndarray | None:
    """The place of each image's folder among the sorted folders; None if the images lie in no subfolder."""
    folders = [name.rpartition("/")[0] for name in images]
    if not any(folders):
        return None
    for name, folder in zip(images, folders, strict=True):
        if not folder or "/" in folder:
            expected = "images all in the folder itself, or all directly in class subfolders, or --labels none"
            raise mismatch(expected, f"{name} among {len(images)} images in {members.path}")
    classes = {name.split("/")[0] for name in members.folders}
    empty = sorted(classes - set(folders))
    if empty:  # whether it counts as a class would be a guess
        raise mismatch("images in every class subfolder", f"none in {members.path / empty[0]}")
    return _places(folders, classes, members.path)


def _places(names: Sequence[str], classes: Iterable[str], path: Path) -> np.ndarray:
    """The place of each name among the sorted classes."""
    ordered = sorted(set(classes))
    if all(re.fullmatch("[0-9]{1,18}", name) for name in ordered):
        by_number = sorted(ordered, key=int)
        if other := [index for index, name in enumerate(by_number) if ordered[index] != name]:
            first = other[0]
            _warn(f"classes are numbered in the order of their names as text, {ordered[first]} is {first}, in {path}")
        elif gaps := [index for index, name in enumerate(ordered) if int(name) != index]:
            first = gaps[0]
            _warn(f"classes are numbered from 0 without gaps, {ordered[first]} is {first}, in {path}")
    place = {name: index for index, name in enumerate(ordered)}
    return np.array([place[name] for name in names])


def _integers(labels: list[int], path: Path) -> np.ndarray:
    if (largest := max(labels, key=abs)) >= 2**63 or largest < -(2**63):
        raise mismatch(f"labels from 0 to {MAX_CLASSES - 1}", f"{largest!r:.40} in {path}")
    return np.array(labels, np.int64)


def _by_name(pairs: Iterable[tuple[str, int | str]], path: Path) -> dict:
    by_name: dict = {}
    for name, label in pairs:
        if by_name.setdefault(name, label) != label:
            raise mismatch("one class for each image", f"{by_name[name]} and {label} for {name} in {path}")
    return by_name


def _spellings(name: str) -> list[str]:
    """An image's name, and what a table may call it: less and less of it."""
    last = name.rpartition("/")[2]
    return [name, name.rpartition(".")[0], last, last.rpartition(".")[0]]


def _outer_names(source: Path) -> list[str]:
    """What a table may put before a name inside `source`: the folders around it, all of them or the last few."""
    folders = canonical_name(str(source.absolute())).split("/")
    return ["/".join(folders[start:]) + "/" for start in range(len(folders))]


def _inner_name(name: str, known: set[str], outer_names: list[str]) -> str:
    """A name in a table without the folders around the dataset; `known` names, casefolded or not, stay as they are."""
    if name in known or name.casefold() in known:
        return name
    return name.removeprefix(next((outer for outer in outer_names if name.startswith(outer)), ""))


def _only(labels: set[int] | None) -> int | None:
    return next(iter(labels)) if labels and len(labels) == 1 else None


def _require_all(found: Sequence[Found | None], images: list[str], path: Path) -> list[Found]:
    for image, label in zip(images, found, strict=True):
        if label is None:
            raise mismatch(f"one label for each of {len(images)} images", f"none for {image} in {path}")
    return [label for label in found if label is not None]


def _warn_of_absent(names: list[str], path: Path) -> None:
    if names:
        _warn(f"{len(names)} names in {path} are of no image, such as {names[0]}")


def _warn(message: str) -> None:
    warnings.warn(f"fastdmd.data: {message}", stacklevel=2)
