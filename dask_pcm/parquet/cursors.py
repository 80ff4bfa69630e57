"""Parquet files are decoded as a forward stream, a few megabytes at a time.

A row group may hold ten million rows, or rows of a megabyte each; neither fits in a worker's
memory. So nothing reads whole row groups. A cursor moves forward through a file and stops where a
span ends. The next span that starts there or later continues it, so each worker decodes a file
once, not once per span.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dask_pcm.errors import InputError, shown_cause
from dask_pcm.parquet.arrow_types import has_categories_within
from dask_pcm.parquet.footers import counted_index, file_info
from dask_pcm.paths import version_of

#: Bytes to decode at a time, and to read ahead per column.
BATCH_BYTES = 2 << 20
_BUFFER_BYTES = 1 << 20
#: Rows to decode at a time. A dictionary-encoded text is stored once for all rows but takes memory
#: in each of them once decoded, so the footer can underestimate a row by orders of magnitude.
_MAX_BATCH_ROWS, _MAX_PROBE_ROWS = 256, 16
#: Idle cursors that a process keeps.
_MAX_IDLE = 4
#: Files whose row groups are remembered.
_MAX_KNOWN = 1024


class Cursor:
    """A position in an open file that only moves forward.

    Not thread-safe: ``_Idle`` gives a cursor to one thread at a time.
    """

    def __init__(
        self,
        path: str,
        version: str,
        columns: tuple[str, ...],
        batch_rows: int,
        options: Mapping[str, Any],
    ) -> None:
        self.key = (path, version, columns)
        self.batch_rows = batch_rows
        #: The next row to read; -1 before `begin`.
        self.at = -1
        self._rest: pa.RecordBatch | None = None
        # Keep the filesystem: an archive is closed when its filesystem is collected.
        self._fs, self._source = _open(path, options)
        # With pre_buffer, or without buffer_size, Arrow reads whole row groups into memory.
        self._file = pq.ParquetFile(self._source, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        schema = self._file.schema_arrow
        counted = counted_index(schema)
        self._columns = list(columns)
        self._stored = [name for name in columns if name in schema.names]
        #: The index that the file does not store, if it was requested.
        self._counted = counted if len(self._stored) < len(columns) else None

    def starts(self) -> tuple[int, ...]:
        """The first row of each row group, and the total number of rows."""
        metadata = self._file.metadata
        counts = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return tuple(itertools.accumulate(counts, initial=0))

    def begin(self, group: int, at: int) -> None:
        """Move to row `at`, the first row of row group `group`."""
        groups = range(group, self._file.metadata.num_row_groups)
        self.at = at
        # Arrow cannot merge nested categories of several row groups: read each group separately.
        kinds = (self._file.schema_arrow.field(name).type for name in self._stored)
        is_apart = any(has_categories_within(kind) for kind in kinds)
        self._batches = itertools.chain.from_iterable(
            self._file.iter_batches(
                self.batch_rows, row_groups=together, columns=self._stored, use_threads=False
            )
            for together in ([[each] for each in groups] if is_apart else [list(groups)])
        )

    def read(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Yield rows ``start:stop`` and stop there; `start` must not be before the cursor."""
        while self.at < stop:
            batch = self._rest if self._rest is not None else next(self._batches)
            first, self._rest = self.at, None
            self.at += len(batch)
            if self.at > stop:
                # Keep the rest of the batch: the next span continues in the middle of it.
                self._rest = batch.slice(stop - first)
                batch, self.at = batch.slice(0, stop - first), stop
            if self.at > start:
                n_before = max(0, start - first)
                yield self._wanted(pa.Table.from_batches([batch.slice(n_before)]), first + n_before)

    def _wanted(self, table: pa.Table, first: int) -> pa.Table:
        """Select the requested columns; Arrow also reads others for a name with a dot."""
        if self._counted is not None:
            column = self._counted.column(first, len(table))
            table = table.append_column(self._counted.name, column)
        return table.select(self._columns)

    def nothing(self) -> pa.Table:
        """A table with these columns and no rows."""
        return self._wanted(self._file.schema_arrow.empty_table(), 0)

    def close(self) -> None:
        """Close the file; the cursor cannot be used afterwards."""
        self._file.close()
        self._source.close()


