"""How good samples are: Fréchet distance and class accuracy, beside those of real images."""

from fastdmd.quality.evaluation import Evaluation, Measurement, sample, table

__all__ = ["Evaluation", "Measurement", "sample", "table"]
