"""Algebra of operators: sums, scales, products, adjoints, declared flags."""

from __future__ import annotations

import pytest
import torch

import ritz
from ritz.errors import OperandError
from ritz.operators import Adjoint, Conjugate, Declared, Dense, Diagonal, Product, Scaled, Sum, identity
from ritz.testing import check_operator

REAL, COMPLEX = torch.float64, torch.complex128
DTYPES = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])


def randn(*shape, seed=0, dtype=REAL):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def hermitian(n, dtype=REAL):
    G = randn(n, n, dtype=dtype).detach()
    return (G + G.mH).requires_grad_()


def function(dtype, n=3, m=3, seed=1):
    W = randn(n, m, seed=seed, dtype=dtype)
    return ritz.aslinearoperator(lambda x: x @ W.mT, shape=(n, m), dtype=dtype)


CASES = {
    "dense": lambda d: Dense(randn(3, 4, dtype=d)),
    "dense hermitian": lambda d: Dense(hermitian(3, d)),
    "one by one": lambda d: Dense(randn(1, 1, dtype=d)),
    "diagonal": lambda d: Diagonal(randn(3, dtype=d)),
    "identity": lambda d: identity(3, dtype=d),
    "sum": lambda d: Dense(randn(3, 3, dtype=d)) + function(d) + randn(3, 3, seed=2, dtype=d),
    "scaled by a number": lambda d: -0.5 * Dense(hermitian(3, d)),
    "scaled by a tensor": lambda d: randn(1, dtype=d) * function(d),
    "scaled by a 0-d tensor": lambda d: Dense(randn(3, 2, dtype=d)) * randn(dtype=d),
    "scaled by a real tensor": lambda d: Dense(randn(3, 2, dtype=d)) * randn(seed=3),
    "scaled by nothing": lambda d: 0.0 * Dense(randn(3, 3, dtype=d)),
    "shifted": lambda d: Dense(hermitian(3, d)).shift(randn(seed=4).square()),
    "product": lambda d: Dense(randn(2, 3, dtype=d)) @ function(d) @ Dense(randn(3, 4, seed=5, dtype=d)),
    "gram": lambda d: (lambda A: A.mH @ A)(Dense(randn(3, 2, dtype=d))),
    "gram of a callable": lambda d: (lambda A: A @ A.mH)(function(d, 2, 3)),
    "square": lambda d: (lambda A: A @ A)(Dense(hermitian(3, d))),
    "adjoint": lambda d: Adjoint(function(d, 2, 3)),
    "conjugate": lambda d: Conjugate(function(d)),
    "transpose": lambda d: function(d, 2, 3).mT,
    "declared": lambda d: Dense(hermitian(3, d), hermitian=False).declare(hermitian=True),
    "negative": lambda d: -(Dense(randn(3, 3, dtype=d)) - function(d)) / 2,
}


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_keeps_the_contract(name, dtype):
    check_operator(CASES[name](dtype))


def test_complex_scale():
    A = Dense(hermitian(3, COMPLEX))
    check_operator(1j * A)
    check_operator(A * torch.tensor(1.0 - 2j, dtype=COMPLEX, requires_grad=True))
    assert (1j * A).hermitian is None


def test_sums_are_flattened():
    A, B, C = (Dense(randn(2, 2, seed=s)) for s in range(3))
    total = (A + B) + (C + A)
    assert isinstance(total, Sum) and total.terms == (A, B, C, A)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_flags_propagate(dtype):
    H, G = Dense(hermitian(3, dtype)), Dense(randn(3, 3, dtype=dtype))
    P = G @ G.mH
    I = identity(3, dtype=dtype)
    assert (P.hermitian, P.psd) == (True, True)
    assert (P + I).psd and (2 * P).psd and P.shift(1.0).psd
    assert (-P).psd is None and (-P).hermitian
    assert (H + P).hermitian and (H + P).psd is None
    assert (G + H).hermitian is None and (G @ H).hermitian is None
    assert G.mH.hermitian is False and H.mH is H and P.mT.psd
    assert G.mH.mH is G
    assert Dense(randn(2, 3, dtype=dtype)).hermitian is False


