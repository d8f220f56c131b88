"""What one step of training holds: of the covariance, of the preconditioner, and after backward."""

import gc

import pytest
import torch
from tests.gp.problems import data, process
from tests.memory import peak_of

from ritz import CG, Hutchinson, Lanczos
from ritz.kernels import NumbaTiles, Stored
from ritz.kernels.stored import StoredOperator
from ritz.solve import RandomlyPivotedCholesky

METHOD = {"solver": CG(rtol=1e-3), "logdet": (Hutchinson(10), Lanczos(rtol=1e-3))}


def stored_matrices():
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is StoredOperator and o._kept is not None]


def test_a_loss_that_is_still_held_holds_no_matrix_after_backward():
    X, y = data()
    gp = process(**METHOD)
    before = len(stored_matrices())
    loss = gp.log_marginal_likelihood(X, y)
    assert len(stored_matrices()) == before + 1
    first = torch.autograd.grad(loss, list(gp.parameters()), retain_graph=True)
    assert len(stored_matrices()) == before + 1
    again = torch.autograd.grad(loss, list(gp.parameters()))
    assert len(stored_matrices()) == before
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("backend", [NumbaTiles(), Stored()], ids=str)
def test_a_step_takes_few_arrays_besides_the_matrix(backend):
    pytest.importorskip("numba", reason="needs numba")
    n, rank = 6000, 200
    X, y = data(n, dtype=torch.float32)
    gp = process(dtype=torch.float32, preconditioner=RandomlyPivotedCholesky(rank), backend=backend, **METHOD)
    value, info = gp.log_marginal_likelihood(X, y, return_info=True)  # compiles
    matrix = 2 * n * (n + 512) if isinstance(backend, Stored) else 0
    # F, Q of its QR decomposition, two gradients in F; the basis, and a copy while it grows
    limit = matrix + 4 * 8 * n * rank + 2 * 4 * n * 11 * (info.depth + 8) + 24 * 2**20
    del value
    assert peak_of(lambda: gp.log_marginal_likelihood(X, y).backward()) < limit
    chosen = process(dtype=torch.float32, **METHOD).covariance(X)
    assert any(isinstance(A, StoredOperator) and A.backend == Stored(NumbaTiles()) for A in chosen.children)
