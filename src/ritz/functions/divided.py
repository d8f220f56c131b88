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

Function = Callable[[Tensor], Tensor]


def derivative(f: Function, x: Tensor) -> Tensor:
    """f'(x) elementwise by autograd; complex x is differentiated as for a holomorphic f."""
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        y = f(point)
        if not y.requires_grad:
            if bool((y == y.flatten()[0]).all()) if y.numel() else True:
                return torch.zeros_like(y)  # a constant
            raise DomainError("the function's derivative is needed, and autograd cannot differentiate the callable")
        if y.is_complex() and not point.is_complex():
            real, imag = _gradient(y.real, point), _gradient(y.imag, point)
            return torch.complex(real, imag)
        g = _gradient(y.real, point)  # complex x: the gradient of Re f is conj(f')
    return g.conj().resolve_conj() if g.is_complex() else g


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
    scale = torch.maximum(a.abs(), b.abs())
    near = gap.abs() <= 0.5 * scale
    quotient = (fa - fb) / torch.where(gap == 0, torch.ones_like(gap), gap)
    if not bool(near.any()):
        return quotient
    eps = torch.finfo(a.dtype).eps
    quotient_error = eps * (fa.abs() + fb.abs()) / torch.where(gap == 0, torch.full_like(gap.abs(), 1e-300), gap.abs())
    x, y = a[near], b[near]
    fine, coarse = _integral(f, x, y, 16), _integral(f, x, y, 12)
    integral_error = (fine - coarse).abs() + 4 * eps * fine.abs()
    better = (integral_error < quotient_error[near]) | (x == y)
    out = quotient.clone()
    out[near] = torch.where(better, fine, quotient[near])
    return out


def _integral(f: Function, a: Tensor, b: Tensor, nodes: int) -> Tensor:
    """∫₀¹ f'(b + s(a − b)) ds by Gauss–Legendre quadrature."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    s = torch.as_tensor(0.5 * (points + 1), dtype=a.real.dtype, device=a.device)
    w = torch.as_tensor(0.5 * weights, dtype=a.real.dtype, device=a.device)
    slopes = derivative(f, b + s.unsqueeze(1) * (a - b))
    return (w.unsqueeze(1) * slopes).sum(0)
