"""Settings out of their bounds: every number of every command, and what is said."""

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Annotated

import pytest

from fastdmd import diffusion, export, settings
from fastdmd.data.settings import DataSettings
from fastdmd.distill.draws import NoiseSettings
from fastdmd.distill.optimization import warm_up_notice
from fastdmd.networks.options import TeacherOptions, flag
from fastdmd.runs import config
from fastdmd.runs.pretraining import PretrainConfig

COMMANDS = {
    "train": config.TrainConfig(),
    "pretrain": PretrainConfig(),
    "evaluate": config.EvaluateConfig(weights="a.safetensors"),
    "pairs": config.PairsConfig(out=Path("a")),
    "sample": config.SampleConfig(weights="a.safetensors"),
    "export": export.ExportConfig(weights=Path("a.safetensors"), out=Path("a.pt2")),
}
FLAGS = {"fake_score_lr": "guidance_lr"}  # that are not called as their settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    count: Annotated[int, settings.at_least(1, 10**9)] = 1
    decay: Annotated[float, settings.at_least(0, 2.5)] | None = None
    rate: Annotated[float | None, settings.above(0, 1e30)] = None
    share: Annotated[float, settings.within(0, 1, below=True)] = 0.0
    sizes: Annotated[tuple[int, ...], settings.at_least(2, 2**16)] = ()
    free: float = 0.0
    name: str | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--count >= 1, got 0"),
        ({"count": 10**9 + 1}, r"--count <= 10\^9, got 1000000001"),
        ({"count": 10**400}, r"--count <= 10\^9, got 1000"),
        ({"decay": -0.5}, "--decay >= 0, got -0.5"),
        ({"decay": math.nan}, "--decay >= 0 and finite, got nan"),
        ({"decay": math.inf}, "--decay >= 0 and finite, got inf"),
        ({"decay": 2.6}, "--decay <= 2.5, got 2.6"),
        ({"rate": 0.0}, "--rate > 0 and finite, got 0.0"),
        ({"rate": 1e31}, r"--rate <= 1e\+30, got 1e\+31"),
        ({"share": 1.0}, r"--share in \[0, 1\), got 1.0"),
        ({"share": math.nan}, r"--share in \[0, 1\), got nan"),
        ({"sizes": (4, 1)}, r"--sizes >= 2, got \(4, 1\)"),
        ({"sizes": (65537,)}, r"--sizes <= 2\^16, got \(65537,\)"),
        ({"free": math.inf}, "--free to be finite, got inf"),
        ({"free": math.nan}, "--free to be finite, got nan"),
        ({"name": ""}, "--name not to be empty, got ''"),
    ],
)
def test_what_is_said_of_a_value_out_of_bounds(values, message):
    with pytest.raises(ValueError, match=f"^expected {message}"):
        settings.check(Settings(**values))


def test_values_at_the_bounds_are_good():
    settings.check(Settings())
    settings.check(Settings(count=10**9, decay=2.5, rate=1e30, share=0.999, sizes=(2, 2**16), free=-1e308, name="x"))
    settings.check(Settings(count=1, decay=0, rate=1e-300, share=0))  # 0 is a value of a float


def values(default):
    """Names and values of all settings, in whatever room they are."""
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        yield from values(value) if dataclasses.is_dataclass(value) else [(field.name, value)]


def numbers():
    """Every number that a command takes, with an absurd value of its own type."""
    for command, default in COMMANDS.items():
        for name, value in values(default):
            if isinstance(value, tuple):
                yield command, name, (10**12,)
            elif isinstance(value, bool):
                continue
            elif isinstance(value, int):
                yield command, name, 10**12
            elif isinstance(value, float):
                yield from ((command, name, absurd) for absurd in (math.nan, math.inf, -math.inf, 1e308))


@pytest.mark.parametrize(("command", "name", "value"), list(numbers()))
def test_no_number_is_without_bounds(command, name, value):
    with pytest.raises(ValueError, match=f"expected --{FLAGS.get(name, name).replace('_', '-')} .*, got") as error:
        COMMANDS[command].replace(**{name: value}).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("command", "said"), [("evaluate", ">= 2, got 1"), ("train", ">= 2, or 0 for no metrics, got 1")]
)
def test_no_command_advises_what_it_refuses(command, said):
    with pytest.raises(ValueError, match=f"^expected --num-samples {said}$"):
        COMMANDS[command].replace(num_samples=1).check()


