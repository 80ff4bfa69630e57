"""The toolkit's settings: Dask configuration under ``pcm``, read into one dataclass.

Each key of ``pcm.yaml`` can be set as any Dask setting can: in a YAML file, by an environment
variable (``DASK_PCM__WORKER__LANES=3``) or with ``dask.config.set({"pcm.worker.lanes": 3})``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

with (Path(__file__).parent / "pcm.yaml").open(encoding="utf-8") as _file:
    _DEFAULTS = yaml.safe_load(_file)
dask.config.update_defaults(_DEFAULTS)


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
    """Parse a time of more than 0 into seconds, from a number or from text such as "10m".

    Raises
    ------
    ValueError
        If it is no such time.
    """
    seconds = _seconds(value)
    _check(seconds > 0)
    return seconds


def _size(value: Any) -> int:
    if isinstance(value, str):  # Dask would read "GB" as one gigabyte
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


def _is_auto(value: Any) -> bool:
    _check(value in ("auto", "never"))
    return bool(value == "auto")


def _may_recompute(value: Any) -> bool | None:
    _check(value in ("auto", "always", "never"))
    return None if value == "auto" else bool(value == "always")


def _is_cpu(value: Any) -> bool:
    _check(value in ("auto", "cpu"))
    return bool(value == "cpu")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What may be set: how it is parsed, and how an error describes it."""

    parse: Callable[[Any], Any]
    wanted: str

    def or_null(self, nothing: Any = None) -> _Kind:
        """The same, or null, which stands for `nothing`."""
        return _Kind(
            lambda value: nothing if value is None else self.parse(value), f"{self.wanted}; or null"
        )


_TIME = _Kind(_seconds, "a time, for instance 250ms or 2m")
_SOME_TIME = _Kind(some_seconds, "a time of more than 0, for instance 250ms or 2m")
_SIZE = _Kind(_size, "a size in bytes, for instance 500MB or 8GiB, or 0 for none")
_SOME_BYTES = _Kind(_some_bytes, "a size in bytes, for instance 500MB or 8GiB; 1 or more")
_COUNT = _Kind(_count, "a whole number, at least 1")
_DEVICE = _Kind(_name, "a name, for instance NVIDIA A10")
_POOL = _Kind(_name, "a name, for instance owners")
_MODULES = _Kind(_names, "a list of modules, for instance [torch] or []")
_FOLDER = _Kind(_path, "a folder, for instance /scratch/me")
_STAGE = _Kind(_is_always, "auto or always")
_ACCELERATOR = _Kind(_is_cpu, "auto or cpu")
_LENDING = _Kind(_is_auto, "auto or never")
_RECOMPUTE = _Kind(_may_recompute, "auto, always or never")
_PORTS = _Kind(_ports, "0, a port or first:last, for instance 9000:9010")


def _set_by(key: str, kind: _Kind, of_job: bool = False) -> Any:
    """A field of ``Config``; `of_job` if a worker's own environment overrides the client's."""
    return field(metadata={"key": key, "kind": kind, "of_job": of_job})


