"""Specs: what is to be computed, as frozen, validated values with a stable id.

A spec holds every field that changes the numbers of a result and no other, so its id (a hash of its
canonical JSON) names the result: two equal ids are the same computation on every platform.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

#: Part of every id. Raise it when a change of the code changes the numbers of a result, so that results
#: computed before the change are not taken for results of the new code.
ALGORITHM_VERSION = 4

Precision = Literal["float32", "float64"]

#: Of targets, runs, sweeps, trials trained together, studies of trials, measured updates of policies, studies of these.
ID_PREFIXES = "tgt|run|swp|trl|sty|ent|ens"
ID_PATTERN = re.compile(rf"({ID_PREFIXES})_[0-9a-f]{{16}}")


#: A quoted text, a list or a table of over 160 characters, which no reader of a message reads.
_LONG = re.compile(r"""(?P<text>(?<!\w)'[^']{120})[^']{40,}'|(?P<list>[\[({][^\[\](){}]{120})[^\[\](){}]{40,}[\])}]""")


class InvalidInput(ValueError):
    """A user's input breaks a rule. The message states the rule, the value received, cut where it is long, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(_LONG.sub(lambda match: f"{match['text'] or match['list']} ...", message))


class Spec(BaseModel):
    """Base of all specs: immutable, hashable, unknown fields refused, NaN and infinity refused.

    rivals: for a field, those that decide the same thing; where an override sets it, they fall to their defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rivals: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Validates plain data (as JSON holds it) strictly: `"3"` or `true` is no integer, a list is a tuple.

        Raises:
          pydantic.ValidationError: a field is unknown, missing, or of the wrong type or range.
        """
        return cls.model_validate_json(json.dumps(fields), strict=True)

    def canonical_json(self) -> str:
        """The one JSON text of this spec: sorted keys, no spaces, shortest floats, no negative zero."""
        return canonical_json(self.model_dump(mode="json"))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII only; floats in Python's shortest round-trip form."""
    return json.dumps(_positive_zeros(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _positive_zeros(value: Any) -> Any:
    """-0.0 and 0.0 are the same number and must give the same id."""
    if isinstance(value, dict):
        return {key: _positive_zeros(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_positive_zeros(item) for item in value]
    return value + 0.0 if isinstance(value, float) else value


def dotted(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names like "target.data.n_data"."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def content_id(prefix: Literal["tgt", "run", "swp", "trl", "sty", "ent", "ens"], content: Any) -> str:
    """`<prefix>_<16 hex digits>`: the first 64 bits of the SHA-256 of the content's canonical JSON."""
    text = canonical_json({"algorithm_version": ALGORITHM_VERSION, "content": content})
    return f"{prefix}_{hashlib.sha256(text.encode('ascii')).hexdigest()[:16]}"


def check_id(text: str) -> str:
    """Returns `text` if it is a well-formed id (so it cannot name a path outside the store).

    Raises:
      InvalidInput: it is not.
    """
    if not isinstance(text, str) or not ID_PATTERN.fullmatch(text):
        raise InvalidInput(
            f"An id is one of {ID_PREFIXES.replace('|', ', ')} followed by _ and 16 hexadecimal digits; got {text!r}. "
            "`lambda-hat ls` lists the ids in the store."
        )
    return text
