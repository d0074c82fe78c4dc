# SPDX-License-Identifier: Apache-2.0
"""What instructions that move no memory compute, on one number per thread."""

from __future__ import annotations

import numpy as np

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I1, I2, I4, I8 = np.int8, np.int16, np.int32, np.int64
F2, F4, F8 = np.float16, np.float32, np.float64

UNSIGNED = {1: np.bool_, 8: U1, 16: U2, 32: U4, 64: U8}
NUMPY = {"s8": I1, "s16": I2, "s32": I4, "s64": I8, "f16": F2, "f32": F4, "f64": F8}
"""NumPy's types of those that are not unsigned numbers; bfloat16 are held as their bits."""

SMALLEST = np.float32(2.0**-126)


def bfloat16_to_float(bits):
    """float32 of the bits of bfloat16."""
    return (np.asarray(bits).astype(U4) << U4(16)).view(F4)


def float_to_bfloat16(x):
    """The bits of the nearest bfloat16, of two the even one."""
    x = np.asarray(x, F4)
    bits = x.view(U4)
    rounded = ((bits.astype(U8) + 0x7FFF + ((bits >> U4(16)) & U4(1))) >> U8(16)).astype(U2)
    return np.where(np.isnan(x), U2(0x7FFF), rounded)


def fma(a, b, c):
    """A product and a sum, rounded once (nearly: float64 rounds what float32 rounds again)."""
    return (a.astype(F8) * b.astype(F8) + np.asarray(c).astype(F8)).astype(F4)


def flushed(x):
    """Numbers too small for an exponent of their own become 0."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(F4(0), x), x)


def exp2(x):
    """2 to the power of x."""
    return flushed(np.exp2(flushed(x).astype(F8)).astype(F4))


def quotient(a, b):
    """Of whole numbers, towards 0. By 0 it is some number: there is no trap, and compilers compute ahead."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    wide, divisor = a.astype(I8), np.where(b == 0, 1, b.astype(I8))
    whole = np.abs(wide) // np.abs(divisor)
    return np.where(b == 0, -1, np.where((wide < 0) != (divisor < 0), -whole, whole)).astype(a.dtype)


def remainder(a, b):
    """Of whole numbers, with the sign of the first."""
    return (np.asarray(a).astype(I8) - quotient(a, b) * np.asarray(b).astype(I8)).astype(np.asarray(a).dtype)


def shift_left(a, count):
    """Bits moved up; none is left where there are as many as they are moved."""
    bits = a.dtype.itemsize * 8
    count = np.asarray(count)
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a, count):
    """Bits moved down, with the sign of signed numbers."""
    bits = a.dtype.itemsize * 8
    count = np.asarray(count)
    last = np.minimum(count, bits - 1).astype(a.dtype)
    return a >> last if a.dtype.kind == "i" else np.where(count < bits, a >> last, a.dtype.type(0))


def bit_field(a, position, length):
    """`length` bits from `position` on, with the sign of signed numbers."""
    position, length = np.broadcast_arrays(np.asarray(position).astype(I8), np.asarray(length).astype(I8))
    field = (np.asarray(a).view(U4).astype(I8) >> position) & ((I8(1) << length) - 1)
    if a.dtype.kind == "i":
        field = np.where(
            (length > 0) & ((field >> np.maximum(length - 1, 0)) & 1 == 1), field - (I8(1) << length), field
        )
    return field.astype(a.dtype)


def permute_bytes(a, b, selector):
    """`prmt`: four bytes chosen among eight, each as it is or its sign bit repeated."""
    whole = np.asarray(b).astype(U8) << U8(32) | np.asarray(a).astype(U8)
    whole, selector = np.broadcast_arrays(whole, np.asarray(selector).astype(U8))
    result = np.zeros(whole.shape, U8)
    for place in range(4):
        choice = (selector >> U8(4 * place)) & U8(15)
        byte = (whole >> ((choice & U8(7)) * U8(8))) & U8(255)
        byte = np.where(choice & U8(8), np.where(byte & U8(128), U8(255), U8(0)), byte)
        result |= byte << U8(8 * place)
    return result.astype(U4)


