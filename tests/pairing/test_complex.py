"""Complex gradients."""

from __future__ import annotations

import pytest
import torch
from tests.pairing.common import COMPLEX, N, operator, randn, rows, squared_norm

from ritz.operators import Dense, Sparse
from ritz.testing import check_gradient

# torch.jit.script is what PyTorch itself imports on the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("kind", ["callable", "real parameter", "dense", "sparse", "conjugate", "transpose", "adjoint"])
@pytest.mark.parametrize("width", [1, 3])
def test_complex_gradients(kind, width):
    Wc = randn(N, N, seed=4, dtype=COMPLEX)

    def value(theta, v):
        if kind == "callable":
            A = operator(lambda x: rows(theta, Wc @ x), dtype=COMPLEX)
        elif kind == "real parameter":
            A = operator(lambda x: rows(theta.real, Wc @ x), dtype=COMPLEX) + theta.real.sum() * Dense(Wc)
        elif kind == "sparse":
            A = Sparse(torch.arange(N + 1), torch.arange(N).flip(0), theta, (N, N))
        else:
            A = Dense(rows(theta, Wc))
            A = {"dense": A, "conjugate": A.mT.mH, "transpose": A.mT, "adjoint": A.mH}[kind]
        return squared_norm(A, v)

    v = randn(N, seed=2, dtype=COMPLEX) if width == 1 else randn(N, width, seed=2, dtype=COMPLEX)
    assert check_gradient(value, randn(N, seed=1, dtype=COMPLEX), v) < 1e-7
