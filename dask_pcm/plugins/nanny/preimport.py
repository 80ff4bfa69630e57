"""The fork server imports this module, and with it what workers need (see ``fork_server.py``).

An import that fails must not end the server: the worker that needs the module gets the error.
"""

from __future__ import annotations

import importlib
import os
import signal
from contextlib import suppress

#: Names the modules to import, separated by commas: the server reads its settings from there.
IMPORTS = "PCM_FORK_SERVER_IMPORTS"
#: A batch system sends these to all processes of a job. The server has to survive them: it reports
#: whether workers are alive, and workers that seem dead are replaced. It ends with its parent.
_NOTICES = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def _ignore(number: int, frame: object) -> None:
    """Do nothing; a handler of our own, so that a SIG_IGN which was set before stays in workers."""


def _stop_ignoring() -> None:
    """Restore the default in a forked worker, where signals are notices."""
    for number in _NOTICES:
        if signal.getsignal(number) is _ignore:
            signal.signal(number, signal.SIG_DFL)


for _number in _NOTICES:
    signal.signal(_number, _ignore)
os.register_at_fork(after_in_child=_stop_ignoring)

for _name in filter(None, os.environ.get(IMPORTS, "").split(",")):
    with suppress(Exception):
        importlib.import_module(_name)
