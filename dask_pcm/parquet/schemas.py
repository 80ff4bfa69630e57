"""One schema for many files: the types that hold the values of all, or why there are none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from dask_pcm.errors import InputError, SchemaError
from dask_pcm.parquet.arrow_types import canonical, contains, holds, wider
from dask_pcm.parquet.footers import File, index_columns

#: What an index is stored as that has no name.
_UNNAMED = re.compile(r"__index_level_\d+__|__null_dask_index__")


@dataclass(frozen=True, slots=True)
class CommonSchema:
    """What is read of files.

    Attributes
    ----------
    schema
        Names and types of the columns, and of the index.
    columns
        In the order of the first file, or in that in which they were asked for.
    index
        The column that all files have as their index; None where rows are numbered.
    """

    schema: pa.Schema
    columns: tuple[str, ...]
    index: str | None

    @classmethod
    def of(cls, files: Sequence[File], columns: Sequence[str] | None = None) -> CommonSchema:
        """Compare the columns that are asked for; all if left out.

        Raises
        ------
        SchemaError
            Where a column is asked for that is not there, or a name stands twice.
        InputError
            Where a column is missing in some file, or no type holds its values in all of them.
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
    """Columns of the first file that are no index."""
    names = files[0].schema.names
    return [name for name in names if name != index and not _is_leftover(name, files)]


def is_unnamed_index(name: str | None) -> bool:
    """Whether a column's name is what is written for an index that has none."""
    return name is not None and _UNNAMED.fullmatch(name) is not None


def _distinct(files: Sequence[File]) -> list[File]:
    """The first file of each schema."""
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
    """The index that all have; several levels, or others in other files, are columns."""
    stored = {index_columns(file.schema) for file in files}
    if len(stored) != 1 or len(names := stored.pop()) != 1:
        return None
    return names[0]


def _is_leftover(name: str, files: Sequence[File]) -> bool:
    """Whether a column is an index without a name."""
    return is_unnamed_index(name) and any(name in index_columns(file.schema) for file in files)


def _check_names(file: File, wanted: Sequence[str], first: File) -> None:
    names = file.schema.names
    if repeated := [name for name in wanted if names.count(name) > 1]:
        raise SchemaError(
            f"Columns of {file.path!r} stand more than once: {', '.join(repeated)}. Leave them out"
            " with columns=[...], or give each a name of its own."
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
    """Refuse columns that only some files have; drop an index without a name if it only counts."""
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
                    f"{file.path!r} has an index without a name, of type {kind}, which not all"
                    " files have alone. Give it a name (frame.index.name = ...), write the files"
                    " without it (index=False), or say which columns to read with columns=[...]."
                )


def _common_type(name: str, distinct: Sequence[File], files: Sequence[File]) -> pa.DataType:
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
    if is_changed:
        for file in files:
            _check_holds(name, kind, file)
    return kind


def _check_holds(name: str, kind: pa.DataType, file: File) -> None:
    given, bounds = canonical(file.schema.field(name).type), file.bounds.get(name)
    if given.equals(kind) or holds(kind, given, bounds):
        return
    values = f"from {bounds[0]} to {bounds[1]}" if bounds else "of any size, for all it says"
    raise InputError(
        f"Column {name!r} of {file.path!r} is {given}, with values {values}; together with other"
        f" files it would be {kind}, which does not hold all of these. {_way_out(name)}"
    )


def _check_readable(name: str, kind: pa.DataType, file: File) -> None:
    reason = None
    if contains(kind, _has_repeated_fields):
        reason = "fields of the same name, and Python's dicts hold one of each"
    if contains(kind, _is_list_view):
        reason = "list views, which Arrow does not read from Parquet as they were"
    if reason is not None:
        raise SchemaError(
            f"Column {name!r} of {file.path!r} has {reason}: {kind}. Leave it out with"
            " columns=[...], or cast it in the files."
        )


def _has_repeated_fields(kind: pa.DataType) -> bool:
    names = [field.name for field in kind] if pa.types.is_struct(kind) else []
    return len(set(names)) < len(names)


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _differs(
    file: File, other: File, name: str, mine: pa.DataType | None, theirs: pa.DataType | None
) -> InputError:
    return InputError(
        f"The schema of {file.path!r} differs from that of {other.path!r}: column {name!r} is"
        f" {'missing' if mine is None else mine} here and"
        f" {'missing' if theirs is None else theirs} there. {_way_out(name)}"
    )


def _way_out(name: str) -> str:
    return (
        f"Write the files anew with one type for {name!r}, or leave it out: columns=[...] names"
        " those to read."
    )
