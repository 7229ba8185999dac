"""Tempered sequential Monte Carlo (Del Moral et al. 2006), of BlackJAX's parts: the posterior and its normaliser."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.adaptation import AdaptedSpec
from lambda_hat.samplers.base import Info, Sampler
from lambda_hat.samplers.hmc import trajectory_length
from lambda_hat.samplers.posterior import Posterior

#: Accepted moves a particle must have had on average before t rises again: copies of one particle that are resampled before
#: they part are soon all there is.
MIN_MOVES = 0.75


class SmcSpec(AdaptedSpec):
    """Tempered sequential Monte Carlo from the localisation's Gaussian; gives the free energy too.

    A chain is a system of particles. They start as draws of N(0, I / localization) and pass through the densities
    exp(-t nbeta (L_n(w) - L_n(w*)) - localization/2 |u|^2) as t rises from 0 to 1, in each step of burn-in as far as leaves a
    share `target_ess` of them effective: reweighted, resampled, and moved by an HMC trajectory. What is left of burn-in and the
    draws are such moves at t = 1; a draw's loss is the particles' mean. The weights' means give log_normalizer,
    log Z = log E[exp(-nbeta (L_n(w) - L_n(w*)))] over that Gaussian, consistently as particles are added; the free energy is
    -log Z.

    If burn-in ends before t = 1, its last step jumps there and this and all later steps count as divergent.
    """

    kind: Literal["smc"] = "smc"
    num_chains: int = Field(2, ge=1, description="independent systems of particles")
    num_burnin_steps: int = Field(300, ge=20, description="steps in which t reaches 1, none of which enters an estimate")
    num_draws: int = Field(400, ge=4, description="recorded draws per system, after burn-in")
    step_size: float = Field(0.3, gt=0, description="step size, in the particles' own widths, at which adaptation starts")
    target_acceptance: float = Field(0.95, gt=0, lt=1, description="acceptance rate the step size is adapted to")
    num_particles: int = Field(32, ge=4, description="particles of a system")
    num_integration_steps: int = Field(5, ge=1, description="leapfrog steps per trajectory")
    target_ess: float = Field(0.6, gt=0, lt=1, description="share of the particles that stays effective as t rises")

    def gradients_per_step(self, num_data: int) -> float:
        return float(self.num_particles * (1 + self.num_integration_steps))

    def algorithm(self) -> Sampler:
        return _build(self.num_particles, self.num_integration_steps, self.num_burnin_steps)


class State(NamedTuple):
    """particles (N, d); t (); log_normalizer (); moves (), accepted since t rose, per particle; jumped (), 1 if t = 1 was not
    reached in time, else 0; step_size (); inverse_mass_matrix (d,), its diagonal."""

    particles: jax.Array
    t: jax.Array
    log_normalizer: jax.Array
    moves: jax.Array
    jumped: jax.Array
    step_size: jax.Array
    inverse_mass_matrix: jax.Array

    @property
    def position(self) -> jax.Array:
        """One particle: a draw as good as any other."""
        return self.particles[..., 0, :]


@functools.cache
def _build(num_particles: int, num_integration_steps: int, num_burnin_steps: int) -> Sampler:
    import blackjax  # starts JAX's backend, which the settings choose
    from blackjax.mcmc.hmc import HMCState
    from blackjax.smc.ess import ess_solver
    from blackjax.smc.resampling import systematic
    from blackjax.smc.solver import dichotomy

    kernel = blackjax.hmc.build_kernel()
    last = num_burnin_steps - 1

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        shape = (num_particles, position.size)
        particles = jax.random.normal(rng_key, shape, position.dtype) / jnp.sqrt(posterior.localization)
        zero = jnp.zeros((), position.dtype)
        return State(particles, zero, zero, zero + 1, zero, numbers["step_size"], jnp.ones_like(position))

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        resampling_key, moving_key = jax.random.split(rng_key)
        gamma = posterior.localization

        def log_prior(u: jax.Array) -> jax.Array:
            return -0.5 * gamma * jnp.sum(jnp.square(u))

        def log_likelihood(u: jax.Array) -> jax.Array:
            return posterior.logdensity_fn(u) - log_prior(u)

        particles = state.particles
        values, gradients = jax.vmap(jax.value_and_grad(log_likelihood))(particles)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)

        rest = 1 - state.t
        # The effective number does not depend on a constant, and at its maximum 0 large values do not cancel in float32.
        centred = values - jnp.max(values)
        # Particles of density 0 are lost whatever the rise.
        alive = jnp.mean(jnp.isfinite(values).astype(rest.dtype))
        rise = ess_solver(lambda _: centred, particles, numbers["target_ess"] * alive, rest, dichotomy)
        rise = jnp.where(state.moves > MIN_MOVES, rise, 0.0)
        arrived, overdue = rise >= rest, index >= last
        t = jnp.where(arrived | overdue, 1.0, state.t + rise).astype(rest.dtype)
        rises = t > state.t
        # No rise leaves weights and particles alone, also those of density 0.
        log_weights = jnp.where(rises, (t - state.t) * values, 0.0)
        log_mean = jax.scipy.special.logsumexp(log_weights) - jnp.log(jnp.asarray(num_particles, t.dtype))
        weights = jax.nn.softmax(log_weights)
        chosen = jnp.where(rises, systematic(resampling_key, weights, num_particles), jnp.arange(num_particles))

        adapting = index < num_burnin_steps
        variances = weights @ jnp.square(particles - (weights @ particles)[None])
        # After a jump a few particles have all the weight, whose variances are no scale to move in.
        jumps = overdue & ~arrived
        inverse_mass_matrix = jnp.where(adapting & ~jumps, variances, state.inverse_mass_matrix)
        u, values, gradients = particles[chosen], values[chosen], gradients[chosen]
        start = HMCState(u, jax.vmap(log_prior)(u) + t * values, -gamma * u + t * gradients)
        length = trajectory_length(index, num_integration_steps)
        moved, info = jax.vmap(
            lambda key, chain: kernel(
                key, chain, lambda u: log_prior(u) + t * log_likelihood(u), state.step_size, inverse_mass_matrix, length
            )
        )(jax.random.split(moving_key, num_particles), start)

        acceptance_rate = jnp.mean(info.acceptance_rate)
        # The posterior narrows as t rises: a step size that follows at a steady rate, since averages over particles are quiet.
        excess = acceptance_rate - numbers["target_acceptance"]
        step_size = jnp.where(adapting, state.step_size * jnp.exp(excess), state.step_size)
        moves = jnp.where(rises, 0.0, state.moves) + acceptance_rate
        jumped = jnp.maximum(state.jumped, jumps.astype(t.dtype))
        log_likelihoods = jnp.where(t > 0, (moved.logdensity - jax.vmap(log_prior)(moved.position)) / t, values)
        difference = -jnp.mean(log_likelihoods) / posterior.nbeta
        failed = jnp.where(jnp.isfinite(difference), jnp.mean(info.is_divergent.astype(t.dtype)), 1.0)
        diverged = jnp.maximum(jumped, failed)
        state = State(moved.position, t, state.log_normalizer + log_mean, moves, jumped, step_size, inverse_mass_matrix)
        work = num_particles * (1 + length).astype(t.dtype)
        return state, Info(difference, acceptance_rate, diverged, work)

    return Sampler(init, step, ("log_normalizer",))
