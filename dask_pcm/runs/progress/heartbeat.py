"""A run's heartbeat: a thread that writes its status at intervals.

In a thread of its own because the driver may block (listing a million parts, waiting for a
scheduler that does not answer) while the run is alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from dask_pcm.errors import FencedError
from dask_pcm.ledger.output import Output
from dask_pcm.runs.progress.progress import Progress

#: How long the end of a run waits for a heartbeat that is being written.
_LAST_S = 30.0


class Heartbeat:
    """Writes ``status.json`` until the context is left."""

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
        self._thread.join(_LAST_S)  # bounded: a filesystem may hang

    def beat(self) -> None:
        """Write the status now."""
        status = self._progress().as_dict()
        self._output.write_json(f"{self._output.run_dir}/status.json", status)

    def check(self) -> None:
        """Raise FencedError if the run was fenced."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._is_over.wait(self._output.storage.heartbeat_s):
            try:
                self.beat()
            except FencedError as error:
                self._error = error
                return
            except Exception:  # a filesystem outage: commits report it if it lasts
                continue
