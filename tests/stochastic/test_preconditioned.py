"""log det A through a preconditioner: exact where the probes span the space, its own derivative, honest comparison."""

import pytest
import torch

import ritz
from ritz import Auto, Frechet, Hutchinson, Lanczos, Unrolled
from ritz.errors import OperandError, SecondDerivativeError
from ritz.operators import Diagonal
from ritz.solve import (
    DiagonalPreconditioner,
    Jacobi,
    Landmarks,
    Nystrom,
    PivotedCholesky,
    Preconditioned,
    RandomlyPivotedCholesky,
)
from ritz.stochastic.preconditioned import plain_error, standard_errors

METHODS = {
    "jacobi": Jacobi(),
    "greedy": PivotedCholesky(10),
    "random": RandomlyPivotedCholesky(12),
    "landmarks": Landmarks(range(0, 40, 5)),
    "nystrom": Nystrom(10),
    "auto": Auto(),
}


def points(n, d=2, seed=0, spread=torch.rand):
    return spread(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model:
    """s·exp(−½‖(x − z)/ℓ‖²) with scalar or varying noise; its tensors, the operator, and the dense matrix."""

    def __init__(self, n=60, d=2, lengthscale=0.3, noise=0.01, varied=False):
        self.X = points(n, d)
        numbers = torch.linspace(0.5, 1.5, n, dtype=torch.float64) * noise if varied else torch.tensor(noise).double()
        scales = torch.full((d,), lengthscale, dtype=torch.float64)
        self.tensors = [t.clone().requires_grad_() for t in (scales, torch.tensor(1.3).double(), numbers)]

    def kernel(self, tensors=None):
        scales, s, _ = tensors or self.tensors
        return s * torch.exp(-0.5 * ((self.X[:, None] - self.X[None]) / scales).square().sum(2))

    def operator(self, tensors=None, wrap=lambda K: ritz.aslinearoperator(K, psd=True)):
        noise = (tensors or self.tensors)[2]
        A = wrap(self.kernel(tensors))
        return A.shift(noise) if noise.ndim == 0 else A + Diagonal(noise)

    def dense(self):
        return self.kernel() + torch.diag_embed(self.tensors[2].expand(len(self.X)))


def flat(grads):
    return torch.cat([g.detach().reshape(-1) for g in grads])


@pytest.mark.parametrize("varied", [False, True], ids=["shift", "diagonal"])
@pytest.mark.parametrize("name", METHODS)
def test_exact_with_as_many_probes_as_points(name, varied):
    model = Model(varied=varied)
    value, info = ritz.logdet(
        model.operator(),
        preconditioner=METHODS[name],
        estimator=Hutchinson(60),
        method=Lanczos(rtol=1e-12),
        return_info=True,
    )
    want = torch.logdet(model.dense())
    assert float(value.detach()) == pytest.approx(float(want.detach()), abs=1e-9)
    assert float(info.standard_error) == 0 and info.details["estimator"] == Hutchinson(60)
    got, ref = (torch.autograd.grad(v, model.tensors) for v in (value, want))
    for g, r in zip(got, ref):
        torch.testing.assert_close(g, r, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("varied", [False, True], ids=["shift", "diagonal"])
@pytest.mark.parametrize("built", ["random", "nystrom"])
def test_gradient_is_the_derivative_of_the_estimate(built, varied):
    """Finite differences of the fixed-probe objective, pivots fixed: P moves with the parameters."""
    model = Model(varied=varied)
    pivots = RandomlyPivotedCholesky(12).build(model.operator()).pivots
    method = Nystrom(10) if built == "nystrom" else Landmarks(pivots)
    f = lambda tensors: ritz.logdet(
        model.operator(tensors), preconditioner=method, estimator=Hutchinson(4), method=Lanczos(rtol=1e-12)
    )
    got = torch.autograd.grad(f(model.tensors), model.tensors)
    at = [t.detach() for t in model.tensors]
    for i, g in enumerate(got):
        E = torch.randn(at[i].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * at[i]
        h = 1e-5
        up, down = (f([*at[:i], at[i] + c * h * E, *at[i + 1 :]]) for c in (1, -1))
        assert float((g * E).sum()) == pytest.approx(float(up - down) / (2 * h), rel=1e-5, abs=1e-6)


def test_a_callable_with_captured_parameters():
    model = Model()
    calls = []

    def wrap(K):
        return ritz.aslinearoperator(lambda X: calls.append(1) or K @ X, shape=60, dtype=torch.float64, psd=True)

    options = {"estimator": Hutchinson(4), "preconditioner": PivotedCholesky(8), "method": Lanczos(rtol=1e-10)}
    value = ritz.logdet(model.operator(wrap=wrap), **options)
    want = ritz.logdet(model.operator(), **options)
    assert calls and float(value.detach()) == pytest.approx(float(want.detach()), abs=1e-8)
    for g, r in zip(torch.autograd.grad(value, model.tensors), torch.autograd.grad(want, model.tensors)):
        torch.testing.assert_close(g, r, rtol=1e-6, atol=1e-7)


def test_complex():
    G = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    M = (G * torch.logspace(0, -4, 30, dtype=torch.float64)) @ G.mH
    M = ((M + M.mH) / 2).requires_grad_()
    noise = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for method in (RandomlyPivotedCholesky(6), Nystrom(5)):
        A = ritz.aslinearoperator(M, psd=True).shift(noise)
        value = ritz.logdet(A, preconditioner=method, estimator=Hutchinson(30), method=Lanczos(rtol=1e-12))
        want = torch.linalg.slogdet(M + noise * torch.eye(30).to(M)).logabsdet
        assert float(value.detach()) == pytest.approx(float(want.detach()), abs=1e-8)
        for g, r in zip(torch.autograd.grad(value, (M, noise)), torch.autograd.grad(want, (M, noise))):
            torch.testing.assert_close((g + g.mH) / 2 if g.ndim else g, r, rtol=1e-6, atol=1e-6)


def test_preconditioner_must_be_differentiated():
    """Gradient error, root mean square over seeds, n = 600, rank 50: 0.0068 plain, 0.0020 with P differentiated, 0.0067
    with P constant, though both of the latter have the same value with the same small standard error."""
    model = Model(600, lengthscale=0.2)
    truth = flat(torch.autograd.grad(torch.logdet(model.dense()), model.tensors))
    K = model.kernel()
    errors = {"plain": [], "differentiated": [], "constant": []}
    for seed in range(4):
        for name, found in errors.items():
            A = ritz.aslinearoperator(K, psd=True).shift(model.tensors[2])
            P = None if name == "plain" else RandomlyPivotedCholesky(50)
            if name == "constant":
                with torch.no_grad():
                    P = P.build(A)
            value, info = ritz.logdet(
                A, preconditioner=P, estimator=Hutchinson(10, seed=seed), method=Lanczos(rtol=1e-5), return_info=True
            )
            g = flat(torch.autograd.grad(value, model.tensors, retain_graph=True))
            found.append((float((g - truth).norm() / truth.norm()), float(info.standard_error)))
    rms = {name: torch.tensor(found).square().mean(0).sqrt() for name, found in errors.items()}
    assert float(rms["differentiated"][0]) < 0.5 * float(rms["plain"][0])
    assert float(rms["differentiated"][0]) < 0.5 * float(rms["constant"][0])
    assert float(rms["constant"][0]) > 0.7 * float(rms["plain"][0])
    assert float(rms["constant"][1]) == pytest.approx(float(rms["differentiated"][1]), rel=1e-3)
    assert float(rms["differentiated"][1]) < 0.25 * float(rms["plain"][1])


@pytest.mark.parametrize("low_rank", [True, False])
def test_auto_takes_the_smaller_standard_error(low_rank):
    model = Model(400, d=2 if low_rank else 3, lengthscale=0.2 if low_rank else 0.05, noise=0.01 if low_rank else 0.1)
    probes = Hutchinson(12)
    with torch.no_grad():
        A = model.operator()
        value, info = ritz.logdet(A, preconditioner=Auto(), estimator=probes, return_info=True)
        errors = info.details["standard_errors"]
        P = RandomlyPivotedCholesky().build(A)
        both = {
            name: ritz.logdet(A, preconditioner=Q, estimator=probes, return_info=True)
            for name, Q in (("plain", None), ("preconditioned", P))
        }
        truth = float(torch.logdet(model.dense()))
    better = min(both, key=lambda name: float(both[name][1].standard_error))
    assert better == ("preconditioned" if low_rank else "plain") == min(errors, key=errors.get)
    for name, (_, found) in both.items():  # 20 steps see the standard errors of converged runs
        assert errors[name] == pytest.approx(float(found.standard_error), rel=0.1)
    assert torch.equal(value, both[better][0])
    assert info.details["preconditioner"] == (RandomlyPivotedCholesky() if low_rank else None)
    assert abs(float(value) - truth) < 4 * float(info.standard_error)


def test_plain_error_without_a_product():
    model = Model(400, lengthscale=0.2)
    with torch.no_grad():
        A = model.operator()
        Z = Hutchinson(20).probes(400, torch.float64)
        for P in (RandomlyPivotedCholesky(60).build(A), Jacobi().build(A)):
            w, U = torch.linalg.eigh(P.to_dense())
            forms = ((U.mT @ Z).square() * w.log().unsqueeze(1)).sum(0)
            torch.testing.assert_close(P.log_forms(Z), forms, rtol=1e-8, atol=1e-6)
        P = RandomlyPivotedCholesky(60).build(A)
        _, info = ritz.logdet(A, estimator=Hutchinson(20), return_info=True)
        small = ritz.quadratic_form(ritz.functions.log, Preconditioned(A, P.inverse_root()), Z)
        assert plain_error(P, Z, small) == pytest.approx(float(info.standard_error), rel=0.2)
        assert standard_errors(A, P, Z)["plain"] == pytest.approx(float(info.standard_error), rel=0.2)
        varied = PivotedCholesky(5).build(Model(50, varied=True).operator())
        assert plain_error(varied, Hutchinson(4).probes(50, torch.float64), torch.zeros(4)) is None


def test_report():
    model = Model()
    A = ritz.Counting(ritz.aslinearoperator(model.dense().detach(), psd=True))
    P = DiagonalPreconditioner(torch.full((60,), 2.0, dtype=torch.float64))
    value, info = ritz.logdet(A, preconditioner=P, estimator=Hutchinson(3), method=Lanczos(9), return_info=True)
    assert info.num_matvecs == A.num_matvecs == 27 and info.depth == 9
    assert info.details["preconditioner"] is P and "standard_errors" not in info.details
    assert info.details["logdet_preconditioner"] == pytest.approx(60 * 0.6931471805599453)
    # a multiple of the identity changes nothing
    assert float(value) == pytest.approx(float(ritz.logdet(A, estimator=Hutchinson(3), method=Lanczos(9))), rel=1e-10)
    _, info = ritz.logdet(model.operator(), preconditioner=PivotedCholesky(5), return_info=True)
    assert info.details["preconditioner_rank"] == 5 and info.details["pivots"].shape == (5,)


def test_float32_where_the_plain_run_breaks_down():
    """n·s/σ² = 4e6: rounding leaves the plain Krylov spaces nothing to go on with; B has no large eigenvalues."""
    X = points(400, 1)
    K = torch.exp(-0.5 * (torch.cdist(X, X) / 0.1) ** 2)
    truth = float(torch.logdet(K + 1e-4 * torch.eye(400, dtype=torch.float64)))
    A = ritz.aslinearoperator(K.float(), psd=True).shift(1e-4)
    value, info = ritz.logdet(A, preconditioner=RandomlyPivotedCholesky(40), estimator=Hutchinson(20), return_info=True)
    assert value.dtype == torch.float32 and info.status.success
    assert abs(float(value) - truth) < max(4 * float(info.standard_error), 2.0)


@pytest.mark.parametrize("method", [Landmarks([0, 5, 9, 20]), Nystrom(5), Jacobi()])
def test_transforms_and_second_derivatives(method):
    """torch.func.grad agrees with autograd; Unrolled() differentiates P twice; the default rule refuses by name."""
    X, noise = points(40), torch.tensor(0.1, dtype=torch.float64)

    def f(lengthscale, gradient=Frechet()):
        K = torch.exp(-0.5 * ((X[:, None] - X[None]) / lengthscale).square().sum(2))
        A = ritz.aslinearoperator(K, psd=True).shift(noise)
        options = {"preconditioner": method, "estimator": Hutchinson(4), "method": Lanczos(20)}
        return ritz.logdet(A, gradient=gradient, **options)

    at = torch.tensor(0.3, dtype=torch.float64)
    x = at.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    torch.testing.assert_close(torch.func.grad(f)(at), g.detach())
    with pytest.raises(SecondDerivativeError):
        torch.autograd.grad(g, x)
    (g,) = torch.autograd.grad(f(x, Unrolled()), x, create_graph=True)
    (second,) = torch.autograd.grad(g, x)
    h = 1e-4
    want = (f(at + h) - 2 * f(at) + f(at - h)) / h**2
    assert float(second) == pytest.approx(float(want), rel=1e-4)


def test_refusals():
    A = Model().operator()
    with pytest.raises(OperandError, match="exclude each other"):
        ritz.logdet(A, preconditioner=Jacobi(), shifts=torch.ones(2))
    with pytest.raises(OperandError, match=r"shape \(3, 3\); the operator has shape \(60, 60\)"):
        ritz.logdet(A, preconditioner=DiagonalPreconditioner(torch.ones(3)))
    with pytest.raises(OperandError, match="preconditioner is a function.*not only"):
        ritz.logdet(A, preconditioner=lambda X: X)
    with pytest.raises(OperandError, match="Hermitian"):
        ritz.logdet(torch.randn(5, 5), preconditioner=Jacobi())
    with pytest.raises(OperandError, match="square"):
        ritz.logdet(ritz.aslinearoperator(torch.ones(5, 4)), preconditioner=Jacobi())
