"""The files of a folder or a zip under one kind of name, whatever system wrote them."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from fastdmd.data import signatures
from fastdmd.data.content import mismatch, open_regular
from fastdmd.reading import MAX_DEFLATE, open_member

SUFFIXES = tuple(  # of images that are read
    ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jfif .jpe .apng .avif".split()
)
UNREAD_SUFFIXES = tuple(  # of images that are not, whatever they begin with
    ".arw .cr2 .cr3 .cur .dcm .dds .dib .dng .emf .eps .exr .fits .hdr .heic .heif .icns .ico .j2k .jp2 .jpx .jxl .nef "
    ".orf .pcx .pfm .psd .qoi .raf .raw .rw2 .sgi .svg .tga .wmf .xbm .xcf .xpm".split()
)
MAX_FILES = 2**24  # of a folder; a few hundred bytes each
DESCRIPTION = "dataset.json"
IDX_NAME = re.compile(r"(images|labels).*([-._]idx[0-9]?[-._]ubyte|[-._]idx[0-9]|\.idx)(\.gz)?$", re.IGNORECASE)
SYSTEM_FOLDERS = (  # of thumbnails, forks and waste
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
)


@dataclasses.dataclass(frozen=True)
class Members:
    """Names are relative to `path`, joined by slashes, in NFC; hidden files and folders are left out."""

    path: Path
    files: dict[str, str]  # name -> the name that `open_raw` takes
    folders: frozenset[str]  # those that are named, and those of files
    open_raw: Callable[[str], IO[bytes]]
    raw_size: Callable[[str], int]  # bytes that `open_raw` can give at most

    @property
    def images(self) -> list[str]:
        """Sorted names of what can be read as images."""
        return sorted(name for name in self.files if name.lower().endswith(SUFFIXES))

    @property
    def idx_files(self) -> list[str]:
        """Sorted names of IDX files: those in no subfolder, or, if there are neither such nor images, all."""
        found = sorted(name for name in self.files if IDX_NAME.search(_last(name)))
        return [name for name in found if "/" not in name] or ([] if self.images else found)

    @property
    def unread(self) -> list[str]:
        """Sorted names of what is an image, by its suffix or its first bytes, and is not among `images`."""
        others = (name for name in self.files if not name.lower().endswith(SUFFIXES))
        return sorted(name for name in others if name.lower().endswith(UNREAD_SUFFIXES) or self._is_picture(name))

    @property
    def description(self) -> str | None:
        """The name of dataset.json, in whatever case."""
        return next((name for name in self.files if name.lower() == DESCRIPTION), None)

    def open(self, name: str) -> IO[bytes]:
        return self.open_raw(self.files[name])

    def size(self, name: str) -> int:
        """Bytes of a file, at most."""
        return self.raw_size(self.files[name])

    def _is_picture(self, name: str) -> bool:
        try:
            with self.open(name) as file:
                return signatures.is_picture(file.read(signatures.NUM_BYTES))
        except Exception:  # of any kind, from a lack of rights to an encrypted member: nobody asked for this file
            return False

    def unwrapped(self) -> Members:
        """Without folders around everything: those that hold one folder, and neither images nor a dataset.json.

        Folders without images count only beside a single one with: `x`, beside an empty `y`, may be one class of two,
        but `w/x` and `w/y` are classes in `w`, whatever lies beside that.
        """
        read = (name for name in self.files if name.lower().endswith(SUFFIXES) or _last(name).lower() == DESCRIPTION)
        holding = {name.rpartition("/")[0] for name in read}
        paths = sorted(name.split("/") for name in self.folders)
        followers = [*paths[1:], []]
        ends = [
            path
            for path, follower in zip(paths, followers, strict=False)
            if follower[: len(path)] != path or "/".join(path) in holding
        ]
        if len(holding) > 1:
            ends = [name.split("/") for name in holding]
        top = "" if "" in holding else "/".join(os.path.commonprefix(ends))
        if not top:
            return self
        start = len(top) + 1
        files = {name[start:]: raw for name, raw in self.files.items() if name.startswith(f"{top}/")}
        folders = frozenset(name[start:] for name in self.folders if name.startswith(f"{top}/"))
        return dataclasses.replace(self, path=self.path / top, files=files, folders=folders)


def of_zip(path: Path, archive: zipfile.ZipFile) -> Members:
    """Everything in an archive; ValueError for names that leave it, or that two files have."""

    def raw_size(name: str) -> int:
        info = archive.getinfo(name)  # its sizes are not to be trusted, but nothing more is ever read
        most = info.compress_size * (MAX_DEFLATE if info.compress_type == zipfile.ZIP_DEFLATED else 1)
        return min(info.file_size, most)

    return _members(path, archive.namelist(), lambda name: open_member(archive, name), raw_size)


def of_folder(path: Path) -> Members:
    """Everything below a folder, links followed; ValueError for what would never end, or cannot be looked into."""
    return _members(
        path, _walk(path), lambda name: open_regular(path / name), lambda name: (path / name).stat().st_size
    )


def canonical_name(name: str) -> str:
    """A name with slashes, in NFC, without drive, root or `.`: what an archive's writer meant, on any system."""
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    parts = [part for part in parts if part not in ("", ".")]
    if parts and re.fullmatch("[A-Za-z]:", parts[0]):
        del parts[0]
    return "/".join(parts)


def _members(
    path: Path, raw_names: Iterable[str], open_raw: Callable[[str], IO[bytes]], raw_size: Callable[[str], int]
) -> Members:
    """Raw names of folders end with a slash. Raises ValueError where two files have one name."""
    files: dict[str, str] = {}
    folders = set()
    for raw in raw_names:
        name = canonical_name(raw)
        parts = name.split("/")
        if ".." in parts:
            raise mismatch("names that stay inside", f"{raw} in {path}")
        if any(map(_is_hidden, parts)):
            continue
        is_folder = raw.endswith(("/", "\\"))
        folders.add(name if is_folder else name.rpartition("/")[0])
        if is_folder:
            continue
        if name in files and _is_read(name):
            raise mismatch("every name once", f"{name} twice in {path}")
        files[name] = raw
    return Members(path, files, frozenset(folders - {""}), open_raw, raw_size)


def _is_read(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, DESCRIPTION)) or IDX_NAME.search(_last(name)) is not None


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part.lower() in SYSTEM_FOLDERS


def _walk(folder: Path) -> list[str]:
    """Everything below a folder but what is hidden, as a zip of it would name it."""
    names: list[str] = []
    root = os.path.realpath(folder)
    seen = {root, *map(str, Path(root).parents)}  # a link to one of these leads back here
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(folder / prefix) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise mismatch("folders that can be read", f"{folder / prefix}: {error.strerror}") from error
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if _is_hidden(entry.name):
                continue
            if os.path.isdir(entry.path):
                if (real := os.path.realpath(entry.path)) in seen:
                    raise mismatch("every folder once", f"{folder / name}, which leads to {real} again")
                seen.add(real)
                names.append(f"{name}/")
                pending.append(f"{name}/")
            elif os.path.isfile(entry.path) or _is_read(name):
                names.append(name)  # what is no file is an error when it is opened
        if len(names) > MAX_FILES:
            raise mismatch(f"at most {MAX_FILES} files", f"more in {folder}")
    return names


def _last(name: str) -> str:
    return name.rpartition("/")[2]
