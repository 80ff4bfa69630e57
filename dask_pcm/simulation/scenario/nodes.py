"""Readers of YAML nodes that report every problem with its line.

A reader is a function from a node to a value. It raises ``Problems``. Readers of mappings and
lists collect the problems of all items, so that one attempt reports all mistakes of a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import yaml
from dask.utils import parse_bytes

T = TypeVar("T")
Reader: TypeAlias = Callable[[yaml.Node], T]

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_BOOL, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"


class Problems(Exception):  # noqa: N818 # one exception for several problems
    """(line, reason) of each problem."""

    def __init__(self, found: Sequence[tuple[int, str]]) -> None:
        super().__init__(found)
        self.found = list(found)


@dataclass(frozen=True, slots=True)
class Field:
    """A key of a mapping: its reader, and its default if it is optional."""

    read: Reader[Any]
    default: Any = None
    is_needed: bool = False


def problem(node: yaml.Node, reason: str) -> Problems:
    """One problem, at the line of a node."""
    return Problems([(node.start_mark.line + 1, reason)])


def needed(read: Reader[Any]) -> Field:
    """A required key."""
    return Field(read, is_needed=True)


def number(least: float = 0.0, is_open: bool = False, most: float = math.inf) -> Reader[float]:
    """Read a number from `least` to `most`; with `is_open`, `least` itself is excluded."""

    def read(node: yaml.Node) -> float:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _NUMBERS:
            raise problem(node, f"a number is expected; found {shown(node)}")
        value = float(_plain(node))
        if not math.isfinite(value):
            raise problem(node, f"a finite number is expected; found {node.value}")
        if value < least or value > most or (is_open and value == least):
            bound = f"above {least:g}" if is_open else f"{least:g} or more"
            bound += f", and {most:g} at most" if most < math.inf else ""
            raise problem(node, f"must be {bound}; found {node.value}")
        return value

    return read


def count(least: int = 1) -> Reader[int]:
    """Read a whole number of at least `least`."""

    def read(node: yaml.Node) -> int:
        value = number(least)(node)
        if value != int(value):
            raise problem(node, f"a whole number is expected; found {shown(node)}")
        return int(value)

    return read


def size(node: yaml.Node) -> int:
    """Read bytes, or bytes per second: a number, or a text such as 3.4 GB or 380 MB/s."""
    if isinstance(node, yaml.ScalarNode):
        try:
            n_bytes = int(parse_bytes(node.value.removesuffix("/s")))
        except (ValueError, OverflowError):
            n_bytes = 0
        if n_bytes > 0:
            return n_bytes
    raise problem(node, f"a size above 0, such as 380 MB, is expected; found {shown(node)}")


def text(node: yaml.Node) -> str:
    """Read any scalar but null as text."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL:
        raise problem(node, f"a text is expected; found {shown(node)}")
    return str(node.value)


def flag(node: yaml.Node) -> bool:
    """Read true or false."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != _BOOL:
        raise problem(node, f"true or false is expected; found {shown(node)}")
    return bool(_plain(node))


def one_of(names: Sequence[str], what: str) -> Reader[str]:
    """Read one of `names`; `what` describes them in messages."""

    def read(node: yaml.Node) -> str:
        name = text(node)
        if name not in names:
            known = ", ".join(names) or "none"
            raise problem(node, f"{name!r} is no {what} of this file (there are: {known})")
        return name

    return read


def optional(read: Reader[T]) -> Reader[T | None]:
    """Read null as None, and anything else with `read`."""

    def read_or_none(node: yaml.Node) -> T | None:
        return None if node.tag == _NULL else read(node)

    return read_or_none


def listed(read: Reader[T]) -> Reader[tuple[T, ...]]:
    """Read a list of values."""

    def read_all(node: yaml.Node) -> tuple[T, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise problem(node, f"a list is expected; found {shown(node)}")
        return tuple(gathered([(item, read) for item in node.value]))

    return read_all


def mapped(read_key: Reader[Any], read: Reader[T]) -> Reader[dict[Any, T]]:
    """Read a mapping with keys of the user's choice."""

    def read_all(node: yaml.Node) -> dict[Any, T]:
        pairs = _pairs(node)
        keys = gathered([(key, read_key) for key, _ in pairs])
        return dict(zip(keys, gathered([(value, read) for _, value in pairs]), strict=True))

    return read_all


def record(fields: Mapping[str, Field], what: str) -> Reader[dict[str, Any]]:
    """Read a mapping with known keys; absent keys get their default."""

    def read(node: yaml.Node) -> dict[str, Any]:
        found: list[tuple[int, str]] = []
        values = {key: field.default for key, field in fields.items()}
        given = set()
        for key_node, value_node in _pairs(node):
            key = text(key_node)
            if key not in fields:
                known = ", ".join(fields)
                found += problem(key_node, f"unknown key {key!r} of {what} (known: {known})").found
                continue
            if key in given:
                found += problem(key_node, f"{key!r} is given twice").found
            given.add(key)
            try:
                values[key] = fields[key].read(value_node)
            except Problems as problems:
                found += [(line, f"{key}: {reason}") for line, reason in problems.found]
        for key, field in fields.items():
            if field.is_needed and key not in given:
                found += problem(node, f"{what} has no {key!r}").found
        if found:
            raise Problems(found)
        return values

    return read


def gathered(pairs: Sequence[tuple[yaml.Node, Reader[T]]]) -> list[T]:
    """Read each node with its reader; return all values, or raise all problems."""
    values: list[T] = []
    found: list[tuple[int, str]] = []
    for node, read in pairs:
        try:
            values.append(read(node))
        except Problems as problems:
            found += problems.found
    if found:
        raise Problems(found)
    return values


def shown(node: yaml.Node) -> str:
    """A node's content, for messages."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value) if node.value else "nothing"


def keys(node: yaml.Node) -> list[str]:
    """Keys of a mapping; none for any other node."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [str(key.value) for key, _ in pairs]


def _pairs(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise problem(node, f"keys and values are expected; found {shown(node)}")
    return list(node.value)


def _plain(node: yaml.ScalarNode) -> Any:
    """The Python value of a scalar."""
    return yaml.SafeLoader("").construct_object(node)
