"""EDM's networks (Karras et al. 2022) as ours, from their constructors' arguments and their tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.networks.states import require_finite
from fastdmd.networks.unet import UNet, UNetConfig
from fastdmd.networks.unet_blocks import Block, separable_filter
from fastdmd.teachers.edm_pickle import load_pickle
from fastdmd.teachers.inert_pickle import shown

# Arguments of the constructors and their defaults; None: there is none.
INTERFACE = {
    "img_resolution": None,
    "img_channels": None,
    "label_dim": 0,
    "use_fp16": False,
    "sigma_min": 0,
    "sigma_max": math.inf,
    "sigma_data": 0.5,
    "model_type": "DhariwalUNet",
}
FAMILIES = {
    "SongUNet": {
        "augment_dim": 0,
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "dropout": 0.1,
        "label_dropout": 0,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": (1, 1),
    },
    "DhariwalUNet": {
        "augment_dim": 0,
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
        "dropout": 0.1,
        "label_dropout": 0,
    },
}
EMBEDDINGS = {"positional": "ddpmpp", "fourier": "fourier"}
CHOICES = {
    "embedding_type": tuple(EMBEDDINGS),
    "encoder_type": ("standard", "residual"),
    "decoder_type": ("standard",),
}
MAX_NUMBER = 1 << 14  # of an argument, so that no product of some overflows; EDM's largest is 1,000
MAX_LENGTH = 16  # of a list


def load(path: str | Path) -> UNet:
    """The network in a pickle of EDM, read without executing anything in it; see `load_pickle` and `from_edm`."""
    arguments, tensors = load_pickle(path)
    try:
        return from_edm(arguments, tensors)
    except ValueError as error:
        raise ValueError(f"{error} in {path}") from error


def from_edm(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> UNet:
    """A network of EDM from the arguments of its constructor and its tensors, under EDM's names.

    `config` holds the arguments of `EDMPrecond`: `img_resolution`, `img_channels`, `label_dim`, `model_type` and those
    of that model; what is left out has EDM's default. The network computes in float32 whatever `use_fp16` says, ignores
    `label_dropout`, which matters to training alone, and `sigma_min` and `sigma_max`, which limit nobody's `sigma`.
    Returns it in eval mode, channels_last, without gradients.

    Raises ValueError for an argument that is unknown or cannot be met, where a tensor is missing, left over or of
    another shape, all of that before memory for the network is taken, and where one is not finite.
    """
    unet_config = config_from_edm(config)
    tensors = _without_filters(state_dict, unet_config)
    blueprint = UNet.blueprint(unet_config, len(tensors))
    _expect_groups(blueprint)
    parts, shapes = dict(edm_parts(blueprint)), blueprint.state_dict()
    for name, part in parts.items():
        if name not in tensors:
            raise ValueError(f"fastdmd.teachers: expected the tensor {name}, got a state without it")
        expected, got = part.of(shapes).shape, tensors[name].shape
        if expected != got:
            raise ValueError(f"fastdmd.teachers: expected {name} of shape {tuple(expected)}, got {tuple(got)}")
    if left_over := sorted(tensors.keys() - parts.keys()):
        raise ValueError(f"fastdmd.teachers: expected no other tensors, got {', '.join(left_over[:5])}")

    network = UNet(unet_config)
    state = network.state_dict()
    for name, part in parts.items():
        part.of(state).copy_(part.ordered(tensors[name]))
    require_finite(network, "the network of EDM")
    return network.in_best_layout().eval().requires_grad_(False)


def _expect_groups(network: UNet) -> None:
    """EDM normalises C channels in min(32, C // 4) groups; where that does not divide C, its networks cannot run."""
    for norm in (module for module in network.modules() if isinstance(module, nn.GroupNorm)):
        groups = min(32, norm.num_channels // 4)
        if norm.num_channels % groups:
            raise ValueError(
                f"fastdmd.teachers: expected widths that EDM's min(32, C // 4) groups divide, got {norm.num_channels} "
                f"channels in {groups} groups"
            )


def config_from_edm(arguments: Mapping[str, Any]) -> UNetConfig:
    """The configuration of a network of EDM. Raises ValueError for arguments that are unknown or cannot be met."""
    model_type = arguments.get("model_type", INTERFACE["model_type"])
    if type(model_type) is not str or model_type not in FAMILIES:
        raise ValueError(f"fastdmd.teachers: expected model_type {' or '.join(FAMILIES)}, got {shown(model_type)}")
    defaults = INTERFACE | FAMILIES[model_type]
    for name in arguments:
        if name not in defaults:
            raise ValueError(f"fastdmd.teachers: expected the arguments of {model_type}, got {shown(name)}")
    edm = {**defaults, **arguments}
    for name, value in edm.items():
        _check(name, value, defaults[name])
    shared = dict(
        image_size=edm["img_resolution"],
        image_channels=edm["img_channels"],
        num_classes=edm["label_dim"],
        model_channels=edm["model_channels"],
        channel_multipliers=edm["channel_mult"],
        num_blocks=edm["num_blocks"],
        attention_resolutions=edm["attn_resolutions"],
        embedding_multiplier=edm["channel_mult_emb"],
        augment_dim=edm["augment_dim"],
        dropout=edm["dropout"],
        sigma_data=edm["sigma_data"],
    )
    if model_type == "DhariwalUNet":
        return UNetConfig(**shared, adm=True, adaptive_scale=True, channels_per_head=64)
    return UNetConfig(
        **shared,
        embedding=EMBEDDINGS[edm["embedding_type"]],
        noise_multiplier=edm["channel_mult_noise"],
        encoder=edm["encoder_type"],
        resample_filter=edm["resample_filter"] if len(edm["channel_mult"]) > 1 else (1, 1),  # of one level: unused
    )


def _check(name: str, value: Any, default: Any) -> None:
    """Type and range of an argument; the default, or its absence for a whole number above 0, tells the type."""

    def is_whole(number: Any, least: int) -> bool:
        return type(number) is int and least <= number <= MAX_NUMBER

    if name == "model_type":
        return
    if name in CHOICES:
        correct, expected = type(value) is str and value in CHOICES[name], " or ".join(CHOICES[name])
    elif name == "use_fp16":
        correct, expected = type(value) is bool, "True or False"
    elif isinstance(default, tuple):
        correct = type(value) in (list, tuple) and len(value) <= MAX_LENGTH and all(is_whole(v, 1) for v in value)
        expected = f"of at most {MAX_LENGTH} whole numbers of 1 to {MAX_NUMBER}"
    elif name in ("dropout", "label_dropout"):
        correct, expected = type(value) in (int, float) and 0 <= value < 1, "from 0 to below 1"
    elif name in ("sigma_min", "sigma_max", "sigma_data"):
        correct, expected = type(value) in (int, float) and value >= 0, "of at least 0"
    else:
        least = 0 if default == 0 else 1
        correct, expected = is_whole(value, least), f"of {least} to {MAX_NUMBER}"
    if not correct:
        raise ValueError(f"fastdmd.teachers: expected {name} {expected}, got {shown(value)}")


def _without_filters(state_dict: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The tensors by their names inside EDM's inner model; the constant resampling filters are compared and dropped."""
    kernel = separable_filter(config.resample_filter)[None, None]
    tensors = {}
    for full_name, tensor in state_dict.items():
        name = full_name.removeprefix("model.")
        if not tensor.is_floating_point() or name in tensors:
            raise ValueError(f"fastdmd.teachers: expected one floating-point tensor {name}, got another")
        if not name.endswith(".resample_filter"):
            tensors[name] = tensor
        elif tensor.shape != kernel.shape or not torch.allclose(tensor.float(), kernel, rtol=1e-3):
            raise ValueError(f"fastdmd.teachers: expected {name} to be that of {config.resample_filter}, got another")
    return tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a tensor of an EDM network goes: to one of ours, or to rows of it."""

    name: str
    rows: slice | None = None
    num_heads: int = 0  # of a qkv tensor, whose rows EDM orders by head, channel, role, and we by role, head, channel

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        tensor = state[self.name]
        return tensor if self.rows is None else tensor[self.rows]

    def ordered(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.num_heads, -1, 3)).movedim(2, 0).flatten(0, 2) if self.num_heads else tensor


def edm_parts(network: UNet) -> Iterator[tuple[str, Part]]:
    """Every tensor of an EDM network, by its name there, and its place in ours."""
    config = network.config
    yield from _weight_and_bias("map_layer0", "map_noise.0")
    yield from _weight_and_bias("map_layer1", "map_noise.2")
    if config.num_classes:
        yield "map_label.weight", Part("map_label.weight")
        if not config.adm:
            yield "map_label.bias", Part("map_label.bias")
    if config.augment_dim:
        yield "map_augment.weight", Part("map_augment.weight")
    if config.embedding == "fourier":
        yield "map_noise.freqs", Part("frequencies")
    size = config.image_size
    yield from _weight_and_bias(f"enc.{size}x{size}_conv", "conv_in")
    row = 0
    for edm, ours, block in _blocks(network):
        yield from _block_parts(edm, ours, block, slice(row, row + block.embedding_channels))
        row += block.embedding_channels
    for index in range(len(network.residual_inputs)):
        size = config.image_size >> (index + 1)
        yield from _weight_and_bias(f"enc.{size}x{size}_aux_residual", f"residual_inputs.{index}.conv")
    last = "out" if config.adm else f"dec.{config.image_size}x{config.image_size}_aux"
    yield from _weight_and_bias(f"{last}_norm", "norm_out")
    yield from _weight_and_bias(f"{last}_conv", "conv_out")


def _blocks(network: UNet) -> Iterator[tuple[str, str, Block]]:
    """EDM's name, ours, and the block, in the order in which `map_blocks` holds their embeddings."""
    sizes = [network.config.image_size >> level for level in range(len(network.config.channel_multipliers))]
    num_blocks = network.config.num_blocks
    encoder, middle, decoder = [], [f"dec.{sizes[-1]}x{sizes[-1]}_in{index}" for index in range(2)], []
    for level, size in enumerate(sizes):
        encoder += [f"enc.{size}x{size}_down"] * (level > 0)
        encoder += [f"enc.{size}x{size}_block{index}" for index in range(num_blocks)]
    for size in reversed(sizes):
        decoder += [f"dec.{size}x{size}_up"] * (size != sizes[-1])
        decoder += [f"dec.{size}x{size}_block{index}" for index in range(num_blocks + 1)]
    for ours, names in (("encoder", encoder), ("middle", middle), ("decoder", decoder)):
        for index, (edm, block) in enumerate(zip(names, getattr(network, ours), strict=True)):
            yield edm, f"{ours}.{index}", block


def _block_parts(edm: str, ours: str, block: Block, rows: slice) -> Iterator[tuple[str, Part]]:
    for name in ("norm0", "conv0", "norm1", "conv1"):
        yield from _weight_and_bias(f"{edm}.{name}", f"{ours}.{name}")
    yield from _weight_and_bias(f"{edm}.affine", "map_blocks", rows=rows)
    if block.skip is not None:
        yield from _weight_and_bias(f"{edm}.skip", f"{ours}.skip")
    if block.attention is not None:
        yield from _weight_and_bias(f"{edm}.norm2", f"{ours}.attention.norm")
        yield from _weight_and_bias(f"{edm}.qkv", f"{ours}.attention.qkv", num_heads=block.attention.num_heads)
        yield from _weight_and_bias(f"{edm}.proj", f"{ours}.attention.proj")


def _weight_and_bias(edm: str, ours: str, **options: Any) -> Iterator[tuple[str, Part]]:
    for kind in ("weight", "bias"):
        yield f"{edm}.{kind}", Part(f"{ours}.{kind}", **options)
