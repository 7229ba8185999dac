"""Where trainings ended, kept in the store beside their results: a longer training of the same course goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lambda_hat.store.arrays import pack_arrays, unpack_arrays
from lambda_hat.store.manifest import Address
from lambda_hat.store.store import Store
from lambda_hat.targets.trials.engine import End
from lambda_hat.targets.trials.spec import TrialSpec

#: The file of an artifact of trials.
FILE = "ends.npz"
#: Bytes of the ends of trials trained together, of which more are not kept: longer trainings of these begin anew.
MAX_BYTES = 2**28


class Place(NamedTuple):
    """After `step` steps a course is that of trial number `row` at the address."""

    step: int
    address: Address
    row: int


def pack_ends(ends: Sequence[End]) -> dict[str, bytes]:
    """The file of trials that were trained together; none where there is nothing to go on from, or too much."""
    if ends[0].step == 0 or sum(leaf.nbytes for end in ends for leaf in end.leaves) > MAX_BYTES:
        return {}
    named = {str(place): np.stack(of) for place, of in enumerate(zip(*(end.leaves for end in ends), strict=True))}
    return {FILE: pack_arrays({"curve": np.stack([end.curve for end in ends]), **named})}


def find_ends(store: Store, specs: Sequence[TrialSpec]) -> dict[str, Place]:
    """trial_id -> the last end in the store of a training of its course that was no longer, of trials that have one."""
    wanted: dict[str, list[TrialSpec]] = {}
    for spec in specs:
        wanted.setdefault(spec.course_id, []).append(spec)
    found: dict[str, Place] = {}
    for manifest in store.manifests(store.addresses("trials")) if specs else ():
        step = manifest.summary["end_step"] if any(file.name == FILE for file in manifest.files) else 0
        for row, course_id in enumerate(manifest.spec["course_ids"] if step else ()):
            for spec in wanted.get(course_id, ()):
                before = found.get(spec.target_id)
                if step <= spec.total_steps and (before is None or before.step < step):
                    found[spec.target_id] = Place(step, manifest.address, row)
    return found


def load_ends(store: Store, specs: Sequence[TrialSpec]) -> list[End] | None:
    """Where these trials go on, all at one step, as `train_trials` takes it; None where they begin at the start.

    Raises:
      ArtifactError: a file of ends is damaged.
    """
    places = find_ends(store, specs)
    if len(places) < len(specs) or len({place.step for place in places.values()}) > 1:
        return None
    files = {address: unpack_arrays(store.read(address, FILE)) for address in {place.address for place in places.values()}}
    ends = []
    for spec in specs:
        step, address, row = places[spec.target_id]
        arrays = files[address]
        ends.append(End(step, arrays["curve"][row], [arrays[str(place)][row] for place in range(len(arrays) - 1)]))
    return ends
