"""Class probabilities of a softmax with Gaussian logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import OperandError


def probit(f: Tensor, variance: Tensor) -> Tensor:
    """softmax(f / √(1 + π σ²/8)) with the marginal variances; f (n, C), variance (n, C, C).

    Reference: MacKay, "The evidence framework applied to classification networks" (1992).
    """
    marginal = variance.diagonal(dim1=-2, dim2=-1)
    return torch.softmax(f / (1.0 + torch.pi / 8 * marginal).sqrt(), -1)


def bridge(f: Tensor, variance: Tensor) -> Tensor:
    """The mean of the Dirichlet distribution that the Laplace bridge maps the Gaussian to.

    Logits are only known up to a constant: mean and covariance are conditioned on a zero sum first.

    Reference: Hobbhahn, Kristiadi, Hennig, "Fast predictive uncertainty for classification with Bayesian deep networks"
    (2022).
    """
    C, tiny = f.shape[-1], torch.finfo(f.dtype).tiny
    to_sum = variance.sum(-1)
    whole = to_sum.sum(-1, keepdim=True).clamp(min=tiny)
    f = f - to_sum * f.sum(-1, keepdim=True) / whole
    marginal = (variance.diagonal(dim1=-2, dim2=-1) - to_sum.square() / whole).clamp(min=tiny)
    # Logarithms of α_c = (1 − 2/C + e^{f_c} Σ e^{−f} / C²) / σ_c², since exponentials of confident logits overflow.
    large = f + torch.logsumexp(-f, -1, keepdim=True) - 2 * math.log(C)
    constant = torch.full_like(f, -math.inf if C == 2 else math.log(1.0 - 2.0 / C))
    return torch.softmax(torch.logaddexp(constant, large) - marginal.log(), -1)


def monte_carlo(f: Tensor, variance: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """The mean softmax over Gaussian draws of the logits."""
    eigenvalues, Q = torch.linalg.eigh(variance.double())
    root = Q * eigenvalues.clamp(min=0.0).sqrt().unsqueeze(-2)
    z = torch.randn(samples, *f.shape, generator=generator, dtype=torch.float64).to(f.device)
    draws = f.double() + torch.einsum("ncd,snd->snc", root, z)
    return torch.softmax(draws, -1).mean(0).to(f.dtype)


def probabilities(link: str, f: Tensor, variance: Tensor, samples: int, seed: int) -> Tensor:
    """Class probabilities of f's shape (…, C) by the named approximation; variance (…, C, C)."""
    shape, C = f.shape, f.shape[-1]
    return _flat(link, f.reshape(-1, C), variance.reshape(-1, C, C), samples, seed).reshape(shape)


def _flat(link: str, f: Tensor, variance: Tensor, samples: int, seed: int) -> Tensor:
    if link == "probit":
        return probit(f, variance)
    if link == "bridge":
        return bridge(f, variance)
    if link == "mc":
        return monte_carlo(f, variance, samples, torch.Generator().manual_seed(seed))
    raise OperandError(f"link={link!r}; expected 'probit', 'mc' or 'bridge'")
