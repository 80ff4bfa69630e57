"""Imported by the fork server of ``plugins/rebirth.py``: what workers need, as far as it is there.

Nothing that is missing or broken here may end the server: whoever needs it finds out by itself.
"""

from __future__ import annotations

import importlib
import os
import signal
from contextlib import suppress

from dask_pcm.config import Config

#: A batch system sends them to all processes of a job. The server ends with the process that has
#: started it: without it nobody could tell whether a worker still lives, and it would be ended.
_NOTICES = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def _ignore(number: int, frame: object) -> None: ...


def _stop_ignoring() -> None:
    """In a worker's process."""
    for number in _NOTICES:
        if signal.getsignal(number) is _ignore:
            signal.signal(number, signal.SIG_DFL)


for _number in _NOTICES:
    signal.signal(_number, _ignore)
os.register_at_fork(after_in_child=_stop_ignoring)

for _name in Config.read().imports:
    with suppress(Exception):
        importlib.import_module(_name)
