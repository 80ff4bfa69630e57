"""The toolkit's settings: Dask configuration under ``pcm``, read into one dataclass.

Each key of ``pcm.yaml`` can be set as any Dask setting can: in a YAML file, by an environment
variable (``DASK_PCM__WORKER__LANES=3``) or with ``dask.config.set({"pcm.worker.lanes": 3})``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

T = TypeVar("T")

with (Path(__file__).parent / "pcm.yaml").open(encoding="utf-8") as _file:
    _DEFAULTS = yaml.safe_load(_file)
dask.config.update_defaults(_DEFAULTS)


@dataclass(frozen=True, slots=True)
class Config:
    """One reading of the settings; see ``pcm.yaml`` for what each means."""

    pipeline_s: float
    tick_s: float
    stall_s: float
    n_load_attempts: int
    idle_s: float | None
    n_lanes: int
    n_threads: int | None
    imports: tuple[str, ...]
    device: str | None
    is_cpu_only: bool
    pool: str | None
    walltime_s: float | None
    notice_s: float
    unit_s: float
    max_unit_rows: int
    unit_bytes: int
    ready_s: float
    batch_timeout_s: float | None
    batch_tokens: int
    batch_rows: int
    device_budget_bytes: int | None
    host_budget_bytes: int | None
    disk_path: str | None
    disk_quota_bytes: int | None
    is_staged_always: bool
    store_timeout_s: float
    ports: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls) -> Config:
        """Read the settings as they are now in this process.

        Raises
        ------
        ValueError
            Where one cannot be used; the message names it, what was found, and what could stand
            there.
        """
        return cls(**{name: _read(*setting) for name, setting in _SETTINGS.items()})

    def here(self) -> Config:
        """These settings, but what belongs to a worker's own job as it is set in this process.

        Settings come from the client; workers of one cluster may be of several jobs, whose scripts
        say of each what it is and for how long it lives. What nothing is said of stays.
        """
        said = {name: _read(*_SETTINGS[name]) for name in _OF_JOB if _is_set(_SETTINGS[name][0])}
        return replace(self, **said)


def _read(key: str, reader: Callable[[Any], Any], wanted: str) -> Any:
    found = _find(key)
    try:
        return reader(found)
    except Exception:  # Dask's own parsers raise a bit of everything
        raise ValueError(f"pcm.{key} must be {wanted}; found {found!r}.") from None


def _find(key: str) -> Any:
    """What is set in this process; the default where Dask's configuration has been reset."""
    for section in accumulate(f"pcm.{key}".split(".")[:-1], "{}.{}".format):
        found = dask.config.get(section, default=None)
        if found is not None and not isinstance(found, Mapping):
            raise ValueError(f"{section} must be a section of settings; found {found!r}.")
    return dask.config.get(f"pcm.{key}", default=_default(key))


def _default(key: str) -> Any:
    return dask.config.get(key, config=_DEFAULTS["pcm"])


def _is_set(key: str) -> bool:
    """Whether it has been set in this process: the defaults say nothing."""
    return bool(_find(key) != _default(key))


def _check(is_right: bool) -> None:
    if not is_right:
        raise ValueError


def _seconds(value: Any) -> float:
    if isinstance(value, str):  # Dask would read ".5s" as 1.5 seconds
        _check(value.strip()[:1].isdigit())
    _check(not isinstance(value, bool))
    seconds = float(value if isinstance(value, (int, float)) else parse_timedelta(value, "s"))
    _check(math.isfinite(seconds) and seconds >= 0)
    return seconds


def some_seconds(value: Any) -> float:
    """A time of more than 0 in seconds, from a number or from a text as "10m"; else ValueError."""
    seconds = _seconds(value)
    _check(seconds > 0)
    return seconds


def _size(value: Any) -> int:
    if isinstance(value, str):  # Dask would read "GB" as one of them
        _check(any(map(str.isdigit, value)))
    _check(not isinstance(value, bool))
    n_bytes = int(parse_bytes(value))
    _check(n_bytes >= 0)
    return n_bytes


def _some_bytes(value: Any) -> int:
    n_bytes = _size(value)
    _check(n_bytes > 0)
    return n_bytes


def _count(value: Any) -> int:
    number = int(str(value))
    _check(number >= 1)
    return number


