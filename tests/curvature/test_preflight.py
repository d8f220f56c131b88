"""What does not fit is refused before it is allocated, and the choice that is named instead does fit."""

import importlib
import re

import pytest
import torch
from torch import nn

import ritz
from ritz.curvature import GGN, KFAC, NTK, CrossEntropy, DiagonalGGN, DualGGN, Jacobian, preflight
from ritz.errors import OperandError

X, Y = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()  # 31 parameters, the last layer 15


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(preflight, "LIMIT", 8 * 20 * 20)


def said(call):
    with pytest.raises(OperandError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("kind", [GGN, DiagonalGGN])
def test_parameters_that_fit(small, kind):
    text = said(lambda: kind(net(), CrossEntropy(), None, (X, Y)).to_dense())
    assert (
        "31 × 31 in torch.float64" in text
        and "params=['0.bias', '2.weight', '2.bias'] fits (19 entries of at most 20)" in text
    )
    assert kind(net(), CrossEntropy(), ["0.bias", "2.weight", "2.bias"], (X, Y)).to_dense().shape == (19, 19)


def test_parameters_none_of_which_fits(monkeypatch):
    monkeypatch.setattr(preflight, "LIMIT", 8 * 2 * 2)
    text = said(lambda: GGN(net(), CrossEntropy(), None, (X, Y)).to_dense())
    assert "none of the last parameters has at most 2 entries" in text


def test_jacobians_and_kernels(small):
    text = said(lambda: Jacobian(net(), data=X).to_dense())  # 36 rows, so that 400 // 36 = 11 columns fit
    assert "params=['2.bias'] fits (3 entries of at most 11)" in text
    assert Jacobian(net(), params=["2.bias"], data=X).to_dense().shape == (36, 3)
    for make in (lambda n: NTK(net(), data=X[:n]), lambda n: DualGGN(GGN(net(), CrossEntropy(), None, (X[:n], Y[:n])))):
        most = int(re.search(r"at most (\d+) examples fit", said(lambda m=make: m(12).to_dense())).group(1))
        assert most == 6 and make(most).to_dense().shape == (18, 18)
        assert "examples fit" in said(lambda m=make: m(7).to_dense())


def test_kronecker_factors(small):
    wide = nn.Sequential(nn.Linear(25, 3)).double()
    data = torch.randn(5, 25, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    text = said(lambda: KFAC(wide, CrossEntropy(), None, data))
    assert "a Kronecker factor of 0.weight, 26 × 26" in text and "at most 20 rows" in text
    assert DiagonalGGN(wide, CrossEntropy(), None, data).trace() > 0
    narrow = nn.Sequential(nn.Linear(19, 3)).double()
    KFAC(narrow, CrossEntropy(), None, (data[0][:, :19], data[1]))
    words = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(8, 3)).double()  # one-hot inputs have no factor
    KFAC(words, CrossEntropy(), None, (torch.tensor([[1, 40], [3, 3]]), torch.tensor([0, 1])))


def test_eigenpairs(monkeypatch):
    monkeypatch.setattr(importlib.import_module("ritz.eig.eigsh"), "MOST_BYTES", 8 * 100 * 40)
    A = ritz.operators.Diagonal(torch.arange(1.0, 101.0, dtype=torch.float64))
    most = int(re.search(r"k up to (\d+) fits", said(lambda: ritz.eigsh(A, 30))).group(1))
    assert most == 18
    torch.testing.assert_close(ritz.eigsh(A, most).values, torch.arange(100.0, 82.0, -1, dtype=torch.float64))
    said(lambda: ritz.eigsh(A, most + 1))


def test_eigenpairs_with_a_basis_of_ones_own(monkeypatch):
    monkeypatch.setattr(importlib.import_module("ritz.eig.eigsh"), "MOST_BYTES", 8 * 100 * 40)
    A = ritz.operators.Diagonal(torch.arange(1.0, 101.0, dtype=torch.float64))
    assert "basis=40 fits" in said(lambda: ritz.eigsh(A, 5, basis=80))
    assert ritz.eigsh(A, 5, basis=40).values.shape == (5,)
    assert "k up to 18 fits" in said(lambda: ritz.eigsh(A, 39, basis=80))