@dataclass(frozen=True, slots=True)
class Config:
    """One reading of the settings; see ``pcm.yaml`` for what each means."""

    # gate
    pipeline_s: float = _set_by("gate.pipeline", _TIME)
    tick_s: float = _set_by("gate.tick", _SOME_TIME)
    stall_s: float = _set_by("gate.stall", _SOME_TIME)
    n_load_attempts: int = _set_by("gate.load-attempts", _COUNT)
    # context
    idle_s: float | None = _set_by("context.idle-timeout", _TIME.or_null())
    # worker
    n_lanes: int = _set_by("worker.lanes", _COUNT)
    n_threads: int | None = _set_by("worker.threads", _COUNT.or_null())
    imports: tuple[str, ...] = _set_by("worker.imports", _MODULES.or_null(()))
    device: str | None = _set_by("worker.device", _DEVICE.or_null(), of_job=True)
    n_devices: int = _set_by("worker.devices", _COUNT, of_job=True)
    is_cpu_only: bool = _set_by("worker.accelerator", _ACCELERATOR, of_job=True)
    pool: str | None = _set_by("worker.pool", _POOL.or_null(), of_job=True)
    walltime_s: float | None = _set_by("worker.walltime", _SOME_TIME.or_null(), of_job=True)
    notice_s: float | None = _set_by("worker.notice", _SOME_TIME.or_null(), of_job=True)
    # run
    unit_s: float = _set_by("run.unit-seconds", _TIME)
    max_unit_rows: int = _set_by("run.max-unit-rows", _COUNT)
    unit_bytes: int = _set_by("run.unit-bytes", _SOME_BYTES)
    ready_s: float = _set_by("run.ready-seconds", _TIME)
    batch_timeout_s: float | None = _set_by("run.batch-timeout", _SOME_TIME.or_null())
    # pools
    poll_s: float = _set_by("pools.poll-interval", _SOME_TIME)
    # inference
    batch_tokens: int = _set_by("inference.batch-tokens", _COUNT)
    batch_rows: int = _set_by("inference.batch-rows", _COUNT)
    slice_tokens: int = _set_by("inference.slice-tokens", _COUNT)
    question_weight: int = _set_by("inference.question-weight", _COUNT)
    may_recompute: bool | None = _set_by("inference.recompute", _RECOMPUTE)
    host_pages_bytes: int | None = _set_by("inference.host-pages", _SIZE.or_null())
    # ladder
    device_budget_bytes: int | None = _set_by(
        "ladder.device.budget", _SOME_BYTES.or_null(), of_job=True
    )
    host_budget_bytes: int | None = _set_by("ladder.host.budget", _SIZE.or_null())
    disk_path: str | None = _set_by("ladder.disk.path", _FOLDER.or_null())
    disk_quota_bytes: int | None = _set_by("ladder.disk.quota", _SOME_BYTES.or_null())
    is_staged_always: bool = _set_by("ladder.stage", _STAGE)
    store_timeout_s: float = _set_by("ladder.store.timeout", _SOME_TIME)
    is_lending: bool = _set_by("ladder.lending", _LENDING)
    ports: tuple[int, ...] = _set_by("ladder.transfer.ports", _PORTS, of_job=True)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls) -> Config:
        """Read the settings as they are now in this process.

        Raises
        ------
        ValueError
            If one cannot be used; the message names it, what was found and what was expected.
        """
        return cls(**{setting.name: _read(setting) for setting in fields(cls)})

    def here(self) -> Config:
        """These settings, but those of a worker's own job as they are set in this process.

        Settings come from the client. Workers of one cluster may be of several jobs, whose scripts
        say of each what it is and how long it lives. What a job does not set stays.
        """
        of_job = (setting for setting in fields(self) if setting.metadata["of_job"])
        found = {one.name: _read(one) for one in of_job if _is_set(one.metadata["key"])}
        return replace(self, **found)


def _read(setting: Field[Any]) -> Any:
    key, kind = setting.metadata["key"], setting.metadata["kind"]
    found = _find(key)
    try:
        return kind.parse(found)
    except Exception:  # Dask's parsers raise errors of many types
        raise ValueError(f"pcm.{key} must be {kind.wanted}; found {found!r}.") from None


def _find(key: str) -> Any:
    """What is set in this process; the default if Dask's configuration has been reset."""
    for section in accumulate(f"pcm.{key}".split(".")[:-1], "{}.{}".format):
        found = dask.config.get(section, default=None)
        if found is not None and not isinstance(found, Mapping):
            raise ValueError(f"{section} must be a section of settings; found {found!r}.")
    return dask.config.get(f"pcm.{key}", default=_default(key))


def _default(key: str) -> Any:
    return dask.config.get(key, config=_DEFAULTS["pcm"])


def _is_set(key: str) -> bool:
    """Whether it has been set in this process to something else than the default."""
    return bool(_find(key) != _default(key))
