"""A sweep killed with SIGKILL, its server with it, again and again, ends with the numbers of one that was never disturbed."""

import re
import signal
from pathlib import Path

import pytest
from places import Place, made, processes
from programs import NUMBERS, wait_for

from flows.progress import STOPPED
from lambda_hat import artifacts, report
from lambda_hat.cli import main
from lambda_hat.manifest import Address, diagnosis_address, run_address
from lambda_hat.plan import make_plan
from lambda_hat.run import RunSpec, labels
from lambda_hat.settings import load_settings
from lambda_hat.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes left behind in /proc"),
]

# Every run takes a second or more, so that a kill finds it at work.
SETTINGS = """
[store]
uri = "unused"
[runtime]
platform = "cpu"
compilation_cache = "{folder}/programs"
progress_seconds = 1e-9

[presets.target.bowl]
family = "quadratic"
dim = 6
data = {{ n_data = 1000 }}
[presets.target.net]
family = "mlp"
model = {{ depth = 1, width = 4 }}
data = {{ n_data = 500, input_dim = 4 }}
training = {{ num_steps = 20000 }}

[presets.sampler.sgld]
kind = "sgld"
step_size = 1e-4
batch_size = 128
num_draws = 6000
num_burnin_steps = 2000
num_steps_bw_draws = 10
[presets.sampler.hmc]
kind = "hmc"
num_draws = 4000
[presets.sampler.mclmc]
kind = "mclmc"
num_draws = 5000

[experiments.default]
sweeps = [["target=bowl,net", "sampler=sgld,hmc,mclmc"]]
"""

CHECKPOINTS = "targets/*/runs/*/checkpoint"


def share_done(store: Store, spec: RunSpec) -> float:
    """The share of a run's draws in its checkpoint."""
    checkpoint = artifacts._load_checkpoint(store, run_address(spec.target_id, spec.run_id))
    if checkpoint is None:
        return 0.0
    return checkpoint.draws["loss_difference"].shape[1] / (spec.sampler.num_burnin_draws + spec.sampler.num_draws)


def first_percent(log: str, label: tuple[str, str]) -> int | None:
    """Where a run's first line of progress is; None if it has none."""
    found = re.search(rf"'sample {' by '.join(label)}' - [█░]+ +(\d+) % of", log)
    return None if found is None else int(found[1])


def test_killed_sweeps_end_as_undisturbed_ones(tmp_path, capsys):
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS.format(folder=tmp_path))
    specs = make_plan(load_settings(settings))
    assert len(specs) == 6
    undisturbed, killed = (Place(tmp_path, name, settings) for name in ("undisturbed", "killed"))
    rows, log = undisturbed.finish()
    assert [row["status"] for row in rows] == ["computed"] * 6
    names = labels(specs)
    assert all(first_percent(log, name) == 0 for name in names)

    total = 2 + 6 + 6 + 1
    kept: dict[Address, tuple[str, str]] = {}
    begun: dict[RunSpec, float] = {}
    resumed = 0
    for moment, how in (
        (lambda: killed.has("targets/*/manifest.json"), signal.SIGKILL),  # the other target is being trained
        (lambda: killed.has(CHECKPOINTS, 30_000), signal.SIGKILL),  # hundreds of draws into a run
        (lambda: len(list(Path(killed.store.uri).glob(CHECKPOINTS))) == 2, signal.SIGINT),  # two runs are at work
        (lambda: killed.has("targets/*/runs/*/diagnosis-v*/manifest.json"), signal.SIGKILL),  # the others are still to come
    ):
        log = killed.stop_when(moment, how)
        finished = made(killed.published())
        assert kept.items() <= finished.items(), "what was finished before was made again"
        assert 0 < len(finished) < total
        kept = finished
        for spec, label in zip(specs, names, strict=True):
            percent = first_percent(log, label)
            if begun.get(spec) and percent is not None:
                assert percent >= int(100 * begun[spec]) > 0, "it started anew"
                resumed += 1
        begun = {spec: share for spec in specs if (share := share_done(killed.store, spec)) > 0.01}
        plan = report.plan_table(specs, killed.store).splitlines()[2:-1]
        for line, spec in zip(plan, specs, strict=True):
            there = run_address(spec.target_id, spec.run_id) in finished
            to_resume = share_done(killed.store, spec) > 0
            assert line.endswith("exists" if there else "to resume" if to_resume else "to compute")
    assert resumed, "no run that was killed at work went on"

    again, log = killed.finish()
    assert [row["status"] for row in again] == [
        "cached" if diagnosis_address(spec.target_id, spec.run_id) in kept else "computed" for spec in specs
    ]
    published = killed.published()
    assert len(published) == total
    assert kept.items() <= made(published).items()
    assert not killed.has(CHECKPOINTS)
    for row, other, spec in zip(rows, again, specs, strict=True):
        assert {name: other[name] for name in NUMBERS} == {name: row[name] for name in NUMBERS}
        address = run_address(spec.target_id, spec.run_id)
        traces = [place.store.manifest(address).file("trace.npz").sha256 for place in (undisturbed, killed)]
        assert traces[0] == traces[1], spec
    assert main(["verify", "--store", killed.store.uri, "--settings", str(settings)]) == 0
    assert capsys.readouterr().out.startswith(f"{total} artifacts checked, 0 damaged")


def test_sigterm_ends_a_sweep_and_its_server(tmp_path):
    """As systemd, Slurm or `docker stop` send it, to the sweep's own process alone."""
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS.format(folder=tmp_path).replace("num_draws = 6000", "num_draws = 10000000"))
    place = Place(tmp_path, "terminated", settings)
    with place.sweep() as (process, log):
        wait_for(lambda: place.has(CHECKPOINTS), process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert processes(process.pid) == {}
    assert log.read_text().count(STOPPED) == 1
    place.published()
    assert place.has(CHECKPOINTS)
