"""The checks themselves: each broken promise is noticed, and named."""

from __future__ import annotations

import pytest
import torch

import ritz
from ritz.errors import OperandError
from ritz.operators import Dense
from ritz.testing import CheckError, check_gradient, check_operator

REAL = torch.float64


def matrix(n=3, m=3):
    return torch.randn(n, m, dtype=REAL, generator=torch.Generator().manual_seed(0)).requires_grad_()


class Honest(ritz.LinearOperator):
    """A dense matrix, the shortest way; the mutants below break one promise each."""

    def __init__(self, M=None, **flags):
        M = matrix() if M is None else M
        super().__init__(M.shape, M.dtype, M.device, **flags)
        self.M = M

    def _matmat(self, X):
        return self.M @ X

    def _rmatmat(self, X):
        return self.M.mH @ X

    def tensors(self):
        return (self.M,)


def test_the_honest_one_passes():
    check_operator(Honest())
    check_operator(Honest(matrix(2, 4)))


class WrongBlock(Honest):
    def _matmat(self, X):
        return self.M @ X if X.shape[1] < 3 else self.M @ X.flip(1)


class SquareTrap(Honest):
    def _matmat(self, X):
        return X @ self.M if X.shape[0] == X.shape[1] else self.M @ X


class WrongAdjoint(Honest):
    def _rmatmat(self, X):
        return self.M @ X


class WrongReplay(Honest):
    def adjoint_product(self, width):
        return lambda X: 2 * self._rmatmat(X)


class Offset(Honest):
    def _matmat(self, X):
        return self.M @ X + 1


class NotLinear(Honest):
    def _matmat(self, X):
        return (self.M @ X) * X.abs().amax(0)


class Mutates(Honest):
    def _matmat(self, X):
        Y = self.M @ X
        if not X.requires_grad:
            X.add_(0)
        return Y


class Aliases(Honest):
    def __init__(self):
        super().__init__(torch.eye(3, dtype=REAL).requires_grad_())

    def _matmat(self, X):
        return X.view(X.shape)


class WrongDtype(Honest):
    def _matmat(self, X):
        return (self.M @ X).float()


class WrongDiagonal(Honest):
    def diagonal(self):
        return self.M.diagonal().flip(0)


class WrongColumns(Honest):
    def columns(self, idx):
        return self.M[:, : len(torch.as_tensor(idx).reshape(-1))]

    def to_dense(self):
        return self.M


class WrongDense(Honest):
    def to_dense(self):
        return self.M.mT


class WrongPair(Honest):
    def pair(self, Lam, Q):
        return (2 * Lam @ Q.mH,)


class TransposedPair(Honest):
    def pair(self, Lam, Q):
        return (Q @ Lam.mH,)


class NoGradient(Honest):
    def pair(self, Lam, Q):
        return (None,)


class TooFew(Honest):
    def pair(self, Lam, Q):
        return ()


class Unnamed(Honest):
    def tensors(self):
        return ()


class Detached(Honest):
    def _matmat(self, X):
        return self.M.detach() @ X


class HalfDetached(Honest):
    def _matmat(self, X):
        return (self.M.detach() + self.M) @ X / 2

    def to_dense(self):
        return self.M

    def pair(self, Lam, Q):
        return (Lam @ Q.mH,)


class ChangesTensor(Honest):
    def pair(self, Lam, Q):
        grads = (Lam @ Q.mH,)
        with torch.no_grad():
            self.M.mul_(2).div_(2).add_(1e-3)
        return grads


class Accepts(Honest):
    def __matmul__(self, other):
        if isinstance(other, torch.Tensor):
            other = other[: self.shape[1]].to(self.dtype).reshape(self.shape[1], -1)
            Y = self._matmat(other)
            return Y.squeeze(1) if Y.shape[1] == 1 else Y
        return super().__matmul__(other)


class Silent(Honest):
    def __repr__(self):
        return "an operator"


