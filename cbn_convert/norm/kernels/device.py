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
