"""What a store holds, for people and for pandas: results as one tidy table, the latest plots as a gallery."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lambda_hat.specs.settings import nearest
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.specs.text import with_error
from lambda_hat.store.manifest import Address, diagnosis_address, sweep_address
from lambda_hat.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

#: What every results table shows; between them come the fields in which runs of a family or a kind differ.
FIRST = ("id", "spec.target.family", "spec.sampler.kind")
LAST = ("llc", "mcse", "true_llc", "ess_bulk", "rhat", "fge", "seconds", "prior_share", "verdict")


def results(store: Store, where: Sequence[str] = (), sweep: str | None = None) -> pd.DataFrame:
    """One row for each diagnosed run, oldest first, with all that is known of it (`Store.catalogue`).

    Args:
      where: COLUMN=VALUE texts that must all hold; "spec." may be left out. sweep: the id, or its beginning, of a sweep whose
        runs alone are wanted; "latest" for the latest.

    Raises:
      InvalidInput: a condition is not of this form or names no column, or there is no such sweep.
    """
    frame = store.catalogue("diagnosis")
    if sweep is not None:
        manifest = store.manifest(find_sweep(store, sweep))
        assert manifest is not None  # it was just found
        frame = frame[frame["id"].isin(manifest.spec["run_ids"])]
    for text in where:
        name, equals, value = text.partition("=")
        column = name if name in frame else f"spec.{name}"
        if not equals or (column not in frame and len(frame)):
            names = [str(column).removeprefix("spec.") for column in frame]
            raise InvalidInput(f"A condition is COLUMN=VALUE, of a column of the results; got {text!r}. {nearest(name, names)}")
        if len(frame):
            frame = frame[[_same(cell, value) for cell in frame[column]]]
    return frame.reset_index(drop=True)


def find_sweep(store: Store, text: str) -> Address:
    """The sweep of this id, or beginning of an id; "latest" for the latest.

    Raises:
      InvalidInput: there is none.
    """
    if text != "latest":
        address = store.find(text)
        if address.kind != "sweep":
            raise InvalidInput(f"A sweep's id begins with swp_; got {text!r}. `lambda-hat ls sweeps` lists them.")
        return address
    sweeps = store.catalogue("sweep")
    if not len(sweeps):
        raise InvalidInput(f"There must be a sweep; there is none in {store.uri}. python flows/sweep.py makes one.")
    return sweep_address(sweeps["id"].iloc[-1])


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of `results` that people look at first: the ids, what differs between runs, and the results."""
    differing = []
    for prefix, kind in (
        ("spec.target.", "spec.target.family"),
        ("spec.posterior.", None),
        ("spec.sampler.", "spec.sampler.kind"),
    ):
        groups = [frame] if kind is None or not len(frame) else [group for _, group in frame.groupby(kind)]
        columns = [column for column in map(str, frame) if column.startswith(prefix) and column not in FIRST]
        differing += [column for column in columns if any(group[column].map(str).nunique() > 1 for group in groups)]
    return frame[[column for column in (*FIRST, *differing, *LAST) if column in frame]]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON's types, NaN as None. Not by pandas' own JSON, which rounds to ten places."""
    return [{str(name): None if value != value else value for name, value in row.items()} for row in frame.to_dict("records")]


def promote(
    store: Store, folder: str | Path, where: Sequence[str] = (), sweep: str | None = None, plots: Sequence[str] = (),
    samplers: Sequence[str] = (), plot_name: str | None = None,
) -> list[Path]:  # fmt: skip
    """Copies the latest plot of each kind into a folder, under names that stay the same, and writes README.md, their gallery.

    <family>-<sampler>-<plot>.png for each family of targets and each sampler, <family>-<plot>.png for the comparisons on a
    family's latest target, <plot>.png for those over all targets. Files of these names are replaced, others are left alone.
    With a plot_name it is this plot of the latest run of each sampler, of whatever family, as <sampler>.png.

    Args:
      where, sweep: which runs, as in `results`. plots, samplers: their names; none given means all.

    Returns:
      The files, README.md last.

    Raises:
      InvalidInput: nothing fits, or the folder cannot be written.
    """
    runs = results(store, where, sweep)
    names = [_sampler(row) for row in runs.to_dict("records")]
    for name in samplers:
        if name not in names:
            raise InvalidInput(f"A sampler must be one of the runs'; got {name!r}. {nearest(name, set(names))}")
    if samplers:
        runs = runs[[name in samplers for name in names]]
    sections: dict[tuple[str, ...], list[_Picture]] = {}
    if plot_name is None:
        pictures = [*_of_sweeps(store, runs, sweep), *_of_runs(store, runs, ("spec.target.family",))]
    else:
        plots = [plot_name.removesuffix(".png")]
        pictures = [picture._replace(file=f"{picture.section[0]}.png") for picture in _of_runs(store, runs, ())]
    for picture in pictures:
        if not plots or picture.plot in plots:
            sections.setdefault(picture.section, []).append(picture)
    if not sections:
        raise InvalidInput(
            f"There must be a plot to promote; none in {store.uri} fits. `lambda-hat results` lists the runs, "
            "and --where, --sweep, --samplers, --plot and --plot-name choose among them and their plots."
        )
    folder = Path(folder)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pictures in sections.values():
            for picture in pictures:
                written.append(folder / picture.file)
                written[-1].write_bytes(store.read(picture.address, picture.name))
        written.append(folder / "README.md")
        written[-1].write_text(_readme(sections), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"--to must name a folder that can be written; got {str(folder)!r}: {error}.") from None
    return written


class _Picture(NamedTuple):
    """A plot in the store, and where it goes.

    section: of the gallery: the names of a family and a sampler, a family alone, or none for what is of all targets.
    address, name: where it is in the store. file: where it goes.
    """

    section: tuple[str, ...]
    plot: str
    caption: str
    address: Address
    name: str
    file: str


def _picture(section: tuple[str, ...], plot: str, caption: str, address: Address, name: str) -> _Picture:
    return _Picture(section, plot, caption, address, name, "-".join([*section, plot]) + ".png")


def _of_runs(store: Store, runs: pd.DataFrame, columns: tuple[str, ...]) -> Iterator[_Picture]:
    """The plots of the latest run of each sampler, for each value of these columns."""
    latest = {(*(row[column] for column in columns), _sampler(row)): row for row in runs.to_dict("records")}
    for section in sorted(latest):
        row = latest[section]
        address = diagnosis_address(row["target_id"], row["id"])
        manifest = store.manifest(address)
        llc = with_error(*(None if row[name] != row[name] else row[name] for name in ("llc", "mcse")))
        caption = f"llc {llc}, {row['verdict']}; `{row['id']}`, {row['created_at'][:10]}"
        for file in manifest.files if manifest is not None else ():
            if file.name.endswith(".png"):
                yield _picture(section, file.name.removesuffix(".png"), caption, address, file.name)


def _of_sweeps(store: Store, runs: pd.DataFrame, sweep: str | None) -> Iterator[_Picture]:
    """The latest comparison of each kind, on each family of targets of these runs and over all."""
    families = dict(zip(runs["target_id"], runs["spec.target.family"], strict=True)) if len(runs) else {}
    ids = list(store.catalogue("sweep")["id"]) if sweep is None else [find_sweep(store, sweep).id]
    found: dict[tuple[tuple[str, ...], str], _Picture] = {}
    for sweep_id in ids:
        manifest = store.manifest(sweep_address(sweep_id))
        if manifest is None or not set(manifest.spec["run_ids"]) & set(runs["id"]):
            continue
        for file in manifest.files:
            plot, _, target_id = file.name.removesuffix(".png").partition("-")
            if file.name.endswith(".png") and (not target_id or target_id in families):
                section = (families[target_id],) if target_id else ()
                caption = f"`{target_id or sweep_id}`, {manifest.created_at[:10]}"
                found[section, plot] = _picture(section, plot, caption, manifest.address, file.name)
    return iter([found[place] for place in sorted(found)])


def _sampler(row: Mapping[Any, Any]) -> str:
    """A sampler's kind, and its preconditioner, which makes another sampler of it."""
    preconditioner = row.get("spec.sampler.preconditioner")
    named = isinstance(preconditioner, str) and preconditioner != "none"
    return f"{row['spec.sampler.kind']}-{preconditioner}" if named else row["spec.sampler.kind"]


def _readme(sections: dict[tuple[str, ...], list[_Picture]]) -> str:
    lines = ["# Gallery", "", "The latest plot of each kind, written by `lambda-hat promote`."]
    for section in sorted(sections):
        title = " by ".join(section) or "All targets"
        lines += ["", f"## {title}"]
        for caption, pictures in itertools.groupby(sections[section], lambda picture: picture.caption):
            lines += ["", caption, ""]
            lines += [f"![{picture.plot.replace('_', ' ')}: {title}]({picture.file})" for picture in pictures]
    return "\n".join([*lines, ""])


def _same(cell: Any, value: str) -> bool:
    """Whether a cell is the value of a command line: as a number where it is one, else as text."""
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return str(cell).lower() == value.lower()
    try:
        return float(cell) == float(value)
    except ValueError:
        return cell != cell and value.lower() == "none"
