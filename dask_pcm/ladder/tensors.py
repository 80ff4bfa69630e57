"""Torch tensors up and down the ladder: bytes of storages into files, and back in place.

A live object is taken apart by pickling it: what pickle would write of storages and of large
buffers goes elsewhere (``Frozen``), and what remains, small, is its skeleton. So whatever can be
pickled can leave its device, and its process, with all identities and ties among its tensors.

The ladder's only torch. It is not imported here: whoever holds a tensor has imported it.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import cloudpickle

if TYPE_CHECKING:
    import torch

    Storage: TypeAlias = torch.UntypedStorage

_CHUNK_BYTES = 16 << 20
_MAX_THREADS = 8
#: Smaller buffers than this stay in the skeleton.
_LEAST_BYTES = 4096
#: More than this besides tensors and arrays is not taken apart: it would take long.
_MAX_SKELETON_BYTES = 64 << 20


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
    """

    skeleton: bytes | None
    storages: list[Storage] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)

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
    file = _Limited()
    freezer = _Freezer(file)
    freezer.dump(value)
    return Frozen(file.getvalue(), freezer.storages, freezer.buffers)


def thaw(skeleton: bytes, storages: Sequence[Storage], buffers: Sequence[memoryview]) -> Any:
    """Put an object together again, on other storages and buffers."""
    return _Thawer(skeleton, storages, buffers).load()


