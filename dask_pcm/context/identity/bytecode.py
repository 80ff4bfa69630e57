"""Reads from bytecode what code does, independent of where its source is."""

from __future__ import annotations

import bisect
import builtins
import dis
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

#: Instructions that look up a global name; all but LOAD_GLOBAL occur in class bodies.
_GLOBAL_LOADS = frozenset("LOAD_GLOBAL LOAD_NAME LOAD_CLASSDEREF LOAD_FROM_DICT_OR_GLOBALS".split())
#: Names that a class body stores for its docstring and source position, which are ignored.
_PLACE_NAMES = frozenset({"__doc__", "__firstlineno__", "__static_attributes__"})
#: Instructions that depend on the position of an import, or on the size of an argument.
_CALL_DETAILS = frozenset({"PUSH_NULL", "EXTENDED_ARG"})
#: Globals that Python itself sets in every module. ``__annotations__`` changes with every annotated
#: variable of the module, and every class body with annotations refers to it.
_OF_MODULES = frozenset(
    "__name__ __annotations__ __conditional_annotations__ __doc__ __file__ __cached__ __package__"
    " __spec__ __loader__ __path__ __builtins__".split()
)
#: Flags for kinds of arguments, generators and coroutines; not __future__ imports and docstrings.
_FLAGS = 0x3FF


def signature(code: CodeType) -> tuple[Any, ...]:
    """The arguments, flags and variables of a code object."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_varnames, code.co_freevars, code.co_cellvars)
    return (counts, code.co_flags & _FLAGS, names)


def instructions(code: CodeType) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Instructions by name and argument, and the constants that they load, in order.

    The result depends on the source alone. Names and constants are given by value, jumps by the
    index of their target: offsets depend on whether there is a docstring. Python compiles
    ``module.function(...)`` to a method call, unless ``import module`` is in the same compilation
    unit, as in a script but not in a notebook. Both forms give the same result.
    """
    found = list(dis.get_instructions(code))
    kept = [
        step
        for step, following in zip(found, [*found[1:], None], strict=True)
        if step.opname not in _CALL_DETAILS
        # A class's docstring is a constant that is loaded and then stored: drop both instructions.
        and not _is_of_place(step)
        and not (following is not None and _is_of_place(following))
    ]
    offsets = [step.offset for step in kept]
    steps: list[tuple[str, Any]] = []
    constants: list[Any] = []
    for step in kept:
        argument: Any = step.arg
        if step.opcode in dis.hasconst:
            constants.append(code.co_consts[step.arg or 0])  # argval lacks keywords' names
            argument = None
        elif step.opcode in dis.hasname:
            argument = step.argval
        elif step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            argument = bisect.bisect_left(offsets, step.argval)
        steps.append(("LOAD_ATTR" if step.opname == "LOAD_METHOD" else step.opname, argument))
    for start, length, target, depth, lasti in _handlers(code.co_exceptiontable):
        at = [bisect.bisect_left(offsets, 2 * offset) for offset in (start, start + length, target)]
        steps.append(("handler", (*at, depth, lasti)))
    return steps, constants


def _handlers(table: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Entries of an exception table: start, length and target in code units, depth, lasti.

    The format is described in CPython's ``Objects/exception_handling_notes.txt``: numbers with six
    bits per byte; bit 6 is set if more bytes follow.
    """
    numbers: list[int] = []
    number = 0
    for byte in table:
        number = number << 6 | byte & 0x3F
        if not byte & 0x40:
            numbers.append(number)
            number = 0
    fours = [iter(numbers)] * 4
    for start, length, target, depth in zip(*fours, strict=True):
        yield start, length, target, depth >> 1, depth & 1


def _is_of_place(step: dis.Instruction) -> bool:
    """Whether an instruction stores a class's docstring or source position."""
    return step.opname == "STORE_NAME" and step.argval in _PLACE_NAMES


def nested(code: CodeType) -> Iterator[CodeType]:
    """A code object and those nested in it: functions, classes, comprehensions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def referenced(code: CodeType, namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Globals that a code object and those nested in it refer to, by name.

    Builtins and the globals that Python itself sets are left out.
    """
    names = {
        step.argval
        for inner in nested(code)
        for step in dis.get_instructions(inner)
        if step.opname in _GLOBAL_LOADS
    }
    for name in sorted(names - _OF_MODULES):
        if name in namespace:
            yield name, namespace[name]
        elif not hasattr(builtins, name):
            yield name, None


def imported(code: CodeType) -> list[str]:
    """Modules that code imports, and names that it imports from them, which may be modules."""
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
    """Names that the class bodies in a code object store."""
    return {
        step.argval
        for inner in nested(code)
        for step in dis.get_instructions(inner)
        if step.opname == "STORE_NAME"
    }
