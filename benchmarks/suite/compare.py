"""Is it slower than it was? Figures of one machine are compared themselves, those of two by their ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.suite.rows import Row, is_measured

Rounds = Sequence[Sequence[Row]]  # the rows of each round


@dataclass(frozen=True)
class Comparison:
    """`times`: how many times as good each figure is as it was before, the median of the rounds."""

    other: str  # what is compared with
    times: dict[str, float] = field(default_factory=dict)
    before: dict[str, Row] = field(default_factory=dict)  # of the last round
    missing: list[str] = field(default_factory=list)  # measured before, and now not, or not in every round
    left_out: list[str] = field(default_factory=list)  # with nothing that two machines can compare

    def faults(self, factor: float) -> list[str]:
        """A line for each figure that is worse by more than `factor`, or gone; and one if nothing was compared."""
        lines = [
            f"{label}: {1 / times:.2f} times as bad as at {self.other}, expected at most {factor:g}"
            for label, times in self.times.items()
            if times * factor < 1
        ]
        lines += [f"{label}: expected a figure, as at {self.other}, got none" for label in self.missing]
        if not self.times and not lines:
            lines.append(f"expected figures to compare with {self.other}, got none")
        return lines


def compare(now: Rounds, before: Rounds, other: str, *, same_machine: bool, is_part: bool = False) -> Comparison:
    """The rounds of now and before in pairs. `is_part`: only some figures were to be measured, so that none is missing
    which no round has."""
    here, there = ([{row.label: row for row in rows} for rows in rounds] for rounds in (now, before))
    comparison = Comparison(other)
    for label in dict.fromkeys(label for rows in there for label in rows):
        if is_part and not any(label in rows for rows in here):
            continue
        merits = [
            tuple(rows[label].merit(same_machine=same_machine) if label in rows else None for rows in pair)
            for pair in zip(here, there, strict=True)
        ]
        merits = [(mine, its) for mine, its in merits if is_measured(its)]
        if not merits:
            comparison.left_out.append(label)
        elif not all(is_measured(mine) for mine, _ in merits):
            comparison.missing.append(label)
        else:
            comparison.times[label] = statistics.median(mine / its for mine, its in merits)
            comparison.before[label] = next(rows[label] for rows in reversed(there) if label in rows)
    return comparison
