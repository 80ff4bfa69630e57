"""Messages between workers of one host, over Unix sockets that only processes of one user use.

A lender listens at an abstract address, which vanishes with its process; the kernel lists them all.
A lease is a connection: while both ends live it is open, and if one of them dies the kernel tells
the other. So no record of leases can be wrong after a crash, and no message belongs to an earlier
lease. Memory of the host is passed as a file descriptor of a memory file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import struct
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

_UNIX = Path("/proc/net/unix")
_MOST_BYTES = 4096
_N_WAITING = 64
#: Lenders that are asked, at most.
_MOST_LENDERS = 64
_PEER = struct.Struct("3i")  # of process, user and group
#: The sockets of this process. A forked child closes its copies: a lease ends with the process that
#: has it, though its children live.
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _begin(cluster: str) -> str:
    name = hashlib.blake2b(cluster.encode(), digest_size=8).hexdigest()
    return f"dask-pcm-lender-{os.getuid()}-{name}-"


def listen(cluster: str) -> socket.socket:
    """A socket at which this process is a lender of a cluster.

    Raises
    ------
    OSError
        If the system has no such sockets.
    """
    name = f"{_begin(cluster)}{random.SystemRandom().getrandbits(64):016x}"
    found = _socket()
    try:
        found.bind(f"\0{name}")
        found.listen(_N_WAITING)
        found.setblocking(False)
    except BaseException:
        found.close()
        raise
    return found


def lenders(cluster: str) -> list[str]:
    """Addresses of the lenders of a cluster on this host, in random order."""
    begin = f"@{_begin(cluster)}"
    with suppress(OSError):
        names = [
            line.rpartition(" ")[2] for line in _UNIX.read_text("ascii", "replace").split("\n")
        ]
        found = sorted({f"\0{name[1:]}" for name in names if name.startswith(begin)})
        return random.sample(found, min(len(found), _MOST_LENDERS))
    return []


def connect(address: str, timeout_s: float = 5.0) -> socket.socket | None:
    """A connection to a lender; None if it is gone, or belongs to another user.

    Parameters
    ----------
    timeout_s
        How long it may take to connect, and each message from then on.
    """
    found = _socket()
    try:
        found.settimeout(timeout_s)
        found.connect(address)
        if is_of_this_user(found):
            return found
    except OSError:  # it has ended, or has too many connections
        pass
    found.close()
    return None


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection of a borrower; None if it is gone, or belongs to another user."""
    try:
        found, _ = listener.accept()
    except OSError:  # or this process has too many files open
        return None
    _sockets.add(found)
    if is_of_this_user(found):
        found.setblocking(False)
        return found
    found.close()
    return None


def is_of_this_user(connection: socket.socket) -> bool:
    """Whether the other end belongs to the user of this process."""
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return bool(_PEER.unpack(said)[1] == os.getuid())


def send(connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> bool:
    """Send a message, and a descriptor of a file; False if the other end is gone."""
    try:
        fds = [] if fd is None else [fd]
        socket.send_fds(connection, [json.dumps(message).encode()], fds)
        return True
    except OSError:
        return False


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """A message and a descriptor, if it has one; None if the other end is gone or talks nonsense.

    Raises
    ------
    BlockingIOError
        If there is no message, and the connection does not wait for one.
    """
    fds: list[int] = []
    try:
        said, fds, _, _ = socket.recv_fds(connection, _MOST_BYTES, 1)
        message = json.loads(said) if said else None
        if isinstance(message, dict):
            for fd in fds:
                os.set_inheritable(fd, False)
            return message, fds.pop() if fds else None
    except BlockingIOError:
        raise
    except (OSError, ValueError):
        pass
    for fd in fds:
        os.close(fd)
    return None


def _socket() -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _sockets.add(found)
    return found


def _close_in_child() -> None:
    for one in _sockets:
        with suppress(OSError):
            one.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
