"""e^{tA}v by every method against the dense exponential and autograd through it."""

from __future__ import annotations

import gc
import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import ritz
from ritz.errors import ConvergenceError, DomainError, OperandError
from ritz.functions.exponential import _rays
from ritz.functions.scalar import Exp
from ritz.functions.shift_invert import OfInverse
from ritz.functions.timed import PhiTerm, Wave

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


def test_substeps_that_cannot_converge_are_reported() -> None:
    _, S, v = problem(False)
    with pytest.raises(ConvergenceError, match=r"e\^\{tA\}v: step limit reached"):
        ritz.expm_multiply(ritz.aslinearoperator(S), v, 3.0, method=ritz.Arnoldi(max_matvecs=1), on_failure="raise")


NASTY = {
    "zero": torch.zeros(N, N, dtype=torch.float64),
    "nilpotent": torch.diag(torch.arange(1.0, N, dtype=torch.float64), 1),
    "far from normal": torch.diag(torch.full((N - 1,), 30.0, dtype=torch.float64), 1)
    - torch.diag(torch.linspace(1, 2, N, dtype=torch.float64)),
    "trace of 1e4": 1e4 * torch.eye(N, dtype=torch.float64) * 1e-3
    + torch.diag(torch.ones(N - 1, dtype=torch.float64), 1),
}


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


# -- Chebyshev -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_chebyshev(t: Any, dtype: torch.dtype) -> None:
    M, S, v = problem(True, dtype)
    times = as_time(t)
    top = float(torch.linalg.eigvalsh(S.detach()).max())
    info = compare(S, [M, v, times], v, times, 1e-9, method=ritz.Chebyshev(bounds=(-0.1, 1.05 * top)))
    assert info.num_matvecs == v.shape[1] * (info.depth - 1)


def test_chebyshev_of_any_function() -> None:
    M, S, v = problem(True)
    S = S + torch.eye(N, dtype=torch.float64)
    top = float(torch.linalg.eigvalsh(S.detach()).max())
    A = ritz.aslinearoperator(S, hermitian=True)
    for f, f_dense in ((ritz.functions.log, torch.log), (ritz.functions.power(-0.3), lambda x: x**-0.3)):
        w, U = torch.linalg.eigh(S)
        y = U @ (f_dense(w).unsqueeze(1) * (U.mT @ v))
        found = ritz.funm_multiply(f, A, v, method=ritz.Chebyshev(bounds=(0.9, 1.1 * top)))
        assert float(((found - y).norm() / y.norm()).detach()) < 1e-9
        ours = torch.autograd.grad(found.sin().sum(), [M, v], retain_graph=True)
        for a, b in zip(ours, torch.autograd.grad(y.sin().sum(), [M, v], retain_graph=True)):
            assert float(((a - b).norm() / b.norm()).detach()) < 1e-8


