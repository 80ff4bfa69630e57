"""What code does, read from its bytecode."""

from __future__ import annotations

import builtins
import dis
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

#: Instructions that look a name up among the globals; the others stand in class bodies.
_GLOBAL_LOADS = frozenset("LOAD_GLOBAL LOAD_NAME LOAD_CLASSDEREF LOAD_FROM_DICT_OR_GLOBALS".split())
#: What a class body stores of its text and place, which do not count.
_PLACE_NAMES = frozenset({"__doc__", "__firstlineno__", "__static_attributes__"})
#: Kinds of arguments, generators and coroutines; not __future__ statements and docstrings.
_FLAGS = 0x3FF


def signature(code: CodeType) -> tuple[Any, ...]:
    """Arguments, flags and variables of some code."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_varnames, code.co_freevars, code.co_cellvars)
    return (counts, code.co_flags & _FLAGS, names)


def instructions(code: CodeType) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Instructions by name and argument, and the constants that they load, in order.

    Names and constants are given by value: where they stand in the code's tables depends on
    whether it has a docstring.
    """
    steps: list[tuple[str, Any]] = []
    constants: list[Any] = []
    found = list(dis.get_instructions(code))
    for step, following in zip(found, [*found[1:], None], strict=True):
        if _is_of_place(step) or (following is not None and _is_of_place(following)):
            continue  # a constant is loaded, and stored as the docstring of a class
        if step.opcode in dis.hasconst:
            constants.append(code.co_consts[step.arg or 0])  # argval lacks keywords' names
            steps.append((step.opname, None))
        else:
            steps.append((step.opname, step.argval if step.opcode in dis.hasname else step.arg))
    return steps, constants


def _is_of_place(step: dis.Instruction) -> bool:
    return step.opname == "STORE_NAME" and step.argval in _PLACE_NAMES


def nested(code: CodeType) -> Iterator[CodeType]:
    """Some code and the code inside it: of functions, classes, comprehensions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def referenced(code: CodeType, namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Globals that code and the code inside it refer to, by name, builtins left out."""
    names = {
        step.argval
        for inner in nested(code)
        for step in dis.get_instructions(inner)
        if step.opname in _GLOBAL_LOADS
    }
    for name in sorted(names - {"__name__"}):
        if name in namespace:
            yield name, namespace[name]
        elif not hasattr(builtins, name):
            yield name, None


def imported(code: CodeType) -> list[str]:
    """Modules that code imports; what it takes from them may be one as well."""
    names: set[str] = set()
    module = ""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            module = step.argval
            names.add(module)
        elif step.opname == "IMPORT_FROM":
            names.add(f"{module}.{step.argval}")
    return sorted(names)


def stored(code: CodeType) -> set[str]:
    """Names that the class bodies in some code store."""
    return {
        step.argval
        for inner in nested(code)
        for step in dis.get_instructions(inner)
        if step.opname == "STORE_NAME"
    }
