"""The public decompositions through autograd: every output with random cotangents, against naive recorded loops."""

import pytest
import torch

import ritz
from ritz.errors import OperandError, SecondDerivativeError
from ritz.testing import oracles

DTYPES = [torch.float64, torch.complex128]
N, ROWS, K = 14, 11, 5


@pytest.fixture
def g():
    return torch.Generator().manual_seed(17)


def randn(g, *shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=g)


def hermitian(M):
    return (M + M.mH) / 2


def bars(outputs, g):
    return [randn(g, *x.shape, dtype=x.dtype) if x.is_floating_point() or x.is_complex() else None for x in outputs]


def pairing(outputs, cotangents):
    return sum((c.conj() * x).sum().real for x, c in zip(outputs, cotangents, strict=True) if c is not None)


METHODS = {
    "lanczos": (ritz.krylov.lanczos, oracles.lanczos, hermitian, (N, N)),
    "arnoldi": (ritz.krylov.arnoldi, oracles.arnoldi, lambda M: M, (N, N)),
    "golub_kahan": (ritz.krylov.golub_kahan, oracles.golub_kahan, lambda M: M, (ROWS, N)),
}


def operator(form, matrix, shape, dtype, hermitian):
    if form == "dense":
        return ritz.aslinearoperator(matrix, hermitian=hermitian)
    if form == "callable":
        return ritz.aslinearoperator(lambda x: matrix @ x, shape=shape, dtype=dtype, hermitian=hermitian)
    return ritz.aslinearoperator(0.5 * matrix, hermitian=hermitian) * 2.0


@pytest.mark.parametrize("form", ["dense", "callable", "scaled"])
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reorthogonalize", [True, False], ids=["orthogonalised", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_all_outputs(name, reorthogonalize, dtype, columns, form, g):
    """Values and gradients in the matrix and the starting vectors to 1e-10, vector and block."""
    ours, loop, structure, shape = METHODS[name]
    M = randn(g, *shape, dtype=dtype)
    V = randn(g, shape[1], *([] if columns is None else [columns]), dtype=dtype)
    M1, V1 = M.clone().requires_grad_(), V.clone().requires_grad_()
    A = operator(form, structure(M1), shape, dtype, True if name == "lanczos" else None)
    out = ours(A, V1, K, reorthogonalize=reorthogonalize)
    cotangents = bars(out, g)
    assert out.depth.dtype == torch.int64 and not out.depth.requires_grad
    assert out.depth.tolist() == (K if columns is None else [K] * columns)
    found = torch.autograd.grad(pairing(out, cotangents), (M1, V1))

    M2, V2 = M.clone().requires_grad_(), V.clone().requires_grad_()
    total = 0.0
    for i in range(columns or 1):
        v = V2 if columns is None else V2[:, i]
        reference = loop(structure(M2), v, K, reorthogonalize=reorthogonalize)
        for field in reference._fields:
            value, bar = getattr(out, field), cotangents[out._fields.index(field)]
            value, bar = (value, bar) if columns is None else (value[i], bar[i])
            expected = getattr(reference, field)
            assert value.shape == expected.shape and value.dtype == expected.dtype, field
            assert float((value - expected).detach().norm()) <= 1e-10 * float(expected.detach().norm()), field
            total = total + (bar.conj() * expected).sum().real
    expected = torch.autograd.grad(total, (M2, V2))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 1e-10 * float(b.norm())


