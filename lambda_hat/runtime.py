"""JAX as the settings want it: platform and persistent compilation cache."""

from __future__ import annotations

from pathlib import Path

import jax

from lambda_hat.settings import Runtime


def configure(runtime: Runtime) -> None:
    """Applies the settings to this process; call before the first computation."""
    if runtime.platform != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(runtime.platform, runtime.platform))
    if runtime.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(runtime.compilation_cache).expanduser()))
        # By default programs that compile in under a second are not kept; ours are many and small.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
