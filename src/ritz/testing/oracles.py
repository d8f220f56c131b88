"""Dense references, written independently of the library: f(A), its derivative, and the gradients that follow from
it.

They are slow, exact up to rounding, and compute in float64 or complex128 whatever comes in. They are not
differentiable by autograd: the derivatives are given in closed form, so that a test compares two different routes.
Gradients follow torch's convention, dφ = Re⟨G, dA⟩ with ⟨X, Y⟩ = tr(Xᴴ Y). The loops to differentiate through are in
`ritz.testing.loops`, and are exported here too.

f is a function on a tensor of eigenvalues, e.g. `torch.exp`, with f(z̄) the conjugate of f(z) (true for every f that
is real on the reals).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ritz.testing.loops import Bidiagonal, Hessenberg, Tridiagonal, arnoldi, golub_kahan, lanczos

__all__ = [
    "Bidiagonal",
    "Hessenberg",
    "Tridiagonal",
    "arnoldi",
    "bilinear_form_gradient",
    "frechet",
    "funm",
    "golub_kahan",
    "lanczos",
    "logdet",
    "logdet_gradient",
    "quadratic_form",
    "quadratic_form_gradient",
    "trace",
    "trace_gradient",
]

ScalarFunction = Callable[[Tensor], Tensor]


@torch.no_grad()
def funm(f: ScalarFunction, A: Tensor, *, contour: tuple[complex, float] | None = None) -> Tensor:
    """Compute f(A) densely.

    Exactly Hermitian A: from its eigendecomposition. Otherwise torch.exp goes to `torch.linalg.matrix_exp`,
    torch.reciprocal to the inverse, torch.log and torch.sqrt to SciPy's logm and sqrtm if SciPy is there; everything
    else to Cauchy's integral over a circle, (1/2πi) ∮ f(z) (zI − A)⁻¹ dz, by the trapezoidal rule, which converges
    geometrically also for defective A.

    Args:
        f: scalar function; analytic inside the circle if that is used.
        A: square tensor (n, n), dense or sparse, real or complex.
        contour: centre and radius of the circle, enclosing the spectrum and no singularity of f; forces this route.
            Without it the circle is centred on the box around the eigenvalues with 1.5 times the radius needed.

    Returns:
        Dense (n, n), float64 when A is real and f(A) is (to 1e-10), otherwise complex128.

    Raises:
        ArithmeticError: when the trapezoidal sum does not settle or its trace is wrong, as happens if f has a branch
            cut or a pole inside the circle; or if the result is not finite.
    """
    A = _dense(A)
    if contour is None and torch.equal(A, A.mH):
        eigenvalues, Q = torch.linalg.eigh(A)
        result = (Q * f(eigenvalues).to(Q.dtype)) @ Q.mH
    elif contour is None and f is torch.exp:
        result = torch.linalg.matrix_exp(A)
    elif contour is None and f is torch.reciprocal:
        result = torch.linalg.inv(A)
    elif contour is None and (dense := _scipy_function(f)) is not None:
        result = torch.as_tensor(dense(A.numpy()))
        result = result.to(torch.complex128 if result.is_complex() else torch.float64)
    else:
        result = _cauchy(f, A.to(torch.complex128), contour)
    if not bool(torch.isfinite(torch.view_as_real(result) if result.is_complex() else result).all()):
        raise ArithmeticError("f(A) is not finite; is f defined on the spectrum of A?")
    if not A.is_complex() and result.is_complex() and result.imag.norm() <= 1e-10 * result.norm():
        result = result.real.clone()
    return result


@torch.no_grad()
def frechet(f: ScalarFunction, A: Tensor, E: Tensor, *, contour: tuple[complex, float] | None = None) -> Tensor:
    """Compute the Fréchet derivative L_f(A, E) = d/dt f(A + tE) at t = 0, as the upper right block of f([[A, E], [0,
    A]]).

    Args:
        f, A, contour: as for `funm`; the block matrix has the spectrum of A.
        E: direction (n, n), any size of entries (it is scaled to that of A first).

    Returns:
        Dense (n, n).

    Reference: N. J. Higham, Functions of Matrices, 2008, equation (3.16).
    """
    A, E = _dense(A), _dense(E)
    dtype = torch.promote_types(A.dtype, E.dtype)
    A, E = A.to(dtype), E.to(dtype)
    size = torch.linalg.norm(E)
    if size == 0:
        return torch.zeros_like(funm(f, A, contour=contour))
    # The block matrix's rounding errors are relative to its own norm, so E must be neither tiny nor huge beside A.
    scale = torch.linalg.norm(A) / size if torch.linalg.norm(A) > 0 else 1 / size
    n = A.shape[0]
    block = torch.cat([torch.cat([A, scale * E], 1), torch.cat([torch.zeros_like(A), A], 1)], 0)
    return funm(f, block, contour=contour)[:n, n:] / scale


def quadratic_form(f: ScalarFunction, A: Tensor, v: Tensor, **options) -> Tensor:
    """Compute vᴴ f(A) v for v (n,)."""
    F = funm(f, A, **options)
    v = v.detach().to(torch.promote_types(F.dtype, v.dtype))
    return torch.vdot(v, F.to(v.dtype) @ v)


def bilinear_form_gradient(f: ScalarFunction, A: Tensor, u: Tensor, v: Tensor, **options) -> Tensor:
    """Compute the gradient of Re uᴴ f(A) v with respect to all entries of A: L_f(Aᴴ, u vᴴ), (n, n).

    A is taken as general. For an A that is Hermitian by construction compare Hermitian parts only.
    """
    u, v = _dense(u), _dense(v)
    dtype = torch.promote_types(u.dtype, v.dtype)
    return frechet(f, _dense(A).mH, torch.outer(u.to(dtype), v.to(dtype).conj()), **options)


def quadratic_form_gradient(f: ScalarFunction, A: Tensor, v: Tensor, **options) -> Tensor:
    """Compute the gradient of Re vᴴ f(A) v with respect to all entries of A: L_f(Aᴴ, v vᴴ), (n, n)."""
    return bilinear_form_gradient(f, A, v, v, **options)


def trace(f: ScalarFunction, A: Tensor, **options) -> Tensor:
    """Compute tr f(A)."""
    return torch.trace(funm(f, A, **options))


def trace_gradient(f: ScalarFunction, A: Tensor, **options) -> Tensor:
    """Compute the gradient of Re tr f(A) with respect to all entries of A: f'(A)ᴴ = L_f(Aᴴ, I), (n, n)."""
    A = _dense(A)
    return frechet(f, A.mH, torch.eye(A.shape[0], dtype=A.dtype), **options)


