"""Labels: where they come from, what they may be, and what is said of classes without images."""

import io
import json
import warnings

import numpy as np
import pytest

from fastdmd import data, pretrain, train
from tests.helpers.small_datasets import LABELS, pixels, png, refuses, write_folder, write_idx, write_npz, write_zip

PICTURE = png(pixels(1)[0])
CLASSES = ["ant", "bee", "cat"]


def labels_of(source, **options) -> list[int] | None:
    labels = data.load(source, **options).labels
    return None if labels is None else labels.tolist()


def folder_of(path, *names: str):
    return write_folder(path, {name: PICTURE for name in names})


@pytest.fixture
def table(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "table.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_bounds(tmp_path):
    path = tmp_path / "a.npz"
    for labels in (
        np.array([0, 1, 2, 0, 1, 2, 2**63], np.uint64),
        np.array([0, 1, 2, 0, 1, 2, 2**64 - 1], np.uint64),
        np.array([0, 1, 2, 0, 1, 2, 10**8]),
        np.array([0, 1, 2, 0, 1, 2, 2**31 - 1], "<i4"),
        np.array([0, 1, 2, 0, 1, 2, 100_000], ">u4"),
    ):
        write_npz(path, images=pixels(1), labels=labels)
        refuses(path, "labels from 0 to 99999", f"{labels[-1]} in {path}")
    write_npz(path, images=pixels(1), labels=LABELS.astype(np.int8) - 1)
    refuses(path, "labels >= 0", f"-1 in {path}")
    write_npz(path, images=pixels(1), labels=np.array([99_999] * 7))
    with pytest.warns(UserWarning, match="99999 of the classes 0 to 99999 have no image in .*a.npz: 0, 1, 2, ..."):
        assert labels_of(path) == [99_999] * 7


def test_classes_without_images_are_named(tmp_path):
    with pytest.warns(UserWarning, match=r"1 of the classes 0 to 3 have no image in .*a.npz: 0$"):
        assert labels_of(write_npz(tmp_path / "a.npz", images=pixels(1), labels=LABELS + 1)) == (LABELS + 1).tolist()
    with pytest.warns(UserWarning, match=r"2 of the classes 0 to 4 have no image in .*labels-idx1-ubyte: 1, 3$"):
        assert labels_of(write_idx(tmp_path / "idx", pixels(1), LABELS * 2)) == (LABELS * 2).tolist()
    description = json.dumps({"labels": [["a.png", 2], ["b.png", 0]]}).encode()
    files = {"dataset.json": description, "a.png": PICTURE, "b.png": PICTURE}
    with pytest.warns(UserWarning, match=r"1 of the classes 0 to 2 have no image in .*dataset.json: 1$"):
        assert labels_of(write_zip(tmp_path / "a.zip", files)) == [2, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels_of(write_npz(tmp_path / "a.npz", images=pixels(1), labels=LABELS)) == LABELS.tolist()


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_prefixes(tmp_path, packed):
    """As guided-diffusion reads them; the images may lie at any depth."""
    files = {
        f"{place}{CLASSES[k]}_{i}_x.png": png(image)
        for i, (image, k, place) in enumerate(zip(pixels(1), LABELS, ["", "q/", "q/r/", "", "", "", ""], strict=True))
    }
    source = write_zip(tmp_path / "a.zip", files) if packed else write_folder(tmp_path / "a", files)
    dataset = data.load(source, labels="prefix")
    order = [list(files).index(name) for name in sorted(files)]
    assert dataset.labels.tolist() == LABELS[order].tolist()
    np.testing.assert_array_equal(dataset.images, pixels(1)[order])
    assert labels_of(source, labels="none") is None


def test_prefixes_that_are_none(tmp_path):
    for name in ("bee.png", "_bee.png", "x/b-1.png", "a_b/c.png"):
        folder = folder_of(tmp_path / name[:1], "ant_1.png", name)
        refuses(folder, "names such as class_1.png for --labels prefix", f"{name} in {folder}", labels="prefix")


def test_numbers_that_are_sorted_as_text_are_told(tmp_path):
    message = "numbered in the order of their names as text, 10 is 1, in"
    with pytest.warns(UserWarning, match=message):
        assert labels_of(folder_of(tmp_path / "a", "9_1.png", "10_1.png", "1_1.png"), labels="prefix") == [1, 0, 2]
    with pytest.warns(UserWarning, match=message):
        assert labels_of(folder_of(tmp_path / "b", "9/a.png", "10/a.png", "1/a.png")) == [0, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels_of(folder_of(tmp_path / "c", "01/a.png", "02/a.png", "00/a.png")) == [0, 1, 2]


def test_numbers_with_gaps_are_told(tmp_path):
    with pytest.warns(UserWarning, match="numbered from 0 without gaps, 3 is 2, in"):
        assert labels_of(folder_of(tmp_path / "a", "3_1.png", "0_1.png", "1_1.png"), labels="prefix") == [0, 1, 2]
    with pytest.warns(UserWarning, match="numbered from 0 without gaps, 01 is 0, in"):
        assert labels_of(folder_of(tmp_path / "b", "01/a.png", "02/a.png")) == [0, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png,2\nb.png,0\nx/c.png,1\n", [2, 0, 1]),
        ("name,class\nx/c.png,1\nb.png,0\na.png,2", [2, 0, 1]),
        ("\ufeffid;label\r\na;2.0\r\nb;0.0\r\nc;1.0\r\n", [2, 0, 1]),  # a spreadsheet, and pandas
        ("./a.png\tcat\nb.png\tant\nx\\c.png\tbee\n\n", [2, 0, 1]),
        ('"a.png","cat, big"\nb.png, ant\nc.png,ant', [1, 0, 0]),
        ("a,1\nb,1\nc,0\n", [1, 1, 0]),
        ("a,12_34\nb,1st\nc,1.0.1\n", [1, 2, 0]),  # no numbers
    ],
)
def test_tables(tmp_path, table, text, expected):
    source = folder_of(tmp_path / "a", "a.png", "b.png", "x/c.png")
    assert labels_of(source, labels=table(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected", "got"),
    [
        ("a,1\n", "one label for each of 2 images", "none for b.png"),
        ("", "one label for each of 2 images", "none for a.png"),
        ("a,1\na,2\nb,0", "one class for each image", "1 and 2 for a"),
        ("a,1,2\nb,0,0", "lines of name,class", "'a,1,2'"),
        ("a,\nb,0", "lines of name,class", "'a,'"),
        ("a,-1\nb,0", "labels >= 0", "-1"),
        ("a,1\nb,nan", "classes that are all integers or all names", "1 and nan"),
        *(
            (
                f"a,{spelt}\nb,{other}",
                "classes that are all integers or all names",
                spelt if other == "cat" else f"10 and {spelt}",
            )
            for spelt in ("1e0", "+10", "0.5", "\u0661\u0662", "\uff11", "nan", "NaN", "-inf")
            for other in ("cat", "10")
        ),
        ("a,100000\nb,0", "labels from 0 to 99999", "100000"),
        (f"a,{10**30}\nb,0", "labels from 0 to 99999", f"{10**30}"),
        (b"\xff\xfea\0,\0001\0", "a readable CSV file", ""),
        (f"a,{'9' * 200_000}\nb,0", "a readable CSV file", ""),
    ],
)
def test_tables_that_are_refused(tmp_path, table, text, expected, got):
    source = folder_of(tmp_path / "a", "a.png", "b.png")
    path = table(text)
    if expected.startswith("a readable"):
        refuses(source, expected, f"{path}: ", labels=path)
    else:
        refuses(source, expected, f"{got} in {path}", labels=path)


def test_tables_and_images_that_do_not_meet(tmp_path, table):
    twice = folder_of(tmp_path / "twice", "x/a.png", "y/a.png")
    path = table("a,1")
    refuses(twice, "names that tell the images apart", f"a for 2 images in {path}", labels=path)
    assert labels_of(twice, labels=table("x/a,1\ny/a.png,0")) == [1, 0]
    with pytest.warns(UserWarning, match="2 names in .*table.csv are of no image, such as c.png"):
        assert labels_of(folder_of(tmp_path / "b", "a.png"), labels=table("a.png,0\nd,0\nc.png,0")) == [0]
    refuses(twice, "a regular file", "nowhere.csv", labels="nowhere.csv")
    refuses(twice, "--labels prefix, none or FILE.csv", "folders", labels="folders")


def test_arrays_have_no_names(tmp_path, table):
    source = write_npz(tmp_path / "a.npz", images=pixels(1), labels=LABELS)
    for choice in ("prefix", table("a,1")):
        refuses(source, f"a folder or zip of images for --labels {choice}", str(source), labels=choice)
    assert labels_of(source, labels="none") is None
    idx = write_idx(tmp_path / "idx", pixels(1), LABELS)
    assert labels_of(idx, labels="none") is None
    (idx / "train-labels-idx1-ubyte").write_bytes(b"broken")  # what nobody asks for is not read
    assert labels_of(idx, labels="none") is None
    source = write_zip(tmp_path / "b.zip", {"a.png": PICTURE, "dataset.json": b"broken"})
    assert labels_of(source, labels="none") is None


def test_counts_come_before_labels(tmp_path):
    """What a header declares is compared before it is allocated."""
    images, labels = io.BytesIO(), io.BytesIO()
    np.save(images, pixels(1))
    np.lib.format.write_array_header_1_0(labels, {"descr": "<i8", "fortran_order": False, "shape": (2**40,)})
    path = write_zip(tmp_path / "b.npz", {"images.npy": images.getvalue(), "labels.npy": labels.getvalue()})
    refuses(path, f"{2**43} bytes of 'labels'", f"0 in {path}")
    source = write_idx(tmp_path / "idx", pixels(1), np.arange(100))
    refuses(source, "7 labels", f"100 in {source / 'train-labels-idx1-ubyte'}")


def test_commands_take_them(tmp_path, teacher_file, capsys, table):
    names = [f"{CLASSES[k]}_{i}.png" for i, k in enumerate(LABELS)]
    images = [np.repeat(np.repeat(image, 5, 1), 6, 2) for image in pixels(1)]  # 30 by 36
    source = str(write_folder(tmp_path / "a", {n: png(x) for n, x in zip(names, images, strict=True)}))
    options = ["--data", source, "--resize", "28", "--labels", "prefix", "--device", "cpu"]
    pretrain.main([*options, "--dry-run"])
    network = json.loads(capsys.readouterr().out)["network"]
    assert network["num_classes"] == 3 and network["image_size"] == 28
    run = [
        "--teacher",
        str(teacher_file),
        "--out",
        str(tmp_path / "run"),
        "--iterations",
        "2",
        "--batch-size",
        "2",
        "--num-samples",
        "4",
        "--teacher-steps",
        "2",
        "--snapshots",
        "1",
        "--execution",
        "eager",
    ]
    train.main([*run, *options])
    assert f"measured against 7 images of {source} (shorter side resized to 28" in capsys.readouterr().out
    for wrong, message in {
        ("--labels", "prefix"): "expected --labels together with --data, got prefix",
        ("--resize", "28"): "expected --resize together with --data, got 28",
        ("--data", source, "--resize", "0"): "expected --resize >= 1, got 0",
        ("--data", source, "--labels", "teapot"): "expected --labels prefix, none or FILE.csv, got teapot",
        ("--data", source): "expected square images of one size (36x36), or --resize N, got 36x30",
    }.items():
        with pytest.raises(SystemExit) as exit_:
            train.main(["--teacher", str(teacher_file), "--out", str(tmp_path / "none"), *wrong])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and message in error and error.count("\n") == 1
    few = str(write_npz(tmp_path / "few.npz", images=np.zeros((3, 28, 28), np.uint8)))
    with pytest.raises(SystemExit):
        train.main([*run[:2], "--out", str(tmp_path / "none"), "--data", few, "--num-samples", "4"])
    assert f"expected at least 4 images to measure against, got 3 in {few}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
