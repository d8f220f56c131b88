"""Variances with their bounds, warnings of what has not converged, groups by name, estimates for larger networks."""

import copy
import warnings

import pytest
import torch
from torch import nn

import ritz
from ritz.curvature import GGN, CrossEntropy, Jacobian, SquaredError, preflight
from ritz.errors import ConvergenceWarning, OperandError
from ritz.laplace import Laplace
from ritz.laplace.predictive import bridge

DOUBLE = {"dtype": torch.float64}


def larger(likelihood="regression", dtype=torch.float64):
    """1281 parameters, 300 examples: no side is short enough where dense=False."""
    torch.manual_seed(0)
    outputs = 1 if likelihood == "regression" else 3
    model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, outputs)).to(dtype)
    x = torch.randn(300, 20, dtype=dtype)
    y = torch.randn(300, 1, dtype=dtype) if likelihood == "regression" else torch.randint(0, 3, (300,))
    return model, x, y


def tied():
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Linear(3, 3), "d": nn.Linear(3, 3)}).double()
    model["d"].weight = model["e"].weight
    model.forward = lambda x: model["d"](torch.tanh(model["e"](x)))
    data = torch.randn(5, 3, **DOUBLE), torch.tensor([0, 1, 2, 0, 1])
    return model, data


def exact_variance(model, x, y, D, sigma):
    G = GGN(model, SquaredError(), None, (x, y), reduction="sum").to_dense()
    J = Jacobian(model, data=x).to_dense()
    return torch.einsum("np,pq,nq->n", J, torch.linalg.inv(G / sigma**2 + torch.diag(D)), J)


@pytest.mark.parametrize("prior", [0.05, {"0": 0.03, "2": 0.4}])
def test_the_variance_lies_between_its_bounds(prior):
    model, x, y = larger()
    P = sum(p.numel() for p in model.parameters())
    D = torch.full((P,), 0.05, **DOUBLE)
    if isinstance(prior, dict):
        D = torch.cat([torch.full((1050,), 0.03, **DOUBLE), torch.full((P - 1050,), 0.4, **DOUBLE)])
    want = exact_variance(model, x, y, D, 0.3)
    la = Laplace(model, "regression", sigma_noise=0.3, dense=False, rank=60, prior_precision=prior).fit((x, y))
    f, upper, lower = la.functional_variance(x, return_lower=True)
    upper, lower = upper.flatten(), lower.flatten()
    assert bool((lower <= want * (1 + 1e-6)).all()) and bool((want <= upper * (1 + 1e-6)).all())
    assert float((upper / lower).max()) > 1.5  # they have something to say
    with pytest.warns(ConvergenceWarning, match="60 eigenpairs are an upper bound, up to .* times too large"):
        torch.testing.assert_close(la.predict(x)[1].flatten(), upper)
    whole = Laplace(model, "regression", sigma_noise=0.3, dense=False, rank=300, prior_precision=prior).fit((x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all 300 eigenvalues that are not zero: nothing is left out
        _, upper, lower = whole.functional_variance(x, return_lower=True)
    torch.testing.assert_close(upper.flatten(), want, rtol=1e-3, atol=1e-6)
    assert bool((lower.flatten() <= want * (1 + 1e-6)).all())
    solved = Laplace(model, "regression", sigma_noise=0.3, dense=False, rank=None, prior_precision=prior, rtol=1e-8)
    _, one, other = solved.fit((x, y)).functional_variance(x[:5], return_lower=True)
    torch.testing.assert_close(one.flatten(), want[:5], rtol=1e-5, atol=1e-8)
    assert torch.equal(one, other)


@pytest.mark.parametrize("prior", [1e-6, 1e-4, {"0": 1e-4, "2": 1e-2}])
def test_variances_are_not_negative_in_single_precision(prior):
    model, x, y = larger(dtype=torch.float32)
    la = Laplace(model, "regression", sigma_noise=0.05, dense=False, prior_precision=prior).fit((3 * x, y))
    assert float(la.functional_variance(3 * x, return_lower=True)[1].min()) > 0


def test_an_evidence_that_has_not_converged_is_told():
    model, x, y = larger()
    options = {"estimator": ritz.Hutchinson(10), "method": ritz.Lanczos(rtol=1e-8, max_matvecs=3), "dual": False}
    for prior in (1e-3, {"0": 1e-3, "2": 1e-3}):
        la = Laplace(model, "regression", sigma_noise=0.3, dense=False, **options).fit((x, y))
        with pytest.warns(ConvergenceWarning, match="3 products|30 products"):
            _, info = la.log_marginal_likelihood(prior, return_info=True)
        assert not info.status.success


def test_groups_of_a_larger_network_are_estimated_with_their_derivatives():
    model, x, y = larger()
    G = GGN(model, SquaredError(), None, (x, y), reduction="sum").to_dense() / 0.09
    logs = torch.tensor([0.2, 1.5], **DOUBLE).log().requires_grad_()
    la = Laplace(model, "regression", sigma_noise=0.3, dense=False, estimator=ritz.Hutchinson(200)).fit((x, y))
    value, info = la.log_marginal_likelihood({"0": logs[0].exp(), "2": logs[1].exp()}, return_info=True)
    D = torch.cat([logs[0].exp().expand(1050), logs[1].exp().expand(51)])
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    want = -0.5 * (torch.logdet(G + torch.diag(D)) - D.log().sum() + (D * theta**2).sum())
    assert float((value - la.log_likelihood() - want).detach().abs()) < 4 * float(info.standard_error) < 20
    (got,), (expected,) = torch.autograd.grad(value, logs), torch.autograd.grad(want, logs)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.5)


def test_the_evidence_is_differentiable_in_an_augmentation():
    model, x, y = larger()
    noise, s = torch.randn(300, 20, **DOUBLE), torch.tensor(0.3, requires_grad=True, **DOUBLE)

    class Augmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, z):
            return self.net(z + s * noise[: len(z)])

    def evidence():
        la = Laplace(Augmented(), "regression", sigma_noise=0.5, hyperparameters=[s], estimator=ritz.Hutchinson(300),
                     method=ritz.Lanczos(rtol=1e-8, max_matvecs=400), dual=False)  # fmt: skip
        return la.fit((x, y)).log_marginal_likelihood(2.0)

    (got,) = torch.autograd.grad(evidence(), s)
    h, values = 1e-4, []
    for step in (h, -h):
        with torch.no_grad():
            s += step
            values.append(evidence())
            s -= step
    torch.testing.assert_close(got, (values[0] - values[1]) / (2 * h), rtol=1e-4, atol=1e-4)


