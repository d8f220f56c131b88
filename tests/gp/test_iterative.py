"""The likelihood from one preconditioned block: its own derivative, outputs that share it, residuals that are true."""

import math

import pytest
import torch

import ritz
from ritz import CG, Auto, ConvergenceWarning, Direct, Hutchinson, Lanczos, Status
from ritz.gp.likelihood import dense, iterative, noise_curve, warn_of_rounding
from ritz.kernels import RBF, Matern, Scale
from ritz.operators import Diagonal
from ritz.solve import Jacobi, Landmarks, Nystrom, PivotedCholesky, RandomlyPivotedCholesky

PRECONDITIONERS = {
    "none": None,
    "auto": Auto(),
    "jacobi": Jacobi(),
    "greedy": PivotedCholesky(12),
    "random": RandomlyPivotedCholesky(15),
    "nystrom": Nystrom(12),
    "landmarks": Landmarks(range(0, 60, 5)),
}


def data(n=60, d=3, outputs=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, dtype=torch.float64, generator=g)
    y = torch.sin(X.sum(1)) + 0.1 * torch.randn(n, dtype=torch.float64, generator=g)
    return X, y if outputs is None else torch.randn(n, outputs, dtype=torch.float64, generator=g) + y.unsqueeze(1)


def textbook(K, r):
    """The sum of log N(r_j; 0, K) over outputs."""
    r = r.reshape(len(r), -1)
    log_det = torch.logdet(K) + len(r) * math.log(2 * math.pi)
    return -0.5 * ((r * torch.linalg.solve(K, r)).sum() + r.shape[1] * log_det)


class Model:
    """s·k_3/2 + noise by plain tensors, so that finite differences are easy."""

    def __init__(self, n=60, d=3, varied=False, lengthscale=1.3, noise=0.02, X=None):
        self.X = data(n, d)[0] if X is None else X
        d = self.X.shape[1]
        at = torch.linspace(0.5, 1.5, n, dtype=torch.float64) * noise if varied else torch.tensor(noise).double()
        scales = torch.linspace(0.8, 1.2, d, dtype=torch.float64) * lengthscale
        self.tensors = [t.clone().requires_grad_() for t in (scales, torch.tensor(1.7).double(), at)]

    def kernel(self, tensors):
        a = 3**0.5 * (((self.X[:, None] - self.X[None]) / tensors[0]).square().sum(2) + 1e-300).sqrt()
        return tensors[1] * (1 + a) * torch.exp(-a)

    def operator(self, tensors=None):
        tensors = tensors or self.tensors
        K = ritz.aslinearoperator(self.kernel(tensors), psd=True)
        return K.shift(tensors[2]) if tensors[2].ndim == 0 else K + Diagonal(tensors[2])

    def dense(self):
        return self.kernel(self.tensors) + torch.diag_embed(self.tensors[2].expand(len(self.X)))


@pytest.mark.parametrize("varied", [False, True], ids=["shift", "diagonal"])
@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_exact_with_as_many_probes_as_points(name, outputs, varied):
    _, y = data(outputs=outputs)
    model, y = Model(varied=varied), y.requires_grad_()
    method = (Hutchinson(60), Lanczos(rtol=1e-11))
    value, info = iterative(model.operator(), y, method, None, "raise", preconditioner=PRECONDITIONERS[name])
    want = textbook(model.dense(), y)
    assert value.shape == () and float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    got = torch.autograd.grad(value, [y, *model.tensors])
    for g, r in zip(got, torch.autograd.grad(want, [y, *model.tensors])):
        torch.testing.assert_close(g, r, rtol=1e-7, atol=1e-8)
    assert float(info.standard_error) == 0 and info.details["quadratic_residual"] < 1e-9
    if outputs:
        each = [textbook(model.dense(), y[:, j]) for j in range(2)]
        torch.testing.assert_close(info.details["outputs"], torch.stack(each).detach())


@pytest.mark.parametrize("name", ["none", "random", "auto", "nystrom"])
def test_gradient_is_the_derivative_of_the_objective(name):
    """At rtol = 1e-3 and a narrow pairing, against finite differences with the same probes and pivots: 1e-3."""
    model, (_, y) = Model(300, 3), data(300)
    method = (Hutchinson(5), Lanczos(rtol=1e-3))
    value, info = iterative(model.operator(), y, method, None, "raise", preconditioner=PRECONDITIONERS[name])
    got = torch.autograd.grad(value, model.tensors)
    assert info.details["pairing_width"] <= 6 * 6  # six columns, six of the pairing for each
    P = Landmarks(info.details["pivots"]) if "pivots" in info.details else PRECONDITIONERS[name]
    at = [t.detach() for t in model.tensors]
    objective = lambda tensors: iterative(model.operator(tensors), y, method, None, "raise", preconditioner=P)[0]
    want = []
    for i, t in enumerate(at):
        for j in range(t.numel()):
            E = torch.zeros(t.numel(), dtype=torch.float64)
            E[j] = 1e-4 * float(t.reshape(-1)[j])
            up, down = (objective([*at[:i], t + c * E.reshape(t.shape), *at[i + 1 :]]) for c in (1, -1))
            want.append(float(up - down) / (2 * float(E[j])))
    got, want = torch.cat([g.reshape(-1) for g in got]), torch.tensor(want, dtype=torch.float64)
    assert float((got - want).norm()) < 1e-3 * float(want.norm())


