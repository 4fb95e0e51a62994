"""Figures of a run, as its page tells them."""

import pytest

from fastdmd.report.figures import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min"),
        (89, "1 min"),
        (3569, "59 min"),
        (3600, "1 h 0 min"),
        (97_200, "27 h 0 min"),
    ],
)
def test_seconds_are_told_in_the_unit_that_one_would_take(seconds, text):
    assert duration(seconds) == text
