"""EDM's networks: golden values of another implementation, a plain one of our own, published variants."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fastdmd.networks.unet import UNet
from fastdmd.networks.weights import load_network, save_network
from fastdmd.teachers.edm import config_from_edm, edm_parts, from_edm
from tests.helpers.edm_reference import Weights, denoise, random_state
from tests.helpers.edm_variants import PUBLISHED, inputs, small

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # angles of the noise embedding are float32 in both


def distance(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def gradient_norms(network):
    """Of every parameter, by its name in EDM."""
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {name: part.of(gradients).norm().item() for name, part in edm_parts(network) if part.name in gradients}


def golden(name):
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    content = np.load(path)
    tensors = {key: torch.from_numpy(content[key]) for key in content.files if content[key].dtype.kind == "f"}
    state = {key.removeprefix("state/"): tensor for key, tensor in tensors.items() if key.startswith("state/")}
    names = [str(name).removeprefix("model.") for name in content["param_names"]]
    norms = dict(zip(names, content["param_grad_norms"].tolist(), strict=True))
    return json.loads(str(content["config"])), state, tensors, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["edm_ddpmpp_tiny", "edm_adm_tiny"])
def test_golden_networks(name, dtype):
    config, state, tensors, norms = golden(name)  # the state in float16, which is exact
    network = from_edm(config, state)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    network = network.to(dtype).requires_grad_(True)
    x = tensors["x"].to(dtype).requires_grad_(True)
    sigma, labels = tensors["sigma"].to(dtype), tensors["class_labels"]
    D_x = network(x, sigma, labels)
    D_x.backward(tensors["cotangent"].to(dtype))
    # The golden values were computed in float32: they are some 1e-6 from what float64 gives.
    assert distance(D_x.detach(), tensors["D_x"]) < 1e-5
    assert distance(x.grad, tensors["grad_x"]) < 1e-5
    assert gradient_norms(network) == pytest.approx(norms, rel=1e-5)
    assert torch.equal(network(x, sigma, labels.argmax(dim=1)), D_x)


@pytest.mark.parametrize("name", ["edm_ddpmpp_tiny", "edm_adm_tiny"])
def test_the_plain_networks_are_golden_too(name):
    config, state, tensors, _ = golden(name)
    weights = Weights({key: tensor.float() for key, tensor in state.items()})
    D_x = denoise(config, weights, tensors["x"], tensors["sigma"], tensors["class_labels"])
    assert distance(D_x, tensors["D_x"]) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_variant_is_the_plain_network(name, dtype):
    """Values and gradients for the input and all parameters but that of augmentation labels, which is kept as it is."""
    config = small(name)
    state = random_state(config)
    network = from_edm(config, state).to(dtype).requires_grad_(True)
    x, sigma, labels, cotangent = inputs(config, dtype)
    tensors = {key: tensor.to(dtype).requires_grad_(True) for key, tensor in state.items()}
    weights = Weights(tensors)

    x_plain = x.clone().requires_grad_(True)
    expected = denoise(config, weights, x_plain, sigma, labels)
    expected.backward(cotangent)
    x.requires_grad_(True)
    D_x = network(x, sigma, labels)
    D_x.backward(cotangent)
    assert distance(D_x.detach(), expected.detach()) < TOLERANCE[dtype]
    assert distance(x.grad, x_plain.grad) < TOLERANCE[dtype]
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for edm_name, part in edm_parts(network):
        if edm_name == "map_augment.weight":
            assert gradients[part.name] is None and config["augment_dim"] > 0
            assert torch.equal(network.map_augment.weight, tensors[f"model.{edm_name}"])
        elif part.name in gradients:
            expected_gradient = part.ordered(tensors[f"model.{edm_name}"].grad)
            assert distance(part.of(gradients), expected_gradient) < 20 * TOLERANCE[dtype], edm_name


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """At full size, without memory: the tensors that the plain network asks for are those that ours takes."""

    class Shapes(dict):
        def __call__(self, name, *shape):
            return self.setdefault(name, torch.empty(shape, device="meta"))

    config, expected = PUBLISHED[name], Shapes()
    complete = {"num_blocks": 4, "attn_resolutions": [16]} | config
    if config["model_type"] == "DhariwalUNet":
        complete |= {"num_blocks": 3, "attn_resolutions": [32, 16, 8]}
    with torch.device("meta"):
        network = UNet(config_from_edm(config))
        label_dim = config["label_dim"]
        shape = (1, 3, config["img_resolution"], config["img_resolution"])
        denoise(
            complete,
            expected,
            torch.empty(shape),
            torch.empty(1),
            torch.empty(1, label_dim),
            torch.empty(1, config.get("augment_dim", 0)),
        )
    got = {name: tuple(part.of(network.state_dict()).shape) for name, part in edm_parts(network)}
    assert got == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    known = {"cifar10-32x32-cond-vp": 55.7, "imagenet-64x64-cond-adm": 295.9}  # of the papers
    assert millions == pytest.approx(known.get(name, millions), abs=0.1)
    assert network.config.dropout == config["dropout"]


@pytest.mark.parametrize("name", ["cifar10-32x32-cond-vp", "imagenet-64x64-cond-adm"])
def test_labels_of_all_zeros_mean_no_class(name):
    config = small(name)
    state = random_state(config)
    network = from_edm(config, state)
    x, sigma, labels, _ = inputs(config, torch.float32)
    expected = denoise(config, Weights(state), x, sigma, torch.zeros_like(labels))
    got = network(x, sigma, torch.zeros_like(labels))
    assert distance(got, expected) < 1e-5
    assert distance(got, network(x, sigma, labels)) > 1e-3
    assert torch.equal(network(x, sigma, labels.argmax(dim=1)), network(x, sigma, labels))


CORNERS = {
    "adm, too narrow for a head at the finest level": small("imagenet-64x64-cond-adm") | {"attn_resolutions": [16, 8]},
    "adm, too narrow for a head anywhere": small("imagenet-64x64-cond-adm") | {"channel_mult": [1, 1]},
    "adm, labels of augmentation but none of classes": small("imagenet-64x64-cond-adm") | {"label_dim": 0},
    "adm, heads wider than 64": small("imagenet-64x64-cond-adm") | {"model_channels": 96, "channel_mult": [1, 2]},
    "adm, wider at its finest level": small("imagenet-64x64-cond-adm") | {"channel_mult": [2, 3]},
    "adm, one level": small("imagenet-64x64-cond-adm") | {"channel_mult": [3]},
    "one level": small("cifar10-32x32-cond-vp") | {"channel_mult": [2]},
    "one level, residual, a filter that nothing uses": small("cifar10-32x32-cond-ve")
    | {"channel_mult": [1], "resample_filter": [1, 2, 1]},
    "attention nowhere but in the middle": small("cifar10-32x32-cond-vp") | {"attn_resolutions": []},
    "attention everywhere": small("ffhq-64x64-uncond-ve") | {"attn_resolutions": [16, 8, 4, 2]},
    "augmentation labels, no class labels": small("cifar10-32x32-uncond-vp") | {"augment_dim": 3},
    "class labels, no augmentation labels": small("cifar10-32x32-cond-ve") | {"augment_dim": 0},
    "multipliers of three": small("cifar10-32x32-cond-vp") | {"model_channels": 12, "channel_mult": [1, 3]},
    "odd width, even noise embedding": small("cifar10-32x32-cond-ve") | {"model_channels": 5, "channel_mult": [1, 1]},
    "widths of embeddings": small("cifar10-32x32-cond-vp") | {"channel_mult_emb": 1, "channel_mult_noise": 3},
    "dropout": small("cifar10-32x32-cond-vp") | {"dropout": 0.9, "label_dropout": 0.9, "use_fp16": True},
    "one class": small("cifar10-32x32-cond-vp") | {"label_dim": 1},
}


@pytest.mark.parametrize("config", CORNERS.values(), ids=CORNERS)
def test_corners_of_the_constructors_are_the_plain_network(config):
    state = random_state(config)
    network = from_edm(config, state).double()
    x, sigma, *_ = inputs(config | {"label_dim": 0}, torch.float64)
    label_dim = config["label_dim"]
    labels = torch.eye(label_dim, dtype=torch.float64)[torch.tensor([1, 0, 4]) % label_dim] if label_dim else None
    weights = Weights({key: tensor.double() for key, tensor in state.items()})
    expected = denoise(config, weights, x, sigma, labels)
    assert distance(network(x, sigma, labels), expected) < TOLERANCE[torch.float64]
    unused = {name for name in state if name.endswith(("resample_filter", "map_augment.weight"))}
    assert weights.used == state.keys() - unused


def test_narrow_levels_of_adm_have_no_attention():
    """Heads are 64 channels wide: with 32, the tensors of attention are not there, and refused where they are."""
    config = small("imagenet-64x64-cond-adm") | {"attn_resolutions": [16, 8, 4], "channel_mult": [1, 2, 1]}
    state = random_state(config)
    attending = {name.rpartition(".qkv")[0] for name in state if ".qkv" in name}
    assert attending == {"model.enc.8x8_block0", "model.dec.8x8_block0", "model.dec.8x8_block1"}
    blocks = [block for _, block in from_edm(config, state).named_modules() if getattr(block, "attention", None)]
    assert [block.attention.num_heads for block in blocks] == [1, 1, 1]
    state["model.enc.16x16_block0.qkv.weight"] = torch.zeros(96, 32, 1, 1)
    with pytest.raises(ValueError, match="expected no other tensors, got enc.16x16_block0.qkv.weight"):
        from_edm(config, state)


def test_half_precision_tensors_become_float32():
    config = small("cifar10-32x32-cond-vp") | {"use_fp16": True}
    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    network = from_edm(config, state)
    expected = from_edm(config, {name: tensor.float() for name, tensor in state.items()})
    x, sigma, labels, _ = inputs(config, torch.float32)
    assert network(x, sigma, labels).dtype == torch.float32
    assert torch.equal(network(x, sigma, labels), expected(x, sigma, labels))
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_names_may_be_those_of_the_inner_model():
    config = small("cifar10-32x32-uncond-ve")
    state = random_state(config)
    inner = {name.removeprefix("model."): tensor for name, tensor in state.items() if "resample_filter" not in name}
    x, sigma, *_ = inputs(config, torch.float32)
    assert torch.equal(from_edm(config, inner)(x, sigma), from_edm(config, state)(x, sigma))


def test_a_network_of_edm_survives_a_weight_file(tmp_path):
    config = small("cifar10-32x32-cond-ve")
    network = from_edm(config, random_state(config))
    save_network(tmp_path / "teacher.safetensors", network, kind="teacher")
    x, sigma, labels, _ = inputs(config, torch.float32)
    loaded, _ = load_network(tmp_path / "teacher.safetensors")
    assert_close(loaded(x, sigma, labels), network(x, sigma, labels), rtol=0, atol=0)
