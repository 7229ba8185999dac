"""Deep linear networks of a thousand to a million parameters against their exact llc: `python benchmarks/deep_linear.py`.

The networks are drawn as in arXiv 2308.12108 (the published accuracy of SGLD, last columns of the table): per class a range
of the number of layers and of the widths, all uniform, and of those only networks with half to twice the class's number of
parameters; a rank r uniform from 0 to the smallest width, which every layer of w* has exactly, so that the exact llc is the
local one. nbeta = n / log n of n = 1e5 (1K, 10K) or 1e6 samples, of which 1e5 are held, inputs uniform in [-10, 10], squared
error without noise, localization 1. Scores per class: the median relative error, and the share of pairs of networks put in
the right order.

The sampler is SGHMC on minibatches of 500 with step_size = "auto": with friction 0.1 it moves 19 times as far as SGLD in as
many steps along the directions in which the loss is flat at w*, and those are what takes long. Gradients are plain: labels
are noise-free, every sample's gradient vanishes at w*, and control variates would double the work for nothing.

Each result is kept in --results as soon as it is there: a run that was stopped goes on where it was. Exit status 1 if a bound
is missed.

  python benchmarks/deep_linear.py --classes 1K 10K            # the small ones, minutes
  python benchmarks/deep_linear.py --figure docs/images/llc_vs_true.png
  python benchmarks/deep_linear.py --classes 100K 1M --steps 50000 --results gpu.jsonl     # as published, on a GPU
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from results import FOLDER, Results, Row, table

from lambda_hat.compute.runtime import configure
from lambda_hat.llc.diagnostics import diagnose
from lambda_hat.llc.run import RunSpec
from lambda_hat.llc.sampling import sample
from lambda_hat.specs.settings import Runtime
from lambda_hat.studies.style import BAND, EXACT, Picture, color, save_png


class SizeClass(NamedTuple):
    """size: the number of parameters. layers, widths: ranges, both ends included. num_networks: of this size. steps: of each
    chain, half of them burn-in. bound: on the median relative error; published: that of SGLD, and its order preservation."""

    size: int
    layers: tuple[int, int]
    widths: tuple[int, int]
    num_data: int
    num_networks: int
    num_chains: int
    steps: int
    bound: float
    published: tuple[float, float]


CLASSES = {
    "1K": SizeClass(1000, (2, 5), (5, 50), 100_000, 20, 2, 20_000, 0.05, (0.08, 0.91)),
    "10K": SizeClass(10_000, (2, 10), (5, 100), 100_000, 20, 2, 20_000, 0.05, (0.22, 0.86)),
    "100K": SizeClass(100_000, (2, 10), (50, 500), 1_000_000, 20, 1, 3000, 0.10, (0.16, 0.95)),
    "1M": SizeClass(1_000_000, (2, 20), (100, 1000), 1_000_000, 5, 1, 2000, 0.10, (0.40, 0.87)),
}
ORDER = 0.95
SAMPLER = {"kind": "sghmc", "friction": 0.1, "gradient": "plain", "batch_size": 500}
#: Recorded draws, burn-in included.
DRAWS = 1000
#: Of the published chains of 100K and 1M, out of reach of two cores in an hour.
PUBLISHED_STEPS = 50_000
#: Samples held at most: a million of a thousand inputs would take 4 GB. nbeta is that of the class's n whatever is held, and
#: the exact llc holds for any data that span the inputs.
HELD = 100_000


def networks(name: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """(widths, rank) of a class's networks, always the same ones, without end."""
    size, layers, widths = CLASSES[name][:3]
    rng = np.random.default_rng(size)
    while True:
        count = int(rng.integers(layers[0], layers[1] + 1)) + 1
        drawn = np.asarray(rng.integers(widths[0], widths[1] + 1, count))
        rank = int(rng.integers(0, int(drawn.min()) + 1))
        if size / 2 <= np.sum(drawn[1:] * drawn[:-1]) <= 2 * size:
            yield tuple(int(width) for width in drawn), rank


