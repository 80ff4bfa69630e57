"""Digests of functions and values that are equal across processes, kernels and machines.

A function counts by what it does: bytecode, constants, defaults, closure and the globals that it
refers to. Where it was written (file, line, cell) does not count, and neither do pickle's bytes,
which differ between two kernels for the same source. Whatever is installed (the standard
library, site-packages) counts by its name alone.

Digests of functions depend on the minor version of Python, as bytecode does.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dis
import functools
import hashlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any

import cloudpickle

from dask_pcm.errors import RecipeError

#: Attributes of a class that say where it was written, or that every class has.
_INCIDENTAL = frozenset(
    "__module__ __doc__ __dict__ __weakref__ __firstlineno__ __static_attributes__ "
    "__annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__abstractmethods__ _abc_impl __dataclass_fields__ __match_args__".split()
)
#: Instructions that look a name up among the globals; the others stand in class bodies.
_GLOBAL_LOADS = frozenset("LOAD_GLOBAL LOAD_NAME LOAD_CLASSDEREF LOAD_FROM_DICT_OR_GLOBALS".split())
_INSTALLED_FOLDERS = tuple(
    {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    | {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
)
#: Counted by name wherever they lie: this package and the frameworks of a notebook.
_INSTALLED_PACKAGES = frozenset({"dask_pcm", "dask", "distributed", "builtins"})


def digest(*values: Any) -> str:
    """Return 32 hexadecimal digits that identify `values`.

    Raises
    ------
    RecipeError
        Where a value can be neither walked nor reduced as ``pickle`` does.

    Examples
    --------
    >>> digest(lambda x: x + 1) == digest(lambda x: x + 1)
    True
    >>> digest(lambda x: x + 1) == digest(lambda x: x + 2)
    False
    """
    return _Walk().digest(values)


class _Walk:
    """One traversal; objects that contain themselves are met again as back-references."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # ids stay unique while we hold the objects
        self._is_strict = True
        # Digests of data without functions of the user's or back-references inside, by id.
        self._plain: dict[int, bytes] = {}
        self._n_references = 0

    def digest(self, value: Any) -> str:
        sha = hashlib.sha256()
        for token in self._tokens(value):
            sha.update(f"{len(token)}:".encode())
            sha.update(token)
        return sha.hexdigest()[:32]

    def _tokens(self, value: Any) -> Iterator[bytes]:
        if type(value) in (bool, int, float, complex, str, type(None)):
            yield f"{type(value).__name__}={value!r}".encode()
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
            self._n_references += 1  # where it is met again it is a back-reference
        else:
            # Met again, data is the same again: whether two equal values are one object depends
            # on how the code was compiled. Only what contains itself is a back-reference.
            del self._seen[id(value)]
        if self._n_references == n_before:
            self._alive.append(value)
            self._plain[id(value)] = hashlib.sha256(b"|".join(tokens)).digest()
            yield self._plain[id(value)]
        else:
            yield from tokens

    def _compound(self, value: Any) -> Iterator[bytes]:
        match value:
            case tuple() | list() if type(value) in (tuple, list):
                yield f"{type(value).__name__}={len(value)}".encode()
                for item in value:
                    yield from self._tokens(item)
            case dict() if type(value) is dict:
                yield from self._mapping("dict", value)
            case set() | frozenset():
                yield f"set={len(value)}".encode()
                yield from sorted(digest(item).encode() for item in value)
            case PurePath():
                yield f"path={value}".encode()
            case CodeType():
                yield from self._code(value)
            case FunctionType():
                yield from self._function(value)
            case MethodType():
                yield b"method"
                yield from self._tokens([value.__func__, value.__self__])
            case ModuleType():
                yield from self._module(value.__name__)
            case type():
                yield from self._class(value)
            case functools.partial():
                yield b"partial"
                yield from self._tokens([value.func, value.args, value.keywords])
            case functools.cached_property():
                yield b"cached_property"
                yield from self._tokens(value.func)
            case _:
                yield from self._object(value)

    def _mapping(self, name: str, value: Mapping[Any, Any]) -> Iterator[bytes]:
        yield f"{name}={len(value)}".encode()
        for _, key in sorted((digest(key), key) for key in value):
            yield from self._tokens(key)
            yield from self._tokens(value[key])

    def _function(self, func: FunctionType) -> Iterator[bytes]:
        if _is_installed(func.__module__) and "<locals>" not in func.__qualname__:
            yield f"function={func.__module__}:{func.__qualname__}".encode()
            return
        yield b"function"
        yield from self._code(func.__code__)
        yield from self._tokens([func.__defaults__, func.__kwdefaults__])
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
            yield f"closure={name}".encode()
            yield from self._cell(cell)
        for name, value in _referenced(func):
            yield f"global={name}".encode()
            yield from self._global(value)
        yield from self._tokens(dict(vars(func)))  # attributes; __wrapped__ among them

    def _global(self, value: Any) -> Iterator[bytes]:
        """A module's locks, loggers and open files are no part of what its functions do."""
        was_strict, self._is_strict = self._is_strict, False
        yield from self._tokens(value)
        self._is_strict = was_strict

    def _cell(self, cell: Any) -> Iterator[bytes]:
        try:
            yield from self._tokens(cell.cell_contents)
        except ValueError:
            yield b"empty"

    def _code(self, code: CodeType) -> Iterator[bytes]:
        yield b"code"
        yield code.co_code
        yield code.co_exceptiontable
        signature = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        yield repr((signature, code.co_flags, code.co_names, code.co_varnames)).encode()
        yield repr((code.co_freevars, code.co_cellvars)).encode()
        for constant in code.co_consts:
            yield from self._tokens(constant)
        for name in _imported(code):
            yield from self._module(name)

    def _module(self, name: str) -> Iterator[bytes]:
        yield f"module={name}".encode()
        for user_module, source in sorted(_user_modules(name).items()):
            yield f"{user_module}={source}".encode()

    def _class(self, cls: type) -> Iterator[bytes]:
        yield f"class={cls.__qualname__}".encode()
        if _is_installed(cls.__module__) and "<locals>" not in cls.__qualname__:
            yield cls.__module__.encode()
            return
        yield from self._tokens(cls.__bases__)
        own = {name: value for name, value in vars(cls).items() if name not in _INCIDENTAL}
        yield from self._mapping("body", own)

    def _object(self, value: Any) -> Iterator[bytes]:
        if tokenize := getattr(type(value), "__dask_tokenize__", None):
            yield b"token"
            yield from self._tokens(tokenize(value))
            return
        if inspect.isdatadescriptor(value) or isinstance(value, (staticmethod, classmethod)):
            parts = [getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel")]
            yield type(value).__name__.encode()
            yield from self._tokens(parts if any(parts) else getattr(value, "__name__", ""))
            return
        if isinstance(value, BuiltinFunctionType):
            yield f"builtin={value.__module__}:{value.__qualname__}".encode()
            return
        if type(value).__module__ == "torch" and type(value).__name__ == "Tensor":
            yield from self._tensor(value)
            return
        if not isinstance(value, type) and callable(wrapped := getattr(value, "__wrapped__", None)):
            yield type(value).__qualname__.encode()  # such as a function with a cache
            yield from self._tokens(wrapped)
            return
        reduce = cloudpickle.CloudPickler.dispatch_table.get(type(value))
        try:
            reduced = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:
            if not self._is_strict:
                yield f"opaque={type(value).__qualname__}".encode()
                return
            raise RecipeError(
                f"Cannot identify {type(value).__qualname__} object {value!r:.80}: it can be"
                f" neither walked nor pickled ({error}). Build it inside the loader instead, or"
                " give its class a __dask_tokenize__ method that returns what makes it up."
            ) from error
        yield b"object"
        if isinstance(reduced, str):
            yield reduced.encode()
        else:
            build, args, *rest = reduced
            items = [list(part) if isinstance(part, Iterator) else part for part in rest]
            yield from self._tokens([build, args, *items])

    def _tensor(self, tensor: Any) -> Iterator[bytes]:
        import torch  # it is imported: somebody made a tensor

        yield f"tensor={tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _referenced(func: FunctionType) -> Iterator[tuple[str, Any]]:
    """Globals that `func` and the functions inside it refer to, by name, builtins left out."""
    names: set[str] = set()
    todo = [func.__code__]
    while todo:
        code = todo.pop()
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        names |= {i.argval for i in dis.get_instructions(code) if i.opname in _GLOBAL_LOADS}
    for name in sorted(names):
        if name in func.__globals__:
            yield name, func.__globals__[name]
        elif not hasattr(builtins, name):
            yield name, None


def _imported(code: CodeType) -> list[str]:
    """Modules that a function imports in its body; what it takes from them may be one as well."""
    names: set[str] = set()
    module = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            module = instruction.argval
            names.add(module)
        elif instruction.opname == "IMPORT_FROM":
            names.add(f"{module}.{instruction.argval}")
    return sorted(name for name in names if not _is_installed(name) and _origin(name))


@functools.lru_cache(maxsize=4096)
def _is_installed(module: str | None) -> bool:
    if module is None or module == "__main__":
        return False
    if module.partition(".")[0] in _INSTALLED_PACKAGES:
        return True
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return False
    if spec is None:
        return False
    if spec.origin in (None, "built-in", "frozen"):
        return spec.origin is not None
    path = Path(str(spec.origin)).resolve()
    return any(path.is_relative_to(folder) for folder in _INSTALLED_FOLDERS)


def _user_modules(name: str) -> dict[str, str]:
    """Digests of a user's module and of the users' modules that it imports, and so on."""
    found: dict[str, str] = {}
    todo = [name]
    while todo:
        module = todo.pop()
        if module in found or _is_installed(module) or (path := _origin(module)) is None:
            continue
        status = path.stat()
        found[module], imports = _parsed(str(path), status.st_mtime_ns, status.st_size)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for imported in imports:
            with contextlib.suppress(ImportError):  # a relative import beyond the top
                todo.append(importlib.util.resolve_name(imported, package))
    return found


def _origin(module: str) -> Path | None:
    """The source file of a module; None if there is no such module, or no source of it."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # finding a submodule imports its package, which may raise anything
        return None
    is_source = spec is not None and spec.has_location and str(spec.origin).endswith(".py")
    return Path(str(spec.origin)) if spec is not None and is_source else None


@functools.lru_cache(maxsize=4096)
def _parsed(path: str, modified_ns: int, size: int) -> tuple[str, tuple[str, ...]]:
    """Digest of a source file without its comments and lines, and the modules it may import."""
    tree = ast.parse(Path(path).read_bytes())
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            joint = "" if start.endswith(".") else "."
            imports += [start, *(f"{start}{joint}{alias.name}" for alias in node.names)]
    dump = ast.dump(tree).encode()
    named = tuple(name for name in imports if name.strip("."))
    return hashlib.sha256(dump).hexdigest()[:32], named
