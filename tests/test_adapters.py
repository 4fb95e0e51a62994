"""Networks of every parameterization as denoisers: exact formulas, the losses of the textbook loop, what is refused."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from conftest import make_network
from safetensors.torch import load_file
from tiny_runs import INFORMED
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from benchmarks.textbook import textbook_like
from fastdmd import diffusion
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.options import AdapterOptions
from fastdmd.networks.weights import save_network
from fastdmd.quality import sample
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from fastdmd.sampling import HeunSampler

PARAMETERIZATIONS = ("x0", "edm", "epsilon", "v", "flow")
SD, SIGMA_DATA = 0.7, 0.5  # of the data, and as EDM's coefficients assume it
ALPHAS_CUMPROD = diffusion.ddpm_alphas_cumprod("linear")
SHAPE = {"image_shape": (2, 4, 4), "num_classes": 0, "sigma_data": SIGMA_DATA}


class Optimal(nn.Module):
    """What the best network gives for images distributed as N(0, SD^2), from its own inputs and nothing else."""

    def __init__(self, output, sign=1.0, time_scale=1.0, to_image=False):
        super().__init__()
        self.output, self.sign, self.time_scale, self.to_image = output, sign, time_scale, to_image
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, level):
        return self.one * self.expected(x, level[:, None, None, None])

    def expected(self, x, level):
        if self.output == "x0":
            return SD**2 / (SD**2 + level**2) * x
        if self.output == "edm":  # the target of F_x is (image - c_skip x) / c_out
            sigma = (4 * level).exp()
            total = (SIGMA_DATA**2 + sigma**2).sqrt()
            image = SD**2 / (SD**2 + sigma**2) * x * total
            return (image - SIGMA_DATA**2 / total * x) * total / (sigma * SIGMA_DATA)
        if self.output == "flow":  # of x = (1 - t) image + t noise
            t = 1 - level / self.time_scale if self.to_image else level / self.time_scale
            image, noise = SD**2 * (1 - t), t  # covariances with x
            return self.sign * (noise - image) / (SD**2 * (1 - t) ** 2 + t**2) * x
        abar = ALPHAS_CUMPROD[level.round().long()]  # of x = sqrt(abar) image + sqrt(1 - abar) noise
        image, noise = abar.sqrt() * SD**2, (1 - abar).sqrt()
        variance = abar * SD**2 + 1 - abar
        if self.output == "v":
            return (abar.sqrt() * noise - (1 - abar).sqrt() * image) / variance * x
        return (noise if self.output == "epsilon" else image) / variance * x


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Optimal("x0"), {"parameterization": "x0"}),
        (Optimal("edm"), {"parameterization": "edm"}),
        (Optimal("epsilon"), {"parameterization": "epsilon"}),
        (Optimal("v"), {"parameterization": "v", "alphas_cumprod": ALPHAS_CUMPROD}),
        (Optimal("image"), {"parameterization": "x0", "noise_schedule": "linear", "timesteps": "integer"}),
        (Optimal("flow"), {"parameterization": "flow"}),
        (Optimal("flow", time_scale=1000), {"parameterization": "flow", "time_scale": 1000}),
        (Optimal("flow", sign=-1, to_image=True), {"parameterization": "flow", "velocity": "image-noise",
                                                   "time_direction": "to-image"}),
    ],
)  # fmt: skip
def test_optimal_networks_of_all_kinds_are_the_same_denoiser(network, options):
    """D_x = SD^2 / (SD^2 + sigma^2) x, exactly, at the noise levels of a schedule."""
    sigma = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).sqrt()[[0, 1, 10, 300, 700, 998, 999]]
    x = torch.randn(len(sigma), 2, 4, 4, dtype=torch.float64) * (SD**2 + sigma**2).sqrt()[:, None, None, None]
    denoiser = Adapted(network, **options, **SHAPE)
    expected = (SD**2 / (SD**2 + sigma**2))[:, None, None, None] * x
    assert_close(denoiser(x, sigma), expected, rtol=1e-9, atol=1e-9)
    assert denoiser.dynamics == ("flow" if options["parameterization"] == "flow" else "edm")


@pytest.mark.parametrize("schedule", diffusion.DDPM_SCHEDULES)
def test_timesteps_follow_the_schedule(schedule):
    """Each level's own timestep at its sigma, the geometric mean half way, the ends beyond them; ascending."""
    denoiser = Adapted(Optimal("v"), parameterization="v", noise_schedule=schedule, num_train_timesteps=50, **SHAPE)
    abar = diffusion.ddpm_alphas_cumprod(schedule, 50)
    sigmas = ((1 - abar) / abar).sqrt()
    assert_close(denoiser.timestep(sigmas), torch.arange(50.0).double(), rtol=0, atol=1e-4)
    half_way = (sigmas[1:] * sigmas[:-1]).sqrt()
    assert_close(denoiser.timestep(half_way), torch.arange(49.0).double() + 0.5, rtol=0, atol=1e-4)
    beyond = torch.stack([sigmas[0] / 100, sigmas[-1] * 100]).float()
    assert denoiser.timestep(beyond).tolist() == [0, 49]
    dense = denoiser.timestep(torch.logspace(-4, 4, 5000))
    assert (dense.diff() >= 0).all() and dense.frac().unique().numel() > 500
    rounded = Adapted(Optimal("v"), parameterization="v", noise_schedule=schedule, num_train_timesteps=50,
                      timesteps="integer", **SHAPE).timestep(half_way * 1.0001)  # fmt: skip
    assert rounded.dtype == torch.int64 and torch.equal(rounded, torch.arange(1, 50))


