"""How a live object is built: reattached from the host tier, or else made by its loader."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from dask_pcm.context.context import ContextRef, Recipe
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import DeviceUnusableError, redacted
from dask_pcm.ladder.device import built_for_cpu, check_device
from dask_pcm.ladder.files.staging import Staging
from dask_pcm.ladder.objects.host import ContextImages, Host
from dask_pcm.ladder.objects.live import Live, LowerTier, frozen

logger = logging.getLogger(__name__)


class Builder:
    """Builds live objects on the device.

    Methods may be called from any thread; the store makes sure that one thread builds a context.

    Parameters
    ----------
    staging
        Stages the files of recipes on this host's disk.
    host
        The host tier.
    is_mapped
        Whether CPU tensors are mapped from their image, so that a host holds one copy of them.
        False where CPU memory plays the device's part and is budgeted as such.
    is_cpu_only
        Whether everything is built for the CPU, even if the process was given a device.

    Attributes
    ----------
    lower
        Makes the tier that a context goes to from the device.
    """

    def __init__(self, staging: Staging, host: Host, is_mapped: bool, is_cpu_only: bool) -> None:
        self._staging = staging
        self._host = host
        self._is_mapped = is_mapped
        self._is_cpu_only = is_cpu_only
        self.lower: Callable[[str], LowerTier] = functools.partial(ContextImages, host)
        #: Seconds that staging took, by the digest of the context that was built last.
        self.staged_s: dict[str, float] = {}

    def found(self, ref: ContextRef, files: ExitStack) -> Live | None:
        """Reattach a context from the host tier; None if there is no usable image of it.

        An image that cannot be reattached is dropped.

        Parameters
        ----------
        files
            Receives the locks that keep the staged files on disk.
        """
        recipe = recipe_of(ref)
        image = None if recipe.reattach is False else self._host.find(ref.digest)
        if image is None or (self._is_cpu_only and image.is_on_device):
            return None
        try:
            # The object may go on reading its files, for instance memory-mapped weights.
            files.enter_context(self._staging.placed(ref.bundles))
            return Live.of_image(image, recipe, self._is_mapped, self.lower(ref.digest))
        except Exception as error:
            logger.warning(
                "Context %r cannot be reattached from the host tier, so it is loaded anew: %r",
                ref.name,
                error,
            )
            files.close()
            self._host.drop(ref.digest)
            return None

    def built(self, ref: ContextRef, files: ExitStack) -> Live:
        """Stage the files of a context and call its loader; `files` as for ``found``.

        Raises
        ------
        StageError, DiskError, RecipeError
            If the files cannot be staged or the recipe cannot be opened.
        DeviceUnusableError
            If the context declares device memory and torch cannot use the device.
        BaseException
            Anything that the loader raises.
        """
        recipe = recipe_of(ref)
        start = time.monotonic()
        placed = files.enter_context(self._staging.placed(ref.bundles))
        self.staged_s = {ref.digest: time.monotonic() - start}
        with built_for_cpu(self._is_cpu_only):
            value = self._checked(ref, recipe.build(placed))
        apart = frozen(value, recipe, ref.name)
        live = Live(value, recipe, apart, self.lower(ref.digest))
        if not self._is_mapped or apart.is_on_device:
            return live  # `keep` makes its image later, while tasks use it
        live.apart = None  # nothing is left for `keep` to do
        if apart.skeleton is None:
            return live
        # Another worker of this host may have built it at the same time: share its copy.
        image = self._host.find(ref.digest) or self._host.put(ref.digest, ref.name, apart)
        if image is None:
            return live
        try:
            return Live.of_image(image, recipe, is_mapped=True, lower=self.lower(ref.digest))
        except Exception as error:
            logger.warning("Context %r cannot be kept on the host tier: %r", ref.name, error)
            self._host.drop(ref.digest)
            return live

    def _checked(self, ref: ContextRef, value: Any) -> Any:
        """Return `value`, or close it and raise if the device that it was to use is unusable."""
        if ref.device_memory_bytes:
            try:
                # The loader may have fallen back to the CPU silently: closed here, before any
                # task or the host tier gets an object that is slow for no visible reason.
                check_device()
            except BaseException:
                close(ref, value)
                raise
        return value

    def keep(self, ref: ContextRef, live: Live) -> None:
        """Copy the object to the host tier, where it survives this process; once per object."""
        apart, live.apart = live.apart, None
        image = None if apart is None else self._host.put(ref.digest, ref.name, apart)
        if image is None:
            return
        image.close()  # the keeper has it
        # Checked after the copy: a task may have changed a tensor while it was copied, and
        # other processes must find the context as it was loaded.
        if not live.is_unchanged:
            logger.info("Context %r is changed by its tasks, so it is not kept", ref.name)
            self._host.drop(ref.digest)


def close(ref: ContextRef, value: Any) -> None:
    """Call the context's close hook, if it has one; an exception is logged, not raised."""
    if (hook := recipe_of(ref).close) is not None:
        try:
            hook(value)
        except Exception:
            logger.warning("The close hook of context %r failed", ref.name, exc_info=True)


def recipe_of(ref: ContextRef) -> Recipe:
    """Open the recipe that a ref carries."""
    recipe: Recipe = Sealed(ref.digest, ref.recipe).open()
    return recipe


def failure_text(ref: ContextRef, cause: BaseException) -> str:
    """The message of a failed load: the context's name and the traceback, without secrets."""
    text = redacted("".join(traceback.format_exception(cause)).rstrip())
    return f"Context {ref.name!r} could not be loaded:\n\n{text}"


def failure_kind(cause: BaseException | None) -> str:
    """The type of a failure, for attribution: "device" blames the node rather than the context."""
    if isinstance(cause, DeviceUnusableError):
        return "device"
    return "" if cause is None else type(cause).__name__
