"""Priors on hyper-parameters: densities of the positive values, found by path, and carried along with the process."""

import copy
import io
import math
import pickle

import pytest
import torch
from tests.gp.problems import data, process
from torch.distributions import Gamma, HalfCauchy, Independent, LogNormal, Normal, Uniform

from ritz.errors import OperandError
from ritz.gp import ConstantMean, ExactGP, FixedNoise, vanilla_priors
from ritz.kernels import RBF, Matern, Scale

LENGTHSCALE = "kernel.base_kernel.lengthscale"


def some():
    return {
        "kernel.outputscale": Gamma(*torch.tensor([2.0, 0.5]).double()),
        LENGTHSCALE: LogNormal(torch.tensor([0.0, 0.5, 1.0]).double(), 2.0),
        "noise": HalfCauchy(0.3),
        "mean.constant": Normal(0.0, 2.0),
    }


def value_of(gp):
    return gp.log_prior().detach()


def by_hand(scale, ell, noise, constant):
    """The same densities from the textbook."""
    gamma = 2 * math.log(0.5) + math.log(scale) - 0.5 * scale  # Γ(2) = 1
    location = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    log = ell.double().log()
    lognormal = (-log - math.log(2.0) - 0.5 * math.log(2 * math.pi) - (log - location) ** 2 / 8).sum()
    cauchy = math.log(2 / (math.pi * 0.3)) - math.log1p((noise / 0.3) ** 2)
    normal = -0.5 * math.log(2 * math.pi * 4) - constant**2 / 8
    return gamma + float(lognormal) + cauchy + normal


def test_value_is_the_sum_of_the_densities():
    gp = process(priors=some())
    ell = torch.tensor([[0.7, 1.9, 0.2]])
    gp.kernel.base_kernel.lengthscale, gp.kernel.outputscale, gp.noise = ell, 1.7, 0.05
    found = value_of(gp)
    assert found.dtype == torch.float64 and found.shape == ()
    constant = float(gp.mean.constant.detach())
    assert float(found) == pytest.approx(by_hand(1.7, ell.flatten(), 0.05, constant), rel=1e-7)
    empty = value_of(process())
    assert float(empty) == 0.0 and empty.dtype == torch.float64


def test_gradient_reaches_the_raw_parameters():
    gp = process(priors=some())
    gp.log_prior().backward()
    raw = gp.kernel.raw_outputscale.detach().clone().requires_grad_(True)
    value = torch.nn.functional.softplus(raw) + 1e-8
    (value.log() - 0.5 * value).backward()
    assert float(gp.kernel.raw_outputscale.grad) == pytest.approx(float(raw.grad), rel=1e-12)
    assert all(p.grad is not None for p in gp.parameters())


def test_the_likelihood_is_free_of_it():
    X, y = data()
    assert torch.equal(process(priors=some()).log_marginal_likelihood(X, y), process().log_marginal_likelihood(X, y))


def test_copies_pickles_and_state():
    gp = process(priors=some())
    want = float(value_of(gp))
    twin = copy.deepcopy(gp)
    assert float(value_of(twin)) == want
    twin.noise = 1.0
    assert float(value_of(twin)) != want and float(value_of(gp)) == want
    assert float(value_of(pickle.loads(pickle.dumps(gp)))) == want
    file = io.BytesIO()
    torch.save(gp.state_dict(), file)
    file.seek(0)
    fresh = process(noise=0.7, priors=some())
    fresh.load_state_dict(torch.load(file))
    assert float(value_of(fresh)) == want
    assert set(gp.state_dict()) == set(process().state_dict())  # priors are settings


def test_dtype_and_device_of_process_and_prior_may_differ():
    single = process(dtype=torch.float32, priors=some())
    assert single.log_prior().dtype == torch.float64
    assert float(value_of(single)) == pytest.approx(float(value_of(process(priors=some()))), rel=1e-5)
    meta = {"noise": LogNormal(torch.zeros((), device="meta"), torch.ones((), device="meta"), validate_args=False)}
    from ritz.gp.priors import _device

    assert _device(meta["noise"]) == torch.device("meta")
    assert _device(Independent(Normal(torch.zeros(2), torch.ones(2)), 1)) == torch.device("cpu")


class Wide:
    """Not a torch distribution."""

    def log_prob(self, value):
        return -value.square() / 50


def test_any_object_with_log_prob():
    gp = process(priors={LENGTHSCALE: Wide()})
    assert float(value_of(gp)) == pytest.approx(-3 * 1.3**2 / 50)


def test_outside_of_the_support_is_minus_infinity():
    gp = process(priors={"noise": Uniform(0.1, 1.0)})  # the noise is 0.05
    assert float(value_of(gp)) == -math.inf
    gp.noise = 0.5
    assert float(value_of(gp)) == pytest.approx(-math.log(0.9), rel=1e-6)


def test_vanilla_priors():
    for d in (1, 18):
        priors = vanilla_priors(d)
        gp = ExactGP(Scale(Matern(2.5, d)), priors=priors).double()
        ell = priors[LENGTHSCALE]
        assert float(ell.base_dist.loc) == pytest.approx(math.sqrt(2) + math.log(d) / 2)
        assert float(ell.base_dist.scale) == pytest.approx(math.sqrt(3))
        assert math.isfinite(float(value_of(gp)))
    # from far out, the prior pulls back
    gp.kernel.base_kernel.lengthscale = 1e4
    gp.kernel.outputscale = 1e4
    gp.noise = 1e-5
    (ell, scale, noise) = torch.autograd.grad(
        gp.log_prior(), [gp.kernel.base_kernel.raw_lengthscale, gp.kernel.raw_outputscale, gp.raw_noise]
    )
    assert bool((ell < 0).all()) and float(scale) < 0 < float(noise)


def test_a_fixed_noise_may_keep_its_prior():
    gp = ExactGP(Scale(RBF(2)), noise=FixedNoise(0.1), priors=vanilla_priors(2))
    assert math.isfinite(float(value_of(gp)))


@pytest.mark.parametrize(
    "priors, words",
    [
        ({"kernel.lengthscale": LogNormal(0.0, 1.0)}, "no 'kernel.lengthscale'.*kernel.base_kernel.lengthscale, "),
        ({"nose": LogNormal(0.0, 1.0)}, "no 'nose'"),
        ({"kernel": LogNormal(0.0, 1.0)}, "'kernel' is a Scale"),
        ({"noise": 0.1}, "log_prob"),
        ({LENGTHSCALE: LogNormal(torch.zeros(2), 1.0)}, r"shape \(1, 3\)"),
        ([("noise", LogNormal(0.0, 1.0))], "a list; expected a dictionary"),
    ],
)
def test_arguments(priors, words):
    with pytest.raises(OperandError, match=words):
        process(priors=priors)
    with pytest.raises(OperandError, match="d=0"):
        vanilla_priors(0)


def test_paths_into_sums_and_means():
    kernel = Scale(RBF()) + Scale(Matern(1.5))
    gp = ExactGP(kernel, ConstantMean(outputs=2), priors={"kernel.kernels.1.outputscale": LogNormal(0.0, 1.0)})
    gp.kernel.kernels[1].outputscale = 2.0
    want = -math.log(2.0) - 0.5 * math.log(2 * math.pi) - 0.5 * math.log(2.0) ** 2
    assert float(value_of(gp)) == pytest.approx(want, rel=1e-6)
