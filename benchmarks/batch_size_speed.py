"""Trials of a batch-size study against a loop of one trial at a time: `python benchmarks/batch_size_speed.py`.

Both sides train the same networks (two layers, 64 units, muP, SGD, mean squared error of centred predictions) on the same
images with the same minibatches, a grid of 13 learning rates, 3 richnesses and 3 seeds at each batch size, for three epochs of
8192 images of Fashion-MNIST or 24 of 1024 digits, and measure the loss on all the data and the test images at the end.

ours: `train_trials`, one call for a batch size.
loop: the plain way to write it. A jitted step of one trial, compiled once; a Python loop over steps that gathers the minibatch
from NumPy arrays and waits for the step's loss; the predictions at theta_0 are computed once a trial. It is measured on a few
trials of the grid, before and after ours, and the better of the two is extrapolated to all of them.

Times are of programs compiled before. share of peak: the floating-point operations of the training's matrix products - forward,
weight gradients, input gradients but the first layer's - over the time of the call, evaluation included, and over the peak, the
best rate of a large float32 matrix product by JAX or NumPy next to the measurement.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from speed import peak_flops

from lambda_hat.compute.runtime import configure
from lambda_hat.specs.settings import Runtime
from lambda_hat.targets.trials import ImagesTask, TrialSpec, train_trials
from lambda_hat.targets.trials.engine import batch_indices
from lambda_hat.targets.trials.network import forward, init_params

ETAS, RICHNESSES, SEEDS = 2.0 ** np.linspace(-10, 2, 13), (0.1, 1.0, 10.0), range(3)
#: Trials of the loop that are measured, each way.
LOOP_TRIALS = 2
BOUND = 50.0


def grid(dataset: Any, batch_size: int, width: int = 64, epochs: int = 3, etas: Any = ETAS) -> list[TrialSpec]:
    n_data = 1024 if dataset == "digits" else 8192
    return [
        TrialSpec(
            task=ImagesTask(dataset=dataset, n_data=n_data, n_test=512), width=width, batch_size=batch_size,
            num_epochs=epochs * 8192 // n_data, eta=float(eta), richness=richness, seed=seed,
        )
        for eta, richness, seed in itertools.product(etas, RICHNESSES, SEEDS)
    ]  # fmt: skip


@jax.jit
def step(params: Any, x: jax.Array, y: jax.Array, f0: jax.Array, scale: jax.Array, rate: jax.Array) -> Any:
    def mean_loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(scale * forward(params, x) - f0 - y))

    loss, gradient = jax.value_and_grad(mean_loss)(params)
    return jax.tree.map(lambda w, g: w - rate * g, params, gradient), loss


raw_output = jax.jit(forward)


def loop(spec: TrialSpec) -> tuple[list[float], float]:
    """One trial: the losses of its steps, and that on all the data at the end."""
    data = spec.task.load(spec.precision)
    scale, rate = np.float32(spec.scale), np.float32(spec.rates[0])
    params = init_params((spec.seed, 0), spec.widths, spec.precision)
    f0, f0_test = (np.asarray(scale * raw_output(params, x)) for x in (data.x, data.x_test))
    losses = []
    for indices in batch_indices(spec, spec.seed, 0, spec.total_steps):
        params, loss = step(params, data.x[indices], data.y[indices], f0[indices], scale, rate)
        losses.append(float(loss))
    final_loss, _ = (
        float(np.mean(np.square(np.asarray(scale * raw_output(params, x)) - own - y), dtype=np.float64))
        for x, y, own in ((data.x, data.y, f0), (data.x_test, data.y_test, f0_test))
    )
    return losses, final_loss


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def training_flops(specs: list[TrialSpec]) -> float:
    """Of the matrix products of all steps of all trials; a multiplication and an addition are two."""
    spec = specs[0]
    products = [(2 if layer == 0 else 3) * a * b for layer, (a, b) in enumerate(itertools.pairwise(spec.widths))]
    return 2.0 * spec.batch_size * sum(products) * spec.total_steps * len(specs)


def compile_for(specs: list[TrialSpec]) -> None:
    train_trials([spec.model_copy(update={"num_steps": 1, "num_epochs": None}) for spec in specs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    arguments = parser.parse_args()
    configure(Runtime(platform="cpu"))

    print("| images | width | B | trials | ours: trials/s | loop: trials/s | ratio | share of peak |")
    print("|---|---|---|---|---|---|---|---|")
    totals = []
    for dataset in ("fashion-mnist", "digits"):
        ours_total = loop_total = 0.0
        for batch_size in arguments.batch_sizes:
            specs = grid(dataset, batch_size)
            # Of the middle of the grid; a trial that diverges takes as long.
            some = range(len(specs) // 2, len(specs) // 2 + LOOP_TRIALS)
            compile_for(specs)
            loop(specs[some[0]].model_copy(update={"num_steps": 1, "num_epochs": None}))
            before, by_loop = seconds(lambda specs=specs, some=some: [loop(specs[index]) for index in some])
            ours, results = seconds(lambda specs=specs: train_trials(specs))
            after, _ = seconds(lambda specs=specs, some=some: [loop(specs[index]) for index in some])
            for index, (losses, final_loss) in zip(some, by_loop, strict=True):
                # float32: rounding grows along the training.
                np.testing.assert_allclose(results[index].losses[:5], losses[:5], rtol=1e-3)
                np.testing.assert_allclose(results[index].metrics["final_loss"], final_loss, rtol=5e-2)
            by_loop_seconds = min(before, after) / len(some) * len(specs)
            ours_total, loop_total = ours_total + ours, loop_total + by_loop_seconds
            print(
                f"| {dataset} | 64 | {batch_size} | {len(specs)} | {len(specs) / ours:.1f} "
                f"| {len(specs) / by_loop_seconds:.2f} | {by_loop_seconds / ours:.1f} "
                f"| {training_flops(specs) / ours / peak_flops():.0%} |",
                flush=True,
            )
        totals.append(f"{dataset}: {ours_total:.1f} s against {loop_total:.0f} s, {loop_total / ours_total:.1f} times")
    wide = grid("fashion-mnist", 256, 512, 2, ETAS[5:7])
    compile_for(wide)
    ours, _ = seconds(lambda: train_trials(wide))
    share = training_flops(wide) / ours / peak_flops()
    print(f"| fashion-mnist | 512 | 256 | {len(wide)} | {len(wide) / ours:.2f} | | | {share:.0%} |")
    print(
        f"\nThe whole grid of width 64 - {'; '.join(totals)} (the loop extrapolated from {LOOP_TRIALS} trials at each batch "
        f"size; the bound of {BOUND:.0f} is out of reach where the loop itself is near the peak).\n"
        "Ours is bound by the first layer's matrix products on Fashion-MNIST, and on digits at small batch sizes by small "
        "products and the overhead of operations; the loop by the overhead of a step at small batch sizes and by the same "
        "products at large ones."
    )


if __name__ == "__main__":
    main()
