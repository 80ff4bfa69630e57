"""Rows of a Parquet file as a stream: forward, a few megabytes at a time.

A row group may have ten million rows, or rows of a megabyte; neither fits in a worker's memory. So
nothing is read by row groups. A cursor goes forward through a file and stops wherever a span ends;
the next span that begins there or further on takes it up, so that a file that is read in many spans
is decoded once by each worker, not once for each span.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dask_pcm.errors import InputError, shown_cause
from dask_pcm.parquet.arrow_types import has_categories_within
from dask_pcm.parquet.footers import counted_index, file_info
from dask_pcm.paths import version_of

#: What is decoded at a time, and what is read ahead of each column.
BATCH_BYTES = 2 << 20
_BUFFER_BYTES = 1 << 20
#: A text that is stored once for all rows takes its room in each of them once it is decoded.
_MAX_BATCH_ROWS, _MAX_PROBE_ROWS = 256, 16
#: Cursors that wait in a process to be taken up again.
_MAX_IDLE = 4
#: Files whose row groups are remembered.
_MAX_KNOWN = 1024


class Cursor:
    """A place in a file; yields rows from there on."""

    def __init__(self, path: str, version: str, columns: tuple[str, ...], batch_rows: int) -> None:
        self.key = (path, version, columns)
        self.batch_rows = batch_rows
        #: The row that comes next; before `begin`, none.
        self.at = -1
        self._rest: pa.RecordBatch | None = None
        self._fs, self._source = _open(path)  # an archive is closed with its filesystem
        # Without a buffer, or with one for all columns, a whole row group would be in memory.
        self._file = pq.ParquetFile(self._source, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        schema = self._file.schema_arrow
        counted = counted_index(schema)
        self._columns = list(columns)
        self._stored = [name for name in columns if name in schema.names]
        #: The index that the file does not store, if it is wanted.
        self._counted = counted if len(self._stored) < len(columns) else None

    def starts(self) -> tuple[int, ...]:
        """First rows of the row groups, and the number of rows in all."""
        metadata = self._file.metadata
        counts = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return tuple(itertools.accumulate(counts, initial=0))

    def begin(self, group: int, at: int) -> None:
        """Go to row `at`, with which row group `group` begins."""
        groups = range(group, self._file.metadata.num_row_groups)
        self.at = at
        # Arrow does not put categories within lists and structs together from several row groups.
        kinds = (self._file.schema_arrow.field(name).type for name in self._stored)
        is_apart = any(has_categories_within(kind) for kind in kinds)
        self._batches = itertools.chain.from_iterable(
            self._file.iter_batches(
                self.batch_rows, row_groups=together, columns=self._stored, use_threads=False
            )
            for together in ([[each] for each in groups] if is_apart else [list(groups)])
        )

    def read(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows `start` to `stop`, which must not lie before the cursor."""
        while self.at < stop:
            batch = self._rest if self._rest is not None else next(self._batches)
            first, self._rest = self.at, None
            self.at += len(batch)
            if self.at > stop:
                self._rest = batch.slice(stop - first)
                batch, self.at = batch.slice(0, stop - first), stop
            if self.at > start:
                n_before = max(0, start - first)
                yield self._wanted(pa.Table.from_batches([batch.slice(n_before)]), first + n_before)

    def _wanted(self, table: pa.Table, first: int) -> pa.Table:
        """The columns asked for; a name with a dot may have brought others along."""
        if self._counted is not None:
            column = self._counted.column(first, len(table))
            table = table.append_column(self._counted.name, column)
        return table.select(self._columns)

    def nothing(self) -> pa.Table:
        """No rows of these columns."""
        return self._wanted(self._file.schema_arrow.empty_table(), 0)

    def close(self) -> None:
        self._file.close()
        self._source.close()


