"""Gaussian posteriors with precision G/s + D: what the evidence, samples and predictive variances need of them.

G is a Gauss–Newton matrix of a summed loss, s the observation noise variance (1 for classification), D the diagonal
prior precision. All of it goes through the whitened matrix W = D^{-1/2} (G/s) D^{-1/2}: log det(I + W) is all that the
evidence needs, and the eigenvalues of I + W are 1 wherever the data says nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functions
from ..curvature import GGN, CustomLoss, DualGGN, EigenBlocks
from ..eig import eigsh
from ..errors import OperandError
from ..functions import funm_multiply
from ..methods import Lanczos
from ..operators import Diagonal
from ..result import Status
from ..solve import CG, solve
from ..stochastic import Deflated, Hutchinson, SpectralMeasure, logdet, spectral_measure

GRAM_BYTES = 512 << 20  # of products that are kept for groups of priors


@dataclass(frozen=True)
class Prior:
    """δ for every parameter: one number, or one for each parameter tensor.

    ``scalar`` is () or (p,), a curve; ``tensors`` (T,) where they differ, for tensors of ``sizes``.
    """

    scalar: Tensor | None
    tensors: Tensor | None = None
    sizes: tuple[int, ...] = ()

    @property
    def entries(self) -> Tensor | None:
        """(P,) in the order of θ, where they differ."""
        if self.tensors is None:
            return None
        return self.tensors.repeat_interleave(torch.tensor(self.sizes, device=self.tensors.device))

    def is_curve(self) -> bool:
        """Whether there are several values, each of them for all parameters."""
        return self.scalar is not None and self.scalar.ndim > 0

    def diagonal(self, P: int) -> Tensor:
        """D as a vector (P,); not for a curve."""
        if (entries := self.entries) is not None:
            return entries
        assert self.scalar is not None
        return self.scalar.reshape(1).expand(P)


class LogDet(NamedTuple):
    """A log-determinant, its standard error, and how the run behind it ended."""

    value: Tensor
    error: Tensor
    status: Status


Variance = Callable[[Tensor], Tensor]


class Posterior(ABC):
    """A structure of the posterior covariance."""

    @abstractmethod
    def logdet(self, prior: Prior, s: Tensor) -> LogDet:
        """log det(I + W), of the shape of a scalar prior's curve; differentiable in both."""

    @abstractmethod
    def sample(self, Z: Tensor, prior: Prior, s: Tensor) -> Tensor:
        """(G/s + D)^{-1/2} in some square root, times standard normal rows Z (k, P)."""

    @abstractmethod
    def variance(self, prior: Prior, s: Tensor) -> Variance:
        """The map from rows J (n, C, P) to J (G/s + D)⁻¹ Jᵀ, (n, C, C)."""

    def unresolved(self) -> float:
        """The largest curvature, an eigenvalue of G, that :meth:`variance` may leave out."""
        return 0.0


