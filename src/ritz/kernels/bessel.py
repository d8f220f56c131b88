"""The modified Bessel function K_ν in log scale, by a quadrature that converges geometrically.

K_ν(x) = ½ ∫ exp(−x cosh s + νs) ds over the real line (DLMF 10.32.9). The exponent is concave. About its top,
s = asinh(ν/x) + v, with ρ = √(x² + ν²) and δ = ρ − ν = x²/(ρ + ν),

    K_ν(x) = ½ ((ν + ρ)/x)^ν e^{−ρ} I,        I = ∫ exp(−δ (cosh v − 1) − ν (eᵛ − 1 − v)) dv,

where nothing overflows or cancels: x^ν K_ν(x) comes out of it smoothly down to x = 0. The integrand is analytic for
|Im v| < π/2, so that the trapezoidal rule converges like exp(−π²/h), and like exp(−2π²/(ρh²)) where it is narrow:
Trefethen and Weideman, SIAM Review 56 (2014), 385–458.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError

DEPTH = 42.0  # the range ends where the integrand is e⁻⁴² = 6e-19 of its top
CHUNK = 2048  # points at a time; they take up to 400 nodes each, 7 MB


def log_bessel_k(nu: float, x: Tensor) -> Tensor:
    """log K_ν(x), elementwise.

    Args:
        nu: the order, any real number (K_{−ν} = K_ν).
        x: positive numbers; floating point.

    Returns:
        A tensor like x; the work is done in float64, in temporaries of 7 MB. For x from 1e-12 to 1e4 and |ν| ≤ 50 it is
        within 1e-15·(100 + |log K_ν|) of the truth.

    Gradient: to any order, by K_ν' = −(K_{ν−1} + K_{ν+1})/2.

    Raises:
        OperandError: x that is not of floating point or has entries that are not positive, ν that is not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise OperandError(f"x is {getattr(x, 'dtype', type(x).__name__)}; expected a floating-point tensor")
    if not math.isfinite(nu):
        raise OperandError(f"nu={nu}; expected a finite order")
    out: Tensor = _LogBesselK.apply(x, float(nu))
    return out


def log_power_bessel_k(nu: float, t: Tensor) -> Tensor:
    """log(a^ν K_ν(a)) for t = a² ≥ 0, in float64 and without a graph; any real ν, finite at t = 0 for ν > 0."""
    t, mu = t.detach().double(), abs(nu)
    rho = (t + mu * mu).sqrt()
    out = mu * (mu + rho).log() - rho + _log_integral(mu, t / (rho + mu)) - math.log(2)
    return out if nu >= 0 else out - mu * t.log()


def _log_integral(nu: float, delta: Tensor) -> Tensor:
    """log I for ν ≥ 0 and float64 δ ≥ 0 of any shape."""
    flat = delta.reshape(-1)
    # Ends of the range: −exponent ≥ (δ/2 + ν)(eʷ − 1 − w) to the right, ≥ δ/2 (eʷ − 1 − w) and ν (e⁻ʷ − 1 + w) to the
    # left, which exceed DEPTH from these w on.
    right = _reach(DEPTH / (flat / 2 + nu))
    left = _reach(2 * DEPTH / flat)
    if nu > 0:
        left = left.clamp(max=DEPTH / nu + math.sqrt(2 * DEPTH / nu))
    # h = 2π/(28 + 10√ρ) makes the error of the rule less than 1e-16 of I; a chunk takes the nodes of its worst point
    nodes = (left + right) * (28 + 10 * (flat + nu).sqrt()) / (2 * math.pi)
    out = torch.empty_like(flat)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        count = int(nodes[part].max()) + 2
        u = torch.linspace(0, 1, count, dtype=torch.float64, device=flat.device)
        width = (left + right)[part, None]
        v = torch.addcmul(-left[part, None], width, u)
        exponent = torch.expm1(v).sub_(v).mul_(-nu)
        # cosh v − 1 = 2 sinh²(v/2)
        exponent.sub_(v.mul_(0.5).sinh_().square_().mul_(2 * flat[part, None]))
        out[part] = (exponent.exp_().sum(1) * (width[:, 0] / (count - 1))).log()
    return out.reshape(delta.shape)


def _reach(B: Tensor) -> Tensor:
    """A w with eʷ − 1 − w ≥ B: w = log(1 + B + w) and w ≤ √(2B)."""
    return torch.log1p(B + (2 * B).sqrt())


class _LogBesselK(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, nu: float) -> Tensor:
        # here and not in log_bessel_k, where x may stand for a batch
        bad = ~(x.detach() > 0)
        if bool(bad.any()):
            raise OperandError(
                f"x has {int(bad.sum())} entries that are NaN or not positive, the first is {float(x[bad][0]):.3g}; "
                "log K_ν needs x > 0"
            )
        # a^ν K_ν(a) is finite down to a = 0
        a, mu = x.detach().double(), abs(nu)
        return (log_power_bessel_k(mu, a.square()) - mu * a.log()).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.nu = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, nu: float) -> tuple[Any, Any]:
        return _LogBesselK.apply(x, nu), in_dims[0]

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return G * _slope(x, ctx.nu), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return dx * _slope(x, ctx.nu)


def _slope(x: Tensor, nu: float) -> Tensor:
    """d log K_ν/dx, itself differentiable."""
    middle = log_bessel_k(nu, x)
    lower, upper = (torch.exp(log_bessel_k(nu + step, x) - middle) for step in (-1, 1))
    return -0.5 * (lower + upper)
