"""``install(client)`` registers the plugins: the scheduler's first, since the workers' greet it."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import dask
import distributed
from distributed import Client, SpecCluster, default_client, get_client, get_worker
from distributed.protocol.pickle import dumps

from dask_pcm.config import Config
from dask_pcm.context.context import Context
from dask_pcm.errors import InstallError, RecipeError
from dask_pcm.plugins.delivery import ask_workers, deliver, deliver_to_nannies, withdraw
from dask_pcm.plugins.nanny.local import forget_local_nannies, keep_local_nannies
from dask_pcm.plugins.nanny.plugin import KeeperPlugin
from dask_pcm.plugins.scheduler.plugin import GATE, GatePlugin
from dask_pcm.plugins.shipping import by_value
from dask_pcm.plugins.worker.plugin import CONTEXTS, ContextPlugin
from dask_pcm.version import __version__

NOT_INSTALLED_TEXT = (
    "The toolkit is not installed on this cluster: call dask_pcm.install(client) first."
)

#: Clients of the process from which this one was forked. They look alive, and nothing runs them.
_left_behind: weakref.WeakSet[Client] = weakref.WeakSet()


def _leave_clients() -> None:
    _left_behind.update(getattr(Client, "_instances", ()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_clients)


def install(client: Client | None = None) -> None:
    """Install the toolkit on a cluster. Idempotent; no worker restarts.

    Parameters
    ----------
    client
        A client of the cluster; the most recent one if left out.

    Raises
    ------
    InstallError
        If there is no client, or if the package is missing on the scheduler or a worker, or if
        its version or that of Python, dask or distributed differs from the client's.

    Notes
    -----
    Blocking; for synchronous clients. The scheduler plugin is installed first, because worker
    plugins greet it as soon as they are set up. Workers that join later are set up automatically;
    so are workers that do not answer within seconds, once they answer again.
    """
    client = current_client(client)
    answering = _check_versions(client)
    config = Config.read()
    client.register_plugin(GatePlugin(config))
    keeper, contexts = KeeperPlugin(config), ContextPlugin(config)
    # Nannies before workers: a worker's plugin calls its nanny's handlers during setup.
    client.run_on_scheduler(deliver_to_nannies, dumps(keeper), keeper.name, answering)
    # A worker that already has the plugin does not set it up again: it must greet the new gate.
    client.run_on_scheduler(deliver, dumps(contexts), contexts.name, _greet, answering)
    if isinstance(client.cluster, SpecCluster):
        keep_local_nannies(client.cluster)


def release(*contexts: Context, client: Client | None = None) -> int:
    """Evict contexts from all workers, each as soon as no task holds it.

    Their staged files stay on disk. If later work needs a released context, it is loaded again.

    Parameters
    ----------
    *contexts
        The contexts to release. Equal recipes are the same context, whichever client made them.
    client
        A client of the cluster; the most recent one if left out.

    Returns
    -------
    int
        Number of workers that held one of them.

    Raises
    ------
    RecipeError
        If an argument is not a context.
    """
    client = current_client(client)
    for context in contexts:
        if not isinstance(context, Context):
            raise RecipeError(f"release takes a dask_pcm.Context; found {context!r:.80}.")
    if not is_installed(client):
        return 0
    digests = [context.digest for context in contexts]
    n_holding: int = client.sync(client.scheduler.pcm_release, digests=digests)
    return n_holding


def explain(what: Any, client: Client | None = None) -> str:
    """Explain why a task waits, or which worker it was sent to and why.

    Parameters
    ----------
    what
        A future, its key, or the name of a part that a run is to write
        (``part-000000000000-000000001000.parquet``), with or without its extension.
    client
        A client of the cluster; the most recent one if left out.

    Returns
    -------
    str
        For each worker, why it has not got the task; and the latest decisions about the task. The
        gate keeps its last 2,000 decisions.

    Examples
    --------
    >>> print(explain(future))  # doctest: +SKIP
    'verify-3' waits (behind 2 of 40 others of its group) for context 'load'.
      2 workers: loading, ready in about 3.1 s
    """
    client = current_client(client)
    if not is_installed(client):
        return NOT_INSTALLED_TEXT
    key = getattr(what, "key", what)
    told: str = client.sync(client.scheduler.pcm_explain, key=key)
    return told


def uninstall(client: Client | None = None) -> None:
    """Remove the toolkit from a cluster. No worker restarts and no work is lost.

    Tasks that wait at the gate continue as plain Dask tasks, and each loads its context where it
    runs. Contexts on workers are closed as soon as no task holds them. Does nothing if the toolkit
    is not installed.

    Parameters
    ----------
    client
        A client of the cluster; the most recent one if left out.
    """
    client = current_client(client)

    def leave(dask_scheduler: Any = None) -> bool:
        gate = dask_scheduler.plugins.get(GATE)
        if gate is not None:
            gate.uninstall()
        return gate is not None

    client.run_on_scheduler(leave)
    # Even without a gate: an earlier uninstall may have failed after the first step.
    client.run_on_scheduler(withdraw, CONTEXTS, is_nannys=False)
    client.run_on_scheduler(withdraw, KeeperPlugin.name, is_nannys=True)
    if isinstance(client.cluster, SpecCluster):
        forget_local_nannies(client.cluster)


def current_client(client: Client | None = None, instead: str | None = None) -> Client:
    """Return `client`, or the most recent one if left out, in a task that of its worker.

    It is synchronous and open.

    Parameters
    ----------
    instead
        What to do with an asynchronous client, for the error; "" accepts it.

    Raises
    ------
    InstallError
        If there is no client, or it is asynchronous, closed, or of a process that forked this one.
    """
    if client is None:
        try:
            client = default_client()
        except ValueError:
            client = _client_of_worker()
    if not isinstance(client, Client):
        what = f"client=Client({'address' if isinstance(client, str) else 'cluster'})"
        raise InstallError(
            f"client is {client!r:.80}; expected a dask.distributed.Client. Pass {what}."
        )
    if client.asynchronous and instead != "":
        raise InstallError(
            instead
            or "This client is asynchronous. Installing and running need a synchronous client: make"
            " one with Client(address), in another thread if an event loop runs in this one."
        )
    if client in _left_behind:
        raise InstallError(
            f"This process was forked from the one in which the client {client.id} was made, which"
            " has its connection. Make a client here: Client(address)."
        )
    if client.status in ("closed", "closing"):
        raise InstallError(
            f"The client {client.id} is {client.status}. Make another one: client ="
            " Client(cluster), or Client(address)."
        )
    return client


def _greet(dask_worker: Any = None) -> None:
    """Greet the gate; runs on a worker that already has the plugin."""
    plugin = dask_worker.plugins.get(CONTEXTS)
    if isinstance(plugin, ContextPlugin):
        plugin.greet()


def _client_of_worker() -> Client:
    """The client of this task's worker; InstallError outside a task."""
    try:
        get_worker()
    except ValueError:
        raise InstallError(
            "There is no Dask client yet. Make one first: client = Client(cluster)."
        ) from None
    return get_client()


