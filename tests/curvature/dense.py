"""Dense references for curvature operators: torch.func Jacobians and torch's own losses, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


def flat_function(model: nn.Module, names: list[str], x: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Outputs as a function of the named parameters in one vector, and that vector."""
    own = [model.get_parameter(name).detach() for name in names]
    theta = torch.cat([p.reshape(-1) for p in own])

    def f(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in own])
        values = {n: part.reshape(p.shape) for n, part, p in zip(names, parts, own)}
        return functional_call(model, values, x if isinstance(x, tuple) else (x,))

    return f, theta


def jacobian(model: nn.Module, names: list[str], x: Any) -> tuple[Tensor, Tensor]:
    """J (outputs, P) and the outputs."""
    f, theta = flat_function(model, names, x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = jacrev(f)(theta)
        return J.reshape(-1, theta.numel()).detach(), f(theta).detach()


def ggn(model: nn.Module, names: list[str], x: Any, y: Any, loss: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """Jᵀ H J with H the full Hessian of the loss, with its own reduction, in all outputs at once."""
    J, f = jacobian(model, names, x)
    H = torch.autograd.functional.hessian(lambda z: loss(z, y), f).reshape(f.numel(), f.numel())
    return J.mT @ H @ J


def hessian(model: nn.Module, names: list[str], x: Any, y: Any, loss: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """∂²loss/∂θ²."""
    f, theta = flat_function(model, names, x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(lambda v: loss(f(v), y), theta)
