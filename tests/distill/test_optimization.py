"""The averages that a run is asked for: what their decays are, and which of them it cannot tell apart."""

import math

import pytest

from fastdmd.distill.optimization import Average, OptimizerSettings, averages_notice


def test_a_half_life_is_that_of_the_weight_of_what_was_seen():
    """After as many images as it has, in whatever batches, a weight counts half."""
    settings = OptimizerSettings(ema_halflives=(1000, 1e4, 48))
    for batch_size in (10, 48, 1000):
        averages = settings.averages(batch_size)
        assert [average.name for average in averages] == [f"half-life {h} images" for h in (1000, 10000, 48)]
        for average, images in zip(averages, (1000, 10_000, 48), strict=True):
            assert average.decay ** (images / batch_size) == pytest.approx(0.5)
    decays = tuple(average.decay for average in settings.averages(48))
    assert settings.of_generator(10, 2, 48)["ema_decay"] == decays and decays[2] == 0.5


def test_one_decay_is_as_it_always_was():
    settings = OptimizerSettings(ema_decay=0.97)
    assert settings.averages(7) == (Average("decay 0.97", 0.97),)
    assert settings.of_generator(10, 2, 7)["ema_decay"] == (0.97,)


@pytest.mark.parametrize(
    ("halflives", "expected"),
    [
        *[((10.0, wrong), "> 0 and finite") for wrong in (0.0, -5.0, math.nan, math.inf)],
        *[(wrong, "as numbers of images, each once") for wrong in ((), (10.0, 20.0, 10), (3.0, 3.00000000001))],
    ],
)
def test_half_lives_that_cannot_be_meant_are_refused(halflives, expected):
    with pytest.raises(ValueError, match=f"^expected --ema-halflives {expected}, got "):
        OptimizerSettings(ema_halflives=halflives).check()


def test_half_lives_that_float32_cannot_average_with_are_refused():
    """As decays are: 1 - 2^-20 at most."""
    assert OptimizerSettings(ema_halflives=(7268171,)).averages(10)[0].decay <= 1 - 2**-20
    with pytest.raises(
        ValueError, match="expected --ema-halflives of at most 7268171 images, with 10 an update, got .8000000.0,."
    ):
        OptimizerSettings(ema_halflives=(8e6,)).averages(10)


def test_averages_that_stay_alike_are_told():
    """Those whose decay the warm-up n / (n + 10) never reaches, where there are two of them."""
    averages = [Average("a", 0.5), Average("b", 0.8), Average("c", 0.9)]
    assert averages_notice(averages, 90) is None  # whose last one averages with 0.9
    assert averages_notice(averages, 80) is None
    assert averages_notice(averages, 40).startswith("the averages of b, c will be the same: the n-th")
    assert averages_notice(averages, 10).startswith("the averages of a, b, c will be the same")
    assert averages_notice(averages[:1], 1) is None
