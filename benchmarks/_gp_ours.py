"""ritz in the race: the same model on any back end, with either gradient rule."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from _gp_data import NOISE_FLOOR, Split
from torch import Tensor

import ritz
from ritz.gp import ExactGP
from ritz.kernels import Matern, Scale

PROBES = 10


def backend(name: str | None) -> Any:
    """A back end by its name; None is Auto()."""
    if name is None:
        return ritz.Auto()
    found = getattr(ritz.kernels, name, None)
    if found is None:
        raise RuntimeError(f"this version of ritz has no back end {name}")
    return found()


def model(d: int, rtol: float, *, where: str | None = None, rank: int | None = None, method: Any = None) -> ExactGP:
    """Matérn 3/2 with ARD, constant mean; the iterative path is forced unless `method` says otherwise.

    `rank` of the preconditioner: None leaves the choice to ritz, 0 is without one.
    """
    kernel = Scale(Matern(1.5, ard_num_dims=d))
    extra: dict[str, Any] = {} if where is None else {"backend": backend(where)}
    if rank is not None:
        extra["preconditioner"] = ritz.RandomlyPivotedCholesky(rank) if rank else None
    if isinstance(method, ritz.Direct):
        return ExactGP(kernel, noise=0.5, solver=method, noise_floor=NOISE_FLOOR, **extra)
    logdet = (ritz.Hutchinson(PROBES), method or ritz.Lanczos(rtol=rtol))
    return ExactGP(kernel, noise=0.5, solver=ritz.CG(rtol=rtol), logdet=logdet, noise_floor=NOISE_FLOOR, **extra)


def parameters(gp: ExactGP) -> list[Tensor]:
    """In the order of the common vector."""
    return [gp.kernel.base_kernel.raw_lengthscale, gp.kernel.raw_outputscale, gp.raw_noise, gp.mean.constant]


@torch.no_grad()
def write(tensors: list[Tensor], theta: np.ndarray) -> None:
    flat, position = torch.as_tensor(theta), 0
    for p in tensors:
        p.copy_(flat[position : position + p.numel()].reshape(p.shape))
        position += p.numel()


def read(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1).double() for p in tensors]).numpy()


class Ours:
    """One contestant: a training step, its solution, its predictions."""

    def __init__(self, split: Split, spec: dict, *, where: str | None = None, rank: int | None = None,
                 adjoint: bool = False, direct: bool = False, depth: int | None = None) -> None:  # fmt: skip
        dtype = getattr(torch, spec["dtype"])
        self.X, self.y = torch.from_numpy(split.X).to(dtype), torch.from_numpy(split.y).to(dtype)
        self.rtol, self.adjoint, self.where = spec["rtol"], adjoint, where
        method = ritz.Direct() if direct else (ritz.Lanczos(depth) if depth else None)
        self.gp = model(split.X.shape[1], self.rtol, where=where, rank=rank, method=method).to(dtype)
        if depth:  # a fixed number of products: no solve on top of them
            self.gp.solver = ritz.Auto()
        self.params = parameters(self.gp)
        self.report: dict[str, Any] = {}
        self.restart(spec["lr"])

    def restart(self, lr: float) -> None:
        self.adam = torch.optim.Adam(self.params, lr=lr)

    def set(self, theta: np.ndarray) -> None:
        write(self.params, theta)

    def get(self) -> np.ndarray:
        return read(self.params)

    def _likelihood(self, y: Tensor) -> Tensor:
        if self.adjoint:
            return self._by_rule(y)
        value, info = self.gp.log_marginal_likelihood(self.X, y, return_info=True)
        self._note(info)
        return value

    def _by_rule(self, y: Tensor) -> Tensor:
        """The same objective through the public functions, which let the gradient rule be named."""
        K = self.gp.kernel(self.X, backend=backend(self.where)).shift(self.gp.noise)
        r = y - self.gp.mean(self.X)
        settings = {"method": ritz.Lanczos(rtol=self.rtol), "gradient": ritz.Adjoint(), "return_info": True}
        quadratic, first = ritz.quadratic_form(ritz.functions.inverse, K, r, **settings)
        logdet, info = ritz.logdet(K, estimator=ritz.Hutchinson(PROBES), **settings)
        self._note(info)
        self.report["depth_of_y"] = first.depth
        return -0.5 * (quadratic + logdet + len(y) * float(np.log(2 * np.pi)))

    def _note(self, info: Any) -> None:
        self.report = {"depth": info.depth, "products": info.num_matvecs, "status": str(info.status.value)}
        self.report["method"] = str(info.method)
        if info.standard_error is not None:
            self.report["standard_error"] = float(info.standard_error.detach())
        for key in ("backend", "preconditioner", "preconditioner_rank", "standard_errors"):
            if info.details.get(key) is not None:
                self.report[key] = str(info.details[key])

    def step(self) -> float:
        """Value, gradient and update; returns −log p / n."""
        self.adam.zero_grad()
        loss = -self._likelihood(self.y) / len(self.y)
        loss.backward()
        self.adam.step()
        return float(loss.detach())

    def solution(self) -> np.ndarray:
        """K̂⁻¹(y − m) as the gradient uses it: −∂ log p / ∂y."""
        y = self.y.clone().requires_grad_()
        (g,) = torch.autograd.grad(self._likelihood(y), y)
        return -g.double().numpy()

    def predict(self, Xs: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Means at all points, variances of new observations at the first few, by the posterior's own methods."""
        P = torch.from_numpy(Xs).to(self.X.dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = self.gp.condition(self.X, self.y)
            return posterior.mean(P).double().numpy(), posterior.variance(P[:first], noise=True).double().numpy()
