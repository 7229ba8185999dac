"""Samplers against exact values: `python benchmarks/accuracy.py`.

deep_linear, monomials, tanh, quadratic: singular models whose llc is known (exact_llc.json), with localization 1; nbeta is that
of n = 1e6 samples for deep linear networks. A Metropolis sampler on all the data (nuts, hmc) must be within 2 % and those on
minibatches (sghmc, sgld) with step_size = "auto" within 5 % of what a perfect sampler returns at this nbeta, which is not
the learning coefficient where its multiplicity is above 1 (trap B of docs/methodology.md). The column "by" says whence:

  quadrature   integrals in one to four dimensions: of monomials; of tanh networks and of deep linear networks of two layers
               given one of them, the other being Gaussian; at rank r > 0 of the part the rank leaves over
  exact        the learning coefficient itself: multiplicity 1, or a correction of less than 0.1 %
  hmc          a run of hmc eight times as long, with its standard error: three layers of low rank

rescaling: one layer of a ReLU network times 1e-4, 1e-2, 1e2, 1e4 and the next divided by it is the same function. By
`lambda_hat.estimate_llc` as it comes, seeds alike, the llc must not change by more than 3 %.

Each result is kept in --results as soon as it is there: a run that was stopped goes on where it was. Exit status 1 if a bound
is missed.

  python benchmarks/accuracy.py --only monomials tanh
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from results import FOLDER, Results, Row, table

import lambda_hat as lh
from lambda_hat.compute.runtime import configure
from lambda_hat.llc.diagnostics import Diagnosis, diagnose
from lambda_hat.llc.run import RunSpec
from lambda_hat.llc.sampling import sample
from lambda_hat.specs.settings import Runtime
from lambda_hat.specs.text import with_error
from lambda_hat.targets.theory import finite_normal_crossing_llc, finite_tanh_llc, quadratic_llc

EXACT = json.loads((Path(__file__).parent / "exact_llc.json").read_text())
#: Bounds on relative errors.
BOUNDS = {"nuts": 0.02, "hmc": 0.02, "sghmc": 0.05, "sgld": 0.05, "rescaling": 0.03}
#: Samples held; the loss depends on them through their second moment only, nbeta is that of NUM_DATA.
HELD, NUM_DATA = 100_000, 1_000_000
NBETA = NUM_DATA / math.log(NUM_DATA)
MAX_PARAMS = 20_000
#: From as many parameters on hmc in place of nuts, and fewer draws.
LARGE = 1000

NUTS = {"kind": "nuts", "num_burnin_steps": 1000, "num_draws": 4000, "target_acceptance": 0.95}
HMC = {"kind": "hmc", "num_burnin_steps": 600, "num_draws": 600}
#: Trajectories as long as the gauge directions of a deep linear network take: with the default 20 steps a chain diffuses along
#: them, and its llc, though steady, is that of a part of the posterior (-17 % on five layers of 64).
FAR = HMC | {"num_integration_steps": 300}
#: In one or two dimensions draws cost nothing, and the mean of a chi-squared takes many; trajectories reach along the arms of a
#: cross, steps are short enough for its tips.
CROSSING = HMC | {"num_burnin_steps": 2000, "num_draws": 100_000, "num_integration_steps": 100, "target_acceptance": 0.99}
REFERENCE = {"kind": "hmc", "num_burnin_steps": 2000, "num_draws": 20_000, "num_integration_steps": 40, "seed": 1}
SGHMC = {"kind": "sghmc", "num_burnin_steps": 20_000, "num_draws": 4000}
SGLD = SGHMC | {"kind": "sgld"}
#: For the same directions: less friction, and more steps.
FAR_SGHMC = SGHMC | {"num_burnin_steps": 100_000, "num_steps_bw_draws": 100, "friction": 0.1, "gradient": "plain"}
FAR_SGLD = SGLD | {"num_burnin_steps": 200_000, "num_steps_bw_draws": 200, "gradient": "plain"}


class Case(NamedTuple):
    """expected: (value, its standard error, whence), computed on demand."""

    part: str
    name: str
    target: dict[str, Any]
    posterior: dict[str, Any]
    expected: Callable[[Results], tuple[float, float, str]]
    samplers: list[dict[str, Any]]


def estimate(results: Results, target: dict[str, Any], posterior: dict[str, Any], sampler: dict[str, Any]) -> Row:
    spec = RunSpec.from_dict({"target": target, "posterior": posterior, "sampler": sampler})

    def compute() -> Row:
        built = spec.target.build()
        trace = sample(spec.target.objective(), built.params_star, built.dataset, spec.posterior, spec.sampler)
        return numbers(diagnose(spec, trace, built.metrics))

    return results.get(spec.run_id, compute)


def numbers(found: Diagnosis) -> Row:
    return {
        "llc": found.llc, "mcse": found.mcse, "ess": found.ess_bulk, "rhat": found.rhat, "acceptance": found.acceptance_rate,
        "seconds": found.seconds + found.compile_seconds, "verdict": found.verdict,
    }  # fmt: skip


def cases() -> Iterator[Case]:
    curvatures = np.geomspace(1.0, 0.1, 10)
    nbeta = 1000 / math.log(1000)
    yield Case(
        "quadratic", "d = 10", {"family": "quadratic"}, {},
        lambda _: (quadratic_llc(curvatures, nbeta, 1.0), 0.0, "quadrature"), [NUTS, SGHMC, SGLD],
    )  # fmt: skip
    for row in EXACT["monomials"]:
        exponents = tuple(row["exponents"])
        for nbeta, value in zip(row["nbeta"], row["finite_nbeta_llc"], strict=True):
            name = " ".join(f"w{i}^{2 * a}" for i, a in enumerate(exponents, 1) if a)
            yield Case(
                "monomials", f"{name}, nβ = {nbeta:.4g}", {"family": "normal_crossing", "exponents": exponents},
                {"nbeta": nbeta}, lambda _, value=value: (value, 0.0, "quadrature"), [CROSSING, SGHMC | {"num_draws": 80_000}],
            )  # fmt: skip
    for row in EXACT["tanh"]:
        hidden, nbeta = row["hidden"], 10_000 / math.log(10_000)
        yield Case(
            "tanh", f"{hidden} hidden", {"family": "tanh", "hidden": hidden, "data": {"n_data": 10_000}}, {},
            lambda _, hidden=hidden, nbeta=nbeta: (finite_tanh_llc(hidden, 1.0, nbeta, 1.0), 0.0, "quadrature"),
            [HMC | {"num_draws": 10_000}, SGHMC],
        )  # fmt: skip
    for row in EXACT["deep_linear"]:
        widths, rank = row["widths"], row["rank"]
        size = sum(a * b for a, b in zip(widths[1:], widths[:-1], strict=True))
        if size > MAX_PARAMS:
            continue
        target = {"family": "dln", "widths": widths, "rank": rank, "data": {"n_data": HELD}}
        name = f"{'-'.join(map(str, widths))} rank {rank}"
        samplers = [NUTS, SGHMC, SGLD]
        if size > LARGE:
            samplers = [FAR, FAR_SGHMC | {"num_burnin_steps": 200_000, "num_draws": 1000, "num_chains": 2}]
        elif size < 4:
            samplers = [CROSSING, SGHMC | {"num_draws": 80_000}, SGLD | {"num_draws": 80_000}]
        elif len(widths) > 3 and 0 < rank < min(widths):
            samplers = [NUTS, FAR_SGHMC, FAR_SGLD]
        yield Case(
            "deep_linear", name, target, {"nbeta": NBETA},
            lambda results, row=row, target=target: deep_linear_expected(results, row, target), samplers,
        )  # fmt: skip


def deep_linear_expected(results: Results, row: dict[str, Any], target: dict[str, Any]) -> tuple[float, float, str]:
    """The rank's own part, a quadratic of r (H_1 + H_{L+1}) - r^2 directions, and of what it leaves over a net of rank 0."""
    widths, rank, exact = row["widths"], row["rank"], float(Fraction(row["llc"]))
    left = [width - rank for width in widths]
    regular = (rank * (widths[0] + widths[-1]) - rank**2) / 2
    # Inputs uniform in [-10, 10] have the second moment 100/3.
    precision = NBETA * 100 / 3
    if min(left) == 0 or min(left) > 5:
        return exact, 0.0, "exact"
    if set(left) == {1}:
        return regular + finite_normal_crossing_llc([1] * (len(left) - 1), precision / 2, 1.0), 0.0, "quadrature"
    if len(left) == 3:
        return regular + two_layer_llc(left, precision), 0.0, "quadrature"
    found = estimate(results, target, {"nbeta": NBETA}, REFERENCE)
    return found["llc"], found["mcse"], "hmc"


