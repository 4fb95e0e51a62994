"""What a run tells as it goes on, and to whom: lines in its folder always, and sinks beside them that may fail."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from fastdmd.networks.tensor_files import read_json
from fastdmd.networks.user_code import reason
from fastdmd.quality import Measurement
from fastdmd.runs.folder import EVALUATIONS, RECORD, RunFolder
from fastdmd.runs.series import group
from fastdmd.runs.sinks import SERVICES, Sink, open_sink
from fastdmd.settings import Settings, fail

SINKS = ("tensorboard", *SERVICES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSettings(Settings):
    """Where a run is recorded, and how it is shown."""

    record: str = "auto"
    """Where losses, figures and samples go besides the run's folder: tensorboard, wandb, trackio, several with commas
    between them, or none; auto: tensorboard where it is installed."""
    report: bool = True
    """Write report.html at the end."""

    def check(self) -> None:
        super().check()
        if self.record in ("auto", "none"):
            return
        names = self.record.split(",")
        if not set(names) <= set(SINKS) or len(set(names)) < len(names):
            fail(self, "record", f"auto, none, or some of {','.join(SINKS)}, each once")
        for name in names:
            if not _is_installed(name):
                raise ValueError(f"expected {name} for --record {self.record}, got none; pip install {name}")

    @property
    def sinks(self) -> tuple[str, ...]:
        if self.record == "auto":
            return ("tensorboard",) if _is_installed("tensorboard") else ()
        return () if self.record == "none" else tuple(self.record.split(","))


class Record:
    """That of one run. A sink that fails says so, once, and is told nothing more; training goes on.

    What is kept elsewhere cannot be taken back: `record.json` says under which name it is kept, and how far it has
    come, and a run that goes on tells only what comes after that.
    """

    def __init__(self, folder: RunFolder, settings: RecordSettings = RecordSettings(record="none")):
        self._folder, self._settings = folder, settings
        self._sinks: dict[str, Sink] = {}
        self._identity = secrets.token_hex(4)
        self._sent: dict[str, int] = {}  # iteration, by sink and kind

    def start(self, iteration: int) -> None:
        """Opens the sinks of a run that goes on from this iteration. Raises OSError or ValueError where one that was
        asked for does not open."""
        path = self._folder.path / RECORD
        if path.exists() and not SERVICES.keys().isdisjoint(self._settings.sinks):
            self._take_over(read_json(path))
        for name in self._settings.sinks:
            try:
                sink = open_sink(name, self._folder.path, iteration, self._identity, self._folder.config)
            except Exception as error:  # whatever a library or a service has to say
                if self._settings.record == "auto":
                    tqdm.write(f"not recorded by {name}: {reason(error)}")
                    continue
                self.close()
                if isinstance(error, OSError):
                    raise
                raise ValueError(f"expected {name} to begin to record, got {reason(error)}") from error
            self._sinks[name] = sink

    def line(self, values: Mapping[str, Any]) -> None:
        """One of metrics.jsonl. Raises OSError where the folder does not take it."""
        tagged = {f"{group(name)}/{name}": value for name, value in values.items() if name != "iteration"}
        alarms = values.get("alarms", ())
        self._scalars("line", values["iteration"], {**tagged, "health/alarms": len(alarms)})
        self._folder.log(**values)

    def measurements(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Those of one iteration for evaluation.jsonl, a line an average. Raises as `line` does."""
        for line in lines:
            figures = {name: value for name, value in line.items() if name not in ("iteration", "images", "average")}
            tagged = {f"quality/{name}/{line['average']}": value for name, value in figures.items()}
            self._scalars(f"measurement of {line['average']}", line["iteration"], tagged)
        self._folder.append(EVALUATIONS, lines)

    def samples(self, iteration: int, picture: Callable[[], Image.Image]) -> None:
        """A picture of some; made where somebody wants it."""
        if self._sinks:
            made = picture()
            self._tell("samples", iteration, lambda sink: sink.picture(iteration, "samples", made))

    def result(self, iteration: int, rows: Mapping[str, Measurement]) -> None:
        """What was measured at the end."""
        tagged = {
            f"result/{field}/{name}": value
            for name, row in rows.items()
            for field, value in dataclasses.asdict(row).items()
        }
        self._scalars("result", iteration, tagged)

    def close(self) -> None:
        for name, sink in list(self._sinks.items()):
            self._attempt(name, sink.close)
        self._sinks.clear()

    def _scalars(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        known = {name: float(value) for name, value in values.items() if _is_known(value)}
        if known:
            self._tell(kind, iteration, lambda sink: sink.scalars(iteration, known))

    def _tell(self, kind: str, iteration: int, tell: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            if sink.rewinds:
                self._attempt(name, functools.partial(tell, sink))
            elif iteration > self._sent.get(f"{name}: {kind}", -1):
                self._attempt(name, functools.partial(self._send, f"{name}: {kind}", iteration, tell, sink))

    def _send(self, what: str, iteration: int, tell: Callable[[Sink], None], sink: Sink) -> None:
        self._sent[what] = iteration
        self._folder.write_json(RECORD, {"identity": self._identity, "sent": self._sent})
        tell(sink)

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of a disk, a network, a library
            self._sinks.pop(name, None)
            tqdm.write(f"not recorded from here on by {name}: {reason(error)}; training goes on")

    def _take_over(self, found: Mapping[str, Any]) -> None:
        """Raises ValueError for what is no record."""
        identity, sent = found.get("identity"), found.get("sent")
        if not isinstance(identity, str) or not isinstance(sent, dict) or {*map(type, sent.values())} - {int}:
            raise ValueError(f"expected an identity and iterations in {self._folder.path / RECORD}, got other content")
        self._identity = identity
        self._sent = sent


def _is_known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_installed(name: str) -> bool:
    """Not so a folder of that name that lies where Python looks."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
