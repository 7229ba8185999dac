"""Random numbers for hot loops: JAX's own generator and normals, written so that XLA compiles them into few kernels.

JAX's threefry is a loop that XLA does not fuse, and its normals are an inverse error function: together they took half of a
small network's SGLD step on a CPU. Here the same cipher is written out, and normals are pairs by Box & Muller.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as jex_random

#: Of Threefry-2x32, 20 rounds (Salmon et al. 2011): rotations, by groups of four rounds, and the parity of the key schedule.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
#: The bits of a word that give a normal's angle; the others give its radius.
ANGLE = np.uint32(2**14 - 1)
#: Second words of the counters, which keep the streams of bits, splits and folds apart.
BITS, FOLD, SPLIT = np.uint32(0), np.uint32(2**32 - 2), np.uint32(2**32 - 1)


def key(seed: jax.Array | int) -> jax.Array:
    """A key for `jax.random`'s functions, of a seed below 2**32."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def normal(rng_key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Independent standard normals; those in float32 in pairs from 32 bits (Box & Muller 1958), 18 of the radius, so that
    |z| < 5.1 as 1 - 3e-7 of all are, and 14 of the angle."""
    if dtype != jnp.float32:
        return jax.random.normal(rng_key, shape, dtype)
    size = math.prod(shape)
    counter = jax.lax.iota(jnp.uint32, (size + 3) // 4)
    words = _threefry(jax.random.key_data(rng_key), counter, jnp.full_like(counter, BITS))
    # One array of all words, or XLA would compute the cipher once for each of its uses. Its second half has the first's radii,
    # and angles a quarter of a turn earlier, whose cosines are the sines.
    quarter = [(word & ~ANGLE) | ((word - np.uint32(2**12)) & ANGLE) for word in words]
    bits = jnp.concatenate([*words, *quarter])
    uniform = ((bits >> np.uint32(14)).astype(jnp.int32).astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-18)
    return (jnp.sqrt(-2 * jnp.log(uniform)) * _cosine(bits << np.uint32(18)))[:size].reshape(shape)


def _cosine(turns: jax.Array) -> jax.Array:
    """cos(2 pi turns / 2**32) within 2e-6, of uint32; XLA's own is not vectorised on CPUs."""
    signed = jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32) * np.float32(2**-32)
    # cos(x) = sin(quarter turn - |x|), whose series is short on a quarter of a turn to either side.
    x = (np.float32(0.25) - jnp.abs(signed)) * np.float32(2 * math.pi)
    q = jnp.square(x)
    return x * (0.99999999 + q * (-0.1666666 + q * (0.008333017 + q * (-1.980661e-4 + q * 2.6e-6))))


def _threefry(words: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cipher of counters (x0, x1), uint32 of one shape, under the key `words`, (2,)."""
    schedule = (words[0], words[1], words[0] ^ words[1] ^ PARITY)
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
        x0, x1 = x0 + schedule[(group + 1) % 3], x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def _counters(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)


def _from_seed(seed: jax.Array) -> jax.Array:
    return jnp.stack([jnp.zeros((), jnp.uint32), jnp.asarray(seed).astype(jnp.uint32)])


def _bits(words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    counters = _counters(shape)
    low, high = _threefry(words, counters, jnp.full_like(counters, BITS))
    if bit_width == 64:
        return low.astype(jnp.uint64) | (high.astype(jnp.uint64) << np.uint64(32))
    return low.astype(jnp.dtype(f"uint{bit_width}"))


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    counters = _counters(shape)
    return jnp.stack(_threefry(words, counters, jnp.full_like(counters, SPLIT)), -1)


def _fold_in(words: jax.Array, number: Any) -> jax.Array:
    data = jnp.asarray(number).astype(jnp.uint32)
    return jnp.stack(_threefry(words, data, jnp.full_like(data, FOLD)))


_IMPLEMENTATION = jex_random.define_prng_impl(
    key_shape=(2,), seed=_from_seed, split=_split, random_bits=_bits, fold_in=_fold_in, name="threefry2x32_unrolled", tag="tfu"
)