def is_installed(client: Client) -> bool:
    """Whether the gate is on this client's scheduler."""

    def has_gate(dask_scheduler: Any = None) -> bool:
        return GATE in dask_scheduler.plugins

    return bool(client.run_on_scheduler(has_gate))


def versions() -> dict[str, str]:
    """Versions that must agree between client, scheduler and workers."""
    return {
        "python": ".".join(map(str, sys.version_info[:2])),
        "dask": dask.__version__,
        "distributed": distributed.__version__,
        "dask_pcm": __version__,
    }


def _versions_there() -> dict[str, str]:
    """As ``versions``, on the scheduler or a worker."""
    # Pickled by value, so that it also works where dask_pcm is missing: hence imports in here.
    import sys

    import dask
    import distributed

    found = {
        "python": ".".join(map(str, sys.version_info[:2])),
        "dask": dask.__version__,
        "distributed": distributed.__version__,
    }
    try:
        from dask_pcm.version import __version__

        found["dask_pcm"] = __version__
    except ImportError:
        found["dask_pcm"] = "missing"
    return found


def _check_versions(client: Client) -> list[str]:
    """Compare versions everywhere; return the addresses of the workers that answered.

    A worker that does not answer now is checked when its plugin arrives (see ``shipping.py``).
    """
    ask = by_value(_versions_there)
    _compare({"the scheduler": client.run_on_scheduler(ask)})
    found: dict[str, dict[str, str]] = client.run_on_scheduler(ask_workers, dumps(ask))
    _compare(found)
    return list(found)


def _compare(found: Mapping[str, Mapping[str, str]]) -> None:
    """Raise InstallError if versions found elsewhere differ from the client's."""
    mine = versions()
    for where, theirs in found.items():
        for package, version in mine.items():
            if theirs.get(package) != version:
                raise InstallError(
                    f"{package} is {theirs.get(package)} on {where} and {version} on the client."
                    " Install the same versions everywhere, for instance from one environment."
                )
