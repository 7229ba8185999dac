"""Inputs and noise have the distributions they are named for; files are what they must be."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.data import (
    FASHION_MNIST_VARIABLE,
    MNIST1M_VARIABLE,
    RegressionData,
    digits,
    draw_inputs,
    draw_noise,
    fashion_mnist,
    mnist1m,
    process_mnist1m,
)
from lambda_hat.targets.trials import ImagesTask

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


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()


def write_zip(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def raw_mnist1m(tmp_path):
    """Ten zips, the odd ones .npy, the even ones idx, of 110 images: image i has the pixels 0, i, 255 and label i mod 10."""
    zips = []
    for part in range(10):
        numbers = np.arange(11 * part, 11 * part + 11)
        x, y = np.zeros((11, 28, 28), np.uint8), (numbers % 10).astype(np.uint8)
        x[:, 0, 1], x[:, 27, 27] = numbers, 255
        if part % 2:
            files = {"part/images.npy": npy(x.reshape(11, 784) if part == 3 else x), "part/labels.npy": npy(y.astype(np.int64))}
        else:
            half = [("a", slice(5)), ("b", slice(5, 11))]
            files = {f"{name}-images-idx3-ubyte": idx(x[rows]) for name, rows in half}
            files |= {f"{name}-labels-idx1-ubyte": idx(y[rows]) for name, rows in half} | {"README": b"hello"}
        zips.append(write_zip(tmp_path / f"raw{part}.zip", **files))
    return zips


def test_mnist1m(raw_mnist1m, tmp_path, monkeypatch):
    """One file holds the images of all zips with their labels, each once, shuffled."""
    notes = []
    path = process_mnist1m(raw_mnist1m, tmp_path, lambda *note: notes.append(note))
    assert path == tmp_path / "mnist1m.npz"
    assert notes[-1] == (10, 10, "zips", "110 images")
    assert {file.suffix for file in tmp_path.iterdir()} == {".npz", ".zip"}  # nothing half made is left
    monkeypatch.setenv(MNIST1M_VARIABLE, str(tmp_path))
    x, y = mnist1m(110)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((110, 784), np.float32, (110,), np.int32)
    numbers = np.rint(255 * x[:, 1]).astype(int)
    assert sorted(numbers) == list(range(110))
    assert not np.array_equal(numbers, np.arange(110))
    np.testing.assert_array_equal(y, numbers % 10)
    np.testing.assert_array_equal(x[:, -1], 1)
    assert not x[:, 2:-1].any()
    few, labels = mnist1m(7)
    np.testing.assert_array_equal(few, x[:7])
    np.testing.assert_array_equal(labels, y[:7])
    again = process_mnist1m(raw_mnist1m, tmp_path / "another.npz")
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(InvalidInput, match=r"must be at most those of .*mnist1m.npz, 110; got 111. Lower n_data or n_test"):
        mnist1m(111)


def test_mnist1m_of_a_task(raw_mnist1m, tmp_path, monkeypatch):
    process_mnist1m(raw_mnist1m, tmp_path)
    monkeypatch.setenv(MNIST1M_VARIABLE, str(tmp_path))
    data = ImagesTask(dataset="mnist1m", n_data=80, n_test=30).load("float64")
    x, y = mnist1m(110)
    np.testing.assert_array_equal(np.concatenate([data.x, data.x_test]), x.astype(np.float64))
    np.testing.assert_array_equal(np.argmax(np.concatenate([data.y, data.y_test]), axis=1), y)


IMAGES, LABELS = np.zeros((3, 28, 28), np.uint8), np.arange(3, dtype=np.uint8)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images.npy": npy(IMAGES)}, r'each with another that says "labels" instead; .*holds images.npy'),
        ({}, "holds none"),
        ({"images.npy": npy(IMAGES[:, :9]), "labels.npy": npy(LABELS)}, r"images.npy is \(3, 9, 28\) of uint8"),
        ({"images.npy": npy(IMAGES / 255), "labels.npy": npy(LABELS)}, "of float64"),
        ({"images.npy": npy(IMAGES), "labels.npy": npy(LABELS[:2])}, r"labels.npy \(2,\) of uint8"),
        ({"images.npy": npy(IMAGES), "labels.npy": npy(LABELS + 9)}, "labels .*0 to 9"),
        ({"images": b"text", "labels": idx(LABELS)}, "images in .* must be an array.*neither .npy nor idx"),
        ({"images": idx(IMAGES)[:-1], "labels": idx(LABELS)}, "must be an array; it cannot be read"),
        ({"images.npy": b"text", "labels.npy": npy(LABELS)}, "must be an array; it cannot be read"),
    ],
)
def test_zips_that_are_not_mnist1m(files, message, tmp_path):
    with pytest.raises(InvalidInput, match=message):
        process_mnist1m([write_zip(tmp_path / "raw.zip", **files)], tmp_path)
    assert not (tmp_path / "mnist1m.npz").exists()


def test_mnist1m_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv(MNIST1M_VARIABLE, str(tmp_path))
    with pytest.raises(InvalidInput, match=r"found no .*mnist1m.npz.*process-mnist1m.*MNIST1M_FOLDER"):
        mnist1m(3)
    (tmp_path / "mnist1m.npz").write_bytes(b"something else")
    with pytest.raises(InvalidInput, match="must be made by `lambda-hat data process-mnist1m`; it is not"):
        mnist1m(3)
    np.savez(tmp_path / "mnist1m.npz", x=np.zeros((3, 5)), y=np.zeros(3))
    with pytest.raises(InvalidInput, match=r"x.npy is an array \(3, 5\) of float64"):
        mnist1m(3)
    with pytest.raises(InvalidInput, match="made of its raw zips; got none"):
        process_mnist1m([], tmp_path)
    with pytest.raises(InvalidInput, match=r"must be a zip; .*missing.zip cannot be read"):
        process_mnist1m([tmp_path / "missing.zip"], tmp_path)
