"""A structured matrix as a linear operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import OperandError
from ..base import LinearOperator

if TYPE_CHECKING:
    from .base import Structure


class StructuredMatrix(LinearOperator):
    """The d×d matrix that a structure makes of a flat tensor.

    Args:
        structure: the class that the matrix belongs to, such as ``Hierarchical(15, 15)``.
        d: rows and columns, at least 1.
        flat: its stored numbers, shape (structure.numel(d),), real floating point.

    Raises:
        OperandError: ``flat`` has another shape, or is not real floating point.

    Cost: of the structure's products. Gradient: in ``flat`` and the operand to any order through ``A @ x``.
    """

    def __init__(self, structure: Structure, d: int, flat: Tensor) -> None:
        n = structure.numel(d)
        if tuple(flat.shape) != (n,):
            raise OperandError(
                f"flat has shape {tuple(flat.shape)}; a {structure.describe(d)} matrix of size {d} needs ({n},)"
            )
        if not flat.is_floating_point():
            raise OperandError(f"flat is {flat.dtype}; a structured matrix needs a real floating-point dtype")
        super().__init__((d, d), flat.dtype, flat.device, hermitian=True if structure.symmetric else None)
        self.structure, self.flat = structure, flat

    def _matmat(self, X: Tensor) -> Tensor:
        return self.structure.matmul(self.flat, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.structure.rmatmul(self.flat, X)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.flat,)

    def diagonal(self) -> Tensor:
        return self.structure.diagonal(self.flat, self.shape[0])

    def to_dense(self) -> Tensor:
        return self.structure.to_dense(self.flat, self.shape[0])

    def __repr__(self) -> str:
        return f"{self.structure.describe(self.shape[0])} {super().__repr__()}"
