"""A live object, and how it goes down a rung and up again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dask_pcm.context.context import Recipe
from dask_pcm.ladder.objects.freeze import Frozen, Owners, freeze, is_plain, modules_of
from dask_pcm.ladder.objects.images import Image

logger = logging.getLogger(__name__)


class Live:
    """What a loader returned.

    Parameters
    ----------
    value
        The live object.
    recipe
        Whose hooks it goes by, if there are any.
    apart
        What it was taken apart to.
    image
        What the host rung has of it, storages in the same order.
    is_mapped
        Whether tensors on the CPU use the image's own memory.
    """

    def __init__(
        self,
        value: Any,
        recipe: Recipe,
        apart: Frozen,
        image: Image | None = None,
        is_mapped: bool = False,
    ) -> None:
        self.value = value
        self.image = image
        #: Until there is an image of it.
        self.apart: Frozen | None = apart if image is None else None
        self._recipe = recipe
        has_hooks = recipe.offload is not None and recipe.restore is not None
        # Hooks see to their own: nothing here may hold on to what they let go of.
        self._n_bytes = _device_bytes(apart.storages) if has_hooks else None
        self._storages = [] if has_hooks else apart.storages
        self._owners: Owners | None = None if has_hooks else apart.owners
        if has_hooks:
            self.apart = None
        self._is_mapped = is_mapped

    @classmethod
    def of_image(cls, image: Image, recipe: Recipe, is_mapped: bool) -> Live:
        """The object that an image was made of."""
        is_mapped = is_mapped and not image.is_on_device
        value, storages = image.thaw(is_mapped)
        # Mapped, it never leaves its place: it does not matter who has a part of it.
        owners = None if is_mapped else _owners_of(value)
        return cls(value, recipe, Frozen(None, storages, owners=owners), image, is_mapped)

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors on an accelerator; where there are none, on the CPU."""
        return _device_bytes(self._storages) if self._n_bytes is None else self._n_bytes

    def bytes_beside(self, others: Sequence[Live]) -> int:
        """Those of its bytes that are not those of other objects as well."""
        if self._n_bytes is not None:
            return self._n_bytes
        theirs = {storage._cdata for other in others for storage in other._storages}
        return _device_bytes([s for s in self._storages if s._cdata not in theirs])

    @property
    def is_unchanged(self) -> bool:
        """Whether its tensors are as they were when it came, as far as torch tells."""
        return self._owners is None or self._owners.is_unchanged

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the image's memory that it uses; they count as this process's once touched."""
        return self.image.n_bytes if self._is_mapped and self.image is not None else 0

    def offload(self) -> bool:
        """Leave the device for the host's memory; False where there is no way to.

        What the object holds at this moment is what it will hold again, to the bit.

        Raises
        ------
        OSError, MemoryError
            Where the host has no room. The object stays as it was.
        """
        if self._recipe.offload is not None and self._recipe.restore is not None:
            self._replace(self._recipe.offload(self.value))
            return True
        if self._is_mapped:  # it has been there all the time
            return True
        movable = [storage for storage in self._storages if _can_be_emptied(storage)]
        if not movable or self._owners is None or not self._owners.is_unshared:
            return False  # what a task has returned may be a part of it
        if self.image is None or not self.image.is_same(self._storages):
            self.image = Image.of_storages(self._storages)
        for storage in movable:
            storage.resize_(0)
        return True

    def restore(self) -> None:
        """Be on the device again."""
        if self._recipe.offload is not None and self._recipe.restore is not None:
            self._replace(self._recipe.restore(self.value))
        elif not self._is_mapped:
            assert self.image is not None
            self.image.refill(self._storages)

    def _replace(self, value: Any) -> None:
        if value is not None:  # some hooks move in place, some return what they have moved
            self.value = value


def _device_bytes(storages: Sequence[Any]) -> int:
    on_device = [storage for storage in storages if storage.device.type != "cpu"]
    return sum(storage.nbytes() for storage in on_device or storages)


def _can_be_emptied(storage: Any) -> bool:
    # Memory that processes share says that it can be resized, and cannot.
    return bool(storage.resizable()) and not (storage.device.type == "cpu" and storage.is_shared())


def _owners_of(value: Any) -> Owners | None:
    try:
        return freeze(value).owners
    except Exception:
        return modules_of(value).owners


def frozen(value: Any, recipe: Recipe, name: str) -> Frozen:
    """An object taken apart; where it cannot be, the storages of its modules.

    What has hooks of its own holds more than tensors, and is left alone; and so is what pickle
    might not do justice to.
    """
    has_hooks = any(hook is not None for hook in (recipe.offload, recipe.restore, recipe.close))
    may_reattach = not has_hooks and is_plain(value)
    if recipe.reattach or (recipe.reattach is None and may_reattach):
        try:
            return freeze(value)
        except Exception as error:
            logger.info("Context %r cannot outlive its process: %s", name, error)
    return modules_of(value)
