"""From the highest rung that has it to the device: what happens when a context is wanted."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import Any

from dask_pcm.context.context import ContextRef, Recipe
from dask_pcm.context.sealed import Sealed
from dask_pcm.ladder.device import built_for_cpu, check_device
from dask_pcm.ladder.files.staging import Staging
from dask_pcm.ladder.objects.images import Host
from dask_pcm.ladder.objects.live import Live, frozen

logger = logging.getLogger(__name__)


class Builder:
    """Brings live objects to the device.

    Parameters
    ----------
    staging
        What brings files of recipes to this host.
    host
        The host rung.
    is_mapped
        Whether tensors on the CPU use the memory of their image: there is then one copy of them on
        a host. Not where the CPU stands in for a device with memory of its own.
    is_cpu_only
        Whether all is built for the CPU, whatever devices the process was given.
    """

    def __init__(self, staging: Staging, host: Host, is_mapped: bool, is_cpu_only: bool) -> None:
        self._staging = staging
        self._host = host
        self._is_mapped = is_mapped
        self._is_cpu_only = is_cpu_only
        #: Seconds in which files came here, by the digest of what was built last.
        self.staged_s: dict[str, float] = {}

    def found(self, ref: ContextRef, files: ExitStack) -> Live | None:
        """What the host rung has of it, on the device; None where it has nothing of use.

        Parameters
        ----------
        files
            Takes up what keeps the staged files where they are.
        """
        recipe = recipe_of(ref)
        image = None if recipe.reattach is False else self._host.find(ref.digest)
        if image is None or (self._is_cpu_only and image.is_on_device):
            return None
        try:
            # The object may read on in its files.
            files.enter_context(self._staging.placed(ref.bundles))
            return Live.of_image(image, recipe, self._is_mapped)
        except Exception as error:
            logger.warning("Context %r is loaded anew: %r", ref.name, error)
            files.close()
            self._host.drop(ref.digest)
            return None

    def built(self, ref: ContextRef, files: ExitStack) -> Live:
        """What the loader makes of its files, as ``found``.

        Raises
        ------
        BaseException
            Whatever the loader raises; ``StageError``, ``DiskError``, ``RecipeError``; and
            ``DeviceUnusableError`` of what was to take memory on a device.
        """
        recipe = recipe_of(ref)
        start = time.monotonic()
        placed = files.enter_context(self._staging.placed(ref.bundles))
        self.staged_s = {ref.digest: time.monotonic() - start}
        with built_for_cpu(self._is_cpu_only):
            value = self._checked(ref, recipe.build(placed))
        apart = frozen(value, recipe, ref.name)
        live = Live(value, recipe, apart)
        if not self._is_mapped or apart.is_on_device:
            return live  # its image is made while it is in use already
        live.apart = None  # it has an image now, or can have none
        if apart.skeleton is None:
            return live
        # Another worker of this host may have built it at the same time: one copy will do.
        image = self._host.find(ref.digest) or self._host.put(ref.digest, ref.name, apart)
        if image is None:
            return live
        try:
            return Live.of_image(image, recipe, is_mapped=True)
        except Exception as error:
            logger.warning("Context %r cannot outlive its process: %r", ref.name, error)
            self._host.drop(ref.digest)
            return live

    def _checked(self, ref: ContextRef, value: Any) -> Any:
        if ref.device_memory_bytes:
            try:
                # Its loader may have taken the CPU unasked: nobody else is to find that either.
                check_device()
            except BaseException:
                close(ref, value)
                raise
        return value

    def keep(self, ref: ContextRef, live: Live) -> None:
        """Have a device's object outlive its process, unless it does."""
        apart, live.apart = live.apart, None
        if live.image is None and apart is not None:
            live.image = self._host.put(ref.digest, ref.name, apart)
            if not live.is_unchanged:  # by a task: others are to find it as it was loaded
                logger.info("Context %r is changed by its tasks: it is not kept", ref.name)
                self._host.drop(ref.digest)
                live.image = None


def close(ref: ContextRef, value: Any) -> None:
    """Call its close hook, if it has one."""
    if (hook := recipe_of(ref).close) is not None:
        try:
            hook(value)
        except Exception:
            logger.warning("close hook of context %r failed", ref.name, exc_info=True)


def recipe_of(ref: ContextRef) -> Recipe:
    """What a worker builds it from."""
    recipe: Recipe = Sealed(ref.digest, ref.recipe).open()
    return recipe
