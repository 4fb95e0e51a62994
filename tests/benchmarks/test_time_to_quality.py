"""Time to quality: which measurement counts, what is not run again, and that both loops have one recipe."""

import copy
import dataclasses
import json
import math
import sys
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import time_to_quality
from benchmarks.suite import reaching
from benchmarks.time_to_quality import RECIPES, SCHEDULES
from benchmarks.timed_run import Recipe, TimedRun
from fastdmd.runs.presets import PRESETS

SMALL = {"gan_guidance_weight": 0.0, "clamp_images": False, "batch_size": 2, "warmup_iterations": 3}
OPTIONS = {"device": "cpu", "num_samples": 70, "precision": "fp32"}


def test_recipes_are_what_their_names_say():
    config = RECIPES["fastdmd, default"].config(SCHEDULES[-1], 0)
    assert config == PRESETS["mnist"].config
    equal = [RECIPES[name] for name in ("fastdmd, the textbook's recipe", "textbook, the same recipe")]
    ours, textbook = (recipe.config(800, 1) for recipe in equal)
    assert ours == textbook and [recipe.loop for recipe in equal] == ["fastdmd", "textbook"]
    assert (ours.gan.is_on, ours.clamp_images) == (False, False)
    assert (ours.optimizer, ours.batch_size) == (config.optimizer, config.batch_size)
    clamped = RECIPES["fastdmd, without adversarial term"].config(800, 1)
    assert clamped == dataclasses.replace(ours, clamp_images=None) and not RECIPES["fastdmd, default"].is_constant
    published = RECIPES["textbook, published settings"]
    settings = published.config(100, 0)
    assert (settings.batch_size, settings.dfake_gen_update_ratio, settings.optimizer.ema_decay) == (128, 10, 0.999)
    assert (settings.optimizer.generator_lr, settings.optimizer.fake_score_lr) == (2e-4, 2e-4)
    assert published.is_constant and published.loop == "textbook" and not settings.gan.is_on


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_both_loops_learn_the_same_along_a_cosine(threads):
    """Averages compared by how far they moved, as tests/distill/test_losses.py does: to the rate's own size a wrong
    schedule would move them by several tenths."""
    runs = {loop: TimedRun(Recipe(loop, "mnist", SMALL), 8, 3, **OPTIONS) for loop in ("fastdmd", "textbook")}
    start = weights(runs["fastdmd"].model.teacher)
    for run in runs.values():
        assert run.advance(5, 1e9)["iteration"] == 5
        point = run.advance(8, 1e9)
        assert point["iteration"] == 8 and point["seconds"] > 0
    ours, textbook = (weights(runs[loop].model.average) - start for loop in ("fastdmd", "textbook"))
    assert ours.norm() > 0 and (ours - textbook).norm() / ours.norm() < 0.02
    (group,) = runs["textbook"].model.loop.guidance_optimizer.param_groups  # of update 7 of 8, from 0
    assert group["lr"] == pytest.approx(1.2e-3 * (0.5 + 0.5 * math.cos(math.pi * 7 / 8)))
    assert runs["textbook"].facts() == {"threads": torch.get_num_threads(), "execution": "eager"}


def test_a_student_is_measured_and_the_limit_ends_a_run(threads):
    run = TimedRun(Recipe("fastdmd", "mnist", SMALL), 40, 0, **OPTIONS)
    before = copy.deepcopy(run.model.average)
    point = run.advance(40, 0.0)
    assert point["iteration"] == 10 and point["first_seconds"] == pytest.approx(point["seconds"], abs=0.2)
    found = run.measure()
    assert found["frechet_distance"] > 1 and 0 <= found["class_accuracy"] <= 1
    assert run.measure() == found and run.seconds == pytest.approx(point["seconds"], abs=1e-3)  # its clock stood
    run.model.average.load_state_dict(before.state_dict())
    assert run.measure() != found


def made(recipe, seed, iterations, points, is_constant=False):
    found = [{"iteration": i, "seconds": s, "first_seconds": 1.0, "frechet_distance": d} for i, s, d in points]
    return {"recipe": recipe, "seed": seed, "iterations": iterations, "points": found, "is_constant": is_constant}


def result():
    """Of a teacher with 0.2: a default that ends at 0.6, 0.3 and 0.2, and a textbook's that takes twice as long."""
    runs = []
    for seed, shift in ((0, 0.0), (1, 2.0)):
        runs += [
            made("fastdmd, default", seed, 100, [(100, 10.0 + shift, 0.6)]),
            made("fastdmd, default", seed, 200, [(200, 20.0 + shift, 0.3)]),
            made("fastdmd, default", seed, 400, [(100, 10.0, 0.25), (200, 20.0, 0.9), (400, 40.0 + shift, 0.2)]),
            made("textbook, the same recipe", seed, 200, [(200, 44.0, 0.3)]),
            made("published", seed, 10**6, [(25, 5.0, 4.0), (35, 7.0, 2.0), (50, 9.0, 2.5)], True),
        ]
    return {
        "results": runs,
        "teacher": {"frechet_distance": 0.2},
        "settings": {"num_samples": 5000, "device": "cpu", "precision": "auto"},
    }


