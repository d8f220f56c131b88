"""F from columns, and FᴴF, with gradients of their own: against those of autograd; how many arrays a build takes."""

import pytest
import torch
from tests.memory import peak_of

from ritz.kernels import Matern
from ritz.solve import RandomlyPivotedCholesky
from ritz.solve.factor import factor_of_columns
from ritz.solve.root import gram

PIVOTS = torch.tensor([4, 0, 9])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def columns(dtype):
    """Columns of a positive definite matrix whose rows at the pivots are not exactly Hermitian."""
    G = normal(12, 12, dtype=dtype)
    return ((G @ G.mH)[:, PIVOTS] + 0.1 * normal(12, 3, seed=1, dtype=dtype)).requires_grad_()


def recorded(C):
    """The definition, in operations that autograd differentiates."""
    S = C[PIVOTS]
    return torch.linalg.solve_triangular(torch.linalg.cholesky((S + S.mH) / 2).mH, C, upper=True, left=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_factor_and_its_derivatives(dtype):
    C, G = columns(dtype), normal(12, 3, seed=2, dtype=dtype)
    F, pivots = factor_of_columns(C, PIVOTS)
    assert pivots is PIVOTS
    torch.testing.assert_close(F, recorded(C))
    (ours,) = torch.autograd.grad(F, C, G, retain_graph=True)  # without a record: by rows
    (theirs,) = torch.autograd.grad(recorded(C), C, G)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(F, C, G, create_graph=True)[0], theirs)
    f = lambda C: factor_of_columns(C, PIVOTS)[0]
    assert torch.autograd.gradcheck(f, C) and torch.autograd.gradgradcheck(f, C)


def test_gradient_in_single_precision_is_rounded_once():
    C = columns(torch.float64).detach().float()
    G = normal(12, 3, seed=2)
    (ours,) = torch.autograd.grad(factor_of_columns(C.requires_grad_(), PIVOTS)[0], C, G)
    wide = C.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(recorded(wide), wide, G)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gram_and_its_derivatives(dtype):
    F = normal(6, 3, dtype=dtype).requires_grad_()
    torch.testing.assert_close(gram(F), F.mH @ F)
    assert torch.autograd.gradcheck(gram, F) and torch.autograd.gradgradcheck(gram, F)


def test_a_preconditioner_and_its_gradient_take_few_arrays_like_its_factor():
    n, rank = 12_000, 200
    array = 8 * n * rank
    X = torch.rand(n, 3).requires_grad_()
    kernel = Matern(1.5, 3, lengthscale=0.3)
    kept = []

    def build():
        kept.append(RandomlyPivotedCholesky(rank).build(kernel(X), shift=torch.tensor(0.1, requires_grad=True)))

    # While pivots are chosen F by rows, the columns of half its size, and a block of each; later F and Q of F = QR
    assert peak_of(build) < 2.8 * array
    (P,) = kept
    assert P.factor.shape == (n, rank)
    V = torch.ones(n, 2)
    value = P.logdet() + P.invsqrt(V).sum()
    # Besides F and Q: the gradients in F of both terms, which are summed; then the sum and that in the columns
    assert peak_of(lambda: value.backward()) < 2.3 * array
    assert bool(torch.isfinite(X.grad).all()) and float(X.grad.norm()) > 0