def with_sign_of_product(magnitude, a, b):
    """Numbers with the sign that `a * b` has; NaN stays."""
    return np.where(np.signbit(a) ^ np.signbit(b), -magnitude, magnitude)


def compare(name, a, b):
    """`setp`: ordered comparisons are false beside NaN, those that end in u true."""
    plain = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
    plain |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    nan = a.dtype.kind == "f" and (np.isnan(a) | np.isnan(b))
    if name in ("nan", "num"):
        return nan if name == "nan" else ~nan
    if name.endswith("u"):
        return plain[name[:-1]](a, b) | nan
    result = plain[name](a, b)
    return result & ~nan if a.dtype.kind == "f" else result


def halves(a):
    """The two halves of 32 or 64 bits."""
    a = np.asarray(a)
    half = {4: U2, 8: U4}[a.dtype.itemsize]
    return a.astype(half), (a >> a.dtype.type(4 * a.dtype.itemsize)).astype(half)


def joined(low, high):
    """32 or 64 bits of two halves."""
    low, high = np.asarray(low), np.asarray(high)
    whole = {2: U4, 4: U8}[low.dtype.itemsize]
    return low.astype(whole) | high.astype(whole) << whole(8 * low.dtype.itemsize)


def _float8_values(exponent_bits: int, mantissa_bits: int):
    values = np.zeros(256, F4)
    bias = (1 << (exponent_bits - 1)) - 1
    for code in range(256):
        sign = -1.0 if code & 128 else 1.0
        exponent, mantissa = (code & 127) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        if exponent:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        else:
            value = mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias)
        if exponent_bits == 5 and exponent == 31:
            value = np.nan if mantissa else np.inf
        if exponent_bits == 4 and code & 127 == 127:
            value = np.nan
        values[code] = sign * value
    return values


FLOAT8 = {"e4m3x2": _float8_values(4, 3), "e5m2x2": _float8_values(5, 2)}


def float8_pair_to_half(pair, kind):
    """Two float8 as two float16 in 32 bits."""
    values = FLOAT8[kind].astype(F2).view(U2)
    pair = np.asarray(pair)
    return joined(values[pair & 255], values[(pair >> 8) & 255])


def float_pair_to_float8(high, low, kind):
    """Two float32 as two float8, the nearest ones, large ones as the largest; NaN stays."""
    values = np.abs(FLOAT8[kind][:128].astype(F8))
    finite = np.flatnonzero(np.isfinite(values))
    result = U2(0)
    for place, x in enumerate((np.asarray(low, F8), np.asarray(high, F8))):
        size = np.minimum(np.abs(np.nan_to_num(x, nan=0.0)), values[finite[-1]])
        above = np.minimum(np.searchsorted(values[finite], size), len(finite) - 1)
        below = np.maximum(above - 1, 0)
        up, down = values[above] - size, size - values[below]
        code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
        code = np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 128, 0))
        result = result | code.astype(U2) << U2(8 * place)
    return result


def truncated_half(x):
    """float16, rounded towards 0."""
    half = np.asarray(x, F4).astype(F2)
    return np.where(np.abs(half.astype(F4)) > np.abs(x), np.nextafter(half, F2(0)), half)


def convert(x, to: str, rounding: str | None):
    """`cvt` between numbers as NumPy holds them; bfloat16 as float32."""
    kind = NUMPY.get(to)
    if to == "bf16":
        return float_to_bfloat16(x)
    if rounding == "rz":
        return truncated_half(x)
    if kind is not None and np.issubdtype(kind, np.floating):
        return np.asarray(x).astype(kind)
    bits = int(to[1:])
    if np.asarray(x).dtype.kind == "f":
        whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](np.asarray(x, F8))
        low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if to[0] == "s" else (0, 2.0**bits - 1)
        x = np.clip(np.nan_to_num(whole, nan=0), low, high).astype(I8)
    return np.asarray(x).astype(kind or UNSIGNED[bits])
