"""Plugins unpickle everywhere: where the package is missing or differs, they only warn.

Dask sends every plugin to every worker that joins, and a worker that cannot unpickle one does not
start. So a plugin is sent as a function pickled by value. Where dask_pcm is missing or has another
version, the function returns a plugin that logs a warning and does nothing else. Plain Dask work
continues on such a worker. It never greets the gate, which therefore sends it no context tasks.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from distributed.diagnostics.plugin import NannyPlugin

from dask_pcm.version import __version__


class ShippedPlugin:
    """A plugin that can be unpickled anywhere; the receiver makes a new one from `config`."""

    config: Any = None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        kind = type(self)
        settings = None if self.config is None else self.config.as_dict()
        arguments = (kind.__module__, kind.__qualname__, issubclass(kind, NannyPlugin), settings)
        return by_value(_arrive), (__version__, *arguments)


def by_value(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of `func` that is pickled with its code instead of by module and name."""
    globals_ = {"__builtins__": __builtins__}
    copy = types.FunctionType(func.__code__, globals_, func.__name__, func.__defaults__)
    copy.__module__ = "__main__"
    return copy


def _arrive(
    version: str, module: str, name: str, is_nannys: bool, settings: dict[str, Any] | None
) -> Any:
    """Make the plugin on the receiving side, or one that warns if the versions differ."""
    # dask_pcm may be missing here, and no globals are shipped: import and define everything inside.
    import importlib
    import logging
    import pickle

    from distributed import NannyPlugin, WorkerPlugin

    try:
        found = importlib.import_module("dask_pcm.version").__version__
    except ImportError:
        found = None
    if found == version:
        kind = getattr(importlib.import_module(module), name)
        if settings is None:
            return kind()
        config = importlib.import_module("dask_pcm.config").Config
        return kind(config(**settings))
    says = "is missing" if found is None else f"is {found}"
    base: Any = NannyPlugin if is_nannys else WorkerPlugin

    class Absent(base):
        """Stays in the plugin's place and warns once."""

        idempotent = True

        def setup(self, worker: Any = None, nanny: Any = None) -> None:
            """Log the warning; a worker also shows it to the clients."""
            where = worker or nanny
            text = (
                f"dask_pcm {says} on {where.address} and {version} on the scheduler: this worker"
                " gets plain tasks, but none that needs a context. Install the same version there."
            )
            logging.getLogger("distributed.worker").warning(text)
            if worker is not None:  # as `distributed.warn` does: shown in the user's notebook, too
                message = {"message": pickle.dumps(text), "category": pickle.dumps(UserWarning)}
                worker.log_event("warn", message)

    Absent.name = "pcm-absent"
    return Absent()
