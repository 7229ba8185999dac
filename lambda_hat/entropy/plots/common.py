"""What the plots of entropy studies share: how policies and measurements are named, and colours by reward and advantage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lambda_hat.entropy.study import EntropyStudy, Measured, PolicyTraining, differing, measurement_settings, policy_settings
from lambda_hat.specs.text import number
from lambda_hat.studies.style import COLORS, EXACT
from lambda_hat.targets.policies.spec import PolicySpec

#: Panels of a figure and lines of a panel that can still be told apart; of more, evenly spaced ones are shown.
MAX_PANELS, MAX_LINES = 9, 6
#: Why most plots cannot be drawn of a study without measurements.
NO_MEASUREMENT = "it needs a measurement"

#: Letters of a prompt or a completion in a plot.
MAX_LETTERS = 12
#: Beyond these are letters that the font may not have.
LAST_LETTER = "\N{LATIN SMALL LETTER EZH}"

#: Of a sequence's sign of advantage, and of its reward: name, colour, marker.
RAISED, LOWERED, NEITHER = (COLORS[0], "o"), (COLORS[1], "^"), (EXACT, ".")
BY_ADVANTAGE = (("advantage > 0", RAISED), ("advantage < 0", LOWERED), ("advantage = 0", NEITHER))
BY_REWARD = ((True, "correct", RAISED), (False, "incorrect", LOWERED))


class View(NamedTuple):
    """A measurement with one of its evaluation batches."""

    measured: Measured
    batch: int

    @property
    def changes(self) -> pd.DataFrame:
        """Of this batch, by eta."""
        changes = self.measured.changes
        return changes[changes["evaluation"] == self.batch].sort_values("eta")

    @property
    def found(self) -> Mapping[str, Any]:
        return self.measured.summary["evaluations"][self.batch]


class Policies(NamedTuple):
    """Policies that differ in nothing but their seed."""

    label: str
    trainings: list[PolicyTraining]


def views(study: EntropyStudy) -> list[View]:
    return [View(measured, batch) for measured in study.measured for batch in range(len(measured.matrices))]


def by_setting(study: EntropyStudy) -> list[Policies]:
    """The study's policies that have been trained by rewards, those of several seeds together."""
    trainings = [training for training in study.policies.values() if len(training.history.get("accuracy", ()))]
    varied = [
        name for name in differing(map(policy_settings, (training.spec for training in trainings))) if name != "policy seed"
    ]
    found: dict[str, list[PolicyTraining]] = {}
    for training in trainings:
        found.setdefault(_written(policy_settings(training.spec), varied), []).append(training)
    return [Policies(label, of) for label, of in found.items()]


def label(study: EntropyStudy, view: View | Measured) -> str:
    """Where something was measured: what sets it apart from the study's other measurements, its id if nothing else does."""
    measured = view if isinstance(view, Measured) else view.measured
    names = differing(measurement_settings(other.spec) for other in study.measured)
    others = [other.spec for other in study.measured if other.entropy_id != measured.entropy_id]
    own, step = _written(measurement_settings(measured.spec), names), measured.spec.target.checkpoint
    alike = any(spec.target.checkpoint == step and _written(measurement_settings(spec), names) == own for spec in others)
    parts = [own, measured.entropy_id if alike else "", f"update {step}"]
    if isinstance(view, View) and len(measured.matrices) > 1:
        parts.append(f"evaluation {view.batch}")
    return " · ".join(filter(None, parts))


def common(study: EntropyStudy) -> str:
    """What all measurements, or else all policies, have in common."""
    names = ("task.kind", "task.modulus", "model.num_layers", "model.width", "learning_rate")
    fields = [policy_settings(spec) for spec in _policies(study)]
    sizes = {f"N_U={len(of.update)}" for of in study.measured}, {f"N_E={len(m)}" for of in study.measured for m in of.matrices}
    shared = [key for key in names if len({str(of.get(key)) for of in fields}) == 1 and fields[0].get(key) is not None]
    texts = [str(fields[0][key]) if key == "task.kind" else f"{key.split('.')[-1]}={number(fields[0][key])}" for key in shared]
    return " · ".join([*texts, *(size for found in sizes if len(found) == 1 for size in found)])


def entropy_label(study: EntropyStudy, of: str) -> str:
    """An entropy and its unit."""
    return f"{of} ({unit(study)})"


def unit(study: EntropyStudy) -> str:
    """Of the entropy."""
    return "nats a token" if {measured.spec.integrand for measured in study.measured} == {"entropy_per_token"} else "nats"


def rate_label(study: EntropyStudy, of: str = "dH/dη") -> str:
    """A rate of change of the entropy and its unit."""
    return f"{of} ({unit(study)} per unit η)"


def by_advantage(ax: Axes, sequences: pd.DataFrame, x: np.ndarray, y: np.ndarray, error: np.ndarray) -> None:
    """Points with error bars, told apart by the sign of the advantage."""
    sign = np.sign(sequences["advantage"].to_numpy())
    for (called, (color, marker)), of in zip(BY_ADVANTAGE, (1, -1, 0), strict=True):
        here = sign == of
        if here.any():
            ax.errorbar(
                x[here], y[here], error[here], fmt=marker, color=color, markersize=4, elinewidth=0.7, alpha=0.8, label=called
            )


def plain(text: str, most: int = MAX_LETTERS) -> str:
    """A text as a label: in one line, in letters that the font has, and not long."""
    line = "".join(c if c.isprintable() and c <= LAST_LETTER else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def _policies(study: EntropyStudy) -> list[PolicySpec]:
    return [measured.spec.target for measured in study.measured] + [training.spec for training in study.policies.values()]


def _written(fields: Mapping[str, Any], names: Iterable[str]) -> str:
    return " · ".join(f"{name}={number(fields.get(name))}" for name in names)