def test_schedules_match_their_papers():
    """Products of alpha, from betas summed up one by one."""
    for schedule, first, last, power in (("linear", 1e-4, 0.02, 1), ("scaled_linear", 0.00085, 0.012, 2)):
        product, expected = 1.0, []
        for index in range(1000):
            root = first ** (1 / power) + index / 999 * (last ** (1 / power) - first ** (1 / power))
            product *= 1 - root**power
            expected.append(product)
        assert_close(diffusion.ddpm_alphas_cumprod(schedule), torch.tensor(expected, dtype=torch.float64))
    cosine = diffusion.ddpm_alphas_cumprod("cosine")
    for index in (0, 400, 990):
        expected = math.cos(((index + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        assert cosine[index].item() == pytest.approx(expected / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rel=1e-9)
    assert cosine[999] / cosine[998] == pytest.approx(0.001)  # beta is at most 0.999
    assert torch.equal(cosine, diffusion.ddpm_alphas_cumprod("squaredcos_cap_v2"))
    assert diffusion.ddpm_alphas_cumprod("linear", 10, beta_end=0.5)[-1] < 0.1
    for arguments, options, message in (
        (("sqrt",), {}, "expected schedule out of linear, scaled_linear, cosine, squaredcos_cap_v2, got sqrt"),
        (("linear", 1), {}, "expected num_steps >= 2, got 1"),
        (("linear",), {"beta_start": 0.5}, "expected 0 < beta_start < beta_end < 1, got 0.5 and 0.02"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion.ddpm_alphas_cumprod(*arguments, **options)


class Tiny(nn.Module):
    """A network of somebody else: two convolutions, levels and one-hot labels joined between them."""

    def __init__(self, channels=1, num_classes=3):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.level, self.label = nn.Linear(1, 8), nn.Linear(max(num_classes, 1), 8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x, level, labels=None):
        h = self.conv_in(x) + self.level(level.log1p()[:, None])[:, :, None, None]
        if labels is not None:
            h = h + self.label(labels)[:, :, None, None]
        return self.conv_out(F.silu(h))


class TinyEDM(Tiny):
    """EDM's logarithms of levels, some negative."""

    def forward(self, x, level, labels=None):
        return super().forward(x, level.exp(), labels)


def tiny(parameterization, seed=0, **options):
    torch.manual_seed(seed)
    network = TinyEDM() if parameterization == "edm" else Tiny()
    shape = {"image_shape": (1, 8, 8), "num_classes": 3, "labels": "one_hot", "sigma_data": 0.5}
    return Adapted(network, parameterization=parameterization, **{**shape, **options})


CONFIG = TrainConfig(batch_size=6, dfake_gen_update_ratio=3, warmup_iterations=2, iterations=4, generator_lr=1e-3,
                     guidance_lr=2e-3, ema_decay=0.9, lr_schedule="constant")  # fmt: skip


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_real_loop_equals_textbook_loop(parameterization):
    """A full cycle and the next generator turn from the same draws: the same losses, the same weights, to rounding."""
    teacher = tiny(parameterization)
    draws = distillation.make_draws(CONFIG, teacher, torch.device("cpu"))
    ours, textbook = distillation.build(CONFIG, copy.deepcopy(teacher)), textbook_like(CONFIG, teacher)
    for step in range(CONFIG.iterations):
        metrics = ours.iterate(step, draws)
        loss_dm, loss_fake = textbook.iterate(step, draws(step))
        assert metrics.loss_fake.item() == pytest.approx(loss_fake.item(), rel=1e-4)
        assert (metrics.loss_dm is None) == (loss_dm is None) == (step % 3 != 0)
        if loss_dm is not None:
            assert metrics.loss_dm.item() == pytest.approx(loss_dm.item(), rel=1e-4, abs=1e-12)
    start = weights(teacher)
    for mine, theirs in (
        (ours.generator, textbook.generator),
        (ours.fake_score, textbook.fake_score),
        (ours.generator_optimizer.ema_network, textbook.ema),
    ):
        moved = weights(theirs) - start
        assert moved.norm() > 0
        assert ((weights(mine) - start - moved).norm() / moved.norm()).item() < 2e-3
    assert torch.equal(weights(ours.teacher), start)


def test_no_level_lies_above_the_noise_schedule(monkeypatch):
    """Training, the generator's input and the teacher's sampler stop where nobody has trained the network."""
    for schedule, expected in (("scaled_linear", 14.6), ("linear", 80.0), (None, 80.0)):
        kind = "x0" if schedule is None else "epsilon"
        teacher, seen = tiny(kind, noise_schedule=schedule), []
        config = CONFIG.for_teacher(teacher)
        assert [config.sigma_max, config.conditioning_sigma] == pytest.approx([expected] * 2, rel=2e-3)
        draws = distillation.make_draws(dataclasses.replace(CONFIG, batch_size=2000), teacher, torch.device("cpu"))(0)
        assert draws.fake_sigma.max().item() == pytest.approx(expected, rel=0.05)
        monkeypatch.setattr(teacher, "forward", lambda x, sigma, labels, seen=seen: seen.append(sigma.max()) or x)
        sample(HeunSampler(teacher, 2), torch.zeros(1, 1, 8, 8), None)
        assert max(seen).item() == pytest.approx(expected, rel=2e-3)
    assert CONFIG.for_teacher(tiny("flow")).conditioning_sigma == 1e6


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_traces_whole_and_asks_nothing_of_the_device(parameterization):
    """One graph under torch.compile; on tensors without values, a look at one would raise."""
    denoiser = tiny(parameterization)
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 50.0]), torch.tensor([0, 2, 1])
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, sigma, labels), denoiser(x, sigma, labels))
    D_x = copy.deepcopy(denoiser).to("meta")(*(tensor.to("meta") for tensor in (x, sigma, labels)))
    assert D_x.device.type == "meta" and D_x.shape == x.shape


def test_bfloat16_weights_run_under_autocast():
    """As the step trains it on a GPU: weights in bfloat16, x and the coefficients in float32."""
    denoiser = tiny("v")
    exact = denoiser(x := torch.randn(4, 1, 8, 8), sigma := torch.full((4,), 0.3), labels := torch.arange(4) % 3)
    low = copy.deepcopy(denoiser)
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    D_x = low(x, sigma, labels)
    assert D_x.dtype == torch.float32 and 0 < (D_x - exact).abs().max() < 0.02
    D_x.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in low.network.parameters())
    config = dataclasses.replace(CONFIG, precision="bf16")
    model, draws = distillation.build(config, denoiser), distillation.make_draws(config, denoiser, torch.device("cpu"))
    assert all(model.iterate(step, draws).loss_fake.isfinite() for step in range(2))


