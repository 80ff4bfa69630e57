"""A pool is a kind of job: where it is submitted, what it asks for and how many there may be."""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from dask.utils import parse_bytes, parse_timedelta

from dask_pcm.errors import PoolError

BATCH_SYSTEMS = ("slurm", "pbs", "htcondor", "local")
#: No worker starts with less; and a number without a unit is likely to be meant in another.
_LEAST_MEMORY = 1 << 26
#: A worker listens on one, its nanny on another, and what it stages for others on a third.
_PORTS_OF_WORKER = 3
#: Of a device's memory, what contexts may take: the rest is for activations.
_FOR_CONTEXTS = 0.9
_TEXTS = ("queue", "account", "gpu_type", "device", "scratch", "log_directory", "python")
#: Slurm's and PBS's ways to write a time: days, hours, minutes and seconds.
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?")
_MEMORY = ("total", "per-cpu", "per-gpu", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Jobs of one kind, each of which starts one or several workers.

    Parameters
    ----------
    batch
        The batch system: ``slurm``, ``pbs``, ``htcondor``, or ``local`` for processes on this
        machine.
    queue, account
        The partition or queue, and the account that is charged (HTCondor: none, and
        ``accounting_group``); None for the site's default.
    cores, memory
        CPU cores and memory of a job, on each of its nodes.
    mem
        How the batch system is asked for the memory: ``total`` for a node, ``per-cpu``,
        ``per-gpu``, or ``none`` where a site refuses to be asked.
    walltime
        The time limit of a job, for instance "2h", "02:00:00" or "1-12:00:00"; None for the
        site's default. No bare number: batch systems read them in different units.
    notice
        How long before the end of its walltime a job gets a signal, where the system sends one; at
        most half of it.
        Under HTCondor also what a job asks for at an eviction (``job_max_vacate_time``); the
        machine may give less.
    gpus_per_job
        GPUs of a job, on each of its nodes; 0 for workers on CPUs. Each gets a worker.
    gpus_per_worker
        GPUs that a worker sees, for models that are larger than one.
    gpu_type
        The site's name of the GPU model, for instance "a10"; None for any. Under HTCondor the
        device's own name, for instance "NVIDIA A10".
    device_memory
        The memory of one of its GPUs, for instance "80 GB"; None if it is not known. With it, a
        context that fits on no pool's workers is refused before any job starts, and jobs are
        submitted to pools that it fits. Workers use 0.9 of it for contexts.
    nodes_per_job
        Nodes of a job. More than one need ``srun`` inside the job.
    is_array
        Whether several jobs are submitted as one array; false where a site takes none.
    max_jobs, max_queued
        Limits of jobs in all, and of those that wait; None for no limit. What replaces a job under
        notice comes on top of it until that has ended.
    idle_timeout
        Adaptive clusters give a worker back when it has had no work for this long.
    device
        The device model of its workers, for the policy's estimates; None: detected.
    scratch
        A folder on the node's own disk for workers; None for Dask's default. Environment variables
        in it are the job's, for instance "$TMPDIR".
    ports
        Ports that workers, their nannies and what they send each other listen on, as "first:last",
        for sites that open few; None for any. Each worker on a node takes three.
    log_directory
        A folder for the output of jobs; None for ``~/.dask_pcm/logs``.
    directives
        Further lines of the script's header, for instance ``["--constraint=gpu80"]``, or of
        HTCondor's submit file, ``["request_disk = 20GB"]``. One that asks for GPUs takes the place
        of what `gpus_per_job` and `gpu_type` would ask for.
    prologue
        Shell commands before the workers start, for instance ``["module load cuda"]``.
    worker_args
        Further options of ``dask worker``.
    python
        The interpreter on the nodes, as a shell reads it; None for the one that submits.

    Raises
    ------
    PoolError
        A value cannot be used.
    """

    batch: str = "slurm"
    queue: str | None = None
    account: str | None = None
    cores: int = 1
    memory: str = "4 GiB"
    mem: str = "total"
    walltime: str | None = None
    notice: str = "60s"
    gpus_per_job: int = 0
    gpus_per_worker: int = 1
    gpu_type: str | None = None
    device_memory: str | None = None
    nodes_per_job: int = 1
    is_array: bool = True
    max_jobs: int | None = None
    max_queued: int | None = None
    idle_timeout: str = "60s"
    device: str | None = None
    scratch: str | None = None
    ports: str | None = None
    log_directory: str | None = None
    directives: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()
    worker_args: tuple[str, ...] = ()
    python: str | None = None
    #: Parsed from the parameters.
    memory_bytes: int = field(init=False)
    walltime_s: float | None = field(init=False)
    idle_s: float = field(init=False)
    notice_s: float = field(init=False)

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        set_("memory_bytes", self._parsed("memory", parse_bytes))
        if isinstance(self.walltime, (int, float)) or str(self.walltime).strip().isdecimal():
            wanted = "a time with its unit, such as '2h'; in YAML, a clock in quotes: '2:00:00'"
            raise _refused("walltime", self.walltime, wanted)
        set_("walltime_s", None if self.walltime is None else self._parsed("walltime", _seconds))
        set_("idle_s", self._parsed("idle_timeout", _seconds))
        set_("notice_s", self._parsed("notice", _seconds))
        if self.memory_bytes < _LEAST_MEMORY:
            raise _refused("memory", self.memory, "a size with its unit, such as '8 GiB'")
        for name in ("directives", "prologue", "worker_args"):
            value = getattr(self, name)
            is_list = isinstance(value, (list, tuple))
            if not is_list or not all(isinstance(one, str) for one in value):
                raise _refused(name, value, "a list of texts")
            set_(name, tuple(value))
        if any(one.lstrip().startswith("#") for one in self.directives):
            raise _refused("directives", list(self.directives), "options without '#SBATCH'")
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value or "\n" in value):
                raise _refused(name, value, "a text of one line")
        if self.batch not in BATCH_SYSTEMS:
            raise _refused("batch", self.batch, f"one of {', '.join(BATCH_SYSTEMS)}")
        if self.mem not in _MEMORY:
            raise _refused("mem", self.mem, f"one of {', '.join(_MEMORY)}")
        for name in ("cores", "gpus_per_worker", "nodes_per_job"):
            self._check_count(name, 1)
        self._check_count("gpus_per_job", 0)
        for name in ("max_jobs", "max_queued"):
            if getattr(self, name) is not None:
                self._check_count(name, 0)
        if self.gpus_per_job % self.gpus_per_worker:
            raise PoolError(
                f"gpus_per_job={self.gpus_per_job} cannot be divided among workers with"
                f" gpus_per_worker={self.gpus_per_worker} each. Make it a multiple."
            )
        for name, is_given in (
            ("mem='per-gpu'", self.mem == "per-gpu"),
            ("device_memory", self.device_memory is not None),
        ):
            if is_given and not self.gpus_per_job:
                raise PoolError(f"{name} needs gpus_per_job of 1 or more.")
        self._check_devices_and_ports()

    def _check_devices_and_ports(self) -> None:
        if self.device_memory is not None:
            self._parsed("device_memory", parse_bytes)
        if self.ports is not None:
            least = _PORTS_OF_WORKER * self.workers_per_node
            try:
                n_ports = len(port_range(self.ports))
            except (ValueError, TypeError) as error:
                raise _refused("ports", self.ports, "'first:last', such as '9000:9099'") from error
            if n_ports < least:
                raise _refused("ports", self.ports, f"{least} or more: {_PORTS_OF_WORKER} a worker")

    @property
    def workers_per_node(self) -> int:
        """Workers of a job on each of its nodes."""
        return max(1, self.gpus_per_job // self.gpus_per_worker)

    @property
    def workers_per_job(self) -> int:
        """Workers of a job."""
        return self.workers_per_node * self.nodes_per_job

    @property
    def device_bytes(self) -> int | None:
        """What contexts may take on the devices of one worker, in bytes; None if not known."""
        if self.device_memory is None:
            return None
        return int(_FOR_CONTEXTS * parse_bytes(self.device_memory)) * self.gpus_per_worker

    @property
    def is_requeued(self) -> bool:
        """Whether the batch system, not the cluster, submits a job again that it has evicted."""
        return self.batch == "htcondor"

    @property
    def max_workers(self) -> float:
        """The most workers that its jobs may have."""
        return math.inf if self.max_jobs is None else self.max_jobs * self.workers_per_job

    @property
    def warned_s(self) -> float:
        """How long before the end of its walltime a job is told, in seconds; half of it at most."""
        return self.notice_s if self.walltime_s is None else min(self.notice_s, self.walltime_s / 2)

    @property
    def clock(self) -> str | None:
        """The time limit in hours, minutes and seconds, as batch systems read it."""
        if self.walltime_s is None:
            return None
        minutes, seconds = divmod(math.ceil(self.walltime_s), 60)
        return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"

    def _parsed(self, name: str, parse: Callable[[Any], Any]) -> Any:
        value = getattr(self, name)
        try:
            found = parse(value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            wanted = "a size, such as '8 GiB'" if "memory" in name else "a time, such as '2h'"
            raise _refused(name, value, wanted) from error
        if not found > 0:
            raise _refused(name, value, "more than 0")
        return found

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _refused(name, value, f"a whole number, at least {least}")


def port_range(text: Any) -> range:
    """Ports as "first:last", or one.

    Raises
    ------
    ValueError, TypeError
        It is no range of ports.

    >>> port_range("9000:9002"), port_range(0)
    (range(9000, 9003), range(0, 1))
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise TypeError(text)
    first, _, last = str(text).partition(":")
    found = range(int(first), int(last or first) + 1)
    if not found or found[0] < 0 or found[-1] > 65_535:
        raise ValueError(text)
    return found


def pools_of(given: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Pool]:
    """Pools by name, from what a user gives: a mapping, or a YAML file with a section ``pools``.

    Raises
    ------
    PoolError
        The file cannot be read, or a pool has an unknown key or a value that cannot be used.
    """
    pools: Mapping[str, Any] = given if isinstance(given, Mapping) else read_file(given)["pools"]
    if not pools:
        raise PoolError("There is no pool. Give at least one: {'gpus': pcm.Pool(...)}.")
    return {str(name): _pool(str(name), value) for name, value in pools.items()}


def read_file(file: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The sections of a cluster file: ``pools``, and ``cluster`` if it has one.

    Raises
    ------
    PoolError
        It cannot be read, or has other sections.
    """
    path = Path(os.fspath(file))
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        found = yaml.load(text, _Loader)  # a safe loader
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PoolError(f"The cluster file {str(path)!r} cannot be read: {error}") from error
    pools = found.get("pools") if isinstance(found, dict) else None
    if not isinstance(pools, dict) or not set(found) <= {"pools", "cluster"}:
        raise PoolError(
            f"The cluster file {str(path)!r} must have a section pools, with a pool a name, and may"
            " have a section cluster."
        )
    return found


class _Loader(yaml.SafeLoader):
    """Refuses keys that are there twice, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See ``yaml.SafeLoader``."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"it has {repeated[0]!r} more than once")
        return super().construct_mapping(node, deep)


def _pool(name: str, given: Any) -> Pool:
    """One pool, with its name in every error."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise PoolError(
            f"A pool is called {name!r}. Use letters, digits, '-' and '_', and begin with one of"
            " the first two."
        )
    if isinstance(given, Pool):
        return given
    if not isinstance(given, Mapping):
        raise PoolError(f"Pool {name!r} is {given!r:.80}; expected a Pool or its parameters.")
    refuse_unknown(f"Pool {name!r}", given, [f.name for f in fields(Pool) if f.init])
    try:
        return Pool(**given)
    except PoolError as error:
        raise PoolError(f"Pool {name!r}: {error}") from error


def refuse_unknown(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise PoolError if `given` has a key that is not known."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known are {', '.join(known)}."
            raise PoolError(f"{what} has an unknown key {key!r}.{hint}")


def _seconds(value: Any) -> float:
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value.strip())):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        if clock[4] is None and clock[1] is None:  # as Slurm reads "90:00"
            hours, minutes, seconds = 0, hours, minutes
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    if isinstance(value, bool):
        raise TypeError(value)
    return float(parse_timedelta(value, "s"))


def _refused(name: str, value: Any, wanted: str) -> PoolError:
    return PoolError(f"{name} is {value!r:.80}; expected {wanted}.")
