"""Dense, diagonal and identity operators, each with its own pairing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import refuse_vmap
from .base import Gradients, LinearOperator


def like(grad: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in the dtype of its tensor: the real part where a real tensor sits in a complex operator."""
    return grad if tensor.is_complex() or not grad.is_complex() else grad.real


class Dense(LinearOperator):
    """A dense tensor (n, m) as an operator. Pairing: Λ Qᴴ.

    With ``hermitian=None`` a square matrix is compared with its adjoint once, exactly.
    """

    def __init__(self, matrix: Tensor, *, hermitian: bool | None = None, psd: bool | None = None) -> None:
        if matrix.ndim != 2:
            raise OperandError(f"a dense operator needs a 2-D tensor; got shape {tuple(matrix.shape)}")
        if matrix.layout != torch.strided:
            raise OperandError(f"a dense operator got a {matrix.layout} tensor; give it to aslinearoperator")
        read = hermitian is None and not psd and matrix.shape[0] == matrix.shape[1]
        if read:
            hermitian = _is_hermitian(matrix)
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device, hermitian=hermitian, psd=psd)
        self.matrix = matrix
        if read and hermitian:
            self.detected((matrix,), lambda: _is_hermitian(matrix))

    def _matmat(self, X: Tensor) -> Tensor:
        self.check_detected()
        return self.matrix @ X

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.matrix.mH @ X

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return (Lam @ Q.mH if self.matrix.requires_grad else None,)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        return self.matrix[:, torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1)]

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def to_dense(self) -> Tensor:
        return self.matrix


def _is_hermitian(matrix: Tensor) -> bool:
    refuse_vmap(matrix, "the matrix")
    detached = matrix.detach()
    return bool(torch.equal(detached, detached.mH.resolve_conj()))


class Diagonal(LinearOperator):
    """diag(d). Pairing: the row sums of Λ ∘ conj(Q)."""

    def __init__(self, entries: Tensor) -> None:
        if entries.ndim != 1:
            raise OperandError(f"a diagonal operator needs a 1-D tensor of entries; got shape {tuple(entries.shape)}")
        n, real = entries.shape[0], not entries.is_complex()
        refuse_vmap(entries, "the diagonal")
        psd = bool((entries.detach() >= 0).all()) if real else None
        super().__init__((n, n), entries.dtype, entries.device, hermitian=True if real else None, psd=psd)
        self.entries = entries
        if psd:
            self.detected((entries,), lambda: bool((entries.detach() >= 0).all()))

    def _matmat(self, X: Tensor) -> Tensor:
        self.check_detected()
        return self.entries.unsqueeze(1) * X

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.entries.conj().unsqueeze(1) * X

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.entries,)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return ((Lam * Q.conj()).sum(1),)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1)
        out = torch.zeros(self.shape[0], index.numel(), dtype=self.dtype, device=self.device)
        return out.index_put((index, torch.arange(index.numel(), device=self.device)), self.entries[index])

    def diagonal(self) -> Tensor:
        return self.entries


class Identity(LinearOperator):
    """The identity; depends on nothing."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__((n, n), dtype, device, hermitian=True, psd=True)

    def _matmat(self, X: Tensor) -> Tensor:
        return X

    def diagonal(self) -> Tensor:
        return torch.ones(self.shape[0], dtype=self.dtype, device=self.device)


def identity(n: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LinearOperator:
    """The identity of size n; ``sigma * identity(n)`` shifts an operator."""
    return Identity(n, dtype or torch.get_default_dtype(), device)
