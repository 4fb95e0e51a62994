"""The accounts of a turn as a GPU computes them: compiled, here for a CPU."""

import copy
import math

import pytest
import torch

from fastdmd.distill.execution import Compiler, Executor
from fastdmd.distill.guard import Guard, marks
from fastdmd.distill.statistics import TURN_STATISTICS, ClassSums, comparison, turn_statistics
from fastdmd.distill.tally import Tally
from tests.distill.test_captured_turns import PLAIN, iterate, make

CPU = torch.device("cpu")
TURNS = {  # what is wrong with it
    "good": {},
    "generated image": {"x_gen": math.nan},
    "teacher's output": {"D_real": math.inf},
    "loss_dm": {"loss": -math.inf},
    "norm": {"norm": math.nan},
    "many left out": {"left_out": 0.5},
    "good again": {},
}


class Accounts:
    def __init__(self, stops):
        self.guard = Guard(CPU, stops=stops)
        self.tally = Tally(("loss_dm", "norm"), CPU, TURN_STATISTICS, self.guard)
        self.class_sums = ClassSums((1, 8, 8), 3, CPU)

    def take(self, x_gen, D_real, D_fake, sigma, labels, loss, norm, left_out):
        seen = marks(None, x_gen, D_real, D_fake)
        permitted = self.tally.permits([loss], seen, left_out)
        statistics = turn_statistics(x_gen, [comparison(x_gen, D_real, D_fake, sigma)])
        self.tally.add(loss, norm, seen=seen, left_out=left_out, statistics=statistics)
        self.class_sums.add(x_gen, labels)
        return permitted, self.guard.is_halted.clone(), seen

    def state(self):
        return {**self.tally.state_dict(), **self.class_sums.state_dict(), "latest": self.tally.latest}


def inputs(index, **wrong):
    torch.manual_seed(index)
    images = {name: torch.randn(6, 1, 8, 8) for name in ("x_gen", "D_real", "D_fake")}
    scalars = {name: torch.tensor(index + 1.0) for name in ("loss", "norm")}
    found = {**images, "sigma": torch.rand(6) * 9, "labels": torch.arange(6) % 3, **scalars}
    found["left_out"] = torch.tensor(0.25)
    for name, value in wrong.items():
        found[name].view(-1)[-1] = value
    return found


@pytest.mark.parametrize("stops", [False, True])
def test_compiled_accounts_find_what_is_not_finite(stops):
    compiler, eager, compiled = Compiler(None), Accounts(stops), Accounts(stops)
    told, places = [], [value.data_ptr() for value in compiled.state().values()]  # a graph writes there again
    for index, wrong in enumerate(TURNS.values()):
        eager.guard.begin(index)
        compiled.guard.begin(index)
        expected = eager.take(**inputs(index, **wrong))
        with torch.compiler.set_stance("fail_on_recompile" if index > 1 else "default"):  # as where a graph is captured
            found = compiler.fused(Accounts.take, compiled, **inputs(index, **wrong))
        for one, other in ((found, expected), (compiled.state(), eager.state())):
            torch.testing.assert_close(one, other, equal_nan=True)
        told.append(tuple(answer.item() for answer in found[:2]))
    never_halted = [(True, False), (False, False), (True, False), (False, False), (True, False), (False, False)]
    assert told == ([(True, False)] + 6 * [(False, True)] if stops else [*never_halted, (True, False)])
    assert [value.data_ptr() for value in compiled.state().values()] == places
    assert str(compiled.tally.fault()) == "NaN or infinity in generated image, iteration 2"


@pytest.mark.parametrize("changes", [{}, {"gan_features": None, "accumulation_steps": 2, "ratio": 1}], ids=str)
def test_turns_are_traced_once_and_account_as_eager_ones(changes, traced, monkeypatch):
    """What a GPU would be given, with nothing left to compile from where a graph would be captured; kernels aside."""
    monkeypatch.setattr(Executor, "_fuses", property(lambda executor: executor.name == "compiled"))
    ratio = {"dfake_gen_update_ratio": changes.get("ratio", 2)}
    plain = PLAIN if "gan_features" in changes else {}
    changes = {**plain, **ratio, **{name: value for name, value in changes.items() if name != "ratio"}}
    told = []
    for execution in ("eager", "compiled"):
        model, draws = make(execution, **changes)
        scalars = iterate(model, draws, range(4))
        with torch.compiler.set_stance("fail_on_recompile"):
            scalars += iterate(model, draws, range(4, 8))
        tallies = [tally.state_dict() for tally in (model.generator_tally, model.guidance_tally)]
        told.append((scalars, tallies, model.class_sums.state_dict()))
        assert bool(model.executor._compiler._fused) == (execution == "compiled")
    torch.testing.assert_close(told[1], told[0], rtol=1e-4, atol=1e-5)


def test_what_is_fused_is_kept_by_function_and_shapes(traced):
    assert torch.equal(Executor("compiled", CPU).fused(torch.add, torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))
    assert traced() == 0  # a CPU computes it as it is
    compiler = Compiler(None)
    for _ in range(2):
        for size in range(1, 11):  # where one function may have eight
            assert torch.equal(compiler.fused(torch.mul, torch.ones(size), torch.ones(())), torch.ones(size))
        assert traced() == 10
    copied = copy.deepcopy(compiler)
    assert len(compiler._fused) == 10 and copied._fused == {}
    assert copied.fused(marks, None, torch.ones(3)).tolist() == [0, 0] and traced() == 11
