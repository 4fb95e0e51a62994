"""What a run is made of is known by its content: it may move, and nothing of it may change."""

import dataclasses
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.soak import prepare
from fastdmd import pairs, pretrain, teachers
from fastdmd.data.identity import identity
from fastdmd.networks.unet import UNet
from fastdmd.networks.weights import save_network
from fastdmd.quality.settings import EvaluationSettings
from fastdmd.runs.contents import contents as contents_of
from tests.helpers.kills import training

AUTO = ["--resume", "auto"]


@pytest.fixture
def prepared(tmp_path):
    """A folder of what runs are made of, and their arguments, but for `--out`."""
    return tmp_path, prepare(tmp_path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_identity_sees_every_value_the_dtype_and_the_shape():
    """Across chunks, too."""
    images = torch.zeros(2**24 + 5, dtype=torch.uint8)
    ids = [identity(images, None)]
    for place in (0, 2**24 - 1, 2**24, -1):
        images[place] = 1
        ids.append(identity(images, None))
        images[place] = 0
    ids += [identity(images), identity(images, images[:1]), identity(images[:-1], None), identity(images[None], None)]
    ids += [identity(images.view(torch.int8), None)]
    assert len(set(ids)) == len(ids) == 10 and identity(images.clone(), None) == ids[0]


def changed_array(path, name, place):
    """The .npz with one value more."""
    arrays = dict(np.load(path))
    arrays[name][place] = (arrays[name][place] + 1) % 10
    np.savez(path, **arrays)


@pytest.fixture
def begun(prepared):
    """A run without an adversarial term that is measured against files of its own, killed after iteration 3 of 4."""
    folder, arguments = prepared
    torch.manual_seed(0)
    scripted = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 9, stride=9), torch.nn.Flatten(), torch.nn.Linear(27, 4))
    torch.jit.trace(scripted, torch.zeros(2, 1, 28, 28)).save(str(folder / "features.pt"))
    np.savez(folder / "reference.npz", mu=np.zeros(4), sigma=np.eye(4))
    named = [text for name, file in FILES.items() for text in (name, str(folder / file))]
    flags = zip(arguments[::2], arguments[1::2], strict=True)
    plain = [text for flag in flags if "--gan-" not in flag[0] for text in flag]
    arguments = [*plain, "--iterations", "4", "--eval-every", "2", *named]
    code, error = training(folder, arguments, sends={3: signal.SIGKILL})
    assert code == -signal.SIGKILL, error
    return folder, arguments


FILES = {"--data": "data.npz", "--feature-network": "features.pt", "--reference": "reference.npz"}


def test_what_is_measured_against_is_known_by_its_content(begun, capsys):
    """One pixel, one label, one weight, one number of the statistics: distances would be of another curve."""
    folder, arguments = begun
    before = contents(folder / "run")
    changes = (
        ("--data", lambda file: changed_array(file, "images", (59, 0, 27, 27))),
        ("--data", lambda file: changed_array(file, "labels", 30)),
        ("--reference", lambda file: changed_array(file, "mu", 3)),
        ("--feature-network", changed_weight),
    )
    for flag, change in changes:
        file = folder / FILES[flag]
        kept = file.read_bytes()
        change(file)
        code, error = training(folder, [*arguments, *AUTO])
        expected = rf"expected what the run was begun with: the content of {flag} \w{{16}}, got \w{{16}}\n"
        assert code == 2 and re.search(f"error: {expected}$", error), (flag, error)
        file.write_bytes(kept)
        assert contents(folder / "run") == before
    without = ["--data", "None"]
    code, error = training(folder, [*arguments, *without, *AUTO])
    assert code == 2 and re.search(r"the content of --data \w{16}, got None\n$", error), error


def changed_weight(path):
    module = torch.jit.load(str(path))
    with torch.no_grad():
        next(module.parameters()).view(-1)[-1] += 1e-3
    module.save(str(path))


def test_a_feature_network_in_code_is_known_by_its_tensors(tmp_path, monkeypatch):
    """To make it once more draws nothing from the state that training goes on with."""
    code = "import torch\ndef make():\n    layer = torch.nn.Linear(2, 2)\n    layer.load_state_dict(torch.load({!r}))\n"
    weights = tmp_path / "weights.pt"
    (tmp_path / "named_features.py").write_text(code.format(str(weights)) + "    return layer\n")
    monkeypatch.syspath_prepend(tmp_path)
    layer, found = torch.nn.Linear(2, 2), []
    for value in (0.0, 0.0, 1.0):
        torch.nn.init.constant_(layer.bias, value)
        torch.save(layer.state_dict(), weights)
        state = torch.get_rng_state()
        made_of = contents_of(EvaluationSettings(feature_network="named_features:make"), None)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(made_of["the content of --feature-network"])
    assert found[0] == found[1] != found[2] and re.fullmatch(r"named_features:make \w{16}", found[0])


