"""The random numbers of the hot loops, against JAX's own and against their distributions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lambda_hat.compute import random


def test_bits_are_threefry():
    """The published test vectors of Threefry-2x32, 20 rounds (Random123's kat_vectors)."""
    cases = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for words, counter, expected in cases:
        got = random._threefry(*(jnp.asarray(x, jnp.uint32) for x in (words, *counter)))
        assert tuple(int(x) for x in got) == expected


def test_streams_do_not_depend_on_their_company():
    keys = jax.vmap(lambda step: jax.random.fold_in(random.key(3), step))(jnp.arange(5))
    together = jax.vmap(lambda key: random.normal(key, (11,), jnp.float32))(keys)
    alone = random.normal(jax.random.fold_in(random.key(3), 2), (11,), jnp.float32)
    np.testing.assert_allclose(together[2], alone, rtol=1e-5, atol=1e-6)  # the device rounds by its vectors
    assert len(np.unique(together)) == 55


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(400_001,), (2, 3, 7)])
def test_normals(dtype, shape):
    values = np.asarray(random.normal(random.key(1), shape, jnp.dtype(dtype)))
    assert values.dtype == dtype
    assert values.shape == shape
    if values.size > 1000:
        assert stats.kstest(values, "norm").pvalue > 0.01
        half = (values.size + 1) // 2
        for power in (1, 2):
            correlation = np.corrcoef(values[: half - 1] ** power, values[half:] ** power)[0, 1]
            assert abs(correlation) < 4 / half**0.5
        assert np.abs(values).max() < 6
        assert (values**4).mean() == pytest.approx(3, abs=4 * (96 / values.size) ** 0.5)


def test_jax_functions_take_the_keys():
    a, b = jax.random.split(random.key(0))
    uniform = np.asarray(jax.random.uniform(a, (100_000,), jnp.float64))
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    counts = np.bincount(np.asarray(jax.random.randint(b, (100_000,), 0, 7)))
    assert stats.chisquare(counts).pvalue > 0.01
