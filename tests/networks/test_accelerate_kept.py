"""Forwards that put what they compute somewhere, or ask for torch's modes: no graph would, so they stay their own."""

import types
from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdmd
from tests.helpers.accelerated import assert_same
from tests.networks.test_accelerate import accelerated
from tests.networks.test_accelerate_traces import Block

X = torch.randn(2, 16, 8, 8)
KEPT, TAPS, PLACE = [], {}, types.SimpleNamespace()
num_calls = 0


class Keeping(Block):
    def __init__(self, way):
        super().__init__(way)
        self.maps, self.cache = [], {"maps": []}

    def in_a_list(self, x):
        KEPT.append(F.silu(self.norm(x)))
        return KEPT[-1]

    def in_a_dictionary(self, x):
        TAPS["h"] = F.silu(self.norm(x))
        return TAPS["h"]

    def in_an_object(self, x):
        PLACE.last = F.silu(self.norm(x))
        return PLACE.last

    def in_an_attribute(self, x):
        self.maps.append(F.silu(self.norm(x)))
        return self.maps[-1]

    def in_an_attribute_of_an_attribute(self, x):
        self.cache["maps"].append(F.silu(self.norm(x)))
        return self.cache["maps"][-1]

    def a_number(self, x):
        global num_calls
        num_calls += 1
        return F.silu(self.norm(x))

    def a_number_around_it(self, x):
        count = 0

        def counted(y):
            nonlocal count
            count += 1
            return F.silu(y)

        return counted(self.norm(x))

    def recomputed_with_gradients(self, x):
        if torch.is_grad_enabled():
            return checkpoint(lambda y: F.silu(self.norm(y)), x, use_reentrant=False)
        return F.silu(self.norm(x))

    def in_full_precision_under_autocast(self, x):
        return F.silu(self.norm(x)) if torch.is_autocast_enabled("cpu") else F.silu(self.norm(x)) * 1.0

    def unless_in_inference(self, x):
        return F.silu(self.norm(x)) if torch.is_inference_mode_enabled() else F.silu(self.norm(x)) * 1.0


KEEPS = "it keeps something of what it computes"


@pytest.mark.parametrize(
    ("way", "reason"),
    {
        "in_a_list": KEEPS,
        "in_a_dictionary": KEEPS,
        "in_an_object": KEEPS,
        "in_an_attribute": KEEPS,
        "in_an_attribute_of_an_attribute": KEEPS,
        "a_number": "it calls a_number, which sets a variable outside",
        "a_number_around_it": "it calls counted, which sets a variable outside",
        "recomputed_with_gradients": "it calls is_grad_enabled",
        "in_full_precision_under_autocast": "it calls is_autocast_enabled",
        "unless_in_inference": "it calls is_inference_mode_enabled",
    }.items(),
)
def test_it_stays(way, reason):
    with torch.no_grad():  # as a teacher is loaded
        module, original, report = accelerated(Keeping(way), X)
    assert reason in report.reasons["norm"] and report.fused == {}
    assert (report.norms, report.convolutions) == ((1, 1), (1, 1))
    for part in (module, original):  # of which no copy could be made
        part.maps.clear(), part.cache["maps"].clear()
    assert_same(module, original, X)


def test_what_it_keeps_are_tensors():
    """Also in the module itself, after a trace that came to nothing."""
    for way in ("in_a_list", "in_a_dictionary", "in_an_object", "in_an_attribute"):
        KEPT.clear()
        module, _, _ = accelerated(Keeping(way), X)
        assert not any(isinstance(kept, fx.Proxy) for kept in module.maps)
        KEPT.clear()
        module.maps.clear()
        output = module(X)
        kept = {"in_a_list": KEPT, "in_a_dictionary": [TAPS["h"]] if TAPS else [], "in_an_attribute": module.maps}
        found = kept.get(way, [getattr(PLACE, "last", None)])
        assert len(found) == 1 and isinstance(found[0], torch.Tensor) and output.shape == X.shape


def test_what_was_recomputed_still_is():
    """Memory would grow where nobody sees it."""
    with torch.no_grad():
        module, *_ = accelerated(Keeping("recomputed_with_gradients"), X)
    num_forwards = []
    module.norm.register_forward_hook(lambda *_: num_forwards.append(1))
    module(X.clone().requires_grad_()).sum().backward()
    assert len(num_forwards) == 2


class Blocks(nn.Module):
    """A list that a trace unrolls, a dictionary, and a module that is gone through."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)])
        self.named = nn.ModuleDict({"first": nn.Conv2d(16, 16, 1)})
        self.head = nn.Module()
        self.head.norm, self.head.extra = nn.GroupNorm(4, 16), nn.ModuleList()

    def forward(self, x):
        for block in (*self.blocks, *self.named.values()):
            x = block(x)
        x = F.silu(self.head.norm(x))
        for extra in self.head.extra:
            x = extra(x)
        return x


def lengthened(module, name):
    torch.manual_seed(1)
    added = nn.Conv2d(16, 16, 3, padding=1)
    if name == "blocks":
        module.blocks.append(added)
    elif name == "another list":
        module.blocks = nn.ModuleList([*module.blocks, added])
    elif name == "shorter":
        del module.blocks[1]
    elif name == "named":
        module.named["second"] = added
    else:
        module.head.extra.append(added)


@pytest.mark.parametrize("name", ["blocks", "another list", "shorter", "named", "extra"])
def test_lists_that_have_another_length_later(name):
    module, original, report = accelerated(Blocks(), X)
    assert report.fused == {"norms with SiLU": 1}
    before = module(X)
    lengthened(module, name), lengthened(original, name)
    assert_same(module, original, X)
    assert not torch.allclose(module(X), before)


def test_what_is_removed_from_what_it_keeps_are_stand_ins_alone():
    """Of lists and dictionaries of anybody's, whatever else they hold; and what counts in the module is as it was."""
    KEPT[:], TAPS["other"] = ["mine"], 1
    for way in ("in_a_list", "in_a_dictionary", "in_an_object"):
        with torch.no_grad():
            accelerated(Keeping(way), X)
    assert KEPT[0] == "mine" and TAPS["other"] == 1
    assert not any(isinstance(kept, fx.Proxy) for kept in (*KEPT, *TAPS.values(), *vars(PLACE).values()))
    KEPT.clear()


class Counting(Block):
    def __init__(self):
        super().__init__("counted")
        self.calls = Counter()

    def counted(self, x):
        self.calls["all"] += 1
        return F.silu(self.norm(x))


def test_what_a_module_counts_is_as_it_was():
    module = Counting()
    report = fastdmd.accelerate(module, X)
    assert report.fused == {} and KEEPS in report.reasons["norm"]
    assert {*module.calls} == {"all"} and type(module.calls["all"]) is int
    before = module.calls["all"]
    module(X)
    assert module.calls == Counter(all=before + 1)


def test_what_shards_and_wrappers_note_on_modules_ends_no_rewrite():
    module, original, report = accelerated(Block("plain"), X)
    assert report.fused == {"norms with SiLU": 1}
    module._is_fsdp_managed_module = module._fsdp_use_orig_params = True
    module._ddp_params_and_buffers_to_ignore = set()
    assert module._fastdmd_rewrites is not None
    assert_same(module, original, X)
