"""The trade of steps for samples in a study: what batch sizes take to a target loss, and the critical batch size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from lambda_hat.batch_size.critical import CriticalBatchSize, Curve, critical_batch_size, steps_to_target
from lambda_hat.batch_size.smoothing import smooth
from lambda_hat.batch_size.study import Study, groups, losses

#: The share of batch sizes that reach the target loss, and the fewest that say anything.
REACHING, MIN_SIZES = 0.75, 3
#: The window over which loss curves are smoothed before they are compared, as a share of the steps done.
WINDOW = 0.2


class Trade(NamedTuple):
    """Steps for samples in one setting.

    table: of each batch size and seed the trial that needs the fewest `steps`, and whether its learning rate is `at_end` of
    those tried. noise_scale: the gradient noise scale at the end of these trials, their median.
    """

    label: str
    table: pd.DataFrame
    fit: CriticalBatchSize | None
    noise_scale: float | None


def default_target(table: pd.DataFrame) -> float | None:
    """The lowest loss that the share `REACHING` of the batch sizes reach at their best learning rates, median over the seeds;
    of several settings, that of the worst. None where no setting has three batch sizes.

    Args:
      table: of all trials of a study. A selection of them would be compared at another loss.
    """
    tables = [group.table for group in groups(table, "batch_size", "eta", least=1)]
    best = [losses(of).groupby([of["batch_size"], of["seed"]]).min().groupby("batch_size").median() for of in tables]
    known = [of.dropna() for of in best if of.notna().sum() >= MIN_SIZES]
    return max((float(of.quantile(REACHING, "higher")) for of in known), default=None)


def trades(study: Study) -> list[Trade]:
    """What the study's target loss takes in each setting in which three batch sizes reach it."""
    needed: list[Trade] = []
    if study.target_loss is None:
        return needed
    for group in groups(study.table, "batch_size", "eta", least=1):
        table = _fewest(group.table, study.curves, study.target_loss)
        if table["batch_size"].nunique() >= MIN_SIZES:
            fit = critical_batch_size(table["batch_size"].to_numpy(), table["steps"].to_numpy())
            noise = table["gradient_noise_scale"] if "gradient_noise_scale" in table else pd.Series(dtype=float)
            noise = noise[np.isfinite(noise) & (noise > 0)]
            needed.append(Trade(group.label, table, fit, float(noise.median()) if len(noise) else None))
    return needed


def _fewest(table: pd.DataFrame, curves: dict[str, Curve], target: float) -> pd.DataFrame:
    """Of each batch size and seed the trial that needs the fewest `steps`, and whether its learning rate is `at_end`."""
    rates = table.groupby("batch_size")["eta"]
    timed = table.assign(at_end=(table["eta"] == rates.transform("min")) | (table["eta"] == rates.transform("max")))
    # Of trials that are below the target in the end: a noisy curve dips below losses that the trial has not reached.
    timed = timed[(losses(timed) <= target) & timed["trial_id"].isin(curves)]
    steps = []
    for name, num_steps in zip(timed["trial_id"], timed["num_steps"], strict=True):
        at, curve = curves[name]
        taken = steps_to_target((at, smooth(at, curve, relative=WINDOW)), target)
        steps.append(num_steps if taken is None else taken)
    timed = timed.assign(steps=np.array(steps, np.float64))
    timed = timed[timed["steps"] > 0]
    return timed.loc[timed.groupby(["batch_size", "seed"])["steps"].idxmin()]


def smoothed(study: Study, table: pd.DataFrame) -> list[tuple[float, Curve]]:
    """The batch size and the smoothed loss curve of each of these trials that has one, as `collapse` takes them; NaN where it
    failed."""
    curves = []
    for size, name, failure in zip(table["batch_size"], table["trial_id"], table["failure"], strict=True):
        if name in study.curves:
            steps, curve = study.curves[name]
            whole = smooth(steps, curve, relative=WINDOW) if pd.isna(failure) else np.full(len(steps), np.nan)
            curves.append((float(size), (steps, whole)))
    return curves
