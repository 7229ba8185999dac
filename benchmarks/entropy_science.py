"""The entropy of policies in RL, and what moves it, by exact enumeration: `python benchmarks/entropy_science.py`.

Trains policies on (a + b) mod 11 (answers of at most three tokens, 15 tokens), by imitation to 45 % and then by 150 updates of
RL with AdamW, and prints as Markdown tables
a. entropy and accuracy over the updates, exactly, at evenly spaced checkpoints;
b. the fit R = -a exp(H) + b (Cui et al. 2025, arXiv 2505.22617), H the mean token entropy, R the mean reward;
c. for updates redrawn at every checkpoint, with the optimizer's state there: does the sign of the entropy's change follow from
   covariances of log-probabilities with advantages, or with the changes of the logits; also with rewards shuffled in each
   group, so that covariances of either sign occur;
d. each training sequence's part in the change, by its reward and the surprisal of its least likely token;
e. how often intervals of estimates cover the exact values;
f. derivatives against finite differences of the exact entropy;
g. the update's parts against their sum, and against Optax's own step.
All seeds are fixed. `--json FILE` keeps the figures, `--figures DIR` draws plots.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from entropy_errors import COVERED_STEP, print_coverage, print_steps
from entropy_figures import Fit, draw_course, draw_sequences, draw_signs
from entropy_updates import DIRECTIONS, REDRAWN, RL, SEEDS, SPEC, Exact, enumeration, exact, redraw
from results import table
from scipy import stats

from lambda_hat.compute.runtime import configure
from lambda_hat.specs.settings import Runtime
from lambda_hat.studies.style import save_png
from lambda_hat.targets.policies.train import train_policy

#: Checkpoints of which an update's sequences are drawn.
SHOWN_STEPS = (30, 90)


# --- a, b: entropy and reward over the updates ------------------------------------------------------------------------------


def over_updates(known: dict[tuple[int, int], Exact]) -> pd.DataFrame:
    return pd.DataFrame([
        {"seed": seed, "step": step, "entropy": found.entropy, "token_entropy": found.token_entropy, "accuracy": found.accuracy}
        for (seed, step), found in known.items()
    ])  # fmt: skip


def print_course(course: pd.DataFrame) -> dict[str, Any]:
    print("\n## a. Entropy falls\n")
    names = ["entropy", "token_entropy", "accuracy"]
    of_steps = course.groupby("step")[names].agg(["mean", "std"])
    print(table(
        ("update", "H of a completion (nats)", "H per token", "accuracy"),
        [(str(step), *(f"{row[name, 'mean']:.3f} ± {row[name, 'std']:.3f}" for name in names))
         for step, row in of_steps.iterrows()],
    ))  # fmt: skip
    by_seed = course.pivot(index="step", columns="seed", values="entropy")
    change = by_seed.iloc[-1] - by_seed.iloc[0]
    falls = int((by_seed.diff().iloc[1:] < 0).sum().sum())
    of = by_seed.size - by_seed.shape[1]
    print(f"\nMean ± standard deviation over {len(change)} seeds. Change of H: {change.mean():.3f} ± {change.std():.3f}, from "
          f"{change.min():.3f} to {change.max():.3f}; it falls from a checkpoint to the next in {falls} of {of}.")  # fmt: skip
    return {"change": change.to_dict(), "falls": falls, "of": of}


def fit(entropy: Any, reward: Any) -> Fit:
    found = stats.linregress(np.exp(entropy), reward)
    line = stats.linregress(entropy, reward).rvalue ** 2
    return Fit(-found.slope, found.stderr, found.intercept, found.intercept_stderr, found.rvalue**2, line)


def print_fits(course: pd.DataFrame) -> dict[str, Fit]:
    print("\n## b. R = -a exp(H) + b, H the mean token entropy\n")
    fits = {f"seed {seed}": fit(part["token_entropy"], part["accuracy"]) for seed, part in course.groupby("seed")}
    fits["all seeds"] = fit(course["token_entropy"], course["accuracy"])
    print(table(
        ("", "a", "b", "R^2", "R^2 of R = c - d H", "b - a, reward at H = 0"),
        [(name, f"{f.a:.3f} ± {f.a_error:.3f}", f"{f.b:.3f} ± {f.b_error:.3f}", f"{f.r_squared:.4f}", f"{f.line:.4f}",
          f"{f.b - f.a:.3f}") for name, f in fits.items()],
    ))  # fmt: skip
    return fits


# --- c: the sign of the change ----------------------------------------------------------------------------------------------


def share(hits: Any) -> str:
    found = stats.binomtest(int(np.sum(hits)), len(hits)).proportion_ci(method="wilson")
    return f"{np.mean(hits):.1%} of {len(hits)} [{found.low:.1%}, {found.high:.1%}]"


def print_signs(updates: pd.DataFrame) -> dict[str, Any]:
    print("\n## c. The sign of the change of entropy\n")
    rows: list[tuple[str, ...]] = []
    kept: dict[str, Any] = {}
    for rewards, part in updates.groupby("rewards"):
        for name, text in DIRECTIONS.items():
            for predictor, label in (
                (-part["covariance"], "-Cov(log p, A)"),
                (part[f"{name}_states"], "-Cov_a(log pi, dz), update's states"),
                (part[f"{name}_fixed"], "-Cov_a(log pi, dz), all states"),
            ):
                same = np.sign(predictor) == np.sign(part[name])
                rank = stats.spearmanr(predictor, part[name])[0]
                below = f"{np.mean(predictor < 0):.0%}", f"{np.mean(part[name] < 0):.0%}"
                rows.append((rewards, text, label, *below, share(same), f"{rank:.2f}"))
                kept[f"{rewards}, {name}: {label}"] = {"same": float(same.mean()), "rank": float(rank)}
    print(table(
        ("rewards", "direction d", "predictor", "predictor < 0", "dH/deta < 0", "equal signs [95 %]", "rank correlation"), rows
    ))  # fmt: skip
    updates = updates[updates["rewards"] == "own"]
    baseline, parts, full = updates["baseline"], updates["parts"], updates["full"]
    known = updates.dropna(subset="actual")
    ratio = known["actual"] / (RL.learning_rate * known["full"])
    agree = updates.groupby(["seed", "step"])["full"].agg(lambda part: abs(np.sign(part).sum()) == len(part))
    kept |= {
        "momentum_larger": float((baseline.abs() > parts.abs()).mean()), "momentum_flips": float((full * parts < 0).mean()),
        "ratio": ratio.quantile([0, 0.25, 0.5, 0.75, 1]).tolist(), "actual_sign": float((ratio > 0).mean()),
        "identity": float(updates.filter(like="_identity").max().max()),
        "columns": float((updates["columns"] / parts - 1).abs().max()), "one_sign": float(agree.mean()),
    }  # fmt: skip
    print(f"\nOf the updates with their own rewards: the baseline b of momentum outweighs the parts, |dH along b| > |dH along "
          f"sum v_i|, in {share(baseline.abs() > parts.abs())}, and turns their sign in {share(full * parts < 0)}. All "
          f"{REDRAWN} redrawn steps have one sign at {share(agree)} checkpoints. By enumeration the change at eta = "
          f"{RL.learning_rate:g} is {ratio.median():.2f} of eta dH/deta (median; quartiles {ratio.quantile(0.25):.2f}, "
          f"{ratio.quantile(0.75):.2f}), and has its sign in {share(ratio > 0)}. "
          f"-Cov_a(log pi, dz) is dH_t to {kept['identity']:.0e}; sums of columns are the "
          f"derivative along sum v_i to {kept['columns']:.0e}.")  # fmt: skip
    by_step = updates.assign(flips=full * parts < 0).groupby("step")
    names = ("gradient", "parts", "baseline", "full")
    print("\n" + table(
        ("update", "dH/deta along -g", "along sum v_i", "along b", "along v", "signs turned"),
        [(str(step), *(f"{part[name].mean():.2f} ± {part[name].std():.2f}" for name in names), f"{part['flips'].mean():.0%}")
         for step, part in by_step],
    ))  # fmt: skip
    return kept


# --- d: which sequences -----------------------------------------------------------------------------------------------------


def with_fences(sequences: pd.DataFrame) -> pd.DataFrame:
    """Within each update: quartiles of the surprisal, who is beyond Tukey's fences, and changes in units of the mean |dH|."""
    groups = sequences.groupby(["seed", "step", "number"])
    low, high = (groups["change"].transform("quantile", q) for q in (0.25, 0.75))
    reach = 1.5 * (high - low)
    return sequences.assign(
        quartile=np.ceil(4 * groups["surprisal"].rank(pct=True, method="first")).astype(int),
        outlier=(sequences["change"] < low - reach) | (sequences["change"] > high + reach),
        relative=sequences["change"] / groups["change"].transform(lambda part: part.abs().mean()),
    )


