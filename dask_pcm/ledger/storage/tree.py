"""A folder and what is below it, accessed through descriptors such that no link is followed.

Other users may be able to write where an output is. A name is resolved folder by folder: each is
opened relative to the one above it, and not through a link. So a link that another user has put
there leads nowhere: not to a file that would be truncated, and not to a folder from which files
would be moved. FIFOs and devices are never opened. Folders below the root are trusted only if they
belong to the user who drives the run, to the user of this process, or to root. Other users can put
files into those only if their owner permits it.

Calls that link or rename a file also resolve the last folder of its name. So they fail if that
folder has been renamed in the meantime, which is how a run is fenced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO

from dask_pcm.errors import OutputError

# O_PATH: a folder is only a starting point, so no permission to list it is needed.
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
# O_NONBLOCK: a FIFO that replaces a file after the check of its type must not block the open.
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder. Names are relative to it, with ``/`` between folders.

    Attributes
    ----------
    root
        Its path. The user has named it, so it may be a link, and may belong to any user.
    is_guarded
        Whether folders of other users are refused. Those who only read an output may read any.
    owner
        Id of a user whose folders are trusted, besides root and the user of this process.
    """

    root: str
    is_guarded: bool = True
    owner: int = field(default_factory=os.geteuid)

    # -- folders ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def folder(self, name: str = "", is_made: bool = False) -> Iterator[int]:
        """Open a folder and yield its descriptor; with `is_made`, make it and those above it.

        Raises
        ------
        FileNotFoundError
            If there is none.
        OutputError
            If it, or a folder above it, is a link or a file, or belongs to another user.
        """
        descriptor = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        try:
            walked = ""
            for part in filter(None, name.split("/")):
                walked = f"{walked}/{part}".lstrip("/")
                if is_made:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                # One level at a time, as O_NOFOLLOW applies to the last component of a path only.
                above, descriptor = descriptor, _step(self, descriptor, part, walked)
                os.close(above)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _above(self, name: str) -> Iterator[tuple[int, str]]:
        """Open the folder that a name is in; yield its descriptor, and the name within it."""
        above, _, own = name.rpartition("/")
        with self.folder(above) as descriptor:
            yield descriptor, own

    def make_folder(self, name: str) -> None:
        """Make a folder and those above it, unless they exist."""
        with self.folder(name, is_made=True):
            pass

    def entries(self, name: str = "") -> Iterator[tuple[str, os.stat_result]]:
        """Names in a folder with their status; links are not followed."""
        with self.folder(name) as above:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=above)
        try:
            with os.scandir(descriptor) as found:
                for entry in found:
                    # A file may be removed between the listing and its status.
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.name, entry.stat(follow_symlinks=False)
        finally:
            os.close(descriptor)

    # -- files ------------------------------------------------------------------------------

    def open(self, name: str, flags: int) -> int:
        """Open a file and return its descriptor; with ``O_CREAT`` the file may be new.

        Raises
        ------
        OutputError
            If it is not a regular file.
        """
        with self._above(name) as (above, own):
            # Checked before it is opened, as opening a device can have effects; and again after,
            # as the name may have been given to something else between the two.
            with contextlib.suppress(FileNotFoundError):
                _check_is_file(self.root, name, os.stat(own, dir_fd=above, follow_symlinks=False))
            try:
                descriptor = os.open(own, flags | _SAFE, 0o666, dir_fd=above)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise _wrong(self.root, name, stat.S_IFLNK, "file") from None
        try:
            _check_is_file(self.root, name, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def reader(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return os.fdopen(self.open(name, os.O_RDONLY), "rb")

    def creator(self, name: str) -> BinaryIO:
        """Create a file and open it for writing; FileExistsError if it exists."""
        return os.fdopen(self.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")

    def status(self, name: str) -> os.stat_result:
        """Status of a file or folder, links not followed; FileNotFoundError if there is none."""
        with self._above(name) as (above, own):
            return os.stat(own, dir_fd=above, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name."""
        try:
            self.status(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def rename(self, name: str, target: str) -> None:
        """Rename a file or folder, and replace a file that has the new name."""
        with self._source(name) as (above, own), self._above(target) as (into, new):
            os.rename(own, new, src_dir_fd=above, dst_dir_fd=into)

    def link(self, name: str, target: str) -> None:
        """Give a file a second name; FileExistsError if that is taken."""
        with self._source(name) as (above, own), self._above(target) as (into, new):
            os.link(own, new, src_dir_fd=above, dst_dir_fd=into, follow_symlinks=False)

    @contextlib.contextmanager
    def _source(self, name: str) -> Iterator[tuple[int, str]]:
        """As `_above`, but one level higher: the system call resolves the last folder itself."""
        # A descriptor of the run directory would stay valid after its rename, and a link from it
        # would succeed. By name, the lookup and the link are one call, which fails once it is
        # renamed.
        parts = name.split("/")
        n_above = len(parts) - (2 if len(parts) > 2 else 1)
        with self.folder("/".join(parts[:n_above])) as descriptor:
            yield descriptor, "/".join(parts[n_above:])

    def touch(self, name: str) -> None:
        """Set the times of a file to now."""
        with self._above(name) as (above, own):
            os.utime(own, dir_fd=above, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content; do nothing if there is none."""
        with contextlib.suppress(FileNotFoundError), self._above(name) as (above, own):
            if stat.S_ISDIR(os.stat(own, dir_fd=above, follow_symlinks=False).st_mode):
                shutil.rmtree(own, ignore_errors=True, dir_fd=above)
            else:
                os.unlink(own, dir_fd=above)

    def sync_folder(self, name: str = "") -> None:
        """Sync a folder, so that its names survive a loss of power."""
        with self.folder(name) as above:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=above)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_below(tree: Tree, name: str) -> None:
    """Check all that is below a folder.

    Raises
    ------
    OutputError
        If something is neither a file nor a folder, or belongs to another user.
    """
    with contextlib.suppress(FileNotFoundError):
        for own, status in tree.entries(name):
            below = f"{name}/{own}"
            if stat.S_ISDIR(status.st_mode):
                check_below(tree, below)
            elif not stat.S_ISREG(status.st_mode):
                raise _wrong(tree.root, below, status.st_mode, "file")
            _check_owner(tree, below, status.st_uid)


def _step(tree: Tree, above: int, part: str, name: str) -> int:
    try:
        descriptor = os.open(part, _FOLDER, dir_fd=above)
    except NotADirectoryError:
        raise _wrong(tree.root, name, os.lstat(part, dir_fd=above).st_mode, "folder") from None
    try:
        _check_owner(tree, name, os.fstat(descriptor).st_uid)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_owner(tree: Tree, name: str, uid: int) -> None:
    if not tree.is_guarded or uid in (0, tree.owner, os.geteuid()) or uid == _uid_in(tree.root):
        return
    raise OutputError(
        f"{name!r} in {tree.root!r} belongs to {_user(uid)}, and this process runs as"
        f" {_user(os.geteuid())}. Files of other users are not trusted. If you do trust them,"
        f" copy {tree.root!r} (cp -r) and resume in the copy, or have root change the owner"
        " (chown -R); otherwise give another folder."
    )


def _check_is_file(root: str, name: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _wrong(root, name, status.st_mode, "file")


def _wrong(root: str, name: str, mode: int, expected: str) -> OutputError:
    found = _KINDS.get(stat.S_IFMT(mode), "of another kind")
    return OutputError(
        f"{name!r} in {root!r} is {found}, where a {expected} was expected. It is not"
        " used; find out who put it there, and remove it."
    )


@lru_cache(maxsize=16)
def _uid_in(root: str) -> int | None:
    """The owner that a filesystem reports for a file that this process creates; None if it cannot.

    Some filesystems have no owners, or map them: there, our own files appear as another user's.
    """
    probe = os.path.join(root, f".pcm-{uuid.uuid4().hex}")
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o600)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        os.unlink(probe)


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
