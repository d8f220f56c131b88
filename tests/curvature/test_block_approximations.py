"""KFAC, EKFAC, exact blocks and the diagonal against the dense Gauss–Newton matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ritz
from ritz.curvature import (
    EKFAC,
    GGN,
    KFAC,
    BlockDiagonalGGN,
    CrossEntropy,
    DiagonalGGN,
    EmpiricalFisher,
    Fisher,
    MonteCarloFisher,
    SquaredError,
    dual,
    kronecker,
)
from ritz.errors import OperandError
from ritz.testing import check_operator

from .layered import CASES, made

DOUBLE = {"dtype": torch.float64}


def block_indices(A: Any) -> list[Tensor]:
    """Entries of the parameter vector of every block."""
    starts = [sum(A.network.sizes[:i]) for i in range(len(A.network.sizes))]
    return [torch.cat([torch.arange(starts[i], starts[i] + A.network.sizes[i]) for i in b.indices]) for b in A.blocks]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"reduction": "sum"}])
def test_diagonal_and_blocks_are_exact(name, options):
    model, x, y = made(name)
    G = GGN(model, CrossEntropy(), None, (x, y), **options).to_dense()
    torch.testing.assert_close(DiagonalGGN(model, CrossEntropy(), None, (x, y), **options).diagonal(), G.diagonal())
    blocks = BlockDiagonalGGN(model, CrossEntropy(), None, (x, y), **options)
    want = torch.zeros_like(G)
    for index in block_indices(blocks):
        want[index.unsqueeze(1), index] = G[index.unsqueeze(1), index]
    torch.testing.assert_close(blocks.to_dense(), want)
    empirical = Fisher(model, CrossEntropy(), None, (x, y), kind=EmpiricalFisher(), **options).to_dense()
    diagonal = DiagonalGGN(model, CrossEntropy(), None, (x, y), kind=EmpiricalFisher(), **options)
    if name != "norm between":  # where the norm has a Gauss–Newton block
        torch.testing.assert_close(diagonal.diagonal(), empirical.diagonal())


@pytest.mark.parametrize("name", CASES)
def test_corrected_eigenvalues_are_the_curvature_along_the_eigenvectors(name):
    model, x, y = made(name)
    G = GGN(model, CrossEntropy(), None, (x, y)).to_dense()
    for A in (EKFAC(model, CrossEntropy(), None, (x, y)), EKFAC(model, CrossEntropy(), None, (x, y), micro_batch=2)):
        Q = A.from_basis(torch.eye(A.shape[0], **DOUBLE))  # eigenvectors as rows
        torch.testing.assert_close(Q @ Q.mT, torch.eye(A.shape[0], **DOUBLE))
        torch.testing.assert_close((Q @ G @ Q.mT).diagonal(), A.eigenvalues)


def test_kronecker_factors_are_moments_of_inputs_and_gradients():
    """Against autograd, example by example: A the mean of a aᵀ, B the sum of g gᵀ over root columns."""
    model, x, y = made("linear")
    A = KFAC(model, CrossEntropy(), None, (x, y), reduction="sum")
    a1 = torch.cat([x, torch.ones(6, 1, **DOUBLE)], 1)
    a2 = torch.tanh(model[0](x)).detach()
    B1, B2 = torch.zeros(5, 5, **DOUBLE), torch.zeros(3, 3, **DOUBLE)
    for n in range(6):
        z1 = model[0](x[n]).detach().requires_grad_()
        f = model[2](torch.tanh(z1))
        p = torch.softmax(f, 0).detach()
        H = torch.diag(p) - p.outer(p)
        J = torch.stack([torch.autograd.grad(f[c], z1, retain_graph=True)[0] for c in range(3)])
        B1 += J.mT @ H @ J
        B2 += H
    first, second = torch.kron(B1, a1.mT @ a1 / 6), torch.kron(B2, a2.mT @ a2 / 6)
    # θ holds the weight (5, 4) by rows and then the bias; the factors have the bias as a last column.
    columns = torch.arange(25).reshape(5, 5)
    index = torch.cat([columns[:, :4].reshape(-1), columns[:, 4]])
    want = torch.block_diag(first[index.unsqueeze(1), index], second)
    torch.testing.assert_close(A.to_dense(), want)


def test_one_example_of_one_layer_is_exact_and_approximations_are_ordered():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3, **DOUBLE), torch.randn(1, 4, **DOUBLE), torch.tensor([1])
    G = GGN(model, CrossEntropy(), None, (x, y)).to_dense()
    torch.testing.assert_close(KFAC(model, CrossEntropy(), None, (x, y)).to_dense(), G)
    model, x, y = made("linear")
    G = BlockDiagonalGGN(model, CrossEntropy(), None, (x, y)).to_dense()
    kron, corrected = (kind(model, CrossEntropy(), None, (x, y)).to_dense() for kind in (KFAC, EKFAC))
    assert float((corrected - G).norm()) < float((kron - G).norm())


@pytest.mark.parametrize("kind", [KFAC, EKFAC, DiagonalGGN, BlockDiagonalGGN])
@pytest.mark.parametrize("name", ["linear", "norm between", "attention"])
def test_functions_of_the_approximations(kind, name):
    model, x, y = made(name)
    A = kind(model, CrossEntropy(), "2" if name != "attention" else ["out", "embed"], (x, y))
    check_operator(A)
    M = A.to_dense()
    unit = torch.eye(A.shape[0], **DOUBLE)
    torch.testing.assert_close(A.inverse(0.1).to_dense(), torch.linalg.inv(M + 0.1 * unit))
    root = A.function(ritz.functions.sqrt).to_dense()
    torch.testing.assert_close(root @ root, M)
    torch.testing.assert_close(A.trace(), M.trace())
    torch.testing.assert_close(A.logdet(0.3), torch.logdet(M + 0.3 * unit))
    torch.testing.assert_close(A.diagonal(), M.diagonal())
    torch.testing.assert_close(A.from_basis(A.to_basis(unit)), unit)
    groups = A.per_coordinate(lambda n: 1.0 if n.endswith("weight") else 2.0)
    assert groups.shape == (A.shape[0],)


def test_drawn_labels_average_to_the_exact_factors():
    model, x, y = made("linear")
    want = KFAC(model, SquaredError(), None, (x, torch.zeros(6, 3, **DOUBLE))).to_dense()
    got = KFAC(model, SquaredError(), None, (x, torch.zeros(6, 3, **DOUBLE)), kind=MonteCarloFisher(2000)).to_dense()
    assert float((got - want).norm() / want.norm()) < 0.05


def test_bad_input():
    model, x, y = made("linear")
    wide = nn.Linear(100, 50)
    for call, message in [
        (lambda: KFAC(lambda p, z: z @ p, CrossEntropy(), torch.ones(4, 3, **DOUBLE), (x, y)), "got a function"),
        (lambda: BlockDiagonalGGN(wide, CrossEntropy(), None, (torch.ones(2, 100), y[:2])), "5000 entries"),
        (lambda: KFAC(model, CrossEntropy(), None, (x, y)).inverse(), "smallest eigenvalue"),
    ]:  # fmt: skip
        with pytest.raises(OperandError, match=message):
            call()


class Outside(nn.Module):
    """The embedding is used once more, as a decoder, by a function that no hook sees; and there are unused parts."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(5, 4, **DOUBLE), nn.Linear(4, 4, **DOUBLE)
        self.unused, self.norm = nn.Linear(2, 2, **DOUBLE), nn.LayerNorm(4, **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.l(self.e(x))), self.e.weight)


