"""Training of a policy in device loops that can be cut anywhere: warm start on right answers, then updates by rewards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lambda_hat.compute.chunks import Pace, Progress, no_progress, run_in_chunks
from lambda_hat.store.arrays import flatten
from lambda_hat.targets.policies.decoder import Decoder
from lambda_hat.targets.policies.generate import generate, sequences
from lambda_hat.targets.policies.lora import LoraSpec, init_adapters
from lambda_hat.targets.policies.objective import (
    RlSpec,
    group_advantages,
    negative_log_likelihoods,
    policy_loss,
    sequence_weights,
)
from lambda_hat.targets.policies.policy import Policy, answer_loss
from lambda_hat.targets.policies.pretrained import PretrainedSpec
from lambda_hat.targets.policies.tasks import TokenizedTask, rewards
from lambda_hat.targets.target import Dataset, Params, Save, Target, Unfinished, mean_float64, num_params

if TYPE_CHECKING:
    from lambda_hat.targets.policies.spec import PolicySpec

#: Columns of the curves of both phases.
WARM_START_CURVE = ("loss", "accuracy")
RL_CURVE = ("accuracy", "entropy", "token_entropy", "length", "gradient_norm")


class PolicyCheckpoint(NamedTuple):
    """What is trained, after an update, with AdamW's state: count, (), its steps so far; mu and nu, the decayed means, without
    bias correction, of the gradients (after clipping) and of their squares."""

    params: Params
    count: Any
    mu: Params
    nu: Params


class TrainedPolicy(NamedTuple):
    """A trained policy, on the host.

    params: what is trained, the network or its adapters, after the last update. checkpoints: by update, of
      `spec.rl.saved_steps`; 0 is the warm-started policy.
    warm_start: curves over its steps, each of its batch before the step: `loss`, the mean of -log pi(answer), and `accuracy`,
      the mean of pi(answer).
    history: curves over the updates, each of its batch before the update: `accuracy`, the mean reward; `entropy`, the mean over
      sequences of sum_t H_t; `token_entropy`, the mean over tokens; `length`, tokens a completion; `gradient_norm`, unclipped.
    base: the frozen network below adapters, None where there are none.
    """

    spec: PolicySpec
    params: Params
    checkpoints: dict[int, PolicyCheckpoint]
    warm_start: dict[str, np.ndarray]
    history: dict[str, np.ndarray]
    base: Params | None = None


class _Carry(NamedTuple):
    params: Params
    optimizer: Any
    warm_curve: Any  # (max_steps, 2), NaN from the early stop on
    curve: Any  # (num_steps, 5)
    warm: Any  # whether the warm start reached its accuracy


def rl_optimizer(rl: Any) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; the fields of `RlSpec` may be traced, and max_norm infinite."""
    return optax.chain(
        optax.clip_by_global_norm(rl.max_norm),
        optax.adamw(rl.learning_rate, rl.beta1, rl.beta2, rl.epsilon, weight_decay=rl.weight_decay),
    )


class _Numbers(NamedTuple):
    """Fields of `RlSpec` that are traced; the same for the warm start."""

    learning_rate: Any
    beta1: Any
    beta2: Any
    epsilon: Any
    weight_decay: Any
    max_norm: Any


def _numbers(rl: RlSpec, dtype: Any) -> _Numbers:
    max_norm = np.inf if rl.max_norm is None else rl.max_norm
    fields = (rl.learning_rate, rl.beta1, rl.beta2, rl.epsilon, rl.weight_decay, max_norm)
    return _Numbers(*(np.asarray(number, dtype) for number in fields))


@jax.jit
def _new_state(params: Params) -> Any:
    """Of the optimizer."""
    return rl_optimizer(_numbers(RlSpec(), jax.tree.leaves(params)[0].dtype)).init(params)


def _stepped(carry: _Carry, gradient: Params, numbers: _Numbers) -> _Carry:
    updates, optimizer = rl_optimizer(numbers).update(gradient, carry.optimizer, carry.params)
    return carry._replace(params=optax.apply_updates(carry.params, updates), optimizer=optimizer)


