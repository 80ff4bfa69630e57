"""A function's private cache counts with its initial value, so calling it keeps its identity.

Such a global is a cache, a counter, or a model that the function loads once. It counts as the
literal that its module bound it to, not as its present value, if the source shows two things: the
identified top-level function writes to it, and nothing else in the module mentions it; no other
function, no class, and no statement but the one that binds it.

Every other global counts by its value, for instance a table that other code fills as well, or that
the author changes in another cell.
"""

from __future__ import annotations

import ast
import builtins
import collections
import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask_pcm.context.identity.cells import Text, texts

_MUTATORS = frozenset(
    "add append appendleft clear discard extend extendleft insert move_to_end pop popitem popleft"
    " remove reverse setdefault sort subtract update __setitem__ __delitem__".split()
)
_CONTAINERS = (
    *(dict, list, set, frozenset, tuple, bytearray),
    *(collections.Counter, collections.defaultdict, collections.OrderedDict, collections.deque),
)
_LITERAL_NODES = (ast.Constant, ast.Dict, ast.List, ast.Set, ast.Tuple, ast.UnaryOp, ast.Lambda)


#: Represents code outside of functions and classes.
_TOP = ""


@dataclass(slots=True)
class _Survey:
    """How a source text uses the globals of its module.

    Attributes
    ----------
    bound
        Values of plain top-level assignments, by name; the last one counts.
    mentioned_by
        Top-level functions and classes that mention a name, and ``_TOP`` if other code does; not
        counting those assignments.
    written_by
        The functions among these that write to it.
    """

    bound: dict[str, ast.expr] = field(default_factory=dict)
    mentioned_by: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    written_by: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def initial_values(qualname: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The initial values of the globals that only one top-level function uses, by name."""
    surveys = [_survey(text) for text in texts(namespace)]
    written = {name for s in surveys for name, by in s.written_by.items() if qualname in by}
    found: dict[str, Any] = {}
    for name in written & set(namespace):
        mentioned_by = {by for survey in surveys for by in survey.mentioned_by.get(name, ())}
        bound = next((s.bound[name] for s in surveys if name in s.bound), None)
        if mentioned_by == {qualname} and bound is not None:
            found.update(_evaluated(name, bound, namespace))
    return found


def _evaluated(name: str, bound: ast.expr, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The value of a literal, by name; empty if it is none, or the global has another type now."""
    if not _is_literal(bound, namespace):
        return {}
    try:
        value = eval(compile(ast.Expression(bound), "<literal>", "eval"), dict(namespace))
    except Exception:  # for instance a container called with invalid arguments
        return {}
    now = namespace[name]
    if value is not None and type(now) is not type(value):
        return {}
    # A registry counts by its value: what it maps to is part of what the function does.
    held = now.values() if isinstance(now, dict) else now
    is_registry = isinstance(now, _CONTAINERS) and any(callable(item) for item in held)
    return {} if is_registry else {name: value}


def _is_literal(node: ast.expr, namespace: Mapping[str, Any]) -> bool:
    """Whether an expression consists of constants, displays and calls of container types."""
    if isinstance(node, ast.Lambda):
        return True
    if isinstance(node, (ast.Name, ast.Attribute)):
        return isinstance(_named(node, namespace), type)
    if isinstance(node, ast.Call):
        if _named(node.func, namespace) not in _CONTAINERS:
            return False
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, _LITERAL_NODES):
        parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    else:
        return False
    return all(_is_literal(part, namespace) for part in parts)


def _named(node: ast.expr, namespace: Mapping[str, Any]) -> Any:
    """The object that a name, or an attribute of a name, refers to; None if there is none."""
    if isinstance(node, ast.Name):
        return namespace.get(node.id, getattr(builtins, node.id, None))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return getattr(namespace.get(node.value.id), node.attr, None)
    return None


@functools.lru_cache(maxsize=512)
def _survey(text: Text) -> _Survey:
    """Survey a source text; empty if it cannot be parsed."""
    survey = _Survey()
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        for statement in ast.parse(text.source).body:
            if text.is_run:
                _survey_statement(statement, survey)
            else:  # it may not have run: every name in it counts as used by other code
                _note_names(statement, _TOP, survey)
    return survey


def _survey_statement(statement: ast.stmt, survey: _Survey) -> None:
    """Add a top-level statement to a survey."""
    match statement:
        case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(
            ast.Name(name), _, ast.expr() as value
        ):
            survey.bound[name] = value
            _note_names(value, _TOP, survey)
        case ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
            _note_names(statement, name, survey)
            for written in _written(statement):
                survey.written_by[written].add(name)
            for part in (*statement.decorator_list, statement.args):
                _note_names(part, _TOP, survey)
        case ast.ClassDef(name):
            _note_names(statement, f"class {name}", survey)
        case _:
            _note_names(statement, _TOP, survey)


def _note_names(node: ast.AST, by: str, survey: _Survey) -> None:
    """Add all names in a node as mentioned by `by`."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            survey.mentioned_by[inner.id].add(by)
        elif isinstance(inner, ast.alias):
            survey.mentioned_by[(inner.asname or inner.name).partition(".")[0]].add(by)
        elif isinstance(inner, ast.Global):
            for name in inner.names:
                survey.mentioned_by[name].add(by)


def _written(function: ast.AST) -> Iterator[str]:
    """Names that code may write to: those declared global, changed containers and attributes."""
    for node in ast.walk(function):
        match node:
            case ast.Global(names):
                yield from names
            case ast.Subscript(value, _, ast.Store() | ast.Del()):
                yield from _root(value)
            case ast.Attribute(value, _, ast.Store() | ast.Del()):
                yield from _root(value)
            case ast.Call(ast.Attribute(value, attr)) if attr in _MUTATORS:
                yield from _root(value)


def _root(node: ast.expr) -> Iterator[str]:
    """The name ``a`` of an expression such as ``a.b[c].d``; nothing for other expressions."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id