@dataclass
class Full(Posterior):
    """The whole matrix, known by its products.

    Attributes:
        dual: log det(I + W) on the side of the data, with vectors of the length of all outputs; None: where that is
            shorter.
        G: the operator; None in a posterior that was loaded, which has its measure and eigenpairs alone.
        estimator, method: of log det(I + W), see :func:`ritz.logdet`.
        floor: the smallest s·δ that the kept spectral measure resolves; smaller ones make it anew.
        rank: eigenpairs behind predictive variances, an upper bound that is exact at rank P.
        rtol: of samples, and of solves where ``rank`` is None.
    """

    G: GGN | None
    estimator: Deflated | Hutchinson = Deflated(300, 20, block=20)
    method: Lanczos = Lanczos(rtol=1e-3, max_matvecs=400)
    floor: float = 1e-3
    rank: int | None = 300
    rtol: float = 1e-3
    dual: bool | None = None
    measure: SpectralMeasure | None = field(default=None, repr=False)
    pairs: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    left_out: float = field(default=0.0, repr=False)

    def logdet(self, prior: Prior, s: Tensor) -> LogDet:
        if (entries := prior.entries) is not None:
            return self._by_groups(entries, s)
        assert prior.scalar is not None
        sigma = (prior.scalar * s).reshape(-1)
        if self.G is not None and any(t.requires_grad for t in self.G.tensors()):  # hyperparameters: a run of its own
            value, info = logdet(self.G, shifts=sigma, estimator=self.estimator, method=self.method, return_info=True)
            value, error, status = value - self.G.shape[0] * sigma.log(), info.standard_error, info.status
        else:
            measure = self._measured(float(sigma.detach().min()))
            value, error = measure.trace(lambda x: torch.log1p(x / sigma.double().reshape(-1, *(1,) * x.ndim)))
            status = measure.info.status
        return LogDet(value.reshape(prior.scalar.shape), error.reshape(prior.scalar.shape), status)

    def _measured(self, smallest: float) -> SpectralMeasure:
        """Nodes that resolve log(x + smallest), from one run however many values are asked for."""
        if self.measure is None or smallest < self.floor:
            self.floor = min(self.floor, smallest)
            floor = self.floor
            self.measure = spectral_measure(
                self._smaller(),
                estimator=self.estimator,
                method=self.method,
                f=lambda x: torch.log1p(x.clamp(min=0.0) / floor),
            )
        return self.measure

    def _smaller(self) -> GGN | DualGGN:
        """The matrix or its dual: for one prior precision only the nonzero eigenvalues matter."""
        G = self._operator()
        if self.dual is False or isinstance(G.loss, CustomLoss):
            return G
        dual = DualGGN(G)
        return dual if self.dual or dual.shape[0] < G.shape[0] else G

    def _operator(self) -> GGN:
        if self.G is None:
            raise OperandError(
                "a loaded posterior has no data: the evidence of one prior precision (not below those it was saved "
                "with) and predictions work; for samples, groups, or smaller values call .fit(loader)"
            )
        return self.G

    def _whitened(self, D: Tensor, s: Tensor) -> Any:
        """I + W."""
        G = self._operator()
        root = Diagonal((D * s).rsqrt().to(G.dtype))
        return (root @ G @ root).declare(psd=True).shift(1.0)

    def _by_groups(self, D: Tensor, s: Tensor) -> LogDet:
        value, info = logdet(self._whitened(D, s), estimator=self.estimator, method=self.method, return_info=True)
        return LogDet(value, info.standard_error, info.status)

    def sample(self, Z: Tensor, prior: Prior, s: Tensor) -> Tensor:
        D = prior.diagonal(Z.shape[1]).to(Z.dtype)
        with torch.no_grad():
            method = Lanczos(rtol=self.rtol, max_matvecs=self.method.max_matvecs)
            Y = funm_multiply(functions.rsqrt, self._whitened(D, s), Z.mT.contiguous(), method=method)
        return Y.mT * D.rsqrt()

    def variance(self, prior: Prior, s: Tensor) -> Variance:
        if self.rank is not None:
            values, V = self._leading()
            return low_rank_variance(values, V, prior, s)
        D = prior.diagonal(self._operator().shape[0])
        W = self._whitened(D, s)

        def by_solves(J: Tensor) -> Tensor:
            n, C, P = J.shape
            rows = (J * D.rsqrt().to(J.dtype)).reshape(n * C, P)
            X = solve(W, rows.mT.contiguous(), method=CG(rtol=self.rtol))
            return torch.einsum("ncp,pnd->ncd", rows.reshape(n, C, P), X.reshape(P, n, C))

        return by_solves

    def unresolved(self) -> float:
        if self.rank is None:
            return 0.0
        values, V = self._leading()
        return 0.0 if V.shape[1] >= V.shape[0] else self.left_out

    @torch.no_grad()
    def _leading(self) -> tuple[Tensor, Tensor]:
        if self.pairs is None:
            G = self._operator()
            k = min(self.rank or 1, G.shape[0])
            (values, vectors), info = eigsh(
                G, k, block=10 if k >= 20 else 1, rtol=1e-3, on_failure="ignore", return_info=True
            )
            # Values below rounding are no curvature: left in, they would lower the upper bound.
            noise = 10 * torch.finfo(values.dtype).eps * values.max()
            known = torch.where(values > noise, values, torch.zeros_like(values))
            residual = 0.0 if info.residual is None else float(info.residual[-1]) * float(values.max())
            self.left_out = max(float(values.min()) + residual, float(noise))
            self.pairs = known, vectors
        return self.pairs


@dataclass
class Blocks(Posterior):
    """A block approximation that is known by its eigenvectors: Kronecker factors, corrected ones, the diagonal."""

    G: EigenBlocks

    def _precision(self, prior: Prior) -> Tensor:
        """D in the coordinates of the eigenvectors, where it is constant on every block."""
        if prior.tensors is None:
            assert prior.scalar is not None
            return prior.scalar.unsqueeze(-1).expand(*prior.scalar.shape, self.G.shape[0])
        own: list[Tensor] = []
        for block in self.G.blocks:
            values = prior.tensors[list(block.indices)]
            if not torch.equal(values.min(), values.max()):
                raise OperandError(
                    f"the prior precision differs inside of the block of {block.name}; expected one value for a weight "
                    "and its bias (with structure='full' or 'lowrank' any will do)"
                )
            own.append(values[0].expand(block.eigenvalues.numel()))
        return torch.cat(own)

    def logdet(self, prior: Prior, s: Tensor) -> LogDet:
        value = torch.log1p(self.G.eigenvalues.double() / (self._precision(prior) * s)).sum(-1)
        return LogDet(value, torch.zeros_like(value).detach(), Status.CONVERGED)

    def sample(self, Z: Tensor, prior: Prior, s: Tensor) -> Tensor:
        return self.G.from_basis(Z * (self.G.eigenvalues / s + self._precision(prior)).rsqrt().to(Z.dtype))

    def variance(self, prior: Prior, s: Tensor) -> Variance:
        weights = (self.G.eigenvalues / s + self._precision(prior)).reciprocal()

        def by_blocks(J: Tensor) -> Tensor:
            n, C, P = J.shape
            rows = self.G.to_basis(J.reshape(n * C, P)).reshape(n, C, P)
            return torch.einsum("ncp,ndp->ncd", rows * weights.to(J.dtype), rows)

        return by_blocks


