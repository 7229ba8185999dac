"""Strict JAX for every test: 64-bit available, no implicit rank or dtype promotion."""

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def library_promotion():
    """For tests that run Optax or BlackJAX: their own code mixes floats with integers and booleans, and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
