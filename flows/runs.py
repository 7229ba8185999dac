"""Runs as tasks: their targets, draws and diagnoses, as far as the store does not hold them; and what is shown of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.states import State

from flows.engines import engine, final_state, submit_ahead
from flows.orchestration import error_of, publish_to_ui, reason
from flows.tasks import Place, build_target, compare, diagnose, sample
from lambda_hat.llc import artifacts, summary
from lambda_hat.llc.artifacts import found, steps
from lambda_hat.llc.run import RunSpec, batches, labels
from lambda_hat.specs.settings import Runtime
from lambda_hat.store.manifest import Address, Manifest, target_address
from lambda_hat.store.store import Store


def compute(specs: list[RunSpec], store: Store, place: Place, runtime: Runtime) -> list[dict[str, Any]]:
    """Each run's row: its diagnosis, ids and status (computed, cached, failed)."""
    there = found(store, specs)
    names = labels(specs)
    rows = {
        index: summary.row(names[index], spec, "cached", there[steps(spec)[-1]].summary)
        for index, spec in enumerate(specs)
        if all(address in there for address in steps(spec))
    }
    get_run_logger().info("%d of %d runs are in the store", len(rows), len(specs))
    # Whole batches, so that a run has the same numbers wherever its batch was interrupted.
    if todo := [batch for batch in batches(specs) if not all(index in rows for index in batch)]:
        workers = min(runtime.max_workers, len(todo))  # none that would have nothing to do
        with engine(runtime.model_copy(update={"max_workers": workers})):
            _compute(specs, names, todo, rows, there, place, runtime)
    return [rows[index] for index in range(len(specs))]


def _compute(
    specs: list[RunSpec], names: list[tuple[str, str]], todo: list[list[int]], rows: dict[int, dict[str, Any]],
    there: dict[Address, Manifest], place: Place, runtime: Runtime,
) -> None:  # fmt: skip
    """Adds the rows of the runs of these batches, as far as they are not there."""
    logger, content = get_run_logger(), [spec.model_dump(mode="json") for spec in specs]

    def options(*made: Address) -> dict[str, Any]:
        exists = all(address in there for address in made)
        return {"refresh_cache": not exists, "timeout_seconds": runtime.task_timeout_seconds or None}

    targets: dict[str, PrefectFuture[Any]] = {}
    for index in (index for batch in todo for index in batch[:1]):
        if (target_id := specs[index].target_id) not in targets:
            task = build_target.with_options(**options(target_address(target_id)))
            targets[target_id] = task.submit(target_id, names[index][0], content[index], place)
    samples: dict[PrefectFuture[Any], list[int]] = {}
    for batch in todo:
        runs = [specs[index] for index in batch]
        label = " by ".join(names[batch[0]]) + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
        task = sample.with_options(**options(*(steps(run)[1] for run in runs)))
        made = artifacts.sweep_id(runs), label, [content[index] for index in batch], place
        samples[task.submit(*made, wait_for=[targets[runs[0].target_id]])] = batch
    diagnoses: dict[PrefectFuture[Any], int] = {}

    def finish(index: int, state: State) -> None:
        made, result = steps(specs[index])[1:], state.result() if state.is_completed() else None
        status = "failed" if result is None else "cached" if all(address in there for address in made) else "computed"
        rows[index] = summary.row(names[index], specs[index], status, result, "" if result else reason(state))
        logger.info("%s by %s: %s", *names[index], status, exc_info=None if result else error_of(state))

    # Each run is diagnosed as soon as it is sampled; queued behind the others, its diagnosis would come after all sampling.
    for sampled in as_completed(list(samples)):
        batch = samples[sampled]
        built, state = final_state(targets[specs[batch[0]].target_id]), final_state(sampled)
        for index in (index for index in batch if index not in rows):
            task = diagnose.with_options(**options(steps(specs[index])[2]))
            arguments = specs[index].run_id, " by ".join(names[index]), content[index], place
            if not state.is_completed():
                finish(index, state if built.is_completed() else built)
            elif runtime.engine == "threads":  # of which matplotlib bears one
                finish(index, task(*arguments, return_state=True))
            else:
                diagnoses[submit_ahead(task, *arguments)] = index
    for diagnosed in as_completed(list(diagnoses)):
        finish(diagnoses[diagnosed], final_state(diagnosed))


def run_each(task: Any, calls: list[tuple[Any, ...]], runtime: Runtime) -> list[str]:
    """Runs a task of artifacts that are not in the store, their labels second in each call; what failed, and why."""
    if not calls:
        return []
    log, errors = get_run_logger(), []
    task = task.with_options(refresh_cache=True, timeout_seconds=runtime.task_timeout_seconds or None)
    with engine(runtime.model_copy(update={"max_workers": min(runtime.max_workers, len(calls))})):
        futures = {task.submit(*call): call[1] for call in calls}
        for future in as_completed(list(futures)):
            state = final_state(future)
            if state.is_completed():
                log.info("%s %s: done", task.name, futures[future])
            else:
                errors.append(f"{task.name} {futures[future]}: {reason(state)}")
                log.error(errors[-1], exc_info=error_of(state))
    return errors


def show(
    key: str, rows: list[dict[str, str]], label: str, address: Address, publish: Callable[[], Manifest], store: Store,
    place: Place,
) -> tuple[dict[str, str], str]:  # fmt: skip
    """Publishes a comparison in the store, by a task if it is not there yet, and in the UI: where its files are, or why not."""
    files: dict[str, str] = {}
    plots: dict[str, bytes] = {}
    error = ""
    try:
        if (manifest := store.manifest(address)) is None:
            compare.with_options(refresh_cache=True)(address.id, label, publish, place)
            manifest = store.manifest(address)
            assert manifest is not None  # or the task has failed
        plots = {file.name: store.read(address, file.name) for file in manifest.files if file.name.endswith(".png")}
        files = {file.name: store.url(address, file.name) for file in manifest.files}
    except Exception as caught:  # a damaged trace, a plot that fails: there is a table all the same
        error = f"no plots: {caught}"
        get_run_logger().error(error)
    publish_to_ui(key, rows, plots, f"{label} finished" + (f"; {error}" if error else ""), files.get("report.html", ""))
    return files, error
