"""Lanczos(two_pass=True): the values and gradients of the kept basis, without it."""

import pytest
import torch

import ritz
from ritz.functions import exp, rsqrt
from ritz.krylov.lanczos import run_lanczos
from ritz.krylov.two_pass import pass_again, run_without_basis

N = 60
ONE = ritz.Lanczos(rtol=1e-11, reorthogonalize=False)
TWO = ritz.Lanczos(rtol=1e-11, reorthogonalize=False, two_pass=True)


def hermitian(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(N, N, dtype=dtype, generator=g)
    return (M @ M.mH / N + torch.eye(N, dtype=dtype)).requires_grad_()


def vectors(m, dtype=torch.float64, seed=1):
    return torch.randn(N, m, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sym(M):
    return (M + M.mH) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_second_pass_makes_the_vectors_of_the_first(dtype):
    A, V = hermitian(dtype).detach(), vectors(3, dtype).detach()
    V[:, 1] = 0
    product = A.matmul
    kept = run_lanczos(product, V, 15, reorthogonalize=False)
    state = run_without_basis(product, V, 7)
    state = run_without_basis(product, V, 15, state=state)
    torch.testing.assert_close(state.alpha, kept.alpha)
    torch.testing.assert_close(state.beta, kept.beta)
    C = torch.randn(3, 15, 4, dtype=dtype, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(pass_again(product, V, state, C), C.mT @ kept.Q, atol=1e-12, rtol=1e-12)
    assert state.Q.shape == (3, 15, 0)


@pytest.mark.parametrize("f", [exp, rsqrt], ids=["exp", "rsqrt"])
@pytest.mark.parametrize("m", [1, 3])
def test_values_and_gradients_against_the_dense_function(f, m):
    A, B, G = hermitian(), vectors(m), vectors(m, seed=3).detach()
    Y, info = ritz.funm_multiply(f, ritz.aslinearoperator(A), B, method=TWO, return_info=True)
    got = torch.autograd.grad((Y * G).sum(), (A, B))
    w, U = torch.linalg.eigh(sym(A))
    exact = U @ ((torch.exp(w) if f is exp else w.rsqrt()).unsqueeze(1) * (U.mH @ B))
    wanted = torch.autograd.grad((exact * G).sum(), (A, B))
    torch.testing.assert_close(Y, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sym(got[0]), wanted[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-8, atol=1e-8)
    assert info.num_matvecs == m * (2 * info.depth - 1)
    assert info.backward.status.success


def test_complex_values_of_a_real_operator_and_times():
    A, B, G = hermitian(), vectors(2), vectors(2, torch.complex128, seed=3).detach()
    t = torch.tensor([-0.7j, 0.4 - 0.2j], dtype=torch.complex128, requires_grad=True)
    outs = []
    for method in (ONE, TWO):
        Y = ritz.expm_multiply(ritz.aslinearoperator(A), B, t, method=method)
        outs.append((Y, *torch.autograd.grad((Y * G).sum().abs(), (A, B, t))))
    for one, two in zip(*outs):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        exact = torch.stack([torch.linalg.matrix_exp(s * sym(A)) @ B.to(s.dtype) for s in t])
    torch.testing.assert_close(outs[1][0].detach(), exact, rtol=1e-9, atol=1e-9)


def test_complex_hermitian_against_the_dense_exponential():
    A, B, G = hermitian(torch.complex128), vectors(2, torch.complex128), vectors(2, torch.complex128, 3).detach()
    Y = ritz.expm_multiply(ritz.aslinearoperator(A), B, -1j, method=TWO)
    got = torch.autograd.grad((Y * G).sum().real, (A, B))
    exact = torch.linalg.matrix_exp(-1j * sym(A)) @ B
    wanted = torch.autograd.grad((exact * G).sum().real, (A, B))
    torch.testing.assert_close(Y, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sym(got[0]), wanted[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-8, atol=1e-8)


def test_a_zero_column_stays_zero_and_a_short_space_ends():
    d = torch.arange(1.0, 4.0, dtype=torch.float64).repeat(20).requires_grad_()
    B = vectors(2).detach()
    B[:, 0] = 0
    Y, info = ritz.funm_multiply(exp, ritz.operators.Diagonal(d), B, method=TWO, return_info=True)
    torch.testing.assert_close(Y, d.exp().unsqueeze(1) * B)
    assert info.depth == 3
    (grad,) = torch.autograd.grad(Y.sum(), d)
    torch.testing.assert_close(grad, d.exp().detach() * B.sum(1))


def test_memory_does_not_grow_with_the_depth(monkeypatch):
    """No tensor of as many vectors as the depth is made, forward or backward."""
    n = 4000
    d = torch.linspace(1.0, 400.0, n, dtype=torch.float64).requires_grad_()
    v = torch.ones(n, dtype=torch.float64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    depths = {}
    for method in (ONE, TWO):
        largest = 0
        with Watch():
            y, info = ritz.expm_multiply(ritz.operators.Diagonal(d), v, -1.0, method=method, return_info=True)
            y.square().sum().backward()
        depths[method] = (info.depth, largest / n)
    assert depths[ONE][0] > 50 and depths[ONE][1] > 50
    assert depths[TWO][0] == depths[ONE][0] and depths[TWO][1] < 16


def test_what_it_is_not_for():
    A, B = hermitian(), vectors(1)
    with pytest.raises(ritz.OperandError, match="reorthogonalize=False"):
        ritz.Lanczos(two_pass=True)
    with pytest.raises(ritz.OperandError, match="Frechet"):
        ritz.funm_multiply(exp, ritz.aslinearoperator(A), B, method=TWO, gradient=ritz.Adjoint())
    with pytest.raises(ritz.OperandError, match="drop two_pass"):
        ritz.quadratic_form(exp, ritz.aslinearoperator(A).declare(hermitian=True), B, method=TWO)
