"""Several outputs: independent ones that share everything, and correlated ones, against dense Gaussians of torch."""

import copy
import pickle

import pytest
import torch
from tests.gp.problems import data, process
from torch.distributions import LogNormal, MultivariateNormal

from ritz import CG, ConvergenceWarning, Direct, Hutchinson, Lanczos, Status
from ritz.errors import DomainError, OperandError, SecondDerivativeError
from ritz.gp import ConstantMean, ExactGP, FixedNoise, LinearMean, MultiOutputGP, ZeroMean, fit
from ritz.kernels import RBF, Matern, Scale

N, P = 24, 3
PATHS = {
    "dense": {},
    "iterative": {"logdet": (Hutchinson(N * P), Lanczos(N * P))},
    "iterative with cg": {"logdet": (Hutchinson(N * P), Lanczos(N * P)), "solver": CG(rtol=1e-12)},
}


def targets(n=N, dtype=torch.float64):
    X, y = data(n)
    Y = torch.stack([y, 0.5 * y + X[:, 0], torch.cos(X[:, 1]) - y], 1)
    return X.to(dtype), Y.to(dtype)


def check(value, want, tensors):
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-9)
    for got, ref in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(want, tensors)):
        torch.testing.assert_close(got, ref, rtol=1e-7, atol=1e-8)


# -- independent outputs ----------------------------------------------------------------------------------------------

MEANS = {
    "zero": ZeroMean,
    "shared": ConstantMean,
    "one each": lambda: ConstantMean([0.1, -0.2, 0.3], outputs=P),
    "linear": lambda: LinearMean(3, outputs=P),
    "a module": lambda: torch.nn.Linear(3, P),
}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("path", PATHS)
def test_independent_outputs_are_summed(mean, path):
    X, Y = targets()
    torch.manual_seed(0)
    gp = process(mean=MEANS[mean](), **PATHS[path])
    X, Y = X.requires_grad_(True), Y.requires_grad_(True)
    value, info = gp.log_marginal_likelihood(X, Y, return_info=True)
    m = gp.mean(X)
    m = m if m.ndim == 2 else m.unsqueeze(1).expand(N, P)
    K = gp.kernel.evaluate(X) + gp.noise * torch.eye(N)
    want = sum(MultivariateNormal(m[:, j], K).log_prob(Y[:, j]) for j in range(P))
    check(value, want, [X, Y, *gp.parameters()])
    if path == "iterative":
        assert info.num_matvecs == info.depth * (P + N)  # one block: P targets and N probes (as many as points)


def test_one_column_is_one_output():
    X, Y = targets()
    gp = process()
    one, column = gp.log_marginal_likelihood(X, Y[:, 0].contiguous()), gp.log_marginal_likelihood(X, Y[:, :1])
    assert float(one.detach()) == pytest.approx(float(column.detach()), rel=1e-12)


def test_means_of_one_output():
    X, Y = targets()
    y = Y[:, 0].contiguous()
    line = process(mean=LinearMean(3))
    with torch.no_grad():
        line.mean.weights.copy_(torch.tensor([1.0, -2.0, 0.5]))
        line.mean.bias.fill_(0.3)
    zero = process(mean=ZeroMean())
    m = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + line.mean.bias
    torch.testing.assert_close(line.log_marginal_likelihood(X, y), zero.log_marginal_likelihood(X, y - m))
    torch.manual_seed(0)
    module = process(mean=torch.nn.Linear(3, 1))  # (n, 1) is taken for (n,)
    m = module.mean(X).squeeze(1)
    torch.testing.assert_close(module.log_marginal_likelihood(X, y), zero.log_marginal_likelihood(X, y - m))
    single = process(mean=torch.nn.Linear(3, 1), dtype=torch.float32)  # the dense path gives it float64 points
    single._dense(X, y)[0].backward()
    assert single.mean.weight.grad is not None
    with pytest.raises(OperandError, match=r"mean function returned shape \(24, 2\)"):
        process(mean=torch.nn.Linear(3, 2)).log_marginal_likelihood(X, Y)
    with pytest.raises(OperandError, match="3 weights"):
        process(mean=LinearMean(3)).mean(X[:, :2])
    for call in (lambda: ConstantMean(torch.ones(2)), lambda: ConstantMean(outputs=0), lambda: LinearMean(0)):
        with pytest.raises(OperandError, match="expected"):
            call()


# -- correlated outputs -----------------------------------------------------------------------------------------------


