"""A process that was given a device must be able to use it: detection, name and check.

Nothing here imports torch or creates a device context before the user's own code does. Functions
may be called from any thread.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

from dask_pcm.errors import DeviceUnusableError
from dask_pcm.ladder.objects.tensors import is_out_of_memory, is_sticky

_PROC = Path("/proc")
_NVIDIA = "CUDA_VISIBLE_DEVICES"
#: Variables that declare which devices a process may use. Batch systems set several of them at
#: once, for any kind of device.
_DECLARING = (
    _NVIDIA,
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
)
#: Values that batch systems set if there is no device.
_NONE = frozenset({"", "-1", "NoDevFiles"})
#: Whether loads in this context use the CPU, even if the process was given a device.
_is_cpu_only: ContextVar[bool] = ContextVar("is_cpu_only", default=False)
_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@contextmanager
def built_for_cpu(is_cpu_only: bool) -> Iterator[None]:
    """Make loads on this thread use the CPU within the block, if `is_cpu_only`."""
    token = _is_cpu_only.set(is_cpu_only)
    try:
        yield
    finally:
        _is_cpu_only.reset(token)


def chosen_device() -> str:
    """The torch device type that a loader should use by default.

    The accelerator that torch can use here; "cpu" if there is none, or if
    ``pcm.worker.accelerator`` is ``cpu``.
    """
    import torch

    if _is_cpu_only.get() or not torch.accelerator.is_available():
        return "cpu"
    return str(torch.accelerator.current_accelerator().type)


def device_model(proc: Path = _PROC) -> str:
    """The model name of the device that contexts of this process use.

    For an NVIDIA device, the driver's name of the device with the visible index, in PCI bus order,
    or UUID; with the suffix "MIG" for a slice of one. For other accelerators, torch's name, once
    torch has initialised them. Otherwise the CPU's model name, or "cpu".
    """
    return _nvidia_model(proc) or _torch_model() or cpu_model(proc)


def declared_device(proc: Path = _PROC) -> str | None:
    """The evidence that this process was given an accelerator, as text; None if there is none."""
    said = [f"{name}={os.environ[name]}" for name in _DECLARING if _is_given(name)]
    if said:
        return ", ".join(said)
    if _NVIDIA not in os.environ and (devices := _nvidia_devices(proc)):
        models = ", ".join(sorted({device.get("Model", "unknown") for device in devices}))
        return f"{len(devices)} in {proc / 'driver/nvidia/gpus'}: {models}"
    return None


def _is_given(name: str) -> bool:
    """Whether a variable declares at least one device."""
    return os.environ.get(name, "").strip() not in _NONE


def check_device(proc: Path = _PROC) -> None:
    """Check that torch can use the device that this process was given, if it was given one.

    Called before a context uses the device, or just after it was loaded. Does nothing if torch is
    not imported, or within ``built_for_cpu``. A check that succeeds is not repeated.

    Raises
    ------
    DeviceUnusableError
        If torch cannot use the device. The message names what was declared and found, the
        versions, and what to do.
    """
    torch = sys.modules.get("torch")
    if torch is None or _is_cpu_only.get():
        return
    if (declared := declared_device(proc)) is not None:
        _check(torch, declared, proc)


@functools.cache
def _check(torch: ModuleType, declared: str, proc: Path) -> None:
    """Raise DeviceUnusableError if torch cannot use a device; caches success only."""
    cause = None
    try:
        wrong = _fault(torch)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built for the CPU only
        # A device that is full, or has failed in this process, is not unusable for others.
        if is_out_of_memory(error) or is_sticky(error):
            raise
        wrong, cause = str(error).strip() or type(error).__name__, error
    if wrong is not None:
        raise DeviceUnusableError(_explain(torch, declared, wrong, proc)) from cause


def _fault(torch: ModuleType) -> str | None:
    """Why torch cannot use the device; None if it can.

    Raises
    ------
    RuntimeError
        The driver's own error, for instance that it is too old.
    """
    if getattr(torch.version, "xpu", None) is not None:
        return None if torch.xpu.is_available() else "torch.xpu.is_available() is False"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only"
    torch.cuda.init()
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    built_for = torch.cuda.get_arch_list()
    if torch.version.hip is not None or not built_for:
        return None
    capability = torch.cuda.get_device_capability()
    if any(_runs_on(arch, capability) for arch in built_for):
        return None
    major, minor = capability
    return (
        f"it has no kernels for {torch.cuda.get_device_name()}, which is sm_{major}{minor}: it is"
        f" built for {', '.join(built_for)}"
    )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for `arch` run on a device of this compute capability.

    ``sm_XY`` is binary code: it runs on the same major version from minor version Y on. ``a``
    restricts it to exactly this capability, ``f`` to its family. ``compute_XY`` is PTX, which the
    driver compiles for any later device.
    """
    found = _ARCH.fullmatch(arch)
    if found is None:
        return False
    kind, variant, built_for = found[1], found[4], (int(found[2]), int(found[3]))
    if variant == "a":
        return built_for == capability
    is_same_major = built_for[0] == capability[0]
    if kind == "sm" or variant == "f":
        return is_same_major and built_for <= capability
    return built_for <= capability


