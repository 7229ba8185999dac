"""What a run records of its draws, and where an interrupted one got to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: What is recorded of every draw; each (chain, draw).
FIELDS = ("loss_difference", "loss_square", "squared_distance", "acceptance_rate", "is_divergent", "work")

#: Coordinates of u that are recorded, evenly spaced among all.
NUM_COORDINATES = 8


@dataclass(frozen=True)
class Trace:
    """Recorded draws of a run.

    draws: arrays that begin (num_chains, num_burnin_draws + num_draws, ...), in the run's dtype.
      loss_difference: L(w) - L(w*) averaged over the draw's steps, which estimates the same mean as thinned values with less
      noise; loss_square: its square averaged so. squared_distance: |u|^2 at the draw. acceptance_rate averaged, is_divergent
      counted and work (FGE) summed over the draw's steps. coordinates: up to `NUM_COORDINATES` of u, on a third axis.
      Where asked for: full_difference, L_n(w) - L_n(w*) on all the data, NaN at draws where it was not evaluated; observed,
      l_i(w) - l_i(w*) of the samples of all observables, on a third axis; and a sampler's own `extras`.
    num_burnin_draws: how many of the first draws are burn-in.
    seconds: {"compile", "sampling"}; sampling includes tuning and burn-in. A resumed run adds the time of all its parts; runs
      sampled together share theirs evenly.
    observables: the number of samples of each observable, in the order of `observed`.
    """

    draws: dict[str, np.ndarray]
    num_burnin_draws: int
    seconds: dict[str, float]
    observables: dict[str, int]

    def posterior_draws(self, name: str) -> np.ndarray:
        """Draws after burn-in, (num_chains, num_draws, ...)."""
        return self.draws[name][:, self.num_burnin_draws :]

    @property
    def fge(self) -> float:
        """Work done, in full-data gradient equivalents: of all chains, burn-in included."""
        return float(np.nansum(self.draws["work"], dtype=np.float64))


class Checkpoint(NamedTuple):
    """A run cut short: its state's leaves, the draws so far, the seconds spent, and the program that made them: the run's lane
    among those sampled with it, their number, the parts their chains were divided into, and what they observed."""

    leaves: list[np.ndarray]
    draws: dict[str, np.ndarray]
    seconds: dict[str, float]
    lane: int
    num_lanes: int
    num_parts: int
    observables: tuple[str, ...]

    @property
    def num_draws(self) -> int:
        return self.draws[FIELDS[0]].shape[1]


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Draws in a row, arrays of (run, chain, draw, ...)."""
    return {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}
