"""What makes up an object that is neither data nor code, nor counts by how it is pickled."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
import weakref
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any

#: What weak references lead to is somebody else's.
_WEAK = (weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_TYPING = frozenset({"typing", "typing_extensions"})
_TYPING_KINDS = frozenset("TypeVar ParamSpec TypeVarTuple NewType TypeAliasType ForwardRef".split())
#: What makes up objects of typing that pickle knows by their names alone.
_TYPING_PARTS = "__name__ __bound__ __constraints__ __supertype__ __value__ __forward_arg__".split()
#: Settings of ``torch.autocast``; the others are what it finds when it is entered.
_AUTOCAST_PARTS = "device fast_dtype _enabled _cache_enabled".split()


def components(value: Any) -> list[Any] | None:
    """The kind of an object and its parts; None where there is no rule for it."""
    if (of_library := _of_libraries(value)) is not None:
        return of_library
    if tokenize := getattr(type(value), "__dask_tokenize__", None):
        return ["token", tokenize(value)]
    match value:
        case PurePath():
            return [f"path={value}"]
        case MethodType():
            return ["method", value.__func__, value.__self__]
        case BuiltinFunctionType() | MethodWrapperType():
            name = f"builtin={getattr(value, '__module__', None)}:{value.__qualname__}"
            of = value.__self__  # such as the pattern of re.compile(...).match
            return [name] if of is None or isinstance(of, ModuleType) else [name, of]
        case functools.partial():
            return ["partial", value.func, value.args, value.keywords]
        case set() | frozenset():  # of a class of its own: pickle has the order of hashes
            return ["set", type(value), frozenset(value), getattr(value, "__dict__", None)]
        case functools.cached_property():
            return ["cached_property", value.func]
    if inspect.isdatadescriptor(value) or isinstance(value, (staticmethod, classmethod)):
        parts = [getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel")]
        return [type(value).__name__, parts if any(parts) else getattr(value, "__name__", "")]
    if isinstance(value, _WEAK):
        return [type(value).__qualname__]
    wrapped = inspect.getattr_static(value, "__wrapped__", None)
    # Such as a function with a cache.
    return [type(value).__qualname__, wrapped] if callable(wrapped) else None


def _of_libraries(value: Any) -> list[Any] | None:
    kind = type(value)
    if kind.__module__ in _TYPING and kind.__name__ in _TYPING_KINDS:
        return [kind.__qualname__, *(getattr(value, name, None) for name in _TYPING_PARTS)]
    if kind.__module__ == "torch" and kind.__name__ == "Tensor":
        return _tensor(value)
    if kind.__module__ == "torch.amp.autocast_mode":
        return [kind.__qualname__, *(getattr(value, name, None) for name in _AUTOCAST_PARTS)]
    filesystem: Any = getattr(sys.modules.get("fsspec"), "AbstractFileSystem", ())
    if isinstance(value, filesystem):
        # Its own token has the process and the thread in it.
        return ["filesystem", kind, value.storage_args, value.storage_options]
    if kind.__module__ == "numpy" and kind.__name__ == "ufunc":
        # NumPy gives no other way to the function that np.frompyfunc has made one of.
        functions = [part for part in gc.get_referents(value) if isinstance(part, FunctionType)]
        return ["ufunc", value.__name__, *functions]
    return None


def _tensor(tensor: Any) -> list[Any]:
    import torch  # it is imported: somebody made a tensor

    flat = tensor.detach().cpu().contiguous().flatten()
    of = f"tensor={tensor.dtype} {tuple(tensor.shape)}"
    return [of, flat.view(torch.uint8).numpy().tobytes()]


def owned_by_process() -> dict[int, str]:
    """Names of what belongs to the process, by id: environment, arguments, modules, import paths.

    They differ from one process of a job to the next, for instance by the id of a Slurm job. What
    can be hashed is left out: it does not change, and may be the value of something else, too.
    """
    return {
        id(held): f"{module.__name__}.{name}"
        for module in (os, sys)
        for name, held in vars(module).items()
        if not is_hashable(held)
    }


def is_hashable(value: Any) -> bool:
    return type(value).__hash__ is not None


def is_environment(value: Any) -> bool:
    """Whether a dict is a copy of the process's environment."""
    is_as_large = type(value) is dict and len(value) == len(os.environ) > 0
    return is_as_large and bool(value == os.environ)


def without_caches(value: Any, state: Any) -> Any:
    """An object's state as it is pickled, without the values that cached properties keep in it."""
    if isinstance(state, tuple) and len(state) == 2:  # with __slots__: (__dict__, slots)
        return tuple(without_caches(value, part) for part in state)
    if type(state) is not dict:
        return state
    kept = {name: held for name, held in state.items() if not _is_cached(type(value), name)}
    return kept or None  # as pickle has it of an object without attributes


def _is_cached(cls: type, name: Any) -> bool:
    member = inspect.getattr_static(cls, name, None) if isinstance(name, str) else None
    kind = type(member)
    return isinstance(member, functools.cached_property) or kind.__name__ == "cached_property"
