"""The spectral measure of a Hermitian operator, from one Krylov run: traces of every function, and the density.

Stochastic Lanczos quadrature replaces the eigenvalues by Ritz values θ with weights w, so that tr f(A) ≈ Σ w f(θ). The
nodes do not depend on f: what is kept is a few thousand numbers, and a curve over shifts or widths costs no product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions.scalar import as_function
from ..functions.space import HermitianSpace, as_hermitian, build, choose
from ..methods import Auto, KrylovMethod, Lanczos
from ..operators.base import check_square
from ..operators.convert import aslinearoperator
from ..pairing import Run
from ..result import Info, OnFailure, report
from .deflated import Deflated, krylov_part
from .probes import Hutchinson, mean_and_error, rest_probes


@dataclass(frozen=True)
class SpectralMeasure:
    """Nodes and weights: known exactly (D,), and one quadrature a probe (m, k), whose mean is meant.

    ``exact``: the probes span the space, so that nothing is random.
    """

    known: Tensor
    known_weights: Tensor
    nodes: Tensor
    weights: Tensor
    exact: bool
    info: Info

    def samples(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """One estimate of tr f(A) for every probe, (..., m); f may have axes of its own in front, f(θ) (..., *θ)."""
        rest = (f(self.nodes) * self.weights).sum(-1)
        if not self.known.numel():
            return rest
        return rest + (f(self.known) * self.known_weights).sum(-1, keepdim=True)

    def trace(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """tr f(A) and its standard error, (...,); differentiable in what f closes over."""
        return mean_and_error(self.samples(f), self.exact)

    def logdet(self, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """log det(A + σI) and its standard error at every σ (p,); differentiable in σ."""
        sigma = shifts.to(self.nodes.dtype)
        return self.trace(lambda x: torch.log(x + sigma.reshape(-1, *(1,) * x.ndim)))

    def density(self, grid: Tensor, width: float | Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues per unit length on a grid (g,), smoothed by a Gaussian of that standard deviation, and its error.

        It integrates to n. ``width`` may be a tensor (g,).
        """
        x, s = grid.to(self.nodes.dtype), torch.as_tensor(width, dtype=self.nodes.dtype).expand(grid.shape)

        def gaussian(theta: Tensor) -> Tensor:
            shape = (-1, *(1,) * theta.ndim)
            z = (theta - x.reshape(shape)) / s.reshape(shape)
            return torch.exp(-0.5 * z.square()) / (s.reshape(shape) * (2 * torch.pi) ** 0.5)

        return self.trace(gaussian)


def spectral_measure(
    A: Any,
    *,
    estimator: Hutchinson | Deflated = Hutchinson(),
    method: KrylovMethod = Lanczos(100),
    f: Any = None,
    generator: torch.Generator | None = None,
    on_failure: OnFailure = "warn",
) -> SpectralMeasure:
    """Nodes and weights of the spectral measure of a Hermitian operator (n, n); no gradient in A.

    Args:
        estimator: probes, or probes behind a Krylov space that is taken out.
        method: ``Lanczos(k)``; adaptive, it stops where the forms of ``f`` have converged.
        f: the function that an adaptive depth waits for (the hardest one that will be asked for).
        on_failure: "warn", "raise" or "ignore" where an adaptive depth does not suffice for it.

    Cost: the products of the run. Kept: k numbers a probe.
    """
    A = aslinearoperator(A)
    check_square(A, "a spectral measure")
    n = A.shape[0]
    chosen = choose(A, method)
    if not isinstance(chosen, Lanczos):
        raise OperandError("a spectral measure needs a Hermitian operator; declare hermitian=True if it is one")
    A = as_hermitian(A, chosen)
    if chosen.num_matvecs is None and f is None:
        raise OperandError(f"{chosen} is adaptive, and no f says for what; give f=, or a depth as in Lanczos(100)")
    resolved = estimator.resolve(n) if isinstance(estimator, Deflated) else estimator
    functions = [] if f is None else [as_function(f)]
    with torch.no_grad(), Run(A) as run:
        empty = torch.zeros(0, dtype=torch.float64, device=A.device)
        known, known_weights, spent = empty, empty, 0
        if isinstance(resolved, Deflated):
            block = krylov_part(A, run.matmat, resolved, generator)
            known = block.ritz
            known_weights = block.vectors[: resolved.columns].abs().square().sum(0)
            Z, exact = rest_probes(block.V[:, : resolved.columns], resolved.m, resolved.seed, generator), False
        else:
            Z, exact = resolved.probes(n, A.dtype, A.device, generator), resolved.is_exact(n)
        space, error, status = build(run.matmat, Z, chosen, functions, psd=A.psd)
        assert isinstance(space, HermitianSpace)
        spent = run.num_matvecs
    depth = int(space.state.depth.max())
    info = Info(chosen, spent, depth, error, status=status, details={"estimator": estimator})
    report(info, what=f"a spectral measure by {chosen} at n={n}", target=chosen.rtol or 0.0, on_failure=on_failure)
    return SpectralMeasure(known, known_weights, space.ritz, space.first.square(), exact, info)


def spectral_density(
    A: Any,
    grid: Tensor | int = 200,
    *,
    width: float | Tensor | None = None,
    estimator: Hutchinson | Deflated = Hutchinson(),
    method: KrylovMethod = Auto(),
    generator: torch.Generator | None = None,
    return_info: bool = False,
) -> Any:
    """The smoothed eigenvalue density of a Hermitian operator on a grid, with a standard error at every point.

    Args:
        A: Hermitian operator (n, n).
        grid: points (g,), or their number: equally spaced over the Ritz values, three widths beyond.
        width: standard deviation of the Gaussian that stands for each eigenvalue, one number or one a point (g,); None:
            a hundredth of the range.
        estimator, generator: as in :func:`ritz.trace`.
        method: ``Lanczos(k)``; Auto() is Lanczos(100). Details finer than about range/k are those of the quadrature.

    Returns:
        (grid (g,), density (g,), standard error (g,)); the density integrates to n. With ``return_info`` also an
        :class:`~ritz.result.Info`.

    Reference: Lin, Saad, Yang, "Approximating spectral densities of large matrices" (2016).
    """
    A = aslinearoperator(A)
    chosen = Lanczos(min(100, A.shape[0])) if isinstance(method, Auto) else method
    measure = spectral_measure(A, estimator=estimator, method=chosen, generator=generator)
    seen = torch.cat([measure.known, measure.nodes[measure.weights > 0]])
    low, high = float(seen.min()), float(seen.max())
    spread = high - low if high > low else max(abs(high), 1.0)
    width = spread / 100 if width is None else width
    if not bool((torch.as_tensor(width) > 0).all()):
        raise OperandError(f"width={width!r}; expected a positive standard deviation")
    if isinstance(grid, int):
        beyond = 3 * float(torch.as_tensor(width).max())
        grid = torch.linspace(low - beyond, high + beyond, grid, dtype=torch.float64)
    density, error = measure.density(grid, width)
    found = grid, density, error
    return (*found, measure.info) if return_info else found
