"""CUDA tensors that hold nothing, on a machine without a GPU: for what can be proved of GPU code without running it."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path


def load(folder: Path) -> None:
    """Makes torch's autograd take CUDA devices for real. Before torch is imported, and not to be undone."""
    library, root = folder / "libfake_cuda.so", Path(importlib.util.find_spec("torch").origin).parent
    command = [
        "g++",
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{root}/include",
        Path(__file__).with_name("fake_cuda.cpp"),
        "-o",
        library,
        f"-L{root}/lib",
        "-lc10",
        "-ltorch_cpu",
    ]
    subprocess.run(command, check=True)
    for name in (root / "lib" / "libc10.so", root / "lib" / "libtorch_cpu.so", library):
        ctypes.CDLL(str(name), ctypes.RTLD_GLOBAL)

    from torch._subclasses.fake_tensor import FakeTensorMode

    FakeTensorMode.__deepcopy__ = lambda mode, memo: mode  # a copy of a fake tensor stays in its mode


def fake(network):
    """Replaces every parameter and buffer of a module by a fake CUDA tensor; inside a FakeTensorMode."""
    import torch

    for module in network.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    kind[name] = torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty
    return network
