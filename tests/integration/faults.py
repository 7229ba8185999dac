"""A small sweep that is disturbed again and again; what must hold then: nothing is lost, doubled, damaged or different."""

from __future__ import annotations

import contextlib
import io
import random
import re
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace

import fsspec
from places import Place, made
from programs import NUMBERS

from lambda_hat.cli import main
from lambda_hat.store.manifest import Address, Manifest

SETTINGS = """
[store]
uri = "unused"
cache = ""
[runtime]
platform = "cpu"
compilation_cache = "{folder}/programs"

[presets.target.bowl]
family = "quadratic"
dim = 6
data = {{ n_data = 1000 }}
[presets.target.net]
family = "mlp"
model = {{ depth = 1, width = 4 }}
data = {{ n_data = 200, input_dim = 4 }}
training = {{ num_steps = 1000 }}

[presets.sampler.sgld]
kind = "sgld"
step_size = 1e-4
batch_size = 100
num_draws = 4000
num_burnin_steps = 2000
[presets.sampler.hmc]
kind = "hmc"
num_draws = 2000

[experiments.default]
sweeps = [["target=bowl", "sampler=sgld"], ["target=net", "sampler=hmc", "sampler.seed=1,2"]]
"""

#: Targets, runs and diagnoses; with their comparison, and those of fewer runs where some have failed.
TOTAL = 2 + 3 + 3


class Tally:
    """Of one kind of fault: how often it struck, how many finished artifacts it cost, what it left behind."""

    def __init__(self) -> None:
        self.points = self.lost = self.doubled = self.left = 0

    def compare(self, before: dict, after: dict) -> None:
        """Of what was finished before, nothing is missing and nothing was made again."""
        self.lost += len(before.keys() - after.keys())
        self.doubled += sum(after.get(address, how) != how for address, how in before.items())
        assert (self.lost, self.doubled) == (0, 0)


def content(published: dict[Address, Manifest]) -> dict[Address, object]:
    """Bit for bit the same in all stores: the draws, and the numbers of the table."""
    found: dict[Address, object] = {}
    for address, manifest in published.items():
        if address.kind == "run":
            found[address] = manifest.file("trace.npz").sha256
        elif address.kind == "diagnosis":
            found[address] = {name: manifest.summary[name] for name in NUMBERS if name != "run_id"}
    return found


def check_finished(place: Place, undisturbed: SimpleNamespace, tally: Tally, again: bool = True) -> None:
    """Nothing is missing, damaged or different; what `gc` names is debris, for without it all is there as before, and nothing
    else is; called again, the sweep computes nothing.
    """
    before = place.published()
    assert is_complete(before)
    assert content(before) == undisturbed.content
    named = {place.store.url(address, file.name) for address, manifest in before.items() for file in manifest.files}
    named |= {f"{place.store.uri}/{address.folder}/manifest.json" for address in before}
    left = removed(place, "--dry-run")
    assert [(path, file) for path in left for file in named if f"{file}/".startswith(f"{path}/")] == []
    assert removed(place) == left
    fs, root = fsspec.core.url_to_fs(place.store.uri, use_listings_cache=False)
    assert {fs.unstrip_protocol(path).removeprefix("file://") for path in fs.find(root)} == named
    assert command("verify", place) == f"{len(before)} artifacts checked, 0 damaged, in {place.store.uri}\n"
    tally.left += len(left)
    if again:
        rows, _ = place.finish()
        assert [row["status"] for row in rows] == ["cached"] * 3
    assert made(place.published()) == made(before)


def is_complete(published: Collection[Address]) -> bool:
    return sum(address.kind != "sweep" for address in published) == TOTAL < len(published)


def removed(place: Place, *arguments: str) -> list[str]:
    """What `gc` names."""
    return re.findall(r"removed: (.*), \d+ bytes$", command("gc", place, "--older-than", "0", *arguments), re.MULTILINE)


def command(name: str, place: Place, *arguments: str) -> str:
    """What `lambda-hat NAME` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([name, "--store", place.store.uri, "--settings", str(place.settings), *arguments]) == 0
    return out.getvalue()


def disturb(
    place: Callable[[str], Place], undisturbed: SimpleNamespace, victims: list[str], tallies: Callable[[str], Tally],
    strike: Callable[[Place, str], tuple[bool, bool]],
) -> None:  # fmt: skip
    """`strike` runs the sweep, once more, and disturbs it: whether there was time to, and whether it ended well all the same.

    One store after another, each until the sweep has ended.
    """
    stores, name = 0, re.sub(r"[^a-z0-9]+", "-", victims[-1])
    while victims:
        stores += 1
        store, kept, ended, victim = place(f"{name}-{stores}"), {}, False, ""
        while victims and not ended:
            victim = victims[-1]
            struck, ended = strike(store, victim)
            if struck:
                victims.pop()
                tallies(victim).points += 1
            finished = made(store.published())
            tallies(victim).compare(kept, finished)
            kept = finished
        if not ended:
            store.finish()
            tallies(victim).compare(kept, made(store.published()))
        check_finished(store, undisturbed, tallies(victim), again=not victims)


def runs_for(process: subprocess.Popen, seconds: float, log: Path) -> bool:
    """Whether it still runs after so long; else it has ended well."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        assert process.wait(timeout=seconds) == 0, log.read_text()[-3000:]
        return False
    return True


def ends_well(process: subprocess.Popen) -> bool:
    """What it makes of what has happened to it, given two minutes."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=120) == 0
    return False


def chosen(kills: dict[str, int], moment: random.Random) -> list[str]:
    victims = [f"kill -9: {victim}" for victim, count in kills.items() for _ in range(count)]
    moment.shuffle(victims)
    return victims
