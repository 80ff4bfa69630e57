"""The toolkit's settings: Dask configuration under ``pcm``, read into one dataclass.

Each key of ``pcm.yaml`` can be set as any Dask setting can: in a YAML file, by an environment
variable (``DASK_PCM__WORKER__LANES=3``) or with ``dask.config.set({"pcm.worker.lanes": 3})``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
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
    n_load_attempts: int
    idle_s: float | None
    n_lanes: int
    n_threads: int | None
    imports: tuple[str, ...]
    unit_s: float
    max_unit_rows: int
    unit_bytes: int
    ready_s: float
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
        """Read the settings as they are now in this process."""

        def get(key: str) -> object:
            return dask.config.get(f"pcm.{key}")

        def seconds(key: str) -> float:
            return float(parse_timedelta(get(key), default="s"))

        def size(key: str, least: int = 1) -> int:
            value = int(parse_bytes(get(key)))
            if value < least:
                raise ValueError(f"pcm.{key} must be {least} bytes or more; found {get(key)!r}.")
            return value

        def count(key: str) -> int:
            value = int(str(get(key)))
            if value < 1:
                raise ValueError(f"pcm.{key} must be at least 1; found {value}.")
            return value

        def optional(key: str, read: Callable[[str], T]) -> T | None:
            return None if get(key) is None else read(key)

        def ports(key: str) -> tuple[int, ...]:
            first, _, last = str(get(key)).partition(":")
            try:
                found = tuple(range(int(first), int(last or first) + 1))
            except ValueError:
                found = ()
            if not found or found[0] < 0 or found[-1] > 65_535:
                raise ValueError(f"pcm.{key} must be 0, a port or first:last; found {get(key)!r}.")
            return found

        def choice(key: str, options: tuple[str, ...]) -> str:
            value = str(get(key))
            if value not in options:
                raise ValueError(f"pcm.{key} must be one of {', '.join(options)}; found {value!r}.")
            return value

        def texts(key: str) -> tuple[str, ...]:
            found = get(key) or []
            if not isinstance(found, (list, tuple)):
                raise ValueError(f"pcm.{key} must be a list; found {found!r}.")
            return tuple(map(str, found))

        return cls(
            pipeline_s=seconds("gate.pipeline"),
            tick_s=seconds("gate.tick"),
            n_load_attempts=count("gate.load-attempts"),
            idle_s=optional("context.idle-timeout", seconds),
            n_lanes=count("worker.lanes"),
            n_threads=optional("worker.threads", count),
            imports=texts("worker.imports"),
            unit_s=seconds("run.unit-seconds"),
            max_unit_rows=count("run.max-unit-rows"),
            unit_bytes=size("run.unit-bytes"),
            ready_s=seconds("run.ready-seconds"),
            batch_tokens=count("inference.batch-tokens"),
            batch_rows=count("inference.batch-rows"),
            device_budget_bytes=optional("ladder.device.budget", size),
            host_budget_bytes=optional("ladder.host.budget", lambda k: size(k, least=0)),
            disk_path=optional("ladder.disk.path", lambda key: str(get(key))),
            disk_quota_bytes=optional("ladder.disk.quota", size),
            store_timeout_s=seconds("ladder.store.timeout"),
            ports=ports("ladder.transfer.ports"),
            is_staged_always=choice("ladder.stage", ("auto", "always")) == "always",
        )
