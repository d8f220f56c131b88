"""The GPU kernels in Triton: product, fill and contraction. Imported only when one of them is to run.

One program owns a block of rows and goes over the columns tile by tile, with tile, profile and accumulators in
registers: no tile ever reaches memory. There are no atomics, so results do not depend on the order of programs. All
arrays come padded to whole blocks by zeros (triton_operands.py), which adds nothing and needs no masks.

Accuracy of float32 on tensor cores. Operands go through as three products of TF32 parts (2⁻²² relative). The
accumulators inside of the unit are truncated, not rounded, which is a bias that grows with the number of additions: so
a tile's product starts at zero, and tiles are added up outside by Kahan's compensated sum. (A plain ``acc += dot``
would be compiled into the unit's own accumulator.)

In all of this s_ij = ‖u_i − v_j‖² for coordinates that carry the profile's factor; see :func:`_profile`.
"""

import triton
import triton.language as tl

# How s is made.
DIRECT = tl.constexpr(0)  # differences, one coordinate after the other: exact for close points
SPLIT = tl.constexpr(1)  # the same with coordinates in two float32 parts: float64 coordinates at float32 speed
DOT = tl.constexpr(2)  # ½‖w_i‖² + ½‖w_j‖² − w_i·w_j with w = √2 u, on tensor cores

# Profiles.
GAUSSIAN = tl.constexpr(0)
MATERN12 = tl.constexpr(1)
MATERN32 = tl.constexpr(2)
MATERN52 = tl.constexpr(3)
RATIONAL = tl.constexpr(4)

LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1e-35)  # s below: coincident points, where Matérn 1/2 has no derivative


@triton.jit
def _gap(u, v, a, stride_u, stride_v, DISTANCE: tl.constexpr):
    """u_ia − v_ja for the pointers u and v to coordinate 0 of the rows and of the columns."""
    if DISTANCE == SPLIT:
        a = 2 * a
    gap = tl.load(u + a * stride_u)[:, None] - tl.load(v + a * stride_v)[None, :]
    if DISTANCE == SPLIT:
        gap += tl.load(u + (a + 1) * stride_u)[:, None] - tl.load(v + (a + 1) * stride_v)[None, :]
    return gap