def two_layer_llc(widths: list[int], precision: float) -> float:
    """nbeta E[L] of nbeta L = precision/2 |W_2 W_1|^2 under standard Gaussian W_1, W_2, by quadrature.

    Given W_1, of singular values s_i, W_2 is Gaussian: nbeta E[L | W_1] = q/2 sum_i e_i / (e_i + 1), e_i = precision s_i^2, and
    W_1 has weight prod (e_i + 1)^(-q/2). Of a p x h Gaussian matrix the s_i have the density
    prod s_i^|p-h| exp(-s_i^2/2) prod_{i<j} |s_i^2 - s_j^2| (Muirhead 1982, theorem 3.2.18).
    """
    p, h, q = widths
    if q < p:  # either layer can be the one that is integrated out
        p, q = q, p
    k = min(p, h)
    log_s = np.linspace(-0.5 * math.log(precision) - 7, 2.0, {1: 2001, 2: 801, 3: 161, 4: 61}.get(k, 31))
    s = np.exp(log_s)
    e = precision * s**2
    log_weight = (abs(p - h) + 1) * log_s - s**2 / 2 - q / 2 * np.log1p(e)
    # In order s_1 < ... < s_k, one after the other, so that memory is that of k - 1 dimensions.
    total = mean = 0.0
    grids = np.meshgrid(*[np.arange(len(s))] * (k - 1), indexing="ij") if k > 1 else []
    ordered = [grid[np.all([a < b for a, b in itertools.pairwise(grids)], axis=0)] if k > 2 else grid.ravel() for grid in grids]
    logs = sum((log_weight[i] for i in ordered), np.zeros(1))
    for a in range(k - 1):
        for b in range(a):
            logs = logs + np.log(s[ordered[a]] ** 2 - s[ordered[b]] ** 2)
    shares = sum((e[i] / (e[i] + 1) for i in ordered), np.zeros(1))
    largest = None
    for last in range(k - 1, len(s)):
        below = ordered[-1] < last if k > 1 else np.ones(1, bool)
        log_density = logs[below] + log_weight[last]
        for i in ordered:
            log_density = log_density + np.log(s[last] ** 2 - s[i[below]] ** 2)
        largest = log_density.max() if largest is None else largest
        weight = np.exp(log_density - largest)
        total += weight.sum()
        mean += weight @ (shares[below] + e[last] / (e[last] + 1))
    return q / 2 * mean / total


