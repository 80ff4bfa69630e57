"""Which job an output belongs to: refused to any other, resumed by the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dask.dataframe.dask_expr._expr import Expr

from dask_pcm.dataframe import ContextMap
from dask_pcm.digest import digest
from dask_pcm.errors import OutputError
from dask_pcm.ledger.commit import Output
from dask_pcm.pieces import PieceReader
from dask_pcm.plugins.install import versions

FORMAT = 1
MANIFEST = "manifest.json"
_MAX_SHOWN_CHARS = 80


def identity(expr: Expr, is_splittable: bool) -> dict[str, Any]:
    """What makes up a job, component by component, so that a difference can be named.

    Where pieces may be split (`is_splittable`), how the input was cut does not count.
    """
    maps = [part for part in _walk(expr) if isinstance(part, ContextMap)]
    found: dict[str, Any] = {
        "contexts": [ref.digest for part in maps for ref in part.operand("refs")],
        "function": [part.operand("call").digest for part in maps],
        "frame": digest(_shape(expr)),
    }
    for part in maps:
        about = getattr(part.operand("call").open().func, "about", None)
        found.update(about() if about else {})
    readers = [reader for part in _walk(expr) if (reader := _reader_of(part)) is not None]
    if readers:
        files = [file for reader in readers for file in reader.files.values()]
        found["input"] = {file.path: file.fingerprint for file in files}
        if not is_splittable:
            found["pieces"] = digest([list(op) for op in _spans(expr)])
    return found


def check(output: Output, mine: Mapping[str, Any], overwrite: bool) -> bool:
    """Hold a job against the output's manifest; True if there is work of it to resume.

    Raises
    ------
    OutputError
        Where the output is another job's or somebody else's, and why; nothing was changed.
    """
    if strangers := output.strangers():
        raise OutputError(
            f"The output folder {output.path!r} holds files that are not ours, such as"
            f" {strangers[0]!r}. Give another folder, or move them away."
        )
    manifest = _read(output)
    if overwrite:
        return False
    if manifest is None:
        if output.parts():
            raise OutputError(
                f"The output folder {output.path!r} holds parts but no manifest says of which job."
                " Give another folder, or overwrite it (overwrite=True, --overwrite)."
            )
        return False
    if manifest.get("format") != FORMAT:
        raise OutputError(
            f"The output folder {output.path!r} has format {manifest.get('format')}; this version"
            f" writes format {FORMAT}. Give another folder, or overwrite it."
        )
    if differences := list(_differences(manifest["identity"], mine)):
        raise OutputError(
            f"The output folder {output.path!r} holds the output of another job:"
            f" {'; '.join(differences)}. Give another folder, or overwrite it (overwrite=True,"
            " --overwrite)."
        )
    return True


def write(output: Output, mine: Mapping[str, Any], contexts: Mapping[str, str]) -> None:
    """Write the manifest of a new job."""
    recorded = {"versions": versions(), "contexts": dict(contexts)}
    value = {"format": FORMAT, "identity": mine, "recorded": recorded}
    output.write_json(MANIFEST, value)


def record(output: Output, facts: Mapping[str, Any]) -> None:
    """Add what was found out while running: device, dtype."""
    manifest = _read(output)
    if manifest is not None and facts:
        manifest["recorded"].update(facts)
        output.write_json(MANIFEST, manifest)


def _read(output: Output) -> dict[str, Any] | None:
    path = output.home / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"The manifest {str(path)!r} cannot be read ({error}). Give another output folder, or"
            " remove this one."
        ) from error
    if not isinstance(manifest, dict) or "identity" not in manifest:
        raise OutputError(f"{str(path)!r} is not a manifest of dask_pcm.")
    return manifest


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    mine = json.loads(json.dumps(mine))
    names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    # Digests say little: they are named only where nothing readable differs.
    readable = [name for name in names if name not in ("function", "frame", "pieces")] or names
    for name in readable:
        if name == "input":
            yield _different_input(theirs.get(name) or {}, mine.get(name) or {})
        elif name in ("contexts", "function", "frame", "pieces"):
            yield f"its {name.removesuffix('s')} is another"
        else:
            yield f"its {name} is {_shown(theirs.get(name))}, not {_shown(mine.get(name))}"


def _different_input(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    for path in {**theirs, **mine}:
        if path not in mine:
            return f"its input has {path!r}, which is not in this one"
        if path not in theirs:
            return f"its input lacks {path!r}"
        if theirs[path] != mine[path]:
            return f"its input file {path!r} has changed since"
    return "its input files are in another order"


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


def _shape(expr: Expr) -> Any:
    """An expression as nested lists of what it does, without how its input was cut."""
    if isinstance(expr, ContextMap):
        refs = [ref.digest for ref in expr.operand("refs")]
        return ["ContextMap", expr.operand("call").digest, refs, _shape(expr.frame)]
    if (reader := _reader_of(expr)) is not None:
        return ["read", reader.token, _partitions(expr)]
    if "layer" in type(expr)._parameters:  # persisted: known by its keys, not by its futures
        return ["graph", list(map(str, expr.operand("keys")))]
    operands = [_shape(op) if isinstance(op, Expr) else op for op in expr.operands]
    return [type(expr).__name__, operands]


def _spans(expr: Expr) -> Iterator[list[tuple[int, int]]]:
    for part in _walk(expr):
        if _reader_of(part) is not None:
            yield [(span.offset, span.n_rows) for span in part.operand("iterables")[0]]


def _partitions(expr: Expr) -> Any:
    """Row ranges that were picked from a read; None for all."""
    if not expr._filtered:
        return None
    spans = expr.operand("iterables")[0]
    return [(spans[i].offset, spans[i].offset + spans[i].n_rows) for i in expr._partitions]
