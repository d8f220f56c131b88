"""Saving, loading and copying: plain tensors in, the same bits out, hooks made anew."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import CurvatureOptimizer


class Stateful:
    """The part of the optimizers that torch's own state handling gets wrong for them."""

    def load_state_dict(self: CurvatureOptimizer, state_dict: dict[str, Any]) -> None:  # type: ignore[misc]
        """Load a state dictionary of plain tensors and numbers; tensors move to their parameter's device, not dtype.

        (torch casts loaded state to the parameter's dtype, which would round float32 factors of bfloat16 weights.)
        """
        super().load_state_dict(state_dict)  # type: ignore[misc]
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(parameters, indices):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.detach().to(device, copy=True)
        for layer in self._layers:
            layer.cache.clear()
        self._forget()
        self._scale.step = self.param_groups[0]["step"]

    def __deepcopy__(self: CurvatureOptimizer, memo: dict[int, Any]) -> CurvatureOptimizer:  # type: ignore[misc]
        new = object.__new__(type(self))
        memo[id(self)] = new
        self._forget()
        for name, value in self.__dict__.items():
            # "step" is there where a learning-rate scheduler has wrapped it: a copy has no scheduler.
            if name not in ("_capture", "_collector", "step"):
                new.__dict__[name] = copy.deepcopy(value, memo)
        new._capture = None
        new._attach()
        return new

    def __getstate__(self: CurvatureOptimizer) -> dict[str, Any]:  # type: ignore[misc]
        raise TypeError(
            f"{type(self).__name__} holds hooks on its model and cannot be pickled; save optimizer.state_dict() and "
            "load it into an optimizer of the same model"
        )


def same_device(state: dict[str, Any], device: torch.device) -> None:
    """Move a parameter's state after the parameter was moved (``model.to(device)`` keeps the parameter object)."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device != device and key != "step":
            state[key] = value.to(device)