def test_labels_arrive_as_the_network_takes_them():
    seen = []

    class Recorder(nn.Conv2d):
        def forward(self, x, level, *labels):
            seen.append(labels)
            return super().forward(x)

    def call(class_labels, **options):
        denoiser = Adapted(Recorder(1, 1, 1), parameterization="x0", image_shape=(1, 4, 4), **options)
        denoiser(torch.zeros(2, 1, 4, 4), torch.ones(2), class_labels)
        return seen.pop()

    numbers, one_hot = torch.tensor([2, 0]), torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    for labels in (numbers, one_hot):
        assert torch.equal(call(labels, num_classes=3)[0], numbers)
        assert torch.equal(call(labels, num_classes=3, labels="one_hot")[0], one_hot)
        assert call(labels, labels="none") == call(labels, num_classes=0) == ()
    with pytest.raises(ValueError, match="expected class_labels for 3 classes, got None"):
        call(None, num_classes=3)


def test_attributes_fill_in_what_is_not_said():
    edm_like, ours = Tiny(), Tiny()
    edm_like.img_channels, edm_like.img_resolution, edm_like.label_dim, edm_like.sigma_data = 1, 8, 3, 0.4
    ours.image_shape, ours.num_classes, ours.dynamics = (1, 8, 8), 3, "flow"
    adapted = Adapted(edm_like, parameterization="edm")
    assert (adapted.image_shape, adapted.num_classes, adapted.sigma_data) == ((1, 8, 8), 3, 0.4)
    assert adapted.interface.labels == "one_hot" and adapted.dynamics == "edm"
    adapted = Adapted(ours, parameterization="x0")
    assert adapted.interface.labels == "int" and adapted.sigma_data == 0.5 and adapted.dynamics == "flow"
    assert Adapted(ours, parameterization="x0", num_classes=0, sigma_data=2).describe() == {
        "source": "test_adapters:Tiny",
        "options": {"parameterization": "x0", "image_shape": (1, 8, 8), "num_classes": 0, "labels": "none",
                    "sigma_data": 2.0},
    }  # fmt: skip
    described = tiny("epsilon", noise_schedule="scaled_linear").describe()["options"]
    assert described["beta_start"] == 0.00085 and described["num_train_timesteps"] == 1000


