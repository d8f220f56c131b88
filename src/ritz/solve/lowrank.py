"""Low-rank preconditioners P = F Fᴴ + σ² I, or F Fᴴ + D with a positive diagonal D."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import DomainError, OperandError
from ..numerics import full_precision, unwrap
from ..operators import Diagonal, LinearOperator
from .preconditioners import Preconditioner
from .root import InverseRoot, Shift, frozen, gram, wide


class LowRankPreconditioner(Preconditioner):
    """P = F Fᴴ + σ² I, or F Fᴴ + D, with F (n, r), inverted through the singular values s and vectors U of F.

        P⁻¹ = (I − U Uᴴ)/σ² + U diag(1/(s² + σ²)) Uᴴ,       P^(-1/2) likewise with square roots.

    This is Woodbury's identity with the subtraction done where it is harmless, and in double precision, whatever the
    dtype of the vectors. A diagonal D = W² is taken out on both sides: P = W (W⁻¹F Fᴴ W⁻¹ + I) W, and the root is
    R = W (W⁻¹F Fᴴ W⁻¹ + I)^(1/2), P = R Rᴴ, which is not Hermitian.

    Args:
        factor: F (n, r).
        shift: σ², a number or a tensor of one element, or the diagonal of D (n,); tensors get gradients.
        dtype: of the operator; that of the factor by default. The factor is best in float64 also for float32.
        own: F is nobody else's, and need not be copied.

    Attributes:
        factor, noise: F, and σ² or the diagonal of D, copied: P stays what it was made from. Gradients go through.
        pivots: indices of the columns that F was made of (r,), or None.

    Raises:
        DomainError: a shift, or an entry of D, that is not positive.
    """

    def __init__(self, factor: Tensor, shift: Shift, dtype: torch.dtype | None = None, *, own: bool = False) -> None:
        n = factor.shape[0]
        super().__init__((n, n), dtype or factor.dtype, factor.device, psd=True)
        self.noise: Shift
        self.pivots: Tensor | None = None
        self._scale: Tensor | None = None  # diagonal of W
        if isinstance(shift, Tensor) and shift.ndim == 1 and shift.numel() == n and n != 1:
            _check_diagonal(shift)
            self.factor, self.noise = factor, shift = factor if own else frozen(factor), frozen(shift)
            self._scale = wide(shift).sqrt()
            scaled: Tensor = wide(factor) / self._scale.unsqueeze(1)
            self._core = InverseRoot(scaled, 1.0, self.dtype, own=True)
        elif isinstance(shift, Tensor) and shift.numel() != 1:
            raise OperandError(f"shift has shape {tuple(shift.shape)}; expected one element, or ({n},) for a diagonal")
        else:
            self._core = InverseRoot(wide(factor), shift, self.dtype, own=own)
            self.factor, self.noise = self._core.factor, self._core.shift_

    def _matmat(self, X: Tensor) -> Tensor:
        F = self.factor
        Y = X.to(torch.promote_types(X.dtype, F.dtype))
        noise = self.noise
        if self._scale is not None and isinstance(noise, Tensor):
            noise = noise.unsqueeze(1)
        elif isinstance(noise, Tensor):
            noise = noise.reshape(())
        return (F @ (F.mH @ Y) + noise * Y).to(X.dtype)

    def solve(self, X: Tensor) -> Tensor:
        Y, w = wide(X), None if self._scale is None else self._scale.detach().unsqueeze(1)
        with full_precision():
            return (self._core.inverse(Y) if w is None else self._core.inverse(Y / w) / w).to(X.dtype)

    def inverse_root(self) -> LinearOperator:
        if self._scale is None:
            return self._core
        return self._core @ Diagonal((1.0 / self._scale).to(self.dtype))

    def logdet(self) -> Tensor:
        """n log σ² + log det(I + FᴴF/σ²), the latter by Cholesky of the r×r matrix."""
        F = self._core.factor
        n, r = F.shape
        noise = torch.as_tensor(self._core.shift_, dtype=torch.float64, device=F.device).reshape(())
        out = n * noise.log() if self._scale is None else 2 * self._scale.log().sum()
        if r:
            with full_precision():
                M = torch.eye(r, dtype=F.dtype, device=F.device) + gram(F) / noise
                out = out + 2 * torch.linalg.cholesky(M).diagonal().real.log().sum()
        return out.to(self.dtype.to_real())

    @torch.no_grad()
    def log_forms(self, Z: Tensor) -> Tensor | None:
        if self._scale is not None:
            return None
        Z, core = wide(Z), self._core
        weights = core.coefficients(Z).abs().square()
        near = torch.log1p(core.singular.square() / core.sigma2).unsqueeze(1) * weights
        return math.log(core.sigma2) * Z.abs().square().sum(0) + near.sum(0)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.factor, self.noise) if isinstance(self.noise, Tensor) else (self.factor,)

    def diagonal(self) -> Tensor:
        return ((self.factor.abs() ** 2).sum(1) + self.noise).to(self.dtype)


def _check_diagonal(d: Tensor) -> None:
    values = unwrap(d).detach()
    bad = (~((values > 0) & torch.isfinite(values))).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise DomainError(
            f"a low-rank preconditioner needs positive noise; {bad.shape[0]} of {values.numel()} entries are not, the "
            f"first is d[{i}] = {float(values[i]):.3g}"
        )
