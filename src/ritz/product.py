"""A X for operators whose own pairing is better than autograd's record of their product (sparse, kernels, stencils)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import TransformError
from .numerics import VMAP_REFUSED, full_precision, has_tangent, in_transform, is_transformed


class _Product(torch.autograd.Function):
    """A X with A's pairing as its derivative; see :func:`product`."""

    @staticmethod
    def forward(A: Any, X: Tensor, *tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return A._numeric(X)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.A = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        X, *tensors = ctx.saved_tensors
        A, needs = ctx.A, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # a second derivative is wanted: differentiate the recorded product instead
            # ... through aliases: X may be computed from a tensor of A, and the engine does not stop at X.
            # Copies, because a view of the values of a sparse tensor cannot be differentiated where it is complex.
            aliases = [t.clone() for t in (X, *tensors)]
            wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
            found = iter(torch.autograd.grad(A._recorded(*aliases), wanted, G, create_graph=True, allow_unused=True))
            return (None, *(next(found) if need else None for need in needs))
        with full_precision():
            grad_X = A._rmatmat(G) if needs[0] else None
            grads = A.pair(G, X) if any(needs[1:]) else (None,) * len(tensors)
        return (None, grad_X, *grads)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise TransformError(VMAP_REFUSED.format(name="an operand"))


def product(A: Any, X: Tensor) -> Tensor:
    """A X, differentiable to any order in A's tensors and X, with A's own pairing for the first derivative.

    ``A`` has ``_numeric(X)`` (the product without a graph) and ``_recorded(X, *A.tensors())`` (in plain differentiable
    operations on its arguments).
    """
    tensors = A.tensors()
    if has_tangent(X, *tensors):
        return A._recorded(X, *tensors)
    if in_transform():
        if torch.is_grad_enabled() or any(is_transformed(t) for t in (X, *tensors)):
            return A._recorded(X, *tensors)
        return A._numeric(X).clone()  # a tensor of the transform, which callers may change in place
    if torch.is_grad_enabled() and (X.requires_grad or any(t.requires_grad for t in tensors)):
        return _Product.apply(A, X, *tensors)
    return A._numeric(X)
