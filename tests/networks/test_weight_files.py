"""Weight files of anybody's: what is found under wrappers and entries, and one line for everything else."""

import io
import json
import math
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastdmd.networks.states import load_weights
from fastdmd.networks.tensor_files import open_tensors


class Inner(nn.Module):
    """Two tensors of its own, one of them under two names, and a count."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Linear(2, 2)
        self.mix.weight.data = torch.randn(2, 2, generator=generator)
        self.mix.bias.data = torch.randn(2, generator=generator)
        self.again = self.mix.bias
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))


TRAINED = Inner(7).state_dict()


def under(prefix, state=TRAINED):
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def without(*names):
    return {name: tensor.clone() for name, tensor in TRAINED.items() if name not in names}


def saved(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def took_all(network):
    return all(torch.equal(network.state_dict()[name], tensor) for name, tensor in TRAINED.items())


EMA_PYTORCH = under("ema_model.") | under("online_model.", Inner(8).state_dict()) | {"step": torch.tensor(3)}
LIGHTNING = {
    "epoch": 3,
    "pytorch-lightning_version": "2.4.0",
    "hparams_name": "kwargs",
    "loops": {"fit_loop": {"total": 4}},
    "state_dict": under("net.") | {"loss.perceptual.weight": torch.zeros(3)},
    "lr_schedulers": [],
    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": [{"lr": 1e-4}]}],
}


@pytest.mark.parametrize(
    ("content", "key", "taken"),
    [
        (TRAINED, None, None),
        ({**TRAINED, "epoch": 3, "name": "run"}, None, None),
        (under("module."), None, "5 tensors under module, left 0 others"),
        (under("_orig_mod."), None, None),
        (under("module._orig_mod."), None, "under module, left 0"),
        (under("model.diffusion_model."), None, "under model.diffusion_model, left 0"),
        (under("module.") | {"n_averaged": torch.tensor(3)}, None, "under module, left 1 others"),  # AveragedModel
        ({"state_dict": under("module.")}, None, "under state_dict.module, left 0"),
        ({"step": 4, "ema": TRAINED, "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, None, "under ema, left 1"),
        ({"model": TRAINED, "ema": TRAINED}, None, "under model, left 0"),  # one dictionary
        (LIGHTNING, None, "under state_dict.net, left 1 others"),
        (EMA_PYTORCH, "ema_model", "under ema_model, left 6 others"),
        (
            {"model": under("module.", Inner(8).state_dict()), "model_ema": under("module.")},
            "model_ema",
            "under model_ema.module, left 5 others",
        ),
        ({"state_dict": under("net.", Inner(8).state_dict()) | under("ema.")}, "state_dict.ema.", "state_dict.ema, le"),
        (without("again"), None, None),
        (under("net.", without("mix.bias")), None, "4 tensors under net, left 0 others"),
    ],
)
def test_tensors_are_found_under_wrappers_and_entries(content, key, taken, tmp_path, capsys):
    network = Inner()
    load_weights(network, saved(tmp_path / "w.pt", content), key)
    notice = capsys.readouterr().err
    assert took_all(network) and network.again is network.mix.bias
    assert (
        notice == "" if taken is None else notice.count("\n") == 1 and taken in notice and "w.pt: took the " in notice
    )


def test_a_network_that_is_wrapped_itself_takes_plain_tensors(tmp_path):
    path = saved(tmp_path / "w.ckpt", TRAINED)
    compiled, wrapped = nn.Sequential(), nn.Sequential()
    compiled.add_module("_orig_mod", Inner())  # as torch.compile and DataParallel do
    wrapped.add_module("module", compiled)
    load_weights(wrapped, path)
    assert took_all(compiled._orig_mod)
    load_weights(network := Inner(), saved(tmp_path / "w.safetensors", under("model.")))
    assert took_all(network)
    # Safetensors under another name, the format before zip files, and several files with their index.
    (tmp_path / "renamed.bin").write_bytes((tmp_path / "w.safetensors").read_bytes())
    torch.save(TRAINED, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name, part in (("a", ["mix.weight"]), ("b", ["mix.bias", "again", "count", "mask"])):
        save_file({tensor: TRAINED[tensor].clone() for tensor in part}, tmp_path / f"{name}.safetensors")
    places = {name: "a.safetensors" if name == "mix.weight" else "b.safetensors" for name in TRAINED}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "UPPER.SAFETENSORS").write_bytes((tmp_path / "w.safetensors").read_bytes())
    for name in ("renamed.bin", "old.pth", "model.safetensors.index.json", "UPPER.SAFETENSORS"):
        load_weights(network := Inner(), tmp_path / name)
        assert took_all(network)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_an_index_decides_where_a_tensor_comes_from(kind, tmp_path):
    """Parts may hold stale copies of what other parts are named for, and more; before and after the right one."""
    state = {name: tensor for name, tensor in TRAINED.items() if name != "again"}
    names = {"a": ["mix.weight", "count"], "b": ["mix.bias"], "c": ["mask"]}
    for part, own in names.items():
        stale = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name not in own}
        content = stale | {name: state[name] for name in own} | {f"more.{part}": torch.zeros(1)}
        saved(tmp_path / f"{part}.{kind}", content)
    places = {name: f"{part}.{kind}" for part, own in names.items() for name in own}
    (tmp_path / "w.index.json").write_text(json.dumps({"weight_map": places}))
    load_weights(network := Inner(), tmp_path / "w.index.json")
    assert took_all(network)
    places |= {"more.a": f"a.{kind}"}
    (tmp_path / "w.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="got also more.a$"):
        load_weights(Inner(), tmp_path / "w.index.json")


def test_an_archive_that_inflates_is_refused_before_it_does(tmp_path):
    path = saved(tmp_path / "w.pt", {"model": TRAINED, "zeros": torch.zeros(1 << 20)})
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "c.pt", "w", compression) as packed:
            for name in archive.namelist():
                packed.writestr(name, archive.read(name))
        if compression == zipfile.ZIP_DEFLATED:
            with pytest.raises(
                ValueError, match=r"at most 10 times its own size in .*c.pt, got 419\d{4} bytes in \d{4}$"
            ):
                open_tensors(tmp_path / "c.pt")
        else:
            load_weights(network := Inner(), tmp_path / "c.pt", "model")
            assert took_all(network)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"model": TRAINED, "ema": under("")}, None, "expected --weights-key out of model, ema for .*w.pt, got none"),
        (EMA_PYTORCH, None, "expected --weights-key out of ema_model, online_model for .*, got none"),
        (EMA_PYTORCH, "emma", "expected --weights-key out of ema_model, online_model for .*, got emma"),
        ({"a": {"x": under("n."), "y": under("")}}, "a", "expected --weights-key out of a.x.n, a.y for .*, got a"),
        (without("mix.weight", "count"), None, "the tensors of Inner in .*w.pt, got it without count, mix.weight$"),
        (under("net.", without("mix.weight")), None, "in .*w.pt under net, got it without mix.weight"),
        (TRAINED | {"more": torch.zeros(1)}, None, "got also more"),
        (TRAINED | {"count": torch.zeros(2)}, None, r"got count of shape \(2,\), not \(\)"),
        (TRAINED | {"count": torch.tensor(1.5)}, None, "got count of floating point, not whole numbers"),
        (TRAINED | {"mix.bias": torch.ones(2, dtype=torch.int8)}, None, "mix.bias of whole numbers, not floating poi"),
        (TRAINED | {"mix.bias": torch.ones(2, dtype=torch.complex64)}, None, "mix.bias of torch.complex64, not float"),
        (TRAINED | {"mix.weight": torch.eye(2).to_sparse()}, None, "mix.weight of torch.sparse_coo layout, not"),
        (TRAINED | {"mix.bias": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}, None, "torch.qint8"),
        (
            TRAINED | {"mix.bias": torch.zeros(2, device="meta")},
            None,
            "tensors with values in .*, got mix.bias without",
        ),
        (TRAINED | {"mix.bias": torch.tensor([1, math.nan])}, None, r"got NaN in again \(1 of 2 numbers\)"),
        (
            TRAINED | {"mix.weight": torch.full((2, 2), 7e4).half()},
            None,
            r"got infinity in mix.weight \(4 of 4 numbers",
        ),
        (TRAINED | {"mask": torch.tensor([0.0, math.nan])}, None, "got NaN in mask"),
        ({"a": {"b.c": torch.zeros(1)}, "a.b": {"c": torch.ones(1)}}, None, "every tensor once in .*, got a.b.c twice"),
        (under("") | under("_orig_mod."), None, "every tensor once in .*, got .* twice"),
        (
            {"shadow_params": list(TRAINED.values()), "decay": 0.9},
            None,
            "by name, in .*, got only shadow_params, decay",
        ),
        ({}, None, "expected a state dict, tensors by name, in .*w.pt, got an empty one"),
        (list(TRAINED.values()), None, "expected a state dict, tensors by name, in .*w.pt, got a list"),
        (torch.zeros(3), None, "expected a state dict, tensors by name, in .*w.pt, got a Tensor"),
        (nn.Linear(1, 1), None, "got a torch.nn.modules.linear.Linear in it, whose code would have to run"),
        ({"a": np.zeros(2)}, None, "got a numpy.*_reconstruct in it, whose code would have to run"),
    ],
)
def test_files_that_do_not_fit_get_one_line(content, key, message, tmp_path, capsys):
    network = Inner()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=f"^fastdmd.weights: .*{message}") as error:
        load_weights(network, saved(tmp_path / "w.pt", content), key)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and capsys.readouterr().err == ""
    if "finite" not in str(error.value):
        assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def archive(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name in names:
            content.writestr(name, "x")
    return file.getvalue()


def tar(names):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as content:
        for name in names:
            content.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def torch_bytes(**options):
    file = io.BytesIO()
    torch.save(TRAINED, file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", b"", "expected a weight file, got .*w.pt, which is empty"),
        ("w.safetensors", b"", "expected a weight file, got .*w.safetensors, which is empty"),
        ("w.pt", b"hello\n", "alone .* in .*w.pt, got a file that begins with b'hello.n'$"),
        ("w.pt", b"version https://git-lfs.github.com/spec/v1", "got a file that begins with b'version https://'$"),
        ("w.pt", b"\x80\x02", "alone .* in .*w.pt, got EOFError"),
        ("w.pt", b"\x80\x02" + b"]" * 100_000 + b".", "alone .* in .*w.pt, got"),
        ("w.pt", b"\x93NUMPY" + bytes(90), "alone .* in .*w.pt, got a file that begins with b'.x93NUMPY"),
        ("w.pt", archive(["a.txt"]), "alone .* in .*w.pt, got RuntimeError"),
        ("w.pt", archive([]), "alone .* in .*w.pt, got"),
        ("w.pt", tar(["storages", "tensors", "pickle", "sys_info"]), "legacy .tar format.$"),
        ("w.pt", torch_bytes()[:-100], "expected an archive as torch writes it, whole, in .*w.pt, got BadZipFile"),
        ("w.pt", torch_bytes(_use_new_zipfile_serialization=False)[:-5], "alone .* in .*w.pt, got RuntimeError: unexp"),
        ("w.pt", struct.pack("<Q", 2) + b"{]", "expected a safetensors file, got .*w.pt"),
        ("w.safetensors", torch_bytes(), "expected a safetensors file, got .*w.safetensors"),
        ("w.index.json", b"{", "expected JSON in .*w.index.json, got JSONDecodeError"),
        ("w.index.json", b"\xff", "expected JSON in .*, got UnicodeDecodeError"),
        ("w.index.json", b"[" * 100_000, "expected JSON in .*, got RecursionError"),
        ("w.index.json", b" " * ((16 << 20) + 1), "expected JSON in .*w.index.json, got more than 16777216 bytes"),
        ("w.index.json", b"[]", "expected a JSON object in .*, got a list"),
        ("w.index.json", b"{}", "expected a weight_map of names to files in .*, got none"),
        ("w.index.json", b'{"weight_map": {"a": "../a.pt"}}', "expected weight files beside .*, got ../a.pt"),
        ("w.index.json", b'{"weight_map": {"a": "w.index.json"}}', "expected weight files beside .*, got w.index.json"),
        ("w.index.json", b'{"weight_map": {"a": "part.pt"}}', "tensors of .*w.index.json in part.pt, got no a"),
    ],
)
def test_files_that_are_no_weights_get_one_line(name, content, message, tmp_path):
    torch.save(TRAINED, tmp_path / "part.pt")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^fastdmd.weights: .*{message}") as error:
        load_weights(Inner(), tmp_path / name)
    text = str(error.value)
    assert "\n" not in text and len(text) < 700 and "weights_only" not in text.replace("``weights_only=True``", "")


def test_folders_and_absent_parts_are_named(tmp_path):
    (tmp_path / "w.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')
    for name, message in (
        ("w.index.json", "absent.safetensors, which does not exist"),
        ("", "which is no file"),
        ("x.ckpt", "x.ckpt, which does not exist"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_weights(Inner(), tmp_path / name)


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {"a": [1]}
    content["self"], content["list"] = content, [content] * 3
    for level in range(30):  # 2^30 ways through it
        content = {"left": content, "right": content, "w": torch.ones(1) * level}
    torch.save(content, tmp_path / "w.pt")
    started = time.monotonic()
    assert len(open_tensors(tmp_path / "w.pt").described) == 8  # as deep as anybody nests
    assert time.monotonic() - started < 5
