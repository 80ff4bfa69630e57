"""Workers of one host: stores in this process that lend to each other over real sockets."""

from __future__ import annotations

import time
import uuid

import pytest

from dask_pcm.ladder.objects.host import Host, LocalKeeper
from dask_pcm.ladder.objects.shelf import Shelf
from dask_pcm.ladder.store import Store

MIB = 1 << 20


class Neighbours:
    """Makes workers that find each other, and no others."""

    def __init__(self):
        self.cluster = uuid.uuid4().hex
        self.stores = []

    def worker(self, device_mib=0, host_mib=0, name="", sees_devices=True, **options):
        """A worker with a device of its own, whose part CPU memory plays, and a host tier."""
        shelf = Shelf(host_mib * MIB)
        store = Store(
            host=Host(LocalKeeper(shelf)),
            budget=lambda: device_mib * MIB,
            is_mapped=False,
        )
        store.shelf = shelf
        devices = {"cpu": "cpu"} if sees_devices else {}
        store.lend(lambda: "cpu", lambda: devices, **options).open(self.cluster, name or "w")
        self.stores.append(store)
        return store


@pytest.fixture
def host():
    yield from neighbours()


def neighbours():
    """Workers that hold nothing in the end."""
    found = Neighbours()
    yield found
    for store in found.stores:
        store.validate()
        store.close()
        assert not store.lending.leases.lent_bytes()
    for store in found.stores:  # contexts that move at this moment are dropped then
        wait_for(lambda store=store: not store.lending.borrowed_bytes)


def wait_for(is_so, timeout_s=20.0):
    """Wait until something is so."""
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)
