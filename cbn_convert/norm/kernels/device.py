"""The Triton kernels of the CUDA path; fused.py launches them.

Tiles are [positions, channels]. Strides make the two layouts one: NCHW has N images of P positions with stride 1, and
channels_last one image of N·P positions with stride C. Sums are in float32.
"""

import triton
import triton.language as tl


@triton.jit
def activate(z, ACT: tl.constexpr):
    if ACT == 1:
        z = tl.where(z < 0, 0.0, z)
    elif ACT == 2:
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACT == 3:
        z = z * tl.sigmoid(z)
    elif ACT == 4:
        z = z * tl.where(z < -3, 0.0, tl.where(z > 3, 6.0, z + 3)) / 6
    return z


@triton.jit
def through(g, z, ACT: tl.constexpr):
    """The gradient g taken through the activation of z, as torch does it at the edges."""
    if ACT == 1:
        g = tl.where(z > 0, g, 0.0)
    elif ACT == 2:
        g = tl.where((z > 0) & (z < 6), g, 0.0)
    elif ACT == 3:
        s = tl.sigmoid(z)
        g = g * s * (1 + z * (1 - s))
    elif ACT == 4:
        g = tl.where(z <= -3, 0.0, tl.where(z < 3, g * (z / 3 + 0.5), g))
    return g


@triton.jit
def tile_at(tile, c, C, P, sn, sc, sp, BP: tl.constexpr, WIDE: tl.constexpr):
    """Offsets and mask [BP, BC] of the tile-th block of positions at channels c."""
    blocks = tl.cdiv(P, BP)
    image, p = tile // blocks, (tile % blocks) * BP + tl.arange(0, BP)
    mask = (p < P)[:, None] & (c < C)[None, :]
    if WIDE:
        image, p, c = image.to(tl.int64), p.to(tl.int64), c.to(tl.int64)
    return image * sn + p[:, None] * sp + c[None, :] * sc, mask


