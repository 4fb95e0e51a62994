"""Where `--out` points to is tried before anything long, by every command, and nothing stays behind."""

import dataclasses
import json
import os
import re
import resource
import stat
from pathlib import Path

import pytest

from fastdmd import evaluate, export, files, pretrain, quality, sample, teachers, train
from fastdmd.data.settings import DataSettings
from fastdmd.networks.weights import save_network
from fastdmd.quality.settings import EvaluationSettings
from fastdmd.runs import outputs
from fastdmd.runs.config import EvaluateConfig, SampleConfig, TrainConfig
from fastdmd.runs.pretraining import PretrainConfig
from fastdmd.teachers import TeacherOptions
from tests.helpers.networks import make_network
from tests.helpers.tiny_runs import QUICK


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    os.mkfifo(tmp_path / "pipe.json")
    os.symlink("loop", tmp_path / "loop")
    return tmp_path


UNWRITABLE_FILES = {
    "folder.json": "expected --out to be a file, got the folder folder.json",
    "no/such/a.json": "expected --out in an existing folder, got no/such/a.json",
    "file/a.json": "expected --out in an existing folder, got file/a.json",
    "loop/a.json": "expected --out in an existing folder, got loop/a.json",
    "pipe.json": "expected --out to be a file, got pipe.json, a device or a pipe",
    "/dev/full": "expected --out to be a file, got /dev/full, a device or a pipe",
    "n" * 300: "expected --out to be writable, got n*: File name too long",
    "~/a.json": "expected --out without ~, which the shell has left as it is, got ~/a.json",
    "run/summary.json": "expected --out apart from the files of the run in run, got run/summary.json",
    "run/samples.png": "expected --out apart from the files of the run in run, got run/samples.png",
}


@pytest.mark.parametrize("out", UNWRITABLE_FILES)
def test_files_that_cannot_be_written(folder, out, capsys, monkeypatch):
    monkeypatch.setattr(teachers, "read", lambda *_: pytest.fail("something long began"))
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["mnist", "--out", out, "--device", "cpu"])
    error = capsys.readouterr().err
    expected = UNWRITABLE_FILES[out].replace("n*", "n" * 300)
    assert stop.value.code == 2 and error == f"fastdmd.evaluate: error: {expected}\n"
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("main", "name"), [(sample.main, "a.png"), (evaluate.main, "a.json"), (export.main, "a.safetensors")]
)
def test_every_command_that_writes_a_file_asks_first(folder, main, name, capsys):
    save_network(folder / "generator.safetensors", make_network(), kind="generator", conditioning_sigma=80.0)
    (folder / name).mkdir()
    with pytest.raises(SystemExit) as stop:
        main([str(folder / "generator.safetensors"), "--out", name])
    assert stop.value.code == 2 and f"expected --out to be a file, got the folder {name}" in capsys.readouterr().err


