"""The host tier as one process sees it: images of its contexts, which its keeper holds open.

The keeper counts: an image is written once it has room for it. A process opens an image while it
reads it, or while the image is the only copy of a context.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from dask_pcm.ladder.objects.freeze import Frozen
from dask_pcm.ladder.objects.images import Image, NoRoomError
from dask_pcm.ladder.objects.shelf import Shelf, max_files

logger = logging.getLogger(__name__)

#: Smaller objects get no image: loading them again is as fast.
LEAST_BYTES = 1 << 16
#: After a digest: tensors as tasks have left them, without what would make the object again.
_OFFLOADED = " offloaded"
#: Before the number of what is lent; no digest begins like that.
_LENT = "lent "
#: The share of what is lent that is left beside it.
_LEFT = 0.5


class Keeper(Protocol):
    """Holds memory files open, by digest; its methods may be called on any thread."""

    def find(self, digest: str) -> str | None:
        """A path at which the file of a context can be opened; None if it is not kept."""

    def keep(
        self, digest: str, path: str, n_bytes: int, is_shared: bool, is_pinned: bool
    ) -> bool | None:
        """Keep a file, for all workers of the host if `is_shared`, otherwise for this one.

        Returns False if there is no room, None if the keeper does not answer.

        Parameters
        ----------
        is_pinned
            Whether the file stays until ``unpin``, and is of use to this process only.
        """

    def keep_loan(self, name: str, path: str, n_bytes: int) -> bool | None:
        """As ``keep``, for memory that is lent: False too if others would have to make room.

        And if other workers have the same budget: they need no loan.
        """

    def pin(self, digest: str) -> bool:
        """Keep a context's file until ``unpin``; False if it is not there any more."""

    def unpin(self, digest: str) -> None:
        """The file may make room for others again."""

    def drop(self, digest: str) -> None:
        """Keep a context's file no longer."""


