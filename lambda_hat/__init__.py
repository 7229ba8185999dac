"""lambda_hat: software for people who study how neural networks learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lambda_hat.llc.api import LLCEstimate, estimate_llc, estimate_llcs, plot_estimates

__version__ = "0.1.0"
__all__ = ["LLCEstimate", "estimate_llc", "estimate_llcs", "plot_estimates"]


def __getattr__(name: str) -> Any:
    """The Python interface, on first use: its imports (JAX, Matplotlib) take seconds."""
    if name in __all__:
        from lambda_hat.llc import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