ALWAYS = {"parameterization", "image_shape", "num_classes", "labels", "sigma_data"}
NAMED = {"noise_schedule", "num_train_timesteps", "timesteps"}


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({"parameterization": "x0"}, set()),
        ({"parameterization": "x0", "noise_schedule": "cosine"}, NAMED),
        ({"parameterization": "edm"}, set()),
        ({"parameterization": "epsilon", "num_train_timesteps": 7}, NAMED | {"beta_start", "beta_end"}),
        ({"parameterization": "v", "alphas_cumprod": [0.9, 0.5, 0.1]}, {"alphas_cumprod", "timesteps"}),
        ({"parameterization": "flow"}, {"velocity", "time_scale", "time_direction"}),
    ],
)
def test_an_interface_leaves_nothing_open_and_is_made_again_from_what_a_file_holds(options, stated):
    network = Adapted(Tiny(), **options, **SHAPE)
    values = {field.name: getattr(network.interface, field.name) for field in dataclasses.fields(network.interface)}
    assert None not in values.values() and None not in network.interface.stated.values()
    assert network.interface.stated.keys() == ALWAYS | stated
    kept = json.loads(json.dumps(network.describe()))["options"]
    assert AdapterOptions(**kept).resolve(nn.Identity()) == network.interface
    length = {"x0": 1000 if stated else 0, "epsilon": 7, "v": 3}.get(options["parameterization"], 0)
    assert len(network.interface.alphas_cumprod) == len(network.ln_sigmas) == length
    assert network.sigma_max == (network.ln_sigmas[-1].exp().item() if length else math.inf)


