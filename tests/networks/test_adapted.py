"""Networks of somebody else as denoisers: the losses of the textbook loop, labels and attributes, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from benchmarks.textbook import textbook_like
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.options import AdapterOptions
from fastdmd.quality import sample
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from fastdmd.sampling import HeunSampler
from tests.helpers.tiny_runs import INFORMED

PARAMETERIZATIONS = ("x0", "edm", "epsilon", "v", "flow")
SHAPE = {"image_shape": (2, 4, 4), "num_classes": 0, "sigma_data": 0.5}


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


CONFIG = TrainConfig().replace(
    batch_size=6,
    dfake_gen_update_ratio=3,
    warmup_iterations=2,
    iterations=4,
    generator_lr=1e-3,
    fake_score_lr=2e-3,
    ema_decay=0.9,
    lr_schedule="constant",
)


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
        assert metrics["loss_fake"].item() == pytest.approx(loss_fake.item(), rel=1e-4)
        assert ("loss_dm" not in metrics) == (loss_dm is None) == (step % 3 != 0)
        if loss_dm is not None:
            assert metrics["loss_dm"].item() == pytest.approx(loss_dm.item(), rel=1e-4, abs=1e-12)
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
        assert [config.noise.sigma_max, config.noise.conditioning_sigma] == pytest.approx([expected] * 2, rel=2e-3)
        draws = distillation.make_draws(CONFIG.replace(batch_size=2000), teacher, torch.device("cpu"))(0)
        assert draws.fake_sigma.max().item() == pytest.approx(expected, rel=0.05)
        monkeypatch.setattr(teacher, "forward", lambda x, sigma, labels, seen=seen: seen.append(sigma.max()) or x)
        sample(HeunSampler(teacher, 2), torch.zeros(1, 1, 8, 8), None)
        assert max(seen).item() == pytest.approx(expected, rel=2e-3)
    assert CONFIG.for_teacher(tiny("flow")).noise.conditioning_sigma == 1e6


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
    config = CONFIG.replace(precision="bf16")
    model, draws = distillation.build(config, denoiser), distillation.make_draws(config, denoiser, torch.device("cpu"))
    assert all(model.iterate(step, draws)["loss_fake"].isfinite() for step in range(2))


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
        "source": f"{__name__}:Tiny",
        "options": {
            "parameterization": "x0",
            "image_shape": (1, 8, 8),
            "num_classes": 0,
            "labels": "none",
            "sigma_data": 2.0,
        },
    }
    described = tiny("epsilon", noise_schedule="scaled_linear").describe()["options"]
    assert described["beta_start"] == 0.00085 and described["num_train_timesteps"] == 1000


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
        (
            {"parameterization": "v", "noise_schedule": "linear", "alphas_cumprod": (0.9, 0.1)},
            "expected no --noise-schedule with alphas_cumprod, got linear",
        ),
        ({"parameterization": "v", "alphas_cumprod": (0.9, 0.95)}, "expected alphas_cumprod that fall, .* 0.9 to 0.95"),
        ({"parameterization": "v", "alphas_cumprod": (1.0, 0.5)}, "expected alphas_cumprod that fall"),
    ],
)
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


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_what_was_pickled_with_options_in_place_of_the_interface(parameterization):
    """As earlier versions wrote networks whole: options resolved, and None where there is no noise schedule."""
    today = tiny(parameterization)
    state = {k: v for k, v in vars(today).items() if k not in ("interface", "is_scaled", "foreign_name")}
    state["options"] = AdapterOptions(**today.interface.stated)
    if parameterization not in ("epsilon", "v"):
        state["_buffers"] = {"ln_sigmas": None}
    former = Adapted.__new__(Adapted)
    former.__setstate__(copy.deepcopy(state))
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0])
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(former(x, sigma, labels), today(x, sigma, labels))
    assert former.describe() == today.describe() and not hasattr(former, "options")
    assert (former.foreign_name, former.is_scaled) == (today.foreign_name, today.is_scaled)
    assert copy.deepcopy(former).interface == today.interface
