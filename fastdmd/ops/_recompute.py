"""Activation checkpointing runs a function again during the backward pass: it must see the noise of the first run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_DRAWN: WeakKeyDictionary[object, list[Tensor]] = WeakKeyDictionary()  # by checkpoint: the states of its draws
_NUM_REPLAYED: WeakKeyDictionary[Callable, int] = WeakKeyDictionary()  # by the hook of a recomputation


def drawn_before(rng_state: Tensor) -> Tensor | None:
    """The state that this call drew from when it ran first, or None if it runs for the first time.

    `torch.utils.checkpoint` (`use_reentrant=False`) is known by its hooks for saved tensors: torch has no public way to
    tell a first run from a recomputation. What is not known is refused by `check_first_run`.
    """
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    seen = {} if hooks is None else _closure(hooks[0])
    if "frame" in seen and torch._C._current_graph_task_id() == -1:  # of _checkpoint_hook
        _DRAWN.setdefault(seen["frame"], []).append(rng_state.clone())
    if "target_frame_ref" not in seen:  # of _recomputation_hook
        return None
    number = _NUM_REPLAYED.get(hooks[0], 0)
    _NUM_REPLAYED[hooks[0]] = number + 1
    states = _DRAWN.get(seen["target_frame_ref"](), [])
    if number >= len(states):
        raise _refusal()
    return states[number]


def _closure(hook: Callable) -> dict[str, Any]:
    hook = getattr(hook, "__wrapped__", hook)
    if getattr(hook, "__module__", None) != "torch.utils.checkpoint" or hook.__closure__ is None:
        return {}
    return dict(zip(hook.__code__.co_freevars, (cell.cell_contents for cell in hook.__closure__), strict=True))


def check_first_run() -> None:
    """Raises RuntimeError in a backward pass: a recomputation would draw other noise than the forward pass did.

    The op that takes a key from a state calls it, where it runs and where it is traced: so compiled functions, too.
    """
    if torch._C._current_graph_task_id() != -1:
        raise _refusal()


def _refusal() -> RuntimeError:
    return RuntimeError(
        "fastdmd.add_noise: expected rng_state outside of a backward pass, got it in one, where a recomputation draws"
        " other noise: give noise or rng_key, or checkpoint eagerly, without nesting and with use_reentrant=False"
    )