def test_files_of_a_run_may_move(begun):
    """And it ends as if they had not; complete, it is only known by its names."""
    folder, arguments = begun
    shutil.copytree(folder / "run", folder / "elsewhere" / "run")
    code, error = training(folder, [*arguments, *AUTO])
    assert code == 0, error
    for file in FILES.values():
        (folder / file).rename(folder / "elsewhere" / file)
    moved = [text for flag, file in FILES.items() for text in (flag, str(folder / "elsewhere" / file))]
    code, error = training(folder / "elsewhere", ["--resume", "run", *moved])
    assert code == 0 and "left out" not in error, error
    for name in ("generator.safetensors", "networks.safetensors"):
        weights = [load_file(place / "run" / name) for place in (folder, folder / "elsewhere")]
        assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 30
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    curves = [(place / "run" / "evaluation.jsonl").read_text().splitlines() for place in (folder, folder / "elsewhere")]
    distances = [[json.loads(line)["frechet_distance"] for line in curve] for curve in curves]
    assert distances[0] == distances[1] and len(distances[0]) >= 4 and None not in distances[0]
    code, error = training(folder / "elsewhere", [*arguments, *AUTO])
    assert code == 2 and re.search(r"begun with: --data \S+elsewhere/data.npz, got \S+/data.npz; ", error), error


def test_images_to_learn_from_count_also_where_the_next_batch_does_not_draw_them(prepared):
    folder, arguments = prepared
    data = folder / "data.npz"
    short = ["--iterations", "3", "--num-samples", "0", "--eval-every", "0"]
    code, error = training(folder, [*arguments, *short], sends={2: signal.SIGKILL})
    assert code == -signal.SIGKILL, error
    before, kept = contents(folder / "run"), data.read_bytes()
    for image in (0, 23, 59):
        changed_array(data, "images", (image, 0, 3, 4))
        code, error = training(folder, [*arguments, *short, *AUTO])
        assert code == 2 and re.search(r"begun with: the content of --data \w{16}, got \w{16}\n$", error), error
        data.write_bytes(kept)
    assert contents(folder / "run") == before


def test_pairs_are_known_by_their_content(prepared):
    folder, _ = prepared
    pairs.main(["--teacher", str(folder / "teacher.safetensors"), "--out", str(folder / "pairs"), *PAIRS])
    arguments = ["--teacher", str(folder / "teacher.safetensors"), "--iterations", "3", "--batch-size", "4"]
    arguments += ["--warmup-iterations", "0", "--num-samples", "0", "--checkpoint-every", "1", "--device", "cpu"]
    arguments += ["--regression-weight", "0.25", "--teacher-steps", "2", "--pairs"]
    code, error = training(folder, [*arguments, str(folder / "pairs")], sends={2: signal.SIGKILL})
    assert code == -signal.SIGKILL, error
    shutil.copytree(folder / "pairs", folder / "moved")
    (folder / "moved" / "SHA256SUMS").unlink()  # which would tell before
    for file in sorted((folder / "moved").glob("*.safetensors")):
        kept, tensors = file.read_bytes(), load_file(file)
        tensors["images"][-1, 0, 5, 5] += 1e-3
        save_file(tensors, file)
        code, error = training(folder, [*arguments, str(folder / "moved"), *AUTO])
        assert code == 2 and re.search(r"begun with: the content of --pairs \w{16}, got \w{16}\n$", error), error
        file.write_bytes(kept)
    record = folder / "moved" / "pairs.json"
    kept = record.read_text()
    record.write_text(kept.replace('"seed": 0', '"seed": 1'))  # of other noise
    code, error = training(folder, [*arguments, str(folder / "moved"), *AUTO])
    assert code == 2 and "begun with: the content of --pairs " in error, error
    record.write_text(kept)
    code, error = training(folder, [*arguments, str(folder / "moved"), *AUTO])
    assert code == 0, error


PAIRS = ["--num", "12", "--batch-size", "6", "--teacher-steps", "2", "--device", "cpu"]
OTHER_NETWORKS = {"sigma_data": (0.5, 0.7), "dynamics": ("edm", "flow"), "dropout": (0.0, 0.3)}


def test_what_a_teacher_to_go_on_from_computes_stays(prepared):
    """Its weights are in the checkpoint; those of the file, which is at the same path, may be others by then."""
    folder, _ = prepared
    teacher, data, init = folder / "teacher.safetensors", folder / "data.npz", folder / "init.safetensors"
    shutil.copy(teacher, init)
    arguments = ["--init", str(init), "--data", str(data), "--iterations", "4", "--batch-size", "4", "--device", "cpu"]
    arguments += ["--warmup-iterations", "0", "--num-samples", "0", "--checkpoint-every", "1", "--teacher-steps", "2"]
    for place, sends, expected in ((folder / "whole", {}, 0), (folder, {2: signal.SIGKILL}, -signal.SIGKILL)):
        code, error = training(place, arguments, sends=sends, command=pretrain)
        assert code == expected, error
    before = contents(folder / "run")
    config = teachers.load(str(teacher)).config
    for name, (then, now) in OTHER_NETWORKS.items():
        save_network(init, UNet(dataclasses.replace(config, **{name: now})), kind="teacher")
        code, error = training(folder, [*arguments, *AUTO], command=pretrain)
        flag = name.replace("_", "-")
        assert code == 2 and error.endswith(f"begun with: --{flag} {then}, got {now}\n"), error
        assert contents(folder / "run") == before
    save_network(init, UNet(config), kind="teacher")
    code, error = training(folder, [*arguments, *AUTO], command=pretrain)
    assert code == 0, error
    weights = [load_file(place / "run" / "teacher.safetensors") for place in (folder, folder / "whole")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()) and len(weights[0]) > 30
