"""The disk rung: contents of files on the job's scratch, one copy a host, kept for the next job.

::

    lock                    held by whoever makes room
    blobs/<digest>          a file's content, complete and verified
    blobs/<digest>.part     what there is of one that is being staged
    blobs/<digest>.note     what staging took, and how the file was when it was last verified;
                            written when it is used
    blobs/<digest>.lock     shared by whoever uses it, held by whoever evicts it
    blobs/<digest>.staging  held by whoever stages it; of the size that it will have, without blocks
    blobs/<digest>.tree     held by whoever looks at a tree, and makes it
    trees/<digest>/<name>   a bundle as its loader sees it: links to blobs

Locks are the kernel's (flock): they end with their process, so nothing has to be taken back from
the dead. They hold on a disk of this host alone; see ``is_node_local``.

Nothing is synced: what a process wrote outlives it in the page cache. After a crash of the machine
a file may have holes, so one from an earlier boot is verified when it is first used; and so is one
that somebody has written to.
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
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from dask_pcm.context.bundles import Blob, Bundle, checked_name, digest_of
from dask_pcm.errors import DiskError
from dask_pcm.ladder.files.locks import is_held, locked
from dask_pcm.ladder.files.partial import PartialBlob, read_note, state, verified_chunks, write_note

logger = logging.getLogger(__name__)

#: Filesystems that other hosts see, too.
_SHARED = (
    *("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "9p", "afs", "pvfs", "wekafs"),
    *("gluster", "panfs", "orangefs", "sshfs", "s3fs", "juicefs", "gcsfuse", "goofys", "rclone"),
)
#: Half-written blobs that nobody has gone on with for so long are removed.
_STALE_S = 86_400.0
_AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB
#: How blobs are named.
_DIGEST = re.compile(r"[0-9a-f]{32}")
#: What it takes to begin staging anything; so small files are worth more for their bytes.
_FIXED_S = 0.1


class FileCache:
    """Blobs of this user on this host.

    Processes of one host share it; threads too.

    Parameters
    ----------
    root
        A folder of its own; made, for this user alone, if there is none.
    quota_bytes
        What all of it may take; None for as much as the disk has.

    Raises
    ------
    DiskError
        Where the folder cannot be made or written, or is open to others or theirs.
    """

    def __init__(self, root: str | os.PathLike[str], quota_bytes: int | None = None) -> None:
        self.root = Path(root)
        self._quota_bytes = quota_bytes
        self._blobs, self._trees = self.root / "blobs", self.root / "trees"
        self._room_lock = self.root / "lock"
        #: Blobs that this process is staging.
        self._fillings: dict[str, PartialBlob] = {}
        for folder in (self.root, self._blobs, self._trees):
            _make_own(folder)
        self._clean()

    def has(self, blob: Blob) -> bool:
        """Whether a blob is complete."""
        return (self._blobs / blob.digest).exists()

    # -- staging ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def filling(self, blob: Blob) -> Iterator[PartialBlob | None]:
        """Be the one that stages a blob; None where it is complete, perhaps since we waited.

        What an earlier attempt has written is kept, as far as it is verified.

        Raises
        ------
        DiskError
            Where there is no room for it, even without all that nobody uses.
        """
        if self.has(blob):  # who uses it has it locked
            yield None
            return
        place = self._blobs / blob.digest
        with locked(place.with_suffix(".staging"), fcntl.LOCK_EX) as staging:
            if self.has(blob):
                yield None
                return
            with locked(self._room_lock, fcntl.LOCK_EX):
                os.ftruncate(staging, 0)  # of somebody who was killed
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
        """The path of a bundle whose blobs are complete; until the block ends they stay.

        Raises
        ------
        FileNotFoundError
            Where a blob is not complete (any more).
        """
        with contextlib.ExitStack() as stack:
            for file in bundle.files:
                lock = self._blobs / f"{file.blob.digest}.lock"
                stack.enter_context(locked(lock, fcntl.LOCK_SH))
                self._check(file.blob)
            targets = {checked_name(f.name): self._blobs / f.blob.digest for f in bundle.files}
            tree = self._tree(bundle.digest, targets)
            yield str(tree if bundle.is_folder else tree / bundle.files[0].name)

    def _check(self, blob: Blob) -> None:
        """Note that a blob is used now; of an earlier boot, see whether it is whole."""
        place = self._blobs / blob.digest
        note, now = read_note(place), state(place)
        if note.get("state") != now:
            with place.open("rb") as file:
                if len(verified_chunks(file.fileno(), blob)) < blob.n_chunks:
                    logger.warning("%s was damaged; it is staged again", place)
                    place.unlink()
                    raise FileNotFoundError(errno.ENOENT, "damaged", str(place))
            write_note(place, {**note, "state": now})
        with contextlib.suppress(FileNotFoundError):
            os.utime(place.with_suffix(".note"))

    def check_size(self, bundle: Bundle) -> None:
        """Raise DiskError where a bundle could not even have the cache for itself."""
        if self._quota_bytes is not None and bundle.n_bytes > self._quota_bytes:
            raise DiskError(
                f"{bundle.given!r} has {bundle.n_bytes:,} bytes, more than the quota of"
                f" {self._quota_bytes:,} of the cache {str(self.root)!r} (pcm.ladder.disk.quota)."
            )

    def linked(self, bundle: Bundle) -> str:
        """A folder of links to the files of a bundle where they lie, and to nothing else."""
        targets = {checked_name(file.name): Path(file.url) for file in bundle.files}
        where = digest_of(bundle.files[0].url.encode()).hex()
        return str(self._tree(f"{bundle.digest}-{where}", targets))

    def _tree(self, name: str, targets: Mapping[str, Path]) -> Path:
        """A folder of links, as it should be: made anew where somebody has changed it."""
        tree = self._trees / name
        # One at a time: never a moment when a tree that another has been given is not there.
        with locked(self._blobs / f"{name}.tree", fcntl.LOCK_EX):
            if _links(tree) == targets:
                return tree
            making, aside = (self._trees / f".{name}-{uuid.uuid4().hex}" for _ in range(2))
            for link, target in targets.items():
                (making / link).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                (making / link).symlink_to(target)
            with contextlib.suppress(FileNotFoundError):
                tree.rename(aside)
            making.rename(tree)
        shutil.rmtree(aside, ignore_errors=True)
        return tree

    @contextlib.contextmanager
    def opened(self, digest: str, chunk: int) -> Iterator[int | None]:
        """A descriptor of a file that has a chunk at its place; None where there is none.

        Also of a blob that this process is staging at the moment.

        Raises
        ------
        DiskError
            Where `digest` is none: it comes from peers, and is joined to a path.
        """
        if not is_digest(digest):
            raise DiskError(f"{digest!r:.80} is no digest of a blob: 32 hexadecimal digits.")
        filling, descriptor = self._fillings.get(digest), None
        if filling is not None and chunk in filling.have:
            descriptor = filling.reopened()
        if descriptor is None:  # or it has been completed in this moment
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(self._blobs / digest, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    # -- room ---------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """What all blobs take, half-written ones too; of those that are being staged all."""
        return sum(_size(path) for path in self._blobs.iterdir()) + self._reserved_bytes()

    def _reserved_bytes(self) -> int:
        """What is still to be written of blobs that are being staged."""
        n_bytes = 0
        for path in self._blobs.glob("*.staging"):
            with contextlib.suppress(FileNotFoundError):  # evicted at this moment
                size = path.stat().st_size
                if size and is_held(path):
                    # One or the other, if it is completed at this moment.
                    written = _size(path.with_suffix(".part")) or _size(path.with_suffix(""))
                    n_bytes += max(0, size - written)
        return n_bytes

    def evict(self, digest: str) -> bool:
        """Remove a blob; False where somebody uses or stages it."""
        place = self._blobs / digest
        with contextlib.suppress(BlockingIOError), contextlib.ExitStack() as stack:
            for kind in (".lock", ".staging"):
                stack.enter_context(locked(place.with_suffix(kind), _AT_ONCE))
            for kind in ("", ".part", ".note", ".staging", ".lock"):
                place.with_suffix(kind).unlink(missing_ok=True)
            return True
        return False

    def _make_room(self, n_bytes: int) -> None:
        """Evict what is worth least, until `n_bytes` more fit; nothing if they never would."""
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
            self._clean_trees()

    def _lacking(self, n_bytes: int) -> int:
        lacking = n_bytes + self._reserved_bytes() - shutil.disk_usage(self.root).free
        if self._quota_bytes is not None:
            lacking = max(lacking, self.used_bytes() + n_bytes - self._quota_bytes)
        return lacking

    def _room(self) -> str:
        free = f"{shutil.disk_usage(self.root).free:,} bytes are free"
        if self._quota_bytes is None:
            return free
        return f"{free}, and {self.used_bytes():,} of its quota of {self._quota_bytes:,} are taken"

    def _clean(self) -> None:
        """Remove what processes left half-done that did not live to go on, and nobody took up."""
        with locked(self._room_lock, fcntl.LOCK_EX):
            found = list(self._blobs.iterdir())
            parts = {path.stem for path in found if path.suffix == ".part" and not _is_stale(path)}
            there = {path.stem for path in found if not path.suffix} | parts
            left = {p.stem for p in found if p.suffix in (".part", ".note", ".staging", ".lock")}
            for digest in left - there:
                self.evict(digest)
            self._clean_trees()
        for path in self._trees.glob(".*"):
            if _is_stale(path):
                shutil.rmtree(path, ignore_errors=True)

    def _clean_trees(self) -> None:
        """Remove trees of which nothing is left; whoever uses one has its files locked."""
        names = {path.stem for path in self._blobs.glob("*.tree")}
        for name in names | {path.name for path in self._trees.glob("[!.]*")}:
            tree, lock = self._trees / name, self._blobs / f"{name}.tree"
            if not _is_dangling(tree):
                continue
            with contextlib.suppress(BlockingIOError), locked(lock, _AT_ONCE):
                if _is_dangling(tree):
                    shutil.rmtree(tree, ignore_errors=True)
                    lock.unlink()


def is_digest(name: object) -> bool:
    """Whether a name is that of a blob: nothing else may be joined to the folder of blobs."""
    return isinstance(name, str) and _DIGEST.fullmatch(name) is not None


def is_node_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies on a filesystem of this host alone; where nobody can tell, it is."""
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
    """Make a folder for this user alone, or see that it is one."""
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
        raise DiskError(f"The cache {str(folder)!r} cannot be written.")


def _worth(place: Path) -> float:
    """What a blob is worth for its bytes: seconds that staging took, fading since its last use."""
    try:
        n_bytes = place.stat().st_size
        used_at = place.with_suffix(".note").stat().st_mtime
    except FileNotFoundError:  # half-written: whoever stages it has it locked
        return 0.0
    seconds = float(read_note(place).get("seconds", 0.0))
    return (_FIXED_S + seconds) / max(1, n_bytes) / max(1.0, time.time() - used_at)


def _is_stale(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _STALE_S
    except FileNotFoundError:
        return False


def _is_dangling(tree: Path) -> bool:
    """Whether a tree is not there, or no link in it leads anywhere."""
    links = [path for path in tree.rglob("*") if path.is_symlink()]
    return not (any(path.exists() for path in links) if links else tree.exists())


def _links(tree: Path) -> dict[str, Path]:
    """Where the links in a folder lead; whatever else is there, to nowhere."""
    found = {}
    for path in tree.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(tree))] = path.readlink()
        elif not path.is_dir():
            found[str(path.relative_to(tree))] = Path()
    return found


def _size(path: Path) -> int:
    """Bytes that a file takes on its disk; a half-written one has holes."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
