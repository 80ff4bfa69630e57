"""A private Slurm on this machine: five nodes with pretended GPUs, and a partition that preempts.

Jobs are tracked by control groups: without, children of a job escape its end, and what is proved of
preemption is proved of nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Nodes with their GPUs: of several kinds and, on the last two, several on a node.
NODES = {
    "a10n1": "a10:1",
    "a10n2": "a10:1",
    "h100n1": "h100:1",
    "titann1": "titanx:2",
    "quadn1": "a100:4",
}
#: Partitions as those of ``jobqueue-configs``, on the same nodes.
_CONFIGURED = ("preemptible", "gpu-nodes", "gpu")
#: What pretends to be a GPU.
_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
GRACE_S, KILL_WAIT_S = 10, 5
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
_CGROUPS = Path("/sys/fs/cgroup/freezer")


def missing() -> str:
    """Why there can be no Slurm here; "" if there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [command for command in _COMMANDS if shutil.which(command, path=path) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install -y --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    return "" if _CGROUPS.is_dir() else "no control groups of version 1"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """Start a Slurm with its files in `folder`; yields its configuration file."""
    for name in ("state", "log", "munge", "run"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    (folder / "munge").chmod(0o700)
    conf = _configure(folder)
    environ = {**os.environ, "SLURM_CONF": str(conf)}
    try:
        _start_munge(folder)
        subprocess.run(["/usr/sbin/slurmctld", "-c"], env=environ, check=True)
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            subprocess.run(["/usr/sbin/slurmd", "-N", node], env=environ, check=True)
        _wait_for_nodes(environ)
        yield conf
    finally:
        with suppress(OSError, subprocess.SubprocessError):
            _end_jobs(environ)
        for pid_file in sorted(folder.rglob("*.pid"), key=lambda file: "munge" in file.name):
            _end(pid_file)


def _start_munge(folder: Path) -> None:
    subprocess.run(
        [
            "/usr/sbin/munged",
            "--force",
            f"--socket={folder}/run/munge.sock",
            f"--key-file={folder}/munge/key",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/log/munged.log",
            f"--seed-file={folder}/munge/seed",
        ],
        check=True,
    )


def _wait_for_nodes(environ: dict[str, str]) -> None:
    stop = time.monotonic() + 60
    while time.monotonic() < stop:
        command = ["sinfo", "-h", "-N", "-p", "owners", "-o", "%T"]
        said = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if said.stdout.split().count("idle") == len(NODES):
            return
        time.sleep(0.1)
    raise RuntimeError(f"Slurm's nodes did not come up: {said.stdout} {said.stderr}")


def _end_jobs(environ: dict[str, str]) -> None:
    """End all jobs, and wait for it: without daemons, the processes of their steps would stay."""
    subprocess.run(["scancel", "--quiet", "--me"], env=environ, check=False, timeout=10)
    command, stop = ["squeue", "--noheader"], time.monotonic() + KILL_WAIT_S + 15
    while time.monotonic() < stop:
        said = subprocess.run(command, env=environ, capture_output=True, check=False, timeout=10)
        if not said.stdout.strip():
            return
        time.sleep(0.2)


def _end(pid_file: Path) -> None:
    """End a daemon by its pid file."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


def _configure(folder: Path) -> Path:
    host = socket.gethostname().split(".")[0]
    lines = [
        "ClusterName=pcm",
        f"SlurmctldHost={host}(127.0.0.1)",
        "SlurmUser=root",
        "SlurmdUser=root",
        f"SlurmctldPort={_free_port()}",
        f"AuthInfo=socket={folder}/run/munge.sock",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "ProctrackType=proctrack/cgroup",
        "TaskPlugin=task/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "ReturnToService=2",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "GresTypes=gpu",
        "SlurmdParameters=config_overrides",
        "SchedulerParameters=bf_interval=2,bf_resolution=1,sched_interval=2,batch_sched_delay=0",
        "PriorityType=priority/basic",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
        f"KillWait={KILL_WAIT_S}",
    ]
    lines += [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=32"
        f" Sockets=1 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=512000 Gres=gpu:{gpus}"
        " State=UNKNOWN"
        for node, gpus in NODES.items()
    ]
    shared = "Nodes=ALL State=UP MaxTime=INFINITE"
    lines += [
        f"PartitionName=owners {shared} PriorityTier=100 PreemptMode=OFF",
        f"PartitionName=opportunistic {shared} Default=YES PriorityTier=1 PreemptMode=CANCEL"
        f" GraceTime={GRACE_S} DefMemPerCPU=200",
        *(
            f"PartitionName={name} {shared} PriorityTier=1 PreemptMode=CANCEL GraceTime={GRACE_S}"
            " DefMemPerCPU=200"
            for name in _CONFIGURED
        ),
    ]
    conf = folder / "slurm.conf"
    conf.write_text("\n".join(lines) + "\n")
    gres = []
    for node, gpus in NODES.items():
        kind, n = gpus.split(":")
        gres += [f"NodeName={node} Name=gpu Type={kind} File={one}" for one in _FILES[: int(n)]]
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")
    (folder / "cgroup.conf").write_text(
        "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
        "ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
    )
    return conf


if __name__ == "__main__":  # whether one can be started here
    with tempfile.TemporaryDirectory() as made, running(Path(made, "slurm")):
        pass
