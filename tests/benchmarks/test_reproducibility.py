"""What the runs of `benchmarks.reproducibility` differ in reaches their processes."""

import pytest

from benchmarks import reproducibility


@pytest.mark.parametrize("name", reproducibility.RUNS)
def test_every_run_has_its_own_environment_over_one_thread(name, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(reproducibility.subprocess, "Popen", lambda words, **options: started.append(options["env"]))
    _, variables = reproducibility.RUNS[name]
    reproducibility.command("train", [], tmp_path / "run", variables)
    expected = {"OMP_NUM_THREADS": "1"} | variables
    assert {variable: started[0][variable] for variable in expected} == expected
