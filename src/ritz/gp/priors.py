"""Priors on hyper-parameters: densities by attribute path, evaluated at the positive values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, LogNormal

from ..errors import OperandError

LENGTHSCALE, OUTPUTSCALE, NOISE = "kernel.base_kernel.lengthscale", "kernel.outputscale", "noise"


def vanilla_priors(d: int) -> dict[str, Distribution]:
    """Weak priors for standardised data and a kernel ``Scale(RBF(d))`` or ``Scale(Matern(nu, d))``, by path.

        log ℓ_j ~ N(√2 + ½ log d, 3)      log outputscale ~ N(0, 1)      log σ² ~ N(−4, 4)

    Distances between random points grow as √d, and so does the prior's typical length-scale: without it every point
    looks far from every other in many dimensions. Without the second one a nearly linear target drives output scale
    and length-scales to infinity together, where the covariance is singular in float32.

    Args:
        d: the number of inputs.

    Reference: the first: Hvarfner, Hellsten, Nardi, Vanilla Bayesian optimization performs great in high dimensions,
    2024, equation 4 (they fix the output scale at 1). The other two are broad and ours.
    """
    if d < 1:
        raise OperandError(f"vanilla_priors(d={d}); expected at least one input")
    return {
        LENGTHSCALE: _log_normal(math.sqrt(2) + 0.5 * math.log(d), math.sqrt(3)),
        OUTPUTSCALE: _log_normal(0.0, 1.0),
        NOISE: _log_normal(-4.0, 2.0),
    }


def _log_normal(mean: float, deviation: float) -> Distribution:
    loc, scale = (torch.tensor(v, dtype=torch.float64) for v in (mean, deviation))
    return LogNormal(loc, scale)


def checked_priors(gp: nn.Module, priors: Mapping[str, Any] | None) -> dict[str, Any]:
    """The priors as a dictionary of our own, every one of them evaluated once.

    Raises:
        OperandError: a path that leads nowhere or to no tensor, a prior without ``log_prob``, shapes that do not fit.
    """
    if priors is not None and not isinstance(priors, Mapping):
        raise OperandError(f"priors is a {type(priors).__name__}; expected a dictionary of attribute path and prior")
    out = dict(priors or {})
    for path, prior in out.items():
        if not callable(getattr(prior, "log_prob", None)):
            raise OperandError(
                f"the prior of {path!r} is a {type(prior).__name__}; expected a torch.distributions object, or another "
                "with log_prob(tensor)"
            )
        _log_density(gp, path, prior)
    return out


def log_density(gp: nn.Module, priors: Mapping[str, Any]) -> Tensor:
    """Σ log p(value at path), a scalar in float64 on the device of the parameters."""
    device = next((p.device for p in gp.parameters()), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for path, prior in priors.items():
        total = total + _log_density(gp, path, prior).to(device)
    return total


def _log_density(gp: nn.Module, path: str, prior: Any) -> Tensor:
    value = _value(gp, path).to(torch.float64).to(_device(prior))
    try:
        if isinstance(prior, Distribution) and not _supported(prior, value.detach()):
            return torch.full((), -math.inf, dtype=torch.float64)
        return prior.log_prob(value).double().sum()
    except (ValueError, RuntimeError) as error:
        raise OperandError(
            f"the prior of {path!r} does not take a value of shape {tuple(value.shape)}: {' '.join(str(error).split())}"
        ) from error


def _value(gp: nn.Module, path: str) -> Tensor:
    try:
        value = attrgetter(path)(gp)
    except AttributeError:
        known = ", ".join(sorted(_paths(gp)))
        raise OperandError(f"there is no {path!r} to have a prior; known are {known}") from None
    if not isinstance(value, Tensor):
        raise OperandError(f"{path!r} is a {type(value).__name__}; a prior needs a hyper-parameter, a tensor")
    return value


def _paths(gp: nn.Module) -> list[str]:
    """Paths of the hyper-parameters: where a module has ``raw_x``, x is the value meant."""
    out = []
    for name, _ in gp.named_parameters():
        head, _, last = name.rpartition(".")
        last = last.removeprefix("raw_")
        out.append(f"{head}.{last}" if head else last)
    return out


def _supported(prior: Distribution, value: Tensor) -> bool:
    """Whether the value is where the prior has any density; True where the prior does not say."""
    try:
        support = prior.support
    except NotImplementedError:
        return True
    return support is None or bool(support.check(value).all())


def _device(prior: Any) -> torch.device:
    """Where the prior's numbers are: a distribution has no ``.to()``, so the value goes to it."""
    if isinstance(prior, nn.Module):
        return next((t.device for t in (*prior.parameters(), *prior.buffers())), torch.device("cpu"))
    for value in getattr(prior, "__dict__", {}).values():
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, (Distribution, nn.Module)):
            return _device(value)
    return torch.device("cpu")
