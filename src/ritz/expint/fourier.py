"""Operators that the Fourier transform diagonalises: constant coefficients on periodic grids, and functions of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite, in_transform, refuse_vmap, version
from ..operators import LinearOperator
from ..operators.base import Gradients
from ..product import product
from .coefficients import check_grid
from .grid import Grid

__all__ = ["Fourier", "laplacian_symbol"]


class Fourier(LinearOperator):
    """The operator F⁻¹ diag(s) F on a periodic grid, F the discrete Fourier transform over all axes.

    Args:
        symbol: s, of ``grid.shape``, real or complex, in the order of ``torch.fft.fftn``: entry m belongs to the
            waves e^{2πi m·x/L}.
        grid: with periodic borders.
        dtype: of vectors. None: real where s(−m) = conj s(m) up to rounding (then real vectors have real products),
            else complex. With a real dtype the operator is Re F⁻¹ diag(s) F, which only sees the part of s that is
            symmetric in this sense.

    ``hermitian`` is True for a real symbol, ``psd`` where it is also ≥ 0; a complex symbol leaves both open.

    Raises:
        OperandError: a border that is not periodic, a symbol of another shape, a dtype of another precision.
        NonFiniteError: NaN or Inf in the symbol.

    Cost: two transforms, O(n log n) a vector.
    Gradient: in the symbol, any order through ``A @ x``; in pairings (Fλ)·conj(Fq)/n, its real part for a real symbol.

    Example:
        >>> grid = Grid(4, border="periodic", spacing=1.0)
        >>> A = Fourier(laplacian_symbol(grid, spectral=False, dtype=torch.float64), grid)
        >>> A.to_dense()[0].round(decimals=6) + 0.0
        tensor([-2.,  1.,  0.,  1.], dtype=torch.float64)
    """

    def __init__(self, symbol: Tensor, grid: Grid, *, dtype: torch.dtype | None = None) -> None:
        _check_periodic(grid)
        if not isinstance(symbol, Tensor) or symbol.shape != grid.shape:
            got = f"shape {tuple(symbol.shape)}" if isinstance(symbol, Tensor) else f"type {type(symbol).__name__}"
            raise OperandError(f"symbol has {got}; expected a tensor of the grid's shape {grid.shape}")
        check_finite(symbol.detach(), "symbol")
        real = symbol.dtype.to_real()
        dtype = dtype or (real if _keeps_real(symbol.detach()) else real.to_complex())
        if dtype.to_real() != real:
            raise OperandError(f"dtype={dtype} came with a symbol in {symbol.dtype}; expected {real} or its complex")
        self.symbol, self.grid = symbol, grid
        self._axes = tuple(range(1, grid.ndim + 1))
        self._half: tuple[int, Tensor] | None = None  # with the version of the symbol that it was made from
        psd = not symbol.is_complex() and self._is_nonnegative()
        hermitian = None if symbol.is_complex() else True
        super().__init__((grid.size, grid.size), dtype, symbol.device, hermitian=hermitian, psd=psd or None)
        if psd:
            self.detected((symbol,), self._is_nonnegative)

    def _is_nonnegative(self) -> bool:
        refuse_vmap(self.symbol, "symbol")
        return bool((self.symbol.detach() >= 0).all())

    def apply_function(self, f: Callable[[Tensor], Tensor], *, dtype: torch.dtype | None = None) -> Fourier:
        """f(A), exactly: the operator of the symbol f(s), with f elementwise and differentiable.

        e^{tA} is ``A.apply_function(lambda s: torch.exp(t * s))``. With ``dtype=None`` vectors keep A's dtype where
        f(s) allows it, and a complex A stays complex.
        """
        symbol = f(self.symbol)
        if dtype is None and self.dtype.is_complex:
            dtype = self.dtype
        return Fourier(symbol, self.grid, dtype=dtype)

    # -- products -------------------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        self.check_detected()
        return self._recorded(X, self.symbol) if in_transform() else product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        if self.hermitian:
            return self._matmat(X)
        return self._apply(X, self.symbol.conj())

    def _numeric(self, X: Tensor) -> Tensor:
        if self.dtype.is_complex:
            return self._apply(X, self.symbol)
        fields, shape, axes = self._fields(X), self.grid.shape, self._axes
        out: Tensor = torch.fft.irfftn(torch.fft.rfftn(fields, dim=axes).mul_(self._half_symbol()), s=shape, dim=axes)
        return out.reshape(X.shape[1], -1).mT

    def _half_symbol(self) -> Tensor:
        """The half of the symmetric part of the symbol that a transform of real vectors keeps."""
        now = version(self.symbol)
        if self._half is None or self._half[0] != now:
            s = self.symbol.detach()
            even = (s + _reflect(s).conj()) / 2
            self._half = now, even[..., : self.grid.shape[-1] // 2 + 1].contiguous()
        return self._half[1]

    def _recorded(self, X: Tensor, symbol: Tensor) -> Tensor:
        return self._apply(X, symbol)

    def _apply(self, X: Tensor, symbol: Tensor) -> Tensor:
        out: Tensor = torch.fft.ifftn(symbol * torch.fft.fftn(self._fields(X), dim=self._axes), dim=self._axes)
        out = out.reshape(X.shape[1], -1).mT
        return out if self.dtype.is_complex else out.real

    def _fields(self, X: Tensor) -> Tensor:
        return X.mT.reshape(X.shape[1], *self.grid.shape)

    # -- gradients and entries ------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.symbol,)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        if not self.symbol.requires_grad:
            return (None,)
        lam, q = (torch.fft.fftn(self._fields(X), dim=self._axes) for X in (Lam, Q))
        grad = (lam * q.conj()).sum(0) / self.grid.size
        return (grad if self.symbol.is_complex() else grad.real,)

    def diagonal(self) -> Tensor:
        mean = self.symbol.mean()
        mean = mean.to(self.dtype) if self.dtype.is_complex or not mean.is_complex() else mean.real
        return mean.expand(self.shape[0]).clone()


def laplacian_symbol(
    grid: Grid,
    spectral: bool = True,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The symbol of Δ on a periodic grid, of ``grid.shape``, real and ≤ 0.

    ``spectral=True``: −|k|² with k = 2π m/L, of exact derivatives of trigonometric polynomials. ``spectral=False``:
    −Σ_a (4/h_a²) sin²(π m_a/n_a), the eigenvalues of the stencil :func:`~ritz.expint.stencils.Laplacian`.
    """
    _check_periodic(grid)
    symbol = torch.zeros(grid.shape, dtype=torch.float64)
    for axis, (n, h) in enumerate(zip(grid.shape, grid.h)):
        m = torch.fft.fftfreq(n, dtype=torch.float64)  # m/n
        along = (2 * math.pi * m / h) ** 2 if spectral else (2 / h * torch.sin(math.pi * m)) ** 2
        symbol -= along.reshape([-1 if a == axis else 1 for a in range(grid.ndim)])
    return symbol.to(dtype=dtype or torch.get_default_dtype(), device=device)


def _reflect(symbol: Tensor) -> Tensor:
    """s(−m)."""
    axes = tuple(range(symbol.ndim))
    return symbol.flip(axes).roll((1,) * symbol.ndim, axes)


def _keeps_real(symbol: Tensor) -> bool:
    refuse_vmap(symbol, "symbol")
    odd = (symbol - _reflect(symbol).conj()).abs().max()
    return float(odd) <= 64 * torch.finfo(symbol.dtype).eps * float(symbol.abs().max())


def _check_periodic(grid: Any) -> None:
    check_grid(grid)
    if any(b != "periodic" for b in grid.border):
        raise OperandError(
            f"a grid with border={grid.border} has no Fourier symbol; expected border='periodic' on every axis: use "
            "Laplacian or Diffusion"
        )
