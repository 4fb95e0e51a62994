"""Networks that give more than a tensor: all tensors in it are compared before and after."""

import re
import types

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastdmd.networks.accelerate.acceleration import accelerate
from fastdmd.networks.accelerate.trial import Trial

FORMS = {
    "a tuple": lambda image, h: (image, h),
    "a list in a mapping": lambda image, h: {"all": [image, h], "count": 2},
    "an object": lambda image, h: types.SimpleNamespace(sample=image, hidden=h),
}


class Giving(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.leave = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        h = nn.functional.silu(self.norm(self.enter(x)))
        return self.form(self.leave(h), h)


@pytest.mark.parametrize("name", FORMS)
def test_all_that_it_gives_stays(name):
    torch.manual_seed(0)
    module, x = Giving(FORMS[name]), torch.randn(2, 3, 8, 8)
    h = nn.functional.silu(module.norm(module.enter(x)))
    image = module.leave(h)
    done = accelerate(module, x)
    assert done.norms == (1, 1) and done.convolutions == (2, 2)
    given = module(x)
    tensors = given if isinstance(given, tuple) else given["all"] if isinstance(given, dict) else vars(given).values()
    assert_close(list(tensors), [image, h], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("now", "fault"),
    [
        (lambda image, h: (image, h[:, :4]), r"its output.1 became \(2, 4, 8, 8\) of torch.float32"),
        (lambda image, h: (image,), "its output.1 became none"),
        (lambda image, h: (image, 2 * h), r"its output.1 came to differ by 1.0e\+00 of its norm"),
        (lambda image, h: (image, h, h.detach()), "there is another output.2 now"),
        (lambda image, h: (image, 1 / None), "TypeError: unsupported operand .*"),
        (lambda image, h: (image, h), "None"),
    ],
)
def test_what_becomes_another_is_named(now, fault):
    torch.manual_seed(0)
    module = Giving(FORMS["a tuple"])
    trial = Trial(module, (torch.randn(2, 3, 8, 8),))
    assert trial.unsteady is None
    module.form = now
    assert re.fullmatch(fault, str(trial.fault()))
