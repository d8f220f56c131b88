"""The compiled pass over a tile: profiles by arithmetic that the compiler turns into vector instructions.

Imported by :mod:`~ritz.kernels.numba_tiles` when a tile is first passed over, and by nobody else: importing ritz does
not import numba. Numba has no vector exponential of its own, so here is one: x = n·log 2 + r with |r| ≤ log(2)/2, a
polynomial 1 + r + r²·q(r) (q minimax in relative error, 3e-9 in float32 and 8e-18 in float64), and n added to the
exponent bits. It costs a fifth of a library call, is exact at 0, and errs by less than an ulp of 1 elsewhere.

Only "contract" (fused multiply-add) is allowed of the fast-math flags where numbers are made: others would remove the
rounding that splits off n. Sums may be reassociated, which is what makes them vectors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import carray, types

GAUSSIAN, MATERN12, MATERN32, MATERN52, RATIONAL = range(5)  # numbers of the profiles in compiled code

# Any: numba's own types of decorators do not know options that come as a dictionary
njit: Any = numba.njit
cfunc: Any = numba.cfunc

EXACT = {"fastmath": {"contract"}, "error_model": "numpy", "nogil": True}
SCALAR = {**EXACT, "forceinline": True}
SUMS = {**EXACT, "fastmath": {"contract", "reassoc", "nsz"}}
STRETCH = 1024  # terms that are summed in the tile's dtype before they go to a float64 sum

# -- exp and log1p -----------------------------------------------------------------------------------------------------

_F, _D = np.float32, np.float64
_I23, _I52 = np.int32(23), np.int64(52)
# adding 1.5·2^23 (1.5·2^52) rounds to an integer and leaves it in the lowest bits
_INV32, _MAGIC32, _HIGH32, _LOW32 = _F(1.4426950408889634), _F(12582912.0), _F(0.693359375), _F(-2.12194440054690583e-4)
_INV64, _MAGIC64 = 1.4426950408889634, 6755399441055744.0
_ROOT32, _MANTISSA32 = np.int32(0x3F3504F3), np.int32(0x7FFFFF)  # the bits of √½, and of a mantissa
_ROOT64, _MANTISSA64 = np.int64(0x3FE6A09E667F3BCD), np.int64(0xFFFFFFFFFFFFF)
_HIGH64, _LOW64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_E2, _E3, _E4, _E5, _E6 = (
    _F(c)
    for c in (0.4999999345170843359, 0.1666652068983301881, 0.04166838736126114555, 0.008368709824171194323,
              0.001381461326077977081)
)  # fmt: skip
_D2, _D3, _D4, _D5, _D6, _D7, _D8, _D9, _D10, _D11 = (
    0.5000000000000010214, 0.1666666666666667452, 0.04166666666652210648, 0.008333333333322216196,
    0.001388888894778552285, 0.0001984126988656380167, 0.00002480148736602567617, 2.755724236744965777e-6,
    2.763264067543023571e-7, 2.511003829672724322e-8,
)  # fmt: skip


@njit(**SCALAR)
def exp32(x: Any) -> Any:
    """exp of a float32 in [−80, 80]."""
    z = x * _INV32 + _MAGIC32
    n = z - _MAGIC32
    r = x - n * _HIGH32
    r = r - n * _LOW32
    q = _E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * _E6)))
    p = _F(1.0) + (r + r * r * q)
    bits = _F(p).view(np.int32) + (_F(z).view(np.int32) << _I23)
    return np.int32(bits).view(np.float32)


@njit(**SCALAR)
def exp64(x: Any) -> Any:
    """exp of a float64 in [−690, 690]."""
    z = x * _INV64 + _MAGIC64
    n = z - _MAGIC64
    r = x - n * _HIGH64
    r = r - n * _LOW64
    q = _D7 + r * (_D8 + r * (_D9 + r * (_D10 + r * _D11)))
    q = _D2 + r * (_D3 + r * (_D4 + r * (_D5 + r * (_D6 + r * q))))
    p = 1.0 + (r + r * r * q)
    bits = _D(p).view(np.int64) + (_D(z).view(np.int64) << _I52)
    return np.int64(bits).view(np.float64)


@njit(**SCALAR)
def log1p32(x: Any, y: Any, inverse: Any) -> Any:
    """log(1 + x) of a float32 x ≥ 0, given y = fl(1 + x) and 1/y: m·2^e = y with m about 1, and what y lost of x."""
    i = _F(y).view(np.int32) - _ROOT32
    e = _F(i >> _I23)
    m = np.int32((i & _MANTISSA32) + _ROOT32).view(np.float32)
    s = (m - _F(1.0)) / (m + _F(1.0))  # log m = 2 artanh s
    w = s * s
    p = _F(1 / 3) + w * (_F(1 / 5) + w * (_F(1 / 7) + w * _F(1 / 9)))
    lost = (x - (y - _F(1.0))) * inverse
    return e * _HIGH32 + (_F(2.0) * (s + s * w * p) + (e * _LOW32 + lost))


@njit(**SCALAR)
def log1p64(x: Any, y: Any, inverse: Any) -> Any:
    """The same of a float64."""
    i = _D(y).view(np.int64) - _ROOT64
    e = _D(i >> _I52)
    m = np.int64((i & _MANTISSA64) + _ROOT64).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    w = s * s
    p = 1 / 13 + w * (1 / 15 + w * (1 / 17 + w * (1 / 19 + w * (1 / 21))))
    p = 1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * p))))
    lost = (x - (y - 1.0)) * inverse
    return e * _HIGH64 + (2.0 * (s + s * w * p) + (e * _LOW64 + lost))


# -- profiles ----------------------------------------------------------------------------------------------------------


def _profiles(real: Any, exp: Any, log1p: Any, lowest: float) -> tuple[Any, Any, Any]:
    """Passes over a piece of a tile with arithmetic in ``real``, for the profile with number ``code``.

    values(…, t) writes k(t) over t, over(…, t, out) elsewhere (two names of the same memory would keep the loop from
    becoming vectors); pairing(…, t, T) writes T∘k'(t) over t and returns ⟨T, k⟩ and ⟨T, ∂k/∂α⟩. Profiles are functions
    of the unclamped t that return (dk/dt, k, ∂k/∂α); only the rational quadratic one has an α and its own upper end.
    """
    zero, one, half, third, sixth = real(0.0), real(1.0), real(0.5), real(1 / 3), real(1 / 6)
    low, high = real(lowest), real(lowest**2)

    @njit(**SCALAR)
    def gaussian(x: Any, alpha: Any, top: Any) -> Any:
        x = low if x < low else x  # in this order NaN stays
        k = exp(zero if x > zero else x)
        return k, k, zero

    @njit(**SCALAR)
    def within(x: Any) -> Any:
        x = zero if x < zero else x
        return high if x > high else x

    @njit(**SCALAR)
    def matern12(x: Any, alpha: Any, top: Any) -> Any:
        a = np.sqrt(within(x))
        k = exp(-a)
        return (-half * k / a if a > zero else zero), k, zero

    @njit(**SCALAR)
    def matern32(x: Any, alpha: Any, top: Any) -> Any:
        a = np.sqrt(within(x))
        decay = exp(-a)
        return -half * decay, (one + a) * decay, zero

    @njit(**SCALAR)
    def matern52(x: Any, alpha: Any, top: Any) -> Any:
        x = within(x)
        a = np.sqrt(x)
        decay = exp(-a)
        return -sixth * (one + a) * decay, (one + a + third * x) * decay, zero

    @njit(**SCALAR)
    def rational(x: Any, alpha: Any, top: Any) -> Any:
        x = zero if x < zero else x
        x = top if x > top else x
        y = one + x
        inverse = one / y
        log = log1p(x, y, inverse)
        k = exp(-alpha * log)
        return -alpha * k * inverse, k, k * (x * inverse - log)

    values0, over0, pairing0 = _loops(gaussian, real, False)
    values1, over1, pairing1 = _loops(matern12, real, False)
    values2, over2, pairing2 = _loops(matern32, real, False)
    values3, over3, pairing3 = _loops(matern52, real, False)
    values4, over4, pairing4 = _loops(rational, real, True)

    @njit(**EXACT)
    def values(code: Any, alpha: Any, top: Any, t: Any) -> None:
        if code == GAUSSIAN:
            values0(alpha, top, t)
        elif code == MATERN12:
            values1(alpha, top, t)
        elif code == MATERN32:
            values2(alpha, top, t)
        elif code == MATERN52:
            values3(alpha, top, t)
        else:
            values4(alpha, top, t)

    @njit(**EXACT)
    def over(code: Any, alpha: Any, top: Any, t: Any, out: Any) -> None:
        if code == GAUSSIAN:
            over0(alpha, top, t, out)
        elif code == MATERN12:
            over1(alpha, top, t, out)
        elif code == MATERN32:
            over2(alpha, top, t, out)
        elif code == MATERN52:
            over3(alpha, top, t, out)
        else:
            over4(alpha, top, t, out)

    @njit(**EXACT)
    def pairing(code: Any, alpha: Any, top: Any, t: Any, T: Any) -> Any:
        if code == GAUSSIAN:
            return pairing0(alpha, top, t, T)
        if code == MATERN12:
            return pairing1(alpha, top, t, T)
        if code == MATERN32:
            return pairing2(alpha, top, t, T)
        if code == MATERN52:
            return pairing3(alpha, top, t, T)
        return pairing4(alpha, top, t, T)

    return values, over, pairing


def _loops(profile: Any, real: Any, bends: bool) -> tuple[Any, Any, Any]:
    """The three passes with one profile. A free variable: passed as an argument, it would keep the code off disk."""

    @njit(**EXACT)
    def values(alpha: Any, top: Any, t: Any) -> None:
        a, b = real(alpha), real(top)
        for i in range(t.size):
            t[i] = profile(real(t[i]), a, b)[1]

    @njit(**EXACT)
    def over(alpha: Any, top: Any, t: Any, out: Any) -> None:
        a, b = real(alpha), real(top)
        for i in range(t.size):
            out[i] = profile(real(t[i]), a, b)[1]

    @njit(**SUMS)
    def stretch(a: Any, b: Any, t: Any, T: Any) -> Any:
        total, bent = real(0.0), real(0.0)
        for i in range(t.size):
            slope, k, bend = profile(real(t[i]), a, b)
            total += T[i] * k
            if bends:
                bent += T[i] * bend
            t[i] = T[i] * slope
        return total, bent

    @njit(**EXACT)
    def pairing(alpha: Any, top: Any, t: Any, T: Any) -> Any:
        total, bent = 0.0, 0.0
        for c in range(0, t.size, STRETCH):
            x, y = stretch(real(alpha), real(top), t[c : c + STRETCH], T[c : c + STRETCH])
            total, bent = total + x, bent + y
        return total, bent

    return values, over, pairing


_values32, _over32, _pairing32 = _profiles(np.float32, exp32, log1p32, -80.0)
_values64, _over64, _pairing64 = _profiles(np.float64, exp64, log1p64, -690.0)

# -- what is called ----------------------------------------------------------------------------------------------------
# data: addresses of facts = (size, code), (alpha, top), t, the second tile, and the pair of sums.


@njit(**SCALAR)
def _facts(data: Any) -> Any:
    facts, shapes = carray(data[0], 2, np.int64), carray(data[1], 2, np.float64)
    return facts[0], facts[1], shapes[0], shapes[1]


def _values_single(data: Any) -> None:
    size, code, alpha, top = _facts(data)
    _values32(code, alpha, top, carray(data[2], size, np.float32))


def _values_wide(data: Any) -> None:
    size, code, alpha, top = _facts(data)
    _over32(code, alpha, top, carray(data[2], size, np.float64), carray(data[3], size, np.float32))


def _values_double(data: Any) -> None:
    size, code, alpha, top = _facts(data)
    _values64(code, alpha, top, carray(data[2], size, np.float64))


def _pairing_single(data: Any) -> None:
    size, code, alpha, top = _facts(data)
    t, T, sums = carray(data[2], size, np.float32), carray(data[3], size, np.float32), carray(data[4], 2, np.float64)
    sums[0], sums[1] = _pairing32(code, alpha, top, t, T)


def _pairing_wide(data: Any) -> None:
    size, code, alpha, top = _facts(data)
    t, T, sums = carray(data[2], size, np.float64), carray(data[3], size, np.float32), carray(data[4], 2, np.float64)
    sums[0], sums[1] = _pairing32(code, alpha, top, t, T)


def _pairing_double(data: Any) -> None:
    size, code, alpha, top = _facts(data)
    t, T, sums = carray(data[2], size, np.float64), carray(data[3], size, np.float64), carray(data[4], 2, np.float64)
    sums[0], sums[1] = _pairing64(code, alpha, top, t, T)


VALUES = {(4, 4): _values_single, (8, 4): _values_wide, (8, 8): _values_double}
PAIRING = {(4, 4): _pairing_single, (8, 4): _pairing_wide, (8, 8): _pairing_double}

# Compiled code has to live somewhere between calls, and it is the same for everybody: nothing here depends on who asks.
_compiled: dict[Callable[[Any], None], Any] = {}
_lock = threading.Lock()


def address(function: Callable[[Any], None]) -> int:
    """The address of one of the functions above, compiled for C callers; on disk for the next process, if it can be."""
    with _lock:
        if function not in _compiled:
            _compiled[function] = _compile(function)
    return int(_compiled[function].address)


def _compile(function: Callable[[Any], None]) -> Any:
    signature = types.void(types.CPointer(types.voidptr))
    try:
        return cfunc(signature, cache=True, nopython=True, error_model="numpy")(function)
    except (RuntimeError, OSError):  # no place for the cache, or no room in it
        return cfunc(signature, nopython=True, error_model="numpy")(function)
