"""Entropy studies: what is asked for, what is drawn and measured, what the store holds, and how the command shows it."""

import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
from flow_runs import made, runner, tasks, ui_artifacts

from lambda_hat.cli import main
from lambda_hat.entropy import artifacts
from lambda_hat.entropy.attribution import evaluate_references
from lambda_hat.entropy.batches import draw_evaluation, draw_update, features
from lambda_hat.entropy.measure import chunk_sizes, in_bfloat16, measure
from lambda_hat.entropy.plan import check_entropy, describe, make_entropy_plan
from lambda_hat.entropy.sequences import all_token_stats
from lambda_hat.entropy.spec import EntropySpec, EvaluationSpec, SequenceSpec, UpdateSpec
from lambda_hat.entropy.study import influence_table
from lambda_hat.entropy.summary import preview, table
from lambda_hat.llc import artifacts as steps
from lambda_hat.specs.settings import EntropyExperiment, Settings, load_settings
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.arrays import unpack_arrays
from lambda_hat.store.manifest import entropy_address, target_address
from lambda_hat.store.store import Store
from lambda_hat.targets.policies.spec import policy_of

POLICY = {
    "family": "policy", "task": {"kind": "modular_addition", "modulus": 3},
    "model": {"kind": "decoder", "width": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 16},
    "warm_start": {"max_steps": 60, "batch_size": 16},
    "rl": {"num_steps": 4, "num_prompts": 4, "num_completions": 4, "num_checkpoints": 2, "weight_decay": 0.01},
}  # fmt: skip
SETTINGS = Settings.model_validate({
    "presets": {
        "target": {"policy": POLICY, "bowl": {"family": "quadratic"}},
        "sampler": {"hmc": {"kind": "hmc", "num_chains": 2, "num_draws": 30, "num_burnin_steps": 20}},
    },
    "entropy": {
        "default": {"sweeps": [["target=policy", "evaluation.num_prompts=32", "update.num_prompts=3"]]},
        "two": {"sweeps": [["target=policy", "seed=0"], ["target=policy", "seed=1", "etas=0.01"]]},
    },
})  # fmt: skip


#: Sequences held together: the same in most tests, which then share their programs.
CHUNK = 4


