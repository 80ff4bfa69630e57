"""A live object moves between the device and the host tier and keeps its identity."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from dask_pcm.context.context import Recipe
from dask_pcm.ladder.objects.freeze import Frozen, Owners, freeze, is_plain, modules_of
from dask_pcm.ladder.objects.host import ContextImages, Host
from dask_pcm.ladder.objects.images import Image

logger = logging.getLogger(__name__)


class Storages(Protocol):
    """Tensors that have left the device, on a lower tier."""

    def refill(self, storages: Sequence[Any]) -> None:
        """Allocate emptied storages again and fill them; if memory runs out, all are empty."""


class LowerTier(Protocol):
    """Where a context's tensors are while it is not on the device; a tier has its own budget."""

    def pin(self, storages: Sequence[Any]) -> Storages:
        """Copy storages, which may be emptied then; the copy stays until ``unpin``.

        Raises
        ------
        NoRoomError
            If its budget has no room.
        OSError, MemoryError
            If there is no memory.
        """

    def unpin(self) -> None:
        """The context needs the copy no longer."""


@runtime_checkable
class Lent(Protocol):
    """A lower tier whose memory may be wanted back."""

    def move(self) -> Storages | None:
        """Leave that memory, unless it is not wanted back.

        Raises as ``LowerTier.pin`` if there is no other.
        """


class Live:
    """A loader's result, with what it takes to offload and restore it.

    The store calls ``offload`` and ``restore`` from one thread at a time.

    Parameters
    ----------
    value
        The live object.
    recipe
        Its recipe, whose offload and restore hooks are used if there are any.
    apart
        The frozen object.
    lower
        The tier that it goes to from the device.
    mapped_bytes
        Bytes of its image, if its CPU tensors are mapped from that.

    Attributes
    ----------
    mapped_bytes
        What it maps; these count as this process's memory once touched.
    """

    def __init__(
        self,
        value: Any,
        recipe: Recipe,
        apart: Frozen,
        lower: LowerTier | None = None,
        mapped_bytes: int = 0,
    ) -> None:
        self.value = value
        self.mapped_bytes = mapped_bytes
        #: The frozen object, until it has been decided whether there is an image of it.
        self.apart: Frozen | None = apart if apart.skeleton is not None else None
        self._lower = lower or ContextImages(Host(), "")
        #: Its tensors on the lower tier, while they are not on the device.
        self._offloaded: Storages | None = None
        self._recipe = recipe
        has_hooks = recipe.offload is not None and recipe.restore is not None
        # Hooks free memory themselves: a reference to the storages here would keep it.
        self._n_bytes = _device_bytes(apart.storages) if has_hooks else None
        self._storages = [] if has_hooks else apart.storages
        self._owners: Owners | None = None if has_hooks else apart.owners
        if has_hooks:
            self.apart = None

    @classmethod
    def of_image(
        cls, image: Image, recipe: Recipe, is_mapped: bool, lower: LowerTier | None = None
    ) -> Live:
        """Thaw the object of an image, which is closed then."""
        is_mapped = is_mapped and not image.is_on_device
        value, storages = image.thaw(is_mapped)
        image.close()
        # A mapped object is never emptied, so it does not matter whether its parts are shared.
        owners = None if is_mapped else _owners_of(value)
        mapped_bytes = image.n_bytes if is_mapped else 0
        return cls(value, recipe, Frozen(None, storages, owners=owners), lower, mapped_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors on an accelerator; if it has none there, on the CPU."""
        return _device_bytes(self._storages) if self._n_bytes is None else self._n_bytes

    def bytes_beside(self, others: Sequence[Live]) -> int:
        """Its bytes without those that it shares with other objects."""
        if self._n_bytes is not None:
            return self._n_bytes
        theirs = {storage._cdata for other in others for storage in other._storages}
        return _device_bytes([s for s in self._storages if s._cdata not in theirs])

    @property
    def is_unchanged(self) -> bool:
        """Whether its tensors are unchanged since it was loaded, as far as torch counts writes."""
        return self._owners is None or self._owners.is_unchanged

    def offload(self) -> bool:
        """Move the object from the device to the lower tier; False if that is impossible.

        ``restore`` brings back exactly the current values, bit for bit.

        Raises
        ------
        NoRoomError, OSError, MemoryError
            If there is no memory for it. The object stays on the device, unchanged.
        """
        if self._recipe.offload is not None and self._recipe.restore is not None:
            self._replace(self._recipe.offload(self.value))
            return True
        if self.mapped_bytes:  # its bytes are in host memory already
            return True
        movable = [storage for storage in self._storages if _can_be_emptied(storage)]
        if not movable or self._owners is None or not self._owners.is_unshared:
            return False  # a task's result may refer to its tensors
        self._offloaded = self._lower.pin(self._storages)
        for storage in movable:
            storage.resize_(0)
        return True

    def restore(self) -> None:
        """Move the object back to the device."""
        if self._recipe.offload is not None and self._recipe.restore is not None:
            self._replace(self._recipe.restore(self.value))
        elif self._offloaded is not None:
            self._offloaded.refill(self._storages)
            self.leave()

    def move(self) -> None:
        """Leave memory of the lower tier that is wanted back.

        Raises
        ------
        NoRoomError, OSError, MemoryError
            If there is no memory for it elsewhere. The object is where it was.
        """
        if self._offloaded is not None and isinstance(self._lower, Lent):
            self._offloaded = self._lower.move() or self._offloaded

    def leave(self) -> None:
        """Leave the lower tier, if it is there: it is on the device again, or given up."""
        if self._offloaded is not None:
            self._offloaded = None
            self._lower.unpin()

    def _replace(self, value: Any) -> None:
        """Take over a hook's result."""
        if value is not None:  # hooks may move the object in place, or return another one
            self.value = value


def _device_bytes(storages: Sequence[Any]) -> int:
    """Bytes of the storages on an accelerator; if there are none, of all."""
    on_device = [storage for storage in storages if storage.device.type != "cpu"]
    return sum(storage.nbytes() for storage in on_device or storages)


def _can_be_emptied(storage: Any) -> bool:
    """Whether a storage's memory can be freed while its tensors live on."""
    # Shared CPU memory claims to be resizable, but resizing it fails.
    return bool(storage.resizable()) and not (storage.device.type == "cpu" and storage.is_shared())


def _owners_of(value: Any) -> Owners | None:
    """The owners of a thawed object."""
    try:
        return freeze(value).owners
    except Exception:
        return modules_of(value).owners


def frozen(value: Any, recipe: Recipe, name: str) -> Frozen:
    """Freeze a new object; if that is impossible, return the storages of its modules.

    By default, an object is frozen only if it consists of types that are known to pickle well and
    has no hooks, which suggest that it holds more than tensors. `recipe.reattach` overrides that.
    """
    has_hooks = any(hook is not None for hook in (recipe.offload, recipe.restore, recipe.close))
    may_reattach = not has_hooks and is_plain(value)
    if recipe.reattach or (recipe.reattach is None and may_reattach):
        try:
            return freeze(value)
        except Exception as error:
            logger.info("Context %r cannot be kept on the host tier: %s", name, error)
    return modules_of(value)
