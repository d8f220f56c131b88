"""Rows of a network's Jacobian, example by example, for predictive variances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import Jacobian
from ..curvature.batches import Batch, narrow, read, to_device
from ..curvature.factored import Factored
from ..curvature.network import Network, Selection
from ..errors import OperandError

ROWS_BYTES = 256 << 20  # rows that are held at once
COTANGENTS = 64  # examples × outputs that go back through the network together, where layers have no rows


def jacobian_rows(model: nn.Module, params: Selection, x: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs (n, *T, C) and rows (n, T C, P) of a few examples at a time.

    Rows come from what the layers see where they have that form, and from one backward pass for each output of a few
    examples otherwise.
    """
    batch = to_device(read([(x, None)], None)[0], Network(model, params).device)
    size, start, fits = batch.size, 0, True
    step = min(size, 32)
    while start < size:
        count = min(step, size - start)
        piece = Batch(narrow(batch.x, start, count, size), None, count)
        J = Jacobian(model, None, params, [(piece.x, None)])
        f = J.network(J.network.parameters, piece.x).detach()
        if f.ndim < 2 or f.shape[0] != piece.size:
            raise OperandError(
                f"the model returned {tuple(f.shape)} for {piece.size} examples; expected (n, …, C), C may be 1"
            )
        rows = J._factor(0, piece, ROWS_BYTES) if fits else None
        fits = rows is not None
        if rows is None and piece.size * f[0].numel() > COTANGENTS and piece.size > 1:
            step = max(1, COTANGENTS // f[0].numel())
            continue
        yield f, rows.dense() if isinstance(rows, Factored) else _by_backward(J, f)
        start += piece.size
        if fits:
            each = f[0].numel() * J.network.numel * f.element_size()
            step = min(size - start, max(1, ROWS_BYTES // max(each, 1))) or 1


def _by_backward(J: Jacobian, f: Tensor) -> Tensor:
    unit = torch.eye(J.shape[0], dtype=f.dtype, device=f.device)
    return J._rmatmat(unit).mT.reshape(f.shape[0], f[0].numel(), J.network.numel)
