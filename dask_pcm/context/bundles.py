"""Files of a recipe are content-addressed, so a worker can verify every chunk that it gets.

A **bundle** is one path or URL that a recipe names: a file, or a folder with its files. The content
of each file is a **blob**, identified by the digests of its chunks. The same bytes under another
name or path are the same blob, and the source of a chunk need not be trusted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
from blake3 import blake3
from fsspec.implementations.local import LocalFileSystem

from dask_pcm import user_cache
from dask_pcm.errors import InputError, redacted, shown_cause
from dask_pcm.paths import path_text, redacted_repr, version_of

logger = logging.getLogger(__name__)

#: A file is split into this many chunks, within the bounds for a chunk's size.
_N_CHUNKS, _MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 64, 256 << 10, 16 << 20
_DIGEST_BYTES = 16
_N_READERS = 8
#: Digesting that takes longer is logged.
_SLOW_S = 5.0
#: The name of these entries in the user's cache folder.
_KIND = "blobs"


def digest_of(data: Any) -> bytes:
    """The BLAKE3 digest of some bytes, 16 bytes long."""
    return blake3(data).digest(_DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Blob:
    """The content of a file.

    Attributes
    ----------
    n_bytes, chunk_bytes
        Its size, and the size of each chunk but the last.
    chunk_digests
        The digests of the chunks, 16 bytes each, concatenated.

    Examples
    --------
    >>> blob = Blob(5, 4, digest_of(b"clai") + digest_of(b"m"))
    >>> blob.n_chunks, blob.span(1), blob.holds(1, b"m"), blob.holds(0, b"m")
    (2, (4, 5), True, False)
    """

    n_bytes: int
    chunk_bytes: int
    chunk_digests: bytes

    @property
    def digest(self) -> str:
        """The digest of the content, 32 hex digits."""
        head = f"{self.n_bytes}/{self.chunk_bytes}/".encode()
        return digest_of(head + self.chunk_digests).hex()

    @property
    def n_chunks(self) -> int:
        """The number of chunks."""
        return len(self.chunk_digests) // _DIGEST_BYTES

    def span(self, chunk: int) -> tuple[int, int]:
        """The offsets of a chunk's first byte and of the byte after its last."""
        start = chunk * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.n_bytes)

    def holds(self, chunk: int, data: Any) -> bool:
        """Whether `data` is the content of a chunk."""
        at = chunk * _DIGEST_BYTES
        return digest_of(data) == self.chunk_digests[at : at + _DIGEST_BYTES]


@dataclass(frozen=True, slots=True, repr=False)
class BundledFile:
    """A file of a bundle.

    Attributes
    ----------
    name
        Its path in the bundle, with slashes.
    url
        The absolute path or URL at which a worker may read it.
    version
        Changes when the file at `url` is written to; empty if the store does not tell.
    blob
        Its content.
    """

    name: str
    url: str
    version: str
    blob: Blob

    __repr__ = redacted_repr


@dataclass(frozen=True, slots=True, repr=False)
class Bundle:
    """One path or URL of a recipe.

    Attributes
    ----------
    given
        The path or URL as the recipe's arguments name it.
    is_folder
        Whether it is a folder; otherwise it has exactly one file.
    files
        Its files, ordered by name.
    digest
        The digest of names and contents, independent of their location.
    """

    given: str
    is_folder: bool
    files: tuple[BundledFile, ...]
    digest: str

    __repr__ = redacted_repr

    @property
    def n_bytes(self) -> int:
        """The size of all files."""
        return sum(file.blob.n_bytes for file in self.files)

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("dask_pcm.Bundle", self.digest)