class _Idle:
    """Idle cursors that another span may continue, least recently used dropped first.

    Thread-safe: a cursor that is taken is removed, so no two threads move it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cursors: list[Cursor] = []
        self._starts: dict[tuple[str, str], tuple[int, ...]] = {}

    def starts(self, path: str, version: str) -> tuple[int, ...] | None:
        """The first rows of a file's row groups; None if it has not been read yet."""
        return self._starts.get((path, version))

    def note_starts(self, path: str, version: str, starts: tuple[int, ...]) -> None:
        """Remember the first rows of a file's row groups; forget the oldest of too many files."""
        with self._lock:
            self._starts[path, version] = starts
            if len(self._starts) > _MAX_KNOWN:
                del self._starts[next(iter(self._starts))]

    def take(self, key: Any, earliest: int, start: int, batch_rows: int) -> Cursor | None:
        """Take the cursor of a file nearest before row `start`, but not before `earliest`.

        A cursor whose batch size differs from `batch_rows` by more than a factor of about 2 to 4
        is not used: its size was chosen before the real size of rows was known. It is dropped in
        time.
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
        """Add an idle cursor; close the least recently used one of too many."""
        with self._lock:
            self._cursors.append(cursor)
            dropped = self._cursors[:-_MAX_IDLE]
            del self._cursors[:-_MAX_IDLE]
        # Outside the lock: closing a remote file may take long.
        for old in dropped:
            old.close()

    def clear(self) -> None:
        """Close all cursors and forget all files."""
        with self._lock:
            dropped, self._cursors = self._cursors, []
            self._starts.clear()
        for old in dropped:
            old.close()


idle = _Idle()
#: Ratio of decoded bytes to the footer's estimate, by file, as last seen in this process.
_inflation: dict[str, float] = {}
_LAST = ""  # the key of the file read last


def inflation(path: str) -> float | None:
    """Ratio of a file's decoded size in memory to the estimate from its footer, at least 1.

    For a file that has not been read yet, that of the file read last; None if there is none.
    """
    return _inflation.get(path, _inflation.get(_LAST))


def note_inflation(path: str, n_bytes: int, expected: float) -> None:
    """Record the decoded and the estimated size of some rows of a file, both in bytes."""
    if len(_inflation) > _MAX_KNOWN:
        _inflation.clear()
    _inflation[path] = _inflation[_LAST] = max(1.0, n_bytes / max(1.0, expected))


def read_rows(
    path: str,
    version: str,
    columns: tuple[str, ...],
    start: int,
    stop: int,
    row_bytes: float,
    options: Mapping[str, Any] | None = None,
) -> Iterator[pa.Table]:
    """Yield rows ``start:stop`` of a file in tables of about ``BATCH_BYTES``; at least one table.

    May be called from any thread. A generator that is closed early closes its cursor.

    Parameters
    ----------
    version
        The file's version (see ``paths.version_of``) when it was listed.
    row_bytes
        Bytes per row in these columns, estimated from the footer.
    options
        Options of the filesystem.

    Raises
    ------
    InputError
        If the file has changed since it was listed, is gone or cannot be read.
    """
    with _named(path):
        options = options or {}
        _check_version(path, version, options)
        starts, cursor = idle.starts(path, version), None
        batch_rows = _batch_rows(path, row_bytes)
        if starts is None:
            cursor = Cursor(path, version, columns, batch_rows, options)
            starts = cursor.starts()
            idle.note_starts(path, version, starts)
        group = bisect.bisect_right(starts, start) - 1
        if start >= stop or group < 0:
            cursor = cursor or Cursor(path, version, columns, batch_rows, options)
            yield cursor.nothing()
            cursor.close()
            return
        if cursor is None:
            cursor = idle.take((path, version, columns), starts[group], start, batch_rows)
        if cursor is None:
            cursor = Cursor(path, version, columns, batch_rows, options)
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
    """Rows to decode at a time: few, until the real size of this file's rows is known."""
    known = _inflation.get(path)
    most = _MAX_PROBE_ROWS if known is None else _MAX_BATCH_ROWS
    return max(1, min(most, int(BATCH_BYTES / max(1.0, row_bytes * (known or 1.0)))))


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn errors of Arrow and the filesystem into InputErrors that name the file."""
    try:
        yield
    except (OSError, pa.ArrowException, StopIteration, RuntimeError) as error:
        raise InputError(f"Cannot read {path!r}: {error}") from shown_cause(error)


def _open(path: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Open a file; return its filesystem and a binary stream."""
    fs, name = fsspec.core.url_to_fs(path, **options)
    is_local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    return fs, pa.OSFile(name, "rb") if is_local else fs.open(name, "rb")


def _check_version(path: str, version: str, options: Mapping[str, Any]) -> None:
    """Raise InputError if a file has changed since it was listed."""
    fs, name = fsspec.core.url_to_fs(path, **options)
    # A cached listing would report the old version.
    fs.invalidate_cache(fs._parent(name))
    if version_of(file_info(fs, name)) != version:
        raise InputError(
            f"{path!r} has changed since it was listed. Call pcm.read_parquet again. An output that"
            " already contains rows of it can only be resumed with the original file, or restarted"
            " (overwrite=True, --overwrite)."
        )
