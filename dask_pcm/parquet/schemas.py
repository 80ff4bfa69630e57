"""All files are read with one schema, whose types hold the values of every file.

If there is no such type, or a column is missing somewhere, an error names both files and the
column.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from dask_pcm.errors import InputError, SchemaError
from dask_pcm.parquet.arrow_types import canonical, contains, holds, wider
from dask_pcm.parquet.footers import File, index_columns

#: Names of columns that store an unnamed index, written by pandas and by Dask.
_UNNAMED = re.compile(r"__index_level_\d+__|__null_dask_index__")


@dataclass(frozen=True, slots=True)
class CommonSchema:
    """The columns, types and index with which all files are read.

    Attributes
    ----------
    schema
        Names and types of the columns and the index.
    columns
        Names in the order requested, or in that of the first file.
    index
        The column that is the pandas index of all files; None to index by row number.
    """

    schema: pa.Schema
    columns: tuple[str, ...]
    index: str | None

    @classmethod
    def of(cls, files: Sequence[File], columns: Sequence[str] | None = None) -> CommonSchema:
        """Find the common schema of the requested columns, or of all.

        Raises
        ------
        SchemaError
            If a requested column does not exist, or a name is repeated.
        InputError
            If a column is missing in some file, or no type holds its values in all files.
        """
        distinct = _distinct(files)
        index = _common_index(distinct)
        if columns is not None and index in columns:
            index = None
        own = [] if index is None else [index]
        names = _ordinary(distinct, index) if columns is None else list(columns)
        wanted = [*names, *own]
        for file in distinct:
            _check_names(file, wanted, files[0])
        if columns is None:
            _check_all_wanted(distinct, wanted)
        fields = [pa.field(name, _common_type(name, distinct, files)) for name in wanted]
        return cls(pa.schema(fields, files[0].schema.metadata), tuple(names), index)


def _ordinary(files: Sequence[File], index: str | None) -> list[str]:
    """The columns of the first file without its index."""
    names = files[0].schema.names
    return [name for name in names if name != index and not _is_leftover(name, files)]


def is_unnamed_index(name: str | None) -> bool:
    """Whether a column name is a placeholder for an unnamed index."""
    return name is not None and _UNNAMED.fullmatch(name) is not None


def _distinct(files: Sequence[File]) -> list[File]:
    """The first file of each distinct schema: many files usually have few."""
    found: list[File] = []
    for file in files:
        if found and file.schema.equals(found[-1].schema, check_metadata=True):
            continue
        index = index_columns(file.schema)
        if not any(
            file.schema.equals(other.schema) and index == index_columns(other.schema)
            for other in found
        ):
            found.append(file)
    return found


def _common_index(files: Sequence[File]) -> str | None:
    """The single index column of all files; None if they differ or have several levels."""
    stored = {index_columns(file.schema) for file in files}
    if len(stored) != 1 or len(names := stored.pop()) != 1:
        return None
    return names[0]


def _is_leftover(name: str, files: Sequence[File]) -> bool:
    """Whether a column stores an unnamed index in some file."""
    return is_unnamed_index(name) and any(name in index_columns(file.schema) for file in files)


def _check_names(file: File, wanted: Sequence[str], first: File) -> None:
    """Raise if a file lacks a requested column or has it more than once."""
    names = file.schema.names
    if repeated := [name for name in wanted if names.count(name) > 1]:
        raise SchemaError(
            f"{file.path!r} has columns more than once: {', '.join(repeated)}. Omit them with"
            " columns=[...], or give each a unique name."
        )
    if not (missing := [name for name in wanted if name not in names]):
        return
    if file is first:
        raise SchemaError(
            f"{file.path!r} has no column {', '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, names))}."
        )
    raise _differs(file, first, missing[0], None, first.schema.field(missing[0]).type)


def _check_all_wanted(files: Sequence[File], wanted: Sequence[str]) -> None:
    """Refuse columns that only some files have; an unnamed integer index is dropped silently."""
    first = files[0]
    for file in files:
        for name in dict.fromkeys(file.schema.names):
            kind = file.schema.field(file.schema.names.index(name)).type
            if name in wanted:
                continue
            if not _is_leftover(name, files):
                raise _differs(file, first, name, kind, None)
            if not pa.types.is_integer(kind):
                raise InputError(
                    f"{file.path!r} has an unnamed index of type {kind}, which is not the only"
                    " index of all files. Name it (frame.index.name = ...), write the files"
                    " without it (index=False), or select the columns to read with columns=[...]."
                )


def _common_type(name: str, distinct: Sequence[File], files: Sequence[File]) -> pa.DataType:
    """The type that holds a column's values in all files; InputError if there is none."""
    for file in distinct:
        _check_readable(name, file.schema.field(name).type, file)
    source = distinct[0]
    kind = canonical(source.schema.field(name).type)
    is_changed = False
    for file in distinct[1:]:
        theirs = canonical(file.schema.field(name).type)
        both = wider(kind, theirs)
        if both is None:
            raise _differs(file, source, name, theirs, kind)
        is_changed |= not (both.equals(kind) and both.equals(theirs))
        if not both.equals(kind):
            kind, source = both, file
    # Types come from distinct schemas, but bounds of values differ from file to file.
    if is_changed:
        for file in files:
            _check_holds(name, kind, file)
    return kind


def _check_holds(name: str, kind: pa.DataType, file: File) -> None:
    """Raise InputError if the common type does not hold all of a file's values."""
    given, bounds = canonical(file.schema.field(name).type), file.bounds.get(name)
    if given.equals(kind) or holds(kind, given, bounds):
        return
    values = f"from {bounds[0]} to {bounds[1]}" if bounds else "of unknown size"
    raise InputError(
        f"Column {name!r} of {file.path!r} is {given}, with values {values}; together with other"
        f" files it would be {kind}, which does not hold all of these. {_way_out(name)}"
    )


def _check_readable(name: str, kind: pa.DataType, file: File) -> None:
    """Raise SchemaError if Arrow or Python cannot represent a type's values."""
    reason = None
    if contains(kind, _has_repeated_fields):
        reason = "struct fields with the same name, of which a Python dict holds only one"
    if contains(kind, _is_list_view):
        reason = "list views, which Arrow does not read back from Parquet unchanged"
    if reason is not None:
        raise SchemaError(
            f"Column {name!r} of {file.path!r} has {reason}: {kind}. Omit it with"
            " columns=[...], or cast it in the files."
        )


def _has_repeated_fields(kind: pa.DataType) -> bool:
    """Whether a type is a struct with repeated field names."""
    names = [field.name for field in kind] if pa.types.is_struct(kind) else []
    return len(set(names)) < len(names)


def _is_list_view(kind: pa.DataType) -> bool:
    """Whether a type is a list view, with 32-bit or 64-bit offsets."""
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _differs(
    file: File, other: File, name: str, mine: pa.DataType | None, theirs: pa.DataType | None
) -> InputError:
    """The error for a column whose type differs between two files; None if it is missing."""
    return InputError(
        f"The schema of {file.path!r} differs from that of {other.path!r}: column {name!r} is"
        f" {'missing' if mine is None else mine} here and"
        f" {'missing' if theirs is None else theirs} there. {_way_out(name)}"
    )


def _way_out(name: str) -> str:
    """What to do about a column whose files disagree, as a sentence."""
    return (
        f"Rewrite the files with one type for {name!r}, or omit it: columns=[...] lists the columns"
        " to read."
    )
