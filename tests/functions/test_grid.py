"""Every rule × operator kind × function × dtype: values, gradients in tensors and vectors, against dense autograd."""

from functools import partial

import pytest
import torch
from tests.functions.cases import (
    DTYPES,
    FUNCTIONS,
    GENERAL,
    HERMITIAN,
    KINDS,
    TOLERANCE,
    N,
    assert_close,
    dense_funm,
    is_general,
    leaves,
    method_for,
    randn,
    real_inner,
    relative,
)

import ritz
from ritz import functions as F
from ritz.functions.scalar import Exp

RULES = (ritz.Frechet(), ritz.Adjoint(), ritz.Unrolled())
name = lambda x: getattr(x, "__name__", None) or str(x).removeprefix("torch.").removesuffix("()")


@pytest.fixture
def g():
    return torch.Generator().manual_seed(7)


def compare(kind, dtype, g, vectors, cotangent, ours, reference, tol, rules=RULES):
    """One loss by dense autograd and by every rule of ritz: value, and gradients in all tensors and vectors."""
    tensors, operator, matrix = kind(dtype, g)
    params64, vs64 = leaves(tensors, "double"), leaves(vectors, "double")
    expected = reference(matrix(*params64), *vs64)
    wide = cotangent.to(torch.complex128 if cotangent.is_complex() else torch.float64)
    expected_grads = torch.autograd.grad(real_inner(wide, expected), params64 + vs64)
    for rule in rules:
        params, vs = leaves(tensors), leaves(vectors)
        value = ours(operator(*params), *vs, gradient=rule)
        grads = torch.autograd.grad(real_inner(cotangent.to(value.dtype), value), params + vs)
        assert_close([value, *grads], [expected, *expected_grads], tol, str(rule))
        assert value.real.dtype == dtype.to_real() and value.is_complex() == expected.is_complex()
        for found, like in zip(grads, params + vs, strict=True):
            assert found.dtype == like.dtype and found.shape == like.shape


# The full table for one Hermitian and one general kind; for the other kinds functions that stand for the rest.
SOME = ("exp", "log", "power-2", "gauss")
TABLE = [
    (kind, function)
    for kind in KINDS.values()
    for function in (FUNCTIONS if kind in (HERMITIAN[0], GENERAL[0]) else SOME)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("kind", "function"), TABLE, ids=name)
def test_multiply_and_forms(kind, function, dtype, g):
    f, dense = FUNCTIONS[function]
    B, G = randn(g, N, 2, dtype=dtype), randn(g, N, 2, dtype=dtype)
    v, u = B[:, 0], G[:, 0]
    herm, tol, options = not is_general(kind), TOLERANCE[dtype], {"method": method_for(kind)}
    rules = RULES if function in SOME and dtype != torch.complex128 else RULES[:2]
    one, state = torch.ones((), dtype=dtype), g.get_state()
    real = (lambda x: x.real) if herm else (lambda x: x)
    for vectors, cotangent, ours, reference in (
        ([B], G, partial(ritz.funm_multiply, f, **options), lambda A, B: dense_funm(dense, A, herm) @ B),
        (
            [u, v],
            one,
            partial(ritz.bilinear_form, f, **options),
            lambda A, u, v: u.conj() @ dense_funm(dense, A, herm) @ v,
        ),
        (
            [v],
            real(one),
            partial(ritz.quadratic_form, f, **options),
            lambda A, v: real(v.conj() @ dense_funm(dense, A, herm) @ v),
        ),
    ):
        g.set_state(state)
        compare(kind, dtype, g, vectors, cotangent, ours, reference, tol, rules)


@pytest.mark.parametrize("kind", [HERMITIAN[0], HERMITIAN[2], *GENERAL], ids=name)
def test_auto_and_a_vector(kind, g):
    """The defaults: adaptive depth, Lanczos or Arnoldi by the operator's flag, shape of the operand."""
    v, G = randn(g, N), randn(g, N)
    reference = lambda A, v: torch.linalg.matrix_exp(A) @ v
    compare(kind, torch.float64, g, [v], G, partial(ritz.funm_multiply, F.exp), reference, 1e-8, RULES[:1])