@triton.jit
def _squares(
    U, V, NU, NV, rows, cols, stride_u, stride_v, SAME: tl.constexpr, DISTANCE: tl.constexpr, Q: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s (rows, cols). DOT: U is (n, Q) with NU = ½‖w‖²; else (Q, n), or (2Q, n) with both parts of a coordinate."""
    if DISTANCE == DOT:
        inner = tl.arange(0, CHUNK)
        u = U + rows[:, None] * stride_u + inner[None, :]
        v = V + cols[None, :] * stride_v + inner[:, None]
        s = tl.load(NU + rows)[:, None] + tl.load(NV + cols)[None, :]
        if Q <= 2 * CHUNK:  # unrolled, so that the rows' coordinates stay where they are from tile to tile
            for c in tl.static_range(0, Q, CHUNK):
                s -= tl.dot(tl.load(u + c), tl.load(v + c), input_precision=PRECISION)
        else:
            for c in range(0, Q, CHUNK):
                s -= tl.dot(tl.load(u + c), tl.load(v + c), input_precision=PRECISION)
        s = tl.maximum(s, 0.0)
        if SAME:
            s = tl.where(rows[:, None] == cols[None, :], 0.0, s)
    else:
        s = tl.zeros((rows.shape[0], cols.shape[0]), dtype=U.dtype.element_ty)
        u = U + rows
        v = V + cols
        if Q <= 4:  # unrolled, so that the rows' coordinates stay in registers from tile to tile
            for a in tl.static_range(Q):
                gap = _gap(u, v, a, stride_u, stride_v, DISTANCE)
                s += gap * gap
        else:
            for a in range(Q):
                gap = _gap(u, v, a, stride_u, stride_v, DISTANCE)
                s += gap * gap
    return s


@triton.jit
def _log1p(s):
    """log(1 + s) to full relative accuracy: the error of 1 + s is divided out again."""
    w = 1.0 + s
    return tl.where(w == 1.0, s, tl.log(w) * (s / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _profile(s, alpha, PROFILE: tl.constexpr):
    """k of s. Its factor is chosen such that exponentials are exp2 of s or of √s, without another multiplication.

    Gaussian: s = ½ log₂e·r². Matérn ν: s = 2ν (log₂e)²·r², √s = a·log₂e. Rational quadratic: s = r²/(2α).
    """
    if PROFILE == GAUSSIAN:
        return tl.exp2(-s)
    elif PROFILE == MATERN12:
        return tl.exp2(-tl.sqrt(s))
    elif PROFILE == MATERN32:
        b = tl.sqrt(s)
        return (1.0 + LN2 * b) * tl.exp2(-b)
    elif PROFILE == MATERN52:
        b = tl.sqrt(s)
        return (1.0 + LN2 * b + (LN2 * LN2 / 3) * s) * tl.exp2(-b)
    else:
        return tl.exp(-alpha * _log1p(s))


@triton.jit
def _slopes(s, alpha, PROFILE: tl.constexpr):
    """(k, dk/ds, ∂k/∂α at fixed r²); the last is k again where there is no α."""
    if PROFILE == GAUSSIAN:
        k = tl.exp2(-s)
        return k, -LN2 * k, k
    elif PROFILE == MATERN12:
        b = tl.sqrt(s)
        k = tl.exp2(-b)
        apart = s > TINY
        return k, tl.where(apart, (-LN2 / 2) * k / tl.where(apart, b, 1.0), 0.0), k
    elif PROFILE == MATERN32:
        b = tl.sqrt(s)
        e = tl.exp2(-b)
        k = (1.0 + LN2 * b) * e
        return k, (-LN2 * LN2 / 2) * e, k
    elif PROFILE == MATERN52:
        b = tl.sqrt(s)
        e = tl.exp2(-b)
        first = (1.0 + LN2 * b) * e
        k = first + (LN2 * LN2 / 3) * s * e
        return k, (-LN2 * LN2 / 6) * first, k
    else:
        log = _log1p(s)
        k = tl.exp(-alpha * log)
        return k, -alpha * k / (1.0 + s), k * (s / (1.0 + s) - log)


@triton.jit
def _add(total, lost, part):
    """Kahan's sum: (total + part, what rounding lost)."""
    part = part - lost
    new = total + part
    return new, (new - total) - part


@triton.jit
def product_kernel(
    U, V, NU, NV, X, Y, alpha, stride_u, stride_v, n, m, k, reach,
    PROFILE: tl.constexpr, SAME: tl.constexpr, DISTANCE: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y (parts, k, n) += k(U, V) X for X (k, m): vectors as rows. Program (row block, vectors, part of the columns)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1).to(tl.int64) * VECTORS
    part = tl.program_id(2)
    shape = tl.load(alpha)
    vectors = tl.arange(0, VECTORS)
    X += block * m
    if VECTORS == 1:
        total = tl.zeros((ROWS, COLUMNS), dtype=X.dtype.element_ty)
    else:
        total = tl.zeros((ROWS, VECTORS), dtype=X.dtype.element_ty)
    lost = total
    for start in range(part * reach, tl.minimum(part * reach + reach, m), COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        s = _squares(U, V, NU, NV, rows, cols, stride_u, stride_v, SAME, DISTANCE, Q, CHUNK, PRECISION)
        tile = _profile(s, shape, PROFILE)
        if VECTORS == 1:  # every entry keeps a sum of its own until the end: no reduction in the loop
            total += tile * tl.load(X + cols)[None, :]
        else:
            x = tl.load(X + vectors[None, :] * m + cols[:, None])
            found = tl.dot(tile, x, input_precision=PRECISION, out_dtype=X.dtype.element_ty)
            total, lost = _add(total, lost, found)
    Y += (part.to(tl.int64) * k + block) * n
    if VECTORS == 1:
        tl.store(Y + rows, tl.sum(total, 1))
    else:
        tl.store(Y + vectors[None, :] * n + rows[:, None], total)


@triton.jit
def fill_kernel(
    U, V, NU, NV, K, alpha, stride_u, stride_v, stride_k, n, m,
    PROFILE: tl.constexpr, SAME: tl.constexpr, DISTANCE: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of K (n, m), its rows stride_k apart. Here n and m are the true sizes: K is not padded."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    s = _squares(U, V, NU, NV, rows, cols, stride_u, stride_v, SAME, DISTANCE, Q, CHUNK, PRECISION)
    tile = _profile(s, tl.load(alpha), PROFILE)
    place = K + rows.to(tl.int64)[:, None] * stride_k + cols[None, :]
    tl.store(place, tile, mask=(rows < n)[:, None] & (cols < m)[None, :])


@triton.jit
def contract_kernel(
    U, V, NU, NV, W, L, R, G, sums, alpha, stride_u, stride_v, n, m, k, reach,
    PROFILE: tl.constexpr, SAME: tl.constexpr, DISTANCE: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, MOVES: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For T = L Rᵀ, L (n, k) and R (m, k), DEPTH divides k: the sums over columns of S = T ∘ dk/ds, times coordinates.

    MOVES: G (parts, n, all), of which this program writes WIDTH columns: S W with W (all, m) holding coordinates and a
    row of ones; where DISTANCE is SPLIT, Σ_j S_ij (u_i − v_j), which does not cancel.
    SUMS: sums (2, parts·row blocks) in float64: Σ T ∘ k and Σ T ∘ ∂k/∂α.
    Program (row block, columns of G, part of the columns of the matrix).
    """
    dtype = L.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1) * WIDTH
    part = tl.program_id(2)
    shape = tl.load(alpha)
    depth = tl.arange(0, DEPTH)
    wide = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), dtype=dtype)
    lost = total
    value = tl.zeros((ROWS,), dtype=tl.float64)
    bend = value
    for start in range(part * reach, tl.minimum(part * reach + reach, m), COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        s = _squares(U, V, NU, NV, rows, cols, stride_u, stride_v, SAME, DISTANCE, Q, CHUNK, PRECISION)
        T = tl.zeros((ROWS, COLUMNS), dtype=dtype)
        for c in range(0, k, DEPTH):
            left = tl.load(L + rows.to(tl.int64)[:, None] * k + (c + depth)[None, :])
            right = tl.load(R + cols.to(tl.int64)[None, :] * k + (c + depth)[:, None])
            T = tl.dot(left, right, T, input_precision=PRECISION, out_dtype=dtype)
        entry, slope, change = _slopes(s, shape, PROFILE)
        if SUMS:
            value += tl.sum(T * entry, 1).to(tl.float64)
            if PROFILE == RATIONAL:
                bend += tl.sum(T * change, 1).to(tl.float64)
        if MOVES:
            S = T * slope
            if SAME:  # u_i − u_i: large, and would have to cancel
                S = tl.where(rows[:, None] == cols[None, :], 0.0, S)
            if DISTANCE == SPLIT:
                moved = tl.zeros((ROWS, WIDTH), dtype=dtype)
                for a in range(chunk, tl.minimum(Q, chunk + WIDTH)):
                    gap = _gap(U + rows, V + cols, a, stride_u, stride_v, DISTANCE)
                    moved += tl.where((chunk + wide)[None, :] == a, tl.sum(S * gap, 1)[:, None], 0.0)
            else:
                w = tl.load(W + (chunk + wide).to(tl.int64)[None, :] * m + cols[:, None])
                moved = tl.dot(S, w, input_precision=PRECISION, out_dtype=dtype)
            total, lost = _add(total, lost, moved)
    if MOVES:
        width = tl.num_programs(1) * WIDTH
        G += part.to(tl.int64) * n * width
        tl.store(G + rows.to(tl.int64)[:, None] * width + (chunk + wide)[None, :], total)
    if SUMS:
        if chunk == 0:
            place = part * tl.num_programs(0) + tl.program_id(0)
            tl.store(sums + place, tl.sum(value))
            if PROFILE == RATIONAL:
                tl.store(sums + tl.num_programs(0) * tl.num_programs(2) + place, tl.sum(bend))
