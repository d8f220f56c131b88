"""Toeplitz operators, multiplied and paired by FFT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite, in_transform, refuse_vmap, version
from .base import Gradients, LinearOperator


class Toeplitz(LinearOperator):
    """The matrix with constant diagonals T_ij = column[i − j] for i ≥ j and row[j − i] for j > i.

    Args:
        column: first column (n,), real or complex.
        row: first row (m,); row[0] is ignored, as in SciPy. None for a Hermitian matrix: row = conj(column), of which
            column[0] must be real.

    Raises:
        OperandError: wrong shapes or dtypes, or no row and a column[0] with an imaginary part.
        NonFiniteError: NaN or Inf in the column or the row.

    Cost: O((n + m) log(n + m)) a vector, for the product and for the pairing, which is a correlation of its blocks.
    float16 and bfloat16 are transformed in float32.
    Gradient: in column and row to any order through ``A @ x``.
    """

    def __init__(self, column: Tensor, row: Tensor | None = None) -> None:
        for name, t in (("column", column), ("row", row)):
            if t is None:
                continue
            if t.ndim != 1 or t.numel() == 0:
                raise OperandError(f"{name} has shape {tuple(t.shape)}; a Toeplitz operator needs (n,) with n >= 1")
            if t.dtype != column.dtype or t.device != column.device:
                raise OperandError(f"row is {t.dtype} on {t.device}; column is {column.dtype} on {column.device}")
            check_finite(t.detach(), name)
        if row is None and column.is_complex() and bool(column[0].detach().imag != 0):
            raise OperandError(
                f"column[0] = {complex(column[0].detach())} came without a row; the diagonal of a Hermitian matrix is "
                "real: give the row, or drop the imaginary part"
            )
        self.column, self.row = column, row
        n, m = column.shape[0], (column if row is None else row).shape[0]
        read = row is not None and n == m
        hermitian = True if row is None else (self._is_hermitian() if read else None)
        super().__init__((n, m), column.dtype, column.device, hermitian=hermitian)
        if row is not None and hermitian:
            self.detected((column, row), self._is_hermitian)
        self._length = _fast_length(n + m - 1)
        self._spectrum: tuple[tuple[int, ...], Tensor] | None = None  # with the versions of the tensors behind it

    def _is_hermitian(self) -> bool:
        assert self.row is not None
        refuse_vmap(self.row, "the row")
        c, r = self.column.detach(), self.row.detach()
        real = not c.is_complex() or not bool(c[0].imag)
        return real and torch.equal(c[1:].conj().resolve_conj(), r[1:].resolve_conj())

    # -- the circulant that T is the upper left corner of ---------------------------------------------------------

    def _diagonals(self) -> tuple[Tensor, Tensor]:
        """T's first column (n,), and its first row without the corner (m − 1,)."""
        if self.row is not None:
            return self.column, self.row[1:]
        c = self.column
        corner = c[:1].real.to(c.dtype) if c.is_complex() else c[:1]
        return torch.cat([corner, c[1:]]), c[1:].conj()

    def _symbol(self) -> Tensor:
        """The eigenvalues of the circulant, kept while nothing is recorded and the tensors stay as they are."""
        tensors = self.tensors()
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if recorded or in_transform():
            return self._transform_of_diagonals()
        now = tuple(version(t) for t in tensors)
        if self._spectrum is None or self._spectrum[0] != now:
            symbol = self._transform_of_diagonals()
            if torch.autograd.forward_ad._current_level >= 0:
                return symbol  # it may carry a tangent of this level
            self._spectrum = now, symbol.detach()
        return self._spectrum[1]

    def _transform_of_diagonals(self) -> Tensor:
        column, row = self._diagonals()
        gap = torch.zeros(self._length - column.shape[0] - row.shape[0], dtype=self.dtype, device=self.device)
        return self._fft(torch.cat([column, gap, row.flip(0)]).unsqueeze(1))

    def _fft(self, X: Tensor) -> Tensor:
        transform = torch.fft.fft if X.is_complex() else torch.fft.rfft
        return transform(_wide(X), n=self._length, dim=0)

    def _ifft(self, Z: Tensor) -> Tensor:
        transform = torch.fft.ifft if self.dtype.is_complex else torch.fft.irfft
        return transform(Z, n=self._length, dim=0).to(self.dtype)

    # -- products and pairing -------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        self.check_detected()
        return self._ifft(self._symbol() * self._fft(X))[: self.shape[0]]

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self._ifft(self._symbol().conj() * self._fft(X))[: self.shape[1]]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.column,) if self.row is None else (self.column, self.row)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        # ⟨Λ, dT Q⟩ is linear in every diagonal: entry l of the correlation is Σ_i conj(Q_{i−l}) Λ_i.
        g = self._ifft((self._fft(Q).conj() * self._fft(Lam)).sum(1, keepdim=True)).squeeze(1)
        n, m = self.shape
        to_column, to_row = g[:n], g[self._length - m + 1 :].flip(0)
        if self.row is not None:
            return to_column, torch.cat([torch.zeros_like(self.row[:1]), to_row])
        corner = to_column[:1].real.to(g.dtype) if g.is_complex() else to_column[:1]
        return (torch.cat([corner, to_column[1:] + to_row.conj()]),)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        n, m = self.shape
        j = torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1) % m
        column, row = self._diagonals()
        i = torch.arange(n, device=self.device).unsqueeze(1)
        return torch.cat([row.flip(0), column])[i - j + (m - 1)]

    def diagonal(self) -> Tensor:
        return self._diagonals()[0][:1].expand(min(self.shape))


def _wide(X: Tensor) -> Tensor:
    return X.float() if X.dtype in (torch.float16, torch.bfloat16) else X


def _fast_length(n: int) -> int:
    """The smallest even number ≥ n without prime factors above 5: prime lengths are several times slower."""
    best = 2
    while best < n:
        best *= 2
    power5 = 1
    while power5 < best:
        power35 = power5
        while power35 < best:
            length = 2 * power35
            while length < n:
                length *= 2
            best = min(best, length)
            power35 *= 3
        power5 *= 5
    return best
