"""The studies of quality: flags that exist, runs that are not made twice, and means over the seeds."""

import dataclasses
import json

import pytest

from benchmarks import quality
from fastdmd.runs import cli
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.presets import PRESETS


@pytest.mark.parametrize(
    "flags", [flags for study in quality.STUDIES.values() for flags in study.values()], ids=lambda flags: str(flags)
)
def test_flags_are_those_of_the_command(flags):
    options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    found = cli.parse(TrainConfig, "fastdmd.train", options, PRESETS)
    assert (dataclasses.replace(found, out=None) == PRESETS["mnist"].config) == (not flags)


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    made = []

    def run(flags, seed, device, num_threads):
        assert device == "cpu"
        if flags == {"iterations": 800, "beta1": 0.7}:
            raise RuntimeError("diverged")
        made.append((flags, seed))
        distance = 0.25 + 0.5 * seed + len(flags) - 1
        return dict.fromkeys((key for key, *_ in quality.FIGURES), distance)

    monkeypatch.setattr(quality, "run", run)
    monkeypatch.setattr(quality, "STUDIES", {"small": {"plain": {}, "other": {"beta1": 0.5}, "broken": {"beta1": 0.7}}})
    file = tmp_path / "study.json"
    plain, other = {"iterations": 800}, {"iterations": 800, "beta1": 0.5}
    for seeds, expected in (("0", [(plain, 0), (other, 0)]), ("0,1", [(plain, 1), (other, 1)])):
        made.clear()
        monkeypatch.setattr("sys.argv", ["quality", "small", "--seeds", seeds, "--json", str(file)])
        with pytest.raises(SystemExit, match="runs failed"):  # what fails leaves the others
            quality.main()
        assert sorted(made, key=str) == sorted(expected, key=str)
        stored = json.loads(file.read_text())
        file.write_text(json.dumps(stored | {"how": "by hand"}))
    assert stored["how"] == "by hand"
    rows = stored["rows"]
    assert [(row["variant"], row["seed"], row["frechet_distance"]) for row in rows] == [
        ("plain", 0, 0.25),
        ("other", 0, 1.25),
        ("plain", 1, 0.75),
        ("other", 1, 1.75),
    ]
    plain, other = capsys.readouterr().out.splitlines()[-2:]
    assert plain.split()[:5] == ["plain", "2", "0.500", "±", "0.354"]
    assert other.split()[:5] == ["other", "2", "1.500", "±", "0.354"]


def test_variants_are_chosen_by_their_whole_names(monkeypatch, capsys):
    made = []
    figures = dict.fromkeys((key for key, *_ in quality.FIGURES), 0.5)
    monkeypatch.setattr(quality, "run", lambda flags, *others: made.append(flags) or figures)
    monkeypatch.setattr(quality, "STUDIES", {"small": {"4 steps": {}, "4 steps, noised": {"beta1": 0.5}}})
    monkeypatch.setattr("sys.argv", ["quality", "small", "--seeds", "0", "--variants", "4 steps, noised"])
    quality.main()
    assert made == [{"iterations": 800, "beta1": 0.5}]
    monkeypatch.setattr("sys.argv", ["quality", "small", "--variants", "noised"])
    with pytest.raises(SystemExit) as refused:
        quality.main()
    assert refused.value.code == 2 and "out of 4 steps, 4 steps, noised, got noised" in capsys.readouterr().err
