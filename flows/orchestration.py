"""What the flows share: plans, what the store has, results in the UI, and the command line's frame."""

from __future__ import annotations

import argparse
import base64
import json
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from prefect import Flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import State

from flows.progress import STOPPED, on_interrupt
from flows.tasks import open_place
from lambda_hat import artifacts, report
from lambda_hat.manifest import Address, Manifest, StoreUnavailable, diagnosis_address, run_address, target_address
from lambda_hat.plan import describe, make_plan
from lambda_hat.run import RunSpec
from lambda_hat.settings import Settings
from lambda_hat.spec import InvalidInput
from lambda_hat.store import Store


class RunsFailed(Exception):
    """Some runs failed; `rows` are the results of all."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)  # what pickle makes it of again
        self.rows = rows

    def __repr__(self) -> str:
        return f"RunsFailed({self})"  # not the rows, which Prefect would log

    def __str__(self) -> str:
        failed = sum(row["status"] == "failed" for row in self.rows)
        return f"{failed} of {len(self.rows)} runs failed; the others are finished and kept."


def plan(settings: Settings, store: Store, experiment: str | None, overrides: list[str], from_run: str | None) -> list[RunSpec]:
    """The runs asked for."""
    if from_run is None:
        return make_plan(settings, experiment, overrides)
    if experiment or overrides:
        raise InvalidInput(
            f"--from-run repeats a run as it was, without experiment or overrides; got {experiment or overrides}."
        )
    try:
        return [artifacts.find_run_spec(store, from_run)]
    except InvalidInput:  # repeated into another store than its own
        return [artifacts.find_run_spec(Store(settings.store.uri, settings.store.options, settings.store.cache), from_run)]


def steps(spec: RunSpec) -> tuple[Address, Address, Address]:
    """What a finished run has in the store: its target, its draws, its diagnosis."""
    ids = spec.target_id, spec.run_id
    return target_address(spec.target_id), run_address(*ids), diagnosis_address(*ids)


def found(store: Store, specs: Sequence[RunSpec]) -> dict[Address, Manifest]:
    """Which steps of these runs the store has; a remote one is asked for many at a time."""
    addresses = dict.fromkeys(address for spec in specs for address in steps(spec))
    return {manifest.address: manifest for manifest in store.manifests(addresses)}


def publish_to_ui(key: str, rows: list[dict[str, str]], plots: dict[str, bytes], heading: str, page: str) -> None:
    """Shows a results table and plots in the Prefect UI, as artifacts `key` and `key-plots`; says where the report is."""
    # Cells are Markdown, in which a dash alone is a bullet.
    cells = [{name: "–" if text == "-" else text for name, text in row.items()} for row in rows]
    create_table_artifact(key=key, table=cells, description=heading)
    images = [f"## {name}\n![{name}](data:image/png;base64,{base64.b64encode(png).decode()})" for name, png in plots.items()]
    where = [f"Report, one HTML file: `{page}`"] if page else []
    create_markdown_artifact(key=f"{key}-plots", markdown="\n\n".join([*where, *images]), description=heading)


def reason(state: State) -> str:
    """Why a step of a run failed, in one line."""
    return " ".join((state.message or state.name or "").split())


def command_line(flow: Flow[Any, Any], plan: Callable[..., list[RunSpec]], examples: str) -> int:
    """Runs a flow from the command line; returns the exit status: 0, 1 where runs failed, 2 for wrong input or no store."""
    options = _parser(str(flow.description).split("\n\n")[0], examples).parse_args()
    arguments = (options.experiment, options.overrides, options.from_run)
    try:
        settings, store = open_place({"store_uri": options.store, "settings_file": options.settings})
        if options.list:
            print(describe(settings))
            return 0
        specs = plan(settings, store, *arguments)
        if options.dry_run:
            print(report.plan_table(specs, store))
            return 0
    except (InvalidInput, StoreUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = f"{len(specs)} runs of {len({spec.target_id for spec in specs})} targets"
    code = 0
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        given = (*arguments, options.store, options.settings)
        rows: Any = flow.with_options(flow_run_name=name)(*("" if value is None else value for value in given))
    except RunsFailed as error:
        rows, code = error.rows, 1
    except (InvalidInput, StoreUnavailable) as error:  # an engine that does not start, a platform that is not here
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        finished = [spec for spec, row in zip(specs, rows, strict=True) if row["status"] != "failed"]
        print(f"\n{report.text_table(rows)}\n{report.plot_places(finished, store)}")
    return code


def _parser(description: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override or sweep a field; commas sweep")
    parser.add_argument("--experiment", metavar="NAME", help="a named experiment of the settings (default: default)")
    parser.add_argument("--list", action="store_true", help="list presets, experiments, samplers and targets, and stop")
    parser.add_argument("--dry-run", action="store_true", help="show what would be computed and its work, and stop")
    parser.add_argument("--from-run", metavar="ID", help="repeat a run from the spec saved with it")
    parser.add_argument(
        "--store", metavar="URI", help="where artifacts go: a folder or s3://bucket/prefix (default: the settings')"
    )
    parser.add_argument("--settings", metavar="FILE", help="settings file (default: ./settings.toml)")
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    return parser
