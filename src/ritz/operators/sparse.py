"""Sparse matrices: products through CSR, gradients on the stored pattern only, never densified."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from .base import Gradients, LinearOperator
from .basic import like


class Sparse(LinearOperator):
    """A sparse matrix given by row pointers, column indices and values (CSR order).

    Args:
        crow, col: compressed row pointers (n + 1,) and column indices (nnz,).
        values: stored entries (nnz,); the tensor that receives the gradient.
        shape: (n, m).

    The pairing is a sampled dense–dense product on the pattern (torch's own backward of a sparse product is a dense
    n×m matrix). ``Sparse.from_tensor`` keeps the link from the values to a COO or CSR tensor that requires grad.
    """

    def __init__(
        self,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        shape: Sequence[int],
        *,
        hermitian: bool | None = None,
        psd: bool | None = None,
    ) -> None:
        super().__init__(shape, values.dtype, values.device, hermitian=hermitian, psd=psd)
        self.crow, self.col, self.values = crow, col, values
        self._csr = _csr(crow, col, values.detach(), self.shape)
        if hermitian is None and not psd and shape[0] == shape[1]:
            self.hermitian = self._is_hermitian()
        self._adjoint_csr: Tensor | None = None
        self._rows: Tensor | None = None

    @classmethod
    def from_tensor(cls, x: Tensor, *, hermitian: bool | None = None, psd: bool | None = None) -> Sparse:
        """From a sparse COO, CSR, CSC, BSR or BSC tensor; gradients flow back in its own layout."""
        if x.ndim != 2:
            raise OperandError(f"a sparse operator needs a 2-D tensor; got shape {tuple(x.shape)}")
        if x.layout == torch.sparse_csr:
            with _quiet():
                values = x.values()  # type: ignore[operator]
            return cls(x.crow_indices(), x.col_indices(), values, x.shape, hermitian=hermitian, psd=psd)
        if x.layout == torch.sparse_coo:
            x = x.coalesce()
            row, col = x.indices()
            crow = torch.zeros(x.shape[0] + 1, dtype=torch.long, device=x.device)
            crow[1:] = torch.bincount(row, minlength=x.shape[0]).cumsum(0)
            return cls(crow, col, x.values(), x.shape, hermitian=hermitian, psd=psd)
        if x.requires_grad:
            raise OperandError(f"a trainable sparse tensor came in layout {x.layout}; convert it to COO or CSR first")
        with _quiet():
            return cls.from_tensor(x.to_sparse_csr(), hermitian=hermitian, psd=psd)

    @property
    def rows(self) -> Tensor:
        """Row index of every stored entry (nnz,)."""
        if self._rows is None:
            counts = self.crow[1:] - self.crow[:-1]
            self._rows = torch.repeat_interleave(torch.arange(self.shape[0], device=self.device), counts)
        return self._rows

    def _is_hermitian(self) -> bool:
        adjoint = self._transposed()
        with _quiet():
            return (
                torch.equal(adjoint.crow_indices(), self.crow)
                and torch.equal(adjoint.col_indices(), self.col)
                and torch.equal(adjoint.values(), self.values.detach())
            )

    def _transposed(self) -> Tensor:
        order = torch.argsort(self.col, stable=True)
        crow = torch.zeros(self.shape[1] + 1, dtype=self.crow.dtype, device=self.device)
        crow[1:] = torch.bincount(self.col, minlength=self.shape[1]).cumsum(0)
        values = self.values.detach()[order].conj().resolve_conj()
        return _csr(crow, self.rows[order].to(self.col.dtype), values, (self.shape[1], self.shape[0]))

    def _matmat(self, X: Tensor) -> Tensor:
        from ..pairing import product

        return product(self, X)

    def _numeric(self, X: Tensor) -> Tensor:
        if X.shape[1] == 1:  # torch's CSR matrix–vector kernel is several times faster than its matrix–matrix one
            return torch.mv(self._csr, X.squeeze(1)).unsqueeze(1)
        return self._csr @ X

    def _recorded(self, X: Tensor) -> Tensor:
        terms = self.values.unsqueeze(1) * X.index_select(0, self.col)
        out = torch.zeros(self.shape[0], X.shape[1], dtype=terms.dtype, device=self.device)
        return out.index_add(0, self.rows, terms)

    def _rmatmat(self, X: Tensor) -> Tensor:
        if self.hermitian:
            return self._matmat(X)
        if torch.is_grad_enabled() and (self.values.requires_grad or X.requires_grad):
            terms = self.values.conj().unsqueeze(1) * X.index_select(0, self.rows)
            out = torch.zeros(self.shape[1], X.shape[1], dtype=terms.dtype, device=self.device)
            return out.index_add(0, self.col, terms)
        if self._adjoint_csr is None:
            self._adjoint_csr = self._transposed()
        return self._adjoint_csr @ X

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        if not self.values.requires_grad:
            return (None,)
        if Lam.device.type == "cpu" and not Lam.is_complex():
            zero = _csr(self.crow, self.col, torch.zeros_like(self.values), self.shape)
            with _quiet():
                return (torch.sparse.sampled_addmm(zero, Lam, Q.mT, beta=0.0).values(),)
        grad = torch.zeros_like(self.values)
        for j in range(Lam.shape[1]):  # column by column: memory O(nnz), not O(nnz·k)
            grad += Lam[:, j].contiguous()[self.rows] * Q[:, j].contiguous()[self.col].conj()
        return (like(grad, self.values),)

    def diagonal(self) -> Tensor:
        on = (self.rows == self.col).nonzero().squeeze(1)
        out = torch.zeros(min(self.shape), dtype=self.dtype, device=self.device)
        return out.index_add(0, self.rows[on], self.values[on])

    def to_dense(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return out.index_put((self.rows, self.col), self.values, accumulate=True)


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    with _quiet():
        return torch.sparse_csr_tensor(crow, col, values, tuple(shape), check_invariants=False)


def _quiet() -> Any:
    """Silence torch's notes that CSR is in beta and that its invariants go unchecked (the pattern is checked once)."""
    context = warnings.catch_warnings()
    context.__enter__()
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    return _Exit(context)


class _Exit:
    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: Any) -> None:
        self.context.__exit__(*exc)
