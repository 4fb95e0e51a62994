"""The folder of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdmd.files import write_atomically


class RunFolder:
    """The folder of one run: `config.json`, `metrics.jsonl`, `samples.png`, weights and `summary.json`.

    Raises FileExistsError if the folder already holds a run, OSError if it cannot be written; nothing that was
    there before is touched.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"fastdmd: expected a folder for --out, got the file {path}")
        if (path / "config.json").exists():
            raise FileExistsError(f"fastdmd: expected a new folder for --out, got {path}, which already holds a run")
        path.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", config)
        self._metrics = open(path / "metrics.jsonl", "w", buffering=1, encoding="utf-8")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, default=str) + "\n"
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def log(self, **values: float) -> None:
        self._metrics.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._metrics.close()
