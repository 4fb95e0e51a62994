"""Alarms: each rule where it holds and just below, on histories that are written down; and when they are told."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

from fastdmd import train
from fastdmd.distill.statistics import COMPARISONS, ClassFigures
from fastdmd.quality.alarms import RULES, Alarm
from fastdmd.quality.reference import Reference
from fastdmd.quality.watch import LEAST_POOLED, LONGEST_HISTORY, Watch
from tests.helpers.tiny_runs import run_train

PLAIN = Reference(brightness=-0.7, contrast=0.5, spread=0.4, saturated=0.8, excess=0.01)
MEANS = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * math.sqrt(4 * 3 / 7)  # 30 % of the variety, and 4 within
CLASSES = ClassFigures(torch.tensor([1e6, 1e6], dtype=torch.float64), MEANS, 4.0)
REFERENCE = dataclasses.replace(PLAIN, classes=CLASSES)
RIGHT = {
    "brightness": -0.7,
    "contrast": 0.5,
    "spread": 0.4,
    "saturated": 0.8,
    "excess": 0.02,
    "class_spread": 2.0,
    "class_separation": 0.3,
    "classes_seen": 10.0,
    "classes_lost": 0.0,
    **dict.fromkeys(COMPARISONS, 0.6),
    "loss_gan_guidance": 1.0,
    "gan_right": 0.7,
    "spread_then": 0.4,
    "average_spread": 0.4,
}
WITHOUT_CLASSES = {name: None for name in RIGHT if name.startswith("class")}


def told(*readings, reference=REFERENCE, **options):
    """The alarms of a run that tells these, one an iteration."""
    watch = Watch(reference, max_grad_norm=0.5, **options)
    return [alarm for i, reading in enumerate(readings) for alarm in watch.read(i + 1, reading, LEAST_POOLED, 400)[1]]


CASES = [
    ("over-saturation", {"excess": 0.12}, {"excess": 0.1}, r"exceed \[-1, 1\] by 0.12 on average, 0.01 are right"),
    (
        "over-saturation",
        {"saturated": 0.93},
        {"saturated": 0.91},
        "7.0% of the values lie between black and white, 20.0%",
    ),
    ("over-saturation", {"contrast": 0.71}, {"contrast": 0.69}, "contrast 0.71, 0.5 is right"),
    ("brightness off", {"brightness": -0.49}, {"brightness": -0.51}, "brightness -0.49, -0.7 is right"),
    ("brightness off", {"brightness": -0.91}, {"brightness": -0.89}, "brightness -0.91, -0.7 is right"),
    ("collapse", {"class_spread": 0.99}, {"class_spread": 1.01}, "class spread fell to 0.99 from 2, 2 is right"),
    ("collapse", {**WITHOUT_CLASSES, "spread": 0.19}, {**WITHOUT_CLASSES, "spread": 0.21}, "^spread fell to 0.19"),
    ("loss of classes", {"classes_lost": 3.0}, {"classes_lost": 2.0}, "3 of 10 classes look like another one"),
    ("loss of classes", {"class_separation": 0.08}, {"class_separation": 0.1}, "make 8.0% of the variety, 30.0% is"),
    (
        "fake score stands still",
        {name: 0.09 for name in COMPARISONS[:4]} | {"spread": 0.31},
        {name: 0.09 for name in COMPARISONS[:3]} | {"spread": 0.31},
        "fake score and teacher differ by 9.0% of what the teacher would change, at spread 0.31, 0.4 is right",
    ),
    (
        "fake score stands still",
        {name: 0.01 for name in COMPARISONS[:4]} | {"spread": 0.49},
        {name: 0.01 for name in COMPARISONS[:4]} | {"spread": 0.47},  # a generator that is as good as its teacher
        "differ by 1.0%",
    ),
    (
        "discriminator is blind",
        {"gan_right": 0.518, "spread": 0.31},  # of 1600 in four readings: 1.5 deviations are 1.9 %
        {"gan_right": 0.518, "spread": 0.33},
        "tells 51.8% right, at spread 0.31, 0.4 is right",
    ),
    (
        "discriminator is blind",
        {"gan_right": 0.51, "spread": 0.3},
        {"gan_right": 0.52, "spread": 0.3},
        "tells 51.0% right",
    ),
    (
        "discriminator overfits",
        {"gan_right": 0.805},
        {"gan_right": 0.795},
        "tells 80.5% right, 70.0% before: it may know the real images by heart",
    ),
    (
        "discriminator overfits",
        {"gan_right": 0.83},
        {"gan_right": 0.83, "spread": 0.3},  # of images that are easily told
        "tells 83.0% right, 70.0% before",
    ),
    (
        "fake score lags",
        {name: 2.1 for name in COMPARISONS[4:]},
        {name: 1.9 for name in COMPARISONS[4:7]} | {COMPARISONS[7]: 2.2},
        "the fake score errs 2.1 times as much as the teacher",
    ),
    ("teacher errs", {"fake_error_above_5": 0.125}, {"fake_error_above_5": 0.21}, "above 5 it errs 8 times"),
    ("teacher errs", {"fake_error_0.2_1": 0.02}, {"fake_error_0.2_1": 0.21}, "at sigma 0.2 to 1 it errs 50 times"),
    (
        "teacher errs",
        {"fake_error_1_5": 0.35, "fake_error_below_0.2": 1.8},
        {"fake_error_1_5": 0.37, "fake_error_below_0.2": 1.8},
        "at sigma 1 to 5 it errs 3 times",
    ),
    ("gradient clipped", {"generator_grad_norm": 4.1}, {"generator_grad_norm": 3.9}, "is 8 times as long as --max"),
    ("average lags", {"average_spread": 0.29}, {"average_spread": 0.31}, "spread 0.29 in the average's images, 0.4 in"),
]


@pytest.mark.parametrize(("kind", "wrong", "bearable", "seen"), CASES)
def test_a_rule_holds_from_its_limit_on(kind, wrong, bearable, seen):
    """After a healthy beginning, and nothing else is told."""
    healthy = [RIGHT] * 5
    assert told(*healthy, *[RIGHT | bearable] * 6) == []
    (alarm,) = told(*healthy, *[RIGHT | wrong] * 6)
    rule = next(rule for rule in RULES if rule.kind == kind)
    num_mean = 3 if kind.startswith("discriminator") else 0  # more readings, of which it takes the mean
    assert (alarm.kind, alarm.iteration, alarm.advice) == (kind, 5 + num_mean + rule.num_readings, rule.advice)
    assert re.search(seen, alarm.seen), alarm.seen
    assert str(alarm) == f"iteration {alarm.iteration}: alarm: {kind}: {alarm.seen}; try {rule.advice}"


def test_every_rule_is_among_the_cases():
    assert {rule.kind for rule in RULES} == {kind for kind, *_ in CASES}


def test_a_discriminator_that_always_told_much_right_does_not_overfit():
    """Nor one that learned it in the first readings; one that went down and came back did."""
    assert told(*[RIGHT | {"gan_right": right} for right in (*[0.75] * 8, *[0.82] * 8)]) == []
    (alarm,) = told(*[RIGHT | {"gan_right": right} for right in (*[0.75] * 8, *[0.65] * 8, *[0.82] * 8)])
    assert (alarm.kind, alarm.iteration) == ("discriminator overfits", 21) and "65.0% before" in alarm.seen


def test_a_discriminator_that_guessed_while_images_formed_is_blind():
    """Though they are formed before it has judged enough; not one that told them, or that began with formed ones."""
    forming = [RIGHT | {"gan_right": right, "spread": 0.2} for right in (0.55, 0.51)]
    formed = [RIGHT | {"gan_right": 0.5}] * 6
    (alarm,) = told(*forming, *formed)
    assert (alarm.kind, alarm.iteration) == ("discriminator is blind", 5)
    assert "50.2% right, 51.5% at most since images began to form" in alarm.seen
    assert told(*[one | {"gan_right": 0.57} for one in forming], *formed) == []
    assert told(*[one | {"spread": 0.4} for one in forming], *formed) == []


def test_images_that_are_all_alike_are_a_collapse_from_the_start():
    (alarm,) = told(*[RIGHT | {"class_spread": 0.085}] * 3)
    assert (alarm.kind, alarm.iteration) == ("collapse", 2) and "images are all alike" in alarm.seen
    assert told(*[RIGHT | {"class_spread": 0.095}] * 3) == []


def test_what_has_not_formed_yet_has_not_collapsed():
    """Images that are blurred, as those of one step are at first, and that then take their time."""
    forming = [RIGHT | {"class_spread": 0.15 + 0.05 * i, "spread": 0.2, "class_separation": 0.9} for i in range(20)]
    assert told(*forming) == []


def test_an_alarm_is_told_once_and_again_if_it_comes_back():
    dark = RIGHT | {"brightness": -1.0}
    alarms = told(dark, *[RIGHT] * 3, *[dark] * 4, RIGHT, dark, dark, RIGHT, RIGHT, *[dark] * 3)
    assert [alarm.iteration for alarm in alarms] == [6, 15]
    both = told(*[dark | {"excess": 1.0}] * 2)
    assert [alarm.kind for alarm in both] == ["over-saturation", "brightness off"]


def test_what_is_not_known_is_no_alarm():
    unknown = dict.fromkeys(RIGHT)
    assert told(*[unknown] * 6) == [] and told(*[{}] * 6) == []
    assert told(*[RIGHT | {"class_separation": 0.0}] * 6, reference=PLAIN) == []


def test_nothing_is_told_while_rates_warm_up():
    dark = RIGHT | {"brightness": -1.0}
    assert [alarm.iteration for alarm in told(*[dark] * 9, settled_at=5)] == [7]


def test_readings_of_few_images_wait_for_more():
    """And are weighed by their images; a reading without images says nothing of them."""
    watch = Watch(REFERENCE)
    dark, bright = RIGHT | {"brightness": -2.0}, RIGHT | {"brightness": -0.6}
    half = LEAST_POOLED // 2
    sequence = [(dark, half), ({"loss_fake": 1.0, "brightness": None}, 0), (dark, half)] * 2
    found = [watch.read(i, reading, num)[1] for i, (reading, num) in enumerate(sequence)]
    assert [len(alarms) for alarms in found] == [0, 0, 0, 0, 0, 1]
    watch = Watch(REFERENCE)
    assert not any(watch.read(i, r, n)[1] for i, (r, n) in enumerate([(dark, 4), (bright, LEAST_POOLED)] * 4))


def test_the_average_is_held_against_the_generator_of_its_time():
    watch = Watch(PLAIN)
    images = torch.randn(1, 200, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def read(spread):
        (name,) = {alarm.kind for alarm in watch.read(1, {"spread": spread}, LEAST_POOLED)[1]} or {None}
        return name

    watch.see_average(0.1 * images)  # before there is a reading
    assert [read(spread) for spread in (0.4, 0.4)] == [None, None]
    watch.see_average(0.4 * images)
    assert [read(spread) for spread in (0.6, 0.6, 0.6)] == [None] * 3  # it has not been seen since
    watch.see_average(0.4 * images)
    assert [read(spread) for spread in (0.6, 0.6)] == [None, "average lags"]
    assert watch.read(2, {}, 0)[0] == {"average_spread": pytest.approx(0.4, rel=0.05)}


def test_a_long_run_is_not_remembered_whole():
    """What was reached long ago is forgotten, and takes no memory."""
    fallen = [RIGHT | {"class_spread": 0.9}] * 4
    for num_between, kinds in ((LONGEST_HISTORY // 2, ["collapse"]), (LONGEST_HISTORY, [])):
        assert [alarm.kind for alarm in told(RIGHT, RIGHT, *[{}] * num_between, *fallen)] == kinds


def test_more_images_know_better_what_is_chance():
    """A discriminator that tells 51.8 % right: a guess of 1600 images, none of 16,000."""
    blind = RIGHT | {"gan_right": 0.518, "spread": 0.3}
    for num_judged, kinds in ((400, {"discriminator is blind"}), (4000, set()), (0, set())):
        watch = Watch(REFERENCE)
        found = [watch.read(i, blind, LEAST_POOLED, num_judged)[1] for i in range(8)]
        assert {alarm.kind for alarms in found for alarm in alarms} == kinds


def test_an_average_is_not_held_against_images_that_sampling_does_not_make():
    watch, images = Watch(PLAIN, follows_average=False), torch.randn(1, 200, 1, 4, 4)
    for _ in range(4):
        watch.see_average(0.01 * images)
        assert watch.read(1, {"spread": 0.4}, LEAST_POOLED) == ({}, [])


def test_advice_names_flags_that_there_are(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    known = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    for rule in RULES:
        named = re.findall(r"--[a-z0-9-]+", rule.advice)
        assert named and set(named) <= known, rule.kind


def test_a_run_that_goes_wrong_says_so(teacher_file, tmp_path, capsys):
    """On the screen, in metrics.jsonl and in summary.json: the data are nothing that this teacher makes."""
    images = np.full((40, 1, 28, 28), 255, np.uint8)
    images[::2, :, :14] = 250
    np.savez(tmp_path / "white.npz", images=images, labels=np.arange(40) % 10)
    options = ["--data", str(tmp_path / "white.npz"), "--num-samples", "0", "--batch-size", str(LEAST_POOLED)]
    summary = run_train(teacher_file, tmp_path / "run", *options)
    output, lines = capsys.readouterr().out, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"kind": "brightness off", "iteration": 4}.items() <= summary["alarms"][-1].items()
    assert all(output.count(str(Alarm(**alarm))) == 1 for alarm in summary["alarms"])
    assert "alarms" not in json.loads(lines[0]) and "brightness off" in json.loads(lines[1])["alarms"]
