"""Whether workers accept connections; those behind NAT or a closed port join, and do not."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from distributed.comm import connect
from distributed.comm.addressing import get_address_host_port

#: How long a worker has to accept a connection.
_ANSWER_S = 5.0


async def refusal(address: str, connection_args: dict[str, Any]) -> str:
    """Why there is no connection to a worker; "" if it has accepted one.

    Parameters
    ----------
    address
        Where it says it can be reached.
    connection_args
        What the scheduler's connections are made with.
    """
    with suppress(OSError):
        comm = await connect(address, timeout=_ANSWER_S, **connection_args)
        comm.abort()
        return ""
    if not address.startswith(("tcp://", "tls://")):
        return ""
    # A worker that is busy with Python answers late, but its system accepts for it.
    host, port = get_address_host_port(address)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _ANSWER_S)
    except TimeoutError:
        return f"no answer within {_ANSWER_S:.0f} s"
    except OSError as error:
        return error.strerror or str(error)
    writer.close()
    return ""
