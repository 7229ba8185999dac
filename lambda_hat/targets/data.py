"""Datasets: inputs and labels, drawn or loaded, as arrays in the target's dtype."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.target import DataSpec

Inputs = Literal["gauss_iso", "gauss_aniso", "mixture", "lowdim_manifold", "heavy_tail"]
Noise = Literal["gauss", "hetero", "student_t", "outliers"]


def normal(seed: tuple[int, int], shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Independent normal samples of standard deviation `scale`, float64 (PCG64).

    Args:
      seed: the target's seed and a number that tells its streams apart, so that no two targets share samples.
    """
    return scale * np.random.default_rng(seed).standard_normal(shape)


class RegressionData(DataSpec):
    """Inputs x and label noise of a regression; labels are f(x) + noise with the target's own f."""

    input_dim: int = Field(8, ge=1, description="dimension of the inputs")
    output_dim: int = Field(1, ge=1, description="dimension of the outputs")
    inputs: Inputs = Field("gauss_iso", description="distribution of the inputs")
    cov_decay: float = Field(0.8, gt=0, le=1, description="of gauss_aniso: the variance of coordinate i is cov_decay^i")
    num_components: int = Field(4, ge=1, description="of mixture: unit Gaussians around this many centres")
    separation: float = Field(3.0, ge=0, description="of mixture: the centres are N(0, separation^2 I)")
    manifold_dim: int = Field(2, ge=1, description="of lowdim_manifold: dimension of the random subspace the inputs lie in")
    tail_df: float = Field(4.0, gt=2, description="of heavy_tail: degrees of freedom of Student's t, at unit variance")
    noise: Noise = Field("gauss", description="distribution of the label noise")
    noise_scale: float = Field(0.1, ge=0, description="standard deviation of the label noise (outliers: of the other samples)")
    noise_df: float = Field(4.0, gt=2, description="of student_t: degrees of freedom")
    outlier_fraction: float = Field(0.05, gt=0, lt=1, description="of outliers: share of the samples")
    outlier_scale: float = Field(10.0, ge=1, description="of outliers: their noise over the others'")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        owners = {
            "cov_decay": "gauss_aniso", "num_components": "mixture", "separation": "mixture", "manifold_dim": "lowdim_manifold",
            "tail_df": "heavy_tail", "noise_df": "student_t", "outlier_fraction": "outliers", "outlier_scale": "outliers",
        }  # fmt: skip
        for name, owner in owners.items():
            value = getattr(self, name)
            if owner not in (self.inputs, self.noise) and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a field of {owner}; got {value} with inputs={self.inputs} and noise={self.noise}")
        if self.inputs == "lowdim_manifold" and self.manifold_dim > self.input_dim:
            raise ValueError(f"manifold_dim must be at most input_dim, {self.input_dim}; got {self.manifold_dim}")
        return self


def draw_inputs(spec: RegressionData, seed: int, stream: int, num_samples: int) -> np.ndarray:
    """Inputs of the regression, (num_samples, input_dim), float64.

    The mixture's centres and the subspace depend on `seed` alone; the samples on `seed` and `stream` (0 or 1).
      gauss_iso: N(0, I).  gauss_aniso: N(0, diag(cov_decay^i)), i = 0, 1, ...
      mixture: a centre drawn uniformly, plus N(0, I).
      lowdim_manifold: A z with z ~ N(0, I) of manifold_dim, A's columns orthogonal, so long that |x|^2 averages input_dim.
      heavy_tail: each coordinate Student's t, scaled to unit variance.
    """
    shape = (num_samples, spec.input_dim)
    rng = np.random.default_rng((seed, 2 * stream))
    fixed = np.random.default_rng((seed, 4))
    match spec.inputs:
        case "gauss_iso":
            return rng.standard_normal(shape)
        case "gauss_aniso":
            return rng.standard_normal(shape) * np.sqrt(spec.cov_decay ** np.arange(spec.input_dim))
        case "mixture":
            centres = spec.separation * fixed.standard_normal((spec.num_components, spec.input_dim))
            return centres[rng.integers(spec.num_components, size=num_samples)] + rng.standard_normal(shape)
        case "lowdim_manifold":
            basis, _ = np.linalg.qr(fixed.standard_normal((spec.input_dim, spec.manifold_dim)))
            z = rng.standard_normal((num_samples, spec.manifold_dim))
            return np.sqrt(spec.input_dim / spec.manifold_dim) * z @ basis.T
        case "heavy_tail":
            return rng.standard_t(spec.tail_df, shape) * np.sqrt(1 - 2 / spec.tail_df)


