"""What of a turn is recorded and replayed, and what is not: of small functions."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fastdmd import ops
from fastdmd.distill.recording import NUM_WARMUP_CALLS, RecordedTurn, Recording, program


class Static:
    """Something that a turn writes to."""

    def __init__(self):
        self.x, self.out = torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3)
        self.weight = nn.Parameter(torch.ones(3))
        self.num_runs = 0


def turn_of(body):
    static, turn = Static(), RecordedTurn()

    def run():
        static.num_runs += 1
        body(static)

    return static, lambda fixed=None: turn(run, fixed), turn


def backward(static):
    loss = (static.x * static.weight).sigmoid().square().sum()
    (grad,) = torch.autograd.grad(loss, static.weight)
    static.out.copy_(grad.expand(2, 3) + static.x[:, 1:2])


def test_a_replay_computes_from_what_buffers_hold_now():
    static, call, turn = turn_of(backward)
    for count in range(8):
        static.x.add_(1)
        static.weight.data.mul_(0.9)
        static.out.zero_()
        call()
        got = static.out.clone()
        backward(static)
        assert torch.equal(got, static.out) and got.abs().sum() > 0
        assert turn.is_captured == (count > NUM_WARMUP_CALLS)
    assert static.num_runs == NUM_WARMUP_CALLS + 2


def test_it_begins_anew_where_something_else_is_fixed():
    rate = [2.0]
    static, call, turn = turn_of(lambda static: static.out.copy_(rate[0] * static.x))
    for rate[0] in (2.0, 3.0, 2.0):
        for _ in range(6):
            call(fixed=rate[0])
            assert torch.equal(static.out, rate[0] * static.x)
        assert turn.is_captured
    assert static.num_runs == 3 * (NUM_WARMUP_CALLS + 2)


def counted(static):
    static.out.copy_(static.x * static.num_runs)


def by_a_value(static):
    if static.x.sum().item() > 0:
        static.out.copy_(static.x)


def by_a_mask(static):
    static.out[0, 0] = static.x[static.x > 1].sum()


def growing(static):
    for _ in range(static.num_runs):
        static.out.add_(static.x)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda static: static.out.copy_(torch.rand(2, 3)), "aten.rand.default draws random numbers of torch's"),
        (lambda static: static.out.copy_(nn.functional.dropout(static.x)), "draws random numbers"),
        (by_a_value, "aten._local_scalar_dense.default tells Python a value"),
        (by_a_mask, "aten.index.Tensor has a shape that depends on values"),
        (
            lambda static: static.out.add_(len(torch.nonzero(static.x))),
            "aten.nonzero.default has a shape that depends on",
        ),
        (counted, "aten.mul.Tensor at one call, aten.mul.Tensor at the next, or with other arguments"),
        (growing, "3 operations at one call, 4 at the next"),
        (lambda static: static.out.add_(torch.tensor(2.0)), "that no operation has made, another one at the next call"),
        (
            lambda static: static.out.add_(torch.from_numpy(static.x.numpy() * 2)),
            r"a tensor \(2, 3\) that no operation has",
        ),
        (lambda static: static.x.t_().t_(), "aten.t_.default changes the shape of a tensor"),
    ],
)
def test_what_would_not_be_the_same_runs_as_it_is(body, reason):
    static, call, turn = turn_of(body)
    for _ in range(8):
        call()
    with pytest.raises(AssertionError, match=reason):
        assert turn.reason is None, turn.reason
    assert not turn.is_captured and static.num_runs == 8


def test_an_error_in_a_turn_is_an_error_and_the_next_calls_go_on():
    fails = [False]

    def body(static):
        backward(static)
        if fails[0]:
            raise RuntimeError("out of memory")

    for at in range(6):
        static, call, turn = turn_of(body)
        for count in range(8):
            fails[0] = count == at
            if count == at and not turn.is_captured:
                with pytest.raises(RuntimeError, match="out of memory"):
                    call()
            else:
                call()
            backward_of = static.out.clone()
            backward(static)
            assert torch.equal(backward_of, static.out)
        assert turn.is_captured


def test_a_recording_holds_nothing_but_what_stays():
    static, made = Static(), []

    def body():
        large = static.x * 2
        made.append(weakref.ref(large))
        static.out.copy_(large.sigmoid())

    with Recording() as recording:
        body()
    replay = program(recording)
    gc.collect()
    assert made[0]() is None
    assert {id(tensor) for tensor in recording.constants} == {id(static.x), id(static.out)}
    static.x.neg_()
    replay()
    assert torch.equal(static.out, (static.x * 2).sigmoid())


def test_views_of_buffers_are_made_once_and_needless_work_is_left_out():
    static = Static()

    def body():
        (static.x * 5).sum()
        half = static.x.view(3, 2)[1:].detach()
        static.out.view(3, 2)[1:].add_(half.exp().detach())

    with Recording() as recording:
        body()
    names = [call.op.name() for call in recording.calls]
    assert names == ["aten::mul.Tensor", "aten::sum", "aten::exp", "aten::detach", "aten::add_.Tensor"]
    static.out.zero_()
    with Recording() as again:
        program(recording)()
    assert [call.op.name() for call in again.calls] == ["aten::exp", "aten::add_.Tensor"]
    assert torch.equal(static.out.view(3, 2)[1:], static.x.view(3, 2)[1:].exp())


def test_the_backend_is_that_of_the_recording():
    static = Static()
    static.x, static.out = torch.randn(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)
    parameters = torch.ones(4), torch.zeros(4)

    def body():
        static.out.copy_(ops.group_norm_silu(static.x, *parameters, num_groups=2))

    with ops.use_backend("reference"), Recording() as recording:
        body()
    replay = program(recording)
    replay()
    with ops.use_backend("reference"):
        expected = ops.group_norm_silu(static.x, *parameters, num_groups=2)
    assert torch.equal(static.out, expected)