class _Idle:
    """Cursors that may be taken up again; those used last stay longest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cursors: list[Cursor] = []
        self._starts: dict[tuple[str, str], tuple[int, ...]] = {}

    def starts(self, path: str, version: str) -> tuple[int, ...] | None:
        """First rows of a file's row groups, if it has been read before."""
        return self._starts.get((path, version))

    def note_starts(self, path: str, version: str, starts: tuple[int, ...]) -> None:
        with self._lock:
            self._starts[path, version] = starts
            if len(self._starts) > _MAX_KNOWN:
                del self._starts[next(iter(self._starts))]

    def take(self, key: Any, earliest: int, start: int, batch_rows: int) -> Cursor | None:
        """The cursor of a file that stands nearest before row `start`, not before `earliest`.

        One that decodes many more or fewer than `batch_rows` at a time is left to be forgotten.
        """
        with self._lock:
            found = [c for c in self._cursors if c.key == key and earliest <= c.at <= start]
            found = [c for c in found if batch_rows <= 4 * c.batch_rows <= 8 * batch_rows]
            if not found:
                return None
            nearest = max(found, key=lambda cursor: cursor.at)
            self._cursors.remove(nearest)
            return nearest

    def put(self, cursor: Cursor) -> None:
        with self._lock:
            self._cursors.append(cursor)
            dropped = self._cursors[:-_MAX_IDLE]
            del self._cursors[:-_MAX_IDLE]
        for old in dropped:
            old.close()

    def clear(self) -> None:
        with self._lock:
            dropped, self._cursors = self._cursors, []
            self._starts.clear()
        for old in dropped:
            old.close()


idle = _Idle()
#: Bytes of decoded rows over what was expected of them, by file, as last seen in this process.
_inflation: dict[str, float] = {}
_LAST = ""  # the key of whatever file was read last


def inflation(path: str) -> float | None:
    """How much more the rows of a file take in memory than was estimated from its footer.

    Of a file that has not been read yet, that of the file read last; None where none has been.
    """
    return _inflation.get(path, _inflation.get(_LAST))


def note_inflation(path: str, n_bytes: int, expected: float) -> None:
    if len(_inflation) > _MAX_KNOWN:
        _inflation.clear()
    _inflation[path] = _inflation[_LAST] = max(1.0, n_bytes / max(1.0, expected))


def read_rows(
    path: str, version: str, columns: tuple[str, ...], start: int, stop: int, row_bytes: float
) -> Iterator[pa.Table]:
    """Rows `start` to `stop` of a file, in tables of about ``BATCH_BYTES``; at least one table.

    Parameters
    ----------
    version
        When the file was written, as it was listed.
    row_bytes
        Bytes of a row in these columns, as the footer has it.

    Raises
    ------
    InputError
        Where the file has changed since it was listed, is gone or cannot be read.
    """
    with _named(path):
        _check_version(path, version)
        starts, cursor = idle.starts(path, version), None
        batch_rows = _batch_rows(path, row_bytes)
        if starts is None:
            cursor = Cursor(path, version, columns, batch_rows)
            starts = cursor.starts()
            idle.note_starts(path, version, starts)
        group = bisect.bisect_right(starts, start) - 1
        if start >= stop or group < 0:
            cursor = cursor or Cursor(path, version, columns, batch_rows)
            yield cursor.nothing()
            cursor.close()
            return
        if cursor is None:
            cursor = idle.take((path, version, columns), starts[group], start, batch_rows)
        if cursor is None:
            cursor = Cursor(path, version, columns, batch_rows)
        if cursor.at < starts[group]:
            cursor.begin(group, starts[group])
        try:
            yield from cursor.read(start, stop)
        except BaseException:
            cursor.close()
            raise
    if cursor.at < starts[-1]:
        idle.put(cursor)
    else:
        cursor.close()


def _batch_rows(path: str, row_bytes: float) -> int:
    """Rows to decode at a time: few, until it is known what rows of this file really take."""
    known = _inflation.get(path)
    most = _MAX_PROBE_ROWS if known is None else _MAX_BATCH_ROWS
    return max(1, min(most, int(BATCH_BYTES / max(1.0, row_bytes * (known or 1.0)))))


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, StopIteration, RuntimeError) as error:
        raise InputError(f"Cannot read {path!r}: {error}") from shown_cause(error)


def _open(path: str) -> tuple[Any, Any]:
    fs, name = fsspec.core.url_to_fs(path)
    is_local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    return fs, pa.OSFile(name, "rb") if is_local else fs.open(name, "rb")


def _check_version(path: str, version: str) -> None:
    fs, name = fsspec.core.url_to_fs(path)
    fs.invalidate_cache(fs._parent(name))
    if version_of(file_info(fs, name)) != version:
        raise InputError(
            f"{path!r} has changed since it was listed. Call pcm.read_parquet again; an output that"
            " has rows of it already can go on only with the file as it was, or be begun anew"
            " (overwrite=True, --overwrite)."
        )
