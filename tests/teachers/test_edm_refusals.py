"""What is refused as one of EDM's networks: arguments and tensors that cannot be, one line for each."""

import math

import pytest
import torch

from fastdmd.teachers.edm import from_edm
from tests.helpers.edm_reference import random_state
from tests.helpers.edm_variants import small


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({"model_channels": 18}, 18),
        ({"model_channels": 48, "channel_mult": [3]}, 144),
        ({"model_channels": 4, "channel_mult": [16, 19]}, 152),
    ],
)
def test_widths_that_edm_cannot_normalise_are_refused(changes, channels):
    """They make a network there, which fails at its first image: nobody has trained one."""
    config = small("cifar10-32x32-cond-vp") | changes
    with pytest.raises(RuntimeError, match="divisible"):
        random_state(config)
    state = {f"model.{index}": torch.zeros(1) for index in range(9)}
    with pytest.raises(ValueError, match=rf"EDM's min\(32, C // 4\) groups divide, got {channels} channels"):
        from_edm(config, state)


@pytest.mark.parametrize(
    ("value", "dtype", "kind"),
    [(math.nan, torch.float32, "NaN"), (7e4, torch.float16, "infinity"), (1e300, torch.float64, "infinity")],
)
def test_tensors_that_are_not_finite_are_refused(value, dtype, kind):
    """As they are, and where the precision of the file or of the network cannot hold them."""
    config = small("cifar10-32x32-cond-vp")
    state = random_state(config)
    name = "model.dec.2x2_in0.qkv.weight"
    state[name] = state[name].double().index_fill(0, torch.tensor([3]), value).to(dtype)
    with pytest.raises(ValueError, match=f"expected finite weights in .*, got {kind} in middle.0.attention.qkv.weight"):
        from_edm(config, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": "UNet"}, "expected model_type SongUNet or DhariwalUNet, got 'UNet'"),
        ({"model_type": ["SongUNet"]}, "expected model_type SongUNet or DhariwalUNet, got some list"),
        ({"img_resolution": None}, "expected img_resolution of 1 to 16384, got None"),
        ({"img_resolution": 10}, "expected image_size divisible by 4"),
        ({"img_channels": True}, "expected img_channels of 1 to 16384, got True"),
        ({"label_dim": -1}, "expected label_dim of 0 to 16384, got -1"),
        ({"model_channels": 10**30}, "expected model_channels of 1 to 16384, got 1000"),
        ({"model_channels": 7}, "expected an even model_channels >= 4, got 7"),
        ({"channel_mult": []}, "expected at least one channel multiplier"),
        ({"channel_mult": [1, 0.5]}, "expected channel_mult of at most 16 whole numbers of 1 to 16384, got some list"),
        ({"channel_mult": 2}, "expected channel_mult of at most 16 whole numbers of 1 to 16384, got 2"),
        ({"num_blocks": 1000}, r"expected the tensors of every block, got \d+ tensors"),
        ({"resample_filter": [1] * 17}, "expected resample_filter of at most 16"),
        ({"resample_filter": [1, 2, 1]}, "expected a resample_filter of even length"),
        ({"embedding_type": "zero"}, "expected embedding_type positional or fourier, got 'zero'"),
        ({"encoder_type": "skip"}, "expected encoder_type standard or residual, got 'skip'"),
        ({"decoder_type": "skip"}, "expected decoder_type standard, got 'skip'"),
        ({"dropout": float("nan")}, "expected dropout from 0 to below 1, got nan"),
        ({"label_dropout": 1.0}, "expected label_dropout from 0 to below 1, got 1.0"),
        ({"sigma_data": "0.5"}, "expected sigma_data of at least 0, got '0.5'"),
        ({"sigma_data": 0}, "expected sigma_data > 0 and at most 1e.06, got 0"),
        ({"sigma_max": float("nan")}, "expected sigma_max of at least 0, got nan"),
        ({"use_fp16": 1}, "expected use_fp16 True or False, got 1"),
        ({"width": 3}, "expected the arguments of SongUNet, got 'width'"),
        ({"model_type": "DhariwalUNet"}, "expected the arguments of DhariwalUNet, got 'embedding_type'"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    config = small("cifar10-32x32-cond-vp")
    with pytest.raises(ValueError, match=f"fastdmd.*: {message}"):
        from_edm(config | arguments, random_state(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.dec.8x8_up.conv0.bias"), "the tensor dec.8x8_up.conv0.bias, got"),
        (lambda state: state.pop("model.map_label.weight"), "the tensor map_label.weight, got"),
        (lambda state: state.update({"model.dec.9.weight": torch.zeros(1)}), "no other tensors, got dec.9.weight"),
        (
            lambda state: state.update({"model.enc.8x8_conv.weight": torch.zeros(16, 3, 1, 1)}),
            r"enc.8x8_conv.weight of shape \(16, 3, 3, 3\), got \(16, 3, 1, 1\)",
        ),
        (
            lambda state: state.update({"model.enc.4x4_block0.affine.weight": torch.zeros(31, 64)}),
            r"enc.4x4_block0.affine.weight of shape \(32, 64\), got \(31, 64\)",
        ),
        (
            lambda state: state.update({"model.dec.8x8_up.skip.resample_filter": torch.ones(1, 1, 2, 2)}),
            r"dec.8x8_up.skip.resample_filter to be that of \(1, 1\), got another",
        ),
        (
            lambda state: state.update({"map_layer0.bias": torch.zeros(64)}),
            "one floating-point tensor map_layer0.bias, got another",
        ),
        (
            lambda state: state.update({"model.map_layer0.bias": torch.zeros(64, dtype=torch.int64)}),
            "one floating-point tensor map_layer0.bias, got another",
        ),
    ],
)
def test_tensors_that_are_refused(change, message):
    config = small("cifar10-32x32-cond-vp")
    state = random_state(config)
    change(state)
    with pytest.raises(ValueError, match=f"fastdmd.teachers: expected {message}"):
        from_edm(config, state)
