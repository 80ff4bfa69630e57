"""What all tests of plugins have in common."""

from __future__ import annotations

import dask
import pytest


@pytest.fixture(autouse=True)
def fork_servers_import_little(request):
    """Each cluster has a fork server of its own, and transformers takes it seconds to import."""
    if request.path.name == "test_rebirth.py":  # it is about what is imported
        yield
        return
    with dask.config.set({"pcm.worker.imports": []}):
        yield
