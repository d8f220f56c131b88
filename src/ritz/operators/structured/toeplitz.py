"""Triangular Toeplitz matrices: polynomials in the shift, multiplied by FFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..toeplitz import _fast_length, _wide
from .base import Structure
from .products import empty_product, product, writable

MATRIX_SIZE = 384  # up to here a product with the d×d matrix is faster than transforms, given enough columns
CHUNK = 2**17  # numbers that are transformed at a time on a CPU: the spectra stay in its cache


def forms_matrix(d: int, m: int) -> bool:
    """Whether K X for X (d, m) is computed by forming the d×d matrix: d is small, and the columns pay for it."""
    return d <= MATRIX_SIZE and 16 * m >= d


class _Toeplitz(Structure):
    """K = Σ_j c_j Zʲ with Z the shift down (lower) or up (upper), stored as c_0, …, c_{d−1}.

    Both classes are one commutative algebra up to transposition, Kᵀ = J K J with J the flip, and because a flip turns
    around every diagonal of a symmetric matrix they share all formulas but the direction of K X.
    """

    _upper: ClassVar[bool]

    def numel(self, d: int) -> int:
        return d

    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        flat = torch.zeros(d, dtype=dtype, device=device)
        flat[:1] = 1
        return flat

    def _to_dense(self, flat: Tensor, d: int) -> Tensor:
        # Row i of the lower matrix is the window of (c_{d−1}, …, c_0, 0, …, 0) that starts at d − 1 − i.
        padded = torch.cat([flat.flip(-1), torch.zeros_like(flat[..., 1:])], -1)
        K = padded.unfold(-1, d, 1).flip(-2)
        return K.mT if self._upper else K

    def _from_dense(self, M: Tensor) -> Tensor:
        d = M.shape[-1]
        # Diagonals become columns: rows 2d wide, read as rows that are one number longer; column d − 1 is the main one.
        padded = torch.nn.functional.pad(_wide(M), (d - 1, 1, 0, 1)).flatten(-2)
        sums = padded[..., : d * (2 * d + 1)].unflatten(-1, (d, 2 * d + 1)).sum(-2)
        sums = sums[..., d - 1 : 2 * d - 1] if self._upper else sums[..., :d].flip(-1)
        return self._mean(sums, M.dtype)

    def _double_(self, flat: Tensor, d: int) -> None:
        flat[..., 1:].mul_(2)

    # -- products -------------------------------------------------------------------------------------------------

    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        d, m = X.shape[-2:]
        if forms_matrix(d, m):
            K = self._to_dense(flat, d)
            return product(K.mT if transposed else K, X, out)
        n = _fast_length(2 * d - 1)
        symbol = torch.fft.rfft(_wide(flat), n=n).unsqueeze(-1)
        if transposed != self._upper:
            symbol = symbol.conj()
        parts = (
            torch.fft.irfft(symbol * torch.fft.rfft(_wide(x), n=n, dim=-2), n=n, dim=-2)[..., :d, :].to(X.dtype)
            for x in _chunks(X, n)
        )
        if out is None and writable(flat, X):
            out = empty_product(flat, X)
        if out is None:
            return torch.cat(list(parts), -1)
        for place, part in zip(_chunks(out, n), parts, strict=True):
            place.copy_(part)
        return out

    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        n = _fast_length(2 * d - 1)
        symbol = torch.fft.rfft(_widest(left), n=n) * torch.fft.rfft(_widest(right), n=n)
        return torch.fft.irfft(symbol, n=n)[..., :d].to(left.dtype)

    def _gram(self, flat: Tensor, d: int) -> Tensor:
        # Sum of the j-th diagonal of Kᵀ K: Σ_q (d − q) c_q c_{q−j}.
        n, c = _fast_length(2 * d - 1), _widest(flat)
        symbol = torch.fft.rfft(c * _lengths(c), n=n) * torch.fft.rfft(c, n=n).conj()
        return self._mean(torch.fft.irfft(symbol, n=n)[..., :d], flat.dtype)

    def _outer(self, U: Tensor) -> Tensor:
        d, m = U.shape[-2:]
        if forms_matrix(d, m):
            return self._from_dense(U @ U.mT)
        # Sum of the j-th diagonal of U Uᵀ: autocorrelations of the columns, added up.
        n = _fast_length(2 * d - 1)
        spectra = (torch.view_as_real(torch.fft.rfft(_wide(u), n=n, dim=-2)) for u in _chunks(U, n))
        power = torch.stack([s.square().sum((-2, -1)) for s in spectra]).sum(0)
        return self._mean(torch.fft.irfft(_widest(power), n=n)[..., :d], U.dtype)

    @staticmethod
    def _mean(sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums of the diagonals, (..., d), divided by their lengths."""
        return (sums / _lengths(sums)).to(dtype)

    # -- numbers --------------------------------------------------------------------------------------------------

    def _diagonal(self, flat: Tensor, d: int) -> Tensor:
        return flat[..., :1].expand(flat.shape[:-1] + (d,))

    def norm(self, flat: Tensor, d: int) -> Tensor:
        self._check_flat(flat, d)
        c = _wide(flat)
        return torch.linalg.vector_norm(c * _lengths(c).sqrt(), dim=-1).to(flat.dtype)

    def apply_cost(self, d: int, width: int) -> float:
        # A multiplication within a transform takes several times as long as one within a matrix product.
        return float(d * min(d, 16 * math.log2(2 * d)) * width)


