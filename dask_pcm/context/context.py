"""``Context`` is the recipe of live, reusable state; graphs carry its ``ContextRef``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NoReturn

from dask.utils import funcname, parse_bytes

from dask_pcm.arguments import check_arguments, check_loader, check_reserved
from dask_pcm.context.bundles import Bundle, bundle_of
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import RecipeError


@dataclass(frozen=True, slots=True)
class ContextRef:
    """A task's reference to a context: numbers for the gate, a sealed recipe for the worker.

    Attributes
    ----------
    digest
        The recipe's digest.
    name
        For messages.
    device_memory_bytes
        Declared size on the device; None if it was not declared.
    is_exclusive
        Whether one task at a time may hold the live object.
    recipe
        The sealed ``Recipe``.
    about
        Pairs of names and values for reports, such as a model's name and commit.
    bundles
        Files that the loader reads; a worker stages them first.
    parts
        Digests of the recipe's parts; not pickled, so they stay with the client.
    """

    digest: str
    name: str
    device_memory_bytes: int | None
    is_exclusive: bool
    recipe: bytes = field(repr=False)
    about: tuple[tuple[str, str], ...] = ()
    bundles: tuple[Bundle, ...] = field(default=(), repr=False)
    parts: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without `parts`, the last field: every task carries a ref, and only the client needs them.
        return ContextRef, tuple(getattr(self, part.name) for part in fields(self)[:-1])

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.ContextRef", self.digest)


@dataclass(frozen=True, slots=True)
class Place:
    """A placeholder in a recipe's arguments for the path at which a bundle is staged."""

    bundle: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A loader with its arguments and hooks; paths of bundles are replaced by ``Place``."""

    load: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    offload: Callable[[Any], Any] | None = None
    restore: Callable[[Any], Any] | None = None
    close: Callable[[Any], None] | None = None
    reattach: bool | None = None

    def build(self, places: Mapping[str, str] = MappingProxyType({})) -> Any:
        """Call the loader, on a worker; `places` are the staged paths of bundles, by digest.

        Raises
        ------
        RecipeError
            If the loader returns None or a coroutine.
        BaseException
            Anything that the loader raises.
        """
        args, kwargs = _replaced((self.args, dict(self.kwargs)), Place, lambda p: places[p.bundle])
        value = self.load(*args, **kwargs)
        if value is None or inspect.iscoroutine(value):
            raise RecipeError(
                f"The loader {funcname(self.load)} returned {value!r:.80}. It must return the live"
                " object, which functions get as an argument."
            )
        return value


class Context:
    """The recipe of an expensive object that each worker builds once and keeps.

    Parameters
    ----------
    load
        Called on a worker as ``load(*args, **kwargs)``. Returns the live object, which may be
        anything but None: a torch module, an engine, an index. It may be a class.
    *args, **kwargs
        Arguments of `load`; part of the recipe's identity.
    device_memory
        Bytes that the live object takes on its device, as a number or as text ("4 GiB").
    name
        Its name in messages; the loader's name if left out.
    exclusive
        Whether only one task at a time may use the live object (the default). Pass False for
        objects that are safe to share between threads.
    files
        Local paths or URLs of files and folders that `load` reads. Each must be an argument as
        well: on a worker, `load` gets the path at which it was staged instead. Files are identified
        by name and content, not by location.
    offload, restore, close
        Hooks that are called with the live object: to move it off the device, to move it back, and
        to close it. `offload` and `restore` must be given together.
    reattach
        Whether a worker process may restore the object that an earlier process built (on CPUs: or
        another process of the host), instead of calling `load`. By default True for torch modules,
        tensors, arrays, objects of transformers and containers of these, if there are no hooks. Set
        False if `load` has side effects, True for a class of your own that can be pickled.

    Raises
    ------
    RecipeError
        If the recipe cannot be pickled or identified, if the loader cannot be called with these
        arguments, if one of `files` is not an argument, or if a parameter has an invalid value.
        Raised here, not when a task runs.
    InputError
        If one of `files` is missing.

    Examples
    --------
    >>> def load(path):
    ...     return {"weights": path}
    >>> llm = Context(load, "models/smollm2", device_memory="4 GiB")
    >>> llm.name, llm.device_memory_bytes
    ('load', 4294967296)
    >>> llm == Context(load, "models/smollm2", name="another name")
    True

    A class whose ``__init__`` does the work:

    >>> class Matcher:
    ...     def __init__(self, words):
    ...         self.words = frozenset(words)
    ...     def __call__(self, text):
    ...         return bool(self.words & set(text.split()))
    >>> from dask_pcm import acquire
    >>> with acquire(Context(Matcher, ["tennis"])) as matcher:
    ...     matcher("she played tennis")
    True
    """

    __slots__ = ("ref",)
    ref: ContextRef

    def __init__(
        self,
        load: Callable[..., Any],
        *args: Any,
        device_memory: int | str | None = None,
        name: str | None = None,
        exclusive: bool = True,
        files: Sequence[str | os.PathLike[str] | Bundle] = (),
        offload: Callable[[Any], Any] | None = None,
        restore: Callable[[Any], Any] | None = None,
        close: Callable[[Any], None] | None = None,
        reattach: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(load, Context):
            raise RecipeError(
                f"{load!r} is a Context already: use it as it is, with context=... in"
                " map_partitions, or acquire it in tasks of your own."
            )
        check_loader(load)
        _check_hooks(offload=offload, restore=restore, close=close)
        _check_choice("exclusive", exclusive, (True, False))
        _check_choice("reattach", reattach, (True, False, None))
        given = {
            "device_memory": device_memory is not None,
            "name": name is not None,
            "exclusive": not exclusive,
            "files": bool(files),
            "offload": offload is not None,
            "restore": restore is not None,
            "close": close is not None,
            "reattach": reattach is not None,
        }
        check_reserved(load, args, [option for option, is_given in given.items() if is_given])
        name = name or funcname(load)
        bundles = tuple(f if isinstance(f, Bundle) else bundle_of(f) for f in _several(files))
        args, kwargs = _placed(args, kwargs, bundles)
        check_arguments(load, args, kwargs, "Context", _OPTIONS)
        recipe = Recipe(load, args, kwargs, offload, restore, close, reattach)
        # Without the name, the memory and `reattach`: these do not change the object that is built.
        identity = (load, args, kwargs, offload, restore, close)
        sealed = Sealed.of(recipe, f"The recipe of context {name!r}", identity)
        memory = None if device_memory is None else _bytes(device_memory)
        ref = ContextRef(
            sealed.digest,
            name,
            memory,
            exclusive,
            sealed.payload,
            bundles=bundles,
            parts=sealed.parts,
        )
        # A context is hashed by its digest, so it is immutable from here on.
        object.__setattr__(self, "ref", ref)

    @property
    def digest(self) -> str:
        """The recipe's digest, equal across processes, kernels and clients."""
        return self.ref.digest

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.ref.name

    @property
    def device_memory_bytes(self) -> int | None:
        """Declared size on the device; None if it was not declared."""
        return self.ref.device_memory_bytes

    def _refuse_use(self, *args: Any) -> NoReturn:
        """Raise RecipeError: the recipe was used like the live object."""
        raise RecipeError(self._is_not_live())

    # Common uses of live objects: without these, the error would not say what is wrong.
    __call__ = __getitem__ = __enter__ = __exit__ = _refuse_use

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"No attribute {name!r}. {self._is_not_live()}")

    @classmethod
    def _is_not_live(cls) -> str:
        """The message for a recipe that is used like the live object."""
        return (
            f"This {cls.__name__} is the recipe of a live object, not the object. Use"
            " dask_pcm.map_partitions(func, ddf, context=..., meta=...), which gives the function"
            " the live object; or, in a task of your own (Dask's map_partitions, client.map), write"
            " with dask_pcm.acquire(context) as live: and use that."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; make a new one to change {name}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self), self._state())

    def _state(self) -> dict[str, Any]:
        """All slots, those of subclasses too."""
        slots = (name for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ()))
        return {name: getattr(self, name) for name in slots}

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.Context", self.digest)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.digest[:8]}>"