def _explain(torch: ModuleType, declared: str, wrong: str, proc: Path) -> str:
    """The message of DeviceUnusableError."""
    versions = torch.version
    if versions.cuda is not None:
        built = f"built for CUDA {versions.cuda}"
    elif versions.hip is not None:
        built = f"built for ROCm {versions.hip}"
    elif getattr(versions, "xpu", None) is not None:
        built = f"built for XPU {versions.xpu}"
    else:
        built = "built for CPUs"
    found = _nvidia_model(proc) or "a device that the driver does not name"
    driver = driver_version(proc)
    on = f"NVIDIA driver {driver}" if driver else "no NVIDIA driver"
    return (
        f"This worker was given a device ({declared}; found: {found}), and torch cannot use it:"
        f" {wrong}. Found torch {torch.__version__}, {built}, and {on}. Install a torch that is"
        " built for this device and driver, or keep work off this node. To use the CPU instead, set"
        " pcm.worker.accelerator to cpu: DASK_PCM__WORKER__ACCELERATOR=cpu in the job script of the"
        " workers, or dask.config.set({'pcm.worker.accelerator': 'cpu'}) on the client before"
        " dask_pcm.install(); if it is installed already, after dask_pcm.uninstall()."
    )


def driver_version(proc: Path = _PROC) -> str | None:
    """The version of the NVIDIA driver; None if there is none."""
    text = _read(proc / "driver" / "nvidia" / "version")
    found = re.search(r"NVRM version:.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


def _nvidia_devices(proc: Path) -> list[dict[str, str]]:
    """The driver's description of each device, in PCI bus order."""
    files = sorted(proc.glob("driver/nvidia/gpus/*/information"))
    devices = [dict(_fields(_read(file))) for file in files]
    return [device for device in devices if device.get("GPU Excluded") != "Yes"]


def _nvidia_model(proc: Path) -> str | None:
    """The model of the first visible NVIDIA device; None if there is none."""
    devices = _nvidia_devices(proc)
    visible = os.environ.get(_NVIDIA)
    if not devices or (visible is not None and visible.strip() in _NONE):
        return None
    first = "0" if visible is None else visible.split(",")[0].strip()
    chosen = devices[0]  # for ids that identify no device: those of a node are usually alike
    if first.isdecimal() and int(first) < len(devices):
        chosen = devices[int(first)]
    uuid = first.removeprefix("MIG-").partition("/")[0]
    for device in devices:
        if uuid.startswith("GPU-") and device.get("GPU UUID", "").startswith(uuid):
            chosen = device  # CUDA accepts a unique prefix of a UUID
            break
    model = chosen.get("Model")
    return f"{model} MIG" if model and first.startswith("MIG-") else model


def _torch_model() -> str | None:
    """torch's name of the current device; None unless torch has initialised it."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)  # missing while another thread is importing torch
    if cuda is None or not hasattr(cuda, "is_initialized") or not cuda.is_initialized():
        return None
    return " ".join(str(cuda.get_device_name()).split()) or None


def cpu_model(proc: Path = _PROC) -> str:
    """The CPU's model name; "cpu" if the system does not provide it."""
    fields = dict(reversed(list(_fields(_read(proc / "cpuinfo")))))
    return fields.get("model name") or "cpu"


def _fields(text: str) -> Iterator[tuple[str, str]]:
    """Names and values of lines ``name: value``, with normalised spaces."""
    for line in text.splitlines():
        name, is_field, value = line.partition(":")
        if is_field:
            yield name.strip(), " ".join(value.split())


def _read(path: Path) -> str:
    """The contents of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
