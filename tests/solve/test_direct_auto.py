"""Dense factorisations, their refusals, and the choice of a solver."""

import pytest
import torch

import ritz
from ritz.errors import DomainError, OperandError
from ritz.result import Status
from ritz.solve import CG, GMRES, MINRES, Direct, choose, solve
from ritz.testing import problem, problems


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SOLVABLE = [p.name for p in problems() if p.name not in ("zero", "rank_deficient", "hilbert", "spd_ill")]


@pytest.mark.parametrize("name", SOLVABLE)
def test_against_dense(name):
    p = problem(name)
    b = normal(p.n, 2, dtype=p.matrix.dtype)
    for flags in ({}, {"psd": True}) if p.psd else ({},):
        x, info = solve(ritz.aslinearoperator(p.matrix, **flags), b, method=Direct(), return_info=True)
        expected = torch.linalg.solve(p.dense, b)
        assert float((x - expected).norm() / expected.norm()) <= 1e-12
        assert info.status is Status.CONVERGED and float(info.residual.max()) <= 1e-12


def test_diagonal_is_a_division():
    d = torch.linspace(1.0, 2.0, 100_000, dtype=torch.float64)
    A = ritz.operators.Diagonal(d)
    b = normal(100_000)
    x, info = solve(A, b, return_info=True)
    assert isinstance(info.method, Direct)
    torch.testing.assert_close(x, b / d)
    torch.testing.assert_close(solve(ritz.operators.identity(5, dtype=torch.float64), b[:5]), b[:5])
    z = torch.complex(d[:5], d[5:10])
    c = torch.complex(b[:5], b[5:10]).requires_grad_()
    (g,) = torch.autograd.grad(solve(ritz.operators.Diagonal(z), c).real.sum(), c)
    torch.testing.assert_close(g, (1 / z).conj())


def test_products_are_counted():
    A = ritz.Counting(ritz.aslinearoperator(problem("spd_well").matrix))
    with torch.no_grad():
        _, info = solve(A, normal(16, 2), method=Direct(), return_info=True)
    assert info.num_matvecs == A.num_matvecs == 16 + 2


def test_not_positive_definite_says_what_and_what_to_do():
    A = ritz.aslinearoperator(problem("indefinite").matrix, psd=True)
    with pytest.raises(DomainError, match=r"n=16, torch.float64.*smallest eigenvalue is -1\.[0-9]+.*add a shift"):
        solve(A, normal(16), method=Direct())
    with pytest.raises(DomainError, match="work in float64"):
        solve(
            ritz.aslinearoperator(problem("indefinite").matrix.float(), psd=True), normal(16).float(), method=Direct()
        )
    with pytest.raises(DomainError, match="A \\+ σI is not positive definite.*smallest eigenvalue"):
        solve(A, normal(16), method=Direct(), shifts=[0.1])


@pytest.mark.parametrize("flags", [{}, {"psd": True}])
def test_exactly_singular_raises(flags):
    with pytest.raises(DomainError, match="singular|not positive definite"):
        solve(ritz.aslinearoperator(problem("zero").matrix, **flags), normal(10), method=Direct())


def test_singular_up_to_rounding_is_reported():
    with pytest.warns(ritz.errors.ConvergenceWarning, match="Direct.*worst residual"):
        _, info = solve(problem("rank_deficient").matrix, normal(16), method=Direct(), return_info=True)
    assert info.status is Status.STAGNATED and float(info.residual) > 1e-6


def test_size_is_refused_with_the_bytes_it_needs():
    A = ritz.aslinearoperator(lambda x: x, shape=100_000, dtype=torch.float64)
    with pytest.raises(OperandError, match=r"160000000000 bytes \(149.0 GiB\).*max_bytes"):
        solve(A, torch.ones(100_000, dtype=torch.float64), method=Direct())
    small = ritz.aslinearoperator(problem("spd_well").matrix)
    with pytest.raises(OperandError, match="4096 bytes"):
        solve(small, normal(16), method=Direct(max_bytes=4095))
    solve(small, normal(16), method=Direct(max_bytes=4096))


def operator(n, **flags):
    return ritz.aslinearoperator(lambda x: x, shape=n, dtype=torch.float64, **flags)


@pytest.mark.parametrize(
    "A, options, expected",
    [
        (operator(2000, psd=True), {}, Direct),
        (operator(2001, psd=True), {}, CG),
        (operator(2001, hermitian=True), {}, MINRES),
        (operator(2001), {}, Direct),
        (operator(23_170), {}, Direct),
        (operator(23_171), {}, GMRES),
        (operator(100), {"preconditioned": True}, GMRES),
        (operator(100, psd=True), {"preconditioned": True}, CG),
        (operator(100, hermitian=True), {"preconditioned": True}, MINRES),
        (ritz.operators.Diagonal(torch.ones(50_000)), {}, Direct),
    ],
)
def test_choice(A, options, expected):
    assert isinstance(choose(A, **options), expected)


def test_choice_is_reported():
    _, info = solve(problem("spd_well").matrix, normal(16), return_info=True)
    assert info.method == Direct(rtol=1e-6)
    with pytest.raises(OperandError, match="method is 'cg'"):
        solve(problem("spd_well").matrix, normal(16), method="cg")


@pytest.mark.parametrize(
    "name, method, words",
    [
        ("nonsymmetric", CG(), "known not to be.*hermitian=True"),
        ("nonsymmetric", MINRES(), "known not to be.*hermitian=True"),
        ("complex_symmetric", CG(), "known not to be"),
    ],
)
def test_methods_refuse_what_they_cannot_do(name, method, words):
    p = problem(name)
    with pytest.raises(OperandError, match=words):
        solve(p.matrix, normal(p.n, dtype=p.matrix.dtype), method=method)


def test_cg_refuses_what_is_known_to_be_indefinite():
    A = ritz.aslinearoperator(problem("indefinite").matrix, psd=False)
    with pytest.raises(OperandError, match="psd=False.*MINRES"):
        solve(A, normal(16), method=CG())
