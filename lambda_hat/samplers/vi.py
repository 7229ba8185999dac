"""Gaussian variational inference: mean-field (BlackJAX) or with a covariance of low rank beside the diagonal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.base import Info, Sampler, SamplerSpec
from lambda_hat.samplers.posterior import Posterior

#: Where the standard deviations (as BlackJAX's, in units of 1/sqrt(nbeta + localization)) and the factor's entries start.
START_LOG_SCALE, START_FACTOR = -2.0, 0.1


class ViSpec(SamplerSpec):
    """Gaussian variational inference: independent draws of the Gaussian nearest to the posterior.

    q = N(mu, S (I + V V^T) S) with S diagonal and V of shape (d, rank), 0 for mean-field, maximises the evidence lower bound
    E_q[log p - log q] on the whole data during burn-in: Adam on the bound's gradient from `num_samples` draws (sticking the
    landing, Roeder et al. 2017), the rate falling to 0 as a cosine. Then every draw is independent.

    The draws are of q, not of the posterior, an error no number of draws removes. Their log_weight = log p - log q tells how
    big it is (Pareto-smoothed importance sampling: with a shape k above 0.7, q does not do).
    """

    kind: Literal["vi"] = "vi"
    num_draws: int = Field(1000, ge=4, description="recorded draws per chain, after burn-in")
    num_burnin_steps: int = Field(2000, ge=1, description="steps of the optimisation")
    num_steps_bw_draws: int = Field(1, ge=1, le=1, description="1: draws are independent, and each has its own weight")
    rank: int = Field(0, ge=0, le=256, description="columns of V; 0 = mean-field")
    num_samples: int = Field(4, ge=1, description="draws per estimate of the bound's gradient")
    learning_rate: float = Field(0.05, gt=0, description="Adam's at the start; of log scales, and of means in posterior widths")

    def gradients_per_step(self, num_data: int) -> float:
        return 1.0

    def fge(self, num_data: int) -> float:
        return super().fge(num_data) + self.num_chains * self.num_burnin_steps * self.num_samples

    def algorithm(self) -> Sampler:
        return _build(self.rank, self.num_samples, self.num_burnin_steps)


class State(NamedTuple):
    """position (d,): the draw; log_weight (): its log p - log q; family: the approximation's state."""

    position: jax.Array
    log_weight: jax.Array
    family: Any


class LowRankState(NamedTuple):
    """mu (d,); rho (d,), log S; factor (d, rank), V; opt_state: Optax's."""

    mu: jax.Array
    rho: jax.Array
    factor: jax.Array
    opt_state: Any


class Family(NamedTuple):
    """A family of Gaussians over z, (d,), with the signatures of BlackJAX's.

    init: (rng_key, z, optimizer) -> state. step: (rng_key, state, logdensity_fn, optimizer, num_samples) -> (state, info).
    sample: (rng_key, state, num_samples) -> (num_samples, d). log_q: state -> (z -> scalar).
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any]]
    sample: Callable[..., jax.Array]
    log_q: Callable[[Any], Callable[[jax.Array], jax.Array]]


def mean_field() -> Family:
    """BlackJAX's mean-field family."""
    from blackjax.vi import meanfield_vi

    return Family(
        lambda rng_key, z, optimizer: meanfield_vi.init(z, optimizer),
        meanfield_vi.step,
        meanfield_vi.sample,
        lambda state: meanfield_vi.generate_meanfield_logdensity(state.mu, state.rho),
    )