COMPLEX_VALUED = {
    "exp(ix)": lambda x: torch.exp(1j * x),
    "1/(x+2i)": lambda x: 1 / (x + 2j),
    "Exp(0.3-1i)": Exp(0.3 - 1j),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("function", COMPLEX_VALUED)
@pytest.mark.parametrize("kind", [HERMITIAN[0], *GENERAL], ids=name)
def test_complex_valued_functions(kind, function, dtype, g):
    """Complex f of a real or complex operator: complex results with both parts of the gradient, never a cast."""
    f = COMPLEX_VALUED[function]
    v, u = randn(g, N, dtype=dtype), randn(g, N, dtype=dtype)
    G, c = randn(g, N, dtype=dtype.to_complex()), torch.tensor(0.6 - 0.8j, dtype=dtype.to_complex())
    herm, state, options = not is_general(kind), g.get_state(), {"method": method_for(kind)}
    W = lambda x: x.to(torch.complex128)
    dense = lambda A: dense_funm(f, A, herm)
    for vectors, cotangent, ours, reference in (
        ([v], G, partial(ritz.funm_multiply, f, **options), lambda A, v: dense(A) @ W(v)),
        ([v], c, partial(ritz.quadratic_form, f, **options), lambda A, v: W(v).conj() @ dense(A) @ W(v)),
        ([u, v], c, partial(ritz.bilinear_form, f, **options), lambda A, u, v: W(u).conj() @ dense(A) @ W(v)),
    ):
        g.set_state(state)
        compare(kind, dtype, g, vectors, cotangent, ours, reference, TOLERANCE[dtype])


def test_complex_valued_trace(g):
    A = randn(g, N, N)
    A = A + A.mT
    estimate = ritz.trace(A, lambda x: torch.exp(1j * x), estimator=ritz.Hutchinson(N))
    assert relative(estimate, torch.exp(1j * torch.linalg.eigvalsh(A)).sum()) < 1e-12


# -- expm ------------------------------------------------------------------------------------------------------------

TIMES = {
    "number": (0.1, False),
    "negative": (-1.7, False),
    "imaginary": (-0.6j, False),
    "scalar": (torch.tensor(0.7, dtype=torch.float64), True),
    "offset grid": (torch.tensor([0.5, 0.75, 1.3], dtype=torch.float64), True),
    "decreasing through zero": (torch.tensor([0.4, 0.0, -0.9], dtype=torch.float64), True),
    "complex scalar": (torch.tensor(0.3 + 0.8j, dtype=torch.complex128), True),
    "complex grid": (torch.tensor([0.2j, -0.3 + 0.1j], dtype=torch.complex128), True),
    "list": ([0.1, -0.2], False),
    "one": (1, False),
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=name)
@pytest.mark.parametrize("kind", [HERMITIAN[0], HERMITIAN[2], GENERAL[0]], ids=name)
def test_expm(kind, dtype, times, g):
    t, with_time = TIMES[times]
    T = (
        t
        if isinstance(t, torch.Tensor)
        else torch.tensor(t, dtype=torch.complex128 if isinstance(t, complex) else torch.float64)
    )
    for shape in ((N,), (N, 2)):
        B = randn(g, *shape, dtype=dtype)
        out = dtype.to_complex() if T.is_complex() else dtype
        G = randn(g, *T.shape, *shape, dtype=out)
        state = g.get_state()

        def reference(A, B, t=T, out=out):
            parts = [torch.linalg.matrix_exp(s.to(out) * A.to(out)) @ B.to(out) for s in t.reshape(-1)]
            return torch.stack(parts) if t.ndim else parts[0]

        g.set_state(state)
        ours = lambda A, B, s=t, **o: ritz.expm_multiply(A, B, s, method=method_for(kind), **o)
        compare(kind, dtype, g, [B, t] if with_time else [B], G, ours, reference, 1e-9)


def test_expm_is_a_group(g):
    A, v = randn(g, 40, 40) / 6, randn(g, 40)
    there = ritz.expm_multiply(A, v, 1.3)
    assert relative(ritz.expm_multiply(A, there, -1.3), v) < 1e-8


def test_expm_of_a_skew_generator_is_unitary(g):
    M = randn(g, 30, 30, dtype=torch.complex128)
    psi = randn(g, 30, dtype=torch.complex128)
    out = ritz.expm_multiply(ritz.aslinearoperator((M + M.mH) / 2), psi, -2j)
    assert abs(float(out.norm() / psi.norm()) - 1) < 1e-9


# -- shifts and traces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    ("kind", "function"),
    [(kind, f) for kind in HERMITIAN for f in (("log", "exp", "rsqrt", "gauss") if kind is HERMITIAN[0] else ("log",))],
    ids=name,
)
def test_shifts(kind, dtype, function, g):
    """vᴴ f(A + σI) v for a grid of σ from one run, with derivatives in A, v and σ."""
    f, dense = FUNCTIONS[function]
    v, sigma = randn(g, N, dtype=dtype), torch.tensor([0.0, 0.3, 2.0], dtype=dtype.to_real())
    G = randn(g, 3, dtype=dtype.to_real())

    def reference(A, v, sigma):
        eye = torch.eye(N, dtype=A.dtype)
        return torch.stack([(v.conj() @ dense_funm(dense, A + s * eye, True) @ v).real for s in sigma])

    ours = lambda A, v, s, **o: ritz.quadratic_form(f, A, v, shifts=s, method=ritz.Lanczos(N), **o)
    compare(kind, dtype, g, [v, sigma], G, ours, reference, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS.values(), ids=name)
