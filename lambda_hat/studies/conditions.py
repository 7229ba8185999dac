"""Conditions that choose rows of a study's table: COLUMN=VALUE,VALUE, COLUMN<VALUE, <=, >, >=."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lambda_hat.specs.overrides import Value, parse
from lambda_hat.specs.settings import nearest
from lambda_hat.specs.spec import InvalidInput

if TYPE_CHECKING:
    import pandas as pd

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_CONDITION = re.compile(r"\s*([^<>=]+?)\s*(<=|>=|<|>|=)(.*)", re.DOTALL)


def rows_where(table: pd.DataFrame, texts: Sequence[str]) -> pd.DataFrame:
    """The rows of which all conditions hold: COLUMN=VALUE[,VALUE...] as in overrides, or COLUMN<VALUE, <=, > or >=.

    Numbers are equal to nine digits; `none` is a missing value.

    Raises:
      InvalidInput: a condition is not of this form or names no column, or a number is compared with text.
    """
    for text in texts:
        found = _CONDITION.fullmatch(text)
        if found is None or not found[3].strip():
            raise InvalidInput(
                f"A condition is COLUMN=VALUE or COLUMN<VALUE, of a column of the study; got {text!r}. "
                "Write for example batch_size=16,64 or eta>=0.01."
            )
        name, sign = found[1], found[2]
        if name not in table:
            raise InvalidInput(
                f"A condition is of a column of the study; got {text!r}. {nearest(name, [str(column) for column in table])}"
            )
        values = parse(f"{name}={found[3]}").values
        if sign == "=":
            keep = np.any([_same(table[name], value) for value in values], axis=0)
        else:
            (bound, *others) = values
            if others or not isinstance(bound, int | float) or table[name].dtype.kind not in "iuf":
                raise InvalidInput(
                    f"{sign} compares a column of numbers with one number; got {text!r}. Use = for anything else."
                )
            keep = _COMPARE[sign](table[name].to_numpy(np.float64), bound)
        table = table[keep]
    return table


def _same(column: pd.Series, value: Value) -> np.ndarray:
    """Which cells of the column are the value."""
    if value is None:
        return column.isna().to_numpy()
    if isinstance(value, int | float) and column.dtype.kind in "iuf":
        return np.isclose(column.to_numpy(np.float64), value, rtol=1e-9, atol=0.0)
    return (column.map(str).str.lower() == str(value).lower()).to_numpy()
