"""Some columns of a kernel matrix, by groups of rows: neither their values nor their derivatives need more memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..numerics import full_precision, has_tangent, in_transform

# Entries made at once. Distances and profiles of a group are some ten arrays in float64, which then fit a cache.
GROUP = 2**17


def columns_by_rows(A: Any, index: Tensor) -> Tensor:
    """The columns (n, r) of an operator at ``index`` (r,), differentiable to any order.

    ``A`` has ``tensors()``, and ``_dense(*tensors, rows=, columns=)`` in plain differentiable operations on them.

    Cost: n·r entries, and as many again for a first derivative. Memory: n·r numbers; autograd's record of the entries,
    about ten times as much, only for second derivatives and inside of torch.func's transforms.
    """
    tensors = A.tensors()
    if in_transform() or has_tangent(*tensors):
        out: Tensor = A._dense(*tensors, columns=index)
        return out
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        recorded: Tensor = _Columns.apply(A, index, *tensors)
        return recorded
    return _values(A, index, tensors)


def _groups(n: int, r: int) -> Iterator[slice]:
    rows = max(1, GROUP // max(r, 1))
    return (slice(a, min(a + rows, n)) for a in range(0, n, rows))


@torch.no_grad()
def _values(A: Any, index: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    n, r = A.shape[0], index.numel()
    out = torch.empty(n, r, dtype=A.dtype, device=A.device)
    for rows in _groups(n, r):
        out[rows] = A._dense(*tensors, rows=rows, columns=index)
    return out


class _Columns(torch.autograd.Function):
    """The values, without a record; backward records one group of rows after the other."""

    @staticmethod
    def forward(A: Any, index: Tensor, *tensors: Tensor) -> Tensor:
        return _values(A, index, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.A, ctx.index = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # a second derivative is wanted
            aliases = [t.clone() for t in tensors]
            wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
            K = ctx.A._dense(*aliases, columns=ctx.index)
            found = iter(torch.autograd.grad(K, wanted, G, create_graph=True, allow_unused=True))
            return (None, None, *(next(found) if need else None for need in needs))
        total: list[Any] = [None] * len(tensors)
        for rows in _groups(*G.shape):
            with torch.enable_grad(), full_precision():
                leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
                K = ctx.A._dense(*leaves, rows=rows, columns=ctx.index)
                found = iter(torch.autograd.grad(K, [t for t in leaves if t.requires_grad], G[rows], allow_unused=True))
            for i, need in enumerate(needs):
                g = next(found) if need else None
                if g is not None:  # sums of many groups: in double precision
                    total[i] = g.double() if total[i] is None else total[i] + g.double()
        grads = (None if g is None else g.to(t.dtype) for g, t in zip(total, tensors, strict=True))
        return (None, None, *grads)
