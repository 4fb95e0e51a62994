"""What torch.compile generates for an H100: feature maps stay in channels_last."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NEEDS = [
    (shutil.which("g++") is None, "needs g++ to make a fake CUDA device"),
    (torch.__version__ < "2.13", "reaches into Inductor as it is in torch 2.13"),
    (torch.version.cuda is not None, "a CUDA build of torch has registered a CUDA of its own"),
    (importlib.util.find_spec("triton") is None, "needs Triton to generate code"),
]
missing = next((reason for is_missing, reason in NEEDS if is_missing), None)

COMPILED = """
import json, os, sys
from pathlib import Path
from benchmarks import fake_cuda
fake_cuda.load(Path(sys.argv[1]))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from benchmarks import inspect_step
from fastdmd.networks.unet import UNet, UNetConfig
from benchmarks.fake_cuda import inductor

inductor.install()
config = UNetConfig(image_size=16, image_channels=3, num_classes=10, model_channels=16, channel_multipliers=(1, 2),
                    num_blocks=1, attention_resolutions=(8,), adm=True, adaptive_scale=True, channels_per_head=16)
with torch.device("meta"):
    network = UNet(config).to(torch.bfloat16, memory_format=torch.channels_last)
with FakeTensorMode():
    compiled = torch.compile(fake_cuda.fake(network), fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    x, sigma = torch.empty(4, 3, 16, 16, device="cuda"), torch.empty(4, device="cuda")
    class_labels = torch.empty(4, dtype=torch.int64, device="cuda")
    compiled(x, sigma, class_labels).sum().backward()
    network.zero_grad()
    with inductor.Record() as record:
        compiled(x, sigma, class_labels).sum().backward()
summary = inspect_step.summarize(record.launches)
summary["weights"] = [[*p.shape] for p in network.parameters() if p.dim() == 4]
print(json.dumps(summary), flush=True)
os._exit(0)  # the engine's thread for the fake device cannot be joined
"""


@pytest.mark.skipif(missing is not None, reason=str(missing))
def test_compiled_network_keeps_channels_last(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads(result.stdout.splitlines()[-1])
    num_square = sum(shape[2:] == [3, 3] for shape in summary["weights"])  # 1x1 convolutions become matrix products
    calls = {kind: row["calls"] for kind, row in summary["kinds"].items()}
    assert calls["convolution"] == num_square and calls["convolution backward"] >= num_square
    assert calls["attention"] == calls["attention backward"] > 0
    assert summary["convolutions_not_channels_last"] == []
    for row in summary["layout_changes"]:
        assert not any(re.search(r"\[4, \d\d+, (16, 16|8, 8)\]", x) for x in row["inputs"] + row["outputs"]), row
    assert all("[10, " in row["outputs"][-1] for row in summary["atomics"])  # the gradient of the label table alone
