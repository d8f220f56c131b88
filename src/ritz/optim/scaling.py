"""The factor by which a loss was multiplied before backward (mixed precision), and when it is taken out again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import OperandError

if TYPE_CHECKING:
    from .base import CurvatureOptimizer


class LossScale:
    """Takes a loss scale out of gradients and statistics.

    Args:
        source: None, a number, a callable step -> number, or a ``torch.amp.GradScaler``. A number or a callable says
            that ``.grad`` arrives at ``step`` still scaled. A GradScaler keeps its own account of ``.grad``.

    Without a source, ``GradScaler.step`` still tells the scale at the step, unless ``unscale_`` was called before.
    """

    def __init__(self, source: Any = None) -> None:
        known = source is None or callable(source) or hasattr(source, "get_scale")
        if not known and not (isinstance(source, (int, float)) and source > 0):
            raise OperandError(
                f"grad_scale={source!r}; expected a positive number, a callable of the step, or a GradScaler"
            )
        self.source = source

    def known(self, step: int) -> float | None:
        """The scale of the backward passes of this step, where the source tells it."""
        if self.source is None:
            return None
        if hasattr(self.source, "get_scale"):
            return float(self.source.get_scale())
        return float(self.source(step)) if callable(self.source) else float(self.source)

    @staticmethod
    def found_inf(optimizer: CurvatureOptimizer) -> bool:
        """Whether a GradScaler found infinities, so that the step is to be skipped."""
        found = getattr(optimizer, "found_inf", None)
        return found is not None and bool(found)

    def unscale(self, optimizer: CurvatureOptimizer) -> float | None:
        """Divide ``.grad`` where it is scaled; returns the scale that is still in the statistics (None: unknown)."""
        told = getattr(optimizer, "grad_scale", None)
        stepping = getattr(optimizer, "found_inf", None) is not None
        known = self.known(optimizer.param_groups[0]["step"])
        if told is None and known is not None and not hasattr(self.source, "get_scale"):
            told = known
        if told is not None and float(told) != 1.0:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            if grads:  # torch refuses an empty list
                torch._foreach_mul_(grads, 1.0 / float(told))
        if known is not None:
            return 1.0
        if told is None:
            return None if stepping else 1.0
        return float(told)
