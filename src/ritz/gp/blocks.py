"""Many test points in blocks: what one block needs is forgotten before the next, with or without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import OperandError
from ..numerics import check_finite, in_transform

BLOCK_BYTES = 64 * 2**20  # of the widest matrix that a block needs


def check_points(Xs: Tensor, X: Tensor) -> Tensor:
    """Test points (n*, d) for observations X (n, d); (n*,) is taken for one column.

    Raises:
        OperandError, NonFiniteError: another shape or dtype; NaN or Inf.
    """
    Xs = Xs.unsqueeze(1) if isinstance(Xs, Tensor) and Xs.ndim == 1 else Xs
    if not isinstance(Xs, Tensor) or Xs.ndim != 2 or Xs.shape[1] != X.shape[1] or Xs.dtype != X.dtype:
        what = f"{tuple(Xs.shape)} {Xs.dtype}" if isinstance(Xs, Tensor) else type(Xs).__name__
        raise OperandError(f"Xs is {what}; expected (n*, {X.shape[1]}) in {X.dtype}")
    check_finite(Xs, "Xs")
    return Xs


def block_rows(width: int, dtype: torch.dtype) -> int:
    """Points of a block whose matrix has ``width`` numbers a point: 64 MB of it, between 16 and 512 points."""
    return max(16, min(512, BLOCK_BYTES // max(1, width * (torch.finfo(dtype).bits // 8))))


def in_blocks(f: Callable[[Tensor], tuple[Tensor, ...]], Xs: Tensor, rows: int) -> tuple[Tensor, ...]:
    """The results of f on blocks of rows of Xs, joined; f must be a function of the block alone.

    Where a gradient is wanted and there are several blocks, f runs once more for each of them in backward instead of
    keeping its graph. (torch.func's transforms do not allow that; there the graph is kept.)
    """
    parts = Xs.split(rows)
    if len(parts) > 1 and torch.is_grad_enabled() and Xs.requires_grad and not in_transform():
        results = [checkpoint(f, P, use_reentrant=False, preserve_rng_state=False) for P in parts]
    else:
        results = [f(P) for P in parts]
    return tuple(torch.cat(column) for column in zip(*results, strict=True))
