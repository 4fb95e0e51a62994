"""AdamWEMA against torch's own AdamW, clipping and averaging, and inside the textbook loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks import textbook
from benchmarks.textbook import TextbookDMD2
from fastdmd import ops
from fastdmd.distill.draws import draw, materialised
from fastdmd.distill.starts import map_tensors
from fastdmd.networks.unet import UNetConfig
from fastdmd.networks.unet_blocks import Conv3x3, GroupNorm, GroupNormSiLU
from fastdmd.optim.adamw_ema import EMA_WARMUP, AdamWEMA
from fastdmd.sampling import Generator
from tests.helpers.networks import make_network

SHAPES = [(), (1,), (7,), (17,), (3, 5), (1, 4), (4, 3, 3, 3), (5, 1, 3, 3), (6, 4, 1, 1), (0, 3)]
LAYOUTS = {
    "contiguous": lambda p: p,
    "channels_last": lambda p: p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p,
    "transposed": lambda p: p.mT.contiguous().mT if p.dim() >= 2 else p,
    "slice": lambda p: torch.stack([p, p + 1], dim=-1)[..., 0],  # strides that skip the other one
}
TOLERANCES = {torch.float64: dict(rtol=1e-10, atol=1e-12), torch.float32: dict(rtol=2e-5, atol=2e-6)}


class Parts(nn.Module):
    """Parameters p0, p1, ... of any shape and layout, the first of them tied, and a loss that pulls at all."""

    def __init__(self, parts, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, (shape, layout, frozen) in enumerate(parts):
            value = LAYOUTS[layout](torch.randn(shape, dtype=dtype, generator=generator))
            self.register_parameter(f"p{index}", nn.Parameter(value, requires_grad=not frozen))
        self.tied = self.p0

    def loss(self, step, scale):
        generator = torch.Generator().manual_seed(step + 1)
        terms = []
        for parameter in self.parameters():
            pull = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            terms.append((scale * pull * parameter + 0.5 * parameter.square()).sum())
        return torch.stack(terms).sum() + self.tied.sum()


def take_gradient(route, optimizer, network, loss):
    """What a user may do before `step`."""
    if route == "backward":
        optimizer.backward(loss(1.0))
    elif route == "accumulate":
        optimizer.backward(loss(0.5))
        optimizer.backward(loss(1.5), accumulate=True)
    elif route == "zero_grad":
        optimizer.zero_grad()
        loss(1.0).backward()
    elif route == "module's zero_grad, then accumulate":
        network.zero_grad()
        optimizer.backward(loss(1.0), accumulate=True)
    elif route == "zeros":
        optimizer.zero_grad(set_to_none=False)
        loss(1.0).backward()
    else:
        loss(1.0).backward(create_graph=route == "create_graph")


ROUTES = [
    "backward",
    "accumulate",
    "zero_grad",
    "module's zero_grad, then accumulate",
    "zeros",
    "create_graph",
    "nothing to clear",
]
CONFIGURATIONS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(TOLERANCES)),
        "parts": st.lists(
            st.tuples(st.sampled_from(SHAPES), st.sampled_from(list(LAYOUTS)), st.booleans()), min_size=1, max_size=5
        ).map(lambda parts: [(*parts[0][:2], False), *parts[1:]]),
        "learning_rate": st.sampled_from([0.0, 1e-4, 1e-2, 0.3]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.0, 0.0), (0.5, 0.9), (0.99, 0.95)]),
        "eps": st.sampled_from([1e-8, 1e-6, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.7]),
        "max_grad_norm": st.sampled_from([float("inf"), 1e-3, 1.0, 5.0, 1e6]),
        "ema_decay": st.sampled_from([None, 0.0, 0.3, 0.95, 1.0]),
        "warmup_steps": st.sampled_from([0, 1, 3]),
        "decay_steps": st.sampled_from([None, 1, 4, 9]),
        "groups": st.sampled_from([None, {"0": {"weight_decay": 0.2}}, {"0": {"learning_rate_factor": 0.1}, "": {}}]),
        "route": st.sampled_from(ROUTES),
    }
)


@pytest.mark.filterwarnings("ignore:Using backward")  # with create_graph=True, on purpose
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(CONFIGURATIONS)
def test_any_configuration_is_torch_adamw(configuration):
    options = dict(configuration)
    dtype, parts, route = options.pop("dtype"), options.pop("parts"), options.pop("route")
    if options["groups"] is not None and "" in options["groups"] and all(frozen for *_, frozen in parts[1:]):
        options["groups"] = {"0": options["groups"]["0"]}  # nothing is left for the second group
    network = Parts(parts, dtype)
    theirs = copy.deepcopy(network)
    ours = AdamWEMA(network, **options)

    trained = [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]
    changes = (options["groups"] or {}).get("0", {})
    factors = [changes.get("learning_rate_factor", 1.0) if "0" in name else 1.0 for name, _ in trained]
    decays = [
        changes.get("weight_decay", options["weight_decay"]) if "0" in name else options["weight_decay"]
        for name, _ in trained
    ]
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay} for (_, p), decay in zip(trained, decays, strict=True)],
        lr=options["learning_rate"],
        betas=options["betas"],
        eps=options["eps"],
        foreach=False,
    )
    average = [p.detach().clone() for _, p in trained]
    for step in range(5):
        take_gradient(route, ours, network, lambda scale, step=step: network.loss(step, scale))
        norm = ours.step()
        adamw.zero_grad()
        scales = (0.5, 1.5) if route == "accumulate" else (1.0,)
        torch.stack([theirs.loss(step, scale) for scale in scales]).sum().backward()
        expected_norm = nn.utils.clip_grad_norm_([p for _, p in trained], options["max_grad_norm"])
        for group, factor in zip(adamw.param_groups, factors, strict=True):
            group["lr"] = ours.learning_rate(step) * factor
        adamw.step()
        if options["ema_decay"] is not None:
            decay = min(options["ema_decay"], (step + 1) / (step + 1 + EMA_WARMUP))
            for mean, (_, p) in zip(average, trained, strict=True):
                mean.lerp_(p.detach(), 1 - decay)
        torch.testing.assert_close(norm, expected_norm, **TOLERANCES[dtype])
    for name, expected in theirs.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), expected, **TOLERANCES[dtype])
    if options["ema_decay"] is not None:
        for (name, _), expected in zip(trained, average, strict=True):
            torch.testing.assert_close(ours.ema_network.get_parameter(name).data, expected, **TOLERANCES[dtype])


# The textbook loop, with one part of ours at a time.

TINY = UNetConfig(
    image_size=8, num_classes=3, model_channels=8, channel_multipliers=(1,), num_blocks=1, attention_resolutions=()
)
OPTIONS = dict(
    generator_lr=1e-3,
    guidance_lr=2e-3,
    weight_decay=0.02,
    max_grad_norm=0.5,
    warmup_steps=3,
    guidance_warmup_steps=7,
    ema_decay=0.9,
    dfake_gen_update_ratio=3,
)
RATES = OPTIONS["generator_lr"], OPTIONS["guidance_lr"]
NETWORK_OPS = {"group_norm_silu": GroupNormSiLU, "group_norm": GroupNorm, "conv3x3": Conv3x3}


class WithOurLosses(TextbookDMD2):
    """The textbook's iteration again, with `part` (add_noise, dm_loss, fake_loss) computed by ours."""

    part = None

    def noised(self, x, sigma, noise):
        return (
            ops.add_noise(x, sigma, noise=noise) if self.part == "add_noise" else x + sigma[:, None, None, None] * noise
        )

    def iterate(self, step, draws):
        x_gen = Generator(self.generator, (80.0,))(draws.noise, draws.class_labels)
        loss_dm = None
        if step % self.ratio == 0:
            with torch.no_grad():
                x_t = self.noised(x_gen, draws.dm_sigma, draws.dm_noise)
                D_real, D_fake = (D(x_t, draws.dm_sigma, draws.class_labels) for D in (self.teacher, self.fake_score))
                weight = (x_gen - D_real).abs().mean(dim=(1, 2, 3), keepdim=True)
                target = x_gen - (D_fake - D_real) / weight
            if self.part == "dm_loss":
                loss_dm = ops.dm_loss(x_gen, D_real, D_fake)
            else:
                loss_dm = 0.5 * F.mse_loss(x_gen, target)
            loss_dm.backward()
            self._update(0, self.generator, self.generator_optimizer)
            decay = min(self.ema_decay, self.num_updates[0] / (self.num_updates[0] + 10))
            for average, value in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                average.data.lerp_(value.data, 1 - decay)
        x_gen = x_gen.detach()
        D_fake = self.fake_score(
            self.noised(x_gen, draws.fake_sigma, draws.fake_noise), draws.fake_sigma, draws.class_labels
        )
        if self.part == "fake_loss":
            loss_fake = ops.fake_loss(D_fake, x_gen, draws.fake_sigma, sigma_data=0.5)
        else:
            weight = draws.fake_sigma**-2 + 0.5**-2
            loss_fake = (weight[:, None, None, None] * (D_fake - x_gen).square()).mean()
        loss_fake.backward()
        self._update(1, self.fake_score, self.guidance_optimizer)
        return loss_dm, loss_fake


