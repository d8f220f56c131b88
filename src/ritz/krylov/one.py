"""The Lanczos and Arnoldi loops of a single vector on the CPU, where every call from Python is felt.

The same recurrences and the same numbers as the general loop, up to the order of a sum: half as many tensor operations,
scalars as Python numbers. A step on n = 16 384 is a few products' worth of overhead otherwise. A complex vector is a
real one of twice the length to Lanczos: the recurrence has real coefficients, and Re xᴴy is the dot product of the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .adjoint import Product
from .orthogonalize import SHORT, safe_norms
from .progress import BREAKDOWN, bad_start, not_finite


class Steps(NamedTuple):
    """What a loop found: the last residual (n,), and a number α and β for every step; β is zero where it broke down."""

    residual: Tensor
    alpha: list[float]
    beta: list[float]


def negligible(dtype: torch.dtype) -> float:
    """Relative to ‖A‖: a residual that counts as zero."""
    return BREAKDOWN * torch.finfo(dtype).eps


def fits(V: Tensor, reorthogonalize: bool) -> bool:
    """Whether V is what this loop is for."""
    known = V.dtype in (torch.float32, torch.float64) or V.is_complex() and not reorthogonalize
    return V.shape[1] == 1 and V.device.type == "cpu" and known


def as_real(x: Tensor) -> Tensor:
    """Vectors along the last axis as real ones, in the same memory."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def on_real(matmat: Product, dtype: torch.dtype) -> Product:
    """The product with a column, on its real form."""
    if not dtype.is_complex:
        return matmat

    def product(x: Tensor) -> Tensor:
        return as_real(matmat(torch.view_as_complex(x.view(-1, 2)).unsqueeze(1)).squeeze(1)).unsqueeze(1)

    return product


def lanczos_steps(
    matmat: Product, Q: Tensor, first: int, w: Tensor, length: float, largest: float, *, reorthogonalize: bool
) -> Steps:
    """Fill Q (k, n) from row ``first`` on; ``w`` is the residual before, of norm ``length``, and ‖A‖ ≥ ``largest``."""
    rows, tol = Q.unbind(0), negligible(Q.dtype)
    alpha: list[float] = []
    beta: list[float] = []
    for j in range(first, Q.shape[0]):
        if not length > 0:
            break
        q = rows[j]
        torch.div(w, length, out=q)
        w = matmat(q.unsqueeze(1)).squeeze(1)
        w = torch.sub(w, rows[j - 1], alpha=length) if j else w.clone()
        a = torch.dot(q, w).item()
        w.sub_(q, alpha=a)
        if reorthogonalize:  # the second pass of "twice is enough": the recurrence was the first
            basis = Q[: j + 1]
            c = torch.mv(basis, w)
            w.addmv_(basis.t(), c, alpha=-1)
            a += c[j].item()
        b = norm(w)
        if not math.isfinite(a + b):
            raise not_finite(j + 1)
        largest = max(largest, abs(a) + b)
        length = b if b > tol * largest else 0.0
        alpha.append(a)
        beta.append(length)
    return Steps(w, alpha, beta)


def arnoldi_steps(
    matmat: Product, Q: Tensor, H: Tensor, first: int, w: Tensor, length: float, largest: float, *, passes: int
) -> tuple[Tensor, int, float]:
    """Fill Q (k, n) from row ``first`` on and H (k, k); arguments as for Lanczos, ``passes`` of Gram–Schmidt.

    Returns the last residual, the number of steps, and the residual's norm, zero where the iteration broke down.
    """
    rows, tol, k = Q.unbind(0), negligible(Q.dtype), Q.shape[0]
    j = first
    while j < k and length > 0:
        q, basis = rows[j], Q[: j + 1]
        torch.div(w, length, out=q)
        w = matmat(q.unsqueeze(1)).squeeze(1)
        c = torch.mv(basis, w)
        w = torch.addmv(w, basis.t(), c, alpha=-1)
        for _ in range(passes - 1):
            more = torch.mv(basis, w)
            w.addmv_(basis.t(), more, alpha=-1)
            c += more
        H[: j + 1, j] = c
        size, b = norm(c), norm(w)
        if not math.isfinite(size + b):
            raise not_finite(j + 1)
        largest = max(largest, size + b)
        length = b if b > tol * largest else 0.0
        j += 1
        if j < k:
            H[j, j - 1] = length
    return w, j - first, length


def norm(w: Tensor) -> float:
    """‖w‖; by one dot product where squares neither over- nor underflow and float32 sums them well."""
    if w.dtype == torch.float64 or w.shape[0] <= SHORT:
        square = torch.dot(w, w).item()
        if 1e-25 < square < 1e25:
            return math.sqrt(square)
    return torch.linalg.vector_norm(w, dtype=torch.float64).item()


def start_norm(w: Tensor) -> float:
    """‖w‖ of a starting vector, without over- or underflow; raises where it is not a number of its precision."""
    length = norm(w)
    if not 1e-120 < length < 1e120:
        length = safe_norms(w.unsqueeze(0)).item()
    if not length <= torch.finfo(w.dtype).max:
        raise bad_start()
    return length
