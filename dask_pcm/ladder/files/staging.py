"""From where a recipe's files lie to where its loader reads them."""

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
_N_ATTEMPTS = 3


class Staging:
    """Brings bundles to this host's disk.

    Parameters
    ----------
    config
        Where the cache is, and how large; see ``pcm.ladder`` in ``pcm.yaml``.
    fetch
        Gets what is missing of a file; by default from where it lies.
    on_staged
        Called with each blob that is there.
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
        """Paths of `bundles` on this host, by digest; until the block ends they stay.

        What lies on this host's own disks already is used where it is.

        Raises
        ------
        StageError
            Where a file cannot be read, or is not any more what the recipe names.
        DiskError
            Where the cache cannot be used, or has no room.
        """
        with contextlib.ExitStack() as stack:
            yield {bundle.digest: stack.enter_context(self._one(bundle)) for bundle in bundles}

    @contextlib.contextmanager
    def _one(self, bundle: Bundle) -> Iterator[str]:
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
                except FileNotFoundError:  # evicted, or found damaged, since
                    continue
                yield path
                return
            raise StageError(
                f"{bundle.given!r} does not stay in the cache {str(disk.root)!r}: it is"
                " evicted as fast as it is staged. Give it more room (pcm.ladder.disk.quota)."
            )

    def _from_store(self, file: BundledFile, filling: PartialBlob) -> None:
        fetch(file, filling, (self._config or Config.read()).store_timeout_s)

    def _in_place(self, bundle: Bundle) -> str:
        """A folder as links to its files: what else lies there is no part of the recipe."""
        first = bundle.files[0]
        if not bundle.is_folder:
            return first.url
        try:
            return self.disk.linked(bundle)
        except DiskError as error:
            folder = first.url.removesuffix(f"/{first.name}")
            logger.warning("%s is read where it is, whatever else lies there: %s", folder, error)
            return folder

    @property
    def disk(self) -> FileCache:
        """The cache of this host, made when it is first needed."""
        with self._making:
            if self._disk is None:
                self._disk = open_disk(self._config or Config.read())
            return self._disk


def open_disk(config: Config) -> FileCache:
    """The cache that the settings ask for; where it cannot be shared, one of this process alone."""
    path = config.disk_path or os.path.join(tempfile.gettempdir(), f"dask_pcm-{os.getuid()}")
    root = Path(os.path.expandvars(path)).expanduser().absolute()
    if not is_node_local(root):
        # Locks on a network filesystem hold up everybody, or hold nothing.
        logger.warning(
            "The cache %s is on a network filesystem: each worker process has one of its own there."
            " Set pcm.ladder.disk.path to a disk of the node.",
            root,
        )
        root = root / f"{socket.gethostname()}-{os.getpid()}"
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    return FileCache(root, config.disk_quota_bytes)


def is_in_place(bundle: Bundle) -> bool:
    """Whether a bundle lies on this host's own disks, as it was when it was digested."""
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
    """Read from where a file lies what is missing of it.

    Raises
    ------
    StageError
        Where it cannot be read, or holds something else by now.
    """

    def copy(chunk: int) -> bool:
        return filling.write(chunk, read_chunk(file, chunk, timeout_s))

    try:
        with ThreadPoolExecutor(_N_READERS) as pool:
            are_right = list(pool.map(copy, filling.missing))
    except DiskError:
        raise
    except Exception as error:  # each store has its own
        raise StageError(unreadable(file, error)) from error
    if not all(are_right):
        raise StageError(changed(file))


def read_chunk(file: BundledFile, chunk: int, timeout_s: float) -> bytes:
    """A chunk from where the file lies.

    Raises
    ------
    TimeoutError
        Where it has not come after `timeout_s`: stores that stop answering are not waited for,
        whatever their client does.
    """
    came: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def read() -> None:
        try:
            fs, path = fsspec.core.url_to_fs(file.url)
            start, stop = file.blob.span(chunk)
            with fs.open(path, "rb", cache_type="none") as stream:
                stream.seek(start)
                came.put(stream.read(stop - start))
        except Exception as error:  # each store has its own
            came.put(error)

    threading.Thread(target=read, name="pcm-store", daemon=True).start()
    try:
        found = came.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout_s:g} s (pcm.ladder.store.timeout)") from None
    if isinstance(found, Exception):
        raise found
    return found


def unreadable(file: BundledFile, error: Exception) -> str:
    """What is wrong where a file cannot be read."""
    return (
        f"{file.url!r}, which a recipe names, cannot be read on this worker"
        f" ({type(error).__name__}: {error}). Put it where driver and workers see it, or in an"
        " object store."
    )


def changed(file: BundledFile) -> str:
    """What is wrong where a file holds something else."""
    return f"{file.url!r} is not what it was when the recipe was made. Make the Context again."
