"""What goes wrong: domains, false declarations, operands that do not fit; messages say what came and what to do."""

import warnings

import numpy as np
import pytest
import torch

import ritz
from ritz import functions as F
from ritz.errors import ConvergenceError, ConvergenceWarning, DomainError, NonFiniteError, OperandError

N = 20


@pytest.fixture
def g():
    return torch.Generator().manual_seed(5)


def randn(g, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=g)


@pytest.fixture
def A(g):
    """Positive definite, spectrum 0.5 … 10."""
    Q = torch.linalg.qr(randn(g, N, N))[0]
    M = (Q * torch.linspace(0.5, 10, N, dtype=torch.float64)) @ Q.mT
    return ritz.aslinearoperator((M + M.mT) / 2, hermitian=True)


@pytest.fixture
def v(g):
    return randn(g, N)


POSITIVE_ONLY = {
    "log": F.log,
    "sqrt": F.sqrt,
    "rsqrt": F.rsqrt,
    "power(0.5)": F.power(0.5),
    "power(-1.5)": F.power(-1.5),
}
OUTPUTS = {
    "multiply": lambda f, A, v, **o: ritz.funm_multiply(f, A, v, **o),
    "form": lambda f, A, v, **o: ritz.quadratic_form(f, A, v, **o),
    "bilinear": lambda f, A, v, **o: ritz.bilinear_form(f, A, v.flip(0), v, **o),
    "trace": lambda f, A, v, **o: ritz.trace(A, f, **o),
    "diagonal": lambda f, A, v, **o: ritz.diagonal(A, f, **o),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", POSITIVE_ONLY)
def test_domain_of_an_indefinite_operator(name, output, A, v):
    """The smallest Ritz value is named, with a shift that would mend it; and the run ends at the first look."""
    counting = ritz.Counting(A.shift(-3.0))
    with pytest.raises(
        DomainError, match=rf"{name.split('(')[0]}.*Ritz value -2\.\d+.*all eigenvalues >=? 0.*A\.shift\(sigma\)"
    ):
        OUTPUTS[output](POSITIVE_ONLY[name], counting, v)
    assert counting.num_matvecs <= 12 * 10
    for gradient in (ritz.Adjoint(), ritz.Unrolled()):
        with pytest.raises(DomainError, match="Ritz value -2"):
            OUTPUTS[output](POSITIVE_ONLY[name], A.shift(-3.0), v, gradient=gradient, method=ritz.Lanczos(N))


def test_domain_edges(A, v):
    singular = ritz.aslinearoperator(torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)))
    e1, ones = torch.eye(3, dtype=torch.float64)[0], torch.ones(3, dtype=torch.float64)
    with pytest.raises(DomainError, match="Ritz value 0;.*shift"):
        ritz.quadratic_form(F.inverse, singular, e1)
    with pytest.raises(DomainError, match="expected all eigenvalues > 0"):
        ritz.quadratic_form(F.log, singular, e1)
    assert float(ritz.quadratic_form(F.power(3), A.shift(-3.0), v)) == pytest.approx(
        float(v @ torch.linalg.matrix_power(A.shift(-3.0).to_dense(), 3) @ v)
    )
    # a callable that is infinite, undefined, or without a slope at a Ritz value
    with pytest.raises(DomainError, match="f is inf at the Ritz value 0 "):
        ritz.quadratic_form(lambda x: 1 / x, singular, e1)
    with pytest.raises(DomainError, match="f is nan at the Ritz value -2"):
        ritz.quadratic_form(lambda x: torch.log(x), A.shift(-3.0), v)
    matrix = singular.to_dense().requires_grad_()
    root = ritz.aslinearoperator(matrix, hermitian=True)
    with pytest.raises(DomainError, match="no finite slope"):
        ritz.quadratic_form(lambda x: x.clamp(min=0).sqrt(), root, e1)
    out = ritz.funm_multiply(lambda x: x.clamp(min=0).sqrt(), root, ones)
    torch.testing.assert_close(out.detach(), torch.tensor([0, 1, 2**0.5], dtype=torch.float64), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("method", [ritz.Lanczos(N), ritz.Arnoldi(N), ritz.Auto()], ids=str)
def test_overflow_of_the_function(method, A, v):
    with pytest.raises(DomainError, match="scale the operator|not finite"):
        ritz.expm_multiply(A, v, 1000.0, method=method)


def test_negative_axis_of_a_general_operator(g, v):
    M = torch.diag(torch.linspace(-1, 3, N, dtype=torch.float64)) + 0.1 * randn(g, N, N).triu(1)
    for f in (F.log, F.sqrt, F.rsqrt, F.power(0.5)):
        with pytest.raises(DomainError, match="negative real axis|not finite"):
            ritz.funm_multiply(f, M, v, method=ritz.Arnoldi(N))


@pytest.mark.parametrize("output", ["multiply", "form", "trace"])
def test_false_declaration_of_positive_definiteness(output, A, v):
    """Reported once, with the figure; status says so; on_failure decides."""
    call, lie = OUTPUTS[output], A.shift(-3.0).declare(psd=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, info = call(torch.sin, lie, v, return_info=True)
    assert [w.category for w in seen] == [ConvergenceWarning]
    assert "declared positive semidefinite" in str(seen[0].message) and "Ritz value of -2." in str(seen[0].message)
    assert info.status is ritz.Status.NOT_POSITIVE and not info.status.success and info.status.advice
    with pytest.raises(ConvergenceError, match="declared positive semidefinite"):
        call(torch.sin, lie, v, on_failure="raise")
    _, info = call(torch.sin, lie, v, on_failure="ignore", return_info=True)
    assert info.status is ritz.Status.NOT_POSITIVE
    assert call(torch.sin, A.declare(psd=True), v, return_info=True)[1].status is not ritz.Status.NOT_POSITIVE


SMALL = torch.eye(3, dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)
WRONG = {
    "rows": (
        lambda: ritz.funm_multiply(F.exp, SMALL, torch.ones(4, dtype=torch.float64)),
        OperandError,
        r"B has shape \(4,\); expected \(3,\)",
    ),
    "three dimensions": (
        lambda: ritz.quadratic_form(F.exp, SMALL, torch.ones(1, 3, 1)),
        OperandError,
        r"v has shape \(1, 3, 1\)",
    ),
    "a number": (lambda: ritz.quadratic_form(F.exp, SMALL, torch.tensor(1.0)), OperandError, r"v has shape \(\)"),
    "NumPy": (
        lambda: ritz.funm_multiply(F.exp, SMALL, np.ones(3)),
        OperandError,
        "B is a ndarray; expected a torch.Tensor",
    ),
    "list": (
        lambda: ritz.quadratic_form(F.exp, SMALL, [1.0, 2.0, 3.0]),
        OperandError,
        "v is a list; expected a torch.Tensor",
    ),
    "second list": (lambda: ritz.bilinear_form(F.exp, SMALL, ONES, [1.0] * 3), OperandError, "v is a list"),
    "integers": (
        lambda: ritz.quadratic_form(F.exp, SMALL, torch.arange(3)),
        OperandError,
        r"v is torch.int64.*operator is torch.float64.*\.to\(",
    ),
    "integer operator": (
        lambda: ritz.quadratic_form(F.exp, torch.ones(3, 3, dtype=torch.long), ONES),
        OperandError,
        r"int64; expected a floating.*x\.double",
    ),
    "precision": (
        lambda: ritz.funm_multiply(F.exp, SMALL.float(), ONES),
        OperandError,
        "B is torch.float64.*operator is torch.float32",
    ),
    "complex vector": (lambda: ritz.quadratic_form(F.exp, SMALL, ONES + 0j), OperandError, "v is torch.complex128"),
    "widths": (
        lambda: ritz.bilinear_form(F.exp, SMALL, ONES, ONES[:, None]),
        OperandError,
        r"u has shape \(3,\) and v \(3, 1\)",
    ),
    "rectangular": (
        lambda: ritz.funm_multiply(F.exp, torch.ones(3, 4), torch.ones(3)),
        OperandError,
        r"square.*\(3, 4\)",
    ),
    "rectangular trace": (lambda: ritz.logdet(torch.ones(3, 4)), OperandError, r"square operator.*\(3, 4\)"),
    "NaN": (lambda: ritz.funm_multiply(F.exp, SMALL, ONES * float("nan")), NonFiniteError, "B has 3 NaN or Inf"),
    "Inf in u": (lambda: ritz.bilinear_form(F.exp, SMALL, ONES / 0, ONES), NonFiniteError, "u has 3 NaN"),
    "callable without shape": (
        lambda: ritz.quadratic_form(F.exp, lambda x: x, ONES),
        OperandError,
        "without a shape; pass shape=",
    ),
    "method text": (
        lambda: ritz.quadratic_form(F.exp, SMALL, ONES, method="lanczos"),
        OperandError,
        r"method='lanczos'; expected Lanczos\(k\)",
    ),
    "method class": (
        lambda: ritz.quadratic_form(F.exp, SMALL, ONES, method=ritz.Lanczos),
        OperandError,
        "method=<class.*expected Lanczos",
    ),
    "gradient text": (
        lambda: ritz.quadratic_form(F.exp, SMALL, ONES, gradient="adjoint"),
        OperandError,
        r"gradient='adjoint'; expected Frechet\(\)",
    ),
    "gradient class": (
        lambda: ritz.funm_multiply(F.exp, SMALL, ONES, gradient=ritz.Unrolled),
        OperandError,
        "gradient=<class",
    ),
    "mixed spaces": (
        lambda: ritz.funm_multiply(F.exp, SMALL, ONES, gradient=ritz.Frechet(method=ritz.Arnoldi(3))),
        OperandError,
        "of one kind",
    ),
    "Lanczos, not Hermitian": (
        lambda: ritz.funm_multiply(F.exp, torch.ones(3, 3).triu(), torch.ones(3), method=ritz.Lanczos(2)),
        OperandError,
        r"not Hermitian; use Arnoldi\(\)",
    ),
    "estimator": (lambda: ritz.logdet(SMALL, estimator=5), OperandError, r"estimator=5; expected Hutchinson"),
    "estimator of a diagonal": (lambda: ritz.diagonal(SMALL, F.exp, estimator=5), OperandError, "estimator=5"),
    "half a probe": (lambda: ritz.Hutchinson(2.5), OperandError, "m=2.5"),
    "no probe": (lambda: ritz.Hutchinson(0), OperandError, "at least one"),
    "no steps": (lambda: ritz.Lanczos(0), OperandError, "num_matvecs=0"),
    "scalar shift": (lambda: ritz.logdet(SMALL, shifts=0.1), OperandError, r"shifts has shape \(\).*shape \(p,\)"),
    "matrix of shifts": (lambda: ritz.logdet(SMALL, shifts=torch.ones(2, 2)), OperandError, r"shape \(2, 2\)"),
    "complex shifts": (lambda: ritz.logdet(SMALL, shifts=torch.ones(2) * 1j), OperandError, "expected real numbers"),
    "NaN shift": (lambda: ritz.logdet(SMALL, shifts=torch.tensor([float("nan")])), NonFiniteError, "shifts has 1 NaN"),
    "shifts of a general operator": (
        lambda: ritz.logdet(SMALL + SMALL.roll(1, 0), shifts=torch.ones(1)),
        OperandError,
        "shifts= needs",
    ),
    "shifts without f": (lambda: ritz.trace(SMALL, shifts=torch.ones(1)), OperandError, "needs a function f"),
    "time": (lambda: ritz.expm_multiply(SMALL, ONES, "1"), OperandError, "t is '1'; expected a number"),
    "matrix of times": (
        lambda: ritz.expm_multiply(SMALL, ONES, torch.ones(2, 2)),
        OperandError,
        r"t has shape \(2, 2\)",
    ),
    "NaN time": (lambda: ritz.expm_multiply(SMALL, ONES, float("nan")), NonFiniteError, "t has 1 NaN"),
    "constant f": (
        lambda: ritz.quadratic_form(lambda x: 1.0, SMALL, ONES),
        DomainError,
        r"returned a float.*torch.ones_like",
    ),
    "reducing f": (
        lambda: ritz.funm_multiply(lambda x: x.sum(), SMALL, ONES),
        DomainError,
        r"shape \(\) for eigenvalues.*by itself",
    ),
    "f by name": (lambda: ritz.trace(SMALL, "log"), DomainError, "f is 'log'; expected a function"),
    "on_failure": (
        lambda: ritz.quadratic_form(F.exp, SMALL, ONES, on_failure="print"),
        OperandError,
        "on_failure='print'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_misuse(case):
    call, error, match = WRONG[case]
    with pytest.raises(error, match=match) as caught:
        call()
    assert len(str(caught.value)) < 420, "one sentence, please"


def test_what_users_pass_is_taken(g, A):
    """Plain tensors as operators, non-contiguous and expanded vectors, times as numbers or lists, modules."""
    M, v = A.to_dense(), randn(g, N)
    expected = torch.linalg.matrix_exp(-0.1 * M)
    torch.testing.assert_close(ritz.expm_multiply(M, v, -0.1), expected @ v, rtol=1e-10, atol=1e-12)  # 0.1 in doubles
    torch.testing.assert_close(ritz.expm_multiply(M, v, [-0.1, -0.2])[0], expected @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ritz.expm_multiply(M, v, np.float64(-0.1)), expected @ v, rtol=1e-10, atol=1e-12)
    f = lambda x: torch.exp(-0.1 * x)
    strided, rows = randn(g, N, 6)[:, ::2], randn(g, 3, N).T
    expanded = v[:, None].expand(N, 3)
    for B in (strided, rows, expanded, torch.stack([v, v], 1)[:, 1]):
        torch.testing.assert_close(ritz.funm_multiply(f, M, B), expected @ B, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(ritz.quadratic_form(f, M, B), (B * (expected @ B)).sum(0), rtol=1e-9, atol=1e-11)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(randn(g, N, 4))
            self.log_scale = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return self.log_scale.exp() * x + self.weight @ (self.weight.T @ x)

    layer = Layer()
    operator = ritz.aslinearoperator(layer, shape=N, dtype=torch.float64, psd=True)
    ritz.logdet(operator, estimator=ritz.Hutchinson(N)).backward()
    W = layer.weight.detach().clone().requires_grad_()
    torch.logdet(torch.eye(N, dtype=torch.float64) + W @ W.T).backward()
    torch.testing.assert_close(layer.weight.grad, W.grad, rtol=1e-9, atol=1e-11)
    assert layer.log_scale.grad is not None