def test_the_longest_name_of_a_group_has_the_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(9, 3, **DOUBLE), torch.randn(9, 2, **DOUBLE)
    la = Laplace(model, "regression").fit(data)
    one, other = {"0": 1.0, "0.weight": 20.0, "2": 1.0}, {"0.weight": 20.0, "2": 1.0, "0": 1.0}
    single = {"0.weight": 20.0, "0.bias": 1.0, "2.weight": 1.0, "2.bias": 1.0}
    want = la.log_marginal_likelihood(single)
    assert float(la.log_marginal_likelihood(one)) == float(la.log_marginal_likelihood(other)) == float(want)


def test_states_without_eigenpairs_and_of_other_weights(tmp_path):
    model, x, y = larger()
    la = Laplace(model, "regression", dense=False, rank=None).fit((x, y))
    torch.save(la.state_dict(), tmp_path / "la.pt")
    state = torch.load(tmp_path / "la.pt", weights_only=True)
    loaded = Laplace(model, "regression", dense=False).load_state_dict(state)
    torch.testing.assert_close(loaded.log_marginal_likelihood(1.0), la.log_marginal_likelihood(1.0))
    with pytest.raises(OperandError, match="a loaded posterior has no data"):
        loaded.functional_variance(x[:2])
    with torch.no_grad():
        model[0].weight += 0.1
    with pytest.raises(OperandError, match="belongs to other weights"):
        Laplace(model, "regression", dense=False).load_state_dict(state)
    deeper = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1)).double()
    with pytest.raises(OperandError, match="1101 of them.* than the 661"):
        Laplace(deeper, "regression", dense=False).load_state_dict(state)


def test_the_bridge_is_finite_for_confident_logits_and_no_variance():
    f = torch.tensor([[80.0, -80.0, 1.0], [0.5, 0.2, -1.0], [200.0, 0.0, -200.0]])
    V = torch.diag_embed(torch.tensor([[2.0, 1.0, 3.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]))
    got = bridge(f, V)
    assert bool(torch.isfinite(got).all()) and bool((got[0].argmax() == 0) & (got[2].argmax() == 0))
    # Against the formula, in double precision, where nothing overflows and every variance is another.
    root = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0), **DOUBLE)
    g, v, C = 2 * root[:, 0], root @ root.mT + 0.1 * torch.eye(3, **DOUBLE), 3
    to_sum, whole = v.sum(-1), v.sum((1, 2))[:, None]
    centred = g - to_sum * g.sum(1, keepdim=True) / whole
    marginal = v.diagonal(dim1=1, dim2=2) - to_sum**2 / whole
    alpha = (1 - 2 / C + centred.exp() / C**2 * torch.exp(-centred).sum(1, keepdim=True)) / marginal
    torch.testing.assert_close(bridge(g, v), alpha / alpha.sum(1, keepdim=True))
    assert bool(torch.isfinite(bridge(f, torch.zeros(3, 3, 3))).all())
    confident = nn.Linear(2, 3)
    confident.weight.data = torch.tensor([[40.0, 0], [-40, 0], [0, 1]])
    x = torch.tensor([[1.0, 0], [2, 0], [-1, 0.5]])
    la = Laplace(confident, "classification").fit((x, torch.tensor([0, 0, 1])))
    assert bool(torch.isfinite(la.predict(x, link="bridge")).all())


