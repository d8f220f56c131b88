"""Times as tensors, checked where they enter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite
from ..operators.base import LinearOperator


def as_times(t: Any, A: LinearOperator) -> Tensor:
    """A scalar or a 1-D grid of times; numbers keep double precision (``torch.as_tensor(0.1)`` would be float32)."""
    if isinstance(t, Tensor):
        times = t
    else:
        try:
            times = torch.from_numpy(np.asarray(t)).to(A.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OperandError(f"t is {t!r}; expected a number, or a 1-D tensor of times") from error
    if times.dtype == torch.bool or not times.numel():
        raise OperandError(f"t is {t!r}; expected a number, or a 1-D tensor of at least one time")
    if times.ndim > 1:
        raise OperandError(f"t has shape {tuple(times.shape)}; expected a scalar or a 1-D grid of times")
    check_finite(times.detach(), "t")
    return times


def one_time(t: Any, A: LinearOperator) -> Tensor:
    """A single time as a tensor of no dimension."""
    time = as_times(t, A)
    if time.ndim:
        raise OperandError(f"t has shape {tuple(time.shape)}; expected one time")
    return time
