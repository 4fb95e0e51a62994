"""An H100 for torch.compile on a machine without a GPU: code is generated for it, run on fake tensors and recorded.

After `fake_cuda.load`. Inductor writes the wrapper and the Triton sources that it would write on the real device, but
for what it decides by timing kernels: convolutions and matrix products stay with cuDNN and cuBLAS, shapes unpadded.
"""

import dataclasses
import math
import re
import types

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import async_compile, config
from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
from torch._inductor.runtime import triton_heuristics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastdmd import ops
from fastdmd.kernels._common import ticket

PROPERTIES = dict(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    gcnArchName="sm_90",
)
aten = torch.ops.aten
LIBRARIES = {  # what cuDNN, cuBLAS and flash attention compute
    aten.convolution: "convolution",
    aten.convolution_backward: "convolution backward",
    aten.mm: "matrix product",
    aten.addmm: "matrix product",
    aten.bmm: "matrix product",
    aten._scaled_dot_product_flash_attention: "attention",
    aten._scaled_dot_product_flash_attention_backward: "attention backward",
}
FREE = {"device", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}  # launch nothing


def install() -> None:
    """Makes torch.compile believe in the device. Not to be undone."""
    constants = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": types.SimpleNamespace(**PROPERTIES),
        "set_device": None,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_rng_state": None,
    }
    for name, value in constants.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    torch.cuda.get_rng_state = lambda *_: torch.empty(16, dtype=torch.uint8)
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            utils=types.SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448}),
        )
    )
    # What would time kernels: templates, replacements of hand-written attention, padded shapes.
    config.max_autotune_gemm_backends = config.max_autotune_conv_backends = "ATEN"
    config.triton.autotune_cublasLt = False
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = lambda *_: None
    config.shape_padding = False
    config.compile_threads = 1
    config.force_disable_caches = True
    config.profile_bandwidth = True  # notes in each kernel how many bytes it moves
    triton_heuristics.start_graph = triton_heuristics.end_graph = lambda *_: None

    folder = joint_graph.UniformValueConstantFolder
    folder._deduce_value = _on_host(folder._deduce_value)

    # What generated wrappers call.
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=0)
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: x.as_strided(
        size, stride, x.storage_offset() + offset
    )
    guards.copy_if_misaligned = lambda x: x
    guards.assert_alignment = lambda *_: None
    async_compile.AsyncCompile.triton = lambda _, name, source, **__: GeneratedKernel(name, source)
    JITFunction.run = lambda kernel, *arguments, **_: Record.add("fastdmd", kernel.__name__, arguments, [])


def _on_host(function):
    """Constants of the graph that Inductor computes while it compiles."""

    class OnHost(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **({**kwargs, "device": "cpu"} if "device" in (kwargs or {}) else kwargs or {}))

    def call(*arguments):
        with OnHost():
            return function(*arguments)

    return call


@dataclasses.dataclass(frozen=True)
class Launch:
    """A call of a library, a generated kernel, one of fastdmd's ops, or an eager operation."""

    kind: str
    name: str
    inputs: list[torch.Tensor]  # fake
    outputs: list[torch.Tensor]
    num_bytes: int  # read and written, every element once
    flops: int = 0
    num_launches: int = 1
    source: str = ""


class Record(TorchDispatchMode):
    """The launches inside the block, in order. What runs inside must have run before: it is not to be compiled here."""

    active: "list[Record]" = []

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []
        ticket(torch.device("cuda", 0))  # allocated once in a process

    def __enter__(self):
        Record.active.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        Record.active.pop()
        return super().__exit__(*error)

    @classmethod
    def ignore_compile_internals(cls):
        return True

    @classmethod
    def add(cls, kind: str, name: str, inputs, outputs, num_bytes: int | None = None, **more) -> None:
        if cls.active:
            inputs, outputs = tensors(inputs), tensors(outputs)
            num_bytes = sum(map(size_bytes, inputs + outputs)) if num_bytes is None else num_bytes
            cls.active[-1].launches.append(Launch(kind, name, inputs, outputs, num_bytes, **more))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in FREE:
            return func(*args, **kwargs)
        with self:  # `to` is a view by its schema, and a copy once it is taken apart
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        written = [
            x
            for argument, x in zip(func._schema.arguments, args, strict=False)
            if argument.is_write and isinstance(x, torch.Tensor)
        ]
        if func.namespace == "fastdmd":
            with Record() as kernels:
                ops.implementations(name, "cuda")["triton"](*args)
            Record.add("fastdmd op", name, args, (result, written), num_launches=len(kernels.launches))
        elif (kind := LIBRARIES.get(func.overloadpacket)) is not None:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            num_launches = sum(args[-1][:2]) if name == "convolution_backward" else 1
            inputs = [x for x in tensors(args) if all(x is not y for y in tensors(result))]
            Record.add(kind, name, inputs, result, flops=flops, num_launches=num_launches)
        else:
            overwritten = written if name in ("copy_", "fill_", "zero_") else []
            Record.add(
                "eager", name, [x for x in tensors((args, kwargs)) if all(x is not y for y in overwritten)], result
            )
        return result


class GeneratedKernel:
    """A kernel of Inductor's, as its wrapper launches it."""

    def __init__(self, name: str, source: str):
        self.name, self.source = name, source
        self.num_bytes = round(float(re.search(r"'kernel_num_gb': ([^,}]+)", source)[1]) * 1e9)
        self.parameters = re.search(rf"def {name}\((.*?)\)", source)[1].replace(" ", "").split(",")
        self.kind = "generated pointwise" if "@triton_heuristics.pointwise" in source else "generated reduction"

    def run(self, *arguments, **_) -> None:
        given = list(zip(self.parameters, arguments, strict=False))
        inputs = [x for name, x in given if name.startswith("in_")]
        outputs = [x for name, x in given if name.startswith(("out_", "in_out_"))]
        Record.add(self.kind, self.name, inputs, outputs, self.num_bytes, source=self.source)


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def size_bytes(x: torch.Tensor) -> int:
    """Of the distinct elements: an expanded dimension has one."""
    return x.element_size() * math.prod(x.shape[dim] for dim in range(x.dim()) if x.stride(dim) > 0)


def layout(x: torch.Tensor) -> str:
    """Of a feature map or a slice of one: channels_last, contiguous, either, or other."""
    dense = {"channels_last": (0, 2, 3, 1), "contiguous": (0, 1, 2, 3)}
    fitting = []
    for name, order in dense.items():
        strides = [x.stride(dim) for dim in order if x.shape[dim] > 1]
        if strides == sorted(strides, reverse=True) and strides[-1:] in ([], [1]):
            fitting.append(name)
    return fitting[0] if len(fitting) == 1 else "either" if fitting else "other"
