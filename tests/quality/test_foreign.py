"""Feature networks, references and images that are not what the metrics take: said in a line, before anything long."""

import contextlib
import io
import os
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fastdmd import data, memory, quality
from fastdmd.quality import evaluation as evaluation_module
from fastdmd.quality.features import load_feature_network, verify
from fastdmd.quality.frechet import FeatureStatistics

SHAPE = (1, 28, 28)


class Made(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


def leave(images):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.flatten(1) / 0, "expected finite features of it, got NaN or infinity"),
        (lambda x: (x.flatten(1), x.flatten(1) * np.inf), "expected finite logits of it, got NaN or infinity"),
        (lambda x: torch.zeros(len(x), 5), "expected features of it that tell two images apart, got the same"),
        (lambda x: x.flatten(1)[:, :0], "expected 1 to 16384 features of it, got 0"),
        (lambda x: x.flatten(1).repeat(1, 21), "expected 1 to 16384 features of it, got 16464"),
        (lambda x: x, r"expected features \(2, D\), floating point, got"),
        (lambda x: [][1], r"expected Made to take images of shape \(2, 1, 28, 28\), got IndexError: list index"),
        (leave, "expected Made to take images of shape .*, got SystemExit: 0"),
        (lambda x: nn.Conv2d(3, 4, 3)(x), "expected Made to take images .* got RuntimeError: Given groups=1"),
    ],
)
def test_a_feature_network_is_tried_once(make, message):
    with pytest.raises(ValueError, match=message) as error:
        verify(load_feature_network(Made(make)), SHAPE, "it")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sigma", "fault"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], "expected sigma without a negative eigenvalue, got one below"),
        ([[1.0, 1.0], [1.0, 1.0 - 1e-4]], "expected sigma without a negative eigenvalue, got one below"),
        ([[1.0, 1.0], [1.0, 1.0]], None),  # of two images
        ([[1.0, 1.0], [1.0, 1.0 - 1e-8]], None),  # rounded
        ([[0.0, 0.0], [0.0, 0.0]], None),
    ],
)
def test_a_covariance_has_no_negative_eigenvalue(tmp_path, sigma, fault):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.array(sigma))
    with pytest.raises(ValueError, match=fault) if fault else contextlib.nullcontext():
        assert FeatureStatistics.from_npz(tmp_path / "a.npz").covariance.tolist() == sigma