def draw_noise(spec: RegressionData, seed: int, stream: int, x: np.ndarray) -> np.ndarray:
    """Label noise of the samples x, (num_samples, output_dim), float64.

    gauss: N(0, noise_scale^2).  hetero: N(0, noise_scale^2 |x|^2 / input_dim), wider for inputs far from 0.
    student_t: noise_scale times Student's t scaled to unit variance.
    outliers: N(0, noise_scale^2), of a random outlier_fraction of the samples outlier_scale times as wide.
    """
    shape = (len(x), spec.output_dim)
    rng = np.random.default_rng((seed, 2 * stream + 1))
    match spec.noise:
        case "gauss":
            unit = rng.standard_normal(shape)
        case "hetero":
            unit = rng.standard_normal(shape) * np.sqrt(np.mean(np.square(x), axis=1, keepdims=True))
        case "student_t":
            unit = rng.standard_t(spec.noise_df, shape) * np.sqrt(1 - 2 / spec.noise_df)
        case "outliers":
            is_outlier = rng.random((len(x), 1)) < spec.outlier_fraction
            unit = rng.standard_normal(shape) * np.where(is_outlier, spec.outlier_scale, 1.0)
    return spec.noise_scale * unit


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled handwritten digits, shuffled: x (1797, 64), pixels scaled to [0, 1]; y (1797,), int32."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    return x[order] / 16.0, y[order].astype(np.int32)


#: Names a folder with Fashion-MNIST's files, where they are not Debian's.
FASHION_MNIST_VARIABLE = "FASHION_MNIST_FOLDER"
_FASHION_MNIST = {  # SHA-256 of the uncompressed files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def fashion_mnist(part: Literal["train", "t10k"]) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST (arXiv 1708.07747), in its own order: x (n, 784), pixels scaled to [0, 1], float32; y (n,), int32.

    Args:
      part: train, 60,000 images, or t10k, 10,000.

    Raises:
      InvalidInput: a file is not there, or is not Fashion-MNIST's.
    """
    images, labels = (_idx(f"{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784)
    return x.astype(np.float32) / 255, np.frombuffer(labels, np.uint8, offset=8).astype(np.int32)


def check_fashion_mnist() -> None:
    """Raises InvalidInput where one of Fashion-MNIST's files is not there, or is not its own."""
    for name in _FASHION_MNIST:
        _idx(name)


def _idx(name: str) -> bytes:
    folder = Path(os.environ.get(FASHION_MNIST_VARIABLE, "/usr/share/datasets/fashion-mnist"))
    path = folder / f"{name}.gz"
    if not path.is_file():
        raise InvalidInput(
            f"Fashion-MNIST's four .gz files must be in one folder; found no {path}. "
            "`apt-get install dataset-fashion-mnist` installs them; if they are elsewhere, name the folder in the "
            f"environment variable {FASHION_MNIST_VARIABLE}."
        )
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path} must be a whole .gz file that can be read; {error}. Install the file again.") from error
    if hashlib.sha256(content).hexdigest() != _FASHION_MNIST[name]:
        raise InvalidInput(f"{path} must be Fashion-MNIST's, but its content is another's. Install the file again.")
    return content


#: Names the folder of mnist1m.npz, which `process_mnist1m` makes.
MNIST1M_VARIABLE = "MNIST1M_FOLDER"
MNIST1M_FILE = "mnist1m.npz"


def process_mnist1m(zips: Sequence[Path], output: Path, progress: Progress = no_progress) -> Path:
    """Makes one file of MNIST-1M's raw zips, images of 28x28 pixels in ten classes, all in memory: 784 bytes an image.

    A zip holds one or more pairs of files, in any folders, images and labels, of one name but for the words "images" and
    "labels": "train-images.npy" with "train-labels.npy", or "images-idx3-ubyte" with "labels-idx1-ubyte". Images are unsigned
    bytes, (n, 28, 28) or (n, 784); labels (n,), 0 to 9; both .npy or the idx format of MNIST.

    Args:
      output: a folder, in which the file is called `MNIST1M_FILE`, or the file itself.
      progress: receives the zips read.

    Returns:
      The path of the file: compressed, `x` (n, 784) and `y` (n,), uint8, the images of all zips shuffled, so that its first m
      are a sample of all of them; the same for the same zips in the same order. It appears only when it is whole.

    Raises:
      OSError: the file cannot be written.
      InvalidInput: a zip is not there, or does not hold what it must.
    """
    if not zips:
        raise InvalidInput("MNIST-1M is made of its raw zips; got none. Name them all.")
    made = output / MNIST1M_FILE if output.is_dir() else output
    unfinished = made.with_name(f".{made.name}.tmp")
    unfinished.open("wb").close()  # before all the reading
    unfinished.unlink()
    images, labels = [], []
    for done, path in enumerate(zips, 1):
        for x, y in _mnist1m_pairs(Path(path)):
            images.append(x)
            labels.append(y)
        progress(done, len(zips), "zips", f"{sum(map(len, labels))} images")
    order = np.random.default_rng(0).permutation(sum(map(len, labels)))
    with unfinished.open("wb") as file:
        np.savez_compressed(file, x=np.concatenate(images)[order], y=np.concatenate(labels)[order])
    return unfinished.replace(made)


