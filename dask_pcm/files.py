"""Parquet files as their footers describe them: found, fingerprinted, held against each other."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import PurePath
from typing import Any, NamedTuple

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.utils import natural_sort_key

from dask_pcm.errors import InputError, SchemaError, redacted

SUFFIXES = (".parquet", ".parq", ".pq")
_MAGIC = b"PAR1"
_TAIL_BYTES = 64 * 1024
_N_READERS = 16
#: Pandas types that can hold a null where numpy's cannot.
NULLABLE = {
    **{getattr(pa, f"int{n}")(): getattr(pd, f"Int{n}Dtype")() for n in (8, 16, 32, 64)},
    **{getattr(pa, f"uint{n}")(): getattr(pd, f"UInt{n}Dtype")() for n in (8, 16, 32, 64)},
    pa.bool_(): pd.BooleanDtype(),
}


class _Redacts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


#: fsspec logs the URLs that it asks for, passwords and signatures included.
for _name in ("fsspec", "fsspec.http"):
    logging.getLogger(_name).addFilter(_Redacts())


def path_text(path: str | os.PathLike[str]) -> str:
    """A path or URL as text.

    Raises
    ------
    InputError
        Where it was a URL before pathlib took one of its slashes.
    """
    text = os.fspath(path)
    if isinstance(path, PurePath) and re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text):
        url = text.replace(":/", "://", 1)
        raise InputError(
            f"{path!r} would be a local folder: pathlib takes a URL for a path. Give {url!r}, as"
            " text."
        )
    return text


def redacted_repr(value: Any) -> str:
    """What ``repr`` shows of a dataclass, without the secrets of URLs in it."""
    shown = (field.name for field in fields(value) if field.repr)
    texts = (f"{name}={redacted(repr(getattr(value, name)))}" for name in shown)
    return f"{type(value).__name__}({', '.join(texts)})"


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Input files by paths, as a manifest names them: without what may be a secret.

    A new signature is no other file. Where URLs differ in nothing else, they are numbered.

    >>> names_of(["https://host/a?sig=1", "https://host/get?id=1", "https://host/get?id=2"])
    {'https://host/a?sig=1': 'https://host/a', 'https://host/get?id=1': 'https://host/get', \
'https://host/get?id=2': 'https://host/get (2)'}
    """
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for path in paths:
        name = redacted(path)
        counts[name] += 1
        names[path] = name if counts[name] == 1 else f"{name} ({counts[name]})"
    return names


class RowGroup(NamedTuple):
    """Rows, and the bytes of the wanted columns before compression."""

    n_rows: int
    n_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class File:
    """An input file as its footer describes it; the fingerprint tells whether it changed."""

    path: str
    size_bytes: int
    modified: str
    footer: str
    n_rows: int
    row_groups: tuple[RowGroup, ...]
    schema: pa.Schema
    nullable: frozenset[str]

    __repr__ = redacted_repr

    @property
    def fingerprint(self) -> dict[str, str | int]:
        return {"size": self.size_bytes, "modified": self.modified, "footer": self.footer}


def list_files(path: str, columns: Sequence[str] | None = None) -> list[File]:
    """Find the Parquet files of an input and read their footers, in natural order of names.

    Bytes are counted of `columns`; of all if left out.
    """
    try:
        fs, root = fsspec.core.url_to_fs(path)
        fs.invalidate_cache()  # files may have come or changed since it was listed last
        found = _found(fs, root)
    except Exception as error:  # each store has its own
        raise InputError(f"Cannot open the input {path!r}: {error}") from error
    if found is None:
        raise InputError(f"There is no input at {path!r}.")
    paths = [name for name in found if len(found) == 1 or _is_data(name, root)]
    if not paths or (fs.isdir(root) and not _is_data(paths[0], root)):
        others = f"; it holds {len(found)} other files, such as {found[0]!r}" if found else ""
        raise InputError(f"There are no Parquet files ({', '.join(SUFFIXES)}) in {path!r}{others}.")
    if partitioned := [name for name in paths if "=" in name[len(root) :].rpartition("/")[0]]:
        raise InputError(
            f"{path!r} is partitioned by folder names ({partitioned[0]!r}), whose columns"
            " pcm.read_parquet does not read. Read it with dask.dataframe.read_parquet."
        )
    paths.sort(key=natural_sort_key)
    with ThreadPoolExecutor(_N_READERS) as pool:
        return list(pool.map(lambda name: _describe(fs.unstrip_protocol(name), columns), paths))


def _found(fs: Any, root: str) -> list[str] | None:
    if "*" in root:
        return list(fs.glob(root))
    if fs.isdir(root):
        return list(fs.find(root))
    return [root] if fs.exists(root) else None


def _is_data(name: str, root: str) -> bool:
    below = name[len(root.partition("*")[0]) :] if name != root else name.rpartition("/")[2]
    is_hidden = any(part.startswith(("_", ".")) for part in below.split("/"))
    return name.endswith(SUFFIXES) and not is_hidden


def _describe(url: str, columns: Sequence[str] | None) -> File:
    try:
        fs, path = fsspec.core.url_to_fs(url)
        info = fs.info(path)
        with fs.open(path, "rb") as file:
            footer = _footer(file, info["size"], url)
            file.seek(0)
            metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowInvalid, EOFError) as error:
        raise InputError(f"Cannot read {url!r} as Parquet: {error}") from error
    return File(
        path=url,
        size_bytes=info["size"],
        modified=version_of(info),
        footer=hashlib.sha256(footer).hexdigest()[:32],
        n_rows=metadata.num_rows,
        row_groups=tuple(_row_groups(metadata, schema, columns)),
        schema=schema,
        nullable=_with_nulls(schema, metadata),
    )


