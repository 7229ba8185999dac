"""A study: many trials as one table, and their loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lambda_hat.specs.text import number
from lambda_hat.studies.conditions import rows_where

if TYPE_CHECKING:
    import pandas as pd


class Study(NamedTuple):
    """The trials of a study.

    table: one row a trial: `trial_id`, its settings, `temperature` eta/batch_size, `samples` seen, and what was measured, NaN
    where it was not or where the trial diverged; `failure`, see `targets.trials.engine.Failure`, missing where training did
    not fail. curves: trial_id -> (steps, losses), the mean loss of the minibatches of all steps since the point before.
    target_loss: to which critical batch sizes are fitted, the same for whatever of the study is looked at; None for none.
    """

    table: pd.DataFrame
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    target_loss: float | None = None


def losses(table: pd.DataFrame) -> pd.Series:
    """What trials are compared by: their final loss, NaN of those that failed."""
    return table["final_loss"].where(table["failure"].isna())


def failures(table: pd.DataFrame) -> dict[str, int]:
    """How many trials failed in each way, the most frequent first."""
    return {str(kind): int(count) for kind, count in table["failure"].value_counts().items()}


def failed_text(counts: Mapping[str, int]) -> str:
    """How many trials failed and how, of the counts of `failures`."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{sum(counts.values())} failed: {kinds}" if counts else "none failed"


def where(study: Study, texts: Sequence[str]) -> Study:
    """The trials of which all conditions hold, see `rows_where`."""
    table = rows_where(study.table, texts).reset_index(drop=True)
    return study._replace(table=table, curves={name: study.curves[name] for name in table["trial_id"] if name in study.curves})


def settings(table: pd.DataFrame) -> list[str]:
    """The columns that were set: those between `trial_id` and `temperature`."""
    names = [str(name) for name in table]
    return names[names.index("trial_id") + 1 : names.index("temperature")]


def swept(table: pd.DataFrame) -> list[str]:
    """The settings with more than one value; without those that another determines: the number of steps where the batch size
    does, the precision where the richness does."""
    names = [name for name in settings(table) if len(distinct(table[name])) > 1]
    follows = [
        name for name, by in (("num_steps", "batch_size"), ("num_epochs", "batch_size"), ("precision", "richness"))
        if {name, by} <= set(names) and all(len(distinct(of)) == 1 for _, of in table.groupby(by)[name])
    ]  # fmt: skip
    return [name for name in names if name not in follows]


def distinct(column: pd.Series) -> list[Any]:
    """The values of a column in order, missing ones last; those that are not numbers as text."""
    return [*sorted(set(comparable(column).dropna().tolist())), *([None] if column.isna().any() else [])]


def comparable(column: pd.Series) -> pd.Series:
    """The column if it is of numbers, else its text."""
    return column if column.dtype.kind in "iuf" else column.map(str, na_action="ignore")


class Group(NamedTuple):
    """Trials that differ in the axes of a plot or fit and in the seed alone. values: their other swept settings."""

    values: dict[str, Any]
    table: pd.DataFrame

    @property
    def label(self) -> str:
        return " · ".join(f"{name.removeprefix('task.')}={number(value)}" for name, value in self.values.items())


def groups(table: pd.DataFrame, *axes: str, least: int = 2) -> list[Group]:
    """The trials by all swept settings but the axes and the seed, in order; only those of `least` values of every axis."""
    names = [name for name in swept(table) if name not in (*axes, "seed")]
    if not names:
        found = [Group({}, table)]
    else:
        keys = [comparable(table[name]) for name in names]
        found = [Group(dict(zip(names, values, strict=True)), of) for values, of in table.groupby(keys, dropna=False)]
    return [group for group in found if all(group.table[axis].nunique() >= least for axis in axes)]
