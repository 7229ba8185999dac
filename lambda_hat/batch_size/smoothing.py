"""Smoothing of loss curves whose points are means over unequal numbers of steps.

A point at step s is the mean loss of the minibatches of all steps since the point before, s'. Smoothing weighs it by their
number s - s'. A diverged curve is NaN from its first number that is not finite on; what came before is never mixed with it.
Windows are centred, and shrink towards the ends of a curve to stay so: evenly spaced points on a straight line are not changed.
"""

from __future__ import annotations

import numpy as np

from lambda_hat.spec import InvalidInput

#: Consecutive points whose numbers of steps differ by more than this factor belong to different schedules of recording.
JUMP = 4.0


def updates_done(steps: np.ndarray) -> np.ndarray:
    """Updates done, on average over the steps that each point stands for, when their losses were computed; (P,).

    The loss of step k is of the parameters after k - 1 updates: those of steps s' + 1 to s on average after (s' + s - 1) / 2.

    Args:
      steps: the points of a curve, rising, each at least 1, (P,).
    """
    steps = np.asarray(steps, np.float64)
    return (np.concatenate([[0.0], steps[:-1]]) + steps - 1) / 2


def moving_average(losses: np.ndarray, num_points: int) -> np.ndarray:
    """The mean of each point and its neighbours, at most `num_points` in all, each with the same weight; (P,)."""
    if num_points < 1:
        raise InvalidInput(f"A moving average is over at least 1 point; got num_points={num_points}. Give a positive number.")
    losses = _until_divergence(losses)
    where, half = np.arange(len(losses), dtype=np.float64), np.full(len(losses), (num_points - 1) / 2)
    return _window_mean(where, losses, np.ones(len(losses)), half)


def smooth(steps: np.ndarray, losses: np.ndarray, window: float | None = None, relative: float | None = None) -> np.ndarray:
    """The mean loss of the steps in a window around each point, never across a jump in the schedule of recording; (P,).

    Args:
      steps, losses: a loss curve, see the module, each (P,). Where consecutive points stand for numbers of steps that differ
        more than fourfold, the schedule jumps, and the parts on both sides are smoothed apart.
      window: width of the window in steps. relative: or: its width as a share of the steps done, the same everywhere on a
        logarithmic axis.
    """
    losses, counts = _until_divergence(losses), np.diff(np.asarray(steps, np.float64), prepend=0.0)
    where = updates_done(steps)
    if window is not None and relative is None:
        half = np.full(len(where), window / 2)
    elif relative is not None and window is None:
        half = relative / 2 * where
    else:
        raise InvalidInput(
            f"A window has one width, in steps or relative to them; got window={window} and relative={relative}. Give one."
        )
    growth = counts[1:] / counts[:-1]
    borders = np.flatnonzero((growth > JUMP) | (growth < 1 / JUMP)) + 1
    parts = [np.split(values, borders) for values in (where, losses, counts, half)]
    return np.concatenate([_window_mean(*part) for part in zip(*parts, strict=True)])


def _until_divergence(losses: np.ndarray) -> np.ndarray:
    """The losses in float64, NaN from the first on that is not finite."""
    losses = np.asarray(losses, np.float64)
    return np.where(np.logical_and.accumulate(np.isfinite(losses)), losses, np.nan)


def _window_mean(where: np.ndarray, values: np.ndarray, weights: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Weighted means of the finite values within `half` of each place, or of less where the nearer end is; all (P,)."""
    smoothed, kept = np.full(len(values), np.nan), int(np.isfinite(values).sum())
    if not kept:
        return smoothed
    where, weights, half = where[:kept], weights[:kept], half[:kept]
    half = np.minimum(half, np.minimum(where - where[0], where[-1] - where))
    first = np.searchsorted(where, where - half, side="left")
    end = np.searchsorted(where, where + half, side="right")
    # Differences of cumulated sums lose digits where losses fall over many orders of magnitude; sums of slices do not.
    for i, (a, b) in enumerate(zip(first, end, strict=True)):
        smoothed[i] = np.average(values[a:b], weights=weights[a:b])
    return smoothed