def run_spec(name: str, widths: tuple[int, ...], rank: int, steps: int, num_chains: int, sampler: dict[str, Any]) -> RunSpec:
    thinning = max(1, steps // DRAWS)
    lengths = {"num_burnin_steps": steps // 2, "num_draws": steps // 2 // thinning, "num_steps_bw_draws": thinning}
    num_data = CLASSES[name].num_data
    return RunSpec.from_dict({
        "target": {"family": "dln", "widths": widths, "rank": rank, "data": {"n_data": min(num_data, HELD)}},
        "posterior": {"nbeta": num_data / math.log(num_data)} if num_data > HELD else {},
        "sampler": SAMPLER | lengths | {"num_chains": num_chains} | sampler,
    })  # fmt: skip


def measure(name: str, spec: RunSpec) -> Row:
    """The row of a run: what was estimated, how well, and what it cost."""
    began = time.perf_counter()
    target = spec.target.build()
    trace = sample(spec.target.objective(), target.params_star, target.dataset, spec.posterior, spec.sampler)
    found = diagnose(spec, trace, target.metrics)
    seconds = time.perf_counter() - began
    row = {
        "class": name, "widths": list(spec.target.widths), "rank": spec.target.rank, "num_params": found.num_params,
        "exact": found.true_llc, "llc": found.llc, "mcse": found.mcse, "verdict": found.verdict, "remedy": found.remedy,
        "acceptance": found.acceptance_rate, "ess": found.ess_bulk, "rhat": found.rhat,
        "sampling_seconds": found.seconds, "compile_seconds": found.compile_seconds, "seconds": seconds,
        "device": jax.devices()[0].device_kind, "sampler": spec.sampler.model_dump(mode="json"),
    }  # fmt: skip
    del target, trace
    jax.clear_caches()  # the programs of another shape are of no more use, and what they hold
    gc.collect()
    return row


def error(row: Row) -> float:
    """Relative; infinite for a run without an estimate."""
    return float("inf") if row["llc"] is None else row["llc"] / row["exact"] - 1


def order_preservation(rows: Sequence[Row]) -> float:
    """The share of pairs with different exact values that the estimates order alike; a run without one orders none."""
    pairs = [
        (a, b) if a["exact"] < b["exact"] else (b, a) for a, b in itertools.combinations(rows, 2) if a["exact"] != b["exact"]
    ]
    right = [a["llc"] is not None and b["llc"] is not None and a["llc"] < b["llc"] for a, b in pairs]
    return sum(right) / len(right) if right else 1.0


def summarize(name: str, rows: Sequence[Row]) -> Row:
    errors = np.abs([error(row) for row in rows])
    verdicts = Counter(row["verdict"] for row in rows)
    trusted = [abs(error(row)) for row in rows if row["verdict"] == "ok"]
    median, order = float(np.median(errors)), order_preservation(rows)
    return {
        "class": name, "networks": len(rows), "median_error": median, "largest_error": float(np.max(errors)),
        "median_error_ok": float(np.median(trusted)) if trusted else None, "order": order,
        "verdicts": dict(verdicts.most_common()), "seconds": sum(row["seconds"] for row in rows),
        "steps": CLASSES[name].steps, "held": median <= CLASSES[name].bound and order >= ORDER,
    }  # fmt: skip


def plot(by_class: dict[str, list[Row]]) -> Picture:
    """Estimates against exact values on linear axes, a panel for each class; open marks are verdicts other than ok."""
    fig = Picture(figsize=(9, 2.6 + 3.6 * ((len(by_class) + 1) // 2)), layout="constrained")
    axes = fig.subplots((len(by_class) + 1) // 2, 2, squeeze=False)
    for ax in axes.flat[len(by_class) :]:
        ax.set_visible(False)
    for ax, (name, rows) in zip(axes.flat, by_class.items(), strict=False):
        known = [row for row in rows if row["llc"] is not None]
        exact, llc, mcse = (np.array([row[field] or 0.0 for row in known]) for field in ("exact", "llc", "mcse"))
        top = 1.08 * max(np.max(exact), np.max(llc))
        line, bound = np.array([0.0, top]), CLASSES[name].bound
        ax.plot(line, line, color=EXACT, linestyle="--", linewidth=1.2)
        ax.fill_between(line, (1 - bound) * line, (1 + bound) * line, **BAND, color=EXACT, label=f"exact ± {bound:.0%}")
        for verdict_ok, face, label in ((True, color(0), "verdict ok"), (False, "none", "another verdict")):
            mine = np.array([(row["verdict"] == "ok") == verdict_ok for row in known])
            if mine.any():
                ax.errorbar(
                    exact[mine], llc[mine], mcse[mine], fmt="o", color=color(0), markerfacecolor=face, capsize=2, label=label
                )
        score = summarize(name, rows)
        ax.set(xlim=(0, top), ylim=(0, top), xlabel="exact llc", ylabel="llc")
        ax.set_title(f"{name}: median |error| {score['median_error']:.1%}, order {score['order']:.2f}", fontsize=10, loc="left")
        ax.legend(fontsize=8, frameon=False, loc="upper left")
    fig.suptitle("Deep linear networks: SGHMC on minibatches, automatic step size, against exact values", fontsize=11)
    return fig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=list(CLASSES), help="default: all")
    parser.add_argument("--count", type=int, help="networks per class, in place of 20 (5 for 1M)")
    parser.add_argument("--steps", type=int, help="steps of a chain, half of them burn-in, in place of the class's own")
    parser.add_argument("--chains", type=int, help="chains of a run, in place of the class's own")
    parser.add_argument(
        "--sampler", type=json.loads, default={}, metavar="JSON", help="fields of the sampler, to compare others"
    )
    parser.add_argument(
        "--results", type=Path, default=FOLDER / "deep_linear.jsonl", help="where results are kept (%(default)s)"
    )
    parser.add_argument("--figure", type=Path, metavar="PNG", help="write the figure there")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table there")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    configure(Runtime())
    results = Results(options.results)
    by_class: dict[str, list[Row]] = {}
    for name in options.classes:
        size_class = CLASSES[name]
        count = options.count or size_class.num_networks
        for place, (widths, rank) in enumerate(itertools.islice(networks(name), count), 1):
            steps, num_chains = options.steps or size_class.steps, options.chains or size_class.num_chains
            spec = run_spec(name, widths, rank, steps, num_chains, options.sampler)
            row = results.get(spec.run_id, lambda name=name, spec=spec: measure(name, spec))
            by_class.setdefault(name, []).append(row)
            shape = f"{'-'.join(map(str, widths))} rank {rank}"
            estimate = "no llc" if row["llc"] is None else f"llc {row['llc']:.4g}, exact {row['exact']:.4g}, {error(row):+.1%}"
            print(f"{name} {place}/{count}: {shape}: {estimate}, {row['verdict']}, {row['seconds']:.0f} s", flush=True)
    scores = [summarize(name, rows) for name, rows in by_class.items()]
    lines = []
    for score in scores:
        size_class = CLASSES[score["class"]]
        verdicts = ", ".join(f"{number} {verdict}" for verdict, number in score["verdicts"].items())
        ok = "-" if score["median_error_ok"] is None else f"{score['median_error_ok']:.1%}"
        lines.append([
            score["class"], str(score["networks"]), f"{score['median_error']:.1%}", f"{size_class.bound:.0%}", ok,
            f"{score['largest_error']:.0%}", f"{score['order']:.3f}", f"{ORDER:.2f}", verdicts, f"{score['seconds']:.0f}",
            f"{size_class.published[0]:.0%}, {size_class.published[1]:.2f}",
        ])  # fmt: skip
    columns = [
        "class",
        "networks",
        "median error",
        "bound",
        "of verdict ok",
        "largest",
        "order",
        "bound",
        "verdicts",
        "seconds",
    ]
    print("\n" + table([*columns, "published: error, order"], lines))
    if short := [name for name in options.classes if CLASSES[name].num_data > HELD and options.steps is None]:
        print(
            f"\nTwo cores cannot do {PUBLISHED_STEPS} steps of {', '.join(short)} in an hour; here are fewer. "
            "As published, on a GPU:\n"
            f"  python benchmarks/deep_linear.py --classes {' '.join(short)} --steps {PUBLISHED_STEPS}"
        )
    if options.figure:
        options.figure.write_bytes(save_png(plot(by_class)))
    if options.json:
        options.json.write_text(json.dumps({"scores": scores, "rows": by_class}, indent=1) + "\n")
    return 0 if all(score["held"] for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