def _ports(value: Any) -> tuple[int, ...]:
    first, _, last = str(value).partition(":")
    found = tuple(range(int(first), int(last or first) + 1))
    _check(found[0] >= 0 and found[-1] <= 65_535)
    return found


def _path(value: Any) -> str:
    _check(isinstance(value, (str, os.PathLike)))
    path = os.fspath(value)
    _check(isinstance(path, str) and bool(path.strip()))
    return path


def _name(value: Any) -> str:
    _check(isinstance(value, str) and bool(value.strip()))
    return str(value)


def _names(value: Any) -> tuple[str, ...]:
    _check(isinstance(value, Sequence) and not isinstance(value, str))
    _check(all(isinstance(name, str) and name for name in value))
    return tuple(value)


def _is_always(value: Any) -> bool:
    _check(value in ("auto", "always"))
    return bool(value == "always")


def _is_cpu(value: Any) -> bool:
    _check(value in ("auto", "cpu"))
    return bool(value == "cpu")


def _or(nothing: T, reader: Callable[[Any], T]) -> Callable[[Any], T]:
    """A reader that takes null, too."""
    return lambda value: nothing if value is None else reader(value)


_TIME = "a time, for instance 250ms or 2m"
_MORE_TIME = "a time of more than 0, for instance 250ms or 2m"
_NAME = "a name"
_SIZE = "a size in bytes, for instance 500MB or 8GiB"
_NUMBER = "a whole number, at least 1"
#: What is said of the job that a worker runs in.
_OF_JOB = ("device", "is_cpu_only", "pool", "walltime_s", "notice_s")
#: For each field of ``Config`` the setting, what reads it, and what it must be.
_SETTINGS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "pipeline_s": ("gate.pipeline", _seconds, _TIME),
    "tick_s": ("gate.tick", some_seconds, _MORE_TIME),
    "stall_s": ("gate.stall", some_seconds, _MORE_TIME),
    "n_load_attempts": ("gate.load-attempts", _count, _NUMBER),
    "idle_s": ("context.idle-timeout", _or(None, _seconds), f"{_TIME}, or null"),
    "n_lanes": ("worker.lanes", _count, _NUMBER),
    "n_threads": ("worker.threads", _or(None, _count), f"{_NUMBER}, or null"),
    "imports": ("worker.imports", _or((), _names), "a list of modules, for instance [torch] or []"),
    "device": ("worker.device", _or(None, _name), f"{_NAME}, for instance NVIDIA A10; or null"),
    "is_cpu_only": ("worker.accelerator", _is_cpu, "auto or cpu"),
    "pool": ("worker.pool", _or(None, _name), f"{_NAME}, for instance owners; or null"),
    "walltime_s": ("worker.walltime", _or(None, some_seconds), f"{_MORE_TIME}; or null"),
    "notice_s": ("worker.notice", some_seconds, _MORE_TIME),
    "unit_s": ("run.unit-seconds", _seconds, _TIME),
    "max_unit_rows": ("run.max-unit-rows", _count, _NUMBER),
    "unit_bytes": ("run.unit-bytes", _some_bytes, f"{_SIZE}; 1 or more"),
    "ready_s": ("run.ready-seconds", _seconds, _TIME),
    "batch_timeout_s": (
        "run.batch-timeout",
        _or(None, some_seconds),
        f"{_MORE_TIME}; or null",
    ),
    "batch_tokens": ("inference.batch-tokens", _count, _NUMBER),
    "batch_rows": ("inference.batch-rows", _count, _NUMBER),
    "device_budget_bytes": (
        "ladder.device.budget",
        _or(None, _some_bytes),
        f"{_SIZE}; 1 or more; or null",
    ),
    "host_budget_bytes": ("ladder.host.budget", _or(None, _size), f"{_SIZE}; 0 for none; or null"),
    "disk_path": (
        "ladder.disk.path",
        _or(None, _path),
        "a folder, for instance /scratch/me; or null",
    ),
    "disk_quota_bytes": (
        "ladder.disk.quota",
        _or(None, _some_bytes),
        f"{_SIZE}; 1 or more; or null",
    ),
    "is_staged_always": ("ladder.stage", _is_always, "auto or always"),
    "store_timeout_s": ("ladder.store.timeout", some_seconds, _MORE_TIME),
    "ports": ("ladder.transfer.ports", _ports, "0, a port or first:last, for instance 9000:9010"),
}
