"""Problems with a known exponential, and the comparison of values and gradients with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ritz

N = 40


TIMES: dict[str, Any] = {
    "forward": 3.0,
    "backward": -4.0,
    "turned": 2j,
    "grid": [0.5, -1.0, 0.0, 2.0, 2.5],
    "offset": [1.5, 2.0],
    "two rays": [1j, 2j, -1.0],
}


def problem(hermitian: bool, dtype: torch.dtype = torch.float64, m: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A leaf, the matrix made of it, and vectors."""
    g = torch.Generator().manual_seed(3)
    M = torch.randn(N, N, dtype=dtype, generator=g)
    M = (M @ M.mH / 10 if hermitian else M / 1.5).requires_grad_()
    v = torch.randn(N, m, dtype=dtype, generator=g).requires_grad_()
    return M, (M + M.mH) / 2 if hermitian else M * 1.0, v


def as_time(t: Any) -> Tensor:
    some = t if isinstance(t, list) else [t]
    dtype = torch.complex128 if any(isinstance(s, complex) for s in some) else torch.float64
    return torch.tensor(t, dtype=dtype, requires_grad=True)


def dense(S: Tensor, v: Tensor, t: Tensor) -> Tensor:
    wide = torch.promote_types(S.dtype, t.dtype)
    parts = [torch.matrix_exp(s * S.to(wide)) @ v.to(wide) for s in t.reshape(-1)]
    return torch.stack(parts).reshape(*t.shape, *v.shape)


def compare(S: Tensor, leaves: list[Tensor], v: Tensor, t: Tensor, tolerance: float, **options: Any) -> ritz.Info:
    """Value and gradients against the dense exponential."""
    hermitian = bool(torch.equal(S, S.mH))
    y = dense(S, v, t)
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((g.conj() * y).sum().real, leaves, retain_graph=True)
    found, info = ritz.expm_multiply(
        ritz.aslinearoperator(S, hermitian=hermitian), v, t, return_info=True, on_failure="raise", **options
    )
    assert float(((found - y).norm() / y.norm()).detach()) < tolerance
    grads = torch.autograd.grad((g.conj() * found).sum().real, leaves, retain_graph=True)
    for a, b in zip(grads, expected, strict=True):
        assert float(((a - b).norm() / b.norm()).detach()) < 10 * tolerance
    assert info.backward is not None and info.backward.num_matvecs > 0
    return info


NASTY = {
    "zero": torch.zeros(N, N, dtype=torch.float64),
    "nilpotent": torch.diag(torch.arange(1.0, N, dtype=torch.float64), 1),
    "far from normal": torch.diag(torch.full((N - 1,), 30.0, dtype=torch.float64), 1)
    - torch.diag(torch.linspace(1, 2, N, dtype=torch.float64)),
    "trace of 1e4": 1e4 * torch.eye(N, dtype=torch.float64) * 1e-3
    + torch.diag(torch.ones(N - 1, dtype=torch.float64), 1),
}
