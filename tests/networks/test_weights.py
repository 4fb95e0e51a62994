"""fastdmd's own weight files: what their metadata may say, and that no weights in them are broken."""

import dataclasses
import json
import math
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastdmd import teachers
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.weights import RECORDED, generator_metadata, load_network, save_network
from fastdmd.quality import Measurement
from fastdmd.sampling import Generator
from tests.helpers import foreign
from tests.helpers.networks import SMALL, make_network

RECORD = {
    "settings": {"num_samples": 10, "reference": None},
    "quality": dataclasses.asdict(Measurement(0.25, 0.99, 31.5, 35, 10)),
}


def test_buffers_keep_their_digits(tmp_path):
    """Those of frequencies: half of them would be another network than was measured."""
    network = make_network(dataclasses.replace(SMALL, embedding="fourier"))
    for name, dtype in {"half": torch.float16, "bf16": torch.bfloat16}.items():
        save_network(tmp_path / name, network, kind="teacher", dtype=dtype)
        with safe_open(tmp_path / name, framework="pt") as file:
            dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}
        assert dtypes.pop("frequencies") is torch.float32 and {*dtypes.values()} == {dtype}
        loaded, _ = load_network(tmp_path / name)
        assert torch.equal(loaded.frequencies, network.frequencies)


def rewritten(path, **changes):
    """The file of a small network whose metadata claims something else."""
    network = make_network()
    description = dataclasses.asdict(SMALL) | changes.pop("network", {})
    metadata = {"kind": "teacher", "network": description} | changes
    tensors = {name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, metadata={"fastdmd": json.dumps(metadata)})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"num_blocks": 10**9}}, "expected num_blocks from 1 to 1024, got 1000000000 in"),
        ({"network": {"num_blocks": 1000}}, "expected the tensors of every block, got .* in .*w.safetensors"),
        ({"network": {"model_channels": 10**400}}, "expected model_channels from 1 to 16384, got 1000"),
        ({"network": {"model_channels": 16384}}, r"tensors of UNet in .* of shape .*, not \(16384, "),
        ({"network": {"model_channels": "8"}}, "expected model_channels from 1 to 16384, got 8 in"),
        ({"network": {"channel_multipliers": [1] * 1000}}, "expected channel_multipliers of at most 16 numbers"),
        ({"network": {"channel_multipliers": [1, 10**6]}}, "expected channel_multipliers from 1 to 16384"),
        ({"network": {"channel_multipliers": [1, 16384]}}, "expected widths of at most 65536 channels, got 131072"),
        ({"network": {"channel_multipliers": 3}}, "expected channel_multipliers as a list, got 3"),
        ({"network": {"num_classes": 10**8}}, "expected num_classes from 0 to 1048576, got 100000000"),
        ({"network": {"num_classes": 3}}, r"got map_label.weight of shape \(8, 10\), not \(8, 3\)"),
        ({"network": {"image_size": 16384, "image_channels": 16384}}, "expected images of at most"),
        ({"network": {"image_size": None}}, "expected image_size from 1 to 16384, got None"),
        ({"network": {"adm": "yes"}}, "expected adm true or false, got yes"),
        ({"network": {"embedding": ["fourier"]}}, "expected embedding out of positional, ddpmpp, fourier, got"),
        ({"network": {"sigma_data": 10**400}}, "expected sigma_data > 0 and at most 1e.06, got 1000"),
        ({"network": {"dropout": math.nan}}, "expected dropout from 0 to below 1, got nan"),
        ({"network": {"width": 3}}, r"expected a known network in .*, got the fields \['width'\]"),
        ({"network": {"source": "a:b", "options": []}}, "--network package.module:name for .*, whose network is a:b"),
        ({"network": {"diffusers": [], "options": []}}, "in .*w.safetensors, got options that are a list"),
        ({"kind": ["teacher"]}, "expected a teacher or generator in .*, got another kind"),
        (
            {"kind": "generator", "conditioning_sigma": "80"},
            "expected conditioning_sigma from 1.18e-38 to 1e.30 in .*, got 80",
        ),
        ({"kind": "generator", "conditioning_sigma": 1e-300}, "expected conditioning_sigma from .*, got 1e-300"),
        ({"kind": "generator", "conditioning_sigma": True}, "expected conditioning_sigma from .*, got True"),
        ({"kind": "generator", "conditioning_sigma": None}, "expected conditioning_sigma from .*, got None"),
        ({"record": "x"}, "expected a record of settings and figures in .*w.safetensors, got 'x'"),
        ({"record": [1]}, "expected a record of"),
        ({"record": 5}, "expected a record"),
        ({"record": {}}, "got {}"),
        ({"record": RECORD | {"settings": 1}}, "expected a record of"),
        ({"record": {"settings": {}}}, "expected a rec"),
        *(
            ({"record": RECORD | {"quality": RECORD["quality"] | change}}, "expected a record of")
            for change in (
                {"frechet_distance": "0.1"},
                {"class_accuracy": math.nan},
                {"evaluations": 35.5},
                {"num_images": True},
                {"images_per_second": math.inf},
                {"recorded": 1},
                {"other": 1},
            )
        ),
        ({"record": RECORD | {"quality": {"class_accuracy": 1.0}}}, "expected a record of"),
        (
            {"kind": "generator", "conditioning_sigma": 10**400},
            "expected conditioning_sigma from .* in .*, got 10",
        ),
        ({"kind": "generator", "conditioning_sigma": math.nan}, "expected conditioning_sigma .*, got nan"),
        *(
            (
                {"kind": "generator", "generator_sigmas": sigmas},
                "expected generator_sigmas, a list from 1.18e-38 to 1e.30, the highest first, in .*, got ",
            )
            for sigmas in (
                [80.0, math.nan],
                [80.0, "2"],
                [80.0, -1.0],
                [80.0, True],
                "80,2",
                None,
                [],
                80.0,
                [2.0, 80.0],
                [80.0, 80.0],
            )
        ),
        (
            {"kind": "generator", "conditioning_sigma": 80.0, "generator_sigmas": [80.0, 2.0]},
            "expected conditioning_sigma or generator_sigmas in .*w.safetensors, got both",
        ),
        ({"kind": "generator"}, "expected a generator's conditioning_sigma, got .*w.safetensors without"),
    ],
)
def test_descriptions_that_the_tensors_do_not_bear_out(changes, message, tmp_path):
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"^fastdmd.*{message}") as error:
        teachers.read(rewritten(tmp_path / "w.safetensors", **changes))
    assert "\n" not in str(error.value) and time.monotonic() - started < 10