@torch.no_grad()
def logdet(A: Tensor) -> Tensor:
    """Compute log det A, by an LU factorisation.

    Raises:
        ValueError: when the determinant is not positive (to 1e-8 of its phase, for complex A).
    """
    sign, value = torch.linalg.slogdet(_dense(A))
    if not torch.abs(sign - 1) < 1e-8:
        raise ValueError(f"the determinant has sign (or phase) {sign.item()}, so its logarithm is not real")
    return value


@torch.no_grad()
def logdet_gradient(A: Tensor) -> Tensor:
    """Compute the gradient of log |det A| with respect to all entries of A: A⁻ᴴ, (n, n)."""
    return torch.linalg.inv(_dense(A)).mH.resolve_conj()


def _dense(x: Tensor) -> Tensor:
    x = x.detach() if x.layout == torch.strided else x.detach().to_dense()
    return x.resolve_conj().to("cpu", torch.complex128 if x.is_complex() else torch.float64)


def _scipy_function(f: ScalarFunction):
    if f is not torch.log and f is not torch.sqrt:
        return None
    try:
        import scipy.linalg
    except ImportError:
        return None
    return scipy.linalg.logm if f is torch.log else scipy.linalg.sqrtm


def _cauchy(f: ScalarFunction, A: Tensor, contour: tuple[complex, float] | None) -> Tensor:
    """(1/N) Σ_j f(z_j) (z_j − c) (z_j I − A)⁻¹ at N points of the circle around c, N doubled until two sums agree."""
    eigenvalues = torch.linalg.eigvals(A)
    if contour is None:
        box = [(x.max() + x.min()).item() / 2 for x in (eigenvalues.real, eigenvalues.imag)]
        centre = complex(*box)
        # A lone eigenvalue has no extent; any radius will do, provided that it scales with A.
        radius = 1.5 * max(torch.abs(eigenvalues - centre).max().item(), 0.1 * abs(centre), 1e-3)
    else:
        centre, radius = contour
    identity = torch.eye(A.shape[0], dtype=A.dtype)
    previous = None
    for log_points in range(5, 12):
        angle = (torch.arange(2**log_points, dtype=torch.float64) + 0.5) * (2 * torch.pi / 2**log_points)
        offset = torch.polar(torch.full_like(angle, radius), angle)
        z = centre + offset
        total = torch.zeros_like(A)
        for w, resolvent_at in zip(f(z) * offset, z):  # one at a time: n³ work each, and no (N, n, n) array
            total += w * torch.linalg.solve(resolvent_at * identity - A, identity)
        total /= 2**log_points
        if previous is not None and torch.linalg.norm(total - previous) <= 1e-12 * torch.linalg.norm(total):
            # A pole inside the circle does not hinder convergence, but adds its residue. The trace shows it; rounding
            # splits multiple eigenvalues, but changes their sum little.
            wrong = torch.abs(torch.trace(total) - f(eigenvalues).sum())
            if not wrong <= 1e-6 * len(A) * torch.abs(f(z)).max():
                raise ArithmeticError(f"Cauchy's integral over |z − {centre}| = {radius} includes a singularity of f")
            return total
        previous = total
    raise ArithmeticError(
        f"Cauchy's integral over |z − {centre}| = {radius} did not settle with {2**log_points} points. "
        "f must be analytic inside the circle; pass contour=(centre, radius) with a circle around the spectrum that "
        "avoids the singularities of f"
    )
