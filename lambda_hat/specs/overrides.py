"""The grammar of overrides: `key=value`, the same on the command line, in experiments and in deployments.

model.depth=3                 one value: integer, float (1e-5), true/false, none/null, otherwise text
sampler.step_size=1e-5,1e-6   commas sweep
target.seed=range(1,4)        Python's range over integers: 1, 2, 3
eta=2**range(-3,2)            powers: 0.125, 0.25, 0.5, 1, 2; 2**-3 is one value
target.widths=[5,3,5]         a list is one value; [5,3,5],[10,10] sweeps two lists; [] is an empty one
data.teacher={depth=1}        a table is one value, as in TOML, or in JSON: {"depth": 1}; lists and tables hold one another
data.path="a, b"              quotes, single or double, for text with spaces or any of , = [ ] { } ( ), or like a number
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Never, TypeAlias

from lambda_hat.specs.spec import InvalidInput

KeyPath = tuple[str, ...]
Value: TypeAlias = "int | float | bool | str | tuple[Value, ...] | Table | None"

#: More values in one sweep are a typing error, and would be made before anything could refuse them.
MAX_VALUES = 10_000

MAX_DEPTH = 8

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

_QUOTED = re.compile(r"""("[^"]*"|'[^']*')\s*""")
_RANGE = re.compile(r"""([^\[\]{},()='"\s*]+\s*\*\*\s*)?range\s*\([^()]*\)\s*""")
_BARE = re.compile(r"""[^\[\]{},()='"\s]+\s*""")
_ENTRY = re.compile(rf"""(?P<quote>["']?)(?P<name>{NAME.pattern})(?P=quote)\s*[=:]\s*""")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_POWER = re.compile(r"(?P<base>[^\s*]+)\s*\*\*\s*(?P<exponent>.*)", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True)
class Table:
    """A table of values that, unlike a dict, cannot change and can be hashed."""

    entries: tuple[tuple[str, Value], ...]

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name}={value!r}' for name, value in self.entries)}}}"


@dataclass(frozen=True)
class Assignment:
    """One override: the key's parts, its values in order, and the text it was written as."""

    path: KeyPath
    values: tuple[Value, ...]
    text: str

    @property
    def key(self) -> str:
        return ".".join(self.path)


#: Assignments by the path of their key.
Sweep = dict[KeyPath, Assignment]


def parse(text: str) -> Assignment:
    """Parses `key=value[,value...]`.

    Raises:
      InvalidInput: the text is not of the grammar.
    """
    key, equals, right = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals:
        _refuse(text, "an override is key=value; this has no '='", "Write for example model.depth=3.")
    if not all(NAME.fullmatch(part) for part in path):
        _refuse(
            text,
            f"a key is names joined by dots, each of letters, digits, _ and -; got {key!r}",
            "Write for example sampler.num_chains=4.",
        )
    return Assignment(path, tuple(_Reader(text, right.strip()).items("", 0)), text)


def parse_sweep(texts: Iterable[str]) -> Sweep:
    """The assignments of one sweep.

    Raises:
      InvalidInput: a text is not of the grammar, or a key is given twice.
    """
    sweep: Sweep = {}
    for assignment in map(parse, texts):
        if (first := sweep.setdefault(assignment.path, assignment)) is not assignment:
            _refuse(assignment.text, f"a sweep sets a key once; {first.text!r} sets it too", "Join the values with commas.")
    return sweep


def plain(value: Value) -> Any:
    """The value as JSON has it: lists for tuples, dicts for tables."""
    if isinstance(value, Table):
        return {name: plain(item) for name, item in value.entries}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def chosen(name: str, sweeps: Iterable[Sweep]) -> list[Any]:
    """The presets of a section which the sweeps name, each once."""
    values = (sweep[(name,)].values for sweep in sweeps if (name,) in sweep)
    return list(dict.fromkeys(itertools.chain.from_iterable(values)))


def left(sweep: Sweep, user: Sweep) -> Sweep:
    """What overrides leave of a sweep: they replace the same key and what is inside it."""
    return {path: assignment for path, assignment in sweep.items() if not any(path[: len(new)] == new for new in user)}


def without(sweep: Sweep, heads: Collection[str]) -> Sweep:
    """The assignments whose keys do not begin with one of `heads`."""
    return {path: assignment for path, assignment in sweep.items() if path[0] not in heads}


def _refuse(text: str, rule: str, remedy: str) -> Never:
    raise InvalidInput(f"Override {text!r}: {rule}. {remedy}")


