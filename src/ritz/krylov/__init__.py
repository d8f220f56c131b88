"""Krylov decompositions: Lanczos, Arnoldi, Golub–Kahan, each with its adjoint recurrence beside it."""

from .decompositions import Bidiagonal, Hessenberg, Tridiagonal, arnoldi, golub_kahan, lanczos

__all__ = ["Bidiagonal", "Hessenberg", "Tridiagonal", "arnoldi", "golub_kahan", "lanczos"]