def test_declared_flags():
    A = ritz.aslinearoperator(lambda x: x, shape=3)
    assert A.hermitian is None
    assert A.declare(psd=True).hermitian is True
    assert ritz.aslinearoperator(A, hermitian=True).hermitian is True
    assert ritz.aslinearoperator(A) is A
    assert isinstance(A.declare(hermitian=True), Declared)
    with pytest.raises(OperandError, match="Hermitian"):
        ritz.aslinearoperator(lambda x: x, shape=(2, 3), hermitian=True)
    with pytest.raises(OperandError, match="psd=True came with hermitian=False"):
        ritz.aslinearoperator(lambda x: x, shape=2, hermitian=False, psd=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda A: A + Dense(randn(4, 4)),
        lambda A: A + 2.0,
        lambda A: A + randn(3),
        lambda A: A * randn(3),
        lambda A: A * "x",
        lambda A: 1j * A,
        lambda A: A @ Dense(randn(4, 3)),
        lambda A: A + Dense(randn(3, 3, dtype=COMPLEX)),
        lambda A: Dense(randn(2, 3)).shift(1.0),
        lambda A: Dense(randn(3)),
        lambda A: Diagonal(randn(3, 3)),
        lambda A: A @ [1.0, 2.0, 3.0],
    ],
)
def test_refusals(make):
    with pytest.raises(OperandError):
        make(Dense(randn(3, 3)))


DETECTED = {
    "dense": (lambda t: Dense(t), lambda: torch.eye(3, dtype=REAL), lambda t: t[0, 1].add_(1)),
    "dense by aslinearoperator": (
        lambda t: ritz.aslinearoperator(t).shift(1.0),
        lambda: torch.zeros(3, 3, dtype=REAL),
        lambda t: t[0, 1].add_(1),
    ),
    "diagonal": (lambda t: Diagonal(t), lambda: torch.ones(3, dtype=REAL), lambda t: t[0].sub_(5)),
    "sparse": (
        lambda t: ritz.operators.Sparse(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 2]), t, (3, 3)),
        lambda: torch.ones(3, dtype=REAL),
        lambda t: t[0].add_(1),
    ),
    "toeplitz": (
        lambda t: ritz.operators.Toeplitz(t, torch.zeros(3, dtype=REAL)),
        lambda: torch.eye(3, dtype=REAL)[0],
        lambda t: t[1].add_(1),
    ),
    "toeplitz by its row": (
        lambda t: ritz.operators.Toeplitz(torch.zeros(3, dtype=REAL), t),
        lambda: torch.zeros(3, dtype=REAL),
        lambda t: t[1].add_(1),
    ),
    "low rank": (
        lambda t: ritz.operators.LowRank(torch.ones(3, 2, dtype=REAL), core=t),
        lambda: torch.ones(2, dtype=REAL),
        lambda t: t[0].sub_(5),
    ),
}


@pytest.mark.parametrize("name", DETECTED)
def test_a_flag_read_off_a_tensor_is_read_again_after_a_step(name):
    """An operator made once over a parameter that happened to be symmetric when training started."""
    make, start, step = DETECTED[name]
    t = start()
    A = make(t)
    assert A.hermitian or A.psd
    A @ torch.ones(3, dtype=REAL)
    t.mul_(2)  # keeps the property
    A @ torch.ones(3, dtype=REAL)
    step(t)
    with pytest.raises(OperandError, match="changed in place since"):
        A @ torch.ones(3, dtype=REAL)
    make(t) @ torch.ones(3, dtype=REAL)


def test_declared_flags_are_not_read_again():
    t = torch.eye(3, dtype=REAL)
    A = Dense(t, hermitian=True)
    t[0, 1] += 1
    A @ torch.ones(3, dtype=REAL)  # the caller answers for it


def test_columns_take_tensors_lists_and_ranges():
    A = Dense(randn(3, 5))
    for idx in (torch.tensor([0, 4]), [0, 4], range(0, 5, 4)):
        torch.testing.assert_close(A.columns(idx), A.matrix[:, [0, 4]])
    assert (A + A).columns([]).shape == (3, 0)


def test_repr_says_what_is_known():
    text = repr(Dense(hermitian(3)))
    assert "Dense(shape=(3, 3)" in text and "hermitian=True" in text and "psd" not in text


def test_classes_are_what_the_algebra_makes():
    A = Dense(randn(3, 3))
    assert isinstance(2 * A, Scaled) and isinstance(A @ A, Product) and isinstance(A.mH, Adjoint)
