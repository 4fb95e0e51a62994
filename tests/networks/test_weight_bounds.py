"""Weight files that are damaged, or would take more memory than they have bytes: one line, before anything is taken."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from fastdmd.networks import tensor_files
from fastdmd.networks.tensor_files import open_tensors
from fastdmd.quality.features import load_feature_network

VALUES = torch.arange(1000, dtype=torch.float32)


def read(path):
    found = open_tensors(path)
    return found.read({name: name for name in found.described})


def refuses(path, message):
    with pytest.raises(ValueError, match=f"^fastdmd.weights: expected {message}") as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_bit_of_an_archive(tmp_path):
    """torch reads 1.5 for 1, and says nothing; the archive's checksum does."""
    path = tmp_path / "w.pt"
    torch.save({"a": VALUES}, path)
    assert torch.equal(read(path)["a"], VALUES)
    content = bytearray(path.read_bytes())
    position = content.index(VALUES.numpy().tobytes())
    content[position + 4 + 2] ^= 0x40
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["a"][1] == 1.5
    refuses(path, f"an archive as torch writes it, whole, in {path}, got BadZipFile: Bad CRC-32 for file 'w/data/0'")


def test_a_bit_of_torchscript(tmp_path):
    path = tmp_path / "f.pt"
    torch.jit.script(torch.nn.Linear(4, 3)).save(str(path))
    x = torch.ones(2, 4)
    assert torch.equal(load_feature_network(path)(x)[0], torch.jit.load(str(path))(x))
    with zipfile.ZipFile(path) as archive:
        weight = archive.read("f/data/1" if archive.getinfo("f/data/1").file_size == 48 else "f/data/0")
    content = bytearray(path.read_bytes())
    content[content.index(weight) + 2] ^= 0x40
    path.write_bytes(content)
    assert not torch.equal(torch.jit.load(str(path))(x), torch.zeros(2, 3))  # torch takes it
    with pytest.raises(ValueError, match=f"expected an archive as torch writes it, whole, in {path}, got BadZipFile"):
        load_feature_network(path)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-100], lambda data: b"PK\3\4" + data[:50], lambda data: data[:4]]
)
def test_an_archive_that_is_not_whole(tmp_path, change):
    path = tmp_path / "w.pt"
    torch.save({"a": VALUES}, path)
    path.write_bytes(change(path.read_bytes()))
    refuses(path, f"an archive as torch writes it, whole, in {path}, got BadZipFile")


def test_storages_of_more_than_the_file(tmp_path):
    """A former file of 4 KB whose pickle says 2^45 elements: that is no lack of memory of this machine."""
    path = tmp_path / "w.pth"
    torch.save({"a": VALUES}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    number = b"M" + (1000).to_bytes(2, "little")
    assert content.count(number) == 2  # of the storage, and of the shape
    path.write_bytes(content.replace(number, b"\x8a\x06" + (2**45).to_bytes(6, "little"), 1))
    refuses(path, "safetensors, or what torch.save makes .*, got tensors of many times the file's size$")


def header(path, entries, values=b""):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path


@pytest.mark.parametrize(
    "shape", [[0, 2**63], [2**63, 0], [0, 2**64 - 1], [2**40, 2**40, 0], [-1], [0] * 100, 5, [None]]
)
def test_shapes_that_are_none(tmp_path, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    path = header(tmp_path / "w.safetensors", {"a": entry})
    try:
        found = read(path)
    except ValueError:
        refuses(path, "a safetensors file, got ")
    else:
        assert list(found["a"].shape) == shape and found["a"].numel() == 0


def test_more_tensors_than_any_network(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_file({f"{number}": torch.ones(1) for number in range(20)}, path)
    assert len(read(path)) == 20
    monkeypatch.setattr(tensor_files, "MAX_TENSORS", 19)
    refuses(path, f"at most 19 tensors in {path}, got 20$")


def test_a_header_of_a_gibibyte_is_not_read(tmp_path):
    path = tmp_path / "w.safetensors"
    with open(path, "wb") as file:
        file.write((2**30).to_bytes(8, "little") + b"{")
        file.truncate(2**31)
    refuses(path, f"a safetensors file, got {path}: its header would have 1073741824 bytes, in a file of 2147483648")
