"""Where a run is recorded besides its folder: TensorBoard's event files, Weights & Biases, trackio."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastdmd.runs.folder import EVENTS

if TYPE_CHECKING:
    from PIL import Image

PROJECT = "fastdmd"


class Sink(Protocol):
    """What takes numbers and pictures of an iteration, later ones after earlier ones. It raises whatever it raises."""

    rewinds: bool  # whether it forgets what it has of the iterations that a run that goes on has before it

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder of the run.

    They are written at once, by no thread: of torch's SummaryWriter a full disk ends the thread, with a traceback.
    """

    rewinds = True

    def __init__(self, folder: Path, iteration: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # a tenth of a second to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        path = folder / EVENTS
        path.mkdir(exist_ok=True)
        # Files are read in the order of their names, which begin with a second: that of a killed process may be this.
        times = [int(old.name.split(".")[3]) for old in path.glob("events.out.tfevents.[0-9]*.*")]
        second = max([int(time.time()), *(found + 1 for found in times)])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._writer = RecordWriter(open(path / name, "xb"))
        self._write(file_version="brain.Event:2")
        if times:  # what they hold of this iteration and later ones is void
            self._write(step=iteration, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        tagged = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=iteration, summary=self._summary(value=tagged))

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        content = io.BytesIO()
        picture.save(content, format="PNG")
        image = self._summary.Image(
            width=picture.width,
            height=picture.height,
            colorspace=len(picture.getbands()),
            encoded_image_string=content.getvalue(),
        )
        self._write(step=iteration, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        self._writer.close()

    def _write(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()


class WeightsAndBiases:
    """A run of wandb, under an id by which it is found again."""

    rewinds = False

    def __init__(self, folder: Path, identity: str, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(console="off"),  # what the command prints is its own
        )

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, under a name by which it is found again."""

    rewinds = False

    def __init__(self, folder: Path, identity: str, config: Mapping[str, Any]):
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=PROJECT, name=f"{folder.name}-{identity}", resume="allow", config=dict(config), embed=False
        )

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        self._run.log({name: self._trackio.Image(picture)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


# Which keep what they are told.
SERVICES: dict[str, Callable[..., Sink]] = {"wandb": WeightsAndBiases, "trackio": Trackio}


def open_sink(name: str, folder: Path, iteration: int, identity: str, config: Mapping[str, Any]) -> Sink:
    """That of a run which goes on from this iteration."""
    if name == "tensorboard":
        return TensorBoard(folder, iteration)
    return SERVICES[name](folder, identity, config)
