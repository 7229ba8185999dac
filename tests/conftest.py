"""Strict JAX for every test: 64-bit available, no implicit rank or dtype promotion."""

import os

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


@pytest.fixture(scope="module")
def clean_process():
    """No settings from outside; JAX's promotion for Optax and BlackJAX in every thread; what a flow configures, undone."""
    before = {name: getattr(jax.config, name) for name in ("jax_numpy_dtype_promotion", "jax_default_matmul_precision")}
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("LAMBDA_HAT_", "PREFECT_")):
                patch.delenv(name)
        jax.config.update("jax_numpy_dtype_promotion", "standard")
        yield
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def prefect_home(clean_process, tmp_path_factory):
    """Where the clients of a Prefect server of these tests' own keep results."""
    from prefect import settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")
    updates = {
        settings.PREFECT_HOME: home,
        settings.PREFECT_LOGGING_TO_API_ENABLED: False,
        settings.PREFECT_SERVER_ANALYTICS_ENABLED: False,
        settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # stopping them takes up to a second a flow run
    }
    with settings.temporary_settings(updates), prefect_test_harness(server_startup_timeout=120):
        yield home
