"""What `lambda-hat study` and `lambda-hat entropy` share: studies found in the store; tables, plots, reports."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lambda_hat.specs.settings import nearest
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.gallery import records
from lambda_hat.store.manifest import KINDS, Address
from lambda_hat.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from lambda_hat.studies.plots import Drawn


def add_options(command: argparse.ArgumentParser, condition: str) -> None:
    """Which rows, and as what: a table, plots or a report.

    Args:
      condition: an example of one on the table's rows.
    """
    command.add_argument("--where", metavar="CONDITION", nargs="+", default=[], help=f"only rows with these, e.g. {condition}")
    command.add_argument("--format", choices=["table", "csv", "json", "parquet"], default="table", help="default: table")
    command.add_argument(
        "--plot",
        metavar="NAME",
        nargs="*",
        help="of --to or --report: only these plots; no name: none (default: all that apply)",
    )
    made = command.add_mutually_exclusive_group()
    made.add_argument("--output", metavar="FILE", help="write the table to a file (needed for parquet)")
    made.add_argument("--to", metavar="DIR", help="draw the plots into a folder, made if need be, instead of the table")
    made.add_argument("--report", metavar="FILE", help="write the report, one HTML file, instead of the table")


@contextlib.contextmanager
def refusals(options: argparse.Namespace) -> Iterator[None]:
    """Around all that reads and writes for these options: what cannot be done is refused in words.

    Raises:
      InvalidInput: an option has nothing to do with the others, Parquet has no file to go to, or a file cannot be written.
    """
    drawing = options.to is not None or options.report is not None
    if options.plot is not None and not drawing:
        raise InvalidInput("--plot chooses plots of a folder or a report; got neither. Add --to DIR or --report FILE.")
    if options.format != "table" and drawing:
        raise InvalidInput(f"--format is of the table; got {options.format} with --to or --report. Leave it out.")
    if options.format == "parquet" and options.output is None:
        raise InvalidInput("Parquet is binary and needs --output FILE; got none. Add --output FILE.parquet.")
    try:
        yield
    except BrokenPipeError:  # the reader of the table has seen enough
        raise
    except OSError as error:
        raise InvalidInput(f"Files must be written where there is permission and room; {error}. Name another place.") from None


def find_studies(store: Store, kind: Literal["study", "entropy_study"], texts: Sequence[str]) -> list[Address]:
    """The studies of these ids, beginnings of ids or names of experiments; "latest" is the latest, "all" every one.

    Raises:
      InvalidInput: one is none of these, or there is no study.
    """
    catalogue = store.catalogue(kind)
    if not len(catalogue):
        flow = {"study": "batch_size", "entropy_study": "entropy"}[kind]
        raise InvalidInput(f"There must be a study; there is none in {store.uri}. python flows/{flow}.py makes one.")
    prefix, found = KINDS[kind][0], []
    for text in texts:
        named = catalogue["id"][catalogue["spec.name"] == text]
        if text == "all":
            found += [Address(kind, id, None) for id in catalogue["id"]]
        elif text == "latest" or len(named):
            found.append(Address(kind, (catalogue["id"] if text == "latest" else named).iloc[-1], None))
        else:
            if not text.startswith(f"{prefix}_"):
                names = {*catalogue["spec.name"], "latest", "all"}
                raise InvalidInput(
                    f"A study is named by its experiment or its id, {prefix}_...; got {text!r}. {nearest(text, names)}"
                )
            found.append(store.find(text))
    return list(dict.fromkeys(found))


def rendered(frame: pd.DataFrame, form: str) -> str | bytes:
    """A table as csv, json or parquet, whole, or as a table for people."""
    if form == "parquet":
        return frame.to_parquet()
    if form == "csv":
        return frame.to_csv(index=False)
    if form == "json":
        return json.dumps(records(frame), indent=1)
    return frame.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.5g}")


def emit(content: str | bytes, output: str | None) -> None:
    """Prints a text, or writes it or bytes to a file."""
    if output is not None:
        Path(output).write_bytes(content if isinstance(content, bytes) else f"{content.rstrip()}\n".encode())
    elif isinstance(content, str):
        print(content.rstrip("\n"))


def write_plots(drawn: Drawn, options: argparse.Namespace) -> None:
    """The plots that were drawn, into the folder asked for; says which were not, and why.

    Raises:
      InvalidInput: none could be drawn.
    """
    reasons = [f"{name} is not drawn: {reason}" for name, reason in drawn.left_out.items()]
    if not drawn.pngs:
        raise InvalidInput("; ".join(["A folder of plots takes one that can be drawn", *reasons]) + ". Choose others.")
    folder = Path(options.to)
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in drawn.pngs.items():
        (folder / f"{name}.png").write_bytes(png)
        print(folder / f"{name}.png")
    for reason in reasons:
        print(reason, file=sys.stderr)


def write_report(page: str, options: argparse.Namespace, of: str) -> None:
    """The report, to the file asked for."""
    Path(options.report).write_text(page, encoding="utf-8")
    print(f"{options.report}: {of}")
