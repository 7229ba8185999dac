"""Entropy studies: what one update does to a policy's entropy, and which sequences do it. `python flows/entropy.py --help`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from flows.ends import Stop
from flows.options import parse, parser
from flows.orchestration import Command, RunsFailed, command_line
from flows.runs import compute, run_each, show
from flows.tasks import Place, begin, measure_update, train_policy
from lambda_hat.entropy import artifacts
from lambda_hat.entropy.plan import EntropyPlan, describe, make_entropy_plan
from lambda_hat.entropy.spec import EntropySpec
from lambda_hat.entropy.summary import failures, label, outcome, preview, table, text
from lambda_hat.llc.preflight import check, check_runs
from lambda_hat.specs.settings import Runtime, Settings
from lambda_hat.store.manifest import entropy_address, entropy_study_address, target_address
from lambda_hat.store.store import Store


@flow(name="entropy")
def entropy(
    experiment: str = "", overrides: Sequence[str] = (), store_uri: str = "", settings_file: str = ""
) -> dict[str, Any]:
    """Measures what updates of policies do to their entropy; trains and measures only what the store does not hold.

    Args:
      experiment: A named entropy study of the settings; "default" if none is named.
      overrides: KEY=VALUE each, as on the command line: "target.checkpoint=0,150", "update.num_prompts=16", "sampler=sgld".
      store_uri: Where artifacts go, a folder or s3://bucket/prefix, in place of the settings' store.
      settings_file: A settings file, in place of ./settings.toml.

    Returns:
      The study's id, its measurements and where its files are.

    Raises:
      InvalidInput: an argument is wrong; nothing has been computed.
      RunsFailed: some measurements or runs failed; the others are finished and stored.
    """
    settings, store, place = begin(store_uri, settings_file)
    study = _plan(settings, store, experiment or None, list(overrides))
    errors = _train(study, store, place, settings.runtime) + _measure(study, store, place, settings.runtime)
    fine, damaged = artifacts.intact(store, study.specs)
    rows = compute(study.runs, store, place, settings.runtime) if study.runs else []
    return _publish(study, store, place, fine, outcome(study, fine, rows, errors + damaged))


def _plan(settings: Settings, store: Store, experiment: str | None, overrides: list[str]) -> EntropyPlan:
    """The study asked for, once it is clear that nothing is in its way."""
    study = make_entropy_plan(settings, experiment, overrides)
    measured = {manifest.id for manifest in store.manifests(entropy_address(spec.entropy_id) for spec in study.specs)}
    check([spec.target for spec in study.specs if spec.entropy_id not in measured], store, settings.runtime)
    check_runs(study.runs, store, settings.runtime)
    return study


def _train(study: EntropyPlan, store: Store, place: Place, runtime: Runtime) -> list[str]:
    """Trains the policies that are not in the store; what failed, and why."""
    policies = {spec.target.target_id: spec for spec in study.specs}
    there = {manifest.id for manifest in store.manifests(map(target_address, policies))}
    missing = [spec for target_id, spec in policies.items() if target_id not in there]
    get_run_logger().info("%d of %d policies are in the store", len(policies) - len(missing), len(policies))
    calls = [
        (spec.target.target_id, f"{spec.target.task.kind}, seed {spec.target.seed}", spec.target.model_dump(mode="json"), place)
        for spec in missing
    ]
    return run_each(train_policy, calls, runtime)


def _measure(study: EntropyPlan, store: Store, place: Place, runtime: Runtime) -> list[str]:
    """Measures what is not in the store, of the policies that are; what failed, and why."""
    policies = dict.fromkeys(target_address(spec.target.target_id) for spec in study.specs)
    updates = (entropy_address(spec.entropy_id) for spec in study.specs)
    there = {manifest.id for manifest in store.manifests([*policies, *updates])}
    missing = [spec for spec in study.specs if spec.target.target_id in there and spec.entropy_id not in there]
    get_run_logger().info("%d of %d updates are to be measured", len(missing), len(study.specs))
    chunks = study.options.grad_chunk_size, study.options.tf_batch_size
    calls = [(spec.entropy_id, label(spec), spec.model_dump(mode="json"), chunks, place) for spec in missing]
    return run_each(measure_update, calls, runtime)


def _publish(study: EntropyPlan, store: Store, place: Place, fine: list[EntropySpec], result: dict[str, Any]) -> dict[str, Any]:
    """The finished measurements as one study, in the store and in the UI; returns the result with it or raises RunsFailed."""
    if fine:
        result["measurements"] = table(store, fine)
        name, plots, run_ids, ids = study.name, study.options.plots, result["run_ids"], [spec.entropy_id for spec in fine]
        address = entropy_study_address(artifacts.study_id(name, ids, plots, run_ids))
        publish = functools.partial(artifacts.publish_study, name, ids, store, plots, run_ids)
        label = f"{study.name}: {len(fine)} of {len(study.specs)} updates"
        files, error = show("entropy-results", result["measurements"], label, address, publish, store, place)
        if error:
            result["errors"].append(error)
        else:
            manifest = store.manifest(address)
            assert manifest is not None  # it was just shown
            result |= {"study_id": address.id, "files": files, "not_drawn": manifest.summary["not_drawn"]}
    if result["num_failed"] or result["runs_failed"]:
        raise RunsFailed(failures(result), result)
    return result


EXAMPLES = """\
examples:
  python flows/entropy.py                                                 the default study, a minute or two
  python flows/entropy.py --list                                          studies, policies and fields of a measurement
  python flows/entropy.py target.checkpoint=0,75,150 update.num_prompts=16 'etas=1e-4,1e-3'
  python flows/entropy.py 'target.seed=range(0,3)' 'seed=range(0,8)'      three policies, eight updates at each checkpoint
  python flows/entropy.py sampler=sgld sampler.batch_size=32              with the llc of the policy at each checkpoint
"""


def main() -> int:
    options = parser(entropy, EXAMPLES)
    given = parse(options)
    arguments = (given.experiment, given.overrides)
    command = Command(
        entropy, plan=lambda settings, store, _: _plan(settings, store, *arguments), listing=describe,
        name=lambda study: f"{study.name}: {len(study.specs)} updates", preview=preview, arguments=lambda _: arguments,
        show=lambda _, result, __: text(result),
    )  # fmt: skip
    return command_line(command, given, Stop())


if __name__ == "__main__":
    sys.exit(main())
