"""Diffusion ∇·(c∇u) on a grid, with isotropic, diagonal and full coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..operators.algebra import wanted
from ..operators.base import Gradients
from .anisotropic import Components, Crossing, at_borders, components, crossings, refuse_indefinite
from .bands import Entries, StencilOperator, as_fields, axis_keys, dots, pull_back, slopes
from .coefficients import (
    Precision,
    as_tensor,
    check_grid,
    evaluate,
    face_values,
    node_field,
    precision,
    refuse_negative,
)
from .grid import Grid


class Diffusion(StencilOperator):
    """The operator u ↦ ∇·(c∇u), or with ``negative=True`` u ↦ −∇·(c∇u), by finite volumes of second order.

    A = −Σ_faces c_f/h² (e_i − e_j)(e_i − e_j)ᵀ over neighbours i, j: symmetric and negative semidefinite for every
    c ≥ 0, and conservative (columns sum to zero without Dirichlet borders). Not scaled by cell volumes: du/dt = A u.

    Args:
        coefficient: c ≥ 0, one of
            a number or a tensor of no dimension;
            a tensor of ``grid.shape``: values at the nodes, of which faces get the mean;
            a list of these, one per axis: ∂_a(c_a ∂_a u) summed over the axes;
            a tensor (ndim, ndim, *grid.shape): a symmetric positive semidefinite tensor K at every node, ∇·(K∇u);
            a callable (an ``nn.Module`` as well) of positions (m, ndim), returning (m,) or (m, 1): c at the midpoints
            of the faces. It is called once, here: make the operator anew after every step of an optimizer. (A network
            for K or for one c per axis: give its values at ``grid.coordinates()`` as tensors.)
        grid: where, and with which borders. On "neumann" borders the flux n·K∇u is zero, on "dirichlet" ones u is.
        mean: of node values at faces: "arithmetic", or "harmonic" where c jumps and flows in series.
        negative: the sign; −∇·(c∇u) has psd=True, so that CG, Cholesky and A^{1/2} take it.
        dtype: of vectors: the coefficient's dtype, or the complex companion of it. Default: the coefficient's; for a
            number torch's default dtype.
        device: of vectors, where the coefficient is a number; else the coefficient's.

    Raises:
        DomainError: a negative coefficient, or a tensor K that is not positive semidefinite, also where an in-place
            change made it so.
        NonFiniteError: NaN or Inf in the coefficient.  OperandError: anything of another shape, dtype or kind.

    The tensor form takes the one-sided differences of all 2^ndim quadrants of a node with the node's own K, which is
    bilinear finite elements with lumped (vertex) quadrature: 9 points in two dimensions, 19 in three, exactly the
    five-point stencil with arithmetic means where K is diagonal, without oscillating null vectors elsewhere. In
    boundary cells without flux the missing difference is the one that makes K∇u·n zero. Off-diagonal entries of A may
    be positive, so there is no maximum principle.

    Cost: one multiply–add per neighbour and vector; n·(1 + ndim) numbers kept (n·(3 + ndim) for a tensor K in 2-D).
        After an in-place change of the coefficient the bands are made anew at the next product, for the time of about
        10 products (50 with a tensor K).
    Gradient: in the coefficient, any order through ``A @ x``; in pairings −Σ_f Re(D_f λ)*(D_f q)/h² on faces, then the
        adjoint of the mean.
    Reference: for K∇u, G. Strang, G. Fix, An Analysis of the Finite Element Method, 1973 (lumping).

    Example:
        >>> grid = Grid(4, border="dirichlet", spacing=1.0)
        >>> Diffusion(1.0, grid, dtype=torch.float64).to_dense()[1]
        tensor([ 1., -2.,  1.,  0.], dtype=torch.float64)
    """

    def __init__(
        self,
        coefficient: Any,
        grid: Grid,
        *,
        mean: str = "arithmetic",
        negative: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_grid(grid)
        if mean not in ("arithmetic", "harmonic"):
            raise OperandError(f"mean={mean!r}; expected 'arithmetic' or 'harmonic'")
        several = isinstance(coefficient, (list, tuple))
        like = precision(list(coefficient) if several else [coefficient], dtype, device)
        self._harmonic, self._sign = mean == "harmonic", -1.0 if negative else 1.0
        self._full = isinstance(coefficient, Tensor) and coefficient.ndim == grid.ndim + 2
        self._on_faces = callable(coefficient) and not isinstance(coefficient, Tensor)
        if self._on_faces:
            tensors = _on_faces(coefficient, grid, like)
        elif several:
            if len(coefficient) != grid.ndim:
                raise OperandError(f"{len(coefficient)} coefficients on a grid of {grid.ndim} axes; expected one each")
            tensors = [node_field(c, f"coefficient[{a}]", grid, like) for a, c in enumerate(coefficient)]
        elif self._full:
            tensors = [_symmetric_field(coefficient, grid, like)]
        else:
            tensors = [node_field(coefficient, "coefficient", grid, like)]
        if self._harmonic and (self._full or self._on_faces):
            raise OperandError("mean='harmonic' came with a tensor or a callable; it applies to values at the nodes")
        keys = axis_keys(grid)
        self._crossings: list[Crossing] = crossings(grid, keys) if self._full else []
        super().__init__(grid, keys, tensors, like.vectors, like.device, hermitian=True, psd=negative)

    def _check(self, *tensors: Tensor) -> None:
        for i, t in enumerate(tensors):
            if self._full:
                refuse_indefinite(t, "coefficient")
            else:
                refuse_negative(t, f"coefficient[{i}]" if len(tensors) > 1 else "coefficient", "diffusion")

    def _faces(self, axis: int, tensors: Sequence[Tensor], K: Components) -> Tensor:
        if self._on_faces:
            return tensors[axis]
        c = at_borders(K, (axis, axis), self.grid) if K else tensors[axis if len(tensors) > 1 else 0]
        return face_values(c, self.grid, axis, self._harmonic)

    def _weights(self, *tensors: Tensor) -> list[Tensor]:
        """The weight ω of every link, and of the links with the value zero at Dirichlet borders."""
        grid, K = self.grid, components(tensors[0]) if self._full else []
        ground, weights = torch.zeros(grid.shape, dtype=tensors[0].dtype, device=self.device), []
        for axis, (h, n) in enumerate(zip(grid.h, grid.shape)):
            faces = self._faces(axis, tensors, K) / h**2
            if grid.border[axis] == "dirichlet":
                ground.narrow(axis, 0, 1).add_(faces.narrow(axis, 0, 1))
                ground.narrow(axis, n - 1, 1).add_(faces.narrow(axis, n, 1))
                faces = faces.narrow(axis, 1, n - 1)
            weights.append(faces.narrow(axis, 0, n - 1))
            if grid.border[axis] == "periodic":
                weights.append(faces.narrow(axis, n - 1, 1))
        return self._mixed(weights, ground, K) if self._crossings else [*weights, ground]

    def _mixed(self, weights: list[Tensor], ground: Tensor, K: Components) -> list[Tensor]:
        """The same with what the mixed entries of K add; the links of diagonal neighbours come after the others."""
        grid, shapes = self.grid, [[s.stop - s.start for s in link.tail] for link in self._links]
        added = [torch.zeros(shape, dtype=ground.dtype, device=self.device) for shape in shapes]
        entries: dict[tuple[int, int], Tensor] = {}
        for crossing in self._crossings:
            a, b = crossing.axes
            if (a, b) not in entries:
                entries[a, b] = at_borders(K, (a, b), grid) / (4 * grid.h[a] * grid.h[b])
            target = ground if crossing.link is None else added[crossing.link]
            target[crossing.where] += crossing.sign * entries[a, b][crossing.node]
        straight = [w + x for w, x in zip(weights, added)]
        return [*straight, *added[len(weights) :], ground]

    def _entries(self, *tensors: Tensor) -> Entries:
        *weights, ground = self._weights(*tensors)
        diagonal = -ground
        for link, w in zip(self._links, weights, strict=True):
            diagonal[link.tail] -= w
            diagonal[link.head] -= w
        upper = [self._sign * w for w in weights]
        return Entries(self._sign * diagonal, upper, upper)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        if not wanted(self._tensors):
            return (None,) * len(self._tensors)
        lam, q = as_fields(Lam, self.grid), as_fields(Q, self.grid)
        along = [-self._sign * g for g in (*slopes(lam, q, self._links), dots(lam, q))]
        return pull_back(self._weights, self._tensors, along)


def Laplacian(
    grid: Grid, *, negative: bool = False, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Diffusion:
    """The Laplacian Δ, or with ``negative=True`` the positive semidefinite −Δ: :class:`Diffusion` with c = 1.

    Args and errors as there; 3, 5 or 7 points, eigenvalues −Σ_a (4/h_a²) sin²(·) in [−4 Σ_a 1/h_a², 0].
    """
    return Diffusion(1.0, grid, negative=negative, dtype=dtype, device=device)


def _on_faces(function: Any, grid: Grid, like: Precision) -> list[Tensor]:
    points = [grid.faces(axis, dtype=like.real, device=like.device) for axis in range(grid.ndim)]
    values = evaluate(function, torch.cat(points), "the coefficient", like).split([len(p) for p in points])
    return [v.reshape(grid.face_shape(axis)) for axis, v in enumerate(values)]


def _symmetric_field(K: Tensor, grid: Grid, like: Precision) -> Tensor:
    shape = (grid.ndim, grid.ndim, *grid.shape)
    if K.shape != shape:
        raise OperandError(f"coefficient has shape {tuple(K.shape)}; expected a tensor at every node, {shape}")
    return as_tensor(K, "coefficient", like)