def run_case(results: Results, case: Case) -> list[list[str]]:
    """Lines of the table; the bound's mark is its last cell."""
    value, value_error, whence = case.expected(results)
    lines = []
    for sampler in case.samplers:
        row = estimate(results, case.target, case.posterior, sampler)
        kind = sampler["kind"]
        off = math.inf if row["llc"] is None else row["llc"] / value - 1
        lines.append([
            case.part, case.name, kind, with_error(row["llc"], row["mcse"]), with_error(value, value_error or None), whence,
            f"{off:+.1%}", f"{(row['mcse'] or math.nan) / value:.1%}", f"{BOUNDS[kind]:.0%}", row["verdict"],
            f"{row['seconds']:.0f}", "held" if abs(off) <= BOUNDS[kind] else "MISSED",
        ])  # fmt: skip
        print(f"{case.part} {case.name} by {kind}: {off:+.1%}, {row['verdict']}, {row['seconds']:.0f} s", flush=True)
    return lines


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    hidden = jax.nn.relu(hidden @ params["w2"] + params["b2"])
    return hidden @ params["w3"] + params["b3"]


def squared_error(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(network(params, batch[0]) - batch[1]), axis=1)


def trained() -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """A ReLU network 6-16-16-2 at its minimum on 2000 samples of a network like it, with noise 0.1."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"w1": (6, 16), "w2": (16, 16), "w3": (16, 2)}
    params = {
        name: jax.random.normal(key, shape) * math.sqrt(2 / shape[0])
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    } | {"b1": jnp.zeros(16), "b2": jnp.zeros(16), "b3": jnp.zeros(2)}
    x = jax.random.normal(keys[3], (2000, 6))
    data = x, network(params, x) + 0.1 * jax.random.normal(keys[4], (2000, 2))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 3000))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(lambda p: jnp.mean(squared_error(p, data)))(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3000)
    return params, data


def rescaling(results: Results) -> list[list[str]]:
    params, data = trained()
    lines, unscaled = [], 0.0
    for factor in (1.0, 1e-4, 1e-2, 1e2, 1e4):
        scaled = params | {"w1": factor * params["w1"], "b1": factor * params["b1"], "w2": params["w2"] / factor}

        def compute(scaled: dict[str, jax.Array] = scaled) -> Row:
            return numbers(lh.estimate_llc(squared_error, scaled, data, seed=0, progress=False).diagnosis)

        row = results.get(f"rescaling {factor:g}", compute)
        unscaled = row["llc"] if factor == 1 else unscaled
        off = math.inf if row["llc"] is None else row["llc"] / unscaled - 1
        bound = BOUNDS["rescaling"]
        lines.append([
            "rescaling", f"layer 1 times {factor:g}", "sgld", with_error(row["llc"], row["mcse"]),
            f"{unscaled:.4g}", "unscaled",
            f"{off:+.1%}", f"{(row['mcse'] or math.nan) / unscaled:.1%}", f"{bound:.0%}", row["verdict"],
            f"{row['seconds']:.0f}", "held" if abs(off) <= bound else "MISSED",
        ])  # fmt: skip
        print(f"rescaling {factor:g}: {off:+.2%}, {row['verdict']}, {row['seconds']:.0f} s", flush=True)
    return lines


PARTS = ("quadratic", "monomials", "tanh", "deep_linear", "rescaling")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to do; default: all")
    parser.add_argument("--results", type=Path, default=FOLDER / "accuracy.jsonl", help="where results are kept (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table there")
    options = parser.parse_args()
    configure(Runtime())
    results, began = Results(options.results), time.perf_counter()
    lines = [line for case in cases() if case.part in options.only for line in run_case(results, case)]
    if "rescaling" in options.only:
        lines += rescaling(results)
    columns = ["part", "target", "sampler", "llc", "expected", "by", "error", "mcse", "bound", "verdict", "seconds", "held"]
    print("\n" + table(columns, lines))
    missed = sum(line[-1] == "MISSED" for line in lines)
    print(f"\n{len(lines) - missed} of {len(lines)} within their bounds, {time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([dict(zip(columns, line, strict=True)) for line in lines], indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
