"""What a user can get wrong on the command line: one line, exit code 2, nothing written."""

import re

import numpy as np
import pytest
from datasets import write_idx
from PIL import Image
from tiny_runs import QUICK, digits, run_train

from fastdmd import train


def truncated_idx(path):
    write_idx(path, *digits(), compressed=True)
    file = path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-200])


def labels_out_of_range(path):
    images, labels = digits()
    np.savez(path, images=images, labels=labels + 12)


def oblong_image(path):
    path.mkdir()
    Image.new("L", (28, 32)).save(path / "oblong.png")


def colour_image(path):
    path.mkdir()
    Image.new("RGB", (28, 28)).save(path / "colour.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher", "nowhere.safetensors"], "nowhere.safetensors, which does not exist"),
        (["--data", truncated_idx], r"expected a readable IDX file, got .*train-images-idx3-ubyte.gz"),
        (["--data", labels_out_of_range], r"expected labels from 0 to 9, got labels up to 14 in"),
        (["--data", oblong_image], r"expected square .* got .*28x32"),
        (["--data", colour_image], r"expected images of shape \(1, 28, 28\), got \(3, 28, 28\) in"),
        (["--data", "nowhere.npz"], "expected a dataset, got nowhere.npz, which does not exist"),
        (["--batch-size", "0"], "expected --batch-size >= 1, got 0"),
        (["--generator-lr", "-1"], "expected --generator-lr > 0 and finite, got -1.0"),
        (["--generator-lr", "nan"], "expected --generator-lr > 0 and finite, got nan"),
        (["--max-step-percent", "0.01"], "expected --max-step-percent between --min-step-percent 0.02 and 1, got 0.01"),
        (["--seed", "-1"], r"expected --seed in \[0, 2\^32\), got -1"),
        (["--preset", "imaginary"], "expected --preset one of mnist, mnist-reference, cifar10-cond, .*, got imaginary"),
        (["--device", "cuda:77"], "expected --device auto, cpu or a CUDA device that is there, got cuda:77"),
        (["--device", "teapot"], "expected --device auto, cpu or a CUDA device that is there, got teapot"),
        (["--out", lambda path: path.write_text("a file")], "expected a folder for --out, got the file"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--feature-network", "no.such.module:thing"], "expected no.such.module:thing to be importable"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_exit_code_2(options, message, teacher_file, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--teacher", str(teacher_file), "--out", str(out), *QUICK]
    name, value = options
    if callable(value):
        value(tmp_path / "input.npz")
        value = str(tmp_path / "input.npz")
    with pytest.raises(SystemExit) as exit_:
        train.main([*arguments, name, value])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert re.fullmatch(r"fastdmd\.train: error: [^\n]*\n", error) and re.search(message, error), error
    assert not out.exists()


def test_a_folder_that_cannot_be_made_or_holds_a_run_is_left_alone(teacher_file, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    run_train(teacher_file, tmp_path / "run", "--num-samples", "0")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for out, message in (("file/run", "Not a directory"), ("run", "expected a new folder for --out")):
        with pytest.raises(SystemExit) as exit_:
            run_train(teacher_file, tmp_path / out)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
