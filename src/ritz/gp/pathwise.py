"""Samples of a posterior by pathwise conditioning: prior samples, corrected by one solve.

Matheron's rule: with a sample f of the prior (of mean m) and one ε of the noise,

    f + K(·, X) K̂⁻¹ (y − f(X) − ε)

is a sample of the posterior, as a function. It is linear in f, so that its error is that of the prior sample and of the
solve; all samples are right-hand sides of one solve. Reference: Wilson, Borovitskiy, Terenin, Mostowsky, Deisenroth,
Efficiently sampling functions from Gaussian process posteriors, 2020; Pathwise conditioning of Gaussian processes,
2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions import funm_multiply
from ..methods import Auto, Lanczos
from ..numerics import full_precision
from ..result import Info
from . import features, means
from .blocks import block_rows, in_blocks
from .features import FeatureMap

if TYPE_CHECKING:
    from .posterior import Posterior

EXACT_UP_TO = 1000  # points that Auto() samples through their covariance matrix
ROOT_BYTES = 256 * 2**20  # of the Krylov bases of square roots that are held at a time
CHECKED = 256  # observations whose covariance under the features is compared with the kernel


@dataclass(frozen=True)
class Exact:
    """Samples mean + S z with S Sᵀ the posterior covariance of the points; no approximation.

    S is the Cholesky factor, or where that breaks down (repeated points) the symmetric root with negative eigenvalues,
    which are rounding, set to 0: ``info.details["clipped"]`` is the largest of them, relative to the largest of all.

    Cost: that of ``posterior.covariance``, and n*³/3 (9 n*³ for the symmetric root) in float64.
    """


@dataclass(frozen=True)
class Features:
    """Prior samples from m random Fourier features, 2m weights each, for each term of a sum of kernels.

    All samples share the frequencies. Given them, samples are Gaussian with exactly the posterior's mean, and with the
    covariance that follows from that of the features in the place of the prior's. Its correlations are off by at most
    1/√(2m) in standard error, 0.016 for m = 2048 (:mod:`ritz.gp.features` has the formula); away from data, where the
    posterior is the prior, so are those of the samples. More samples do not lower that error, more features do.

    ``info.details``: ``features``, 2m for each term of a sum; ``prior_error``, the root mean square error of the prior
    covariances of up to 256 observations as measured, relative to the variance; ``prior_bound``, 1/√(2m).

    Cost: n·2m operations a sample, and one solve for all; then n* (2m + n) a sample.
    """

    m: int = 2048

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or self.m < 1:
            raise OperandError(f"Features(m={self.m!r}); expected a whole number of frequencies, at least one")


@dataclass(frozen=True)
class SquareRoot:
    """Prior samples K^{1/2} z at observations and test points together, by Lanczos to the relative tolerance ``rtol``.

    For every kernel. ``info.details["prior_error"]`` is the largest error estimate over samples, and misses of ``rtol``
    warn. Rounding adds up to √(eps·‖K‖), since eigenvalues 0 of K come out as ±eps·‖K‖.

    Cost: (n + n*)² per Lanczos step and sample; bases of at most 256 MB at a time.
    """

    rtol: float = 1e-3
    max_matvecs: int = 300

    def __post_init__(self) -> None:
        self.lanczos()  # raises where the settings make no sense

    def lanczos(self) -> Lanczos:
        """The Krylov method."""
        return Lanczos(rtol=self.rtol, max_matvecs=self.max_matvecs)


class Paths:
    """Posterior samples as functions, from ``posterior.sample_paths``; the same functions in every call.

    Attributes:
        num_paths: how many.
        info: report: ``residual`` of the solve for every path (and output), and the features' figures in ``details``.

    Memory: n + 2m numbers a path and output.
    """

    def __init__(
        self, posterior: Posterior, num_paths: int, prior: FeatureMap, W: Tensor, V: Tensor, info: Info
    ) -> None:
        self.posterior, self.num_paths, self.info = posterior, num_paths, info
        self._prior, self._W, self._V = prior, W, V

    def __call__(self, Xs: Tensor) -> Tensor:
        """The paths at Xs (n*, d), shape (num_paths, n*) or (num_paths, n*, p); differentiable in Xs."""
        Xs = self.posterior._check(Xs)
        with full_precision():
            values = _prior_values(self._prior, self._W, Xs) + self.posterior.kernel(Xs, self.posterior.X) @ self._V
        return _mean(self.posterior, Xs) + _samples_first(self.posterior, values, self.num_paths)

    def __repr__(self) -> str:
        return f"Paths({self.num_paths} paths, {self._prior.width} features)"


def paths(posterior: Posterior, num_paths: int, method: Features, generator: torch.Generator) -> Paths:
    """Paths with a prior part made of features."""
    if not isinstance(method, Features):
        raise OperandError(f"method={method!r}; paths are made of Features(m), sample takes the others")
    X, columns = posterior.X, _columns(posterior, num_paths)
    prior = features.draw(posterior.gp.kernel, X.mean(0), method.m, generator)
    W = normal((prior.width, columns), generator, X)
    with full_precision():
        f = _prior_values(prior, W, X)
    V, info = _update(posterior, f, num_paths, generator)
    info.method = method
    error = _prior_error(posterior, prior)
    info.details.update(features=prior.width, prior_error=error, prior_bound=(2 * method.m) ** -0.5)
    return Paths(posterior, num_paths, prior, W, V, info)


def sample(
    posterior: Posterior, Xs: Tensor, num_samples: int, method: Any, generator: torch.Generator
) -> tuple[Tensor, Info]:
    """Samples of f at Xs (num_samples, n*) or (num_samples, n*, p), and their report."""
    if isinstance(method, Auto):
        few = posterior.is_dense and Xs.shape[0] <= EXACT_UP_TO
        method = Exact() if few else Features() if features.has_features(posterior.gp.kernel) else SquareRoot()
    if isinstance(method, Exact):
        return _exact(posterior, Xs, num_samples, generator)
    if isinstance(method, SquareRoot):
        return _by_root(posterior, Xs, num_samples, method, generator)
    if not isinstance(method, Features):
        raise OperandError(f"method={method!r}; expected Exact(), Features(m), SquareRoot(rtol) or Auto()")
    drawn = paths(posterior, num_samples, method, generator)
    return drawn(Xs), drawn.info


def normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, drawn in float64 on the generator's device: the same for every dtype and device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(like)


def _exact(posterior: Posterior, Xs: Tensor, num: int, generator: torch.Generator) -> tuple[Tensor, Info]:
    L, clipped = root(posterior._covariance(Xs).double())
    with full_precision():
        Z = (L @ normal((Xs.shape[0], _columns(posterior, num)), generator, L)).to(Xs.dtype)
    info = Info(Exact(), 0, 0, posterior.info.residual, status=posterior.info.status, details={"clipped": clipped})
    return posterior.mean(Xs) + _samples_first(posterior, Z, num), info


def root(S: Tensor) -> tuple[Tensor, float]:
    """L with L Lᵀ = S, a covariance up to rounding, and what was clipped; see :class:`Exact`."""
    with full_precision():
        L, failed = torch.linalg.cholesky_ex(S)
        if not int(failed) or not S.shape[0]:
            return L, 0.0
        values, vectors = torch.linalg.eigh(S)
        clipped = max(-float(values[0]), 0.0) / max(float(values[-1]), torch.finfo(torch.float64).tiny)
        return vectors * values.clamp_min(0.0).sqrt(), clipped


def _by_root(
    posterior: Posterior, Xs: Tensor, num: int, method: SquareRoot, generator: torch.Generator
) -> tuple[Tensor, Info]:
    points, n = torch.cat([posterior.X, Xs]), posterior.X.shape[0]
    K = posterior.kernel(points)
    Z = normal((points.shape[0], _columns(posterior, num)), generator, points)
    basis = method.max_matvecs * points.shape[0] * points.element_size()
    parts, errors, products = [], [0.0], 0
    for z in Z.split(max(1, ROOT_BYTES // basis), 1):
        f, report = funm_multiply(_root, K, z.contiguous(), method=method.lanczos(), return_info=True)
        parts.append(f)
        errors.append(float(report.residual.max()))
        products += report.num_matvecs
    F = torch.cat(parts, 1)
    V, info = _update(posterior, F[:n], num, generator)
    with full_precision():
        values = F[n:] + posterior.kernel(Xs, posterior.X) @ V
    info.method, info.num_matvecs = method, info.num_matvecs + products
    info.details["prior_error"] = max(errors)
    return _mean(posterior, Xs) + _samples_first(posterior, values, num), info


def _root(t: Tensor) -> Tensor:
    return t.clamp_min(0.0).sqrt()  # a kernel matrix has eigenvalues 0 up to rounding


def _columns(posterior: Posterior, num: int) -> int:
    if num < 1:
        raise OperandError(f"{num} samples were asked for; expected at least 1")
    return num * (posterior.outputs or 1)


def _update(posterior: Posterior, F: Tensor, num: int, generator: torch.Generator) -> tuple[Tensor, Info]:
    """K̂⁻¹ (y − m − f − ε) for prior samples f (n, k) without mean; the solve is that of f + ε, y's is known."""
    noise = posterior.gp.observed_noise(posterior.X).to(F.dtype).sqrt()
    noise = noise if noise.ndim == 0 else noise.unsqueeze(1)
    U, info = posterior.solve(F + noise * normal(tuple(F.shape), generator, F))
    return posterior.weights.reshape(F.shape[0], -1).repeat(1, num) - U, info


