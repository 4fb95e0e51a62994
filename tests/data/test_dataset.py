"""Datasets in memory: batches by (seed, step), mapped files, and what a network requires of them."""

import re
import shutil

import numpy as np
import pytest
import torch

from fastdmd import data
from fastdmd.data import array_files
from tests.helpers.small_datasets import LABELS, check, edm_files, pixels, write_idx, write_npz, write_zip

FIRST_DRAWN = [1, 2, 0, 2, 0, 2, 0, 0]  # labels for seed 3, step 5: a run resumed later draws the same


@pytest.fixture
def dataset(tmp_path) -> data.Dataset:
    return data.load(write_npz(tmp_path / "dataset.npz", images=pixels(3), labels=LABELS))


def test_batch_values(dataset):
    images, labels = dataset.batch(torch.tensor([5, 0, 5]))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    np.testing.assert_array_equal(images.numpy(), pixels(3)[[5, 0, 5]] / np.float32(127.5) - np.float32(1))
    assert labels.tolist() == [2, 1, 2]
    assert dataset.require(num_classes=0).batch(torch.tensor([1]))[1] is None
    with pytest.raises(ValueError, match=r"expected int64 indices of shape \(B,\), got torch.int32 of shape \(3,\)"):
        dataset.batch(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected int64 indices of shape \(B,\), got torch.int64 of shape \(\)"):
        dataset.batch(torch.tensor(3))


def test_range_and_roundtrip():
    levels = torch.arange(256, dtype=torch.uint8)
    levels_dataset = data.Dataset(levels.reshape(1, 1, 16, 16), None, "levels")
    images, labels = levels_dataset.batch(torch.tensor([0]))
    assert labels is None and images.min() == -1 and images.max() == 1
    assert torch.equal(data.to_uint8(images), levels_dataset.images)
    assert data.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]
    assert data.to_uint8(torch.tensor([-0.5, 0.5], dtype=torch.bfloat16)).tolist() == [64, 191]


def test_random_batch_is_a_function_of_seed_and_step(dataset):
    def draw(seed, step, source=dataset):
        return source.random_batch(64, seed=seed, step=step)

    for first, second in zip(draw(3, 5), draw(3, 5), strict=True):
        assert torch.equal(first, second)
    draws = [tuple(draw(seed, step)[1].tolist()) for seed in (0, 1, 2**16, 2**32 - 1) for step in (0, 1, 2**32 - 1)]
    assert len(set(draws)) == len(draws)
    images, labels = draw(3, 5)
    found = [(images == image).flatten(1).all(1) for image in dataset.batch(torch.arange(len(LABELS)))[0]]
    assert labels.tolist() == LABELS[torch.stack(found).int().argmax(0).numpy()].tolist()  # images keep their labels
    assert labels[:8].tolist() == FIRST_DRAWN


def test_random_batch_is_uniform():
    places = data.Dataset(torch.zeros(10, 1, 1, 1, dtype=torch.uint8), torch.arange(10), "places")
    labels = torch.cat([places.random_batch(100, seed=0, step=step)[1] for step in range(200)])
    counts = torch.bincount(labels, minlength=10).double()
    assert ((counts - 2000).square() / 2000).sum() < 27.9  # chi-squared, 9 degrees of freedom: p = 0.001


@pytest.mark.parametrize("chunk_bytes", [1, 300, 2**24])
def test_mapped_file_gives_identical_batches(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(array_files, "CHUNK_BYTES", chunk_bytes)
    maps = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args, **named: maps.append(1) or memmap(*args, **named))
    write_idx(tmp_path / "idx", pixels(1), LABELS, compressed=True)
    write_npz(tmp_path / "a.npz", images=pixels(3).transpose(0, 2, 3, 1), labels=LABELS)
    write_zip(tmp_path / "a.zip", edm_files(pixels(3), LABELS))
    for source in (tmp_path / "idx", tmp_path / "a.npz", tmp_path / "a.zip"):
        held, mapped = data.load(source), data.load(source, memory_limit_bytes=0)
        check(mapped, held.images.numpy(), LABELS)
        for a, b in zip(held.random_batch(9, seed=1, step=2), mapped.random_batch(9, seed=1, step=2), strict=True):
            assert torch.equal(a, b)
    assert len(maps) == 3


def test_memory_limit_is_exact(tmp_path, monkeypatch):
    source = write_npz(tmp_path / "a.npz", images=pixels(1))
    monkeypatch.setattr(np, "memmap", lambda *args, **named: pytest.fail("mapped"))
    check(data.load(source, memory_limit_bytes=pixels(1).nbytes), pixels(1), None)
    with pytest.raises(pytest.fail.Exception, match="mapped"):
        data.load(source, memory_limit_bytes=pixels(1).nbytes - 1)


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5}))
    with pytest.raises(OSError, match=r"fastdmd.data: expected 252 bytes free in .*, got 5"):
        data.load(write_npz(tmp_path / "a.npz", images=pixels(1)), memory_limit_bytes=0)


@pytest.mark.cuda
def test_cuda_batches_equal_those_of_the_host(tmp_path, dataset, monkeypatch):
    on_device = data.load(tmp_path / "dataset.npz", device="cuda")
    assert on_device.images.is_cuda and on_device.labels.is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * pixels(3).nbytes - 1, 0))
    on_host = data.load(tmp_path / "dataset.npz", device="cuda")
    assert not on_host.images.is_cuda
    expected_images, expected_labels = dataset.random_batch(50, seed=1, step=2)
    for source, device in ((on_device, None), (on_host, "cuda"), (on_device, "cpu")):
        images, labels = source.random_batch(50, seed=1, step=2, device=device)
        assert images.is_cuda == labels.is_cuda == (device != "cpu")
        assert torch.equal(labels.cpu(), expected_labels)
        assert torch.equal(data.to_uint8(images).cpu(), data.to_uint8(expected_images))
        torch.testing.assert_close(images.cpu(), expected_images, rtol=0, atol=2**-22)  # 2 ulp at 1


def test_require(dataset):
    assert dataset.require(image_shape=(3, 6, 6), num_classes=3) is dataset
    assert dataset.require(num_classes=10) is dataset and dataset.require() is dataset
    unconditional = dataset.require(num_classes=0)
    assert unconditional.labels is None and unconditional.images is dataset.images
    name = re.escape(dataset.name)
    with pytest.raises(ValueError, match=rf"images of shape \(1, 6, 6\), got \(3, 6, 6\) in {name}$"):
        dataset.require(image_shape=(1, 6, 6))
    with pytest.raises(ValueError, match=rf"labels from 0 to 1, got labels up to 2 in {name}$"):
        dataset.require(num_classes=2)
    with pytest.raises(ValueError, match=rf"labels from 0 to 9, got no labels in {name}$"):
        unconditional.require(num_classes=10)
    assert dataset.require(least_images=7) is dataset
    with pytest.raises(ValueError, match=rf"at least 8 images to measure against, got 7 in {name}$"):
        dataset.require(least_images=8)
