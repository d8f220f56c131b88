"""Terms of a shared Lanczos run: which function goes with which columns, and what the space says about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite
from ..operators.base import LinearOperator
from .composed import Shifted
from .scalar import ScalarFunction
from .space import HermitianSpace, combine


class Term(NamedTuple):
    """One function for some columns of the block; ``shifts`` (p,) asks for f(A + σI) at each σ."""

    f: ScalarFunction
    columns: slice
    shifts: Tensor | None = None


def shift_tensor(shifts: Any, A: LinearOperator) -> Tensor | None:
    """Shifts as a real tensor (p,) in double precision or as the caller has them."""
    if shifts is None:
        return None
    if not isinstance(shifts, Tensor):
        shifts = torch.as_tensor(shifts, dtype=torch.float64, device=A.device)
    if shifts.ndim != 1 or shifts.is_complex():
        raise OperandError(
            f"shifts has shape {tuple(shifts.shape)} and {shifts.dtype}; expected real numbers of shape (p,), as in "
            "torch.tensor([0.1, 1.0])"
        )
    check_finite(shifts.detach(), "shifts")
    return shifts


def shifted(term: Term) -> list[ScalarFunction]:
    """The term's functions, one for each shift."""
    if term.shifts is None:
        return [term.f]
    return [Shifted(term.f, float(s)) for s in term.shifts.detach()]


def form_values(term: Term, ritz: Tensor, weights: Tensor) -> Tensor:
    """Σ_i f(w_i) weights_i on the term's columns; real part (a real f of a Hermitian operator has real forms)."""
    w, g = ritz[term.columns], weights[term.columns]
    rows = [(f(w) * g).sum(1) for f in shifted(term)]
    return rows[0] if term.shifts is None else torch.stack(rows)


def term_cotangents(
    terms: Sequence[Term], cotangents: Sequence[Tensor | None], m: int
) -> list[tuple[ScalarFunction, Tensor]]:
    """(f, g) pairs with g spread over all m columns, for the cotangents of the terms' values."""
    out = []
    for term, bar in zip(terms, cotangents, strict=True):
        if bar is None:
            continue
        rows = bar.double().unsqueeze(0) if term.shifts is None else bar.double()
        for f, row in zip(shifted(term), rows, strict=True):
            g = torch.zeros(m, dtype=torch.float64, device=row.device)
            g[term.columns] = row
            out.append((f, g))
    return out


def form_input_gradients(
    space: HermitianSpace, terms: Sequence[Term], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Cotangents of V and of every term's shifts: 2 f(A)v and Σ f'(w) weights, read off the space."""
    m = space.ritz.shape[0]
    pairs = term_cotangents(terms, cotangents, m)
    c = torch.zeros_like(space.ritz)
    for f, g in pairs:
        c = c + g.unsqueeze(1) * torch.where(g.unsqueeze(1) == 0, torch.zeros_like(c), f(space.ritz))
    c = (space.vectors @ (2 * c * space.first).unsqueeze(2)).squeeze(2)
    out: list[Tensor | None] = [combine(space.basis, c)]
    weights = space.first.square()
    for term, bar in zip(terms, cotangents, strict=True):
        if term.shifts is None:
            continue
        w, g = space.ritz[term.columns], weights[term.columns]
        slopes = torch.stack([(f.derivative(w) * g).sum(1) for f in shifted(term)])
        out.append(None if bar is None else (slopes * bar.double()).sum(1))
    return out


def overlap(terms: Sequence[Term], m: int) -> bool:
    """Whether two terms read the same column."""
    used = [j for t in terms for j in range(m)[t.columns]]
    return len(used) != len(set(used))


def applied(space: HermitianSpace, terms: Sequence[Term]) -> Tensor:
    """f(A)v for every column, each with its term's function, (n, m)."""
    c = torch.zeros_like(space.ritz)
    for term in terms:
        c[term.columns] = term.f(space.ritz[term.columns])
    return combine(space.basis, (space.vectors @ (c * space.first).unsqueeze(2)).squeeze(2))
