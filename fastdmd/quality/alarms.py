"""Whether a distillation goes wrong: rules over what its generator's images look like, beside what they should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from fastdmd.distill.statistics import BINS
from fastdmd.quality.reference import Reference

Reading = Mapping[str, float | None]  # what is known of one interval of the log, by name
History = Sequence[Reading]


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One line: what was seen, and what may help."""

    kind: str
    iteration: int
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"iteration {self.iteration}: alarm: {self.kind}: {self.seen}; try {self.advice}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way of going wrong: `look(reading, history before it, reference)` says what was seen, or None."""

    kind: str
    look: Callable[[Reading, History, Reference], str | None]
    advice: str
    num_readings: int = 2  # in a row that it has to hold for: one may be chance, and some ills pass as images form


def saturated(reading: Reading, history: History, reference: Reference) -> str | None:
    """Values beyond [-1, 1], of clamped images too few between black and white, or too much contrast."""
    excess, share, contrast = (reading.get(name) for name in ("excess", "saturated", "contrast"))
    if excess is not None and excess > reference.excess + MOST_EXCESS * reference.contrast:
        return f"values exceed [-1, 1] by {excess:.2g} on average, {reference.excess:.2g} are right"
    if share is not None and 1 - share < LEAST_BETWEEN * (1 - reference.saturated):
        return f"{1 - share:.1%} of the values lie between black and white, {1 - reference.saturated:.1%} is right"
    if contrast is not None and contrast > MOST_CONTRAST * reference.contrast:
        return f"contrast {contrast:.2g}, {reference.contrast:.2g} is right"
    return None


def off_centre(reading: Reading, history: History, reference: Reference) -> str | None:
    brightness = reading.get("brightness")
    if brightness is not None and abs(brightness - reference.brightness) > MOST_SHIFT * reference.contrast:
        return f"brightness {brightness:.2g}, {reference.brightness:.2g} is right"
    return None


def collapsed(reading: Reading, history: History, reference: Reference) -> str | None:
    """Images that are all alike, within a class or at all, or much more alike than they have been."""
    classes = reference.classes
    within = None if classes is None else classes.variance_within**0.5
    for name, right in (("class_spread", within), ("spread", reference.spread)):
        spread, words = reading.get(name), name.replace("_", " ")
        if spread is None or right is None:
            continue
        if spread < LEAST_SPREAD * right:
            return f"{words} {spread:.2g}, {right:.2g} is right: images are all alike"
        reached = sorted(known for past in history if (known := past.get(name)) is not None)
        peak = min(reached[-2], right) if len(reached) > 1 else 0.0  # once may be chance
        if peak >= FORMED * right and spread < LATE_FALL * peak:
            return f"{words} fell to {spread:.2g} from {peak:.2g}, {right:.2g} is right"
    return None


def classes_lost(reading: Reading, history: History, reference: Reference) -> str | None:
    lost, seen, separation = (reading.get(name) for name in ("classes_lost", "classes_seen", "class_separation"))
    if lost is not None and seen is not None and lost >= max(LEAST_LOST, SHARE_LOST * seen):
        return f"{lost:.0f} of {seen:.0f} classes look like another one"
    right = 0.0 if reference.classes is None else reference.classes.separation
    if separation is not None and separation < LEAST_SEPARATION * right:
        return f"classes make {separation:.1%} of the variety, {right:.1%} is right"
    return None


def fake_score_still(reading: Reading, history: History, reference: Reference) -> str | None:
    """The fake score says what the teacher says, though the generator's images are not the teacher's."""
    found = _bins(reading, "disagreement")
    if len(history) < 2 or not found or max(found.values()) > LEAST_DISAGREEMENT or not _differs(reading, reference):
        return None
    differ = f"fake score and teacher differ by {max(found.values()):.1%} of what the teacher would change"
    return f"{differ}, {_spreads(reading, reference)}"


def fake_score_lags(reading: Reading, history: History, reference: Reference) -> str | None:
    """The fake score, which learns from the generator's images, knows them less than the teacher, which does not."""
    found = _bins(reading, "fake_error")
    if not found or (error := sum(found.values()) / len(found)) < MOST_FAKE_ERROR:
        return None
    return f"on generated images the fake score errs {error:.1f} times as much as the teacher"


def discriminator_blind(reading: Reading, history: History, reference: Reference) -> str | None:
    """The discriminator guesses, though generated images are not yet like real ones, or were not while it did.

    One that judges at all noise levels is never far from a guess: a healthy one was seen to tell 56 % right while
    images formed, and no more than chance once they had. What is no more than chance follows from how many images it
    judged, whose share has a standard deviation of `0.5 / num_judged^1/2`.
    """
    told = _told_right((*history, reading))
    if not told:
        return None
    right, num_judged = told[-1]
    if right > 0.5 + GUESSED_DEVIATIONS * 0.5 / num_judged**0.5:
        return None
    if _differs(reading, reference):
        return f"the discriminator tells {right:.1%} right, {_spreads(reading, reference)}"
    most = max(share for share, _ in told)
    if most > LEAST_LEARNED or not any(_differs(past, reference) for past in history):
        return None
    return f"the discriminator tells {right:.1%} right, {most:.1%} at most since images began to form"


