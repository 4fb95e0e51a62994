"""How a method is put together: a new one from one place, the terms beside it, and DMD's regression."""

import copy
import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from torch.testing import assert_close

from fastdmd.data.pairs import Pairs
from fastdmd.diffusion import DenoisingNetwork, karras_sigmas
from fastdmd.distill import budget, methods
from fastdmd.distill.draws import Draws, draw, materialised
from fastdmd.distill.gan import AdversarialDraws, GANSettings
from fastdmd.distill.matching import DistributionMatching, ScoreIdentity
from fastdmd.distill.method_settings import MethodSettings
from fastdmd.distill.methods import Adversarial, Matched, Regressed
from fastdmd.distill.regression import PAIRED, AdversarialPairDraws, PairDraws, regression_loss
from fastdmd.distill.turns import DMD2
from fastdmd.runs import distillation
from fastdmd.sampling import Generator
from tests.helpers.adversarial import CONFIG as ADVERSARIAL
from tests.helpers.adversarial import TINY, real_images
from tests.helpers.networks import make_network

CPU = torch.device("cpu")
OFF = {"gan": GANSettings()}
CONFIG = ADVERSARIAL.replace(**OFF)
WITH_PAIRS = {"regression_weight": 0.25, "pairs": "somewhere"}


@pytest.fixture
def teacher():
    return make_network(TINY)


def random_pairs(num=11, num_classes=3):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(num, 1, 8, 8, generator=generator)
    return Pairs(noise, 0.7 + 0.1 * noise, torch.arange(num) % num_classes if num_classes else None)


def make(teacher, config=CONFIG, **changes):
    config = config.replace(**changes)
    draws = distillation.make_draws(config, teacher, CPU, real_images(), random_pairs())
    return distillation.build(config, copy.deepcopy(teacher)), draws


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@dataclasses.dataclass(frozen=True)
class ToTheTeacher:
    """A toy: the mean squared distance of an image to what the teacher makes of it."""

    scalar = "loss_toy"

    def __call__(self, x_gen, draws, *, teacher, fake_score):
        draws = materialised(draws)
        with torch.no_grad():
            D_real = teacher(
                x_gen + draws.dm_sigma.view(-1, 1, 1, 1) * draws.dm_noise, draws.dm_sigma, draws.class_labels
            )
        return (x_gen - D_real).square().mean(), x_gen.new_zeros(())


@pytest.mark.parametrize("beside", ["nothing", "an adversarial term", "a regression", "both"])
def test_a_method_is_added_in_one_place(teacher, beside, monkeypatch):
    """Settings that name it run it, with whatever stands beside."""
    monkeypatch.setitem(methods.MATCHINGS, "toy", lambda settings: ToTheTeacher())
    changes = {"method": "toy", "divergence": "reverse-kl"}
    if beside in ("a regression", "both"):
        changes |= WITH_PAIRS
    model, draws = make(teacher, ADVERSARIAL if beside in ("an adversarial term", "both") else CONFIG, **changes)
    metrics = [model.iterate(step, draws) for step in range(3)][-1]
    assert metrics["loss_toy"] > 0 and metrics["generator_grad_norm"] > 0
    assert ("loss_gan_generator" in metrics) == ("an adversarial term" in beside or beside == "both")
    assert ("loss_regression" in metrics) == (beside in ("a regression", "both"))
    assert not torch.equal(weights(model.generator), weights(teacher))


def test_settings_name_the_methods_that_there_are():
    (name,) = (hint for hint in get_type_hints(MethodSettings).items() if hint[0] == "name")
    assert get_args(name[1]) == tuple(methods.MATCHINGS)


def test_what_settings_make(teacher):
    """The parts of each, and the random inputs that they ask for."""
    cases = [
        (CONFIG, Matched(0.5, DistributionMatching()), Draws),
        (CONFIG.replace(method="sid", sid_alpha=1.2), Matched(0.5, ScoreIdentity(1.2)), Draws),
        (CONFIG.replace(**WITH_PAIRS), Regressed(Matched(0.5, DistributionMatching()), 0.25), PairDraws),
    ]
    for config, expected, kind in cases:
        model, draws = make(teacher, config)
        assert model.method == expected and model.method.draws is type(draws(0)) is kind
    for changes, kind in (({}, AdversarialDraws), (WITH_PAIRS, AdversarialPairDraws)):
        model, draws = make(teacher, ADVERSARIAL, method="sid", divergence="reverse-kl", **changes)
        found = model.method.method if changes else model.method
        assert type(found) is Adversarial and found.matching == ScoreIdentity()
        assert model.head_optimizer.network is model.method.head is found.head
        assert model.method.draws is type(draws(0)) is kind