def spec_of(**fields):
    target = POLICY | {"checkpoint": 4}
    update = {"num_prompts": 3, "num_completions": 4}
    return EntropySpec.from_dict(
        {"target": target, "update": update, "evaluation": {"num_prompts": 40}, "etas": [1e-3, 1e-2]} | fields
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A policy in a store, and one measured update of it."""
    store = Store(str(tmp_path_factory.mktemp("entropy") / "store"))
    spec = spec_of(exact=True)
    with jax.numpy_dtype_promotion("standard"):  # Optax's
        steps.build_target(spec.target, store)
    return SimpleNamespace(store=store, spec=spec, manifest=artifacts.measure_update(spec, store, CHUNK))


@pytest.fixture(scope="module")
def policy(stored):
    target = steps.load_target(stored.store, stored.spec.target.target_id, 4)
    state = steps.load_state(stored.store, stored.spec.target.target_id, 4)
    return SimpleNamespace(target=target, state=state, policy=policy_of(target), task=stored.spec.target.tokenized())


# --- What is asked for ---------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_the_default():
    plan = make_entropy_plan(SETTINGS)
    assert [spec.target.checkpoint for spec in plan.specs] == [0, 4]
    assert all(spec.evaluation.num_prompts == 32 and spec.update.num_completions == 8 for spec in plan.specs)
    assert plan.runs == []


def test_overrides_multiply_and_replace():
    plan = make_entropy_plan(SETTINGS, None, ["target.checkpoint=4", "seed=0,1", "evaluation.num_prompts=8", "etas=1e-4,1e-3"])
    assert [(spec.seed, spec.evaluation.num_prompts, spec.etas) for spec in plan.specs] == [
        (0, 8, (1e-4, 1e-3)), (1, 8, (1e-4, 1e-3)),
    ]  # fmt: skip
    swept = make_entropy_plan(SETTINGS, None, ["target.checkpoint=4", "etas=[1e-4],[1e-3,1e-2]"])
    assert [spec.etas for spec in swept.specs] == [(1e-4,), (1e-3, 1e-2)]
    named = make_entropy_plan(SETTINGS, None, ["target.checkpoint=4", "update.prompt_ids=0,5,7"])
    assert named.specs[0].update.prompt_ids == (0, 5, 7)
    assert len(make_entropy_plan(SETTINGS, "two").specs) == 4
    assert len({spec.entropy_id for spec in make_entropy_plan(SETTINGS, "two").specs}) == 4


def test_a_study_samples_its_policies():
    plan = make_entropy_plan(SETTINGS, None, ["sampler=hmc", "sampler.num_draws=40"])
    assert [(run.target_id, run.target.checkpoint) for run in plan.runs] == [
        (spec.target.target_id, spec.target.checkpoint) for spec in plan.specs
    ]
    assert {run.sampler.num_draws for run in plan.runs} == {40}


def test_options_are_the_studys_own():
    plan = make_entropy_plan(SETTINGS, None, ["grad_chunk_size=2", "tf_batch_size=16", "plots=[training,etas]"])
    assert (plan.options.grad_chunk_size, plan.options.tf_batch_size, plan.options.plots) == (2, 16, ("training", "etas"))
    assert plan.specs == make_entropy_plan(SETTINGS).specs


@pytest.mark.parametrize(
    "text",
    [
        "update.sequences=[{prompt='1+1=', completion='2', reward=1}, {prompt='1+1=', completion='0, 1', reward=0}]",
        "update.sequences={prompt='1+1=',completion='2',reward=1},{prompt='1+1=',completion='0, 1',reward=0}",
        'update.sequences=[{"prompt": "1+1=", "completion": "2", "reward": 1.0}, '
        '{"prompt": "1+1=", "completion": "0, 1", "reward": 0}]',
        "update={num_completions=2, num_prompts=3, "
        "sequences=[{prompt='1+1=',completion='2',reward=1},{prompt='1+1=',completion='0, 1',reward=0}]}",
    ],
)
def test_sequences_are_written_as_tables(text):
    sequences = tuple(
        SequenceSpec(prompt="1+1=", completion=text, reward=reward) for text, reward in (("2", 1.0), ("0, 1", 0.0))
    )
    update = UpdateSpec(num_prompts=3, num_completions=2, sequences=sequences)
    made = make_entropy_plan(SETTINGS, None, ["target.checkpoint=4"]).specs[0].model_copy(update={"update": update})
    overrides = ["target.checkpoint=4", *(["update.num_completions=2"] if text.startswith("update.") else []), text]
    for settings, given in ((SETTINGS, overrides), (settings_with(overrides), [])):
        (spec,) = make_entropy_plan(settings, None, given).specs
        assert spec == made
        assert spec.entropy_id == made.entropy_id


def settings_with(overrides):
    sweep = ["target=policy", "evaluation.num_prompts=32", "update.num_prompts=3", *overrides]
    return SETTINGS.model_copy(update={"entropy": {"default": EntropyExperiment(sweeps=[sweep])}})


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["update.sequences={prompt=a, completion=b}"], "measurement.update.sequences[0].reward must be given"),
        (["update.sequences=[{promt=a}]"], "sequences[0].promt is no field that exists. Did you mean 'prompt'?"),
        (["update.sequences.prompt=a"], "got 'update.sequences.prompt'"),
        (["update.sequences=3"], "update.sequences[0] must be a table of fields; got 3"),
        (["target=bowl"], "study is of policies; 'bowl' is a target of family 'quadratic'"),
        (["evaluation.num_prompt=3"], "Did you mean 'evaluation.num_prompts'"),
        (["eta=0.1"], "Did you mean 'etas'"),
        (["etas=0.1,-1"], "above 0"),
        (["update.num_completions=1"], "num_completions must be greater than or equal to 2; got 1"),
        (["update.prompt_ids=9", "target.checkpoint=4"], "below the task's number of prompts, 9; got 9"),
        (["update.prompts='1+1='", "update.prompt_ids=1"], "leave one out"),
        (["evaluation.prompts=[\"1+1=\",\"1+2=\"]"], "an answer each; got 2 prompts and 0 answers"),
        (["evaluation.num_prompts=1"], "greater than or equal to 2"),
        (["target.checkpoint=3"], "checkpoint must be a training step that the target saves; got 3"),
        (["sampler.num_draws=40"], "sampler=NAME; got none"),
        (["plots=[nothing]"], "plot must be a known name"),
        (["grad_chunk_size=-1"], "greater than or equal to 0"),
        (["seed=range(0,9999)", "update.num_prompts=1,2"], "at most 10000 measurements"),
        (["exact=true", "target.task.modulus=101"], "at most 16777216 completions"),
        (["integrand=entropie"], "integrand must be 'entropy'"),
        (["target.task.max_length=0"], "greater than or equal to 1; got 0"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(overrides, match):
    with pytest.raises(InvalidInput) as error:
        make_entropy_plan(SETTINGS, None, overrides)
    assert match in str(error.value)


def test_the_committed_studies_are_valid():
    check_entropy(load_settings())
    text = describe(load_settings())
    assert "policy-lora" in text
    assert "evaluation.num_prompts" in text
    assert "dln" not in text


# --- What is drawn ---------------------------------------------------------------------------------------------------------


def test_flat_groups_are_redrawn(policy):
    spec = UpdateSpec(num_prompts=6, num_completions=4, max_resample_attempts=50)
    update = draw_update(spec, policy.policy, policy.task, 0)
    rewards = update.drawn.rewards.reshape(-1, 4)
    assert update.shortfall == 0
    assert len(rewards) == update.groups_asked == 6
    assert (rewards.max(axis=1) > rewards.min(axis=1)).all()
    np.testing.assert_allclose(update.drawn.advantages, (rewards - rewards.mean(axis=1, keepdims=True)).ravel(), rtol=1e-12)
    assert (update.drawn.attempts.max() > 0) == (update.attempts > 0)
    assert (np.diff(update.drawn.prompt_ids.reshape(-1, 4), axis=1) == 0).all()


def test_a_shortfall_is_reported(policy):
    spec = UpdateSpec(num_prompts=30, num_completions=2, max_resample_attempts=0)
    update = draw_update(spec, policy.policy, policy.task, 0)
    assert 0 < update.shortfall < 30
    assert len(update.drawn.rewards) == 2 * (30 - update.shortfall)
    whole = draw_update(spec.model_copy(update={"tolerance": 0.0}), policy.policy, policy.task, 0)
    assert whole.shortfall == update.shortfall
    with pytest.raises(InvalidInput, match="whose rewards differ"):
        draw_update(spec.model_copy(update={"tolerance": 2.0}), policy.policy, policy.task, 0)


def test_prompts_by_number_written_out_and_whole_sequences(policy):
    named = draw_evaluation(EvaluationSpec(prompt_ids=(4, 4, 8)), policy.policy, policy.task, 0, 0)
    assert named.prompts.tolist() == ["1+1=", "1+1=", "2+2="]
    own = draw_evaluation(EvaluationSpec(prompts=("0+9=", "7+7="), answers=("9", "5")), policy.policy, policy.task, 0, 0)
    assert own.prompts.tolist() == ["0+9=", "7+7="]
    assert own.rewards.shape == (2,)
    rows = [("1+1=", "2", 1.0), ("1+1=", "0", 0.0), ("0+1=", "1", 1.0), ("0+1=", "2", 0.25)]
    spec = UpdateSpec.from_dict({
        "num_completions": 2,
        "sequences": [dict(zip(("prompt", "completion", "reward"), row, strict=True)) for row in rows],
    })  # fmt: skip
    update = draw_update(spec, policy.policy, policy.task, 0)
    assert update.drawn.advantages.tolist() == [0.5, -0.5, 0.375, -0.375]
    assert update.drawn.prompt_ids.tolist() == [0, 0, 1, 1]
    tokens = update.drawn.batch.tokens_BT[0][update.drawn.batch.mask_BT[0]]
    assert tokens.tolist() == [*policy.task.tokenizer.encode("2"), policy.task.end_token]
    with pytest.raises(InvalidInput, match="characters"):
        draw_evaluation(EvaluationSpec(prompts=("a", "b"), answers=("1", "1")), policy.policy, policy.task, 0, 0)


def test_completions_cut_off_are_counted(stored, policy):
    """By default a completion has at most the tokens of the longest answer, two here; with more, more of them end."""
    found, shares = artifacts.load_measured(stored.store, stored.spec.entropy_id), []
    for name, rows, summary in (
        ("update", found.update, found.summary), ("eval_00", found.evaluations[0], found.summary["evaluations"][0]),
    ):  # fmt: skip
        arrays = unpack_arrays(stored.store.read(stored.manifest.address, f"{name}.npz"))
        ended = [policy.task.end_token in row[mask] for row, mask in zip(arrays["tokens"], arrays["mask"], strict=True)]
        assert rows["truncated"].tolist() == [not end for end in ended]
        assert summary["truncated"] == rows["truncated"].sum()
    assert found.summary["max_length"] == 2
    for length in (None, 2, 6):
        task = policy.task._replace(task=policy.task.task.model_copy(update={"max_length": length}))
        drawn = draw_evaluation(EvaluationSpec(num_prompts=300), policy.policy, task, 0, 0)
        assert drawn.completions_NL.shape == (300, length or 2)
        stats = all_token_stats(policy.policy.apply, policy.policy.params, drawn.batch)
        shares.append(features(drawn, stats, task)["truncated"].mean())
    assert shares[0] == shares[1] > shares[2]
    assert shares[0] > 0


def test_batches_differ_by_seed_and_number_alone(policy):
    def tokens(seed, number):
        return draw_evaluation(EvaluationSpec(num_prompts=20), policy.policy, policy.task, seed, number).batch.tokens_BT

    np.testing.assert_array_equal(tokens(0, 0), tokens(0, 0))
    assert not np.array_equal(tokens(0, 0), tokens(0, 1))
    assert not np.array_equal(tokens(0, 0), tokens(1, 0))


# --- What is measured ------------------------------------------------------------------------------------------------------


def test_measurement(stored):
    found = artifacts.load_measured(stored.store, stored.spec.entropy_id)
    assert found.spec == stored.spec
    [matrix], [first] = found.matrices, found.summary["evaluations"]
    assert matrix.shape == (40, 12)
    assert first["grad_first"] == pytest.approx(matrix.sum(), rel=1e-12)
    assert first["first"] == pytest.approx(first["baseline_first"] + first["grad_first"], rel=1e-3)
    sums = found.influence.query("eta == 0.01")["first_order"].to_numpy()
    np.testing.assert_allclose(sums, 0.01 * matrix.sum(axis=0), rtol=1e-12)
    features = found.update
    np.testing.assert_allclose(features["surprisal"], features["mean_surprisal"] * features["length"], rtol=1e-12)
    assert (features["max_surprisal"] <= features["surprisal"] + 1e-6).all()
    assert ((features["completion"] == features["answer"]) == (features["reward"] == 1)).all()
    assert features["id"].iloc[3] == f"{stored.spec.entropy_id}.update.3"
    changes = found.changes.set_index("eta")
    np.testing.assert_allclose(
        changes["residual"], changes["full"] - changes["baseline"] - changes["grad_sum"], rtol=1e-9, atol=1e-12
    )
    # Against enumeration: the first order at a small eta, importance sampling within its errors at both.
    assert abs(changes["first_order"] - changes["exact"]).loc[0.001] < 4 * changes["first_order_error"].loc[0.001]
    assert (abs(changes["full"] - changes["exact"]) < 4 * changes["full_error"]).all()
    assert abs(first["entropy"] - first["exact_entropy"]) < 4 * first["entropy_error"]


def test_files(stored):
    names = {file.name for file in stored.manifest.files}
    assert {"summary.json", "eval_00_delta_matrix.npy", "eval_00_grad_eta/eta_0.01.json", "update.npz"} < names
    for part, rows in (("full", 1), ("baseline", 1), ("grad", 12), ("baseline_plus_grad", 12)):
        data = stored.store.read(stored.manifest.address, f"eval_00_per_sequence/{part}/eta_0.01.npy")
        assert np.load(io.BytesIO(data), allow_pickle=False).shape == (rows, 40)
    diagnostics = json.loads(stored.store.read(stored.manifest.address, "eval_00_grad_eta/eta_0.01.json"))
    change = np.load(io.BytesIO(stored.store.read(stored.manifest.address, "eval_00_grad_eta/eta_0.01.npy")))
    assert diagnostics["grad"]["change"] == change.tolist()
    assert diagnostics["full"]["eta"] == 0.01
    assert len(diagnostics["grad"]["log_weight_quantiles"]) == 12
    assert json.loads(stored.store.read(stored.manifest.address, "summary.json"))["checkpoint"] == 4


class Cut(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 6])
def test_an_interrupted_measurement_goes_on(stored, policy, after):
    """Cut after a chunk of the matrix, after the first of an eta, after a whole eta: the same numbers to the last bit."""
    spec, saved = spec_of(), []

    def save(work):
        saved.append(work)
        if len(saved) == after:
            raise Cut

    # Every chunk is saved, however long saving takes.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lambda_hat.entropy.measure.Pace.__call__", lambda self, save: save())
        with pytest.raises(Cut):
            measure(spec, policy.target, policy.state, CHUNK, save=save)
    again = artifacts._unpack_work(artifacts._pack_work(saved[-1]))
    counted = []
    resumed, _ = measure(
        spec, policy.target, policy.state, CHUNK, resume=again,
        progress=lambda done, total, unit, note: counted.append((done, total)),
    )  # fmt: skip
    assert counted[0] == (4 * after, 36)
    assert counted[-1] == (36, 36)
    whole = artifacts.load_measured(stored.store, stored.spec.entropy_id)
    np.testing.assert_array_equal(resumed.matrices[0], whole.matrices[0])
    pd.testing.assert_frame_equal(resumed.influence, whole.influence, check_exact=True)
    np.testing.assert_array_equal(resumed.changes["full"], whole.changes["full"])


def test_chunks_change_rounding_alone(stored, policy):
    whole = artifacts.load_measured(stored.store, stored.spec.entropy_id)
    other, _ = measure(spec_of(), policy.target, policy.state, grad_chunk_size=5, tf_batch_size=7)
    np.testing.assert_allclose(other.matrices[0], whole.matrices[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(other.influence["change"], whole.influence["change"], atol=1e-6)


def test_half_precision_is_near(policy):
    batch = draw_evaluation(EvaluationSpec(num_prompts=20), policy.policy, policy.task, 0, 0).batch
    full = all_token_stats(policy.policy.apply, policy.policy.params, batch)
    half = all_token_stats(in_bfloat16(policy.policy.apply), policy.policy.params, batch)
    assert half.logp_BT.dtype == np.float32
    np.testing.assert_allclose(half.entropies_BT, full.entropies_BT, atol=0.05)
    assert np.abs(half.entropies_BT - full.entropies_BT).max() > 1e-4


def test_half_precision_changes_survive(stored, policy):
    """bfloat16 rounds away the difference of policies that are 1e-4 apart: changes are those of the policy's own precision."""
    full, half = (
        measure(spec_of(etas=[1e-4, 1e-3], forward=forward), policy.target, policy.state, CHUNK)[0]
        for forward in ("full", "bfloat16")
    )
    for column in ("full", "grad_sum", "baseline"):
        np.testing.assert_allclose(half.changes[column], full.changes[column], rtol=0.1, err_msg=column)
    scale = np.abs(full.influence["change"]).groupby(full.influence["eta"]).transform("max")
    assert (np.abs(half.influence["change"] - full.influence["change"]) < 0.1 * scale).all()
    np.testing.assert_allclose(half.matrices[0].sum(), full.matrices[0].sum(), rtol=0.1)
    assert half.summary["evaluations"][0]["entropy"] == full.summary["evaluations"][0]["entropy"]


def test_rows_of_other_settings_differ(stored, capsys):
    """In every table: those of the flow, of the study and of the command."""
    specs = [stored.spec, *(spec_of(exact=True, **own) for own in ({"forward": "bfloat16"}, {"clip": 5.0}))]
    for spec in specs:
        artifacts.measure_update(spec, stored.store, CHUNK)
    rows = table(stored.store, specs)
    assert {(row["forward"], row["clip"]) for row in rows} == {("full", "None"), ("bfloat16", "None"), ("full", "5.0")}
    made = artifacts.publish_study("three", [spec.entropy_id for spec in specs], stored.store, [])
    for name in ("results.csv", "changes.csv"):
        read = pd.read_csv(io.BytesIO(stored.store.read(made.address, name)))
        assert len(read[["forward", "clip"]].drop_duplicates()) == 3, name
    assert main(["entropy", made.id, "--where", "sequence=0", "eta=0.01", "--store", stored.store.uri]) == 0
    assert {"forward", "clip"} < set(capsys.readouterr().out.split("\n")[0].split())


def test_references_are_evaluated_once(policy, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments[4])
        return evaluate_references(*arguments)

    monkeypatch.setattr("lambda_hat.entropy.measure.evaluate_references", counted)
    measure(spec_of(evaluation={"num_prompts": 10, "num_batches": 2}), policy.target, policy.state, CHUNK)
    assert calls == [(1e-3, 1e-2)] * 2


def test_chunk_sizes_follow_memory():
    params = {"w": np.zeros((1024, 1024), np.float32)}
    assert chunk_sizes(3, 5, params, 8, 16) == (3, 3, 5)
    small, large = chunk_sizes(0, 0, params, 8, 16), chunk_sizes(0, 0, {"w": np.zeros((2**14, 2**13), np.float32)}, 64, 50_000)
    assert small == (64, 64, 32)
    assert 1 <= large.grad <= 2
    assert 1 <= large.sequences < 64


# --- What the store holds --------------------------------------------------------------------------------------------------


def test_nothing_is_measured_twice(stored):
    assert artifacts.measure_update(stored.spec, stored.store).created_at == stored.manifest.created_at
    assert stored.store.load_checkpoint(stored.manifest.address) is None
    assert target_address(stored.spec.target.target_id) in stored.store.related(stored.manifest.address)


def test_damage_is_found(stored, tmp_path):
    copy = Store(str(tmp_path / "store"))
    for address in (target_address(stored.spec.target.target_id), stored.manifest.address):
        copy.copy(address, stored.store)
    assert artifacts.intact(copy, [stored.spec, spec_of(seed=9)]) == ([stored.spec], [])
    next((tmp_path / "store").rglob("changes.parquet")).write_bytes(b"x" * stored.manifest.file("changes.parquet").size)
    fine, problems = artifacts.intact(copy, [stored.spec])
    assert fine == []
    assert "SHA-256" in problems[0]


@pytest.fixture(scope="module")
def study(stored):
    return artifacts.publish_study("default", [stored.spec.entropy_id], stored.store, ["etas"])


def test_study(stored, study):
    assert {file.name for file in study.files} >= {"results.csv", "results.parquet", "changes.csv", "report.html", "etas.png"}
    again = artifacts.publish_study("default", [stored.spec.entropy_id], stored.store, ["etas"])
    assert again.created_at == study.created_at
    loaded = artifacts.load_study(stored.store, "default", [stored.spec.entropy_id])
    joined = influence_table(loaded)
    assert len(joined) == 24
    assert {"entropy_id", "checkpoint", "max_surprisal", "change", "first_order"} < set(joined)
    read = pd.read_parquet(io.BytesIO(stored.store.read(study.address, "results.parquet")))
    pd.testing.assert_frame_equal(read, joined)
    assert loaded.policies[stored.spec.target.target_id].history["entropy"].shape == (4,)
    assert stored.manifest.address in stored.store.related(study.address)


def test_command(stored, study, capsys, tmp_path):
    place = ["--store", stored.store.uri]
    assert main(["entropy", *place]) == 0
    assert "first_order_error" in capsys.readouterr().out
    assert main(["entropy", study.id[:8], "--where", "eta=0.01", "reward=1", "--format", "json", *place]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert {(row["eta"], row["reward"]) for row in rows} == {(0.01, 1.0)}
    assert main(["entropy", "--plot", "etas", "--to", str(tmp_path / "plots"), *place]) == 0
    assert (tmp_path / "plots" / "etas.png").stat().st_size > 5000
    assert main(["entropy", "default", "--report", str(tmp_path / "report.html"), *place]) == 0
    assert study.id in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    for wrong in (
        ["nothing"],
        ["--format", "parquet"],
        ["--where", "eta=7"],
        ["--where", "colour=red"],
        ["--where", "reward=1", "--to", str(tmp_path / "a")],
        ["--where", "reward=1", "--report", str(tmp_path / "a.html")],
    ):
        assert main(["entropy", *wrong, *place]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["ls", "entropy", "entropy-studies", *place]) == 0
    assert study.id in capsys.readouterr().out


def test_texts(stored):
    plan = make_entropy_plan(SETTINGS)
    assert "2 updates of 1 policies, of which 1 are trained; 2 to measure" in preview(plan, stored.store)
    [row] = table(stored.store, [stored.spec, spec_of(seed=3)])
    assert row["flat groups"].endswith("of 3")
    assert [part.split(" of ")[1] for part in row["cut off"].split(", ")] == ["12", "40"]
    assert entropy_address(row["measurement"]) == stored.manifest.address


# --- The flow, against a Prefect server of its own --------------------------------------------------------------------------

SETTINGS_FILE = """
[runtime]
compilation_cache = ""
progress_seconds = 1e-9

[presets.target.policy]
family = "policy"
task = {{ kind = "modular_addition", modulus = 3 }}
model = {{ kind = "decoder", width = 8, num_layers = 1, num_heads = 2, num_kv_heads = 1, mlp_width = 16 }}
warm_start = {{ max_steps = 60, batch_size = 16 }}
rl = {{ num_steps = 4, num_prompts = 4, num_completions = 4, num_checkpoints = 2, weight_decay = 0.01 }}

[presets.sampler.hmc]
kind = "hmc"
num_chains = 2
num_draws = 30
num_burnin_steps = 20
num_integration_steps = 4

[entropy.default]
sweeps = [["target=policy", "target.checkpoint=0,4", "update.num_prompts=3", "update.num_completions=4",
           "evaluation.num_prompts=40", "etas=[1e-3,1e-2]", "sampler=hmc"]]
plots = ["etas", "training"]
grad_chunk_size = {chunk}
"""


@pytest.fixture(scope="module")
def run(prefect_home, tmp_path_factory):
    from flows import entropy as flow

    path = tmp_path_factory.mktemp("settings") / "settings.toml"
    path.write_text(SETTINGS_FILE.format(chunk=CHUNK))
    return runner(flow.entropy, str(path))


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """The default study in an empty store."""
    store = Store(str(tmp_path_factory.mktemp("first") / "store"))
    outcome = run(store)
    assert outcome.error is None
    return SimpleNamespace(store=store, outcome=outcome, result=outcome.result)


def test_flow(first, stored):
    labels = [f"modular_addition, seed 0, checkpoint {step}, batch seed 0" for step in (0, 4)]
    states = tasks(first.outcome, 9)
    named = {"train modular_addition, seed 0", *(f"measure {label}" for label in labels), "compare default: 2 of 2 updates"}
    assert named < set(states)
    assert sum(name.startswith(("sample", "diagnose")) for name in states) == 4
    assert set(states.values()) == {"Completed"}
    assert [row["checkpoint"] for row in first.result["measurements"]] == ["0", "4"]
    # What the same spec gives without a flow, bit for bit.
    [spec] = [spec_of()]
    measured = artifacts.load_measured(first.store, spec.entropy_id)
    alone = artifacts.load_measured(stored.store, stored.spec.entropy_id)
    np.testing.assert_array_equal(measured.matrices[0], alone.matrices[0])
    study = artifacts.load_study(first.store, "default", [spec.entropy_id], first.result["run_ids"])
    assert sorted(study.llcs["checkpoint"]) == [0, 4]
    assert [problem for _, problem in first.store.verify() if problem] == []
    json.dumps(first.result, allow_nan=False)


def test_flow_in_the_ui(first):
    shown = ui_artifacts(first.outcome)
    assert shown.keys() == {"entropy-results", "entropy-results-plots"}
    assert json.loads(shown["entropy-results"].data) == first.result["measurements"]
    assert shown["entropy-results-plots"].data.count("![") == 2
    assert first.result["files"]["report.html"] in shown["entropy-results-plots"].data


def test_the_flow_again_computes_nothing(first, run):
    before = made(first.store)
    again = run(first.store)
    assert again.result == first.result
    assert tasks(again, 0) == {}
    assert made(first.store) == before


def test_a_failed_measurement_leaves_the_others_alone(first, run, monkeypatch):
    measure_update = artifacts.measure_update

    def fail(spec, *arguments):
        if spec.seed == 7:
            raise RuntimeError("no memory for\nso much")
        return measure_update(spec, *arguments)

    monkeypatch.setattr(artifacts, "measure_update", fail)
    outcome = run(first.store, "target.checkpoint=4", "seed=0,7")
    assert str(outcome.error).startswith("1 of 2 measurements failed; the others are finished")
    assert (outcome.result["num_failed"], len(outcome.result["measurements"])) == (1, 1)
    assert outcome.result["errors"][0].endswith("no memory for so much")
    monkeypatch.undo()
    assert run(first.store, "target.checkpoint=4", "seed=0,7").error is None


def test_the_flow_refuses_wrong_input_before_any_work(run, tmp_path):
    store = Store(str(tmp_path / "store"))
    outcome = run(store, "etaz=1")
    assert isinstance(outcome.error, InvalidInput)
    assert "Did you mean 'etas'?" in str(outcome.error)
    assert list(store.addresses()) == []