class Mixed(nn.Module):
    """Examples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.out = nn.Linear(4, 4, **DOUBLE), nn.Linear(4, 3, **DOUBLE)
        self.A = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.A @ torch.tanh(self.l(x)))


@pytest.mark.parametrize("kind", [EKFAC, DiagonalGGN, KFAC])
def test_what_escapes_the_layers_gets_an_exact_block(kind):
    torch.manual_seed(0)
    tokens = torch.randint(0, 5, (5, 3))
    for model, x, y in (
        (Outside(), tokens, torch.randint(0, 5, (5, 3))),
        (Mixed(), torch.randn(6, 4, **DOUBLE), torch.randint(0, 3, (6,))),
    ):
        A = kind(model, CrossEntropy(), None, (x, y))
        G = GGN(model, CrossEntropy(), None, (x, y)).to_dense()
        if kind is KFAC:  # a Kronecker factor of mixed examples is one all the same
            e = list(A.network.names).index("e.weight") if "e.weight" in A.network.names else None
            assert e is None or any(b.indices == (e,) and b.site is None for b in A.blocks)
            continue
        torch.testing.assert_close(A.trace(), G.trace())
        if kind is DiagonalGGN:
            torch.testing.assert_close(A.diagonal(), G.diagonal())


def test_the_diagonal_of_mixed_examples_has_no_largest_size(monkeypatch):
    monkeypatch.setattr(kronecker, "LARGEST_BLOCK", 3)
    monkeypatch.setattr(dual, "ROWS_AT_ONCE", 4)  # 18 rows: five pieces, the last one shorter
    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(6, 4, **DOUBLE), torch.randint(0, 3, (6,))
    for data in ((x, y), [(x, y), (2 * x, y)]):
        want = GGN(model, CrossEntropy(), None, data, reduction="sum").to_dense().diagonal()
        got = DiagonalGGN(model, CrossEntropy(), None, data, reduction="sum").diagonal()
        torch.testing.assert_close(got, want)
    with pytest.raises(OperandError, match="16 entries, more than 3"):
        DiagonalGGN(model, CrossEntropy(), None, (x, y), kind=EmpiricalFisher())


@pytest.mark.parametrize("kind", [EmpiricalFisher(), MonteCarloFisher(3)])
def test_exact_blocks_follow_the_kind(kind):
    model, x, y = made("norm between")
    want = Fisher(model, CrossEntropy(), None, (x, y), kind=kind).to_dense().diagonal()
    got = DiagonalGGN(model, CrossEntropy(), None, (x, y), kind=kind).diagonal()
    norm = slice(25, 35)  # after a weight and bias of 5 × 5
    torch.testing.assert_close(got[norm], want[norm])


def test_low_precision_is_decomposed_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(torch.bfloat16)
    x, y = torch.randn(6, 4).to(torch.bfloat16), torch.randint(0, 3, (6,))
    for kind in (KFAC, EKFAC, DiagonalGGN, BlockDiagonalGGN):
        assert bool(torch.isfinite(kind(model, CrossEntropy(), None, (x, y)).eigenvalues).all())
