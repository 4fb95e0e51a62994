"""What is measured at the end of a run: what it keeps, its best, and whatever else the training names."""

from __future__ import annotations

import functools

from fastdmd.quality import Evaluation, Measurement
from fastdmd.runs.course import Course
from fastdmd.runs.progress import Interrupted, Progress, Received, stop_if_interrupted
from fastdmd.runs.snapshots import Snapshots
from fastdmd.runs.training import Training
from fastdmd.sampling import Sampler


def measure(
    training: Training,
    course: Course | None,
    evaluation: Evaluation | None,
    progress: Progress,
    rows: dict[str, Measurement],
    received: Received,
    snapshots: Snapshots,
) -> None:
    """Fills `rows`, by their names, of a run that is complete; a signal ends it, and then `progress` says so. What is
    kept may be another average than the last samples are of: then these are made anew."""
    if progress.outcome != "complete" or evaluation is None:
        return

    def measure_one(name: str, sampler: Sampler, record: dict | None = None) -> Measurement | None:
        before_batch = functools.partial(stop_if_interrupted, received)
        try:
            return evaluation.measure(sampler, name=name, record=record, before_batch=before_batch)
        except ValueError as error:  # images that are not finite, among ten thousand
            fault = f"{name} not measured: {error}"
            progress.reason = fault if progress.reason is None else f"{progress.reason}; {fault}"
            print(fault)
            return None

    try:
        shown = None if course is None else course.kept
        (name, sampler, record), *_ = training.measurements()
        row = measure_one(name, sampler, record) if course is None else course.choose(name, measure_one)
        if row is not None:
            rows[name] = row
            training.save(progress.iterations, record=evaluation.record(row))
        if course is not None and course.kept != shown:
            snapshots.show(progress.iterations)
        if course is not None and (best := course.measure_best(progress.iterations, row, evaluation, measure_one)):
            rows["best"] = best
        _, *others = training.measurements()  # of the average that is kept by now
        for other, sampler, record in others:
            if (row := measure_one(other, sampler, record)) is not None:
                rows[other] = row
        if course is not None:
            course.finish(rows)
    except Interrupted:
        progress.outcome, progress.signal = "interrupted", received()
