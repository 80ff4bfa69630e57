"""What the author of a class wrote, apart from what metaclasses and decorators made of it."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from dask_pcm.sources import is_installed, without_docstrings

#: Descriptors that are what was written; those of libraries replace it.
_PLAIN_DESCRIPTORS = (
    *(FunctionType, classmethod, staticmethod, property, functools.cached_property),
    *(functools.partialmethod, functools.singledispatchmethod),
)
#: Functions that attrs has made hold a hash of text, which differs in every process.
_GENERATED = "<attrs generated"


def class_statement(cls: type) -> CodeType | None:
    """The statement that made a class, compiled without docstrings; None where there is no source.

    It has what the author wrote: decorators, bases, keywords, annotations and members, whatever
    metaclasses and decorators have made of them.
    """
    for source in _sources(sys.modules.get(cls.__module__)):
        statement = _class_statements(source).get(cls.__qualname__)
        if statement is not None:
            with contextlib.suppress(SyntaxError):  # it refers to variables of a function around it
                return compile(statement, "<class>", "exec", dont_inherit=True)
    return None


def _sources(module: ModuleType | None) -> Iterator[str]:
    """The text of a module, or the cells of a notebook, the latest first."""
    namespace: dict[str, Any] = getattr(module, "__dict__", {})
    if file := namespace.get("__file__"):
        with contextlib.suppress(Exception):  # a loader's own errors
            yield "".join(linecache.getlines(str(file), namespace))
    cells = namespace.get("In")
    if isinstance(cells, list):
        yield from (cell for cell in reversed(cells) if isinstance(cell, str))


@functools.lru_cache(maxsize=512)
def _class_statements(source: str) -> dict[str, ast.Module]:
    """Class statements of a source by their qualified names; of several, the last."""
    found: dict[str, ast.Module] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = ast.Module([child], [])
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{prefix}{child.name}.<locals>.")
            else:
                visit(child, prefix)

    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        visit(ast.fix_missing_locations(without_docstrings(ast.parse(source))), "")
    return found


def annotations_of(cls: type) -> Any:
    """Annotations as they were written in a class, names that are not defined yet included."""
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.getannotations(cls, format=annotationlib.Format.FORWARDREF)
    return vars(cls).get("__annotations__", {})


def parameters_of(cls: type) -> Any:
    """What making an object of a class takes: fields that a library keeps where only it knows."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except Exception:  # metaclasses of others may raise anything
        return None
    return [(p.name, p.kind.name, p.default, p.annotation) for p in parameters]


def is_written(cls: type, name: str, value: Any) -> bool:
    """Whether a class's author wrote a member, as far as can be told without the source."""
    if not (name.startswith("__") and name.endswith("__")) or name == "__slots__":
        return True
    func = inspect.unwrap(getattr(value, "__func__", value))
    return (
        isinstance(func, FunctionType)
        and not is_installed(func.__module__)
        and not func.__code__.co_filename.startswith(_GENERATED)
        and func.__qualname__ == f"{cls.__qualname__}.{name}"
    )


def kept_member(member: Any) -> Any:
    """A member, or only its kind where a library's descriptor replaced what the statement says."""
    kind = type(member)
    is_foreign = hasattr(kind, "__get__") and is_installed(kind.__module__)
    return kind if is_foreign and kind not in _PLAIN_DESCRIPTORS else member
