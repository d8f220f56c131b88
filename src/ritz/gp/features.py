"""Random Fourier features: functions with a kernel's covariance as sums of cosines of random frequencies.

A stationary kernel is the expectation of s·cos(ωᵀ(x − z)) over its spectral density. With m draws of ω and w ~ N(0, I),

    f(x) = √(s/m) Σ_j (w_j cos ω_jᵀx + w_{m+j} sin ω_jᵀx)

has the covariance (s/m) Σ_j cos ω_jᵀ(x − z) given the frequencies: that of the kernel on average over them, and for
x = z always. A correlation k(δ) is off by √(½(1 + k(2δ)) − k(δ)²)/√m in standard error. That is at most 1/√(2m) where
k(2δ) ≤ k(δ)² (RBF, Matérn and their products), and 0.75/√m for any other kernel that decreases.

Spectral densities: RBF N(0, ℓ⁻²); Matérn Student's t with 2ν degrees of freedom, scaled by 1/ℓ; rational quadratic
√g·N(0, ℓ⁻²) with g ~ Gamma(α)/α. Frequencies of a product of kernels are sums of theirs; the terms of a sum of kernels
have features each.

Reference: Rahimi, Recht, Random features for large-scale kernel machines, 2007.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import OperandError
from ..kernels import RBF, AdditiveKernel, Kernel, Matern, ProductKernel, RationalQuadratic, Scale

Term = tuple[Tensor, Tensor]  # variance s, a float64 scalar, and frequencies (d, m) in float64


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Φ (b, width) with E[Φ(x) Φ(z)ᵀ] = k(x, z), differentiable in the points.

    Phases are made in float64: frequencies of rough kernels are large, and a phase is wanted modulo 2π.
    """

    origin: Tensor
    terms: tuple[Term, ...]

    @property
    def width(self) -> int:
        """Columns of Φ: a cosine and a sine for every frequency."""
        return sum(2 * omega.shape[1] for _, omega in self.terms)

    def __call__(self, X: Tensor) -> Tensor:
        """Φ(X) (b, width) in the dtype of X, for points (b, d)."""
        parts = []
        for s, omega in self.terms:
            phase = ((X.double() - self.origin) @ omega).remainder(2 * math.pi).to(X.dtype)
            scale = (s / max(omega.shape[1], 1)).sqrt().to(X.dtype)
            parts += [scale * phase.cos(), scale * phase.sin()]
        return torch.cat(parts, 1)


def draw(kernel: Kernel, origin: Tensor, m: int, generator: torch.Generator) -> FeatureMap:
    """m frequencies for every term of a kernel on points near ``origin`` (d,).

    Raises:
        OperandError: a kernel whose spectral density is not known.
    """
    bits = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    terms = _terms(kernel, origin.shape[0], m, np.random.default_rng(bits))
    return FeatureMap(origin.double(), tuple((s.double(), omega.to(origin.device)) for s, omega in terms))


def has_features(kernel: Kernel) -> bool:
    """Whether :func:`draw` knows the spectral density of a kernel."""
    if isinstance(kernel, Scale):
        return has_features(kernel.base_kernel)
    if isinstance(kernel, (AdditiveKernel, ProductKernel)):
        return all(has_features(k) for k in kernel.parts())
    return isinstance(kernel, (RBF, Matern, RationalQuadratic))


def _terms(kernel: Kernel, d: int, m: int, rng: np.random.Generator) -> list[Term]:
    """(variance, frequencies) of the terms that a kernel is the sum of."""
    if isinstance(kernel, Scale):
        return [(kernel.outputscale.detach() * s, omega) for s, omega in _terms(kernel.base_kernel, d, m, rng)]
    if isinstance(kernel, AdditiveKernel):
        return [term for k in kernel.parts() for term in _terms(k, d, m, rng)]
    if isinstance(kernel, ProductKernel):
        first, *rest = (_terms(k, d, m, rng) for k in kernel.parts())
        for others in rest:
            first = [(s * t, omega + eta) for s, omega in first for t, eta in others]
        return first
    if not isinstance(kernel, (RBF, Matern, RationalQuadratic)):
        raise OperandError(
            f"the spectral density of {type(kernel).__name__} is not known, so that it has no random features: use "
            "method=Exact() for few points, SquareRoot() for many"
        )
    ell = kernel.lengthscale.detach().double()
    active = list(range(d)) if kernel.active_dims is None else kernel.active_dims.tolist()
    z = rng.standard_normal((len(active), m))
    if isinstance(kernel, Matern):
        nu = float(kernel.nu)
        z = z / np.sqrt(rng.standard_gamma(nu, m) / nu)  # χ² with 2ν degrees of freedom, over 2ν
    elif isinstance(kernel, RationalQuadratic):
        alpha = float(kernel.alpha.detach())
        z = z * np.sqrt(rng.standard_gamma(alpha, m) / alpha)
    omega = torch.zeros(d, m, dtype=torch.float64, device=ell.device)
    omega[active] = torch.from_numpy(z).to(ell.device) / ell.mT
    return [(torch.ones((), dtype=torch.float64, device=ell.device), omega)]