@functools.cache
def _warm_start(network: Decoder, batch_size: int) -> Callable[..., _Carry]:
    """The compiled loop of the warm start; rates, the number of steps and the target accuracy are traced."""

    @functools.partial(jax.jit, donate_argnums=0)
    def warm_start(
        carry: _Carry,
        dataset: Dataset,
        key: jax.Array,
        numbers: _Numbers,
        target: jax.Array,
        start: jax.Array,
        count: jax.Array,
    ) -> _Carry:
        def loss(params: Params, batch: Dataset) -> tuple[jax.Array, jax.Array]:
            losses = negative_log_likelihoods(network.apply, params, batch.samples["tokens"], batch.samples["mask"])
            return jnp.mean(losses), jnp.mean(jnp.exp(-losses))

        def goes_on(state: tuple) -> jax.Array:
            index, carry = state
            return (index < start + count) & ~carry.warm

        def body(state: tuple) -> tuple:
            index, carry = state
            batch = dataset.take(jax.random.randint(jax.random.fold_in(key, index), (batch_size,), 0, dataset.num_data))
            (value, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(carry.params, batch)
            carry = _stepped(carry, gradient, numbers)
            curve = carry.warm_curve.at[index].set(jnp.stack([value, accuracy]))
            return index + 1, carry._replace(warm_curve=curve, warm=accuracy >= target)

        return jax.lax.while_loop(goes_on, body, (start, carry))[1]

    return warm_start


@functools.cache
def _update(
    network: Decoder, lora: LoraSpec | None, max_length: int, num_prompts: int, num_completions: int
) -> Callable[..., _Carry]:
    """The compiled loop of the updates; rates, their number and the frozen network are traced."""

    @functools.partial(jax.jit, donate_argnums=0)
    def update(
        carry: _Carry,
        base: Params | None,
        prompts: Dataset,
        end_tokens: jax.Array,
        key: jax.Array,
        numbers: _Numbers,
        start: jax.Array,
        count: jax.Array,
    ) -> _Carry:
        def body(index: jax.Array, carry: _Carry) -> _Carry:
            prompt_key, completion_key = jax.random.split(jax.random.fold_in(key, index))
            ids = jax.random.randint(prompt_key, (num_prompts,), 0, prompts.num_data)
            batch = prompts.take(jnp.repeat(ids, num_completions)).samples
            keys = jax.random.split(completion_key, len(batch["lengths"]))
            policy = Policy(network, base, lora, carry.params)
            samples = generate(network, policy.full, keys, batch["tokens"], batch["lengths"], max_length, end_token=end_tokens)
            dtype = samples.log_probs.dtype
            right = rewards(samples.completions, batch["answers"], end_tokens).astype(dtype)
            groups = (num_prompts, num_completions)
            lengths = jnp.sum(samples.mask, axis=1).reshape(groups)
            weights = sequence_weights(group_advantages(right.reshape(groups)), lengths).reshape(-1)
            loss = functools.partial(policy_loss, policy.apply)
            gradient = jax.grad(loss)(carry.params, samples.tokens, samples.mask, weights)
            num_tokens = jnp.sum(samples.mask).astype(dtype)
            entropy = jnp.sum(samples.entropies)
            row = jnp.stack([
                jnp.mean(right), entropy / len(right), entropy / num_tokens, num_tokens / len(right), optax.tree.norm(gradient),
            ])  # fmt: skip
            return _stepped(carry, gradient, numbers)._replace(curve=carry.curve.at[index].set(row))

        return jax.lax.fori_loop(start, start + count, body, carry)

    return update


def train_policy(
    spec: PolicySpec, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None
) -> TrainedPolicy:
    """Trains until the warm start has its accuracy (or its max_steps), then `rl.num_steps` updates with a new AdamW state,
    of the network or, with `spec.lora`, of new adapters to it.

    Each update draws prompts and completions at temperature 1 from the policy as it is, once; groups whose rewards are all
    equal add nothing to it.

    Args:
      resume, save: see `TargetSpec.build`; a resumed call gives bit for bit the numbers of an uninterrupted one. Steps count
        from the warm start's first, with updates from warm_start.max_steps on.

    Raises:
      FloatingPointError: the parameters are not finite at the end.
      InvalidInput: see `PolicySpec.build`.
    """
    # On GPUs JAX would multiply float32 matrices in TF32, ten bits of mantissa.
    with jax.enable_x64(spec.precision == "float64"), jax.default_matmul_precision("highest"):
        training = _Training(spec, progress, save)
        start = 0 if resume is None else training.resume(resume)
        training.warm_start(start)
        training.updates(start)
        return training.trained()


class _Training:
    """The training of one policy: what its steps take, and how far it has got.

    base, carry: the frozen network, of updates of adapters, and what the loops carry. checkpoints: after the updates so far.
    """

    def __init__(self, spec: PolicySpec, progress: Progress, save: Save | None) -> None:
        self.spec, self.progress, self.save = spec, progress, save
        self.dtype, self.pretrained = np.dtype(spec.precision), isinstance(spec.model, PretrainedSpec)
        self.total, self.pace = spec.warm_start.max_steps + spec.rl.num_steps, Pace()
        self.warm_key, self.rl_key = jax.random.split(jax.random.key(spec.seed))
        self.base: Params | None = None
        self.carry = self._fresh(spec.initial(self.dtype))
        self.checkpoints: dict[int, Params] = {}

    def _fresh(self, params: Params) -> _Carry:
        curves = (
            np.full((self.spec.warm_start.max_steps, len(WARM_START_CURVE)), np.nan, self.dtype),
            np.zeros((self.spec.rl.num_steps, len(RL_CURVE)), self.dtype),
        )
        params = jax.device_put(params)
        return jax.device_put(_Carry(params, _new_state(params), *curves, np.asarray(False)))

    def _with_adapters(self) -> tuple[Params | None, _Carry]:
        """The frozen network and what the updates train, with a new optimizer state."""
        carry, lora = self.carry, self.spec.lora
        if lora is None:
            return None, carry._replace(optimizer=_new_state(carry.params))
        adapters = jax.device_put(init_adapters(lora, carry.params, (self.spec.seed, 1)))
        return carry.params, carry._replace(params=adapters, optimizer=_new_state(adapters))

    def _saved(self, base: Params | None, carry: _Carry) -> Any:
        """What an unfinished training keeps: of a pretrained model not the network, whose files are there."""
        return None if self.pretrained else base, carry

    def resume(self, unfinished: Unfinished) -> int:
        """Takes up an unfinished training, if it is one of this; the steps it has done."""
        in_updates = unfinished.step > self.spec.warm_start.max_steps
        known = self._with_adapters() if in_updates else (self.base, self.carry)
        if (restored := unfinished.restore(self._saved(*known))) is None:
            return 0
        self.base, self.carry = known[0] if self.pretrained else restored[0], restored[1]
        self.checkpoints = dict(unfinished.checkpoints)
        return unfinished.step

    def _after_chunk(self, carry: _Carry, done: int) -> None:
        if (save := self.save) is not None and done < self.total:
            leaves = jax.tree.leaves(self._saved(self.base, carry))
            self.pace(lambda: save(Unfinished(done, [np.array(leaf) for leaf in leaves], self.checkpoints)))

    def warm_start(self, start: int) -> None:
        """Imitation of the right answers from step `start` on; the policy that the updates begin with."""
        warm = self.spec.warm_start
        dataset = jax.device_put(answers_dataset(self.spec.tokenized(), None))
        advance = _warm_start(self.spec.decoder(), warm.batch_size)
        numbers = _numbers(RlSpec(learning_rate=warm.learning_rate, max_norm=None), self.dtype)
        target = np.asarray(warm.target_accuracy, self.dtype)

        def after_chunk(carry: _Carry, done: int) -> None:
            self._after_chunk(carry, done)
            accuracy = np.asarray(carry.warm_curve)[:, 1]
            known = accuracy[np.isfinite(accuracy)]
            self.progress(done, self.total, "steps", f"warm start, accuracy {known[-1]:.3g}" if known.size else "warm start")

        self.carry = run_in_chunks(
            lambda carry, first, count: advance(
                carry, dataset, self.warm_key, numbers, target, np.int32(first), np.int32(count)
            ),
            self.carry, start, warm.max_steps, after_chunk,
        )  # fmt: skip
        if start <= warm.max_steps:
            self.base, self.carry = self._with_adapters()
            self.checkpoints = {0: _checkpoint(self.carry)} if 0 in self.spec.rl.saved_steps else {}

    def updates(self, start: int) -> None:
        """The updates by reward, from step `start` of the whole training on."""
        rl, before = self.spec.rl, self.spec.warm_start.max_steps
        task = self.spec.tokenized()
        prompts = task.prompts()
        fields = {"tokens": prompts.tokens, "lengths": prompts.lengths, "answers": prompts.answers}
        prompt_data, end_tokens = jax.device_put(Dataset(fields, {})), np.array(task.end_tokens, np.int32)
        width = prompts.answers.shape[1]
        update = _update(self.spec.decoder(), self.spec.lora, width, rl.num_prompts, rl.num_completions)
        numbers = _numbers(rl, self.dtype)

        def advance(carry: _Carry, start: int, count: int) -> _Carry:
            """`count` updates, stopping at every checkpoint on the way."""
            first, last = start - before, start - before + count
            for step in [*(step for step in rl.saved_steps if first < step < last), last]:
                arguments = (prompt_data, end_tokens, self.rl_key, numbers, np.int32(first), np.int32(step - first))
                carry = update(carry, self.base, *arguments)
                first = step
                if step in rl.saved_steps:
                    self.checkpoints[step] = _checkpoint(carry)
            return carry

        def after_chunk(carry: _Carry, done: int) -> None:
            self._after_chunk(carry, done)
            self.progress(done, self.total, "steps", f"accuracy {np.asarray(carry.curve)[done - before - 1, 0]:.3g}")

        self.carry = run_in_chunks(advance, self.carry, max(start, before), self.total, after_chunk)

    def trained(self) -> TrainedPolicy:
        """The policy after the last update."""
        spec, carry = self.spec, self.carry
        base, params, warm_curve, curve = jax.tree.map(np.array, (self.base, carry.params, carry.warm_curve, carry.curve))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            raise FloatingPointError(
                "Training must end with finite parameters; it diverged with "
                f"warm_start.learning_rate={spec.warm_start.learning_rate} and rl.learning_rate={spec.rl.learning_rate}. "
                "Lower them."
            )
        warm_curve = warm_curve[~np.isnan(warm_curve[:, 0])]
        return TrainedPolicy(
            spec, params,
            {step: PolicyCheckpoint(**checkpoint) for step, checkpoint in self.checkpoints.items()},
            dict(zip(WARM_START_CURVE, warm_curve.T, strict=True)), dict(zip(RL_CURVE, curve.T, strict=True)),
            base,
        )  # fmt: skip


def answers_dataset(task: TokenizedTask, base: Params | None) -> Dataset:
    """Prompts followed by their right answers: `tokens`, (n, T), int32, and `mask`, (n, T), bool; a frozen network `base` as
    constants, named by `store.arrays.flatten`."""
    prompts = task.prompts()
    tokens, mask = sequences(prompts.tokens, prompts.lengths, prompts.answers, task.end_token)
    return Dataset({"tokens": np.asarray(tokens), "mask": np.asarray(mask)}, {} if base is None else flatten(base))


def to_target(policy: TrainedPolicy) -> Target:
    """The target whose w* is the trained policy; see `PolicySpec`.

    Its metrics are, of w* and every checkpoint, init_loss and accuracy, the mean probability of the right answer over all
    prompts, exactly; and of the warm start its number of steps. Its states are {"count", "mu", "nu"}: see `PolicyCheckpoint`.
    """
    spec = policy.spec
    dataset = answers_dataset(spec.tokenized(), policy.base)
    values = _loss_and_accuracy(spec.decoder(), spec.lora)
    measured = [{"step": step} | mean_float64(values, saved.params, dataset) for step, saved in policy.checkpoints.items()]
    # The last checkpoint is after the last update.
    metrics = {name: value for name, value in measured[-1].items() if name != "step"} | {
        "num_params": num_params(policy.params), "num_data": dataset.num_data,
        "warm_start_steps": len(policy.warm_start["loss"]), "checkpoints": measured,
    }  # fmt: skip
    history = {"step": np.arange(1, spec.rl.num_steps + 1)} | policy.history
    checkpoints = {step: saved.params for step, saved in policy.checkpoints.items()}
    states = {step: {"count": saved.count, "mu": saved.mu, "nu": saved.nu} for step, saved in policy.checkpoints.items()}
    return Target(spec, policy.params, dataset, metrics, history, checkpoints=checkpoints, states=states)


@functools.cache
def _loss_and_accuracy(network: Decoder, lora: LoraSpec | None) -> Callable[[Params, Dataset], dict[str, jax.Array]]:
    def values(params: Params, dataset: Dataset) -> dict[str, jax.Array]:
        losses = answer_loss(network, lora).per_sample_loss(params, dataset)
        return {"init_loss": losses, "accuracy": jnp.exp(-losses)}

    return values


def _checkpoint(carry: _Carry) -> dict[str, Any]:
    """The fields of a `PolicyCheckpoint`, copied to the host: the device's own are donated to the next step."""
    adam = {name: optax.tree.get(carry.optimizer, name) for name in ("count", "mu", "nu")}
    return jax.tree.map(np.array, {"params": carry.params, **adam})