def discriminator_overfits(reading: Reading, history: History, reference: Reference) -> str | None:
    """The discriminator tells far more right than it once did, though generated images look as real ones do.

    One that learns is soon behind, as the generator learns, too. A share that only grows is that of real images known
    by heart, of which there were too few for so many iterations.
    """
    told = [right for right, _ in _told_right((*history, reading))]
    if not told or _differs(reading, reference):
        return None
    right, least = told[-1], min(told)
    if right < KNOWN_BY_HEART or right < least + MOST_LEARNED:
        return None
    return f"the discriminator tells {right:.1%} right, {least:.1%} before: it may know the real images by heart"


def teacher_errs(reading: Reading, history: History, reference: Reference) -> str | None:
    """Far more than the fake score at some noise levels: so does a network that is taken for what it is not.

    Where generated images are not like the teacher's the fake score is ahead, too, but not by so much. Where it lags at
    other levels, less is far.
    """
    found = _bins(reading, "fake_error")
    if not found or (error := min(found.values())) > LEAST_ERROR * max(1.0, *found.values()):
        return None
    where = min(found, key=found.__getitem__)
    where = where.replace("_", " " if where[0].isalpha() else " to ")
    return f"at sigma {where} it errs {1 / max(error, 1e-3):.0f} times as much as the fake score"


def average_lags(reading: Reading, history: History, reference: Reference) -> str | None:
    """The average, which is the result, is not where the generator was when both were seen."""
    average, then = reading.get("average_spread"), reading.get("spread_then")
    if average is None or then is None or abs(average - then) < AVERAGE_BEHIND * reference.spread:
        return None
    return f"spread {average:.2g} in the average's images, {then:.2g} in the generator's"


def clipped(reading: Reading, history: History, reference: Reference) -> str | None:
    """A gradient far beyond what is let through: that of distribution matching, which is normalised, is outweighed."""
    times = reading.get("times_clipped")
    if times is None or times < MOST_CLIPPED:
        return None
    return f"the generator's gradient is {times:.0f} times as long as --max-grad-norm lets through"


def _differs(reading: Reading, reference: Reference) -> bool:
    """Whether images are plainly not yet what they should be."""
    spread = reading.get("spread")
    return spread is not None and abs(spread - reference.spread) >= PLAIN_DIFFERENCE * reference.spread


def _told_right(readings: History) -> list[tuple[float, float]]:
    """What share a discriminator told right, and of how many images, of every four readings in a row."""
    known = [
        (share, num)
        for one in readings
        if (share := one.get("gan_right")) is not None and (num := one.get("num_judged"))
    ]
    fours = [known[i : i + 4] for i in range(len(known) - 3)]
    totals = [sum(num for _, num in four) for four in fours]
    return [(sum(share * num for share, num in four) / total, total) for four, total in zip(fours, totals, strict=True)]


def _spreads(reading: Reading, reference: Reference) -> str:
    return f"at spread {reading['spread']:.2g}, {reference.spread:.2g} is right"


def _bins(reading: Reading, what: str) -> dict[str, float]:
    """Known ones of a statistic by noise level."""
    return {name: known for name in BINS if (known := reading.get(f"{what}_{name}")) is not None}


# Measured, see benchmarks/alarms.py. Shares of what the reference has.
MOST_EXCESS = 0.2
LEAST_BETWEEN = 0.4
MOST_CONTRAST = 1.4
MOST_SHIFT = 0.4
LEAST_SPREAD = 0.045  # blurred images, as those of one step are at first, have 0.06
FORMED = 0.5
LATE_FALL = 0.5
LEAST_LOST = 2
SHARE_LOST = 0.3
LEAST_SEPARATION = 0.3
LEAST_DISAGREEMENT = 0.1
MOST_FAKE_ERROR = 2.0  # while images form, the default run has 1.8 in two readings of 50 iterations
GUESSED_DEVIATIONS = 1.5
LEAST_LEARNED = 0.53  # healthy runs have 0.54 and more while images form, one that stands still 0.52
KNOWN_BY_HEART = 0.8  # runs that end near their teacher's distance have 0.78 at most
MOST_LEARNED = 0.1
PLAIN_DIFFERENCE = 0.2
LEAST_ERROR = 0.2  # a healthy run of ratio 10 has 0.4
MOST_CLIPPED = 8.0  # while images form, healthy runs have 3
AVERAGE_BEHIND = 0.25

RULES = (
    Rule("over-saturation", saturated, "a lower --generator-lr and --guidance-lr, or a teacher with less guidance"),
    Rule("brightness off", off_centre, "a lower --generator-lr and --guidance-lr, and look at samples of the teacher"),
    Rule("collapse", collapsed, "a higher --guidance-lr or --dfake-gen-update-ratio, a lower --generator-lr"),
    Rule(
        "loss of classes",
        classes_lost,
        "samples of the teacher by class, a higher --guidance-lr, a larger --batch-size",
    ),
    Rule("fake score stands still", fake_score_still, "a higher --guidance-lr or --dfake-gen-update-ratio"),
    Rule(
        "fake score lags",
        fake_score_lags,
        "a lower --generator-lr and --guidance-lr, a higher --dfake-gen-update-ratio",
    ),
    Rule("discriminator is blind", discriminator_blind, "a higher --gan-lr or --gan-guidance-weight"),
    Rule(
        "discriminator overfits",
        discriminator_overfits,
        "more images by --data, --gan-translation, or fewer --iterations",
    ),
    Rule(
        "teacher errs", teacher_errs, "samples of the teacher; if it is a network of your own, its --parameterization"
    ),
    Rule("gradient clipped", clipped, "a lower --gan-generator-weight, if there is one, or a lower --generator-lr"),
    Rule("average lags", average_lags, "a lower --ema-decay, or shorter --ema-halflives"),
)
