"""The model of what several GPUs gain, and what the commands beside it are told."""

import dataclasses

import pytest

from benchmarks import scaling

COSTS = scaling.Costs(
    parameters=1e8,
    forward_flops=1e11,
    ratio=4,
    rate=1e14,
    bandwidth=1e11,
    latency=1e-5,
    optimizer=2e-3,
    gradient_bytes=2,
)


def test_the_model_is_its_formulas():
    assert COSTS.updates == 1.25 and COSTS.image == pytest.approx(5e-3)
    assert COSTS.exchanged_bytes(1) == 0 and COSTS.exchange(1) == 0
    assert COSTS.exchanged_bytes(4) == pytest.approx(2 * 3 / 4 * 1e8 * 2 * 1.25)
    assert COSTS.exchange(4) == pytest.approx(3.75e8 / 1e11 + 6 * 1e-5 * 1.25)
    assert COSTS.iteration(4, 100) == pytest.approx(25 * 5e-3 + 1.25 * 2e-3 + COSTS.exchange(4))
    batch = COSTS.half_batch(8)
    assert COSTS.iteration(8, batch) == pytest.approx(2 * COSTS.fixed(8))
    slow = dataclasses.replace(COSTS, latency=1e-3)
    most = slow.most_gpus(400)
    times = [slow.iteration(num_gpus, 400) for num_gpus in range(1, 200)]
    assert 2 < most < 100 and abs(times.index(min(times)) + 1 - most) <= 1


def test_the_command_says_that_it_is_a_model(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling", "--batch", "64", "--ratio", "2"])
    scaling.main()
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("a model, not a measurement: batch 64") and len(rows) == 10
    monkeypatch.setattr("sys.argv", ["scaling", "--latency-us", "0"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "expected --latency-us above 0, got 0" in capsys.readouterr().err
