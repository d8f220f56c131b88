"""Low-rank operators U C Vᴴ, and low-rank updates of other operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite
from .algebra import Sum
from .base import Gradients, LinearOperator
from .basic import like


class LowRank(LinearOperator):
    """U C Vᴴ.

    Args:
        U: (n, r).
        V: (m, r), or None for U itself: the operator is then U C Uᴴ.
        core: C, as its diagonal (r,) or a matrix (r, r), real or of U's dtype; None for the identity.

    ``hermitian`` is known where V is None and the core is Hermitian, ``psd`` where further the core is None or a
    nonnegative diagonal; elsewhere both are None, to be declared.

    Raises:
        OperandError: shapes or dtypes that do not fit.  NonFiniteError: NaN or Inf in U, V or the core.

    Cost: a product with k vectors is O((n + m)·r·k) operations, and so is the pairing (nothing n×m appears).
    """

    def __init__(self, U: Tensor, V: Tensor | None = None, core: Tensor | None = None) -> None:
        V = None if V is U else V
        named = {"U": U, **({} if V is None else {"V": V}), **({} if core is None else {"core": core})}
        for name, t in named.items():
            if t.device != U.device or (t.dtype != U.dtype and not (name == "core" and t.dtype == U.real.dtype)):
                raise OperandError(f"{name} is {t.dtype} on {t.device}; U is {U.dtype} on {U.device}: convert one")
            check_finite(t.detach(), name)
        if U.ndim != 2 or (V is not None and (V.ndim != 2 or V.shape[1] != U.shape[1])):
            given = tuple(U.shape) if V is None else f"{tuple(U.shape)} and {tuple(V.shape)}"
            raise OperandError(f"a low-rank operator got factors of shape {given}; expected U (n, r) and V (m, r)")
        r = U.shape[1]
        if core is not None and tuple(core.shape) not in ((r,), (r, r)):
            raise OperandError(f"core has shape {tuple(core.shape)}; expected ({r},) for a diagonal, or ({r}, {r})")
        self.U, self.V, self.core = U, V, core
        hermitian = True if V is None and self._core_is_hermitian() else None
        psd = True if hermitian and self._core_is_nonnegative() else None
        shape = (U.shape[0], (U if V is None else V).shape[0])
        super().__init__(shape, U.dtype, U.device, hermitian=hermitian, psd=psd)
        if psd and core is not None:
            self.detected((core,), self._core_is_nonnegative)
        elif hermitian and core is not None:
            self.detected((core,), self._core_is_hermitian)

    def _core_is_hermitian(self) -> bool:
        C = self.core
        if C is None or (C.ndim == 1 and not C.is_complex()):
            return True
        C = C.detach()
        return bool((C.imag == 0).all()) if C.ndim == 1 else bool(torch.equal(C, C.mH.resolve_conj()))

    def _core_is_nonnegative(self) -> bool:
        C = self.core
        return C is None or (C.ndim == 1 and not C.is_complex() and bool((C.detach() >= 0).all()))

    def _inner(self, Z: Tensor, adjoint: bool = False) -> Tensor:
        """C Z, or Cᴴ Z."""
        if self.core is None:
            return Z
        C = self.core.to(self.dtype)
        if C.ndim == 1:
            return (C.conj() if adjoint else C).unsqueeze(1) * Z
        return (C.mH if adjoint else C) @ Z

    @property
    def _right(self) -> Tensor:
        return self.U if self.V is None else self.V

    def _matmat(self, X: Tensor) -> Tensor:
        self.check_detected()
        return self.U @ self._inner(self._right.mH @ X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self._right @ self._inner(self.U.mH @ X, adjoint=True)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.U, self.V, self.core) if t is not None)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        left, right = self.U.mH @ Lam, self._right.mH @ Q  # UᴴΛ and VᴴQ, (r, k)
        to_U = Lam @ self._inner(right).mH
        to_V = Q @ self._inner(left, adjoint=True).mH
        grads: list[Tensor | None] = [to_U + to_V] if self.V is None else [to_U, to_V]
        if self.core is not None:
            to_core = left @ right.mH if self.core.ndim == 2 else (left * right.conj()).sum(1)
            grads.append(like(to_core, self.core))
        return tuple(grads)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1)
        return self.U @ self._inner(self._right[index].mH)

    def diagonal(self) -> Tensor:
        size = min(self.shape)
        return (self.U[:size] * self._inner(self._right[:size].mH).mT).sum(1)


def low_rank_update(A: LinearOperator, U: Tensor, V: Tensor | None = None) -> LinearOperator:
    """A + U Vᴴ, or A + U Uᴴ with V None, which is positive semidefinite where A is.

    Args:
        A: operator (n, m).
        U: (n, r).
        V: (m, r), or None for U.

    Raises:
        OperandError: shapes, dtypes or devices that do not fit.
    """
    return Sum([A, LowRank(U, V)])
