"""`lambda-hat study` and `lambda-hat data`: studies in the store, looked at again without training anything."""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_hat.specs.spec import ALGORITHM_VERSION, InvalidInput
from lambda_hat.store.manifest import Address, Manifest
from lambda_hat.store.store import Store
from lambda_hat.studies.views import add_options, emit, find_studies, refusals, rendered, write_plots, write_report

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from lambda_hat.batch_size.study import Study


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds them to the parser's commands; each sets `run`, (store, options) -> exit status."""
    study = commands.add_parser(
        "study", parents=[common], help="batch-size studies: their table, chosen plots, a report of chosen trials",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Batch-size studies: their table, chosen plots, a report of chosen trials.\n\n"
        "The trials of several studies are joined. Conditions choose among them: COLUMN=VALUE,VALUE, COLUMN<VALUE, <=, >, >=.",
        epilog="\n  ".join([
            "examples:",
            "lambda-hat study",
            "lambda-hat study latest --where batch_size=16,64 'eta>=0.1' --format csv --output trials.csv",
            "lambda-hat study digits-mup digits-sp --report both.html --plot heatmap_batch width_transfer",
            "lambda-hat study all --where richness=1 --plot losscurve_grid --to figures",
        ]),
    )  # fmt: skip
    study.add_argument(
        "studies", nargs="*", default=["latest"], metavar="STUDY",
        help='ids or their beginnings, names of experiments (the latest of each), "latest" (default) or "all"',
    )  # fmt: skip
    add_options(study, "eta>=0.1")
    study.add_argument("--target-loss", metavar="LOSS", type=_loss, help="of critical batch sizes (default: that of the study)")
    study.set_defaults(run=_study)

    data = commands.add_parser("data", help="prepare data sets that are not installed with a package")
    process = data.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "process-mnist1m", parents=[common], help="MNIST-1M: its raw zip files to one file",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Writes the images of MNIST-1M's raw zips, shuffled, to one file, mnist1m.npz.\n\n"
        'A zip holds files with "images" in their names, each with one that says "labels" instead, in .npy or in MNIST\'s idx\n'
        "format: unsigned bytes, (n, 28, 28) or (n, 784), and (n,), 0 to 9. Tasks read the file from the folder that the\n"
        "environment variable MNIST1M_FOLDER names.",
        epilog="examples:\n  lambda-hat data process-mnist1m raw/*.zip --output ~/data/mnist1m.npz",
    )  # fmt: skip
    process.add_argument("zips", nargs="+", type=Path, metavar="ZIP", help="the zip files, in order")
    process.add_argument("--output", type=Path, default=Path("mnist1m.npz"), metavar="FILE", help="default: mnist1m.npz")
    process.set_defaults(run=_process_mnist1m)


def _loss(text: str) -> float:
    try:
        loss = float(text)
    except ValueError:
        loss = math.nan
    if not 0 < loss < math.inf:
        raise argparse.ArgumentTypeError(f"a loss is a positive number; got {text!r}")
    return loss


def _study(store: Store, options: argparse.Namespace) -> int:
    from lambda_hat.batch_size.study import where

    with refusals(options):
        if options.target_loss is not None and options.to is None and options.report is None:
            raise InvalidInput("--target-loss is of plots and reports; got neither. Add --to DIR or --report FILE.")
        addresses = find_studies(store, "study", options.studies)
        whole = _joined(store, addresses)
        study = where(whole if options.target_loss is None else whole._replace(target_loss=options.target_loss), options.where)
        if not len(study.table):
            raise InvalidInput(f"There must be a trial; none fits {' '.join(options.where)}. Without --where all are shown.")
        if options.to is None and options.report is None:
            emit(rendered(_shown(study) if options.format == "table" else study.table, options.format), options.output)
        else:
            _drawn(study, len(whole.table), store.manifests(addresses), options)
    return 0


def _drawn(study: Study, num_trials: int, manifests: list[Manifest], options: argparse.Namespace) -> None:
    """Plots or a report of a study, a selection of `num_trials` of the studies of these manifests."""
    from lambda_hat.batch_size.plots import draw_plots
    from lambda_hat.batch_size.report import study_report

    drawn = draw_plots(study, options.plot)
    if options.to is not None:
        write_plots(drawn, options)
    else:
        ids = ", ".join(manifest.id for manifest in manifests)
        name = " and ".join(dict.fromkeys(manifest.spec["name"] for manifest in manifests))
        page = study_report(ids, name, study, drawn, chosen=options.where, num_trials=num_trials)
        write_report(page, options, f"{len(study.table)} trials of {ids}")


def _joined(store: Store, addresses: list[Address]) -> Study:
    """The trials of all these studies, each once, with what any of them has measured of it; that of a later one wins.
    Their target loss is the one they share, or else that of all their trials together.

    Raises:
      InvalidInput: a study was made by another version of the algorithms, whose trials this one does not know.
    """
    import pandas as pd

    from lambda_hat.batch_size.study import Study
    from lambda_hat.batch_size.trades import default_target
    from lambda_hat.store.arrays import unflatten, unpack_arrays

    tables: list[pd.DataFrame] = []
    targets: set[float | None] = set()
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for manifest in store.manifests(addresses):
        address, made_by = manifest.address, manifest.algorithm_version
        if made_by != ALGORITHM_VERSION:
            raise InvalidInput(
                f"A study is shown by the version of the algorithms that made it, here {ALGORITHM_VERSION}; {address.id} was "
                f"made by version {made_by}. Run it again, or name other studies."
            )
        targets.add(manifest.summary["target_loss"])
        tables.append(pd.read_parquet(io.BytesIO(store.read(address, "results.parquet"))))
        named = unflatten(unpack_arrays(store.read(address, "curves.npz")))
        curves |= {trial_id: (curve["steps"], curve["losses"]) for trial_id, curve in named.items()}
    # The settings of tasks of several kinds stay before what was measured.
    columns: list[str] = []
    for table in tables:
        place = 0
        for name in map(str, table):
            if name not in columns:
                columns.insert(place, name)
            place = columns.index(name) + 1
    together = pd.concat(tables, ignore_index=True)[columns]
    table = together.groupby("trial_id", sort=False, as_index=False).last()  # of each, the last known
    return Study(table, curves, targets.pop() if len(targets) == 1 else default_target(table))


def _shown(study: Study) -> pd.DataFrame:
    """For people: what differs between the trials, and what was found."""
    from lambda_hat.batch_size.study import settings, swept

    table = study.table
    varied = ["trial_id", *swept(table)]
    return table[[*varied, *(str(name) for name in table if name not in {"trial_id", "samples", *settings(table)})]]


def _process_mnist1m(_store: Store, options: argparse.Namespace) -> int:
    from lambda_hat.targets.data import process_mnist1m

    def show(done: int, total: int, unit: str, note: str) -> None:
        print(f"{done} of {total} {unit}, {note}", file=sys.stderr)

    try:
        print(process_mnist1m(options.zips, options.output, show))
    except OSError as error:
        raise InvalidInput(f"--output must be a file that can be written; {error}. Name another place.") from None
    return 0
