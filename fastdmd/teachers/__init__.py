"""Where teachers come from: files, folders and code of many kinds."""

from fastdmd.networks.options import NO_OPTIONS, TeacherOptions
from fastdmd.teachers.edm import from_edm
from fastdmd.teachers.sources import is_code, load, load_generator, read, sampler_of
from fastdmd.teachers.trial import (
    verify,
    verify_derivative,
    verify_features,
    verify_level_embedding,
    verify_training,
)

__all__ = [
    "NO_OPTIONS",
    "TeacherOptions",
    "from_edm",
    "is_code",
    "load",
    "load_generator",
    "read",
    "sampler_of",
    "verify",
    "verify_derivative",
    "verify_features",
    "verify_level_embedding",
    "verify_training",
]