@pytest.mark.parametrize("name", METHODS)
def test_one_output_at_a_time(name, g):
    """A missing cotangent is zero: the gradients of the outputs one by one add up to that of all of them."""
    ours, _, structure, shape = METHODS[name]
    M, v = randn(g, *shape).requires_grad_(), randn(g, shape[1]).requires_grad_()
    out = ours(ritz.aslinearoperator(structure(M), hermitian=True if name == "lanczos" else None), v, K)
    cotangents = bars(out, g)
    whole = torch.autograd.grad(pairing(out, cotangents), (M, v), retain_graph=True)
    parts = [torch.zeros_like(M), torch.zeros_like(v)]
    for x, c in zip(out, cotangents, strict=True):
        if c is not None:
            grads = torch.autograd.grad(pairing([x], [c]), (M, v), retain_graph=True, allow_unused=True)
            parts = [p if d is None else p + d for p, d in zip(parts, grads, strict=True)]
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_breakdown_gives_finite_gradients(name, g):
    """Identity, k beyond n, zero vector: depth says where it ended, the rest is masked, gradients are finite."""
    ours, _, _, _ = METHODS[name]
    for matrix, v, k, depth in (
        (torch.eye(6), randn(g, 6), 4, 1),
        (torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 3.0])), randn(g, 6), 5, 3),
        (hermitian(randn(g, 6, 6)) + 5 * torch.eye(6), randn(g, 6), 9, 6),
        (torch.eye(6), torch.zeros(6), 3, 0),
        (torch.tensor([[2.0]]), torch.ones(1), 3, 1),
    ):
        A, x = matrix.double().requires_grad_(), v.double().requires_grad_()
        out = ours(ritz.aslinearoperator(A, hermitian=True), x, k)
        assert int(out.depth) == depth
        basis = out.V if name == "golub_kahan" else out.Q
        assert basis.shape == (x.shape[0], k) and float(basis[:, depth:].detach().abs().sum()) == 0
        grads = torch.autograd.grad(pairing(out, bars(out, g)), (A, x))
        assert all(bool(torch.isfinite(t).all()) for t in grads)


@pytest.mark.parametrize("name", METHODS)
def test_costs(name, g):
    """k products (and k adjoint ones for Golub–Kahan); backward k adjoint (and k forward) ones."""
    ours, _, structure, shape = METHODS[name]
    M = structure(randn(g, *shape)).requires_grad_()
    A = ritz.Counting(ritz.aslinearoperator(M, hermitian=True if name == "lanczos" else None))
    out = ours(A, randn(g, shape[1], 2), K)
    two_sided = name == "golub_kahan"
    assert (A.num_forward, A.num_adjoint) == (2 * K, 2 * K if two_sided else 0)
    pairing(out, bars(out, g)).backward()
    assert A.num_matvecs == (4 + (4 if two_sided else 0)) * K and A.num_paired == (4 if two_sided else 2) * K


@pytest.mark.parametrize("name", METHODS)
def test_second_derivatives_are_refused(name, g):
    ours, _, structure, shape = METHODS[name]
    M, v = randn(g, *shape).requires_grad_(), randn(g, shape[1]).requires_grad_()
    out = ours(ritz.aslinearoperator(structure(M), hermitian=True if name == "lanczos" else None), v, 3)
    (d,) = torch.autograd.grad(pairing(out, bars(out, g)), M, create_graph=True)
    for inner in (M, v):
        with pytest.raises(SecondDerivativeError, match=f"krylov.{name} was differentiated twice"):
            torch.autograd.grad(d.sum(), inner, retain_graph=True, allow_unused=True)


SQUARE, ONES = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
WRONG = {
    "not Hermitian": (
        lambda: ritz.krylov.lanczos(torch.ones(3, 3).triu(), torch.ones(3), 2),
        "needs a Hermitian operator; use arnoldi",
    ),
    "rectangular Lanczos": (lambda: ritz.krylov.lanczos(torch.ones(3, 4), torch.ones(4), 2), "square"),
    "rectangular Arnoldi": (
        lambda: ritz.krylov.arnoldi(torch.ones(3, 4), torch.ones(4), 2),
        r"square operator.*\(3, 4\)",
    ),
    "wrong side": (
        lambda: ritz.krylov.golub_kahan(torch.ones(3, 4), torch.ones(3), 2),
        r"v has shape \(3,\); expected \(4,\)",
    ),
    "no steps": (lambda: ritz.krylov.lanczos(SQUARE, ONES, 0), "k=0.*whole number >= 1"),
    "half a step": (lambda: ritz.krylov.arnoldi(SQUARE, ONES, 2.5), "k=2.5"),
    "a truth as a number": (lambda: ritz.krylov.arnoldi(SQUARE, ONES, True), "k=True"),
    "list": (lambda: ritz.krylov.lanczos(SQUARE, [1.0, 1.0, 1.0], 2), "v is a list"),
    "precision": (lambda: ritz.krylov.lanczos(SQUARE, ONES.float(), 2), "v is torch.float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_misuse(case):
    call, match = WRONG[case]
    with pytest.raises(OperandError, match=match):
        call()
