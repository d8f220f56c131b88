"""Small regression problems and the textbook formulas they are checked against."""

import math

import torch

from ritz.gp import ExactGP
from ritz.kernels import Matern, Scale


def data(n=60, d=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, dtype=torch.float64, generator=g)
    y = torch.sin(X.sum(1)) + 0.1 * torch.randn(n, dtype=torch.float64, generator=g)
    return X.to(dtype), y.to(dtype)


def process(d=3, dtype=torch.float64, noise=0.05, **options):
    gp = ExactGP(Scale(Matern(1.5, d, lengthscale=1.3), 1.7), noise=noise, **options).to(dtype)
    if hasattr(gp.mean, "constant"):
        with torch.no_grad():
            gp.mean.constant.fill_(0.3)
    return gp


def textbook(gp, X, y):
    """log N(y; m, K + σ² I) with the matrix written out from differences."""
    base = gp.kernel.base_kernel
    a = (3 * ((X[:, None] - X[None]) / base.lengthscale).square().sum(2) + 1e-300).sqrt()
    K = gp.kernel.outputscale * (1 + a) * torch.exp(-a) + gp.noise * torch.eye(len(y), dtype=X.dtype)
    r = y - gp.mean.constant
    return -0.5 * (r @ torch.linalg.solve(K, r) + torch.logdet(K) + len(y) * math.log(2 * math.pi))
