"""The state of a watch: another one goes on from it as the first does."""

import json
import math

import torch

from fastdmd.quality.watch import LEAST_POOLED, Watch
from tests.quality.test_alarms import REFERENCE, RIGHT


def test_a_watch_goes_on_from_its_state():
    """Written to JSON at any moment: what it tells from there on is the same."""
    dark, fallen = RIGHT | {"brightness": -1.0}, RIGHT | {"class_spread": 0.9, "excess": math.inf}
    readings = [RIGHT, dark, RIGHT, RIGHT, *[dark] * 5, RIGHT, *[fallen] * 6, dark, *[RIGHT] * 4, *[dark] * 4]
    images = 0.1 * torch.randn(1, 200, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def read(watch, numbers):
        found = []
        for number in numbers:
            known = {
                name: value for name, value in readings[number].items() if "spread_" not in name and "e_sp" not in name
            }
            found.append(watch.read(number, known, LEAST_POOLED // 2 + number, 400))
            if number == 4:
                watch.see_average(images)
        return found

    whole = read(Watch(REFERENCE), range(len(readings)))
    assert {alarm.kind for _, alarms in whole for alarm in alarms} >= {"brightness off", "collapse", "average lags"}
    for length in range(len(readings)):
        first, second = Watch(REFERENCE), Watch(REFERENCE)
        read(first, range(length))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert read(second, range(length, len(readings))) == whole[length:], length
