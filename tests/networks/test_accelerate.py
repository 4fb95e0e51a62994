"""What `accelerate` makes of networks of others: the same numbers, by our ops."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdmd
from benchmarks.foreign_unet import ForeignUNet
from fastdmd.networks.accelerate import attention
from fastdmd.networks.accelerate.layers import Conv3x3, GroupNorm
from tests.helpers.accelerated import (
    AdaptiveBlock,
    GroupNorm32,
    Norm,
    Swish,
    TimesBlock,
    assert_same,
    sequential,
)

X, EMBEDDING = torch.randn(2, 16, 8, 8), torch.randn(2, 8)


def accelerated(module, *inputs):
    """The module, a copy from before, and what was done."""
    torch.manual_seed(0)
    original = copy.deepcopy(module)
    return module, original, fastdmd.accelerate(module, *inputs)


def fused(report):
    return dict(report.fused)


def test_a_network_of_a_sequence():
    x = torch.randn(2, 3, 8, 8)
    module, original, report = accelerated(sequential(), x)
    assert (report.norms, report.convolutions) == ((2, 2), (3, 3))
    assert fused(report) == {"norms with SiLU": 2} and report.is_channels_last and not report.reasons
    assert str(report) == (
        "accelerated 5 of 5 modules (GroupNorms 2 of 2, 3x3 convolutions 3 of 3, norms with SiLU 2, channels_last)"
    )
    assert_same(module, original, x)
    assert_same(module, original, torch.randn(5, 3, 12, 6))  # nothing of sizes is baked in
    assert_same(module.double(), original.double(), torch.randn(1, 3, 4, 4).double())


def test_a_textbook_unet():
    network = ForeignUNet(channels=(16, 32, 32), image_shape=(1, 12, 12))
    inputs = torch.randn(2, 1, 12, 12), torch.tensor([3.0, 500.0]), torch.tensor([1, 2])
    module, original, report = accelerated(network, *inputs)
    assert (report.norms, report.convolutions) == ((18, 18), (18, 18))
    assert fused(report) == {"norms with SiLU": 17, "attentions": 1} and not report.reasons
    assert_same(module, original, *inputs)
    others = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 5.0, 900.0]), torch.tensor([0, 9, 4])
    assert_same(module, original, *others)
    assert_same(module, original, *others[:2])  # called in another way, without labels


def test_a_network_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="the extra fastdmd[diffusers] is not installed")
    for kind, num_norms in (("default", 21), ("scale_shift", 20)):
        network = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            resnet_time_scale_shift=kind,
        )
        inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
        module, original, report = accelerated(network, *inputs)
        assert (report.norms, report.convolutions) == ((num_norms, num_norms), (19, 19))
        # Norm and SiLU at its end are apart: its forward asks what a timestep is. Norms of attention have no SiLU.
        assert fused(report) == {"norms with SiLU": 16, "attentions": 4} and list(report.reasons) == ["conv_norm_out"]
        assert_same(module.eval(), original.eval(), *inputs)


@pytest.mark.parametrize("block", [AdaptiveBlock, TimesBlock])
@pytest.mark.parametrize("norm", [Norm, lambda channels: nn.GroupNorm(4, channels)])
def test_adaptive_norms(block, norm):
    """With PyTorch's GroupNorm, and with somebody's own."""
    module, original, report = accelerated(block(norm), X, EMBEDDING)
    assert fused(report)["norms with SiLU"] == 2 and not report.reasons
    assert_same(module.eval(), original.eval(), X, EMBEDDING)
    with counted("group_norm_silu") as calls:
        module(X, EMBEDDING)
    assert calls == [False, True]  # whether with scale and shift


@contextlib.contextmanager
def counted(name):
    """Notes the calls of an op: whether each has a scale."""
    calls, own = [], getattr(fastdmd.ops, name)

    def note(*arguments, **options):
        calls.append("scale" in options)
        return own(*arguments, **options)

    with mock.patch.object(fastdmd.ops, name, note):
        yield calls


def test_scale_and_shift_of_other_shapes_stay_with_torch():
    """Of a table that is not `[B, C, 1, 1]`, as that of every pixel."""
    block = TimesBlock(lambda channels: nn.GroupNorm(4, channels))
    module, original, report = accelerated(block, X, EMBEDDING)
    assert fused(report) == {"norms with SiLU": 2}
    assert_same(module, original, X, EMBEDDING[:1])  # one row for all images


def test_a_dropout_of_a_function_is_drawn_in_training_alone():
    module, original, _ = accelerated(AdaptiveBlock(), X, EMBEDDING)
    fastdmd.unaccelerate(module)  # contiguous, as dropout draws in the order of memory
    fastdmd.accelerate(module, X, EMBEDDING)
    for tensor in module.parameters():
        tensor.data = tensor.data.contiguous()
    assert_same(module.train(), original.train(), X, EMBEDDING)
    assert (module(X, EMBEDDING) == module(X, EMBEDDING)).float().mean() < 0.9
    assert torch.equal(module.eval()(X, EMBEDDING), module(X, EMBEDDING))


@pytest.mark.parametrize("activation", [nn.SiLU, Swish, lambda: nn.SiLU(inplace=True)])
@pytest.mark.parametrize("norm", [nn.GroupNorm, GroupNorm32])
def test_norms_and_activations_of_all_kinds(norm, activation):
    x = torch.randn(2, 3, 8, 8)
    module, original, report = accelerated(sequential(norm=norm, activation=activation), x)
    assert report.norms == (2, 2) and report.fused["norms with SiLU"] == 2
    assert_same(module, original, x)


class Attention(nn.Module):
    """Of heads, written in one of many ways."""

    def __init__(self, way):
        super().__init__()
        self.qkv, self.way, self.softmax = nn.Conv2d(16, 48, 1), way, nn.Softmax(dim=-1)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(x).reshape(B, 3 * C, H * W).chunk(3, dim=1)  # [B, C, N]
        return getattr(self, self.way)(q, k, v, C).reshape(B, C, H, W)

    def bmm(self, q, k, v, C):
        weights = torch.bmm(q.permute(0, 2, 1), k) * C ** (-0.5)
        return torch.bmm(v, F.softmax(weights, dim=2).permute(0, 2, 1))

    def einsum(self, q, k, v, C):
        scale = 1 / C**0.25
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        return torch.einsum("bts,bcs->bct", weights, v)

    def keys_first(self, q, k, v, C):
        weights = torch.einsum("bck,bcq->bqk", k, q).div(C**0.5).softmax(dim=2)
        return torch.einsum("nqk,nck->ncq", weights, v)

    def heads(self, q, k, v, C):
        q, k, v = (x.reshape(x.shape[0], 4, C // 4, -1).transpose(-2, -1) for x in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(dim=-1)
        return (weights @ v).transpose(-2, -1).flatten(1, 2)

    def torchs(self, q, k, v, C):
        q, k, v = (x.reshape(x.shape[0], 4, C // 4, -1).mT for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)

    def torchs_by_names(self, q, k, v, C):
        q, k, v = (x.reshape(x.shape[0], 4, C // 4, -1).mT for x in (q, k, v))
        options = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": 0.3}
        return F.scaled_dot_product_attention(value=v, query=q, key=k, **options).mT.flatten(1, 2)

    def torchs_without_heads(self, q, k, v, C):
        return F.scaled_dot_product_attention(q.mT, k.mT, v.mT, None, 0.0, False).mT

    def by_a_module(self, q, k, v, C):
        return torch.bmm(v, self.softmax(torch.bmm(q.mT, k) / 4).transpose(1, 2))


WAYS = "bmm", "einsum", "keys_first", "heads", "torchs", "torchs_by_names", "torchs_without_heads", "by_a_module"


@pytest.mark.parametrize("way", WAYS)
def test_attention_written_out(way):
    for size in (6, 18):  # by products, and by scaled_dot_product_attention
        x = torch.randn(2, 16, size, size)
        module, original, report = accelerated(Attention(way), x)
        assert fused(report) == {"attentions": 1}
        assert_same(module, original, x)
    module.softmax.dim = original.softmax.dim = 1
    assert_same(module, original, x) if way == "by_a_module" else None


@pytest.fixture
def by_torch(monkeypatch):
    """Shapes of what comes to PyTorch's attention."""
    called, own = [], F.scaled_dot_product_attention

    def note(q, *arguments, **options):
        called.append(q.shape)
        return own(q, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    return called


def test_many_scores_are_not_kept(by_torch, monkeypatch):
    """Of 4 heads and 36 pixels, as products would for the gradient."""
    q = torch.randn(2, 4, 36, 4)
    for limit in (q[..., 0].numel() * 36, q[..., 0].numel() * 36 - 1):
        monkeypatch.setattr(attention, "MAX_SCORES", limit)
        attention.scaled_dot_product(q, q, q)
    assert by_torch == [q.shape]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_as_precise_as_pytorchs(dtype, by_torch):
    """Great ones too, that float16 cannot hold; and the result lies in memory as PyTorch's does."""
    q, k, v = (torch.randn(2, 64, 4, 8).transpose(1, 2) for _ in range(3))
    q, k, v = (t.to(dtype) for t in (300 * q, 300 * k, v))
    found = attention.scaled_dot_product(q, k, v)
    assert by_torch == []
    torchs = F.scaled_dot_product_attention(q, k, v)
    assert found.dtype == torchs.dtype and found.stride() == torchs.stride()
    expected = torch.softmax(q.double() * 8**-0.5 @ k.double().mT, dim=-1) @ v.double()
    errors = [(y - expected).abs().max() for y in (found, torchs)]
    assert errors[0] <= 2 * errors[1] + 1e-12


class NotAttention(Attention):
    def over_queries(self, q, k, v, C):
        return torch.bmm(v, torch.bmm(q.mT, k).softmax(dim=1).mT)

    def over_queries_from_behind(self, q, k, v, C):
        return torch.matmul(v, torch.matmul(q.mT, k).softmax(dim=-2).mT)

    def over_heads(self, q, k, v, C):
        q, k, v = (x.reshape(x.shape[0], 4, C // 4, -1).transpose(-2, -1) for x in (q, k, v))
        return ((q @ k.mT).softmax(dim=1) @ v).transpose(-2, -1).flatten(1, 2)

    def over_queries_of_heads(self, q, k, v, C):
        q, k, v = (x.reshape(x.shape[0], 4, C // 4, -1).transpose(-2, -1) for x in (q, k, v))
        return ((q @ k.mT).softmax(dim=2) @ v).transpose(-2, -1).flatten(1, 2)

    def masked(self, q, k, v, C):
        weights = torch.bmm(q.mT, k).tril().softmax(dim=-1)
        return torch.bmm(v, weights.transpose(1, 2))

    def causal(self, q, k, v, C):
        return F.scaled_dot_product_attention(q.mT, k.mT, v.mT, is_causal=True).mT

    def torchs_masked(self, q, k, v, C):
        return F.scaled_dot_product_attention(q.mT, k.mT, v.mT, torch.bmm(q.mT, k)).mT

    def dropped_out(self, q, k, v, C):
        return F.scaled_dot_product_attention(q.mT, k.mT, v.mT, None, 1e-9).mT

    def seen(self, q, k, v, C):
        weights = torch.bmm(q.mT, k).softmax(dim=-1)
        return torch.bmm(v, weights.transpose(1, 2)) + weights.sum()

    def other_product(self, q, k, v, C):
        return torch.bmm(v, torch.bmm(q.mT, k).softmax(dim=-1))

    def changed(self, q, k, v, C):
        weights = torch.bmm(q.mT, k * 1)
        k = k + 0
        k += 1
        return torch.bmm(v + 0 * k, weights.softmax(dim=-1).mT)


@pytest.mark.parametrize(
    "way",
    [
        "over_queries",
        "over_queries_from_behind",
        "over_heads",
        "over_queries_of_heads",
        "masked",
        "causal",
        "torchs_masked",
        "dropped_out",
        "seen",
        "other_product",
        "changed",
    ],
)
def test_what_is_no_attention_stays(way):
    x = torch.randn(2, 16, 6, 6)
    module, original, report = accelerated(NotAttention(way), x)
    assert fused(report) == {}
    assert_same(module, original, x)


def test_what_is_exactly_torchs_own_is_swapped_and_nothing_else():
    class Subclass(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    module = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        Subclass(4, 4, 3, padding=1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.GroupNorm(2, 4, affine=False),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
    )
    x = torch.randn(2, 4, 6, 6)
    module, original, report = accelerated(module, x)
    assert [type(part) in (Conv3x3, GroupNorm) for part in module] == [True, *[False] * 5, True, True, True]
    assert report.convolutions == (4, 5) and report.norms == (1, 1)  # the subclass calls a function, which is ours now
    assert report.reasons == {"2": "it is a ParametrizedConv2d"}
    assert_same(module, original, x)
