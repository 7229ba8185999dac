"""Whether estimates, their errors and an update's parts are right: for `benchmarks/entropy_science.py`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from entropy_updates import HYPER, NETWORK, PROMPTS, RL, SEEDS, Drawn, Exact, dot, draw, draw_update, slopes_of, update_of
from results import table

from lambda_hat.entropy.adamw import aggregate_gradient, precondition, sequence_gradients, take_apart
from lambda_hat.entropy.estimators import baselines, evaluate, orders
from lambda_hat.entropy.exact import Enumeration, exact_derivatives, exact_entropy, float64
from lambda_hat.entropy.importance import Evaluation, snis
from lambda_hat.entropy.sequences import Batch, all_token_stats, moved
from lambda_hat.targets.policies.train import PolicyCheckpoint, TrainedPolicy, rl_optimizer
from lambda_hat.targets.target import Params

#: Repetitions, sequences of each, and learning rates of the coverage of intervals, and of which checkpoint of the first seed.
REPETITIONS, SIZES, ETAS, COVERED_STEP = 200, (64, 256), (1e-3, 1e-2), 60


# --- e, f: intervals and derivatives ---------------------------------------------------------------------------------------


def chosen_directions(wide: PolicyCheckpoint, values: Exact, drawn: Drawn) -> dict[str, Params]:
    """v, and the two v_i that raise and that lower the entropy most."""
    _, update = update_of(wide, drawn)
    columns = slopes_of(wide.params, drawn, jax.tree.map(np.multiply, update.preconditioner, values.gradient))
    chosen = np.array([np.argmax(columns), np.argmin(columns)])
    batch = Batch(*(array[chosen] for array in drawn.batch))
    gradients = jax.jit(sequence_gradients, static_argnums=0)(NETWORK.apply, wide.params, batch, drawn.weights[chosen])
    each = precondition(update.preconditioner, gradients)
    up, down = (jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), each) for row in (0, 1))
    return {"v": jax.tree.map(np.asarray, update.full), "the v_i that raises H most": up, "the v_i that lowers H most": down}


def print_coverage(saved: PolicyCheckpoint, values: Exact, every: Enumeration) -> dict[str, Any]:
    print(f"\n## e. Coverage of intervals, {REPETITIONS} repetitions, update {COVERED_STEP} of seed {SEEDS[0]}\n")
    wide = PolicyCheckpoint(*float64(tuple(saved)))
    with jax.enable_x64(True):
        directions = chosen_directions(wide, values, draw_update(saved.params, (SEEDS[0], COVERED_STEP, 0)))
        truth = {
            (name, eta): exact_entropy(NETWORK.apply, moved(wide.params, direction, np.asarray(eta)), every) - values.entropy
            for name, direction in directions.items() for eta in ETAS
        }  # fmt: skip
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *directions.values())
    total = REPETITIONS * max(SIZES)
    ids = np.random.default_rng(7).integers(0, len(PROMPTS.texts), total)
    batch, _ = draw(saved.params, ids, (7, 7))
    count = len(directions)
    at = {eta: evaluate(NETWORK.apply, saved.params, stacked, np.full(count, eta), batch, "entropy", count, 256)
          for eta in (0.0, *ETAS)}  # fmt: skip
    found = all_token_stats(NETWORK.apply, saved.params, batch, 256)
    rows: list[tuple[str, ...]] = []
    kept: dict[str, Any] = {}

    def add(label: tuple[str, ...], misses: np.ndarray, *errors: np.ndarray) -> None:
        z = np.abs(misses / errors[0])
        covered = [[float(np.mean(np.abs(misses) < q * error)) for q in (1.0, 1.96)] for error in errors]
        kept[", ".join(label)] = {"covered": covered, "within_3": float(np.mean(z < 3)), "largest": float(np.max(z)),
                                  "bias": float(np.mean(misses / errors[0]))}  # fmt: skip
        cells = [f"{part:.1%}" for pair in covered for part in pair] + ["-"] * (4 - 2 * len(errors))
        rows.append((*label, *cells, f"{np.mean(z < 3):.1%}", f"{np.mean(misses / errors[0]):+.2f}"))

    for size in SIZES:
        parts = [np.arange(size * index, size * (index + 1)) for index in range(REPETITIONS)]
        for eta in ETAS:
            estimates = [
                snis(Evaluation(at[0.0].logp_KN[:1, part], at[0.0].h_KN[:1, part]),
                     Evaluation(at[eta].logp_KN[:, part], at[eta].h_KN[:, part]), seed=index)
                for index, part in enumerate(parts)
            ]  # fmt: skip
            change, jackknife, bootstrap = (
                np.array([getattr(one, name) for one in estimates]) for name in ("change", "jackknife_error", "bootstrap_error")
            )
            for index, name in enumerate(directions):
                label = (f"SNIS, eta = {eta:g}", name, str(size))
                add(label, change[:, index] - truth[name, eta], jackknife[:, index], bootstrap[:, index])
        controls = [baselines(type(found)(*(array[part] for array in found)), batch.mask_BT[part], "entropy") for part in parts]
        chosen = Batch(*(array[: REPETITIONS * size] for array in batch))
        contributions = orders(
            NETWORK.apply, saved.params, stacked, chosen, np.concatenate(controls), second=False, direction_chunk=count,
            sequence_chunk=256,
        ).first_KN.reshape(count, REPETITIONS, size) * REPETITIONS  # fmt: skip
        for index, (name, direction) in enumerate(directions.items()):
            errors = np.sqrt(size) * np.std(contributions[index], axis=1, ddof=1)
            misses = contributions[index].sum(axis=1) - dot(values.gradient, direction)
            add(("first order", name, str(size)), misses, errors)
    print(table(
        ("estimator", "direction", "N_E", "jackknife: 68 %", "95 %", "bootstrap: 68 %", "95 %", "within 3 errors",
         "mean error / s.e."), rows,
    ))  # fmt: skip
    return kept | print_derivatives(wide, directions, every)


def print_derivatives(wide: PolicyCheckpoint, directions: dict[str, Params], every: Enumeration) -> dict[str, Any]:
    print("\n## f. Derivatives of the exact entropy against finite differences, step 3 * 10^-5\n")
    rows, kept, step = [], dict[str, Any](), 3e-5
    for name, direction in directions.items():
        with jax.enable_x64(True):
            found = exact_derivatives(NETWORK.apply, wide.params, direction, every)
            there = [moved(wide.params, direction, np.asarray(k * step)) for k in (-2, -1, 0, 1, 2)]
            h = [exact_entropy(NETWORK.apply, params, every) for params in there]
        first = (h[0] - 8 * h[1] + 8 * h[3] - h[4]) / (12 * step)
        second = (-h[0] + 16 * h[1] - 30 * h[2] + 16 * h[3] - h[4]) / (12 * step**2)
        errors = abs(first / found.first - 1), abs(second / found.second - 1)
        kept[f"derivatives, {name}"] = errors
        rows.append((name, f"{found.first:.4f}", f"{errors[0]:.0e}", f"{found.second:.3f}", f"{errors[1]:.0e}"))
    print(table(("direction", "first", "relative difference", "second", "relative difference"), rows))
    return kept


# --- g: the step -----------------------------------------------------------------------------------------------------------


def print_steps(policies: dict[int, TrainedPolicy]) -> dict[str, Any]:
    print("\n## g. The update in float32: v = b + sum v_i, and eta v = Optax's step\n")
    rows: list[tuple[str, ...]] = []
    kept: dict[str, Any] = {}
    drawn = {(seed, step): draw_update(saved.params, (seed, step, 0)) for seed, policy in policies.items()
             for step, saved in policy.checkpoints.items()}  # fmt: skip
    gradients_of = jax.jit(sequence_gradients, static_argnums=0)
    for max_norm, decay in ((1.0, 0.0), (0.1, 0.1), (np.inf, 0.1)):
        optimizer = rl_optimizer(RL.model_copy(update={"max_norm": max_norm, "weight_decay": decay}))
        init, advance = jax.jit(optimizer.init), jax.jit(optimizer.update)
        hyper = HYPER._replace(weight_decay=decay, max_norm=max_norm)
        found = []
        for (seed, step), batch in drawn.items():
            saved = policies[seed].checkpoints[step]
            gradient = aggregate_gradient(NETWORK.apply, saved.params, batch.batch, batch.weights, 64)
            update = take_apart(hyper, saved, saved.params, gradient)
            each = gradients_of(NETWORK.apply, saved.params, batch.batch, batch.weights.astype(np.float32))
            parts = precondition(update.preconditioner, each)
            total = jax.tree.map(lambda b, v: np.asarray(b) + np.asarray(v).sum(axis=0), update.baseline, parts)
            state = optax.tree.set(init(saved.params), count=saved.count, mu=saved.mu, nu=saved.nu)
            scaled = jax.tree.map(lambda v: np.float32(RL.learning_rate) * np.asarray(v), update.full)
            taken = advance(gradient, state, saved.params)[0]
            found.append((step, float(update.clip) < 1, _apart(total, update.full), _apart(scaled, taken)))
        steps, clipped, sums, taken = map(np.array, zip(*found, strict=True))
        first, later = np.max(sums[steps == 0]), np.max(sums[steps > 0])
        kept[f"{max_norm} {decay}"] = {"sum_at_0": first, "sum": later, "median": np.median(sums), "step": np.max(taken)}
        limit = "none" if np.isinf(max_norm) else f"{max_norm:g}"
        rows.append((limit, f"{decay:g}", f"{np.mean(clipped):.0%}", f"{first:.1e}", f"{later:.1e}", f"{np.median(sums):.1e}",
                     f"{np.max(taken):.1e}"))  # fmt: skip
    print(table(
        ("clipped at norm", "weight decay", "clipped", "relative error of b + sum v_i: update 0, largest", "later, largest",
         "median", "of eta v, largest"), rows,
    ))  # fmt: skip
    return kept


def _apart(one: Params, other: Params) -> float:
    pairs = [(np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)) for a, b in
             zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]  # fmt: skip
    first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))
