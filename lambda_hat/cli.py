"""`lambda-hat`: look at what is in a store. Computing is the flows' part (`python flows/sweep.py --help`)."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_hat import __version__
from lambda_hat.batch_size import commands as batch_size
from lambda_hat.entropy import commands as entropy
from lambda_hat.specs.settings import load_settings
from lambda_hat.specs.spec import InvalidInput, dotted
from lambda_hat.specs.text import verdict_text, with_error
from lambda_hat.store import gallery
from lambda_hat.store.manifest import Address, ArtifactError, Manifest, StoreUnavailable, diagnosis_address
from lambda_hat.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

#: Columns of `ls`, where the artifacts have them.
LS_COLUMNS = {
    "targets": ["id", "spec.family", "spec.seed", "num_params", "num_data", "init_loss", "true_llc", "created_at"],
    "runs": ["id", "target_id", "spec.target.family", "spec.sampler.kind", "spec.sampler.seed", "fge", "created_at"],
    "sweeps": ["id", "num_runs", "created_at"],
    "trials": ["id", "num_trials", "num_failed", "seconds", "created_at"],
    "studies": ["id", "spec.name", "num_trials", "num_failed", "created_at"],
    "entropy": ["id", "target_id", "checkpoint", "spec.integrand", "num_update", "seconds", "created_at"],
    "entropy-studies": ["id", "spec.name", "num_measured", "created_at"],
}
KINDS = {
    "targets": "target", "runs": "run", "sweeps": "sweep", "trials": "trials", "studies": "study", "entropy": "entropy",
    "entropy-studies": "entropy_study",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 where `verify` or `pull` finds damage, 2 for wrong input or no store, 130
    after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        settings = load_settings(options.settings)
        uri = settings.store.uri if options.store is None else options.store
        status = options.run(Store(uri, settings.store.options, settings.store.cache), options)
        sys.stdout.flush()
        return status
    except (InvalidInput, ArtifactError, StoreUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        return 130
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

    ls = commands.add_parser("ls", parents=[common], help="list what is in the store, oldest first")
    ls.add_argument("kinds", nargs="*", type=_kind, metavar="KIND", help=f"{', '.join(KINDS)} (default: all)")
    ls.add_argument("--json", action="store_true", help="print JSON")
    ls.set_defaults(run=_ls)

    show = commands.add_parser("show", parents=[common], help="one artifact: its spec, results and files")
    show.add_argument("id", metavar="ID", help="an id, or the beginning of one")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)

    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument(
        "--where", metavar="COLUMN=VALUE", nargs="+", default=[], help="only runs with these, e.g. sampler.kind=sgld verdict=ok"
    )
    chosen.add_argument("--sweep", metavar="ID", help='only runs of this sweep; "latest" for the latest')

    results = _command(
        commands, "results", [common, chosen], "every diagnosed run of the store in one table",
        "The table shows in which fields runs of a family or a kind differ, and the results. csv, json and parquet hold every\n"
        "column: ids, the whole spec, every estimate with its error, the verdict.",
        "lambda-hat results",
        "lambda-hat results --where sampler.kind=sgld verdict=ok",
        "lambda-hat results --sweep latest --format csv --output results.csv",
        "lambda-hat results --store s3://bucket/prefix --format parquet --output results.parquet",
    )  # fmt: skip
    results.add_argument("--format", choices=["table", "csv", "json", "parquet"], default="table", help="default: table")
    results.add_argument("--output", metavar="FILE", help="write to a file (needed for parquet)")
    results.set_defaults(run=_results)

    report = _command(
        commands, "report", [common], "a sweep as one HTML file that needs nothing else",
        "Results that sort, what to change, plots and configurations; made when the sweep finished, to open, send or print.",
        "lambda-hat report",
        "lambda-hat report swp_12 --output report.html",
    )  # fmt: skip
    report.add_argument(
        "sweep", nargs="?", default="latest", metavar="ID", help="of a sweep, or its beginning (default: latest)"
    )
    report.add_argument("--output", metavar="FILE", help="default: <id of the sweep>.html")
    report.set_defaults(run=_report)

    promote = _command(
        commands, "promote", [common, chosen], "the latest plot of each kind to a folder, with a gallery",
        "Copies the latest plots of each family of targets and sampler, and of the sweeps over them, under names that stay\n"
        "the same from call to call (mlp-sgld-trace.png), and writes README.md, which shows them.",
        "lambda-hat promote --to docs/gallery",
        "lambda-hat promote --to docs/gallery --plot trace llc_convergence --where target.family=mlp",
        "lambda-hat promote --samplers sgld,hmc --plot-name theta_trace.png --outdir assets",
    )  # fmt: skip
    promote.add_argument(
        "--to", "--outdir", metavar="DIR", default="gallery", help="folder, made if need be (default: gallery)"
    )
    promote.add_argument("--samplers", metavar="NAMES", type=_names, default=[], help="only runs of these, e.g. sgld,hmc")
    shown = promote.add_mutually_exclusive_group()
    shown.add_argument("--plot", metavar="NAME", nargs="+", default=[], help="only these plots, e.g. trace llc_convergence")
    shown.add_argument("--plot-name", metavar="NAME", help="one plot of the latest run of each sampler, as SAMPLER.png")
    promote.set_defaults(run=_promote)

    pull = _command(
        commands, "pull", [common], "copy artifacts to another store, a folder say",
        "Copies a target with its runs and their diagnoses, a run with its target and its diagnosis, a sweep with all it\n"
        "compares; without ID, everything. What is there is skipped, so the same command goes on where it was stopped.",
        "lambda-hat pull --store s3://bucket/prefix --to results",
        "lambda-hat pull swp_12 tgt_0a1b --to results",
    )  # fmt: skip
    pull.add_argument("ids", nargs="*", metavar="ID", help="an id, or the beginning of one (default: all)")
    pull.add_argument("--to", metavar="URI", required=True, help="a folder, made if need be, or any other store")
    pull.add_argument("--json", action="store_true", help="print JSON")
    pull.set_defaults(run=_pull)

    verify = commands.add_parser("verify", parents=[common], help="check every byte of every artifact against its SHA-256")
    verify.set_defaults(run=_verify)

    gc = _command(
        commands, "gc", [common], "remove what killed work has left behind",
        "Files no manifest names, temporary files, checkpoints of finished work and unfinished uploads to S3. Results stay,\n"
        "and so do checkpoints of unfinished work.",
        "lambda-hat gc --dry-run",
        "lambda-hat gc --older-than 1",
    )  # fmt: skip
    gc.add_argument("--dry-run", action="store_true", help="only list them")
    gc.add_argument(
        "--older-than", metavar="HOURS", type=_hours, default=24.0,
        help="only what nobody wrote to for so long; what is being written now must not be removed (default: 24)",
    )  # fmt: skip
    gc.set_defaults(run=_gc)

    batch_size.add_commands(commands, common)
    entropy.add_commands(commands, common)
    return parser


def _command(commands: Any, name: str, parents: list[argparse.ArgumentParser], line: str, text: str, *examples: str) -> Any:
    """A command whose help has more than a line: `text` and examples."""
    return commands.add_parser(
        name, parents=parents, help=line, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{line[0].upper()}{line[1:]}.\n\n{text}", epilog="\n  ".join(["examples:", *examples]),
    )  # fmt: skip


def _names(text: str) -> list[str]:
    return text.split(",")


def _kind(text: str) -> str:
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"a kind is one of {', '.join(KINDS)}; got {text!r}")
    return text


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 <= hours <= 1e6:
        raise argparse.ArgumentTypeError(f"hours are a number from 0 to a million; got {text!r}")
    return hours


def _ls(store: Store, options: argparse.Namespace) -> int:
    listing = {}
    for name in options.kinds or KINDS:
        frame = store.catalogue(KINDS[name])  # type: ignore[arg-type]
        frame["created_at"] = frame["created_at"].str.slice(0, 19)  # to the second, UTC
        listing[name] = frame[[column for column in LS_COLUMNS[name] if column in frame]]
    if options.json:
        print(json.dumps({name: gallery.records(frame) for name, frame in listing.items()}, indent=1))
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
        if kind == "diagnosis":
            found = fields["summary"]
            exact = f", exact {found['true_llc_text']}" if found["true_llc_text"] else ""
            verdict = verdict_text(found["verdict"], found["prior_share"])
            print(f"  llc {with_error(found['llc'], found['mcse'])}{exact}: {verdict}")
        for section in ("spec", "summary", "files"):
            if kind == "diagnosis" and section == "spec":
                continue  # the run's own, shown above
            print(f"  {section}")
            for name, value in dotted(fields[section]).items():
                if kind == "diagnosis" and value in (None, []):
                    continue  # what this run does not give
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    print(f"    {name}\n{textwrap.indent(_rows(value), ' ' * 6)}")
                else:
                    print(f"    {name:32} {value}")
    return 0


def _rows(values: list[dict[str, Any]]) -> str:
    """What there are several of: findings as sentences, chains as a table."""
    if "remedy" in values[0]:
        return "\n".join(f"{finding['verdict']}: {finding['remedy']}" for finding in values)
    import pandas as pd

    return _text(pd.DataFrame(values).rename_axis("chain").reset_index())


def _report(store: Store, options: argparse.Namespace) -> int:
    address = gallery.find_sweep(store, options.sweep)
    manifest = store.manifest(address)
    if manifest is None or all(file.name != "report.html" for file in manifest.files):
        raise InvalidInput(
            f"A sweep has a report since this version of lambda_hat; {address.id} has none. "
            "Call its sweep again: nothing is sampled twice."
        )
    output = options.output or f"{address.id}.html"
    _write(output, store.read(address, "report.html"))
    print(f"{output}: {manifest.summary['num_runs']} runs of {address.id}")
    return 0


def _promote(store: Store, options: argparse.Namespace) -> int:
    written = gallery.promote(
        store, options.to, options.where, options.sweep, options.plot, options.samplers, options.plot_name
    )
    print(f"{len(written) - 1} plots, shown in {written[-1]}")
    return 0


def _results(store: Store, options: argparse.Namespace) -> int:
    if options.format == "parquet" and options.output is None:
        raise InvalidInput("Parquet is binary and needs --output FILE; got none. Add --output results.parquet.")
    frame = gallery.results(store, options.where, options.sweep)
    if options.format in ("csv", "parquet"):
        # No cell of these holds a list, and lists that differ from run to run have no one Parquet type; JSON text keeps them.
        frame = frame.map(lambda value: json.dumps(value) if isinstance(value, list | tuple | dict) else value)
        # Nor may a column hold numbers and text, as step sizes do, of which some are "auto".
        mixed = [str(name) for name, column in frame.items() if {str} < {type(value) for value in column.dropna()}]
        frame[mixed] = frame[mixed].map(str, na_action="ignore")
    if options.format == "csv":
        text = frame.to_csv(index=False).rstrip("\n")
    elif options.format == "json":
        text = json.dumps(gallery.records(frame), indent=1)
    elif options.format == "table":
        none = f"no results in {store.uri}; python flows/sweep.py makes some"
        if options.where or options.sweep:
            none = f"no results fit in {store.uri}; lambda-hat results without --where and --sweep lists all"
        text = _text(gallery.tidy(frame)) if len(frame) else none
    if options.output is None:
        print(text)
        return 0
    _write(options.output, frame.to_parquet() if options.format == "parquet" else f"{text}\n".encode())
    return 0


def _write(output: str, content: bytes) -> None:
    try:
        Path(output).write_bytes(content)
    except OSError as error:
        raise InvalidInput(f"--output must name a file that can be written; got {output!r}: {error}.") from None


def _pull(store: Store, options: argparse.Namespace) -> int:
    from tqdm import tqdm

    to = Store(options.to)
    to.check_writable()
    chosen = [part for text in options.ids for part in store.related(store.find(text))]
    manifests = store.manifests(dict.fromkeys(chosen) if options.ids else store.addresses())
    if not manifests:
        raise InvalidInput(f"There must be an artifact to copy; there is none in {store.uri}. Name the store with --store URI.")

    def copy(manifest: Manifest) -> int | ArtifactError | None:
        try:
            return to.copy(manifest.address, store)
        except ArtifactError as error:
            return error

    copied, present, damaged = [], 0, 0
    sizes = [sum(file.size for file in manifest.files) for manifest in manifests]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None) as bar, ThreadPoolExecutor(4) as pool:
        for manifest, size, done in zip(manifests, sizes, pool.map(copy, manifests), strict=True):
            bar.update(size)
            if isinstance(done, ArtifactError):
                damaged += 1
                bar.write(f"damaged: {manifest.kind} {manifest.id}: {done}", file=sys.stderr)
            elif done is None:
                present += 1
            else:
                copied.append(done)
    if options.json:
        counts = {"copied": len(copied), "present": present, "damaged": damaged, "bytes": sum(copied)}
        print(json.dumps(counts | {"to": to.uri}))
    else:
        print(f"{len(copied)} artifacts copied, {present} were there, {damaged} damaged, in {to.uri}")
    return 1 if damaged else 0


def _gc(store: Store, options: argparse.Namespace) -> int:
    verb = "would be removed" if options.dry_run else "removed"
    count = total = 0
    for path, num_bytes in store.clean(options.older_than, options.dry_run):
        print(f"{verb}: {path}, {num_bytes} bytes")
        count, total = count + 1, total + num_bytes
    print(f"{count} leftovers of {total} bytes {verb}, in {store.uri}")
    return 0


def _verify(store: Store, options: argparse.Namespace) -> int:
    checked = damaged = 0
    for address, problem in store.verify():
        checked += 1
        if problem is not None:
            damaged += 1
            print(f"damaged: {address.kind} {address.id}: {problem}")
    if not checked:
        raise InvalidInput(
            f"There must be an artifact to check; there is none in {store.uri}. Name the store with --store URI."
        )
    print(f"{checked} artifacts checked, {damaged} damaged, in {store.uri}")
    return 1 if damaged else 0


def _text(frame: pd.DataFrame) -> str:
    """Aligned text, headed by the last parts of the columns' names."""
    short = frame.rename(columns=lambda name: name.removeprefix("spec.").removeprefix("target.").removeprefix("sampler."))
    return short.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.5g}")