def drop_in(model, **options):
    """AdamWEMA in the place of AdamW: the loop clips, sets `lr` in `param_groups`, clears and averages itself."""
    networks = model.generator, model.fake_score
    model.generator_optimizer, model.guidance_optimizer = (
        AdamWEMA(network, learning_rate=rate, weight_decay=OPTIONS["weight_decay"], **options)
        for network, rate in zip(networks, RATES, strict=True)
    )
    return model


def whole(model):
    """AdamWEMA does all of it: warm-up, clipping, averaging."""
    model = drop_in(model, max_grad_norm=OPTIONS["max_grad_norm"], ema_decay=OPTIONS["ema_decay"])
    model.max_grad_norm, model.warmup_steps = float("inf"), (0, 0)
    for optimizer, name in (
        (model.generator_optimizer, "warmup_steps"),
        (model.guidance_optimizer, "guidance_warmup_steps"),
    ):
        optimizer.warmup_steps = OPTIONS[name]
    return model


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(model):
    """Losses and final weights of 50 iterations."""
    sigmas, losses = textbook.karras_schedule().double(), []
    for step in range(50):
        draws = materialised(draw((2, 1, 8, 8), 3, sigmas, 20, 980, seed=0, step=step))
        draws = map_tensors(lambda x: x.double() if x.is_floating_point() else x, draws)
        losses += [loss.detach() for loss in model.iterate(step, draws) if loss is not None]
    networks = [model.generator, model.fake_score, model.ema]
    if getattr(model.generator_optimizer, "ema_network", None) is not None:
        networks[2] = model.generator_optimizer.ema_network
    return torch.stack(losses), [torch.cat([p.detach().flatten() for p in n.parameters()]) for n in networks]