def test_a_reference_of_other_features_is_not_read(tmp_path):
    """Its declared 2 GB are not even there."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", member((2**14,)))
        archive.writestr("sigma.npy", member((2**14, 2**14)))
    with pytest.raises(ValueError, match=f"expected a reference of 784 features, got 16384 in {tmp_path}/a.npz"):
        quality.Evaluation(SHAPE, 10, num_samples=10, feature_network=nn.Flatten(), reference=str(tmp_path / "a.npz"))


def test_more_features_than_memory_are_refused(monkeypatch):
    """10 covariances of 784 features are 49 MB; nothing is gathered before that is known."""
    monkeypatch.setattr(data, "load", lambda: pytest.fail("something long began"))
    monkeypatch.setattr(memory, "available_bytes", lambda _: 10 * 8 * 784**2 - 1)
    with pytest.raises(ValueError, match="expected covariances of 784 features to fit .* fewer features"):
        quality.Evaluation(SHAPE, 10, num_samples=10, feature_network=nn.Flatten())


def test_slow_features_are_announced(monkeypatch):
    monkeypatch.setattr(evaluation_module, "SLOW_FEATURES", 783)
    monkeypatch.setattr(data, "load", lambda: 1 / 0)
    with pytest.warns(UserWarning, match="Fréchet distance in 784 features"), pytest.raises(ZeroDivisionError):
        quality.Evaluation(SHAPE, 10, num_samples=10, feature_network=nn.Flatten())


def only_two(images):
    if len(images) != 2:
        sys.exit(0)
    return images.flatten(1)


class OnlyTwo(nn.Module):
    def forward(self, images):
        return images.view(2, 784)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: Made(only_two), r"Made .* SystemExit: 0 \(.*test_foreign.py, line \d+\)"),
        (lambda: Made(lambda x: {2: x.flatten(1)}[len(x)]), r"Made .* KeyError: 500 \(.*, line \d+\)"),
        (lambda: "only_two.pt", r"only_two.pt .* RuntimeError: shape '\[2, 784\]' is invalid for input of size 392000"),
    ],
)
def test_a_feature_network_that_fails_later_is_one_line(make, got, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(OnlyTwo()).save("only_two.pt")
    with pytest.raises(ValueError) as error:
        quality.Evaluation(SHAPE, 10, num_samples=500, feature_network=make())
    expected = got.replace(" .*", r" to take images of shape \(500, 1, 28, 28\), got", 1)
    assert re.fullmatch(f"fastdmd.features: expected {expected}", str(error.value))


def test_good_feature_networks_pass():
    assert verify(load_feature_network(), SHAPE, "it") == 64
    assert verify(load_feature_network(nn.Flatten()), (3, 4, 4), "it") == 48


def test_files_that_are_no_torchscript(tmp_path, recwarn):
    torch.jit.script(nn.Flatten()).save(tmp_path / "good.pt")
    assert verify(load_feature_network(tmp_path / "good.pt"), SHAPE, "it") == 784
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:700])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.ts").write_text("inception")
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    for name, got in {
        "weights.pt": "what torch.save wrote",
        "module.pt": "what torch.save wrote",
        "truncated.pt": "another format",
        "empty.pt": "another format",
        "text.ts": "another format",
        "folder.pt": ".*no regular file",
        "pipe.pt": ".*no regular file",
    }.items():
        with pytest.raises(ValueError, match=f"expected a TorchScript file.*, got {got}") as error:
            load_feature_network(tmp_path / name)
        assert "\n" not in str(error.value)


def member(shape, descr="<f8", content=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


MU, SIGMA = member((2,), content=bytes(16)), member((2, 2), content=np.eye(2).tobytes())


@pytest.mark.parametrize(
    ("mu", "sigma", "num_images", "message"),
    [
        (member((10**6,)), member((10**6, 10**6)), None, "expected at most 16384 features, got 1000000"),
        (member((2**62, 4)), SIGMA, None, "expected at most 16384 features, got 18446744073709551616"),
        (MU, member((10**6, 10**6)), None, r"expected sigma float \(2, 2\), got float64 \(1000000, 1000000\)"),
        (MU, member((2, 2), content=b"short"), None, "expected sigma once, 32 bytes, got 5 bytes in"),
        (member((2,), "|O"), SIGMA, None, r"expected mu float \(2,\), got object"),
        (member((2,), "<U9"), SIGMA, None, "expected mu float"),
        (member((2,), "<c16"), SIGMA, None, "expected mu float .*, got complex128"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((", SIGMA, None, "expected a readable .npz file"),
        (b"\x93NUMPY\x09\x00\x10\x00", SIGMA, None, "expected a readable .npz file"),
        (b"", SIGMA, None, "expected a readable .npz file"),
        (member((2,), content=np.full(2, 1e200).tobytes()), SIGMA, None, r"expected values of at most 1e\+100, got 1e"),
        (MU, SIGMA, member((), "<i8", np.int64(-5).tobytes()), "expected num_images >= 2, got -5"),
        (MU, SIGMA, member((), "<i8", np.int64(2**62).tobytes()), "expected num_images >= 2, got 4611686018427387904"),
        (MU, SIGMA, member((), "<f8", np.float64(9.5).tobytes()), r"expected num_images int \(\), got float64"),
        (MU, SIGMA, member((10**9,), "<i8"), r"expected num_images int \(\), got int64 \(1000000000,\)"),
    ],
)
def test_what_a_reference_declares_is_checked_first(tmp_path, mu, sigma, num_images, message):
    arrays = {"mu": mu, "sigma": sigma, "num_images": num_images}
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in arrays.items():
            if content is not None:
                archive.writestr(name + ".npy", content)
    with pytest.raises(ValueError, match=message) as error:
        FeatureStatistics.from_npz(tmp_path / "a.npz")
    assert str(error.value).count("\n") == 0


def test_members_that_nobody_asked_for_are_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, content in {"mu": MU, "sigma": SIGMA, "other": member((10**9,)), "odd": b"junk"}.items():
            archive.writestr(name + ".npy", content)
    assert FeatureStatistics.from_npz(tmp_path / "a.npz").covariance.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_files_that_are_not_files_or_are_damaged(tmp_path):
    np.savez(tmp_path / "good.npz", mu=np.zeros(64), sigma=np.eye(64))
    content = bytearray((tmp_path / "good.npz").read_bytes())
    (tmp_path / "truncated.npz").write_bytes(content[:-300])
    content[2000] ^= 255
    (tmp_path / "flipped.npz").write_bytes(content)
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name, got in {
        "truncated": "another format",
        "flipped": "BadZipFile .*CRC",
        "folder": ".*no regular file",
        "pipe": ".*no regular file",
    }.items():
        with pytest.raises(ValueError, match=f"expected .* .npz file, got {got}"):
            FeatureStatistics.from_npz(tmp_path / f"{name}.npz")


# Images that are not digits.


def stripes(num=400):
    widths = 1 + np.arange(num)[:, None, None] % 10
    images = (np.arange(28)[None, :, None] // widths) % 2 * 255 * np.ones((1, 1, 28))
    return images.astype(np.uint8)[:, None]


def foreign(kind, num):
    digits = data.load()
    images, labels = digits.images[:num].numpy(), digits.labels[:num].numpy()
    noise = np.random.default_rng(0).integers(0, 256, (num, *SHAPE), np.uint8)
    return {
        "digits": (images, labels),
        "digits without labels": (images, None),
        "sixes": (digits.images[digits.labels == 6][:num].numpy(), None),
        "binary digits": ((images > 127).astype(np.uint8) * 255, labels),
        "stripes": (stripes(num), np.arange(num) % 10),
        "stripes without labels": (stripes(num), None),
        "inverted": (255 - images, labels),
        "inverted without labels": (255 - images, None),
        "noise without labels": (noise, None),
        "mirrored": (images[..., ::-1].copy(), labels),
        "letters": (images, 30 + labels),
        "parity": (images, labels % 2),
    }[kind]


def evaluation(images, labels, num_samples=100, **options):
    labels = None if labels is None else torch.from_numpy(labels)
    dataset = data.Dataset(torch.from_numpy(images), labels, "these.npz")
    return quality.Evaluation(SHAPE, 10, num_samples=num_samples, dataset=dataset, **options)


@pytest.mark.parametrize("kind", ["digits", "digits without labels", "sixes", "binary digits", "letters"])
def test_digits_are_known(kind):
    assert evaluation(*foreign(kind, 400)).notices == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("stripes", "it agrees with [0-9.]+% of the labels of these.npz"),
        ("stripes without labels", "what is in these.npz does not look like MNIST to it"),
        ("inverted", "it agrees with 1[0-9.]+% of the labels"),
        ("inverted without labels", "does not look like MNIST"),
        ("noise without labels", "does not look like MNIST"),
        ("mirrored", "it agrees with [34][0-9.]+% of the labels"),
        ("parity", "it agrees with [12][0-9.]+% of the labels"),
    ],
)
def test_images_that_are_no_digits_are_noticed(kind, reason):
    found = evaluation(*foreign(kind, 400))
    assert len(found.notices) == 1
    assert re.search(f"those of a classifier of MNIST digits, and .*{reason}", found.notices[0])
    assert found.floor.frechet_distance is not None  # measured all the same


def test_fewer_images_than_features_are_noticed():
    for num, num_samples, counted in ((400, 60, 60), (100, 100, 50)):
        (notice,) = evaluation(*foreign("digits", num), num_samples=num_samples).notices
        assert f"of {counted} images in 64 features is too large" in notice
    with pytest.raises(ValueError, match="expected at least 4 images to measure against, got 3 in these.npz"):
        evaluation(*foreign("digits", 3))


def test_another_network_says_nothing_of_digits(tmp_path):
    torch.jit.script(nn.Sequential(nn.AvgPool2d(7), nn.Flatten())).save(tmp_path / "pool.pt")
    assert evaluation(*foreign("stripes", 400), feature_network=str(tmp_path / "pool.pt")).notices == []


def test_a_reference_needs_features_of_its_images(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="expected --feature-network with --reference for 3×8×8 images, got none"):
        quality.Evaluation((3, 8, 8), 0, num_samples=10, reference=str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="expected a reference of 64 features, got 3 in "):
        quality.Evaluation(SHAPE, 10, num_samples=10, reference=str(tmp_path / "a.npz"))
