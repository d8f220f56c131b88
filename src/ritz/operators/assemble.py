"""The entries of an operator that is a sparse matrix at heart: what a direct solver wants."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algebra import Declared, Scaled, Sum
from .base import LinearOperator
from .basic import Diagonal, Identity
from .counting import Counting
from .sparse import Sparse


class Assembled(NamedTuple):
    """Entries in coordinates; those at one place add up."""

    row: Tensor
    col: Tensor
    values: Tensor


def assemble(A: LinearOperator) -> Assembled | None:
    """The entries of a sparse matrix, of an operator with ``.assemble()``, or of sums and multiples of such.

    None where there are none short of forming the matrix. Values carry no gradient.
    """
    with torch.no_grad():
        return _entries(A)


def _entries(A: Any) -> Assembled | None:
    if isinstance(A, Sparse):
        return Assembled(A.rows, A.col, A.values.detach())
    if isinstance(A, (Diagonal, Identity)):
        index = torch.arange(A.shape[0], device=A.device)
        return Assembled(index, index, A.diagonal().detach())
    if isinstance(A, (Counting, Declared)):
        return _entries(A.operator)
    if isinstance(A, Scaled):
        inner = _entries(A.operator)
        return None if inner is None else inner._replace(values=A._factor() * inner.values)
    if isinstance(A, Sum):
        parts = [_entries(child) for child in A.children]
        if any(p is None for p in parts):
            return None
        return Assembled(*(torch.cat(x) for x in zip(*parts, strict=True)))  # type: ignore[arg-type]
    own = getattr(A, "assemble", None)
    return _entries(own()) if callable(own) else None
