"""Small semilinear systems, and solutions of theirs that ritz has no part in (SciPy, or a fine RK4 under autograd)."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ritz.testing import laplacian_1d

D = torch.float64
N = 4
A = -2.0 * laplacian_1d(N).to_dense()
Y0 = torch.tensor([1.0, -0.5, 0.7, 0.2], dtype=D)
FORCE = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=D)


def autonomous(t: Tensor, y: Tensor) -> Tensor:
    return y - y**3 + torch.sin(y) * torch.roll(y, 1)


def driven(t: Tensor, y: Tensor) -> Tensor:
    """Depends on t in a source and in the Jacobian."""
    return torch.sin(3 * t) * FORCE + torch.exp(-t) * torch.sin(y) * torch.roll(y, 1)


def with_linear(f: Callable[[Tensor, Tensor], Tensor], matrix: Tensor = A) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: matrix @ y + f(t, y)


def by_scipy(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, times: tuple[float, ...], **settings: Any) -> Tensor:
    def rate(t: float, y: np.ndarray) -> np.ndarray:
        return f(torch.tensor(t, dtype=D), torch.from_numpy(y)).numpy()

    options = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-15} | settings
    found = solve_ivp(rate, (times[0], times[-1]), y0.numpy(), t_eval=times, **options)
    assert found.success
    return torch.from_numpy(found.y.T.copy())


@lru_cache
def reference(f: Callable[[Tensor, Tensor], Tensor], *times: float) -> Tensor:
    """y' = A y + f from Y0."""
    return by_scipy(with_linear(f), Y0, times)


def by_rk4(f: Callable[[Tensor, Tensor], Tensor], y: Tensor, t: Tensor, steps: int = 100) -> Tensor:
    """The classical method, for autograd to go through."""
    out = [y]
    for a, b in zip(t[:-1], t[1:], strict=True):
        h, s = (b - a) / steps, a
        for _ in range(steps):
            k1 = f(s, y)
            k2 = f(s + h / 2, y + h / 2 * k1)
            k3 = f(s + h / 2, y + h / 2 * k2)
            k4 = f(s + h, y + h * k3)
            y, s = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), s + h
        out.append(y)
    return torch.stack(out)


class AllenCahn:
    """u' = ε u'' + u − u³ on (−1, 1), Dirichlet border: 64 points, stiffness 42 from ε = 0.01."""

    n, epsilon, times = 64, 0.01, (0.0, 0.5, 2.0)
    laplacian = -epsilon * laplacian_1d(n, spacing=2 / (n + 1)).to_dense()

    @staticmethod
    def reaction(t: Tensor, u: Tensor) -> Tensor:
        return u - u**3

    @classmethod
    def start(cls) -> Tensor:
        x = torch.linspace(-1, 1, cls.n + 2, dtype=D)[1:-1]
        return (0.53 * x - 0.47 * torch.sin(1.5 * torch.pi * x)) * (1 - x**2)

    @classmethod
    @lru_cache
    def solution(cls) -> Tensor:
        f = with_linear(cls.reaction, cls.laplacian)
        return by_scipy(f, cls.start(), cls.times, method="Radau", rtol=1e-10, atol=1e-12)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.detach() - y.detach()).norm() / y.detach().norm())