def test_chebyshev_notices_wrong_bounds() -> None:
    _, S, v = problem(True)
    with pytest.raises(DomainError, match="an eigenvalue lies outside"):
        ritz.expm_multiply(ritz.aslinearoperator(S), v, -10.0, method=ritz.Chebyshev(bounds=(0.0, 5.0)))
    with pytest.raises(OperandError, match="expected a Hermitian operator"):
        ritz.expm_multiply(ritz.aslinearoperator(problem(False)[1]), v, method=ritz.Chebyshev(bounds=(0.0, 5.0)))
    with pytest.raises(OperandError, match="a < b"):
        ritz.Chebyshev(bounds=(2.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_chebyshev_estimates_its_bounds(dtype: torch.dtype) -> None:
    M, S, v = problem(True, dtype)
    eigenvalues = torch.linalg.eigvalsh(S.detach())
    for method in (ritz.Chebyshev(), ritz.Chebyshev(40)):
        y, info = ritz.expm_multiply(ritz.aslinearoperator(S), v, -1.0, method=method, return_info=True)
        low, high = info.method.bounds
        assert low <= eigenvalues[0] and high >= eigenvalues[-1]
        assert info.num_matvecs == 16 + v.shape[1] * (info.depth - 1)
        torch.testing.assert_close(y, torch.matrix_exp(-S) @ v, rtol=1e-8, atol=1e-8)
    eye = ritz.operators.Identity(5, dtype=dtype)
    y = ritz.funm_multiply(ritz.functions.exp, eye, torch.ones(5, dtype=dtype), method=ritz.Chebyshev(8))
    torch.testing.assert_close(y, torch.full((5,), math.e, dtype=dtype))


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


def test_the_resolvent_of_a_matrix_far_from_normal_is_not_believed() -> None:
    v = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for n, error in ((30, ConvergenceError), (N, (ConvergenceError, DomainError))):
        A = ritz.aslinearoperator(NASTY["far from normal"][:n, :n].contiguous(), hermitian=False)
        with pytest.raises(error, match="stagnated|far from normal"):
            ritz.expm_multiply(A, v[:n], 1.0, method=ritz.ShiftInvert(), on_failure="raise")


# -- shift and invert ----------------------------------------------------------------------------------------------


def stiff(hermitian: bool) -> tuple[Tensor, Tensor, Tensor]:
    M, S, v = problem(True)
    turn = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    S = -300.0 * S
    return M, S if hermitian else S + (turn - turn.mT), v


@pytest.mark.parametrize("rule", [ritz.Frechet(), ritz.Adjoint()], ids=["Frechet", "Adjoint"])
@pytest.mark.parametrize("hermitian", [True, False], ids=["Hermitian", "general"])
@pytest.mark.parametrize("t", [1.0, [0.0, 0.3, 1.0]], ids=["one", "grid"])
def test_shift_invert(hermitian: bool, t: Any, rule: Any) -> None:
    M, S, v = stiff(hermitian)
    times = as_time(t)
    # The spaces of 40 vectors hold everything, which rule A refuses: a fixed depth before that.
    kind = ritz.Lanczos if hermitian else ritz.Arnoldi
    method = ritz.ShiftInvert(krylov=kind(34) if isinstance(rule, ritz.Adjoint) else None)
    info = compare(S, [M, v, times], v, times, 1e-8, method=method, gradient=rule)
    assert info.method == method and info.details["gamma"] == 0.1


def laplacian(n: int, values: Tensor) -> ritz.LinearOperator:
    """−D diag(values) Dᵀ of a path with fixed ends, sparse."""
    off = torch.arange(n - 1)
    row = torch.cat([torch.arange(n), off, off + 1])
    col = torch.cat([torch.arange(n), off + 1, off])
    entries = torch.cat([-(values[:-1] + values[1:]), values[1:-1], values[1:-1]])
    order = torch.argsort(row * n + col)
    crow = torch.zeros(n + 1, dtype=torch.long)
    crow[1:] = torch.bincount(row, minlength=n).cumsum(0)
    return ritz.operators.Sparse(crow, col[order], entries[order], (n, n), hermitian=True)


def test_auto_takes_the_resolvent_of_stiff_heat() -> None:
    n = 1000
    c = (1 + torch.rand(n + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    v = torch.sin(torch.linspace(0, 3, n, dtype=torch.float64)).requires_grad_()
    t = torch.tensor(1e4, dtype=torch.float64, requires_grad=True)
    A = laplacian(n, c)
    y, info = ritz.expm_multiply(A, v, t, return_info=True, on_failure="raise")
    assert isinstance(info.method, ritz.ShiftInvert) and info.depth < 40
    w, U = torch.linalg.eigh(A.to_dense())
    expected = U @ (torch.exp(t * w) * (U.mT @ v))
    assert float(((y - expected).norm() / expected.norm()).detach()) < 1e-8
    ours = torch.autograd.grad(y.square().sum(), [c, v, t], retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(expected.square().sum(), [c, v, t])):
        assert float(((a - b).norm() / b.norm()).detach()) < 1e-6
    mild, info = ritz.expm_multiply(A, v, 10.0, return_info=True)
    assert isinstance(info.method, ritz.Lanczos)
    assert isinstance(ritz.expm_multiply(A, v, -1e-3, return_info=True)[1].method, ritz.Lanczos)


def test_shift_invert_takes_a_solver_and_sums() -> None:
    n = 300
    A = laplacian(n, torch.ones(n + 1, dtype=torch.float64))
    v = torch.cos(torch.arange(n, dtype=torch.float64))
    shifted = 50.0 * A + ritz.operators.Diagonal(-torch.rand(n, dtype=torch.float64))
    expected = torch.matrix_exp(shifted.to_dense()) @ v

    def solver(A: Any, gamma: float) -> Any:
        M = torch.eye(n, dtype=torch.float64) - gamma * A.to_dense()
        return lambda X: torch.linalg.solve(M, X)

    for method in (ritz.ShiftInvert(), ritz.ShiftInvert(solver=solver), ritz.ShiftInvert(gamma=0.05)):
        torch.testing.assert_close(ritz.expm_multiply(shifted, v, method=method), expected, rtol=1e-7, atol=1e-9)


def test_shift_invert_refuses() -> None:
    _, S, v = stiff(True)
    A = ritz.aslinearoperator(S)
    for t in (1j, [-1.0, 1.0]):
        with pytest.raises(OperandError, match="expected real times of one sign"):
            ritz.expm_multiply(A, v, t, method=ritz.ShiftInvert())
    with pytest.raises(OperandError, match="cannot be unrolled"):
        ritz.expm_multiply(A, v, 1.0, method=ritz.ShiftInvert(), gradient=ritz.Unrolled())
    big = ritz.aslinearoperator(lambda x: -x, shape=3000, dtype=torch.float64, hermitian=True)
    with pytest.raises(OperandError, match="cannot factor"):
        ritz.expm_multiply(big, torch.ones(3000, dtype=torch.float64), 1.0, method=ritz.ShiftInvert())
    with pytest.raises(OperandError, match="expected .solve, solve_adjoint."):
        method = ritz.ShiftInvert(solver=lambda A, gamma: lambda X: X)
        ritz.expm_multiply(ritz.aslinearoperator(problem(False)[1]), v, 1.0, method=method)


# -- divided differences of functions of time, in many digits ------------------------------------------------------


def _exact(f: Any, x: float) -> Any:
    x, t = mpmath.mpf(x), mpmath.mpf(f.t if not isinstance(f, OfInverse) else 0)
    if isinstance(f, OfInverse):
        return mpmath.exp(mpmath.mpf(f.f.scale) * (1 - 1 / x) / mpmath.mpf(f.gamma))
    if isinstance(f, PhiTerm):
        z = t * x
        return t**f.j * mpmath.hyp1f1(1, f.j + 1, z) / mpmath.factorial(f.j)
    root = mpmath.sqrt(x)
    return {0: mpmath.cos(t * root), 1: t * mpmath.sinc(t * root), 2: -root * mpmath.sin(t * root)}[f.kind]


POINTS = [0.0, 1e-12, 1e-6, 0.1, 0.1000001, 1.0, 1.1, 2.0, 5.0, 30.0, 30.001, 400.0]
FUNCTIONS = [
    Wave(0, 1.3),
    Wave(1, 1.3),
    Wave(2, 1.3),
    Wave(1, -2.0),
    PhiTerm(1, -0.7),
    PhiTerm(3, -0.7),
    PhiTerm(2, 0.1),
]
FUNCTIONS.append(OfInverse(Exp(-1.5), -0.2))


@pytest.mark.parametrize("f", FUNCTIONS, ids=repr)
def test_divided_differences_to_many_digits(f: Any) -> None:
    points = [x for x in POINTS if x > 0.01] if isinstance(f, OfInverse) else POINTS
    with mpmath.workdps(60):
        for a in points:
            for b in points:
                x, y = mpmath.mpf(a), mpmath.mpf(b)
                if a == b:
                    h = mpmath.mpf(10) ** -20 * (1 + x)
                    x, y = (x, x + h) if not isinstance(f, OfInverse) else (x, x * (1 + mpmath.mpf(10) ** -20))
                u, w = _exact(f, x), _exact(f, y)
                exact = (u - w) / (x - y)
                found = float(f.divided_difference(*torch.tensor([[a], [b]], dtype=torch.float64)))
                scale = abs(exact) + (abs(u) + abs(w)) / max(abs(x) + abs(y), 1)
                assert abs(found - exact) < 1e-12 * scale, (a, b)


@pytest.mark.parametrize("f", FUNCTIONS[:-1], ids=repr)
def test_slope_in_time(f: Any) -> None:
    x, h = torch.tensor([0.0, 0.3, 4.0], dtype=torch.float64), 1e-5
    later, earlier = (type(f)(f.kind if isinstance(f, Wave) else f.j, f.t + s) for s in (h, -h))
    torch.testing.assert_close(f.in_time()(x), (later(x) - earlier(x)) / (2 * h), rtol=1e-7, atol=1e-8)


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


def relative_to_dense(A: ritz.LinearOperator, v: Tensor, t: float, y: Tensor) -> float:
    w, U = torch.linalg.eigh(A.to_dense().detach())
    exact = U @ (torch.exp(t * w) * (U.mT @ v))
    return float((y.detach() - exact).norm() / exact.norm())


@pytest.mark.parametrize("stiffness", [1e4, 1e5, 1e6, 1e7])
def test_the_number_of_solves_does_not_grow_with_the_stiffness(stiffness: float) -> None:
    """Half of the line diffuses slowly, the other one as fast as the stiffness says."""
    n = 60
    scale = stiffness / 4
    values = scale * torch.ones(n + 1, dtype=torch.float64)
    values[: n // 2] *= 10 / scale  # slow and fast halves
    v = torch.sin(torch.linspace(0, 3, n, dtype=torch.float64))
    A = laplacian(n, values)
    y, info = ritz.expm_multiply(A, v, 1.0, method=ritz.ShiftInvert(), return_info=True, on_failure="raise")
    assert relative_to_dense(A, v, 1.0, y) < 1e-8
    assert info.depth <= 30


def test_a_solver_of_ones_own_inside_of_the_resolvent() -> None:
    n = 120
    c = (1 + torch.rand(n + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    v = torch.sin(torch.linspace(0, 3, n, dtype=torch.float64))
    A = 50.0 * laplacian(n, c)
    calls = []

    def by_conjugate_gradients(A: ritz.LinearOperator, gamma: float) -> Any:
        M = (ritz.operators.Identity(n, dtype=torch.float64) - gamma * A).declare(hermitian=True, psd=True)
        calls.append(gamma)
        return lambda X: ritz.solve(M, X, method=ritz.CG(rtol=1e-13))

    pair = lambda A, gamma: (by_conjugate_gradients(A, gamma),) * 2  # noqa: E731
    exact = torch.matrix_exp(A.to_dense()) @ v
    (wanted,) = torch.autograd.grad(exact.square().sum(), c, retain_graph=True)
    for solver in (by_conjugate_gradients, pair):
        y = ritz.expm_multiply(A, v, 1.0, method=ritz.ShiftInvert(solver=solver))
        (got,) = torch.autograd.grad(y.square().sum(), c, retain_graph=True)
        torch.testing.assert_close(y, exact, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    assert len(calls) == 2


def test_shift_invert_of_a_sparse_operator_that_is_not_hermitian() -> None:
    grid = ritz.expint.Grid((9, 8), border="dirichlet", spacing=0.1)
    c = torch.full((9, 8), 2.0, dtype=torch.float64, requires_grad=True)
    wind = torch.full((2, 9, 8), 3.0, dtype=torch.float64)
    A = ritz.expint.Diffusion(c, grid) - ritz.expint.Advection(list(wind), grid)
    v = torch.cos(torch.arange(72.0, dtype=torch.float64))
    y = ritz.expm_multiply(A, v, 0.1, method=ritz.ShiftInvert(), on_failure="raise")
    exact = torch.matrix_exp(0.1 * A.to_dense()) @ v
    torch.testing.assert_close(y, exact, rtol=1e-8, atol=1e-9)
    (got,), (wanted,) = (torch.autograd.grad(x.square().sum(), c) for x in (y, exact))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
