"""Staging puts a recipe's files on this host's disk; files that are local already stay in place."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dask_pcm.config import Config
from dask_pcm.context.bundles import Blob, Bundle, BundledFile
from dask_pcm.errors import DiskError, StageError
from dask_pcm.ladder.files.cache import FileCache, is_node_local
from dask_pcm.ladder.files.partial import PartialBlob
from dask_pcm.paths import version_of

logger = logging.getLogger(__name__)

_N_READERS = 4
#: How often a bundle is staged anew if a blob is evicted before the bundle can be locked.
_N_ATTEMPTS = 3


class Staging:
    """Stages bundles on this host's disk; for any thread.

    Parameters
    ----------
    config
        The path and quota of the cache; see ``pcm.ladder`` in ``pcm.yaml``.
    fetch
        Fetches the missing chunks of a file; by default from its store.
    on_staged
        Called with each blob that is complete.
    """

    def __init__(
        self,
        config: Config | None = None,
        fetch: Callable[[BundledFile, PartialBlob], None] | None = None,
        on_staged: Callable[[Blob], None] | None = None,
    ) -> None:
        self._config = config
        self._fetch = fetch or self._from_store
        self._on_staged = on_staged or (lambda blob: None)
        self._disk: FileCache | None = None
        self._making = threading.Lock()

    @contextlib.contextmanager
    def placed(self, bundles: Sequence[Bundle]) -> Iterator[dict[str, str]]:
        """Stage `bundles` and yield their paths, by digest; they stay until the block ends.

        Bundles that are on this host's own disks already are used in place.

        Raises
        ------
        StageError
            If a file cannot be read, or has changed since the recipe was made.
        DiskError
            If the cache cannot be used, or has no room.
        """
        with contextlib.ExitStack() as stack:
            yield {bundle.digest: stack.enter_context(self._one(bundle)) for bundle in bundles}

    @contextlib.contextmanager
    def _one(self, bundle: Bundle) -> Iterator[str]:
        """Stage one bundle and yield its path."""
        config = self._config or Config.read()
        if not config.is_staged_always and is_in_place(bundle):
            yield self._in_place(bundle)
            return
        disk = self.disk
        disk.check_size(bundle)
        with contextlib.ExitStack() as stack:
            for _ in range(_N_ATTEMPTS):
                for file in bundle.files:
                    with disk.filling(file.blob) as filling:
                        if filling is not None:
                            self._fetch(file, filling)
                    self._on_staged(file.blob)
                try:
                    path = stack.enter_context(disk.using(bundle))
                # Between staging and locking, another process may evict a blob or find it damaged.
                except FileNotFoundError:
                    continue
                yield path
                return
            raise StageError(
                f"{bundle.given!r} does not stay in the cache {str(disk.root)!r}: it is"
                " evicted as fast as it is staged. Give it more room (pcm.ladder.disk.quota)."
            )

    def _from_store(self, file: BundledFile, filling: PartialBlob) -> None:
        """The default of `fetch`."""
        fetch(file, filling, (self._config or Config.read()).store_timeout_s)

    def _in_place(self, bundle: Bundle) -> str:
        """The path of a local bundle; for a folder, one of links to the recipe's files alone.

        So a loader never reads a file that is not part of the recipe, and of its digest.
        """
        first = bundle.files[0]
        if not bundle.is_folder:
            return first.url
        try:
            return self.disk.linked(bundle)
        except DiskError as error:
            folder = first.url.removesuffix(f"/{first.name}")
            logger.warning("%s is used in place, with all its other files: %s", folder, error)
            return folder

    @property
    def disk(self) -> FileCache:
        """The cache of this host; created when it is first needed."""
        with self._making:
            if self._disk is None:
                self._disk = open_disk(self._config or Config.read())
            return self._disk


def open_disk(config: Config) -> FileCache:
    """Open the cache that is configured; on a network filesystem, one for this process alone."""
    path = config.disk_path or os.path.join(tempfile.gettempdir(), f"dask_pcm-{os.getuid()}")
    root = Path(os.path.expandvars(path)).expanduser().absolute()
    if not is_node_local(root):
        # Locks on a network filesystem may block all hosts, or have no effect.
        logger.warning(
            "The cache %s is on a network filesystem: each worker process has one of its own there."
            " Set pcm.ladder.disk.path to a disk of the node.",
            root,
        )
        root = root / f"{socket.gethostname()}-{os.getpid()}"
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    return FileCache(root, config.disk_quota_bytes)


def is_in_place(bundle: Bundle) -> bool:
    """Whether a bundle is on this host's own disks, unchanged since it was digested."""
    local = LocalFileSystem()
    for file in bundle.files:
        if not os.path.isabs(file.url) or not is_node_local(file.url):
            return False
        try:
            info = local.info(file.url)
        except OSError:
            return False
        if not file.version or (info["size"], version_of(info)) != (
            file.blob.n_bytes,
            file.version,
        ):
            return False
    return True


def fetch(file: BundledFile, filling: PartialBlob, timeout_s: float) -> None:
    """Read the missing chunks of a file from its store; blocks.

    Raises
    ------
    StageError
        If the file cannot be read, or has changed.
    DiskError
        If the disk is full.
    """

    def copy(chunk: int) -> bool:
        return filling.write(chunk, read_chunk(file, chunk, timeout_s))

    try:
        with ThreadPoolExecutor(_N_READERS) as pool:
            are_right = list(pool.map(copy, filling.missing))
    except DiskError:
        raise
    except Exception as error:  # fsspec's stores raise errors of their own
        raise StageError(unreadable(file, error)) from error
    if not all(are_right):
        raise StageError(changed(file))


def read_chunk(file: BundledFile, chunk: int, timeout_s: float) -> bytes:
    """Read a chunk of a file from its store; blocks.

    Raises
    ------
    TimeoutError
        If the store does not answer within `timeout_s`, regardless of its client's own timeouts.
    Exception
        Anything that the store's client raises.
    """
    came: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def read() -> None:
        try:
            fs, path = fsspec.core.url_to_fs(file.url)
            start, stop = file.blob.span(chunk)
            with fs.open(path, "rb", cache_type="none") as stream:
                stream.seek(start)
                came.put(stream.read(stop - start))
        except Exception as error:  # fsspec's stores raise errors of their own
            came.put(error)

    # A daemon thread: a client that never answers must not keep the process alive.
    threading.Thread(target=read, name="pcm-store", daemon=True).start()
    try:
        found = came.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout_s:g} s (pcm.ladder.store.timeout)") from None
    if isinstance(found, Exception):
        raise found
    return found


def unreadable(file: BundledFile, error: Exception) -> str:
    """The message for a file that cannot be read."""
    return (
        f"{file.url!r}, which a recipe names, cannot be read on this worker"
        f" ({type(error).__name__}: {error}). Put it where driver and workers see it, or in an"
        " object store."
    )


def changed(file: BundledFile) -> str:
    """The message for a file that has changed."""
    return f"{file.url!r} is not what it was when the recipe was made. Make the Context again."
