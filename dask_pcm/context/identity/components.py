"""Objects with a rule of their own: the parts that identify them, instead of their pickle."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
import weakref
from concurrent.futures import Executor
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any

#: Weak references count by their type alone: their targets belong to other objects.
_WEAK = (weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
#: Modules of objects that are no part of what is computed: they count by their type alone.
_TOOLS = frozenset(
    "_asyncio _io _queue _socket _thread asyncio concurrent io logging multiprocessing queue select"
    " socket ssl tempfile threading weakref".split()
)
_TYPING = frozenset({"typing", "typing_extensions"})
_TYPING_KINDS = frozenset("TypeVar ParamSpec TypeVarTuple NewType TypeAliasType ForwardRef".split())
#: The parts of typing objects, which pickle stores by name only.
_TYPING_PARTS = "__name__ __bound__ __constraints__ __supertype__ __value__ __forward_arg__".split()
#: The settings of ``torch.autocast``; its other attributes are the state when it was entered.
_AUTOCAST_PARTS = "device fast_dtype _enabled _cache_enabled".split()


def components(value: Any) -> list[Any] | None:
    """The kind and the parts of an object; None if there is no rule for it."""
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
        case set() | frozenset():  # a subclass: its pickle has the order of hashes
            return ["set", type(value), frozenset(value), getattr(value, "__dict__", None)]
        case functools.cached_property():
            return ["cached_property", value.func]
    if inspect.isdatadescriptor(value) or isinstance(value, (staticmethod, classmethod)):
        parts = [getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel")]
        return [type(value).__name__, parts if any(parts) else getattr(value, "__name__", "")]
    if isinstance(value, (*_WEAK, Executor)):  # a pool's state is what it has done so far
        return [type(value).__qualname__]
    wrapped = inspect.getattr_static(value, "__wrapped__", None)
    # Such as a function with a cache.
    return [type(value).__qualname__, wrapped] if callable(wrapped) else None


def _of_libraries(value: Any) -> list[Any] | None:
    """As ``components``, for objects of known libraries."""
    kind = type(value)
    if kind.__module__ in _TYPING and kind.__name__ in _TYPING_KINDS:
        return [kind.__qualname__, *(getattr(value, name, None) for name in _TYPING_PARTS)]
    if kind.__module__ == "torch" and kind.__name__ == "Tensor":
        return _tensor(value)
    if kind.__module__ == "torch.amp.autocast_mode":
        return [kind.__qualname__, *(getattr(value, name, None) for name in _AUTOCAST_PARTS)]
    if kind.__module__.startswith("torch.jit") and isinstance(getattr(value, "code", None), str):
        return [kind.__qualname__, value.code]
    filesystem: Any = getattr(sys.modules.get("fsspec"), "AbstractFileSystem", ())
    if isinstance(value, filesystem):
        # fsspec's own token contains the process and the thread.
        return ["filesystem", kind, value.storage_args, value.storage_options]
    if kind.__module__ == "numpy" and kind.__name__ == "ufunc":
        # NumPy has no other access to the function behind a ufunc of np.frompyfunc.
        functions = [part for part in gc.get_referents(value) if isinstance(part, FunctionType)]
        return ["ufunc", value.__name__, *functions]
    return None


def _tensor(tensor: Any) -> list[Any]:
    """The dtype, shape and bytes of a tensor."""
    import torch  # imported already, since there is a tensor

    flat = tensor.detach().cpu().contiguous().flatten()
    of = f"tensor={tensor.dtype} {tuple(tensor.shape)}"
    return [of, flat.view(torch.uint8).numpy().tobytes()]


def is_tool(value: Any) -> bool:
    """Whether an object, such as a lock or an open file, says nothing of what is computed."""
    return type(value).__module__.partition(".")[0] in _TOOLS


def owned_by_process() -> dict[int, str]:
    """Objects of ``os`` and ``sys`` describing the process, by id: environment, paths, arguments.

    They differ between processes, for instance in the id of a Slurm job, so they count by name.
    Hashable objects are left out: they are immutable, and may be the value of another name too.
    """
    return {
        id(held): f"{module.__name__}.{name}"
        for module in (os, sys)
        for name, held in vars(module).items()
        if not is_hashable(held)
    }


def is_hashable(value: Any) -> bool:
    """Whether the type of a value is hashable."""
    return type(value).__hash__ is not None


def is_environment(value: Any) -> bool:
    """Whether a dict is a copy of the process's environment."""
    is_as_large = type(value) is dict and len(value) == len(os.environ) > 0
    return is_as_large and bool(value == os.environ)


def without_caches(value: Any, state: Any) -> Any:
    """An object's pickled state without the cached values of its cached properties."""
    if isinstance(state, tuple) and len(state) == 2:  # with __slots__: (__dict__, slots)
        return tuple(without_caches(value, part) for part in state)
    if type(state) is not dict:
        return state
    kept = {name: held for name, held in state.items() if not _is_cached(type(value), name)}
    return kept or None  # like the state of an object without attributes


def _is_cached(cls: type, name: Any) -> bool:
    """Whether a name is that of a cached property."""
    member = inspect.getattr_static(cls, name, None) if isinstance(name, str) else None
    kind = type(member)
    return isinstance(member, functools.cached_property) or kind.__name__ == "cached_property"
