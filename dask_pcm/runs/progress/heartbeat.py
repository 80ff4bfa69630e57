"""A run's sign of life: its status, written from time to time by a thread of its own.

What drives a run may be held up (by a listing of a million parts, by a scheduler that does not
answer) and is at work all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from dask_pcm.errors import FencedError
from dask_pcm.ledger.output import Output
from dask_pcm.ledger.status import Progress

#: How long the end of a run waits for a last sign of life.
_LAST_S = 30.0


class Heartbeat:
    """Writes ``status.json`` until it is left."""

    def __init__(self, output: Output, progress: Callable[[], Progress]) -> None:
        self._output = output
        self._progress = progress
        self._is_over = threading.Event()
        self._error: FencedError | None = None
        self._thread = threading.Thread(target=self._run, name="pcm-heart", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._is_over.set()
        self._thread.join(_LAST_S)  # a filesystem that hangs keeps it for ever

    def beat(self) -> None:
        """Write how the run stands."""
        status = self._progress().as_dict()
        self._output.write_json(f"{self._output.run_dir}/status.json", status)

    def check(self) -> None:
        """Raise FencedError where the run was replaced."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._is_over.wait(self._output.storage.heartbeat_s):
            try:
                self.beat()
            except FencedError as error:
                self._error = error
                return
            except Exception:  # a filesystem that is away for a while; who commits will say so
                continue
