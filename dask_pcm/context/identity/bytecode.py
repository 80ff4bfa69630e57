"""What code does, read from its bytecode."""

from __future__ import annotations

import bisect
import builtins
import dis
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

#: Instructions that look a name up among the globals; the others stand in class bodies.
_GLOBAL_LOADS = frozenset("LOAD_GLOBAL LOAD_NAME LOAD_CLASSDEREF LOAD_FROM_DICT_OR_GLOBALS".split())
#: What a class body stores of its text and place, which do not count.
_PLACE_NAMES = frozenset({"__doc__", "__firstlineno__", "__static_attributes__"})
#: Instructions that come and go with the place of an import, or with the size of an argument.
_CALL_DETAILS = frozenset({"PUSH_NULL", "EXTENDED_ARG"})
#: Globals that Python itself gives every module. ``__annotations__`` grows with every annotated
#: variable of a module, and stands in every class body that annotates.
_OF_MODULES = frozenset(
    "__name__ __annotations__ __conditional_annotations__ __doc__ __file__ __cached__ __package__"
    " __spec__ __loader__ __path__ __builtins__".split()
)
#: Kinds of arguments, generators and coroutines; not __future__ statements and docstrings.
_FLAGS = 0x3FF


def signature(code: CodeType) -> tuple[Any, ...]:
    """Arguments, flags and variables of some code."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_varnames, code.co_freevars, code.co_cellvars)
    return (counts, code.co_flags & _FLAGS, names)


def instructions(code: CodeType) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Instructions by name and argument, and the constants that they load, in order.

    Only what the source says counts. Names and constants are given by value, jumps by the number of
    the instruction that they lead to: where they stand depends on whether there is a docstring.
    ``module.function(...)`` is called as a method unless ``import module`` was compiled together
    with it, as in a script and not in a notebook: both ways are one.
    """
    found = list(dis.get_instructions(code))
    kept = [
        step
        for step, following in zip(found, [*found[1:], None], strict=True)
        if step.opname not in _CALL_DETAILS
        # A constant is loaded, and stored as the docstring of a class.
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

    The format is that of ``Objects/exception_handling_notes.txt`` in CPython: numbers of six bits a
    byte, bit 6 where more follow.
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
    return step.opname == "STORE_NAME" and step.argval in _PLACE_NAMES


def nested(code: CodeType) -> Iterator[CodeType]:
    """Some code and the code inside it: of functions, classes, comprehensions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def referenced(code: CodeType, namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Globals that code and the code inside it refer to, by name.

    Builtins are left out, and what says only where a module lies.
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
