"""Changes of the entropy at a finite eta by self-normalised importance sampling, with what tells whether to trust them.

Weights are of whole sequences, logarithms are natural, and all of it is in float64 on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: Quantiles of log-weights that are reported.
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
#: Resamples of the bootstrap.
NUM_BOOTSTRAP = 200


class Evaluation(NamedTuple):
    """Of each sequence under each of K policies: the log-probability of its completion, and h; (K, N) in float64."""

    logp_KN: np.ndarray
    h_KN: np.ndarray


class Snis(NamedTuple):
    """Estimates of K changes of the entropy, each (K,), and how far to trust them.

    contributions_KN: w_i h'_i - h_i / N with normalised weights; they sum to `change`. jackknife_error, bootstrap_error:
    standard errors over the sequences. ess: 1 / sum w^2, of N. clip_fraction: sequences whose log-weight was clipped.
    log_weight_quantiles: (K, 5), before clipping, at `QUANTILES`.
    """

    change: np.ndarray
    jackknife_error: np.ndarray
    bootstrap_error: np.ndarray
    ess: np.ndarray
    clip_fraction: np.ndarray
    log_weight_quantiles: np.ndarray
    contributions_KN: np.ndarray


def snis(
    base: Evaluation, there: Evaluation, clip: float | None = None, seed: int = 0, reference: Evaluation | None = None
) -> Snis:
    """H(there) - H(base) by self-normalised importance sampling, sum_i w_i h'_i - mean_i h_i with w_i ~ pi'(x_i) / pi(x_i).

    The sequences are independent draws from the base policy. The estimate is biased by O(1/ESS). Both standard errors are of
    the whole estimate, the difference included: errors scale with eta like the change itself, so that a straight line over eta
    says nothing of them.

    Args:
      base: of one policy, the first of what is given. there: of K policies, on the same sequences.
      clip: log-weights are cut to +- this; it biases the estimate. none = none.
      seed: of the bootstrap.
      reference: H(there) - H(reference) instead, both by weights; of one policy.
    """
    reference = base if reference is None else reference
    raw = there.logp_KN - base.logp_KN[:1]
    reference_raw = reference.logp_KN[:1] - base.logp_KN[:1]
    bound = np.inf if clip is None else clip
    log_weights = np.clip(raw, -bound, bound)
    weights, normalized = _weights(log_weights)
    reference_weights, reference_normalized = _weights(np.clip(reference_raw, -bound, bound))
    h, reference_h = there.h_KN, reference.h_KN[:1]
    # Written with differences, so that the same policy gives exactly 0.
    contributions = normalized * (h - reference_h) + (normalized - reference_normalized) * reference_h
    size = h.shape[1]
    left_out = _left_out(weights, h) - _left_out(reference_weights, reference_h)
    spread = left_out - np.mean(left_out, axis=1, keepdims=True)
    # How often each sequence is in each resample; Poisson instead of multinomial counts, of which ratios know no difference.
    counts = np.random.default_rng(seed).poisson(1.0, (size, NUM_BOOTSTRAP)).astype(np.float64)
    resampled = ((weights * h) @ counts) / (weights @ counts)
    resampled = resampled - ((reference_weights * reference_h) @ counts) / (reference_weights @ counts)
    return Snis(
        np.sum(contributions, axis=1),
        np.sqrt((size - 1) / size * np.sum(np.square(spread), axis=1)),
        np.std(resampled, axis=1, ddof=1),
        1 / np.sum(np.square(normalized), axis=1),
        np.mean(raw != log_weights, axis=1),
        np.quantile(raw, QUANTILES, axis=1).T,
        contributions,
    )


def _weights(log_weights_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights up to a factor, the largest being 1, and weights that sum to 1."""
    weights = np.exp(log_weights_KN - np.max(log_weights_KN, axis=1, keepdims=True))
    return weights, weights / np.sum(weights, axis=1, keepdims=True)


def _left_out(weights_KN: np.ndarray, h_KN: np.ndarray) -> np.ndarray:
    """The weighted means without each of the sequences; not finite without one that has all the weight."""
    weighted = weights_KN * h_KN
    with np.errstate(divide="ignore", invalid="ignore"):
        return (np.sum(weighted, axis=1, keepdims=True) - weighted) / (np.sum(weights_KN, axis=1, keepdims=True) - weights_KN)
