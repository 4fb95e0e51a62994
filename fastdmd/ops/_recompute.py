"""Activation checkpointing runs a function again during the backward pass: it must see the noise of the first run."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_DRAWN: WeakKeyDictionary[object, list[Tensor]] = WeakKeyDictionary()  # by checkpoint: the states of its draws
_NUM_REPLAYED: WeakKeyDictionary[Callable, int] = WeakKeyDictionary()  # by the hook of a recomputation


def drawn_before(op: str, rng_state: Tensor) -> Tensor | None:
    """The state that this call drew from when it ran first, or None if it runs for the first time.

    `torch.utils.checkpoint` (`use_reentrant=False`) is known by its hook for saved tensors, of which torch has no
    public view; a compiled function is recomputed right by itself. Raises RuntimeError in any other backward pass,
    where a draw would be another one than that of the forward pass.
    """
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    seen = {} if hooks is None else _closure(hooks[0])
    if "target_frame_ref" in seen:  # of _recomputation_hook
        number = _NUM_REPLAYED.get(hooks[0], 0)
        _NUM_REPLAYED[hooks[0]] = number + 1
        states = _DRAWN.get(seen["target_frame_ref"](), [])
        if number < len(states):
            return states[number]
    if hooks is not None and "target_frame_ref" in seen or torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"fastdmd.{op}: expected rng_state outside of a backward pass, got it in one, where a recomputation would draw"
            " other noise: give noise, or checkpoint without nesting and with use_reentrant=False"
        )
    if "frame" in seen:  # of _checkpoint_hook
        _DRAWN.setdefault(seen["frame"], []).append(rng_state.clone())
    return None


def _closure(hook: Callable) -> dict[str, object]:
    hook = getattr(hook, "__wrapped__", hook)
    if getattr(hook, "__module__", None) != "torch.utils.checkpoint" or hook.__closure__ is None:
        return {}
    return dict(zip(hook.__code__.co_freevars, (cell.cell_contents for cell in hook.__closure__), strict=True))
