"""The identity of a job, in its output's manifest: another job is refused, the same resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from dask.dataframe.dask_expr._expr import Expr

from dask_pcm.context.identity.digest import digest
from dask_pcm.errors import OutputError, redacted
from dask_pcm.frames.map_partitions import ContextMap
from dask_pcm.ledger.decode import are_texts, is_count
from dask_pcm.ledger.layout import MANIFEST
from dask_pcm.ledger.output import Output
from dask_pcm.parquet.reader import PieceReader, Span
from dask_pcm.paths import names_of
from dask_pcm.plugins.install import versions

#: Format of the ledger's files; other formats are refused.
FORMAT = 2
#: Increased with every change of the package that makes the same job give other answers: outputs
#: that other versions began are resumed only where it is equal.
ANSWERS = 2
_MAX_SHOWN_CHARS = 80
#: Components that mean nothing to a reader.
_DIGESTS = ("function", "frame")
#: How a function may differ without a change in its code.
_MAY_BE_CACHE = (
    "; if trying the function filled a cache or a counter there, resume from a process in which it"
    " was not tried, or keep that in the context"
)
#: Components that the provenance of parts leaves out.
UNTOLD = ("input", "contexts", *_DIGESTS)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an output records of its job.

    Attributes
    ----------
    identity
        What distinguishes the job, by component. The files of ``input`` are in the order in which
        their rows are numbered.
    recorded
        For information: versions, contexts by name, commits of models, digests of the parts of
        functions and contexts, number of rows, how parts are committed, devices that rows ran on,
        the connection file of a cluster of pools.
    """

    identity: dict[str, Any]
    recorded: dict[str, Any] = field(default_factory=dict)

    def write(self, output: Output) -> None:
        """Replace the output's manifest."""
        value = {"format": FORMAT, "identity": self.identity, "recorded": self.recorded}
        output.write_json(MANIFEST, value)

    @classmethod
    def read(cls, output: Output) -> Manifest | None:
        """The manifest of an output; None if it has none.

        Raises
        ------
        OutputError
            It is damaged, or has another format.
        """
        found = output.read_json(MANIFEST)
        if found is None:
            return None
        if not isinstance(found, dict) or not _is_manifest(found):
            raise OutputError(
                f"{MANIFEST!r} in {output.path!r} is no manifest of dask_pcm, or is damaged. Give"
                " another folder, or overwrite this one (overwrite=True, --overwrite)."
            )
        if found.get("format") != FORMAT:
            versions = found.get("recorded", {}).get("versions", {})
            writer = versions.get("dask_pcm", "another version")
            raise OutputError(
                f"The output {output.path!r} has format {found.get('format')}, written by dask_pcm"
                f" {writer}; this version reads and writes format {FORMAT}. Give another folder,"
                " overwrite it, or go on with that version."
            )
        return cls(found["identity"], found.get("recorded", {}))

    @property
    def token(self) -> str:
        """Digest of the job without its input files, which every part carries."""
        return digest({k: v for k, v in self.identity.items() if k != "input"})


def _is_manifest(found: Mapping[str, Any]) -> bool:
    """Whether the fields of a manifest that we read have the right types."""
    identity, recorded = found.get("identity"), found.get("recorded", {})
    if not isinstance(identity, dict) or not isinstance(recorded, dict):
        return False
    files = identity.get("input", {})
    texts = [recorded.get(key, "") for key in ("counted", "begun", "committed_by")]
    return (
        isinstance(files, dict)
        and all(isinstance(file, dict) for file in files.values())
        and are_texts([*texts, *files])
        and is_count(recorded.get("total", 0))
        and isinstance(recorded.get("versions", {}), dict)
        and isinstance(recorded.get("parts", {}), dict)
        and are_texts(recorded.get("ran_on", []))
    )


def identify(expr: Expr, is_splittable: bool) -> Manifest:
    """The manifest of a job.

    Where pieces may be split (`is_splittable`), how the input was cut does not count. The output's
    types count as stored, not as pandas has them: whether a column of integers can be null, and so
    its dtype, may change with every file that is added.
    """
    maps = [part for part in _walk(expr) if isinstance(part, ContextMap)]
    numbers = {part._name: number for number, part in enumerate(maps)}
    identity: dict[str, Any] = {
        "answers": ANSWERS,
        "contexts": [ref.digest for part in maps for ref in part.operand("refs")],
        "function": [part.operand("call").digest for part in maps],
        "frame": digest(_shape(expr, numbers)),
    }
    for part in maps:
        about = getattr(part.operand("call").open().func, "about", None)
        identity.update(about() if about else {})
    readers = [reader for part in _walk(expr) if (reader := _reader_of(part)) is not None]
    if readers:
        files = {file.path: file for reader in readers for file in reader.files.values()}
        names = names_of(files)
        identity["input"] = {names[path]: dict(file.fingerprint) for path, file in files.items()}
        if not is_splittable:
            for path, pieces in _pieces(expr).items():
                identity["input"][names[path]]["pieces"] = digest(pieces)
    refs = [ref for part in maps for ref in part.operand("refs")]
    recorded = {
        "versions": versions(),
        "contexts": {ref.name: ref.digest for ref in refs},
        "models": {ref.name: dict(ref.about) for ref in refs if ref.about},
        "parts": {
            "function": [dict(part.operand("call").parts) for part in maps],
            "contexts": [dict(ref.parts) for ref in refs],
        },
    }
    return Manifest(json.loads(json.dumps(identity)), recorded)


