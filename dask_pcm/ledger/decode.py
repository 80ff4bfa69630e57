"""Decoding JSON that other users may have written, or a lost node has torn: types are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

#: Arrow and Parquet count rows in signed 64 bits; JSON has integers of any size.
_MAX_COUNT = 1 << 63


def parse(data: bytes | str) -> Any:
    """Parse JSON.

    Raises
    ------
    ValueError
        If it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError:
        # Callers expect ValueError of any damaged text.
        raise ValueError("it is nested too deeply") from None


def is_count(value: Any) -> bool:
    """Whether a value is a number of rows, bytes or the like.

    >>> is_count(3), is_count(-1), is_count(True), is_count(3.0)
    (True, False, False, False)
    """
    # isinstance would let True pass.
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
    """Whether a value is a list of strings."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def known_fields(cls: type[Any], found: Any) -> dict[str, Any]:
    """Fields of a dataclass in a JSON object, as far as their values have the types of the fields.

    All others are left out: they are of another version of the package, or damaged.
    """
    if not isinstance(found, Mapping):
        return {}
    return {
        field.name: found[field.name]
        for field in fields(cls)
        if field.name in found and _is_like(found[field.name], field)
    }


def _is_like(value: Any, field: Any) -> bool:
    # With postponed annotations, the type of a field is its text.
    kind = str(field.type)
    if kind == "int":
        return is_count(value)
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind.startswith(("dict", "list")):
        return isinstance(value, dict if kind.startswith("dict") else list)
    return isinstance(value, str) or (value is None and "None" in kind)
