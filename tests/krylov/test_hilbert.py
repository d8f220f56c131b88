"""What projection in the adjoint is worth: the identity map A ↦ Q H Qᴴ on Hilbert matrices.

At full depth Q H Qᵀ = A, so that the Jacobian of A ↦ Q(A) H(A) Q(A)ᵀ is the identity, and its computed distance from it
is the error of the adjoint. Krämer, Moreno-Muñoz, Roy, Hauberg (2024) ran this experiment for the Arnoldi adjoint.
Run this file as a script for the table in docs/derivations/arnoldi.md.
"""

import pytest
import torch
from tests.krylov import loops

from ritz.krylov import progress
from ritz.krylov.arnoldi import adjoint_arnoldi, run_arnoldi
from ritz.krylov.lanczos import adjoint_lanczos, run_lanczos

FLOAT = {"dtype": torch.float64}


def hilbert(n):
    i = torch.arange(n, **FLOAT)
    return 1 / (i[:, None] + i[None] + 1)


def symmetric_part(n):
    """The projector (n², n²) onto symmetric directions: all that Lanczos promises for."""
    E = torch.eye(n * n, **FLOAT).view(n * n, n, n)
    return ((E + E.mT) / 2).view(n * n, n * n)


def distance(J, method):
    n = round(len(J) ** 0.5)
    I = torch.eye(n * n, **FLOAT) if method == "arnoldi" else symmetric_part(n)
    return float((J @ I - I).norm() / I.norm())


def jacobian(method, n, **variant):
    """Row (a, b) is the gradient of (Q H Qᵀ)_ab: Q̄ = E Q Hᵀ + Eᵀ Q H and H̄ = Qᵀ E Q for the unit matrix E_ab.

    The n² cotangents are n² runs of one block: a run's state is the same for all.
    """
    A, v = hilbert(n), torch.ones(n, 1, **FLOAT)
    run, adjoint = (run_arnoldi, adjoint_arnoldi) if method == "arnoldi" else (run_lanczos, adjoint_lanczos)
    s = run(lambda X: A @ X, v.expand(n, n * n).contiguous(), n)
    Q = s.Q[0].T
    E = torch.eye(n * n, **FLOAT).view(n * n, n, n)
    if method == "arnoldi":
        H = s.H[0]
        H_bar = Q.T @ E @ Q
        given = {"H_bar": H_bar}
    else:
        off = s.beta[0, :-1]
        H = torch.diag(s.alpha[0]) + torch.diag(off, 1) + torch.diag(off, -1)
        H_bar = Q.T @ E @ Q
        given = {
            "alpha_bar": H_bar.diagonal(0, 1, 2),
            "beta_bar": H_bar.diagonal(1, 1, 2) + H_bar.diagonal(-1, 1, 2),
        }
    Q_bar = (E @ Q @ H.T + E.mT @ Q @ H).mT.contiguous()
    Lam, _ = adjoint(lambda X: A.T @ X, s, Q_bar=Q_bar, **given, **variant)
    return torch.einsum("mki,mkj->mij", Lam, s.Q).reshape(n * n, n * n)


def unrolled(method, n):
    """The same by autograd through the textbook loop."""
    v = torch.ones(n, **FLOAT)

    def reconstruction(A):
        if method == "arnoldi":
            Q, H, *_ = loops.arnoldi(A, v, n, True)
        else:
            Q, a, b, *_ = loops.lanczos(A, v, n, True)
            H = torch.diag(a) + torch.diag(b, 1) + torch.diag(b, -1)
        return Q.T @ H @ Q

    return torch.autograd.functional.jacobian(reconstruction, hilbert(n)).reshape(n * n, n * n)


@pytest.fixture(autouse=True)
def full_depth(monkeypatch):
    """At n = 12 the last β is 8 eps·‖A‖, which counts as breakdown; the study wants all n steps."""
    monkeypatch.setattr(progress, "BREAKDOWN", 0.0)


@pytest.mark.parametrize("n", range(1, 13))
def test_projected_arnoldi_adjoint_keeps_three_digits_more(n):
    with_projection = distance(jacobian("arnoldi", n), "arnoldi")
    without = distance(jacobian("arnoldi", n, project=False), "arnoldi")
    condition = float(torch.linalg.cond(hilbert(n)))
    assert with_projection < max(1e-14, 1e-18 * condition * 10**n / n), (with_projection, condition)
    if n >= 5:
        assert with_projection < 0.02 * without


@pytest.mark.parametrize("n", range(1, 13))
def test_projected_lanczos_adjoint_survives_where_the_recurrence_does_not(n):
    projected = distance(jacobian("lanczos", n), "lanczos")
    recurrence = distance(jacobian("lanczos", n, reorthogonalize=False), "lanczos")
    loop = distance(unrolled("lanczos", n), "lanczos")
    assert projected < max(1e-14, 10 * loop)
    assert projected < 1e-4
    if n >= 5:
        assert projected < 0.01 * recurrence
    if n >= 8:
        assert recurrence > 1


def test_projected_arnoldi_adjoint_beats_autograd_through_the_loop():
    for n in (6, 8, 10):
        assert distance(jacobian("arnoldi", n), "arnoldi") < 0.1 * distance(unrolled("arnoldi", n), "arnoldi")


if __name__ == "__main__":
    progress.BREAKDOWN = 0.0
    print("| n | Arnoldi, projected | not projected | loop | Lanczos, projected | three-term | loop |")
    print("|---|---|---|---|---|---|---|")
    for size in range(1, 13):
        row = [
            distance(jacobian("arnoldi", size), "arnoldi"),
            distance(jacobian("arnoldi", size, project=False), "arnoldi"),
            distance(unrolled("arnoldi", size), "arnoldi"),
            distance(jacobian("lanczos", size), "lanczos"),
            distance(jacobian("lanczos", size, reorthogonalize=False), "lanczos"),
            distance(unrolled("lanczos", size), "lanczos"),
        ]
        print(f"| {size} | " + " | ".join(f"{x:.0e}" for x in row) + " |")
