"""What a user can get wrong on the command line: one line, exit code 2, nothing written."""

import importlib
import re

import numpy as np
import pytest
from PIL import Image

from fastdmd import pretrain, train
from fastdmd.distill import budget
from fastdmd.networks.unet import UNet
from tests.helpers.small_datasets import write_idx
from tests.helpers.tiny_runs import QUICK, Colour, digits, run_train


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


def statistics(D=64, **changes):
    return lambda path: np.savez(path, **{"mu": np.zeros(D), "sigma": np.eye(D), **changes})


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
        (["--preset", "imaginary"], "expected --preset one of mnist, mnist-best, mnist-reference, .*, got imaginary"),
        (["--device", "cuda:77"], "expected --device auto, cpu or a CUDA device that is there, got cuda:77"),
        (["--device", "cpu:3"], "expected --device auto, cpu or a CUDA device that is there, got cpu:3: not one"),
        (["--device", "mps"], "expected --device auto, cpu or a CUDA device that is there, got mps: not one"),
        (["--device", "teapot"], "expected --device auto, cpu or a CUDA device that is there, got teapot"),
        (["--out", lambda path: path.write_text("a file")], "expected a folder for --out, got the file"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--reference", statistics(D=32)], "expected a reference of 64 features, got 32 in"),
        (["--reference", statistics(num_images=np.int64(-5))], "expected num_images >= 2, got -5 in"),
        (["--reference", statistics(mu=np.array([None] * 64))], r"expected mu float \(64,\), got object"),
        (["--feature-network", "torch.nn:Identity"], "expected features .*, got .*1, 28, 28"),
        (["--feature-network", f"{Colour.__module__}:Colour"], r"Colour to take images of shape \(2, 1, 28, 28\)"),
        (["--weight-decay", "inf"], "expected --weight-decay >= 0 and finite, got inf"),
        (["--iterations", "1000000000000"], r"expected --iterations <= 10\^9, got 1000000000000"),
        (["--batch-size", "1000000"], "the run needs about .* GB, .* are free: (try --batch-size|weights and)"),
        (["--feature-network", "no.such.module:thing"], "expected no.such.module:thing to be importable"),
    ],
)
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
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for out, message in (("file/run", "Not a directory"), ("run", "expected a new folder for --out")):
        with pytest.raises(SystemExit) as exit_:
            run_train(teacher_file, tmp_path / out)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["train", "pretrain", "pairs", "sample", "evaluate", "export"])
def test_every_command_checks_the_environment(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTDMD_BACKEND", "imaginary")
    arguments = {"sample": ["mnist"], "evaluate": ["mnist"], "export": ["a.safetensors"]}.get(name, [])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"fastdmd.{name}").main([*arguments, "--out", str(tmp_path / "a.pt2.png")])
    error = "fastdmd.ops: expected a backend out of reference, triton, native, emulated, got imaginary"
    assert stop.value.code == 2 and capsys.readouterr().err == f"fastdmd.{name}: error: {error}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels-per-head", "5"], "expected channels divisible by their 19 heads (channels_per_head 5), got 96"),
        (["--model-channels", "16384"], "expected this network with --batch-size 128 to fit into memory, got "),
        (["--batch-size", "1000000"], "expected this network with --batch-size 1000000 to fit into memory, got "),
        (["--num-blocks", "1000000000000"], "expected --num-blocks <= 64, got 1000000000000"),
    ],
)
def test_networks_that_cannot_be_are_not_begun(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--out", str(tmp_path / "run"), "--device", "cpu", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_an_update_takes_is_close_to_what_is_counted(teacher):
    """Weights, gradients, moments and average five times; beside them what the backward pass keeps, which grows."""
    state = 20 * sum(parameter.numel() for parameter in teacher.parameters())
    one, eight = (budget.training_bytes(lambda: UNet(teacher.config), batch_size) for batch_size in (1, 8))
    assert state < one < eight < 8 * one
    image = 4 * 28 * 28
    assert 10 * 7 * image < eight - one < 1000 * 7 * image