def test_a_record_is_taken_as_it_was_measured(tmp_path):
    assert RECORDED.keys() == {field.name for field in dataclasses.fields(Measurement)}
    for record in (RECORD, RECORD | {"quality": {"frechet_distance": 1, "class_accuracy": None}}, None):
        assert teachers.read(rewritten(tmp_path / "w.safetensors", record=record))[1]["record"] == record


@pytest.mark.parametrize(
    ("sigmas", "written"),
    [((80.0,), {"conditioning_sigma": 80.0}), ((80.0, 6, 0.5), {"generator_sigmas": [80.0, 6, 0.5]})],
)
@pytest.mark.parametrize("clamped", [False, True])
def test_what_a_file_says_of_a_generator(sigmas, written, clamped, tmp_path):
    """Levels, of one as ever, of several such that no former version takes the first for all of them; and clamping."""
    assert generator_metadata(Generator(make_network(), sigmas, clamped)) == {**written, "clamped": clamped}
    for extra in [{"clamped": clamped}] + [{}] * (not clamped):  # former files say nothing of it
        path = rewritten(tmp_path / "w.safetensors", kind="generator", **written, **extra)
        found = teachers.load_generator(path)
        assert (found.sigmas, found.clamped) == (sigmas, clamped)


def test_metadata_that_is_no_description(tmp_path):
    for text, message in (
        ("[" * 10**5, "expected JSON in"),
        ("{", "expected JSON in"),
        ("[]", "without its metadata"),
        ('{"kind": "teacher", "network": []}', "without its metadata"),
    ):
        save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"fastdmd": text})
        with pytest.raises(ValueError, match=message):
            load_network(tmp_path / "w.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="expected a file written by fastdmd, got .*w.pt without its metadata"):
        load_network(tmp_path / "w.pt")


def broken(network, name, value):
    parameter = network.get_parameter(name)
    with torch.no_grad():
        parameter[(0,) * parameter.dim()] = value
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (-math.inf, "infinity")])
def test_files_with_broken_weights_are_no_networks(value, kind, dtype, tmp_path):
    """Ours and adapted ones, whatever code they are filled into."""
    for network, inner, name, code in (
        (ours := make_network(), ours, "conv_out.bias", None),
        (adapted := Adapted(foreign.build(), parameterization="v"), adapted.network, "level.bias", foreign.build),
    ):
        broken(inner, name, value)
        save_network(tmp_path / "w.safetensors", network, kind="generator", conditioning_sigma=80.0, dtype=dtype)
        with pytest.raises(ValueError, match=rf"finite weights in .*w.safetensors, got {kind} in {name} \(1 of"):
            load_network(tmp_path / "w.safetensors", network=code)


def test_code_that_makes_broken_weights():
    for value, kind in ((math.nan, "NaN"), (math.inf, "infinity")):
        with pytest.raises(ValueError, match=f"expected finite weights in Network, got {kind} in middle.weight"):
            teachers.load(broken(foreign.build(), "middle.weight", value), parameterization="v")
    with pytest.raises(ValueError, match="expected finite weights in UNet, got NaN in conv_in.weight"):
        teachers.load(broken(make_network(), "conv_in.weight", math.nan))
    with pytest.raises(ValueError, match="expected weights with values in Network, got conv_in.weight without"):
        teachers.load(foreign.build().to("meta"), parameterization="v")
    masked = foreign.build()
    masked.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert teachers.load(masked, parameterization="v").network.mask.isinf().any()


def test_a_file_holds_what_its_precision_can(tmp_path):
    network = broken(make_network(), "map_blocks.bias", 1e6)
    save_network(tmp_path / "w.safetensors", network, kind="teacher")
    assert load_network(tmp_path / "w.safetensors")[0].map_blocks.bias[0] == 1e6
    before = (tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"weights that torch.float16 can hold, got 1e\+06 in map_blocks.bias"):
        save_network(tmp_path / "w.safetensors", network, kind="teacher", dtype=torch.float16)
    assert (tmp_path / "w.safetensors").read_bytes() == before
