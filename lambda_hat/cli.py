"""`lambda-hat`: look at what is in a store. Computing is the flows' part (`python flows/sweep.py --help`)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_hat import __version__
from lambda_hat.manifest import Address, ArtifactError, diagnosis_address
from lambda_hat.settings import load_settings
from lambda_hat.spec import InvalidInput, dotted
from lambda_hat.store import Store

if TYPE_CHECKING:
    import pandas as pd

#: Columns of `ls`, where the artifacts have them.
LS_COLUMNS = {
    "targets": ["id", "spec.family", "spec.seed", "num_params", "num_data", "init_loss", "true_llc", "created_at"],
    "runs": ["id", "target_id", "spec.target.family", "spec.sampler.kind", "spec.sampler.seed", "fge", "created_at"],
    "sweeps": ["id", "num_runs", "created_at"],
}
KINDS = {"targets": "target", "runs": "run", "sweeps": "sweep"}

#: Columns of the results table; csv, json and parquet hold all.
RESULT_COLUMNS = [
    "id", "spec.target.family", "spec.sampler.kind", "spec.sampler.step_size", "llc", "mcse", "true_llc", "ess_bulk", "rhat",
    "fge", "seconds", "verdict",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 where `verify` finds damage, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    try:
        settings = load_settings(options.settings)
        uri = settings.store.uri if options.store is None else options.store
        status = options.run(Store(uri, settings.store.options), options)
        sys.stdout.flush()
        return status
    except (InvalidInput, ArtifactError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lambda-hat", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", metavar="URI", help="a folder or s3://bucket/prefix (default: the settings')")
    common.add_argument("--settings", metavar="FILE", help="settings file (default: ./settings.toml)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ls = commands.add_parser("ls", parents=[common], help="list targets, runs and sweeps, oldest first")
    ls.add_argument("kinds", nargs="*", type=_kind, metavar="KIND", help="targets, runs, sweeps (default: all)")
    ls.add_argument("--json", action="store_true", help="print JSON")
    ls.set_defaults(run=_ls)

    show = commands.add_parser("show", parents=[common], help="one artifact: its spec, results and files")
    show.add_argument("id", metavar="ID", help="an id, or the beginning of one")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)

    results = commands.add_parser("results", parents=[common], help="every diagnosed run of the store in one table")
    results.add_argument("--format", choices=["table", "csv", "json", "parquet"], default="table", help="default: table")
    results.add_argument("--output", metavar="FILE", help="write to a file (needed for parquet)")
    results.set_defaults(run=_results)

    verify = commands.add_parser("verify", parents=[common], help="check every byte of every artifact against its SHA-256")
    verify.set_defaults(run=_verify)
    return parser


def _kind(text: str) -> str:
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"a kind is one of {', '.join(KINDS)}; got {text!r}")
    return text


def _ls(store: Store, options: argparse.Namespace) -> int:
    listing = {}
    for name in options.kinds or KINDS:
        frame = store.catalogue(KINDS[name])  # type: ignore[arg-type]
        frame["created_at"] = frame["created_at"].str.slice(0, 19)  # to the second, UTC
        listing[name] = frame[[column for column in LS_COLUMNS[name] if column in frame]]
    if options.json:
        print(json.dumps({name: _records(frame) for name, frame in listing.items()}, indent=1))
        return 0
    for name, frame in listing.items():
        print(f"{name} ({len(frame)}) in {store.uri}")
        if len(frame):
            print(_text(frame))
        print()
    return 0


def _show(store: Store, options: argparse.Namespace) -> int:
    address = store.find(options.id)
    parts: list[Address] = [address]
    if address.kind == "run":
        parts.append(diagnosis_address(str(address.target_id), address.id))
    content: dict[str, Any] = {}
    for part in parts:
        if (manifest := store.manifest(part)) is not None:
            content[part.kind] = {
                "id": manifest.id,
                "created_at": manifest.created_at,
                "spec": manifest.spec,
                "summary": manifest.summary,
                "files": {file.name: store.url(part, file.name) for file in manifest.files},
            }
    if options.json:
        print(json.dumps(content, indent=1))
        return 0
    for kind, fields in content.items():
        print(f"{kind} {fields['id']}, made {fields['created_at']}")
        for section in ("spec", "summary", "files"):
            if kind == "diagnosis" and section == "spec":
                continue  # the run's own, shown above
            print(f"  {section}")
            for name, value in dotted(fields[section]).items():
                print(f"    {name:32} {value}")
    return 0


def _results(store: Store, options: argparse.Namespace) -> int:
    if options.format == "parquet" and options.output is None:
        raise InvalidInput("Parquet is binary and needs --output FILE; got none. Add --output results.parquet.")
    frame = store.catalogue("diagnosis")
    if options.format in ("csv", "parquet"):
        # No cell of these holds a list, and lists that differ from run to run have no one Parquet type; JSON text keeps them.
        frame = frame.map(lambda value: json.dumps(value) if isinstance(value, list | tuple | dict) else value)
    if options.format == "csv":
        text = frame.to_csv(index=False).rstrip("\n")
    elif options.format == "json":
        text = json.dumps(_records(frame), indent=1)
    elif options.format == "table":
        shown = frame[[column for column in RESULT_COLUMNS if column in frame]]
        text = _text(shown) if len(shown) else f"no results in {store.uri}; python flows/sweep.py makes some"
    if options.output is None:
        print(text)
        return 0
    try:
        if options.format == "parquet":
            frame.to_parquet(options.output)
        else:
            Path(options.output).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"--output must name a file that can be written; got {options.output!r}: {error}.") from None
    return 0


def _verify(store: Store, options: argparse.Namespace) -> int:
    checked = damaged = 0
    for address, problem in store.verify():
        checked += 1
        if problem is not None:
            damaged += 1
            print(f"damaged: {address.kind} {address.id}: {problem}")
    print(f"{checked} artifacts checked, {damaged} damaged, in {store.uri}")
    return 1 if damaged else 0


def _text(frame: pd.DataFrame) -> str:
    """Aligned text, headed by the last parts of the columns' names."""
    short = frame.rename(columns=lambda name: name.removeprefix("spec.").removeprefix("target.").removeprefix("sampler."))
    return short.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.5g}")


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON's types, NaN as None. Not by pandas' own JSON, which rounds to ten places."""
    return [{str(name): None if value != value else value for name, value in row.items()} for row in frame.to_dict("records")]