def test_the_first_that_is_there_is_reached():
    points = [(9.0, 1.0), (3.0, 2.0), (5.0, 0.5), (7.0, 3.0)]
    assert [reaching.reached(points, distance) for distance in (3.0, 2.0, 1.9, 0.5, 0.4)] == [3.0, 3.0, 5.0, 5.0, None]


def test_of_a_cosine_only_ends_count():
    own = [run for run in result()["results"] if run["recipe"] == "fastdmd, default" and run["seed"] == 0]
    assert reaching.candidates(own) == [(10.0, 0.6), (20.0, 0.3), (40.0, 0.2)]
    assert reaching.candidates([result()["results"][4]]) == [(5.0, 4.0), (7.0, 2.0), (9.0, 2.5)]
    assert reaching.seconds_to(result(), "fastdmd, default", 1.5) == [20.0, 22.0]
    assert reaching.seconds_to(result(), "published", 10) == [7.0, 7.0]


def test_what_is_told_of_known_times():
    rows = {row.label: (row.value, row.ratio) for row in reaching.rows(result())}
    assert rows["fastdmd, default: to the teacher's"] == (41.0, None)
    assert rows["fastdmd, default: to 2 × the teacher's"] == (21.0, pytest.approx(44 / 21))
    assert rows["published: to 10 × the teacher's"] == (7.0, pytest.approx(44 / 7))
    assert "published: to 5 × the teacher's" not in rows
    said, table, before = reaching.told(result()).split("\n\n")
    assert "Fréchet distance, 0.200 of 5,000 samples" in said
    default, textbook, published = table.splitlines()[2:]
    assert default.split("|")[2:4] == [" 41.0 (40.0 to 42.0) ", " 41.0 (40.0 to 42.0) "]
    assert textbook.split("|")[2:5] == [" not reached ", " not reached ", " 44.0 (44.0 to 44.0) "]
    assert published.split("|")[-2] == " 7.00 (7.00 to 7.00) "
    assert before.endswith("400 iterations have 0.900 after 200, where a whole schedule of 200 has 0.300.")
    partly = result()
    partly["results"] = partly["results"][:-3]  # seed 1 has two short schedules alone
    assert "20.0, 1 of 2 seeds" not in reaching.told(partly) and "40.0, 1 of 2 seeds" in reaching.told(partly)
    assert "fastdmd, default: to the teacher's" not in {row.label for row in reaching.rows(partly)}
    assert reaching.curve(result(), "fastdmd, default") == [(11.0, 0.6), (21.0, 0.3), (41.0, 0.2)]
    texts = [e.text for e in ElementTree.fromstring(reaching.drawn(result())).iter() if e.tag.endswith("text")]
    assert {"published", "the teacher's", "2 × the teacher's"} <= set(texts)


class FakeWorker:
    """Trains at so many iterations a second; the distance is 8 / iterations."""

    rates = {"fastdmd": 10.0, "textbook": 2.0}
    begun: list = []
    broken = lost = False

    def __init__(self, recipe, iterations, seed, **options):
        self.recipe, self.step, self.process = recipe, 0, "it"
        FakeWorker.begun.append((recipe.loop, iterations, seed))

    def __call__(self, ask):
        return ask(self)

    def facts(self):
        return {"threads": 1}

    def advance(self, to, limit):
        rate = FakeWorker.rates[self.recipe.loop]
        self.step = min(to, int(limit * rate))
        return {"iteration": self.step, "seconds": self.step / rate, "first_seconds": 10 / rate}

    def measure(self):
        if FakeWorker.lost:
            self.process = None
            raise RuntimeError("its process died")
        if FakeWorker.broken:
            raise RuntimeError("ValueError: expected finite images of the student, got NaN or infinity")
        return {"frechet_distance": 8 / self.step, "class_accuracy": 1.0}

    def measure_teacher(self):
        return {"frechet_distance": 0.02, "class_accuracy": 1.0}

    def close(self):
        pass


