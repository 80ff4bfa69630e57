"""Globals that a function keeps for itself: caches, counters, models that it loads once.

Trying a function fills its cache; that makes no other function of it. A global counts as the
literal that its module bound it to, instead of as its present value, where the source shows that
the function at the top level that is identified writes to it, and that nothing else in the module
mentions it: no other function, no class, and no statement but the one that binds it.

What the source does not show so (a table that other code fills, too, or the author changes in
another cell) counts by its value.
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


#: Stands for code outside of functions among those that mention a name.
_TOP = ""


@dataclass(slots=True)
class _Survey:
    """What a text says of the globals of its module.

    Attributes
    ----------
    bound
        Values of plain assignments at the top level, by name; of several, the last.
    mentioned_by
        Functions and classes at the top level that mention a name, and ``_TOP`` where other
        code does, but for those assignments.
    written_by
        Of these, functions that write to it.
    """

    bound: dict[str, ast.expr] = field(default_factory=dict)
    mentioned_by: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    written_by: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def initial_values(qualname: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The globals that a function at the top level keeps for itself, as before it was called."""
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
    """The value of a literal by its name; nothing where it is none, or something else is there."""
    if not _is_literal(bound, namespace):
        return {}
    try:
        value = eval(compile(ast.Expression(bound), "<literal>", "eval"), dict(namespace))
    except Exception:  # a call with arguments that do not fit
        return {}
    now = namespace[name]
    if value is not None and type(now) is not type(value):
        return {}
    held = now.values() if isinstance(now, dict) else now
    is_registry = isinstance(now, _CONTAINERS) and any(callable(item) for item in held)
    return {} if is_registry else {name: value}


def _is_literal(node: ast.expr, namespace: Mapping[str, Any]) -> bool:
    """Whether an expression is made of constants, displays and empty or filled containers."""
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
    if isinstance(node, ast.Name):
        return namespace.get(node.id, getattr(builtins, node.id, None))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return getattr(namespace.get(node.value.id), node.attr, None)
    return None


@functools.lru_cache(maxsize=512)
def _survey(text: Text) -> _Survey:
    survey = _Survey()
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        for statement in ast.parse(text.source).body:
            if text.is_run:
                _survey_statement(statement, survey)
            else:  # nothing is known of what it did
                _note_names(statement, _TOP, survey)
    return survey


def _survey_statement(statement: ast.stmt, survey: _Survey) -> None:
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
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            survey.mentioned_by[inner.id].add(by)
        elif isinstance(inner, ast.alias):
            survey.mentioned_by[(inner.asname or inner.name).partition(".")[0]].add(by)
        elif isinstance(inner, ast.Global):
            for name in inner.names:
                survey.mentioned_by[name].add(by)


def _written(function: ast.AST) -> Iterator[str]:
    """Names of what code writes to: names that it declares global, containers, attributes."""
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
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id
