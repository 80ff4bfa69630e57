"""Records of a journal, and their encoding.

A record is 32 bytes (length of the head, length of the table, BLAKE2b digest of both), a head in
JSON, and a table as an Arrow IPC stream, which is empty for records without rows.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dask_pcm.ledger.decode import are_ranges, are_texts, is_count, parse

_LENGTHS = struct.Struct("<QQ16s")
#: Keys of heads whose values are a range of rows.
_RANGE_KEYS = ("rows", "begin", "wait", "call")


@dataclass(frozen=True, slots=True)
class Record:
    """A range of input rows that was computed, and its result.

    Attributes
    ----------
    start, stop
        The rows, counted over the whole input.
    table
        Their answers; with filters there are fewer.
    n_failed, errors
        Answers with an error, and some of the errors.
    facts
        Where and how the contexts ran: device, dtype.
    is_kept
        Whether an earlier attempt computed them.
    """

    start: int
    stop: int
    table: pa.Table
    n_failed: int = 0
    errors: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    is_kept: bool = False


def pack(head: Mapping[str, Any], table: pa.Table | None = None) -> list[bytes | memoryview]:
    """Encode a record as three blocks, to be written together."""
    return frame(json.dumps(head).encode(), _to_buffer(table) if table is not None else b"")


def frame(head: bytes, content: bytes | pa.Buffer) -> list[bytes | memoryview]:
    """Put the lengths and the digest in front of an encoded head and table."""
    view = memoryview(content)
    return [_LENGTHS.pack(len(head), len(view), _digest(head, view)), head, view]


def unpack(data: bytes) -> Iterator[tuple[dict[str, Any], memoryview, int]]:
    """Heads and encoded tables of the records, each with the offset at which the record ends.

    Stops at the first record that is torn or damaged.
    """
    view, at = memoryview(data), 0
    while at + _LENGTHS.size <= len(view):
        n_head, n_content, digest = _LENGTHS.unpack_from(view, at)
        at += _LENGTHS.size
        # A lost node leaves a tail that is cut, or holds zeros or stale blocks: pages that were
        # not synced reach the disk in any order. So length alone does not prove a record whole,
        # and nothing after a damaged one can be found again, as its length is not known either.
        if n_head + n_content > len(view) - at:
            return
        encoded, content = view[at : at + n_head], view[at + n_head : at + n_head + n_content]
        if _digest(encoded, content) != digest:
            return
        head = _parse_head(bytes(encoded))
        if head is None:
            return
        at += n_head + n_content
        yield head, content, at


def _parse_head(text: bytes) -> dict[str, Any] | None:
    """A head of which all known keys have the right types; None for any other."""
    try:
        head = parse(text)
    except ValueError:
        return None
    if not isinstance(head, dict):
        return None
    costs, errors, facts = head.get("costs", []), head.get("errors", []), head.get("facts", {})
    is_sound = (
        all(are_ranges([head[key]]) for key in _RANGE_KEYS if key in head)
        and isinstance(costs, list)
        # Older journals have no count of processes that took too long.
        and all(isinstance(cost, list) and len(cost) in (3, 4) for cost in costs)
        and are_ranges([cost[:2] for cost in costs])
        and all(is_count(count) for cost in costs for count in cost[2:])
        and are_texts(head.get("settled", []))
        and is_count(head.get("failed", 0))
        and is_count(head.get("drafts", 0))
        and are_texts(errors)
        and isinstance(facts, dict)
        and are_texts(list(facts.values()))
    )
    return head if is_sound else None


def _to_buffer(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _digest(*blocks: bytes | memoryview) -> bytes:
    blake = hashlib.blake2b(digest_size=16)
    for block in blocks:
        blake.update(block)
    return blake.digest()
