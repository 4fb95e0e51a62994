"""Modules by the names that they had before they moved into folders: the same module, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "adapters": "networks.adapted",
    "bounds": "settings",
    "budget": "distill.budget",
    "checkpoint": "networks.weights",
    "cli": "runs.cli",
    "config": "runs.config",
    "diffusers_unet": "networks.diffusers_unet",
    "dmd2": "distill",
    "edm": "teachers.edm",
    "execution": "distill.execution",
    "features": "quality.features",
    "flags": "settings",
    "flat": "optim.flat",
    "frechet": "quality.frechet",
    "gradients": "optim.gradients",
    "groups": "optim.groups",
    "imports": "networks.user_code",
    "inert_pickle": "teachers.inert_pickle",
    "interrupts": "runs.interrupts",
    "loop": "runs.loop",
    "machine": "runs.machine",
    "metrics": "quality.metrics",
    "outputs": "runs.outputs",
    "pickles": "teachers.edm_pickle",
    "pictures": "runs.pictures",
    "precision": "runs.precision",
    "presets": "runs.presets",
    "run_folder": "runs.folder",
    "startup": "runs.startup",
    "states": "optim.states",
    "step": "distill.turns",
    "tally": "distill.tally",
    "terminal": "runs.terminal",
    "trainer": "runs.distillation",
    "unet": "networks.unet",
    "unet_blocks": "networks.unet_blocks",
    "unet_config": "networks.unet_config",
}


class FormerNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `fastdmd.unet`, which networks pickled whole name too, where it is now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __package__ or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        home = f"{__package__}.{MOVED[spec.name.rpartition('.')[2]]}"
        warnings.warn(f"{spec.name} is {home} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(home)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put that of the former name there


def install() -> None:
    """Last in the search, so that a module of that name would come first."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())