def _prior_values(prior: FeatureMap, W: Tensor, Xs: Tensor) -> Tensor:
    """Φ(Xs) W (n*, k), in blocks."""
    if not Xs.shape[0]:
        return Xs.new_zeros(0, W.shape[1])
    (values,) = in_blocks(lambda P: (prior(P) @ W,), Xs, block_rows(prior.width, torch.float64))
    return values


def _prior_error(posterior: Posterior, prior: FeatureMap) -> float:
    """Root mean square of k̂ − k over pairs of observations, relative to the largest variance."""
    step = -(-posterior.X.shape[0] // CHECKED)
    P = posterior.X[::step].double()
    phi, K = prior(P), posterior.kernel(P).to_dense()
    return float((phi @ phi.mT - K).square().mean().sqrt() / K.diagonal().max().clamp_min(1e-300))


def _samples_first(posterior: Posterior, values: Tensor, num: int) -> Tensor:
    """Columns (n*, num·p) as (num, n*) or (num, n*, p)."""
    if posterior.outputs is None:
        return values.mT
    return values.reshape(values.shape[0], num, posterior.outputs).transpose(0, 1)


def _mean(posterior: Posterior, Xs: Tensor) -> Tensor:
    """The prior's mean, (n*,) or (n*, p)."""
    return means.evaluate(posterior.gp.mean, Xs, posterior.outputs)
