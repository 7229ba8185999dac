"""`lambda-hat entropy`: entropy studies in the store, looked at again without measuring anything."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from lambda_hat.gallery import emit, find_studies, rendered
from lambda_hat.manifest import Address
from lambda_hat.spec import InvalidInput
from lambda_hat.store import Store

#: Columns of the table for people; the other formats hold all.
SHOWN = (
    "target_id", "checkpoint", "evaluation", "eta", "sequence", "prompt", "completion", "reward", "advantage", "max_surprisal",
    "change", "error", "first_order", "first_order_error", "ess",
)  # fmt: skip


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds it to the parser's commands; it sets `run`, (store, options) -> exit status."""
    entropy = commands.add_parser(
        "entropy", parents=[common], help="entropy studies: every training sequence's features and influence, plots, report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Entropy studies: every training sequence's features and influence, chosen plots, a report.\n\n"
        "Conditions choose rows of the table: COLUMN=VALUE,VALUE, COLUMN<VALUE, <=, >, >=.",
        epilog="\n  ".join([
            "examples:",
            "lambda-hat entropy",
            "lambda-hat entropy --where checkpoint=0 'max_surprisal>3' reward=0 --format csv --output rare.csv",
            "lambda-hat entropy latest --plot influence features --to figures",
            "lambda-hat entropy training --report training.html",
        ]),
    )  # fmt: skip
    entropy.add_argument(
        "study", nargs="?", default="latest", metavar="STUDY",
        help='an id or its beginning, the name of an experiment (the latest of it), "latest" (default)',
    )  # fmt: skip
    entropy.add_argument("--where", metavar="CONDITION", nargs="+", default=[], help="only rows with these, e.g. reward=0")
    entropy.add_argument("--format", choices=["table", "csv", "json", "parquet"], default="table", help="default: table")
    entropy.add_argument("--output", metavar="FILE", help="write the table to a file (needed for parquet)")
    entropy.add_argument("--plot", metavar="NAME", nargs="+", default=[], help="only these plots (default: all that apply)")
    entropy.add_argument("--to", metavar="DIR", help="draw the plots into a folder, made if need be, instead of the table")
    entropy.add_argument("--report", metavar="FILE", help="write the report, one HTML file, instead of the table")
    entropy.set_defaults(run=_entropy)


def _entropy(store: Store, options: argparse.Namespace) -> int:
    if options.format == "parquet" and options.output is None:
        raise InvalidInput("Parquet is binary and needs --output FILE; got none. Add --output sequences.parquet.")
    [address] = find_studies(store, "entropy_study", [options.study])
    try:
        if options.to is not None or options.report is not None:
            return _drawn(store, address, options)
        return _table(store, address, options)
    except BrokenPipeError:  # the reader of the table has seen enough
        raise
    except OSError as error:
        raise InvalidInput(f"Files must be written where there is permission and room; {error}. Name another place.") from None


def _table(store: Store, address: Address, options: argparse.Namespace) -> int:
    import pandas as pd

    from lambda_hat.batch_size.study import rows_where

    table = rows_where(pd.read_parquet(io.BytesIO(store.read(address, "results.parquet"))), options.where)
    if not len(table):
        raise InvalidInput(f"There must be a row; none fits {' '.join(options.where)}. Without --where all are shown.")
    shown = table[list(SHOWN)] if options.format == "table" else table
    emit(rendered(shown, options.format), options.output)
    return 0


def _drawn(store: Store, address: Address, options: argparse.Namespace) -> int:
    from lambda_hat.entropy.artifacts import load_study
    from lambda_hat.entropy.plots import draw_plots
    from lambda_hat.entropy.report import entropy_report

    manifest = store.manifest(address)
    assert manifest is not None  # it was just found
    study = load_study(store, manifest.spec["name"], manifest.spec["entropy_ids"], manifest.spec["run_ids"])
    drawn = draw_plots(study, options.plot)
    if options.report is not None:
        Path(options.report).write_text(entropy_report(address.id, study.name, study, drawn), encoding="utf-8")
        print(f"{options.report}: {len(study.measured)} updates of {address.id}")
        return 0
    folder = Path(options.to)
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in drawn.items():
        (folder / f"{name}.png").write_bytes(png)
        print(folder / f"{name}.png")
    if skipped := set(options.plot) - drawn.keys():
        print(f"these plots do not apply to the study: {', '.join(sorted(skipped))}", file=sys.stderr)
    return 0
