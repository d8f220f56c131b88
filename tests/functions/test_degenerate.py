"""Identity, repeated and clustered spectra, exhausted Krylov spaces, zero and extreme operands: right gradients."""

import math

import pytest
import torch
from tests.functions.cases import relative

import ritz
from ritz import functions as F
from ritz.errors import BreakdownError
from ritz.testing import oracles

EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def g():
    return torch.Generator().manual_seed(3)


def randn(g, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=g)


def spectrum(values, g, dtype=torch.float64):
    Q = torch.linalg.qr(randn(g, len(values), len(values), dtype=dtype))[0]
    A = (Q * torch.tensor(values, dtype=torch.float64)) @ Q.mH
    return (A + A.mH) / 2


SPECTRA = {
    "identity": [1.0] * 10,
    "multiple of the identity": [2.0] * 10,
    "two eigenvalues": [1.0] * 4 + [3.0] * 6,
    "three eigenvalues": [0.5] * 3 + [1.0] * 4 + [4.0] * 3,
    "clustered 1e-6": [1 + 1e-6 * i for i in range(5)] + [3 - 1e-6 * i for i in range(5)],
    "clustered 1e-13": [1 + 1e-13 * i for i in range(5)] + [3 - 1e-13 * i for i in range(5)],
    "one element": [1.7],
    "simple": [0.5 + 0.3 * i for i in range(10)],
}
SMOOTH = {
    "exp": (F.exp, torch.exp),
    "log": (F.log, torch.log),
    "sqrt": (F.sqrt, torch.sqrt),
    "inverse": (F.inverse, torch.reciprocal),
    "gauss": (lambda x: torch.exp(-x * x), lambda x: torch.exp(-x * x)),
}


def oracle(dense, A, u, v):
    """L_f(A, u vᴴ) by divided differences in the eigenbasis, with f' by finite arithmetic on ties: for Hermitian A."""
    w, Q = torch.linalg.eigh(A)
    a, b = w.unsqueeze(1), w.unsqueeze(0)
    middle, near = (a + b) / 2, (a - b).abs() < 1e-4
    x = middle.clone().requires_grad_()
    d1 = torch.autograd.grad(dense(x).sum(), x, create_graph=True)[0]
    d2 = torch.autograd.grad(d1.sum(), x, create_graph=True)[0] if d1.requires_grad else torch.zeros_like(x)
    d3 = torch.autograd.grad(d2.sum(), x)[0] if d2.requires_grad else torch.zeros_like(x)
    ratio = torch.where(
        near, d1 + (a - b) ** 2 / 24 * d3, (dense(a) - dense(b)) / torch.where(near, 1.0, a - b)
    ).detach()
    return Q @ (ratio * (Q.mH @ torch.outer(u, v.conj()) @ Q)) @ Q.mH


def off(x, y, size):
    """Error relative to ``size``, for what may be zero (log of the identity)."""
    return float((x.detach() - y).norm()) / size


def herm(G):
    return (G + G.mH) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("function", SMOOTH)
