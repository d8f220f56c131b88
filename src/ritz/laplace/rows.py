"""Rows of a network's Jacobian, example by example, for predictive variances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..curvature.batches import narrow, read, to_device
from ..curvature.factored import factor
from ..curvature.linearize import Linearization
from ..curvature.network import Network
from ..curvature.output_vectors import MOST_VECTORS, unit_vectors
from ..errors import OperandError

ROWS_BYTES = 256 << 20  # rows that are held at once
FIRST = 32  # examples of the first piece, which tells how large the others may be
COTANGENTS = 64  # examples × outputs that go back through the network together, where layers have no rows


def jacobian_rows(network: Network, x: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs f (n, …, C) and rows (n, … C, P) of a few examples at a time.

    Rows come from what the layers see where they have that form, and from one backward pass for each output of a few
    examples otherwise.
    """
    batch = to_device(read([(x, None)], None)[0], network.device)
    start, step, layered = 0, FIRST, True
    while start < batch.size:
        count = min(step, batch.size - start)
        piece = narrow(batch.x, start, count, batch.size)
        kept = factor(network, piece, count, _units, ROWS_BYTES) if layered else None
        layered = kept is not None
        if kept is not None:
            f, rows = kept.f, kept.dense()
        else:
            with torch.no_grad():
                shape = network(network.parameters, narrow(batch.x, start, 1, batch.size)).shape
            outputs = shape[1:].numel()
            count = min(count, max(1, COTANGENTS // outputs))
            at = Linearization(network, narrow(batch.x, start, count, batch.size))
            f = at.f
            unit = torch.eye(f.numel(), dtype=f.dtype, device=f.device).reshape(-1, *f.shape)
            rows = at.vjp(unit).reshape(count, -1, network.numel)
        if f.ndim < 2 or f.shape[0] != count:
            raise OperandError(
                f"the model returned {tuple(f.shape)} for {count} examples; expected (n, …, C), C may be 1"
            )
        yield f, rows
        start += count
        step = max(1, ROWS_BYTES // (f[0].numel() * network.numel * f.element_size()))


def _units(f: Tensor) -> list[Tensor]:
    return list(unit_vectors(f)) if f[0].numel() <= MOST_VECTORS else []
