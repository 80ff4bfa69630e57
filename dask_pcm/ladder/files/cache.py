"""The disk tier: a content-addressed file cache, one copy per host, kept for the next job.

::

    lock                    held exclusively while room is made
    blobs/<digest>          a file's content, complete and verified
    blobs/<digest>.part     a partial blob, which is being staged
    blobs/<digest>.note     seconds that staging took, and the file's state when it was last
                            verified; its modification time is the last use
    blobs/<digest>.lock     shared while the blob is used, exclusive while it is evicted
    blobs/<digest>.staging  exclusive while the blob is staged; a sparse file of its final size
    blobs/<digest>.tree     exclusive while a tree is checked or made
    trees/<digest>/<name>   a bundle as its loader sees it: links to blobs

Locks are flocks. They end with their process, so a crash leaves no stale lock. They are valid only
on a disk of this host; see ``is_node_local``.

Nothing is synced: data that a process wrote survives it in the page cache. After a crash of the
machine a file may have holes. So a blob is verified at its first use after a boot, and whenever its
size or modification time has changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from dask_pcm.context.bundles import Blob, Bundle, checked_name, digest_of
from dask_pcm.errors import DiskError
from dask_pcm.ladder.files.locks import is_held, locked
from dask_pcm.ladder.files.partial import PartialBlob, read_note, state, verified_chunks, write_note
from dask_pcm.ladder.files.trees import Trees, is_stale

logger = logging.getLogger(__name__)

#: Types of network filesystems.
_SHARED = (
    *("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "9p", "afs", "pvfs", "wekafs"),
    *("gluster", "panfs", "orangefs", "sshfs", "s3fs", "juicefs", "gcsfuse", "goofys", "rclone"),
)
_AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB
#: The form of blobs' names.
_DIGEST = re.compile(r"[0-9a-f]{32}")
#: The fixed cost of staging a file; makes small files worth more per byte.
_FIXED_S = 0.1


class FileCache:
    """The blobs of this user on this host.

    Processes of the host share it; methods may be called from any thread. They may block on locks
    and on the disk.

    Parameters
    ----------
    root
        A folder for the cache alone; created, accessible to this user only, if missing.
    quota_bytes
        What all blobs may take; None for all of the disk.

    Raises
    ------
    DiskError
        If the folder cannot be created or written, belongs to another user, or is accessible to
        others.
    """

    def __init__(self, root: str | os.PathLike[str], quota_bytes: int | None = None) -> None:
        self.root = Path(root)
        self._quota_bytes = quota_bytes
        self._blobs = self.root / "blobs"
        self._room_lock = self.root / "lock"
        #: Blobs that this process is staging.
        self._fillings: dict[str, PartialBlob] = {}
        for folder in (self.root, self._blobs, self.root / "trees"):
            _make_own(folder)
        self._trees = Trees(self.root / "trees", self._blobs)
        self._clean()

    def has(self, blob: Blob) -> bool:
        """Whether a blob is complete."""
        return (self._blobs / blob.digest).exists()

    # -- staging ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def filling(self, blob: Blob) -> Iterator[PartialBlob | None]:
        """Stage a blob exclusively; yield None if it is complete, perhaps by another process.

        Chunks that an earlier attempt has written are kept if they are verified.

        Raises
        ------
        DiskError
            If there is no room for it, even with all unused blobs evicted.
        """
        if self.has(blob):  # without a lock: `using` checks again under its own
            yield None
            return
        place = self._blobs / blob.digest
        with locked(place.with_suffix(".staging"), fcntl.LOCK_EX) as staging:
            if self.has(blob):
                yield None
                return
            with locked(self._room_lock, fcntl.LOCK_EX):
                # The file's size reserves room. First drop the reservation of a killed process.
                os.ftruncate(staging, 0)
                self._make_room(blob.n_bytes - _size(place.with_suffix(".part")))
                os.ftruncate(staging, blob.n_bytes)
            with PartialBlob(place, blob) as filling:
                self._fillings[blob.digest] = filling
                try:
                    yield filling
                finally:
                    del self._fillings[blob.digest]

    @contextlib.contextmanager
    def using(self, bundle: Bundle) -> Iterator[str]:
        """Lock a bundle's blobs, which keeps them until the block ends, and yield its path.

        Raises
        ------
        FileNotFoundError
            If a blob is missing, partial or damaged.
        """
        with contextlib.ExitStack() as stack:
            for file in bundle.files:
                lock = self._blobs / f"{file.blob.digest}.lock"
                stack.enter_context(locked(lock, fcntl.LOCK_SH))
                self._check(file.blob)
            targets = {checked_name(f.name): self._blobs / f.blob.digest for f in bundle.files}
            tree = self._trees.make(bundle.digest, targets)
            yield str(tree if bundle.is_folder else tree / bundle.files[0].name)

    def _check(self, blob: Blob) -> None:
        """Record a blob's use; verify it if its state has changed, for instance by a reboot."""
        place = self._blobs / blob.digest
        note, now = read_note(place), state(place)
        if note.get("state") != now:
            with place.open("rb") as file:
                if len(verified_chunks(file.fileno(), blob)) < blob.n_chunks:
                    logger.warning("%s is damaged; it is staged again", place)
                    place.unlink()
                    raise FileNotFoundError(errno.ENOENT, "damaged", str(place))
            write_note(place, {**note, "state": now})
        with contextlib.suppress(FileNotFoundError):
            os.utime(place.with_suffix(".note"))

    def check_size(self, bundle: Bundle) -> None:
        """Raise DiskError if a bundle is larger than the whole cache."""
        if self._quota_bytes is not None and bundle.n_bytes > self._quota_bytes:
            raise DiskError(
                f"{bundle.given!r} has {bundle.n_bytes:,} bytes, more than the quota of"
                f" {self._quota_bytes:,} of the cache {str(self.root)!r} (pcm.ladder.disk.quota)."
            )

    def linked(self, bundle: Bundle) -> str:
        """Return a folder of links to the files of a local bundle, and to no others."""
        targets = {checked_name(file.name): Path(file.url) for file in bundle.files}
        where = digest_of(bundle.files[0].url.encode()).hex()
        return str(self._trees.make(f"{bundle.digest}-{where}", targets))

    @contextlib.contextmanager
    def opened(self, digest: str, chunk: int) -> Iterator[int | None]:
        """Open the file that has a chunk at its offset; yield None if the chunk is not here.

        This includes partial blobs that this process is staging, so peers get chunks early.

        Raises
        ------
        DiskError
            If `digest` is not a digest: it comes from a peer, and becomes part of a path.
        """
        if not is_digest(digest):
            raise DiskError(f"{digest!r:.80} is no digest of a blob; expected 32 hex digits.")
        filling, descriptor = self._fillings.get(digest), None
        if filling is not None and chunk in filling.have:
            descriptor = filling.reopened()
        if descriptor is None:  # complete, perhaps only since the line above
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(self._blobs / digest, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    # -- room ---------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """What all blobs take, in bytes; those that are being staged count with their full size."""
        return sum(_size(path) for path in self._blobs.iterdir()) + self._reserved_bytes()

    def _reserved_bytes(self) -> int:
        """Bytes that are still to be written of blobs that are being staged."""
        n_bytes = 0
        for path in self._blobs.glob("*.staging"):
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                size = path.stat().st_size
                if size and is_held(path):
                    # Under either name: it may be completed and renamed between the two calls.
                    written = _size(path.with_suffix(".part")) or _size(path.with_suffix(""))
                    n_bytes += max(0, size - written)
        return n_bytes

    def evict(self, digest: str) -> bool:
        """Remove a blob; False if it is in use or being staged."""
        place = self._blobs / digest
        with contextlib.suppress(BlockingIOError), contextlib.ExitStack() as stack:
            for kind in (".lock", ".staging"):
                stack.enter_context(locked(place.with_suffix(kind), _AT_ONCE))
            for kind in ("", ".part", ".note", ".staging", ".lock"):
                place.with_suffix(kind).unlink(missing_ok=True)
            return True
        return False

    def _make_room(self, n_bytes: int) -> None:
        """Evict the blobs that are worth least until `n_bytes` fit; with the room lock held.

        Raises
        ------
        DiskError
            If they do not fit with all unused blobs evicted.
        """
        digests = {path.stem for path in self._blobs.iterdir() if path.suffix in ("", ".part")}
        rest = sorted(digests, key=lambda digest: _worth(self._blobs / digest), reverse=True)
        while self._lacking(n_bytes) > 0:
            if not rest:
                raise DiskError(
                    f"There is no room for {n_bytes:,} bytes in {str(self.root)!r}: {self._room()},"
                    " and what is there is in use or being staged. Give it another disk"
                    " (pcm.ladder.disk.path), or more of this one (pcm.ladder.disk.quota)."
                )
            self.evict(rest.pop())
        if len(rest) < len(digests):
            self._trees.clean()

    def _lacking(self, n_bytes: int) -> int:
        """Bytes to free before `n_bytes` fit; negative if there is room to spare."""
        lacking = n_bytes + self._reserved_bytes() - shutil.disk_usage(self.root).free
        if self._quota_bytes is not None:
            lacking = max(lacking, self.used_bytes() + n_bytes - self._quota_bytes)
        return lacking

    def _room(self) -> str:
        """Free and used bytes, for error messages."""
        free = f"{shutil.disk_usage(self.root).free:,} bytes are free"
        if self._quota_bytes is None:
            return free
        return f"{free}, and {self.used_bytes():,} of its quota of {self._quota_bytes:,} are taken"

    def _clean(self) -> None:
        """Remove files of killed processes that no process has continued to write."""
        with locked(self._room_lock, fcntl.LOCK_EX):
            found = list(self._blobs.iterdir())
            parts = {path.stem for path in found if path.suffix == ".part" and not is_stale(path)}
            there = {path.stem for path in found if not path.suffix} | parts
            left = {p.stem for p in found if p.suffix in (".part", ".note", ".staging", ".lock")}
            for digest in left - there:
                self.evict(digest)
            self._trees.clean()
        self._trees.remove_stale()


def is_digest(name: object) -> bool:
    """Whether a name is a blob's: no other may become part of a path in the cache."""
    return isinstance(name, str) and _DIGEST.fullmatch(name) is not None


def is_node_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on a filesystem of this host alone; True if that cannot be determined."""
    best, kind = "", ""
    real = os.path.realpath(path)
    with contextlib.suppress(OSError), open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, at, found, *_ = line.split(" ")
            at = at.encode().decode("unicode_escape")
            if len(at) >= len(best) and f"{real}/".startswith(at.rstrip("/") + "/"):
                best, kind = at, found
    return not kind.removeprefix("fuse.").startswith(_SHARED)


def _make_own(folder: Path) -> None:
    """Create a folder that only this user can access, or check that it is one.

    Raises
    ------
    DiskError
        If it cannot be created or written, belongs to another user, or is accessible to others.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise DiskError(f"The cache {str(folder)!r} cannot be made: {error}.") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise DiskError(
            f"The cache {str(folder)!r} is not a folder of yours (user {os.getuid()}); it belongs"
            f" to user {status.st_uid}. Choose another with pcm.ladder.disk.path."
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise DiskError(
            f"The cache {str(folder)!r} is open to others (mode {stat.S_IMODE(status.st_mode):o}):"
            f" chmod 700 {folder}, or choose another with pcm.ladder.disk.path."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DiskError(
            f"The cache {str(folder)!r} cannot be written. Choose another folder with"
            " pcm.ladder.disk.path."
        )


def _worth(place: Path) -> float:
    """A blob's worth: seconds to stage it, per byte, divided by seconds since its last use."""
    try:
        n_bytes = place.stat().st_size
        used_at = place.with_suffix(".note").stat().st_mtime
    except FileNotFoundError:  # partial: evicted first, unless its lock says that it is staged
        return 0.0
    seconds = float(read_note(place).get("seconds", 0.0))
    return (_FIXED_S + seconds) / max(1, n_bytes) / max(1.0, time.time() - used_at)


def _size(path: Path) -> int:
    """Bytes that a file takes on its disk, which is less than its length if it has holes."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