def test_exact_traces(kind, dtype, g):
    """With m >= n probes nothing is random: trace, logdet and diagonal equal the dense ones, and so do gradients."""
    herm, state, tol = not is_general(kind), g.get_state(), TOLERANCE[dtype]
    probes = ritz.Hutchinson(N + 3)
    options = {"estimator": probes, "method": method_for(kind)}
    dense = lambda A: dense_funm(torch.exp, A, herm)
    real = lambda x: x.real if herm and x.is_complex() else x
    c = (
        torch.tensor(1.5 - 0.5j, dtype=dtype)
        if dtype.is_complex and not herm
        else torch.tensor(1.5, dtype=dtype.to_real())
    )
    w = randn(g, N, dtype=dtype)
    rules = RULES if kind in (HERMITIAN[2], GENERAL[0]) and dtype != torch.complex128 else RULES[:2]
    for cotangent, ours, reference in (
        (c, partial(ritz.trace, f=F.exp, **options), lambda A: real(torch.trace(dense(A)))),
        (c, partial(ritz.logdet, **options), lambda A: real(torch.trace(dense_funm(torch.log, A, herm)))),
        (w, partial(ritz.diagonal, f=F.exp, **options), lambda A: torch.diagonal(dense(A))),
        (c, partial(ritz.trace, estimator=probes), lambda A: real(torch.trace(A))),
        (w, ritz.diagonal, lambda A: torch.diagonal(A)),
        (w, lambda A, gradient: ritz.diagonal(A, estimator=probes).to(dtype), lambda A: torch.diagonal(A)),
    ):
        g.set_state(state)
        compare(kind, dtype, g, [], cotangent, ours, reference, tol, rules)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_logdet_curve(rule, g):
    M = randn(g, N, N)
    A = (M @ M.mT / N).requires_grad_()
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64, requires_grad=True)
    weights = randn(g, 3)
    curve = ritz.logdet(
        ritz.aslinearoperator(A), shifts=sigma, estimator=ritz.Hutchinson(N), method=ritz.Lanczos(N), gradient=rule
    )
    grads = torch.autograd.grad(curve @ weights, (A, sigma))
    eye = torch.eye(N, dtype=torch.float64)
    expected = torch.stack([torch.logdet(A + s * eye) for s in sigma])
    expected_grads = torch.autograd.grad(expected @ weights, (A, sigma))
    symmetric = lambda G: (G + G.mT) / 2  # rules A and "unrolled" promise it on symmetric perturbations only
    grads, expected_grads = ((symmetric(a), s) for a, s in (grads, expected_grads))
    assert_close([curve, *grads], [expected, *expected_grads], 1e-10)
