"""One update of a pair of factors by products alone: directions, the size of a step, the step, the start.

The algorithm of SINGD as pure functions of tensors in flat storage, with K and C as a pair (side 0, side 1) and a batch
axis in front where several layers of equal shape go together. Formulas: :class:`~ritz.optim.SINGD`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OperandError
from ..operators.structured import Structure
from ..operators.structured.products import fixed_vector

Pair = Sequence[Tensor]


@dataclass(frozen=True)
class LargestEntry:
    """max |m_ij|, the authors' measure. It bounds the change of an entry: ‖m‖₂ can be up to d times larger."""

    def __call__(self, structure: Structure, m: Tensor, d: int) -> Tensor:
        """The size of m, (..., 1)."""
        return m.abs().amax(-1, keepdim=True)


@dataclass(frozen=True)
class SpectralNorm:
    """‖m‖₂ by steps of the power method, from a fixed vector: a lower bound.

    As far as that estimate is right, I − β₁ m stays positive definite for a symmetric m (dense and diagonal factors)
    and every lr_cov below 1, however wide and correlated the inputs are; for the other structures it is a measure of
    the same kind without that guarantee. Costs 2 · ``iterations`` + 1 products with a vector.
    """

    iterations: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise OperandError(f"SpectralNorm({self.iterations!r}); expected a whole number of steps, at least 1")

    def __call__(self, structure: Structure, m: Tensor, d: int) -> Tensor:
        """The size of m, (..., 1)."""
        v = fixed_vector(d, m).unsqueeze(-1).expand(m.shape[:-1] + (d, 1))
        for _ in range(self.iterations):
            v = structure.rmatmul(m, structure.matmul(m, _unit(v)))
        return torch.linalg.vector_norm(structure.matmul(m, _unit(v)), dim=-2)


def _unit(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)


def means(structures: Sequence[Structure], M: Pair, d: Sequence[int]) -> list[Tensor]:
    """Average diagonal entries of both sides, (..., 1)."""
    return [(S.trace(x, n) / n).unsqueeze(-1) for S, x, n in zip(structures, M, d)]


def directions(
    structures: Sequence[Structure], d: Sequence[int], F: Pair, H: Pair, damping: float, adaptive: bool
) -> list[Tensor]:
    """D_K and D_C, from the factors and the whitened statistics H_K = Π(Kᵀ A K), H_C = Π(Cᵀ B C)."""
    gram = [S.gram(K, n) for S, K, n in zip(structures, F, d)]
    found = []
    for side, S in enumerate(structures):
        D = H[side] + damping * gram[side]
        if adaptive:  # the average traces of the other factor
            curvature, damped = means(structures, H, d)[1 - side], means(structures, gram, d)[1 - side] * damping
            D = curvature * H[side] + damped * gram[side]
        found.append(D - S.identity(d[side], dtype=D.dtype, device=D.device))
    return found


def multiplicative_step(
    structure: Structure,
    K: Tensor,
    m: Tensor,
    d: int,
    rate: float,
    size: LargestEntry | SpectralNorm | None,
    second_order: bool,
) -> Tensor:
    """K (I − βm), or K (I − βm + (βm)²/2), with β the rate divided by the size of m where that exceeds 1."""
    beta = rate if size is None else rate / size(structure, m, d).clamp(min=1.0)
    m = beta * m
    change = structure.multiply(K, m, d)
    return K - change + (structure.multiply(change, m, d) / 2 if second_order else 0.0)


def first_scale(
    structures: Sequence[Structure], d: Sequence[int], H: Pair, damping: float, adaptive: bool
) -> tuple[list[Tensor], Tensor]:
    """Squared scales s², (..., 1), at which K = C = sI whiten the first statistics on average; and where that is so.

    s⁴ (ā b̄ + λ) = 1, the fixed point of both updates; without ``adaptive`` k² (ā + λ) = 1 and c² (b̄ + λ) = 1. A layer
    that no gradient has reached yet (as behind an output layer of zeros) keeps s = 1 and False, for a later attempt.
    """
    a, b = means(structures, H, d)
    reached = a * b > 0
    squares = [(a * b + damping).rsqrt()] * 2 if adaptive else [1 / (a + damping), 1 / (b + damping)]
    return [torch.where(reached, s, torch.ones_like(s)) for s in squares], reached
