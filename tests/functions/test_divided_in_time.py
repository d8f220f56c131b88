"""Divided differences of functions of time, in many digits."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch

from ritz.functions.scalar import Exp
from ritz.functions.shift_invert import OfInverse
from ritz.functions.timed import PhiTerm, Wave


def _exact(f: Any, x: float) -> Any:
    x, t = mpmath.mpf(x), mpmath.mpf(f.t if not isinstance(f, OfInverse) else 0)
    if isinstance(f, OfInverse):
        return mpmath.exp(mpmath.mpf(f.f.scale) * (1 - 1 / x) / mpmath.mpf(f.gamma))
    if isinstance(f, PhiTerm):
        z = t * x
        return t**f.j * mpmath.hyp1f1(1, f.j + 1, z) / mpmath.factorial(f.j)
    root = mpmath.sqrt(x)
    return {0: mpmath.cos(t * root), 1: t * mpmath.sinc(t * root), 2: -root * mpmath.sin(t * root)}[f.kind]


POINTS = [0.0, 1e-12, 1e-6, 0.1, 0.1000001, 1.0, 1.1, 2.0, 5.0, 30.0, 30.001, 400.0]


FUNCTIONS = [
    Wave(0, 1.3),
    Wave(1, 1.3),
    Wave(2, 1.3),
    Wave(1, -2.0),
    PhiTerm(1, -0.7),
    PhiTerm(3, -0.7),
    PhiTerm(2, 0.1),
    OfInverse(Exp(-1.5), -0.2),
]


@pytest.mark.parametrize("f", FUNCTIONS, ids=repr)
def test_divided_differences_to_many_digits(f: Any) -> None:
    points = [x for x in POINTS if x > 0.01] if isinstance(f, OfInverse) else POINTS
    with mpmath.workdps(60):
        for a in points:
            for b in points:
                x, y = mpmath.mpf(a), mpmath.mpf(b)
                if a == b:
                    h = mpmath.mpf(10) ** -20 * (1 + x)
                    x, y = (x, x + h) if not isinstance(f, OfInverse) else (x, x * (1 + mpmath.mpf(10) ** -20))
                u, w = _exact(f, x), _exact(f, y)
                exact = (u - w) / (x - y)
                found = float(f.divided_difference(*torch.tensor([[a], [b]], dtype=torch.float64)))
                scale = abs(exact) + (abs(u) + abs(w)) / max(abs(x) + abs(y), 1)
                assert abs(found - exact) < 1e-12 * scale, (a, b)


@pytest.mark.parametrize("f", FUNCTIONS[:-1], ids=repr)
def test_slope_in_time(f: Any) -> None:
    x, h = torch.tensor([0.0, 0.3, 4.0], dtype=torch.float64), 1e-5
    later, earlier = (type(f)(f.kind if isinstance(f, Wave) else f.j, f.t + s) for s in (h, -h))
    torch.testing.assert_close(f.in_time()(x), (later(x) - earlier(x)) / (2 * h), rtol=1e-7, atol=1e-8)
