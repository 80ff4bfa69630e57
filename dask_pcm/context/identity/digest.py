"""Digests of functions and values that are equal across processes, kernels and machines.

A function is identified by what it does: bytecode, constants, defaults, closure and the globals
that it refers to. A class is identified by what its author wrote: bases, annotations, members and,
if its source can be found, the whole statement. Installed code (the standard library,
site-packages) is identified by its name alone.

The following do not count: additions by metaclasses and decorators of libraries; docstrings; the
position of code (file, line, cell); and the bytes of pickles, which differ between two kernels for
the same source.

Digests of functions and classes depend on the minor version of Python, as bytecode does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from dask_pcm.context.identity.addresses import Addresses
from dask_pcm.context.identity.bytecode import imported, instructions, referenced, signature, stored
from dask_pcm.context.identity.caches import initial_values
from dask_pcm.context.identity.classes import (
    DATA_PACKAGES,
    annotations_of,
    class_statement,
    is_added,
    is_known_by_name,
    is_written,
    kept_member,
    parameters_of,
)
from dask_pcm.context.identity.components import (
    components,
    is_environment,
    is_hashable,
    is_tool,
    owned_by_process,
    without_caches,
)
from dask_pcm.context.identity.sources import is_installed, origin, user_modules
from dask_pcm.context.identity.unseen import warn_of_state, warn_of_type
from dask_pcm.errors import RecipeError

#: Attributes of a class that give its source position, or that every class has.
_INCIDENTAL = frozenset(
    "__module__ __doc__ __dict__ __weakref__ __firstlineno__ __static_attributes__ "
    "__annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__abstractmethods__ _abc_impl __dataclass_fields__ __match_args__".split()
)
#: Attributes in which libraries store fields that were written as members of a class.
_FIELD_TABLES = ("__pydantic_fields__", "__attrs_attrs__", "__dataclass_fields__")


@dataclass(frozen=True, slots=True)
class Identity:
    """A digest, with the digests of its parts.

    Attributes
    ----------
    digest
        32 hex digits.
    parts
        Digests of code, globals, closures and attributes, by readable names; inner parts come
        before outer ones.
    """

    digest: str
    parts: Mapping[str, str]


def identify(*values: Any) -> Identity:
    """Return the digest of `values`, with parts that show where two identities differ.

    Raises
    ------
    RecipeError
        If a value can be neither walked nor pickled.
    """
    walk = _Walk()
    return Identity(walk.digest(values), walk.parts)


def digest(*values: Any) -> str:
    """Return 32 hex digits that identify `values`.

    Raises
    ------
    RecipeError
        If a value can be neither walked nor pickled.

    Examples
    --------
    >>> digest(lambda x: x + 1) == digest(lambda x: x + 1)
    True
    >>> digest(lambda x: x + 1) == digest(lambda x: x + 2)
    False
    """
    return identify(*values).digest


class _Walk:
    """One traversal of values; an object that contains itself yields a back-reference.

    Parameters
    ----------
    of_state
        The addresses to leave out, for a walk over an object's present state: functions and classes
        count by name there, and what cannot be pickled by its type. None for any other walk.
    """

    def __init__(self, of_state: Addresses | None = None) -> None:
        self.parts: dict[str, str] = {}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # ids stay unique while we hold the objects
        self._is_strict = of_state is None
        # Digests of data without functions of the user's or back-references inside, by id.
        self._plain: dict[int, bytes] = {}
        self._n_references = 0
        self._is_in_state = self._is_shallow = of_state is not None
        self._checked: set[type] = set()
        self._addresses = of_state or Addresses()

    @functools.cached_property
    def _owned(self) -> dict[int, str]:
        """See ``owned_by_process``."""
        return owned_by_process()

    def digest(self, value: Any) -> str:
        """The digest of a value."""
        return _hashed(self._tokens(value))[:32]

    def _part(self, label: str, tokens: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the tokens of a part and record their digest; equal labels are combined."""
        passed = list(tokens)
        known = self.parts.get(label, "").encode()
        self.parts[label] = _hashed([known, *passed])[:16]
        yield from passed

    def _tokens(self, value: Any) -> Iterator[bytes]:
        """The tokens of any value."""
        if type(value) in (bool, int, float, complex, str, type(None)):
            shown = repr(value)
            if self._is_in_state and type(value) in (int, str):
                shown = self._addresses.without(shown)
            yield f"{type(value).__name__}={shown}".encode()
            return
        if type(value) is bytes:
            yield b"bytes"
            yield value
            return
        if id(value) in self._plain:
            yield self._plain[id(value)]
            return
        if id(value) in self._seen:
            self._n_references += 1
            yield f"again={self._seen[id(value)]}".encode()
            return
        self._seen[id(value)] = len(self._seen)
        n_before = self._n_references
        tokens = list(self._compound(value))
        if isinstance(value, (FunctionType, type)):
            self._alive.append(value)
            self._n_references += 1  # later occurrences are back-references
        else:
            # Later occurrences of data are walked again: whether two equal values are one object
            # depends on how the code was compiled. Only a cycle is a back-reference.
            del self._seen[id(value)]
        if self._n_references == n_before:
            self._alive.append(value)
            self._plain[id(value)] = hashlib.sha256(b"|".join(tokens)).digest()
            yield self._plain[id(value)]
        else:
            yield from tokens

    def _compound(self, value: Any) -> Iterator[bytes]:
        """The tokens of a value that is not a plain constant."""
        if is_environment(value):
            value = os.environ
        if not is_hashable(value) and id(value) in self._owned:
            yield f"process={self._owned[id(value)]}".encode()
            return
        match value:
            case tuple() | list() if type(value) in (tuple, list):
                yield f"{type(value).__name__}={len(value)}".encode()
                for item in value:
                    yield from self._tokens(item)
            case dict() if type(value) is dict:
                yield f"dict={len(value)}".encode()
                # In the order of the keys' digests: keys of several types do not compare.
                for _, key in sorted((digest(key), key) for key in value):
                    yield from self._tokens(key)
                    yield from self._tokens(value[key])
            case set() | frozenset() if type(value) in (set, frozenset):
                yield f"set={len(value)}".encode()
                yield from sorted(digest(item).encode() for item in value)
            case FunctionType() | type() if self._is_shallow:
                yield value.__qualname__.encode()
            case CodeType():
                yield from self._code(value)
            case FunctionType():
                yield from self._function(value)
            case ModuleType():
                yield from _module_tokens(value.__name__)
            case type():
                yield from self._part(f"class {value.__qualname__}", self._class(value))
            case _:
                yield from self._object(value)

    def _function(self, func: FunctionType) -> Iterator[bytes]:
        """The tokens of a function: its name if installed, otherwise all that it consists of."""
        # From globals and code: functools.wraps copies __module__ and __qualname__ to a wrapper.
        module, name = func.__globals__.get("__name__"), func.__code__.co_qualname
        if is_installed(module):
            yield f"function={module}:{name}".encode()
            if "<" in name:  # a closure or lambda: its name does not identify it
                yield from self._wrapper(func)
            return
        yield b"function"
        yield from self._part(f"the code of {name}", self._code(func.__code__))
        defaults = [func.__defaults__, func.__kwdefaults__]
        yield from self._part(f"the defaults of {name}", self._tokens(defaults))
        yield from self._closure(func)
        yield from self._globals(func.__code__, func.__globals__, name)
        # Attributes; __wrapped__ is among them.
        yield from self._part(f"the attributes of {name}", self._tokens(dict(vars(func))))

    def _wrapper(self, func: FunctionType) -> Iterator[bytes]:
        """The tokens of a closure of a library: what it wraps, and its settings."""
        registry = getattr(func, "registry", None)
        if (
            func.__globals__.get("__name__") == "functools" and registry is not None
        ):  # singledispatch
            yield from self._global(dict(registry))
            return
        if func.__code__.co_name == "<lambda>":
            yield from self._code(func.__code__)
        if wrapped := vars(func).get("__wrapped__", vars(func).get("raw_function")):
            # Of the wrapper's other variables only settings count, not namespaces and caches.
            yield from self._global([wrapped, getattr(wrapped, "__annotations__", None)])
            yield from self._global(list(_settings(func)))
            return
        was_strict, self._is_strict = self._is_strict, False
        yield from self._tokens([func.__defaults__, func.__kwdefaults__])
        yield from self._closure(func)
        self._is_strict = was_strict

    def _closure(self, func: FunctionType) -> Iterator[bytes]:
        """The tokens of a function's closure variables."""
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
            yield f"closure={name}".encode()
            label = f"the variable {name!r} around {func.__code__.co_qualname}"
            yield from self._part(label, self._cell(cell))

    def _cell(self, cell: Any) -> Iterator[bytes]:
        """The tokens of a closure cell, which may be empty."""
        try:
            yield from self._tokens(cell.cell_contents)
        except ValueError:
            yield b"empty"

    def _globals(
        self, code: CodeType, namespace: Mapping[str, Any], name_of_code: str
    ) -> Iterator[bytes]:
        """The tokens of the globals that code refers to."""
        caches = initial_values(name_of_code, namespace)
        for name, value in referenced(code, namespace):
            yield f"global={name}".encode()
            label = f"the global {name!r} of {name_of_code}"
            yield from self._part(label, self._global(caches.get(name, value)))

    def _global(self, value: Any) -> Iterator[bytes]:
        """The tokens of a global; locks, loggers, open files and the like count by type only."""
        was_strict, self._is_strict = self._is_strict, False
        yield from self._tokens(value)
        self._is_strict = was_strict

    def _code(self, code: CodeType) -> Iterator[bytes]:
        """The tokens of a code object, and of the user's modules that it imports."""
        steps, constants = instructions(code)
        yield b"code"
        yield repr((signature(code), steps)).encode()
        for constant in constants:
            yield from self._tokens(constant)
        for name in imported(code):
            if not is_installed(name) and origin(name):
                yield from _module_tokens(name)

    def _class(self, cls: type) -> Iterator[bytes]:
        """The tokens of a class."""
        yield f"class={cls.__qualname__}".encode()
        if is_known_by_name(cls):
            yield cls.__module__.encode()
            return
        if type(cls) is not type:
            yield from self._tokens(type(cls))
        yield from self._global(vars(cls).get("__orig_bases__", cls.__bases__))
        yield from self._global(noted := annotations_of(cls))
        statement = class_statement(cls)
        if statement is None or "<locals>" in cls.__qualname__:  # fields may hold a variable
            yield from self._global([vars(cls).get(name) for name in _FIELD_TABLES])
            yield from self._global(parameters_of(cls) if noted else None)
        if statement is None:
            members = {name: v for name, v in vars(cls).items() if is_written(cls, name, v)}
        else:
            yield from self._code(statement)
            yield from self._globals(statement, vars(sys.modules[cls.__module__]), cls.__qualname__)
            names = stored(statement)
            members = {n: v for n, v in vars(cls).items() if n in names or is_added(n, v)}
        for name in sorted(members.keys() - _INCIDENTAL):
            member = members[name] if statement is None else kept_member(members[name])
            yield f"member={name}".encode()
            label = f"the attribute {name!r} of {cls.__qualname__}"
            yield from self._part(label, self._global(member))

    def _object(self, value: Any) -> Iterator[bytes]:
        """The tokens of an object: by a rule of its own, or as pickle reduces it."""
        if (made_of := components(value)) is not None:
            yield from self._tokens(made_of)
            return
        reduce = cloudpickle.CloudPickler.dispatch_table.get(type(value))
        try:
            reduced = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:
            if not self._is_strict:
                yield f"opaque={type(value).__qualname__}".encode()
                if not is_tool(value):
                    warn_of_type(value)
                return
            raise RecipeError(
                f"Cannot identify {type(value).__qualname__} object {value!r:.80}: it can be"
                f" neither walked nor pickled ({error}). Build it inside the loader instead, or"
                " give its class a __dask_tokenize__ method that returns its parts."
            ) from error
        yield b"object"
        if isinstance(reduced, str):
            yield reduced.encode()
            return
        build, args, *rest = reduced
        items = [list(part) if isinstance(part, Iterator) else part for part in rest]
        items[:1] = [without_caches(value, state) for state in items[:1]]
        if self._is_in_state:
            yield from self._tokens([build, args, *items])
            return
        if (
            type(value) not in self._checked
            and type(value).__module__.partition(".")[0] not in DATA_PACKAGES
        ):
            self._checked.add(type(value))
            # Twice: what two pickles of one object differ in differs between processes, too.
            first, second = (_Walk(self._addresses).digest(value) for _ in range(2))
            if first != second:
                warn_of_state(value)
        self._is_in_state = True
        yield from self._tokens([build, args, *items])
        self._is_in_state = False


def _hashed(tokens: Iterable[bytes]) -> str:
    """The SHA-256 of tokens, each prefixed by its length."""
    sha = hashlib.sha256()
    for token in tokens:
        sha.update(f"{len(token)}:".encode())
        sha.update(token)
    return sha.hexdigest()


def _module_tokens(name: str) -> Iterator[bytes]:
    """The tokens of a module: its name, and the source if it is the user's."""
    yield f"module={name}".encode()
    for user_module, source in sorted(user_modules(name).items()):
        yield f"{user_module}={source}".encode()


def _settings(wrapper: FunctionType) -> Iterator[Any]:
    """The arguments of a library's decorator that its wrapper holds as plain values."""
    for cell in wrapper.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            value = cell.cell_contents
            is_autocast = type(value).__module__ == "torch.amp.autocast_mode"
            if is_autocast or type(value) in (bool, int, float, str, bytes):
                yield value
