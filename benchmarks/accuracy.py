"""Samplers against exact values: `python benchmarks/accuracy.py`. Prints a table; exit status 1 if a bound is missed.

The quadratic is scored in standard errors of its finite-nbeta value, the deep linear networks (noise-free, n = 1e6,
localization 1) by relative error of the exact llc. A perfect sampler is itself below the exact llc where the multiplicity is
2 (trap B of docs/methodology.md): about 2 % on 5-3-5 of rank 0, 1 % on 10-10-10 of rank 5.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import Any

from lambda_hat.diagnostics import diagnose
from lambda_hat.run import RunSpec
from lambda_hat.sampling import sample
from lambda_hat.theory import quadratic_llc

QUADRATIC = {"family": "quadratic", "dim": 10, "condition_number": 10.0}
ZERO = {"family": "dln", "widths": [5, 3, 5], "rank": 0}
HALF = {"family": "dln", "widths": [10, 10, 10], "rank": 5}
LANGEVIN = {"kind": "sgld", "num_burnin_steps": 50_000, "num_draws": 5000, "num_steps_bw_draws": 40}
HMC = {"kind": "hmc", "num_burnin_steps": 1000, "num_draws": 10_000, "target_acceptance": 0.95}

CASES: list[tuple[str, dict[str, Any], dict[str, Any], float]] = [  # name, target, sampler, bound on the error
    ("quadratic", QUADRATIC, LANGEVIN | {"step_size": 1e-5}, 3.0),
    ("quadratic", QUADRATIC, {"kind": "hmc", "num_draws": 2000}, 3.0),
    ("quadratic", QUADRATIC, {"kind": "mclmc", "num_draws": 2000}, 3.0),
    ("5-3-5 rank 0", ZERO, LANGEVIN | {"step_size": 1e-7}, 0.10),
    ("5-3-5 rank 0", ZERO, HMC, 0.03),
    ("10-10-10 rank 5", HALF, LANGEVIN | {"step_size": 2e-8}, 0.10),
    ("10-10-10 rank 5", HALF, HMC, 0.03),
]


def main() -> int:
    missed = 0
    print("| target | sampler | llc | expected | error | bound | ESS | R-hat | seconds | verdict |\n|" + "---|" * 10)
    for name, target_fields, sampler_fields, bound in CASES:
        spec = RunSpec.from_dict({"target": target_fields, "sampler": sampler_fields})
        target = spec.target.build()
        trace = sample(spec.target.objective(), target.params_star, target.dataset, spec.posterior, spec.sampler)
        d = diagnose(spec, trace, target.metrics)
        assert d.llc is not None
        if name == "quadratic":
            expected = quadratic_llc(spec.target.curvatures(), spec.nbeta, spec.posterior.localization)
            error, unit = (d.llc - expected) / d.mcse, " s.e."
        else:
            expected = float(Fraction(target.metrics["true_llc"]))
            error, unit = d.llc / expected - 1, ""
        missed += abs(error) > bound
        shown = [f"{error:+.2f}{unit}", f"{bound:.0f}{unit}"] if unit else [f"{error:+.1%}", f"{bound:.0%}"]
        row = [name, spec.sampler.kind, f"{d.llc:.3f} ± {d.mcse:.3f}", f"{expected:.4g}", *shown]
        row += [f"{d.ess_bulk:.0f}", f"{d.rhat:.3f}", f"{d.seconds:.1f}", d.verdict]
        print("| " + " | ".join(row) + " |", flush=True)
    print(f"\n{len(CASES) - missed} of {len(CASES)} within their bounds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
