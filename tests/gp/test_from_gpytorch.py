"""GPyTorch models read by names: against GPyTorch itself where it is installed, and against stand-ins everywhere."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import distributions, nn

from ritz.errors import OperandError
from ritz.gp import FixedNoise, LinearMean, ZeroMean, from_gpytorch
from ritz.kernels import RBF, AdditiveKernel, Linear, Matern, Periodic, ProductKernel, RationalQuadratic, Scale


def data(n=40, d=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    return X.to(dtype), (X[:, 0].sin() + 0.1 * torch.randn(n, generator=g, dtype=torch.float64)).to(dtype)


# -- without GPyTorch: classes of the same names ----------------------------------------------------------------------


class Like(nn.Module):
    """A stand-in: attributes as in GPyTorch, nothing else."""

    active_dims = None
    ard_num_dims = None
    batch_shape = torch.Size([])

    def __init__(self, **attributes):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros((), dtype=torch.float64))  # tells the dtype
        for name, value in attributes.items():
            if isinstance(value, list):
                value = nn.ModuleList(value) if name == "kernels" else torch.as_tensor(value)
                value = value.double() if name not in ("kernels", "active_dims") else value
            setattr(self, name, value)


class RBFKernel(Like): ...


class MaternKernel(Like): ...


class RQKernel(Like): ...


class PeriodicKernel(Like): ...


class LinearKernel(Like): ...


class PolynomialKernel(Like): ...


class CosineKernel(Like): ...


class ScaleKernel(Like): ...


class AdditiveKernel_(Like): ...


class ProductKernel_(Like): ...


AdditiveKernel_.__name__, ProductKernel_.__name__ = "AdditiveKernel", "ProductKernel"


class ConstantMean_(Like): ...


class ZeroMean_(Like): ...


class GaussianLikelihood(Like): ...


class FixedNoiseGaussianLikelihood(Like): ...


class BernoulliLikelihood(Like): ...


class MultitaskMean(Like): ...


ConstantMean_.__name__, ZeroMean_.__name__ = "ConstantMean", "ZeroMean"


def stand_in(kernel, mean=None, likelihood=None, **more):
    mean = mean or ConstantMean_(constant=torch.tensor(0.3).double())
    likelihood = likelihood or GaussianLikelihood(noise=[0.05])
    return SimpleNamespace(covar_module=kernel, mean_module=mean, likelihood=likelihood, **more)


def test_stand_ins():
    kernel = AdditiveKernel_(
        kernels=[
            ScaleKernel(outputscale=[2.5], base_kernel=RBFKernel(lengthscale=[[0.5, 1.0, 2.0]], ard_num_dims=3)),
            ProductKernel_(
                kernels=[
                    MaternKernel(nu=1.5, lengthscale=[[0.7]], active_dims=[2, 0]),
                    PeriodicKernel(lengthscale=[[1.5]], period_length=[[0.9]], active_dims=[1]),
                ]
            ),
            RQKernel(lengthscale=[[1.1]], alpha=[0.6]),
            LinearKernel(variance=[[0.4]]),
            PolynomialKernel(offset=[0.8], power=torch.tensor([2])),
        ]
    )
    gp = from_gpytorch(stand_in(kernel))
    scaled, product, rq, linear, polynomial = gp.kernel.kernels
    assert isinstance(gp.kernel, AdditiveKernel) and isinstance(product, ProductKernel)
    assert isinstance(scaled, Scale) and isinstance(scaled.base_kernel, RBF) and isinstance(rq, RationalQuadratic)
    assert isinstance(product.kernels[0], Matern) and product.kernels[0].nu == 1.5 and isinstance(linear, Linear)
    assert isinstance(product.kernels[1], Periodic) and polynomial.power == 2
    close = lambda got, want: torch.testing.assert_close(got, torch.tensor(want).double(), rtol=1e-12, atol=0)
    close(scaled.outputscale, 2.5)
    close(scaled.base_kernel.lengthscale, [[0.5, 1.0, 2.0]])
    close(product.kernels[0].lengthscale, [[0.7]])
    close(product.kernels[1].period_length, [[0.9]])
    close(torch.cat([rq.alpha, linear.variance[0], polynomial.offset]), [0.6, 0.4, 0.8])
    close(gp.noise, 0.05)
    close(gp.mean(torch.zeros(1, 3).double()), [torch.tensor(0.3).item()])
    assert product.kernels[0].active_dims.tolist() == [2, 0] and product.kernels[1].active_dims.tolist() == [1]
    assert bool(torch.isfinite(gp.log_marginal_likelihood(*data())))


def test_columns_of_columns():
    # the active_dims of a sum's terms count within those of the sum
    terms = [RBFKernel(lengthscale=[[1.0]], active_dims=[1]), RBFKernel(lengthscale=[[1.0]])]
    gp = from_gpytorch(stand_in(AdditiveKernel_(kernels=terms, active_dims=[2, 0])))
    assert [k.active_dims.tolist() for k in gp.kernel.kernels] == [[0], [2, 0]]
    # GPyTorch copies them from the base to the scaled kernel, and applies them once
    base = RBFKernel(lengthscale=[[1.0]], active_dims=[1])
    gp = from_gpytorch(stand_in(ScaleKernel(outputscale=[1.0], base_kernel=base, active_dims=[1])))
    assert gp.kernel.base_kernel.active_dims.tolist() == [1]


def test_noise_bounds_fixed_parameters_and_settings():
    constraint = SimpleNamespace(lower_bound=torch.tensor(1e-3))
    likelihood = GaussianLikelihood(noise=[0.05], raw_noise_constraint=constraint)
    kernel = RBFKernel(lengthscale=[[1.0]], raw_lengthscale=nn.Parameter(torch.zeros(1, 1), requires_grad=False))
    gp = from_gpytorch(stand_in(kernel, ZeroMean_(), likelihood))
    assert gp.noise_floor == pytest.approx(1e-3) and isinstance(gp.mean, ZeroMean)
    assert not gp.kernel.raw_lengthscale.requires_grad and gp.raw_noise.requires_grad
    fixed = FixedNoiseGaussianLikelihood(noise=torch.linspace(0.1, 0.2, 40).double(), second_noise_covar=None)
    gp = from_gpytorch(stand_in(kernel, None, fixed), solver=__import__("ritz").CG(rtol=1e-8))
    assert isinstance(gp.noise_model, FixedNoise) and gp.solver.rtol == 1e-8
    torch.testing.assert_close(gp.noise_model.value, fixed.noise)


def test_priors_and_constraints():
    kernel = ScaleKernel(outputscale=[2.0], base_kernel=RBFKernel(lengthscale=[[0.7]]))
    Gamma = type("GammaPrior", (), {})()
    Gamma.concentration, Gamma.rate = torch.tensor(3.0), torch.tensor(6.0)
    Box, Interval = (
        type("SmoothedBoxPrior", (), {})(),
        type("Interval", (), {"__str__": lambda self: "Interval(0, 1)"})(),
    )
    Positive = type("Positive", (), {})()
    priors = [
        ("covar_module.base_kernel.lengthscale_prior", kernel.base_kernel, Gamma, None, None),
        ("covar_module.outputscale_prior", kernel, Box, None, None),
    ]
    constraints = [("covar_module.raw_outputscale_constraint", Interval), ("a.raw_lengthscale_constraint", Positive)]
    model = stand_in(kernel, named_priors=lambda: priors, named_constraints=lambda: constraints)
    with pytest.warns(UserWarning) as record:
        gp = from_gpytorch(model)
    messages = [str(r.message) for r in record]
    assert len(messages) == 2 and "SmoothedBoxPrior of covar_module.outputscale_prior" in messages[0]
    assert "Interval(0, 1) of covar_module.raw_outputscale" in messages[1]
    assert set(gp.priors) == {"kernel.base_kernel.lengthscale"}
    want = distributions.Gamma(3.0, 6.0).log_prob(torch.tensor(0.7))
    assert float(gp.log_prior().detach()) == pytest.approx(float(want), rel=1e-6)


def test_refusals():
    rbf = RBFKernel(lengthscale=[[1.0]])
    batched = RBFKernel(lengthscale=[[1.0]], batch_shape=torch.Size([2]))
    second = FixedNoiseGaussianLikelihood(noise=torch.ones(3), second_noise_covar=object())
    cases = [
        (stand_in(CosineKernel()), "CosineKernel; supported are RBFKernel, MaternKernel"),
        (stand_in(batched), "batch_shape"),
        (stand_in(rbf, MultitaskMean()), "MultitaskMean; supported are ConstantMean"),
        (stand_in(rbf, None, BernoulliLikelihood()), "BernoulliLikelihood; supported are GaussianLikelihood"),
        (stand_in(rbf, None, GaussianLikelihood(noise=[0.1, 0.2])), "noise has shape"),
        (stand_in(rbf, None, second), "learn_additional_noise"),
        (nn.Linear(1, 1), "Linear has no covar_module"),
    ]
    for model, words in cases:
        with pytest.raises(OperandError, match=words):
            from_gpytorch(model)


class Model(nn.Module):
    """A stand-in for a model that is a module, with more than its three parts."""

    def __init__(self, **more):
        super().__init__()
        vars_ = vars(stand_in(ScaleKernel(outputscale=[2.0], base_kernel=RBFKernel(lengthscale=[[1.0]]))))
        for name, value in {**vars_, **more}.items():
            setattr(self, name, value)


def test_what_belongs_to_no_part_is_refused():
    cases = [
        ({"extractor": nn.Linear(3, 3)}, "Model has extractor beside covar_module, mean_module, likelihood"),
        ({"norm": nn.BatchNorm1d(3, affine=False)}, "has norm beside"),
        ({"warp": nn.Parameter(torch.ones(3))}, "has warp beside"),
        ({"feature_extractor": torch.tanh}, "has feature_extractor beside"),
        ({"input_transform": nn.Identity(), "outcome_transform": nn.Identity()}, "input_transform, outcome_transform"),
        ({"warp": nn.Parameter(torch.ones(3)), "input_transform": nn.Linear(3, 3)}, "has warp, input_transform beside"),
    ]
    for more, words in cases:
        with pytest.raises(OperandError, match=words):
            from_gpytorch(Model(**more))
    with pytest.raises(OperandError, match="has feature_extractor beside"):
        from_gpytorch(stand_in(RBFKernel(lengthscale=[[1.0]]), feature_extractor=nn.Linear(3, 3)))
    harmless = Model(scale=nn.Tanh(), input_transform=None)
    harmless.base = harmless.covar_module.base_kernel  # a part under a second name
    assert isinstance(from_gpytorch(harmless).kernel, Scale)


# -- with GPyTorch ----------------------------------------------------------------------------------------------------


def kernels(gpytorch):
    k = gpytorch.kernels
    return {
        "rbf": k.ScaleKernel(k.RBFKernel(ard_num_dims=3)),
        "matern12": k.MaternKernel(nu=0.5),
        "matern32": k.ScaleKernel(k.MaternKernel(nu=1.5, active_dims=[2, 0], ard_num_dims=2)),
        "matern52": k.ScaleKernel(k.MaternKernel(nu=2.5, ard_num_dims=3)),
        "rq": k.ScaleKernel(k.RQKernel(ard_num_dims=3)),
        "periodic": k.ScaleKernel(k.PeriodicKernel(ard_num_dims=3)),
        "periodic one": k.PeriodicKernel(active_dims=[1]),
        "linear": k.ScaleKernel(k.LinearKernel()),
        "linear ard": k.LinearKernel(ard_num_dims=3),
        "polynomial": k.PolynomialKernel(power=3),
        "sum": k.ScaleKernel(k.RBFKernel()) + k.LinearKernel(active_dims=[0]) + k.ScaleKernel(k.PeriodicKernel()),
        "product": k.ScaleKernel(k.RBFKernel(active_dims=[0, 1]) * k.PeriodicKernel(active_dims=[2])),
        "nested": k.ScaleKernel(k.RBFKernel(active_dims=[1]) + k.MaternKernel(), active_dims=[2, 0]),
        "scaled columns": k.ScaleKernel(k.ScaleKernel(k.RBFKernel(), active_dims=[1]), active_dims=[0, 2]),
    }


def exact_model(gpytorch, kernel, X, y, mean=None, likelihood=None):
    class Model(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(X, y, likelihood or gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module, self.covar_module = mean or gpytorch.means.ConstantMean(), kernel

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model = Model().double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.5)
    return model


@pytest.fixture
def gpytorch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("gpytorch")


NAMES = "rbf, matern12, matern32, matern52, rq, periodic, periodic one, linear, linear ard, polynomial, sum, product"


@pytest.mark.parametrize("name", [*NAMES.split(", "), "nested", "scaled columns"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_same_matrix_and_likelihood(gpytorch, name):
    X, y = data()
    model = exact_model(gpytorch, kernels(gpytorch)[name], X, y)
    gp = from_gpytorch(model)
    with torch.no_grad(), gpytorch.settings.lazily_evaluate_kernels(False):
        want = model.covar_module(X, X[:7] + 0.1).to_dense()
        torch.testing.assert_close(gp.kernel(X, X[:7] + 0.1).to_dense(), want, rtol=1e-10, atol=1e-10)
    model.train(), model.likelihood.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    with gpytorch.settings.fast_computations(False, False, False):
        theirs = mll(model(X), y) * len(y)  # theirs is divided by n
    ours = gp.log_marginal_likelihood(X, y)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_means_noises_and_predictions(gpytorch):
    X, y = data()
    new = X[:5] + 0.3
    noise = torch.linspace(0.05, 0.2, len(y), dtype=torch.float64)
    cases = [
        (gpytorch.means.ZeroMean(), gpytorch.likelihoods.GaussianLikelihood()),
        (gpytorch.means.LinearMean(3), gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise)),
        (gpytorch.means.LinearMean(3, bias=False), gpytorch.likelihoods.GaussianLikelihood()),
    ]
    for mean, likelihood in cases:
        kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        model = exact_model(gpytorch, kernel, X, y, mean, likelihood)
        gp = from_gpytorch(model)
        model.eval(), model.likelihood.eval()
        with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
            want = model(new)
        got, variance = gp.condition(X, y).predict(new)
        torch.testing.assert_close(got.detach(), want.mean, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(variance.detach(), want.variance, rtol=1e-6, atol=1e-7)
    assert isinstance(gp.mean, LinearMean)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_priors_of_gpytorch(gpytorch):
    X, y = data()
    p = gpytorch.priors
    kernel = gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.RBFKernel(ard_num_dims=3, lengthscale_prior=p.GammaPrior(3.0, 6.0)),
        outputscale_prior=p.LogNormalPrior(0.0, 1.0),
    )
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_prior=p.GammaPrior(1.1, 0.05))
    mean = gpytorch.means.ConstantMean(constant_prior=p.NormalPrior(0.0, 2.0))
    model = exact_model(gpytorch, kernel, X, y, mean, likelihood)
    gp = from_gpytorch(model)
    assert set(gp.priors) == {"kernel.base_kernel.lengthscale", "kernel.outputscale", "noise", "mean.constant"}
    model.train(), likelihood.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    with gpytorch.settings.fast_computations(False, False, False):
        theirs = float(mll(model(X), y).detach()) * len(y)
    ours = float((gp.log_marginal_likelihood(X, y) + gp.log_prior()).detach())
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert gp.noise_floor == pytest.approx(1e-4, rel=1e-6) and math.isfinite(ours)
