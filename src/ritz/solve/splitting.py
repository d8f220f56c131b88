"""A = K + noise: which terms of a sum are a multiple of the identity, or a positive diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import Counting, Declared, Diagonal, Identity, LinearOperator, Scaled, Sum
from .root import Shift


def split_shift(A: LinearOperator) -> tuple[LinearOperator, Shift | None]:
    """K and σ² with A = K + σ² I, found among the terms of a sum; σ² is None where there is no such term."""
    return _split(A, diagonals=False)


def split_noise(A: LinearOperator) -> tuple[LinearOperator, Shift | None]:
    """K and the noise with A = K + σ² I or A = K + D, D a diagonal with positive entries.

    The noise is a number or a tensor of one element (σ²), the entries (n,) of D and of every multiple of the identity
    beside it, or None. A diagonal term that leaves the noise not positive everywhere stays in K.
    """
    K, noise = _split(A, diagonals=True)
    if isinstance(noise, Tensor) and noise.numel() > 1 and not bool((noise.detach() > 0).all()):
        return split_shift(A)
    return K, noise


def add_shifts(first: Shift | None, second: Shift | None) -> Shift | None:
    """The sum, where None is nothing."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.numel() == second.numel():
        return first + second.reshape(first.shape)
    if any(isinstance(x, Tensor) and x.numel() > 1 for x in (first, second)):  # one of them is (n,): spread the other
        first, second = (x.reshape(-1) if isinstance(x, Tensor) else x for x in (first, second))
    return first + second


def _split(A: LinearOperator, diagonals: bool) -> tuple[LinearOperator, Shift | None]:
    if isinstance(A, (Counting, Declared)):
        K, noise = _split(A.children[0], diagonals)
        return (A, None) if noise is None else (A.rebuild([K]), noise)
    if not isinstance(A, Sum):
        return A, None
    rest: list[LinearOperator] = []
    noise = None
    for term in A.terms:
        value = _noise(term, diagonals)
        if value is None:
            rest.append(term)
        else:
            noise = add_shifts(noise, value)
    if not rest or noise is None:
        return A, None
    return (rest[0] if len(rest) == 1 else Sum(rest)), noise


def _noise(A: LinearOperator, diagonals: bool) -> Shift | None:
    """c where A is c·I, and the entries where A is a real diagonal and those are asked for."""
    if isinstance(A, Identity):
        return 1.0
    if diagonals and isinstance(A, Diagonal) and not A.entries.is_complex():
        return A.entries
    if diagonals and isinstance(A, Declared):
        return _noise(A.operator, diagonals)
    if isinstance(A, Scaled):
        inner = _noise(A.operator, diagonals)
        if inner is None:
            return None
        scalar = A.scalar
        if isinstance(scalar, Tensor) and isinstance(inner, Tensor) and inner.numel() > 1:
            scalar = scalar.to(inner.dtype).reshape(())
        return scalar * inner  # type: ignore[no-any-return]
    return None


def noise_values(noise: Shift, n: int, device: torch.device) -> Tensor:
    """The noise as numbers (n,) in float64, without a graph."""
    values = torch.as_tensor(noise.detach() if isinstance(noise, Tensor) else noise, dtype=torch.float64, device=device)
    return values.reshape(-1).expand(n)
