"""The log marginal likelihood: both paths against the textbook, gradients in everything, reports that are true."""

import math

import pytest
import torch
from tests.gp.problems import data, process, textbook

import ritz
from ritz import CG, Auto, ConvergenceWarning, Direct, Hutchinson, Lanczos, RandomlyPivotedCholesky
from ritz.errors import DomainError, NonFiniteError, OperandError, SecondDerivativeError
from ritz.gp import ExactGP, ZeroMean
from ritz.kernels import RBF, Scale, Stored, Tiles

EXACT = (Hutchinson(60), Lanczos(60))  # as many probes as points: nothing is random


def value_and_gradients(gp, X, y, **options):
    X, y = X.clone().requires_grad_(True), y.clone().requires_grad_(True)
    value, info = gp.log_marginal_likelihood(X, y, return_info=True, **options)
    return value.detach(), torch.autograd.grad(value, [X, y, *gp.parameters()]), info


PATHS = {
    "auto": {},
    "direct": {"solver": Direct()},
    "lanczos": {"logdet": EXACT},
    "lanczos and cg": {"logdet": EXACT, "solver": CG(rtol=1e-12)},
    "no preconditioner": {"logdet": EXACT, "preconditioner": None},
    "low rank": {"logdet": EXACT, "preconditioner": RandomlyPivotedCholesky(20)},
    "stored": {"logdet": EXACT, "backend": Stored()},
}


@pytest.mark.parametrize("name", PATHS)
def test_value_and_every_gradient(name):
    X, y = data()
    value, grads, info = value_and_gradients(process(**PATHS[name]), X, y)
    gp = process()
    Xr, yr = X.clone().requires_grad_(True), y.clone().requires_grad_(True)
    want = textbook(gp, Xr, yr)
    torch.testing.assert_close(value, want.detach(), rtol=1e-10, atol=0)
    assert len(grads) == 6
    for got, ref in zip(grads, torch.autograd.grad(want, [Xr, yr, *gp.parameters()])):
        torch.testing.assert_close(got, ref, rtol=1e-7, atol=1e-9)
    assert info.method == (Direct() if name in ("auto", "direct") else EXACT)
    assert float(info.standard_error) == 0.0


def test_what_was_chosen_is_reported():
    X, y = data()
    options = {"logdet": EXACT, "preconditioner": RandomlyPivotedCholesky(20)}
    _, info = process(**options).log_marginal_likelihood(X, y, return_info=True)
    assert info.details["preconditioner"] == RandomlyPivotedCholesky(20)
    assert info.details["backend"] == Stored(Tiles()) and info.details["rounding"] < 1e-10
    stored = process(logdet=EXACT, preconditioner=None, backend=Stored(Tiles(edge=16)))
    _, info = stored.log_marginal_likelihood(X, y, return_info=True)
    assert info.details["backend"] == Stored(Tiles(edge=16)) and info.details.get("preconditioner") is None
    P = RandomlyPivotedCholesky(20).build(process().covariance(X))
    ready = process(logdet=EXACT, preconditioner=P).log_marginal_likelihood(X, y)
    torch.testing.assert_close(ready.detach(), textbook(process(), X, y).detach(), rtol=1e-9, atol=0)


def test_covariance_is_exactly_kernel_plus_noise():
    X, _ = data()
    gp = process()
    want = gp.kernel.evaluate(X) + gp.noise * torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(gp.covariance(X).to_dense(), want)
    torch.testing.assert_close(gp.dense_covariance(X), want)
    assert float(gp.noise.detach()) == pytest.approx(0.05)


def test_stochastic_value_is_within_its_standard_error():
    X, y = data(150)
    want = float(textbook(process(), X, y).detach())
    scores = []
    for seed in range(20):
        gp = process(logdet=(Hutchinson(10, seed=seed), Lanczos(60)))
        with torch.no_grad():
            value, info = gp.log_marginal_likelihood(X, y, return_info=True)
        scores.append((float(value) - want) / float(info.standard_error))
    scores = torch.tensor(scores)
    # twenty standard scores of Student's t with 9 degrees of freedom: mean 0 ± 0.25, mean square 1.3 ± 0.6
    assert abs(float(scores.mean())) < 0.9 and 0.3 < float(scores.square().mean()) < 3.5


