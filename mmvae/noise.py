r"""Randomness that is a pure function of integer keys.

A key names a place in a run, for example ``fold(seed, step, row)``. The same key gives the same numbers on every rank, for every batch
composition and after every restart, so nothing random needs to be saved. The generator is the finaliser of SplitMix64 applied to a counter:

    x_i = mix(key + i * 0x9E3779B97F4A7C15),   mix = xor-shift, multiply, xor-shift, multiply, xor-shift

Shapes: ``B`` keys; a draw is ``(B, *shape)``.

References:
    Steele, Lea, Flood (2014), Fast splittable pseudorandom number generators, https://doi.org/10.1145/2660193.2660195
    Salmon et al. (2011), Parallel random numbers: as easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as ``value``."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    for bits, multiplier in _MULTIPLIERS:
        x = (x ^ _shift(x, bits)) * _signed(multiplier)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    for bits, multiplier in _MULTIPLIERS:
        x = ((x ^ (x >> bits)) * multiplier) & _MASK
    return x ^ (x >> 31)


def fold(seed: int, *parts: int | Tensor) -> int | Tensor:
    """Mix integers into one key, ``h <- mix(h + golden + mix(part))`` for each part in turn.

    Arguments:
        seed: any integer.
        parts: integers, or int64 tensors that broadcast against each other.

    Returns:
        A key in ``[0, 2**63)``: an int when every part is one, else an int64 tensor.

    Example:
        >>> fold(0, 1, 2) == fold(0, 1, 2), fold(0, 1, 2) == fold(0, 2, 1)
        (True, False)
        >>> int(fold(0, 1, torch.tensor([2]))) == fold(0, 1, 2)
        True
    """
    key: int | Tensor = _mix_int((seed + _GOLDEN) & _MASK)
    for part in parts:
        if isinstance(part, Tensor) or isinstance(key, Tensor):
            part = _mix(part.long()) if isinstance(part, Tensor) else _signed(_mix_int(part & _MASK))
            key = key if isinstance(key, Tensor) else _signed(key)
            key = _mix(key + part + _signed(_GOLDEN))
        else:
            key = _mix_int((key + _mix_int(part & _MASK) + _GOLDEN) & _MASK)
    return key & ((1 << 63) - 1)


def keyed_uniform(keys: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform numbers in the open interval (0, 1), 23 bits each (with 24, float32 would round the largest to 1).

    Arguments:
        keys: (B,) int64.
        shape: shape of one row's draw.

    Returns:
        (B, *shape) float32.
    """
    counter = torch.arange(1, math.prod(shape) + 1, device=keys.device) * _signed(_GOLDEN)
    bits = _shift(_mix(keys.unsqueeze(-1) + counter), 41)
    return ((bits.float() + 0.5) * 2.0**-23).reshape(len(keys), *shape)


def keyed_normal(keys: Tensor, shape: Sequence[int] = ()) -> Tensor:
    r"""Standard normal numbers by Box and Muller, :math:`\sqrt{-2 \ln u}\,\cos 2 \pi v`.

    Arguments:
        keys: (B,) int64.
        shape: shape of one row's draw.

    Returns:
        (B, *shape) float32.
    """
    size = math.prod(shape)
    half = (size + 1) // 2
    u, v = keyed_uniform(keys, (2, half)).unbind(1)
    radius, angle = (-2.0 * u.log()).sqrt(), 2.0 * math.pi * v
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[:, :size].reshape(len(keys), *shape)
