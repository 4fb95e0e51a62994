"""What becomes of an accelerated module: copied, pickled, compiled, moved, undone; and what is not let through."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdmd
from fastdmd import ops
from fastdmd.networks.accelerate.layers import Conv3x3, GroupNorm
from tests.helpers.accelerated import AdaptiveBlock, TimesBlock, WrongGradient, assert_same, sequential
from tests.networks.test_accelerate import accelerated

IMAGES = torch.randn(2, 3, 8, 8)
X, EMBEDDING = torch.randn(2, 16, 8, 8), torch.randn(2, 8)


def times_block():
    return TimesBlock(lambda channels: nn.GroupNorm(4, channels))


def test_a_copy_is_one_of_its_own():
    module, original, _ = accelerated(times_block(), X, EMBEDDING)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin.norm0) is GroupNorm and isinstance(twin, TimesBlock) and type(twin).__name__ == "TimesBlock"
        assert_same(twin, original, X, EMBEDDING)
        with mock.patch.object(ops, "group_norm_silu", side_effect=ops.group_norm_silu) as op:
            twin(X, EMBEDDING).sum().backward()
        assert op.call_count == 2 and all(p.grad is not None for p in twin.parameters())
        assert all(p.grad is None for p in module.parameters())
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(twin(X, EMBEDDING), X)
        assert_same(module, original, X, EMBEDDING)
        fastdmd.unaccelerate(twin)
        assert type(twin) is TimesBlock and type(twin.norm0) is nn.GroupNorm


def test_its_state_has_the_names_it_had():
    module, original, _ = accelerated(sequential(), IMAGES)
    assert list(module.state_dict()) == list(original.state_dict())
    other = sequential().state_dict()
    module.load_state_dict(other), original.load_state_dict(other)
    assert_same(module, original, IMAGES)
    assert all(torch.equal(value, other[name]) for name, value in module.state_dict().items())


def test_undone_it_is_as_it_was():
    for make, inputs in ((sequential, (IMAGES,)), (times_block, (X, EMBEDDING)), (AdaptiveBlock, (X, EMBEDDING))):
        module, original, _ = accelerated(make(), *inputs)
        fastdmd.unaccelerate(module)
        parts, before = dict(module.named_modules()), dict(original.named_modules())
        assert [type(part) for part in parts.values()] == [type(part) for part in before.values()]
        assert [vars(part).keys() for part in parts.values()] == [vars(part).keys() for part in before.values()]
        assert all(tensor.is_contiguous() for tensor in module.parameters())
        assert torch.equal(module.eval()(*inputs), original.eval()(*inputs))
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    fastdmd.unaccelerate(module)
    assert not module.weight.is_contiguous()  # was not accelerated


def test_a_second_time_comes_to_the_same():
    module, original, first = accelerated(times_block(), X, EMBEDDING)
    assert fastdmd.accelerate(module, X, EMBEDDING) == first and first.fused == {"norms with SiLU": 2}
    assert_same(module, original, X, EMBEDDING)


def test_it_compiles_whole():
    inputs = X, EMBEDDING
    module, original, _ = accelerated(times_block(), *inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), original(*inputs), rtol=1e-4, atol=1e-5)
    compiled(*inputs).sum().backward(), original(*inputs).sum().backward()
    for mine, theirs in zip(module.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_in_other_dtypes():
    module, original, _ = accelerated(times_block(), X, EMBEDDING)
    module, original = module.bfloat16(), original.bfloat16()
    assert_same(module, original, X.bfloat16(), EMBEDDING.bfloat16())
    module, original, report = accelerated(original.train(), X.bfloat16(), EMBEDDING.bfloat16())
    assert report.fused == {"norms with SiLU": 2} and not report.reasons and module.training
    assert_same(module, original, X.bfloat16(), EMBEDDING.bfloat16())


def test_under_autocast():
    module, original, _ = accelerated(times_block(), X, EMBEDDING)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = module(X, EMBEDDING), original(X, EMBEDDING)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.03, atol=0.03)


def test_torch_func_takes_it():
    """Which knows no custom ops: PyTorch's own layers are there for it."""
    module, original, _ = accelerated(sequential(), IMAGES)

    def total(network):
        return lambda x: network(x[None]).square().sum()

    found, expected = (torch.func.vmap(torch.func.grad(total(network)))(IMAGES) for network in (module, original))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_else_changes():
    module = nn.Sequential(*sequential(), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    module[0].weight.requires_grad_(False)
    module[1].eval()
    module(IMAGES).sum().backward()
    before, grads = copy.deepcopy(module), {name: p.grad.clone() for name, p in module[1:].named_parameters()}
    inputs, state = IMAGES.clone(), torch.get_rng_state()
    fastdmd.accelerate(module, inputs)
    assert torch.equal(inputs, IMAGES) and not inputs.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module.modules()] == [part.training for part in before.modules()]
    for (name, mine), (_, theirs) in zip(module.named_parameters(), before.named_parameters(), strict=True):
        assert mine.requires_grad == theirs.requires_grad and torch.equal(mine, theirs), name
    assert len(grads) > 4 and all(torch.equal(p.grad, grads[name]) for name, p in module[1:].named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), before.buffers(), strict=True))