def _chunks(X: Tensor, n: int) -> Sequence[Tensor]:
    """The columns of X in blocks whose transforms of length n fit into a cache; all at once on other devices."""
    return X.split(max(8, CHUNK // n), -1) if X.device.type == "cpu" else (X,)


def _widest(x: Tensor) -> Tensor:
    """Double precision where the device has it, for transforms of vectors.

    The sums give c_0 the weight d and are divided by as little as 1: single precision would leave an error of d·eps
    in the corners. A transform of one vector costs little in any precision.
    """
    return x.float() if x.device.type == "mps" else x.double()


def _lengths(like: Tensor) -> Tensor:
    """Lengths d, d − 1, …, 1 of the diagonals."""
    return torch.arange(like.shape[-1], 0, -1, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class LowerToeplitz(_Toeplitz):
    """Lower triangular Toeplitz matrices, K_ij = c_{i−j}. Π takes means of diagonals, twice those below the main one.

    Storage: d. Cost: O(d log d) a column for K X and for Π(U Uᵀ), or d² by a matrix product for small d; O(d log d) for
    K M and Π(Kᵀ K). float16 and bfloat16 are transformed in float32; the last two are computed in double precision.

    >>> import torch
    >>> from ritz.operators.structured import LowerToeplitz
    >>> S, M = LowerToeplitz(), torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[6.0, 0.0, 0.0, 0.0], [11.333, 6.0, 0.0, 0.0], [10.0, 11.333, 6.0, 0.0], [8.0, 10.0, 11.333, 6.0]]
    """

    _upper: ClassVar[bool] = False

    def describe(self, d: int) -> str:
        return "lower Toeplitz"


@dataclass(frozen=True)
class UpperToeplitz(_Toeplitz):
    """Upper triangular Toeplitz matrices, K_ij = c_{j−i}. Π takes means of diagonals, twice those above the main one.

    Storage and cost are those of :class:`LowerToeplitz`.

    >>> import torch
    >>> from ritz.operators.structured import UpperToeplitz
    >>> S, M = UpperToeplitz(), torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[6.0, 11.333, 10.0, 8.0], [0.0, 6.0, 11.333, 10.0], [0.0, 0.0, 6.0, 11.333], [0.0, 0.0, 0.0, 6.0]]
    """

    _upper: ClassVar[bool] = True

    def describe(self, d: int) -> str:
        return "upper Toeplitz"