def correlated(dtype=torch.float64, **options):
    gp = MultiOutputGP(Matern(1.5, 3, lengthscale=1.3), P, 2, noise=torch.tensor([0.05, 0.1, 0.2]), **options)
    gp.mean = copy.deepcopy(gp.mean)
    with torch.no_grad():
        gp.mean.constant.copy_(torch.tensor([0.3, -0.1, 0.2]))
    return gp.to(dtype)


def covariance_by_entries(gp, X, Z=None):
    """cov(f_a(x_i), f_b(z_j)) at row i·p + a, column j·p + b, written out."""
    B = gp.output_factor @ gp.output_factor.mT + torch.diag(gp.output_variance)
    K = gp.kernel.evaluate(X, Z)
    return torch.einsum("ij,ab->iajb", K, B).reshape(K.shape[0] * P, K.shape[1] * P)


@pytest.mark.parametrize("path", PATHS)
def test_value_and_every_gradient(path):
    X, Y = targets()
    X, Y = X.requires_grad_(True), Y.requires_grad_(True)
    gp = correlated(**PATHS[path])
    value, info = gp.log_marginal_likelihood(X, Y, return_info=True)
    noise = torch.cat([gp.noise] * N)
    S = covariance_by_entries(gp, X) + torch.diag(noise)
    want = MultivariateNormal(gp.mean(X).reshape(-1), S).log_prob(Y.reshape(-1))
    names = {name for name, _ in gp.named_parameters()}
    assert {"output_factor", "raw_output_variance", "raw_noise", "mean.constant"} < names
    check(value, want, [X, Y, *gp.parameters()])
    assert isinstance(info.method, tuple) == (path != "dense")
    with torch.no_grad():
        torch.testing.assert_close(gp.covariance(X).to_dense(), S)
        torch.testing.assert_close(gp.dense_covariance(X), S)


@pytest.mark.parametrize("solver", [Direct(), CG(rtol=1e-11)], ids=["dense", "iterative"])
def test_posterior(solver):
    X, Y = targets()
    gp = correlated(solver=solver)
    new = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
    posterior = gp.condition(X, Y)
    mean, variance = posterior.predict(new)
    C = covariance_by_entries(gp, new, X)
    S = covariance_by_entries(gp, X) + torch.diag(torch.cat([gp.noise] * N))
    r = (Y - gp.mean(X)).reshape(-1, 1)
    want = gp.mean(new) + (C @ torch.linalg.solve(S, r)).reshape(7, P)
    spread = covariance_by_entries(gp, new) - C @ torch.linalg.solve(S, C.mT)
    torch.testing.assert_close(mean, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(variance, spread.diagonal().reshape(7, P), rtol=1e-7, atol=1e-8)
    noisy = posterior.predict(new, noise=True)[1]
    torch.testing.assert_close(noisy, variance + gp.noise, rtol=1e-12, atol=0)
    for got, ref in ((mean, want), (variance, spread.diagonal())):
        found, truth = (torch.autograd.grad(t.sum(), new, retain_graph=True)[0] for t in (got, ref))
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)
    joint = posterior.covariance(new)
    torch.testing.assert_close(joint, spread, rtol=1e-7, atol=1e-8)
    noisy = posterior.covariance(new, noise=True) - joint
    torch.testing.assert_close(noisy, torch.diag(torch.cat([gp.noise] * 7)), rtol=1e-7, atol=1e-12)
    G = torch.randn(7 * P, 7 * P, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found, truth = (torch.autograd.grad((G * t).sum(), new, retain_graph=True)[0] for t in (joint, spread))
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)
    assert posterior.weights.shape == (N, P) and float(posterior.info.residual.max()) < 1e-10
    assert (posterior.info.method == Direct()) == isinstance(solver, Direct)
    assert bool((posterior.variance(X) >= 0).all()) and repr(posterior).startswith("MultiOutputPosterior(24")
    assert posterior.predict(new[:0])[1].shape == (0, P) and posterior.sample(new[:0], 2).shape == (2, 0, P)


