"""Datasets: inputs and labels, drawn or loaded, as arrays in the target's dtype."""

from __future__ import annotations

import numpy as np


def normal(seed: tuple[int, int], shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Independent normal samples of standard deviation `scale`, float64 (PCG64).

    Args:
      seed: the target's seed and a number that tells its streams apart, so that no two targets share samples.
    """
    return scale * np.random.default_rng(seed).standard_normal(shape)


def digits(n_data: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's bundled handwritten digits, shuffled and split: (x, y, x_test, y_test).

    x: (n_data, 64) pixels scaled to [0, 1]; y: (n_data,) labels 0-9, int32; the rest of the 1797 images are the test set.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order] / 16.0, y[order].astype(np.int32)
    return x[:n_data], y[:n_data], x[n_data:], y[n_data:]
