"""GPyTorch in the race: dense (BBMM or Cholesky) and on KeOps, with the settings spelled out."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import gpytorch
import numpy as np
import torch
from _gp_data import NOISE_FLOOR, Split

PROBES = 10
ALWAYS, NEVER = 10**9, 0


class Model(gpytorch.models.ExactGP):
    def __init__(self, X: torch.Tensor, y: torch.Tensor, likelihood: Any, keops: bool) -> None:
        super().__init__(X, y, likelihood)
        if keops:
            from gpytorch.kernels.keops import MaternKernel
        else:
            from gpytorch.kernels import MaternKernel
        self.mean_module = gpytorch.means.ConstantMean()
        base = MaternKernel(nu=1.5, ard_num_dims=X.shape[1])
        self.covar_module = gpytorch.kernels.ScaleKernel(base)

    def forward(self, X: torch.Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(X), self.covar_module(X))


class GPyTorch:
    """One contestant. `tolerance` None is GPyTorch's default of 1; `rank` is that of its pivoted Cholesky."""

    def __init__(self, split: Split, spec: dict, *, tolerance: float | None = None, rank: int = 15,
                 cholesky: bool = False, keops: bool = False, depth: int | None = None) -> None:  # fmt: skip
        torch.manual_seed(0)  # of its probes, which it draws anew in every step
        dtype = getattr(torch, spec["dtype"])
        self.X, self.y = torch.from_numpy(split.X).to(dtype), torch.from_numpy(split.y).to(dtype)
        constraint = gpytorch.constraints.GreaterThan(NOISE_FLOOR)
        self.likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=constraint).to(dtype)
        self.model = Model(self.X, self.y, self.likelihood, keops).to(dtype)
        self.objective = gpytorch.mlls.ExactMarginalLogLikelihood(self.likelihood, self.model)
        self.params = [
            self.model.covar_module.base_kernel.raw_lengthscale,
            self.model.covar_module.raw_outputscale,
            self.likelihood.noise_covar.raw_noise,
            self.model.mean_module.raw_constant,
        ]
        self.cholesky, self.rank = cholesky, rank
        self.tolerance = 1.0 if tolerance is None else tolerance
        # A fixed depth for the scaling runs: a tolerance that is never met, within `depth` iterations
        self.max_iterations = depth or 1000
        if depth:
            self.tolerance = 1e-12
        self.report: dict[str, Any] = {}
        self.restart(spec["lr"])

    def settings(self) -> ExitStack:
        s, stack = gpytorch.settings, ExitStack()
        stack.enter_context(s.max_cholesky_size(ALWAYS if self.cholesky else NEVER))
        if not self.cholesky:
            stack.enter_context(s.fast_computations(True, True, True))
            stack.enter_context(s.num_trace_samples(PROBES))
            stack.enter_context(s.cg_tolerance(self.tolerance))
            stack.enter_context(s.max_cg_iterations(self.max_iterations))
            stack.enter_context(s.max_preconditioner_size(self.rank))
            stack.enter_context(s.min_preconditioning_size(0))  # its default leaves n < 2000 without
        return stack

    def restart(self, lr: float) -> None:
        self.model.train()
        self.likelihood.train()
        self.adam = torch.optim.Adam(self.params, lr=lr)

    @torch.no_grad()
    def set(self, theta: np.ndarray) -> None:
        flat, position = torch.as_tensor(theta), 0
        for p in self.params:
            p.copy_(flat[position : position + p.numel()].reshape(p.shape))
            position += p.numel()

    def get(self) -> np.ndarray:
        return torch.cat([p.detach().reshape(-1).double() for p in self.params]).numpy()

    def log_likelihood(self, y: torch.Tensor) -> torch.Tensor:
        """The sum over points; call it under `settings()`."""
        return self.objective(self.model(self.X), y) * len(y)

    def step(self) -> float:
        with self.settings():
            self.adam.zero_grad()
            loss = -self.objective(self.model(self.X), self.y)
            loss.backward()
            self.adam.step()
        return float(loss.detach())

    def solution(self) -> np.ndarray:
        """K̂⁻¹(y − m) as the gradient uses it: −∂ log p / ∂y."""
        with self.settings():
            y = self.y.clone().requires_grad_()
            (g,) = torch.autograd.grad(self.log_likelihood(y), y)
        return -g.double().numpy()

    def predict(self, Xs: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        self.model.eval()
        self.likelihood.eval()
        P, s = torch.from_numpy(Xs).to(self.X.dtype), gpytorch.settings
        with torch.no_grad(), self.settings(), s.eval_cg_tolerance(min(self.tolerance, 0.01)):
            with s.skip_posterior_variances(True):
                mean = self.model(P).mean
            variance = self.likelihood(self.model(P[:first])).variance
        return mean.double().numpy(), variance.double().numpy()