@pytest.mark.parametrize("config", [CONFIG, ADVERSARIAL], ids=["alone", "with an adversarial term"])
@pytest.mark.parametrize("dynamics", ["edm", "flow"])
def test_a_fake_loss_without_weight_is_the_mean_square(config, dynamics):
    teacher = make_network(dataclasses.replace(TINY, dynamics=dynamics))
    model, draws = make(teacher, config, fake_loss_weight="none")
    drawn, x_gen = draws(0), torch.randn(6, 1, 8, 8)
    terms = model.method.guidance_terms(x_gen, drawn, teacher=teacher, fake_score=model.fake_score)
    sigma, noise = drawn.fake_sigma.view(-1, 1, 1, 1), materialised(drawn).fake_noise
    expected = (model.fake_score(x_gen + sigma * noise, drawn.fake_sigma, drawn.class_labels) - x_gen) ** 2
    assert_close(terms.scalars["loss_fake"], expected.mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sid_alpha": 1.2}, "expected --sid-alpha together with --method sid, got 1.2"),
        ({"sid_alpha": 11.0, "method": "sid"}, r"expected --sid-alpha in \[-10, 10\], got 11.0"),
        ({"regression_weight": 0.1}, "expected --pairs with images of the teacher for --regression-weight, got none"),
        ({"pairs": "folder"}, "expected --pairs together with --regression-weight, got folder"),
        ({"regression_weight": -1.0}, "expected --regression-weight >= 0, got -1.0"),
        (
            {"method": "sid", "gan_guidance_weight": 1e-2, "divergence": "forward-kl"},
            "expected --divergence reverse-kl with --method sid, got forward-kl",
        ),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**changes).check()


class Gaussian(DenoisingNetwork):
    """The denoiser of images whose values are N(mean, std^2), which is that of a generator as well."""

    image_shape, num_classes, sigma_data, dynamics = (1, 4, 4), 0, 1.0, "edm"
    with_features = describe = None

    def __init__(self):
        super().__init__()
        self.mean, self.log_std = (torch.nn.Parameter(torch.tensor(value)) for value in (0.5, 0.0))

    def forward(self, x, sigma, class_labels=None):
        variance = (2 * self.log_std).exp()
        return self.mean + variance / (variance + sigma.view(-1, 1, 1, 1) ** 2) * (x - self.mean)


@pytest.mark.parametrize("matching", [DistributionMatching(), ScoreIdentity()], ids=str)
def test_a_generator_comes_to_have_the_distribution_of_its_teacher(matching):
    """From N(0.5, 0.0125^2), what the teacher of N(0.5, 1) gives in one step; measured: std 0.990 and 0.995."""
    options = {"learning_rate": 2e-2, "weight_decay": 0.0}
    model = DMD2(
        Gaussian(),
        generator_sigmas=(80.0,),
        sigma_data=1.0,
        dfake_gen_update_ratio=2,
        generator_options={**options, "decay_steps": 300},
        guidance_options={**options, "learning_rate": 4e-2, "decay_steps": 1200},
        method=Matched(1.0, matching),
    )
    sigmas = karras_sigmas(1000)

    def images():
        noise = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        return Generator(model.generator, (80.0,))(noise).detach()

    assert images().std() == pytest.approx(0.0125, rel=0.02)
    for step in range(400):
        model.iterate(step, lambda step: draw((32, 1, 4, 4), 0, sigmas, 20, 980, seed=1, step=step))
    assert images().std() == pytest.approx(1, abs=0.03) and images().mean() == pytest.approx(0.5, abs=0.03)


# DMD's regression.


def test_the_regression_loss():
    a, b = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]]), torch.tensor([[[[0.0, 2.0]]], [[[3.0, 1.0]]]])
    assert regression_loss(a, b).item() == (1 + 9) / 4
    message = r"fastdmd.regression_loss: expected images_gen of shape \(2, 1, 1, 2\), got \(1, 1, 1, 2\)"
    with pytest.raises(ValueError, match=message):
        regression_loss(a[:1], b)


