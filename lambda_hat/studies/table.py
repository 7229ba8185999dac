"""What commands say of studies: tables in aligned plain text, what failed, where files are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

_RIGHT = {"llc", "exact", "ESS", "R-hat", "FGE", "seconds"}


def what_failed(counts: Mapping[str, int], kept: bool = True) -> str:
    """What failed of a study, in a sentence: how many of what. kept: whether the rest is."""
    failed = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
    rest = "finished and kept, and the same command tries again what failed." if kept else "finished; --no-save keeps nothing."
    return f"{failed} failed; the others are {rest}"


def files_of(files: Mapping[str, str]) -> list[str]:
    """Lines that say where a study's report, table and plots are."""
    plots = [f"  {url}" for name, url in files.items() if name.endswith(".png")]
    return [f"report: {files['report.html']}", f"table: {files['results.csv']}", *(["plots:", *plots] if plots else [])]


def aligned(cells: Sequence[Mapping[str, str]], right: Collection[str] = _RIGHT) -> str:
    """Columns of text, those named `right` to the right."""
    names = list(cells[0]) if cells else []
    widths = {name: max(len(name), *(len(cell[name]) for cell in cells)) for name in names}

    def line(cell: Mapping[str, str]) -> str:
        pads = (cell[name].rjust(widths[name]) if name in right else cell[name].ljust(widths[name]) for name in names)
        return "  ".join(pads).rstrip()

    header = line({name: name for name in names})
    return "\n".join([header, "─" * len(header), *map(line, cells)])