def test_networks_say_of_themselves_what_others_need(tmp_path):
    """Ours and anybody's: description, tensors, layout, and whether code that is not ours runs in it."""
    ours = make_network().to(memory_format=torch.contiguous_format)
    assert ours.describe() == dataclasses.asdict(ours.config) and ours.inner is ours
    assert ours.foreign_name == "" and ours.is_one_graph and ours.parameterization == "edm"
    assert ours.in_best_layout() is ours
    assert ours.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    theirs = Adapted(Tiny(), parameterization="v", **SHAPE)
    weight = theirs.network.conv_in.weight
    assert theirs.inner is theirs.network and theirs.foreign_name == "Tiny" and not theirs.is_one_graph
    assert theirs.in_best_layout() is theirs and theirs.network.conv_in.weight.stride() == weight.stride()
    for network in (ours, theirs):
        save_network(tmp_path / "w.safetensors", network, kind="teacher")
        assert load_file(tmp_path / "w.safetensors").keys() == network.inner.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected --parameterization out of x0, edm, epsilon, v, flow, got None"),
        ({"parameterization": "score"}, "expected --parameterization out of .*, got score"),
        ({"parameterization": "v", "image_shape": None}, "expected --image-shape for a network without .* image_shape"),
        ({"parameterization": "v", "image_shape": (3, 8)}, r"expected --image-shape C H W, got \(3, 8\)"),
        ({"parameterization": "v", "num_classes": None}, "expected --num-classes for a network without .* num_classes"),
        ({"parameterization": "edm", "sigma_data": None}, "expected --teacher-sigma-data for a network without"),
        ({"parameterization": "edm", "sigma_data": -1.0}, "expected --teacher-sigma-data > 0 and finite, got -1.0"),
        ({"parameterization": "v", "num_classes": 3, "labels": "none"}, "--num-classes > 0 with .* 3 and none"),
        ({"parameterization": "v", "labels": "int"}, "expected --num-classes > 0 with .* got 0 and int"),
        ({"parameterization": "v", "velocity": "noise-image"}, "expected no --velocity with --noise-schedule linear"),
        ({"parameterization": "flow", "noise_schedule": "cosine"}, "no --noise-schedule with --parameterization flow"),
        ({"parameterization": "flow", "time_scale": 0.0}, "expected --time-scale > 0 and finite, got 0.0"),
        ({"parameterization": "x0", "beta_end": 0.1}, "expected no --beta-end with --parameterization x0 and no noise"),
        ({"parameterization": "v", "noise_schedule": "cosine", "beta_end": 0.1}, "no --beta-end with --noise-schedule"),
        ({"parameterization": "edm", "num_train_timesteps": 9}, "expected no --schedule-timesteps with"),
        ({"parameterization": "v", "noise_schedule": "linear", "alphas_cumprod": (0.9, 0.1)},
         "expected no --noise-schedule with alphas_cumprod, got linear"),
        ({"parameterization": "v", "alphas_cumprod": (0.9, 0.95)}, "expected alphas_cumprod that fall, .* 0.9 to 0.95"),
        ({"parameterization": "v", "alphas_cumprod": (1.0, 0.5)}, "expected alphas_cumprod that fall"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^fastdmd.Adapted: .*{message}"):
        Adapted(Tiny(), **{**SHAPE, **options})
    assert AdapterOptions(**options).given().keys() == {name for name, value in options.items() if value is not None}


def test_outputs_that_cannot_be_are_refused():
    class Giving(nn.Linear):
        def forward(self, x, level):
            return self.gives(x)

    network = Giving(1, 1)
    denoiser = Adapted(network, parameterization="v", image_shape=(3, 4, 4), num_classes=0)
    x, sigma = torch.zeros(2, 3, 4, 4), torch.ones(2)
    for gives, got in (
        (lambda x: x[:, :1], r"\(2, 1, 4, 4\) of torch.float32"),  # would broadcast
        (lambda x: x.long(), r"\(2, 3, 4, 4\) of torch.int64"),
        (lambda x: (x,), "a tuple"),
    ):
        network.gives = gives
        with pytest.raises(ValueError, match=rf"to give a floating point tensor of shape \(2, 3, 4, 4\), got {got}"):
            denoiser(x, sigma)
    network.gives = lambda x: type("Output", (), {"sample": x + 1})()
    assert denoiser(x, sigma).abs().sum() > 0
    with pytest.raises(ValueError, match="expected a network with parameters, got a Identity without"):
        Adapted(nn.Identity(), parameterization="v", **SHAPE)


def test_what_is_fixed_stays_fixed_and_slices_become_tensors():
    """Parameters held fixed beside trained ones do not move in a distillation; tied ones stay tied."""
    network = Tiny()
    network.frequencies = nn.Parameter(torch.ones(8), requires_grad=False)
    network.level.weight = nn.Parameter(torch.randn(8, 6)[:, 2:3])  # strides (6, 1): not a tensor of its own
    network.label.bias = network.level.bias
    names = set(network.state_dict())
    teacher = Adapted(network, parameterization="flow", **INFORMED)
    assert set(network.state_dict()) == names and "frequencies" in dict(network.named_buffers())
    assert set(teacher.state_dict()) == {f"network.{name}" for name in names}
    draws = distillation.make_draws(CONFIG, teacher, torch.device("cpu"))
    ours, textbook = distillation.build(CONFIG, copy.deepcopy(teacher)), textbook_like(CONFIG, teacher)
    for step in range(2):
        ours.iterate(step, draws), textbook.iterate(step, draws(step))
    moved = weights(textbook.generator) - weights(teacher)
    assert ((weights(ours.generator) - weights(textbook.generator)).norm() / moved.norm()).item() < 2e-3
    generator = ours.generator_optimizer.ema_network.network
    assert generator.frequencies.eq(1).all() and not generator.level.weight.eq(network.level.weight).any()
    assert generator.label.bias is generator.level.bias
