"""A folder and what is below it, opened by descriptors: no link is followed.

Others may be able to write where an output lies. A name is walked folder by folder, each opened
below the one before and not through a link, so nothing that somebody has put there leads elsewhere:
to a file that would be truncated, or to a folder whose files would be moved. A FIFO or a device is
never opened. Folders below are trusted only if they belong to the user who drives the run, to the
user of this process, or to root: others can put something into those only if they were let.

What makes a link or renames a file looks the file's last folder up in the same call. So it fails
where that folder has been renamed meanwhile, which is how a run is shut out.
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

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
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
    """A folder; names are relative to it, and their folders are separated by ``/``.

    Attributes
    ----------
    root
        Its path. It is the user's own word, so it may be a link, and anybody's.
    is_guarded
        Whether folders of others are refused; who only looks may look at anybody's.
    owner
        The user by whom, besides this process's and root, folders may have been made.
    """

    root: str
    is_guarded: bool = True
    owner: int = field(default_factory=os.geteuid)

    # -- folders ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def folder(self, name: str = "", is_made: bool = False) -> Iterator[int]:
        """A descriptor of a folder, for the calls that take one; made if it `is_made`.

        Raises
        ------
        FileNotFoundError
            Where there is none.
        OutputError
            Where it, or one on the way to it, is a link, a file or somebody else's.
        """
        descriptor = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        try:
            walked = ""
            for part in filter(None, name.split("/")):
                walked = f"{walked}/{part}".lstrip("/")
                if is_made:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                above, descriptor = descriptor, _step(self, descriptor, part, walked)
                os.close(above)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _above(self, name: str) -> Iterator[tuple[int, str]]:
        """The folder that a name is in, and the name within it."""
        above, _, own = name.rpartition("/")
        with self.folder(above) as descriptor:
            yield descriptor, own

    def make_folder(self, name: str) -> None:
        """Make a folder and those above it, unless they are there."""
        with self.folder(name, is_made=True):
            pass

    def entries(self, name: str = "") -> Iterator[tuple[str, os.stat_result]]:
        """What is in a folder: names, and what they are; links as links."""
        with self.folder(name) as above:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=above)
        try:
            with os.scandir(descriptor) as found:
                for entry in found:
                    with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                        yield entry.name, entry.stat(follow_symlinks=False)
        finally:
            os.close(descriptor)

    # -- files ------------------------------------------------------------------------------

    def open(self, name: str, flags: int) -> int:
        """Open a file; with ``O_CREAT`` it may be a new one.

        Raises
        ------
        OutputError
            Where it is no file.
        """
        with self._above(name) as (above, own):
            with contextlib.suppress(FileNotFoundError):  # first: opening may do something
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
        return os.fdopen(self.open(name, os.O_RDONLY), "rb")

    def creator(self, name: str) -> BinaryIO:
        """A new file; FileExistsError if it is there."""
        return os.fdopen(self.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")

    def status(self, name: str) -> os.stat_result:
        """What a name is; FileNotFoundError where there is none."""
        with self._above(name) as (above, own):
            return os.stat(own, dir_fd=above, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        try:
            self.status(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def rename(self, name: str, target: str) -> None:
        """Give a file or folder another name, in place of whatever file has that."""
        with self._source(name) as (above, own), self._above(target) as (into, new):
            os.rename(own, new, src_dir_fd=above, dst_dir_fd=into)

    def link(self, name: str, target: str) -> None:
        """Give a file another name as well; FileExistsError where that is taken."""
        with self._source(name) as (above, own), self._above(target) as (into, new):
            os.link(own, new, src_dir_fd=above, dst_dir_fd=into, follow_symlinks=False)

    @contextlib.contextmanager
    def _source(self, name: str) -> Iterator[tuple[int, str]]:
        """As `_above`, but the last folder of a name is left to the call that is given it."""
        parts = name.split("/")
        n_above = len(parts) - (2 if len(parts) > 2 else 1)
        with self.folder("/".join(parts[:n_above])) as descriptor:
            yield descriptor, "/".join(parts[n_above:])

    def touch(self, name: str) -> None:
        """Have a file written now."""
        with self._above(name) as (above, own):
            os.utime(own, dir_fd=above, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing if there is none."""
        with contextlib.suppress(FileNotFoundError), self._above(name) as (above, own):
            if stat.S_ISDIR(os.stat(own, dir_fd=above, follow_symlinks=False).st_mode):
                shutil.rmtree(own, ignore_errors=True, dir_fd=above)
            else:
                os.unlink(own, dir_fd=above)

    def sync_folder(self, name: str = "") -> None:
        """Have the names in a folder survive a loss of power."""
        with self.folder(name) as above:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=above)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_below(tree: Tree, name: str) -> None:
    """Look at all that is below a folder.

    Raises
    ------
    OutputError
        Where something is no file and no folder, or is somebody else's.
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
        f" {_user(os.geteuid())}. What another user has put there is not trusted. If you do"
        f" trust it, copy {tree.root!r} (cp -r) and go on in the copy, or have root change its"
        " owner (chown -R); otherwise give another folder."
    )


def _check_is_file(root: str, name: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _wrong(root, name, status.st_mode, "file")


def _wrong(root: str, name: str, mode: int, expected: str) -> OutputError:
    found = _KINDS.get(stat.S_IFMT(mode), "of another kind")
    return OutputError(
        f"{name!r} in {root!r} is {found}, where a {expected} was expected. It is not"
        " used; see who put it there, and remove it."
    )


@lru_cache(maxsize=16)
def _uid_in(root: str) -> int | None:
    """To whom a file belongs that this process makes there: some filesystems say another user."""
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
