"""Distillation by DMD2 and its relatives: losses, methods, turns, and how they are executed."""

from fastdmd.distill.draws import Draws, draw
from fastdmd.distill.losses import denoising_loss, generator_loss
from fastdmd.distill.turns import DMD2

__all__ = ["DMD2", "Draws", "denoising_loss", "draw", "generator_loss"]
