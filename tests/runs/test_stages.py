"""Second stages: they start from exactly what the first has left, and say what of it is new, other or missing."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdmd import train
from fastdmd.networks.weights import load_network, save_network
from tests.helpers.networks import SMALL, make_network
from tests.helpers.tiny_runs import QUICK, digits, refuses, run_train

SLOW = 10**6  # images: an average that hardly moves in an iteration
GAN = ["--gan-guidance-weight", "1e-2", "--gan-generator-weight", "3e-3"]
STILL = ["--generator-lr", "1e-30", "--guidance-lr", "1e-30", "--iterations", "1", "--num-samples", "0"]


def networks(run):
    return load_file(run / "networks.safetensors")


def metadata_of(run):
    with safe_open(run / "networks.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["fastdmd"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a head and two averages, and what it was made of."""
    folder = tmp_path_factory.mktemp("whole")
    images, labels = digits()
    np.savez(folder / "data.npz", images=images, labels=labels)
    save_network(folder / "teacher.safetensors", make_network(), kind="teacher")
    options = ["--ema-halflives", f"3,{SLOW}", "--num-samples", "0", "--data", str(folder / "data.npz"), *GAN]
    rates = ["--generator-lr", "1e-2", "--guidance-lr", "1e-2"]
    run_train(folder / "teacher.safetensors", folder / "first", *options, *rates)
    return folder


