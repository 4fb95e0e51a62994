"""The code of the README runs as written."""

import re
from pathlib import Path

import pytest
import torch

from fastdmd import ops
from fastdmd.runs.presets import PRESETS

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_blocks_and_one_compiles():
    assert len(BLOCKS) == 5 and sum("torch.compile" in block for block in BLOCKS) == 1


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[3][:30])
def test_block(block):
    torch.manual_seed(0)
    if "_runtime" in block:
        pytest.importorskip("fastdmd._runtime", reason="not built")
    names = {}
    exec(compile(block, str(README), "exec"), names)
    if "x_gen" in names:
        grad = names["ops"].dm_gradient(names["x_gen"], names["D_real"], names["D_fake"])
        torch.testing.assert_close(names["x_gen"].grad, grad / grad.numel())
        assert all(p.grad.abs().sum() > 0 for p in names["fake_score"].parameters())
        assert names["state"].tolist()[2] == 2
    elif "residual" in names:
        assert names["x"].grad.isfinite().all() and names["x"].grad.abs().sum() > 0
    elif "noise" in names:
        x_t = ops.add_noise(torch.zeros(6, 3, 32, 32), torch.ones(6), rng_key=ops.rng_key(0))
        torch.testing.assert_close(torch.from_numpy(names["noise"]), x_t[5].flatten())
    elif "optimizer" in names:
        weight, average = names["network"][0].weight, names["average"][0].weight
        assert 0 < (weight - average).abs().max() < 1e-3 and names["grad_norm"] > 0
    else:
        torch.testing.assert_close(names["shadow"], names["param"].bfloat16())
        assert names["grad_norm"] > 1 and names["grad"].eq(0).all() and names["step"].item() == 1


def test_the_batches_of_the_presets():
    """Of the table's lines, each for one preset or several: one number, or one for each."""
    header, table = "| preset | teacher | parameters |", README.read_text()
    lines = table[table.index(header) :].partition("\n\n")[0].split("\n")[2:]
    told = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names, batches = re.findall(r"`([\w-]+)`", cells[0]), [int(n) for n in cells[4].split(" in ")[0].split(",")]
        told |= zip(names, batches if len(batches) > 1 else batches * len(names), strict=True)
    assert told == {name: preset.config.batch_size for name, preset in PRESETS.items()}
