"""A piece is a file and a row range, fixed before Dask's optimiser sees the frame.

Each partition of a frame made by ``read_parquet`` is a piece. The optimiser may drop columns and
renumber partitions, but it cannot regroup files. So a piece holds the same rows in every run, and
the ledger can record progress by piece.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import dask
import dask.dataframe as dd
from dask.utils import parse_bytes

from dask_pcm.arguments import checked
from dask_pcm.config import Config
from dask_pcm.errors import InputError
from dask_pcm.parquet.filters import (
    Filters,
    alternatives,
    filter_columns,
    fitted,
    matching,
    matching_groups,
)
from dask_pcm.parquet.footers import File, RowGroup, column_names, describe_files
from dask_pcm.parquet.listing import AnyPath, find_files, path_texts
from dask_pcm.parquet.reader import PieceReader, Span

ROWS_PER_PIECE = 10_000


@checked
def read_parquet(
    path: AnyPath | Iterable[AnyPath],
    columns: str | Iterable[str] | None = None,
    *,
    rows_per_piece: int = ROWS_PER_PIECE,
    bytes_per_piece: int | str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filters: Filters | None = None,
) -> dd.DataFrame:
    """Read Parquet files as an ordinary Dask DataFrame whose partitions are pieces.

    Parameters
    ----------
    path : str, path-like or iterable of these
        A file of any name, a folder, or a glob pattern with ``*``, ``?``, ``[0-9]``, ``**`` (any
        depth) or ``{a,b}``; a path or an fsspec URL; one or several. Folders are searched
        recursively and through symbolic links, and each file is read once. In folders, names that
        begin with ``_`` or ``.`` are skipped, and so are files that have neither a Parquet suffix
        (``.parquet``, ``.parq``, ``.pq``) nor the Parquet magic bytes. In object stores, only
        files without a suffix are opened to look for these bytes.
    columns : str or iterable of str, optional
        Columns to read. All by default. Only these need to agree between files.
    rows_per_piece : int, default 10,000
        Maximum number of rows in a piece. Consecutive row groups of a file are merged up to it,
        and larger row groups are split. A piece never spans files.
    bytes_per_piece : int or str, optional
        Maximum size of a piece, in bytes or as text ("64 MiB"): its columns before compression, as
        estimated from the file's footer. ``pcm.run.unit-bytes`` by default.
    storage_options : dict, optional
        Options of the fsspec filesystem of `path`, such as credentials or an endpoint. Workers get
        them with their tasks; they are in no manifest, report or log, and do not tell jobs apart.
    filters : list of tuple, or list of list of tuple, optional
        Conditions ``(column, operator, value)`` with the operators ``==``, ``!=``, ``<``, ``<=``,
        ``>``, ``>=``, ``in`` and ``not in``, as pandas and Dask take them: rows for which all of a
        list hold, for one of several lists. Row groups that cannot hold such rows, by their
        statistics, are not read. A condition on a null or NaN does not hold. Values are converted
        to the type of their column.

    Returns
    -------
    dask.dataframe.DataFrame
        Indexed by row number within the whole input, with known divisions; or by the pandas index
        of the files, if all of them store the same index with one level. Integers and booleans with
        nulls get pandas' nullable dtypes. A column whose type differs between files gets a type
        that holds the values of all (``docs/types.md``).

    Raises
    ------
    InputError
        If the input does not exist, some of it cannot be read (a dangling link, a truncated file,
        a file that is not Parquet), or no type holds the values of a column in all files.
    SchemaError
        If a requested column does not exist or a name is repeated, or `filters` do not fit.
    """
    paths = path_texts(path)
    is_whole = isinstance(rows_per_piece, int) and not isinstance(rows_per_piece, bool)
    if not is_whole or rows_per_piece < 1:
        raise InputError(
            f"rows_per_piece must be a whole number, at least 1; found {rows_per_piece!r:.80}."
        )
    limit = _limit_bytes(bytes_per_piece)
    if storage_options is not None and not isinstance(storage_options, Mapping):
        raise InputError(f"storage_options must be a dict; found {type(storage_options).__name__}.")
    names = None if columns is None else column_names(columns, "columns")
    wanted, read, kept = names, names, None
    if filters is not None:
        conditions = alternatives(filters)
        kept = functools.partial(matching_groups, filters=conditions)
        if names is not None:  # conditions may be on other columns
            read = list(dict.fromkeys([*names, *filter_columns(conditions)]))
    roots, urls = find_files(paths, storage_options)
    files = describe_files(urls, read, storage_options, kept)
    reader = PieceReader(roots, files, read, storage_options)
    spans = list(_pieces(files, rows_per_piece, limit)) or [
        Span(0, files[0].path, files[0].modified, 0, 0, 0)
    ]
    divisions = None
    if not reader.has_own_index and spans[-1].stop:
        divisions = (*(span.offset for span in spans), spans[-1].offset + spans[-1].n_rows - 1)
    # Dask would convert every object column to text, including lists, bytes and decimals.
    with dask.config.set({"dataframe.convert-string": False}):
        frame = dd.from_map(
            reader, spans, meta=reader.meta(), divisions=divisions, label="read-pieces"
        )
        if filters is not None:
            frame = matching(frame, fitted(conditions, reader.schema))
        return frame if wanted == read else frame[wanted]


def _limit_bytes(given: int | str | None) -> int:
    """The size of a piece, in bytes."""
    if given is None:
        return Config.read().unit_bytes
    try:
        limit = 0 if isinstance(given, bool) else int(parse_bytes(given))
    except (ValueError, TypeError, AttributeError):
        limit = 0
    if limit < 1:
        raise InputError(
            "bytes_per_piece must be a size of at least 1 byte, such as '64 MiB'; found"
            f" {given!r:.80}."
        )
    return limit


def _pieces(files: Sequence[File], max_rows: int, max_bytes: int) -> Iterator[Span]:
    """Cut every file into pieces, numbered in order."""
    piece = offset = 0
    for file in files:
        for number, groups in _runs_of_groups(file):
            first = sum(group.n_rows for group in file.row_groups[:number])
            start = first
            for stop, n_bytes in cuts(groups, max_rows, max_bytes):
                stop += first
                yield Span(piece, file.path, file.modified, start, stop, offset + start, n_bytes)
                piece, start = piece + 1, stop
        offset += file.n_rows


def _runs_of_groups(file: File) -> Iterator[tuple[int, list[RowGroup]]]:
    """Successive row groups that are read, with the number of the first."""
    numbers = range(len(file.row_groups)) if file.kept is None else sorted(file.kept)
    # Of successive numbers, each less its place is the same.
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], [file.row_groups[number] for number in found]


def cuts(groups: Sequence[RowGroup], max_rows: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut the row groups of a file into pieces; yield each piece's end row and size in bytes.

    >>> list(cuts([RowGroup(10, 40), RowGroup(5, 20), RowGroup(30, 900)], 20, 400))
    [(15, 60), (25, 300), (35, 300), (45, 300)]
    """
    start = end = n_bytes = 0
    for group in groups:
        n_parts = max(-(-group.n_rows // max_rows), -(-group.n_bytes // max_bytes), 1)
        is_full = end - start + group.n_rows > max_rows or n_bytes + group.n_bytes > max_bytes
        if end > start and is_full:
            yield end, n_bytes
            start, n_bytes = end, 0
        if n_parts > 1:
            # Parts of nearly equal size, so that no row group ends in a tiny piece.
            edges = [end + group.n_rows * part // n_parts for part in range(1, n_parts + 1)]
            for stop in dict.fromkeys(edge for edge in edges if edge > end):
                yield stop, round(group.n_bytes * (stop - start) / group.n_rows)
                start = stop
            end = start
        else:
            end, n_bytes = end + group.n_rows, n_bytes + group.n_bytes
    if end > start:
        yield end, n_bytes
