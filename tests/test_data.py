"""Inputs and noise have the distributions they are named for; files are what they must be."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from lambda_hat.data import FASHION_MNIST_VARIABLE, RegressionData, digits, draw_inputs, draw_noise, fashion_mnist
from lambda_hat.spec import InvalidInput

N = 40_000


def inputs(**fields):
    return draw_inputs(RegressionData(input_dim=6, **fields), 0, 0, N)


def noise(x=None, **fields):
    spec = RegressionData(input_dim=6, output_dim=2, noise_scale=0.5, **fields)
    return draw_noise(spec, 0, 0, np.ones((N, 6)) if x is None else x)


def kurtosis(x):
    return np.mean(((x - x.mean()) / x.std()) ** 4)


def test_gauss_inputs():
    np.testing.assert_allclose(np.cov(inputs().T), np.eye(6), atol=0.03)
    decaying = inputs(inputs="gauss_aniso", cov_decay=0.5)
    np.testing.assert_allclose(np.cov(decaying.T), np.diag(0.5 ** np.arange(6)), atol=0.03)


def test_mixture_inputs():
    """Of two centres, each sample is near one: within the clusters the variance is 1."""
    x = inputs(inputs="mixture", num_components=2, separation=20.0)
    near = np.linalg.norm(x - x[0], axis=1) < 10
    assert 0.45 < near.mean() < 0.55
    for cluster in (x[near], x[~near]):
        np.testing.assert_allclose(np.cov(cluster.T), np.eye(6), atol=0.05)


def test_manifold_inputs():
    x = inputs(inputs="lowdim_manifold", manifold_dim=2)
    assert np.linalg.matrix_rank(x) == 2
    assert np.mean(np.sum(x**2, axis=1)) == pytest.approx(6, rel=0.03)
    fresh = draw_inputs(RegressionData(input_dim=6, inputs="lowdim_manifold"), 0, 1, 10)
    assert np.linalg.matrix_rank(np.concatenate([x, fresh])) == 2  # the same subspace


def test_heavy_tail_inputs():
    x = inputs(inputs="heavy_tail", tail_df=6.0)
    assert x.var() == pytest.approx(1, rel=0.03)
    assert kurtosis(x) > 4  # 6 in theory, 3 for a Gaussian


@pytest.mark.parametrize("kind", ["gauss", "student_t"])
def test_noise_has_its_scale(kind):
    assert noise(noise=kind).std() == pytest.approx(0.5, rel=0.05)


def test_noise_shapes():
    assert kurtosis(noise(noise="gauss")) == pytest.approx(3, abs=0.1)
    assert kurtosis(noise(noise="student_t", noise_df=6.0)) > 4
    outliers = noise(noise="outliers", outlier_fraction=0.1, outlier_scale=10.0)
    assert outliers.var() == pytest.approx(0.25 * (0.9 + 0.1 * 100), rel=0.05)
    assert np.median(np.abs(outliers)) == pytest.approx(0.6745 * 0.5, rel=0.15)
    x = np.where(np.arange(N)[:, None] % 2 == 0, 1.0, 3.0) * np.ones((1, 6))
    hetero = noise(x, noise="hetero")
    assert hetero[1::2].std() / hetero[::2].std() == pytest.approx(3, rel=0.03)


def test_streams_and_seeds_differ():
    spec = RegressionData(input_dim=3)
    draws = [draw_inputs(spec, seed, stream, 5) for seed in (0, 1) for stream in (0, 1)]
    draws += [draw_noise(RegressionData(input_dim=3, output_dim=3), seed, 0, np.ones((5, 3))) for seed in (0, 1)]
    assert len({draw.tobytes() for draw in draws}) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cov_decay": 0.5}, "cov_decay is a field of gauss_aniso; got 0.5 with inputs=gauss_iso and noise=gauss"),
        ({"noise": "student_t", "outlier_scale": 3.0}, "outlier_scale is a field of outliers"),
        ({"inputs": "lowdim_manifold", "manifold_dim": 9}, "manifold_dim must be at most input_dim, 8; got 9"),
    ],
)
def test_specs_that_cannot_be(fields, message):
    with pytest.raises(ValidationError, match=message):
        RegressionData(**fields)


def test_digits():
    x, y = digits(0)
    assert (x.shape, y.shape, y.dtype) == ((1797, 64), (1797,), np.int32)
    assert (x.min(), x.max()) == (0, 1)


def test_fashion_mnist():
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    x, y = fashion_mnist("t10k")
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((10_000, 784), np.float32, (10_000,), np.int32)
    assert (x.min(), x.max()) == (0, 1)
    assert np.bincount(y).tolist() == [1000] * 10


def test_fashion_mnist_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv(FASHION_MNIST_VARIABLE, str(tmp_path))
    with pytest.raises(InvalidInput, match=r"found no .*train-images.*apt-get install dataset-fashion-mnist"):
        fashion_mnist("train")
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(InvalidInput, match="its content is another's"):
        fashion_mnist("t10k")
