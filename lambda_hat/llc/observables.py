"""What draws say beyond the llc: free energies, the singular fluctuation, and how the losses of samples move together.

Everything here is of draws after burn-in from the chains that stayed finite (`recorded`). A covariance is taken about each
chain's own mean and pooled over the chains, so that chains which disagree do not pass for losses that move together; it is too
small by a share of about 1 / (effective draws of a chain).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lambda_hat.llc.estimates import finite_chains, mcse
from lambda_hat.llc.trace import Trace

#: Parts of a chain whose covariances are compared to find their error: each must be long against the autocorrelation.
BATCHES = 4


class Measure(NamedTuple):
    """A number and its Monte Carlo standard error, None where there are too few draws for one."""

    value: float
    mcse: float | None


class Matrix(NamedTuple):
    """Numbers and their Monte Carlo standard errors, arrays of one shape; NaN where there are too few draws for an error."""

    values: np.ndarray
    mcse: np.ndarray


def recorded(trace: Trace, name: str) -> np.ndarray | None:
    """The kept chains' draws after burn-in of an optional field, without draws at which it was not evaluated.

    Returns:
      (chains, draws, ...) in float64; None if the trace has no such field, or no chain or draw is left.
    """
    found = recorded_together(trace, name)
    return None if found is None else found[0]


def recorded_together(trace: Trace, *names: str) -> list[np.ndarray] | None:
    """Several fields, each as by `recorded`, of the same chains and at the same draws.

    A draw at which a field is NaN on every chain was not evaluated and is left out. Any other number that is not finite is a
    chain's failure: that chain is left out, since its draws that were finite are not a sample of its posterior.
    """
    if any(name not in trace.draws for name in names):
        return None
    fields = [trace.posterior_draws(name) for name in names]
    evaluated = ~np.any([np.all(np.isnan(field), axis=_but(1, field)) for field in fields], axis=0)
    fields = [field[:, evaluated] for field in fields]
    kept = finite_chains(trace) & np.all([np.all(np.isfinite(field), axis=_but(0, field)) for field in fields], axis=0)
    fields = [field[kept].astype(np.float64) for field in fields]
    return fields if all(field.size for field in fields) else None


def _but(kept: int, field: np.ndarray) -> tuple[int, ...]:
    return tuple(axis for axis in range(field.ndim) if axis != kept)


def blocks(counts: Mapping[str, int]) -> dict[str, slice]:
    """Where each observable's samples lie on the last axis of the field `observed`."""
    ends = list(itertools.accumulate(counts.values(), initial=0))
    return {name: slice(start, end) for name, (start, end) in zip(counts, itertools.pairwise(ends), strict=True)}


def block_losses(observed: np.ndarray, counts: Mapping[str, int]) -> np.ndarray:
    """L_D(w) - L_D(w*) of each observable D, (chains, draws, observables), from the losses of their samples."""
    return np.stack([np.mean(observed[:, :, part], axis=2) for part in blocks(counts).values()], axis=2)


def scaled_mean(draws: np.ndarray, factor: float) -> Measure:
    """factor E[draws], of draws (chains, draws)."""
    error = mcse(draws)
    return Measure(factor * float(np.mean(draws)), None if error is None else abs(factor) * error)


def wbic(llc: Measure, nbeta: float, num_data: int, init_loss: float) -> Measure | None:
    """WBIC = n E[L_n(w)] = n L_n(w*) + (n / nbeta) llc, in nats (Watanabe 2013).

    It approximates the free energy -log ∫ exp(-n L_n(w)) phi(w) dw of the model at temperature one to O(sqrt(log n)), phi the
    localisation's Gaussian: of a neighbourhood of w*, then. None unless nbeta = n / log n, where n / nbeta = log n.
    """
    if not math.isclose(nbeta, num_data / math.log(num_data), rel_tol=1e-6):
        return None
    factor = num_data / nbeta
    return Measure(num_data * init_loss + factor * llc.value, None if llc.mcse is None else factor * llc.mcse)


def free_energy(log_normalizer: np.ndarray, nbeta: float, init_loss: float) -> Measure:
    """F(nbeta) = -log ∫ exp(-nbeta L_n(w)) phi(w) dw = nbeta L_n(w*) - log Z, in nats, phi the localisation's Gaussian.

    Args:
      log_normalizer: each chain's log of a consistent estimate of Z = E_phi[exp(-nbeta (L_n(w) - L_n(w*)))], (chains,). It
        is not unbiased where the temperatures were chosen by the particles themselves, but nearly.

    Returns:
      The value from the chains' mean of Z, and the standard error of the mean of log Z, None for one chain.
    """
    top = float(np.max(log_normalizer))
    log_mean = top + math.log(float(np.mean(np.exp(log_normalizer - top))))
    error = float(np.std(log_normalizer, ddof=1)) / math.sqrt(len(log_normalizer)) if len(log_normalizer) > 1 else None
    return Measure(nbeta * init_loss - log_mean, error)


