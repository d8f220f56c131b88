"""Predictions against dense formulas on both paths, variances that cannot be negative, bounds, bounded memory."""

import pickle

import pytest
import torch
from tests.gp.problems import data, process
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ritz import CG, ConvergenceWarning, Direct, Status
from ritz.errors import OperandError, SecondDerivativeError
from ritz.gp import ExactGP, FixedNoise, HeteroscedasticNoise
from ritz.gp import posterior as module
from ritz.gp.projection import Projection
from ritz.kernels import RBF, Matern, Scale

PATHS = pytest.mark.parametrize("options", [{}, {"solver": CG(rtol=1e-11)}], ids=["dense", "iterative"])


def textbook(gp, X, y, Xs):
    """Mean and covariance with every matrix written out, in float64."""
    X, y, Xs = X.double(), y.double(), Xs.double()
    k = gp.kernel.evaluate
    K = k(X) + torch.diag_embed(gp.observed_noise(X).double().expand(len(X)))
    C = k(X, Xs)
    m, ms = (gp.mean(P) if y.ndim == 1 else gp.mean(P).unsqueeze(1) for P in (X, Xs))
    return ms + C.mT @ torch.linalg.solve(K, y - m), k(Xs) - C.mT @ torch.linalg.solve(K, C)


class Largest(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            # An expanded tensor holds no more than its storage.
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, min(t.numel(), t.untyped_storage().nbytes() // t.element_size()))
        return out


@PATHS
def test_mean_variance_and_covariance(options):
    X, y = data(90)
    Xs, _ = data(600, seed=1)  # several blocks of columns
    gp = process(**options)
    posterior = gp.condition(X, y)
    mean, variance = posterior.predict(Xs)
    want, covariance = (t.detach() for t in textbook(gp, X, y, Xs))
    torch.testing.assert_close(mean, want, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(variance, covariance.diagonal(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(posterior.covariance(Xs), covariance, rtol=1e-8, atol=1e-9)
    noisy, S = posterior.predict(Xs, noise=True)[1], posterior.covariance(Xs, noise=True)
    torch.testing.assert_close(noisy - variance, gp.noise.detach().expand(600))
    torch.testing.assert_close(S.diagonal(), noisy, rtol=1e-8, atol=1e-9)
    assert not mean.requires_grad and float(posterior.info.residual.max()) < 1e-10


@PATHS
def test_outputs_share_factor_and_variance(options):
    X, y = data(50)
    Y = torch.stack([y, 2 * y + X[:, 0], X[:, 1]], 1)
    Xs, _ = data(9, seed=1)
    posterior = process(**options).condition(X, Y)
    mean, variance = posterior.predict(Xs)
    assert mean.shape == (9, 3) and variance.shape == (9,) and posterior.weights.shape == (50, 3)
    for j in range(3):
        alone = process(**options).condition(X, Y[:, j])
        torch.testing.assert_close(mean[:, j], alone.mean(Xs), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(variance, alone.variance(Xs))


@PATHS
def test_noise_that_varies(options):
    X, y = data(40)
    Xs, _ = data(6, seed=1)
    noises = torch.linspace(0.01, 0.5, 40, dtype=torch.float64)
    gp = ExactGP(Scale(Matern(1.5, 3)).double(), noise=FixedNoise(noises, new=0.3), **options).double()
    want, covariance = textbook(gp, X, y, Xs)
    mean, variance = gp.condition(X, y).predict(Xs)
    torch.testing.assert_close(mean, want.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(variance, covariance.diagonal().detach(), rtol=1e-8, atol=1e-9)
    noisy = gp.condition(X, y).variance(Xs, noise=True)
    torch.testing.assert_close(noisy, variance + 0.3)
    learned = ExactGP(Scale(Matern(1.5, 3)), noise=HeteroscedasticNoise(torch.nn.Linear(3, 1)), **options).double()
    posterior = learned.condition(X, y)
    added = posterior.variance(Xs, noise=True) - posterior.variance(Xs)
    torch.testing.assert_close(added, learned.noise_at(Xs).detach())
    P = Xs.clone().requires_grad_(True)  # the noise of a new observation depends on its point
    for f in (posterior.variance, posterior.covariance):
        (got,) = torch.autograd.grad((f(P, noise=True) - f(P)).sum(), P)
        torch.testing.assert_close(got, torch.autograd.grad(learned.noise_at(P).sum(), P)[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"solver": CG(rtol=1e-12)}], ids=["dense", "iterative"])
@pytest.mark.parametrize("count", [7, 1100], ids=["one block", "several blocks"])
def test_gradients_in_the_test_points(options, count):
    X, y = data(30)
    Xs = data(count, seed=1)[0].requires_grad_(True)
    gp = process(**options)
    posterior = gp.condition(X, y)
    weights = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mean, variance = posterior.predict(Xs)
    chosen, step = [0, 5, count - 1], 1e-5
    for value, f in ((mean, posterior.mean), (variance, posterior.variance)):
        (grad,) = torch.autograd.grad((weights * value).sum(), Xs)
        for i in chosen:  # each value depends on its own point only
            for a in range(3):
                shift = torch.zeros(1, 3, dtype=torch.float64)
                shift[0, a] = step
                up, down = (f(Xs[i : i + 1].detach() + s * shift) for s in (1, -1))
                want = weights[i] * (up - down) / (2 * step)
                torch.testing.assert_close(grad[i, a], want[0], rtol=1e-6, atol=1e-8)
    posterior.mean(Xs).sum().backward()  # what is cached survives a backward pass


@PATHS
def test_gradient_of_the_covariance(options):
    X, y = data(30)
    posterior = process(**options).condition(X, y)
    Xs = data(5, seed=1)[0].requires_grad_(True)
    G = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (got,) = torch.autograd.grad((G * posterior.covariance(Xs)).sum(), Xs)
    (want,) = torch.autograd.grad((G * textbook(process(), X, y, Xs)[1]).sum(), Xs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_second_derivatives():
    X, y = data(20)
    dense, iterative = (process(**o).condition(X, y) for o in ({}, {"solver": CG(rtol=1e-12)}))
    Xs = data(3, seed=1)[0].requires_grad_(True)
    for f in (dense.mean, dense.variance, dense.covariance, iterative.mean):
        assert torch.autograd.gradcheck(f, Xs) and torch.autograd.gradgradcheck(f, Xs)
    for f in (iterative.variance, iterative.covariance):
        assert torch.autograd.gradcheck(f, Xs)
        (grad,) = torch.autograd.grad(f(Xs).sum(), Xs, create_graph=True)
        with pytest.raises(SecondDerivativeError, match="Direct"):
            torch.autograd.grad(grad.sum(), Xs)
    many = data(1100, seed=1)[0].requires_grad_(True)  # several blocks
    (grad,) = torch.autograd.grad(dense.variance(many).sum(), many, create_graph=True)
    (found,) = torch.autograd.grad(grad[:2].sum(), many)
    two = many[:2].detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(dense.variance(two).sum(), two, create_graph=True)
    torch.testing.assert_close(found[:2], torch.autograd.grad(grad.sum(), two)[0])
    for posterior in (dense, iterative):
        (want,) = torch.autograd.grad(posterior.variance(many).sum(), many)
        got = torch.func.grad(lambda P, f=posterior.variance: f(P).sum())(many.detach())
        torch.testing.assert_close(got, want)


def test_later_training_does_not_reach_the_posterior():
    X, y = data(30)
    gp = process()
    posterior = gp.condition(X, y)
    before = posterior.predict(X)
    gp.noise, gp.kernel.outputscale = 3.0, 9.0
    for a, b in zip(before, posterior.predict(X)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@PATHS
def test_variance_is_never_negative(options, dtype):
    X, y = data(60, dtype=dtype)
    X = torch.cat([X, X[:20]])  # repeated rows
    y = torch.cat([y, y[:20]])
    options = {"solver": CG(rtol=1e-3)} if options else {}
    gp = ExactGP(Scale(RBF(lengthscale=5.0)), noise=2e-6 if not options else 1e-2, **options).to(dtype)
    posterior = gp.condition(X, y)
    eps, scale = torch.finfo(dtype).eps, float(gp.kernel.outputscale.detach())
    for Xs in (X, X + 1e-5, 0.5 * X):
        v, S = posterior.variance(Xs), posterior.covariance(Xs)
        assert bool((v >= 0).all()) and float(v.max()) < 0.1
        assert torch.equal(S, S.mT)
        assert float(torch.linalg.eigvalsh(S.double())[0]) > -(2 * len(X)) * eps * len(Xs) * scale


def test_float32_is_as_good_as_float64_up_to_rounding(monkeypatch):
    X, y = data(80, dtype=torch.float32)
    Xs, _ = data(40, seed=1, dtype=torch.float32)
    gp = process(dtype=torch.float32, noise=1e-3)
    mean, covariance = (t.detach().float() for t in textbook(gp, X, y, Xs))
    for limit in (5000, 10):  # the factor in float64, and in float32 with refinement
        monkeypatch.setattr(module, "DOUBLE_UP_TO", limit)
        posterior = gp.condition(X, y)
        got = posterior.predict(Xs)
        assert got[0].dtype == got[1].dtype == posterior.covariance(Xs).dtype == torch.float32
        torch.testing.assert_close(got[0], mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], covariance.diagonal(), rtol=1e-3, atol=2e-5)


def test_tiny_noise_interpolates():
    X, y = data(40)
    posterior = process(noise=1e-5, noise_floor=1e-9).condition(X, y)
    mean, variance = posterior.predict(X)
    torch.testing.assert_close(mean, y, rtol=0, atol=1e-3)
    assert 0 <= float(variance.min()) and float(variance.max()) < 1.1e-5


def test_an_unconverged_solve_only_enlarges_variance_and_covariance():
    X, y = data(120)
    Xs, _ = data(25, seed=1)
    exact = textbook(process(), X, y, Xs)[1].detach()
    gp = process(solver=CG(max_steps=2), preconditioner=None)  # two steps are far from enough
    with pytest.warns(ConvergenceWarning):
        posterior = gp.condition(X, y)
    with pytest.warns(ConvergenceWarning):
        rough, info = posterior.variance(Xs, return_info=True)
    excess = rough - exact.diagonal()
    assert float(excess.min()) >= -1e-12 and float(excess.max()) > 1e-3
    assert bool((excess <= info.residual + 1e-12).all()) and info.details["solved"] == 25
    # by how much: the square of the solution's error e in the norm of K̂, which ‖K̂e‖²/σ² bounds
    K, C = (t.detach() for t in (gp.dense_covariance(X), gp.kernel.evaluate(X, Xs)))
    with pytest.warns(ConvergenceWarning):
        x = posterior.solve(C)[0]
    e = x - torch.linalg.solve(K, C)
    torch.testing.assert_close(excess, (e * (K @ e)).sum(0), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(info.residual, (C - K @ x).square().sum(0) / gp.noise.detach(), rtol=1e-6, atol=0)
    with pytest.warns(ConvergenceWarning):
        S = posterior.covariance(Xs)
    assert float(torch.linalg.eigvalsh(S - exact)[0]) > -1e-12


@pytest.mark.parametrize("method", [CG(max_steps=2), Projection(5, rtol=1e-3)], ids=["cg", "projection"])
def test_failed_solves_are_reported_and_warned_of_once(method):
    X, y = data(120)
    Xs = data(1100, seed=1)[0].requires_grad_(True)  # several blocks
    with pytest.warns(ConvergenceWarning):
        posterior = process(solver=CG(max_steps=2), preconditioner=None).condition(X, y)
    with pytest.warns(ConvergenceWarning, match="1100 variances: step limit .* target of 1e-06") as record:
        v, info = posterior.variance(Xs, method=method, return_info=True)
        v.sum().backward()
    assert len(record) == 1 and info.status is Status.MAX_STEPS and info.depth == 2
    done = process(solver=CG(rtol=1e-8)).condition(X, y).variance(Xs, return_info=True)[1]
    assert done.status is Status.CONVERGED and done.depth > 2


def test_rounding_is_judged_by_whether_there_is_a_preconditioner():
    X, y = data(300, dtype=torch.float32)
    options = {"dtype": torch.float32, "noise": 1e-4, "solver": CG(rtol=0.5)}
    with pytest.warns(ConvergenceWarning, match="give a preconditioner"):
        process(preconditioner=None, **options).condition(X, y)
    process(**options).condition(X, y)  # no warning, and so no error


# -- variances from a basis -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached():
    X, y = data(300)
    Xs, _ = data(700, seed=1)
    gp = process(solver=CG(rtol=1e-10), noise=0.2)
    return gp, gp.condition(X, y), Xs, textbook(gp, X, y, Xs)[1].diagonal().detach()


@pytest.mark.parametrize("rank", [1, 20, 100, 299])
def test_a_projection_bounds_the_variance_on_both_sides(cached, rank):
    _, posterior, Xs, exact = cached
    v, info = posterior.variance(Xs, method=Projection(rank, rtol=None), return_info=True)
    assert bool((v >= exact - 1e-10).all()) and bool((v - info.residual <= exact + 1e-10).all())
    assert info.details["solved"] == 0
    if rank == 100:  # and the bounds are of use
        assert float(((v - exact) / exact).median()) < 0.3 and float((info.residual / exact).median()) < 0.6


def test_a_projection_of_full_rank_is_exact(cached):
    _, posterior, Xs, exact = cached
    v, info = posterior.variance(Xs, method=Projection(1000, rtol=None), return_info=True)
    torch.testing.assert_close(v, exact, rtol=1e-9, atol=1e-10)
    assert float(info.residual.max()) < 1e-9


def test_a_projection_in_float32(cached):
    _, posterior, Xs, exact = cached
    gp = process(solver=CG(), noise=0.2, dtype=torch.float32)
    short = gp.condition(posterior.X.float(), posterior.y.float())
    for method in (Projection(100, rtol=None), Projection(300, rtol=None), Projection(60, rtol=0.1)):
        v, info = short.variance(Xs.float(), method=method, return_info=True)
        assert v.dtype == torch.float32
        rounding = 300 * torch.finfo(torch.float32).eps * 1.7
        excess = v.double() - exact
        assert float(excess.min()) > -rounding and bool((excess < info.residual + rounding).all())


def test_points_that_a_projection_does_not_serve_are_solved_for(cached):
    _, posterior, Xs, exact = cached
    v, info = posterior.variance(Xs, method=Projection(60, rtol=0.1), return_info=True)
    assert 0 < info.details["solved"] < 700 and info.num_matvecs > info.details["solved"]
    assert bool((v >= exact - 1e-10).all()) and bool((v <= 1.1 * exact + 1e-10).all())
    bound, loose = posterior.variance(Xs, method=Projection(60, rtol=None), return_info=True)
    left = loose.residual <= 0.1 * (bound - loose.residual)
    torch.testing.assert_close(v[left], bound[left])
    torch.testing.assert_close(v[~left], exact[~left], rtol=1e-8, atol=1e-9)
    P = Xs[:20].clone().requires_grad_(True)  # both kinds of points
    (grad,) = torch.autograd.grad(posterior.variance(P, method=Projection(60, rtol=0.1)).sum(), P)
    step = torch.zeros_like(P)
    step[:, 0] = 1e-5
    up, down = (posterior.variance((P + s * step).detach(), method=Projection(60, rtol=0.1)) for s in (1, -1))
    torch.testing.assert_close(grad[:, 0], (up - down) / 2e-5, rtol=1e-5, atol=1e-7)


def test_the_basis_is_made_once_and_belongs_to_the_posterior(cached, monkeypatch):
    gp, posterior, Xs, _ = cached
    made = []
    build = Projection.build
    monkeypatch.setattr(Projection, "build", lambda self, *args: made.append(self) or build(self, *args))
    for rtol in (None, 1.0, None):
        posterior.variance(Xs[:5], method=Projection(33, rtol=rtol))
    assert len(made) == 1
    gp.condition(posterior.X, posterior.y).variance(Xs[:5], method=Projection(33, rtol=None))
    assert len(made) == 2


def test_auto_beyond_the_factor_takes_the_projection(monkeypatch):
    monkeypatch.setattr(module, "FACTOR_UP_TO", 50)
    X, y = data(120)
    Xs, _ = data(30, seed=1)
    gp = process()
    posterior = gp.condition(X, y)
    v, info = posterior.variance(Xs, return_info=True)
    assert info.method == Projection() and "CG" in repr(posterior)
    torch.testing.assert_close(v, textbook(gp, X, y, Xs)[1].diagonal().detach(), rtol=1e-5, atol=1e-6)
    assert process(solver=Direct()).condition(X, y).is_dense
    assert process(solver=CG()).condition(X, y).variance(Xs, return_info=True)[1].method == CG()


# -- memory, shapes, arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"solver": CG(rtol=1e-2)}], ids=["dense", "iterative"])
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_bounded_for_many_test_points(options, gradient):
    n, count = 300, 10_000
    X, y = data(n, 2, dtype=torch.float32)
    Xs = data(count, 2, seed=1, dtype=torch.float32)[0].requires_grad_(gradient)
    gp = process(2, dtype=torch.float32, **options)
    posterior = gp.condition(X, y)
    saved = []

    def pack(t):
        saved.append(t.numel())
        return t

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mean = posterior.mean(Xs)
        variance = posterior.variance(Xs, method=Projection(50, rtol=None) if options else module.Auto())
        if gradient:
            kept = sum(saved)  # before backward makes blocks anew
            (mean.sum() + variance.sum()).backward()
            assert kept < 0.1 * n * count
    assert largest.numel <= max(512 * 512, 2 * n * n, 8 * count) < 0.1 * n * count


def test_shapes_and_arguments():
    X, y = data(20)
    for options in ({}, {"solver": CG()}):
        posterior = process(**options).condition(X, y)
        empty = posterior.predict(X[:0])
        assert empty[0].shape == empty[1].shape == (0,) and posterior.covariance(X[:0]).shape == (0, 0)
        assert posterior.variance(X[:1], return_info=True)[1].residual.shape == (1,)
        assert posterior.covariance(X[:1]).shape == (1, 1)
    assert "20 observations" in repr(posterior)
    for bad in (X[:, :2], X.float(), X.numpy()):
        with pytest.raises(OperandError, match="Xs"):
            posterior.mean(bad)
    with pytest.raises(OperandError, match="4000"):
        posterior.covariance(X.new_zeros(4001, 3))
    with pytest.raises(OperandError, match="method"):
        posterior.variance(X, method="fast")
    with pytest.raises(OperandError, match="Cholesky factor"):
        process().condition(X, y).variance(X, method=Projection())
    for settings in ({"rank": 0}, {"rtol": 0.0}):
        with pytest.raises(OperandError, match="expected rank"):
            Projection(**settings)
    one = ExactGP(RBF().double(), noise=0.1).condition(X[:, 0], y)
    torch.testing.assert_close(one.mean(X[:, 0]), one.mean(X[:, :1]))


@PATHS
def test_pickles(options):
    X, y = data(40)
    posterior = process(**options).condition(X, y)
    again = pickle.loads(pickle.dumps(posterior))
    for a, b in zip(posterior.predict(X), again.predict(X)):
        assert torch.equal(a, b)
