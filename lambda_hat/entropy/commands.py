"""`lambda-hat entropy`: entropy studies in the store, looked at again without measuring anything."""

from __future__ import annotations

import argparse
import io
from typing import TYPE_CHECKING, Any

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import Address
from lambda_hat.store.store import Store
from lambda_hat.studies.views import add_options, emit, find_studies, refusals, rendered, write_plots, write_report

if TYPE_CHECKING:
    import pandas as pd

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
        "Conditions choose rows of the table, not of plots and reports: COLUMN=VALUE,VALUE, COLUMN<VALUE, <=, >, >=.",
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
    add_options(entropy, "reward=0")
    entropy.set_defaults(run=_entropy)


def _entropy(store: Store, options: argparse.Namespace) -> int:
    if options.where and (options.to is not None or options.report is not None):
        raise InvalidInput(
            f"--where chooses rows of the table, and plots and the report are of whole updates; got {options.where[0]!r} with "
            f"{'--to' if options.report is None else '--report'}. Leave it out, or write the table with --output."
        )
    with refusals(options):
        [address] = find_studies(store, "entropy_study", [options.study])
        if options.to is None and options.report is None:
            _table(store, address, options)
        else:
            _drawn(store, address, options)
    return 0


def _table(store: Store, address: Address, options: argparse.Namespace) -> None:
    import pandas as pd

    from lambda_hat.studies.conditions import rows_where

    table = rows_where(pd.read_parquet(io.BytesIO(store.read(address, "results.parquet"))), options.where)
    if not len(table):
        raise InvalidInput(f"There must be a row; none fits {' '.join(options.where)}. Without --where all are shown.")
    emit(rendered(table[_shown(table)] if options.format == "table" else table, options.format), options.output)


def _shown(table: pd.DataFrame) -> list[str]:
    """SHOWN, and before it what else sets rows of different measurements apart."""
    names = [*table.columns[: table.columns.get_loc("evaluation")]]
    varied = [name for name in names if name not in ("entropy_id", *SHOWN) and table[name].nunique(dropna=False) > 1]
    alike = table.groupby(["target_id", "checkpoint", *varied], dropna=False)["entropy_id"].nunique().max() > 1
    return [*(["entropy_id"] if alike else []), *SHOWN[:2], *varied, *SHOWN[2:]]


def _drawn(store: Store, address: Address, options: argparse.Namespace) -> None:
    from lambda_hat.entropy.artifacts import load_study
    from lambda_hat.entropy.plots import draw_plots
    from lambda_hat.entropy.report import entropy_report

    manifest = store.manifest(address)
    assert manifest is not None  # it was just found
    study = load_study(store, manifest.spec["name"], manifest.spec["entropy_ids"], manifest.spec["run_ids"])
    drawn = draw_plots(study, options.plot)
    if options.to is not None:
        write_plots(drawn, options)
    else:
        page = entropy_report(address.id, study.name, study, drawn)
        write_report(page, options, f"{len(study.measured)} updates of {address.id}")