BROKEN = {
    WrongBlock: "@ X with 3 columns is off",
    SquareTrap: "@ X with 3 columns is off",
    WrongAdjoint: r"<y, A x> = .* but <A\^H y, x> =",
    WrongReplay: "adjoint_product",
    Offset: "@ 0 is not 0",
    NotLinear: "@ X with|linearity",
    Mutates: "changed X in place",
    Aliases: "returned memory of X",
    WrongDtype: "must return",
    WrongDiagonal: "diagonal",
    WrongColumns: "columns",
    WrongDense: "to_dense",
    WrongPair: "pair|Run.attach",
    TransposedPair: "pair|Run.attach",
    NoGradient: "pair|Run.attach",
    TooFew: "1 tensors|Run.attach",
    Unnamed: r"tensors\(\) does not name",
    Detached: "has no graph",
    HalfDetached: "gradient of A @ X",
    ChangesTensor: "was changed",
    Accepts: "expected",
    Silent: "repr",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_broken_promises_are_noticed(broken):
    with pytest.raises(CheckError, match=BROKEN[broken]):
        check_operator(broken())


FLAGS = {
    "not hermitian": (lambda: Honest(hermitian=True), "flagged Hermitian, but"),
    "hermitian after all": (lambda: Honest(torch.eye(3, dtype=REAL), hermitian=False), "flagged not Hermitian"),
    "negative": (lambda: Honest(-torch.eye(3, dtype=REAL), psd=True), "has the eigenvalue -1"),
    "psd after all": (lambda: Honest(torch.eye(3, dtype=REAL), hermitian=True, psd=False), "flagged not psd"),
    "neither true nor false": (lambda: Honest(hermitian="yes"), "expected True, False or None"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_dishonest_flags_are_noticed(name):
    make, message = FLAGS[name]
    with pytest.raises(CheckError, match=message):
        check_operator(make())


def test_hermitian_flag_without_a_hermitian_matrix_in_algebra():
    class Shifty(Honest):
        def shift(self, sigma):
            return Dense(self.M.detach() + 2 * sigma * torch.eye(3, dtype=REAL))

    with pytest.raises(CheckError, match=r"A \+ 0.5 I"):
        check_operator(Shifty())


def test_messages_have_no_line_breaks_and_name_the_operator():
    with pytest.raises(CheckError) as error:
        check_operator(WrongPair())
    assert "\n" not in str(error.value) and "WrongPair" in str(error.value)


def test_gradients_can_be_left_out():
    check_operator(WrongPair(), gradients=False)


# -- check_gradient ---------------------------------------------------------------------------------------------------


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g, None


def test_right_gradients():
    A, b = matrix().detach(), matrix()[0].detach()
    assert check_gradient(torch.linalg.solve, A, b) < 1e-8
    z = torch.tensor([0.3 + 0.4j, -1.0j], dtype=torch.complex128)
    assert check_gradient(lambda z: (z * z.conj()).exp(), z) < 1e-8
    assert check_gradient(lambda x: (x.sin(), x.cos().sum()), b) < 1e-8
    assert check_gradient(lambda x, n: x**n, b, 3) < 1e-8
    assert check_gradient(lambda x: 1e-30 * x.sin(), b) < 1e-8
    assert check_gradient(lambda x: 1e30 * x.sin(), b) < 1e-8


def test_zero_gradients():
    assert check_gradient(lambda x: torch.ones(2, dtype=REAL) + 0 * x.sum(), matrix().detach()) == 0
    assert check_gradient(lambda x, y: x.square(), matrix().detach(), matrix().detach()) < 1e-8
    assert check_gradient(lambda x: x.square(), torch.zeros(3, dtype=REAL)) == 0


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda x: Wrong.apply(x, 2.0), "relative error"),
        (lambda x: x.detach().square().sum() + 0 * x.sum(), "relative error"),
        (lambda x: x.square() * (x.detach() + 5), "relative error"),
        (lambda x: x.detach().square(), "is None, but the value changes"),
        (lambda x: Wrong.apply(x, float("nan")), "NaN or Inf"),
        (lambda x: (x - 9).log(), "the value is nan"),
        (lambda x: torch.rand(3, dtype=REAL) * x, "differ"),
        (lambda x: (1e6 * x).floor() + x, "do not settle|relative error"),
    ],
)
def test_wrong_gradients_are_noticed(fn, message):
    with pytest.raises(CheckError, match=message):
        check_gradient(fn, torch.tensor([0.3, 0.7, 1.1], dtype=REAL))


@pytest.mark.parametrize("which", [0, 1])
def test_a_small_error_in_one_of_two_arguments_is_noticed(which):
    def fn(x, y):
        out = [x.sin().sum(), y.cos().sum()]
        z = (x, y)[which]
        out[which] = out[which] + 1e-4 * z.detach().sum()
        return sum(out)

    with pytest.raises(CheckError, match=f"argument {which}"):
        check_gradient(fn, torch.tensor([0.3, 0.7], dtype=REAL), torch.tensor([0.3, 0.7], dtype=REAL))


def test_conjugated_gradients_are_noticed():
    class Conjugated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx, g):
            return g * 2 * ctx.saved_tensors[0]  # lacks the conjugate

    with pytest.raises(CheckError, match="relative error"):
        check_gradient(Conjugated.apply, torch.tensor([0.3 + 0.4j], dtype=torch.complex128))


def test_single_precision_is_refused():
    with pytest.raises(OperandError, match="double precision"):
        check_gradient(lambda x: x.square(), torch.ones(3))


def test_arguments_are_left_alone():
    x = torch.ones(3, dtype=REAL, requires_grad=True)
    check_gradient(lambda x: x.square(), x)
    assert x.grad is None and torch.equal(x.detach(), torch.ones(3, dtype=REAL))
