"""How another terminal, and a job, find the cluster: a file with its address and certificates.

Every cluster has a folder of its own in the user's home, which no other user can enter. Jobs read
it there, so the home is one that the nodes share. A cluster whose process is killed leaves its
folder, and jobs that wait; the next one on the same machine removes both.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from distributed import Client, Security
from distributed.comm.addressing import parse_address, parse_host_port

from dask_pcm.errors import PoolError

_FILES = {"tls_ca_file": "ca.pem", "tls_worker_cert": "cert.pem", "tls_worker_key": "key.pem"}
_NAME, _JOBS = "connection.json", "jobs"
#: Seconds within which a machine refuses a connection to a port on which nothing listens.
_REFUSAL_S = 5.0


def home() -> Path:
    """The folder of all clusters of this user."""
    return (
        Path(os.environ.get("DASK_PCM_HOME") or Path.home() / ".dask_pcm").expanduser().absolute()
    )


@dataclass(frozen=True, slots=True)
class Connection:
    """The files of one cluster.

    Attributes
    ----------
    folder
        Where they are.
    tls
        The certificates, by option of ``dask worker``; empty without TLS.
    left
        Jobs of clusters whose process was killed: batch system and id.
    """

    folder: Path
    tls: Mapping[str, str]
    left: tuple[tuple[str, str], ...] = ()

    @property
    def file(self) -> Path:
        """The connection file."""
        return self.folder / _NAME

    @classmethod
    def make(cls, name: str, security: Security | None) -> Connection:
        """Make the folder, with the certificates of `security` in it."""
        plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
        clusters = home() / "clusters"
        left = tuple(_remove_left(clusters))
        folder = clusters / f"{plain}-{os.urandom(3).hex()}-{os.getpid()}@{socket.gethostname()}"
        folder.mkdir(mode=0o700, parents=True)
        tls = {}
        for field, file in _FILES.items() if security is not None else ():
            path, given = folder / file, getattr(security, field)
            try:
                _write(path, _text(given))
            except (OSError, TypeError) as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise PoolError(
                    f"security has no {field} that can be read: {given!r:.60}. Leave security out"
                    " for temporary certificates."
                ) from error
            tls[f"--{field.replace('_worker', '').replace('_', '-')}"] = str(path)
        return cls(folder, tls, left)

    def publish(self, address: str) -> None:
        """Write the connection file."""
        _write(self.file, json.dumps({"address": address, "tls": dict(self.tls)}))

    def note_jobs(self, batch: str, jobs: Iterable[str]) -> None:
        """Note jobs that were submitted, should this process be killed."""
        text = "".join(f"{batch} {job}\n" for job in jobs)
        with suppress(OSError):
            fd = os.open(self.folder / _JOBS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(fd, "a", encoding="utf-8") as file:
                file.write(text)

    def remove(self) -> None:
        """Remove all files; workers that have not read them yet end."""
        shutil.rmtree(self.folder, ignore_errors=True)


def connect(file: str | os.PathLike[str], **options: Any) -> Client:
    """Connect to a cluster that was started elsewhere by this user.

    Parameters
    ----------
    file
        The cluster's connection file, ``cluster.connection_file``.
    **options
        Passed to ``distributed.Client``.

    Raises
    ------
    PoolError
        The file is missing, is none, or others can read the certificates; or the scheduler does not
        answer, which is known at once where its machine is reached and its process has ended.
    """
    path = Path(file).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "address" in found and "tls" not in found:
            raise PoolError(
                f"{str(path)!r} is a scheduler file of Dask's, not a connection file of a"
                f" PoolCluster. Use the address that it has: {found['address']!r}."
            )
        address, tls = str(found["address"]), dict(found["tls"])
    except FileNotFoundError as error:
        raise PoolError(
            f"There is no connection file {str(path)!r}: the cluster is closed, or its folder is on"
            " another machine."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PoolError(f"{str(path)!r} is no connection file: {error!r:.100}.") from error
    if not tls:
        return _client(path, address, **options)
    for name in tls.values():
        _refuse_readable(Path(name))
    ca, cert, key = (tls[f"--tls-{one}"] for one in ("ca-file", "cert", "key"))
    security = Security(
        tls_ca_file=ca, tls_client_cert=cert, tls_client_key=key, require_encryption=True
    )
    return _client(path, address, security=security, **options)


def _client(path: Path, address: str, **options: Any) -> Client:
    try:
        if not options.get("asynchronous"):  # then it is connected later
            raise_if_refused(address, options.get("security"))
        client = Client(address, **options)
    except OSError as error:
        raise PoolError(
            f"The scheduler of {str(path)!r} does not answer at {address}: its process has ended,"
            " or cannot be reached from here."
        ) from error
    client.connection_file = str(path.absolute())
    return client


def raise_if_refused(address: str, security: Any = None) -> None:
    """Raise ConnectionRefusedError if nothing listens at an address: Dask tries for half a minute.

    Other failures may pass.
    """
    try:
        where = parse_host_port(parse_address(address)[1])
        with socket.create_connection(where, timeout=_REFUSAL_S) as found:
            if isinstance(security, Security):  # the scheduler warns of handshakes that fail
                context = security.get_connection_args("client")["ssl_context"]
                context.wrap_socket(found).close()
    except ConnectionRefusedError:
        raise
    except (OSError, ValueError):
        pass


def _remove_left(clusters: Path) -> Iterator[tuple[str, str]]:
    """Remove the folders of clusters whose process on this machine is gone; yield their jobs."""
    for folder in clusters.glob(f"*-*@{socket.gethostname()}"):
        pid = folder.name.rpartition("@")[0].rpartition("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with suppress(OSError):
                for line in (folder / _JOBS).read_text(encoding="utf-8").splitlines():
                    batch, _, job = line.partition(" ")
                    yield batch, job
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_readable(path: Path) -> None:
    """Raise if others than the user can read a certificate or its key."""
    try:
        found = path.stat()
    except OSError as error:
        raise PoolError(
            f"The certificate {str(path)!r} cannot be read: {error.strerror}."
        ) from error
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077 or found.st_uid != os.getuid():
        raise PoolError(
            f"The certificate {str(path)!r} has mode {mode:o} and owner {found.st_uid}; expected"
            f" 600 and {os.getuid()}. Others may have read it: start the cluster again."
        )


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def _text(given: str) -> str:
    """A certificate: its text, or the file that has it."""
    return given if "\n" in given else Path(given).read_text(encoding="utf-8")
