"""Which numbers of the log are drawn together."""

import pytest

from fastdmd.distill.statistics import COMPARISONS, IMAGE_STATISTICS
from fastdmd.report.curves import TITLES
from fastdmd.runs.series import PARTS, group, level


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "losses"),
        ("loss_gan_guidance", "losses"),
        ("fake_grad_norm", "gradient norms"),
        ("fake_error_0.2_1", "fake error"),
        ("disagreement_above_5", "disagreement"),
        ("saturated", "images"),
        ("average_spread", "images"),
        ("class_spread", "spread of classes"),
        ("classes_lost", "classes"),
        ("gan_right", "discriminator"),
        ("resident_bytes", "memory"),
        ("images_per_second", "speed"),
        ("seconds", "other"),
        ("skipped_updates", "other"),
    ],
)
def test_numbers_have_their_group(name, expected):
    assert group(name) == expected


def test_every_statistic_has_a_picture_with_a_title():
    assert {group(name) for name in (*IMAGE_STATISTICS, *COMPARISONS)} == {"images", "disagreement", "fake error"}
    assert {*TITLES} == {*PARTS.values(), "images"}


def test_noise_levels_are_words():
    assert [level(f"fake_error_{name}") for name in ("below_0.2", "0.2_1", "1_5", "above_5")] == [
        "sigma below 0.2",
        "sigma 0.2 to 1",
        "sigma 1 to 5",
        "sigma above 5",
    ]
    assert level("loss_dm") == "loss_dm"
