"""Sparse matrices: products through CSR, gradients on the stored pattern only, never densified."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import in_transform, refuse_vmap, unwrap, version
from .base import Gradients, LinearOperator
from .basic import like

Pattern = tuple[Tensor, Tensor]


class Sparse(LinearOperator):
    """A sparse matrix given by row pointers, column indices and values (CSR order).

    Args:
        crow, col: compressed row pointers (n + 1,) and column indices (nnz,).
        values: stored entries (nnz,); the tensor that receives the gradient.
        shape: (n, m).
        hermitian, psd: flags; with both None a square matrix is compared with its adjoint once, exactly. That takes
            as long as tens of products: declare the flag where a new operator is made every step.

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
        if crow.shape != (self.shape[0] + 1,) or values.ndim != 1 or col.shape != values.shape:
            raise OperandError(
                f"CSR parts of shapes {tuple(crow.shape)}, {tuple(col.shape)}, {tuple(values.shape)} for a matrix "
                f"{self.shape}; expected ({self.shape[0] + 1},), (nnz,), (nnz,)"
            )
        self.crow, self.col = crow, col
        self._values: Tensor | None = values
        self._leaf: Tensor | None = None
        self._narrow: Pattern | None = None
        self._rows: Tensor | None = None
        self._transposition: tuple[Tensor, Pattern] | None = None
        self._csr: tuple[int, Tensor] | None = None  # with the version of the values that it was made from
        self._adjoint_csr: tuple[int, Tensor] | None = None
        if hermitian is None and not psd and self.shape[0] == self.shape[1]:
            self.hermitian = self._is_hermitian()
            if self.hermitian:
                self.detected((values,), self._is_hermitian)

    @classmethod
    def from_tensor(cls, x: Tensor, *, hermitian: bool | None = None, psd: bool | None = None) -> Sparse:
        """From a sparse COO, CSR, CSC, BSR or BSC tensor; gradients flow back in its own layout."""
        if x.ndim != 2:
            raise OperandError(f"a sparse operator needs a 2-D tensor; got shape {tuple(x.shape)}")
        announce_csr()
        if x.layout == torch.sparse_csr:
            out = cls(x.crow_indices(), x.col_indices(), _csr_values(x), x.shape, hermitian=hermitian, psd=psd)
        elif x.layout == torch.sparse_coo:
            entries = x.coalesce()
            row, col = entries.indices()
            out = cls(_pointers(row, x.shape[0]), col, entries.values(), x.shape, hermitian=hermitian, psd=psd)
        if x.layout in (torch.sparse_csr, torch.sparse_coo):
            if x.is_leaf and x.requires_grad:
                out._leaf, out._values = x, None
            return out
        if x.requires_grad:
            raise OperandError(f"a trainable sparse tensor came in layout {x.layout}; convert it to COO or CSR first")
        return cls.from_tensor(x.to_sparse_coo(), hermitian=hermitian, psd=psd)

    @property
    def values(self) -> Tensor:
        """Stored entries (nnz,)."""
        if self._values is None:
            # A trainable COO or CSR leaf: autograd frees the link to it once it has gone through; make a new one then
            assert self._leaf is not None
            self._values, me = _entries(self._leaf), weakref.ref(self)

            def used(_: Any) -> None:
                operator = me()
                if operator is not None:
                    operator._values = None

            link = self._values.grad_fn
            assert link is not None
            link.register_prehook(used)
        return self._values

    def _pattern(self) -> Pattern:
        """Row pointers and columns for our own products: 32-bit where they fit, which torch's kernels read faster."""
        if self._narrow is None:
            fits = max(*self.shape, self.col.numel()) < 2**31 and self.device.type == "cpu"
            self._narrow = (self.crow.int(), self.col.int()) if fits else (self.crow, self.col)
        return self._narrow

    @property
    def rows(self) -> Tensor:
        """Row index of every stored entry (nnz,)."""
        if self._rows is None:
            counts = self.crow[1:] - self.crow[:-1]
            self._rows = torch.repeat_interleave(torch.arange(self.shape[0], device=self.device), counts)
        return self._rows

    # -- the adjoint's pattern and the Hermitian flag -------------------------------------------------------------

    def _transposed(self) -> tuple[Tensor, Pattern]:
        """The order that sorts the entries by column, and the pattern of the adjoint; both independent of values."""
        if self._transposition is None:
            order = torch.argsort(self.col, stable=True)
            pattern = (_pointers(self.col, self.shape[1], self.crow.dtype), self.rows[order].to(self.col.dtype))
            self._transposition = order, pattern
        return self._transposition

    def _is_hermitian(self) -> bool:
        refuse_vmap(self.values, "the values of a sparse matrix")
        values = unwrap(self.values).detach()
        order, (crow, col) = self._transposed()
        if torch.equal(crow, self.crow) and torch.equal(col, self.col):
            return torch.equal(values[order].conj().resolve_conj(), values)
        # The patterns differ, which stored zeros, unsorted columns or duplicates may do to a Hermitian matrix as well.
        x = torch.linspace(1, 2, self.shape[0], dtype=values.dtype, device=self.device).unsqueeze(1)
        forward, adjoint = self._recorded(x, values), self._recorded_adjoint(x, values)
        if float((forward - adjoint).norm()) > torch.finfo(values.dtype).eps ** 0.5 * float(forward.norm()):
            return False
        A = torch.sparse_coo_tensor(torch.stack([self.rows, self.col]), values, self.shape, check_invariants=False)
        return not bool((A - A.mH).coalesce().values().any())

    # -- products -------------------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        from ..product import product

        self.check_detected()
        if in_transform():
            return self._recorded(X, self.values)
        return product(self, X)

    def _numeric(self, X: Tensor) -> Tensor:
        values = self.values
        now = version(values)
        if self._csr is None or self._csr[0] != now:
            self._csr = now, _csr(*self._pattern(), values.detach(), self.shape)
        return _multiply(self._csr[1], X)

    def _recorded(self, X: Tensor, values: Tensor) -> Tensor:
        terms = values.unsqueeze(1) * X.index_select(0, self.col)
        out = torch.zeros(self.shape[0], X.shape[1], dtype=terms.dtype, device=self.device)
        return out.index_add(0, self.rows, terms)

    def _recorded_adjoint(self, X: Tensor, values: Tensor) -> Tensor:
        terms = values.conj().unsqueeze(1) * X.index_select(0, self.rows)
        out = torch.zeros(self.shape[1], X.shape[1], dtype=terms.dtype, device=self.device)
        return out.index_add(0, self.col, terms)

    def _rmatmat(self, X: Tensor) -> Tensor:
        if self.hermitian:
            return self._matmat(X)
        if in_transform():
            return self._recorded_adjoint(X, self.values)
        order, (crow, col) = self._transposed()
        if torch.is_grad_enabled() and (self.values.requires_grad or X.requires_grad):
            adjoint = Sparse(crow, col, self.values[order].conj(), (self.shape[1], self.shape[0]), hermitian=False)
            return adjoint._matmat(X)
        now = version(self.values)
        if self._adjoint_csr is None or self._adjoint_csr[0] != now:
            values = self.values.detach()[order].conj().resolve_conj()
            self._adjoint_csr = now, _csr(crow, col, values, (self.shape[1], self.shape[0]))
        return _multiply(self._adjoint_csr[1], X)

    # -- gradients and entries ------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        if not self.values.requires_grad:
            return (None,)
        if Lam.device.type == "cpu" and Lam.dtype in (torch.float32, torch.float64) and not in_transform():
            zero = _csr(*self._pattern(), torch.zeros_like(self.values), self.shape)
            return (torch.sparse.sampled_addmm(zero, Lam, Q.mT, beta=0.0).values(),)
        grad = torch.zeros_like(self.values)
        for j in range(Lam.shape[1]):  # column by column: memory O(nnz), not O(nnz·k)
            grad = grad + Lam[:, j].contiguous()[self.rows] * Q[:, j].contiguous()[self.col].conj()
        return (like(grad, self.values),)

    def diagonal(self) -> Tensor:
        on = (self.rows == self.col).nonzero().squeeze(1)
        out = torch.zeros(min(self.shape), dtype=self.dtype, device=self.device)
        return out.index_add(0, self.rows[on], self.values[on])

    def to_dense(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return out.index_put((self.rows, self.col), self.values, accumulate=True)


def _multiply(A: Tensor, X: Tensor) -> Tensor:
    # torch's CSR matrix–vector kernel is several times faster than its matrix–matrix one
    return torch.mv(A, X.squeeze(1)).unsqueeze(1) if X.shape[1] == 1 else A @ X


def _pointers(index: Tensor, size: int, dtype: torch.dtype = torch.long) -> Tensor:
    """Compressed pointers (size + 1,) of a sorted index, or of what it would be when sorted."""
    pointers = torch.zeros(size + 1, dtype=dtype, device=index.device)
    pointers[1:] = torch.bincount(index, minlength=size).cumsum(0)
    return pointers


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    announce_csr()
    return torch.sparse_csr_tensor(crow, col, values, tuple(shape), check_invariants=False)


def _csr_values(x: Tensor) -> Tensor:
    """The values of a CSR tensor. One that was just made from values leads back to those directly.

    torch's own backward of ``sparse_csr_tensor(crow, col, values)`` masks a dense n×m matrix.
    """
    if type(x.grad_fn).__name__ == "SparseCompressedTensorBackward0":
        values = getattr(x.grad_fn, "_saved_values", None)
        if isinstance(values, Tensor):
            return values
    return x.values()  # type: ignore[operator]


def _entries(x: Tensor) -> Tensor:
    """The values of a leaf, linked to it even where numerics run without a graph."""
    with torch.enable_grad():
        return _csr_values(x) if x.layout == torch.sparse_csr else x.coalesce().values()


@functools.cache
def announce_csr() -> None:
    """Let torch say once a process, unheard, that CSR is in beta; we use its products and conversions only.

    Filters are global to the process, so they are not touched around every use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(1, dtype=torch.long)
        torch.sparse_csr_tensor(torch.arange(2), index, torch.zeros(1), (1, 1), check_invariants=False)
