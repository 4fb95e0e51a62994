"""The UNet: preconditioning, conditioning, layouts, configurations and what a weight file carries."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from fastdmd import diffusion, pretrain
from fastdmd.networks.unet import UNet, UNetConfig, positional_embedding
from fastdmd.networks.unet_blocks import Concatenate, Product1x1, Repeat
from fastdmd.networks.weights import load_network, save_network
from tests.helpers.networks import SMALL, make_network

VARIANTS = {
    "small": SMALL,
    "rgb, three levels, heads": UNetConfig(
        image_size=16,
        image_channels=3,
        model_channels=8,
        channel_multipliers=(1, 2, 3),
        num_blocks=2,
        attention_resolutions=(8, 16),
        channels_per_head=4,
        adaptive_scale=True,
    ),
    "unconditional, one level": UNetConfig(
        image_size=8, num_classes=0, model_channels=6, channel_multipliers=(1,), num_blocks=1, attention_resolutions=()
    ),
    "odd resolution": UNetConfig(image_size=10, model_channels=12, channel_multipliers=(1, 1), num_blocks=1),
    "ncsn++": UNetConfig(
        image_size=16,
        model_channels=8,
        channel_multipliers=(1, 2),
        num_blocks=1,
        attention_resolutions=(8,),
        embedding="fourier",
        noise_multiplier=2,
        encoder="residual",
        resample_filter=(1, 3, 3, 1),
    ),
    "adm": UNetConfig(
        image_size=16,
        model_channels=16,
        channel_multipliers=(1, 2),
        num_blocks=1,
        attention_resolutions=(8,),
        adm=True,
        adaptive_scale=True,
        channels_per_head=8,
    ),
}


def inputs(config, B=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, *config.image_shape, generator=generator)
    sigma = torch.tensor([0.01, 1.0, 60.0])[:B]
    labels = torch.tensor([0, 3, 9])[:B] if config.num_classes else None
    return x, sigma, labels


def test_a_product_is_the_convolution_of_single_pixels():
    layer = Product1x1(6, 9, 1).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    tensors, expected = (x, *layer.parameters()), layer(x)
    product = layer.as_product(x)
    assert product.is_contiguous(memory_format=torch.channels_last)
    assert_close(product, expected)
    grad = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(y, tensors, grad) for y in (product, expected))
    for got, one in zip(found, wanted, strict=True):
        assert_close(got, one)
        assert got.stride() == one.stride()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_forward_is_preconditioning_around_the_raw_network(config):
    network = make_network(config)
    x, sigma, labels = inputs(config)
    c_skip, c_out, c_in, c_noise = (v[:, None, None, None] for v in diffusion.preconditioning(sigma, 0.5))
    expected = c_skip * x + c_out * network.raw(c_in * x, c_noise.flatten(), labels)
    assert_close(network(x, sigma, labels), expected)
    assert network(x, sigma, labels).std() > 0.1


def test_repetition_and_its_gradients():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.equal(Repeat.apply(x), expected)
    assert_close(torch.autograd.grad(Repeat.apply(x), x, grad), torch.autograd.grad(expected, x, grad))
    assert torch.autograd.gradgradcheck(Repeat.apply, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_concatenation_has_dense_gradients(layout):
    """In the layout of the images; of a plain one they are slices, which each convolution copies."""
    pair = [
        torch.randn(2, channels, 4, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        for channels in (3, 5)
    ]
    expected = torch.cat(pair, dim=1)
    grad = torch.randn(expected.shape, dtype=torch.float64).contiguous(memory_format=layout)
    assert torch.equal(Concatenate.apply(*pair), expected)
    found = torch.autograd.grad(Concatenate.apply(*pair), pair, grad)
    for got, sliced in zip(found, torch.autograd.grad(expected, pair, grad), strict=True):
        assert torch.equal(got, sliced) and got.is_contiguous(memory_format=layout)
    assert torch.autograd.gradgradcheck(Concatenate.apply, pair)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_layouts_and_batches_agree(config):
    """channels_last or not, one image or three, labels as integers or one-hot: the same numbers."""
    network = make_network(config)
    x, sigma, labels = inputs(config)
    expected = network(x, sigma, labels)
    one_hot = None if labels is None else torch.nn.functional.one_hot(labels, config.num_classes).float()
    assert_close(network(x, sigma, one_hot), expected, rtol=1e-5, atol=1e-5)
    singles = [network(x[i : i + 1], sigma[i : i + 1], None if labels is None else labels[i : i + 1]) for i in range(3)]
    assert_close(torch.cat(singles), expected, rtol=1e-4, atol=1e-5)
    network.to(memory_format=torch.contiguous_format)
    assert_close(network(x, sigma, labels), expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_and_condition_matters():
    network = make_network().requires_grad_(True)
    x, sigma, labels = inputs(SMALL)
    output = network(x, sigma, labels)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    assert not torch.allclose(network(x, sigma, labels.roll(1)), output, atol=1e-3)
    assert not torch.allclose(network(x, sigma * 2, labels), output, atol=1e-3)


def test_a_fresh_network_predicts_the_data_mean():
    """The last convolution starts near zero: D_x = c_skip * x, and the loss starts near one."""
    network = UNet(SMALL)
    x, sigma, labels = inputs(SMALL)
    c_skip = diffusion.preconditioning(sigma, 0.5)[0]
    assert_close(network(x, sigma, labels), diffusion.per_sample(c_skip) * x, rtol=0, atol=1e-3)


def test_positional_embedding_is_cosines_then_sines():
    embedding = positional_embedding(torch.tensor([0.0, 2.0]), 4)
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 0.02, 2.0, 0.02]])
    expected[1] = torch.cat([expected[1, :2].cos(), expected[1, 2:].sin()])
    assert_close(embedding, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": 30, "patch_size": 2, "channel_multipliers": (1, 2, 2)},
            "image_size divisible by 8 .*, got 30",
        ),
        ({"model_channels": 7}, "an even model_channels >= 4, got 7"),
        ({"channel_multipliers": ()}, "at least one channel multiplier"),
        ({"num_classes": -1}, "num_classes from 0 to 1048576, got -1"),
        ({"num_blocks": 10**9}, "num_blocks from 1 to 1024, got 1000000000"),
        ({"model_channels": 4.0}, "model_channels from 1 to 16384, got 4.0"),
        ({"resample_filter": (1, 2, 1)}, "a resample_filter of even length"),
        ({"sigma_data": math.inf}, "sigma_data > 0 and at most 1e.06, got inf"),
        ({"sigma_data": 0.0}, "sigma_data > 0 and at most 1e.06, got 0.0"),
    ],
)
def test_configurations_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**options)


def test_heads_divide_their_channels():
    for width, per_head, heads in ((8, 4, 2), (8, 16, 1), (12, 5, 2), (8, 0, 1)):
        config = dataclasses.replace(
            SMALL, model_channels=width, channel_multipliers=(1, 1), channels_per_head=per_head
        )
        assert UNet(config).middle[0].attention.num_heads == heads
    with pytest.raises(
        ValueError, match=r"expected channels divisible by their 3 heads \(channels_per_head 4\), got 14"
    ):
        UNet(dataclasses.replace(SMALL, model_channels=14, channel_multipliers=(1, 1), channels_per_head=4))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (7,)),
        (["--attention-resolutions", "14", "7"], (14, 7)),
        (["--attention-resolutions"], ()),
        (["--patch-size", "1"], (14,)),
        (["--channel-multipliers", "1", "--patch-size", "4"], (7,)),
    ],
)
def test_pretrain_attends_where_it_is_asked_to(options, expected, capsys):
    pretrain.main(["--dry-run", "--device", "cpu", "--model-channels", "8", *options])
    resolved = json.loads(capsys.readouterr().out)
    for part in ("network", "architecture"):
        assert tuple(resolved[part]["attention_resolutions"]) == expected


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (["16"], "14, 7"),
        (["7", "28"], "14, 7"),
        (["7", "--patch-size", "1"], "28, 14"),
        (["5", "--channel-multipliers", "1"], "14"),
    ],
)
def test_pretrain_refuses_attention_at_sizes_that_are_not_there(options, sizes, capsys):
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--dry-run", "--device", "cpu", "--attention-resolutions", *options])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert f"expected --attention-resolutions out of {sizes}, the feature-map sizes of these images, got (" in error


def test_labels_are_classes(teacher):
    """As an embedding has it: none counts from the end, and bytes are no mask."""
    noise = torch.randn(4, *teacher.image_shape)
    with pytest.raises(IndexError):
        teacher(noise, torch.ones(4), torch.full((4,), -1))
    with pytest.raises(RuntimeError, match="Long, Int"):
        teacher(noise, torch.ones(4), torch.zeros(4, dtype=torch.uint8))


def test_a_conditional_network_asks_for_labels(teacher):
    with pytest.raises(ValueError, match="expected class_labels for 10 classes, got None"):
        teacher(torch.zeros(1, 1, 28, 28), torch.ones(1))


def test_weight_file_carries_its_configuration(tmp_path):
    network = make_network(VARIANTS["rgb, three levels, heads"])
    path = tmp_path / "network.safetensors"
    save_network(path, network, kind="generator", conditioning_sigma=12.5)
    loaded, metadata = load_network(path)
    assert loaded.config == network.config
    assert metadata["kind"] == "generator" and metadata["conditioning_sigma"] == 12.5
    x, sigma, labels = inputs(network.config)
    assert torch.equal(loaded(x, sigma, labels), network(x, sigma, labels))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_weight_files_that_are_refused(tmp_path, teacher_file):
    content = teacher_file.read_bytes()
    cases = {
        "truncated": (content[: len(content) // 2], "expected a safetensors file"),
        "text": (b"these are no weights", "expected a safetensors file"),
        "empty": (b"", "expected a weight file, got .*empty.safetensors, which is empty"),
    }
    for name, (bytes_, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bytes_)
        with pytest.raises(ValueError, match=message):
            load_network(path)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors, which does not exist"):
        load_network(tmp_path / "nowhere.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="foreign.safetensors without its metadata"):
        load_network(tmp_path / "foreign.safetensors")
    metadata = {"fastdmd": json.dumps({"kind": "teacher", "network": dataclasses.asdict(SMALL)})}
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "other.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="expected the tensors of UNet in"):
        load_network(tmp_path / "other.safetensors")


def test_emphasized_labels_are_farther_from_their_mean():
    network = make_network()
    before = network.map_label.weight.clone()
    network.emphasize_labels(1.5)
    mean = before.mean(dim=1, keepdim=True)
    assert_close(network.map_label.weight - mean, 1.5 * (before - mean))
    with pytest.raises(ValueError, match="class-conditional network, got an unconditional one"):
        make_network(VARIANTS["unconditional, one level"]).emphasize_labels(1.5)
