"""Exceptions and warnings. Every message says what came, what was expected, and what to do next."""

from __future__ import annotations


class RitzError(Exception):
    """Base of every exception that ritz raises on purpose."""


class OperandError(RitzError, ValueError):
    """An operand has the wrong shape, dtype, device or structure."""


class NonFiniteError(RitzError, ValueError):
    """NaN or Inf in an operand, or in what an operator's product returned."""


class DomainError(RitzError, ValueError):
    """A function was asked for outside its domain, such as log of an operator with a Ritz value <= 0."""


class AdjointUnavailableError(RitzError, TypeError):
    """The adjoint product of a callable was needed, not given, and cannot be derived by autograd."""


class BreakdownError(RitzError, RuntimeError):
    """The Krylov space is exhausted where the chosen gradient rule needs it not to be."""


class SecondDerivativeError(RitzError, RuntimeError):
    """A first-order gradient rule was differentiated a second time."""


class TransformError(RitzError, RuntimeError):
    """A function transform (vmap, forward mode) that the operator primitives do not serve."""


class ConvergenceError(RitzError, RuntimeError):
    """An iteration missed its tolerance and ``on_failure="raise"`` was asked for."""


class ConvergenceWarning(UserWarning):
    """An iteration missed its tolerance; the message has the figures and what to do next."""
