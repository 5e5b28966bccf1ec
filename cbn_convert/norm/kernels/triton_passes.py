"""What gpu.py launches: the passes over weights [C, F], a program for each channel. See formulas.py for the formulas.

Sums are in the type of the weights. A vector that is not there is None, and nothing is compiled for it. Quotients and
roots are rounded correctly, so that statistics stay the same to the bit where weights do.
"""

import triton
import triton.language as tl


@triton.jit
def over(a, b):
    """a / b."""
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def root(a):
    """sqrt(a)."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def at_least(a, least):
    """a, or the least; NaN stays."""
    return tl.maximum(a, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def value(vector, c, default, dtype: tl.constexpr):
    """The entry of a vector, or the default where there is none."""
    if vector is None:
        return tl.full([], default, dtype)
    else:  # or Triton compiles what follows as well
        return tl.load(vector + c).to(dtype)


@triton.jit
def fold(
    theta, bias, patch_mean, patch_rest, patch_axes, table, gamma, beta, out, rows, running_mean, running_var,
    C, F, K, per_group, EPS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """out [7, C]: the table at θ, s and β + s (b - M); rows [C, F]: s θ; running statistics [C]."""
    c, f = tl.program_id(0), tl.arange(0, BLOCK)
    dtype: tl.constexpr = theta.dtype.element_ty
    least = tl.full([], LEAST, dtype)  # a number alone would be rounded to float32
    row = theta + c.to(tl.int64) * F
    m, v, b = tl.load(table + c), tl.load(table + C + c), value(bias, c, 0.0, dtype)
    if patch_mean is not None:
        p, d = patch_mean + (c // per_group) * F, patch_rest + (c // per_group) * F
        k = tl.arange(0, AXES)[:, None]
        u = patch_axes + (c // per_group) * K * F + k * F
        along, across, length = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
        products = tl.zeros([AXES, BLOCK], dtype)
        for start in range(0, F, BLOCK):
            at = start + f
            w = tl.load(row + at, mask=at < F, other=0.0)
            along += w * tl.load(p + at, mask=at < F, other=0.0)
            across += w * w * tl.load(d + at, mask=at < F, other=0.0)
            length += w * w
            products += w[None, :] * tl.load(u + at[None, :], mask=(at < F)[None, :] & (k < K), other=0.0)
        by_axis = tl.sum(products, 1)
        anchor, square = tl.sum(along) + b, at_least(tl.sum(length), least)
        spread = at_least(tl.sum(across) + tl.sum(by_axis * by_axis), least)
        anchor_then, spread_then = tl.load(table + 2 * C + c), tl.load(table + 3 * C + c)
        square_then = tl.load(table + 4 * C + c)
        leave_zero = (square_then <= least) & (square > least)
        moved = m + (anchor - anchor_then) + (root(over(square, square_then)) - 1) * (m - anchor_then)
        m = tl.where(leave_zero, anchor, moved)
        v = tl.where(leave_zero, spread, v * over(spread, spread_then))
        tl.store(out + 2 * C + c, anchor)
        tl.store(out + 3 * C + c, spread)
        tl.store(out + 4 * C + c, square)
    s = over(value(gamma, c, 1.0, dtype), root(v + EPS))
    tl.store(out + c, m)
    tl.store(out + C + c, v)
    tl.store(out + 5 * C + c, s)
    tl.store(out + 6 * C + c, s * (b - m) + value(beta, c, 0.0, dtype))
    if running_mean is not None:
        tl.store(running_mean + c, m)
        tl.store(running_var + c, v)
    if rows is not None:
        to = rows + c.to(tl.int64) * F
        for start in range(0, F, BLOCK):
            at = start + f
            tl.store(to + at, s * tl.load(row + at, mask=at < F), mask=at < F)


@triton.jit
def folded_gradient(
    theta, bias, patch_mean, patch_rest, patch_axes, table, gamma, g, g_shift, g_gamma,
    C, F, K, per_group, EPS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Of g [C, F], the gradient of s θ, that of θ in its place; g_gamma [C]."""
    c, f = tl.program_id(0), tl.arange(0, BLOCK)
    dtype: tl.constexpr = theta.dtype.element_ty
    least = tl.full([], LEAST, dtype)  # a number alone would be rounded to float32
    row, to = theta + c.to(tl.int64) * F, g + c.to(tl.int64) * F
    m, v, of_shift = tl.load(table + c), tl.load(table + C + c), tl.load(g_shift + c)
    product = tl.zeros([BLOCK], dtype)
    for start in range(0, F, BLOCK):
        at = start + f
        product += tl.load(row + at, mask=at < F, other=0.0) * tl.load(to + at, mask=at < F, other=0.0)
    t = tl.sum(product) + of_shift * (value(bias, c, 0.0, dtype) - m)
    inv_std = over(tl.full([], 1.0, dtype), root(v + EPS))
    s = value(gamma, c, 1.0, dtype) * inv_std
    tl.store(g_gamma + c, t * inv_std)
    if patch_mean is None:
        for start in range(0, F, BLOCK):
            at = start + f
            tl.store(to + at, s * tl.load(to + at, mask=at < F), mask=at < F)
    else:
        p, d = patch_mean + (c // per_group) * F, patch_rest + (c // per_group) * F
        k = tl.arange(0, AXES)[:, None]
        u = patch_axes + (c // per_group) * K * F + k * F
        products = tl.zeros([AXES, BLOCK], dtype)
        for start in range(0, F, BLOCK):
            at = start + f
            w = tl.load(row + at, mask=at < F, other=0.0)
            products += w[None, :] * tl.load(u + at[None, :], mask=(at < F)[None, :] & (k < K), other=0.0)
        by_axis = tl.sum(products, 1)[:, None]
        anchor, spread, square = tl.load(table + 2 * C + c), tl.load(table + 3 * C + c), tl.load(table + 4 * C + c)
        g_mean, g_var = -s * of_shift, -0.5 * s * t * inv_std * inv_std
        along = tl.where(square > least, over(g_mean * (m - anchor), square), 0.0)
        across = tl.where(spread > least, over(g_var * 2 * v, spread), 0.0)
        for start in range(0, F, BLOCK):
            at = start + f
            w, own = tl.load(row + at, mask=at < F), tl.load(to + at, mask=at < F)
            axes = tl.load(u + at[None, :], mask=(at < F)[None, :] & (k < K), other=0.0)
            through = g_mean * tl.load(p + at, mask=at < F) + (along + across * tl.load(d + at, mask=at < F)) * w
            tl.store(to + at, s * own + through + across * tl.sum(by_axis * axes, 0), mask=at < F)
