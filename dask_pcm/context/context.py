"""``Context``: the recipe of live, reusable state; ``ContextRef``: what a graph carries of it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NoReturn

from dask.utils import funcname, parse_bytes

from dask_pcm.arguments import check_arguments, check_loader
from dask_pcm.context.bundles import Bundle, bundle_of
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import RecipeError


@dataclass(frozen=True, slots=True)
class ContextRef:
    """What a task says of the context that it needs: numbers for the gate, bytes for the worker.

    Attributes
    ----------
    digest
        Identity of the recipe.
    name
        For people.
    device_memory_bytes
        Declared size on the device; None if it was not declared.
    is_exclusive
        Whether one task at a time may hold the live object.
    recipe
        The sealed ``Recipe``.
    about
        What people want to know of it, in pairs: a model's name and commit.
    bundles
        Files that the loader reads; a worker stages them first.
    parts
        What the digest is made of; stays with the client.
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
        return ContextRef, tuple(getattr(self, part.name) for part in fields(self)[:-1])

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.ContextRef", self.digest)


@dataclass(frozen=True, slots=True)
class Place:
    """Stands in a recipe's arguments for the path at which a bundle is staged."""

    bundle: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What builds a context, as a worker sees it; for each bundle an argument holds a ``Place``."""

    load: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    offload: Callable[[Any], Any] | None = None
    restore: Callable[[Any], Any] | None = None
    close: Callable[[Any], None] | None = None
    reattach: bool | None = None

    def build(self, places: Mapping[str, str] = MappingProxyType({})) -> Any:
        """Call the loader; `places` are the paths of bundles, by their digests."""
        args, kwargs = _replaced((self.args, dict(self.kwargs)), Place, lambda p: places[p.bundle])
        value = self.load(*args, **kwargs)
        if value is None or inspect.iscoroutine(value):
            raise RecipeError(
                f"The loader {funcname(self.load)} returned {value!r:.80}. It must return the live"
                " object: that is what functions get."
            )
        return value


class Context:
    """The recipe of something expensive that every worker builds once and keeps.

    Parameters
    ----------
    load
        Called on a worker as ``load(*args, **kwargs)``; returns anything but None: a torch module,
        an engine, an index. A class will do: its object is what functions get.
    *args, **kwargs
        Given to `load`; part of the recipe's identity.
    device_memory
        Bytes that the live object takes on its device, as a number or as text ("4 GiB").
    name
        How it is called in messages; the loader's name if left out.
    exclusive
        Whether only one task at a time may use the live object (the default). Pass False for
        objects that are safe to share between threads.
    files
        Local paths or URLs of files and folders that `load` reads. Each must be an argument as
        well: on a worker `load` gets the path at which it was staged instead. They count by names
        and content, not by where they lie.
    offload, restore, close
        Hooks that take the live object: to move it off the device, back on it (one does not go
        without the other), and to end it.
    reattach
        Whether a worker process may put together again what an earlier one has built (on CPUs: or
        a neighbour), instead of calling `load`. By default where that is a torch module, tensors,
        arrays, an object of transformers, or a container of such, and there are no hooks. Say False
        where `load` does more than to return it; True for a class of your own that can be pickled.

    Raises
    ------
    RecipeError
        Where the recipe cannot be pickled or identified, the loader cannot be called with these
        arguments, no argument is one of `files`, or another parameter is nothing that it could be;
        here, not when a task runs.
    InputError
        Where one of `files` is missing.

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
        name = name or funcname(load)
        bundles = tuple(f if isinstance(f, Bundle) else bundle_of(f) for f in _several(files))
        args, kwargs = _placed(args, kwargs, bundles)
        check_arguments(load, args, kwargs, "Context", _OPTIONS)
        recipe = Recipe(load, args, kwargs, offload, restore, close, reattach)
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
        object.__setattr__(self, "ref", ref)

    @property
    def digest(self) -> str:
        """Identity of the recipe: equal across processes, kernels and clients."""
        return self.ref.digest

    @property
    def name(self) -> str:
        return self.ref.name

    @property
    def device_memory_bytes(self) -> int | None:
        return self.ref.device_memory_bytes

    def _refuse_use(self, *args: Any) -> NoReturn:
        raise RecipeError(self._is_not_live())

    # What people do with live objects, where they have the recipe of one in their hands.
    __call__ = __getitem__ = __enter__ = __exit__ = _refuse_use

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"No attribute {name!r}. {self._is_not_live()}")

    @classmethod
    def _is_not_live(cls) -> str:
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
        slots = (name for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ()))
        return {name: getattr(self, name) for name in slots}

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.Context", self.digest)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.digest[:8]}>"


_OPTIONS = tuple(inspect.signature(Context).parameters)


def _revive(cls: type[Context], state: dict[str, Any]) -> Context:
    context = cls.__new__(cls)
    for name, value in state.items():
        object.__setattr__(context, name, value)
    return context


def _check_hooks(**hooks: Any) -> None:
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise RecipeError(
                f"{name} is a hook of Context: a function that takes the live object; found"
                f" {hook!r:.80}."
            )
    if (hooks["offload"] is None) != (hooks["restore"] is None):
        given, lacking = sorted(("offload", "restore"), key=lambda name: hooks[name] is None)
        raise RecipeError(
            f"{given} is given and {lacking} is not: what one hook moves off the device the other"
            " has to move back. Give both, or none and let the tensors be moved."
        )


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice for choice in choices):
        raise RecipeError(
            f"{name} must be one of {', '.join(map(repr, choices))}; found {value!r:.80}."
        )


def _several(files: Any) -> Sequence[Any]:
    if isinstance(files, (str, os.PathLike, Bundle)):
        return (files,)
    return tuple(files)


def _placed(args: Any, kwargs: Any, bundles: Sequence[Bundle]) -> Any:
    """Arguments with a ``Place`` wherever the path of a bundle stands."""
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
            " know where it was staged. Write Context(load, path, files=[path]): load gets the path"
            " on its worker."
        )
    return placed


def _replaced(value: Any, kind: Any, replace: Callable[[Any], Any]) -> Any:
    """`value` with everything of a kind replaced, in lists, tuples and dicts too."""
    if isinstance(value, kind):
        return replace(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, kind, replace) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, kind, replace) for key, item in value.items()}
    return value


def _bytes(size: int | str) -> int:
    try:
        n_bytes = -1 if isinstance(size, bool) else int(parse_bytes(size))
    except Exception:  # Dask's parser raises a bit of everything
        n_bytes = -1
    if n_bytes < 0:
        raise RecipeError(
            f"device_memory must be a size in bytes, for instance '4 GiB', and not negative; found"
            f" {size!r:.80}."
        )
    return n_bytes
