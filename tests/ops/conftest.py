"""What surrounds every test of the ops."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison():
    """torch.empty holds NaN, so that an output that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
