"""Stationary kernel matrices by tiles: products, and gradients of everything, without an n×n matrix.

Coordinates u_i = u(x_i), v_j = u(z_j) and the profile come from a :class:`~ritz.kernels.forms.Form`. A back end makes
the tiles and contracts the pairing to gradients of the coordinates; the chain rule from there to points and parameters
is the form's. docs/derivations/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics import full_precision, in_transform, is_transformed, untransformed, unwrap
from ..operators.base import Gradients, LinearOperator
from .backends import TileBackend
from .columns import columns_by_rows
from .distances import Coordinates, origin_of, prepare, squared_distances
from .forms import Form
from .parameters import positive
from .profiles import Profile
from .torch_tiles import Tiles
from .upper import UpperTiles


class StationaryOperator(LinearOperator):
    """s·k(‖u(x_i) − u(z_j)‖²) as an operator (n, m) that is made tile by tile.

    Args:
        form: coordinates and profile.
        X: points (n, d).
        Z: points (m, d), or None for X itself; the operator is then Hermitian positive semidefinite.
        parameters: raw parameters of the form, such as raw length-scales.
        raw_scales: raw factors s of one element each (none: s = 1); nested scalings multiply.
        backend: how tiles are made; kept as the attribute ``backend``, and shown.

    Cost: per product n·m evaluations of k (half of them for Z = None); the pairing costs about three products.
    Memory: ≤ 64 MB of tiles, and n·(d + k) numbers.
    Gradient: of X, Z, parameters and scales; the first by tiles, further ones through the dense matrix.
    """

    def __init__(
        self,
        form: Form,
        X: Tensor,
        Z: Tensor | None,
        parameters: Sequence[Tensor],
        raw_scales: Sequence[Tensor] = (),
        *,
        backend: TileBackend = Tiles(),
    ) -> None:
        same = Z is None
        rows, columns = X.shape[0], (X if Z is None else Z).shape[0]
        super().__init__((rows, columns), X.dtype, X.device, hermitian=same or None, psd=same or None)
        self.form, self.X, self.Z, self.backend = form, X, Z, backend
        self.parameters, self.raw_scales = tuple(parameters), tuple(raw_scales)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, backend={self.backend})"

    # -- products -------------------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        from ..product import product

        return product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self._matmat(X) if self.hermitian else self._swapped()._matmat(X)

    def _swapped(self) -> StationaryOperator:
        assert self.Z is not None
        return StationaryOperator(self.form, self.Z, self.X, self.parameters, self.raw_scales, backend=self.backend)

    @torch.no_grad()
    def _numeric(self, X: Tensor) -> Tensor:
        with full_precision(), untransformed():
            Y = self.backend.product(*self._prepared(), unwrap(X))
            scale = self._factor(*_plain(*self.raw_scales))
            return Y if scale is None else Y.mul_(scale)

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        return self._dense(*tensors) @ X

    def _factor(self, *raw_scales: Tensor) -> Tensor | None:
        """The product of the scales, a scalar, or None for 1."""
        factor = None
        for raw in raw_scales:
            s = positive(raw).to(self.dtype).reshape(())
            factor = s if factor is None else factor * s
        return factor

    def _split(self, tensors: Sequence[Any]) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
        """X, Z, parameters, raw scales out of the order of :meth:`tensors`."""
        X, rest = tensors[0], tuple(tensors[1:])
        Z, rest = (None, rest) if self.Z is None else (rest[0], rest[1:])
        return X, Z, rest[: len(self.parameters)], rest[len(self.parameters) :]

    def _dense(self, *tensors: Tensor, rows: slice = slice(None), columns: Tensor | None = None) -> Tensor:
        """The matrix, or some of its rows and columns, in plain differentiable operations on :meth:`tensors`."""
        X, Z, parameters, raw_scales = self._split(tensors)
        origin, same = origin_of(X), columns is None and Z is None
        other = X if Z is None else Z
        U = self.form.coordinates(X[rows], origin, *parameters)
        V = U if same else self.form.coordinates(other if columns is None else other[columns], origin, *parameters)
        K = self.form.entries(squared_distances(U, V, same), *parameters)
        factor = self._factor(*raw_scales)
        return K if factor is None else factor * K

    def _prepared(self) -> tuple[Profile, Coordinates]:
        """Profile and coordinates as numbers."""
        X, Z, parameters, _ = self._split(_plain(*self.tensors()))
        X, Z, origin = X.double(), None if Z is None else Z.double(), origin_of(X).double()
        profile = self.form.profile(*parameters)
        U = self.form.coordinates(X, origin, *parameters)
        V = None if Z is None else self.form.coordinates(Z, origin, *parameters)
        return profile, prepare(U, V, profile, self.dtype)

    # -- gradients ------------------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        second = () if self.Z is None else (self.Z,)
        return (self.X, *second, *self.parameters, *self.raw_scales)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        tensors = self.tensors()
        needs = [t.requires_grad for t in tensors]
        first = len(tensors) - len(self.raw_scales)
        moves, sums = any(needs[:first]), any(needs[first:])
        if not moves and not sums:
            return (None,) * len(tensors)
        with torch.no_grad(), full_precision(), untransformed():
            profile, points = self._prepared()
            sums = sums or profile.num_shapes > 0
            Lam, Q = unwrap(Lam).detach(), unwrap(Q).detach()
            found = self.backend.contract(profile, points, Lam, Q, moves=moves, sums=sums)
            X, Z, parameters, raw_scales = self._split(_plain(*tensors))
            factor = self._factor(*raw_scales)
            scale = 1.0 if factor is None else factor.double()
            inputs: list[Tensor | None] = [None, None] if Z is not None else [None]
            chained: list[Tensor | None] = [None] * len(parameters)
            if moves:
                origin = origin_of(X).double()
                for i, (P, G) in enumerate(((X, found.grad_U), (Z, found.grad_V))):
                    if P is None or G is None:
                        continue
                    g, rest = self.form.pullback(P.double(), origin, parameters, G.double() * scale)
                    inputs[i] = g.to(self.dtype)
                    chained = [_sum(a, b) for a, b in zip(chained, rest, strict=True)]
                direct = self.form.shape_gradients(found.shapes * scale, *parameters)
                chained = [_sum(a, b) for a, b in zip(chained, direct, strict=True)]
            scales: list[Tensor | None] = []
            for i, r in enumerate(raw_scales):
                others = self._factor(*(o for j, o in enumerate(raw_scales) if j != i))
                g = found.value if others is None else found.value * others
                scales.append((torch.sigmoid(r) * g.to(r.dtype)).reshape(r.shape))
        return tuple(g if need else None for g, need in zip([*inputs, *chained, *scales], needs, strict=True))

    # -- entries --------------------------------------------------------------------------------------------------

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        """The columns K[:, idx] (n, len(idx)), from n·len(idx) evaluations of k; differentiable to any order.

        The first derivative evaluates them anew by groups of rows: nothing of their size stays on the graph.
        """
        return columns_by_rows(self, torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1))

    def diagonal(self) -> Tensor:
        """The diagonal: s for Z = None, without evaluations; differentiable."""
        factor = self._factor(*self.raw_scales)
        if self.Z is None:
            ones = torch.ones(self.shape[0], dtype=self.dtype, device=self.device)
            return ones if factor is None else factor * ones
        size, origin = min(self.shape), origin_of(self.X)
        U, V = (self.form.coordinates(P[:size], origin, *self.parameters) for P in (self.X, self.Z))
        K = self.form.entries((U - V).square().sum(1), *self.parameters)
        return K if factor is None else factor * K

    def to_dense(self) -> Tensor:
        """The matrix (n, m): by tiles in place where no graph is wanted, in differentiable operations otherwise."""
        tensors = self.tensors()
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if recorded or any(is_transformed(t) for t in tensors):
            return self._dense(*tensors)
        with torch.no_grad(), full_precision(), untransformed():
            K = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.backend.fill(*self._prepared(), K)
            scale = self._factor(*_plain(*self.raw_scales))
            K = K if scale is None else K.mul_(scale)
        return K.clone() if in_transform() else K

    @torch.no_grad()
    def write_upper(self, upper: UpperTiles, *, add: bool) -> None:
        """Write the matrix (Z = None, on a CPU, by ``Tiles`` of the same edge) into its upper tiles, or add it."""
        assert isinstance(self.backend, Tiles) and self.Z is None
        with full_precision(), untransformed():
            factor = self._factor(*_plain(*self.raw_scales))
            scale = 1.0 if factor is None else float(factor)

            def put(i: int, j: int, K: Tensor) -> None:
                if add:
                    upper.tiles[i, j].add_(K, alpha=scale)
                else:
                    torch.mul(K, scale, out=upper.tiles[i, j])

            self.backend.each(*self._prepared(), self.dtype, put)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else (a if b is None else a + b)


def _plain(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else unwrap(t).detach() for t in tensors)
