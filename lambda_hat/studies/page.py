"""Pages: one HTML file each that needs nothing else: no network, no other file, no script to be read or printed."""

from __future__ import annotations

import base64
import re
from importlib.resources import files
from typing import Any

import jinja2

from lambda_hat import __version__
from lambda_hat.specs.spec import ALGORITHM_VERSION
from lambda_hat.specs.text import with_error

#: What made the numbers.
VERSIONS = f"lambda_hat {__version__}, algorithms {ALGORITHM_VERSION}"


def page(template: str, **content: Any) -> str:
    """A page of `templates/` with this content, escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: files("lambda_hat.studies").joinpath("templates", name).read_text("utf-8")),
    )  # fmt: skip
    environment.filters |= {"image": _image, "title": _title, "text": _text}
    environment.globals["error"] = with_error
    return environment.get_template(template).render(**content)


def _image(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _title(name: str) -> str:
    """A plot's name as a heading."""
    return re.sub(r"\bllc\b", "LLC", name.replace("_", " "))


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