@pytest.fixture
def first(whole, tmp_path):
    """The run, for a test to do with as it likes."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path / "first"


def second(teacher_file, first, *options, name="second"):
    run_train(teacher_file, first.parent / name, "--init-from", str(first), *STILL, *options)
    return first.parent / name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_second_stage_starts_from_the_tensors_of_the_first(teacher_file, first, precision):
    """In full precision whatever it computes in; at rates that move nothing, they are there after an iteration."""
    options = ["--ema-halflives", f"3,{SLOW}", "--gan-lr", "1e-30", "--data", str(first.parent / "data.npz"), *GAN]
    before = networks(first)
    after = networks(second(teacher_file, first, "--batch-size", "2", "--precision", precision, *options))
    assert before.keys() == after.keys() and len({name.split(".")[0] for name in before}) == 4
    teacher = make_network().state_dict()
    for part in ("generator", "fake_score", "head"):
        names = [name for name in before if name.startswith(f"{part}.")]
        assert names
        for name in names:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-20)
        if part != "head":  # and it is no start from the teacher
            assert any(not torch.equal(before[f"{part}.{name}"], value) for name, value in teacher.items())
    decays = [0.5 ** (2 / 3), 0.5 ** (2 / SLOW)]  # at this batch; from the first update on, without warm-up
    moved = 0.0
    for name in (name.removeprefix("generator.") for name in before if name.startswith("generator.")):
        for index, decay in enumerate(decays):
            own, weights = before[f"average.{index}.{name}"], before[f"generator.{name}"]
            expected = own + (1 - decay) * (weights - own)
            torch.testing.assert_close(after[f"average.{index}.{name}"], expected, rtol=1e-6, atol=1e-7)
        moved = max(moved, (weights - own).abs().max().item())
    assert moved > 1e-4


def test_heads_averages_and_levels_that_differ_are_said(teacher_file, first, capsys):
    other = ["--generator-sigmas", "40,2", "--clamp-images", "False"]
    run = second(teacher_file, first, "--ema-decay", "0.999999", *other)
    said = capsys.readouterr().err
    assert f"the discriminator's head of {first} is left out: --gan-guidance-weight is 0\n" in said
    assert f"{first} has no average of decay 0.999999: it starts from the one that was kept\n" in said
    assert f"the generator of {first} makes images at sigma 80, here at 40, 2\n" in said
    assert f"images of the generator of {first} are clamped to [-1, 1], here they are not\n" in said
    before, after, kept = networks(first), networks(run), load_network(first / "generator.safetensors")[0]
    assert not any(name.startswith("head.") for name in after)
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(after[f"average.0.{name}"], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value, before[f"average.0.{name}"], rtol=0, atol=0)
    again = second(teacher_file, run, "--data", str(first.parent / "data.npz"), *GAN, name="third")
    assert f"{run} has no head of a discriminator: it starts anew\n" in capsys.readouterr().err
    assert any(name.startswith("head.") for name in networks(again))
    metadata = metadata_of(run)  # of several levels, whose first is not all
    assert (metadata["generator_sigmas"], metadata["clamped"]) == ([40.0, 2.0], False)


def test_other_levels_and_another_clamping_are_said(teacher_file, first, capsys):
    """From a run of today as from the generator of an older one; where nothing differs, nothing is said."""
    several = second(teacher_file, first, "--generator-sigmas", "80,5", "--data", str(first.parent / "data.npz"), *GAN)
    said = capsys.readouterr().err
    assert f"the generator of {first} makes images at sigma 80, here at 80, 5\n" in said and "clamped" not in said
    assert metadata_of(several)["generator_sigmas"] == [80.0, 5.0] and "conditioning_sigma" not in metadata_of(several)
    for number in range(2):
        again = second(teacher_file, several, "--clamp-images", "False", name=f"{number}")
        said = capsys.readouterr().err
        assert f"the generator of {several} makes images at sigma 80, 5, here at 80\n" in said
        assert f"images of the generator of {several} are clamped to [-1, 1], here they are not\n" in said
        assert metadata_of(again)["clamped"] is False
        (several / "networks.safetensors").unlink(missing_ok=True)
    second(teacher_file, again, name="last")
    said = capsys.readouterr().err
    assert f"images of the generator of {again} are not clamped to [-1, 1], here they are\n" in said
    assert "makes images" not in said


def test_the_fake_score_goes_on_knowing_the_steps(teacher_file, tmp_path, capsys):
    """Of a generator of as many; of others it learns them anew, which is said."""
    name, left_out = "fake_score.map_noise.step_codes", "knows of the steps of its generator is left out\n"
    first, two = tmp_path / "first", ["--generator-sigmas", "80,5", "--batch-size", "6"]
    run_train(teacher_file, first, "--guidance-lr", "1e-2", "--num-samples", "0", *two)
    codes = networks(first)[name]
    assert codes.shape == (2, 32) and codes.abs().max() > 1e-3 and not torch.equal(*codes)
    capsys.readouterr()
    same = second(teacher_file, first, "--generator-sigmas", "80,1", "--batch-size", "6", name="same")
    torch.testing.assert_close(networks(same)[name], codes, rtol=0, atol=1e-20)
    assert left_out not in capsys.readouterr().err
    three = second(teacher_file, first, "--generator-sigmas", "80,5,1", "--batch-size", "6", name="three")
    assert networks(three)[name].shape == (3, 32) and networks(three)[name].abs().max() < 1e-20
    assert f"what the fake score of {first} {left_out}" in capsys.readouterr().err
    one = second(teacher_file, first, name="one")
    assert name not in networks(one) and f"what the fake score of {first} {left_out}" in capsys.readouterr().err
    again = second(teacher_file, one, *two, name="again")
    assert networks(again)[name].abs().max() < 1e-20 and left_out not in capsys.readouterr().err


def test_a_run_from_before_gives_its_generator(teacher_file, first, capsys):
    (first / "networks.safetensors").unlink()
    after = networks(second(teacher_file, first))
    assert capsys.readouterr().err.count(
        f"{first} has no networks.safetensors: generator and averages start from its generator.safetensors, the fake "
        "score from the teacher\n"
    )
    kept, teacher = load_network(first / "generator.safetensors")[0].state_dict(), make_network().state_dict()
    for name, value in kept.items():
        torch.testing.assert_close(after[f"generator.{name}"], value, rtol=0, atol=1e-20)
        torch.testing.assert_close(after[f"average.0.{name}"], value, rtol=0, atol=1e-20)
        torch.testing.assert_close(after[f"fake_score.{name}"], teacher[name], rtol=0, atol=1e-20)
    assert any(not torch.equal(value, teacher[name]) for name, value in kept.items())


@pytest.mark.parametrize("is_old", [False, True], ids=["", "from before"])
def test_networks_of_somebody_else_go_on_too(tmp_path, is_old):
    """With buffers and weights that are tied; of another parameterization they are other networks."""
    foreign = ["--parameterization", "x0", *QUICK[2:], *STILL]
    teacher = ["--teacher", "tests.helpers.foreign:build"]
    train.main([*teacher, "--out", str(tmp_path / "a"), *foreign, "--generator-lr", "1e-2", "--precision", "bf16"])
    before = networks(tmp_path / "a")
    kept = load_file(tmp_path / "a" / "generator.safetensors")
    if is_old:
        (tmp_path / "a" / "networks.safetensors").unlink()
    train.main([*teacher, "--out", str(tmp_path / "b"), "--init-from", str(tmp_path / "a"), *foreign])
    after = networks(tmp_path / "b")
    expected = {
        name: kept[name.removeprefix("generator.network.")] if is_old else before[name]
        for name in before
        if name.startswith("generator.")
    }
    assert "generator.network.middle.bias" in expected and after["generator.network.steps"] == 7
    for name, value in expected.items():
        if name != "generator.network.middle.bias":  # which is that of conv_in, in the precision computed in
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-20)
    tied = [after[f"generator.network.{name}.bias"] for name in ("conv_in", "middle")]
    assert torch.equal(*tied)
    with pytest.raises(SystemExit):
        other = ["--parameterization", "edm", "--teacher-sigma-data", "0.5"]
        train.main([*teacher, "--out", str(tmp_path / "c"), "--init-from", str(tmp_path / "a"), *foreign[2:], *other])
    assert not (tmp_path / "c").exists()


def test_the_file_says_what_it_is_of(first):
    """The average that was kept, too; and it is no generator to sample from."""
    metadata = metadata_of(first)
    names = ["half-life 3 images", f"half-life {SLOW} images"]
    assert (metadata["averages"], metadata["kept"], metadata["iterations"]) == (names, names[0], 4)
    assert load_network(first / "generator.safetensors")[1]["average"] == names[0]
    with pytest.raises(ValueError, match="expected a teacher or generator in .*networks.safetensors, got another kind"):
        load_network(first / "networks.safetensors")


def rewrite(path, change=lambda tensors: None, **metadata):
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()["fastdmd"])
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"fastdmd": json.dumps(found | metadata)})


BROKEN = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "expected a safetensors file, got"),
    "other metadata": (lambda path: rewrite(path, kept="another"), "expected the networks of a run in .*, got other"),
    "other levels": (
        lambda path: rewrite(path, conditioning_sigma="80"),
        "expected conditioning_sigma from",
    ),
    "a tensor missing": (
        lambda path: rewrite(path, lambda tensors: tensors.pop(max(n for n in tensors if n.startswith("generator.")))),
        "expected the tensors of generator in .*networks.safetensors, got it without",
    ),
    "no fake score": (
        lambda path: rewrite(
            path, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith("fake_score.")]
        ),
        "expected the tensors of fake_score in .*, got it without",
    ),
    "NaN": (
        lambda path: rewrite(
            path, lambda tensors: [tensors[name].fill_(torch.nan) for name in tensors if name.startswith("generator.")]
        ),
        "finite, got",
    ),
    "another head": (
        lambda path: rewrite(path, lambda tensors: tensors.update({"head.conv_out.weight": torch.zeros(1, 7, 1, 1)})),
        "expected the head of .*, got conv_out.weight of shape",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_networks_that_are_broken_are_refused(kind, teacher_file, first, capsys):
    breaks, message = BROKEN[kind]
    breaks(first / "networks.safetensors")
    options = ["--teacher", str(teacher_file), "--init-from", str(first), "--out", str(first.parent / "run")]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train.main([*options, *STILL, "--device", "cpu", "--data", str(first.parent / "data.npz"), *GAN])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and not (first.parent / "run").exists()
    assert error.startswith("fastdmd.train: error: ") and message.split(".*")[0] in error, error


def test_what_is_no_run_of_this_teacher_is_refused(teacher_file, first, tmp_path, capsys):
    wider = dataclasses.replace(SMALL, model_channels=16)
    save_network(tmp_path / "wider.safetensors", make_network(wider), kind="teacher")
    empty, old = tmp_path / "empty", tmp_path / "old"
    empty.mkdir(), shutil.copytree(first, old)
    (old / "networks.safetensors").unlink()
    for teacher, folder, message in (
        (teacher_file, tmp_path / "nowhere", "expected --init-from to be the folder of a run of fastdmd.train, got"),
        (teacher_file, empty, "got .*empty without networks.safetensors or generator.safetensors"),
        (teacher_file, first / "config.json", "expected --init-from to be the folder of a run of fastdmd.train, got"),
        (tmp_path / "wider.safetensors", first, "with model_channels 16, got 8 in .*networks.safetensors"),
        (tmp_path / "wider.safetensors", old, "with model_channels 16, got 8 in .*generator.safetensors"),
    ):
        options = ["--teacher", str(teacher), "--init-from", str(folder), "--out", str(tmp_path / "run"), *STILL]
        capsys.readouterr()
        refuses(train, [*options, "--warmup-iterations", "0", "--device", "cpu"], message, capsys)
        assert not (tmp_path / "run").exists()
