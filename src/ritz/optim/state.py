"""Saving, loading and copying: plain tensors in, the same bits out, hooks made anew."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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

    def settle(self: CurvatureOptimizer, p: nn.Parameter, group: int) -> None:  # type: ignore[misc]
        """Let a parameter's state follow where the model was moved or cast; costs a comparison where it was not."""
        where = (p.device, p.dtype)
        if self._where.setdefault(p, where) == where:
            return
        self._where[p] = where
        settings = self._settings[group]
        moved(self.state[p], p, settings.curvature_dtype if settings is not None else None)
        for layer in self._layers:
            if layer.weight is p:
                layer.cache.clear()

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


IN_THE_DTYPE_OF_THE_PARAMETER = ("momentum_buffer", "rounding", "exp_avg", "exp_avg_sq")


def moved(state: dict[str, Any], p: Tensor, curvature_dtype: torch.dtype | None) -> None:
    """Take a parameter's state along after ``model.to(...)``, which keeps the parameter object."""
    for key, value in state.items():
        if isinstance(value, Tensor) and key != "step":
            own = curvature_dtype is None or key in IN_THE_DTYPE_OF_THE_PARAMETER
            state[key] = value.to(p.device, p.dtype if own else curvature_dtype)