class Wrong:
    """An op that computes something else for so many channels."""

    def __init__(self, op, num_channels):
        self.op, self.num_channels = op, num_channels

    def __call__(self, x, *arguments, **options):
        y = self.op(x, *arguments, **options)
        return y + 1e-2 * y.roll(1, dims=1) if x.shape[1] == self.num_channels else y


@pytest.mark.parametrize("name", ["conv3x3", "group_norm_silu", "group_norm"])
def test_what_comes_out_wrong_stays_torchs(name, monkeypatch):
    """The one module, with a reason; all others are ours."""
    widths = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 32, 3, padding=1)),
        nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 48, 3, padding=1)),
        nn.GroupNorm(4, 48),
        nn.Conv2d(48, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.Conv2d(32, 3, 3, padding=1),
    )
    bad = {"conv3x3": 48, "group_norm_silu": 32, "group_norm": 48}[name]
    monkeypatch.setattr(ops, name, Wrong(getattr(ops, name), bad))
    module, original, report = accelerated(widths, IMAGES)
    place = {"conv3x3": "4", "group_norm_silu": "2", "group_norm": "3"}[name]
    assert list(report.reasons) == [place]
    assert "came to differ by" in report.reasons[place] and f"; {place}: its " in str(report)
    assert report.convolutions == ((4, 5) if name == "conv3x3" else (5, 5))
    assert report.norms == ((3, 4) if name == "group_norm" else (4, 4))
    assert report.fused == {"norms with SiLU": 1 if name == "group_norm_silu" else 2}
    assert_same(module, original, IMAGES)


def test_a_wrong_gradient_alone_is_seen(monkeypatch):
    own = ops.group_norm_silu
    monkeypatch.setattr(
        ops, "group_norm_silu", lambda x, *rest, **options: own(WrongGradient.apply(x, 1.01), *rest, **options)
    )
    module, original, report = accelerated(sequential(), IMAGES)
    assert report.fused == {} and "its gradient of " in report.reasons["itself"]
    assert_same(module, original, IMAGES)


class Flattened(nn.Module):
    """Takes pixels in the order of memory, which is another in channels_last."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 3)

    def forward(self, x):
        return self.linear(self.conv(x).view(x.shape[0], -1))


def test_a_network_that_wants_its_layout_keeps_it():
    module, original, report = accelerated(Flattened(), IMAGES)
    assert not report.is_channels_last and type(module.conv) is Conv3x3 and module.conv.weight.is_contiguous()
    assert list(report.reasons) == ["channels_last"] and "view" in report.reasons["channels_last"]
    assert_same(module, original, IMAGES)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 3, 3, padding=1), 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x) * self.calls


def test_mistakes():
    for call, message in (
        (lambda: fastdmd.accelerate(sequential()), "expected example inputs of the Sequential, got none"),
        (lambda: fastdmd.accelerate(sequential().to("meta"), IMAGES), "expected weights with values, got some on the"),
        (lambda: fastdmd.accelerate(Noisy(), IMAGES), "expected the same a second time, got other numbers: its output"),
        (lambda: fastdmd.accelerate(sequential(), IMAGES[:, :2]), "expected input.* to have 3 channels"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
    module = Noisy()
    with pytest.raises(ValueError, match="second time"):
        fastdmd.accelerate(module, IMAGES)
    assert type(module) is Noisy and type(module.conv) is nn.Conv2d and module.conv.weight.is_contiguous()


class Final(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 3, padding=1)

    def __init_subclass__(cls):
        raise TypeError("no subclasses")

    def forward(self, x):
        return self.conv(F.silu(self.norm(x)))


def test_what_ends_midway_changes_nothing(monkeypatch):
    modules = Final(), sequential()
    originals = copy.deepcopy(modules)
    with pytest.raises(TypeError, match="no subclasses"):
        fastdmd.accelerate(modules[0], IMAGES)
    monkeypatch.setattr(ops, "group_norm_silu", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fastdmd.accelerate(modules[1], IMAGES)
    for module, original in zip(modules, originals, strict=True):
        assert [type(part) for part in module.modules()] == [type(part) for part in original.modules()]
        assert torch.equal(module(IMAGES), original(IMAGES)) and all(p.requires_grad for p in module.parameters())


def test_features_of_a_network_beside_its_forward():
    """What is called apart from the forward that was run, as the encoder of an adversarial term."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = sequential(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.head(F.silu(self.body(x)))

        def features(self, x):
            return self.body[:4](x)

    module, original, _ = accelerated(Network(), IMAGES)
    torch.testing.assert_close(module.features(IMAGES), original.features(IMAGES), rtol=1e-4, atol=1e-5)
