"""A report in a browser, where one is installed: nothing is fetched, nothing wrong, nothing cut off on a phone."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastdmd.report import __main__ as command
from fastdmd.runs.pictures import SampleHistory

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (375, 1200)
# Frames of two widths, and what is found in them: each report is a document of its own, with its own policy.
WRAPPER = """<!doctype html><body>{frames}<pre id="found"></pre><script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument, view = frame.contentWindow;
    return {{
      width: page.documentElement.clientWidth,
      needed: page.documentElement.scrollWidth,
      pictures: [...page.images].map((image) => image.complete && image.naturalWidth > 0 && image.clientWidth > 0),
      asked: view.performance.getEntriesByType("resource").map((entry) => entry.name).filter((n) => !/^data:/.test(n)),
      curves: page.querySelectorAll("svg path.line").length,
      paper: view.getComputedStyle(page.body).backgroundColor,
    }};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>"""


def browser():
    playwright = sorted(Path.home().glob(".cache/ms-playwright/chromium*/**/chrome"))
    return next(filter(None, map(shutil.which, NAMES)), None) or (str(playwright[-1]) if playwright else None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of many curves, long names and many snapshots."""
    path = (
        tmp_path_factory.mktemp("runs") / "a-run-with-a-name-that-is-as-long-as-no-name-of-a-run-should-be-0123456789"
    )
    path.mkdir()
    levels = {f"disagreement_{name}": 0.5 for name in ("below_0.2", "0.2_1", "1_5", "above_5")}
    lines = [
        {"iteration": step, "loss_dm": 1 / step, "loss_fake": 2 / step, **levels} for step in range(100, 400_000, 900)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"teacher": "m" * 300, "iterations": 400_000, "data": {"path": "/data/" + "d" * 200}}
    (path / "config.json").write_text(json.dumps(settings))
    row = {"frechet_distance": 1.5, "images_per_second": 12_345.6, "evaluations": 1, "class_accuracy": 0.5}
    alarm = {"kind": "collapse", "iteration": 123_456, "seen": "s" * 200, "advice": "--a-flag " * 30}
    summary = {"generator": row, "generator, 1 step": row, "teacher": row, "floor": row, "best": row, "alarms": [alarm]}
    (path / "summary.json").write_text(json.dumps({**summary, "outcome": "complete", "iterations": 400_000}))
    history = SampleHistory(path / "samples.png")
    images = torch.rand(10, 11, 3, 32, 32) * 2 - 1
    history.columns = [images[:, 0]] * 15
    history.iterations = [step * 26_000 for step in range(15)]
    history.add(images, 390_000)
    return path


@pytest.mark.parametrize("num_runs", [1, 5])
def test_a_browser_shows_all_of_it(run, tmp_path, num_runs):
    if (name := browser()) is None:
        pytest.skip("no Chromium is installed")
    runs = [run]
    for place in range(1, num_runs):
        runs.append(tmp_path / str(place) / run.name)
        shutil.copytree(run, runs[-1])
    command.main([*map(str, runs), "--out", str(tmp_path / "report.html"), "--device", "cpu"])
    text = html.escape((tmp_path / "report.html").read_text())
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{text}"></iframe>' for width in WIDTHS)
    (tmp_path / "wrapper.html").write_text(WRAPPER.format(frames=frames))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'wrapper.html'}"]
    done = subprocess.run([name, *flags, *where], capture_output=True, text=True, timeout=100)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', done.stdout)[1]))
    assert len(found) == len(WIDTHS)
    for width, seen in zip(WIDTHS, found, strict=True):
        assert seen["needed"] <= seen["width"] and width - 20 <= seen["width"] <= width
        assert len(seen["pictures"]) == (17 if num_runs == 1 else 5) and all(seen["pictures"])
        assert seen["asked"] == [] and seen["curves"] >= (6 if num_runs == 1 else 2)
        assert seen["paper"] == "rgb(253, 253, 251)"
