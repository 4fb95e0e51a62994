"""The loops of bench_step: each makes its cycles, and what ours tells about itself adds up."""

import argparse

import pytest

from benchmarks import loops
from fastdmd.networks.accelerate.layers import Conv3x3, GroupNorm
from tests.helpers import foreign

ARGUMENTS = argparse.Namespace(
    preset="mnist", device="cpu", batch_size=2, ratio=2, precision="fp32", execution="eager", compile_mode="default"
)


@pytest.mark.parametrize("name", ["textbook", "compiled", "fastdmd"])
def test_a_cycle(name, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function, **_: function)  # minutes
    loop = loops.make(name, ARGUMENTS)
    assert loop.cycle() > 0 and loop.step == 2 and loop.peak_bytes() > 2**20


def test_a_network_of_somebody_else(monkeypatch):
    """Ours with and without acceleration, and a textbook's loop, on one network."""
    monkeypatch.setitem(loops.FOREIGN, "foreign", foreign.textbook)
    arguments = argparse.Namespace(**{**vars(ARGUMENTS), "preset": "foreign"})
    for name, num_ours in (("textbook", 0), ("unaccelerated", 0), ("fastdmd", 36)):
        loop = loops.make(name, arguments)
        assert loop.cycle() > 0 and loop.step == 2
        for network in (loop.model.teacher, loop.model.generator, loop.model.fake_score):
            assert sum(isinstance(part, (Conv3x3, GroupNorm)) for part in network.modules()) == num_ours


def test_the_parts_of_a_cycle_are_its_whole():
    loop = loops.make("fastdmd", ARGUMENTS)
    facts = loop.facts()
    assert (facts["execution"], facts["compute_dtype"], facts["launches_per_turn"]) == ("eager", "torch.float32", None)
    parts = facts["seconds_by_part"]
    assert set(parts) == {"x_gen", "teacher", "fake forward", "backward", "optimizer", "rest"}
    assert all(seconds > 0 for seconds in parts.values())
    assert any("conv" in name for name in facts["seconds_by_op"])
    model = loop.model  # and nothing is left under a clock
    for owner in (model.generator, model.teacher, model.fake_score, model.generator_optimizer):
        assert not {"forward", "backward", "update"} & vars(owner).keys()


def test_the_floor_is_what_the_cycle_computes():
    floor = loops.make("floor", ARGUMENTS)
    facts = floor.facts()
    # Of 2 images: x_gen of both iterations and two forwards of the teacher and the fake score and a backward in the
    # generator turn, and in each of two guidance turns a forward and a backward; a backward is two forwards.
    assert floor.cycle() > 0 and facts["flops"] == pytest.approx(2 * 12 * 0.26e9, rel=0.1)
    assert facts["matmul_peak"] > 1e8
