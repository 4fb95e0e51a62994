"""Which device each process of several takes, on machines that have so many GPUs."""

import pytest
import torch

from fastdmd.runs.distributed import device_of


@pytest.fixture
def second_of_three(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "num_devices", "expected"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:1"), ("cuda", 8, "cuda:1"), ("cpu", 2, "cpu")],
)
def test_each_has_its_own(name, num_devices, expected, second_of_three, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    assert device_of(name) == expected


@pytest.mark.parametrize(
    ("name", "num_devices", "message"),
    [
        ("cuda:0", 8, "expected --device auto, cuda or cpu of 3 processes, got cuda:0"),
        ("cuda", 0, "expected a GPU for each process of a machine, got 0 for LOCAL_RANK 1"),
        ("auto", 1, "expected a GPU for each process of a machine, got 1 for LOCAL_RANK 1"),
    ],
)
def test_none_is_shared(name, num_devices, message, second_of_three, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    with pytest.raises(ValueError, match=f"^{message}$"):
        device_of(name)


@pytest.mark.parametrize("name", ["auto", "cuda:3", "anything"])
def test_one_alone_takes_what_it_is_told(name, monkeypatch):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert device_of(name) == name
