"""A nanny keeps memory files with images of contexts for its workers (``ladder/objects/shelf.py``).

Everything here runs on the nanny's event loop.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

from distributed import Nanny
from distributed.system import MEMORY_LIMIT

from dask_pcm.config import Config
from dask_pcm.ladder.objects.shelf import Shelf


def host_budget_bytes(config: Config, environ: Mapping[str, str], limit: int | None) -> int:
    """What the images of this nanny's workers may take, in bytes.

    By default half of the job's memory. The workers of a job whose nannies are processes of their
    own (see ``pools/launcher.py``) have equal shares.

    Parameters
    ----------
    limit
        What a worker may take, in bytes.
    """
    n_nannies = int(environ.get("PCM_JOB_WORKERS", "0"))
    if config.host_budget_bytes is not None:
        return config.host_budget_bytes // max(1, n_nannies)
    # A job may be granted less than what the kernel would let it take.
    granted = limit * n_nannies if limit and n_nannies else MEMORY_LIMIT
    return min(MEMORY_LIMIT, granted) // 2 // max(1, n_nannies)


@functools.cache
def _shelves() -> weakref.WeakValueDictionary[str, Shelf]:
    """The shelves of this process, by scheduler address; each lives as long as a nanny uses it."""
    return weakref.WeakValueDictionary()


class HostImages:
    """The images of one nanny's workers, on the shelf of the host.

    Parameters
    ----------
    budget_bytes
        What all images of the shelf may take; the nannies of a process have one in common.
    """

    def __init__(self, nanny: Nanny, budget_bytes: int) -> None:
        self._nanny = nanny
        shelf = Shelf(budget_bytes)
        self.shelf: Shelf | None = _shelves().setdefault(nanny.scheduler_addr, shelf)
        self.shelf.n_users += 1

    def close(self) -> None:
        """Drop what only this nanny's worker uses."""
        if self.shelf is not None:
            self.shelf.clear(self._own(""))
            self.shelf.leave(self._nanny.address)
            self.shelf.n_users -= 1
        self.shelf = None

    def handlers(self) -> dict[str, Any]:
        """RPCs of the worker, by operation."""
        return {
            "pcm_begin": self.begin,
            "pcm_find": self.find,
            "pcm_keep": self.keep,
            "pcm_keep_loan": self.keep_loan,
            "pcm_pin": self.pin,
            "pcm_unpin": self.unpin,
            "pcm_drop": self.drop,
            "pcm_clear": self.clear,
        }

    def begin(self) -> None:
        """A worker process begins: what only the one before could use is dropped."""
        if self.shelf is not None:
            self.shelf.leave(self._nanny.address)

    def find(self, digest: str) -> str | None:
        """The path of a context's memory file: this worker's own, or the one of the whole host."""
        assert self.shelf is not None
        return next(filter(None, map(self.shelf.find, self._names(digest))), None)

    def keep(
        self, digest: str, path: str, n_bytes: int, is_shared: bool, is_pinned: bool
    ) -> bool | None:
        """Keep a memory file that the worker has open; see ``Shelf.keep``."""
        assert self.shelf is not None
        name = digest if is_shared else self._own(digest)
        return self.shelf.keep(name, path, n_bytes, self._nanny.address if is_pinned else None)

    def keep_loan(self, name: str, path: str, n_bytes: int) -> bool | None:
        """Keep memory that the worker lends, unless other workers have the same budget."""
        assert self.shelf is not None
        if self.shelf.n_users > 1:
            return False
        owner = self._nanny.address
        return self.shelf.keep(self._own(name), path, n_bytes, owner, is_loan=True)

    def pin(self, digest: str) -> bool:
        """Keep a file until ``unpin``; False if it is not there any more."""
        assert self.shelf is not None
        return any(self.shelf.pin(name, self._nanny.address) for name in self._names(digest))

    def unpin(self, digest: str) -> None:
        """The worker does not depend on a file any more."""
        if self.shelf is not None:
            for name in self._names(digest):
                self.shelf.unpin(name, self._nanny.address)

    def drop(self, digest: str) -> None:
        """Drop a context's memory files."""
        if self.shelf is not None:
            for name in self._names(digest):
                self.shelf.drop(name, self._nanny.address)

    def clear(self) -> None:
        """Drop all memory files of the cluster on this host."""
        if self.shelf is not None:
            self.shelf.clear()

    def _names(self, digest: str) -> tuple[str, str]:
        """The files that may be a context's: this worker's own comes first."""
        return self._own(digest), digest

    def _own(self, digest: str) -> str:
        """The name of a file that only this nanny's worker uses: it belongs on its device."""
        return f"{digest} {self._nanny.address}"
