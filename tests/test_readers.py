"""Who reads files, and in which bounds: nobody loads a pickle, and what docs/operations.md says is what holds."""

import ast
import re
from pathlib import Path

from fastdmd import files, reading
from fastdmd.data import image_files, labels, members, pairs
from fastdmd.networks import tensor_files
from fastdmd.quality import frechet
from fastdmd.runs import checkpoint
from fastdmd.teachers import edm_pickle

ROOT = Path(__file__).parents[1]
SOURCES = {path.relative_to(ROOT / "fastdmd").as_posix(): path for path in (ROOT / "fastdmd").rglob("*.py")}

# Calls that read what somebody else wrote, and the files that may make them.
ALONE_IN = {
    "zipfile.ZipFile": {"reading.py"},
    "json.load": set(),
    "np.load": set(),
    "np.fromfile": {"runs/contents.py"},  # the file that `open_regular` gave
    "np.lib.format.read_array": {"quality/frechet.py"},
    "torch.load": {"networks/tensor_files.py"},
    "torch.jit.load": {"quality/features.py"},
    "Image.open": {"data/image_files.py", "runs/pictures.py"},  # the latter of a run's own samples.png
    "gzip.open": {"data/array_files.py"},
    "mmap.mmap": {"teachers/edm_pickle.py"},
    "safe_open": {"networks/tensor_files.py", "data/pairs.py"},
    "load_file": {"runs/checkpoint.py", "quality/features.py"},  # the latter of the package's own file
    "pickle.load": set(),
    "pickle.loads": set(),
    "pickle.Unpickler": set(),
}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_readers_are_where_they_are_looked_for():
    found = {name: set() for name in ALONE_IN}
    for source, path in SOURCES.items():
        for name, _ in calls(path):
            if name in found:
                found[name].add(source)
    assert found == ALONE_IN


def test_no_pickle_is_loaded():
    modules = set()
    for source, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules |= {(source, name) for name in names if "pickle" in name or name in ("dill", "shelve", "marshal")}
        for name, node in calls(path):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name != "torch.load" or options.get("weights_only") == "True"
            assert options.get("allow_pickle", "False") == "False", source
    own = ("fastdmd.teachers", "fastdmd.teachers.edm_pickle", "fastdmd.teachers.inert_pickle")
    # The latter for a machine that finds names of shapes and places alone, of a checkpoint in parts.
    expected = {("teachers/inert_pickle.py", "pickletools"), ("runs/checkpoint_parts.py", "pickle")}
    assert {entry for entry in modules if entry[1] not in own} == expected
    uses = [line for line in SOURCES["runs/checkpoint_parts.py"].read_text().splitlines() if "pickle." in line]
    assert uses == ["class _Metadata(pickle.Unpickler):"]


def test_json_of_files_is_parsed_in_one_place():
    """Elsewhere `json.loads` is given what `json.dumps` has just made."""
    for source, path in SOURCES.items():
        for name, node in calls(path):
            if name == "json.loads" and source != "reading.py":
                assert ast.unparse(node.args[0]).startswith("json.dumps("), source


def test_the_bounds_in_the_docs():
    text = (ROOT / "docs" / "operations.md").read_text().split("## What is read, and its bounds")[1]
    rows = {cells[1].strip(): cells[2] for line in text.splitlines() if len(cells := line.split("|")) > 3}
    mib, kib = 2**20, 2**10
    expected = {
        "zip, npz": ["a sixteenth of (its size + 1 GiB)"],
        "header of an array": [f"{reading.MAX_NPY_HEADER_BYTES // kib} KiB"],
        "PNG, JPEG, WebP, BMP, GIF, TIFF, PPM, AVIF": [f"{image_files.MAX_FILE_BYTES // mib} MiB", "2^27 pixels"],
        "folder": ["2^24 names"],
        "`dataset.json`, CSV": [
            f"{labels.TEXT_BYTES[0] // mib} MiB + {labels.TEXT_BYTES[1] // kib} KiB an image",
            f"2^22 + {labels.TEXT_VALUES[1]} values",
            f"{labels.MAX_CLASSES:,} classes",
        ],
        "JSON of networks and runs": [
            f"{reading.MAX_JSON_BYTES // mib} MiB",
            f"`state.json` {checkpoint.MAX_REST_BYTES // mib} MiB",
        ],
        "safetensors": [f"a header of {reading.MAX_JSON_BYTES // mib} MiB", f"{tensor_files.MAX_TENSORS:,} tensors"],
        "`.pt`, `.bin`, TorchScript": [f"{tensor_files.MAX_INFLATION} times its size"],
        "pickle of EDM": ["10^6 operations"],
        "reference statistics": [f"{frechet.MAX_FEATURES:,} features"],
        "checkpoint": [f"`SHA256SUMS` of {files.MAX_SUMS_BYTES // mib} MiB"],
        "pairs": ["10^7", f"{pairs.MAX_RECORD_BYTES // kib} KiB"],
        "`metrics.jsonl` of a run that goes on": ["its last MiB"],
    }
    for row, bounds in expected.items():
        assert all(bound in rows[row] for bound in bounds), (row, rows[row])
    numbers = (reading.DIRECTORY_BYTES, reading.SPARE_BYTES, reading.MAX_LINE_BYTES, image_files.MAX_PIXELS)
    assert numbers == (16, 2**30, 2**20, 2**27) and labels.TEXT_VALUES[0] == 2**22 and members.MAX_FILES == 2**24
    assert (edm_pickle.MAX_OPERATIONS, pairs.MAX_PAIRS) == (10**6, 10**7)
    assert re.search(r"`make fuzz` makes 2,000 bad inputs", text)
