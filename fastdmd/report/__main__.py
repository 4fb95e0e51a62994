"""`python -m fastdmd.report RUN [RUN ...]`: the report of a run, or the comparison of several, as one page."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.report")

import dataclasses
from pathlib import Path
from typing import Annotated

from fastdmd.report import page
from fastdmd.report.reading import read_runs
from fastdmd.report.study import Study, study, subject_of
from fastdmd.runs import cli, distributed, folder, machine, outputs, terminal
from fastdmd.runs.config import CommandSettings
from fastdmd.runs.folder import REPORT
from fastdmd.settings import Positional, Switch, fail


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(CommandSettings):
    """Show what runs came to, finished or not: one HTML page that needs no network."""

    runs: Annotated[tuple[Path, ...], Positional]
    """Folders of runs; of several, the page compares them."""
    out: Path | None = None
    """Default: report.html in the folder of the run or, of several, here."""
    samples: bool = True
    """Compute what is not in the folder: images of the teacher, real images nearest to samples."""
    run_code: Switch = False
    """Import the code and the TorchScript that configurations name: only of runs that you trust."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""

    def check(self) -> None:
        super().check()
        if not self.runs:
            raise ValueError("expected the folders of runs, got none")
        if self.out is not None and self.out.suffix != ".html":  # such as a file of a run
            fail(self, "out", "ending in .html")


@terminal.command("fastdmd.report")
def main(arguments: list[str] | None = None) -> None:
    distributed.require_alone("fastdmd.report")
    config = cli.parse(ReportConfig, "fastdmd.report", arguments)
    with cli.user_errors("fastdmd.report", "reading"):
        device = cli.resolve_device(config.device)
        found = read_runs(config.runs)
        out = config.out or (config.runs[0] / REPORT if len(found) == 1 else Path(REPORT))
        outputs.require_file(out)
        if len(found) > 1 or out.name != REPORT or not out.parent.samefile(config.runs[0]):
            folder.require_file(out)
        machine.prepare(device)
    with cli.run_errors("fastdmd.report", "writing"):
        computed = Study()
        if config.samples and len(found) == 1 and found[0].sheet is not None:
            computed = study(found[0], subject_of(found[0], device, runs_code=config.run_code))
        page.write(out, found, computed)
    print(out)


if __name__ == "__main__":
    main()
