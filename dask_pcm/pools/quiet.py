"""While clusters are open, Dask's own news (INFO) is not shown to the user."""

from __future__ import annotations

import logging
import threading


class Quiet:
    """Raises the level of handlers while there is a cluster; for any thread.

    ``distributed.utils.silence_logging_cmgr`` restores what one cluster found although another is
    still open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_open = 0
        self._levels: dict[logging.Handler, int] = {}

    def begin(self, level: int) -> None:
        """A cluster is opened: show nothing below `level`."""
        with self._lock:
            self._n_open += 1
            for root in ("distributed", "bokeh"):
                for handler in logging.getLogger(root).handlers:
                    if isinstance(handler, logging.StreamHandler):
                        self._levels.setdefault(handler, handler.level)
                        handler.setLevel(level)

    def end(self) -> None:
        """A cluster is closed; once it was the last one, everything is as it was."""
        with self._lock:
            self._n_open -= 1
            if not self._n_open:
                for handler, level in self._levels.items():
                    handler.setLevel(level)
                self._levels.clear()
