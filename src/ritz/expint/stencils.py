"""Differential operators on a grid: diffusion, advection, Schrödinger Hamiltonians, waves in inhomogeneous media.

Products read diagonals of the matrix (``bands.py``); gradients in the coefficients are closed forms in differences of
neighbours, so that nothing of size n×n, and no list of entries, appears.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DomainError, OperandError
from ..operators.base import Gradients
from .bands import Entries, StencilOperator, as_fields, axis_keys, dots
from .coefficients import as_tensor, check_grid, node_field, precision, refuse_negative
from .diffusion import Diffusion, Laplacian
from .grid import Grid

__all__ = ["Advection", "Diffusion", "Hamiltonian", "Laplacian", "WaveOperator"]


class Advection(StencilOperator):
    """The operator u ↦ −v·∇u, not Hermitian; ``Diffusion(c, grid) + Advection(v, grid)`` transports and spreads.

    Args:
        velocity: v, one number or tensor per axis, each of no dimension or of ``grid.shape`` (values at the nodes);
            or a tensor with a leading axis of ndim. On a grid of one axis the number or tensor itself.
        grid: where. Beyond a "neumann" border u repeats the border's node (outflow), beyond a "dirichlet" one it is 0.
        scheme: "upwind", the difference towards where the flow comes from: first order, no oscillations, eigenvalues
            with real parts ≤ 0 where v is constant; or "central": second order, which oscillates where
            |v|h exceeds twice the diffusion.
        dtype, device: as in :class:`Diffusion`.

    Raises: OperandError, NonFiniteError: as in :class:`Diffusion`.

    Cost: one multiply–add per neighbour and vector; n·(1 + 2·ndim) numbers kept.
    Gradient: in the velocities, any order through ``A @ x``; in pairings −Re λ*(D q) at every node. Upwind is not
        differentiable where v = 0; the difference of v > 0 is used there.

    Example:
        >>> Advection(2.0, Grid(3, border="dirichlet", spacing=1.0), dtype=torch.float64).to_dense()
        tensor([[-2.,  0.,  0.],
                [ 2., -2.,  0.],
                [ 0.,  2., -2.]], dtype=torch.float64)
    """

    def __init__(
        self,
        velocity: Any,
        grid: Grid,
        scheme: str = "upwind",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_grid(grid)
        if scheme not in ("upwind", "central"):
            raise OperandError(f"scheme={scheme!r}; expected 'upwind' or 'central'")
        if isinstance(velocity, Tensor) and velocity.ndim in (1, grid.ndim + 1) and velocity.shape[0] == grid.ndim:
            alone = grid.ndim == 1 and velocity.shape == grid.shape  # a grid of one node
            velocity = [velocity] if alone else velocity.unbind(0)
        elif not isinstance(velocity, (list, tuple)) and grid.ndim == 1:
            velocity = [velocity]
        if not isinstance(velocity, (list, tuple)) or len(velocity) != grid.ndim:
            got = f"{len(velocity)} entries" if isinstance(velocity, (list, tuple)) else type(velocity).__name__
            raise OperandError(f"velocity has {got} on a grid of {grid.ndim} axes; expected one entry per axis")
        like = precision(list(velocity), dtype, device)
        tensors = [node_field(v, f"velocity[{a}]", grid, like) for a, v in enumerate(velocity)]
        self._upwind = scheme == "upwind"
        super().__init__(grid, axis_keys(grid), tensors, like.vectors, like.device)

    def _entries(self, *tensors: Tensor) -> Entries:
        grid = self.grid
        diagonal = torch.zeros(grid.shape, dtype=tensors[0].dtype, device=self.device)
        upper: list[Tensor] = []
        lower: list[Tensor] = []
        for axis, (v, h, n) in enumerate(zip(tensors, grid.h, grid.shape)):
            v = v.expand(grid.shape)
            if self._upwind:
                zero = torch.zeros_like(v)
                back, fore = torch.where(v >= 0, v, zero) / h, torch.where(v >= 0, zero, v) / h
            else:
                back = fore = v / (2 * h)
            # (A u)_i = −back_i (u_i − u_{i−1}) − fore_i (u_{i+1} − u_i)
            diagonal += fore - back
            if grid.border[axis] == "neumann":
                diagonal.narrow(axis, 0, 1).add_(back.narrow(axis, 0, 1))
                diagonal.narrow(axis, n - 1, 1).sub_(fore.narrow(axis, n - 1, 1))
            upper.append(-fore.narrow(axis, 0, n - 1))
            lower.append(back.narrow(axis, 1, n - 1))
            if grid.border[axis] == "periodic":
                upper.append(-fore.narrow(axis, n - 1, 1))
                lower.append(back.narrow(axis, 0, 1))
        return Entries(diagonal, upper, lower)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        lam, q = as_fields(Lam, self.grid), as_fields(Q, self.grid)
        grads: list[Tensor | None] = []
        for axis, v in enumerate(self._tensors):
            if not v.requires_grad:
                grads.append(None)
                continue
            grad = -dots(lam, [self._slope(x, axis) for x in q])
            grads.append(grad if v.ndim else grad.sum())
        return tuple(grads)

    def _slope(self, x: Tensor, axis: int) -> Tensor:
        """The derivative along an axis that the scheme takes of a field."""
        jumps, n = _jumps(x, self.grid, axis), self.grid.shape[axis]
        back, fore = jumps.narrow(axis, 0, n), jumps.narrow(axis, 1, n)
        slope = torch.where(self._tensors[axis].detach() >= 0, back, fore) if self._upwind else (back + fore) / 2
        return slope / self.grid.h[axis]


class Hamiltonian(StencilOperator):
    """The Schrödinger operator H = −Δ/(2m) + V(x), real symmetric: e^{−iHt}ψ is ``expm_multiply(H, psi, -1j * t)``.

    Args:
        potential: V, a number, a tensor of no dimension or of ``grid.shape``, or a callable of positions (size, ndim)
            returning (size,) or (size, 1), called once.
        grid: where; a "dirichlet" border is an infinite wall.
        mass: m > 0, a number or a tensor of no dimension; ħ = 1.
        dtype: of vectors; give the complex companion of the potential's dtype for complex ψ.
        device: as in :class:`Diffusion`.

    Raises: DomainError: a mass that is not positive.  OperandError, NonFiniteError: as in :class:`Diffusion`.

    Cost: as :class:`Diffusion`.
    Gradient: in potential and mass, any order through ``A @ x``; in pairings Re λ*q at every node.
    """

    def __init__(
        self,
        potential: Any,
        grid: Grid,
        mass: float | Tensor = 1.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_grid(grid)
        like = precision([potential, mass], dtype, device)
        m = as_tensor(mass, "mass", like)
        if m.ndim:
            raise OperandError(f"mass has shape {tuple(m.shape)}; expected a number or a tensor of no dimension")
        self._kinetic = Laplacian(grid, negative=True, dtype=like.vectors, device=like.device)
        self._unit = self._kinetic._entries(*self._kinetic.tensors())
        tensors = [node_field(potential, "potential", grid, like), m]
        super().__init__(grid, axis_keys(grid), tensors, like.vectors, like.device, hermitian=True)

    def _check(self, *tensors: Tensor) -> None:
        mass = float(tensors[1].detach())
        if not mass > 0:
            raise DomainError(f"mass = {mass:g}; expected a positive number")

    def _entries(self, *tensors: Tensor) -> Entries:
        V, m = tensors
        upper = [w / (2 * m) for w in self._unit.upper]
        return Entries(self._unit.diagonal / (2 * m) + V, upper, upper)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        V, m = self._tensors
        to_V = to_m = None
        if V.requires_grad:
            to_V = dots(as_fields(Lam, self.grid), as_fields(Q, self.grid))
            to_V = to_V if V.ndim else to_V.sum()
        if m.requires_grad:
            along = dots(as_fields(Lam, self.grid), as_fields(self._kinetic._matmat(Q), self.grid))
            to_m = along.sum() / (-2 * m.detach() ** 2)
        return to_V, to_m


class WaveOperator(StencilOperator):
    """The positive semidefinite S = C(−Δ)C, C = diag(c), behind waves u_tt = c²Δu of speed c(x).

    With u = C w the wave equation reads w_tt = −S w, which is symmetric: its energy ½‖w_t‖² + ½⟨w, Sw⟩ is conserved,
    its solution is cos(t√S) w₀ + S^{-1/2} sin(t√S) ẇ₀, and √(λ_max(S)) bounds the frequencies. The same matrix by the
    algebra is ``Diagonal(c) @ Laplacian(grid, negative=True) @ Diagonal(c)``, in three products and without flags.

    Args:
        speed: c ≥ 0, a number, a tensor of no dimension or of ``grid.shape``, or a callable of positions (size, ndim)
            returning (size,) or (size, 1), called once.
        grid: where; a wave is reflected at a "neumann" border with its sign, at a "dirichlet" one with the opposite.
        dtype, device: as in :class:`Diffusion`.

    Raises: DomainError: a negative speed.  OperandError, NonFiniteError: as in :class:`Diffusion`.

    Cost: as :class:`Diffusion`; a pairing takes one product with −Δ on either block.
    Gradient: in the speed, any order through ``A @ x``; in pairings Re(λ*·L C q + q*·L C λ) with L = −Δ.
    """

    def __init__(
        self,
        speed: Any,
        grid: Grid,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_grid(grid)
        like = precision([speed], dtype, device)
        self._laplacian = Laplacian(grid, negative=True, dtype=like.vectors, device=like.device)
        self._unit = self._laplacian._entries(*self._laplacian.tensors())
        tensors = [node_field(speed, "speed", grid, like)]
        super().__init__(grid, axis_keys(grid), tensors, like.vectors, like.device, psd=True)

    def _check(self, *tensors: Tensor) -> None:
        refuse_negative(tensors[0], "speed", "wave speed")

    def _entries(self, *tensors: Tensor) -> Entries:
        c = tensors[0].expand(self.grid.shape)
        links = zip(self._links, self._unit.upper, strict=True)
        upper = [w * (c[link.tail] * c[link.head]) for link, w in links]
        return Entries(self._unit.diagonal * c**2, upper, upper)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        (speed,) = self._tensors
        if not speed.requires_grad:
            return (None,)
        c, L, grid = speed.detach().expand(self.grid.shape).reshape(-1, 1), self._laplacian._matmat, self.grid
        slope = dots(as_fields(Lam, grid), as_fields(L(c * Q), grid))
        slope += dots(as_fields(Q, grid), as_fields(L(c * Lam), grid))
        return (slope if speed.ndim else slope.sum(),)


def _jumps(x: Tensor, grid: Grid, axis: int) -> Tensor:
    """Differences of neighbours along an axis of a field, both borders included."""
    n = grid.shape[axis]
    first, last = x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1)
    if grid.border[axis] == "periodic":
        before = after = first - last
    elif grid.border[axis] == "dirichlet":
        before, after = first, -last
    else:
        before = after = torch.zeros_like(first)
    return torch.cat([before, x.diff(dim=axis), after], axis)