@pytest.mark.parametrize("case", SPECTRA)
def test_degenerate_spectra(case, function, dtype, g):
    """Frechet() for every output, Adjoint() for forms; fixed depth beyond exhaustion, and adaptive."""
    f, dense = SMOOTH[function]
    matrix = spectrum(SPECTRA[case], g, dtype)
    n = matrix.shape[0]
    u, v = randn(g, n, dtype=dtype), randn(g, n, dtype=dtype)
    expected_form, expected_bilinear = oracle(dense, matrix, v, v), oracle(dense, matrix, u, v)
    if function == "exp" and dtype == torch.float64:  # the reference itself, against the block-matrix formula
        assert relative(expected_bilinear, oracles.bilinear_form_gradient(dense, matrix, u, v)) < 1e-10
    funm = oracles.funm(dense, matrix)
    size = float(funm.norm()) + 1.0
    for method in (ritz.Lanczos(n + 4), ritz.Auto()):
        A, x = matrix.clone().requires_grad_(), v.clone().requires_grad_()
        for rule in (ritz.Frechet(), ritz.Adjoint()):
            value = ritz.quadratic_form(f, ritz.aslinearoperator(A, hermitian=True), x, method=method, gradient=rule)
            G, xbar = torch.autograd.grad(value, (A, x))
            assert abs(float(value.detach()) - float((v.conj() @ funm @ v).real)) < 1e-12 * size * float(v.norm() ** 2)
            assert relative(herm(G), expected_form) < (1e-8 if rule == ritz.Adjoint() and "1e-6" in case else 1e-10), (
                rule
            )
            assert off(xbar, 2 * funm @ v, size) < 1e-10
        y = u.clone().requires_grad_()
        value = ritz.bilinear_form(f, ritz.aslinearoperator(A, hermitian=True), y, x, method=method)
        G, xbar, ybar = torch.autograd.grad(value.real, (A, x, y))
        assert relative(G, expected_bilinear) < 1e-10
        assert off(xbar, funm.mH @ u, size) < 1e-10 and off(ybar, funm @ v, size) < 1e-10
    probes = ritz.Hutchinson(n)
    A = matrix.clone().requires_grad_()
    (G,) = torch.autograd.grad(ritz.trace(ritz.aslinearoperator(A, hermitian=True), f, estimator=probes), A)
    assert relative(G, oracles.trace_gradient(dense, matrix)) < 1e-9


@pytest.mark.parametrize("case", ["identity", "two eigenvalues", "three eigenvalues", "clustered 1e-6"])
def test_general_route_on_degenerate_spectra(case, g):
    """The same operators by Arnoldi: block matrices are then highly defective, and the named functions do not mind."""
    matrix = spectrum(SPECTRA[case], g)
    u, v = randn(g, 10), randn(g, 10)
    for f, dense in (SMOOTH["exp"], SMOOTH["log"], SMOOTH["sqrt"], SMOOTH["inverse"]):
        A, x = matrix.clone().requires_grad_(), v.clone().requires_grad_()
        value = ritz.bilinear_form(f, ritz.aslinearoperator(A), u, x, method=ritz.Arnoldi(14))
        G, xbar = torch.autograd.grad(value, (A, x))
        assert relative(G, oracle(dense, matrix, u, v)) < 1e-10
        assert off(xbar, oracles.funm(dense, matrix) @ u, 1.0) < 1e-10


def test_defective_matrix(g):
    """A Jordan block under named functions."""
    matrix = torch.eye(6, dtype=torch.float64) * 2 + torch.diag(torch.ones(5, dtype=torch.float64), 1)
    u, v = randn(g, 6), randn(g, 6)
    for f, dense in ((F.exp, torch.exp), (F.log, torch.log), (F.inverse, torch.reciprocal)):
        A = matrix.clone().requires_grad_()
        value = ritz.bilinear_form(f, ritz.aslinearoperator(A), u, v, method=ritz.Arnoldi(6))
        (G,) = torch.autograd.grad(value, A)
        assert relative(G, oracles.bilinear_form_gradient(dense, matrix, u, v)) < 1e-9
    with pytest.raises(ritz.errors.DomainError, match="nearly defective.*named function"):
        ritz.funm_multiply(lambda x: torch.sin(x), ritz.aslinearoperator(matrix), v, method=ritz.Arnoldi(6))


# -- the case of math.md: 3-D Laplacian, whose eigenvalues are repeated, past convergence ------------------------------


