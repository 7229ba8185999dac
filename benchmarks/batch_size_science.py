"""The science of batch size, learning rate, richness and width on Fashion-MNIST: `python benchmarks/batch_size_science.py`.

Runs the studies richness, width, critical and llc of settings.toml as a user would, fits what theory predicts, and prints
Markdown tables. `--store` keeps the studies (a second call trains nothing), `--images` copies their plots into a folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from lambda_hat.batch_size.artifacts import load_study
from lambda_hat.batch_size.critical import collapse
from lambda_hat.batch_size.fits import Slope, richness_slopes, width_transfer
from lambda_hat.batch_size.noise_scale import gradient_noise_scale
from lambda_hat.batch_size.study import Study, failed_text, failures
from lambda_hat.batch_size.trades import smoothed, trades
from lambda_hat.llc.run import RunSpec
from lambda_hat.store.store import Store
from lambda_hat.studies.views import find_studies
from lambda_hat.targets.trials.spec import TrialSpec

ROOT = Path(__file__).parent.parent
#: Plots that docs/batch-size.md shows.
IMAGES = {
    "richness": ("heatmap_gamma",), "width": ("width_transfer", "coordinate_check"),
    "critical": ("heatmap_batch", "losscurve_temp_samples", "steps_to_target"), "llc": ("llc",),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--studies", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--store", metavar="DIR", help="keep the studies here")
    parser.add_argument("--images", metavar="DIR", type=Path, help="copy plots here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(options.store or f"{folder}/store")
        for name in options.studies:
            began = time.perf_counter()
            environment = os.environ | {"PREFECT_HOME": f"{folder}/prefect", "PREFECT_LOGGING_LEVEL": "ERROR"}
            command = [sys.executable, "flows/batch_size.py", "--experiment", name, "--store", store.uri]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
            [address] = find_studies(store, "study", [name])
            study = _study(store, address)
            table = study.table
            print(f"\n## {name}: {len(table)} trials, {failed_text(failures(table))}, {time.perf_counter() - began:.0f} s\n")
            {"richness": _richness, "width": _width, "critical": _critical, "llc": _llc}[name](study)
            for plot in IMAGES[name] if options.images else ():
                options.images.joinpath(f"{name}_{plot}.png").write_bytes(store.read(address, f"{plot}.png"))
    return 0


def _study(store: Store, address) -> Study:
    manifest = store.manifest(address)
    frame = store.catalogue("diagnosis")
    runs = [
        RunSpec.from_dict(store.manifest(run).spec) for run in store.related(address)
        if run.kind == "run" and run.id in set(manifest.spec["run_ids"]) and len(frame)
    ]  # fmt: skip
    import io

    ids = pd.read_csv(io.BytesIO(store.read(address, "results.csv")))["trial_id"].tolist()
    return load_study(store, ids, runs)


def _row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _heads(*cells: str) -> None:
    _row(*cells)
    print("|" + "---|" * len(cells))


def _slope(slope: Slope | None) -> str:
    return "-" if slope is None else f"{slope.slope:.3f} [{slope.low:.3f}, {slope.high:.3f}]"


def _richness(study: Study) -> None:
    _heads("L", "side", "slope of log eta* over log richness, 95 %", "theory", "off", "optima left out")
    for depth, table in study.table.groupby("depth"):
        found = richness_slopes(table)
        for side, slope, theory in zip(("lazy", "rich"), (found.lazy, found.rich), found.theory, strict=True):
            off = "-" if slope is None else f"{slope.slope / theory - 1:+.1%}"
            _row(depth, side, _slope(slope), f"{theory:.3f}", off, len(slope.left_out) if slope else "all")


def _width(study: Study) -> None:
    _heads("optimizer", "parameterization", "rate rule", *(f"N = {w}" for w in sorted(study.table["width"].unique())),
           "largest shift in grid steps", "slope over log N, 95 %")  # fmt: skip
    for names, table in study.table.groupby(["optimizer", "parameterization", "rate_rule"]):
        found = width_transfer(table)
        optima = [f"{best.log2_eta:.2f}{' (' + best.flag + ')' if best.flag else ''}" for best in found.optima]
        shift = f"{np.nanmax(np.abs(found.shifts)):.2f}" if np.isfinite(found.shifts).any() else "-"
        _row(*names, *optima, shift, _slope(found.slope))


def _critical(study: Study) -> None:
    [trade] = trades(study)
    fit = trade.fit
    assert fit is not None
    _heads("B", "fewest steps (median of seeds)", "samples")
    for size, steps in trade.table.groupby("batch_size")["steps"].median().items():
        _row(size, f"{steps:.0f}", f"{size * steps:,.0f}")
    low, high = fit.batch_size_interval
    limit = "never" if fit.linear_limit is None else f"at B = {fit.linear_limit:.0f}"
    print(f"\ntarget loss {study.target_loss:.4f}: critical batch size {fit.batch_size:.0f} [{low:.0f}, {high:.0f}]; "
          f"20 % more samples than at the smallest B: {limit}\n")  # fmt: skip
    _noise_scales(trade.table)
    _heads("eta / B", "batch sizes", "RMS difference in log loss at equal samples", "breaks at (10 %)")
    for temperature, table in study.table.groupby("temperature"):
        if table["batch_size"].nunique() < 4:
            continue
        found = collapse(smoothed(study, table))
        if found is not None:
            breaks = "not up to there" if found.breaks_at is None else f"{found.breaks_at:.0f}"
            _row(f"{temperature:g}", ", ".join(f"{size:.0f}" for size in found.batch_sizes),
                 ", ".join(f"{difference:.2f}" for difference in found.differences), breaks)  # fmt: skip


def _noise_scales(fastest: pd.DataFrame) -> None:
    """The gradient noise scale on the way to the target, of the fastest trial at B = 64 and seed 0."""
    _heads("share of the steps to the target", "gradient noise scale")
    row = fastest[(fastest["batch_size"] == 64) & (fastest["seed"] == 0)].iloc[0]
    for share in (0.25, 0.5, 1.0):
        spec = TrialSpec.from_dict({
            "task": {"kind": "images", "dataset": "fashion-mnist", "n_data": int(row["task.n_data"]), "n_test": 2048},
            "batch_size": 64, "eta": float(row["eta"]), "num_steps": max(1, round(share * row["steps"])), "seed": 0,
        })  # fmt: skip
        noise = gradient_noise_scale(spec.build(), jax.random.key(0))
        _row(f"{share:g}", f"{noise.noise_scale:.0f} ± {noise.error:.0f}")
    print()


def _llc(study: Study) -> None:
    table = study.table
    etas = sorted(table["eta"].unique())
    _heads("B", *(f"eta = {eta:g}" for eta in etas))
    for size, of_size in table.groupby("batch_size"):
        cells = [of_size[of_size["eta"] == eta].iloc[0] for eta in etas]
        _row(size, *(
            cell["failure"] if isinstance(cell["failure"], str) else
            f"{cell['llc']:.1f} ± {cell['llc_mcse']:.1f} (loss {cell['final_loss']:.3f}, {cell['verdict']})" for cell in cells
        ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
