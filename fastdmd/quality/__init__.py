"""How good samples are: near to real images, varied, of the class asked for; beside real images themselves."""

from fastdmd.quality.evaluation import Evaluation, sample
from fastdmd.quality.measurement import Measurement, table

__all__ = ["Evaluation", "Measurement", "sample", "table"]