def free_energy_by_integration(nbeta: np.ndarray, llc: np.ndarray, errors: np.ndarray) -> Matrix:
    """F(nbeta_k) - F(nbeta_1) less (nbeta_k - nbeta_1) L_n(w*), from runs at several nbeta, by thermodynamic integration.

    dF / d nbeta = E[L_n], so the difference is ∫ E[L_n - L_n(w*)] d nbeta = ∫ llc d log nbeta: the trapezoidal rule in
    log nbeta, in which the llc of a regular model is flat.

    Args:
      nbeta: (k,), rising. llc, errors: the estimates there and their standard errors, (k,).
    """
    steps = np.diff(np.log(nbeta))
    weights = np.zeros((len(nbeta), len(nbeta)))  # of each llc in each difference
    for k, step in enumerate(steps):
        weights[k + 1 :, k] += step / 2
        weights[k + 1 :, k + 1] += step / 2
    return Matrix(weights @ llc, np.sqrt(np.square(weights) @ np.square(errors)))


def singular_fluctuation(observed: np.ndarray, nbeta: float, num_data: int) -> Measure:
    """nu(beta) = beta/2 sum_i Var_w[l_i(w)] = nbeta/2 mean_i Var_w[l_i(w)] (Watanabe 2009; d/2 for a regular realisable model).

    Args:
      observed: losses of M of the n training samples, spread over them, less those at w*, (chains, draws, M). Variances are
        taken within chains and pooled.

    Returns:
      nu, and its error: of the draws and, where M < n, of the choice of the samples.
    """
    num_draws, count = observed.shape[1:]
    squares = np.square(observed - np.mean(observed, axis=1, keepdims=True)) * (num_draws / (num_draws - 1))
    value, error = scaled_mean(np.mean(squares, axis=2), nbeta / 2)
    if error is None or count < 2:
        return Measure(value, error)
    of_samples = nbeta / 2 * float(np.std(np.mean(squares, axis=(0, 1)), ddof=1)) / math.sqrt(count)
    return Measure(value, math.hypot(error, of_samples * math.sqrt(max(0.0, 1 - count / num_data))))


def covariance(x: np.ndarray, y: np.ndarray) -> Matrix:
    """Cov[x_i, y_j] over the posterior, about each chain's own mean; errors by batch means, `BATCHES` a chain.

    Args:
      x, y: (chains, draws, a) and (chains, draws, b).

    Returns:
      Values and errors, (a, b).
    """
    chains, draws = x.shape[:2]
    x, y = (values - np.mean(values, axis=1, keepdims=True) for values in (x, y))
    values = np.einsum("cda,cdb->ab", x, y, optimize=True) / (chains * max(draws - 1, 1))
    length = draws // BATCHES
    if length < 2:
        return Matrix(values, np.full(values.shape, np.nan))
    parts = [slice(start, start + length) for start in range(0, length * BATCHES, length)]
    means = np.array([x[c, part].T @ y[c, part] / length for c in range(chains) for part in parts])
    return Matrix(values, np.std(means, axis=0, ddof=1) / math.sqrt(len(means)))


def influence(observed: np.ndarray) -> Matrix:
    """Bayesian influence BIF(i, j) = -Cov_w[l_i, l_j] in nats^2 (Kreer et al. 2025, arXiv 2509.26544).

    It is d E[l_j] / d beta_i, where the posterior's exponent is -sum_i beta_i l_i(w): how giving sample i more weight changes
    the expected loss of sample j, at the run's temperature and localisation. Negative: training on i helps j. Per unit of
    relative weight it is multiplied by beta = nbeta / n.

    Args:
      observed: losses, (chains, draws, M); means of blocks of samples give the influence of the blocks.

    Returns:
      (M, M), symmetric.
    """
    values, errors = covariance(observed, observed)
    return Matrix(-values, errors)


def susceptibilities(loss_difference: np.ndarray, observed: np.ndarray) -> Matrix:
    """chi_D = (1/nbeta) d E[phi] / dh = -Cov_w[phi, L_D - L_n] in nats^2 (Baker et al. 2025, arXiv 2504.18274).

    The training loss L_n is mixed with the loss on D, L_n + h (L_D - L_n), and phi = L_n(w) - L_n(w*) on the posterior of the
    run. A component of the network (a layer, a head) has a susceptibility of its own: that of a run whose
    `posterior.parameters` leave the others at w*. Positive: with more of D among the training data, the component's loss on
    the present ones rises; per unit h, E[phi] changes by nbeta chi.

    phi must be of all n samples and of the draw itself. From a part of M samples, -Cov[L_M, L_D - L_M] holds all of the
    variance of L_M, which their choice raises above that of L_n: a positive offset, the same for every D. From phi, the value
    is the definition's; where D is a sample of a larger set, its expectation over that choice is the set's susceptibility.

    Args:
      loss_difference: phi, (chains, draws). observed: L_D(w) - L_D(w*) of K datasets, or of K samples, at the same draws,
        (chains, draws, K).

    Returns:
      (K,).
    """
    phi = loss_difference[:, :, None]
    values, errors = covariance(phi, observed - phi)
    return Matrix(-values[0], errors[0])
