"""How a user reaches a dashboard that only the scheduler's machine can open."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

#: JupyterHub sets it in a notebook's server, which passes requests on to ports of its machine.
_HUB = "JUPYTERHUB_SERVICE_PREFIX"


def proxied(link: str, environ: Mapping[str, str]) -> str:
    """The link to a dashboard on this machine's loopback, through JupyterHub if there is one.

    >>> proxied("http://127.0.0.1:8787/status", {"JUPYTERHUB_SERVICE_PREFIX": "/user/ann/"})
    '/user/ann/proxy/8787/status'
    >>> proxied("http://127.0.0.1:8787/status", {})
    'http://127.0.0.1:8787/status'
    """
    found = urlsplit(link)
    if not environ.get(_HUB) or found.port is None:
        return link
    return f"{environ[_HUB].rstrip('/')}/proxy/{found.port}{found.path}"


def tunnel(link: str) -> str:
    """The command by which another machine opens `link`, as it is, in its browser; "" if none.

    >>> tunnel("http://127.0.0.1:8787/status").startswith("ssh -N -L 8787:127.0.0.1:8787 ")
    True
    >>> tunnel("/user/ann/proxy/8787/status")
    ''
    """
    port = urlsplit(link).port
    if port is None:
        return ""
    return f"ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}"
