"""``python -m dask_pcm.pools.launcher``: the process of a job, which starts its workers.

With one worker it becomes ``dask worker``. With several it starts one for each device, passes the
batch system's signals on, and starts a worker again that has ended without being told to. Batch
systems signal the process of a job, and some end a job's other processes without a word.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from dask.utils import parse_bytes, parse_timedelta

from dask_pcm.plugins.classad import JOB, MACHINE, number_in, text_in

#: Each of these lists the devices of a job; what libraries see is set by the same name.
_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
#: What a scratch folder must have room for.
_SCRATCH_BYTES = 1 << 20
#: How long the scheduler has to accept a connection.
_ANSWER_S = 10.0
#: Before a worker is started again: this long, and twice as long each time that it does not last.
_WAIT_S, _LONGEST_S, _LASTING_S = 1.0, 60.0, 60.0
#: The time limit of a worker, from the start of its process.
_WALLTIME = "DASK_PCM__WORKER__WALLTIME"


def job_id(environ: Mapping[str, str]) -> str:
    """The batch system's id of this job, as the cluster knows it.

    >>> job_id({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "15"})
    '12_3'
    """
    if "PCM_JOB_ID" in environ:
        return environ["PCM_JOB_ID"]
    if "PBS_JOBID" in environ:
        return environ["PBS_JOBID"].split(".")[0]
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID") or f"{os.getpid()}"


def start_number(environ: Mapping[str, str]) -> int:
    """How often this job has been started: HTCondor starts evicted jobs again, under their id."""
    return number_in(environ, JOB, "NumShadowStarts") or 1


def shares(devices: Sequence[str], n_workers: int) -> list[list[str]]:
    """The devices of each worker.

    Raises
    ------
    SystemExit
        They cannot be divided evenly: two workers on a device would each expect its whole memory.

    >>> shares(["0", "1", "2", "3"], 2)
    [['0', '1'], ['2', '3']]
    """
    if len(devices) % n_workers:
        sys.exit(
            f"This job has {len(devices)} devices ({', '.join(devices)}) for {n_workers} workers."
            " Set gpus_per_job to the number of devices that the batch system gives a job."
        )
    each = len(devices) // n_workers
    return [list(devices[k * each : (k + 1) * each]) for k in range(n_workers)]


def environments(environ: Mapping[str, str], n_workers: int) -> list[dict[str, str]]:
    """The environment of each worker, which sees its own devices only.

    Where the batch system lists none (some hide all other devices from a job instead), they are
    counted: a job has several workers only if it has a number of devices for each.

    >>> [one["CUDA_VISIBLE_DEVICES"] for one in environments({}, 2)]
    ['0', '1']
    """
    found: list[dict[str, str]] = [dict(environ) for _ in range(n_workers)]
    if n_workers > 1 and not any(environ.get(name, "").strip() for name in _DEVICES):
        each = int(environ.get("DASK_PCM__WORKER__DEVICES", "1"))
        for k, one in enumerate(found):
            one["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(k * each, (k + 1) * each)))
    for name in _DEVICES:
        devices = [device for device in environ.get(name, "").split(",") if device.strip()]
        if devices and n_workers > 1:
            for one, share in zip(found, shares(devices, n_workers), strict=True):
                one[name] = ",".join(share)
    return found


def node_of(environ: Mapping[str, str]) -> str:
    """This machine, as its batch system calls it."""
    machine = text_in(environ, MACHINE, "Machine")
    return environ.get("SLURMD_NODENAME") or machine or socket.gethostname()


def check_scratch(folder: str, environ: Mapping[str, str]) -> None:
    """End the job if its workers could not use their folder on this node.

    The cluster reads the words in the job's output (``fleet.BAD_NODE``), and excludes the node.

    Raises
    ------
    SystemExit
        The folder cannot be made, or nothing can be written to it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_SCRATCH_BYTES))
    except OSError as error:
        why = f"its scratch folder {folder!r}: {error.strerror}"
        sys.exit(f"Node {node_of(environ)} cannot be used: {why}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the workers of this job; see ``pools/batch.py`` for what it is called with."""
    parser = argparse.ArgumentParser(prog="dask_pcm.pools.launcher", allow_abbrev=False)
    for option in ("--name", "--pool"):
        parser.add_argument(option, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--nthreads", type=int, default=1)
    parser.add_argument("--memory-limit", default="0")
    parser.add_argument("--local-directory")
    parser.add_argument("scheduler")
    given, rest = parser.parse_known_args(arguments)
    if given.local_directory is not None:
        check_scratch(given.local_directory, os.environ)
        rest += ["--local-directory", given.local_directory]
    n = given.workers
    name = f"{given.pool}-{job_id(os.environ)}"
    if (n_starts := start_number(os.environ)) > 1:  # no worker has the name of a lost one
        name = f"{name}-start{n_starts}"
    if int(os.environ.get("SLURM_NNODES", "1")) > 1 and "SLURM_NODEID" in os.environ:
        name = f"{name}-{os.environ['SLURM_NODEID']}"
    command = [sys.executable, "-m", "distributed.cli.dask_worker", given.scheduler]
    command += ["--nthreads", str(max(1, given.nthreads // n))]
    command += ["--memory-limit", str(parse_bytes(given.memory_limit) // n)]
    command += ["--preload-nanny", "dask_pcm.preload", *rest]
    os.environ["PCM_JOB_WORKERS"] = str(n)  # they divide the host memory of the job
    if n == 1:
        os.execv(sys.executable, [*command, "--name", name])
    each = environments(os.environ, n)
    workers = [_Worker([*command, "--name", f"{name}-{k}"], each[k]) for k in range(n)]
    sys.exit(_Launcher(workers, given.scheduler).run())


def answers(address: str) -> bool:
    """Whether something listens at an address; otherwise workers would be started for ever."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError):
        return False
    return True


class _Worker:
    """One worker, and when it may be started again."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self._command = command
        self._environ = environ
        self._wait_s = _WAIT_S
        self._begun = time.monotonic()
        self.starts_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it has what is left of the job's time."""
        self._started = time.monotonic()
        environ = dict(self._environ)
        if _WALLTIME in environ:
            left_s = float(parse_timedelta(environ[_WALLTIME], "s")) - self._started + self._begun
            environ[_WALLTIME] = f"{max(1.0, left_s):.0f}s"
        self.process = subprocess.Popen(self._command, env=environ)

    def end(self) -> None:
        """It has ended by itself: wait before it is started again."""
        self.process = None
        is_lasting = time.monotonic() - self._started > _LASTING_S
        self._wait_s = _WAIT_S if is_lasting else min(2 * self._wait_s, _LONGEST_S)
        self.starts_at = time.monotonic() + self._wait_s


class _Launcher:
    """Several workers of a job."""

    def __init__(self, workers: list[_Worker], scheduler: str) -> None:
        self._workers = workers
        self._scheduler = scheduler
        self._is_told = False
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)

    def run(self) -> int:
        """Keep the workers running until they end as they should; return the exit code."""
        while self._workers:
            for worker in list(self._workers):
                code = None if worker.process is None else worker.process.poll()
                # Code 0: the scheduler has retired it, or is gone.
                if code == 0 or (self._is_told and (worker.process is None or code is not None)):
                    self._workers.remove(worker)
                elif code is not None:
                    if not answers(self._scheduler):  # nothing to start it for
                        self._workers.remove(worker)
                    else:
                        worker.end()
                elif worker.process is None and time.monotonic() >= worker.starts_at:
                    worker.start()
            time.sleep(0.05)
        return 0

    def _pass_on(self, number: int, frame: object) -> None:
        self._is_told = True
        for worker in self._workers:
            if worker.process is not None and worker.process.poll() is None:
                worker.process.send_signal(number)


if __name__ == "__main__":
    main()
