"""XDiag and the Frobenius norm against dense matrices."""

from __future__ import annotations

import pytest
import torch

import ritz
from ritz.errors import OperandError
from ritz.stochastic import frobenius_norm
from ritz.testing import check_gradient

DOUBLE = {"dtype": torch.float64}


def decaying(n: int = 200, rate: float = 0.15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, **DOUBLE))[0]
    M = (Q * torch.exp(-rate * torch.arange(n, **DOUBLE))) @ Q.mT
    return 0.5 * (M + M.mT)


def naive(M: torch.Tensor, Omega: torch.Tensor) -> torch.Tensor:
    """The definition: a basis without column i for every probe."""
    m = Omega.shape[1]
    found = []
    for i in range(m):
        others = [j for j in range(m) if j != i]
        Q = torch.linalg.qr(M @ Omega[:, others])[0]
        P = Q @ Q.mT
        w = Omega[:, i]
        found.append((P @ M).diagonal() + w * (M @ w - P @ (M @ w)))
    return torch.stack(found, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_its_definition(symmetric):
    M = decaying(40)
    M = M if symmetric else M @ torch.randn(40, 40, generator=torch.Generator().manual_seed(1), **DOUBLE)
    estimator = ritz.XDiag(12, seed=3)
    value, info = ritz.diagonal(M, estimator=estimator, return_info=True)
    samples = naive(M, ritz.Hutchinson(6, 3).probes(40, torch.float64))
    torch.testing.assert_close(value, samples.mean(1))
    torch.testing.assert_close(info.standard_error, samples.std(1) / 6**0.5)
    assert info.num_matvecs == 12


def test_it_beats_plain_probes_where_the_spectrum_decays():
    M = decaying()
    exact = M.diagonal()
    plain = (ritz.diagonal(M, estimator=ritz.Hutchinson(60)) - exact).norm()
    better = (ritz.diagonal(M, estimator=ritz.XDiag(60)) - exact).norm()
    assert float(better) < 0.1 * float(plain)  # e^(−0.15·30) = 0.011 is left of the matrix, and its probes
    rank = decaying(60, 5.0)  # of numerical rank eight: exact, though R is singular
    torch.testing.assert_close(ritz.diagonal(rank, estimator=ritz.XDiag(40)), rank.diagonal(), rtol=1e-6, atol=1e-10)
    zero = torch.zeros(30, 30, **DOUBLE)
    torch.testing.assert_close(ritz.diagonal(zero, estimator=ritz.XDiag(8)), zero[0])


def test_its_gradient():
    M = decaying(12, 0.3)
    w = torch.linspace(-1, 1, 12, **DOUBLE)
    check_gradient(lambda A: ritz.diagonal(0.5 * (A + A.mT), estimator=ritz.XDiag(8)) @ w, M.clone().requires_grad_())
    L = torch.randn(12, 12, generator=torch.Generator().manual_seed(2), **DOUBLE)
    general = lambda A: ritz.diagonal(A @ L, estimator=ritz.XDiag(8)) @ w  # noqa: E731
    check_gradient(general, M.clone().requires_grad_())


@pytest.mark.parametrize("shape", [(30, 20), (20, 20)])
def test_frobenius_norm(shape):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0), **DOUBLE)
    value, error = frobenius_norm(M, estimator=ritz.Hutchinson(19))
    assert abs(float(value - M.norm())) < 4 * float(error)
    exact, none = frobenius_norm(M, estimator=ritz.Hutchinson(20))
    torch.testing.assert_close(exact, M.norm())
    assert float(none) == 0.0


def test_bad_input():
    for call, message in [
        (lambda: ritz.XDiag(3), "even number of columns, at least four"),
        (lambda: ritz.diagonal(decaying(20), ritz.functions.exp, estimator=ritz.XDiag(8)), "diagonal of A itself"),
        (lambda: ritz.diagonal(decaying(20).to(torch.complex128), estimator=ritz.XDiag(8)), "real operators"),
    ]:
        with pytest.raises(OperandError, match=message):
            call()