class Counting(ritz.Counting):
    """Counts products; the diagonal, from which rounding is estimated, takes none."""

    def diagonal(self):
        return self.operator.diagonal()


def test_one_block_of_products_and_no_more():
    X, y = data()
    gp = process(logdet=(Hutchinson(7), Lanczos(12)), preconditioner=None)
    counted = []
    covariance = gp.covariance
    gp.covariance = lambda X: counted.append(Counting(covariance(X))) or counted[-1]
    value, _, info = value_and_gradients(gp, X, y)
    assert info.num_matvecs == counted[0].num_matvecs == 12 * 8  # k·(m + 1), the gradient included
    assert info.depth == 12
    assert info.residual.shape == (8,) and info.details["quadratic_residual"] == float(info.residual[0])


def test_cg_takes_over_where_the_block_is_too_short():
    X, y = data()
    short = (Hutchinson(60), Lanczos(4))
    value, grads, info = value_and_gradients(process(logdet=short, solver=CG(rtol=1e-11)), X, y)
    r = y - 0.3
    gp = process()
    quadratic = r @ torch.linalg.solve(gp.dense_covariance(X).detach(), r)
    assert info.details["quadratic"] == pytest.approx(float(quadratic.detach()), rel=1e-12)
    assert info.details["quadratic_residual"] <= 1e-11 and info.details["solve"].num_matvecs > 20
    block = process(logdet=short)
    _, _, alone = value_and_gradients(block, X, y)
    assert abs(alone.details["quadratic"] - float(quadratic.detach())) > 1e-4
    want = torch.autograd.grad(textbook(gp, X, yr := y.clone().requires_grad_(True)), yr)[0]
    torch.testing.assert_close(grads[1], want, rtol=1e-7, atol=1e-9)


def test_deterministic_to_the_bit():
    X, y = data(200)
    gp = process(logdet=(Hutchinson(5), Lanczos(20)))
    first, second = (value_and_gradients(gp, X, y)[:2] for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))
    torch.manual_seed(5)
    assert torch.equal(first[0], value_and_gradients(gp, X, y)[0])


def test_auto_is_a_function_of_size():
    gp = process()
    assert gp.method(2000) == Direct() and gp.method(2001) == (Hutchinson(10), Lanczos(rtol=1e-3))
    assert process(solver=CG()).method(5) == (Hutchinson(10), Lanczos(rtol=1e-3))


def test_iterative_path_in_float32():
    X, y = data(400, dtype=torch.float32)
    gp = process(dtype=torch.float32, logdet=(Hutchinson(8), Lanczos(rtol=1e-3)))
    value, grads, _ = value_and_gradients(gp, X, y)
    double = process(logdet=(Hutchinson(8), Lanczos(rtol=1e-6)))
    want, truth, _ = value_and_gradients(double, X.double(), y.double())
    assert value.dtype == torch.float32
    assert abs(float(value) - float(want)) < 1e-4 * abs(float(want))
    for got, ref in zip(grads, truth):
        assert got.dtype == torch.float32 and float((got - ref).norm()) < 2e-2 * float(ref.norm())


def test_dense_path_is_in_float64_whatever_comes_in():
    X, y = data(80, dtype=torch.float32)
    gp = process(dtype=torch.float32, noise=2e-6)
    value = gp.log_marginal_likelihood(X, y)
    want = gp.double().log_marginal_likelihood(X.double(), y.double())
    assert value.dtype == torch.float32 and float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-6)


def test_hopeless_float32_is_announced():
    X, y = data(300, dtype=torch.float32)
    gp = process(dtype=torch.float32, noise=1e-4, logdet=(Hutchinson(2), Lanczos(5)), preconditioner=None)
    with pytest.warns(ConvergenceWarning, match="float64"):
        _, info = gp.log_marginal_likelihood(X, y, return_info=True)
    assert info.details["rounding"] > 0.1
    _, info = gp.log_marginal_likelihood(X, y, return_info=True, on_failure="ignore")  # a warning would be an error
    assert info.details["rounding"] > 0.1
    gp.preconditioner = RandomlyPivotedCholesky(100)  # takes the large eigenvalues away: no warning, and so an error
    _, info = gp.log_marginal_likelihood(X, y, return_info=True)
    assert info.details["rounding"] < 0.1


