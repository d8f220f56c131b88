"""A posterior saved without pickles, and read again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ritz.errors import OperandError
from ritz.laplace import Laplace

from .test_laplace import EXACT, STRUCTURES, fitted, made


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior", [2.0, {"0": 0.5, "2": 3.0}])
def test_saved_and_loaded(structure, prior, tmp_path):
    la, _, x, _ = fitted("regression", structure, sigma_noise=0.7, prior_precision=prior)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    state = torch.load(tmp_path / "la.pt", weights_only=True)
    settings = EXACT if structure == "full" else {}
    loaded = Laplace(la.model, "regression", structure=structure, **settings).load_state_dict(state)
    assert loaded.prior_precision == prior and loaded.sigma_noise == 0.7
    deltas = torch.tensor([0.01, 1.0], dtype=torch.float64)
    torch.testing.assert_close(loaded.log_marginal_likelihood(deltas), la.log_marginal_likelihood(deltas))
    for a, b in zip(loaded.predict(x), la.predict(x)):
        torch.testing.assert_close(a, b)
    if structure == "full":
        with pytest.raises(OperandError, match="a loaded posterior has no data"):
            loaded.sample(2)
        with pytest.raises(OperandError, match="has no data"):
            loaded.log_marginal_likelihood(1e-7)
    else:
        torch.testing.assert_close(loaded.sample(2), la.sample(2))


def test_states_of_others_are_refused_and_change_nothing():
    la, _, _, _ = fitted("regression", "diag")
    state = la.state_dict()
    model, _, _ = made("regression")
    other = Laplace(nn.Linear(3, 2).double(), "regression", structure="diag")
    for target, changed, message in [
        (other, {}, "is of the parameters"),
        (Laplace(model, "regression", structure="kron"), {}, "structure='diag'; this Laplace has 'kron'"),
        (Laplace(model, "regression", structure="diag"), {"version": 7}, "version 7; expected 2"),
    ]:
        with pytest.raises(OperandError, match=message):
            target.load_state_dict(state | changed)
        assert target.posterior is None