@dataclass
class LowRank(Posterior):
    """Eigenpairs of the whole matrix, and nothing in the other directions: G = V diag(λ) Vᵀ. Exact with all of them."""

    values: Tensor
    V: Tensor
    _grams: Tensor | None = field(default=None, repr=False)

    def logdet(self, prior: Prior, s: Tensor) -> LogDet:
        if prior.tensors is None:
            assert prior.scalar is not None
            value = torch.log1p(self.values.double() / (prior.scalar * s).unsqueeze(-1)).sum(-1)
        else:
            inner = self._inner(prior) / s
            value = torch.logdet(inner + torch.eye(inner.shape[0], dtype=inner.dtype, device=inner.device))
        return LogDet(value, torch.zeros_like(value).detach(), Status.CONVERGED)

    def _inner(self, prior: Prior) -> Tensor:
        """Uᵀ D⁻¹ U for G = U Uᵀ, (k, k), from the products of every parameter tensor where memory allows."""
        assert prior.tensors is not None
        k = self.V.shape[1]
        if self._grams is None:
            U = self.V.double() * self.values.double().sqrt()
            if 8 * len(prior.sizes) * k * k > GRAM_BYTES:
                return U.mT @ (U / prior.diagonal(U.shape[0]).unsqueeze(1))
            self._grams = torch.stack([part.mT @ part for part in U.split(list(prior.sizes))])
        return torch.tensordot(prior.tensors.reciprocal(), self._grams, 1)

    def sample(self, Z: Tensor, prior: Prior, s: Tensor) -> Tensor:
        D = prior.diagonal(Z.shape[1]).to(self.V.dtype)
        Q, w = self._whitened(D, s)
        X = Z.to(Q.dtype)
        return ((X + ((X @ Q) * ((1.0 + w).rsqrt() - 1.0)) @ Q.mT) * D.rsqrt()).to(Z.dtype)

    def _whitened(self, D: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """W = Q diag(w) Qᵀ."""
        U = self.V * (self.values / s).sqrt().to(self.V.dtype) * D.rsqrt().unsqueeze(1)
        Q, w, _ = torch.linalg.svd(U, full_matrices=False)
        return Q, w.square()

    def variance(self, prior: Prior, s: Tensor) -> Variance:
        return low_rank_variance(self.values, self.V, prior, s)


def low_rank_variance(values: Tensor, V: Tensor, prior: Prior, s: Tensor, more: float = 0.0) -> Variance:
    """Rows J (n, C, P) to J (V diag(λ/s) Vᵀ + D)⁻¹ Jᵀ, (n, C, C).

    With rows in the coordinates of D^{1/2} and V diag(λ/s) Vᵀ = D^{1/2} Q diag(w) Qᵀ D^{1/2}, what lies in the span of
    Q is divided by 1 + w, and the rest is left as it is: a sum of squares, which no rounding makes negative. Where G
    has more than these eigenpairs this is an upper bound, since leaving out curvature only adds variance; ``more``, a
    bound on what was left out, is added to D for a lower one.
    """
    D = (prior.diagonal(V.shape[0]) + more / s).to(V.dtype)
    root = D.rsqrt()
    if prior.tensors is None:
        Q, w = V, values / (s * D[0])
    else:
        Q, R = torch.linalg.qr(V * (values / s).sqrt().to(V.dtype) * root.unsqueeze(1))
        w, E = torch.linalg.eigh(R.double() @ R.mT.double())
        Q = Q @ E.to(Q.dtype)
    shrink = (1.0 + w.clamp(min=0.0)).reciprocal().to(V.dtype)

    def variance(J: Tensor) -> Tensor:
        rows = J.to(V.dtype) * root
        inside = rows @ Q
        rest = rows - inside @ Q.mT
        found = rest @ rest.mT + (inside * shrink) @ inside.mT
        return found.to(J.dtype)

    return variance