def test_gradient_with_a_kernel_operator():
    """The operator of the library, its columns and its pairing, in place of a dense tensor."""
    X, y = data(80)
    kernel = Scale(Matern(1.5, 3, lengthscale=1.3), 1.7).double()
    noise, X = torch.tensor(0.02, dtype=torch.float64, requires_grad=True), X.requires_grad_()
    tensors = [X, noise, *kernel.parameters()]
    method = (Hutchinson(80), Lanczos(rtol=1e-11))
    value, _ = iterative(kernel(X).shift(noise), y, method, None, "raise", preconditioner=RandomlyPivotedCholesky(20))
    want = textbook(kernel.evaluate(X) + noise * torch.eye(80, dtype=torch.float64), y)
    for g, r in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(want, tensors)):
        torch.testing.assert_close(g, r, rtol=1e-7, atol=1e-8)


def test_outputs_share_every_product():
    _, Y = data(outputs=3)
    model = Model()
    P = RandomlyPivotedCholesky(15).build(model.operator())
    method = (Hutchinson(6), Lanczos(14))
    counted = ritz.Counting(model.operator())
    value, info = iterative(counted, Y, method, None, "ignore", preconditioner=P)
    assert counted.num_matvecs == info.num_matvecs == 14 * (3 + 6) and info.residual.shape == (9,)
    single = [iterative(model.operator(), y, method, None, "ignore", preconditioner=P) for y in Y.T]
    torch.testing.assert_close(value, sum(v for v, _ in single))
    assert float(info.standard_error) == pytest.approx(3 * float(single[0][1].standard_error))
    value.backward()
    assert counted.num_paired == info.details["pairing_width"]
    assert counted.num_matvecs == 14 * 9 + counted.num_paired  # what reaches P is one product of the pairing's width


@pytest.mark.parametrize("P", [None, RandomlyPivotedCholesky(15)], ids=["plain", "preconditioned"])
def test_residual_is_the_true_one(P):
    """‖r − A x‖/‖r‖ of the block's own x, which is the Galerkin solution, recomputed here in another basis."""
    model, (_, y) = Model(), data()
    steps = 6
    with torch.no_grad():
        A = model.operator()
        built = None if P is None else P.build(A)
        _, info = iterative(A, y, (Hutchinson(3), Lanczos(steps)), None, "ignore", preconditioner=built)
        M = A.to_dense()
        R = torch.eye(60, dtype=torch.float64) if built is None else built.invsqrt(torch.eye(60, dtype=torch.float64))
        B, v = R @ M @ R.mT, R @ y
        powers = [v / v.norm()]
        for _ in range(steps - 1):
            powers.append(B @ powers[-1] / (B @ powers[-1]).norm())
        Q = torch.linalg.qr(torch.stack(powers, 1)).Q
        x = R.mT @ (Q @ torch.linalg.solve(Q.mT @ B @ Q, Q.mT @ v))
    want = float((y - M @ x).norm() / y.norm())
    assert info.details["quadratic_residual"] == pytest.approx(want, rel=1e-5) and want > 1e-3
    assert float(info.residual[0]) == info.details["quadratic_residual"]


def test_cg_finishes_with_the_preconditioner():
    model, (_, Y) = Model(200, noise=1e-3), data(200, outputs=2)
    P = RandomlyPivotedCholesky(80)
    found = {}
    for name, Q in (("plain", None), ("preconditioned", P)):
        value, info = iterative(
            model.operator(), Y, (Hutchinson(200), Lanczos(3)), CG(rtol=1e-11), "raise", preconditioner=Q
        )
        found[name] = info.details["solve"]
        assert info.details["quadratic_residual"] <= 1e-11
        X = torch.linalg.solve(model.dense(), Y)
        assert info.details["quadratic"] == pytest.approx(float((Y * X).sum().detach()), rel=1e-12)
        (g,) = torch.autograd.grad(info_quadratic(model, Y, Q), model.tensors[2])
        want = -(X.detach() ** 2).sum()
        torch.testing.assert_close(g, want, rtol=1e-8, atol=0)
    assert found["preconditioned"].depth < 0.5 * found["plain"].depth


