"""What looks at a distillation as it goes on, and beside what."""

from __future__ import annotations

from fastdmd.data import Dataset
from fastdmd.distill import DMD2
from fastdmd.quality.reference import Reference
from fastdmd.quality.watch import Watch
from fastdmd.ranks import ALONE, Ranks
from fastdmd.runs.config import ResolvedTrainConfig
from fastdmd.sampling import HeunSampler


def make_watch(config: ResolvedTrainConfig, model: DMD2, named: Dataset | None, ranks: Ranks = ALONE) -> Watch | None:
    """What looks for alarms: beside real images, the user's or the embedded teacher's digits, else the teacher's own.

    None where the teacher samples NaN or infinity.
    """
    num_classes = model.teacher.num_classes
    if named is None and config.teacher == "mnist":
        named = config.data.load()
    if named is not None:
        reference = Reference.of_dataset(named, num_classes, config.seed)
    else:
        sampler = HeunSampler(model.teacher, config.evaluation.teacher_steps)
        num_at_once = config.batch_size // config.compute.accumulation_steps // ranks.size
        reference = Reference.of_teacher(sampler, num_at_once, config.seed)
    if reference is None:
        return None
    has_one_average = len(model.generator_optimizer.ema_networks) == 1  # of several, one that lags is no fault
    return Watch(
        reference,
        model.class_sums,
        settled_at=config.optimizer.warmup_iterations,
        max_grad_norm=config.optimizer.max_grad_norm,
        follows_average=has_one_average and not config.noise.uses_real_images,
        num_steps=model.num_steps,
    )
