"""Datasets of images: read whole from folders, archives and arrays, and checked."""

from fastdmd.data.dataset import Dataset, load, to_uint8

__all__ = ["Dataset", "load", "to_uint8"]
