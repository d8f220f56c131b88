"""One look, at the first step, at whether the derivatives of func are those of its values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError, OperandError
from ..operators import LinearOperator
from .linearized import Rate

AGREEMENT = 0.05  # of a difference quotient with the Jacobian's product, relative


def check_time(f: Rate, t: Tensor, y: Tensor, value: Tensor, span: float) -> None:
    """Raise where autograd sees no dependence on t, and the values do depend on it."""
    later = _evaluate(f, t.detach() + 1e-3 * span, y.detach())
    if later is not None and not torch.equal(later, value.detach()):
        raise OperandError(
            "func depends on t where autograd does not see it (float(t), math, NumPy), or is not deterministic; "
            "Rosenbrock methods need ∂f/∂t: write it in torch operations on t, or use ETDRK4 with linear="
        )


def check_dependence(f: Rate, t: Tensor, y: Tensor, value: Tensor) -> None:
    """Raise where autograd sees no dependence on y, and the values do depend on it."""
    x, step = _direction(y)
    other = _evaluate(f, t.detach(), y.detach() + step * x)
    if other is not None and not torch.equal(other, value.detach()):
        raise OperandError(
            "func depends on y where autograd does not see it (NumPy, detach), or is not deterministic; write it in "
            "torch operations, give jacobian=, or use ETDRK4 with linear="
        )


def check_jacobian(f: Rate, t: Tensor, y: Tensor, value: Tensor, N: LinearOperator) -> None:
    """Raise where the operator that was given for ∂f/∂y is far from a difference quotient of f."""
    x, step = _direction(y)
    other = _evaluate(f, t.detach(), y.detach() + step * x)
    if other is None:
        return
    with torch.no_grad():
        quotient, product = (other - value.detach()) / step, N @ x
    gap, size = float((quotient - product).norm()), max(float(quotient.norm()), float(product.norm()))
    noise = 10 * torch.finfo(y.dtype).eps * float(value.detach().norm()) / step
    if gap > AGREEMENT * size + noise:
        raise OperandError(
            f"jacobian(t, y) differs from a difference quotient of func by {gap / size:.1e} of its size; expected the "
            "exact ∂func/∂y (without linear, which is added) as an operator on the flattened state"
        )


def _evaluate(f: Rate, t: Tensor, y: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            return f(t, y).detach()
    except NonFiniteError:
        return None  # outside of the domain of f: nothing to compare


def _direction(y: Tensor) -> tuple[Tensor, float]:
    """A fixed vector without structure, and a step along it."""
    i = torch.arange(y.numel(), dtype=torch.float64, device=y.device)
    x = (0.7 * i * i + 1.3 * i + 0.5).sin().to(y.dtype)
    size = max(float(y.detach().abs().max()), 1e-3) if y.numel() else 1.0
    return x, size * torch.finfo(y.dtype).eps ** 0.5 * 10
