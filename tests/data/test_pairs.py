"""Folders of pairs: noise that is a function of (seed, index), what is checked of files, and what a teacher asks."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdmd.data.pairs import PairFolder, PairRecord, load_pairs
from fastdmd.files import MAX_SUMS_BYTES
from tests.helpers.small_datasets import TINY_PAIRS

RECORD = TINY_PAIRS
ASKED = {"teacher": RECORD.teacher, "image_shape": (1, 4, 4), "num_classes": 3, "sigma": 80.0}


def images_of(noise):
    return 0.5 * noise + 1


def write(path, record=RECORD):
    folder = PairFolder(path, record)
    folder.begin()
    for index in folder.missing():
        part = record.part(index)
        folder.write(index, images_of(record.noise(part)), record.labels(part))
    return path


def test_what_was_written_is_read(tmp_path):
    pairs = load_pairs(write(tmp_path / "pairs"), **ASKED)
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == [
        "SHA256SUMS",
        "pairs-00000.safetensors",
        "pairs-00001.safetensors",
        "pairs-00002.safetensors",
        "pairs.json",
    ]
    assert len(pairs) == 7 and torch.equal(pairs.images, images_of(pairs.noise))
    assert pairs.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    noise, images, labels = pairs.random_batch(50, seed=1, step=2)
    assert torch.equal(images, images_of(noise)) and len(labels.unique()) == 3 and len(noise.unique(dim=0)) == 7
    for seed, step, same in ((1, 2, True), (1, 3, False), (2, 2, False)):
        assert torch.equal(pairs.random_batch(50, seed=seed, step=step)[0], noise) == same


def test_without_classes_there_are_no_labels(tmp_path):
    record = dataclasses.replace(RECORD, num_classes=0)
    pairs = load_pairs(write(tmp_path / "pairs", record), **ASKED | {"num_classes": 0})
    assert pairs.labels is None and pairs.random_batch(2, seed=0, step=0)[2] is None


def test_noise_is_a_function_of_seed_and_index():
    """Whatever the files hold; standard normal, and of each pair its own."""
    whole = dataclasses.replace(RECORD, num=4000, batch_size=4000)
    noise = whole.noise(whole.part(0))
    parts = dataclasses.replace(RECORD, num=40, batch_size=7)
    assert torch.equal(torch.cat([parts.noise(parts.part(index)) for index in range(6)]), noise[:40])
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02 and len(noise.unique(dim=0)) == 4000
    assert not torch.equal(dataclasses.replace(whole, seed=6).noise(slice(0, 40)), noise[:40])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("teacher", "f" * 16, "expected images of the teacher f{16} in .*pairs, got 0123456789abcdef"),
        ("image_shape", (3, 4, 4), r"expected images of shape \(3, 4, 4\) in .*pairs, got \(1, 4, 4\)"),
        ("num_classes", 0, "expected a number of classes of 0 in .*pairs, got 3"),
        ("label_emphasis", 1.3, "expected images of the teacher with --label-emphasis 1.3 in .*pairs, got 1.0"),
        ("sigma", 1e6, "expected noise scaled with --conditioning-sigma 1000000.0 in .*pairs, got 80.0"),
    ],
)
def test_pairs_of_another_teacher(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_pairs(write(tmp_path / "pairs"), **ASKED | {name: value})


def test_a_folder_from_before_there_were_checksums_gets_them(tmp_path):
    """Of what is whole, when the rest is made; until then it is read without."""
    path = write(tmp_path / "pairs")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    (path / "SHA256SUMS").unlink()
    assert len(load_pairs(path, **ASKED)) == 7
    (path / "pairs-00001.safetensors").unlink()
    write(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def truncate(file):
    file.write_bytes(file.read_bytes()[:-20])


def alter(**changes):
    def change(file):
        tensors = load_file(file)
        save_file({name: changes.get(name, lambda x: x)(x).contiguous() for name, x in tensors.items()}, file)

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "expected 3 files of pairs in .*, got none .* pairs-00001.safetensors; the same"),
        (truncate, "expected a readable safetensors file, got .*pairs-00001.safetensors: "),
        (lambda file: file.write_bytes(b""), "expected a readable safetensors file, got .*pairs-00001.safetensors: "),
        (alter(images=lambda x: x[:2]), r"expected .*\(3, 1, 4, 4\).* in .*pairs-00001.safetensors, got .*\(2, 1, 4"),
        (alter(images=lambda x: x.half()), "expected .*float32.* in .*pairs-00001.safetensors, got .*float16"),
        (alter(images=lambda x: x / 0), "expected finite images in .*pairs-00001.safetensors, got NaN or infinity"),
        (alter(labels=lambda x: x + 1), "expected labels from 0 to 2 in .*pairs-00001.safetensors, got 1 to 3"),
        (alter(labels=lambda x: x - 1), "expected labels from 0 to 2 in .*pairs-00001.safetensors, got -1 to 1"),
    ],
)
def test_files_that_are_not_whole(spoil, message, tmp_path):
    """Told where they are read, and made again where they are made."""
    path = write(tmp_path / "pairs")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    spoil(path / "pairs-00001.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_pairs(path, **ASKED)
    assert "\n" not in str(error.value)
    assert list(PairFolder(path, RECORD).missing()) == [1]
    write(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("random_numbers", "seeded_by"),
            "expected noise of Philox4x32-10 in .*pairs.json, got noise of torch's generators",
        ),
        (lambda text: text[:-9], "expected a readable JSON file, got .*pairs.json: "),
        (lambda text: "[]", "expected a readable JSON file"),
        (lambda text: text.replace('"seed"', '"seeds"'), "expected a readable JSON file, .* 'seeds'"),
        (lambda text: text.replace("80.0", '"80.0"'), "expected sigma of another type in .*pairs.json, got '80.0'"),
        (lambda text: text.replace("80.0", "NaN"), "expected a noise level in .*pairs.json, got nan"),
        (lambda text: text.replace('"num": 7', '"num": 7000000000000'), "expected counts that can be in .*pairs.json"),
        (
            lambda text: text.replace('"batch_size": 3', '"batch_size": 0'),
            "expected counts that can be in .*pairs.json",
        ),
        (lambda text: text.replace('"seed": 5', '"seed": -5'), "expected counts that can be in .*pairs.json"),
        (lambda text: text.replace("1,", "true,"), "expected counts that can be in .*pairs.json"),
    ],
)
def test_records_that_cannot_be(change, message, tmp_path):
    path = write(tmp_path / "pairs")
    text = (path / "pairs.json").read_text()
    assert json.loads(text)["num"] == 7
    (path / "pairs.json").write_text(change(text))
    for read in (lambda: load_pairs(path, **ASKED), lambda: PairFolder(path, RECORD)):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


def test_what_is_no_folder_of_pairs(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="expected a folder of fastdmd.pairs, got .*, without pairs.json"):
            load_pairs(path, **ASKED)
    path = write(tmp_path / "pairs")
    (path / "pairs.json").unlink()
    with pytest.raises(ValueError, match="expected pairs.json beside the pairs in .*pairs, got none"):
        PairFolder(path, RECORD)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PairRecord)])
def test_another_record_is_refused_by_what_differs(field, tmp_path):
    path = write(tmp_path / "pairs")
    value = getattr(RECORD, field)
    other = (3, 4, 4) if field == "image_shape" else f"{value}x" if isinstance(value, str) else value + 1
    with pytest.raises(ValueError, match=f"expected pairs of {field} .* in .*pairs, got some of {field} "):
        PairFolder(path, dataclasses.replace(RECORD, **{field: other}))


def test_more_files_than_checksums_are_read_of_are_refused(tmp_path):
    """Before any is made, not after hours."""
    for num, batch_size, is_taken in ((100_000, 1, True), (100_001, 1, False), (10**7, 100, True), (10**7, 99, False)):
        record = dataclasses.replace(RECORD, num=num, batch_size=batch_size)
        if is_taken:
            PairFolder(tmp_path / "pairs", record)
        else:
            with pytest.raises(
                ValueError, match="expected at most 100000 files of pairs, got 10.* a larger --batch-size"
            ):
                PairFolder(tmp_path / "pairs", record)
    assert 91 * 100_000 < MAX_SUMS_BYTES


def test_no_noise_is_drawn_for_pairs_that_are_not_there(tmp_path, monkeypatch):
    """Of ten million it would take minutes."""
    path = write(tmp_path / "pairs")
    content = json.loads((path / "pairs.json").read_text())
    (path / "pairs.json").write_text(json.dumps(content | {"num": 10**7, "batch_size": 10**7}))
    monkeypatch.setattr(PairRecord, "noise", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match="expected .* in .*pairs-00000.safetensors, got"):
        load_pairs(path, **ASKED)
