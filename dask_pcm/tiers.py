"""Where a context is in a worker: one vocabulary for ladder, wire, gate and displays."""

from __future__ import annotations

import enum


class Tier(enum.StrEnum):
    """Where a context is in a worker, or that it is on its way."""

    #: On no tier.
    ABSENT = "absent"
    #: On its way to the device: staged, built or restored.
    LOADING = "loading"
    DEVICE = "device"
    HOST = "host"
    #: It could not be loaded.
    FAILED = "failed"


#: Tiers of contexts that take room on the device.
ON_DEVICE = (Tier.DEVICE, Tier.LOADING)
