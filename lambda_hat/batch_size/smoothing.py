"""Smoothing of loss curves whose points are means over unequal numbers of steps.

A point at step s is the mean loss of the minibatches of all steps since the point before, s'. Smoothing weighs it by their
number s - s'. A diverged curve is NaN from its first number that is not finite on; what came before is never mixed with it.
"""

from __future__ import annotations

import numpy as np

from lambda_hat.specs.spec import InvalidInput


def updates_done(steps: np.ndarray) -> np.ndarray:
    """Updates done, on average over the steps that each point stands for, when their losses were computed; (P,).

    The loss of step k is of the parameters after k - 1 updates: those of steps s' + 1 to s on average after (s' + s - 1) / 2.

    Args:
      steps: the points of a curve, rising, each at least 1, (P,).
    """
    steps = np.asarray(steps, np.float64)
    return (np.concatenate([[0.0], steps[:-1]]) + steps - 1) / 2


def smooth(steps: np.ndarray, losses: np.ndarray, window: float | None = None, relative: float | None = None) -> np.ndarray:
    """The mean loss of the steps in a window around the middle of each point's own; (P,).

    A point takes part if all its steps are in the window: where the schedule of recording jumps, from a point a step to one
    every thousand, say, short windows before it do not reach across it. At a curve's ends and at such jumps a window's wider
    side shrinks to the steps of its narrower one, since the mean over one side would be that of another time.

    Args:
      steps, losses: a loss curve, see the module, each (P,).
      window: width of the window in steps. relative: or: its width as a share of the steps done, the same everywhere on a
        logarithmic axis.

    Raises:
      InvalidInput: not exactly one width is given, or it is not positive.
    """
    if (width := window if relative is None else relative if window is None else None) is None or width <= 0:
        raise InvalidInput(
            "A window has one positive width, in steps or relative to them; "
            f"got window={window} and relative={relative}. Give one."
        )
    losses = np.asarray(losses, np.float64)
    kept = int(np.logical_and.accumulate(np.isfinite(losses)).sum())
    ends = np.asarray(steps, np.float64)[:kept]
    starts = np.concatenate([[0.0], ends])[:kept]
    middles = (starts + ends) / 2
    half = width / 2 * (middles if window is None else np.ones(kept))
    own = np.arange(kept)
    for _ in range(2):  # as wide as it may be, then as the narrower side of that
        first = np.minimum(np.searchsorted(starts, middles - half, side="left"), own)
        after = np.maximum(np.searchsorted(ends, middles + half, side="right"), own + 1)
        half = np.minimum(middles - starts[first], ends[after - 1] - middles)
    smoothed = np.full(len(losses), np.nan)
    # Differences of cumulated sums would lose digits where losses fall over many orders of magnitude.
    for i, part in enumerate(map(slice, first, after)):
        smoothed[i] = np.average(losses[part], weights=ends[part] - starts[part])
    return smoothed
