"""A kernel matrix that is kept, or one half of it: filled once by tiles, multiplied and differentiated by tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import full_precision, has_tangent, in_transform, untransformed, unwrap, version
from ..operators import Sum
from ..operators.base import Gradients, LinearOperator
from .backends import Stored
from .tiled import StationaryOperator
from .torch_tiles import Tiles, multiply
from .upper import UpperTiles


class _Kept(NamedTuple):
    """A matrix with what it was made from: memory and count of changes of every tensor."""

    matrix: Tensor | UpperTiles
    key: tuple[tuple[int, int], ...]
    seen: tuple[Tensor, ...]  # held, so that no other tensor gets the same memory


class StoredOperator(LinearOperator):
    """The matrix of ``operator`` (n, m), made at the first product and anew when a tensor of it has changed.

    Changes that PyTorch counts are seen: operations in place, steps of an optimiser, and another tensor assigned to
    ``.data``. Writes through ``.data`` (``p.data.fill_(1)``) and in inference mode are not counted, and not seen.

    Memory: n (n + 512)/2 numbers for a stationary kernel on a CPU (or a sum of such, scaled or not) with Z = None, of
    whose symmetric matrix the tiles on and above the diagonal are kept. Otherwise n·m numbers, and as many again for a
    moment where a sum is made. Gradient: the operator's own pairing, by tiles; the second derivative through its dense
    matrix.
    """

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            operator.shape, operator.dtype, operator.device, hermitian=operator.hermitian, psd=operator.psd
        )
        self.operator = operator
        self._kept: _Kept | None = None

    @property
    def backend(self) -> Stored:
        """``Stored(tiles)`` with the tiles that fill the matrix and contract gradients (the first ones, for a sum)."""
        operator: Any = self.operator
        while isinstance(operator, Sum):
            operator = operator.terms[0]
        return Stored(getattr(operator, "backend", Stored().tiles))

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, backend={self.backend})"

    @property
    def deferrable(self) -> bool:
        return self.operator.deferrable

    def matrix(self) -> Tensor:
        """The matrix (n, m) as numbers, without a graph; a copy where only one half of it is kept."""
        K = self._current()
        return K.to_dense() if isinstance(K, UpperTiles) else K

    @torch.no_grad()
    def _current(self) -> Tensor | UpperTiles:
        seen = tuple(unwrap(t) for t in self.operator.tensors())
        key = tuple((t.data_ptr(), version(t)) for t in seen)
        kept = self._kept  # read once: another Python thread may exchange it
        if kept is None or key != kept.key:
            kept = self._kept = None  # before the new one is there, or both would be held
            with untransformed():
                held = tuple(t.detach() for t in seen)
            kept = self._kept = _Kept(_filled(self.operator), key, held)
        return kept.matrix

    def _matmat(self, X: Tensor) -> Tensor:
        from ..product import product

        return product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        if self.hermitian:
            return self._matmat(X)
        tensors = (X, *self.tensors())
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if recorded or in_transform() or has_tangent(*tensors):
            return self.operator._rmatmat(X)
        with torch.no_grad(), full_precision():
            return multiply(self.matrix().mT, X, same=False)

    @torch.no_grad()
    def _numeric(self, X: Tensor) -> Tensor:
        K = self._current()
        with full_precision(), untransformed():
            X = unwrap(X)
            return K.product(X) if isinstance(K, UpperTiles) else multiply(K, X, same=bool(self.hermitian))

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        return _recorded(self.operator, X, tensors)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self.operator.pair(Lam, Q)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        """The columns K[:, idx]; differentiable."""
        return self.operator.columns(idx)

    def diagonal(self) -> Tensor:
        """The diagonal; differentiable."""
        return self.operator.diagonal()

    def to_dense(self) -> Tensor:
        return self.operator.to_dense()


def _filled(operator: LinearOperator) -> Tensor | UpperTiles:
    """The matrix as numbers, half of it where that will do; otherwise a sum term by term, with one matrix besides."""
    terms: Sequence[Any] = operator.terms if isinstance(operator, Sum) else [operator]
    edge = _common_edge(terms)
    if edge is not None:
        with untransformed():
            upper = UpperTiles(operator.shape[0], edge, operator.dtype, operator.device)
        for position, term in enumerate(terms):
            term.write_upper(upper, add=position > 0)
        return upper
    if not isinstance(operator, Sum):
        return unwrap(operator.to_dense().detach())
    out = torch.zeros(operator.shape, dtype=operator.dtype, device=operator.device)
    for term in terms:
        out += term.to_dense()
    return unwrap(out.detach())


def _common_edge(terms: Sequence[Any]) -> int | None:
    """Rows of the tiles that all terms are made of, where these can stand for the matrix; None otherwise."""
    edges = set()
    for term in terms:
        served = isinstance(term, StationaryOperator) and term.Z is None and term.device.type == "cpu"
        if not (served and isinstance(term.backend, Tiles)):
            return None
        edges.add(term.backend.size(term.dtype, term.device))
    return edges.pop() if len(edges) == 1 else None


def _recorded(operator: Any, X: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The product in plain differentiable operations on the tensors, for an operator that has it or a sum of such."""
    if not isinstance(operator, Sum):
        out: Tensor = operator._recorded(X, *tensors)
        return out
    total, position = None, 0
    for term in operator.terms:
        count = len(term.tensors())
        part = _recorded(term, X, tensors[position : position + count])
        total, position = part if total is None else total + part, position + count
    assert total is not None
    return total
