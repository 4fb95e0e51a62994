"""What tests of compiled turns share."""

import pytest
import torch


@pytest.fixture
def traced(monkeypatch):
    """`torch.compile` that traces as ever, and generates no code; forgets what it knew. Gives the number of graphs."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **options, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
