"""What the flows share: plans, what the store has, results in the UI, and the command line's frame."""

from __future__ import annotations

import base64
import json
import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from prefect import Flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import State

from flows.ends import Stop
from flows.log import Tracebacks
from flows.server import tie_server
from flows.tasks import open_place
from lambda_hat.specs.settings import Settings
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.specs.text import shortened
from lambda_hat.store.manifest import ArtifactError, StoreUnavailable
from lambda_hat.store.store import Store


class RunsFailed(Exception):
    """Some of the work failed, as the message says; `result` is the flow's, with what is finished."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message, result)  # what pickle makes it of again
        self.message, self.result = message, result

    def __repr__(self) -> str:
        return f"RunsFailed({self})"  # not the result, which Prefect would log

    def __str__(self) -> str:
        return self.message


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


def error_of(state: State) -> BaseException | None:
    """What was raised in a step that failed, where it is known here."""
    found = state.result(raise_on_failure=False)
    return found if isinstance(found, BaseException) and found.__traceback__ is not None else None


class Command(NamedTuple):
    """What a flow's command line does with its options.

    plan: (settings, store, options) -> what is asked for. listing: settings -> what has a name. name: of the flow run.
    preview: (plan, store) -> what would be computed. arguments: options -> the flow's. show: (plan, result, store) -> text.
    """

    flow: Flow[Any, Any]
    plan: Callable[[Settings, Store, Any], Any]
    listing: Callable[[Settings], str]
    name: Callable[[Any], str]
    preview: Callable[[Any, Store], str]
    arguments: Callable[[Any], tuple[Any, ...]]
    show: Callable[[Any, Any, Store], str]


def command_line(command: Command, options: Any, stop: Stop) -> int:
    """Runs a flow from the command line; returns the exit status: 0, 1 where runs failed or something broke, 2 for wrong input
    or no store, 130 or 143 where it was stopped."""
    with stop, Tracebacks() as tracebacks:
        try:
            return _run(command, options, tracebacks)
        except (InvalidInput, ArtifactError, StoreUnavailable) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            stop.say()
            return 128 + stop.signum
        except Exception as error:  # of ours or of a library: what it says, in a line
            logging.getLogger("prefect").error("%s", type(error).__name__, exc_info=error)
            said = " ".join(str(error).split()) or "no message"
            print(f"error: {type(error).__name__}: {shortened(said)}. {tracebacks.where()}", file=sys.stderr)
            return 1


def _run(command: Command, options: Any, tracebacks: Tracebacks) -> int:
    settings, store = open_place({"store_uri": options.store, "settings_file": options.settings})
    if options.list:
        print(command.listing(settings))
        return 0
    asked = command.plan(settings, store, options)
    if options.dry_run:
        print(command.preview(asked, store))
        return 0
    tie_server()
    given = (*command.arguments(options), options.store, options.settings)
    flow = command.flow.with_options(flow_run_name=command.name(asked))
    failed = ""
    try:
        result: Any = flow(*("" if value is None else value for value in given))
    except RunsFailed as error:
        result, failed = error.result, f"{error} {tracebacks.where()}"
    print(json.dumps(result, indent=1) if options.json else f"\n{command.show(asked, result, store)}")
    if failed:
        print(failed.rstrip(), file=sys.stderr)
    return 1 if failed else 0
