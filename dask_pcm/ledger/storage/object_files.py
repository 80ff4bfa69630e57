"""Objects of an output below a URL, put such that a fenced run mostly fails.

The fence is checked right before an object is put. A put that is under way at that moment can still
succeed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import fsspec

from dask_pcm.errors import FencedError
from dask_pcm.ledger.storage.base import Entry, Storage
from dask_pcm.ledger.storage.lock_files import SILENT_S, LockFiles
from dask_pcm.ledger.storage.object_store import ObjectStore
from dask_pcm.ledger.storage.tree import Tree

#: Protocols whose fsspec implementation puts conditionally. Whether the store does is tested.
CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl"})


@dataclass(frozen=True, slots=True)
class ObjectFiles(Storage):
    """Objects of an output.

    Attributes
    ----------
    locks
        Folder for lock files, on a filesystem that driver and workers share; None if the store
        puts conditionally.
    """

    # Each request costs money and tens of milliseconds, so both are rarer than in a folder.
    poll_s: ClassVar[float] = 2.0
    heartbeat_s: ClassVar[float] = 5.0
    allows_late_commits: ClassVar[bool] = True
    locks: str | None = None

    @property
    def fs(self) -> Any:
        """The fsspec filesystem, with listings that are never cached.

        Other processes put and remove objects here, and fsspec shares cached listings within a
        process.
        """
        fs, _ = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        return ObjectStore(fs, self.path)

    @property
    def is_flat(self) -> bool:
        """Whether names need no folders and may be long; other protocols have names of files."""
        return protocol_of(self.path) in CONDITIONAL | {"memory"}

    @property
    def lock_files(self) -> LockFiles:
        """The lock files of this output."""
        return LockFiles(Tree(str(self.locks), owner=self.owner), self.path, SILENT_S)

    def url(self, name: str) -> str:
        """URL of an object of the output; of the output itself for an empty name."""
        return f"{self.path}/{name}" if name else self.path

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """List a folder; the stamp of an object is what its store has, see `stamp_of`."""
        fs = self.fs
        root = fs._strip_protocol(self.url(folder)).rstrip("/")
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for info in fs.ls(root, detail=True, refresh=True):
                # Some stores list the folder itself, as an object of an empty name.
                name = info["name"].rstrip("/")[len(root) + 1 :]
                if name and info["type"] == "directory":
                    found[f"{name}/"] = Entry(0, "")
                elif name:
                    found[name] = Entry(info["size"], stamp_of(info))
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        """Read an object."""
        content: bytes = self.fs.cat_file(self.url(name))
        return content

    def reader(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open an object for reading."""
        file: AbstractContextManager[BinaryIO] = self.fs.open(self.url(name), "rb")
        return file

    def exists(self, name: str) -> bool:
        """Whether there is an object or folder of this name now."""
        fs = self.fs
        fs.invalidate_cache()
        return bool(fs.exists(self.url(name)))

    def write(self, name: str, data: bytes) -> None:
        """Put an object, after checking the fence."""
        # `driver.json` is the fence: a run writes it once, when it registers.
        if name != f"{self.run_dir}/driver.json":
            self.check_fence()
        self.put(name, data)

    def move(self, name: str, target: str) -> None:
        """Copy an object to another name and remove it; not atomic."""
        self._make_folder(target)
        self.fs.mv(self.url(name), self.url(target))

    def remove(self, name: str) -> None:
        """Remove an object, or all below a folder."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.url(name), recursive=True)

    def put(self, name: str, data: bytes, **options: Any) -> None:
        """Put an object without checking the fence."""
        self._make_folder(name)
        self.fs.pipe_file(self.url(name), data, **options)

    def create(self, name: str, data: bytes) -> bool:
        """Put an object if there is none; return whether it was put."""
        try:
            self.put(name, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Not all fsspec implementations translate the store's answer 412; S3 words it "At
            # least one of the pre-conditions you specified did not hold".
            if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                return False
            raise
        return True

    def check_fence(self) -> None:
        """Raise FencedError if the run is fenced."""
        if not self.exists(f"{self.run_dir}/driver.json"):
            raise FencedError(
                f"Run {self.run[:8]} of {self.path!r} was replaced by a newer one; its unwritten"
                " results were dropped."
            )

    def _make_folder(self, name: str) -> None:
        if not self.is_flat:
            self.fs.makedirs(self.fs._parent(self.url(name)), exist_ok=True)


def protocol_of(url: str) -> str:
    """The protocol of a URL, such as ``s3``."""
    return url.partition("://")[0]


def stamp_of(info: Mapping[str, Any]) -> str:
    """What changes whenever an object is written, of its fsspec info; empty if there is nothing."""
    # Each store has its own name for it. Entity tags and digests come before times, which have a
    # resolution of a second in some stores.
    for key in ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "created"):
        if info.get(key):
            return str(info[key])
    return ""