def test_a_cg_that_fails_is_the_status_and_warns_once():
    model, (_, y) = Model(200, noise=1e-3), data(200)
    with torch.no_grad(), pytest.warns(ConvergenceWarning) as record:
        _, info = iterative(model.operator(), y, (Hutchinson(3), Lanczos(3)), CG(rtol=1e-11, max_steps=4), "warn")
    assert len(record) == 1 and info.status is info.details["solve"].status is Status.MAX_STEPS
    A, y = hard(1e7, torch.float32)
    with torch.no_grad(), pytest.warns(ConvergenceWarning) as record:
        _, info = iterative(A, y, (Hutchinson(3), Lanczos(3)), CG(rtol=1e-6), "warn")
    assert len(record) == 1 and info.status is info.details["solve"].status is Status.STAGNATED


def info_quadratic(model, Y, P):
    """The quadratic form alone: twice the difference of two likelihoods that have the log-determinant in common."""
    method = (Hutchinson(200), Lanczos(3))
    value = iterative(model.operator(), Y, method, CG(rtol=1e-11), "raise", preconditioner=P)[0]
    zero = iterative(model.operator(), 0 * Y, method, CG(rtol=1e-11), "raise", preconditioner=P)[0]
    return 2 * (zero - value)


def test_auto_reports_both_and_takes_the_smaller():
    _, y = data(300)
    method = (Hutchinson(10), Lanczos(rtol=1e-3))
    X = torch.rand(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for lengthscale, better in ((3.0, "preconditioned"), (0.1, "plain")):
        model = Model(300, 3, lengthscale=lengthscale, noise=0.1, X=X)
        with torch.no_grad():
            value, info = iterative(model.operator(), y, method, None, "raise", preconditioner=Auto())
            errors = info.details["standard_errors"]
            assert min(errors, key=errors.get) == better
            asked = None if better == "plain" else RandomlyPivotedCholesky()
            again, other = iterative(model.operator(), y, method, None, "raise", preconditioner=asked)
            plain = iterative(model.operator(), y, method, None, "raise")[1]
            first = iterative(model.operator(), y, method, None, "raise", preconditioner=RandomlyPivotedCholesky())[1]
        assert torch.equal(value, again) and info.details["preconditioner"] == asked
        assert info.num_matvecs == first.num_matvecs + (other.num_matvecs if asked is None else 0)
        assert errors[better] == pytest.approx(2 * float(other.standard_error), rel=1e-3)
        assert errors["plain"] == pytest.approx(2 * float(plain.standard_error), rel=0.25)


def test_auto_with_noise_that_varies():
    """The forms of log P are not at hand there: both errors come from short runs."""
    model, (_, y) = Model(varied=True, lengthscale=3.0), data()
    with torch.no_grad():
        _, info = iterative(model.operator(), y, (Hutchinson(8), Lanczos(30)), None, "raise", preconditioner=Auto())
    errors = info.details["standard_errors"]
    assert errors["preconditioned"] < errors["plain"] and info.details["preconditioner"] == RandomlyPivotedCholesky()
    assert errors["preconditioned"] == pytest.approx(2 * float(info.standard_error), rel=0.02)


def test_zero_targets_and_one_point():
    model = Model()
    value, info = iterative(
        model.operator(),
        torch.zeros(60).double(),
        (Hutchinson(60), Lanczos(60)),
        None,
        "raise",
        preconditioner=RandomlyPivotedCholesky(5),
    )
    want = textbook(model.dense(), torch.zeros(60).double())
    assert float(value.detach()) == pytest.approx(float(want.detach()))
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(value, model.tensors))
    assert info.details["quadratic_residual"] == 0.0
    one = Model(1, 2)
    y = torch.ones(1, dtype=torch.float64)
    value, _ = iterative(one.operator(), y, (Hutchinson(1), Lanczos(1)), None, "raise", preconditioner=Auto())
    assert float(value.detach()) == pytest.approx(float(textbook(one.dense(), y).detach()))


# -- float32 ----------------------------------------------------------------------------------------------------------


