"""Sealed values pass the scheduler as bytes, without being unpickled there."""

from __future__ import annotations

import functools
import io
import pickle
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import cloudpickle

from dask_pcm.context.identity.digest import identify
from dask_pcm.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Sealed:
    """A pickled value, identified by the digest of the value rather than of its bytes.

    The scheduler deserialises every graph. A sealed value stays bytes there, so the scheduler needs
    neither the user's modules nor torch. Pickles of one value may differ between processes; its
    `digest` does not. `parts`, the digest's parts, are not pickled: they stay with the client.
    """

    digest: str
    payload: bytes = field(repr=False)
    parts: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Sealed, (self.digest, self.payload)

    @classmethod
    def of(cls, value: Any, what: str, identity: Any = None) -> Sealed:
        """Seal `value`; `what` names it in errors, `identity` replaces it in the digest."""
        try:
            payload = _pickled(value)
        except Exception as error:
            raise RecipeError(
                f"{what} cannot be pickled, so no worker could receive it: {error}. Create open"
                " files, locks, connections and models inside the function instead of outside it."
            ) from error
        found = identify(value if identity is None else identity)
        return cls(found.digest, payload, found.parts)

    def open(self) -> Any:
        """Unpickle the value; equal bytes are unpickled once per process.

        Raises
        ------
        RecipeError
            If a module that the value needs cannot be imported.
        """
        return _unpickle(self.payload)

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.Sealed", self.digest)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc] # its types are not shipped
    """A pickler that also pickles cached properties, which hold a lock before Python 3.12."""

    dispatch_table: ClassVar[Any] = ChainMap(
        {
            functools.cached_property: lambda value: (
                functools.cached_property,
                (value.func,),
                {"attrname": value.attrname},
            )
        },
        cloudpickle.Pickler.dispatch_table,
    )


def _pickled(value: Any) -> bytes:
    """Pickle a value, functions and classes of the notebook by value."""
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


@functools.lru_cache(maxsize=256)
def _unpickle(payload: bytes) -> Any:
    """Unpickle bytes; cached, since every task of a graph carries the same recipe."""
    try:
        return pickle.loads(payload)
    except ImportError as error:
        raise RecipeError(
            f"A function or an argument lives in a module that this worker cannot import"
            f" ({error}). Define it in the notebook, install the module on the workers, send it"
            " with client.upload_file(...), or call cloudpickle.register_pickle_by_value(module)."
        ) from error