class LocalKeeper:
    """A keeper in this process, for a worker without a nanny."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.find = shelf.find

    def keep(
        self, digest: str, path: str, n_bytes: int, is_shared: bool, is_pinned: bool
    ) -> bool | None:
        """See ``Keeper``."""
        return self._shelf.keep(digest, path, n_bytes, "me" if is_pinned else None)

    def keep_loan(self, name: str, path: str, n_bytes: int) -> bool | None:
        """See ``Keeper``."""
        return self._shelf.keep(name, path, n_bytes, "me", is_loan=True)

    def pin(self, digest: str) -> bool:
        """See ``Keeper``."""
        return self._shelf.pin(digest, "me")

    def unpin(self, digest: str) -> None:
        """See ``Keeper``."""
        self._shelf.unpin(digest, "me")

    def drop(self, digest: str) -> None:
        """See ``Keeper``."""
        self._shelf.drop(digest, "me")


class Host:
    """The images that this process has made or found; for any thread.

    Parameters
    ----------
    keeper
        Keeps images beyond this process. None to keep none: then contexts only leave the device.
    budget_bytes
        What they may take in this process, without a keeper.

    Attributes
    ----------
    make_room
        Gives back memory of the host that is lent; returns whether there was any.
    """

    def __init__(self, keeper: Keeper | None = None, budget_bytes: int = sys.maxsize) -> None:
        self._outlives = keeper is not None
        self._keeper: Keeper = keeper or LocalKeeper(Shelf(budget_bytes))
        self._images: dict[str, Image] = {}
        #: Which image of a context is pinned.
        self._pinned: dict[str, str] = {}
        self._changing = threading.Lock()
        self.make_room: Callable[[int], bool] | None = None

    def find(self, digest: str) -> Image | None:
        """The image of a context, open; None if it is not kept."""
        # Under the lock throughout, so that two threads do not open the same file twice.
        with self._changing:
            image = self._images.get(digest)
            if image is None or not image.is_open:
                self._images.pop(digest, None)
                path = self._keeper.find(digest)
                if path is not None:
                    try:
                        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                        self._images[digest] = Image(fd, digest)
                    except Exception as error:  # dropped, half written, or another file by now
                        logger.info("The image of %s is gone: %s", digest, error)
            return self._images.get(digest)

    def put(self, digest: str, name: str, frozen: Frozen) -> Image | None:
        """Make an image of an object that outlives this process; None if that is impossible.

        Without an image, the successor of a killed worker loads the object from staged files.
        """
        if not self._outlives or frozen.skeleton is None or frozen.n_bytes < LEAST_BYTES:
            return None
        try:
            return self._written(digest, frozen, is_pinned=False)
        except NoRoomError as error:
            if error.is_refused:
                _warn(name, frozen, str(error))
            else:  # the toolkit is being uninstalled, or the job ends
                logger.info("The nanny does not answer, so context %r is not kept", name)
        except Exception as error:  # no memory files, no memory, or a device error
            _warn(name, frozen, str(error))
        return None

    def pin(self, digest: str, storages: Sequence[Any]) -> Image:
        """An open image of storages that stays until ``unpin``.

        One that is there already is taken if it is the same to the bit.

        Raises
        ------
        NoRoomError
            If the budget has no room for it beside others that are pinned.
        OSError, MemoryError
            If the system has no memory files, or no memory left.
        """
        offloaded = digest + _OFFLOADED
        with self._changing:
            keys = [offloaded, digest] if offloaded in self._images else [digest]
        for key in keys:
            image = self.find(key)
            if image is not None and image.is_same(storages) and self._keeper.pin(key):
                self._pinned[digest] = key
                return image
        image = self._written(offloaded, Frozen(None, list(storages)), is_pinned=True)
        self._pinned[digest] = offloaded
        return image

    def unpin(self, digest: str) -> None:
        """A context has left the host tier: its image is a copy, which others may displace."""
        key = self._pinned.pop(digest, None)
        if key is not None:
            with self._changing:
                self._images[key].close()
            self._keeper.unpin(key)

    def drop(self, digest: str) -> None:
        """Drop the images of a context, here and at the keeper."""
        self._pinned.pop(digest, None)
        for key in (digest + _OFFLOADED, digest):
            with self._changing:
                image = self._images.pop(key, None)
            if image is not None:
                image.close()
            if image is not None or key == digest:
                self._keeper.drop(key)

    def lend(self, number: int, n_bytes: int) -> int | None:
        """Memory for another process, as a file that the caller closes; None if there is none.

        It is taken here, so it counts for the job of this process, however it dies. Its size is
        sealed: no process that maps it loses it.
        """
        try:
            fd = os.memfd_create("dask_pcm lent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:  # too many files
            return None
        name = f"{_LENT}{number}"
        try:
            os.ftruncate(fd, n_bytes)
            is_there = psutil.virtual_memory().available > (1 + _LEFT) * n_bytes
            is_kept = is_there and self._keeper.keep_loan(name, _path_of(fd), n_bytes)
            if is_kept:
                os.posix_fallocate(fd, 0, n_bytes)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
                return fd
            if is_kept is None:  # it does not answer, and may keep it all the same
                self._keeper.drop(name)
        except OSError as error:
            logger.info("Memory of the host cannot be lent: %s", error)
            self._keeper.drop(name)
        os.close(fd)
        return None

    def end_loan(self, number: int) -> None:
        """What was lent is not used any more."""
        self._keeper.drop(f"{_LENT}{number}")

    def _written(self, digest: str, frozen: Frozen, is_pinned: bool) -> Image:
        """Write an image, once the keeper has room, unless too many files are open already."""

        def admit(fd: int, n_bytes: int, is_on_device: bool) -> None:
            is_shared = not is_on_device and not is_pinned
            says = digest, _path_of(fd), n_bytes, is_shared, is_pinned
            is_kept = self._keeper.keep(*says)
            # Not for a copy, which is of use only once a worker dies.
            may_ask = is_kept is False and is_pinned and self.make_room is not None
            if may_ask and self.make_room is not None and self.make_room(n_bytes):
                is_kept = self._keeper.keep(*says)
            if not is_kept:
                raise NoRoomError(is_refused=is_kept is not None)

        with self._changing:
            n_open = sum(image.is_open for image in self._images.values())
        if n_open >= max_files():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        try:
            image = Image.write(frozen, digest, admit)
        except NoRoomError:
            raise
        except BaseException:
            self._keeper.drop(digest)  # half of it may be there
            raise
        with self._changing:
            self._images[digest] = image
        return image


@dataclass(frozen=True, slots=True)
class ContextImages:
    """The host tier for one context; a ``LowerTier``."""

    host: Host
    digest: str

    def pin(self, storages: Sequence[Any]) -> Image:
        """See ``Host.pin``."""
        return self.host.pin(self.digest, storages)

    def unpin(self) -> None:
        """See ``Host.unpin``."""
        self.host.unpin(self.digest)


def _path_of(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"


def _warn(name: str, frozen: Frozen, why: str) -> None:
    """Log that an object has no image."""
    logger.warning(
        "Context %r (%s bytes) is not kept on the host tier: %s. The successor of a killed worker"
        " loads it again, from its disk.",
        name,
        f"{frozen.n_bytes:,}",
        why,
    )