def mnist1m(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n images of MNIST-1M as `process_mnist1m` shuffled them: x (n, 784), pixels in [0, 1], float32; y (n,), int32.

    Raises:
      InvalidInput: the file is not in the folder that the environment variable MNIST1M_FOLDER names, or not made by
        `process_mnist1m`, or holds fewer.
    """
    path = Path(os.environ.get(MNIST1M_VARIABLE, "")) / MNIST1M_FILE
    if not path.is_file():
        raise InvalidInput(
            f"MNIST-1M must be in one file, {MNIST1M_FILE}; found no {path}. Make it of the raw zips with `lambda-hat data "
            f"process-mnist1m`, and name its folder in the environment variable {MNIST1M_VARIABLE}."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            (x, total), (y, _) = (_head(archive, f"{name}.npy", n) for name in "xy")
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InvalidInput(
            f"{path} must be made by `lambda-hat data process-mnist1m`; it is not: {error}. Make it again."
        ) from error
    if n > total:
        raise InvalidInput(f"The images asked for must be at most those of {path}, {total}; got {n}. Lower n_data or n_test.")
    return x.reshape(n, 784).astype(np.float32) / np.float32(255), y.astype(np.int32)


def _head(archive: zipfile.ZipFile, name: str, n: int) -> tuple[np.ndarray, int]:
    """The first n rows of an array of bytes in an archive, without reading the others, and the number of all rows."""
    with archive.open(name) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or shape[1:] not in ((784,), ()):
            raise ValueError(f"{name} is an array {shape} of {dtype}")
        rows = min(n, shape[0])
        content = file.read(rows * math.prod(shape[1:]))
    return np.frombuffer(content, np.uint8).reshape(rows, *shape[1:]), shape[0]


def _mnist1m_pairs(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images, (n, 784), and labels, (n,), uint8, of the zip's pairs of files, in the order of their names."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"Each of MNIST-1M's raw files must be a zip; {path} cannot be read: {error}. Get it again."
        ) from error
    with archive:
        members = {PurePosixPath(name).name: name for name in sorted(archive.namelist())}
        pairs = {name: name.replace("images", "labels").replace("idx3", "idx1") for name in members if "images" in name}
        if not pairs or not set(pairs.values()) <= set(members):
            raise InvalidInput(
                'A zip of MNIST-1M must hold files with "images" in their names, each with another that says "labels" '
                f"instead; {path} holds {', '.join(list(members)[:5]) or 'none'}. Name the raw zips, or rename the files."
            )
        for images, labels in pairs.items():
            x, y = (_raw_array(path, archive, members[name]) for name in (images, labels))
            if x.dtype != np.uint8 or x.shape[1:] not in ((28, 28), (784,)) or y.shape != x.shape[:1] or np.any(y > 9):
                raise InvalidInput(
                    "Images of MNIST-1M must be unsigned bytes, (n, 28, 28) or (n, 784), and labels (n,), 0 to 9; in "
                    f"{path}, {images} is {x.shape} of {x.dtype} and {labels} {y.shape} of {y.dtype}. Get the zip again."
                )
            yield x.reshape(-1, 784), y.astype(np.uint8)


def _raw_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array in .npy or of bytes in MNIST's idx format: 0, 0, 8, the number of axes, their lengths in 4 bytes each."""
    try:
        content = archive.read(name)
        if name.endswith(".npy"):
            return np.load(io.BytesIO(content), allow_pickle=False)
        if content[:3] != b"\0\0\x08":
            raise ValueError("it is neither .npy nor idx of unsigned bytes")
        start = 4 + 4 * content[3]
        return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], ">u4"))
    except (ValueError, IndexError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{name} in {path} must be an array; it cannot be read: {error}. Get the zip again.") from error