def check(output: Output, mine: Manifest, overwrite: bool, extend: bool) -> Manifest | None:
    """Compare a job with the output's manifest; return the one to resume, or None to start anew.

    Raises
    ------
    OutputError
        The output is of another job or program, with the differences; nothing was changed.
    """
    if foreign_files := output.foreign_files():
        raise OutputError(
            f"The output {output.path!r} holds files of another program, such as"
            f" {foreign_files[0]!r}. Give another folder, or move them away."
        )
    if overwrite:
        return None
    theirs = Manifest.read(output)
    if theirs is None:
        if output.parts():
            raise OutputError(
                f"The output {output.path!r} holds parts but no manifest, so their job is"
                " unknown. Give another folder, or overwrite it (overwrite=True, --overwrite)."
            )
        return None
    if differences := list(_differences(theirs, mine, extend)):
        raise OutputError(
            f"The output {output.path!r} holds the output of another job:"
            f" {'; '.join(differences)}. Give another folder, or overwrite it (overwrite=True,"
            " --overwrite)."
        )
    if extend:
        files = {**theirs.identity.get("input", {}), **mine.identity.get("input", {})}
        return Manifest({**theirs.identity, "input": files}, theirs.recorded)
    return theirs


def _differences(of_theirs: Manifest, of_mine: Manifest, extend: bool) -> Iterator[str]:
    theirs, mine = of_theirs.identity, of_mine.identity
    names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    # Digests say little: they are named only where nothing readable differs.
    readable = [name for name in names if name not in _DIGESTS] or names
    for name in readable:
        if name == "input":
            yield from _different_input(theirs.get(name) or {}, mine.get(name) or {}, extend)
        elif name == "answers":
            yield "the version of dask_pcm that began it gives other answers than this one"
        elif name == "contexts" or name in _DIGESTS:
            parts = [of.recorded.get("parts", {}).get(name) for of in (of_theirs, of_mine)]
            yield f"its {name.removesuffix('s')} changed{_changed_part(*parts)}"
        else:
            yield f"its {name} is {_shown(theirs.get(name))}, not {_shown(mine.get(name))}"


def _changed_part(theirs: Any, mine: Any) -> str:
    """Which part differs between two lists of parts, the innermost first; "" if unknown."""
    if not isinstance(theirs, list) or not isinstance(mine, list):
        return ""  # recorded by an earlier version
    for before, now in zip(theirs, mine, strict=False):
        for name in {**now, **before} if isinstance(before, dict) else ():
            if name not in before or name not in now:
                return f" ({name} is {'new' if name in now else 'gone'})"
            if before[name] != now[name]:
                how = "" if name.startswith(("the code", "class")) else _MAY_BE_CACHE
                return f" ({name} has changed{how})"
    return " (in its arguments or options)" if len(theirs) == len(mine) else ""


def _different_input(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], extend: bool
) -> Iterator[str]:
    """The first file that is missing, changed or new; new ones are no difference with `extend`."""
    if gone := [path for path in theirs if path not in mine]:
        yield f"its input has {gone[0]!r}, which this one lacks"
        return
    for path in theirs:
        if theirs[path] != mine[path]:
            what = [k for k in theirs[path] if theirs[path][k] != mine[path].get(k)]
            how = f"has changed since (its {', '.join(what)})"
            if what == ["pieces"]:
                how = "is cut into other pieces now"
            yield f"its input file {path!r} {how}"
            return
    new = [path for path in mine if path not in theirs]
    if new and not extend:
        yield (
            f"its input lacks {new[0]!r} (extend=True or --extend takes in new files:"
            f" {len(new):,} of them)"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 1] + "…"


def _walk(expr: Expr) -> Iterator[Expr]:
    seen = set()
    todo = [expr]
    while todo:
        part = todo.pop(0)
        if part._name not in seen:
            seen.add(part._name)
            yield part
            todo += part.dependencies()


def _reader_of(expr: Expr) -> PieceReader | None:
    func = expr.operand("func") if "func" in type(expr)._parameters else None
    return func if isinstance(func, PieceReader) else None


def _shape(expr: Expr, numbers: Mapping[str, int]) -> Any:
    """An expression as nested lists of its operations, without its files or how they were cut.

    Maps appear as numbers: their functions and contexts are components of their own.
    """
    if isinstance(expr, ContextMap):
        types = str(pa.Schema.from_pandas(expr._meta, preserve_index=False).remove_metadata())
        return ["ContextMap", numbers[expr._name], types, _shape(expr.frame, numbers)]
    if (reader := _reader_of(expr)) is not None:
        types = str(reader.schema.remove_metadata())
        return ["read", list(reader.columns), types, _picked(expr)]
    if "layer" in type(expr)._parameters:  # persisted: known by its keys, not by its futures
        return ["graph", list(map(str, expr.operand("keys")))]
    operands = [_shape(op, numbers) if isinstance(op, Expr) else op for op in expr.operands]
    return [type(expr).__name__, operands]


def _pieces(expr: Expr) -> dict[str, list[tuple[int, int]]]:
    """First and last row of each piece, by file."""
    found: dict[str, list[tuple[int, int]]] = {}
    for part in _walk(expr):
        if _reader_of(part) is not None:
            for span in part.operand("iterables")[0]:
                found.setdefault(span.path, []).append((span.start, span.stop))
    return found


def _picked(expr: Expr) -> Any:
    """Spans selected from a read; None for all."""
    if not expr._filtered:
        return None
    spans: list[Span] = [expr.operand("iterables")[0][index] for index in expr._partitions]
    return [(redacted(span.path), span.start, span.stop) for span in spans]
