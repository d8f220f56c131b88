"""What a kernel is: a module that gives entries, and operators on points."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OperandError
from ..methods import Auto
from ..numerics import check_finite
from ..operators import LinearOperator
from .backends import Backend, Stored, TileBackend, choose
from .evaluated import PARAMETERS, EvaluatedOperator
from .stored import StoredOperator


class Kernel(nn.Module, ABC):
    """A positive semidefinite function of two points.

    ``kernel(X)`` is the Hermitian operator of the matrix k(x_i, x_j), ``kernel(X, Z)`` the rectangular one of
    k(x_i, z_j); neither forms the matrix. ``kernel.evaluate`` does, for small sizes. Kernels add and multiply:
    ``RBF() + 0.5 * Matern(1.5)``, where a number becomes a :class:`Scale` that is learned from there on.

    A kernel of your own gives ``evaluate(X, Z=None)`` in differentiable operations; products, gradients and memory
    are then taken care of by tiles. Hyper-parameters are cast to the dtype of the points.
    """

    @abstractmethod
    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        """The dense matrix k(x_i, z_j) (n, m) for X (n, d) and Z (m, d), or k(x_i, x_j); of any differentiability."""

    def forward(self, X: Tensor, Z: Tensor | None = None, *, backend: Backend = Auto()) -> LinearOperator:
        """The kernel matrix as an operator.

        Args:
            X: points (n, d), or (n,) for d = 1; floating point.
            Z: points (m, d), or None for X itself.
            backend: a back end of tiles (``Tiles()``, ``NumbaTiles()``, ``TritonTiles()``), ``Stored()`` (the dense
                matrix, kept), or ``Auto()``: a function of size and device, see :func:`~ritz.kernels.backends.choose`.

        Returns:
            An operator (n, m) with gradients in the points and every hyper-parameter; Hermitian psd for Z = None.

        Raises:
            OperandError: points that do not fit together or to the kernel.
            NonFiniteError: NaN or Inf in the points.
        """
        X, Z = self._check(X, Z)
        if not isinstance(backend, Backend):
            raise OperandError(f"backend={backend!r}; expected Auto(), Stored() or a back end of tiles")
        size = X.shape[0] * (X if Z is None else Z).shape[0]
        tiles = choose(backend.tiles if isinstance(backend, Stored) else backend, size, X.device)
        with PARAMETERS:  # or the operator might keep what a tile in another Python thread has put in their place
            operator = self.operator(X, Z, (), tiles)
        return StoredOperator(operator) if isinstance(backend, Stored) else operator

    def operator(
        self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: TileBackend
    ) -> LinearOperator:
        """The operator of this kernel times the factors that belong to ``raw_scales``; for checked points."""
        return EvaluatedOperator(self, X, Z, raw_scales, backend=backend)

    def _check(self, X: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = []
        for name, P in (("X", X), ("Z", Z)):
            if P is None:
                continue
            if not isinstance(P, Tensor) or not P.is_floating_point() or P.ndim not in (1, 2):
                what = f"{tuple(P.shape)} {P.dtype}" if isinstance(P, Tensor) else type(P).__name__
                raise OperandError(f"{name} is {what}; expected a floating-point tensor of points (n, d)")
            if P.dtype not in (torch.float32, torch.float64):
                raise OperandError(f"{name} is {P.dtype}; expected float32 or float64: convert it with .float()")
            P = P.unsqueeze(1) if P.ndim == 1 else P
            check_finite(P, name)
            out.append(P)
        if Z is not None and (out[0].shape[1], X.dtype, X.device) != (out[1].shape[1], Z.dtype, Z.device):
            raise OperandError(
                f"X has {out[0].shape[1]} columns in {X.dtype} on {X.device}, Z has {out[1].shape[1]} in {Z.dtype} on "
                f"{Z.device}; points of one kernel matrix must agree"
            )
        for p in self.parameters():
            if p.device != X.device:
                raise OperandError(f"the kernel is on {p.device} and X on {X.device}; move one of them with .to(...)")
        return out[0], out[1] if Z is not None else None

    def __add__(self, other: Any) -> Kernel:
        from .combine import AdditiveKernel

        if isinstance(other, Kernel):
            return AdditiveKernel(self, other)
        return NotImplemented

    def __mul__(self, other: Any) -> Kernel:
        from .combine import ProductKernel, Scale

        if isinstance(other, Kernel):
            return ProductKernel(self, other)
        if isinstance(other, numbers.Real) or (isinstance(other, Tensor) and other.numel() == 1):
            return Scale(self, outputscale=other)
        return NotImplemented

    def __rmul__(self, other: Any) -> Kernel:
        return self.__mul__(other)


class ActiveKernel(Kernel):
    """Base of kernels that see some columns of the points, with one hyper-parameter for all of them or one each.

    Args:
        ard_num_dims: number of values of that hyper-parameter, one per column; None for one that all share.
        active_dims: the columns of the points that the kernel sees; None for all.
    """

    active_dims: Tensor | None

    def __init__(self, ard_num_dims: int | None = None, active_dims: Sequence[int] | None = None) -> None:
        super().__init__()
        if ard_num_dims is not None and ard_num_dims < 1:
            raise OperandError(f"ard_num_dims={ard_num_dims}; expected at least 1, or None for one value")
        if active_dims is not None and ard_num_dims not in (None, len(active_dims)):
            raise OperandError(f"ard_num_dims={ard_num_dims} came with {len(active_dims)} active_dims; they must agree")
        self.ard_num_dims = ard_num_dims
        self._columns = None if active_dims is None else tuple(int(i) for i in active_dims)
        index = None if self._columns is None else torch.tensor(self._columns, dtype=torch.long)
        self.register_buffer("active_dims", index)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "active_dims")
        if found is None or tuple(found.tolist()) == self._columns:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        args[-1].append(  # error_msgs: load_state_dict raises them
            f"{prefix}active_dims is {found.tolist()} in the state and {self._columns} in the kernel; the columns are "
            "fixed when a kernel is made: make it with those of the state"
        )

    def _check(self, X: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        X, Z = super()._check(X, Z)
        if self._columns is None and self.ard_num_dims not in (None, X.shape[1]):
            raise OperandError(f"the kernel has ard_num_dims={self.ard_num_dims} and X {X.shape[1]} columns")
        outside = [c for c in self._columns or () if not 0 <= c < X.shape[1]]
        if outside:
            raise OperandError(f"active_dims has column {outside[0]} and X only {X.shape[1]} columns")
        return X, Z

    def extra_repr(self) -> str:
        return f"ard_num_dims={self.ard_num_dims}, active_dims={self._columns}"
