"""The commands, end to end on tiny runs: what they write, what they refuse, and that they repeat themselves."""

import dataclasses
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import SMALL, make_network
from PIL import Image
from safetensors.torch import load_file

from fastdmd import evaluate, pretrain, sample, train
from fastdmd.checkpoint import load_network, save_network

QUICK = [
    "--iterations", "4", "--batch-size", "4", "--dfake-gen-update-ratio", "2", "--warmup-iterations", "0",
    "--log-every", "2", "--snapshots", "2", "--num-samples", "40", "--teacher-steps", "2", "--device", "cpu",
]  # fmt: skip


def run_train(teacher_file, out, *options):
    train.main(["--teacher", str(teacher_file), "--out", str(out), *QUICK, *options])
    return json.loads((out / "summary.json").read_text())


def test_run_folder_holds_what_it_should(teacher_file, tmp_path, capsys):
    out = tmp_path / "run"
    summary = run_train(teacher_file, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generator.safetensors", "metrics.jsonl", "samples.png", "summary.json",
    ]  # fmt: skip
    assert summary["outcome"] == "complete" and summary["iterations"] == 4
    assert summary["generator"]["evaluations"] == 1 and summary["teacher"]["evaluations"] == 3
    for row in ("teacher", "generator"):
        assert summary[row]["frechet_distance"] > summary["floor"]["frechet_distance"] > 0
        assert 0 <= summary[row]["class_accuracy"] <= 1 and summary[row]["images_per_second"] > 0
        assert summary[row]["num_images"] == 40
    assert summary["floor"]["class_accuracy"] > 0.99
    assert summary["versions"]["torch"] == torch.__version__ and summary["seconds"] > 0

    config = json.loads((out / "config.json").read_text())
    assert config["iterations"] == 4 and config["teacher"] == str(teacher_file) and config["rho"] == 7.0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4]
    assert all(np.isfinite(list(line.values())).all() and line["loss_fake"] > 0 for line in lines)
    assert lines[0]["loss_dm"] == 0 < lines[1]["loss_dm"]  # the fake score starts as the teacher

    rows, columns = 10, 3 + 1 + 10  # three snapshots, a gap, ten varied samples; each 28 + 1 pixels, doubled
    assert Image.open(out / "samples.png").size == (2 * (29 * columns - 1), 2 * (29 * rows - 1))
    table = capsys.readouterr().out
    for row in ("teacher", "generator", "floor: real images"):
        assert re.search(rf"^{row}\s.*\d", table, re.MULTILINE)


def test_generator_is_the_average_and_differs_from_the_teacher(teacher_file, tmp_path):
    run_train(teacher_file, tmp_path / "run", "--num-samples", "0")
    generator, metadata = load_network(tmp_path / "run" / "generator.safetensors")
    assert metadata["kind"] == "generator" and metadata["conditioning_sigma"] == 80.0
    assert metadata["iterations"] == 4 and metadata["config"]["batch_size"] == 4
    moved = [
        (a - b).abs().max().item() for a, b in zip(generator.parameters(), make_network().parameters(), strict=True)
    ]
    assert min(moved) > 0