def print_sequences(sequences: pd.DataFrame) -> dict[str, Any]:
    print("\n## d. Each sequence's part, dH/deta along v_i, in units of the mean |dH/deta| of its update\n")
    sequences = with_fences(sequences)
    rows: list[tuple[str, ...]] = []
    kept: dict[str, Any] = {}
    for (correct, quartile), part in sequences.groupby(["correct", "quartile"]):
        # Sequences of an update are not independent: the error is of the mean over updates.
        of_updates = part.groupby(["seed", "step", "number"])["relative"].agg(["mean", "size"])
        weights = of_updates["size"] / of_updates["size"].sum()
        mean = float(np.sum(weights * of_updates["mean"]))
        error = float(np.sqrt(np.sum(np.square(weights * (of_updates["mean"] - mean)))))
        name = f"{'correct' if correct else 'incorrect'}, {('lowest', 'second', 'third', 'highest')[quartile - 1]}"
        kept[name] = {"n": len(part), "mean": mean, "error": error, "outliers": float(part["outlier"].mean())}
        rows.append((
            name, str(len(part)), f"{part['surprisal'].median():.2f}", f"{part['advantage'].mean():+.2f}",
            f"{mean:+.2f} ± {error:.2f}", f"{part['relative'].abs().median():.2f}", f"{part['relative'].std():.1f}",
            f"{(part['change'] < 0).mean():.0%}", f"{part['outlier'].mean():.0%}",
            f"{part['relative'].abs().sum() / sequences['relative'].abs().sum():.0%}",
        ))  # fmt: skip
    print(table(
        ("reward, quartile of max surprisal", "n", "median surprisal (nats)", "mean A", "mean ± s.e.", "median size", "spread",
         "below 0", "outliers", "share of all sizes"), rows,
    ))  # fmt: skip
    rare = ~sequences["correct"] & (sequences["quartile"] == 4)
    outlier = sequences["outlier"]
    odds = stats.fisher_exact(pd.crosstab(rare, outlier).to_numpy())[0]
    per_advantage = (sequences["relative"] / sequences["advantage"]).abs()
    ranks = {}
    for name, part in (("incorrect", sequences[~sequences["correct"]]), ("correct", sequences[sequences["correct"]])):
        ranks[name] = [float(stats.spearmanr(part["surprisal"], of[part.index])[0]) for of in
                       (sequences["relative"].abs(), per_advantage)]  # fmt: skip
    by_step = {int(step): (float(part["outlier"].mean()), float((part["change"] < 0).mean())) for step, part in
               sequences[rare].groupby("step")}  # fmt: skip
    kept |= {"outliers": float(outlier.mean()), "odds": float(odds), "of_outliers": float(rare[outlier].mean()),
             "of_all": float(rare.mean()), "below_0": float((sequences["change"] < 0)[rare & outlier].mean()), "ranks": ranks,
             "by_step": by_step}  # fmt: skip
    print(f"\nOf all {len(sequences)} sequences {kept['outliers']:.1%} are beyond Tukey's fences of their update. Incorrect "
          f"ones of the highest quartile are {kept['of_all']:.1%} of all and {kept['of_outliers']:.1%} of the "
          f"outliers (odds ratio {odds:.1f}); {kept['below_0']:.0%} of these outliers lower the entropy. Rank "
          f"correlation of surprisal with |dH|, and with |dH / A|: "
          + ", ".join(f"{name} {size:.2f}, {per:.2f}" for name, (size, per) in ranks.items()) + ".\n")  # fmt: skip
    print(table(("update", "outliers among incorrect, highest", "of these sequences lower the entropy"),
                [(str(step), f"{share:.0%}", f"{below:.0%}") for step, (share, below) in by_step.items()]))  # fmt: skip
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the figures here")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="draw plots into this folder")
    options = parser.parse_args()
    configure(Runtime(platform="cpu"))
    began = time.perf_counter()

    def note(text: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    every = enumeration()
    policies = {seed: train_policy(SPEC.model_copy(update={"seed": seed})) for seed in SEEDS}
    note("trained")
    known = {
        (seed, step): exact(saved.params, every)
        for seed, policy in policies.items() for step, saved in policy.checkpoints.items()
    }  # fmt: skip
    note("enumerated")
    course = over_updates(known)
    results: dict[str, Any] = {"course": course.to_dict("records"), "change": print_course(course)}
    fits = print_fits(course)
    results["fits"] = {name: found._asdict() for name, found in fits.items()}
    redrawn = redraw(policies, known, every)
    note("redrawn")
    results["signs"] = print_signs(redrawn.updates)
    results["sequences"] = print_sequences(redrawn.sequences)
    first = policies[SEEDS[0]].checkpoints
    results["coverage"] = print_coverage(first[COVERED_STEP], known[SEEDS[0], COVERED_STEP], every)
    note("covered")
    results["steps"] = print_steps(policies)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.figures:
        shown = {step: first[step] for step in SHOWN_STEPS}
        figures = {"course": draw_course(course, fits), "signs": draw_signs(redrawn.updates),
                   "sequences": draw_sequences(shown, SEEDS[0])}  # fmt: skip
        for name, figure in figures.items():
            options.figures.joinpath(f"entropy_{name}.png").write_bytes(save_png(figure))
    note("done")


if __name__ == "__main__":
    main()
