"""Points with repetitions, kernels by plain formulas, and a check of torch.func, for the tests of kernel operators."""

import math

import mpmath
import torch

import ritz
from ritz import functions
from ritz.kernels import RBF, Linear, Matern, Periodic, Polynomial, RationalQuadratic, Scale


def points(n, d=3, dtype=torch.float64, seed=0, repeat=True):
    X = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if repeat:
        X[n // 2] = X[1]
        X[n - 1] = X[1]
    return X


def direct(kernel, X, Z):
    """k(x, z) from differences and inner products, without any of the library's numerics."""
    if hasattr(kernel, "kernels"):
        parts = torch.stack([direct(k, X, Z) for k in kernel.kernels])
        return parts.prod(0) if type(kernel).__name__ == "ProductKernel" else parts.sum(0)
    if isinstance(kernel, Scale):
        return kernel.outputscale * direct(kernel.base_kernel, X, Z)
    if kernel.active_dims is not None:
        X, Z = X[:, kernel.active_dims], Z[:, kernel.active_dims]
    if isinstance(kernel, Linear):
        return torch.einsum("ia,ja,a->ij", X, Z, kernel.variance.expand(1, X.shape[1])[0])
    if isinstance(kernel, Polynomial):
        return (torch.einsum("ia,ja->ij", X, Z) + kernel.offset) ** kernel.power
    difference = X[:, None] - Z[None]
    if isinstance(kernel, Periodic):
        sine = torch.sin(math.pi * difference / kernel.period_length)
        return torch.exp(-2 * (sine.square() / kernel.lengthscale).sum(2))
    r2 = (difference / kernel.lengthscale).square().sum(2)
    if isinstance(kernel, RBF):
        return torch.exp(-r2 / 2)
    if isinstance(kernel, RationalQuadratic):
        return (1 + r2 / (2 * kernel.alpha)) ** -kernel.alpha
    assert isinstance(kernel, Matern)
    if kernel.nu in (0.5, 1.5, 2.5):
        a = (2 * kernel.nu * r2).sqrt()
        return {0.5: 1 + 0 * a, 1.5: 1 + a, 2.5: 1 + a + a * a / 3}[kernel.nu] * torch.exp(-a)
    flat = []
    for v in r2.detach().flatten().tolist():
        nu = mpmath.mpf(kernel.nu)
        a = mpmath.sqrt(2 * nu * v)
        flat.append(float(2 ** (1 - nu) / mpmath.gamma(nu) * a**nu * mpmath.besselk(nu, a)) if v else 1.0)
    return torch.tensor(flat, dtype=r2.dtype).reshape(r2.shape)


def check_under_torch_func(kernel, X):
    """torch.func.grad of a Krylov quadratic form, in parameters and points, against a plain backward pass."""
    v = torch.linspace(0, 1, len(X), dtype=torch.float64)
    parameters = dict(kernel.named_parameters())

    def fn(parameters, X):
        K = torch.func.functional_call(kernel, parameters, (X,))
        return ritz.quadratic_form(functions.log, K.shift(0.1), v, method=ritz.Lanczos(len(X)))

    a, b = torch.func.grad(fn, argnums=(0, 1))(parameters, X)
    X = X.clone().requires_grad_(True)
    want = torch.autograd.grad(fn(parameters, X), [*parameters.values(), X])
    for x, y in zip([*a.values(), b], want):
        torch.testing.assert_close(x, y.detach(), rtol=1e-8, atol=1e-10)
