"""What a run is made of besides settings and teacher: by content, as files may lie elsewhere when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdmd.data import Dataset
from fastdmd.data.identity import identity
from fastdmd.data.pairs import Pairs
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.networks.states import tensors_of
from fastdmd.networks.user_code import make_network
from fastdmd.quality.features import is_script
from fastdmd.quality.settings import EvaluationSettings
from fastdmd.reading import open_regular


def contents(
    evaluation: EvaluationSettings,
    data: Dataset | None,
    *,
    pairs: Pairs | None = None,
    init: DenoisingNetwork | None = None,
) -> dict[str, Any]:
    """What is compared when a run goes on, by the name that a message has for it; None for what nobody named.

    Of `init` that is what it computes besides its weights, which are in the checkpoint. Raises OSError for a file that
    cannot be read.
    """
    description = {} if init is None else json.loads(json.dumps(init.describe(), default=str))
    return {
        "the content of --data": None if data is None else identity(data.images, data.labels),
        "the content of --pairs": None if pairs is None else identity(pairs.noise, pairs.images, pairs.labels),
        "the content of --feature-network": _of_features(evaluation.feature_network),
        "the content of --reference": None if evaluation.reference is None else _of_file(evaluation.reference),
        **{f"{name} of --init": value for name, value in description.items()},
    }


def _of_features(source: str | None) -> str | None:
    """That of a file; of code its name and the tensors of what it makes."""
    if source is None:
        return None
    if is_script(source):
        return _of_file(source)
    with torch.random.fork_rng(devices=[]):  # training goes on with the state as it was
        state = tensors_of(make_network(source, "features"))
    return f"{source} {identity(*(tensor for _, tensor in sorted(state.items())))}"


def _of_file(path: str) -> str:
    with open_regular(Path(path)) as file:
        return identity(torch.from_numpy(np.fromfile(file, np.uint8)))
