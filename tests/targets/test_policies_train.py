"""Policies learn as the equations say, in one go or in several, and are targets like any other."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from lambda_hat.llc.artifacts import load_state, load_target, publish_target
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.store import Store
from lambda_hat.targets.policies.decoder import DecoderSpec
from lambda_hat.targets.policies.generate import generate, token_statistics
from lambda_hat.targets.policies.lora import LoraSpec, merge
from lambda_hat.targets.policies.objective import group_advantages, policy_loss, sequence_weights
from lambda_hat.targets.policies.spec import PolicySpec, RlSpec, WarmStartSpec, policy_of
from lambda_hat.targets.policies.tasks import ModularTask, rewards
from lambda_hat.targets.policies.train import to_target, train_policy
from lambda_hat.targets.singular import TanhSpec

pytestmark = pytest.mark.usefixtures("library_promotion")

SPEC = PolicySpec(
    task=ModularTask(modulus=3),
    model=DecoderSpec(width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16),
    warm_start=WarmStartSpec(learning_rate=5e-3, batch_size=32, max_steps=300, target_accuracy=0.45),
    rl=RlSpec(num_steps=80, num_prompts=8, num_completions=8, learning_rate=3e-3, weight_decay=0.1, num_checkpoints=3),
    precision="float64",
    seed=2,
)


@pytest.fixture(scope="module")
def saves():
    return []


@pytest.fixture(scope="module")
def policy(saves):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return train_policy(SPEC, save=saves.append)


def equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first._asdict(), second._asdict())


def test_weights_make_the_loss_the_mean_over_prompts():
    rng = np.random.default_rng(0)
    rewards_ug = rng.integers(2, size=(3, 4)).astype(np.float64)
    mask = np.arange(6)[None, None] < rng.integers(1, 6, size=(3, 4, 1))
    logits = rng.standard_normal((12, 6, 5))
    tokens = rng.integers(5, size=(12, 6)).astype(np.int32)
    log_probs = np.zeros((12, 6))
    for t in range(1, 6):
        before = logits[:, t - 1]
        log_probs[:, t] = before[np.arange(12), tokens[:, t]] - np.log(np.sum(np.exp(before), axis=1))
    expected = 0.0
    for b in range(3):
        longest = max(mask[b, g].sum() for g in range(4))
        for g in range(4):
            advantage = rewards_ug[b, g] - rewards_ug[b].mean()
            expected -= advantage * np.sum(log_probs[4 * b + g][mask[b, g]]) / (4 * longest) / 3
    weights = sequence_weights(group_advantages(rewards_ug), mask.sum(axis=2)).reshape(-1)
    loss = policy_loss(lambda params, tokens: params, logits, tokens, mask.reshape(12, 6), weights)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_the_warm_start_stops_at_its_accuracy(policy):
    accuracy = policy.warm_start["accuracy"]
    assert 1 < len(accuracy) < 300
    assert accuracy[-1] >= 0.45
    assert np.all(accuracy[:-1] < 0.45)


def test_rewards_raise_the_accuracy_and_lower_the_entropy(policy):
    history = policy.history
    assert {len(curve) for curve in history.values()} == {80}
    assert np.mean(history["accuracy"][-10:]) > np.mean(history["accuracy"][:5]) + 0.2
    assert np.mean(history["entropy"][-10:]) < np.mean(history["entropy"][:5])
    np.testing.assert_allclose(history["token_entropy"] * history["length"], history["entropy"], rtol=1e-12)


@pytest.mark.slow
def test_an_update_is_adamw_on_the_gradient_of_its_batch(policy):
    one = train_policy(SPEC.model_copy(update={"rl": SPEC.rl.model_copy(update={"num_checkpoints": 81})}))
    equal(one.checkpoints[0], policy.checkpoints[0])
    before, after = one.checkpoints[0], one.checkpoints[1]
    assert (int(before.count), int(after.count)) == (0, 1)
    # The batch of the first update, drawn again.
    network, prompts = SPEC.decoder(), SPEC.tokenized().prompts()
    rl_key = jax.random.split(jax.random.key(SPEC.seed))[1]
    prompt_key, completion_key = jax.random.split(jax.random.fold_in(rl_key, 0))
    ids = np.repeat(np.asarray(jax.random.randint(prompt_key, (8,), 0, 9)), 8)
    keys = jax.random.split(completion_key, 64)
    samples = generate(network, before.params, keys, prompts.tokens[ids], prompts.lengths[ids], SPEC.tokenized().max_length)
    right = np.asarray(rewards(samples.completions, prompts.answers[ids]), np.float64)
    assert one.history["accuracy"][0] == np.mean(right)
    weights = np.zeros(64)
    for b in range(8):
        own = slice(8 * b, 8 * b + 8)
        weights[own] = (right[own] - right[own].mean()) / (8 * 8 * samples.mask[own].sum(1).max())

    def loss(params):
        log_probs, _ = token_statistics(network.apply, params, samples.tokens)
        return -(weights[:, None] * samples.mask * log_probs).sum()

    gradient = jax.jit(jax.grad(loss))(before.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    assert one.history["gradient_norm"][0] == pytest.approx(norm, rel=1e-9)
    clip, rl = min(1.0, SPEC.rl.max_norm / norm), SPEC.rl

    def check(g, mu, nu, old, new):
        g = clip * np.asarray(g)
        np.testing.assert_allclose(mu, 0.1 * g, rtol=1e-8, atol=1e-14)
        np.testing.assert_allclose(nu, 0.001 * g**2, rtol=1e-8, atol=1e-20)
        direction = g / (np.abs(g) + rl.epsilon) + rl.weight_decay * old
        clear = np.abs(g) > 1e-6  # of smaller ones rounding decides the direction
        np.testing.assert_allclose((new - old)[clear], -rl.learning_rate * direction[clear], rtol=1e-5)

    jax.tree.map(check, gradient, after.mu, after.nu, before.params, after.params)


def test_checkpoints_are_kept_and_the_last_is_the_end(policy):
    assert tuple(policy.checkpoints) == SPEC.checkpoint_steps == (0, 40, 80)
    assert [int(saved.count) for saved in policy.checkpoints.values()] == [0, 40, 80]
    jax.tree.map(np.testing.assert_array_equal, policy.checkpoints[80].params, policy.params)
    assert np.all(policy.checkpoints[0].mu["norm"]["scale"] == 0)


def test_a_resumed_training_gives_the_same_numbers(policy, saves):
    steps = [unfinished.step for unfinished in saves]
    assert steps == sorted(steps)
    early = next(unfinished for unfinished in saves if not unfinished.checkpoints)
    late = next(unfinished for unfinished in reversed(saves) if unfinished.checkpoints)
    for unfinished in (early, late):
        resumed = train_policy(SPEC, resume=unfinished)
        equal(resumed._replace(spec=None), policy._replace(spec=None))


def test_a_policy_is_a_target(policy):
    target = to_target(policy)
    assert TypeAdapter(PolicySpec).validate_json(json.dumps(SPEC.model_dump(mode="json")), strict=True) == SPEC
    assert target.dataset.num_data == SPEC.num_data == target.metrics["num_data"] == 9
    per_sample_loss = jax.jit(SPEC.objective().per_sample_loss)
    for step, row in zip(SPEC.checkpoint_steps, target.metrics["checkpoints"], strict=True):
        losses = per_sample_loss(target.checkpoints[step], target.dataset)
        assert row == {
            "step": step, "init_loss": pytest.approx(float(np.mean(losses))),
            "accuracy": pytest.approx(float(np.mean(np.exp(-losses)))),
        }  # fmt: skip
        assert target.states[step] == {name: getattr(policy.checkpoints[step], name) for name in ("count", "mu", "nu")}
    assert target.metrics["accuracy"] == row["accuracy"]
    assert {len(curve) for curve in target.history.values()} == {80}


LORA = SPEC.model_copy(
    update={"lora": LoraSpec(rank=2, matrices=("*/query", "*/down")), "rl": SPEC.rl.model_copy(update={"num_steps": 20})}
)


@pytest.fixture(scope="module")
def adapted():
    saves = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return train_policy(LORA, save=saves.append), saves


def test_adapters_are_trained_alone(policy, adapted):
    trained, _ = adapted
    # The same warm start; its network is frozen, and the first checkpoint computes what it does.
    jax.tree.map(np.testing.assert_array_equal, trained.base, policy.checkpoints[0].params)
    first, last = trained.checkpoints[0], trained.checkpoints[20]
    assert set(first.params) == {"layer_0/query", "layer_0/down"}
    assert jax.tree.structure(first.mu) == jax.tree.structure(first.params)
    assert all(np.all(leaves["b"] == 0) and np.any(last.params[module]["b"] != 0) for module, leaves in first.params.items())
    assert trained.history["accuracy"][0] == policy.history["accuracy"][0]
    assert trained.history["entropy"][0] == pytest.approx(policy.history["entropy"][0], rel=1e-12)
    assert np.mean(trained.history["accuracy"][-5:]) > np.mean(trained.history["accuracy"][:5])


def test_a_resumed_training_of_adapters_gives_the_same_numbers(adapted):
    trained, saves = adapted
    for unfinished in (next(save for save in saves if not save.checkpoints), saves[-1]):
        equal(train_policy(LORA, resume=unfinished)._replace(spec=None), trained._replace(spec=None))


def test_a_policy_with_adapters_is_a_target_of_its_own(adapted, tmp_path):
    target = to_target(adapted[0])
    store = Store(str(tmp_path))
    publish_target(target, store)
    loaded = load_target(store, target.target_id, 20)
    per_sample_loss = jax.jit(LORA.objective().per_sample_loss)
    losses = per_sample_loss(loaded.params_star, loaded.dataset)
    assert target.metrics["init_loss"] == pytest.approx(float(np.mean(losses)), rel=1e-12)
    gradient = jax.jit(jax.grad(lambda params: per_sample_loss(params, loaded.dataset).sum()))(loaded.params_star)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapted[0].params)
    # The network with the adapters merged has the same losses.
    policy = policy_of(loaded)
    merged = merge(LORA.lora, policy.base, policy.params)
    np.testing.assert_allclose(jax.jit(SPEC.objective().per_sample_loss)(merged, loaded.dataset), losses, rtol=1e-9)
    logits = jax.jit(lambda apply, params, tokens: apply(params, tokens))(
        policy.apply, policy.params, loaded.dataset.samples["tokens"]
    )
    np.testing.assert_allclose(
        logits, jax.jit(policy.decoder.apply)(merged, loaded.dataset.samples["tokens"]), rtol=1e-9, atol=1e-12
    )
    state = load_state(store, target.target_id, 20)
    assert int(state["count"]) == 20
    jax.tree.map(np.testing.assert_array_equal, state["nu"], adapted[0].checkpoints[20].nu)
    with pytest.raises(InvalidInput, match="family policy is needed"):
        policy_of(TanhSpec().build())


def test_a_pretrained_model_has_no_warm_start():
    model = {"kind": "pretrained", "path": "nowhere", "sha256": "0" * 64}
    spec = PolicySpec.from_dict({"model": model, "warm_start": {"max_steps": 0}})
    assert spec.num_data == 121
    with pytest.raises(ValidationError, match="max_steps must be 0 for a pretrained model"):
        PolicySpec.from_dict({"model": model})
    with pytest.raises(InvalidInput, match="which is none of these"):
        spec.decoder()


def test_a_diverged_training_is_refused():
    spec = SPEC.model_copy(update={"warm_start": SPEC.warm_start.model_copy(update={"learning_rate": 1e200})})
    with pytest.raises(FloatingPointError, match=r"diverged with warm_start.learning_rate=1e\+200"):
        train_policy(spec)