def _row_groups(
    metadata: pq.FileMetaData, schema: pa.Schema, columns: Sequence[str] | None
) -> Iterator[RowGroup]:
    leaves = [field.name for field in schema for _ in range(_n_leaves(field.type))]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        n_bytes = group.total_byte_size
        if columns is not None and len(leaves) == metadata.num_columns:
            wanted = (i for i, name in enumerate(leaves) if name in columns)
            n_bytes = sum(group.column(i).total_uncompressed_size for i in wanted)
        yield RowGroup(group.num_rows, n_bytes)


def _n_leaves(kind: pa.DataType) -> int:
    """Columns that a type takes in a Parquet file."""
    if pa.types.is_dictionary(kind):
        return _n_leaves(kind.value_type)
    return sum(_n_leaves(kind.field(i).type) for i in range(kind.num_fields)) or 1


def _footer(file: Any, size: int, url: str) -> bytes:
    """The raw footer: it names every column chunk's sizes, offsets and statistics."""
    if size < 12:
        raise InputError(f"{url!r} is not a Parquet file: it has {size} bytes.")
    head = file.read(4)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read()
    if head != _MAGIC:
        raise InputError(f"{url!r} is not a Parquet file: it begins with {head!r}, not {_MAGIC!r}.")
    if tail[-4:] != _MAGIC:
        raise InputError(
            f"{url!r} is torn: it begins as a Parquet file but its end is missing. Whoever wrote"
            " it was interrupted; write it again."
        )
    n_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if n_bytes > len(tail):
        file.seek(max(0, size - n_bytes))
        tail = file.read()
    return bytes(tail[-n_bytes:])


def _with_nulls(schema: pa.Schema, metadata: pq.FileMetaData) -> frozenset[str]:
    """Integer and boolean columns in which a null stands, or may stand for all we know."""
    names = {field.name for field in schema if field.type in NULLABLE}
    found = set()
    for group in range(metadata.num_row_groups):
        if not metadata.row_group(group).num_rows:
            continue
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            statistics = column.statistics
            is_known = statistics is not None and statistics.has_null_count
            if column.path_in_schema in names and (not is_known or statistics.null_count):
                found.add(column.path_in_schema)
    return frozenset(found)


def check_columns(file: File, columns: Sequence[str] | None) -> list[str]:
    names = file.schema.names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SchemaError(f"Columns of {file.path!r} stand more than once: {', '.join(repeated)}.")
    if columns is None:
        return [name for name in names if name not in index_columns(file.schema)]
    if missing := [name for name in columns if name not in names]:
        raise SchemaError(
            f"{file.path!r} has no column {', '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, names))}."
        )
    return list(columns)


def one_schema(files: Sequence[File]) -> pa.Schema:
    """The schema of all files, in the order of the first.

    A column that has no type in one file (it is empty, or all null, and pandas wrote it) has that
    of the others.

    Raises
    ------
    InputError
        Where the types of a column differ.
    """
    found = {field.name: field for field in files[0].schema}
    source = dict.fromkeys(found, files[0].path)
    for file in files[1:]:
        if file.schema.equals(files[0].schema):
            continue
        other = {field.name: field for field in file.schema}
        for name in sorted(found.keys() | other.keys()):
            mine, theirs = found.get(name), other.get(name)
            if mine is not None and theirs is not None and _is_typed(mine, theirs):
                found[name], source[name] = theirs, file.path
            elif mine is None or theirs is None or not _is_alike(mine, theirs):
                raise InputError(
                    f"The schema of {file.path!r} differs from that of"
                    f" {source.get(name, files[0].path)!r}: column {name!r} is"
                    f" {'missing' if theirs is None else theirs.type} here and"
                    f" {'missing' if mine is None else mine.type} there."
                )
    return pa.schema(list(found.values()), files[0].schema.metadata)


def _is_typed(mine: pa.Field, theirs: pa.Field) -> bool:
    """Whether only the second field says what its values are."""
    return pa.types.is_null(mine.type) and not pa.types.is_null(theirs.type)


def _is_alike(mine: pa.Field, theirs: pa.Field) -> bool:
    """Whether types are the same, whatever may be null in them."""
    return bool(pa.types.is_null(theirs.type) or _loose(mine.type) == _loose(theirs.type))


def _loose(kind: pa.DataType) -> pa.DataType:
    """A type in which everything may be null."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _loose(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(pa.field("item", _loose(kind.value_type)))
    return kind


def index_columns(schema: pa.Schema) -> list[str]:
    """Columns that pandas stored an index in; none for a plain range."""
    stored = (schema.pandas_metadata or {}).get("index_columns", [])
    return [name for name in stored if isinstance(name, str) and name in schema.names]


def version_of(info: Mapping[str, Any]) -> str:
    """When a file was written, or another sign that it is the same; empty if there is none."""
    keys = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified")
    signs = (info[key] for key in keys if info.get(key) not in (None, ""))
    sign = next(signs, None)
    if sign is None:
        return ""
    return sign.isoformat() if isinstance(sign, datetime) else repr(sign)
