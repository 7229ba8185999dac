"""Ways to the attribution matrix of an update: `python benchmarks/entropy_speed.py`.

A decoder trains on N_U sequences, by default as many as an update of RL has, and is evaluated on N_E; M[e, i] is the part of
evaluation sequence e in the first-order change of the entropy along training sequence i's part v_i of an AdamW step. All ways
start from the same sequences and update, compute v_i themselves, and must agree.

gradients: `attribution_matrix`, one gradient of each sequence and their products.
jvp: `orders` with all v_i in one vmapped forward-mode pass.
snis, one by one: a forward pass under theta + eta v_i for one v_i after the other, which gives the change at eta alone. Its
  standard error over the evaluation sequences is compared with the first order's: the ratio's square is how many times as many
  sequences it takes for the same precision, and the time at the same precision is that many times its own.

Times are of programs compiled before, the best of the rounds, the ways alternately. Share of peak: the floating-point
operations of the gradients (6 a parameter and token) and of their products over the time and over the best rate of a large
float32 matrix product next to it, on all cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from speed import peak_flops

from lambda_hat.compute.runtime import configure
from lambda_hat.entropy.adamw import AdamW, adam_state, aggregate_gradient, precondition, sequence_gradients, take_apart
from lambda_hat.entropy.attribution import Training, attribution_matrix
from lambda_hat.entropy.estimators import baselines, evaluate, orders
from lambda_hat.entropy.importance import snis
from lambda_hat.entropy.sequences import Batch, all_token_stats
from lambda_hat.specs.settings import Runtime
from lambda_hat.targets.policies.decoder import DecoderSpec, decoder
from lambda_hat.targets.policies.generate import generate
from lambda_hat.targets.policies.objective import group_advantages, sequence_weights
from lambda_hat.targets.policies.spec import RlSpec

VOCABULARY, PROMPT, GROUP = 16, 6, 8
ETA = 1e-3


def draw(network: Any, params: Any, seed: int, prompts: int, group: int, length: int) -> Batch:
    """Completions of random prompts, `group` of each."""
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, (prompts, PROMPT)).astype(np.int32).repeat(group, axis=0)
    keys = jax.random.split(jax.random.key(seed), len(tokens))
    samples = generate(network, params, keys, tokens, np.full(len(tokens), PROMPT, np.int32), length)
    return Batch(np.asarray(samples.tokens), np.asarray(samples.mask))


def best(calls: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    results = {name: call() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - began)
    return {name: min(found) for name, found in times.items()}, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=10, help="the most tokens of a completion")
    parser.add_argument("--training", type=int, default=RlSpec().num_prompts * RlSpec().num_completions, help="N_U")
    parser.add_argument("--evaluation", type=int, default=256, help="N_E")
    parser.add_argument("--chunk", type=int, default=256, help="directions held together, of jvp a quarter")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    configure(Runtime(platform=arguments.platform))

    network = decoder(
        DecoderSpec(width=arguments.width, num_layers=arguments.layers, mlp_width=2 * arguments.width), VOCABULARY
    )
    params = network.init((0,), np.float32)
    apply = network.apply
    train = draw(network, params, 1, arguments.training // GROUP, GROUP, arguments.length)
    evaluation = draw(network, params, 2, arguments.evaluation, 1, arguments.length)
    rewards = np.random.default_rng(3).integers(0, 2, (arguments.training // GROUP, GROUP))
    weights = sequence_weights(group_advantages(rewards), train.mask_BT.sum(1).reshape(-1, GROUP)).ravel()
    gradient = aggregate_gradient(apply, params, train, weights)
    optimizer = optax.adamw(ETA)
    state = optimizer.update(gradient, optimizer.init(params), params)[1]
    update = take_apart(AdamW(0.9, 0.999, 1e-8, 1e-4, 1.0), adam_state(state), params, gradient)
    training = Training(train, weights, update)
    controls = baselines(all_token_stats(apply, params, evaluation), evaluation.mask_BT, "entropy")
    weights32, chunk = weights.astype(np.float32), arguments.chunk
    rows = [slice(index, index + 1) for index in range(arguments.training)]

    @jax.jit
    def parts(params: Any, tokens: Any, mask: Any, weights: Any, preconditioner: Any) -> Any:
        return precondition(preconditioner, sequence_gradients(apply, params, Batch(tokens, mask), weights))

    def part(chosen: slice) -> Any:
        return parts(params, train.tokens_BT[chosen], train.mask_BT[chosen], weights32[chosen], update.preconditioner)

    def by_jvp(chosen: slice, chunk: int) -> np.ndarray:
        found = orders(apply, params, part(chosen), evaluation, controls, second=False, direction_chunk=chunk)
        return found.first_KN

    def by_snis() -> Any:
        found = [evaluate(apply, params, part(row), np.array([ETA]), evaluation, direction_chunk=1) for row in rows]
        return type(found[0])(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    times, results = best(
        {
            "gradients": lambda: attribution_matrix(apply, params, training, evaluation, controls, grad_chunk=chunk).T,
            "jvp": lambda: by_jvp(slice(None), max(1, chunk // 4)),
            "snis, one by one": by_snis,
        },
        arguments.rounds,
    )
    matrix = results["gradients"]
    np.testing.assert_allclose(results["jvp"], matrix, rtol=0, atol=1e-3 * np.abs(matrix).max())
    base = evaluate(apply, params, part(rows[0]), np.zeros(1), evaluation, direction_chunk=1)
    changes = snis(base, results["snis, one by one"])
    moving = np.flatnonzero(weights)  # a part that is 0 is known exactly
    first_error = np.sqrt(matrix.shape[1]) * np.std(matrix, axis=1, ddof=1)[moving]
    more = float(np.median((changes.jackknife_error[moving] / ETA / first_error) ** 2))

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    apart = np.abs(results["jvp"] - matrix).max() / np.abs(matrix).max()
    print(
        f"{size} parameters, N_U = {arguments.training}, N_E = {arguments.evaluation}, sequences of {train.tokens_BT.shape[1]} "
        f"tokens; largest difference from jvp {apart:.1e} of the largest entry; snis needs {more:.1f} times as many sequences "
        f"at eta = {ETA:g} for the same standard error."
    )
    sequences = arguments.training + arguments.evaluation
    flops = size * (6 * train.tokens_BT.shape[1] * sequences + 2 * arguments.training * arguments.evaluation)
    print(f"gradients: {flops / 1e9:.1f} Gflop, {flops / times['gradients'] / peak_flops():.0%} of the peak.\n")
    print("| way | seconds | times gradients' |\n|---|---|---|")
    times["snis at the same precision"] = times["snis, one by one"] * more
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.3f} | {seconds / times['gradients']:.1f} |")


if __name__ == "__main__":
    main()
