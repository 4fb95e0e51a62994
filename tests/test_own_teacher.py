"""docs/own-teacher.md: its commands and its code, as printed; and what it says of teachers taken wrongly."""

import importlib
import json
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from examples import own_teacher
from fastdmd import evaluate, load_teacher, sample
from fastdmd.networks.weights import load_network
from tests.helpers import edm_pickles
from tests.helpers.edm_reference import random_state

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-teacher.md").read_text()
EDM = {  # a small network in the place of a published one, for images of the same shape
    "model_type": "SongUNet",
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 10,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}
FORMS = {"x0": "X0", "edm": "Edm", "epsilon": "Epsilon", "v": "V", "flow": "Flow"}

pytestmark = pytest.mark.filterwarnings("ignore:.* does not denoise as")  # some of these networks are not trained


def blocks(*headings):
    """Kind and text of the page's blocks under these headings, or beside them in bold."""
    sections = re.split(r"^(?:#+ |(?:\d\. )?\*\*)(.*?)(?:$|\.?\*\*)", PAGE, flags=re.MULTILINE)
    found = [text for heading, text in zip(sections[1::2], sections[2::2], strict=True) if heading in headings]
    assert len(found) == len(headings), sections[1::2]
    return [
        (kind, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
        for section in found
        for indent, kind, text in re.findall(r"^( *)```(\w+)\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)
    ]


def run(kind, text):
    """A block as its reader would run it; the names that Python code leaves."""
    names = {"__name__": "page"}
    if kind == "python":
        exec(compile(text, "own-teacher.md", "exec"), names)
    else:
        for line in text.replace("\\\n", "").splitlines():
            python, option, command, *arguments = shlex.split(line)
            assert (python, option) == ("python", "-m")
            importlib.import_module(command).main(arguments)
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def test_every_block_is_run_here():
    run_here = blocks("A pickle of EDM", "A folder of diffusers", "Any module", "Weights", "In Python", "Values")
    run_here += blocks("`--dry-run`", "Figures of the teacher")
    assert len(run_here) == 10 == len(re.findall(r"```\w", PAGE))


def test_a_pickle_of_edm(tmp_path):
    state = random_state(EDM)
    path = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    path.write_bytes(edm_pickles.dumps(edm_pickles.published(EDM, state)))
    ((kind, text),) = blocks("A pickle of EDM")
    run(kind, text)
    generator, metadata = load_network(tmp_path / "runs" / "cifar10-trial" / "generator.safetensors")
    assert metadata["kind"] == "generator" and generator.image_shape == (3, 32, 32) and generator.num_classes == 10
    moved = (generator.conv_out.weight - load_teacher(path).conv_out.weight).abs().max()
    assert 0 < moved < 1e-3  # in ten iterations of a rate of 1e-5
    settings = json.loads((tmp_path / "runs" / "cifar10-trial" / "config.json").read_text())
    assert settings["preset"] == "cifar10-cond" and settings["dfake_gen_update_ratio"] == 5


def test_a_folder_of_diffusers(tmp_path):
    pytest.importorskip("diffusers", reason="the extra fastdmd[diffusers] is not installed")
    for kind, text in blocks("A folder of diffusers"):
        run(kind, text)
    generator, _ = load_network(tmp_path / "runs" / "pipeline-trial" / "generator.safetensors")
    assert generator.parameterization == "v" and generator.image_shape == (3, 16, 16)
    assert generator.interface.alphas_cumprod == pytest.approx(own_teacher.ABAR.tolist(), rel=1e-5)


def test_any_module_by_commands(tmp_path, capsys):
    for kind, text in blocks("Any module"):
        run(kind, text)
    assert "Epsilon: accelerated" in capsys.readouterr().out
    generator, _ = load_network(
        tmp_path / "runs" / "trial" / "generator.safetensors", network="examples.own_teacher:Epsilon"
    )
    assert generator.parameterization == "epsilon" and not torch.equal(
        generator.network.unet.conv_out.weight, own_teacher.Epsilon().unet.conv_out.weight
    )


def test_weights_for_code(tmp_path, capsys):
    for kind, text in blocks("Weights"):
        run(kind, text)
    assert re.search(r"my_weights.pt: took the \d+ tensors under ema, left 0 others", capsys.readouterr().err)
    sample.main(["mnist", "--num", "4", "--out", "mnist.npz"])
    expected, images = (np.load(tmp_path / name)["images"].astype(int) for name in ("mnist.npz", "flow.npz"))
    assert np.abs(images - expected).max() <= 2 and images.std() > 50  # of 255


def test_through_python():
    ((kind, text),) = blocks("In Python")
    names = run(kind, text)
    embedded = own_teacher.V().image_and_noise
    assert names["before"].shape == (4, 1, 28, 28) and names["metrics"]["loss_fake"].isfinite()
    D_x, _ = embedded(80 * names["noise"], torch.full((4,), 80.0), names["labels"])
    assert (names["images"] - D_x).abs().max() > 0.01  # it has learned
    assert_close(names["images"], D_x, atol=1.0, rtol=0)  # a little, from there


def test_pixels_of_another_range():
    ((kind, text),) = blocks("Values")
    teacher = run(kind, text)["teacher"]
    x, sigma, labels = torch.randn(3, 1, 28, 28), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([1, 2, 3])
    inside, _ = own_teacher.X0().image_and_noise((x + 1) / 2, sigma / 2, labels)
    assert_close(teacher(x, sigma, labels), 2 * inside - 1, atol=2e-2, rtol=1e-2)  # to a timestep


def test_what_is_looked_at_before_a_long_run(capsys):
    ((kind, text),) = blocks("`--dry-run`")
    run(kind, text)
    told = json.loads(capsys.readouterr().out)
    options = told["network"]["options"]
    assert options["parameterization"] == "epsilon" and options["noise_schedule"] == "linear"
    assert options["labels"] == "int" and options["sigma_data"] == 0.5 and told["budget"]["state_bytes"] > 0
    ((kind, text),) = blocks("Figures of the teacher")
    run(kind, text)
    distance, accuracy = re.search(r"^teacher +35 +(\S+) +(\S+)%", capsys.readouterr().out, re.MULTILINE).groups()
    assert float(distance) == pytest.approx(0.387, rel=0.1) and float(accuracy) > 98


@pytest.mark.parametrize("parameterization", FORMS)
def test_the_five_forms_are_the_embedded_teacher(parameterization):
    """And none of them is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = load_teacher(getattr(own_teacher, FORMS[parameterization])(), parameterization=parameterization)
    abar = own_teacher.ABAR[torch.tensor([30, 300, 700, 990])]
    sigma = (1 / abar - 1).sqrt().float()  # at timesteps, which need no rounding
    images, labels = torch.rand(4, 1, 28, 28) - 0.5, torch.tensor([0, 3, 5, 9])
    x = images + sigma[:, None, None, None] * torch.randn_like(images)
    assert_close(teacher(x, sigma, labels), load_teacher("mnist")(x, sigma, labels), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("form", "options", "warning"),
    [
        ("Epsilon", ["v"], None),
        ("Epsilon", ["x0", "--noise-schedule", "linear"], "changes an image without noise by 343%"),
        ("Epsilon", ["epsilon", "--schedule-timesteps", "500"], "errs 4.3 times"),
        ("V", ["epsilon"], "errs 12.3 times"),
        ("Flow", ["flow", "--velocity", "image-noise"], "errs 3.6 times"),
        ("Flow", ["flow", "--time-direction", "to-image"], "errs 3.3 times"),
        ("Flow", ["flow", "--time-scale", "1000"], None),
        ("Edm", ["edm", "--teacher-sigma-data", "1"], None),
    ],
)
def test_wrong_ones_are_warned_of_where_the_page_says_so(form, options, warning, tmp_path):
    arguments = [f"examples.own_teacher:{form}", "--no-accelerate", "--parameterization", *options]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample.main([*arguments, "--num", "1", "--teacher-steps", "1", "--out", str(tmp_path / "a.npz")])
    told = [str(each.message) for each in caught if "does not denoise" in str(each.message)]
    assert len(told) == (warning is not None) and (warning is None or warning in told[0])


def test_some_wrong_ones_are_errors(capsys):
    for options in (["epsilon"], ["edm", "--teacher-sigma-data", "0.5"]):
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(["examples.own_teacher:X0", "--parameterization", *options, "--num-samples", "2"])
        assert exit_.value.code == 2 and "expected finite images of X0, got NaN" in capsys.readouterr().err