def hard(ratio, dtype, n=600):
    """n·s/σ² = ratio with σ² = 0.1, as large data sets have it; length-scales grow with the scale, as in training."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, generator=g, dtype=torch.float64)
    y = torch.sin(X.sum(1)) + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)
    s = 0.1 * ratio / n
    kernel = Scale(Matern(1.5, 4, lengthscale=s**0.5), s).to(dtype)
    return kernel(X.to(dtype)).shift(torch.tensor(0.1, dtype=dtype)), y.to(dtype)


@pytest.mark.parametrize("ratio, error", [(1e5, 1e-4), (1e6, 2e-3), (1e7, 1e-2)])
def test_float32_with_a_preconditioner(ratio, error):
    """The error that rounding leaves grows like √ratio and not like ratio; the plain block stops short at 1e7."""
    method = (Hutchinson(10), Lanczos(rtol=1e-3))
    with torch.no_grad():
        A, y = hard(ratio, torch.float64)
        P = RandomlyPivotedCholesky(100)
        _, truth = iterative(A, y, (method[0], Lanczos(rtol=1e-8)), None, "raise", preconditioner=P)
        A, y = hard(ratio, torch.float32)
        P = Landmarks(truth.details["pivots"])
        _, info = iterative(A, y, method, None, "raise", preconditioner=P)
        _, plain = iterative(A, y, method, None, "ignore")
    assert info.status is Status.CONVERGED and info.depth <= 24
    assert info.details["quadratic"] == pytest.approx(truth.details["quadratic"], rel=error)
    assert abs(info.details["logdet"] - truth.details["logdet"]) < 600 * error
    assert info.details["quadratic_residual"] < 0.02
    if ratio == 1e7:
        assert plain.status is Status.STAGNATED and plain.details["quadratic_residual"] > 0.5
        with pytest.warns(ConvergenceWarning, match="stagnated"):
            iterative(A, y, method, None, "warn")
        # b − A x rounds by eps·‖A‖‖x‖, here 3 % of b; so far CG gets as well, if it has the preconditioner
        _, info = iterative(A, y, (method[0], Lanczos(2)), CG(rtol=0.05), "raise", preconditioner=P)
        assert info.details["solve"].depth > 0
        assert info.details["quadratic"] == pytest.approx(truth.details["quadratic"], rel=error)


def test_rounding_is_judged_after_preconditioning():
    for ratio, hopeless, plain in ((1e5, False, False), (1e7, False, True), (1e10, True, True)):
        A, _ = hard(ratio, torch.float32)
        noise = torch.tensor(0.1)
        with warnings_if(plain):
            value = warn_of_rounding(A, noise)
        assert value == pytest.approx(torch.finfo(torch.float32).eps * (ratio + 600), rel=1e-3)
        with warnings_if(hopeless):
            after = warn_of_rounding(A, noise, preconditioned=True)
        assert after == pytest.approx(value / 600**0.5, rel=1e-3)


def warnings_if(expected):
    import contextlib

    return pytest.warns(ConvergenceWarning, match="float64") if expected else contextlib.nullcontext()


# -- the noise as a curve ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("method", [Direct(), (Hutchinson(50), Lanczos(50))], ids=["dense", "iterative"])
def test_noise_curve(method, outputs):
    X, r = data(50, outputs=outputs)
    kernel = Scale(RBF(3, lengthscale=1.5), 1.3).double()
    noises = torch.tensor([0.01, 0.1, 3.0], dtype=torch.float64, requires_grad=True)
    r.requires_grad_()
    tensors = [r, noises, *kernel.parameters()]
    found = noise_curve(kernel(X), r, noises, method)
    K, block = kernel.evaluate(X), r.reshape(50, -1)
    dense_ = [K + s * torch.eye(50, dtype=torch.float64) for s in noises]
    want = (
        torch.stack([torch.logdet(M) for M in dense_]),
        torch.stack([(block * torch.linalg.solve(M, block)).sum() for M in dense_]),
    )
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for got, ref in zip(found, want):
        assert got.shape == (3,)
        torch.testing.assert_close(got, ref, rtol=1e-8, atol=1e-8)
    grads = torch.autograd.grad((weights * (found[0] + found[1])).sum(), tensors)
    for g, w in zip(grads, torch.autograd.grad((weights * (want[0] + want[1])).sum(), tensors)):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


def test_noise_curve_is_one_run():
    X, r = data(50)
    A = ritz.Counting(RBF(3).double()(X))
    with torch.no_grad():
        noise_curve(A, r, torch.logspace(-2, 1, 40).double(), (Hutchinson(5), Lanczos(12)))
    assert A.num_matvecs == 12 * 6


def test_dense_outputs_are_summed():
    X, Y = data(outputs=3)
    model = Model()
    noise = model.tensors[2]
    value, info = dense(model.dense(), Y, X, noise)
    torch.testing.assert_close(value, textbook(model.dense(), Y))
    single = [dense(model.dense(), y, X, noise)[0] for y in Y.T]
    torch.testing.assert_close(info.details["outputs"], torch.stack(single).detach())