class _Reader:
    """Reads the values of an override from the left."""

    def __init__(self, text: str, right: str) -> None:
        self.text, self.rest = text, right

    def items(self, closing: str, depth: int) -> list[Value]:
        """The comma-separated items up to `closing`; "" is the end."""
        items: list[Value] = []
        if closing and self._mark(closing):
            return items
        while True:
            items.extend(self._item(depth))
            if len(items) > MAX_VALUES:
                _refuse(self.text, f"a sweep has at most {MAX_VALUES} values", "Sweep fewer.")
            if self._ends(closing):
                return items

    def _item(self, depth: int) -> Iterable[Value]:
        if depth > MAX_DEPTH:
            _refuse(self.text, f"lists and tables nest at most {MAX_DEPTH} deep", "Check the brackets.")
        if content := self._take(_RANGE):
            if depth:
                _refuse(self.text, "range(...) sweeps, so it cannot stand in a list or a table", "Write the numbers out.")
            return _range(self.text, content)
        if content := self._take(_QUOTED):
            return [content[1:-1]]
        if content := self._take(_BARE):
            return [_scalar(self.text, content)]
        if self._mark("["):
            return [tuple(self.items("]", depth + 1))]
        if self._mark("{"):
            return [self._table(depth + 1)]
        if not self.rest or self.rest[0] in ",]}":
            _refuse(self.text, "an item is empty", "Give a value after '=', and between commas; [] is an empty list.")
        _refuse(self.text, f"{self.rest!r} is no value", "Check brackets and quotes; quote text with , = ( ) [ ] { }.")

    def _table(self, depth: int) -> Table:
        entries: dict[str, Value] = {}
        if self._mark("}"):
            return Table(())
        while True:
            if not (match := _ENTRY.match(self.rest)):
                _refuse(
                    self.text, f"a table is {{name=value, ...}}; got {self.rest!r}", "Write for example {depth=1, width=4}."
                )
            if match["name"] in entries:
                _refuse(self.text, f"a table sets a name once; got {match['name']!r} twice", "Leave one out.")
            self.rest = self.rest[match.end() :]
            (entries[match["name"]],) = self._item(depth)
            if self._ends("}"):
                return Table(tuple(entries.items()))

    def _ends(self, closing: str) -> bool:
        """Whether `closing` follows an item, or else a comma."""
        if self._mark(closing) if closing else not self.rest:
            return True
        if not self._mark(","):
            bare = _BARE.match(self.rest)
            got = repr(bare[0].strip() if bare else self.rest[0]) if self.rest else "the end"
            _refuse(
                self.text, f"a comma or {closing or 'the end'} must follow an item; got {got}",
                "Check commas, brackets and quotes; quote text with , = ( ) [ ] { }.",
            )  # fmt: skip
        return False

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.rest)
        self.rest = self.rest[match.end() :] if match else self.rest
        return match[0].strip() if match else ""

    def _mark(self, mark: str) -> bool:
        there = self.rest.startswith(mark)
        self.rest = self.rest[len(mark) :].lstrip() if there else self.rest
        return there


def _range(text: str, content: str) -> Iterable[Value]:
    power = _POWER.fullmatch(content)
    values = _integers(text, content if power is None else power["exponent"])
    return values if power is None else [_power(text, power["base"], exponent) for exponent in values]


def _power(text: str, base: str, exponent: int) -> Value:
    """base ** exponent; an integer where it is one."""
    if not _FLOAT.fullmatch(base) or float(base) <= 0 or not abs(exponent * math.log10(float(base))) < 300:
        _refuse(
            text,
            f"a power is of a positive number, and has at most 300 digits; got {base}**{exponent}",
            "Write for example 2**range(-3,2).",
        )
    return (int(base) if _INTEGER.fullmatch(base) else float(base)) ** exponent


def _integers(text: str, content: str) -> range:
    content = content.strip().removeprefix("range").strip()[1:-1]
    numbers = [part.strip() for part in content.split(",")]
    if len(numbers) not in (2, 3) or not all(_INTEGER.fullmatch(number) and len(number) < 20 for number in numbers):
        _refuse(
            text, f"range takes two or three integers; got range({content})", "Write range(first,end) or range(first,end,step)."
        )
    start, stop, step = [int(number) for number in numbers] + [1] * (3 - len(numbers))
    if step == 0:
        _refuse(text, f"the step of a range must not be 0; got range({content})", "Leave it out for 1.")
    values = range(start, stop, step)
    if not values:
        _refuse(text, f"range({content}) is empty", "The end is exclusive: range(1,4) is 1, 2, 3.")
    # len() of a range beyond the machine's integers is an error.
    if (stop - start) // step > MAX_VALUES:
        _refuse(text, f"a sweep has at most {MAX_VALUES} values; got range({content})", "Sweep fewer.")
    return values


def _scalar(text: str, content: str) -> Value:
    if content.lower() in _WORDS:
        return _WORDS[content.lower()]
    if (power := _POWER.fullmatch(content)) and _INTEGER.fullmatch(power["exponent"]) and len(power["exponent"]) < 20:
        return _power(text, power["base"], int(power["exponent"]))
    if _INTEGER.fullmatch(content):
        # Python refuses to read integers of thousands of digits; no field holds more than these.
        if len(content) > 300:
            _refuse(text, "a number has at most 300 digits", "Shorten it.")
        return int(content)
    return float(content) if _FLOAT.fullmatch(content) else content