def test_second_derivatives():
    X, y = data(12)
    gp = process()
    assert torch.autograd.gradgradcheck(gp.log_marginal_likelihood, (X.requires_grad_(True), y), atol=1e-5)
    gp = process(logdet=(Hutchinson(3), Lanczos(5)))
    value = gp.log_marginal_likelihood(X, y)
    (g,) = torch.autograd.grad(value, gp.raw_noise, create_graph=True)
    with pytest.raises(SecondDerivativeError):
        torch.autograd.grad(g, gp.raw_noise)


def test_not_positive_definite_is_explained_and_never_mended():
    X, y = data(30)
    X = torch.cat([X, X[:4]])
    y = torch.cat([y, y[:4]])
    gp = ExactGP(RBF(lengthscale=30.0).double(), noise=1e-18, noise_floor=1e-19)
    with pytest.raises(DomainError) as error:
        gp.log_marginal_likelihood(X, y)
    for words in ("n = 34", "torch.float64", "pivot", "4 rows", "1e-18", "larger noise", "Nothing was added"):
        assert words in str(error.value)


def test_means():
    X, y = data(20)
    zero = process(mean=ZeroMean())
    line = process(mean=lambda X: 2.0 * X[:, 0])
    a = zero.log_marginal_likelihood(X, y - 2.0 * X[:, 0])
    torch.testing.assert_close(line.log_marginal_likelihood(X, y), a)
    assert "mean.constant" in dict(process().named_parameters())


def test_trivial_sizes_and_targets():
    gp = process(d=2, mean=ZeroMean(), noise=0.25)
    X, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    want = -0.5 * (1 / 1.95 + math.log(1.95) + math.log(2 * math.pi))
    assert float(gp.log_marginal_likelihood(X, y).detach()) == pytest.approx(want)
    forced = process(d=2, mean=ZeroMean(), noise=0.25, logdet=(Hutchinson(4), Lanczos(3)))
    assert float(forced.log_marginal_likelihood(X, y).detach()) == pytest.approx(want)
    value = forced.log_marginal_likelihood(X, 0 * y)  # a zero column in the block
    value.backward()
    assert bool(torch.isfinite(forced.raw_noise.grad))


def test_a_direct_solver_keeps_to_its_memory():
    X, y = data(40)
    enough = 2 * 8 * 40**2
    gp, short = (process(solver=Direct(max_bytes=size)) for size in (enough, enough - 1))
    gp.condition(X, y), gp.log_marginal_likelihood(X, y), gp.leave_one_out(X, y)
    noises = torch.ones(1, dtype=torch.float64)
    calls = (short.condition, short.log_marginal_likelihood, short.leave_one_out)
    for call in (*calls, lambda X, y: short.noise_curve(X, y, noises)):
        with pytest.raises(OperandError, match=f"need {enough} bytes.*max_bytes={enough - 1}.*raise max_bytes"):
            call(X, y)


def test_arguments():
    X, y = data(10)
    gp = process()
    cases = [
        (lambda: gp.log_marginal_likelihood(X, y[:5]), "expected"),
        (lambda: gp.log_marginal_likelihood(X, y.float()), "convert"),
        (lambda: gp.log_marginal_likelihood(X, y.reshape(1, 10)), "expected"),
        (lambda: gp.log_marginal_likelihood(X, y.reshape(10, 1, 1)), "expected"),
        (lambda: gp.log_marginal_likelihood(X, y.reshape(10, 1)[:, :0]), "expected"),
        (lambda: gp.log_marginal_likelihood(X, y.numpy()), "ndarray"),
        (lambda: ExactGP("rbf"), "kernel"),
        (lambda: ExactGP(Scale(RBF()), solver="cg"), "solver"),
        (lambda: ExactGP(Scale(RBF()), logdet=Hutchinson(3)), "logdet"),
        (lambda: ExactGP(Scale(RBF()), solver=Direct(), logdet=EXACT), "Auto"),
        (lambda: ExactGP(Scale(RBF()), noise=-1.0), "noise"),
        (lambda: ExactGP(Scale(RBF()), preconditioner=50), "preconditioner=50; expected"),
        (lambda: ExactGP(Scale(RBF()), backend="numba").covariance(X), "backend"),
    ]
    for call, words in cases:
        with pytest.raises(OperandError, match=words):
            call()
    with pytest.raises(NonFiniteError, match="y has"):
        gp.log_marginal_likelihood(X, y / 0)
    assert gp.solver == Auto()