class _Limited(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > _MAX_SKELETON_BYTES:
            raise ValueError("it holds too much that is neither tensor nor array")
        return super().write(data)


class _Freezer(cloudpickle.Pickler):  # type: ignore[misc] # its types are not shipped
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._keep)
        self.storages: list[Storage] = []
        self.buffers: list[memoryview] = []
        self._numbers: dict[int, int] = {}

    def _keep(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < _LEAST_BYTES:
            return True
        self.buffers.append(raw)
        return False

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


# -- storages ------------------------------------------------------------------------------------


def storages_of(value: Any) -> list[Storage]:
    """Storages of the modules in an object that cannot be pickled: of itself, or its attributes."""
    torch = sys.modules.get("torch")
    if torch is None or not (hasattr(value, "__dict__") or isinstance(value, (list, tuple))):
        return []
    held = value if isinstance(value, (list, tuple)) else vars(value).values()
    modules = [item for item in (value, *held) if isinstance(item, torch.nn.Module)]
    found: dict[int, Storage] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            with contextlib.suppress(Exception):  # sparse or lazy ones have none
                storage = tensor.untyped_storage()
                found.setdefault(storage._cdata, storage)
    return list(found.values())


#: Packages whose objects are pickled without loss.
_PLAIN = frozenset({"torch", "transformers", "sentence_transformers", "numpy", "dask_pcm"})


def is_plain(value: Any) -> bool:
    """Whether an object is a torch module, or of a library known to pickle well, or holds such."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        return True
    return type(value).__module__.partition(".")[0] in _PLAIN


def device_bytes() -> int | None:
    """What contexts may take on this process's accelerator; None where there is none.

    A tenth of it is left to what they compute.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(0.9 * torch.cuda.mem_get_info()[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for something, on a device or off it."""
    torch = sys.modules.get("torch")
    on_device = () if torch is None else (torch.OutOfMemoryError,)
    if isinstance(error, (MemoryError, *on_device)):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "out of memory" in text or "can't allocate memory" in text


#: What a device says when nothing more will run on it in this process (CUDA and HIP).
_STICKY = (
    *("device-side assert", "illegal memory access", "illegal address", "illegal instruction"),
    *("misaligned address", "unspecified launch failure", "launch timed out", "uncorrectable ecc"),
    *("hardware stack error", "invalid program counter", "address space", "nvlink", "fallen off"),
)


def is_sticky(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that its device is lost to this process."""
    while error is not None:
        if type(error).__name__ == "AcceleratorError" or isinstance(error, RuntimeError):
            text = str(error).lower()
            of_device = any(word in text for word in ("cuda", "hip error", "accelerator"))
            if of_device and any(phrase in text for phrase in _STICKY):
                return True
        error = error.__cause__ or error.__context__
    return False


def n_users(storages: Sequence[Storage]) -> int:
    """How many tensors and the like use storages; 0 where torch does not tell."""
    torch = sys.modules.get("torch")
    count = getattr(getattr(torch, "_C", None), "_storage_Use_Count", None)
    return sum(count(storage._cdata) for storage in storages) if count else 0


def new_storage(n_bytes: int, device: str) -> Storage:
    import torch

    return torch.empty(n_bytes, dtype=torch.uint8, device=device).untyped_storage()


def mapped_storage(memory: memoryview) -> Storage:
    """A storage on somebody else's memory."""
    import torch

    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _as_bytes(storage: Storage) -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(part: torch.Tensor) -> memoryview:
    """Memory of bytes on the CPU; not ``numpy()``, after which a storage cannot be resized."""
    return memoryview((ctypes.c_char * len(part)).from_address(part.data_ptr())).cast("B")


# -- bytes ---------------------------------------------------------------------------------------

#: A storage, and where in a file it begins.
Placed: TypeAlias = "tuple[Storage, int]"


def write(fd: int, placed: Iterable[Placed]) -> None:
    """Write storages to a file, each from its offset on."""

    def put(memory: memoryview, at: int) -> bool:
        while memory:
            n_done = os.pwrite(fd, memory, at)
            memory, at = memory[n_done:], at + n_done
        return True

    _for_chunks(placed, put, is_out=True)


def is_same(fd: int, placed: Iterable[Placed]) -> bool:
    """Whether a file holds what storages hold, to the bit."""

    import torch

    size = os.fstat(fd).st_size
    there = torch.frombuffer(mmap.mmap(fd, size, access=mmap.ACCESS_COPY), dtype=torch.uint8)

    def compare(memory: memoryview, at: int) -> bool:
        here = torch.frombuffer(memory, dtype=torch.uint8)
        return torch.equal(here, there[at : at + len(here)])

    return _for_chunks(placed, compare, is_out=True)


def read(fd: int, placed: Iterable[Placed]) -> None:
    """Fill storages from a file, each from its offset on, straight into place.

    Raises
    ------
    OSError
        Where the file ends too soon.
    """

    def get(memory: memoryview, at: int) -> bool:
        while memory:
            n_done = os.preadv(fd, [memory], at)
            if not n_done:
                raise OSError(f"The file ends at {at:,}, {len(memory):,} bytes too soon.")
            memory, at = memory[n_done:], at + n_done
        return True

    _for_chunks(placed, get, is_out=False)


def _for_chunks(
    placed: Iterable[Placed], do: Callable[[memoryview, int], bool], is_out: bool
) -> bool:
    """Have `do` called for chunks of storages by several threads; whether all said yes.

    What is on a device passes through a ring of buffers in pinned memory for each thread.
    """
    chunks = _Shared(
        (storage, start, min(start + _CHUNK_BYTES, storage.nbytes()), at + start)
        for storage, at in placed
        for start in range(0, storage.nbytes(), _CHUNK_BYTES)
    )
    errors: list[BaseException] = []
    answers: list[bool] = []

    def work() -> None:
        try:
            with contextlib.closing(_Ring()) as ring:
                for storage, start, stop, at in chunks:
                    if errors or not all(answers):
                        return
                    part = _as_bytes(storage)[start:stop]
                    if part.device.type == "cpu":
                        answers.append(do(_memory(part), at))
                    elif is_out:
                        answers.append(do(ring.taken(part), at))
                    else:
                        buffer = ring.next(part)
                        answers.append(do(buffer, at))
                        ring.send(part)
        except BaseException as error:
            errors.append(error)

    n_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    threads = [threading.Thread(target=work, name="pcm-tensors") for _ in range(n_threads - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return all(answers)


class _Shared(Iterator[Any]):
    """An iterator that several threads take from."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._taking = threading.Lock()

    def __next__(self) -> Any:
        with self._taking:
            return next(self._items)


class _Ring:
    """Two pinned buffers of one thread: one is filled while the other is on its way."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._sent: list[Any] = []
        self._turn = 0
        self._stream: Any = None

    def _prepare(self, device: torch.device) -> None:
        import torch

        if self._stream is None:
            self._stream = torch.Stream(device)
            # Memory that was just freed may still be read by what was queued before.
            self._stream.wait_stream(torch.accelerator.current_stream(device))
            for _ in range(2):
                try:
                    buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
                except RuntimeError:  # no more may be pinned: slower, but it goes
                    buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
                self._buffers.append(buffer)
                self._sent.append(None)

    def next(self, part: torch.Tensor) -> memoryview:
        """A buffer for as many bytes as `part` has, once what it had before has arrived."""
        self._prepare(part.device)
        self._turn = 1 - self._turn
        if self._sent[self._turn] is not None:
            self._sent[self._turn].synchronize()
        return _memory(self._buffers[self._turn][: len(part)])

    def send(self, part: torch.Tensor) -> None:
        """Copy the buffer to where it belongs, without waiting for it."""
        with self._stream:
            part.copy_(self._buffers[self._turn][: len(part)], non_blocking=True)
            self._sent[self._turn] = self._stream.record_event()

    def taken(self, part: torch.Tensor) -> memoryview:
        """What `part` holds."""
        memory = self.next(part)
        with self._stream:
            self._buffers[self._turn][: len(part)].copy_(part, non_blocking=True)
        self._stream.synchronize()
        return memory

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
