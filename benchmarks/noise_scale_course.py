"""The gradient noise scale along a training, and what the learning rate makes of it: `python benchmarks/noise_scale_course.py`.

B_simple = tr(Sigma) / |G|^2 of a network on 1280 digits (L = 2, N = 64, muP, SGD, squared error, one seed), while it trains at
several learning rates eta and batch sizes B. McCandlish et al. 2018 (arXiv 1812.06162) see it grow as the loss falls, and
depend on the temperature eta/B (their appendix C). SGD is displaced from the floor of its valley by its own minibatch noise,
and where that displacement's gradient is most of G, linear theory has

  |G|^2 = sum_i (eta/B) h_i s_i / (2 - eta h_i),   for small eta h_i   B_simple = 2 B / (eta h),   h = tr(H Sigma) / tr(Sigma),

with the eigenvalues h_i of the Hessian H, the variances s_i of single samples' gradients along their vectors, and eta the rate
that the weights feel. Printed: the estimate and its error; the exact value, of every sample's gradient; 2 B / (eta h); and the
estimate after 256 more steps at eta = 1/4, in which the displacement relaxes and the loss hardly moves.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lambda_hat.batch_size.curvature import hvp
from lambda_hat.batch_size.noise_scale import gradient_noise_scale
from lambda_hat.targets.target import Dataset, Target
from lambda_hat.targets.trials import ImagesTask, TrialSpec, to_target, train_trials

#: Near gradient flow, and the steps after which that is measured; and the temperatures compared with it.
SLOW, SLOW_STEPS = 0.25, (16, 64, 256, 1024, 4096)
CASES, STEPS, COOLING = ((1.0, 64), (4.0, 64), (16.0, 64), (4.0, 16), (16.0, 16)), (256, 1024, 4096), 256
#: Samples whose gradients' curvature is averaged.
PROBES = 150


def main() -> int:
    _row("η", "B", "steps", "loss", "B_simple", "exact", "2 B / (η h)", "cooled: loss", "cooled: B_simple")
    print("|" + "---|" * 9)
    for eta, batch_size in ((SLOW, 64), *CASES):
        end = None
        for steps in SLOW_STEPS if eta == SLOW else STEPS:
            (result,) = train_trials([_trial(eta, batch_size, steps)], ends=end)
            end, target = [result.end], to_target(result)
            found = gradient_noise_scale(target, jax.random.key(0))
            exact, curvature = _exact(target)
            cells = [f"{eta:g}", batch_size, steps, f"{result.metrics['final_loss']:.4f}"]
            cells += [f"{found.noise_scale:.4g} ± {found.error:.2g}", f"{exact:.4g}"]
            if eta != SLOW:
                cells.append(f"{2 * batch_size / (result.spec.rates[0] * curvature):.3g}")
                (cooled,) = train_trials([_trial(SLOW, batch_size, steps + COOLING)], ends=end)
                cells += [f"{cooled.metrics['final_loss']:.4f}"]
                cells += [f"{gradient_noise_scale(to_target(cooled), jax.random.key(0)).noise_scale:.3g}"]
            _row(*cells, *["-"] * (9 - len(cells)))
    return 0


def _trial(eta: float, batch_size: int, steps: int) -> TrialSpec:
    task = ImagesTask(n_data=1280, n_test=256)
    return TrialSpec(task=task, batch_size=batch_size, eta=eta, num_steps=steps, precision="float64")


def _exact(target: Target) -> tuple[float, float]:
    """tr(Sigma) / |G|^2 from the gradients of all samples, and h = tr(H Sigma) / tr(Sigma) from some of them."""
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(target.params_star)
        objective = target.spec.objective()

        def gradient(sample: dict[str, jax.Array]) -> jax.Array:
            batch = Dataset({name: array[None] for name, array in sample.items()}, target.dataset.constants)
            return jax.grad(lambda flat: objective.per_sample_loss(unravel(flat), batch)[0])(flat)

        gradients = jax.jit(jax.vmap(gradient))(target.dataset.samples)
        mean = jnp.mean(gradients, axis=0)
        noise = gradients - mean[None]
        some = noise[np.random.default_rng(0).choice(len(noise), PROBES, replace=False)]
        curved = jax.lax.map(lambda v: v @ hvp(objective, target.params_star, target.dataset, v), some)
        trace = jnp.mean(jnp.sum(jnp.square(noise), axis=1))
        return float(trace / jnp.sum(jnp.square(mean))), float(jnp.mean(curved) / jnp.mean(jnp.sum(jnp.square(some), axis=1)))


def _row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
