"""Fractional diffusion: powers of a singular, positive semidefinite operator."""

import torch

import ritz
from ritz.expint import Diffusion, Grid


def test_fractional_powers_of_a_singular_laplacian_and_their_gradient():
    grid = Grid(24, border="neumann", spacing=0.2)
    c = torch.linspace(0.5, 1.5, 24, dtype=torch.float64).requires_grad_()
    u = torch.sin(torch.arange(24.0, dtype=torch.float64))
    L = Diffusion(c, grid, negative=True)
    s, t = 0.6, 0.3
    half = ritz.funm_multiply(ritz.functions.power(s), L, u)
    decayed = ritz.funm_multiply(lambda x: torch.exp(-t * x.clamp(min=0) ** s), L, u)
    dense = L.assemble().to_dense()
    w, U = torch.linalg.eigh(dense)
    w = w.clamp(min=0)
    # An eigenvalue of zero is only known to 1e-15, of which the power 0.6 is 1e-9, in the dense reference too.
    torch.testing.assert_close(half, U @ (w**s * (U.mT @ u)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decayed, U @ (torch.exp(-t * w**s) * (U.mT @ u)), rtol=1e-10, atol=1e-10)
    shifted = ritz.funm_multiply(ritz.functions.power(s), L.shift(1e-3), u)
    (got,) = torch.autograd.grad(shifted.square().sum(), c)
    w, U = torch.linalg.eigh(dense + 1e-3 * torch.eye(24, dtype=torch.float64))
    (wanted,) = torch.autograd.grad((U @ (w**s * (U.mT @ u))).square().sum(), c)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