def test_tied_weights_are_meant_by_each_of_their_names():
    model, data = tied()
    for params, names in (("d", {"e.weight", "d.bias"}), ("d.weight", {"e.weight"}), ("e", {"e.weight", "e.bias"})):
        assert set(GGN(model, CrossEntropy(), params, data).network.names) == names


def test_bounds_in_single_precision_hold_against_double():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 200), nn.Tanh(), nn.Linear(200, 2))
    x, y = 2 * torch.randn(300, 1), torch.randn(300, 2)
    P = sum(p.numel() for p in model.parameters())
    wide = copy.deepcopy(model).double()
    G = GGN(wide, SquaredError(), None, (x.double(), y.double()), reduction="sum").to_dense()
    J = Jacobian(wide, data=x.double()).to_dense().reshape(300, 2, P)
    for rank, delta in ((40, 1e-2), (60, 1e-3), (60, 1.0)):
        S = torch.linalg.inv(G / 0.01 + delta * torch.eye(P, **DOUBLE))
        want = torch.einsum("ncp,pq,ncq->nc", J, S, J)
        la = Laplace(model, "regression", sigma_noise=0.1, dense=False, rank=rank, prior_precision=delta).fit((x, y))
        _, upper, lower = la.functional_variance(x, return_lower=True)
        upper, lower = (v.diagonal(dim1=1, dim2=2).double() for v in (upper, lower))
        assert bool((lower <= 1.01 * want).all()) and bool((want <= 1.02 * upper).all())


def test_a_state_serves_the_prior_it_was_saved_with(tmp_path):
    model, x, y = larger()
    la = Laplace(model, "regression", dense=False, prior_precision=1e-5, floor=1e-4).fit((x, y))
    torch.save(la.state_dict(), tmp_path / "la.pt")
    state = torch.load(tmp_path / "la.pt", weights_only=True)
    loaded = Laplace(model, "regression", dense=False, floor=1e-4).load_state_dict(state)
    torch.testing.assert_close(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    few = {"estimator": ritz.Hutchinson(10), "method": ritz.Lanczos(rtol=1e-8, max_matvecs=3), "dense": False}
    la = Laplace(model, "regression", **few).fit((x, y))
    with pytest.warns(ConvergenceWarning):
        state = la.state_dict()
    _, info = Laplace(model, "regression", **few).load_state_dict(state).log_marginal_likelihood(1.0, return_info=True)
    assert not info.status.success
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()  # the same squares
    with pytest.raises(OperandError, match="belongs to other weights"):
        Laplace(model, "regression", **few).load_state_dict(state)


def test_states_and_hyperparameters():
    model, x, y = larger()
    t = torch.tensor(1.0, requires_grad=True, **DOUBLE)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, z):
            return self.net(z) * t

    scaled = Scaled()
    state = Laplace(scaled, "regression", hyperparameters=[t]).fit((x, y)).state_dict()
    loaded = Laplace(scaled, "regression", hyperparameters=[t]).load_state_dict(state)
    with pytest.raises(OperandError, match="a loaded posterior has no data"):
        loaded.log_marginal_likelihood(1.0)
    with torch.no_grad():
        t.mul_(2.0)
    with pytest.raises(OperandError, match="fitted at hyperparameters .1.0.; they are .2.0. here"):
        Laplace(scaled, "regression", hyperparameters=[t]).load_state_dict(state)
    with pytest.raises(OperandError, match="they are .. here"):
        Laplace(scaled, "regression").load_state_dict(state)


def test_groups_by_each_name_of_a_tied_weight():
    model, data = tied()
    la = Laplace(model, "classification", subset="d", prior_precision={"d": 3.0}).fit(data)
    torch.testing.assert_close(la.log_marginal_likelihood(), la.log_marginal_likelihood(3.0))


def test_a_whole_decomposition_that_does_not_fit_is_refused(monkeypatch):
    model, x, y = larger()
    monkeypatch.setattr(preflight, "LIMIT", 3200)
    with pytest.raises(OperandError, match="dense=True decomposes, 300 × 1101 .* leave dense=True out"):
        Laplace(model, "regression", dense=True).fit((x, y))
