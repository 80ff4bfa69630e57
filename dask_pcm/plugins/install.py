"""``install(client)``: the plugins, scheduler side first."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import dask
import distributed
from distributed import Client, SpecCluster, default_client
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


def install(client: Client | None = None) -> None:
    """Install the toolkit on a cluster; doing it again changes nothing, and nothing restarts.

    Parameters
    ----------
    client
        A client of the cluster; the one made last if left out.

    Raises
    ------
    InstallError
        Where there is no client, the package is missing on the scheduler or the workers, or its
        version or that of Python, dask or distributed differs from the client's.

    Notes
    -----
    Blocking; for synchronous clients. The scheduler's side goes first: the workers' sides say
    hello to it as soon as they are set up. Workers that join later get theirs by themselves, and so
    do workers that do not answer within seconds, frozen or out of reach, once they are back.
    """
    client = current_client(client)
    answering = _check_versions(client)
    config = Config.read()
    client.register_plugin(GatePlugin(config))
    keeper, contexts = KeeperPlugin(config), ContextPlugin(config)
    client.run_on_scheduler(deliver_to_nannies, dumps(keeper), keeper.name, answering)
    # A worker that had its side already does not say hello to a new gate unasked.
    client.run_on_scheduler(deliver, dumps(contexts), contexts.name, _greet, answering)
    if isinstance(client.cluster, SpecCluster):
        keep_local_nannies(client.cluster)


def release(*contexts: Context, client: Client | None = None) -> int:
    """Have all workers drop contexts, each as soon as no task holds it.

    Their staged files stay on disk. Work that needs a context after all has it loaded again.

    Parameters
    ----------
    *contexts
        Which; equal recipes are the same context, whoever made them.
    client
        A client of the cluster; the one made last if left out.

    Returns
    -------
    int
        Workers that held one of them.

    Raises
    ------
    RecipeError
        Where something else than a context is given.
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
    """Say why a task waits, or where it went and why.

    Parameters
    ----------
    what
        A future, its key, or the name of a part that a run is to write
        (``part-000000000000-000000001000.parquet``), with or without its ending.
    client
        A client of the cluster; the one made last if left out.

    Returns
    -------
    str
        What the gate knows: for each worker why it does not have it yet, and the last decisions
        about it. The last 2,000 decisions are kept.

    Examples
    --------
    >>> print(explain(future))  # doctest: +SKIP
    'verify-3' waits (behind 2 of 40 others of its group) for context 'load'.
      2 workers: loading, ready in about 3.1 s
    """
    client = current_client(client)
    if not is_installed(client):
        return "The toolkit is not installed on this cluster: call dask_pcm.install(client) first."
    key = getattr(what, "key", what)
    told: str = client.sync(client.scheduler.pcm_explain, key=key)
    return told


def uninstall(client: Client | None = None) -> None:
    """Take the toolkit off a cluster; nothing restarts and no work is lost.

    What waits at the gate goes on as plain Dask tasks: each builds its context where it runs. The
    contexts on workers are closed as soon as nobody holds them. Where the toolkit is not installed
    nothing happens.

    Parameters
    ----------
    client
        A client of the cluster; the one made last if left out.
    """
    client = current_client(client)

    def leave(dask_scheduler: Any = None) -> bool:
        gate = dask_scheduler.plugins.get(GATE)
        if gate is not None:
            gate.uninstall()
        return gate is not None

    client.run_on_scheduler(leave)
    # Also where there was no gate: an earlier attempt may have got no further.
    client.run_on_scheduler(withdraw, CONTEXTS, is_nannys=False)
    client.run_on_scheduler(withdraw, KeeperPlugin.name, is_nannys=True)
    if isinstance(client.cluster, SpecCluster):
        forget_local_nannies(client.cluster)


def current_client(client: Client | None = None) -> Client:
    """A client that can be used: the one given, or else the one made last.

    Raises
    ------
    InstallError
        Where there is none, or it is asynchronous or closed.
    """
    if client is None:
        try:
            client = default_client()
        except ValueError:
            raise InstallError(
                "There is no Dask client yet. Make one first: client = Client(cluster)."
            ) from None
    if client.asynchronous:
        raise InstallError(
            "This client is asynchronous; the toolkit is installed, and runs are driven, with an"
            " ordinary one: Client(address), in a thread of its own if need be."
        )
    if client.status in ("closed", "closing"):
        raise InstallError(
            f"The client {client.id} is {client.status}. Make another one: client ="
            " Client(cluster), or Client(address)."
        )
    return client


def _greet(dask_worker: Any = None) -> None:
    plugin = dask_worker.plugins.get(CONTEXTS)
    if isinstance(plugin, ContextPlugin):
        plugin.greet()


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
    # Pickled by value below, so that it answers where dask_pcm is missing too.
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
    """Compare versions everywhere; return the workers that have answered.

    One that does not answer says by itself, when it is back, that it has another version.
    """
    ask = by_value(_versions_there)
    _compare({"the scheduler": client.run_on_scheduler(ask)})
    found: dict[str, dict[str, str]] = client.run_on_scheduler(ask_workers, dumps(ask))
    _compare(found)
    return list(found)


def _compare(found: Mapping[str, Mapping[str, str]]) -> None:
    mine = versions()
    for where, theirs in found.items():
        for package, version in mine.items():
            if theirs.get(package) != version:
                raise InstallError(
                    f"{package} is {theirs.get(package)} on {where} and {version} on the client."
                    " Install the same versions everywhere, for instance from one environment."
                )