@triton.jit
def sums_of_x(x_ptr, out_ptr, C, P, tiles, sn, sc, sp, BP: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr):
    """out [splits, 3, C]: Σ (x - guess), Σ (x - guess)² and the guess."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    offsets, mask = tile_at(0, c, C, P, sn, sc, sp, BP, WIDE)
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    guess = tl.sum(first, 0) / tl.minimum(P, BP)
    total, square = tl.zeros([BP, BC], tl.float32), tl.zeros([BP, BC], tl.float32)
    for tile in range(split, tiles, splits):
        offsets, mask = tile_at(tile, c, C, P, sn, sc, sp, BP, WIDE)
        d = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - guess[None, :]
        d = tl.where(mask, d, 0.0)
        total += d
        square += d * d
    at = out_ptr + split * 3 * C + c
    tl.store(at, tl.sum(total, 0), mask=c < C)
    tl.store(at + C, tl.sum(square, 0), mask=c < C)
    tl.store(at + 2 * C, guess, mask=c < C)


@triton.jit
def merge_statistics(sums_ptr, mean_ptr, var_ptr, C, splits, count, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total, square = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for split in range(splits):
        at = sums_ptr + split * 3 * C + c
        total += tl.load(at, mask=c < C, other=0.0)
        square += tl.load(at + C, mask=c < C, other=0.0)
    rest = total / count
    tl.store(mean_ptr + c, tl.load(sums_ptr + 2 * C + c, mask=c < C, other=0.0) + rest, mask=c < C)
    var = square / count - rest * rest
    tl.store(var_ptr + c, tl.where(var < 0, 0.0, var), mask=c < C)


@triton.jit
def window(
    mean_ptr, var_ptr, past_mean, past_var, anchor, explained, patch_mean, covariance, theta, bias,
    m_ptr, s_ptr, along_ptr, pull_ptr, running_mean, running_var, finite_ptr,
    C, F, per_group, n, slots, newest_weight, momentum, correction,
    FOLLOWS: tl.constexpr, BIAS: tl.constexpr, RUNNING: tl.constexpr, TAYLOR: tl.constexpr,
    BF: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One program per channel; see functional.window_statistics."""
    c = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, ALL)
    both = tl.load(mean_ptr + every, mask=every < C, other=0.0) + tl.load(var_ptr + every, mask=every < C, other=0.0)
    finite = tl.sum((tl.abs(both) < float("inf")).to(tl.int32)) == ALL
    if c == 0:
        tl.store(finite_ptr, finite)
    mean, var = tl.load(mean_ptr + c), tl.load(var_ptr + c)
    total = mean * 0.0
    for i in range(n):
        at = c * slots + i
        m = tl.load(past_mean + at)
        if FOLLOWS:
            reply, gain = tl.zeros([BF], tl.float32), tl.zeros([BF], tl.float32)
            for start in range(0, F, BF):
                f = start + tl.arange(0, BF)
                row = tl.load(theta + c * F + f, mask=f < F, other=0.0)
                reply += row * tl.load(patch_mean + ((c // per_group) * slots + i) * F + f, mask=f < F, other=0.0)
                gain += row * tl.load(covariance + at * F + f, mask=f < F, other=0.0)
            drift = tl.sum(reply) - tl.load(anchor + at)
            if BIAS:
                drift += tl.load(bias + c)
            m += drift
            # kept for the second loop, which needs all means first
            tl.store(pull_ptr + c * n + i, drift)
            tl.store(along_ptr + c * n + i, tl.sum(gain) - tl.load(explained + at))
        total += m
    if FOLLOWS:
        tl.debug_barrier()
    rest = 1 - newest_weight
    center = newest_weight * mean + rest * total / n
    spreads = mean * 0.0
    for i in range(n):
        at = c * slots + i
        v, spread = tl.load(past_var + at), tl.load(past_mean + at) - center
        if FOLLOWS:
            drift, gain = tl.load(pull_ptr + c * n + i), tl.load(along_ptr + c * n + i)
            spread += drift
            pull = spread
            if TAYLOR:
                v += 2 * gain - drift * drift
                along = tl.where(v > 0, 1.0, 0.0)
                pull -= along * drift
                v = tl.where(v < 0, 0.0, v)
            else:
                known = tl.load(explained + at)
                inverse = 1 / tl.where(known > 1e-15, known, 1e-15)
                growth = 1 + gain * inverse
                v *= growth
                along = v * inverse
                v *= growth
            tl.store(pull_ptr + c * n + i, pull)
            tl.store(along_ptr + c * n + i, along)
        spreads += v + spread * spread
    step = mean - center
    s = newest_weight * (var + step * step) + rest * spreads / n
    tl.store(m_ptr + c, center)
    tl.store(s_ptr + c, s)
    if RUNNING:  # decided when compiled
        if finite:
            old = tl.load(running_mean + c).to(tl.float32)
            tl.store(running_mean + c, old + momentum * (center - old))
            old = tl.load(running_var + c).to(tl.float32)
            tl.store(running_var + c, old + momentum * (s * correction - old))


@triton.jit
def normalize(
    x_ptr, y_ptr, mean_ptr, scale_ptr, shift_ptr, C, P, sn, sc, sp,
    BP: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets, mask = tile_at(tl.program_id(0), c, C, P, sn, sc, sp, BP, WIDE)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)[None, :]
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)[None, :]
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, :]
    z = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * scale + shift
    tl.store(y_ptr + offsets, activate(z, ACT), mask=mask)


@triton.jit
def sums_of_g(
    g_ptr, x_ptr, out_ptr, mean_ptr, scale_ptr, shift_ptr, C, P, tiles, sn, sc, sp,
    BP: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """out [splits, 2, C]: Σ g' and Σ g' (x - mean)."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)[None, :]
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)[None, :]
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, :]
    total, products = tl.zeros([BP, BC], tl.float32), tl.zeros([BP, BC], tl.float32)
    for tile in range(split, tiles, splits):
        offsets, mask = tile_at(tile, c, C, P, sn, sc, sp, BP, WIDE)
        d = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean
        g = through(tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32), d * scale + shift, ACT)
        total += g
        products += tl.where(mask, g * d, 0.0)
    at = out_ptr + split * 2 * C + c
    tl.store(at, tl.sum(total, 0), mask=c < C)
    tl.store(at + C, tl.sum(products, 0), mask=c < C)


@triton.jit
def merge_gradients(sums_ptr, inv_std_ptr, scale_ptr, out_ptr, C, splits, share, BC: tl.constexpr):
    """out [6, C]: γ's and β's gradient, ∂L/∂M, 2 ∂L/∂S, and the last two times `share`."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total, products = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for split in range(splits):
        at = sums_ptr + split * 2 * C + c
        total += tl.load(at, mask=c < C, other=0.0)
        products += tl.load(at + C, mask=c < C, other=0.0)
    inv_std = tl.load(inv_std_ptr + c, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    g_gamma = products * inv_std
    g_mean, g_var = -scale * total, -scale * inv_std * g_gamma
    out = out_ptr + c
    tl.store(out, g_gamma, mask=c < C)
    tl.store(out + C, total, mask=c < C)
    tl.store(out + 2 * C, g_mean, mask=c < C)
    tl.store(out + 3 * C, g_var, mask=c < C)
    tl.store(out + 4 * C, share * g_mean, mask=c < C)
    tl.store(out + 5 * C, share * g_var, mask=c < C)


@triton.jit
def input_gradient(
    g_ptr, x_ptr, out_ptr, mean_ptr, scale_ptr, shift_ptr, constant_ptr, slope_ptr, C, P, sn, sc, sp,
    BP: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets, mask = tile_at(tl.program_id(0), c, C, P, sn, sc, sp, BP, WIDE)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)[None, :]
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)[None, :]
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, :]
    constant = tl.load(constant_ptr + c, mask=c < C, other=0.0)[None, :]
    slope = tl.load(slope_ptr + c, mask=c < C, other=0.0)[None, :]
    d = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean
    g = through(tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32), d * scale + shift, ACT)
    tl.store(out_ptr + offsets, g * scale + (slope * d + constant), mask=mask)


@triton.jit
def through_the_past(
    covariance, patch_mean, along, pull, grad_mean, grad_var, theta_ptr, bias_ptr,
    C, F, per_group, n, slots, pm_slots, w, BF: tl.constexpr,
):  # fmt: skip
    """One program per channel and block of F; see functional.gradient_through_the_past."""
    c, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BF + tl.arange(0, BF)
    g_mean, g_var = w * tl.load(grad_mean + c), w * tl.load(grad_var + c)
    row, b = tl.zeros([BF], tl.float32), g_mean * 0.0
    for i in range(n):
        u, v = g_var * tl.load(along + c * n + i), g_mean + g_var * tl.load(pull + c * n + i)
        row += u * tl.load(covariance + (c * slots + i) * F + f, mask=f < F, other=0.0)
        row += v * tl.load(patch_mean + ((c // per_group) * pm_slots + i) * F + f, mask=f < F, other=0.0)
        b += v
    tl.store(theta_ptr + c * F + f, row, mask=f < F)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + c, b)