def bundle_of(path: str | os.PathLike[str], patterns: Sequence[str] = ("*",)) -> Bundle:
    """Digest a file, or the files of a folder whose names match one of `patterns`.

    Hidden files are left out. Digests are cached by path, size and modification time, in this
    process and in the user's cache folder. Blocks while files are read; for the client.

    Raises
    ------
    InputError
        If there is no such file, if it cannot be read, or if it changes while it is read.
    """
    given = path_text(path)
    try:
        fs, root = fsspec.core.url_to_fs(os.path.expanduser(given))
        found = sorted(_listed(fs, root, patterns))
        is_folder = not fs.isfile(root)
    except InputError:
        raise
    except Exception as error:  # fsspec's stores raise errors of their own
        raise InputError(
            f"The files of a recipe cannot be listed: {given!r}: {error}."
        ) from shown_cause(error)
    if not found:
        raise InputError(
            f"There is no file at {given!r}, which a recipe names; no worker could have it."
        )
    start = time.monotonic()
    with ThreadPoolExecutor(_N_READERS) as pool:
        files = tuple(pool.map(lambda item: _bundled(fs, *item), found))
    if (seconds := time.monotonic() - start) > _SLOW_S:
        logger.info("Digesting %s took %.0f s; the digests are cached", redacted(given), seconds)
    named = [[file.name, file.blob.digest] for file in files]
    digest = digest_of(json.dumps([is_folder, named]).encode()).hex()
    return Bundle(given, is_folder, files, digest)


def checked_name(name: str) -> str:
    """Return a file's name, which must not lead out of the bundle's folder.

    Raises
    ------
    InputError
        If it is absolute, empty, or contains ``..`` or a null byte.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise InputError(f"A file of a recipe is called {name!r}, which leads out of its folder.")
    return name


def _listed(fs: Any, root: str, patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names in the bundle with the paths of the files."""
    if fs.isfile(root):
        yield PurePosixPath(redacted(root)).name, root
        return
    for path in fs.find(root):
        name = PurePosixPath(path).relative_to(root)
        is_hidden = any(part.startswith(".") for part in name.parts)
        is_wanted = any(fnmatch.fnmatchcase(name.name, pattern) for pattern in patterns)
        if is_wanted and not is_hidden:
            if not fs.isfile(path):
                raise InputError(
                    f"{path!r}, in a folder that a recipe names, is no file (a folder's link, a"
                    " pipe or the like). Put the files themselves there."
                )
            yield checked_name(str(name)), path


def _bundled(fs: Any, name: str, path: str) -> BundledFile:
    """Digest one file, or take its digest from the cache."""
    url = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
    try:
        info = fs.info(path)
        version = version_of(info)
        key = digest_of(f"{url}\0{info['size']}\0{version}".encode()).hex()
        blob = _memory.recall(key) if version else None
        if blob is None:
            blob = _digested(fs, path, info["size"])
            fs.invalidate_cache()  # fsspec may have cached the file's info
            if version_of(fs.info(path)) != version:
                raise InputError(f"{url!r}, which a recipe names, was changed while it was read.")
            if version:  # without one, later changes of the file would go unnoticed
                _memory.note(key, blob)
    except OSError as error:
        raise InputError(
            f"{url!r}, which a recipe names, cannot be read: {error}."
        ) from shown_cause(error)
    return BundledFile(name, url, version, blob)


def _digested(fs: Any, path: str, n_bytes: int) -> Blob:
    """Read a file and digest its chunks."""
    chunk_bytes = min(max(-(-n_bytes // _N_CHUNKS), _MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
    starts = range(0, n_bytes, chunk_bytes)

    def digested(start: int) -> bytes:
        with fs.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            return digest_of(file.read(chunk_bytes))

    with ThreadPoolExecutor(_N_READERS) as pool:
        return Blob(n_bytes, chunk_bytes, b"".join(pool.map(digested, starts)))


class _Memory:
    """Caches blobs by a key made of path, size and version of the file; for any thread."""

    def __init__(self) -> None:
        self._known: dict[str, Blob] = {}

    def recall(self, key: str) -> Blob | None:
        """The cached blob, from this process or the user's cache folder; None if there is none."""
        if key not in self._known:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found = user_cache.recall(_KIND, key)
                chunk_digests = bytes.fromhex(found["chunk_digests"])
                blob = Blob(int(found["n_bytes"]), int(found["chunk_bytes"]), chunk_digests)
                if blob.n_chunks == -(-blob.n_bytes // blob.chunk_bytes):
                    self._known[key] = blob
        return self._known.get(key)

    def note(self, key: str, blob: Blob) -> None:
        """Cache a blob."""
        self._known[key] = blob
        found = {
            "n_bytes": blob.n_bytes,
            "chunk_bytes": blob.chunk_bytes,
            "chunk_digests": blob.chunk_digests.hex(),
        }
        user_cache.note(_KIND, key, found)


_memory = _Memory()
