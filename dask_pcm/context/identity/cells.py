"""Finds the source text of a module: its file, or the cells of a notebook."""

from __future__ import annotations

import ast
import contextlib
import linecache
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Cell magics that run the cell's body in the notebook's namespace.
_RUNNING = frozenset({"time", "capture", "prun"})
#: Cell magics whose body leaves nothing in the notebook's namespace.
_ELSEWHERE = frozenset({"timeit", "writefile", "file"})


@dataclass(frozen=True, slots=True)
class Text:
    """Source code; `is_run` if it is known to have run, unchanged, in the module's namespace."""

    source: str
    is_run: bool = True


def texts(namespace: Mapping[str, Any]) -> Iterator[Text]:
    """The texts of the module with this namespace; for a notebook its cells, latest first."""
    if file := namespace.get("__file__"):
        with contextlib.suppress(Exception):  # import loaders may raise anything
            yield Text("".join(linecache.getlines(str(file), dict(namespace))))
    cells = namespace.get("In")
    if isinstance(cells, list):
        for cell in reversed(cells):
            if isinstance(cell, str):
                yield from _unwrapped(Text(cell))


def _unwrapped(cell: Text) -> Iterator[Text]:
    """A cell, or the body of one that starts with a cell magic such as ``%%time``.

    IPython stores such a cell as ``get_ipython().run_cell_magic('time', '', 'body')``.
    """
    found = _cell_magic(cell.source)
    if found is None:
        yield cell
        return
    magic, body = found
    if magic not in _ELSEWHERE:
        yield from _unwrapped(Text(_transformed(body), cell.is_run and magic in _RUNNING))


def _cell_magic(source: str) -> tuple[str, str] | None:
    """The magic and the body of a cell; None if it has no cell magic."""
    if "run_cell_magic(" not in source:
        return None
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        match ast.parse(source).body:
            case [
                ast.Expr(
                    ast.Call(
                        ast.Attribute(attr="run_cell_magic"),
                        [ast.Constant(str(magic)), _, ast.Constant(str(body))],
                    )
                )
            ]:
                return magic, body
    return None


def _transformed(body: str) -> str:
    """Translate a cell's IPython syntax, such as ``%time`` and ``!ls``, to Python."""
    if ipython := sys.modules.get("IPython.core.inputtransformer2"):
        with contextlib.suppress(Exception):  # third-party transformers may raise anything
            return str(ipython.TransformerManager().transform_cell(body))
    return body