def test_all_commands_are_covered_and_their_defaults_are_good():
    found = list(numbers())
    assert len({name for _, name, _ in found}) >= 35
    for default in COMMANDS.values():
        default.check()


@pytest.mark.parametrize("name", ["sigma_data", "conditioning_sigma"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e308])
def test_optional_numbers_have_bounds_too(name, value):
    with pytest.raises(ValueError, match=f"expected --{name.replace('_', '-')} "):
        config.TrainConfig().replace(**{name: value}).check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta_end", 0.0),
        ("beta_start", 0.0),
        ("beta_end", math.nan),
        ("time_scale", math.inf),
        ("time_scale", 0.0),
        ("sigma_data", 0.0),
        ("num_train_timesteps", 10**12),
        ("num_train_timesteps", 1),
        ("num_classes", -1),
        ("num_classes", 10**12),
        ("image_shape", (3, 10**6, 10**6)),
        ("image_shape", (0, 8, 8)),
    ],
)
def test_options_of_a_teacher_are_checked_under_their_flags(name, value):
    settings = config.SampleConfig(weights="a:b", adapter=TeacherOptions(**{name: value}))
    with pytest.raises(ValueError, match=f"expected {flag(name)} "):
        settings.check()


def test_zero_is_not_the_default_of_a_noise_schedule():
    for ends in ({"beta_end": 0.0}, {"beta_start": 0.0}):
        with pytest.raises(ValueError, match="expected 0 < beta_start < beta_end < 1, got .*0.0"):
            diffusion.ddpm_alphas_cumprod("linear", **ends)
    abar = diffusion.ddpm_alphas_cumprod("linear", 2, beta_start=0.25, beta_end=0.5)
    assert abar.tolist() == pytest.approx([0.75, 0.375])


def test_a_warm_up_that_outlasts_the_run_is_told():
    assert warm_up_notice(1600, 50) is None and warm_up_notice(51, 50) is None and warm_up_notice(1, 0) is None
    for iterations, warmup_iterations in ((20, 50), (50, 50)):
        notice = warm_up_notice(iterations, warmup_iterations)
        assert f"warm-up takes {warmup_iterations} iterations" in notice
        assert f"ends after {iterations}" in notice and "\n" not in notice


def test_settings_are_replaced_in_whatever_room_they_are():
    """By the names of their flags, old ones and new."""
    changed = config.TrainConfig().replace(data="d", batch_size=4, beta1=0.5, sigma_data=2.0, teacher_sigma_data=3.0)
    assert (changed.data.path, changed.batch_size, changed.optimizer.beta1) == ("d", 4, 0.5)
    assert (changed.noise.sigma_data, changed.adapter.sigma_data) == (2.0, 3.0)
    for name in ("guidance_lr", "fake_score_lr"):
        assert config.TrainConfig().replace(**{name: 0.25}).optimizer.fake_score_lr == 0.25
    assert changed.replace() == changed and changed.replace(beta1=0.9).optimizer.beta1 == 0.9
    with pytest.raises(TypeError, match="fastdmd.TrainConfig: expected names of its settings, got optimiser, path"):
        config.TrainConfig().replace(optimiser=1, path="d", seed=3)


def test_a_room_is_replaced_whole():
    """What else is asked of it goes into the new one; what is no room is refused."""
    changed = config.TrainConfig().replace(
        data=DataSettings(path="d", resize=8), noise=NoiseSettings(rho=5.0), sigma_max=50.0
    )
    assert changed.data == DataSettings(path="d", resize=8)
    assert changed.noise == NoiseSettings(rho=5.0, sigma_max=50.0)
    assert config.TrainConfig(data=changed.data).replace(data=None).data == DataSettings(resize=8)
    with pytest.raises(TypeError, match="expected names of its settings, got noise"):
        config.TrainConfig().replace(noise=None)


def test_settings_of_another_version_are_no_defaults():
    """A pickle with other fields, as that of a configuration before its rooms, is refused; one of today is the same."""
    settings = config.TrainConfig().replace(generator_lr=1e-5)
    assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == settings
    former = config.TrainConfig.__new__(config.TrainConfig)
    vars(former).update({"generator_lr": 1e-5} | {k: v for k, v in vars(settings).items() if k != "optimizer"})
    with pytest.raises(ValueError, match="a pickle that differs in generator_lr, optimizer$"):
        pickle.loads(pickle.dumps(former))
