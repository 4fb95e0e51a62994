"""Anybody's network, computed with our ops."""

from fastdmd.networks.accelerate.acceleration import Acceleration, accelerate, unaccelerate

__all__ = ["Acceleration", "accelerate", "unaccelerate"]
