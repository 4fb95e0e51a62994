"""Writes pickles in the layout of EDM's published ones, and the opcodes for those that no honest program writes."""

import collections
import io
import pickle
import struct
import types

import numpy as np
import torch

TINY = {  # arguments of a network that takes no time
    "model_type": "SongUNet",
    "img_resolution": 4,
    "img_channels": 1,
    "label_dim": 2,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "embedding_type": "fourier",
}
SOURCE = "raise RuntimeError('the source code inside a pickle was executed')\n"


class Call:
    """Pickles as a call of `module.name` with these arguments; nothing needs to exist under that name."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments

    def __reduce__(self):
        def function():
            raise AssertionError

        function.__module__, function.__qualname__ = self.module, self.name
        return function, self.arguments


class Persistent(Call):
    """Pickles as EDM's objects do: a call with its class, the source of its module, and its state."""

    def __init__(self, class_name, state, source=SOURCE):
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
        super().__init__("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


class _Pickler(pickle._Pickler):
    """Writes the name of a function without asking whether it can be imported."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_function(self, function):
        module, name = function.__module__, function.__qualname__
        self.save(module)
        self.save(name)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(function)

    dispatch[types.FunctionType] = save_function


def dumps(value) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=4).dump(value)
    return file.getvalue()


def module(class_name, parameters=(), buffers=(), modules=(), source=SOURCE, **attributes):
    state = {"training": False, "_parameters": dict(parameters), "_buffers": dict(buffers)}
    state |= {"_non_persistent_buffers_set": set(), "_forward_hooks": collections.OrderedDict()}
    return Persistent(class_name, state | {"_modules": dict(modules)} | attributes, source)


def network(config, state, source=SOURCE):
    """EDM's network of this configuration and these tensors."""

    def build(class_name, prefix):
        inside = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        own = {name: state[prefix + name] for name in inside if "." not in name}
        buffers = {name: tensor for name, tensor in own.items() if name in ("resample_filter", "freqs")}
        parameters = {name: torch.nn.Parameter(own[name], False) for name in own if name not in buffers}
        children = {name.split(".")[0]: None for name in inside if "." in name}
        modules = {name: build("Layer", f"{prefix}{name}.") for name in children}
        if class_name == "Layer" and prefix in ("model.enc.", "model.dec."):
            container = torch.nn.ModuleDict()
            container._modules.update(modules)
            return container
        attributes = {"_init_args": (), "_init_kwargs": config, "source": source} if class_name == "EDMPrecond" else {}
        return module(class_name, parameters, buffers, modules, skip_scale=np.sqrt(0.5), **attributes)

    return build("EDMPrecond", "")


def published(config, state, **entries):
    return {
        "ema": network(config, state),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}),
        "augment_pipe": None,
        "dataset_kwargs": {"path": "datasets/none.zip"},
    } | entries


# Opcodes, for what no pickler writes.
def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def name(module_name: str, member: str) -> bytes:
    return text(module_name) + text(member) + pickle.STACK_GLOBAL


def assemble(*parts: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(parts) + pickle.STOP
