"""Live objects taken apart, and put together again.

An object is taken apart by pickling it: what pickle would write of storages and of large buffers
goes elsewhere (``Frozen``), and what remains, small, is its skeleton. So whatever can be pickled
can leave its device, and its process, with all identities and ties among its tensors.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import cloudpickle

if TYPE_CHECKING:
    import torch

    Storage: TypeAlias = torch.UntypedStorage

#: Smaller buffers than this stay in the skeleton.
_LEAST_BYTES = 4096
#: More than this besides tensors and arrays is not taken apart: it would take long.
_MAX_SKELETON_BYTES = 64 << 20
#: How far modules are looked for in what an object holds.
_MAX_DEPTH, _MAX_HELD = 4, 1_000
#: References to an object that its entry in a list, and looking at it, make.
_LOOKING = 2


class Owners:
    """Whether anybody else has what an object is made of, by counting references.

    What a task has returned, another object or a cache may be a part of it, or a view of it: then
    its tensors are not to be emptied.

    Parameters
    ----------
    inside
        Tensors and modules, and how many references to each there are within the object.
    storages
        Of all its tensors.
    """

    def __init__(self, inside: Sequence[tuple[Any, int]], storages: Sequence[Storage]) -> None:
        self._inside = list(inside)
        self._storages = list(storages)
        self._n_users = _n_users(self._storages)
        self._n_changes = self._count_changes()

    @property
    def is_unshared(self) -> bool:
        """Whether the object is its parts' only owner."""
        has_more = any(sys.getrefcount(entry[0]) - _LOOKING > entry[1] for entry in self._inside)
        return not has_more and _n_users(self._storages) <= self._n_users

    @property
    def is_unchanged(self) -> bool:
        """Whether no tensor has been written to since, as far as torch tells."""
        return self._count_changes() == self._n_changes

    def _count_changes(self) -> int:
        torch, total = sys.modules.get("torch"), 0
        for entry in self._inside:
            if torch is not None and isinstance(entry[0], torch.Tensor):
                with contextlib.suppress(RuntimeError):  # those of inference mode do not count
                    total += entry[0]._version
        return total


@dataclass(frozen=True, slots=True)
class Frozen:
    """A live object taken apart.

    Attributes
    ----------
    skeleton
        What pickle wrote; None where the object cannot be put together again.
    storages
        Of its tensors, each once, wherever they are; the object still uses them.
    buffers
        Of arrays and the like.
    owners
        Tells whether anybody else has a part of it.
    """

    skeleton: bytes | None
    storages: list[Storage] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)
    owners: Owners | None = None

    @property
    def is_on_device(self) -> bool:
        """Whether some of it is on an accelerator."""
        return any(storage.device.type != "cpu" for storage in self.storages)

    @property
    def n_bytes(self) -> int:
        """Bytes besides the skeleton."""
        buffers = sum(buffer.nbytes for buffer in self.buffers)
        return buffers + sum(storage.nbytes() for storage in self.storages)


def freeze(value: Any) -> Frozen:
    """Take an object apart; it stays as it is.

    Raises
    ------
    Exception
        Whatever pickle, or the object's own way to be pickled, raises; also where there is too
        much besides tensors and arrays.
    """
    file, buffers = _Limited(), _Buffers()
    freezer = _Freezer(file, buffers)
    try:
        freezer.dump(value)
    finally:
        freezer.clear_memo()  # it holds whatever the object was pickled by, aliases of tensors too
    inside = [visited for visited in freezer.visits.values() if _is_part(visited)]
    freezer.visits.clear()
    owners = Owners(inside, freezer.storages)
    return Frozen(file.getvalue(), freezer.storages, buffers.taken, owners)


def thaw(skeleton: bytes, storages: Sequence[Storage], buffers: Sequence[memoryview]) -> Any:
    """Put an object together again, on other storages and buffers."""
    return _Thawer(skeleton, storages, buffers).load()


