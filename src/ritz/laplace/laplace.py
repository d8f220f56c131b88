"""``Laplace``: a Gaussian posterior around trained parameters, its evidence, and its predictions."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import EKFAC, GGN, KFAC, CrossEntropy, DiagonalGGN, SquaredError
from ..curvature.batches import Batch, read, to_device
from ..curvature.network import Network
from ..eig import eigsh
from ..errors import ConvergenceWarning, OperandError
from ..result import Info, caller_level
from .choices import check_last_layer, chosen_parameters, maximum
from .pairs import all_pairs
from .posterior import Blocks, Full, LowRank, Posterior, Prior, low_rank_variance
from .predictive import probabilities
from .rows import jacobian_rows
from .state import restore, state_of

LIKELIHOODS = ("classification", "regression")
STRUCTURES = ("full", "kron", "ekfac", "diag", "lowrank")


class Laplace:
    """Laplace approximation of a network's posterior, with precision G/σ² + D at the trained parameters.

    G is the Gauss–Newton matrix of the summed negative log-likelihood, D the prior precision: one number δ, or one for
    each named group of parameters.

    Args:
        model: a trained module, in eval mode where it has dropout or batch norm.
        likelihood: "classification" (softmax over the last axis) or "regression" (Gaussian of standard deviation
            ``sigma_noise``).
        subset: "all" parameters that require a gradient, "last_layer", or names as in :class:`~ritz.curvature.GGN`.
        structure: "full": the whole of G, never formed: evidence by stochastic Lanczos quadrature behind a Krylov space
            that is taken out, samples by (I + W)^{-1/2}, variances from its leading eigenpairs or from solves; or
            everything from all of its eigenpairs, see ``dense``.
            "kron", "ekfac", "diag": :class:`~ritz.curvature.KFAC`, ``EKFAC``, ``DiagonalGGN``. "lowrank": ``rank``
            leading eigenpairs alone.
        sigma_noise: standard deviation of the observations.
        prior_precision: δ > 0; or a dictionary from names (as in ``subset``) to numbers, of which the longest name that
            fits a parameter has the say.
        prior_mean: of all parameters.
        rank: eigenpairs, for "lowrank" and for the variances of "full".
        dense: whether "full" decomposes the smaller one of G and its dual as a whole, in float64: then nothing is
            estimated. None: where that has at most 2000 rows, and no settings of the Krylov spaces are given.
        hyperparameters: tensors inside the model that the evidence is differentiable in ("full" only).
        settings: further fields of :class:`~ritz.laplace.Full`.

    Example:
        >>> import torch, ritz
        >>> model = torch.nn.Linear(2, 3)
        >>> data = [(torch.randn(8, 2), torch.randint(0, 3, (8,)))]
        >>> la = ritz.laplace.Laplace(model, "classification").fit(data)
        >>> la.log_marginal_likelihood(torch.tensor([0.1, 1.0, 10.0])).shape
        torch.Size([3])

    Reference: MacKay 1992; Daxberger et al., "Laplace redux" (2021), whose names are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        subset: Any = "all",
        structure: str = "full",
        sigma_noise: float | Tensor = 1.0,
        prior_precision: Any = 1.0,
        prior_mean: float = 0.0,
        rank: int | None = 300,
        dense: bool | None = None,
        hyperparameters: Any = (),
        micro_batch: int | None = None,
        **settings: Any,
    ) -> None:
        if likelihood not in LIKELIHOODS:
            raise OperandError(f"likelihood={likelihood!r}; expected 'classification' or 'regression'")
        if structure not in STRUCTURES:
            raise OperandError(f"structure={structure!r}; expected one of {', '.join(STRUCTURES)}")
        if not isinstance(model, nn.Module):
            raise OperandError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
        if hyperparameters and structure != "full":
            raise OperandError(f"hyperparameters need structure='full'; got structure={structure!r}")
        if dense and (hyperparameters or settings or structure != "full"):
            raise OperandError(
                "dense=True is for structure='full' without hyperparameters or Krylov settings; leave it or these out"
            )
        self.model, self.likelihood, self.structure, self.rank, self.dense = model, likelihood, structure, rank, dense
        self.params, self.subset = chosen_parameters(model, subset), subset
        self.hyperparameters, self.micro_batch, self.settings = tuple(hyperparameters), micro_batch, settings
        self.loss = CrossEntropy() if likelihood == "classification" else SquaredError()
        self.prior_mean = prior_mean
        self.posterior: Posterior | None = None
        self._batches: list[Batch] | None = None
        self.network = Network(model, self.params)
        self.sigma_noise, self.prior_precision = sigma_noise, prior_precision
        self._variance_of(sigma_noise)
        if self._prior_of(prior_precision).is_curve():
            raise OperandError("prior_precision is a 1-D tensor, a curve; a posterior has one number, or a dictionary")
        known = {f.name for f in fields(Full)} - {"G", "rank", "measure", "pairs", "left_out"}
        if unknown := set(settings) - (known if structure == "full" else set()):
            raise TypeError(f"Laplace(structure={structure!r}) does not know {', '.join(sorted(unknown))}")

    # -- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, data: Any) -> Laplace:
        """Curvature and likelihood of the data: a pair (x, y) or a DataLoader of pairs, read once; returns itself.

        "full" with Krylov spaces records nothing here but the data; the others decompose their matrix.
        """
        batches = read(data, self.micro_batch)
        pairs = [(b.x, b.y) for b in batches]
        self.network = Network(self.model, self.params)
        self._batches = batches
        total, self.num_data, self.num_outputs = 0.0, 0, 0
        with torch.no_grad():
            if isinstance(self.subset, str) and self.subset == "last_layer":
                first = to_device(batches[0], self.network.device)
                check_last_layer(self.model, lambda: self.network(self.network.parameters, first.x))
            for batch in batches:
                moved = to_device(batch, self.network.device)
                f = self.network(self.network.parameters, moved.x)
                if f.ndim < 2:
                    raise OperandError(
                        f"the model returned outputs of shape {tuple(f.shape)}; expected (n, …, C), C may be 1"
                    )
                total += float(self.loss.value(f, moved.y))
                self.num_data += f.shape[0]
                self.num_outputs += f.numel()
        if not math.isfinite(total):
            raise OperandError(f"the negative log-likelihood of the data is {total}; check the model and the targets")
        self._loss = total
        self._theta = self._weights()
        kinds = {"kron": KFAC, "ekfac": EKFAC, "diag": DiagonalGGN}
        if self.structure in kinds:
            self.posterior = Blocks(kinds[self.structure](self.model, self.loss, self.params, pairs, reduction="sum"))
            return self
        G = GGN(self.model, self.loss, self.params, pairs, reduction="sum", hyperparameters=self.hyperparameters)
        if self.structure == "lowrank":
            k = min(self.rank or G.shape[0], G.shape[0])
            found = eigsh(G, k, block=min(10, k), rtol=1e-4)
            self.posterior = LowRank(found.values.clamp(min=0.0), found.vectors)
            return self
        krylov = self.hyperparameters or self.settings or self.dense is False
        pairs = None if krylov else all_pairs(G, whatever_size=bool(self.dense))
        self.posterior = Full(G, rank=self.rank, **self.settings) if pairs is None else LowRank(*pairs)
        return self

    def _weights(self) -> Tensor:
        """The parameters as they are, (P,), float64."""
        return torch.cat([p.detach().reshape(-1) for p in self.network.parameters]).double()

    @property
    def _squares(self) -> Tensor:
        """(θ − prior mean)² of the parameters that the posterior is around."""
        return (self._theta - self.prior_mean).square()

    def state_dict(self) -> dict[str, Any]:
        """The fitted posterior as plain tensors and numbers, for ``torch.save``, with the weights that it is around."""
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> Laplace:
        """Take a state of :meth:`state_dict` into a Laplace of the same (trained) model; returns itself.

        A "full" posterior comes back with its evidence curve and predictions, and needs ``fit`` for samples.
        """
        restore(self, state)
        return self

    def _fitted(self) -> Posterior:
        if self.posterior is None:
            raise OperandError("this Laplace has no data yet; call .fit(loader) first")
        return self.posterior

    # -- evidence -----------------------------------------------------------------------------------------------------

    def log_likelihood(self, sigma_noise: Any = None) -> Tensor:
        """log p(data | parameters), a scalar."""
        self._fitted()
        s = self._variance_of(self.sigma_noise if sigma_noise is None else sigma_noise)
        loss = self._live_loss() if any(t.requires_grad for t in self.hyperparameters) else self._loss
        if self.likelihood == "classification":
            return torch.as_tensor(-loss, dtype=torch.float64, device=self.network.device)
        return -loss / s - 0.5 * self.num_outputs * torch.log(2 * torch.pi * s)

    def _live_loss(self) -> Tensor:
        """The loss once more, with the graph of the hyperparameters."""
        if self._batches is None:
            raise OperandError("a loaded posterior has no data, which the evidence in hyperparameters needs; call .fit")
        live = {id(t) for t in self.hyperparameters}
        at = [p if id(p) in live else p.detach() for p in self.network.parameters]
        batches = (to_device(b, self.network.device) for b in self._batches)
        parts = [self.loss.value(self.network(at, b.x), b.y).double() for b in batches]
        return torch.stack(parts).sum()

    def log_marginal_likelihood(
        self, prior_precision: Any = None, sigma_noise: Any = None, *, return_info: bool = False
    ) -> Any:
        """The Laplace evidence log p(data): a scalar; for a 1-D tensor of prior precisions (p,) the curve (p,).

        Args:
            prior_precision: a number or tensor () or (p,), a dictionary from names to numbers; None: the current one.
            sigma_noise: standard deviation of the observations; None: the current one.
            return_info: also return an :class:`~ritz.result.Info` with the ``standard_error`` of every value.

        A scalar prior precision costs one Krylov run with structure "full", the first time; every further value and the
        whole curve come from the same numbers. Groups cost one run a value, with the derivatives in all of them; where
        the matrix was decomposed, a factorisation.
        Gradient: in prior_precision, sigma_noise and hyperparameters.

        Raises:
            OperandError: a value that is not finite, with the reason.
        """
        posterior = self._fitted()
        self.network.check_unchanged()
        prior = self._prior_of(self.prior_precision if prior_precision is None else prior_precision)
        s = self._variance_of(self.sigma_noise if sigma_noise is None else sigma_noise)
        logdet, error, status = posterior.logdet(prior, s)
        if (entries := prior.entries) is None:
            assert prior.scalar is not None
            scatter = prior.scalar * self._squares.sum()
        else:
            scatter = (entries * self._squares).sum()
        value = self.log_likelihood(s.sqrt()) - 0.5 * (scatter + logdet)
        if not bool(torch.isfinite(value).all()):
            raise OperandError(
                f"the log marginal likelihood is {value.detach().tolist()} (log-likelihood "
                f"{float(self.log_likelihood(s.sqrt())):.6g}, scatter {scatter.detach().tolist()}, log-determinant "
                f"{logdet.detach().tolist()}); expected finite terms: check the prior precision and the trained weights"
            )
        if not return_info:
            return value
        return value, Info(posterior, 0, 0, standard_error=0.5 * error, status=status)

    def optimize_prior_precision(
        self, *, sigma_noise: bool | None = None, groups: Any = None, steps: int = 50
    ) -> Laplace:
        """Post-hoc: set prior precision (and noise) to where the evidence of the *fixed* trained parameters is largest.

        Args:
            sigma_noise: whether to optimise the noise as well; None: for regression.
            groups: names with a precision of their own each, such as the layers; None: one for all.
            steps: of Adam on logarithms where groups are given; otherwise the curve is searched, without a product.

        Training the network and these together is something else: see :func:`~ritz.laplace.marglik_training`.
        """
        self._fitted()
        noise = self.likelihood == "regression" if sigma_noise is None else sigma_noise
        if groups is None:
            delta, sigma = self._best_on_curves(noise)
            self.prior_precision, self.sigma_noise = delta, sigma
            return self
        start = self.prior_precision if not isinstance(self.prior_precision, dict) else 1.0
        logs = {g: torch.tensor(math.log(float(start)), dtype=torch.float64, requires_grad=True) for g in groups}
        log_sigma = self._variance_of(self.sigma_noise).detach().sqrt().log().clone().requires_grad_(noise)
        optimizer = torch.optim.Adam([*logs.values(), *([log_sigma] if noise else [])], lr=0.2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -self.log_marginal_likelihood({g: v.exp() for g, v in logs.items()}, log_sigma.exp())
            loss.backward()
            optimizer.step()
        self.prior_precision = {g: float(v.detach().exp()) for g, v in logs.items()}
        self.sigma_noise = float(log_sigma.detach().exp())
        return self

    def _best_on_curves(self, noise: bool) -> tuple[float, float]:
        """The maximum over δ, and over σ by turns: every evaluation is a curve of numbers that are there already."""
        sigma = float(self._variance_of(self.sigma_noise).detach().sqrt())
        delta = 1.0
        with torch.no_grad():
            for _ in range(6 if noise else 1):
                delta = maximum(functools.partial(self.log_marginal_likelihood, sigma_noise=sigma), 1e-3, 1e5)
                if noise:
                    sigma = maximum(functools.partial(self._over_noise, delta), 0.1 * sigma, 10 * sigma, points=15)
        return delta, sigma

    def _over_noise(self, delta: float, sigmas: Tensor) -> Tensor:
        return torch.stack([self.log_marginal_likelihood(delta, float(v)) for v in sigmas])

    # -- predictions --------------------------------------------------------------------------------------------------

    def functional_variance(self, x: Any, *, return_lower: bool = False) -> Any:
        """Outputs f (n, …, C) and the covariance of their linearisation, J Σ Jᵀ, (n, …, C, C), term by term.

        Args:
            return_lower: also return a lower bound of the covariance, of the same shape.

        Where "full" knows ``rank`` leading eigenpairs, the covariance is an upper bound, at most 1 + λ/(σ²δ) times the
        lower one for the smallest eigenvalue λ found and the smallest prior precision δ; a ``ConvergenceWarning`` says
        so where that is more than 2. Otherwise both are the covariance itself; ``rank=None`` solves with one right-hand
        side an output.
        """
        posterior = self._fitted()
        self.network.check_unchanged()
        prior, s = self._prior_of(self.prior_precision), self._variance_of(self.sigma_noise).detach()
        outputs, uppers, lowers = [], [], []
        with torch.no_grad():
            upper = lower = posterior.variance(prior, s)
            if left_out := posterior.unresolved():
                assert isinstance(posterior, Full)
                if not return_lower:
                    self._warn_of(left_out / float(s * prior.diagonal(1).min()))
                lower = low_rank_variance(*posterior._leading(), prior, s, more=left_out)
            for f, rows in jacobian_rows(self.network, x):
                C = f.shape[-1]
                rows = rows.reshape(-1, C, rows.shape[-1])
                outputs.append(f)
                uppers.append(upper(rows).reshape(*f.shape, C))
                if return_lower:
                    lowers.append(lower(rows).reshape(*f.shape, C) if lower is not upper else uppers[-1])
        found = torch.cat(outputs), torch.cat(uppers)
        return (*found, torch.cat(lowers)) if return_lower else found

    def _warn_of(self, excess: float) -> None:
        if excess > 1:
            warnings.warn(
                f"predictive variances from {self.rank} eigenpairs are an upper bound, up to {1 + excess:.3g} times "
                "too large (what was left out may have more curvature than the prior precision); raise rank=, use "
                "rank=None for solves, or look at functional_variance(x, return_lower=True)",
                ConvergenceWarning,
                stacklevel=caller_level(),
            )

    def predict(self, x: Tensor, *, link: str = "probit", samples: int = 100, seed: int = 0) -> Any:
        """Predictions of the linearised network.

        Returns:
            Classification: class probabilities (n, C), by ``link``: "probit", "mc" (``samples`` draws), "bridge".
            Regression: mean (n, C) and covariance (n, C, C) of the outputs, without the observation noise σ².
        """
        f, variance = self.functional_variance(x)
        if self.likelihood == "regression":
            return f, variance
        return probabilities(link, f, variance, samples, seed)

    __call__ = predict

    def sample(self, count: int = 1, *, seed: int = 0) -> Tensor:
        """Posterior draws of the parameters, (count, P), in the order of ``network.names``."""
        P = self.network.numel
        self.network.check_unchanged()
        prior, s = self._prior_of(self.prior_precision), self._variance_of(self.sigma_noise).detach()
        Z = torch.randn(count, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        Z = Z.to(self.network.device, self.network.dtype)
        with torch.no_grad():
            theta = torch.cat([p.reshape(-1) for p in self.network.parameters])
            return theta + self._fitted().sample(Z, prior, s)

    # -- values -------------------------------------------------------------------------------------------------------

    def _variance_of(self, sigma: Any) -> Tensor:
        s = torch.as_tensor(sigma, dtype=torch.float64, device=self.network.device)
        if s.ndim or not bool(s > 0):
            raise OperandError(f"sigma_noise={sigma!r}; expected one positive standard deviation")
        if self.likelihood == "classification" and float(s.detach()) != 1.0:
            raise OperandError(
                f"sigma_noise={float(s.detach())} with likelihood='classification', which has none; leave it out"
            )
        return s.square()

    def _prior_of(self, given: Any) -> Prior:
        if not isinstance(given, dict):
            value = torch.as_tensor(given, dtype=torch.float64, device=self.network.device)
            if value.ndim > 1 or not bool((value > 0).all()):
                raise OperandError(f"prior_precision={given!r}; expected positive numbers, a scalar or a 1-D tensor")
            return Prior(value)
        found: list[Tensor | None] = [None] * len(self.network.names)
        for name, value in sorted(given.items(), key=lambda item: len(str(item[0]))):  # the longest name has the say
            own = self.network.meant_by(str(name))
            number = torch.as_tensor(value, dtype=torch.float64, device=self.network.device)
            if not own or number.numel() != 1 or not bool(number > 0):
                raise OperandError(
                    f"prior_precision has {name!r}: {value!r}; expected a positive number for one of "
                    f"{', '.join(self.network.names)}, or for a module of them"
                )
            for i in own:
                found[i] = number.reshape(())
        missing = [n for n, e in zip(self.network.names, found) if e is None]
        if missing:
            raise OperandError(f"prior_precision has nothing for {', '.join(missing)}; give every parameter a group")
        return Prior(None, torch.stack([e for e in found if e is not None]), tuple(self.network.sizes))