@pytest.mark.parametrize("noise", [False, True])
def test_samples_have_the_posterior_moments(noise):
    X, Y = targets()
    posterior = correlated().condition(X, Y)
    new = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = posterior.sample(new, 20_000, noise=noise, seed=1)
    assert drawn.shape == (20_000, 4, P) and torch.equal(drawn, posterior.sample(new, 20_000, noise=noise, seed=1))
    S, error = posterior.covariance(new, noise=noise), (drawn - posterior.mean(new)).reshape(20_000, -1)
    z = error.mean(0) / (S.diagonal() / 20_000).sqrt()
    assert float(z.abs().max()) < 4.5
    scale = torch.outer(S.diagonal(), S.diagonal()).sqrt()  # an entry's standard error is at most √2 of it, over √m
    assert float(((error.mT @ error / 20_000 - S) / scale).abs().max()) < 5 * (2 / 20_000) ** 0.5


def test_variance_by_products_is_of_first_order_and_reports_its_solves():
    X, Y = targets()
    new = data(400, seed=1)[0].requires_grad_(True)  # several blocks
    dense, products = (correlated(solver=s).condition(X, Y) for s in (Direct(), CG(rtol=1e-11)))
    two = new[:2].detach().requires_grad_(True)
    assert torch.autograd.gradgradcheck(dense.variance, two) and torch.autograd.gradcheck(products.variance, two)
    for f in (products.variance, products.covariance):
        (grad,) = torch.autograd.grad(f(two).sum(), two, create_graph=True)
        with pytest.raises(SecondDerivativeError, match="Direct"):
            torch.autograd.grad(grad.sum(), two)
    _, info = dense.variance(new, return_info=True)
    assert info.method == Direct() and info.status is Status.CONVERGED and info.residual.shape == (400, P)
    with pytest.warns(ConvergenceWarning):
        rough = correlated(solver=CG(max_steps=2), preconditioner=None).condition(X, Y)
    with pytest.warns(ConvergenceWarning, match="1200 variances") as record:
        v, info = rough.variance(new.detach(), return_info=True)
    assert len(record) == 1 and info.status is Status.MAX_STEPS and info.details["solved"] == 1200
    excess = v - dense.variance(new).detach()
    assert float(excess.min()) > -1e-10 and bool((excess <= info.residual + 1e-10).all()) and float(excess.max()) > 1e-3


def test_posterior_in_float32_and_by_products():
    X, Y = targets(dtype=torch.float32)
    exact = correlated().condition(X.double(), Y.double()).predict(X.double() + 0.1)
    for options, tolerance in (({}, 2e-5), ({"solver": CG(rtol=1e-5)}, 2e-3)):
        found = correlated(torch.float32, **options).condition(X, Y).predict(X + 0.1)
        for got, ref in zip(found, exact):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), ref, rtol=tolerance, atol=tolerance)


def test_leave_one_entry_out():
    X, Y = targets(6)
    gp = correlated()
    value, info = gp.leave_one_out(X, Y, return_info=True)
    S, m = gp.dense_covariance(X).detach(), gp.mean(X).detach().reshape(-1)
    y, total = Y.reshape(-1), 0.0
    for i in range(len(y)):
        rest = [j for j in range(len(y)) if j != i]
        w = torch.linalg.solve(S[rest][:, rest], S[rest, i])
        normal = torch.distributions.Normal(m[i] + w @ (y[rest] - m[rest]), (S[i, i] - w @ S[rest, i]).sqrt())
        total += float(normal.log_prob(y[i]))
    assert float(value.detach()) == pytest.approx(total, rel=1e-9)
    assert info.details["mean"].shape == Y.shape


def test_equal_outputs_average_their_noise():
    """Two noisy observations of one function at each point are worth one of half the noise."""
    X, Y = targets(12)
    gp = MultiOutputGP(RBF(3), 2, noise=0.5).double()
    with torch.no_grad():
        gp.output_factor.fill_(1.0)
    gp.output_variance = 2e-8  # at its floor: B is all ones
    one = ExactGP(RBF(3), noise=0.25).double()
    Y = Y[:, :2]
    got, want = gp.condition(X, Y).predict(X + 0.1), one.condition(X, Y.mean(1)).predict(X + 0.1)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b.unsqueeze(1).expand(12, 2), rtol=1e-5, atol=1e-6)


def test_degenerate_to_independent_outputs():
    X, Y = targets()
    gp = MultiOutputGP(RBF(3), P, noise=0.1).double()
    with torch.no_grad():
        gp.output_factor.zero_()
    gp.output_variance = 0.8
    same = ExactGP(Scale(RBF(3), 0.8), ConstantMean(outputs=P), noise=0.1).double()
    a, b = (float(p.log_marginal_likelihood(X, Y).detach()) for p in (gp, same))
    assert a == pytest.approx(b, rel=1e-6)  # start values are rounded to float32