def low_rank(rank: int) -> Family:
    """N(mu, S (I + V V^T) S), S = diag(exp(rho)), V (d, rank): z = mu + S (e + V f) with e and f standard normal."""
    import optax

    def init(rng_key: jax.Array, z: jax.Array, optimizer: optax.GradientTransformation) -> LowRankState:
        # V = 0 is a saddle: no direction would be better than another.
        factor = START_FACTOR * jax.random.normal(rng_key, (z.size, rank), z.dtype)
        parameters = (jnp.zeros_like(z), jnp.full_like(z, START_LOG_SCALE), factor)
        return LowRankState(*parameters, optimizer.init(parameters))

    def draw(rng_key: jax.Array, parameters: tuple, num_samples: int) -> jax.Array:
        mu, rho, factor = parameters
        key_e, key_f = jax.random.split(rng_key)
        e = jax.random.normal(key_e, (num_samples, mu.size), mu.dtype)
        f = jax.random.normal(key_f, (num_samples, rank), mu.dtype)
        return mu[None] + jnp.exp(rho)[None] * (e + f @ factor.T)

    def log_density(parameters: tuple) -> Callable[[jax.Array], jax.Array]:
        mu, rho, factor = parameters
        # By Woodbury and the determinant lemma, through the Cholesky factor of I + V^T V.
        cholesky = jnp.linalg.cholesky(jnp.eye(rank, dtype=mu.dtype) + factor.T @ factor)
        log_det = 2 * (jnp.sum(rho) + jnp.sum(jnp.log(jnp.diagonal(cholesky))))

        def log_q(z: jax.Array) -> jax.Array:
            y = (z - mu) * jnp.exp(-rho)
            explained = jax.scipy.linalg.solve_triangular(cholesky, factor.T @ y, lower=True)
            return -0.5 * (y @ y - explained @ explained + log_det + mu.size * jnp.log(2 * jnp.pi))

        return log_q

    def step(
        rng_key: jax.Array, state: LowRankState, logdensity_fn: Callable, optimizer: optax.GradientTransformation,
        num_samples: int,
    ) -> tuple[LowRankState, jax.Array]:  # fmt: skip
        def divergence(parameters: tuple) -> jax.Array:
            z = draw(rng_key, parameters, num_samples)
            # Sticking the landing: the gradient is through the draws alone, without variance once q is the posterior.
            log_q = log_density(jax.lax.stop_gradient(parameters))
            return jnp.mean(jax.vmap(log_q)(z) - jax.vmap(logdensity_fn)(z))

        parameters = state[:3]
        value, gradient = jax.value_and_grad(divergence)(parameters)
        updates, opt_state = optimizer.update(gradient, state.opt_state, parameters)
        mu, rho, factor = optax.apply_updates(parameters, updates)
        return LowRankState(mu, rho, factor, opt_state), value

    return Family(
        init, step, lambda key, state, num_samples: draw(key, state[:3], num_samples), lambda state: log_density(state[:3])
    )


@functools.cache
def _build(rank: int, num_samples: int, num_burnin_steps: int) -> Sampler:
    import optax

    family = low_rank(rank) if rank else mean_field()

    def unit(posterior: Posterior) -> jax.Array:
        """z = u / unit is of order 1 in the stiff directions of a loss with curvatures of order 1."""
        return 1 / jnp.sqrt(posterior.nbeta + posterior.localization)

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        state = family.init(rng_key, position, optax.adam(numbers["learning_rate"]))
        return State(position, jnp.zeros((), position.dtype), state)

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        fit_key, draw_key = jax.random.split(rng_key)
        scale = unit(posterior)
        dtype = scale.dtype

        def fit() -> tuple[Any, jax.Array]:
            decay = 0.5 * (1 + jnp.cos(jnp.pi * index.astype(dtype) / num_burnin_steps))
            optimizer = optax.adam(numbers["learning_rate"] * decay)
            new, _ = family.step(fit_key, state.family, lambda z: posterior.logdensity_fn(scale * z), optimizer, num_samples)
            # An update that is no number would be the end; another sample may give one.
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]))
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state.family), finite

        fitting = index < num_burnin_steps
        fitted, finite = jax.lax.cond(fitting, fit, lambda: (state.family, jnp.asarray(True)))
        z = family.sample(draw_key, fitted, 1)[0]
        position = scale * z
        logdensity = posterior.logdensity_fn(position)
        log_q = family.log_q(fitted)(z) - position.size * jnp.log(scale)
        difference = posterior.loss_difference(position, logdensity)
        failed = ~(finite & jnp.isfinite(difference))
        one = jnp.ones_like(difference)
        work = 1 + num_samples * fitting.astype(dtype)
        return State(position, logdensity - log_q, fitted), Info(difference, one, failed.astype(dtype), work * one)

    return Sampler(init, step, ("log_weight",))