def test_textbook_loop_with_one_part_of_ours_at_a_time(float64, monkeypatch):
    teacher = make_network(TINY).double()
    expected_losses, expected_weights = run(TextbookDMD2(teacher, **OPTIONS))
    start = torch.cat([p.flatten() for p in teacher.parameters()])
    assert all((weights - start).abs().max() > 1e-3 for weights in expected_weights)
    models = {part: WithOurLosses(teacher, **OPTIONS) for part in ("add_noise", "dm_loss", "fake_loss")}
    for part, model in models.items():
        model.part = part
    for part, kind in NETWORK_OPS.items():
        with monkeypatch.context() as patch:
            patch.setattr(textbook, "PLAIN", {key: value for key, value in textbook.PLAIN.items() if key is not kind})
            models[part] = TextbookDMD2(teacher, **OPTIONS)
            assert any(type(module) is kind for module in models[part].generator.modules())
    models["AdamWEMA as AdamW"] = drop_in(TextbookDMD2(teacher, **OPTIONS))
    models["AdamWEMA"] = whole(TextbookDMD2(teacher, **OPTIONS))
    for part, model in models.items():
        losses, weights = run(model)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=0, msg=lambda m, part=part: f"{part}: {m}")
        for got, expected in zip(weights, expected_weights, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10, msg=lambda m, part=part: f"{part}: {m}")