@pytest.fixture
def call(monkeypatch, tmp_path):
    """`call(options)` runs the command on a file, and gives which runs it began, and what the file has then."""
    monkeypatch.setattr(time_to_quality, "in_a_process", FakeWorker)
    monkeypatch.setattr(FakeWorker, "begun", [])
    monkeypatch.setenv("GOMP_SPINCOUNT", "5000")
    file = tmp_path / "times.json"

    def run(*options):
        FakeWorker.begun.clear()
        argv = ["time_to_quality", "--device", "cpu", "--schedules", "100,200,400", "--json", str(file), *options]
        monkeypatch.setattr(sys, "argv", argv)
        time_to_quality.main()
        return list(FakeWorker.begun), json.loads(file.read_text())

    return run


NAMES = ("--recipes", "fastdmd, default", "textbook, the same recipe")


def test_what_a_file_has_is_not_run_again(call):
    begun, stored = call("--seeds", "0", "--minutes", "2", *NAMES)
    # the textbook would need 200 s for the longest, and has 120
    ours, textbook = [("fastdmd", n, 0) for n in (100, 200, 400)], [("textbook", n, 0) for n in (100, 200)]
    assert begun == [("fastdmd", 1, 0), *ours, *textbook]  # the first measures the teacher
    assert [run["ended"] for run in stored["results"]] == ["whole"] * 5
    assert [point["iteration"] for point in stored["results"][2]["points"]] == [100, 200, 400]
    assert [point["iteration"] for point in stored["results"][1]["points"]] == [200]
    assert stored["teacher"]["frechet_distance"] == 0.02 and "benchmarks/textbook.py" in stored["sources"]
    assert call("--seeds", "0", "--minutes", "2", *NAMES)[0] == []
    begun, stored = call("--seeds", "0,1", "--minutes", "4", *NAMES)
    more = [("fastdmd", n, 1) for n in (100, 200, 400)] + [("textbook", n, 1) for n in (100, 200, 400)]
    assert begun == [("textbook", 400, 0), *more]
    assert reaching.seconds_to(stored, "fastdmd, default", 2) == [20.0, 20.0]  # 0.04 by 200 iterations


def test_a_run_that_was_broken_off_or_limited_is_made_again(call, tmp_path):
    published = ("--recipes", "textbook, published settings", "--seeds", "0")
    begun, stored = call("--minutes", "1", *published)
    (run,) = stored["results"]
    assert begun[1:] == [("textbook", time_to_quality.OPEN_END, 0)] and run["ended"] == "limit"
    assert [point["iteration"] for point in run["points"]] == [25, 35, 50, 71, 100, 120]  # where the limit was
    assert call("--minutes", "0.5", *published)[0] == [] and len(call("--minutes", "2", *published)[0]) == 1
    path = tmp_path / "times.json"
    stored = json.loads(path.read_text())
    stored["results"][0]["ended"] = ""
    path.write_text(json.dumps(stored))
    begun, stored = call("--minutes", "1", *published)
    assert len(begun) == 1 and len(stored["results"]) == 1 and stored["results"][0]["ended"] == "limit"


def test_a_run_that_fails_is_told_and_not_made_again(call, monkeypatch, capsys):
    monkeypatch.setattr(FakeWorker, "broken", True)
    _, stored = call("--seeds", "0", "--recipes", "fastdmd, default")
    assert [(run["iterations"], run["points"]) for run in stored["results"]] == [(100, [])]
    assert stored["results"][0]["ended"].startswith("failed: ValueError: expected finite images")
    assert "got NaN or infinity" in capsys.readouterr().out
    assert call("--seeds", "0", "--recipes", "fastdmd, default")[0] == []


def test_a_run_whose_process_dies_is_an_error_and_made_again(call, monkeypatch):
    monkeypatch.setattr(FakeWorker, "lost", True)
    with pytest.raises(SystemExit, match="error: 1 runs broke off, see above"):
        call("--seeds", "0", "--recipes", "fastdmd, default")
    monkeypatch.setattr(FakeWorker, "lost", False)
    begun, stored = call("--seeds", "0", "--recipes", "fastdmd, default")
    assert begun == [("fastdmd", n, 0) for n in (100, 200, 400)] and len(stored["results"]) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--seeds", "a"), "expected --seeds as whole numbers from 0, separated by commas, got a"),
        (("--schedules", "100,100"), "expected --schedules as whole numbers from 2, separated by commas, got 100,100"),
        (("--minutes", "0"), "expected --minutes of at least 0.01, got 0"),
        (("--recipes", "none"), "got none"),
        (("--samples", "7"), "to be of {'device': 'cpu', 'num_samples': 7, 'precision': 'auto'}"),
    ],
)
def test_mistakes_are_one_line(options, told, call, capsys):
    call("--seeds", "0", "--recipes", "fastdmd, default")
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        call(*options)
    said = capsys.readouterr().err
    assert raised.value.code == 2 and told in said and len(said.splitlines()) == 1
