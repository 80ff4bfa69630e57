from __future__ import annotations

import pytest

from dask_pcm.ladder.store import Store

MIB = 1 << 20


@pytest.fixture
def changes():
    return []


@pytest.fixture
def store(changes):
    """A device of 10 MiB."""
    store = Store(changes.append, budget=lambda: 10 * MIB, is_mapped=False)
    yield store
    store.validate()
