"""JSON that others may have written, or a lost node has torn: parsed and checked by its types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_MAX_COUNT = 1 << 63


def parse(data: bytes | str) -> Any:
    """Parse JSON.

    Raises
    ------
    ValueError
        Where it is none, or nested beyond measure.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_count(value: Any) -> bool:
    """Whether a value is a number of rows, bytes or the like.

    >>> is_count(3), is_count(-1), is_count(True), is_count(3.0)
    (True, False, False, False)
    """
    return type(value) is int and 0 <= value < _MAX_COUNT


def are_ranges(value: Any) -> bool:
    """Whether a value is a list of ranges of rows.

    >>> are_ranges([[0, 5], [7, 9]]), are_ranges([[5, 0]]), are_ranges([5])
    (True, False, False)
    """
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(map(is_count, pair))
        and pair[0] <= pair[1]
        for pair in value
    )


def are_texts(values: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def known_fields(cls: type[Any], found: Any) -> dict[str, Any]:
    """What a JSON object tells of a dataclass: fields that it has, with values like their defaults.

    Others are left out: another version has written it, or it is damaged.
    """
    if not isinstance(found, Mapping):
        return {}
    return {
        field.name: found[field.name]
        for field in fields(cls)
        if field.name in found and _is_like(found[field.name], field)
    }


def _is_like(value: Any, field: Any) -> bool:
    kind = str(field.type)
    if kind == "int":
        return is_count(value)
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind.startswith(("dict", "list")):
        return isinstance(value, dict if kind.startswith("dict") else list)
    return isinstance(value, str) or (value is None and "None" in kind)
