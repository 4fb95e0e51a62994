"""With which settings a run goes on: what was given, and what nobody gave, which stays as it was."""

import pytest
import torch

from fastdmd.runs.cli import to_json
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.continuity import (
    EARLIER,
    flags,
    require_same_origin,
    require_same_settings,
    roundings,
    with_defaults_of_run,
)
from tests.helpers.networks import make_network

CPU = torch.device("cpu")
BEGUN = TrainConfig().replace(out="runs/x", teacher="a.safetensors", num_samples=10_000, eval_every=100)


def resolved(config, recorded=None):
    teacher = make_network()
    return with_defaults_of_run(config, lambda settings: settings.for_teacher(teacher, CPU), recorded)


def recorded(**changes):
    return to_json(resolved(BEGUN.replace(**changes)))


@pytest.mark.parametrize(
    ("then", "now", "kept"),
    [
        ({}, {"num_samples": 2000}, ("monitor", "eval_samples", 5000)),
        ({"num_samples": 900}, {"num_samples": 10_000}, ("monitor", "eval_samples", 900)),
        ({"precision": "bf16"}, {}, ("compute", "precision", "bf16")),  # as begun on a GPU, whose default it is
        ({"clamp_images": False}, {}, ("clamp_images", None, False)),
        ({"generator_sigmas": (80.0, 3.0)}, {}, ("noise", "generator_sigmas", (80.0, 3.0))),
        ({}, {"num_samples": 2000, "eval_samples": 7}, ("monitor", "eval_samples", 7)),  # which somebody gave
    ],
)
@pytest.mark.filterwarnings("ignore:--precision bf16")
def test_what_nobody_gave_stays(then, now, kept):
    """Whatever flag it follows from."""
    run = recorded(**then)
    config = resolved(BEGUN.replace(**now), run)
    room, name, value = kept
    assert (getattr(config, room) if name is None else getattr(getattr(config, room), name)) == value
    if "eval_samples" in now:
        with pytest.raises(ValueError, match="begun with: --eval-samples 5000, got 7$"):
            require_same_settings(config, run, is_measured=True)
    elif then.keys() != {"generator_sigmas"}:
        require_same_settings(config, run, is_measured=True)


@pytest.mark.parametrize("kept", ["many", [5], {"x": 1}, True, None])
def test_a_record_of_something_else_is_not_taken_over(kept):
    run = recorded()
    run["monitor"]["eval_samples"] = kept
    config = resolved(BEGUN, run)
    assert config.monitor.eval_samples == 5000
    with pytest.raises(ValueError, match="begun with: --eval-samples .*, got 5000$"):
        require_same_settings(config, run, is_measured=True)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("monitor", "eval_samples"), -5, "expected --eval-samples >= 2, got -5"),
        (("noise", "generator_sigmas"), [80.0, -1.0], "expected --generator-sigmas .*, got"),
    ],
)
def test_a_record_out_of_bounds_is_refused(place, value, message):
    run = recorded()
    run[place[0]][place[1]] = value
    with pytest.raises(ValueError, match=message):
        resolved(BEGUN, run)


def test_what_rounds_otherwise_may_change_unless_bits_are_promised():
    run, other = recorded(batch_size=12), BEGUN.replace(batch_size=12, accumulation_steps=3, execution="compiled")
    require_same_settings(resolved(other, run), run, is_measured=True)
    assert roundings(resolved(other)) == {"--execution": "compiled", "--compile": False, "--accumulation-steps": 3}
    run = recorded(batch_size=12, deterministic=True)
    with pytest.raises(ValueError, match="--execution captured, got compiled; --accumulation-steps 1, got 3$"):
        require_same_settings(resolved(other.replace(deterministic=True), run), run, is_measured=True)
    with pytest.raises(ValueError, match="--deterministic True, got False$"):
        require_same_settings(resolved(BEGUN.replace(batch_size=12)), run, is_measured=True)


# Of the first runs that could go on. A flag that has come since says in `EARLIER` what they did without it.
FIRST_FLAGS = """
    accelerate accumulation-steps alphas-cumprod batch-size beta-end beta-start beta1 beta2 checkpoint-every
    clamp-images compile conditioning-sigma crop data device dfake-gen-update-ratio divergence dry-run dynamics
    ema-decay ema-halflives eval-every eval-samples execution fake-loss-weight feature-network gan-features
    gan-generator-weight gan-guidance-weight gan-lr gan-max-sigma gan-r1-weight generator-inputs generator-lr
    generator-sigmas guidance-lr image-shape init-from iterations keep-last label-emphasis labels log-every
    lr-schedule max-grad-norm max-step-percent measure-teacher method min-step-percent nan-policy network
    noise-schedule num-classes num-samples num-train-timesteps out pairs parameterization precision preset
    record reference regression-weight report resize resume rho schedule-timesteps seed sid-alpha sigma-data
    sigma-max sigma-min snapshots stop-after teacher teacher-labels teacher-sigma-data teacher-steps
    teacher-weights time-direction time-mean time-scale time-std timesteps velocity verbose warmup-iterations
    weight-decay weights-key
"""


def test_every_flag_is_one_of_the_first_or_says_what_runs_before_it_did():
    found = {flag.removeprefix("--") for _, flag in flags(BEGUN)}
    assert found == {*FIRST_FLAGS.split(), *(flag.removeprefix("--") for flag in EARLIER)}
    run, config = recorded(), resolved(BEGUN)
    values = to_json(config)
    for place, flag in flags(BEGUN):
        if flag in EARLIER:
            *rooms, name = place
            of_run, now = run, values
            for room in rooms:
                of_run, now = of_run[room], now[room]
            assert now[name] == EARLIER[flag]
            del of_run[name]
    require_same_settings(config, run, is_measured=True)


def test_a_run_from_before_the_flag_goes_on_without_it():
    run = recorded()
    del run["deterministic"]
    require_same_settings(resolved(BEGUN), run, is_measured=True)
    with pytest.raises(ValueError, match="--deterministic False, got True$"):
        require_same_settings(resolved(BEGUN.replace(deterministic=True)), run, is_measured=True)


@pytest.mark.parametrize(("name", "value"), [("threads", 2), ("torch", "2.0"), ("device", "another CPU")])
def test_another_machine_is_refused_where_bits_are_promised(name, value):
    for deterministic in (True, False):
        config = resolved(BEGUN.replace(deterministic=deterministic))
        versions = {"torch": "2.13", "device": "a CPU", "threads": 1}
        now = {"version": "0", "teacher": "t", "config": to_json(config), "contents": {}, "versions": versions}
        then = {**now, "versions": {**versions, name: value}}
        require_same_origin(now, now, config)
        if deterministic:
            with pytest.raises(
                ValueError, match=f"with --deterministic what the run was begun with: {name} {value}, got"
            ):
                require_same_origin(then, now, config)
        else:
            require_same_origin(then, now, config)  # which the checkpoint tells