@pytest.fixture(scope="module")
def laplacian():
    """−Δ on 9³ points with its sine eigenbasis, a vector, and the exact gradient of vᵀ log(A) v."""
    m = 9
    i = torch.arange(1, m + 1, dtype=torch.float64)
    S = math.sqrt(2 / (m + 1)) * torch.sin(torch.outer(i, i) * math.pi / (m + 1))
    w1 = 2 - 2 * torch.cos(i * math.pi / (m + 1))
    Q = torch.kron(torch.kron(S, S), S)
    w = (w1[:, None, None] + w1[None, :, None] + w1).reshape(-1)
    A = (Q * w) @ Q
    v = torch.randn(m**3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = w.unsqueeze(1), w.unsqueeze(0)
    low, gap = torch.minimum(a, b), (a - b).abs()
    ratio = torch.where(gap < 1e-14, 1 / low, torch.log1p(gap / low) / torch.where(gap < 1e-14, 1.0, gap))
    c = Q @ v
    return (A + A.mT) / 2, v, float(c @ (c * w.log())), Q @ (ratio * torch.outer(c, c)) @ Q


#          depth, value, rule A, rule F: the table of the design notes
FIGURES = [
    (10, 3e-6, 5.0e-4, 3.1e-3),
    (20, 3e-10, 2.8e-8, 1.5e-5),
    (40, 7e-16, 4.9e-15, 6.3e-12),
    (80, 0.0, 5e-15, 4.6e-15),
]


@pytest.mark.parametrize(("depth", "value", "rule_a", "rule_f"), FIGURES)
def test_figures_of_the_laplacian(laplacian, depth, value, rule_a, rule_f):
    matrix, v, exact, gradient = laplacian
    for rule, figure in ((ritz.Adjoint(), rule_a), (ritz.Frechet(rtol=1e-14), rule_f)):
        A = matrix.clone().requires_grad_()
        found = ritz.quadratic_form(
            F.log, ritz.aslinearoperator(A, hermitian=True), v, method=ritz.Lanczos(depth), gradient=rule
        )
        (G,) = torch.autograd.grad(found, A)
        error = relative(herm(G), gradient)
        assert error < max(10 * figure, 1e-12), (rule, error)
        assert error > figure / 10 or figure < 1e-10, "better than the theory allows: is the reference what it says?"
        assert abs(float(found.detach()) - exact) / abs(exact) < max(10 * value, 1e-13)


def test_default_rank_cut_costs_no_accuracy(laplacian):
    """The default tolerance of the rank may follow the Krylov error, but must stay below it."""
    matrix, v, _, gradient = laplacian
    for depth in (10, 20, 40):
        errors = []
        for rule in (ritz.Frechet(), ritz.Frechet(rtol=1e-14)):
            A = matrix.clone().requires_grad_()
            form = ritz.quadratic_form(
                F.log, ritz.aslinearoperator(A, hermitian=True), v, method=ritz.Lanczos(depth), gradient=rule
            )
            errors.append(relative(torch.autograd.grad(form, A)[0], gradient))
        assert errors[0] < 1.5 * errors[1] + 1e-11, errors


def test_adjoint_of_a_vector_output_at_breakdown_names_frechet(g):
    two = torch.eye(8, dtype=torch.float64).mul(2).requires_grad_()
    for A, v, method in (
        (ritz.aslinearoperator(two, hermitian=True), randn(g, 8), ritz.Lanczos(4)),
        (ritz.aslinearoperator(two, hermitian=True), randn(g, 8), ritz.Lanczos(1)),  # the last step breaks down
        (ritz.aslinearoperator(two), randn(g, 8), ritz.Arnoldi(3)),
        (ritz.aslinearoperator(two, hermitian=True), torch.zeros(8, dtype=torch.float64), ritz.Lanczos(2)),
    ):
        with pytest.raises(BreakdownError, match="exhausted at depth [01] of.*Frechet"):
            ritz.funm_multiply(F.exp, A, v, method=method, gradient=ritz.Adjoint())
    with torch.no_grad():  # the value alone is right
        v = randn(g, 8)
        out = ritz.funm_multiply(F.exp, A, v, method=ritz.Arnoldi(3), gradient=ritz.Adjoint())
    assert relative(out, math.exp(2) * v) < 1e-14


def test_adjoint_of_a_vector_output_on_the_full_space(g):
    """k > n is no breakdown in this sense: all of A was seen."""
    matrix, u, v = spectrum([1.0, 1.5, 2.2, 3.0, 4.5], g), randn(g, 5), randn(g, 5)
    for method in (ritz.Lanczos(9), ritz.Arnoldi(9)):
        A, x = matrix.clone().requires_grad_(), v.clone().requires_grad_()
        op = ritz.aslinearoperator(A, hermitian=True if isinstance(method, ritz.Lanczos) else None)
        out = ritz.funm_multiply(F.exp, op, x, method=method, gradient=ritz.Adjoint())
        G, xbar = torch.autograd.grad(out @ u, (A, x))
        assert relative(herm(G), herm(oracle(torch.exp, matrix, u, v))) < 1e-10
        assert relative(xbar, torch.linalg.matrix_exp(matrix) @ u) < 1e-10


def test_filler_past_breakdown_is_outside_of_the_domain():
    """e₁ has Rayleigh quotient zero, which fills T past breakdown; 1/x must not be asked for it."""
    swap = torch.tensor([[0.0, 2.0, 0], [2.0, 0.0, 0], [0, 0, 5.0]], dtype=torch.float64).requires_grad_()
    e1 = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    out = ritz.funm_multiply(F.inverse, ritz.aslinearoperator(swap, hermitian=True), e1, method=ritz.Lanczos(3))
    assert relative(out, torch.tensor([0, 0.5, 0], dtype=torch.float64)) < 1e-14
    (G,) = torch.autograd.grad(out.sum(), swap)
    inverse = torch.linalg.inv(swap.detach())
    assert relative(G, -torch.outer(inverse @ torch.ones(3, dtype=torch.float64), inverse @ e1)) < 1e-12


@pytest.mark.parametrize("rule", [ritz.Frechet(), ritz.Adjoint(), ritz.Unrolled()], ids=str)
def test_zero_vectors(rule, g):
    """f(A)0 = 0; a form has gradient zero there, f(A)v has f(A)ᴴ g in v; other columns of the block are not touched."""
    matrix, v = spectrum([0.5, 1.0, 2.0, 3.0], g), randn(g, 4)
    A, V = matrix.clone().requires_grad_(), torch.stack([torch.zeros_like(v), v], 1).requires_grad_()
    op = ritz.aslinearoperator(A, hermitian=True)
    forms = ritz.quadratic_form(F.log, op, V, method=ritz.Lanczos(4), gradient=rule)
    G, Vbar = torch.autograd.grad(forms.sum(), (A, V))
    assert float(forms[0].detach()) == 0 and float(Vbar[:, 0].abs().max()) == 0
    assert relative(herm(G), oracle(torch.log, matrix, v, v)) < 1e-11
    assert relative(Vbar[:, 1], 2 * oracles.funm(torch.log, matrix) @ v) < 1e-11
    if isinstance(rule, ritz.Frechet):
        u = randn(g, 4)
        for op in (ritz.aslinearoperator(A, hermitian=True), ritz.aslinearoperator(A)):
            method = ritz.Lanczos(4) if op.hermitian and op is not None else ritz.Arnoldi(4)
            out = ritz.funm_multiply(F.exp, op, V, method=method, gradient=rule)
            G, Vbar = torch.autograd.grad(u @ out[:, 0] + 0 * out.sum(), (A, V))
            assert float(out[:, 0].detach().abs().max()) == 0 and float(G.abs().max()) == 0
            assert relative(Vbar[:, 0], torch.linalg.matrix_exp(matrix) @ u) < 1e-11


@pytest.mark.parametrize("kind", ["Hermitian", "general"])
def test_zero_operator(kind, g):
    A = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    method = ritz.Lanczos(3) if kind == "Hermitian" else ritz.Arnoldi(3)
    u, v = randn(g, 5), randn(g, 5)
    out = ritz.funm_multiply(F.exp, ritz.aslinearoperator(A), v, method=method)
    (G,) = torch.autograd.grad(out @ u, A)
    assert relative(out, v) < 1e-15 and relative(G, torch.outer(u, v)) < 1e-13


@pytest.mark.parametrize("method", [ritz.Lanczos(3), ritz.Arnoldi(3), ritz.Auto()], ids=str)
def test_no_columns(method, g):
    A = spectrum([1.0, 2.0, 3.0], g).requires_grad_()
    B = torch.zeros(3, 0, dtype=torch.float64, requires_grad=True)
    for out in (
        ritz.funm_multiply(F.exp, A, B, method=method),
        ritz.quadratic_form(F.exp, A, B, method=method),
        ritz.expm_multiply(A, B, torch.tensor([0.1, 0.2]), method=method),
    ):
        assert out.numel() == 0
        gradients = torch.autograd.grad(out.sum(), (A, B), allow_unused=True)
        assert all(x is None or float(x.abs().sum()) == 0 for x in gradients)


SCALES = [(torch.float64, s, c) for s in (1e-100, 1e100) for c in (1e-30, 1.0, 1e30)]
SCALES += [(torch.float32, s, c) for s in (1e-15, 1e15) for c in (1e-6, 1.0, 1e6)]
SCALES += [(torch.float32, 1.0, 1e-30), (torch.float32, 1.0, 1e30)]


@pytest.mark.parametrize("rule", [ritz.Frechet(), ritz.Adjoint()], ids=str)
@pytest.mark.parametrize(("dtype", "scale", "cotangent"), SCALES)
def test_extreme_magnitudes(dtype, scale, cotangent, rule, g):
    """A, then v, scaled far up or down, under huge and tiny cotangents: homogeneous functions scale exactly."""
    n, tol = 8, 1e-10 if dtype == torch.float64 else 1e-4
    unit = spectrum([0.5 + 0.4 * i for i in range(n)], g)
    u, v = randn(g, n), randn(g, n)
    for f, p, dense in (
        (F.sqrt, 0.5, torch.sqrt),
        (F.inverse, -1, torch.reciprocal),
        (F.power(1.5), 1.5, lambda x: x**1.5),
    ):
        form, bilinear = oracle(dense, unit, v, v), oracle(dense, unit, u, v)
        for scale_a, scale_v in ((scale, 1.0), (1.0, scale)):
            A = (unit * scale_a).to(dtype).requires_grad_()
            x = (v * scale_v).to(dtype).requires_grad_()
            op = ritz.aslinearoperator(A, hermitian=True)
            out = ritz.funm_multiply(f, op, x, method=ritz.Lanczos(n), gradient=rule) @ u.to(dtype)
            expected = cotangent * scale_a ** (p - 1) * scale_v
            if (1e-30 < expected * min(1, scale_a) and expected < 1e35) or dtype == torch.float64:
                G, xbar = torch.autograd.grad(out, (A, x), torch.tensor(cotangent, dtype=dtype))
                assert relative(herm(G).double() / expected, herm(bilinear)) < tol
                assert relative(xbar.double() / (cotangent * scale_a**p), oracles.funm(dense, unit) @ u) < tol
            expected = cotangent * scale_a ** (p - 1) * scale_v**2
            limit = 300 if dtype == torch.float64 else 35
            if abs(math.log10(expected)) < limit - 5 and abs(math.log10(scale_v)) * 2 < limit:
                out = ritz.quadratic_form(f, op, x, method=ritz.Lanczos(n), gradient=rule)
                G, _ = torch.autograd.grad(out, (A, x), torch.tensor(cotangent, dtype=dtype))
                assert relative(herm(G).double() / expected, form) < tol


@pytest.mark.parametrize("t", [1e-12, 1.0, 300.0])
def test_exponentials_of_large_and_small_steps(t, g):
    """Decay over a long time: no overflow, and the derivative in t with it."""
    unit, v, u = spectrum([0.01 + 0.4 * i for i in range(8)], g), randn(g, 8), randn(g, 8)
    time = torch.tensor(-t, dtype=torch.float64, requires_grad=True)
    for method in (ritz.Lanczos(8), ritz.Arnoldi(8)):
        A = unit.clone().requires_grad_()
        out = ritz.expm_multiply(ritz.aslinearoperator(A), v, time, method=method)
        G, tbar = torch.autograd.grad(out @ u, (A, time))
        w, Q = torch.linalg.eigh(unit)
        decay = torch.exp(-t * w)
        assert relative(out, Q @ (decay * (Q.T @ v))) < 1e-10
        assert relative(tbar, (Q.T @ u) @ (w * decay * (Q.T @ v))) < 1e-9
        if t <= 1:
            assert relative(G, -t * oracle(torch.exp, -t * unit, u, v)) < 1e-9
        assert bool(torch.isfinite(G).all())