def test_same_seed_same_result(teacher_file, tmp_path):
    runs = {name: tmp_path / name for name in ("first", "again", "other")}
    for name, out in runs.items():
        run_train(teacher_file, out, "--num-samples", "0", "--seed", "7" if name == "other" else "3")
    weights = {name: load_file(out / "generator.safetensors") for name, out in runs.items()}
    assert all(torch.equal(weights["first"][key], weights["again"][key]) for key in weights["first"])
    assert not all(torch.equal(weights["first"][key], weights["other"][key]) for key in weights["first"])
    losses = [
        [json.loads(line)["loss_fake"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in runs.values()
    ]
    assert losses[0] == losses[1] != losses[2]
    pictures = [(out / "samples.png").read_bytes() for out in runs.values()]
    assert pictures[0] == pictures[1] != pictures[2]


def digits(num=40, size=28, channels=1):
    images = np.random.default_rng(0).integers(0, 256, (num, size, size, channels), np.uint8)
    return images, np.arange(num) % 10


def write_idx(folder):
    images, labels = digits()
    folder.mkdir()
    header = np.array([0x803, len(images), 28, 28], ">u4").tobytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = np.array([0x801, len(labels)], ">u4").tobytes()
    (folder / "train-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def write_npz(path):
    images, labels = digits()
    np.savez(path, images=images, labels=labels)


def write_folder(folder):
    for index, (image, label) in enumerate(zip(*digits(), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(folder / str(label) / f"{index}.png")


def write_zip(path):
    write_folder(path.parent / "pictures")
    files = sorted((path.parent / "pictures").rglob("*.png"))
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(path.parent / "pictures"))
        labels = [[str(file.relative_to(path.parent / "pictures")), int(file.parent.name)] for file in files]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


@pytest.mark.parametrize(
    ("name", "write"),
    [("idx", write_idx), ("digits.npz", write_npz), ("folder", write_folder), ("digits.zip", write_zip)],
)
def test_every_kind_of_data_gives_the_same_figures(name, write, teacher_file, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / name)
    summary = run_train(teacher_file, tmp_path / "run", "--data", str(tmp_path / "data" / name))
    write_npz(tmp_path / "expected.npz")
    expected = run_train(teacher_file, tmp_path / "expected", "--data", str(tmp_path / "expected.npz"))
    assert summary["generator"]["frechet_distance"] == pytest.approx(
        expected["generator"]["frechet_distance"], rel=1e-6
    )
    assert summary["generator"]["class_accuracy"] == expected["generator"]["class_accuracy"]
    assert summary["floor"]["num_images"] == 20  # one half against the other


def test_data_need_no_labels(teacher_file, tmp_path):
    images, _ = digits()
    np.savez(tmp_path / "unlabelled.npz", images=images)
    summary = run_train(teacher_file, tmp_path / "run", "--data", str(tmp_path / "unlabelled.npz"))
    assert summary["floor"]["frechet_distance"] > 0 and summary["floor"]["class_accuracy"] is None
    assert summary["generator"]["class_accuracy"] is not None  # its labels are those it was asked for


def test_a_generator_is_no_teacher(tmp_path, capsys):
    save_network(tmp_path / "g.safetensors", make_network(), kind="generator", conditioning_sigma=80.0)
    with pytest.raises(SystemExit):
        run_train(tmp_path / "g.safetensors", tmp_path / "run")
    assert "expected --teacher to be a teacher, got a generator in" in capsys.readouterr().err


def truncated_idx(path):
    write_idx(path)
    file = path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-200])


def labels_out_of_range(path):
    images, labels = digits()
    np.savez(path, images=images, labels=labels + 5)


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
        (["--preset", "imaginary"], "expected --preset one of mnist, mnist-reference, got imaginary"),
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


def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(teacher_file, tmp_path, capsys):
    train.main(["--teacher", str(teacher_file), "--preset", "mnist-reference", "--seed", "9", "--dry-run",
                "--out", str(tmp_path / "run")])  # fmt: skip
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["dfake_gen_update_ratio"] == 10 and resolved["seed"] == 9 and resolved["generator_lr"] == 2e-4
    assert resolved["network"]["num_parameters"] == sum(p.numel() for p in make_network().parameters())
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_what_was_reached(teacher_file, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastdmd.train", "--teacher", str(teacher_file), "--out", str(out), *QUICK,
               "--iterations", "1000000", "--snapshots", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    summary = json.loads((out / "summary.json").read_text())
    assert summary["outcome"] == "interrupted" and 6 <= summary["iterations"] < 1000000
    assert summary["generator"]["frechet_distance"] is None
    assert f"interrupted after {summary['iterations']} of 1000000 iterations" in output
    _, metadata = load_network(out / "generator.safetensors")
    assert metadata["iterations"] == summary["iterations"]
    assert Image.open(out / "samples.png").width > 0


def test_divergence_ends_the_run_and_keeps_the_last_snapshot(teacher_file, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        run_train(teacher_file, out, "--generator-lr", "1e30", "--weight-decay", "1e8", "--iterations", "8")
    assert "the losses are not finite" in exit_.value.code
    assert json.loads((out / "summary.json").read_text())["outcome"] == "diverged"
    generator, metadata = load_network(out / "generator.safetensors")
    assert metadata["iterations"] == 0 and all(p.isfinite().all() for p in generator.parameters())


def test_sample_writes_pictures_and_arrays(teacher_file, tmp_path):
    generator = tmp_path / "generator.safetensors"
    save_network(generator, make_network(), kind="generator", conditioning_sigma=80.0)
    arrays = {}
    for name, options in {"a": [], "b": ["--batch-size", "3"], "c": ["--seed", "1"], "d": ["--labels", "3"]}.items():
        out = tmp_path / f"{name}.npz"
        sample.main([str(generator), "--num", "8", "--labels", "3,5", "--out", str(out), "--device", "cpu", *options])
        arrays[name] = np.load(out)
    assert arrays["a"]["images"].shape == (8, 28, 28, 1) and arrays["a"]["images"].dtype == np.uint8
    assert arrays["a"]["labels"].tolist() == [3, 5] * 4 and arrays["d"]["labels"].tolist() == [3] * 8
    difference = arrays["a"]["images"].astype(int) - arrays["b"]["images"]
    assert np.abs(difference).max() <= 1  # the batch size changes rounding, nothing else
    assert np.abs(arrays["a"]["images"].astype(int) - arrays["c"]["images"]).max() > 10
    assert np.array_equal(arrays["a"]["images"][::2], arrays["d"]["images"][::2])
    assert not np.array_equal(arrays["a"]["images"][1::2], arrays["d"]["images"][1::2])

    sample.main([str(teacher_file), "--num", "5", "--out", str(tmp_path / "t.png"), "--teacher-steps", "2"])
    assert Image.open(tmp_path / "t.png").size == (29 * 3 - 1, 29 * 2 - 1)
    network = torch.tensor(arrays["a"]["images"][0, :, :, 0] / 127.5 - 1)
    expected = make_network()(sample_noise(8) * 80, torch.full((8,), 80.0), torch.tensor([3, 5] * 4))
    assert (expected[0, 0].clamp(-1, 1) - network).abs().max() < 1 / 127


def sample_noise(num):
    from fastdmd.diffusion import random_generator

    return torch.randn(num, 1, 28, 28, generator=random_generator(0, 0, stream=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "3,10"], "expected --labels from 0 to 9, separated by commas, got 3,10"),
        (["--labels", "x"], "expected --labels from 0 to 9, separated by commas, got x"),
        (["--num", "0"], "expected --num >= 1, got 0"),
        (["--out", "samples.gif"], "expected --out ending in .png or .npz, got samples.gif"),
        (["--out", "no/such/folder/samples.png"], "expected --out in an existing folder"),
    ],
)
def test_sample_refuses(options, message, teacher_file, capsys):
    with pytest.raises(SystemExit) as exit_:
        sample.main([str(teacher_file), *options])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and message in error


def test_evaluate_repeats_the_figures_of_the_run(teacher_file, tmp_path, capsys):
    summary = run_train(teacher_file, tmp_path / "run")
    evaluate.main(
        [str(tmp_path / "run" / "generator.safetensors"), "--num-samples", "40", "--out", str(tmp_path / "q.json")]
    )
    figures = json.loads((tmp_path / "q.json").read_text())
    for name in ("frechet_distance", "class_accuracy", "evaluations"):
        assert figures["generator"][name] == pytest.approx(summary["generator"][name], rel=1e-5)
        assert figures["floor"][name] == summary["floor"][name]
    assert "floor: real images" in capsys.readouterr().out


def test_other_images_need_their_own_feature_network(tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(SMALL, image_size=16, image_channels=3, num_classes=0)
    teacher_file = tmp_path / "rgb.safetensors"
    save_network(teacher_file, make_network(config), kind="teacher")
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "rgb.npz", images=images)
    summary = run_train(teacher_file, tmp_path / "run", "--data", str(tmp_path / "rgb.npz"))
    assert "no Fréchet distance: the embedded feature network sees 1×28×28 images" in capsys.readouterr().out
    assert summary["generator"]["frechet_distance"] is None and summary["generator"]["images_per_second"] > 0

    (tmp_path / "my_features.py").write_text(
        "import torch\nclass Mean(torch.nn.Module):\n    def forward(self, x):\n        return x.mean((2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--data", str(tmp_path / "rgb.npz"), "--feature-network", "my_features:Mean"]
    summary = run_train(teacher_file, tmp_path / "measured", *options)
    assert summary["generator"]["frechet_distance"] > summary["floor"]["frechet_distance"] > 0
    assert summary["generator"]["class_accuracy"] is None

    features = (images / 127.5 - 1).mean((1, 2))
    np.savez(tmp_path / "reference.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    options += ["--reference", str(tmp_path / "reference.npz")]
    again = run_train(teacher_file, tmp_path / "referenced", *options)
    expected = summary["generator"]["frechet_distance"]
    assert again["generator"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)


def test_pretrain_learns_and_train_takes_its_teacher(tmp_path):
    out = tmp_path / "teacher"
    pretrain.main(["--out", str(out), "--iterations", "60", "--batch-size", "8",
                   "--model-channels", "8", "--warmup-iterations", "5", "--learning-rate", "5e-3", "--log-every", "20",
                   "--snapshots", "1", "--num-samples", "20", "--teacher-steps", "2", "--device", "cpu"])  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]
    network, metadata = load_network(out / "teacher.safetensors")
    assert metadata["kind"] == "teacher" and metadata["config"]["learning_rate"] == 5e-3
    summary = json.loads((out / "summary.json").read_text())
    assert metadata["record"]["quality"] == summary["teacher"] and not summary["teacher"]["recorded"]
    assert network.config.model_channels == 8 and network.config.num_classes == 10

    # What pretrain recorded is used where the measurement would be the same, and only there.
    known = run_train(out / "teacher.safetensors", tmp_path / "known", "--num-samples", "20")["teacher"]
    repeated = run_train(
        out / "teacher.safetensors", tmp_path / "repeated", "--num-samples", "20", "--measure-teacher"
    )["teacher"]
    assert known["recorded"] and not repeated["recorded"]
    assert known["frechet_distance"] == summary["teacher"]["frechet_distance"]
    assert repeated["frechet_distance"] == pytest.approx(known["frechet_distance"], rel=1e-5)
    for changed in (["--num-samples", "30"], ["--seed", "1"], ["--teacher-steps", "3"]):
        options = ["--num-samples", "20", *changed]
        assert not run_train(out / "teacher.safetensors", tmp_path / changed[0], *options)["teacher"]["recorded"]


def test_commands_work_from_anywhere(tmp_path):
    """Installed, with the embedded teacher, in a folder that knows nothing of the project."""
    command = [sys.executable, "-m", "fastdmd.sample", "mnist", "--num", "1", "--teacher-steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "samples.png").size == (28, 28)