def test_files_that_can_be_written(folder):
    (folder / "old.json").write_text("old")
    os.symlink("nowhere", folder / "dangling.json")
    before = sorted(os.listdir())
    for name in ("new.json", "old.json", "dangling.json", "n" * 255):
        outputs.require_file(folder / name)
    assert sorted(os.listdir()) == before and (folder / "old.json").read_text() == "old"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "expected a folder for --out, got the file file"),
        ("file/run", "expected --out to be writable, got file/run: Not a directory"),
        ("loop/run", "expected --out to be writable, got loop/run: "),
        ("pipe.json", "expected a folder for --out, got the file pipe.json"),
        ("new/" + "n" * 300, "expected --out to be writable, got new/n+: File name too long"),
        ("/proc/run", "expected --out to be writable, got /proc/run: "),
        ("~/run", "expected --out without ~, which the shell has left as it is, got ~/run"),
        ("done", "expected a new folder for --out, got done, which already holds a run"),
    ],
)
@pytest.mark.parametrize("main", [train.main, pretrain.main])
def test_run_folders_that_cannot_be(folder, main, out, message, capsys, monkeypatch):
    (folder / "done").mkdir()
    (folder / "done" / "config.json").write_text("{}")
    monkeypatch.setattr(teachers, "read", lambda *_: pytest.fail("something long began"))
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stop:
        main(["--out", out, "--device", "cpu"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and message.replace("n+", "n" * 300) in error
    assert sorted(os.listdir()) == before and os.listdir("done") == ["config.json"]


def test_run_folders_that_can_be_leave_no_trace(folder):
    (folder / "empty").mkdir()
    before = sorted(os.listdir())
    for name in ("a/b/c", "empty", "d"):
        outputs.require_folder(folder / name)
    assert sorted(os.listdir()) == before and os.listdir("empty") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_that_may_not_be_written(folder):
    (folder / "locked").mkdir(mode=0o500)
    for check in (outputs.require_file, outputs.require_folder):
        with pytest.raises(PermissionError, match="expected --out to be writable, got .*: Permission denied"):
            check(folder / "locked" / "a")


def test_a_full_disk_at_the_end_is_one_line(tmp_path, capsys, monkeypatch):
    """Past the check, as it were: the limit on file sizes stands for a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "figures.json"
    out.write_text("old")

    def measure(*_, **__):
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
        return quality.Measurement(1.0, 0.5)

    monkeypatch.setattr(quality.Evaluation, "measure", measure)
    try:
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["mnist", "--out", str(out), "--device", "cpu", "--num-samples", "100"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "figures.json, got: File too large (while writing" in error
    assert out.read_text() == "old" and os.listdir(tmp_path) == ["figures.json"]


@pytest.fixture
def inputs(folder):
    """A file or a folder of every kind that commands read, of which they may know nothing but the name."""
    for name in ("w.safetensors", "r.npz", "d.npz", "f.pt", "names.csv", "mine.py", "images/a.png", "package/code.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")
    os.symlink("d.npz", folder / "link.npz")
    os.link("r.npz", folder / "hard.npz")
    os.symlink("images", folder / "pictures")
    return folder


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (evaluate.main, ["w.safetensors", "--out", "./w.safetensors"]),
        (evaluate.main, ["mnist", "--reference", "r.npz", "--out", "r.npz"]),
        (evaluate.main, ["mnist", "--reference", "r.npz", "--out", "hard.npz"]),
        (evaluate.main, ["mnist", "--data", "d.npz", "--out", "images/../d.npz"]),
        (evaluate.main, ["mnist", "--data", "link.npz", "--out", "d.npz"]),
        (evaluate.main, ["mnist", "--data", "images", "--out", "images/dataset.json"]),
        (evaluate.main, ["mnist", "--data", "images", "--labels", "names.csv", "--out", "names.csv"]),
        (evaluate.main, ["mnist", "--feature-network", "f.pt", "--out", "f.pt"]),
        (evaluate.main, ["mine:Net", "--out", "mine.py"]),
        (evaluate.main, ["mine:Net", "--teacher-weights", "f.pt", "--out", "f.pt"]),
        (evaluate.main, ["w.safetensors", "--network", "package.code:Net", "--out", "package/code.py"]),
        (sample.main, ["d.npz", "--out", "d.npz"]),
        (export.main, ["w.safetensors", "--out", "w.safetensors"]),
        (train.main, ["--teacher", "images", "--out", "images/run"]),
        (train.main, ["--data", "images", "--out", "pictures"]),
        (train.main, ["--init-from", "images", "--out", "images/second"]),
        (pretrain.main, ["--data", "images", "--out", "images"]),
        (pretrain.main, ["--data", "images", "--out", "."]),
        (pretrain.main, ["--init", "w.safetensors", "--out", "w.safetensors"]),
    ],
)
def test_nothing_that_is_read_is_written_over(inputs, main, arguments, capsys):
    before = {str(path): path.is_file() and path.read_text() for path in inputs.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"expected --out apart from what the command reads, got {Path(arguments[-1])} beside " in error
    assert {str(path): path.is_file() and path.read_text() for path in inputs.rglob("*")} == before


def test_what_lies_beside_an_input_may_be_written(inputs):
    for out in ("new.npz", "images.npz", "other/images"):
        outputs.require_apart(inputs / out, ["d.npz", "images", "mine:Net", "no.such:thing", "mnist", "x" * 300])


def test_every_setting_that_could_be_a_path_is_known():
    """As something to read, or as none: a new one has to be sorted here."""
    configs = [
        EvaluateConfig,
        SampleConfig,
        TrainConfig,
        PretrainConfig,
        export.ExportConfig,
        TeacherOptions,
        DataSettings,
        EvaluationSettings,
    ]
    fields = [field for config in configs for field in dataclasses.fields(config)]
    texts = [field for field in fields if re.search(r"\b(str|Path)\b", str(field.type))]
    read = {field.name for field in texts if re.search(r"\bInput\b", str(field.type))}
    known = {"weights", "network", "teacher", "init", "init_from", "path", "labels", "feature_network", "reference"}
    assert read == known
    others = [field.name for field in texts if not re.search(r"\bInput\b", str(field.type))]
    assert set(others) == {"out", "device", "weights_key", "labels"} and others.count("labels") == 1


def test_numbers_of_classes_are_no_files(folder, capsys):
    """`--labels 3` of `sample` are classes: the folder of that name is none of what it reads."""
    (folder / "3").mkdir()
    quick = ["--num", "1", "--teacher-steps", "1", "--device", "cpu"]
    sample.main(["mnist", "--labels", "3", *quick, "--out", "3/samples.png"])
    assert capsys.readouterr().out == "3/samples.png: 1 images\n" and os.listdir("3") == ["samples.png"]


def test_whatever_lies_beside_a_result_stays(folder):
    """Names that a half written file might have taken are the user's own."""
    mine = ("a.json.partial", ".a.json.partial", ".a.json.tmp")
    os.mkfifo(folder / mine[0])
    (folder / mine[1]).mkdir()
    (folder / mine[2]).write_text("precious")
    before = sorted(os.listdir())
    for name in ("a.json", "n" * 255):
        outputs.require_file(folder / name)
        files.write_atomically(folder / name, lambda file: file.write(b"new"))
        assert (folder / name).read_bytes() == b"new"
        assert stat.S_IMODE((folder / name).stat().st_mode) == stat.S_IMODE((folder / "file").stat().st_mode)
    assert sorted(os.listdir()) == sorted([*before, "a.json", "n" * 255])
    assert (folder / mine[2]).read_text() == "precious" and (folder / mine[1]).is_dir()


def test_figures_are_on_the_disk_before_they_are_printed(tmp_path, monkeypatch):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(quality.Evaluation, "measure", lambda *_, **__: quality.Measurement(1.0, 0.5))
    monkeypatch.setattr(evaluate, "table", lambda _: pytest.fail("printed first") if not out.exists() else "")
    evaluate.main(["mnist", "--out", str(out), "--device", "cpu", "--num-samples", "100"])
    assert json.loads(out.read_text())["teacher"]["frechet_distance"] == 1.0


def test_a_dry_run_needs_no_place(folder, capsys):
    train.main(["--teacher", "mnist", *QUICK, "--dry-run", "--out", "done"])
    assert json.loads(capsys.readouterr().out)["out"] == "done"
