"""An operator that counts what goes through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .base import Gradients, LinearOperator


class Counting(LinearOperator):
    """Wraps an operator and counts columns: ``num_forward``, ``num_adjoint`` and their sum ``num_matvecs``.

    The pairing's columns are counted apart in ``num_paired``: they are re-evaluations of the product under autograd
    for a callable, and one contraction for a structured operator. Counts are shared with the operator's bound forms.
    """

    def __init__(self, operator: LinearOperator, _counts: dict[str, int] | None = None) -> None:
        super().__init__(
            operator.shape, operator.dtype, operator.device, hermitian=operator.hermitian, psd=operator.psd
        )
        self.operator = operator
        self._counts = _counts if _counts is not None else {"forward": 0, "adjoint": 0, "paired": 0}

    @property
    def num_forward(self) -> int:
        """Columns that went through the product."""
        return self._counts["forward"]

    @property
    def num_adjoint(self) -> int:
        """Columns that went through the adjoint product."""
        return self._counts["adjoint"]

    @property
    def num_paired(self) -> int:
        """Columns of the pairings in backward."""
        return self._counts["paired"]

    @property
    def num_matvecs(self) -> int:
        """Columns that went through the product and the adjoint product."""
        return self.num_forward + self.num_adjoint

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Counting(children[0], self._counts)

    def _matmat(self, X: Tensor) -> Tensor:
        self._counts["forward"] += X.shape[1]
        return self.operator._matmat(X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        self._counts["adjoint"] += X.shape[1]
        return self.operator._rmatmat(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        inner = self.operator.adjoint_product(width)

        def apply(X: Tensor) -> Tensor:
            self._counts["adjoint"] += X.shape[1]
            return inner(X)

        return apply

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        self._counts["paired"] += Q.shape[1]
        return self.operator.pair(Lam, Q)
