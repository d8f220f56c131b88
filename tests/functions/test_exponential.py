"""e^{tA}v by substeps, under budgets and of matrices that are not normal, against the dense exponential."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from tests.functions.exponentials import NASTY, TIMES, N, as_time, compare, problem
from torch import Tensor

import ritz
from ritz.errors import ConvergenceError, DomainError, OperandError
from ritz.functions.exponential import _rays
from ritz.functions.timed import Wave


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES.keys())
@pytest.mark.parametrize("hermitian", [True, False], ids=["Hermitian", "general"])
@pytest.mark.parametrize("rule", [ritz.Frechet(), ritz.Adjoint()], ids=["Frechet", "Adjoint"])
def test_substeps(hermitian: bool, t: Any, rule: Any) -> None:
    M, S, v = problem(hermitian)
    times = as_time(t)
    method = ritz.Lanczos(max_matvecs=14) if hermitian else ritz.Arnoldi(max_matvecs=14)
    info = compare(S, [M, v, times], v, times, 1e-9, method=method, gradient=rule)
    assert info.details["substeps"] > len(_rays(times.detach().reshape(-1).tolist()))
    assert info.depth <= 14
    assert float(info.residual.detach().max()) < 2e-10  # rtol is 1e-10 for every ray


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_budget_gives_the_same(dtype: torch.dtype) -> None:
    M, S, v = problem(False, dtype)
    t = as_time([1.0, 2.0])
    info = compare(S, [M, v, t], v, t, 1e-9, memory_budget=40 * v.numel() * v.element_size())
    assert info.depth <= 14 and info.details["substeps"] > 1


def test_budget_of_a_callable_that_cannot_wait() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return w * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return w * g, (g * x).sum()

    w = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    diagonal = torch.linspace(0, 9, N, dtype=torch.float64)
    A = ritz.aslinearoperator(lambda x: Hidden.apply(diagonal * x, w), shape=N, dtype=torch.float64, hermitian=True)
    v = torch.ones(N, dtype=torch.float64)
    y = ritz.expm_multiply(A, v, 1.0, memory_budget=50 * N * 8)
    (g,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(g, (diagonal * torch.exp(-2.0 * diagonal)).sum(), rtol=1e-8, atol=0)


def test_budget_holds_memory_down() -> None:
    n, tensors = 20_000, []

    def held(**options: Any) -> int:
        d = torch.linspace(0, 1, n, dtype=torch.float64, requires_grad=True)
        A = ritz.aslinearoperator(lambda x: -400 * d.unsqueeze(1) * x, shape=n, dtype=torch.float64, block=True)
        gc.collect()
        before = {id(x) for x in gc.get_objects() if issubclass(type(x), Tensor)}
        y = ritz.expm_multiply(
            A, torch.ones(n, dtype=torch.float64), 1.0, method=ritz.Arnoldi(max_matvecs=20), **options
        )
        gc.collect()
        new = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and id(x) not in before]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in new}
        tensors.append(y)
        return sum(storages.values())

    vector = n * 8
    assert held() > 2.5 * held(memory_budget=55 * vector)


@pytest.mark.parametrize(
    ("budget", "method", "message"),
    [
        (5 * N * 8, ritz.Auto(), "memory_budget=1600 bytes holds 5 blocks"),
        (30 * N * 8, ritz.Lanczos(25), "holds a space of depth 10"),
    ],
)
def test_budget_too_small(budget: int, method: Any, message: str) -> None:
    _, S, v = problem(True, m=1)
    with pytest.raises(OperandError, match=message):
        ritz.expm_multiply(ritz.aslinearoperator(S), v, 1.0, method=method, memory_budget=budget)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("depth, most", [(10, 700), (20, 40), (30, 15)])
def test_short_spaces_of_an_oscillation_converge(depth: int, most: int, m: int) -> None:
    """Their coefficients end in rounding, whose decay is none: a step must not be refused for it."""
    g = torch.Generator().manual_seed(0)
    d = 4 * torch.rand(400, dtype=torch.float64, generator=g)
    v = torch.randn(400, m, dtype=torch.complex128, generator=g)
    A = ritz.operators.Diagonal(d.to(torch.complex128)).declare(hermitian=True)
    budget = int(2.5 * depth + 4.5) * v.numel() * v.element_size()
    y, info = ritz.expm_multiply(A, v, -50j, memory_budget=budget, return_info=True, on_failure="raise")
    torch.testing.assert_close(y, torch.exp(-50j * d).unsqueeze(1) * v, rtol=0, atol=1e-10)
    assert info.depth <= depth and info.details["substeps"] < most


@pytest.mark.parametrize("t", [True, [], torch.zeros(0)], ids=str)
def test_times_that_are_none(t: Any) -> None:
    _, S, v = problem(False)
    with pytest.raises(OperandError, match="t is .*expected a number, or a 1-D tensor of at least one time"):
        ritz.expm_multiply(ritz.aslinearoperator(S), v, t)


def test_blocks_without_columns() -> None:
    _, S, v = problem(True)
    none = v[:, :0].detach().requires_grad_()
    A = ritz.aslinearoperator(S)
    for y in (
        ritz.expm_multiply(A, none),
        ritz.expint.phi_multiply(A, [none, none]),
        ritz.expint.wave_multiply(A, none, none)[0],
    ):
        assert y.shape == none.shape


def test_substeps_that_cannot_converge_are_reported() -> None:
    _, S, v = problem(False)
    with pytest.raises(ConvergenceError, match=r"e\^\{tA\}v: step limit reached"):
        ritz.expm_multiply(ritz.aslinearoperator(S), v, 3.0, method=ritz.Arnoldi(max_matvecs=1), on_failure="raise")


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("depth", [12, 300])
def test_matrices_that_are_not_normal(name: str, depth: int) -> None:
    S = NASTY[name].clone().requires_grad_()
    v = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for t in (0.0, 1.0, -0.5):
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        y = torch.matrix_exp(time * S) @ v
        A = ritz.aslinearoperator(S, hermitian=False)
        found = ritz.expm_multiply(A, v, time, method=ritz.Arnoldi(max_matvecs=depth), on_failure="raise")
        torch.testing.assert_close(found, y, rtol=1e-8, atol=1e-8 * float(y.detach().norm()))
        g = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for a, b in zip(torch.autograd.grad(found @ g, [S, v, time]), torch.autograd.grad(y @ g, [S, v, time])):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * float(b.detach().norm()) + 1e-12)


def test_a_budget_is_refused_where_nothing_is_bounded_by_it() -> None:
    _, S, v = problem(True)
    A = ritz.aslinearoperator(S)
    for method in (
        ritz.Chebyshev(),
        ritz.ShiftInvert(),
        ritz.Lanczos(reorthogonalize=False, two_pass=True),
    ):
        with pytest.raises(OperandError, match="no bases to bound"):
            ritz.expm_multiply(A, v, method=method, memory_budget=10**6)


def test_waves_are_for_positive_operators() -> None:
    with pytest.raises(DomainError, match="expected a positive semidefinite one"):
        Wave(0, 1.0).check_domain(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    assert math.isclose(float(Wave(0, 1.0)(torch.tensor(-1e-9, dtype=torch.float64))), 1.0)


def test_backward_reports_what_it_misses() -> None:
    _, S, v = problem(False)
    A = ritz.aslinearoperator(S)
    rule = ritz.Frechet(method=ritz.Arnoldi(max_matvecs=3))
    y = ritz.expm_multiply(A, v, 1.0, method=ritz.Arnoldi(max_matvecs=14), gradient=rule)
    with pytest.warns(ritz.ConvergenceWarning, match=r"backward of f\(A\)v: step limit reached"):
        y.sum().backward()
