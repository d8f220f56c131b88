"""Divided differences f[a, b] of a function given only by its values, accurate on near-ties.

f[a, b] = (f(a) − f(b))/(a − b), and f'(a) where a = b. The quotient loses digits as a and b approach each other; the
integral form f[a, b] = ∫₀¹ f'(b + s(a − b)) ds by Gauss–Legendre quadrature, with f' from autograd, loses them where
f is not smooth between a and b. Both come with an error estimate, and the smaller one wins, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import DomainError
from ..numerics import in_transform

Function = Callable[[Tensor], Tensor]

_RULES = {nodes: np.polynomial.legendre.leggauss(nodes) for nodes in (12, 16)}


def derivative(f: Function, x: Tensor) -> Tensor:
    """f'(x) elementwise by autograd; complex x is differentiated as for a holomorphic f."""
    if in_transform():  # requires_grad_ is refused there
        with torch.enable_grad():
            y = f(x)
            if y.is_complex() and not x.is_complex():
                parts = [torch.func.grad(lambda z, p=p: getattr(f(z), p).sum())(x) for p in ("real", "imag")]
                return torch.complex(*parts)
            return torch.func.grad(lambda z: f(z).real.sum())(x).conj().resolve_conj()
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        try:
            y = f(point)
        except (RuntimeError, TypeError) as error:
            raise DomainError(_NOT_DIFFERENTIABLE.format(f"it raised {type(error).__name__}: {error}")) from error
        if not y.requires_grad:
            if _piecewise_constant(f, x.detach(), y):
                return torch.zeros_like(y)
            raise DomainError(_NOT_DIFFERENTIABLE.format("its result does not depend on its argument for autograd"))
        if y.is_complex() and not point.is_complex():
            real, imag = _gradient(y.real, point), _gradient(y.imag, point)
            return torch.complex(real, imag)
        g = _gradient(y.real, point)  # complex x: the gradient of Re f is conj(f')
    return g.conj().resolve_conj() if g.is_complex() else g


_NOT_DIFFERENTIABLE = (
    "the derivative of the callable f is needed, and autograd could not give it ({}); write f in torch operations, or "
    "take a named function from ritz.functions"
)


def _piecewise_constant(f: Function, x: Tensor, y: Tensor) -> bool:
    """Whether f does not change near most of the points: a constant or a step, nothing hidden from autograd."""
    if not x.numel():
        return True
    h = 1e-6 * (x.abs() + x.abs().amax() + torch.finfo(x.dtype).tiny)
    same = (f(x + h) == y) & (f(x - h) == y)
    return float(same.double().mean()) > 0.5


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


def divided_difference(f: Function, a: Tensor, b: Tensor) -> Tensor:
    """f[a, b] for tensors a and b of one (broadcast) shape; relative accuracy about 1e-13 on near-ties."""
    a, b = torch.broadcast_tensors(a, b)
    fa, fb = f(a), f(b)
    gap = a - b
    difference, size = fa - fb, fa.abs() + fb.abs()
    # What cancels is f(a) − f(b), whether or not a and b are close relative to themselves (they are not around zero).
    near = (8 * difference.abs() < size) | (gap == 0)
    quotient = difference / torch.where(gap == 0, torch.ones_like(gap), gap)
    if not bool(near.any()):
        return quotient
    eps = torch.finfo(a.dtype).eps
    x, y = a[near], b[near]
    fine, magnitude = _integral(f, x, y, 16)
    coarse, _ = _integral(f, x, y, 12)
    integral_error = (fine - coarse).abs() + 4 * eps * magnitude
    # Both errors times the gap, which may be too small to divide by.
    better = (integral_error * (x - y).abs() < eps * size[near]) | (x == y)
    out = quotient.clone()
    out[near] = torch.where(better, fine, quotient[near])
    return out


def _integral(f: Function, a: Tensor, b: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """∫₀¹ f'(b + s(a − b)) ds by Gauss–Legendre quadrature, and the same of |f'|."""
    points, weights = _RULES[nodes]
    s = torch.as_tensor(0.5 * (points + 1), dtype=a.real.dtype, device=a.device)
    w = torch.as_tensor(0.5 * weights, dtype=a.real.dtype, device=a.device)
    slopes = derivative(f, b + s.unsqueeze(1) * (a - b))
    return (w.unsqueeze(1) * slopes).sum(0), (w.unsqueeze(1) * slopes.abs()).sum(0)