class _Limited(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > _MAX_SKELETON_BYTES:
            raise ValueError("it holds too much that is neither tensor nor array")
        return super().write(data)


class _Buffers:
    """Takes up large buffers; apart from the pickler, which would hold itself alive."""

    def __init__(self) -> None:
        self.taken: list[memoryview] = []

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < _LEAST_BYTES:
            return True
        self.taken.append(raw)
        return False


class _Freezer(cloudpickle.Pickler):  # type: ignore[misc] # its types are not shipped
    def __init__(self, file: io.BytesIO, buffers: _Buffers) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers)
        self.storages: list[Storage] = []
        #: Tensors and modules, and how often they were met: once for each reference to them.
        self.visits: dict[int, tuple[Any, int]] = {}
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy is not None and isinstance(obj, numpy.memmap):
            raise ValueError("it maps a file, which is better read where it is")
        if torch is None:
            return None
        if isinstance(obj, torch.UntypedStorage):
            return self._number(obj), None
        if isinstance(obj, torch.storage.TypedStorage):
            return self._number(obj._untyped_storage), obj.dtype
        if not self.visits or isinstance(obj, (torch.Tensor, torch.nn.Module)):
            # The first is the object itself; the reference to it is that of whoever keeps it.
            _, n_visits = self.visits.get(id(obj), (obj, 0))
            self.visits[id(obj)] = obj, n_visits + 1
        return None

    def _number(self, storage: Storage) -> int:
        number = self._numbers.setdefault(storage._cdata, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return number


class _Thawer(pickle.Unpickler):
    def __init__(
        self, skeleton: bytes, storages: Sequence[Storage], buffers: Sequence[memoryview]
    ) -> None:
        super().__init__(io.BytesIO(skeleton), buffers=buffers)
        self._storages = storages

    def persistent_load(self, pid: Any) -> Any:
        import torch

        number, dtype = pid
        storage = self._storages[number]
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _is_part(visited: tuple[Any, int]) -> bool:
    """Whether something that was met is there still: not made for the occasion."""
    return sys.getrefcount(visited[0]) > _LOOKING


# -- what is not taken apart -----------------------------------------------------------------------


def modules_of(value: Any) -> Frozen:
    """The tensors of the modules in an object, which cannot be put together again."""
    parts, storages = _parts_of(value)
    # Whoever has a part now is taken to be within; of the object itself that is told by nobody.
    counts = [sys.getrefcount(parts[index]) - _LOOKING for index in range(len(parts))]
    inside = [(part, 1 if part is value else n) for part, n in zip(parts, counts, strict=True)]
    return Frozen(None, storages, owners=Owners(inside, storages))


def _parts_of(value: Any) -> tuple[list[Any], list[Storage]]:
    """The modules in an object with their tensors, and the storages of these."""
    torch = sys.modules.get("torch")
    parts: dict[int, Any] = {}
    storages: dict[int, Storage] = {}
    for module in _modules(value, torch.nn.Module) if torch is not None else ():
        parts[id(module)] = module
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            with contextlib.suppress(Exception):  # None; sparse and lazy ones have none
                storage = tensor.untyped_storage()
                storages.setdefault(storage._cdata, storage)
                parts[id(tensor)] = tensor
    return list(parts.values()), list(storages.values())


def _modules(value: Any, kind: Any) -> list[Any]:
    """All modules in an object, in what it holds, and within each other."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, kind):
            found.update((id(module), module) for module in item.modules())
        elif depth < _MAX_DEPTH:
            if isinstance(item, dict):
                held = list(item.values())
            elif isinstance(item, (list, tuple, set)):
                held = list(item)
            else:
                held = list(getattr(item, "__dict__", {}).values())
            todo += ((inner, depth + 1) for inner in held[:_MAX_HELD])
    return list(found.values())


#: Packages whose objects are pickled without loss.
_PLAIN = frozenset({"torch", "transformers", "sentence_transformers", "numpy", "dask_pcm"})


def is_plain(value: Any) -> bool:
    """Whether an object is a torch module, or of a library known to pickle well, or holds such."""
    torch = sys.modules.get("torch")
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (list, tuple)):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
        elif (
            item is None
            or isinstance(item, (bool, int, float, str, bytes))
            or (torch is not None and isinstance(item, torch.nn.Module))
        ):
            continue
        elif type(item).__module__.partition(".")[0] not in _PLAIN:
            return False
    return True


def _n_users(storages: Sequence[Storage]) -> int:
    """How many tensors and the like use storages; 0 where torch does not tell."""
    torch = sys.modules.get("torch")
    count = getattr(getattr(torch, "_C", None), "_storage_Use_Count", None)
    return sum(count(storage._cdata) for storage in storages) if count else 0
