"""Separates what the author of a class wrote from what metaclasses and decorators added."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
from types import CodeType, FunctionType
from typing import Any

from dask_pcm.context.identity.cells import texts
from dask_pcm.context.identity.sources import is_installed, without_docstrings

#: Descriptors that keep what was written; those of libraries replace it.
_PLAIN_DESCRIPTORS = (
    *(FunctionType, classmethod, staticmethod, property, functools.cached_property),
    *(functools.partialmethod, functools.singledispatchmethod),
)
#: Prefixes of the file names of functions that libraries have generated. The names in attrs' ones
#: contain a hash of a string, which differs in every process.
_GENERATED = ("<attrs generated", "<string>")
#: Packages whose objects are data.
DATA_PACKAGES = frozenset("builtins datetime decimal numpy pandas pyarrow re torch".split())
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def class_statement(cls: type) -> CodeType | None:
    """Compile the statement that made a class, without docstrings; None if there is no source.

    The statement has exactly what the author wrote: decorators, bases, keywords, annotations and
    members, before metaclasses and decorators changed them.
    """
    for text in texts(getattr(sys.modules.get(cls.__module__), "__dict__", {})):
        statement = _class_statements(text.source).get(cls.__qualname__)
        if statement is not None:
            if not text.is_run:
                return None  # another statement may have made the class
            with contextlib.suppress(SyntaxError):  # for instance `nonlocal`, without its function
                return compile(statement, "<class>", "exec", dont_inherit=True)
    return None


@functools.lru_cache(maxsize=512)
def _class_statements(source: str) -> dict[str, ast.Module]:
    """The class statements in a source, by qualified name; the last one of each name counts."""
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
    """A class's own annotations, including those with names that are not defined yet."""
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.getannotations(cls, format=annotationlib.Format.FORWARDREF)
    return vars(cls).get("__annotations__", {})


def parameters_of(cls: type) -> Any:
    """The parameters of a class's constructor, which show fields that a library hides."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except Exception:  # third-party metaclasses may raise anything
        return None
    return [(p.name, p.kind.name, p.default, p.annotation) for p in parameters]


def is_written(cls: type, name: str, value: Any) -> bool:
    """Whether the author wrote a member, judged without the source."""
    if not (name.startswith("__") and name.endswith("__")) or name == "__slots__":
        return True
    func = inspect.unwrap(getattr(value, "__func__", value))
    return (
        isinstance(func, FunctionType)
        and not is_installed(func.__module__)
        and not func.__code__.co_filename.startswith(_GENERATED[0])
        and func.__qualname__ == f"{cls.__qualname__}.{name}"
    )


def is_added(name: str, value: Any) -> bool:
    """Whether the author, not a library, set an attribute of a class after its statement.

    True for the user's own functions under any name, and for data under public names: attributes
    that libraries set have names with underscores, or are of the libraries' own types.
    """
    if _is_own_function(value):
        return True
    return not name.startswith("_") and _is_data(value)


def _is_own_function(value: Any) -> bool:
    """Whether a value is a function of the user's own, or a property or method of one."""
    if isinstance(value, property):
        return any(_is_own_function(f) for f in (value.fget, value.fset, value.fdel))
    func = inspect.unwrap(getattr(value, "__func__", value))
    if not isinstance(func, FunctionType) or is_installed(func.__globals__.get("__name__")):
        return False
    return not func.__code__.co_filename.startswith(_GENERATED)


def _is_data(value: Any) -> bool:
    """Whether a value consists of data, of the user's own types or of ``DATA_PACKAGES``."""
    if isinstance(value, (tuple, list, set, frozenset)) and type(value).__module__ == "builtins":
        return all(_is_data(item) for item in value)
    if type(value) is dict:
        return all(_is_data(item) for pair in value.items() for item in pair)
    kind = value if isinstance(value, type) else type(value)
    if hasattr(kind, "__get__"):
        return _is_own_function(value) or not is_installed(kind.__module__)
    package = kind.__module__.partition(".")[0]
    return package in DATA_PACKAGES or package == "pathlib" or not is_installed(kind.__module__)


def is_known_by_name(cls: type) -> bool:
    """Whether a class belongs to an installed module and can be found there by its name.

    A class that was made at run time may carry the name of the module that made it:
    ``dataclasses.make_dataclass("C", ...)`` gives ``types.C``.
    """
    if not is_installed(cls.__module__) or "<locals>" in cls.__qualname__:
        return False
    if not cls.__flags__ & _HEAP_TYPE:
        return True  # defined in C; some of these have no name in any module
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    return found is cls


def kept_member(member: Any) -> Any:
    """Return a member, or only its type if a library's descriptor has replaced what was written."""
    kind = type(member)
    is_foreign = hasattr(kind, "__get__") and is_installed(kind.__module__)
    return kind if is_foreign and kind not in _PLAIN_DESCRIPTORS else member
