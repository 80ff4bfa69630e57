"""Objects of an output below a URL, put so that a fenced run mostly fails.

The fence is looked at right before an object is put; what was on its way then may still arrive.
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
from dask_pcm.ledger.storage.object_store import Store
from dask_pcm.ledger.storage.tree import Tree

#: Protocols whose fsspec implementation puts conditionally; whether the store does is tried out.
CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl"})


@dataclass(frozen=True, slots=True)
class ObjectFiles(Storage):
    """Objects of an output.

    Attributes
    ----------
    locks
        Folder for lock files, on a filesystem that driver and workers share; None where the store
        puts conditionally.
    """

    poll_s: ClassVar[float] = 2.0
    heartbeat_s: ClassVar[float] = 5.0
    allows_late_commits: ClassVar[bool] = True
    locks: str | None = None

    @property
    def fs(self) -> Any:
        fs, _ = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        return Store(fs, self.path)

    @property
    def is_flat(self) -> bool:
        """Whether names are mere names, as long as may be; elsewhere they are those of files."""
        return protocol_of(self.path) in CONDITIONAL | {"memory"}

    @property
    def lock_files(self) -> LockFiles:
        return LockFiles(Tree(str(self.locks), owner=self.owner), self.path, SILENT_S)

    def url(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def entries(self, folder: str = "") -> dict[str, Entry]:
        fs = self.fs
        root = fs._strip_protocol(self.url(folder)).rstrip("/")
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for info in fs.ls(root, detail=True, refresh=True):
                name = info["name"].rstrip("/")[len(root) + 1 :]
                if name and info["type"] == "directory":
                    found[f"{name}/"] = Entry(0, "")
                elif name:
                    found[name] = Entry(info["size"], stamp_of(info))
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        content: bytes = self.fs.cat_file(self.url(name))
        return content

    def reader(self, name: str) -> AbstractContextManager[BinaryIO]:
        file: AbstractContextManager[BinaryIO] = self.fs.open(self.url(name), "rb")
        return file

    def exists(self, name: str) -> bool:
        fs = self.fs
        fs.invalidate_cache()
        return bool(fs.exists(self.url(name)))

    def write(self, name: str, data: bytes) -> None:
        if name != f"{self.run_dir}/driver.json":
            self.check_fence()
        self.put(name, data)

    def move(self, name: str, target: str) -> None:
        self._make_folder(target)
        self.fs.mv(self.url(name), self.url(target))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.url(name), recursive=True)

    def put(self, name: str, data: bytes, **options: Any) -> None:
        """Put an object, whether or not the run is fenced."""
        self._make_folder(name)
        self.fs.pipe_file(self.url(name), data, **options)

    def create(self, name: str, data: bytes) -> bool:
        """Put an object, if there is none; whether it was put."""
        try:
            self.put(name, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                return False
            raise
        return True

    def check_fence(self) -> None:
        """Raise FencedError where the run was replaced."""
        if not self.exists(f"{self.run_dir}/driver.json"):
            raise FencedError(
                f"Run {self.run[:8]} of {self.path!r} was replaced by a newer one; what it was"
                " about to write was dropped."
            )

    def _make_folder(self, name: str) -> None:
        if not self.is_flat:
            self.fs.makedirs(self.fs._parent(self.url(name)), exist_ok=True)


def protocol_of(url: str) -> str:
    return url.partition("://")[0]


def stamp_of(info: Mapping[str, Any]) -> str:
    """A sign that changes when an object is written again."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "created"):
        if info.get(key):
            return str(info[key])
    return ""
