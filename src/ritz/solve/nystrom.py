"""Low-rank preconditioners as values: which columns of K, or which products with it, the factor is made of.

Each makes F with F Fᴴ = Y (Ωᴴ Y)⁻¹ Yᴴ, Y = K Ω, the Nyström approximation of K on the range of Ω: unit vectors at
pivots (a partial Cholesky factorisation), or a Gaussian sketch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import full_precision
from ..operators import LinearOperator
from .factor import factor_of_columns
from .lowrank import LowRankPreconditioner
from .pivoting import Selection, greedy, random_blocks
from .root import Shift, wide
from .splitting import add_shifts, noise_values, split_noise


def default_rank(n: int) -> int:
    """The rank that None stands for: 2√n rounded to tens, at least 10, at most 500 and at most n.

    Measured at n = 13 279 (Matérn 3/2 with 18 length-scales, n·s/σ² = 1e6), where it is 230: a likelihood took 21, 10,
    7, 4.4, 5.0, 6.0 s of one core at rank 0, 50, 100, 200, 300, 500. Past the cap O(n r²) work and n r numbers would
    grow faster than the steps that they save.
    """
    return min(n, max(10, 10 * round(0.2 * n**0.5)), 500)


@dataclass(frozen=True)
class _Ranked:
    """A method with a largest rank."""

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise OperandError(f"{type(self).__name__}(rank={self.rank}): expected at least 1, or None")

    def resolve(self, n: int) -> int:
        """The rank for n unknowns."""
        return min(n, default_rank(n) if self.rank is None else self.rank)


class _Pivoted(ABC):
    """Base of the methods that read columns of K."""

    @abstractmethod
    def _select(self, K: LinearOperator, noise: Tensor | None) -> Selection:
        """Pivots for K, with the noise (n,) that the approximation will stand beside, if there is one."""

    def build(self, A: LinearOperator, shift: Shift | None = None) -> LowRankPreconditioner:
        """The preconditioner of A + shift·I, P = F Fᴴ + σ² I, or of A = K + D, P = F Fᴴ + D.

        Args:
            A: Hermitian positive semidefinite (n, n). Terms of a sum that are a multiple of the identity, or a
                diagonal with positive entries (``ritz.operators.Diagonal``), are the noise, and the rest is K.
            shift: further noise; a number, a tensor of one element, or one per row (n,).

        Where neither A nor ``shift`` has noise, the mean of the diagonal that the factor leaves over takes the place
        of σ² (a constant).

        Raises:
            DomainError: for a negative diagonal or noise that is not positive.
        """
        K, noise = split_noise(A)
        noise = add_shifts(noise, shift)
        n = K.shape[0]
        with torch.no_grad(), full_precision():
            beside = None if noise is None else noise_values(noise, n, K.device)
            pivots, C, left = self._select(K, beside)
        if torch.is_grad_enabled():
            del C  # before the same ones on a graph are there: a quarter of what the factor takes
            with full_precision():
                C = K.columns(pivots)
        factor, pivots = factor_of_columns(C, pivots)
        del C
        if noise is None:
            mean = float(K.diagonal().detach().real.mean()) if n else 1.0
            noise = max(left / max(n, 1), torch.finfo(K.dtype).eps * mean)
        P = LowRankPreconditioner(factor, noise, K.dtype, own=True)
        P.pivots = pivots
        return P

    def _run(self, K: LinearOperator, noise: Tensor | None, rank: int, algorithm: Any, **options: Any) -> Selection:
        """A selection on K, or on D^(-1/2) K D^(-1/2) where the noise differs from row to row."""
        w = None if noise is None or bool((noise == noise[:1]).all()) else noise.clamp(min=0).sqrt()
        diagonal = K.diagonal().real.to(torch.float64)
        if w is None:
            return algorithm(diagonal, K.columns, rank, K.dtype, **options)  # type: ignore[no-any-return]

        def columns(idx: Tensor) -> Tensor:
            return wide(K.columns(idx)) / w.unsqueeze(1) / w[idx]

        pivots, C, left = algorithm(diagonal / w.square(), columns, rank, K.dtype, **options)
        return Selection(pivots, (C * w.unsqueeze(1) * w[pivots]).to(K.dtype), left)


@dataclass(frozen=True)
class PivotedCholesky(_Ranked, _Pivoted):
    """Partial Cholesky factorisation of K with the largest remaining diagonal entry as the next pivot.

    For A = K + σ² I (as ``A.shift(σ²)`` makes it) P = F Fᴴ + σ² I with F Fᴴ = K[:, S] K[S, S]⁻¹ K[S, :].

    Args:
        rank: columns of F at most; fewer where K is exhausted before. None: :func:`default_rank`, and fewer where the
            trace that is left over has fallen below σ².

    Cost: r columns one by one, and the diagonal, of K (r columns once more where gradients are wanted), O(n r²)
    arithmetic; 2 n r numbers in double precision, up to 3 while pivots are chosen, 2 more while a gradient is made.
    Gradient: pivots fixed, entries of the columns K[:, S] and σ² on the graph.
    Reference: Harbrecht, Peters, Schneider, On the low-rank approximation by the pivoted Cholesky decomposition, 2012.
    """

    def _select(self, K: LinearOperator, noise: Tensor | None) -> Selection:
        return self._run(K, noise, self.resolve(K.shape[0]), greedy, enough=_enough(self.rank, noise))


@dataclass(frozen=True)
class RandomlyPivotedCholesky(_Ranked, _Pivoted):
    """Partial Cholesky factorisation of K with pivots drawn in proportion to the remaining diagonal, in blocks.

    As :class:`PivotedCholesky`, but near-optimal in expectation for every K, where greedy pivots run after outliers,
    and with matrix products for arithmetic.

    Args:
        rank: columns of F at most. None: :func:`default_rank`, and fewer where the trace left over is below σ².
        seed: decides the pivots (numbers drawn on the CPU; the same on every device up to rounding).

    Cost: about 1.3 r columns of K in blocks of r/4, further as for PivotedCholesky.
    Reference: Chen, Epperly, Tropp, Webber, Randomly pivoted Cholesky, 2024; Epperly, Tropp, Webber, Embrace
    rejection, 2024 (the blocks, which leave the distribution of the pivots as it is).
    """

    seed: int = 0

    def _select(self, K: LinearOperator, noise: Tensor | None) -> Selection:
        rank, enough = self.resolve(K.shape[0]), _enough(self.rank, noise)
        return self._run(K, noise, rank, random_blocks, seed=self.seed, enough=enough)


@dataclass(frozen=True)
class Landmarks(_Pivoted):
    """The Nyström approximation on given columns.

    ``Landmarks(P.pivots)`` with the pivots of an earlier build keeps them fixed while hyper-parameters move, so that
    an objective stays one smooth function.

    Args:
        indices: columns of K, distinct; a sequence or a tensor of whole numbers. Columns that depend on others up to
            rounding are left out.

    Cost and gradient as :class:`PivotedCholesky`, without the selection.
    """

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        given: Any = self.indices
        values = given.tolist() if isinstance(given, Tensor) else list(given)
        if len(set(values)) != len(values) or not all(isinstance(i, int) and i >= 0 for i in values):
            raise OperandError(f"Landmarks of {len(values)} indices; expected distinct whole numbers, none negative")
        object.__setattr__(self, "indices", tuple(values))

    def _select(self, K: LinearOperator, noise: Tensor | None) -> Selection:
        if self.indices and max(self.indices) >= K.shape[0]:
            raise OperandError(f"Landmarks has column {max(self.indices)}; the operator has {K.shape[0]} columns")
        pivots = torch.tensor(self.indices, dtype=torch.long, device=K.device)
        C = K.columns(pivots)
        S = wide(C)[pivots]
        chosen = greedy(S.diagonal().real, lambda at: S[:, at], len(pivots), K.dtype).pivots
        if len(chosen) < len(pivots):  # some depend on others: leave those out, and not all that come after them
            pivots, C = pivots[chosen], C[:, chosen]
        if noise is not None:
            return Selection(pivots, C, 0.0)
        F, kept = factor_of_columns(C, pivots)
        return Selection(kept, C[:, : len(kept)], float((K.diagonal().real - (F.abs() ** 2).sum(1)).clamp(min=0).sum()))


@dataclass(frozen=True)
class Nystrom(_Ranked):
    """The randomised Nyström approximation of K from a Gaussian sketch Ω (n, r) with orthonormal columns.

    F Fᴴ = Y (Ωᴴ Y)⁻¹ Yᴴ with Y = K Ω + ν Ω, ν = eps·‖K Ω‖ so that the Cholesky factorisation exists.

    Args:
        rank: columns of the sketch. None: :func:`default_rank`.
        seed: decides the sketch, drawn on the CPU in float64.

    For K that has no cheap columns, or whose rows are alike (pivots need r columns, this r products: n r and n² r
    evaluations for a kernel).

    Cost: r products with K in one block, O(n r²) arithmetic, 3 n r numbers.
    Gradient: sketch fixed; K through its pairing, and σ².
    Reference: Frangella, Tropp, Udell, Randomized Nyström preconditioning, 2023, Algorithm 2.1; here ν is not taken off
    again, and off the range of F the preconditioner is σ², not σ² plus the smallest eigenvalue of F Fᴴ.
    """

    seed: int = 0

    def build(self, A: LinearOperator, shift: Shift | None = None) -> LowRankPreconditioner:
        """The preconditioner of A + shift·I, as :meth:`PivotedCholesky.build`."""
        K, noise = split_noise(A)
        noise = add_shifts(noise, shift)
        n = K.shape[0]
        generator = torch.Generator().manual_seed(self.seed)
        omega = torch.randn(n, self.resolve(n), generator=generator, dtype=torch.float64, device="cpu")
        omega = torch.linalg.qr(omega).Q.to(device=K.device, dtype=torch.promote_types(K.dtype, torch.float64))
        with full_precision():
            Y = wide(K @ omega.to(K.dtype))
            nu = torch.finfo(K.dtype).eps * float(torch.linalg.matrix_norm(Y.detach()))
            Y = Y + nu * omega
            S = omega.mH @ Y
            L, order = torch.linalg.cholesky_ex((S + S.mH) / 2)
            if int(order) > 0:
                keep = int(order) - 1
                Y, L = Y[:, :keep], torch.linalg.cholesky((S + S.mH)[:keep, :keep] / 2)
            factor = torch.linalg.solve_triangular(L.mH, Y, upper=True, left=False)
        if noise is None and not n:
            noise = 1.0
        elif noise is None:
            diagonal = K.diagonal().detach().real.double()
            left = float((diagonal - (factor.detach().abs() ** 2).sum(1)).clamp(min=0).mean())
            noise = max(left, torch.finfo(K.dtype).eps * float(diagonal.mean()))
        return LowRankPreconditioner(factor, noise, K.dtype, own=True)


def _enough(rank: int | None, noise: Tensor | None) -> float:
    """The trace left over at which a rank of None stops: the noise, since R⁻¹ A R⁻ᴴ is then between 1 and 2.

    In units of the noise where it differs from row to row. A rank that was given is kept.
    """
    if rank is not None or noise is None or not noise.numel():
        return 0.0
    return float(noise[0]) if bool((noise == noise[0]).all()) else 1.0


__all__: Sequence[str] = ["Landmarks", "Nystrom", "PivotedCholesky", "RandomlyPivotedCholesky", "default_rank"]