@pytest.mark.parametrize("path", ["dense", "iterative"])
def test_fit_finds_the_correlation(path):
    """Two noisy observations of f and −f."""
    g = torch.Generator().manual_seed(0)
    X = torch.linspace(0, 1, 60, dtype=torch.float64).unsqueeze(1)
    f = torch.sin(9 * X)
    Y = torch.cat([f, -f], 1) + 0.1 * torch.randn(60, 2, dtype=torch.float64, generator=g)
    options = {} if path == "dense" else {"logdet": (Hutchinson(10), Lanczos(rtol=1e-4))}
    gp = MultiOutputGP(RBF(lengthscale=0.3), 2, **options).double()
    fit(gp, X, Y, subset=None if path == "iterative" else 1000, steps=30)
    B, noise = gp.output_covariance.detach(), gp.noise.detach()
    assert float(B[0, 1]) < -0.95 * float(B[0, 0] * B[1, 1]) ** 0.5
    assert bool((noise > 0.006).all()) and bool((noise < 0.016).all())  # 0.01 was put in


def test_state_copies_and_priors():
    X, Y = targets()
    gp = correlated(priors={"output_variance": LogNormal(0.0, 1.0), "noise": LogNormal(-3.0, 1.0)})
    assert gp.log_prior().shape == () and float(gp.log_prior().detach()) != 0.0
    want = float(gp.log_marginal_likelihood(X, Y).detach())
    for twin in (copy.deepcopy(gp), pickle.loads(pickle.dumps(gp))):
        assert float(twin.log_marginal_likelihood(X, Y).detach()) == want
    fresh = MultiOutputGP(Matern(1.5, 3), P, 2, seed=4).double()
    assert not torch.equal(fresh.output_factor, gp.output_factor)
    fresh.load_state_dict(gp.state_dict())
    assert float(fresh.log_marginal_likelihood(X, Y).detach()) == want
    assert "(0.05, 0.1, 0.2)" in repr(gp)


def test_auto_counts_every_entry():
    gp = MultiOutputGP(RBF(), 4)
    assert gp.method(500) == Direct() and gp.method(501) == (Hutchinson(10), Lanczos(rtol=1e-3))
    X = data(130)[0]  # 520 entries, and not 4 times as many
    _, info = gp.double().log_marginal_likelihood(X, X[:, :1].expand(130, 4), return_info=True)
    assert info.method == Direct()


def test_breakdown_is_explained():
    X = torch.zeros(3, 1, dtype=torch.float64)
    gp = MultiOutputGP(RBF(), 2, noise=1e-18, noise_floor=1e-19).double()
    with pytest.raises(DomainError, match="4 rows of X repeat"):  # 6 entries, of which 2 differ
        gp.log_marginal_likelihood(X, X.expand(3, 2))


def test_arguments():
    X, Y = targets()
    gp = correlated()
    cases = [
        (lambda: MultiOutputGP(RBF(), 2, 3), "rank=3"),
        (lambda: MultiOutputGP(RBF(), 0), "outputs=0"),
        (lambda: MultiOutputGP(RBF(), 2, noise=FixedNoise(0.1)), "learns one number"),
        (lambda: MultiOutputGP(RBF(), 2, noise=torch.ones(3)), r"noise was given with shape \(3,\)"),
        (lambda: MultiOutputGP("rbf", 2), "kernel"),
        (lambda: gp.log_marginal_likelihood(X, Y[:, 0]), r"expected \(n, 3\)"),
        (lambda: gp.log_marginal_likelihood(X, Y[:, :2]), r"expected \(n, 3\)"),
        (lambda: gp.noise_curve(X, Y, torch.ones(2)), "one noise"),
        (lambda: gp.condition(X, Y).mean(X[:, :2]), r"expected \(n\*, 3\)"),
        (lambda: gp.condition(X, Y).mean(X.float()), "torch.float64"),
        (lambda: gp.condition(X, Y).covariance(X.new_zeros(1334, 3)), "of size 4002"),
        (lambda: gp.condition(X, Y).sample(X, 0), "at least 1"),
        (lambda: correlated(solver=Direct(max_bytes=16 * 72**2 - 1)).condition(X, Y), "size 72 .* need 82944 bytes"),
    ]
    for call, words in cases:
        with pytest.raises(OperandError, match=words):
            call()
