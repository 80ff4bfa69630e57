"""Freezing splits a live object into a small pickle, its skeleton, and its storages and buffers.

The object is pickled, but its tensors' storages and large buffers are kept out of the pickle. So
any picklable object can leave its device and its process, with shared and tied tensors preserved.
Thawing puts it together again on other storages.
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
#: Objects with a larger skeleton are not frozen: pickling them would take too long.
_MAX_SKELETON_BYTES = 64 << 20
#: How deep modules are searched for in an object, and how many items of each container.
_MAX_DEPTH, _MAX_HELD = 4, 1_000
#: References that the entry in our own list and the call of getrefcount add.
_LOOKING = 2


class Owners:
    """Detects, by reference counts, whether parts of an object are used from outside it.

    A task's result, another object or a cache may contain a part of the object, or a view of its
    memory. Then its tensors must not be emptied.

    Parameters
    ----------
    inside
        The object's tensors and modules, with the number of references from within the object.
    storages
        The storages of all its tensors.
    """

    def __init__(self, inside: Sequence[tuple[Any, int]], storages: Sequence[Storage]) -> None:
        self._inside = list(inside)
        self._storages = list(storages)
        self._n_users = _n_users(self._storages)
        self._n_changes = self._count_changes()

    @property
    def is_unshared(self) -> bool:
        """Whether nothing outside the object refers to its parts."""
        has_more = any(sys.getrefcount(entry[0]) - _LOOKING > entry[1] for entry in self._inside)
        return not has_more and _n_users(self._storages) <= self._n_users

    @property
    def is_unchanged(self) -> bool:
        """Whether no tensor was written to since this was made, as far as torch counts writes."""
        return self._count_changes() == self._n_changes

    def _count_changes(self) -> int:
        """The sum of torch's version counters, which every in-place operation increases."""
        torch, total = sys.modules.get("torch"), 0
        for entry in self._inside:
            if torch is not None and isinstance(entry[0], torch.Tensor):
                with contextlib.suppress(RuntimeError):  # inference tensors have no counter
                    total += entry[0]._version
        return total


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen object.

    Attributes
    ----------
    skeleton
        The pickle; None if the object cannot be thawed.
    storages
        The storages of its tensors, each once, on any device; the live object still uses them.
    buffers
        The memory of its arrays and other large buffers.
    owners
        Detects whether parts of the live object are used from outside it.
    """

    skeleton: bytes | None
    storages: list[Storage] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)
    owners: Owners | None = None

    @property
    def is_on_device(self) -> bool:
        """Whether some storage is on an accelerator."""
        return any(storage.device.type != "cpu" for storage in self.storages)

    @property
    def n_bytes(self) -> int:
        """Bytes of storages and buffers."""
        buffers = sum(buffer.nbytes for buffer in self.buffers)
        return buffers + sum(storage.nbytes() for storage in self.storages)


def freeze(value: Any) -> Frozen:
    """Freeze an object, which stays usable and unchanged.

    Raises
    ------
    Exception
        Anything that pickling raises, or ValueError if the skeleton is too large.
    """
    file, buffers = _Limited(), _Buffers()
    freezer = _Freezer(file, buffers)
    try:
        freezer.dump(value)
    finally:
        freezer.clear_memo()  # its references to tensors would count as uses from outside
    inside = [visited for visited in freezer.visits.values() if _is_part(visited)]
    freezer.visits.clear()
    owners = Owners(inside, freezer.storages)
    return Frozen(file.getvalue(), freezer.storages, buffers.taken, owners)


def thaw(skeleton: bytes, storages: Sequence[Storage], buffers: Sequence[memoryview]) -> Any:
    """Make an object from its skeleton, on other storages and buffers."""
    return _Thawer(skeleton, storages, buffers).load()


class _Limited(io.BytesIO):
    """A buffer for a skeleton, with a limit."""

    def write(self, data: Any) -> int:
        """Append; raises ValueError beyond the limit."""
        if self.tell() + len(data) > _MAX_SKELETON_BYTES:
            raise ValueError("it holds too much that is neither tensor nor array")
        return super().write(data)


class _Buffers:
    """Collects large buffers. Not a method of the pickler, which would make a reference cycle."""

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
    """A pickler that collects storages and counts references to tensors and modules."""

    def __init__(self, file: io.BytesIO, buffers: _Buffers) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers)
        self.storages: list[Storage] = []
        #: Tensors and modules, and how often the pickler met them: once per reference.
        self.visits: dict[int, tuple[Any, int]] = {}
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        """Keep a storage out of the pickle, as its number; called for every object."""
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy is not None and isinstance(obj, numpy.memmap):
            raise ValueError("it maps a file, which would be copied to memory")
        if torch is None:
            return None
        if isinstance(obj, torch.UntypedStorage):
            return self._number(obj), None
        if isinstance(obj, torch.storage.TypedStorage):
            return self._number(obj._untyped_storage), obj.dtype
        if not self.visits or isinstance(obj, (torch.Tensor, torch.nn.Module)):
            # The first is the object itself, whose one reference is the store's.
            _, n_visits = self.visits.get(id(obj), (obj, 0))
            self.visits[id(obj)] = obj, n_visits + 1
        return None

    def _number(self, storage: Storage) -> int:
        """The number of a storage, which is collected when it is met first."""
        number = self._numbers.setdefault(storage._cdata, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return number


class _Thawer(pickle.Unpickler):
    """An unpickler that inserts storages by their numbers."""

    def __init__(
        self, skeleton: bytes, storages: Sequence[Storage], buffers: Sequence[memoryview]
    ) -> None:
        super().__init__(io.BytesIO(skeleton), buffers=buffers)
        self._storages = storages

    def persistent_load(self, pid: Any) -> Any:
        """The storage that ``_Freezer.persistent_id`` has numbered."""
        import torch

        number, dtype = pid
        storage = self._storages[number]
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _is_part(visited: tuple[Any, int]) -> bool:
    """Whether a visited object still has other references: it was not created by pickling."""
    return sys.getrefcount(visited[0]) > _LOOKING


# -- what is not taken apart -----------------------------------------------------------------------


def modules_of(value: Any) -> Frozen:
    """The storages of the modules in an object that cannot be frozen; without a skeleton."""
    parts, storages = _parts_of(value)
    # References that exist now are taken for the object's own. The object itself has one.
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
            with contextlib.suppress(Exception):  # None, or a sparse or lazy tensor
                storage = tensor.untyped_storage()
                storages.setdefault(storage._cdata, storage)
                parts[id(tensor)] = tensor
    return list(parts.values()), list(storages.values())


def _modules(value: Any, kind: Any) -> list[Any]:
    """All modules in an object, found through containers, attributes and submodules."""
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


#: Packages whose objects survive pickling without loss.
_PLAIN = frozenset({"torch", "transformers", "sentence_transformers", "numpy", "dask_pcm"})


def is_plain(value: Any) -> bool:
    """Whether an object consists of torch modules and of objects that are known to pickle well."""
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
    """How many tensors use these storages; 0 if this torch does not tell."""
    torch = sys.modules.get("torch")
    count = getattr(getattr(torch, "_C", None), "_storage_Use_Count", None)
    return sum(count(storage._cdata) for storage in storages) if count else 0