def test_pairs_that_an_iteration_draws(teacher):
    """With the rest as it was; a function of seed and iteration; noise, image and label of a pair stay together."""
    plain, draws = make(teacher)[1], make(teacher, **WITH_PAIRS)[1]
    again, other = (make(teacher, **WITH_PAIRS, seed=seed)[1] for seed in (0, 1))
    for name, value in vars(plain(5)).items():
        kept = getattr(draws(5), name)
        assert torch.equal(value, kept) if isinstance(value, torch.Tensor) else value == kept
    pairs, drawn = random_pairs(), draws(5)
    for noise, image, label in zip(drawn.pair_noise, drawn.pair_images, drawn.pair_labels, strict=True):
        (index,) = (i for i in range(11) if torch.equal(pairs.noise[i], noise))
        assert torch.equal(pairs.images[index], image) and pairs.labels[index] == label
    for name in ("pair_noise", "pair_images", "pair_labels"):
        assert torch.equal(getattr(drawn, name), getattr(again(5), name))
    for different in (draws(6), other(5)):
        assert not torch.equal(drawn.pair_noise, different.pair_noise)
    seen = torch.cat([draws(step).pair_noise for step in range(30)]).flatten(1).unique(dim=0)
    assert len(seen) == 11


@pytest.mark.parametrize("config", [CONFIG, ADVERSARIAL], ids=["plain", "adversarial"])
def test_a_turn_adds_the_gradient_of_the_regression(teacher, config):
    """To what the method's own is: of the total, in the generator's weights, against plain PyTorch."""
    model, draws = make(teacher, config, **WITH_PAIRS)
    own, drawn = model.method.method, draws(2)
    fake = make_network(TINY, seed=1).requires_grad_(True)
    parameters = list(model.generator.parameters())

    def generate(noise, labels):
        return model.generator(80 * noise, torch.full((len(noise),), 80.0), labels)

    def gradient(method):
        options = {"teacher": teacher, "fake_score": fake, "generate": generate}
        terms = method.generator_terms(generate(drawn.noise, drawn.class_labels), drawn, **options)
        return terms, torch.cat([grad.flatten() for grad in torch.autograd.grad(terms.total, parameters)])

    (both, total), (alone, matched) = gradient(model.method), gradient(own)
    loss = (generate(drawn.pair_noise, drawn.pair_labels) - drawn.pair_images).square().mean()
    regression = torch.cat([grad.flatten() for grad in torch.autograd.grad(0.25 * loss, parameters)])
    assert_close(total, matched + regression, rtol=1e-4, atol=1e-6)
    assert regression.norm() > 1e-3 and matched.norm() > 1e-3
    assert tuple(both.scalars) == model.method.generator_scalars == (*own.generator_scalars, "loss_regression")
    assert_close(both.scalars["loss_regression"], loss)
    assert both.left_out == alone.left_out == 0


def test_a_generator_learns_its_pairs(teacher):
    """In parts, too, whose losses are those of the whole batch."""
    options = {**WITH_PAIRS, "method": "sid", "regression_weight": 100.0, "dfake_gen_update_ratio": 1}
    options["generator_lr"] = 5e-3
    model, draws = make(teacher, **options)
    losses = [model.iterate(step, draws)["loss_regression"].item() for step in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    parts, _ = make(teacher, **options, accumulation_steps=3)
    same = [parts.iterate(step, draws)["loss_regression"].item() for step in range(3)]
    assert same == pytest.approx(losses[:3], rel=1e-3)


def test_draws_without_pairs_are_refused(teacher):
    model, _ = make(teacher, **WITH_PAIRS)
    with pytest.raises(ValueError, match="fastdmd.Regressed: expected draws with pairs, got some without"):
        model.iterate(0, make(teacher)[1])
    with pytest.raises(ValueError, match="fastdmd.make_draws: expected pairs for the regression, got none"):
        distillation.make_draws(CONFIG.replace(**WITH_PAIRS), teacher, CPU)
    assert set(PAIRED) == {Draws, AdversarialDraws}


def test_a_regression_and_a_derivative_are_counted(teacher):
    """In forward passes of an image: the generator on pairs, and back; for SiD back through teacher and fake score."""

    def passes(**changes):
        config = CONFIG.replace(precision="fp32", batch_size=4, dfake_gen_update_ratio=1, **changes)
        found = budget.estimate(teacher, lambda meta: distillation.build(config, meta), 4, CPU)
        return found.iteration_flops / found.forward_flops / 4

    plain = passes()
    assert plain == pytest.approx(8, rel=0.05)
    assert passes(**WITH_PAIRS) - plain == pytest.approx(3, rel=0.05)
    assert passes(method="sid") - plain == pytest.approx(2, rel=0.05)  # to the images, not to the weights