_OPTIONS = tuple(inspect.signature(Context).parameters)


def _revive(cls: type[Context], state: dict[str, Any]) -> Context:
    """Unpickle a context without digesting its recipe again."""
    context = cls.__new__(cls)
    for name, value in state.items():
        object.__setattr__(context, name, value)
    return context


def _check_hooks(**hooks: Any) -> None:
    """Raise RecipeError for hooks that cannot be called, or one of a pair alone."""
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise RecipeError(
                f"{name} is a hook of Context: a function that takes the live object; found"
                f" {hook!r:.80}."
            )
    if (hooks["offload"] is None) != (hooks["restore"] is None):
        given, lacking = sorted(("offload", "restore"), key=lambda name: hooks[name] is None)
        raise RecipeError(
            f"{given} is given and {lacking} is not, but restore has to move back what offload"
            " moves off the device. Give both; or neither, and the tensors are moved for you."
        )


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise RecipeError for a value that is not one of the choices, by identity."""
    if not any(value is choice for choice in choices):
        raise RecipeError(
            f"{name} must be one of {', '.join(map(repr, choices))}; found {value!r:.80}."
        )


def _several(files: Any) -> Sequence[Any]:
    """`files` as a sequence; a single path is accepted, too."""
    if isinstance(files, (str, os.PathLike, Bundle)):
        return (files,)
    return tuple(files)


def _placed(args: Any, kwargs: Any, bundles: Sequence[Bundle]) -> Any:
    """Replace the paths of bundles in the arguments by ``Place``."""
    places = {bundle.given: Place(bundle.digest) for bundle in bundles}
    found = set()

    def place(path: str | os.PathLike[str]) -> Any:
        at = places.get(os.fspath(path))
        found.add(os.fspath(path))
        return path if at is None else at

    placed = _replaced((args, kwargs), (str, os.PathLike), place)
    if missing := places.keys() - found:
        raise RecipeError(
            f"files names {min(missing)!r}, but it is no argument of the loader, which would not"
            " know where it was staged. Write Context(load, path, files=[path]): load then gets the"
            " staged path."
        )
    return placed


def _replaced(value: Any, kind: Any, replace: Callable[[Any], Any]) -> Any:
    """Replace all instances of `kind` in `value`, and in lists, tuples and dicts in it."""
    if isinstance(value, kind):
        return replace(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, kind, replace) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, kind, replace) for key, item in value.items()}
    return value


def _bytes(size: int | str) -> int:
    """Parse a size; raises RecipeError if it is invalid."""
    try:
        n_bytes = -1 if isinstance(size, bool) else int(parse_bytes(size))
    except Exception:  # Dask's parser raises errors of several types
        n_bytes = -1
    if n_bytes < 0:
        raise RecipeError(
            f"device_memory must be a size in bytes, for instance '4 GiB', and not negative; found"
            f" {size!r:.80}."
        )
    return n_bytes
