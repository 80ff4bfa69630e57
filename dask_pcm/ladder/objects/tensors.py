"""Copies bytes between torch storages and files, in place, with several threads.

Torch is not imported at module level: code that has a tensor has imported it already.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

    Storage: TypeAlias = torch.UntypedStorage

#: What one thread copies at a time; also the size of its pinned buffers.
_CHUNK_BYTES = 16 << 20
_MAX_THREADS = 8


def device_bytes(n_devices: int = 1) -> int | None:
    """The default device budget: 90 % of the accelerator's memory; None without an accelerator.

    The rest is left for activations.

    Parameters
    ----------
    n_devices
        Devices that a context may span: the first ones, where the worker sees more.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    if n_devices == 1:  # the current one, which need not be the first
        return int(0.9 * torch.cuda.mem_get_info()[1])
    seen = range(min(n_devices, torch.cuda.device_count()))
    return sum(int(0.9 * torch.cuda.mem_get_info(device)[1]) for device in seen)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a device or on the host."""
    torch = sys.modules.get("torch")
    on_device = () if torch is None else (torch.OutOfMemoryError,)
    if isinstance(error, (MemoryError, *on_device)):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "out of memory" in text or "can't allocate memory" in text


#: Parts of the messages of errors after which a device is unusable in this process (CUDA, HIP).
_STICKY = (
    *("device-side assert", "illegal memory access", "illegal address", "illegal instruction"),
    *("misaligned address", "unspecified launch failure", "launch timed out", "uncorrectable ecc"),
    *("hardware stack error", "invalid program counter", "address space", "nvlink", "fallen off"),
)


def is_sticky(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, makes the device unusable for this process."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))  # the chain of causes may have a cycle
        if type(error).__name__ == "AcceleratorError" or isinstance(error, RuntimeError):
            text = str(error).lower()
            of_device = any(word in text for word in ("cuda", "hip error", "accelerator"))
            if of_device and any(phrase in text for phrase in _STICKY):
                return True
        error = error.__cause__ or error.__context__
    return False


def new_storage(n_bytes: int, device: str) -> Storage:
    """Allocate a storage."""
    import torch

    return torch.empty(n_bytes, dtype=torch.uint8, device=device).untyped_storage()


def storage_of(part: torch.Tensor) -> Storage:
    """The storage of a byte tensor that views all of it; of a part in CPU memory, one of its own.

    It uses the same memory, which stays as long as `part` does.
    """
    import torch

    if part.device.type != "cpu":
        return part.untyped_storage()
    return torch.frombuffer(_memory(part), dtype=torch.uint8).untyped_storage()


def mapped_storage(memory: memoryview) -> Storage:
    """Wrap existing memory in a storage, which keeps it alive."""
    import torch

    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def as_bytes(storage: Storage) -> torch.Tensor:
    """A byte tensor that views a whole storage."""
    import torch

    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(part: torch.Tensor) -> memoryview:
    """The memory of a byte tensor on the CPU.

    Not with ``numpy()``, which makes the storage non-resizable for good.
    """
    return memoryview((ctypes.c_char * len(part)).from_address(part.data_ptr())).cast("B")


# -- bytes ---------------------------------------------------------------------------------------

#: A storage, and its offset in a file.
Placed: TypeAlias = "tuple[Storage, int]"


def write(fd: int, placed: Iterable[Placed]) -> None:
    """Write storages to a file, each at its offset; blocks."""

    def put(memory: memoryview, at: int) -> bool:
        while memory:
            n_done = os.pwrite(fd, memory, at)
            memory, at = memory[n_done:], at + n_done
        return True

    _for_chunks(placed, put, is_out=True)


def is_same(fd: int, placed: Iterable[Placed]) -> bool:
    """Whether a file and storages are equal, bit for bit."""

    import torch

    size = os.fstat(fd).st_size
    there = torch.frombuffer(mmap.mmap(fd, size, access=mmap.ACCESS_COPY), dtype=torch.uint8)

    def compare(memory: memoryview, at: int) -> bool:
        here = torch.frombuffer(memory, dtype=torch.uint8)
        return torch.equal(here, there[at : at + len(here)])

    return _for_chunks(placed, compare, is_out=True)


def read(fd: int, placed: Iterable[Placed]) -> None:
    """Fill storages from a file, each from its offset, in place; blocks.

    Raises
    ------
    OSError
        If the file is too short or cannot be read.
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
    """Call `do` for all chunks of storages, on several threads; return whether all returned True.

    Chunks on a device pass through a ring of pinned buffers, one ring per thread. The first error
    of a thread is raised here.
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
                    if errors or not all(answers):  # of any thread: the result is known
                        return
                    part = as_bytes(storage)[start:stop]
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
    """A thread-safe iterator."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._taking = threading.Lock()

    def __next__(self) -> Any:
        with self._taking:
            return next(self._items)


class _Ring:
    """Two pinned buffers of one thread: one is filled while the other is being copied."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._sent: list[Any] = []
        self._turn = 0
        self._stream: Any = None

    def _prepare(self, device: torch.device) -> None:
        """Make the stream and the buffers; only storages on a device need them."""
        import torch

        if self._stream is None:
            self._stream = torch.Stream(device)
            # The allocator reuses memory that kernels queued earlier may still read: wait for them.
            self._stream.wait_stream(torch.accelerator.current_stream(device))
            for _ in range(2):
                try:
                    buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
                except RuntimeError:  # the limit of pinned memory is reached: slower without
                    buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
                self._buffers.append(buffer)
                self._sent.append(None)

    def next(self, part: torch.Tensor) -> memoryview:
        """Return a buffer as large as `part`, after its former copy to the device has ended."""
        self._prepare(part.device)
        self._turn = 1 - self._turn
        if self._sent[self._turn] is not None:
            self._sent[self._turn].synchronize()
        return _memory(self._buffers[self._turn][: len(part)])

    def send(self, part: torch.Tensor) -> None:
        """Start to copy the current buffer to `part`, without waiting."""
        with self._stream:
            part.copy_(self._buffers[self._turn][: len(part)], non_blocking=True)
            self._sent[self._turn] = self._stream.record_event()

    def taken(self, part: torch.Tensor) -> memoryview:
        """Copy `part` to a buffer and return its memory, valid until the next call but one."""
        memory = self.next(part)
        with self._stream:
            self._buffers[self._turn][: len(part)].copy_(part, non_blocking=True)
        self._stream.synchronize()
        return memory

    def close(self) -> None:
        """Wait for all copies; the buffers may be freed afterwards."""
        if self._stream is not None:
            self._stream.synchronize()
