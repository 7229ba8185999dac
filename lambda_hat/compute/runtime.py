"""JAX as the settings want it: platform and persistent compilation cache."""

from __future__ import annotations

from pathlib import Path

import jax

from lambda_hat.specs.settings import Runtime
from lambda_hat.specs.spec import InvalidInput


def configure(runtime: Runtime, computes: bool = True) -> None:
    """Applies the settings to this process; call before the first computation.

    Args:
      computes: whether it is for targets and draws. A process that has others do that leaves the GPUs to them.

    Raises:
      InvalidInput: the platform asked for is not here.
    """
    if not computes:
        runtime = runtime.model_copy(update={"platform": "cpu"})
    # Or JAX's CPU device would run the programs of all threads one after another.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # On GPUs JAX would multiply float32 matrices in TF32, ten bits of mantissa: losses near zero would be noise.
    jax.config.update("jax_default_matmul_precision", "highest")
    if runtime.platform != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(runtime.platform, runtime.platform))
        try:
            backend = jax.default_backend()
        except RuntimeError as error:
            backend = str(error)
        if backend != runtime.platform:
            raise InvalidInput(
                f"runtime.platform must be one JAX finds here; got {runtime.platform!r}, found {backend}. "
                "Use auto, or install the JAX that has it."
            )
    if runtime.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(runtime.compilation_cache).expanduser()))
        # By default programs that compile in under a second are not kept; ours are many and small.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
