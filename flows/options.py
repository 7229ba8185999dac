"""The options of the command lines, as all flows have them."""

from __future__ import annotations

import argparse
from typing import Any

from prefect import Flow


def parse(parser: argparse.ArgumentParser) -> Any:
    """The command line's options; +experiment=NAME among the overrides is --experiment NAME."""
    given = parser.parse_intermixed_args()
    plus = [text for text in given.overrides if text.startswith("+")]
    names = [text.removeprefix("+experiment=") for text in plus] + [given.experiment] * (given.experiment is not None)
    if len(names) > 1 or any(not text.startswith("+experiment=") for text in plus):
        parser.error(
            f"+ stands before experiment=NAME alone, which is given once; got {' '.join(plus)}: write KEY=VALUE without +"
        )
    given.overrides = [text for text in given.overrides if text not in plus]
    given.experiment = names[0] if names else None
    return given


def parser(flow: Flow[Any, Any], examples: str) -> argparse.ArgumentParser:
    """The options all flows have."""
    parser = argparse.ArgumentParser(
        description=str(flow.description).split("\n\n")[0], epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override or sweep a field; commas sweep")
    parser.add_argument(
        "--experiment", metavar="NAME", help="a named experiment of the settings (default: default); or +experiment=NAME"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="changes nothing: commas sweep with and without it")
    parser.add_argument("--list", action="store_true", help="list what can be chosen by name, and stop")
    parser.add_argument("--dry-run", action="store_true", help="show what would be computed and its work, and stop")
    parser.add_argument(
        "--store", metavar="URI", help="where artifacts go: a folder or s3://bucket/prefix (default: the settings')"
    )
    parser.add_argument("--settings", metavar="FILE", help="settings file (default: ./settings.toml)")
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    return parser
