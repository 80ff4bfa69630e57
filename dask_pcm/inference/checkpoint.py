"""Weights are read from safetensors files directly into their memory on the device.

A checkpoint's tensors are first views of the memory-mapped files, so transformers can rename and
select them without reading any data. Afterwards, several threads read the tensors that still are
views from the files into device memory. Tensors that were converted on the way are copied.

The format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import inspect
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dask_pcm.ladder.objects import tensors

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class Checkpoint:
    """Tensors of safetensors files; a context manager that keeps the files open.

    Parameters
    ----------
    paths
        The files.

    Attributes
    ----------
    tensors
        Views of the mapped files, by name. The mapping is private: writes do not reach the files.

    Raises
    ------
    ValueError
        If a file is not safetensors, is truncated, or has an unknown dtype.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        #: (address, size in bytes, file descriptor) of each mapping.
        self._files: list[tuple[int, int, int]] = []
        try:
            for path in paths:
                self._open(os.fspath(path))
        except BaseException:
            self.close()
            raise

    def _open(self, path: str) -> None:
        """Map a file and add its tensors."""
        import torch

        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(fd).st_size
        self._files.append((0, 0, fd))
        head = int.from_bytes(os.pread(fd, 8, 0), "little") if size >= 8 else size
        if head + 8 > size:
            raise ValueError(f"{path!r} is not a safetensors file, or it is truncated.")
        header = json.loads(os.pread(fd, head, 8))
        memory = torch.frombuffer(mmap.mmap(fd, size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        self._files[-1] = (memory.data_ptr(), size, fd)
        for name, about in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + head + at for at in about["data_offsets"])
            if about["dtype"] not in _DTYPES or stop > size:
                raise ValueError(f"{path!r}: cannot read {name!r}, described as {about}.")
            dtype = getattr(torch, _DTYPES[about["dtype"]])
            part = memory[start:stop]
            # torch requires tensors aligned to their item size; the format does not.
            if part.data_ptr() % dtype.itemsize:
                part = part.clone()
            self.tensors[name] = part.view(dtype).reshape(about["shape"])

    def place(self, module: torch.nn.Module, device: str | torch.device) -> None:
        """Move all tensors of a module to a device; tied tensors stay tied.

        Parameters
        ----------
        module
            A module built from `tensors`.
        device
            A torch device. On the CPU, tensors are copied from the mapped files to memory.
        """
        import torch

        moved: dict[Any, torch.Tensor] = {}
        placed: dict[int, list[tuple[Any, int]]] = {}
        for tensor in _tensors_of(module):
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in moved:
                found = self._found(tensor)
                if found is None:
                    moved[key] = tensor.data.to(device, copy=True)
                else:
                    fd, at = found
                    moved[key] = torch.empty_like(tensor.data, device=device)
                    placed.setdefault(fd, []).append((moved[key].untyped_storage(), at))
            tensor.data = moved[key]
        for fd, pairs in placed.items():
            tensors.read(fd, pairs)

    def _found(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """The file that a tensor is a view of, and its offset there; None if it is no view."""
        if not tensor.is_contiguous() or not tensor.nbytes:
            return None
        address = tensor.data_ptr()
        for first, size, fd in self._files:
            if first <= address and address + tensor.nbytes <= first + size:
                return fd, address - first
        return None

    def close(self) -> None:
        """Close the files; a mapping stays until no tensor uses it."""
        for *_, fd in self._files:
            os.close(fd)
        self._files.clear()
        self.tensors = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()


def options_of(kind: Any) -> dict[str, Any]:
    """Keywords with which an encoder is made without the layer that files often lack."""
    has_layer = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if has_layer else {}
