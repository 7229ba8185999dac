"""What is kept: arrays as bytes, manifests, files on any filesystem, the artifact store."""

from __future__ import annotations

from lambda_hat.store.store import Store

__all__ = ["Store"]
